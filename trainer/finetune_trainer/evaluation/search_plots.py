"""The picture of a search: what its trials came to, by each field that was searched. Pure: the same values give the same bytes."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune_trainer.evaluation.drawing import FAINT, HELD_OUT, TUNED, figure_of, svg_of
from finetune_trainer.evaluation.escaping import clipped
from finetune_trainer.trials import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
LOG_FROM = 20.0
"""Ratio of the largest value of a field to the smallest from which on its scale is logarithmic."""
FEW = 6
"""Whole numbers that are written below their scale one by one."""
WIDE = 200.0
"""Ratio from which on only powers of ten are written below such a scale."""


def search_picture(trials: Sequence[Trial], best: int | None, metric: str) -> bytes | None:
    """A panel for each field, a point for each trial that was completed. None for fewer than two. `best` is the best trial's number."""
    done = [trial for trial in trials if trial.value is not None]
    fields = sorted({path for trial in done for path in trial.values})
    if len(done) < 2 or not fields:
        return None
    rows, columns = math.ceil(len(fields) / COLUMNS), min(COLUMNS, len(fields))
    with figure_of(2.2 * rows + 0.5) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for place, axes in enumerate(grid.flat):
            if place >= len(fields):
                axes.set_visible(False)
                continue
            _panel(axes, fields[place], [trial for trial in done if fields[place] in trial.values], best)
            if place % COLUMNS == 0:
                axes.set_ylabel(clipped(metric, 40))
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
        return svg_of(figure)


def _panel(axes: "Axes", path: str, trials: Sequence[Trial], best: int | None) -> None:
    """The trials' values of one field against what they came to."""
    from matplotlib.ticker import LogLocator

    values = [trial.values[path] for trial in trials]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        across = [float(value) for value in values]
        if min(across) > 0 and max(across) / min(across) > LOG_FROM:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if max(across) / min(across) < WIDE else (1.0,)))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_formatter(lambda value, _: "")
        elif len(set(values)) <= FEW and all(isinstance(value, int) for value in values):
            axes.set_xticks(sorted(set(across)))
    else:
        words = sorted({str(value) for value in values})
        across = [float(words.index(str(value))) for value in values]
        axes.set_xticks(range(len(words)), [clipped(word, 14) for word in words])
        axes.margins(x=0.2)
    reached = [trial.value or 0.0 for trial in trials]
    axes.plot(across, reached, linestyle="", marker="o", markersize=5, color=TUNED, alpha=0.75, label="a trial")
    chosen = [(x, y) for x, y, trial in zip(across, reached, trials, strict=True) if trial.number == best]
    for x, y in chosen:
        axes.plot(
            x, y, linestyle="", marker="D", markersize=9, markerfacecolor="none", markeredgewidth=1.6, color=HELD_OUT, label="the best"
        )
    axes.set_xlabel(clipped(path, 34))
    axes.tick_params(axis="x", labelsize=7.5)
    axes.grid(color=FAINT, linewidth=0.6)
