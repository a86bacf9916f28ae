"""Makes docs/demo.svg from a recording of `make demo` on a terminal of 110 columns.

    script --quiet --command "make demo" recording.txt
    python docs/make_demo_picture.py < recording.txt > docs/demo.svg

The picture shows what is left on the screen at the end: of a place that was drawn again and again, the last state.
"""

import argparse
import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

_PIECE = re.compile(r"(\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\r|\n)")
_FRAME = re.compile(r"^Script (started|done) on .*\n", re.MULTILINE)
_FONT_FACE = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


def screen(recording: str) -> list[str]:
    """The lines on the screen at the end, with their colours: cursor up and erase line are followed, other movements left out."""
    lines, row = [""], 0
    for piece in _PIECE.split(recording):
        if piece == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif match := re.fullmatch(r"\x1b\[(\d*)A", piece):
            row = max(0, row - int(match[1] or 1))
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif piece.endswith("m") or not piece.startswith(("\x1b", "\r")):
            lines[row] += piece
    return lines


def picture(recording: str, width: int, title: str) -> str:
    """An SVG that loads nothing from elsewhere."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor", legacy_windows=False)
    for line in screen(_FRAME.sub("", recording).replace(f"{Path.cwd()}/", "").rstrip()):
        text = Text.from_ansi(line.rstrip())
        for part in text.divide(range(width, len(text), width)):  # as a terminal breaks lines, not as a typesetter does
            console.print(part, highlight=False)
    svg = _FONT_FACE.sub("", console.export_svg(title=title, theme=SVG_EXPORT_THEME, unique_id="demo"))
    return svg.replace("<svg ", '<svg xml:space="preserve" ', 1)  # not every program keeps spaces otherwise


def main() -> None:
    """Recording in, picture out."""
    parser = argparse.ArgumentParser(
        description="Make the picture of the demo: a recorded terminal on standard input, SVG on standard output."
    )
    parser.add_argument("--width", type=int, default=110, help="columns of the terminal (%(default)s)")
    parser.add_argument("--title", default="make demo", help="title of the window (%(default)s)")
    arguments = parser.parse_args()
    sys.stdout.write(picture(sys.stdin.read(), arguments.width, arguments.title))


if __name__ == "__main__":
    main()
