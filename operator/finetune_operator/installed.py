"""What `helm test` runs: whether the operator answers, and whether the API server takes a job and refuses what is none.

    python -m finetune_operator.installed OPERATOR-URL NAMESPACE

The jobs are offered on trial (dryRun): nothing is stored. Exit codes: 0 where all is well, 1 where something is not, which is printed.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from finetune_api import API_VERSION, KIND
from finetune_operator.cluster import connect
from finetune_operator.port import ApiError

TIMEOUT = aiohttp.ClientTimeout(total=30)
TINY: dict[str, Any] = {
    "model": {"source": "pvc://claim/model"},
    "data": {"train": {"source": "pvc://claim/train.jsonl"}},
    "method": {"lora": {}},
    "output": {"storage": "pvc://claim/out"},
}
NOT_A_JOB: dict[str, Any] = {**TINY, "backoffLimit": "many"}


async def problems(operator: str, namespace: str) -> AsyncIterator[str]:
    """What is wrong with the installation. `operator` is the URL of its HTTP server."""
    try:
        async with aiohttp.ClientSession(timeout=TIMEOUT) as session, session.get(f"{operator}/readyz") as response:
            if response.status != 200:
                yield f"the operator is not ready: {await response.text()}"
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        yield f"the operator does not answer at {operator}: {error!r}"
    async with connect() as cluster:
        try:
            await cluster.try_job(_job(namespace, TINY))
        except ApiError as error:
            yield f"the API server takes no job: {error}"
        try:
            await cluster.try_job(_job(namespace, NOT_A_JOB))
        except ApiError as error:
            if error.status not in (400, 422):
                yield f"the API server does not look at jobs: {error}"
        else:
            yield "the API server takes a job that is none: the CRD is of another version"


def _job(namespace: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "helm-test", "namespace": namespace}, "spec": spec}


async def _main(operator: str, namespace: str) -> int:
    found = [problem async for problem in problems(operator, namespace)]
    print("\n".join(found) or "the operator is ready, and the API server knows its jobs")  # noqa: T201 - the pod's log is the result
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(_main(*sys.argv[1:3])))
