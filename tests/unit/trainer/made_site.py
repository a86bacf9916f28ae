"""A folder with a handbook and golden outputs, the jobs that make examples of them, and a generator that says what a test wants."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from finetune_api.preparation import Generator as GeneratorSpec
from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_trainer.data.rows import Fault, Row
from finetune_trainer.errors import JobError
from finetune_trainer.made_data import Means, Writer, made_rows
from finetune_trainer.sources import Mounts
from finetune_trainer.storage import Storage

HANDBOOK = """# Loans
A tool may be kept for 14 days. Members may extend a loan once by 7 days if nobody waits for the tool.

# Fees
Late tools cost 2 euros a day. A member with fees above 20 euros cannot borrow.

# Depots
The north depot is open on Mondays. The south depot is open on Fridays and lends trailers.
"""
OUTPUTS = ["Your drill is due after 14 days; you may extend the loan once by 7 days.", "Trailers are lent by the south depot, on Fridays."]


class Author:
    """A generator that answers by a table: the first key that stands in what it is told."""

    def __init__(self, says: Mapping[str, str], *, stops_after: int | None = None, shortfall: int = 0) -> None:
        self.says, self.stops_after, self.shortfall = says, stops_after, shortfall
        self.told: list[str] = []
        self.opened = self.closed = 0

    def generate(self, prompts: Sequence[Sequence[Mapping[str, Any]]], max_new_tokens: int) -> Iterator[str]:
        for messages in prompts[: len(prompts) - self.shortfall]:
            if self.stops_after is not None and len(self.told) == self.stops_after:
                raise JobError(Reason.GENERATOR_UNAVAILABLE, "killed on the way")
            assert [message["role"] for message in messages] == ["user"]
            self.told.append(messages[0]["content"])
            yield next((answer for key, answer in self.says.items() if key in self.told[-1]), "")

    @contextmanager
    def open(self) -> Iterator["Author"]:
        self.opened += 1
        try:
            yield self
        finally:
            self.closed += 1


class Site:
    """A folder with a handbook and golden outputs, and the jobs that use them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "kb").mkdir()
        (folder / "kb" / "handbook.md").write_text(HANDBOOK)
        self.golden(*({"text": output, "id": str(number)} for number, output in enumerate(OUTPUTS)))
        self.said: list[str] = []

    def golden(self, *rows: Mapping[str, Any]) -> None:
        (self.folder / "golden.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def job(self, data: Mapping[str, Any] | None = None, *, questions: Mapping[str, Any] | None = None, **points: Any) -> FineTuneJob:
        base = {"source": f"file://{self.folder}/kb"}
        preparation: dict[str, Any] = {}
        if questions is not None:
            preparation["questions"] = {"knowledgeBase": base, **questions}
        if questions is None or points:
            golden = {"source": f"file://{self.folder}/golden.jsonl", **points.pop("goldenOutputs", {})}
            preparation["contentPoints"] = {"knowledgeBase": base, "goldenOutputs": golden, **points}
        spec = {
            "model": {"source": f"file://{self.folder}/model"},
            "data": {"preparation": preparation, **(data or {})},
            "method": {"lora": {}},
            "output": {"storage": f"file://{self.folder}/out"},
        }
        raw = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "bot", "namespace": "team"}, "spec": spec}
        return parse_job(raw, local=True)

    def rows(
        self, job: FineTuneJob, author: Author, *, is_chat: bool = False, keeps: bool = False, name: str = "author"
    ) -> list[Row | Fault]:
        return list(self.made(job, author, is_chat=is_chat, keeps=keeps, name=name).rows())

    def made(self, job: FineTuneJob, author: Author, *, is_chat: bool = False, keeps: bool = False, name: str = "author") -> Any:
        storage = Storage(LocalFileSystem(), str(self.folder / "out"), "file://out")
        asked: list[str] = []

        def writer_of(spec: GeneratorSpec | None, field: str) -> Writer:
            asked.append(field)
            return Writer({"name": name}, author.open, keeps)

        def encoder_of(source: Any, field: str) -> Any:
            raise AssertionError("no encoder is asked for")

        means = Means(Mounts(self.folder, local=True), storage, job.metadata.namespace, encoder_of, self.said.append)
        made = made_rows(job, means, writer_of, is_chat=is_chat)
        assert all(field.startswith("data.preparation.") and field.endswith(".generator") for field in asked)
        return made


SAYS = {
    "Your drill": "Here are the points:\n1. A tool may be kept for **14 days** [1]\n2. Extend the loan once by 7 days\n"
    "3. A tool may be kept for 30 days\n4. Bring cake",
    "Trailers are": "- The south depot lends trailers\n- It is open on Fridays\n",
}


ASKED = {
    "Loans": "Question: How long may a tool be kept?\nAnswer: For 14 days.\nQuestion: How often is a loan extended?\nAnswer: Never.",
    "Fees": "1. **Question:** What do late tools cost?\n   **Answer:** Late tools cost\n2 euros a day.\n"
    "Q2: Who cannot borrow?\nA2: A member with fees above 20 euros",
    "Depots": "Question: How long may a tool be KEPT\nAnswer: Until the south depot is open.\nAnd so on.",
}
