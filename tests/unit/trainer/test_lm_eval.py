"""Tasks of lm-eval on the model in examples/models, from data on this machine, against the harness's own way of asking a model."""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from lm_eval import evaluator
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel
from tiny_models import job_manifest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from tuned import shake

from finetune_api.evaluation import Suite
from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import parse_job
from finetune_trainer.data.examples import Examples
from finetune_trainer.errors import JobError
from finetune_trainer.evaluation.answered import Answered
from finetune_trainer.evaluation.harness_model import HarnessModel, Scored, labelled, until
from finetune_trainer.evaluation.lm_eval import (
    Candidate,
    TaskResult,
    answer_tasks,
    check_tasks,
    measured_tasks,
    read_results,
    task_results,
)
from finetune_trainer.generation import Speaker, Voice
from finetune_trainer.methods import method_for
from finetune_trainer.methods.method import BaseModel
from finetune_trainer.model import load_model, load_tokenizer
from finetune_trainer.model_files import ModelFiles
from finetune_trainer.storage import Storage
from finetune_trainer.worker import Worker

MODEL = Path(__file__).parents[3] / "examples" / "models" / "tiny-llama"
WHERE = "evaluation.suites[1]"
JOB = parse_job(job_manifest(method={"lora": {"rank": 4}}), local=True)
DOCS = [
    {"question": "The colour of the sky is", "choices": ["blue", "seven", "under it"], "label": 0, "answer": "blue"},
    {"question": "Two and two make", "choices": ["a horse", "four"], "label": 1, "answer": "four"},
    {"question": "Cats like", "choices": ["fish", "the law of large numbers"], "label": 0, "answer": "fish"},
    {"question": "Snow is", "choices": ["hot", "cold", "loud"], "label": 1, "answer": "cold"},
    {"question": "A week has", "choices": ["seven days", "a tail"], "label": 0, "answer": "seven days"},
]
TASKS: dict[str, dict[str, Any]] = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "say": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}],
    },
    "read": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} {{answer}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{answer}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "program": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "unsafe_code": True,
        "metric_list": [{"metric": "exact_match"}],
    },
    "from_the_hub": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "somebodys_metric"}],
    },
}


