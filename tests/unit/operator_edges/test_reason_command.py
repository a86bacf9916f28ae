"""`finetune explain`."""

import re

import pytest
from typer.testing import CliRunner

from finetune_api.reason_pages import PAGES, page
from finetune_api.reasons import Reason
from finetune_operator.cli import app
from finetune_operator.reason_command import reasons_beginning


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ("explain", *arguments))
    return result.exit_code, result.output


def test_a_reason_is_explained() -> None:
    code, output = run("GPUOutOfMemory")
    assert (code, output) == (0, page(Reason.GPU_OUT_OF_MEMORY))
    assert PAGES[Reason.GPU_OUT_OF_MEMORY].cause in output


def test_the_case_does_not_matter() -> None:
    assert run("oomkilled") == run("OOMKilled") == (0, page(Reason.OUT_OF_MEMORY))


def test_a_reason_of_a_job_that_goes_well_is_explained_too() -> None:
    assert run("Suspended") == (0, page(Reason.SUSPENDED))


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
