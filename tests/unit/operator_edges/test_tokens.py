"""Tokens that change on the disk, as those of service accounts do each hour: whoever is refused reads the new one, and nobody notices."""

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import aiohttp
import pytest
from kubernetes.aio.client import Configuration
from kubernetes.aio.config import incluster_config
from tests.unit.operator_edges.test_broken_watches import until, watching
from tests.unit.operator_edges.watched_api import GROUP, WatchedApi, kubeconfig, serving

from finetune_operator.cluster import KubernetesCluster, connect
from finetune_operator.connection import RENEW_SECONDS, RETRY_MAX_SECONDS, Login, Patience
from finetune_operator.election import Election
from finetune_operator.port import ApiError

JOBS = f"{GROUP}/finetunejobs"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate of 127.0.0.1, signed by itself, in one file."""
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    made = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=api -addext subjectAltName=IP:127.0.0.1"
    use = ["-addext", "keyUsage=critical,keyCertSign,digitalSignature", "-keyout", file, "-out", file.with_suffix(".crt")]
    subprocess.run([*made.split(), *use], check=True, capture_output=True)
    file.write_text(file.read_text() + file.with_suffix(".crt").read_text())
    return file


@pytest.fixture
async def api(certificate: Path) -> AsyncIterator[WatchedApi]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    async with serving(context) as made:
        yield made


@pytest.fixture
def token(api: WatchedApi, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a token, in a pod of this API server's cluster."""
    file = tmp_path / "token"
    file.write_text("first")
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(api.port))
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(file))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(certificate.with_suffix(".crt")))
    monkeypatch.setattr("finetune_operator.connection.RENEW_SECONDS", 0.0)
    return file


@pytest.fixture
async def cluster(token: Path) -> AsyncIterator[KubernetesCluster]:
    async with connect() as made:
        yield made


def rotate(api: WatchedApi, token: Path, to: str = "second") -> None:
    """The kubelet writes a new token, and the old one ends."""
    token.write_text(to)
    api.token = to


def empty(token: Path) -> None:
    """Somebody broke the file."""
    token.write_text("")


async def test_a_call_whose_token_has_ended_is_made_with_the_new_one(api: WatchedApi, token: Path, cluster: KubernetesCluster) -> None:
    assert await cluster.jobs() == []
    rotate(api, token)
    answers = await asyncio.gather(*(cluster.jobs() for _ in range(5)))
    assert answers == [[]] * 5
    assert 1 <= api.told["401"] <= 5, "each of those that were on their way was refused once at most"
    refused = api.told["401"]
    assert await cluster.jobs() == []
    assert api.told["401"] == refused, "the new token stays"


async def test_the_lease_is_renewed_with_the_new_token_too(api: WatchedApi, token: Path, cluster: KubernetesCluster) -> None:
    election = Election(cluster.client, "system", "me")
    election._lock.last_contact -= 100
    rotate(api, token)
    await election._lock.get("finetune-operator", "system")  # there is none: that is an answer, too
    assert election.seconds_since_contact < 50


async def test_a_token_that_is_refused_for_good_is_an_error_that_says_so_and_comes_right_when_it_is_replaced(
    api: WatchedApi, token: Path, cluster: KubernetesCluster
) -> None:
    api.token = "second"
    with pytest.raises(ApiError, match="who are you") as refused:
        await cluster.jobs()
    assert (refused.value.status, api.told["401"]) == (401, 1), "it was not asked again with the same token"
    empty(token)
    with pytest.raises(ApiError, match="who are you"):
        await cluster.jobs()
    rotate(api, token)
    assert await cluster.jobs() == []


async def test_a_token_is_read_anew_at_most_every_few_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text("first")
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig(tmp_path, 1, tokenFile=str(file))))
    now = 0.0
    login = Login(Configuration(), "", clock=lambda: now)
    await login.read()
    file.write_text("second")
    assert await login.renew(refused="Bearer first") == "Bearer first", "it was read a moment ago"
    now = RENEW_SECONDS
    assert await login.renew(refused="Bearer first") == "Bearer second"
    file.write_text("third")
    now = 100.0
    assert await login.renew(refused="Bearer first") == "Bearer second", "somebody else has read it since"
    assert await login.renew(refused="Bearer second") == "Bearer third"


@pytest.mark.parametrize("late", [False, True], ids=["at once", "later"])
async def test_the_watch_goes_on_with_the_new_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    """`later`: the old token ends before there is another, so that nobody can log in for a while."""
    monkeypatch.setattr("finetune_operator.connection.RENEW_SECONDS", 0.0)
    monkeypatch.setattr("finetune_operator.__main__.CRD_RETRY_SECONDS", 0.1)
    token = tmp_path / "token"
    token.write_text("first")
    async with serving() as api:
        await api.change("ADDED", "before")
        async with watching(api, tmp_path, monkeypatch, tokenFile=str(token)) as watched:
            await watched.hears("before")
            api.token = "second"
            token.write_text("first" if late else "second")
            api.oldest = api.version + 1
            await api.change("ADDED", "meanwhile")  # every stream ends, so that the watch begins anew
            if late:
                await until(lambda: api.told["401"] >= 4, lambda: f"not refused: {api.told}")
                token.write_text("second")
            await watched.hears("meanwhile")
            await api.change("ADDED", "after")
            await watched.hears("after")


@pytest.mark.parametrize(
    ("attempt", "asked", "seconds"),
    [
        (1, None, 0.4),
        (1, "2", 2.0),
        (3, "1", 1.6),
        (1, "3600", RETRY_MAX_SECONDS),
        (1, "Wed, 21 Oct 2037 07:28:00 GMT", 0.4),
        (1, "nan", 0.4),
    ],
)
def test_a_request_is_sent_again_when_the_server_asks_for_it_but_soon_enough(attempt: int, asked: str | None, seconds: float) -> None:
    response = SimpleNamespace(headers={} if asked is None else {"Retry-After": asked})
    assert Patience().get_timeout(attempt, cast(aiohttp.ClientResponse, response)) == pytest.approx(seconds)
