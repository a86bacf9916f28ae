"""What the documents and the examples of this repository hold: fenced blocks, links, and commands in the comments of manifests."""

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
EXAMPLES = sorted(file for file in (ROOT / "examples").rglob("*.yaml") if ".finetune" not in file.parts and ".status." not in file.name)
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


def languages() -> set[str]:
    """Of all blocks; empty for one that names none."""
    return {match["language"] for document in DOCUMENTS for match in _FENCE.finditer(document.read_text(encoding="utf-8"))}


def comments(manifest: Path) -> Block:
    """The commands in the comment that a manifest begins with: its lines that are indented by more than one space, but for data."""
    head = re.split(r"^[^#\n]", manifest.read_text(encoding="utf-8"), maxsplit=1, flags=re.MULTILINE)[0]
    return Block(manifest, 1, "\n".join(re.findall(r"^#   +(?!\{|\w+: )(.*)$", head, re.MULTILINE)))


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
