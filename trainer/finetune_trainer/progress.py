"""From the workers to the head: how far the training is. The head's answer says whether to stop."""

import http.client
import json
import threading
import time
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

from pydantic import Field

from finetune_api.fields import StatusModel
from finetune_api.status import BestCheckpoint, CheckpointRef, Count, Metric, Name, StageName, Text, Warnings
from finetune_trainer.pace import Pace

PROGRESS_SECONDS = 1.0
"""Rank 0 tells the head this often, whether or not a step ended: the answer may be the call to stop."""
_TIMEOUT_SECONDS = 5.0
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""The head is at hand: a proxy that the environment names for the world outside must not be asked, nor see the token."""


def utc_now() -> str:
    """The time in UTC, RFC 3339, whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Answer:
    """What the head asks of the workers."""

    stop: bool = False
    """Save a checkpoint and leave."""
    regroup: bool = False
    """The same, to begin again with more of them."""


class WorkerProgress(StatusModel):
    """The state of the worker group, as rank 0 sees it. Absent is unknown as yet."""

    group: Annotated[str, Field(max_length=64)]
    """One start of the worker group; another one means that workers were lost."""
    processes: Count = 0
    """How many take part."""
    stage: StageName = "Train"
    message: Text = ""
    start_step: Count | None = None
    """Step that this group went on from; None while it loads."""
    step: Count = 0
    total_steps: Count = 0
    epoch: float = 0.0
    tokens_per_second: float | None = None
    eta_seconds: Count | None = None
    stepping: bool = False
    """Whether the next thing to be done is a step, after one of this group: no loading, compiling, measuring or saving."""
    trained_tokens: Count = 0
    """Tokens of examples that this group took steps on."""
    answered: Count = 0
    """Cases of a suite that are answered."""
    cases: Count | None = None
    """How many it has; None for a group that trains."""
    metrics: tuple[Metric, ...] = ()
    checkpoint: CheckpointRef | None = None
    """The newest complete checkpoint."""
    best_checkpoint: BestCheckpoint | None = None
    """The one with the lowest validation loss."""
    warnings: Warnings = ()
    """What the job's owner should look at although the training goes on; those of this group so far."""
    pace: Pace | None = None
    """How fast the group is; None for one that does not train."""
    damaged_checkpoints: Annotated[tuple[Name, ...], Field(max_length=100)] = ()
    """Checkpoints that were found damaged and set aside when this group began."""


class ProgressSender:
    """Sends the newest WorkerProgress in a thread of its own, so that no step ever waits for the network.

    `post` replaces what is to be sent; `stop_requested` and `regroup_requested` are what the head answered last. A head that does not
    answer is asked again: whether it is gone is for Ray and the operator to find out.
    """

    def __init__(self, url: str, token: str, *, interval: float = PROGRESS_SECONDS) -> None:
        self.stop_requested = False
        self.regroup_requested = False
        self._url, self._token, self._interval = url, token, interval
        self._latest: WorkerProgress | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def post(self, progress: WorkerProgress) -> None:
        """Make this what is sent next."""
        self._latest = progress

    def close(self) -> None:
        """Send the last word and end the thread."""
        self._closing.set()
        self._thread.join(timeout=4 * _TIMEOUT_SECONDS)

    def _run(self) -> None:
        while not self._closing.wait(self._interval):
            self._send()
        for _ in range(3):
            if self._send():
                return
            time.sleep(self._interval)

    def _send(self) -> bool:
        """Whether there was nothing to send or the head took it."""
        progress = self._latest
        if progress is None:
            return True
        request = urllib.request.Request(  # noqa: S310 - the head's URL, always http
            f"{self._url}/progress",
            data=json.dumps(progress.to_json()).encode(),
            method="PUT",
            headers={"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"},
        )
        try:
            with _DIRECTLY.open(request, timeout=_TIMEOUT_SECONDS) as response:
                answer = json.load(response)
                self.stop_requested, self.regroup_requested = bool(answer.get("stop")), bool(answer.get("regroup"))
        except (OSError, ValueError, http.client.HTTPException):
            return False
        return True
