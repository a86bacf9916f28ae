"""Knowledge bases as they are meant, by mistake, and by malice."""

import json
import os
import time
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from finetune_api.preparation import KnowledgeBase
from finetune_api.reasons import Reason
from finetune_trainer.errors import JobError
from finetune_trainer.retrieval import documents as documents_module
from finetune_trainer.retrieval import files_of
from finetune_trainer.retrieval.documents import Document, KnowledgeFiles, Section
from finetune_trainer.sources import Location, Mounts

FIELD = "data.preparation.contentPoints.knowledgeBase"


def files_at(path: Path) -> KnowledgeFiles:
    return KnowledgeFiles(Location(LocalFileSystem(), str(path), "pvc://docs/kb"), FIELD)


def read(folder: Path, **files: str | bytes) -> list[Document]:
    """The documents of a folder with these files; `__` in a name stands for the dot of its ending."""
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(files_at(folder).documents())


def refusal(folder: Path, **files: str | bytes) -> str:
    with pytest.raises(JobError) as caught:
        read(folder, **files)
    assert caught.value.reason is Reason.KNOWLEDGE_BASE_INVALID
    assert caught.value.message.startswith(f"{FIELD}: ")
    return caught.value.message.removeprefix(f"{FIELD}: ")


def test_each_form_gives_its_text_under_its_headings(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        a__txt="\ufeffPlain words.\r\n\r\n# no heading\r\n",
        b__md=(
            "---\nkey: value\n---\nBefore.\n# Loans\n<!-- a\nnote -->\n## How *long*\n"
            'See [the rules](http://x/y "t") now.\n\n# Fees #\nNone.\n'
        ),
        c__html=(
            "<title>Site</title><nav>Menu</nav><h1>Depots</h1><p>Open<br>daily.<ul><li>North<li>South</ul>"
            "<script>x()</script><h2>Map</h2>Here."
        ),
        d__jsonl=json.dumps({"text": "A row.", "title": "Its title", "id": 7}) + "\n\n" + json.dumps({"text": "Another."}) + "\n",
    )
    assert found == [
        Document("pvc://docs/kb/a.txt", (Section("", "Plain words.\n\n# no heading"),)),
        Document(
            "pvc://docs/kb/b.md", (Section("", "Before."), Section("Loans / How *long*", "See the rules now."), Section("Fees", "None."))
        ),
        Document(
            "pvc://docs/kb/c.html", (Section("Site / Depots", "Open\ndaily.\n\nNorth\n\nSouth"), Section("Site / Depots / Map", "Here."))
        ),
        Document("pvc://docs/kb/d.jsonl, line 1", (Section("Its title", "A row."),)),
        Document("pvc://docs/kb/d.jsonl, line 3", (Section("", "Another."),)),
    ]


def test_markdown_headings_stand_in_both_forms_and_not_in_code(tmp_path: Path) -> None:
    text = "Title\n=====\none\n\n```sh\n# no heading\n---\n```\nPart\n---\ntwo\n### Deep\nthree\n## Side\nfour\n"
    sections = read(tmp_path, a__md=text)[0].sections
    assert [(section.title, section.text) for section in sections] == [
        ("Title", "one\n\n```sh\n# no heading\n---\n```"),
        ("Title / Part", "two"),
        ("Title / Part / Deep", "three"),
        ("Title / Side", "four"),
    ]


def test_html_that_is_broken_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    page = (
        "<p>Fish &amp; &eacute;els <b>bold</i> text<table><tr><th>Day<th>Hour<tr><td>Mon<td>9</table>"
        "<pre>a\n  b</pre><div>caf\u00e9 <span>x"
    )
    sections = read(tmp_path, a__html=page)[0].sections
    assert [section.text for section in sections] == ["Fish & \u00e9els bold text\n\nDay | Hour\n\nMon | 9\n\na\nb\n\ncaf\u00e9 x"]


def test_what_a_reader_does_not_see_is_no_text(tmp_path: Path) -> None:
    page = (
        "<body>Seen.<script>if (a<b) { '<p>no</p>' }</script><style>p {}</style><template>no</template>"
        "<svg><title>no</title></svg>Too.</body>"
    )
    assert [section.text for section in read(tmp_path, a__htm=page)[0].sections] == ["Seen.Too."]


