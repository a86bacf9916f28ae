"""A model that is served behind OpenAI's HTTP interface (vLLM, llama.cpp, most hosted services): asked for the answers to prompts.

A conversation goes to `<url>/chat/completions`, a plain prompt to `<url>/completions`. Transient failures are tried again, and a call to
wait (429 with Retry-After) holds up all requests. The key goes to the URL that the job names and nowhere else: no redirect is followed.
A server is not trusted: no answer is read further than it may be long, none is unpacked, and nothing in one ends the process.
"""

import asyncio
import ipaddress
import json
import math
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import tenacity
from aiohttp.abc import ResolveResult

from finetune_api.reasons import Reason
from finetune_api.scrub import scrub
from finetune_api.v1alpha1 import Endpoint
from finetune_trainer.completions import Answer, Question, answer_in, request_of
from finetune_trainer.errors import JobError

ATTEMPTS = 6
"""Times that a request is sent at most; a refusal for the number of requests does not count."""
RETRY_WAIT: tenacity.wait.wait_base = tenacity.wait_random_exponential(multiplier=1, max=30)
CONNECT_SECONDS = 15.0
PROBE_SECONDS = 60.0
"""Longest time for the first, shortest answer: a server that scales from zero may need a while."""
ANSWER_SECONDS = 120.0
"""Longest time for an answer, and SECONDS_FOR_TOKEN more for each token that it may have."""
SECONDS_FOR_TOKEN = 0.5
LARGEST_PAUSE = 300.0
"""Longest that a server's Retry-After is obeyed at once; then it is asked again."""
PATIENCE = 1800.0
"""Longest time that a server may go on refusing for the number of requests."""
TELL_SECONDS = 15.0
"""Shortest pause that is told of, and the time between two such words."""
ANSWER_BYTES = 1 << 20
"""Longest answer, and BYTES_FOR_TOKEN more for each token that it may have and for each that it may name in its place."""
BYTES_FOR_TOKEN = 256
ERROR_BYTES = 1 << 16
"""What is read of an answer that says what is wrong."""
_SHOWN = 300
_METADATA = frozenset(
    map(ipaddress.ip_address, ("fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254", "100.100.100.200", "168.63.129.16", "192.0.0.192"))
)
"""Where clouds tell their machines' and pods' credentials, beside 169.254.169.254: AWS, Google, Alibaba, Azure, Oracle."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""IPv6 addresses that lead to the IPv4 address in their last four bytes."""


@dataclass(frozen=True)
class Party:
    """Who is behind an endpoint: how messages name it, and what it means when it does not answer."""

    field: str
    """The endpoint's field in the spec."""
    who: str
    """For a sentence: the teacher."""
    unavailable: Reason

    def failure(self, what: str, *, part: str = "") -> JobError:
        """An endpoint that does not do as it should; `part` is of its field, such as `.url`."""
        return JobError(self.unavailable, f"{self.field}{part}: {what}")


TEACHER = Party("objective.distillation.teacher.endpoint", "the teacher", Reason.TEACHER_UNAVAILABLE)


class RefusedQuestionError(Exception):
    """The server will not answer this question (too long for it, against its rules)."""


class MissingRouteError(JobError):
    """The server does not have a path, or not for this model."""


class _TransientError(Exception):
    """The same request may succeed a little later."""


