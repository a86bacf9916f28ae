"""What all pictures of a report have in common: colours, style, and how they become files.

Every picture says with shapes and words what it says with colours, which colour-blind readers and printers on grey can tell apart. Text is
drawn as outlines, so a picture looks alike everywhere.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 7.5
"""Of every picture, in inches: a page's text."""
TUNED, UNTUNED, HELD_OUT = "#0072B2", "#B3B3B3", "#D55E00"
BETTER, WORSE, UNCLEAR, INK, FAINT = "#009E73", "#D55E00", "#555555", "#222222", "#E6E6E6"
"""Blue, vermilion and green of the palette that Okabe and Ito have made for all kinds of sight; greys for the rest."""
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with the library
    "font.size": 8.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "path",
    "svg.hashsalt": "finetune",
    "path.simplify": True,
    "text.parse_math": False,  # a dollar sign is a dollar sign
}


@contextmanager
def figure_of(height: float) -> "Iterator[Figure]":
    """An empty figure, so many inches high. A user's own settings do not count, and are as they were afterwards."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")


def svg_of(figure: "Figure") -> bytes:
    """The file, without a time or a version in it."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return file.getvalue()
