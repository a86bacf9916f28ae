"""The report for people: everything that was found stands in it, and nothing that a stranger wrote becomes a part of it."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from tests.unit.evaluation.findings import EVALUATION, REPORT, SEARCH, UID, findings, job, result

from finetune_api.status import Evaluation, EvaluationResult, GateResult, Health
from finetune_trainer.evaluation.answered import Answered, Case
from finetune_trainer.evaluation.evidence import files_of
from finetune_trainer.evaluation.history import Course
from finetune_trainer.evaluation.markdown import Findings, markdown
from finetune_trainer.evaluation.samples import Sample, asked, samples_of
from finetune_trainer.trials import Trial

READER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
PICTURES = ("metrics-1.svg", "loss.svg", "prompts.svg", "search.svg")
GATE = GateResult(metric="task/f1", verdict="Passed", observed=0.9, required="at least 0.8")


def tokens(text: str) -> Iterator[Token]:
    for token in READER.parse(text):
        yield token
        yield from token.children or ()


def sections(text: str) -> list[str]:
    return re.findall(r"^## (.*)$", text, re.MULTILINE)


def test_everything_that_was_found_has_its_section() -> None:
    text = markdown(findings(), PICTURES)
    assert sections(text) == [
        "Gates",
        "Results",
        "Beside other jobs",
        "Health",
        "Training",
        "Prompts for the untuned model",
        "Search",
        "Data",
        "Samples",
        "Origin",
        "How to read this",
    ]
    assert text.startswith("# support-bot: held back\n\n**1 of 3 gates is passed: nothing is published, the artifacts are kept aside in ")
    assert f" in `.finetune/{UID}/held` of output.storage.**\n" in text
    for row in (
        "| **Failed** | `retention/loss` | larger by at most 0.05 than `baseline` | 0.140 | 0.0950 to 0.185 |",
        "| `task/f1` | 0.410 | 0.880 | 0.859 to 0.901 | +0.470 | +0.439 to +0.502 | better | 500 |",
        "| `retention/loss` | 1.920 | 2.060 | 2.030 to 2.090 | +0.140 | +0.0950 to +0.185 | worse | 500 |",
        "| `validation/loss` | 2.410 | 0.880 | \u2013 | \u22121.530 | \u2013 |  | \u2013 |",
        "| `task/exactMatch` | `support-bot-v1` | 0.810 | 0.770 | +0.0400 | +0.0100 to +0.0700 |",
        "| `rag` | base model | `task/f1` | 0.610 | 0.570 to 0.640 | **best** |",
        "8 trials: 6 completed, 1 stopped early, 1 failed.\nThe best is trial 5 with `validation/loss` 0.910; its values",
        "| `method.lora.rank` | 16 |",
        "| 5 | 0.910 | Completed | `method.lora.rank` 16, `training.learningRate` 0.0002 |\n"
        "| 4 | 1.050 | Completed | `method.lora.rank` 8, `training.learningRate` 0.0001778 |\n",
        "| 7 | \u2013 | Failed: TrainingDiverged | `method.lora.rank` 8, `training.learningRate` 0.001 |",
        "| left out: duplicates | 57 |",
        "> Warning: 2 training examples stand in the test data too: see rejects.jsonl",
    ):
        assert row in text


@pytest.mark.parametrize(
    ("gates", "on_gate_failure", "sufficient", "words"),
    [
        ((), "hold", False, "measured\n\n**The job has no gates"),
        ((GATE,), "hold", False, "all gates passed\n\n**1 of 1 gates is passed: the result is published.**"),
        ((GATE, GATE), "fail", False, "all gates passed\n\n**2 of 2 gates are passed: the result is published.**"),
        (EVALUATION.gates, "fail", False, "gates not passed\n\n**1 of 3 gates is passed: nothing is published, the artifacts are not"),
        (EVALUATION.gates, "tryEarlierCheckpoint", False, "held back\n\n**1 of 3 gates is passed: nothing is published, the"),
        ((), "hold", True, "a prompt is enough\n\n**A prompt for the untuned model reaches"),
    ],
)  # fmt: skip
def test_the_first_lines_say_what_follows(gates: tuple[GateResult, ...], on_gate_failure: str, sufficient: bool, words: str) -> None:
    spec = {"evaluation": {"onGateFailure": on_gate_failure}}
    text = markdown(findings(gates=gates, sufficient=sufficient, spec=spec), ())
    assert text.startswith(f"# support-bot: {words}")


def test_a_job_that_has_measured_nothing_has_a_report_too() -> None:
    bare = Findings(job(), REPORT.model_copy(update={"evaluation": None, "baseline": (), "search": None, "data": None, "warnings": ()}))
    assert sections(markdown(bare, ())) == ["Origin"]


def test_one_metric_without_a_baseline() -> None:
    only = EvaluationResult(metric="task/f1", value=0.5)
    text = markdown(findings(results=(only,), gates=(), health=(), course=Course()), ("metrics-1.svg",))
    assert "| `task/f1` | \u2013 | 0.500 | \u2013 | \u2013 | \u2013 |  | \u2013 |" in text
    assert "Beside other jobs" not in text


def test_forty_metrics_have_a_row_each_and_all_their_pictures() -> None:
    results = tuple(result(f"suite-{place}/f1", 0.5, 0.6, 0.05) for place in range(40))
    files = files_of(findings(results=results))
    text = files["report.md"].decode()
    assert all(text.count(f"| `suite-{place}/f1` |") == 1 for place in range(40))
    assert re.findall(r"\]\((.*?\.svg)\)", text) == ["metrics-1.svg", "metrics-2.svg", "loss.svg", "prompts.svg", "search.svg"]
    assert {name for name in files if name.endswith(".svg")} == {"metrics-1.svg", "metrics-2.svg", "loss.svg", "prompts.svg", "search.svg"}


def test_an_inconclusive_gate_is_explained() -> None:
    assert "Inconclusive: the bound lies within the interval." in markdown(findings(), ())
    assert "Inconclusive:" not in markdown(findings(gates=(GATE,)), ())


def test_of_many_trials_the_best_are_told() -> None:
    trials = tuple(Trial(place, {"training.learningRate": 1e-4}, "Completed", float(place)) for place in range(1, 61))
    for mode, told, left_out in (("min", 50, 51), ("max", 11, 10)):
        search = {**SEARCH, "goal": {"metric": "task/f1", "mode": mode}} if mode == "max" else SEARCH
        suites = {"evaluation": {"suites": [{"name": "task", "source": "test", "metrics": ["f1"]}]}}
        text = markdown(findings(trials=trials, spec={"search": search, **suites}), ())
        assert f"\n| {told} | " in text
        assert f"\n| {left_out} | " not in text
        assert "\n10 more trials are left out.\n" in text


def test_the_confidence_is_the_jobs() -> None:
    assert "| 99.5 % interval |" in markdown(findings(spec={"evaluation": {"confidence": 0.995}}), ())


def test_the_same_findings_give_the_same_text() -> None:
    assert markdown(findings(), PICTURES) == markdown(findings(), PICTURES)


def test_neither_a_secret_nor_an_endpoint_is_named() -> None:
    teacher = {"endpoint": {"url": "https://llm.internal.example/v1", "model": "big", "secretRef": {"name": "llm-key"}}}
    spec = {
        "model": {"source": "hf://org/model", "secretRef": {"name": "hub-key"}},
        "objective": {"distillation": {"teacher": teacher, "response": {}}},
    }
    text = markdown(findings(spec=spec), ())
    assert '"distillation"' in text
    assert not re.search("llm.internal|llm-key|hub-key", text)


HOSTILE = [
    "<script>alert(1)</script>",
    "x | y |\n| --- | --- |\n| <img src=x onerror=alert(1)> |",
    "````\n</code></pre>\n# not a heading\n[a](javascript:alert(1))",
    "![pixel](https://evil.example/p.png) https://evil.example",
    "~~~\n- [ ] task\n> quote\n<!-- comment",
    "\\`\\|**b**",
]
hostile = st.one_of(st.sampled_from(HOSTILE), st.text(alphabet="`~<>|\\[]()!*_&#;:/ \n\r\t-+=ab1.\x1b\u2028\u202e", max_size=60))


@settings(max_examples=60, deadline=None)
@given(hostile, hostile, hostile)
def test_nothing_hostile_becomes_markup(first: str, second: str, third: str) -> None:
    """The same findings with harmless texts have the same structure: only contents differ."""
    assert _structure(_told(first, second, third)) == _structure(_told("a", "a", "a"))


def _told(first: str, second: str, third: str) -> str:
    data = REPORT.data.model_copy(update={"made_samples": (f"x{first}",)}) if REPORT.data else None
    changes: dict[str, Any] = {
        "data": data,
        "warnings": (f"x{second}",),
        "health": (Health(name="forgetting", suite="s", verdict="Bad", message=f"x{third}"),),
        "gates": (GateResult(metric="task/f1", verdict="Failed", required=f"x{first}"),),
        "samples": (Sample("task", f"x{second}", f"x{third}", f"x{first}", f"x{second}", f"x{third}"),),
    }
    return markdown(findings(**changes), PICTURES)


def _structure(text: str) -> list[tuple[str, str]]:
    """Every token of the document but texts, with the addresses of pictures and links."""
    return [
        (token.type, str(token.attrs.get("src", token.attrs.get("href", ""))))
        for token in tokens(text)
        if token.type not in ("text", "text_special", "softbreak", "code_inline", "inline")
    ]


def test_samples_are_spread_over_the_suite_and_not_chosen() -> None:
    cases = [Case(id=f"{place:06}", reference="r", prompt=f"p{place}") for place in range(100)]
    answers = [Answered(case.id, text=f"t{case.id}") for case in cases]
    found = samples_of("task", cases, (), answers, most=4)
    assert [sample.id for sample in found] == ["000000", "000025", "000050", "000075"]
    assert found[1] == Sample("task", "000025", "p25", "r", "", "t000025")


def test_a_suite_without_answers_has_no_samples() -> None:
    cases = [Case(id="1", reference="r", prompt="p")]
    assert samples_of("task", cases, [Answered("1", loss=1.0, labels=1)], []) == ()
    assert samples_of("task", [], [], []) == ()


def test_a_conversation_is_one_text() -> None:
    case = Case(id="1", reference="", messages=({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}))
    assert asked(case) == "system: Be kind.\n\nuser: Hi"
    assert (
        asked(Case(id="1", reference="", messages=({"role": "user", "content": [{"text": "x"}]},))) == 'user: {"content": [{"text": "x"}]}'
    )


def test_results_of_nothing_are_empty() -> None:
    assert Findings(job(), REPORT.model_copy(update={"evaluation": None})).evaluation == Evaluation()