class ServedModel:
    """A connection to an endpoint; to be used in one event loop, as an asynchronous context."""

    def __init__(
        self,
        endpoint: Endpoint,
        key: str | None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        tell: Callable[[str], None] = lambda _: None,
        *,
        party: Party = TEACHER,
    ) -> None:
        self._endpoint, self._key, self._sleep, self._tell, self._party = endpoint, key, sleep, tell, party
        self._url = endpoint.url.rstrip("/")
        self._longest = ANSWER_BYTES + BYTES_FOR_TOKEN * endpoint.max_tokens * (1 + endpoint.top_logprobs)
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._free_at = self._told_at = 0.0
        self._refused_since: float | None = None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "ServedModel":
        check_key(self._endpoint, self._key, self._party.field)
        _check_host(urlsplit(self._url).hostname or "", self._party.field)
        # What is packed may be a thousand times as large as what is sent.
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        connections = aiohttp.TCPConnector(limit=self._endpoint.concurrency, resolver=_Resolver(self._party.field))
        self._session = aiohttp.ClientSession(headers=headers, connector=connections, proxy=_proxy(self._url), auto_decompress=False)
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def probe(self, *, chat: bool) -> None:
        """Ask for one token, so that a wrong address, name or key is found before anything is paid for.

        Raises JobError (the party's reason, AuthenticationFailed, InvalidSpec).
        """
        question = Question(messages=({"role": "user", "content": "Hello"},)) if chat else Question(prompt="Hello")
        try:
            await self._ask(question, most_tokens=1, seconds=PROBE_SECONDS, attempts=3)
        except RefusedQuestionError as error:
            raise JobError(Reason.INVALID_SPEC, f"{self._party.field}: {self._url} refuses a request of this form: {error}") from error

    async def answer(self, question: Question) -> Answer:
        """The answer to a question. Raises RefusedQuestionError, and JobError (the party's reason, AuthenticationFailed)."""
        async with self._slots:
            seconds = ANSWER_SECONDS + SECONDS_FOR_TOKEN * self._endpoint.max_tokens
            return await self._ask(question, self._endpoint.max_tokens, seconds, ATTEMPTS)

    async def _ask(self, question: Question, most_tokens: int, seconds: float, attempts: int) -> Answer:
        path, body = request_of(question, self._endpoint, most_tokens)
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_TransientError),
            stop=tenacity.stop_after_attempt(attempts),
            wait=RETRY_WAIT,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            payload: Any = await retrying(
                self._send, f"{self._url}{path}", body, aiohttp.ClientTimeout(total=seconds, connect=CONNECT_SECONDS)
            )
        except _TransientError as error:
            where = f", at the prompt of {question.place}" if question.place else ""
            raise self._party.failure(f"{self._url} {error}, {attempts} times{where}") from error
        try:
            return answer_in(payload, probabilities=self._endpoint.top_logprobs > 0)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            what = f"{self._url}{path} did not answer as OpenAI's interface does: {self._shown(json.dumps(payload))}"
            raise self._party.failure(f"{what}; is url the base address, such as https://host/v1?") from error

    async def _send(self, url: str, body: Mapping[str, Any], timeout: aiohttp.ClientTimeout) -> Any:  # noqa: ANN401, ASYNC109 - any JSON
        """One request, and again where the server asks to wait. Raises _TransientError, RefusedQuestionError, JobError."""
        assert self._session is not None  # noqa: S101 - entered
        while True:
            await self._until_free()
            try:
                async with self._session.post(url, json=body, timeout=timeout, allow_redirects=False) as response:
                    text = await self._read(response)
                    status, headers = response.status, response.headers
            except aiohttp.InvalidURL as error:
                raise JobError(Reason.INVALID_SPEC, f"{self._party.field}.url: {scrub(str(error))}") from error
            except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientSSLError) as error:
                raise self._party.failure(scrub(str(error)), part=".url") from error
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                words = self._shown(str(error)) or "no word in time"
                raise _TransientError(f"does not answer ({type(error).__name__}: {words})") from error
            if status != HTTPStatus.TOO_MANY_REQUESTS:
                self._refused_since = None
                return self._checked(url, status, headers, text)
            self._hold(headers.get("Retry-After"), text)

    async def _read(self, response: aiohttp.ClientResponse) -> str:
        """The body, of an error its beginning. Raises JobError (the party's reason) where an answer is longer than any could be."""
        is_answer = response.status < HTTPStatus.MULTIPLE_CHOICES
        limit, body = self._longest if is_answer else ERROR_BYTES, bytearray()
        async for part in response.content.iter_any():
            body += part
            if len(body) > limit:
                if is_answer:
                    what = f"{self._url} answers with more than {limit:,} bytes, which maxTokens ({self._endpoint.max_tokens}) cannot need"
                    raise self._party.failure(f"{what}; is it a model that is served there?")
                break
        return bytes(body[:limit]).decode(errors="replace")  # JSON is UTF-8, whatever the server calls it

    def _checked(self, url: str, status: int, headers: Mapping[str, str], text: str) -> Any:  # noqa: ANN401 - any JSON
        """The JSON of an answer. Raises for any other."""
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            secret = self._endpoint.secret_ref
            advice = (
                f"the key `token` of the Secret {secret.name} is not accepted"
                if secret
                else "set secretRef to a Secret with the key `token`"
            )
            raise JobError(Reason.AUTHENTICATION_FAILED, f"{self._party.field}: {self._url} answers {status}: {advice}{self._said(text)}")
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status == HTTPStatus.REQUEST_TIMEOUT:
            raise _TransientError(f"answers {status}{self._said(text)}")
        if 300 <= status < 400:
            target = self._shown(headers.get("Location", "elsewhere"))
            raise self._party.failure(f"{self._url} leads on to {target}, which is not followed: name that address", part=".url")
        if status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
            advice = f"check url, which ends before /chat/completions, and model ({self._endpoint.model})"
            raise MissingRouteError(self._party.unavailable, f"{self._party.field}: {url} answers {status}{self._said(text)}: {advice}")
        if status >= HTTPStatus.BAD_REQUEST:
            raise RefusedQuestionError(f"{status}{self._said(text)}")
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            what = f"{url} answers with something else than JSON: {self._shown(text)}"
            raise self._party.failure(f"{what}; is url the base address, such as https://host/v1?") from error

    def _shown(self, text: str) -> str:
        """A server's words for a message; some repeat the key that they do not accept."""
        return _short(text.replace(self._key, "***") if self._key else text)

    def _said(self, text: str) -> str:
        """What a server says of an error, as the end of a sentence."""
        try:
            error = json.loads(text).get("error")
            text = str(error.get("message") if isinstance(error, dict) else error or text)
        except (ValueError, AttributeError, RecursionError):
            pass
        return f" ({self._shown(text)})" if text.strip() else ""

    async def _until_free(self) -> None:
        while (pause := self._free_at - time.monotonic()) > 0:
            await self._sleep(pause)

    def _hold(self, retry_after: str | None, text: str) -> None:
        """Hold up all requests for as long as the server asks. Raises JobError where it has done so for too long."""
        now = time.monotonic()
        self._refused_since = self._refused_since or now
        if now - self._refused_since > PATIENCE:
            what = f"{self._url} answers 429 for {PATIENCE:.0f} s{self._said(text)}"
            raise self._party.failure(f"{what}: lower concurrency, or wait")
        pause = seconds_in(retry_after)
        self._free_at = max(self._free_at, now + pause)
        if pause >= TELL_SECONDS and now - self._told_at >= TELL_SECONDS:
            self._told_at = now
            self._tell(f"{self._party.who} has too many requests (429) and asks to wait {pause:.0f} s{self._said(text)}")


