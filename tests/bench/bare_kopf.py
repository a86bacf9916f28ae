"""What kopf costs by itself: one handler that writes one field of the status. BENCH_TURNS names the file of its turns.

Of the operator it imports the settings of the watch alone, so that its memory is kopf's. kopf writes after its handler has returned: a turn
ends when the watch shows what was written.
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

from finetune_operator.watching import watch_settings

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


def bare_settings() -> kopf.OperatorSettings:
    """The operator's own, but what spares it kopf's comparison of each object, and the choice of pods: kopf as it comes."""
    settings, plain = watch_settings(), kopf.OperatorSettings()
    settings.persistence.diffbase_storage = plain.persistence.diffbase_storage
    settings.watching.label_selectors.clear()
    return settings


def main() -> None:
    """Run until it is killed."""
    with Path(os.environ["BENCH_TURNS"]).open("a", buffering=1, encoding="utf-8") as file:
        asyncio.run(kopf.operator(registry=registry_of(file), settings=bare_settings(), standalone=True, clusterwide=True))


if __name__ == "__main__":
    main()
