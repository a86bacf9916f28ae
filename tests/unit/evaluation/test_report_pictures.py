"""The pictures of a report: what stands in them, that they never fail, and that the same values give the same bytes."""

import hashlib
import json
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.evaluation.findings import BASELINES, RESULTS, TRIALS, course, result

from finetune_api.status import BaselineResult, Difference, EvaluationResult
from finetune_trainer.evaluation import plots
from finetune_trainer.evaluation.drawing import TUNED, UNTUNED
from finetune_trainer.evaluation.history import Course, Point
from finetune_trainer.evaluation.plots import gaps, loss_curves, metric_bars, strategies
from finetune_trainer.evaluation.search_plots import search_picture
from finetune_trainer.trials import Trial

SVG = "{http://www.w3.org/2000/svg}"


def words(picture: bytes) -> list[str]:
    """The texts of a picture: outlines, each with a comment that has its characters."""
    ElementTree.fromstring(picture)  # noqa: S314 - our own file
    return re.findall(r"<!-- (.*?) -->", picture.decode(), re.DOTALL)


def bars(picture: bytes, colour: str) -> list[float]:
    """Widths of the rectangles of a colour, in points, from above; the last one is the legend's."""
    found = []
    for path in ElementTree.fromstring(picture).iter(f"{SVG}path"):  # noqa: S314
        if f"fill: {colour.lower()}" in path.get("style", ""):
            xs = [float(x) for x in re.findall(r"[ML] ([-\d.]+) ", path.get("d", ""))]
            found.append(max(xs) - min(xs))
    return found


@pytest.mark.parametrize(("metrics", "pictures"), [(0, 0), (1, 1), (3, 1), (4, 2), (7, 3)])
def test_any_number_of_metrics(metrics: int, pictures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "ROWS_MAX", 3)
    results = [result(f"suite-{place}/f1", 0.5, 0.6, 0.05) for place in range(metrics)]
    drawn = metric_bars(results)
    assert len(drawn) == pictures
    named = [word for picture in drawn for word in words(picture) if word.startswith("suite-")]
    assert named == [f"suite-{place}" for place in range(metrics)]


def test_bars_are_as_long_as_values_are_large() -> None:
    (picture,) = metric_bars([result("task/f1", 0.2, 0.8), result("task/exactMatch", 0.1, 0.4), result("task/loss", 4.0, 1.0)])
    f1, exact_match, loss, _ = bars(picture, TUNED)
    assert f1 / exact_match == pytest.approx(2.0, rel=1e-3)
    assert f1 / loss == pytest.approx(0.8 / 0.25, rel=1e-3)  # a loss has no bound: its scale ends at the untuned model's


def test_values_at_very_different_scales_are_told_in_figures() -> None:
    (picture,) = metric_bars(
        [result("a/perplexity", 9.2e8, 14.2), result("b/loss", 1e-9, 2e-9), result("c/embeddingSimilarity", -0.12, 0.6)]
    )
    told = words(picture)
    assert [word for word in ("9.20e+08", "14.20", "1.00e\u221209", "2.00e\u221209", "\u22120.120", "0.600") if word not in told] == []


def test_what_was_not_measured_is_said() -> None:
    (picture,) = metric_bars([result("a/loss", None, 1.4), result("a/f1", 0.5, None), EvaluationResult(metric="a/bleu")])
    assert words(picture).count("not measured") == 2
    assert "bleu" not in words(picture)
    assert metric_bars([EvaluationResult(metric="a/bleu")]) == []


@pytest.mark.parametrize(
    ("metric", "low", "value", "high", "word"),
    [
        ("task/f1", 0.1, 0.2, 0.3, "better"),
        ("task/f1", -0.3, -0.2, -0.1, "worse"),
        ("task/f1", -0.1, 0.1, 0.3, "not clear"),
        ("task/f1", 0.0, 0.1, 0.3, "not clear"),
        ("task/loss", 0.1, 0.2, 0.3, "worse"),
        ("task/perplexity", -0.3, -0.2, -0.1, "better"),
        ("general/hellaswag", 0.1, 0.2, 0.3, "better"),
        ("validation/loss", None, -0.2, None, "no interval"),
    ],
)
def test_a_change_is_judged_by_its_interval_and_the_metrics_direction(
    metric: str, low: float | None, value: float, high: float | None, word: str
) -> None:
    change = Difference(value=value, low=low, high=high)
    (picture,) = metric_bars([EvaluationResult(metric=metric, value=0.5, baseline=0.4, difference=change)])
    assert {"better", "worse", "not clear", "no interval"} & set(words(picture)) == {word}


numbers = st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False, width=32), st.floats(-1, 1))


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["f1", "loss", "bleu", "x"]), *[numbers] * 7), min_size=1, max_size=3))
def test_no_values_break_a_picture(rows: list[tuple[str, *tuple[float | None, ...]]]) -> None:
    results = [
        EvaluationResult(
            metric=f"s/{name}", value=value, baseline=baseline, low=low, high=high,
            difference=None if change is None else Difference(value=change, low=least, high=most),
        )
        for name, value, baseline, low, high, change, least, most in rows
    ]  # fmt: skip
    for picture in metric_bars(results):
        assert words(picture)


@settings(max_examples=8, deadline=None)
@given(
    st.dictionaries(st.integers(0, 10**7), st.floats(allow_nan=False, allow_infinity=False, width=32), max_size=5), st.integers(0, 10**7)
)
def test_no_course_breaks_a_picture(losses: dict[int, float], marked: int) -> None:
    steps = sorted(losses)
    train = tuple(Point(step, {"train/loss": losses[step], "train/learningRate": 0.0}) for step in steps)
    held_out = tuple(Point(step, {"validation/loss": losses[step]}) for step in steps)
    picture = loss_curves(Course(train, held_out), marked)
    assert picture is None if not steps else words(picture or b"")


