"""The table of reasons and the pages that are made of it."""

import re
from pathlib import Path

import pytest
from tests.unit.docs.markdown import anchors

from finetune_api import reason_pages
from finetune_api.reason_pages import PAGES, document, page
from finetune_api.reasons import ADVICE, MEANINGS, Reason
from finetune_api.status import TEXT_MAX

ROOT = Path(__file__).parents[3]
FIELDS = (ROOT / "docs/reference.md").read_text(encoding="utf-8")


def test_every_reason_is_a_failure_or_a_way_to_go_well() -> None:
    assert set(ADVICE) | set(MEANINGS) == set(Reason)
    assert not set(ADVICE) & set(MEANINGS)
    assert set(PAGES) == set(ADVICE)


def test_every_failure_has_an_anchor_of_its_own() -> None:
    """Runbook URLs of alerts lead there."""
    found = anchors(ROOT / "docs/reasons.md")
    assert {reason.lower() for reason in ADVICE} <= found
    assert len({reason.lower() for reason in Reason}) == len(Reason)


@pytest.mark.parametrize("reason", ADVICE)
def test_a_page_has_the_cause_the_checks_and_the_fix(reason: Reason) -> None:
    text = page(reason)
    assert text.startswith(f"## {reason}\n")
    assert PAGES[reason].cause in text
    assert ADVICE[reason].hint in text
    assert ("no: the job has failed" in text) is not ADVICE[reason].retryable
    assert len(ADVICE[reason].hint) <= TEXT_MAX, "the status would be refused"
    commands = re.findall(r"^- `(.+)`$", text, re.MULTILINE)
    assert commands == list(PAGES[reason].check)
    assert all(command.startswith(("kubectl ", "finetune ")) for command in commands)


@pytest.mark.parametrize("reason", ADVICE)
def test_a_hint_names_fields_that_exist(reason: Reason) -> None:
    """What looks like a path in the spec is one: `compute.workers`, `training.microBatchSize`."""
    for path in re.findall(
        r"\b(?:compute|training|method|evaluation|checkpoint|output|data|search|model)\.[a-zA-Z]+(?:\.[a-zA-Z]+)?", ADVICE[reason].hint
    ):
        *parents, last = path.split(".")
        assert f"### spec.{'.'.join(parents)}" in FIELDS, path
        section = FIELDS.split(f"### spec.{'.'.join(parents)}\n", 1)[1].split("\n##", 1)[0]
        assert f"| `{last}` |" in section, path


def test_a_failure_without_a_page_is_named(monkeypatch) -> None:
    monkeypatch.setattr(reason_pages, "PAGES", {reason: found for reason, found in PAGES.items() if reason != Reason.NO_PROGRESS})
    with pytest.raises(ValueError, match="no page for NoProgress"):
        document("")
