"""Scores that an encoder and a judge give to answers, as a suite asks for them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tenacity
from fake_endpoint import FakeEndpoint, chat
from fsspec.implementations.local import LocalFileSystem
from test_encoder import bert, by_hand, load, states, unit

from finetune_api.evaluation import Suite
from finetune_api.fields import LOCAL_RUN
from finetune_api.reasons import Reason
from finetune_trainer import endpoint
from finetune_trainer.errors import JobError
from finetune_trainer.evaluation.answered import Answered, Case
from finetune_trainer.evaluation.embedding import similarities
from finetune_trainer.evaluation.given import Givers
from finetune_trainer.sources import Mounts
from finetune_trainer.storage import Storage

CASES = [Case("000000", reference="cats like fish", prompt="one"), Case("000001", reference="dogs", prompt="two")]
TUNED = [Answered("000001", text="cats and dogs"), Answered("000000", text="cats like fish")]
UNTUNED = [Answered("000000", text="fish"), Answered("000001", text="cats and dogs")]
WHERE = "evaluation.suites[2]"


@pytest.fixture(autouse=True)
def _without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "RETRY_WAIT", tenacity.wait_none())


@pytest.fixture
def givers(tmp_path: Path) -> Callable[..., Givers]:
    (tmp_path / "secrets" / "judge").mkdir(parents=True)
    (tmp_path / "secrets" / "judge" / "token").write_text("sk-judge")
    bert(tmp_path / "encoder")

    def made(url: str = "http://127.0.0.1:1/v1", encoder: str = "encoder", key_of: str = "judge") -> Givers:
        manifest = {
            "name": "task",
            "source": "test",
            "metrics": ["exactMatch", "embeddingSimilarity", "judgeScore", "judgeWinRate"],
            "encoder": {"source": f"file://{tmp_path}/{encoder}"},
            "judge": {"endpoint": {"url": url, "model": "large", "secretRef": {"name": key_of}}, "instruction": "Be strict."},
        }
        suite = Suite.model_validate_json(json.dumps(manifest), by_alias=True, by_name=False, context=LOCAL_RUN)
        storage = Storage(LocalFileSystem(), str(tmp_path / "out"), f"file://{tmp_path}/out")
        return Givers(suite, WHERE, storage, "team", Mounts(tmp_path, local=True), tmp_path / "cache", print)

    return made


def first_is_right(path: str, body: dict[str, Any]) -> Any:
    """Scores 10 and 4 for the first and the second case; prefers the answer that holds `cats`."""
    asked = body["messages"][0]["content"]
    if "ANSWER A" in asked:
        first = asked.split("[BEGIN ANSWER A")[1].split("[END ANSWER A")[0]
        return 200, {}, chat("Verdict: A" if "cats" in first else "Verdict: B")
    return 200, {}, chat("Verdict: 10" if "\none\n" in asked else "Verdict: 4")


def test_all_that_a_suite_asks_others_for(givers: Callable[..., Givers], tmp_path: Path) -> None:
    with FakeEndpoint(first_is_right) as server:
        found = givers(server.url).given(CASES, TUNED, UNTUNED)
        assert len(server.questions()) == 4  # a score each, and the pair that differs, twice
        assert {key for *_, key in server.asked} == {"Bearer sk-judge"}
    assert list(found) == ["embeddingSimilarity", "judgeScore", "judgeWinRate"]
    assert found["judgeScore"] == pytest.approx((1, 1 / 3))
    assert found["judgeWinRate"] == (1.0, 0.5)
    model = bert(tmp_path / "encoder")
    one, other = (unit(by_hand(states(model, text), "mean")) for text in ("dogs", "cats and dogs"))
    assert found["embeddingSimilarity"] == pytest.approx((1, one @ other), abs=1e-6)


def test_the_untuned_model_against_itself_is_not_asked_about(givers: Callable[..., Givers]) -> None:
    with FakeEndpoint(first_is_right) as server:
        found = givers(server.url).given(CASES, UNTUNED, UNTUNED)
        assert len(server.questions()) == 2
    assert found["judgeWinRate"] == [0.5, 0.5]


def test_what_is_wrong_is_found_before_anything_is_paid_for(givers: Callable[..., Givers]) -> None:
    with FakeEndpoint(first_is_right) as server:
        givers(server.url).check()
        assert [body["max_tokens"] for _, body, _ in server.asked] == [1]
        server.reply = lambda path, body: (401, {}, "no")
        with pytest.raises(JobError, match=r"^AuthenticationFailed: evaluation.suites\[2\].judge.endpoint: "):
            givers(server.url).check()
        with pytest.raises(JobError) as caught:
            givers(server.url, key_of="other").check()
        assert caught.value.reason == Reason.SECRET_NOT_FOUND
        assert caught.value.message.startswith(f"{WHERE}.judge.endpoint.secretRef: ")
        with pytest.raises(JobError, match=r"^ModelNotFound: evaluation.suites\[2\].encoder: file:.*/none"):
            givers(server.url, encoder="none").check()


def test_cosines_by_hand(tmp_path: Path) -> None:
    model, encoder = bert(tmp_path), load(tmp_path)
    vectors = {text: unit(by_hand(states(model, text), "mean")) for text in ("cats", "dogs like fish", "fish")}
    references = ["cats", "dogs like fish", "", "fish", "cats"]
    answers = ["dogs like fish", "dogs like fish", "cats", " ", "fish"]
    expected = [vectors["cats"] @ vectors["dogs like fish"], 1, None, 0, vectors["cats"] @ vectors["fish"]]
    made = similarities(encoder, references, answers)
    assert made[2] is None
    np.testing.assert_allclose([each for each in made if each is not None], [each for each in expected if each is not None], atol=1e-6)
    assert max(each for each in made if each is not None) <= 1.0
    assert similarities(encoder, [], []) == ()
