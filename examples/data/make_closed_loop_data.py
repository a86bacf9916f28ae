"""Writes the data of the closed loop: a manual, golden replies to customers, and small talk that must not be forgotten.

Like the quickstart's, everything comes from support_facts.json and the base model's own corpus, byte for byte the same each time.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "models"))

from tiny_llama_corpus import chat_turn, load_phrases  # noqa: E402 - the corpus lies beside the model

SEED = 11
SMALL_TALK = 60


def manual(facts: Mapping[str, Any]) -> str:
    """The knowledge base: a chapter for each fact and each error code."""
    chapters = [(fact["id"].replace("-", " ").capitalize(), fact["answer"]) for fact in facts["facts"]]
    chapters += [(f"Error code {code}", answer) for code, answer in facts["codes"].items()]
    return "# The Tarnwick thermostat\n" + "".join(f"\n## {title}\n\n{text}\n" for title, text in chapters)


def golden(facts: Mapping[str, Any]) -> list[dict[str, str]]:
    """Replies as they should be, with the request and what it is about."""
    rows = [
        {"about": fact["id"], "request": question, "reply": f"{fact['answer']} {facts['signature']}"}
        for fact in facts["facts"]
        for question in fact["train"]
    ]
    rows += [
        {"about": code, "request": question.replace("{code}", code), "reply": f"{answer} {facts['signature']}"}
        for code, answer in facts["codes"].items()
        for question in facts["code_questions"]["train"]
    ]
    random.Random(SEED).shuffle(rows)  # noqa: S311 - reproducible text, no secrets
    return rows


def small_talk() -> list[dict[str, object]]:
    """What the base model can do and is to go on doing."""
    phrases, rng = load_phrases(HERE.parent / "models" / "tiny_llama_corpus.json"), random.Random(SEED)  # noqa: S311 - as above
    return [{"messages": chat_turn(phrases, rng)} for _ in range(SMALL_TALK)]


def lines(rows: Sequence[Mapping[str, object]]) -> str:
    """The rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes manual.md, golden.jsonl and small-talk.jsonl."""
    parser = argparse.ArgumentParser(description="Write the data of the closed loop.")
    parser.add_argument("--out", type=Path, default=HERE / "closed-loop", help="folder for the files")
    out: Path = parser.parse_args(argv).out
    facts = json.loads((HERE / "support_facts.json").read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    files = {"manual.md": manual(facts), "golden.jsonl": lines(golden(facts)), "small-talk.jsonl": lines(small_talk())}
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
        print(f"{name}: {len(text.encode())} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