def seconds_in(retry_after: str | None) -> float:
    """The pause that a Retry-After asks for, in seconds or as a date; some seconds where there is none."""
    try:
        seconds = float(retry_after or 5)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after or "").timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            seconds = 5.0
    return min(max(seconds, 0.1), LARGEST_PAUSE) if not math.isnan(seconds) else 5.0


async def answers(
    model: ServedModel,
    questions: Sequence[Question],
    hear: Callable[[int, Answer | RefusedQuestionError], None] = lambda place, answer: None,
) -> list[Answer | RefusedQuestionError]:
    """The answers to all questions, in their order; the first other error ends all. `hear` is told each, with its place, as it comes."""

    async def one(place: int, question: Question) -> Answer | RefusedQuestionError:
        answer: Answer | RefusedQuestionError
        try:
            answer = await model.answer(question)
        except RefusedQuestionError as error:
            answer = error
        hear(place, answer)
        return answer

    tasks = [asyncio.ensure_future(one(place, question)) for place, question in enumerate(questions)]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for an address; read here, since aiohttp would read passwords of a home folder with it."""
    parts = urlsplit(url)
    return None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)


def check_key(endpoint: Endpoint, key: str | None, where: str) -> None:
    """Raise JobError (AuthenticationFailed) where a key cannot be sent: it would be another header, or no text of HTTP's."""
    if key is not None and not (key.isascii() and key.isprintable()):
        secret = endpoint.secret_ref.name if endpoint.secret_ref else ""
        what = f"the key `token` of the Secret {secret} holds a line break or another character that no token has"
        raise JobError(Reason.AUTHENTICATION_FAILED, f"{where}.secretRef: {what}")


def _check_host(address: str, where: str) -> None:
    """Raise JobError (InvalidSpec) for an address where clouds tell their machines' credentials, or of this node's own network alone."""
    try:
        number = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:  # a name
        return
    if isinstance(number, ipaddress.IPv6Address):
        inner = ipaddress.IPv4Address(number.packed[-4:]) if number in _NAT64 else None
        number = number.ipv4_mapped or number.sixtofour or inner or number
    if number.is_link_local:
        raise JobError(Reason.INVALID_SPEC, f"{where}.url leads to {address}, a link-local address, where no model is served")
    if number in _METADATA:
        raise JobError(Reason.INVALID_SPEC, f"{where}.url leads to {address}, a cloud's metadata service, where no model is served")


class _Resolver(aiohttp.ThreadedResolver):
    """Names as the system resolves them, also numbers in other forms than usual."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        """The addresses. Raises OSError, and JobError (InvalidSpec) where one is forbidden."""
        found = await super().resolve(host, port, family)
        for each in found:
            _check_host(each["host"], self._where)
        return found


def _short(text: str) -> str:
    line = " ".join(scrub(text).split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"
