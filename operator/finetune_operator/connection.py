"""How the API server is reached: where it is, who the operator is to it, and when it is asked again.

The token of a service account changes on the disk, each hour or so. The client reads it again once a minute by the wall clock, and one
that a kubeconfig names (`tokenFile`, or a program that gives one) never: so whoever is refused reads it again, and asks once more.
"""

import asyncio
import contextlib
import logging
import math
import os
import time
from collections.abc import Callable
from urllib.request import getproxies

import aiohttp
import aiohttp_retry
import yaml
from kubernetes.aio.client import Configuration
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config

RENEW_SECONDS = 5.0
"""A token is read anew at most so often: one that is refused for good costs no more than that."""
RETRY_ATTEMPTS = 4
RETRY_MAX_SECONDS = 5.0
"""Longest wait between two attempts of one request, whatever the server asks for: the job's own turn comes again."""

log = logging.getLogger(__name__)


async def log_in(context: str = "") -> "Login":
    """To the cluster that KUBECONFIG names, or the one around this pod, or that of the user's kubeconfig; or of a context of these.

    Raises kubernetes.config.ConfigException where none of them can be used.
    """
    configuration = Configuration()
    login = Login(configuration, context)
    await login.read()
    configuration.retries = Patience()
    # Where the environment names no proxy, aiohttp would look for one at each request all the same: in a thread, and in ~/.netrc.
    configuration.client_session_kwargs = {"trust_env": bool(getproxies()), "middlewares": (login,)}
    return login


class Login:
    """Who the operator is. As a middleware of the client it has a request that is answered with 401 sent once more, with a newer token."""

    def __init__(self, configuration: Configuration, context: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.configuration = configuration
        """The client's: where the API server is, and how to log in there."""
        self._context, self._clock = context, clock
        self._one = asyncio.Lock()
        self._last = -math.inf
        """When it was last read (monotonic)."""

    async def read(self) -> None:
        """Read what says who the operator is. Raises ConfigException, OSError and yaml.YAMLError."""
        self._last = self._clock()
        if not self._context and "KUBECONFIG" not in os.environ and "KUBERNETES_SERVICE_HOST" in os.environ:
            load_incluster_config(client_configuration=self.configuration)
        else:
            file = os.environ.get("KUBECONFIG", "~/.kube/config")
            await load_kube_config(config_file=file, context=self._context or None, client_configuration=self.configuration)

    async def renew(self, refused: str | None = None) -> str | None:
        """The token as a header has it; read anew where it is the one that was refused, unless that was done a moment ago."""
        async with self._one:
            token = await self._token()
            if refused is not None and token != refused:
                return token
            if self._clock() - self._last >= RENEW_SECONDS:
                try:
                    await self.read()
                except (ConfigException, OSError, yaml.YAMLError) as error:
                    log.warning("the credentials cannot be read again: %r", error)
            return await self._token()

    async def __call__(self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        """Send a request, and again where its token is refused and there is another."""
        response = await handler(request)
        sent = request.headers.get("Authorization")
        if response.status != 401 or sent is None:
            return response
        token = await self.renew(refused=sent)
        if token is None or token == sent:
            return response
        response.release()
        request.headers["Authorization"] = token
        return await handler(request)

    async def _token(self) -> str | None:
        token: str | None = await self.configuration.get_api_key_with_prefix("BearerToken")
        return token


class Patience(aiohttp_retry.ExponentialRetry):
    """When a request is sent again that may be: as late as the server asks (Retry-After), but within RETRY_MAX_SECONDS."""

    def __init__(self) -> None:
        super().__init__(attempts=RETRY_ATTEMPTS, start_timeout=0.2, max_timeout=RETRY_MAX_SECONDS, statuses={429})

    def get_timeout(self, attempt: int, response: aiohttp.ClientResponse | None = None) -> float:
        """Seconds to wait after this attempt, the first of which is 1."""
        asked = 0.0
        with contextlib.suppress(ValueError):  # a date, or nothing that anybody understands
            asked = float(response.headers.get("Retry-After", 0)) if response is not None else 0.0
        own: float = super().get_timeout(attempt, response)
        return min(max(own, asked), RETRY_MAX_SECONDS) if math.isfinite(asked) else own