@pytest.fixture(scope="module", autouse=True)
def _on_this_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is fetched, nothing is left behind, and the harness does not look about the machine with pip."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(evaluator, "add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks as the harness reads them, and a group of two. Not to be written to."""
    made = tmp_path_factory.mktemp("tasks")
    (made / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(made / "docs.jsonl")}}, "test_split": "test"}
    for name, task in TASKS.items():
        (made / f"{name}.yaml").write_text(json.dumps({"task": name, "tag": "all_of_them", **data, **task}))
    lost = {**data, "dataset_kwargs": {"data_files": {"test": str(made / "gone.jsonl")}}, **TASKS["choose"]}
    (made / "lost.yaml").write_text(json.dumps({"task": "lost", **lost}))
    group = {"group": "both", "task": ["choose", "last_word"], "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (made / "both.yaml").write_text(json.dumps(group))
    return made


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Voice, HFLM]:
    """A tuned model as the trainer has it, and what is published of it as the harness takes it."""
    made = tmp_path_factory.mktemp("adapter")
    voice = tuned()
    method_for(JOB.spec.method).export(voice.model.module, made, BaseModel(str(MODEL), None, "float32"), "adapter")
    published = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), str(made)).merge_and_unload()
    return voice, HFLM(pretrained=published, tokenizer=voice.tokenizer, batch_size=2, device="cpu", max_length=1024)


def tuned() -> Voice:
    files = ModelFiles(MODEL, BaseModel("tests/tiny", None, "float32"), "sha256:0", ("model.safetensors",))
    model = load_model(files, JOB, torch.device("cpu"))
    shake(model.module, 0.05)
    return Voice(model, load_tokenizer(files), 1024)


def suite(*tasks: str, few_shot: int = 0, **fields: Any) -> Suite:
    manifest = {"name": "general", "lmEval": {"tasks": list(tasks), "fewShot": few_shot}, **fields}
    return Suite.model_validate_json(json.dumps(manifest), by_alias=True, by_name=False)


def ours(voice: Voice, asked: Suite, folder: Path) -> dict[str, TaskResult]:
    results = task_results(asked, Candidate(Speaker(voice), voice.tokenizer, voice.context), WHERE, folder)
    return {result.task: result for result in results}


def theirs_of(model: HFLM, folder: Path, *tasks: str, few_shot: int = 0) -> Any:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(
        model, tasks=list(tasks), num_fewshot=few_shot, task_manager=manager, bootstrap_iters=0, random_seed=None, torch_random_seed=None
    )


@pytest.mark.parametrize("few_shot", [0, 2])
def test_the_figures_are_the_harnesss_own(pair: tuple[Voice, HFLM], folder: Path, few_shot: int) -> None:
    voice, model = pair
    found = ours(voice, suite("choose", "say", "last_word", "both", few_shot=few_shot), folder)
    expected = theirs_of(model, folder, "choose", "say", "last_word", few_shot=few_shot)
    group = theirs_of(model, folder, "both", few_shot=few_shot)  # the harness takes no task twice
    assert found["choose"].value == expected["results"]["choose"]["acc,none"]
    assert found["say"].value == expected["results"]["say"]["exact_match,none"]
    assert found["last_word"].value == expected["results"]["last_word"]["acc,none"]
    assert found["both"].value == pytest.approx(group["groups"]["both"]["acc,none"])
    assert [result.metric for result in found.values()] == ["acc", "exact_match", "acc", "acc"]
    for name, metric in (("choose", "acc"), ("say", "exact_match"), ("last_word", "acc")):
        assert found[name].per_case == tuple(sample[metric] for sample in expected["samples"][name])
    assert found["both"].per_case == found["choose"].per_case + found["last_word"].per_case


def test_what_the_model_computes_is_what_the_harness_computes(
    pair: tuple[Voice, HFLM], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only the figures, which are coarse: every log-likelihood and every answer."""
    voice, model = pair
    seen: list[Any] = []
    evaluate = evaluator.evaluate

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(evaluate(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(evaluator, "evaluate", spy)
    ours(voice, suite("choose", "say", "last_word"), folder)
    mine = {name: samples for made in seen for name, samples in made["samples"].items()}
    other = theirs_of(model, folder, "choose", "say", "last_word")["samples"]
    assert [sample["resps"] for sample in mine["say"]] == [sample["resps"] for sample in other["say"]]
    for name in ("choose", "last_word"):
        for one, two in zip(mine[name], other[name], strict=True):
            likelihoods = [[(value, greedy) for ((value, greedy),) in each["resps"]] for each in (one, two)]
            np.testing.assert_allclose([value for value, _ in likelihoods[0]], [value for value, _ in likelihoods[1]], rtol=1e-4)
            assert [greedy for _, greedy in likelihoods[0]] == [greedy for _, greedy in likelihoods[1]]


def test_whole_texts_have_the_harnesss_likelihood(pair: tuple[Voice, HFLM]) -> None:
    voice, model = pair
    requests = [SimpleNamespace(args=(text,)) for text in ("The sky is blue.", "a", "word " * 300)]
    mine = HarnessModel(Speaker(voice), voice.tokenizer, 1024, Worker()).loglikelihood_rolling(requests)
    np.testing.assert_allclose(mine, model.loglikelihood_rolling(requests), rtol=1e-4)


def test_what_was_measured_is_not_measured_again(
    pair: tuple[Voice, HFLM], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    voice, asked = pair[0], suite("choose", limit=3)
    storage = Storage(LocalFileSystem(), str(tmp_path), f"file://{tmp_path}")
    candidate = Candidate(Speaker(voice), voice.tokenizer, voice.context)
    assert read_results(storage, "step-4", asked) is None
    answer_tasks(asked, "step-4", candidate, WHERE, storage, folder)
    found = read_results(storage, "step-4", asked)
    assert found == task_results(asked, candidate, WHERE, folder)
    assert read_results(storage, "baseline", asked) is None
    assert read_results(storage, "step-4", suite("choose", limit=4)) is None  # another question
    monkeypatch.setattr("finetune_trainer.evaluation.lm_eval.task_results", None)
    answer_tasks(asked, "step-4", candidate, WHERE, storage, folder)
    (tmp_path / "answers/step-4/general.tasks.json").write_text('{"asked": {}, "results": 7}')
    assert read_results(storage, "step-4", asked) is None


class Table:
    """Workers in threads: each adds what it has, and all take the sum."""

    def __init__(self, seats: int) -> None:
        self._sum: torch.Tensor | None = None
        self._lock, self._all = threading.Lock(), threading.Barrier(seats, timeout=60)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        with self._lock:
            self._sum = tensor.clone() if self._sum is None else self._sum + tensor
        self._all.wait()
        assert self._sum is not None
        tensor.copy_(self._sum)
        if self._all.wait() == 0:
            self._sum = None
        self._all.wait()


class Reader:
    """Says back what it was asked; the loss of a text is the sum of its labelled tokens."""

    def __init__(self) -> None:
        self.asked = self.finished = 0

    def replies(self, prompts: Any, most: int) -> Any:
        self.asked += len(prompts)
        return [SimpleNamespace(text=f"é{most}:{list(prompt)}") for prompt in prompts]

    def measured(self, examples: Examples) -> list[Answered]:
        self.asked += len(examples)
        rows = [examples.example(place) for place in range(len(examples))]
        return [Answered("", loss=float(tokens[labels].sum()), labels=1, correct=len(tokens) % 2) for tokens, labels in rows]

    def finish(self) -> None:
        self.finished += 1


def test_workers_share_out_what_is_asked_and_tell_one_another(pair: tuple[Voice, HFLM]) -> None:
    """Three of them, and two or five requests: each answers some, and all know all."""
    tokenizer, table = pair[0].tokenizer, Table(3)
    texts = [SimpleNamespace(args=(text, {"max_gen_toks": most})) for text, most in zip("abcde", (4, 4, 9, 4, 9), strict=True)]
    pairs = [SimpleNamespace(args=("The", f" {word}")) for word in ("sky", "sea")]

    def work(rank: int) -> tuple[Reader, list[str], list[tuple[float, bool]]]:
        reader = Reader()
        model = HarnessModel(reader, tokenizer, 64, Worker(rank=rank, world=3, all_reduce=table.all_reduce))
        return reader, model.generate_until(texts), model.loglikelihood(pairs, disable_tqdm=True)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(work, range(3)))
    alone = HarnessModel(Reader(), tokenizer, 64, Worker())
    assert all(said == alone.generate_until(texts) for _, said, _ in found)
    assert all(scores == alone.loglikelihood(pairs, disable_tqdm=True) for *_, scores in found)
    assert found[0][1][2].startswith("é9:[")
    assert [reader.asked for reader, *_ in found] == [3, 3, 1]
    assert [reader.finished for reader, *_ in found] == [2, 2, 2]


def test_as_many_examples_as_the_suite_wants(pair: tuple[Voice, HFLM], folder: Path) -> None:
    found = ours(pair[0], suite("choose", limit=2), folder)
    assert len(found["choose"].per_case) == 2


def test_figures_with_their_intervals() -> None:
    """The mean of 1, 0, 1, 1 is 0.75; of a value that is no mean nothing is known but itself."""
    results = (TaskResult("choose", "acc", 0.75, (1.0, 0.0, 1.0, 1.0)), TaskResult("odd", "f1", 0.4))
    one, two = measured_tasks(suite("choose", "odd"), results, 0.95)
    assert (one.metric, one.value, one.n, one.per_case) == ("general/choose", 0.75, 4, (1.0, 0.0, 1.0, 1.0))
    assert one.low is not None
    assert one.high is not None
    assert 0 <= one.low < 0.75 < one.high <= 1
    assert (two.metric, two.value, two.low, two.high, two.n, two.estimate) == ("general/odd", 0.4, None, None, 0, None)
    assert TaskResult.of_json(json.loads(json.dumps(results[0].to_json()))) == results[0]


def test_texts_end_where_the_task_says() -> None:
    assert until("one\ntwo", {"until": ["\n"]}) == "one"
    assert until("one, two. three", {"until": [".", ",", ""]}) == "one"
    assert until("one", {}) == "one"
    assert labelled(Scored((1, 2, 3, 4), 2)).tolist() == [False, False, True, True]
    assert labelled(Scored((1, 2), 2)).tolist() == [False, True]


def refused(check: Callable[[], Any]) -> str:
    with pytest.raises(JobError) as caught:
        check()
    assert caught.value.reason == Reason.INVALID_SPEC
    assert caught.value.message.startswith(f"{WHERE}.lmEval")
    return caught.value.message


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("nothing_of_the_kind", "nothing_of_the_kind is no task that lm-eval knows"),
        ("all_of_them", "all_of_them is a tag of several tasks: name them, or a group"),
        ("program", "program runs what the model writes, which is not done here"),
        ("read", "read has only metrics that fall as a model gets better (word_perplexity, byte_perplexity)"),
        ("from_the_hub", "the metric somebodys_metric is a program on the hub, which is not run"),
    ],
)
def test_tasks_that_cannot_be_run_are_found_before_a_gpu_is_asked_for(folder: Path, task: str, words: str) -> None:
    assert words in refused(lambda: check_tasks(suite("choose", task), WHERE, folder))


