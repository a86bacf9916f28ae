"""What kopf costs by itself: one handler that writes one field of the status. BENCH_TURNS names the file of its turns.

It imports nothing of the operator, so that its memory is kopf's. kopf writes after its handler has returned: a turn ends when the watch
shows what was written.
"""

import asyncio
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import kopf
import yaml
from tests.bench.turns import Turn

TOUCH = "bench.example.com/touch"
"""Annotation that the benchmark changes."""


def registry_of(file: TextIO) -> kopf.OperatorRegistry:
    """The handlers: how to log in, and what to do about a job."""
    registry = kopf.OperatorRegistry()
    begun: dict[str, float] = {}

    config = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())

    async def on_login(**_: object) -> kopf.ConnectionInfo:
        user = config["users"][0]["user"]
        return kopf.ConnectionInfo(server=config["clusters"][0]["cluster"]["server"], insecure=True, scheme="Bearer", token=user["token"])

    async def on_job(event: Mapping[str, Any], patch: kopf.Patch, **_: object) -> None:
        now, job = time.monotonic(), event["object"]
        if event["type"] == "DELETED":
            return
        meta = job["metadata"]
        name, wanted = f"{meta['namespace']}/{meta['name']}", f"seen {(meta.get('annotations') or {}).get(TOUCH, '')}"
        if (job.get("status") or {}).get("message") != wanted:
            begun.setdefault(name, now)
            patch.status["message"] = wanted
        elif name in begun:
            begin = begun.pop(name)
            file.write(Turn(name, "event", begin, begin, now).line())

    kopf.on.login(registry=registry)(on_login)
    kopf.on.event("finetune.dev", "v1alpha1", "finetunejobs", id="job", registry=registry)(on_job)
    return registry


def plain_settings() -> kopf.OperatorSettings:
    """The operator's own (finetune_operator.handlers), as far as they concern the handling of events."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.peering.standalone = True
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    settings.watching.chunk_size = 500
    settings.queueing.idle_timeout = 1.0
    return settings


def main() -> None:
    """Run until it is killed."""
    with Path(os.environ["BENCH_TURNS"]).open("a", buffering=1, encoding="utf-8") as file:
        asyncio.run(kopf.operator(registry=registry_of(file), settings=plain_settings(), standalone=True, clusterwide=True))


if __name__ == "__main__":
    main()
