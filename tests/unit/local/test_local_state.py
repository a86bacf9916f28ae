"""The folder: whole files, one run at a time, and nothing taken on trust."""

import pytest

from finetune_operator.local.state import JobFile, State, StateError, remove


@pytest.fixture
def state(tmp_path):
    state = State(tmp_path / "state")
    state.prepare()
    return state


def test_a_job_is_run_by_one_run_at_a_time(state):
    with state.locked("demo"):
        with pytest.raises(StateError, match=r"another `finetune local` \(process \d+\) is running demo"), state.locked("demo"):
            pass
        with state.locked("other"):
            pass
    with state.locked("demo"):
        pass


def test_the_key_of_the_tokens_is_drawn_once_and_private(state):
    key = state.token_key()
    assert len(key) >= 32
    assert state.token_key() == key
    assert (state.root / "token-key").stat().st_mode & 0o777 == 0o600


def test_a_job_file_counts_its_versions_and_loads_what_was_saved(tmp_path):
    file = JobFile(tmp_path / "demo.status.yaml")
    assert file.load() is None
    job = {"metadata": {"name": "demo", "uid": "u"}, "spec": {"learningRate": 2e-05, "yes": "on", "text": "a: b\n'ü"}}
    assert file.save(job)["metadata"]["resourceVersion"] == "1"
    loaded = file.load()
    assert loaded is not None
    assert loaded["spec"] == job["spec"]
    assert file.save(loaded)["metadata"]["resourceVersion"] == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["demo.status.yaml"]


@pytest.mark.parametrize("text", ["", "- a", "a: [", "metadata: 3", "metadata: {name: x}"])
def test_a_file_that_no_run_wrote_is_refused(tmp_path, text):
    path = tmp_path / "demo.status.yaml"
    path.write_text(text)
    with pytest.raises(StateError, match=r"demo\.status\.yaml"):
        JobFile(path).load()


def test_the_logs_of_a_job_are_not_those_of_another(state):
    names = ["a-1-head", "a-1-worker-0", "a-12-worker-10", "a-1-1-head", "b-1-head", "a-head", "xa-1-head"]
    for name in names:
        state.log(name).touch()
    assert {path.stem for path in state.logs_of("a")} == {"a-1-head", "a-1-worker-0", "a-12-worker-10"}


def test_removing_a_link_leaves_what_it_leads_to(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    link = tmp_path / "link"
    link.symlink_to(own)
    remove(link)
    remove(tmp_path / "absent")
    assert own.is_dir()
    assert not link.is_symlink()
