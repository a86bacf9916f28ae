"""How kopf watches: settings that make it an informer only.

It imports nothing of the operator, so that a bare handler that is compared with it runs under the same settings (tests/bench/bare_kopf.py).
"""

import kopf

from finetune_api import LABEL_JOB_UID

_RETRY_DELAYS = (1, 1, 2, 3, 5, 8, 13, *[20] * 90)
"""Delays between tries when the API server answers with errors: half an hour. kopf's own give up in one minute; then all is listed anew."""
SILENCE_SECONDS = 70.0
"""A watch that has been silent for so long is begun anew from where it was: its connection may be dead without a word. API servers send a
bookmark every minute, and remember for longer than this what they have told."""


class _NoState(kopf.DiffBaseStorage):  # type: ignore[misc]  # kopf is Any here
    """What kopf is to compare an object with: nothing. Else it copies each that it is told of, twice, for handlers that there are not."""

    def build(self, **_: object) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, **_: object) -> kopf.BodyEssence | None:
        return None

    def store(self, **_: object) -> None:
        """Nothing: there is no handler that this would be done for."""


def watch_settings() -> kopf.OperatorSettings:
    """Make kopf a watcher only: it posts nothing, scans nothing, and outlives half an hour of errors."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.peering.standalone = True
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.watching.inactivity_timeout = SILENCE_SECONDS
    settings.watching.connect_timeout = 10
    settings.watching.chunk_size = 100  # as `survey` does, for the memory's sake
    settings.watching.label_selectors["", "v1", "pods"] = LABEL_JOB_UID
    settings.networking.request_timeout = 60
    settings.networking.connect_timeout = 10
    settings.networking.error_backoffs = _RETRY_DELAYS
    settings.networking.enforce_retry_after = True
    settings.queueing.idle_timeout = 1.0
    settings.persistence.diffbase_storage = _NoState()
    settings.process.ultimate_exiting_timeout = None  # else kopf kills the process some time after a watch that broke down
    return settings
