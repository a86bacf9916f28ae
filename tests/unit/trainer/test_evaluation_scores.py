"""A suite's metrics from cases and answers, and differences of two candidates over the same cases."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from scipy import stats

from finetune_api.evaluation import GENERATED_METRICS, SCORED_METRICS, Suite
from finetune_api.status import EvaluationResult
from finetune_trainer.evaluation.answered import Answered, Case
from finetune_trainer.evaluation.scores import Change, Measured, changes, measured, published, results

SUITE_METRICS = SCORED_METRICS + GENERATED_METRICS
TEXTS = [("the red cat", "the red cat"), ("a dog", "the dog sat"), ('{"a": 1}', '{"a": 2}'), ("2 apples", "two apples"), ("", "nothing")]
CASES = tuple(Case(f"{place:06}", reference, prompt="?") for place, (_, reference) in enumerate(TEXTS))
ANSWERS = tuple(
    Answered(f"{place:06}", text, loss=loss, labels=labels, correct=correct)
    for place, ((text, _), loss, labels, correct) in enumerate(
        zip(TEXTS, (1.0, 6.0, 8.0, 2.0, 3.0), (4, 3, 8, 2, 3), (4, 1, 2, 2, 0), strict=True)
    )
)
ENDPOINT = {"url": "https://judge.example/v1", "model": "judge", "secretRef": {"name": "judge"}}


def suite(*metrics: str, **more: object) -> Suite:
    needs: dict[str, object] = {}
    if "regex" in metrics:
        needs["pattern"] = r"\d"
    if "embeddingSimilarity" in metrics:
        needs["encoder"] = {"source": "hf://some/encoder"}
    if {"judgeScore", "judgeWinRate"} & set(metrics):
        needs["judge"] = {"endpoint": ENDPOINT}
    return Suite.model_validate({"name": "task", "source": "test", "metrics": metrics, **needs, **more})


def by_name(found: Sequence[Measured]) -> dict[str, Measured]:
    return {each.metric.removeprefix("task/"): each for each in found}


def all_metrics() -> dict[str, Measured]:
    given = {
        "embeddingSimilarity": [0.9, 0.5, -0.2, None, 0.1],
        "judgeScore": [1.0, 0.5, 0.0, 0.5, 0.0],
        "judgeWinRate": [1.0, 0.5, 0.5, 0.0, 1.0],
    }
    return by_name(measured(suite(*SUITE_METRICS), CASES, ANSWERS, 0.95, given))


def test_every_metric_of_the_api_is_measured() -> None:
    found = all_metrics()
    assert tuple(found) == SUITE_METRICS
    for each in found.values():
        assert each.value is not None
        assert each.low is not None
        assert each.high is not None
        assert each.low <= each.value <= each.high
        assert len(each.per_case) == len(CASES)
        assert each.ids == tuple(case.id for case in CASES)


def test_values_are_those_of_the_references() -> None:
    """By hand, and by the libraries that define them."""
    answers, references = [text for text, _ in TEXTS], [reference for _, reference in TEXTS]
    rouge = [RougeScorer(["rouge1", "rouge2", "rougeL"]).score(reference, answer) for answer, reference in TEXTS]
    expected = {
        "loss": 20 / 20,
        "perplexity": math.e,
        "tokenAccuracy": 9 / 20,
        "exactMatch": 1 / 5,
        "f1": (1 + 2 / 3 + 0 + 1 / 2 + 0) / 5,  # articles do not count: [dog] and [dog sat]; of the third [1] and [2] are left
        "rouge1": sum(score["rouge1"].fmeasure for score in rouge) / 5,
        "rouge2": sum(score["rouge2"].fmeasure for score in rouge) / 5,
        "rougeL": sum(score["rougeL"].fmeasure for score in rouge) / 5,
        "bleu": BLEU().corpus_score(answers, [references]).score,
        "chrf": CHRF().corpus_score(answers, [references]).score,
        "jsonValidity": 1 / 5,
        "regex": 2 / 5,
        "embeddingSimilarity": 1.3 / 4,
        "judgeScore": 2 / 5,
        "judgeWinRate": 3 / 5,
    }
    assert {name: each.value for name, each in all_metrics().items()} == {name: pytest.approx(value) for name, value in expected.items()}


def test_a_case_by_itself() -> None:
    found = all_metrics()
    assert found["loss"].per_case == pytest.approx([0.25, 2.0, 1.0, 1.0, 1.0])
    assert found["perplexity"].per_case == pytest.approx([math.exp(0.25), math.exp(2), math.e, math.e, math.e])
    assert found["exactMatch"].per_case == (1.0, 0.0, 0.0, 0.0, 0.0)
    assert found["embeddingSimilarity"].per_case == (0.9, 0.5, -0.2, None, 0.1)
    assert found["embeddingSimilarity"].n == 4
    sentence = [BLEU(effective_order=True).sentence_score(text, [reference]).score for text, reference in TEXTS]
    assert found["bleu"].per_case == pytest.approx(sentence)


def test_cases_without_a_golden_answer_count_only_where_none_is_needed() -> None:
    cases = (*CASES, Case("plain", "", prompt="?"))
    answers = (*ANSWERS, Answered("plain", "7"))
    found = by_name(measured(suite("exactMatch", "bleu", "loss", "regex"), cases, answers, 0.95))
    assert {name: (each.n, each.per_case[-1]) for name, each in found.items()} == {
        "exactMatch": (5, None),
        "bleu": (5, None),
        "loss": (5, None),
        "regex": (6, 1.0),
    }
    assert found["bleu"].value == pytest.approx(all_metrics()["bleu"].value)


def test_nothing_to_measure_has_no_value() -> None:
    found = measured(suite("loss", "exactMatch"), [Case("a", "")], [Answered("a")], 0.95)
    assert [(each.value, each.n) for each in found] == [(None, 0), (None, 0)]
    assert [(each.value, each.n) for each in measured(suite("bleu", "perplexity", "f1"), [], [], 0.95)] == [(None, 0)] * 3


def test_a_loss_beyond_all_bounds_has_no_perplexity() -> None:
    (found,) = measured(
        suite("perplexity"),
        [Case("a", "x"), Case("b", "y")],
        [Answered("a", loss=5000.0, labels=1), Answered("b", loss=1.0, labels=1)],
        0.95,
    )
    assert found.value is None
    assert found.per_case == (None, pytest.approx(math.e))


def test_the_order_of_the_answers_is_of_no_consequence() -> None:
    assert measured(suite("f1", "loss"), CASES, ANSWERS[::-1], 0.95) == measured(suite("f1", "loss"), CASES, ANSWERS, 0.95)


def test_missing_answers_and_scores_are_named() -> None:
    with pytest.raises(ValueError, match="suite task: 2 of 5 cases have no answer, the first is 000001"):
        measured(suite("f1"), CASES, [ANSWERS[0], ANSWERS[2], ANSWERS[3]], 0.95)
    with pytest.raises(ValueError, match="suite task: 0 scores of judgeScore for 5 cases"):
        measured(suite("judgeScore"), CASES, ANSWERS, 0.95)
    with pytest.raises(ValueError, match="suite task: 1 scores of judgeScore for 5 cases"):
        measured(suite("judgeScore"), CASES, ANSWERS, 0.95, {"judgeScore": [1.0]})


def answered(losses: Sequence[float], ids: Sequence[str] | None = None) -> tuple[Answered, ...]:
    return tuple(
        Answered(name, loss=loss, labels=1) for name, loss in zip(ids or [str(place) for place in range(len(losses))], losses, strict=True)
    )


def figures(losses: Sequence[float], ids: Sequence[str] | None = None) -> tuple[Measured, ...]:
    answers = answered(losses, ids)
    return measured(suite("loss"), [Case(each.id, "x") for each in answers], answers, 0.95)


HARD = np.random.default_rng(1).normal(3.0, 1.0, 200)
EASIER = HARD - 0.1 + np.random.default_rng(2).normal(0.0, 0.2, 200)


def test_a_paired_difference_is_that_of_the_paired_t_test() -> None:
    (change,) = changes(figures(EASIER.tolist()), figures(HARD.tolist()), 0.95)
    expected = stats.ttest_rel(EASIER, HARD).confidence_interval(0.95)
    assert change.paired
    assert change.value == pytest.approx((EASIER - HARD).mean())
    assert (change.low, change.high) == (pytest.approx(expected.low, abs=0.003), pytest.approx(expected.high, abs=0.003))


def test_pairs_are_the_cases_that_both_know() -> None:
    """Another job was asked half of them, in another order."""
    ids = [str(place) for place in range(0, 200, 2)][::-1]
    (change,) = changes(figures(EASIER.tolist()), figures(HARD[::2][::-1].tolist(), ids), 0.95)
    assert change.value == pytest.approx((EASIER - HARD)[::2].mean())
    assert change.paired


def test_without_common_cases_a_difference_is_wider() -> None:
    mine, theirs = figures(EASIER.tolist()), figures(HARD.tolist(), [f"other-{place}" for place in range(200)])
    (paired,), (change,) = changes(mine, figures(HARD.tolist()), 0.95), changes(mine, theirs, 0.95)
    expected = stats.ttest_ind(EASIER, HARD, equal_var=False).confidence_interval(0.95)
    assert not change.paired
    assert (change.low, change.high) == (pytest.approx(expected.low, abs=0.01), pytest.approx(expected.high, abs=0.01))
    assert change.low is not None
    assert paired.low is not None
    assert change.low < paired.low < 0


def test_results_of_another_job_are_compared_by_what_it_published() -> None:
    theirs = [
        published(EvaluationResult(metric="task/loss", value=3.0, low=2.9, high=3.1, n=50)),
        published(EvaluationResult(metric="other/f1", value=1.0)),
    ]
    (change,) = changes(figures(EASIER.tolist()), theirs, 0.95)
    assert change.value == pytest.approx(EASIER.mean() - 3.0)
    assert change.low is not None
    mine = 1.96 * EASIER.std() / math.sqrt(200)
    assert change.low == pytest.approx(EASIER.mean() - 3.0 - math.hypot(0.1, mine), abs=0.01)
    bare = Measured("task/loss", 3.0)
    assert changes([bare], [Measured("task/loss", 2.5)], 0.95) == (Change("task/loss", 0.5),)
    assert changes([bare], [Measured("task/loss", None)], 0.95) == (Change("task/loss", None, -math.inf, math.inf),)


def test_the_status_tells_numbers_alone() -> None:
    """One case has no interval of its loss: what is infinite here is absent there."""
    after, before = figures([1.0]), figures([2.0])
    (told,) = results(after, before, changes(after, before, 0.95))
    assert told.to_json() == {"metric": "task/loss", "value": 1.0, "baseline": 2.0, "difference": {"value": -1.0}, "n": 1, "compared": []}
    (many,) = results(figures(EASIER.tolist()), (), ())
    assert many.to_json().keys() == {"metric", "value", "low", "high", "n", "compared"}
