"""`finetune explain`."""

import re

import pytest
from typer.testing import CliRunner

from finetune_api.reason_pages import PAGES, page
from finetune_api.reasons import ADVICE, MEANINGS, Reason
from finetune_operator.cli import app
from finetune_operator.reason_command import plain, reasons_beginning


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ("explain", *arguments))
    return result.exit_code, result.output


def test_a_reason_is_explained_in_plain_text() -> None:
    code, output = run("SecretNotFound")
    assert code == 0
    assert PAGES[Reason.SECRET_NOT_FOUND].cause in output
    lines = output.splitlines()
    assert lines[:3] == ["SecretNotFound", "", f"Cause. {PAGES[Reason.SECRET_NOT_FOUND].cause}"]
    check = lines.index("Check:")
    assert lines[check + 1 : check + 4] == [*(f"  {command}" for command in PAGES[Reason.SECRET_NOT_FOUND].check), ""]
    assert lines[-1] == f"Fix. {ADVICE[Reason.SECRET_NOT_FOUND].hint}"


@pytest.mark.parametrize("reason", Reason)
def test_no_page_has_marks_left(reason: Reason) -> None:
    assert not re.search(r"\*\*|^#|`|^- ", plain(page(reason)), re.MULTILINE)


def test_the_case_does_not_matter() -> None:
    assert run("oomkilled") == run("OOMKilled") == (0, plain(page(Reason.OUT_OF_MEMORY)))


def test_a_reason_of_a_job_that_goes_well_is_explained_too() -> None:
    assert run("Suspended") == (0, f"Suspended\n\n{MEANINGS[Reason.SUSPENDED]}\n")


@pytest.mark.parametrize(("word", "meant"), [("OutOfMemory", "HostOutOfMemory"), ("NCCLhung", "NCCLHang"), ("StorageFul", "StorageFull")])
def test_an_unknown_reason_is_answered_with_those_like_it(word: str, meant: str) -> None:
    code, output = run(word)
    assert code == 2
    assert output.startswith(f"there is no reason {word!r}; did you mean ")
    assert meant in output


def test_a_word_that_is_like_none_leads_to_the_list() -> None:
    assert run("xyzzy") == (2, "there is no reason 'xyzzy'; `finetune explain` lists all\n")


def test_without_a_reason_all_are_listed() -> None:
    code, output = run()
    assert code == 0
    assert sorted(line.split()[0] for line in output.splitlines()) == sorted(Reason)
    assert re.search(r"^OOMKilled +Raise memory in compute.resourcesPerWorker", output, re.MULTILINE)


def test_the_shell_completes_names() -> None:
    assert reasons_beginning("gpu") == ["GPUOutOfMemory", "GPUHardwareError", "GPUUnavailable", "GPUKernelFailed"]
    assert reasons_beginning("Storage") == ["StorageFull", "StorageUnavailable"]
    assert reasons_beginning("x") == []