def test_other_files_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.TXT").write_text("deep")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "c.txt").write_text("hidden")
    found = read(tmp_path, a__txt="text", logo__png=b"\x89PNG\0", empty__md="")
    assert [document.place for document in found] == ["pvc://docs/kb/a.txt", "pvc://docs/kb/sub/b.TXT"]
    assert files_at(tmp_path).files()[1] == 1


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "pvc://docs/kb is an empty folder: documents end in .txt"),
        ({"a__pdf": b"%PDF"}, "pvc://docs/kb holds no document: documents end in .txt"),
        ({"a__md": " \n", "b__html": "<p></p>", "c__jsonl": ""}, "pvc://docs/kb holds no text: its documents are empty"),
        ({"a__txt": b"one\ntwo\x00three"}, "pvc://docs/kb/a.txt, line 2: the file holds a zero byte: it is no text, or not in UTF-8"),
        ({"a__txt": "text".encode("utf-16")}, "pvc://docs/kb/a.txt, line 1: the file holds a zero byte"),
        ({"a__md": b"one\ntwo\ncaf\xe9\n"}, "pvc://docs/kb/a.md, line 3: the file is not UTF-8 (byte 12): convert it"),
        (
            {"a__jsonl": '{"text": "x"}\n{"body": "x"}\n'},
            "1 row cannot be used. pvc://docs/kb/a.jsonl, line 2: text is missing; the row has body",
        ),
        ({"a__jsonl": '{"text": 3}\n'}, "1 row cannot be used. pvc://docs/kb/a.jsonl, line 1: text must be a string, not a number"),
        ({"a__jsonl": '{"text": "x", "title": 3}'}, "a.jsonl, line 1: title must be a string, not a number"),
        ({"a__jsonl": '{"text": " "}\n[1]\nnope\n'}, "3 rows cannot be used. pvc://docs/kb/a.jsonl, line 1: text is empty; pvc"),
        ({"a__jsonl": b'{"text": "\xff"}'}, "pvc://docs/kb/a.jsonl, line 1: the row is not UTF-8 (byte 11)"),
        ({"a__html": "<div>" * 200_000 + "deep"}, "pvc://docs/kb/a.html: the page has tags more than 1000 deep"),
    ],
)
def test_what_is_no_knowledge_base_is_refused_by_file_and_line(tmp_path: Path, files: dict[str, str | bytes], told: str) -> None:
    assert told in refusal(tmp_path, **files)


def test_many_bad_rows_are_counted_and_five_told(tmp_path: Path) -> None:
    told = refusal(tmp_path, a__jsonl="{}\n" * 30)
    assert told.startswith("30 rows cannot be used. ")
    assert told.count("text is missing") == 5
    assert told.endswith("; and 25 more")


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="kb does not exist") as caught:
        list(files_at(tmp_path / "none").documents())
    assert caught.value.reason is Reason.KNOWLEDGE_BASE_INVALID


def test_files_and_knowledge_bases_have_a_size_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(documents_module.FILE_BYTES, "md", 1 << 20)
    monkeypatch.setattr(documents_module, "TEXT_CHARACTERS", 1 << 20)
    assert "a.md is larger than 1 MiB, the most of a md document: divide it" in refusal(tmp_path, a__md="x" * ((1 << 20) + 1))
    (tmp_path / "a.md").unlink()
    assert "kb holds more than 1 Mi characters: name a part of it" in refusal(tmp_path, a__txt="x" * 600_000, b__txt="y" * 600_000)


def test_symbolic_links_lead_nowhere_else(tmp_path: Path) -> None:
    base, secret = tmp_path / "kb", tmp_path / "secret.txt"
    base.mkdir()
    secret.write_text("secret")
    (base / "a.txt").write_text("own")
    (base / "loop").symlink_to(base)
    assert [document.place for document in files_at(base).documents()] == ["pvc://docs/kb/a.txt"]
    (base / "b.txt").symlink_to(secret)
    with pytest.raises(JobError, match="a symbolic link leads out of the volume"):
        list(files_at(base).documents())


