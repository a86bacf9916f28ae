"""What the documents of this repository hold: fenced blocks and links."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
DOCUMENTS = (
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "charts/finetune-operator/README.md",
    # what local runs leave is no document
    *(file for file in sorted((ROOT / "examples").rglob("README.md")) if ".finetune" not in file.parts),
)
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_HEADING = re.compile(r"^#+ (?P<text>.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    document: Path
    line: int
    """Of the opening fence, from 1."""
    text: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks(language: str) -> list[Block]:
    """All blocks of a language, without the indentation of the list that they stand in."""
    return [
        Block(document, text.count("\n", 0, match.start()) + 1, textwrap.dedent(match["text"]))
        for document in DOCUMENTS
        for text in [document.read_text(encoding="utf-8")]
        for match in _FENCE.finditer(text)
        if match["language"] == language
    ]


def links(document: Path) -> list[str]:
    """Targets of the links and images that stand in a document's prose."""
    return [match["target"] for match in _LINK.finditer(_prose(document))]


def anchors(document: Path) -> set[str]:
    """What a link to one of the document's headings may say after the #."""
    text = _FENCE.sub("", document.read_text(encoding="utf-8"))
    titles = (re.sub(r"[^\w\- ]", "", match["text"].lower()) for match in _HEADING.finditer(text))
    return {title.strip().replace(" ", "-") for title in titles}


def _prose(document: Path) -> str:
    return re.sub(r"`[^`\n]+`", "", _FENCE.sub("", document.read_text(encoding="utf-8")))