def test_the_gap_is_taken_over_the_latest_steps() -> None:
    train = tuple(Point(step, {"train/loss": float(step)}) for step in range(1, 7))
    held_out = tuple(Point(step, {"validation/loss": 10.0}) for step in (0, 2, 6))
    # Steps 1 and 2 have the mean 1.5, steps 1 to 6 the mean 3.5; before the first step there is no gap.
    assert gaps(Course(train, held_out)) == [(2, 8.5), (6, 6.5)]


def test_loss_curves_name_what_they_show() -> None:
    told = words(loss_curves(course(), 600) or b"")
    for word in ("training (moving average)", "validation", "judged: step 600", "learning", "optimiser steps"):
        assert word in told, told


def test_losses_that_fall_far_have_plain_numbers_at_their_axis() -> None:
    """From 6 to 0.15 the scale is logarithmic; the library would write its own labels as mathematics."""
    losses = [6.0, 3.0, 1.5, 0.75, 0.3, 0.15]
    picture = loss_curves(Course(tuple(Point(step, {"train/loss": loss}) for step, loss in enumerate(losses, start=1))))
    assert picture is not None
    labels = [word for word in words(picture) if word[0].isdigit() and "." in word]
    assert {"5.000", "2.000", "1.000", "0.500", "0.200"} <= set(labels)
    assert not any("$" in word for word in words(picture))


def test_panels_are_there_only_where_there_is_something_to_show() -> None:
    short = Course((Point(1, {"train/loss": 2.0}), Point(2, {"train/loss": 1.5})))
    told = words(loss_curves(short) or b"")
    assert "training" in told
    assert not {"learning", "validation", "validation\nless training"} & set(told)
    assert loss_curves(Course()) is None
    assert loss_curves(Course(held_out=(Point(0, {"validation/loss": 2.0}),))) is None


def test_prompts_stand_beside_one_another_where_there_are_two() -> None:
    told = words(strategies(BASELINES) or b"")
    assert [word for word in ("zero-shot", "few-shot", "rag  (best)", "zero-shot (bigger)", "0.610") if word not in told] == []
    assert strategies(BASELINES[:2]) is None  # none of them is the best
    assert strategies(BASELINES[2:3]) is None


def test_a_search_has_a_panel_for_each_field() -> None:
    told = words(search_picture(TRIALS, 5, "validation/loss") or b"")
    for word in ("validation/loss", "method.lora.rank", "training.learningRate", "8", "16", "0.0001", "a trial", "the best"):
        assert word in told, told
    assert "the best" not in words(search_picture(TRIALS, None, "validation/loss") or b"")


def test_a_search_over_words_has_them_below() -> None:
    trials = [
        Trial(place, {"training.scheduler": word, "training.packing": place == 1}, "Completed", 1.0)
        for place, word in ((1, "cosine"), (2, "linear"))
    ]
    assert {"cosine", "linear", "True", "False"} <= set(words(search_picture(trials, 1, "validation/loss") or b""))


def test_a_search_of_fewer_than_two_values_has_no_picture() -> None:
    assert search_picture(TRIALS[:1], 1, "validation/loss") is None
    assert search_picture(TRIALS[-1:], None, "validation/loss") is None
    assert search_picture((), None, "validation/loss") is None


def test_hostile_names_are_drawn_and_nothing_else() -> None:
    name = "<script>alert(1)</script>--><b>$x^$ &lt;"
    (picture,) = metric_bars([result(f"{name}/f1", 0.1, 0.2)])
    drawn = (
        strategies([BaselineResult(prompt=name, metric="t/f1", value=1.0, best=True), BaselineResult(prompt="b", metric="t/f1", value=0.5)])
        or b""
    )
    for each in (picture, drawn):
        kinds = {element.tag.removeprefix(SVG) for element in ElementTree.fromstring(each).iter()}  # noqa: S314
        assert kinds <= {"svg", "defs", "style", "g", "path", "use", "clipPath", "rect", "pattern", "metadata"} | {
            kind for kind in kinds if kind.startswith("{")
        }
        assert "script" not in kinds


def test_colours_differ_also_as_greys() -> None:
    def lightness(colour: str) -> float:
        """Relative luminance (WCAG 2.2)."""
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted([lightness(TUNED), lightness(UNTUNED)], reverse=True)
    assert (light + 0.05) / (dark + 0.05) > 2.0


_ANOTHER_PROCESS = """
import hashlib, json, sys
from tests.unit.evaluation.findings import BASELINES, RESULTS, course
from finetune_trainer.evaluation import plots
early = [name for name in sys.modules if name.startswith("matplotlib")]
pictures = [*plots.metric_bars(RESULTS), plots.loss_curves(course(), 600), plots.strategies(BASELINES)]
print(json.dumps([early, "matplotlib.pyplot" in sys.modules, [hashlib.sha256(picture).hexdigest() for picture in pictures]]))
"""


def test_another_process_draws_the_same_bytes_and_loads_the_library_only_to_draw() -> None:
    run = subprocess.run(
        [sys.executable, "-c", _ANOTHER_PROCESS], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7", "PATH": ""}
    )
    early, interactive, digests = json.loads(run.stdout)
    assert early == []
    assert not interactive
    here = [*metric_bars(RESULTS), loss_curves(course(), 600) or b"", strategies(BASELINES) or b""]
    assert digests == [hashlib.sha256(picture).hexdigest() for picture in here]
    assert not re.search(rb"<dc:date>|[Mm]atplotlib v|\b20\d\d-\d\d-\d\d", b"".join(here))
