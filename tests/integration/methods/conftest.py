"""Volumes as a pod mounts them, with a part of the quickstart's data; and the table that the tests make."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.unit.docs.markdown import ROOT

ROWS = {"train": 48, "validation": 8, "test": 8, "preference": 330}
FEW = 24
"""Preferences of the table: enough to learn them by heart."""
_table = pytest.StashKey[list[tuple[str, ...]]]()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The sums of several threads differ in their last bits from run to run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The claim `quickstart` with the tiny model, and the ConfigMap `support-data` with the first rows of each file."""
    root = tmp_path_factory.mktemp("volumes")
    shutil.copytree(ROOT / "examples/models/tiny-llama", root / "claims/quickstart/models/tiny-llama")
    data = root / "configmaps/support-data"
    data.mkdir(parents=True)
    for name, count in ROWS.items():
        rows = (ROOT / f"examples/data/support/{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (data / f"{name}.jsonl").write_text("".join(rows[:count]), encoding="utf-8")
        if name == "preference":
            (data / "few-preferences.jsonl").write_text("".join(rows[:FEW]), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def table(pytestconfig: pytest.Config) -> list[tuple[str, ...]]:
    """Rows that are printed at the end of the run."""
    return pytestconfig.stash.setdefault(_table, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table."""
    rows = config.stash.get(_table, [])
    if not rows:
        return
    terminalreporter.section("every method with every objective, on the tiny model")
    for row in sorted(rows):
        terminalreporter.write_line("| " + " | ".join(row) + " |")