def test_a_knowledge_base_is_found_by_its_field(tmp_path: Path) -> None:
    (tmp_path / "claims" / "docs" / "kb").mkdir(parents=True)
    (tmp_path / "claims" / "docs" / "kb" / "a.txt").write_text("on a claim")
    (tmp_path / "configmaps" / "notes").mkdir(parents=True)
    (tmp_path / "configmaps" / "notes" / "a.md").write_text("# T\nin a ConfigMap")
    mounts = Mounts(tmp_path)
    claim = files_of(KnowledgeBase.model_validate({"source": "pvc://docs/kb"}), mounts, FIELD)
    named = files_of(KnowledgeBase.model_validate({"configMap": {"name": "notes", "key": "a.md"}}), mounts, FIELD)
    assert [document.sections[0].text for document in claim.documents()] == ["on a claim"]
    assert [document.sections[0] for document in named.documents()] == [Section("T", "in a ConfigMap")]
    with pytest.raises(JobError, match=r"must not contain '\.\.'"):
        files_of(KnowledgeBase.model_construct(source="pvc://docs/kb/../..", config_map=None, secret_ref=None), mounts, FIELD)


def test_the_identity_is_of_the_content_and_the_state_of_the_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.md").write_text("the same")
    one, two = files_at(tmp_path / "one"), files_at(tmp_path / "two")
    assert one.identity() == two.identity() == ["md fa0487f2dc91544ab4b9f5b1d59b7eb2bf68807a6e42cdf22fce4e0bc4b84cb2"]
    before = one.state()
    (tmp_path / "one" / "one.md").write_text("the Same")
    os.utime(tmp_path / "one" / "one.md", (1, 1))
    assert one.identity() != two.identity()
    assert one.state() != before


@pytest.mark.parametrize("page", ["<p>" * 300_000, "<b>x" * 900 + "</i>" * 300_000, "<" * 900_000, "&" * 900_000, "<!--" * 200_000])
def test_malicious_pages_take_no_long_time(tmp_path: Path, page: str) -> None:
    begun = time.process_time()
    read(tmp_path, a__html=page, b__md=page, c__txt="text")
    assert time.process_time() - begun < 20


def test_unended_comments_and_links_take_no_long_time(tmp_path: Path) -> None:
    begun = time.process_time()
    read(tmp_path, a__md="<!--" * 200_000 + "[a](" * 200_000 + "[" * 200_000 + "# " * 200_000)
    assert time.process_time() - begun < 20


@pytest.mark.parametrize(
    "text",
    ["# x" + " " * 100_000 + "y", "# x" + " #" * 100_000 + "y", "# x" + "#" * 100_000 + " " * 100_000 + "y"],
    ids=["space", "both", "marks"],
)
def test_a_long_heading_takes_no_long_time(tmp_path: Path, text: str) -> None:
    begun = time.process_time()
    read(tmp_path, a__md=f"{text}\ntext")
    assert time.process_time() - begun < 5


def test_a_title_of_many_signs_takes_no_long_time(tmp_path: Path) -> None:
    begun = time.process_time()
    read(tmp_path, a__html=f"<title>{'a&amp;' * 500_000}</title><p>text")
    assert time.process_time() - begun < 10


def test_a_closed_heading_is_without_what_closes_it(tmp_path: Path) -> None:
    sections = read(tmp_path, a__md="## One ##  \na\n# Two#\nb\n# \nc\n# C # D\nd\n")[0].sections
    assert [(section.title, section.text) for section in sections] == [("One", "a"), ("Two", "b"), ("", "c"), ("C # D", "d")]


def test_a_title_that_stands_above_each_passage_is_bounded(tmp_path: Path) -> None:
    """Else a heading of a megabyte over ten thousand others takes ten gigabytes."""
    most, long = documents_module.TITLE_CHARACTERS, "x" * 5000
    found = read(
        tmp_path,
        a__md=f"# {long}\na\n## {long}y\nb\n",
        b__html=f"<title>{long}</title><h1>{long}</h1><p>c",
        c__jsonl=json.dumps({"text": "d", "title": long}),
    )
    assert {len(section.title) for document in found for section in document.sections} == {most}
