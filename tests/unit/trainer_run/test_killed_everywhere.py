"""A job with every stage, whose head is killed after every single thing that it has done: each is done once, by whichever attempt.

Ray Tune is played: trials run one after the other in this process. tests/integration/trainer kills real processes, less often.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.in_process import Finished, KilledError, run_job
from tests.tiny_llama import make_tiny_llama, teach_tiny_llama, write_questions
from tests.unit.trainer_run.test_whole_loop import a_job

from finetune_api.v1alpha1 import FineTuneJob
from finetune_trainer import answering, loop, preparing, run, search
from finetune_trainer.made_data.writer import Desk
from finetune_trainer.trial_run import run_trial
from finetune_trainer.trials import Trials

RULE = "Late tools cost 2 euros a day."
POINT = "Late tools cost 2 euros"
OUTPUTS = [f"Tool {number} costs 2 euros." for number in range(3)]
ATTEMPTS_MAX = 40


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    claim = tmp_path / "claims" / "data"
    told = [{"prompt": f"[1] {RULE}\n{output}\nPoints:\n", "completion": f"- {POINT}"} for output in OUTPUTS]
    teach_tiny_llama(make_tiny_llama(claim / "model"), told, steps=80)
    (claim / "handbook.txt").write_text(RULE)
    (claim / "golden.jsonl").write_text("".join(json.dumps({"text": output}) + "\n" for output in OUTPUTS))
    write_questions(claim / "train.jsonl", 21)
    write_questions(claim / "validation.jsonl", 6, start=100)
    (tmp_path / "claims" / "job").mkdir()
    return tmp_path


def whole_job() -> FineTuneJob:
    points = {
        "knowledgeBase": {"source": "pvc://data/handbook.txt"},
        "goldenOutputs": {"source": "pvc://data/golden.jsonl"},
        "instruction": "{passages}\n{output}\nPoints:\n",
        "prompt": "{points}\n",
        "maxNewTokens": 40,
    }
    data: dict[str, Any] = {part: {"source": f"pvc://data/{part}.jsonl"} for part in ("train", "validation")}
    suite = {"name": "task", "source": "validation", "metrics": ["tokenAccuracy", "exactMatch"], "maxNewTokens": 4}
    prompts = [{"name": "plain"}, {"name": "told", "system": "A word."}, {"name": "shown", "examples": 1}]
    goal = {"metric": "task/tokenAccuracy", "mode": "max"}
    parameters = {"training.learningRate": {"choice": [1e-8, 1e-2]}}
    return a_job(
        "job",
        data={**data, "preparation": {"contentPoints": points}},
        training={"epochs": 2, "globalBatchSize": 6, "maxSequenceLength": 96, "precision": "float32", "packing": False},
        checkpoint={"everySteps": 3, "keep": 2},
        evaluation={"suites": [suite], "gates": [{"metric": "task/tokenAccuracy", "atLeast": 0.0}]},
        baseline={"prompts": prompts, "metric": "task/tokenAccuracy"},
        search={"parameters": parameters, "trials": 2, "algorithm": "grid", "goal": goal, "epochs": 1},
    )


class Deaths:
    """Kills the process after things that are done for the first time, and counts what is done."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self.at: list[str] = []
        """What it was killed after, in order."""
        self.done: Counter[str] = Counter()

    def after(self, owner: Any, name: str, key_of: Callable[..., str | None]) -> None:
        """Be killed after the calls of a function that `key_of` names; each name kills once."""
        call = getattr(owner, name)

        def called(*given: Any, **named: Any) -> Any:
            key = key_of(*given, **named)
            found = call(*given, **named)
            if key is not None:
                self.done[key] += 1
                if key not in self.at:
                    self.at.append(key)
                    raise KilledError
            return found

        self._patch.setattr(owner, name, called)


def run_trials(self: search.Search, searching: Any, _: int, __: str, tell: Callable[[Any], None]) -> None:
    """In Ray Tune's place."""
    trials = search.NextTrial(self, 42, lambda: tell(self.summary()), None)
    while isinstance(asked := trials.suggest("trial"), dict):
        trials.on_trial_complete("trial", run_trial(asked["number"], asked["values"], searching))


def test_each_thing_is_done_once_whenever_the_head_is_killed(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, deaths, answers = whole_job(), Deaths(monkeypatch), Counter[str]()
    monkeypatch.setattr(search.Search, "_fit", run_trials)
    answer = answering._Suite._answered

    def answered(self: answering._Suite, cases: Any) -> Any:
        answers.update(f"{self._candidate} {case.id}" for case in cases)
        return answer(self, cases)

    monkeypatch.setattr(answering._Suite, "_answered", answered)
    deaths.after(answering._Suite, "_complete", lambda self, _: f"answers {self._candidate}")
    deaths.after(Desk, "_keep", lambda _, texts: "texts" if texts else None)
    deaths.after(preparing, "_tell", lambda *_: "prepared")
    deaths.after(Trials, "changed", lambda _, number, **changes: f"trial {number}" if "value" in changes else None)
    deaths.after(loop, "write_result", lambda storage, *_: f"trained {'/'.join(storage.root.split('/')[-2:])}")
    deaths.after(run, "publish_report", lambda *_: "report")
    deaths.after(run, "publish", lambda *_: "published")

    done: Finished | None = None
    for attempt in range(1, ATTEMPTS_MAX):
        try:
            done = run_job(job, inputs, monkeypatch, attempt=attempt)
            break
        except KilledError:
            continue
    assert done is not None
    assert [artifact.kind for artifact in done.report.artifacts] == ["adapter"]
    assert deaths.at == [
        "answers generator",
        "texts",
        "prepared",
        "answers baseline",
        "answers prompt-told",
        "answers prompt-shown",
        "trained trials/1",
        "answers trial-1-step-4",
        "trial 1",
        "trained trials/2",
        "answers trial-2-step-4",
        "trial 2",
        "trained .finetune/job",
        "answers step-8",
        "report",
        "published",
    ]
    assert set(answers.values()) == {1}  # nobody was asked anything twice
    assert {key: number for key, number in deaths.done.items() if number > 1}.keys() <= {"texts", "prepared", "report", "published"}
    assert deaths.done["texts"] == 1
    assert done.report.search is not None
    assert (done.report.search.completed, done.report.search.failed) == (2, 0)
    assert [entry.prompt for entry in done.report.baseline] == ["plain", "told", "shown"]
    assert done.report.data is not None
    assert done.report.data.made == 3