@pytest.mark.parametrize(
    ("utils", "helper"),
    [
        ("def score(doc, results):\n    return {'acc': eval(results[0])}\n", ""),
        ("import helper\ndef score(doc, results):\n    return helper.check(results)\n", "from sympy import sympify\nsympify('1')\n"),
    ],
    ids=["itself", "by another file"],
)
def test_a_task_that_runs_what_a_model_writes_is_refused_though_it_does_not_say_so(
    folder: Path, tmp_path: Path, utils: str, helper: str
) -> None:
    (tmp_path / "utils.py").write_text(utils.replace("import helper\n", "# helper\n"))
    (tmp_path / "helper.py").write_text(helper)
    task = json.loads((folder / "say.yaml").read_text()) | {"task": "hidden", "tag": "one"}
    (tmp_path / "hidden.yaml").write_text(json.dumps(task)[:-1] + ', "process_results": !function utils.score}')
    assert "hidden runs what the model writes" in refused(lambda: check_tasks(suite("hidden"), WHERE, tmp_path))


def test_tasks_that_can_be_run(folder: Path) -> None:
    check_tasks(suite("choose", "say", "last_word", "both"), WHERE, folder)


def test_a_task_whose_data_is_not_there(folder: Path) -> None:
    with pytest.raises(JobError) as caught:
        check_tasks(suite("lost"), WHERE, folder)
    assert caught.value.reason == Reason.DATASET_NOT_FOUND
    assert caught.value.message == f"{WHERE}.lmEval.tasks: the data of lost does not exist"


def test_where_the_harness_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch, pair: tuple[Voice, HFLM]) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for check in (
        lambda: check_tasks(suite("choose"), WHERE, folder),
        lambda: ours(pair[0], suite("choose"), folder),
    ):
        message = refused(check)
        assert "lm-eval is not installed in the trainer: build its image with --build-arg LM_EVAL=1" in message


def test_a_tokenizer_without_an_end(pair: tuple[Voice, HFLM], tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(JobError, match="no token that ends a text"):
        task_results(suite("choose"), Candidate(Speaker(pair[0]), tokenizer, 1024), WHERE, folder)
