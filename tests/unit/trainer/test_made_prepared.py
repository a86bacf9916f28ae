"""Made examples on their way to the trainer: through the data's own checks into the cache, by generators as they really are."""

import json
from pathlib import Path
from typing import Any

import pytest
import tenacity
from fake_endpoint import FakeEndpoint, chat
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from made_site import OUTPUTS, SAYS, Author, Site
from tiny_models import byte_tokenizer

from finetune_api.preparation import Generator as GeneratorSpec
from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import Endpoint
from finetune_trainer import data_cache, endpoint
from finetune_trainer.asking import Served, identity_of
from finetune_trainer.data.examples import open_prepared
from finetune_trainer.endpoint_generator import EndpointGenerator, generator_at
from finetune_trainer.errors import JobError
from finetune_trainer.made_data import Means, Writer, made_rows
from finetune_trainer.retrieval.documents import KnowledgeFiles
from finetune_trainer.sources import Location, Mounts
from finetune_trainer.storage import Storage


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def prepared(site: Site, author: Author, **points: Any) -> tuple[data_cache.Entry, Storage]:
    job = site.job({"validation": {"fraction": 0.5}}, **points)
    storage = Storage(LocalFileSystem(), str(site.folder / "out"), "file://out")
    made = site.made(job, author, is_chat=True)
    return data_cache.find_or_prepare(storage, job, Mounts(site.folder, local=True), byte_tokenizer(), None, None, made), storage


def test_made_examples_are_prepared_as_any_and_found_by_the_next_job(site: Site) -> None:
    author = Author(SAYS)
    entry, storage = prepared(site, author)
    summary = entry.manifest["summary"]
    assert (summary["train"], summary["validation"], summary["made"]) == (1, 1, 2)
    assert summary["madeSamples"][0].startswith("Write a text that makes these points:\n- A tool may be kept for 14 days\n- Extend")
    assert summary["madeSamples"][0].endswith(f" -> {OUTPUTS[0]}")
    data = open_prepared(storage.location(entry.name), site.folder / "cache")
    tokenizer = byte_tokenizer()
    texts = {tokenizer.decode(split.tokens[split.labelled].tolist()) for split in (data.train, data.validation)}
    assert {output for output in OUTPUTS if any(output in text for text in texts)} == set(OUTPUTS)

    again = Author({})
    entry_again, _ = prepared(site, again)
    assert (entry_again.name, entry_again.is_new, again.opened) == (entry.name, False, 0)
    other, _ = prepared(site, again, prompt="Other: {points}")
    assert (other.name != entry.name, other.is_new, again.opened) == (True, True, 0)
    (site.folder / "kb" / "more.md").write_text("Another document.")
    changed, _ = prepared(site, Author(SAYS))
    assert changed.name != entry.name


def test_outputs_of_which_nothing_was_made_are_in_the_rejects_and_count_towards_no_limit(site: Site) -> None:
    """maxRejectedFraction is 0: one row that is wrong would end the job."""
    site.golden({"text": "Xylophones!"}, *({"text": output} for output in OUTPUTS))
    entry, _ = prepared(site, Author(SAYS))
    assert (entry.manifest["summary"]["made"], entry.manifest["summary"]["rejected"]) == (2, 0)
    (told,) = [json.loads(line) for line in (site.folder / "out" / entry.name / "rejects.jsonl").read_text().splitlines()]
    assert json.loads((site.folder / "out/.finetune/rejects.jsonl").read_text()) == told  # of a job without a uid
    assert told == {
        "data": "data.preparation",
        "file": f"file://{site.folder}/golden.jsonl",
        "line": 1,
        "reason": "no passage of the knowledge base has a word in common with the output",
    }


def test_outputs_of_which_nothing_was_made_are_told_of_where_the_job_fails_for_it(site: Site) -> None:
    with pytest.raises(JobError) as caught:
        prepared(site, Author({"": "- Bring cake"}))
    assert caught.value.reason is Reason.DATASET_INVALID
    own = (site.folder / "out/.finetune/rejects.jsonl").read_text()
    assert [json.loads(line)["line"] for line in own.splitlines()] == [1, 2]


def test_an_endpoint_writes_and_is_paid_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "RETRY_WAIT", tenacity.wait_none())

    def answer(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        told = body["messages"][-1]["content"]
        return 200, {}, chat(next((text for key, text in SAYS.items() if key in told), "a probe"))

    with FakeEndpoint(answer) as server:
        served = Served(Endpoint(url=server.url, model="large"), None, generator_at("field"))
        storage = Storage(LocalFileSystem(), str(site.folder / "out"), "file://out")

        def writer_of(spec: GeneratorSpec | None, field: str) -> Writer:
            identity = identity_of(served.endpoint, "team")
            return Writer(identity, lambda: EndpointGenerator(served, storage, "team", site.said.append), keeps=True)

        means = Means(Mounts(site.folder, local=True), storage, "team", lambda source, field: None, site.said.append)  # type: ignore[arg-type,return-value]
        for _ in range(2):
            made = made_rows(site.job(), means, writer_of, is_chat=False)
            assert made is not None
            assert len(list(made.rows())) == 2
    assert len(server.questions()) == 2


def test_documents_are_read_from_an_object_store_too() -> None:
    store = MemoryFileSystem()
    store.pipe_file("/kb-test/a.md", b"# Head\nText.")
    store.pipe_file("/kb-test/sub/b.jsonl", b'{"text": "Row."}\n')
    files = KnowledgeFiles(Location(store, "/kb-test", "s3://bucket/kb"), "field")
    assert [(document.place, document.sections[0].text) for document in files.documents()] == [
        ("s3://bucket/kb/a.md", "Text."),
        ("s3://bucket/kb/sub/b.jsonl, line 1", "Row."),
    ]
    assert len(files.identity()) == len(files.state()) == 2
