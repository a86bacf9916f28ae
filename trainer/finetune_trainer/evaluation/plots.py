"""The pictures of a report: what was measured, as SVG. Pure: the same values give the same bytes."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from finetune_api.status import BaselineResult, EvaluationResult
from finetune_trainer.evaluation.drawing import BETTER, FAINT, HELD_OUT, INK, TUNED, UNCLEAR, UNTUNED, WORSE, figure_of, svg_of
from finetune_trainer.evaluation.escaping import clipped
from finetune_trainer.evaluation.figures import Kind, change_of, kind_of, largest, number, signed
from finetune_trainer.evaluation.history import Course, Point, gap_at

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

ROWS_MAX = 20
"""Metrics in one picture, so that it fits a page."""
WINDOWS = 20
"""A moving average is over so many parts of a curve."""
LOG_FROM = 30
"""Ratio of the largest loss to the smallest from which on the scale is logarithmic."""
_KINDS: dict[Kind, dict[str, Any]] = {
    "better": {"color": BETTER, "marker": "o"},
    "worse": {"color": WORSE, "marker": "X", "markeredgewidth": 0.3},
    "not clear": {"color": UNCLEAR, "marker": "o", "markerfacecolor": "white"},
    "no interval": {"color": UNCLEAR, "marker": "D", "markerfacecolor": "white", "linestyle": ""},
}
"""How a change is drawn."""


def loss_curves(course: Course, marked: int | None = None) -> bytes | None:
    """Training and validation loss against steps, the gap between them, and the learning rate. None where there is nothing to draw.

    `marked` is the step whose model was judged.
    """
    from matplotlib.ticker import MaxNLocator

    train, held_out = _series(course.train, "train/loss"), _series(course.held_out, "validation/loss")
    rate, gap = _series(course.train, "train/learningRate"), gaps(course)
    if len(train) + len(held_out) < 2:
        return None
    panels: list[tuple[float, Callable[[Axes], None]]] = [(3.0, lambda axes: _draw_losses(axes, train, held_out, marked))]
    if len(gap) > 1:
        panels.append((1.1, lambda axes: _draw_gap(axes, gap)))
    if len(rate) > 1:
        panels.append((0.8, lambda axes: _draw_rate(axes, rate)))
    with figure_of(sum(height for height, _ in panels) + 0.5) as figure:
        stack = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=[height for height, _ in panels])[:, 0]
        for axes, (_, draw) in zip(stack, panels, strict=True):
            draw(axes)
            axes.grid(axis="y", color=FAINT, linewidth=0.6)
        stack[-1].set_xlabel("optimiser steps")
        stack[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        stack[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        figure.align_ylabels(stack)
        return svg_of(figure)


def metric_bars(results: Sequence[EvaluationResult]) -> list[bytes]:
    """The untuned and the tuned model's value of each metric, with the interval of the tuned one's, and the interval of the change.

    Metrics differ by orders of magnitude, so each row has its own scale: from 0 to 1 where a metric has these bounds, else from 0 to the
    largest value. One picture for ROWS_MAX metrics.
    """
    shown = [result for result in results if result.value is not None or result.baseline is not None]
    pages = math.ceil(len(shown) / ROWS_MAX)
    size = math.ceil(len(shown) / max(1, pages))
    return [_bars(shown[start : start + size]) for start in range(0, len(shown), size)] if shown else []


def strategies(entries: Sequence[BaselineResult]) -> bytes | None:
    """What the untuned model reaches with each prompt, by the metric that the best was chosen by. None for fewer than two."""
    best = next((entry for entry in entries if entry.best), None)
    rows = [entry for entry in entries if best is not None and entry.metric == best.metric]
    if best is None or len(rows) < 2:
        return None
    with figure_of(0.9 + 0.3 * len(rows)) as figure:
        axes = figure.subplots()
        for place, entry in enumerate(rows):
            colour = TUNED if entry.best else UNCLEAR
            low = entry.low if entry.low is not None else entry.value
            high = entry.high if entry.high is not None else entry.value
            axes.plot((low, high), (place, place), color=colour, linewidth=1.4, solid_capstyle="butt")
            axes.plot(entry.value, place, marker="D" if entry.best else "o", color=colour, markersize=5.5 if entry.best else 4.5)
            axes.annotate(number(entry.value), (high, place), (6, 0), textcoords="offset points", va="center", fontsize=7.5)
        names = [clipped(f"{entry.prompt}{f' ({entry.model})' if entry.model else ''}", 40) for entry in rows]
        axes.set_yticks(range(len(rows)), [f"{name}  (best)" if row.best else name for name, row in zip(names, rows, strict=True)])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=FAINT, linewidth=0.6)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.margins(x=0.12)
        axes.set_xlabel(f"{best.metric} of the untuned model")
        return svg_of(figure)


def gaps(course: Course) -> list[tuple[int, float]]:
    """Validation loss less training loss, after each step that the validation loss was measured."""
    found = ((point.step, gap_at(course, point)) for point in course.held_out if point.step > 0)
    return [(step, gap) for step, gap in found if gap is not None]


def _draw_losses(axes: "Axes", train: list[tuple[int, float]], held_out: list[tuple[int, float]], marked: int | None) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    if train:
        steps, losses = zip(*train, strict=True)
        averaged = len(losses) >= 2 * WINDOWS
        if averaged:
            axes.plot(steps, losses, color=TUNED, linewidth=0.7, alpha=0.3)
        axes.plot(steps, _smoothed(losses), color=TUNED, linewidth=1.6, label=f"training{' (moving average)' if averaged else ''}")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(
            steps,
            losses,
            color=HELD_OUT,
            linewidth=1.2,
            linestyle="--",
            marker="o",
            markersize=4 if len(steps) < 60 else 0,
            label="validation",
        )
    if marked is not None:
        axes.axvline(marked, color=UNCLEAR, linewidth=1.0, linestyle=":", label=f"judged: step {marked:,}")
    values = [*_smoothed([value for _, value in train]), *(value for _, value in held_out)]
    if min(values) > 0 and max(values) / min(values) > LOG_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: number(value))
        axes.yaxis.set_minor_formatter(NullFormatter())  # its own labels are mathematics, which is not parsed here
    axes.set_ylabel("loss")
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, frameon=False, fontsize=8, borderaxespad=0.2)


def _draw_gap(axes: "Axes", gap: list[tuple[int, float]]) -> None:
    steps, values = zip(*gap, strict=True)
    axes.axhline(0, color=UNCLEAR, linewidth=0.8)
    axes.fill_between(steps, 0, values, color=HELD_OUT, alpha=0.15, linewidth=0)
    axes.plot(steps, values, color=HELD_OUT, linewidth=1.2, marker="o", markersize=3 if len(steps) < 60 else 0)
    axes.set_ylabel("validation\nless training")


def _draw_rate(axes: "Axes", rate: list[tuple[int, float]]) -> None:
    steps, values = zip(*rate, strict=True)
    axes.plot(steps, values, color=UNCLEAR, linewidth=1.2)
    axes.set_ylabel("learning\nrate")
    axes.set_ylim(0, max(values) * 1.15 or 1.0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _bars(results: Sequence[EvaluationResult]) -> bytes:
    """One picture: bars on the left, the change on the right."""
    from matplotlib.patches import Patch

    with figure_of(0.9 + 0.46 * len(results)) as figure:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        suites = [result.metric.rpartition("/")[0] for result in results]
        for place, result in enumerate(results):
            _draw_row(left, place, result)
            _draw_change(right, place, result)
            if place and suites[place] != suites[place - 1]:
                for axes in (left, right):
                    axes.axhline(place - 0.5, color="#CCCCCC", linewidth=0.7)
        left.set_yticks(range(len(results)), [_row_name(result.metric) for result in results])
        left.set_ylim(len(results) - 0.4, -0.6)
        left.set_xlim(-0.02, 1.22)
        right.axvline(0, color=UNCLEAR, linewidth=0.8)
        right.set_xlim(-1.25, 2.3)
        for axes, title in ((left, "value, each on its own scale"), (right, "change by the tuning")):
            axes.set_title(title, loc="left", fontsize=8.5, fontweight="bold")
            axes.set_xticks([])
            axes.tick_params(axis="y", length=0)
            for spine in axes.spines.values():
                spine.set_visible(False)
        figure.legend(
            handles=[
                Patch(facecolor=UNTUNED, hatch="////", edgecolor="white", label="untuned"),
                Patch(facecolor=TUNED, label="tuned"),
                *_legend(results),
            ],
            loc="outside lower center",
            ncols=6,
            frameon=False,
            fontsize=8,
        )
        return svg_of(figure)


def _draw_row(axes: "Axes", place: int, result: EvaluationResult) -> None:
    """Two bars, on a track that is as long as the scale where the metric has bounds."""
    low, high = result.low, result.high
    values = [value for value in (result.value, result.baseline, low, high) if value is not None]
    start, end = _scale(result.metric, values)

    def across(value: float) -> float:
        return (value - start) / (end - start)

    if largest(result.metric) is not None:
        axes.barh(place, 1.0, height=0.66, color="#F6F6F6", zorder=0)
    untuned: dict[str, Any] = {"facecolor": UNTUNED, "hatch": "////", "edgecolor": "white"}
    tuned: dict[str, Any] = {"facecolor": TUNED}
    for middle, value, style in ((place - 0.17, result.baseline, untuned), (place + 0.17, result.value, tuned)):
        if value is None:
            axes.text(across(0.0) + 0.01, middle, "not measured", va="center", fontsize=7, color=UNCLEAR, style="italic")
            continue
        axes.barh(middle, across(value) - across(0.0), left=across(0.0), height=0.3, linewidth=0, **style)
        right = value
        if style is tuned and low is not None and high is not None and high > low:
            axes.plot((across(low), across(high)), (middle, middle), color=INK, linewidth=1.0, marker="|", markersize=4.5)
            right = max(value, high)
        axes.text(across(max(right, 0.0)) + 0.015, middle, number(value), va="center", fontsize=7.5)


def _draw_change(axes: "Axes", place: int, result: EvaluationResult) -> None:
    """The change with its interval; each row on its own scale, which is symmetric about 0."""
    change, kind = change_of(result), kind_of(result.metric, change_of(result))
    if change is None or kind is None:
        return
    low, high = change.low, change.high
    reach = max(abs(value) for value in (change.value, low, high) if value is not None) or 1.0
    words = signed(change.value)
    if low is not None and high is not None:
        axes.plot((low / reach, high / reach), (place, place), color=_KINDS[kind]["color"], linewidth=1.6, solid_capstyle="butt")
        words += f"\n{signed(low)} … {signed(high)}"
    axes.plot(change.value / reach, place, markersize=6, **_KINDS[kind])
    axes.text(1.15, place, words, va="center", fontsize=7.2, linespacing=1.25)


def _legend(results: Sequence[EvaluationResult]) -> "list[Line2D]":
    """The signs of the changes that are there."""
    from matplotlib.lines import Line2D

    there = {kind_of(result.metric, change_of(result)) for result in results}
    return [Line2D([], [], label=kind, **style) for kind, style in _KINDS.items() if kind in there]


def _scale(metric: str, values: Sequence[float]) -> tuple[float, float]:
    """Where a row begins and ends."""
    start, end = min(0.0, *values), max(largest(metric) or 0.0, *values)
    return (start, end) if end > start else (0.0, 1.0)


def _row_name(metric: str) -> str:
    suite, _, name = metric.rpartition("/")
    return f"{clipped(suite, 28)}\n{clipped(name, 28)}" if suite else clipped(name, 28)


def _series(points: Sequence[Point], name: str) -> list[tuple[int, float]]:
    return [(point.step, point.values[name]) for point in points if name in point.values]


def _smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each value and its neighbours on both sides; the values themselves where there are few."""
    reach, sums = len(values) // (2 * WINDOWS), [0.0, *itertools.accumulate(values)]
    ends = [(max(0, place - reach), min(len(values), place + reach + 1)) for place in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]
