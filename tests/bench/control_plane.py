"""The operator at a real API server, with pods played here: requests of one job's life, memory and latency with many jobs."""

import asyncio
import contextlib
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import yaml
from rich.table import Table
from tests.bench.processes import use_of
from tests.bench.turns import in_both, turns_in
from tests.integration.api.apiserver import ApiServer, api_server, kubeconfig_through
from tests.integration.api.kube import Kube, Object
from tests.integration.api.operators import Operator
from tests.integration.api.proxy import Proxy
from tests.integration.api.stages import Stage, is_true, job_manifest

CRDS = sorted((Path(__file__).parents[2] / "crds").glob("*.yaml"))
NAMESPACE = "bench"
QUEUE_SECONDS = 1800
"""When a benchmark that does not end is given up."""
AS_IN_PRODUCTION = {"FINETUNE_POLL_SECONDS": "10"}


@contextlib.asynccontextmanager
async def stage_in(folder: Path) -> AsyncIterator[tuple[ApiServer, Stage]]:
    with api_server(folder / "server") as server:
        kube = Kube(server.admin_kubeconfig)
        try:
            for definition in CRDS:
                await kube.create("CustomResourceDefinition", yaml.safe_load(definition.read_text()))
            await kube.create("Namespace", {"metadata": {"name": NAMESPACE}})
            async with asyncio.timeout(60):
                while not await _served(kube):
                    await asyncio.sleep(0.2)
            yield server, Stage(kube, server, NAMESPACE, folder)
        finally:
            await kube.close()


async def _served(kube: Kube) -> bool:
    try:
        await kube.list("FineTuneJob", NAMESPACE)
        return await kube.get("ServiceAccount", NAMESPACE, "default") is not None
    except Exception:
        return False


async def one_life(folder: Path) -> Table:
    """API requests of one job from its creation to Complete, by what they are."""
    async with stage_in(folder) as (server, stage), Proxy(server.url).serving() as proxy:
        through = kubeconfig_through(folder / "proxy.yaml", proxy.url, server.admin_kubeconfig)
        async with stage.player().playing(), stage.operator(through, **AS_IN_PRODUCTION).running() as operator:
            await operator.wait_until_ready()
            reads = proxy.reads
            await stage.apply()
            await stage.wait_for_end(operator)
            await stage.wait_for_children("Pod/tune-1-head")
            reads = proxy.reads - reads
    kinds = Counter(_what(write) for write in proxy.writes)
    table = Table(title="API requests of one job's life (two workers, pods played)", title_justify="left")
    table.add_column("request")
    table.add_column("number", justify="right")
    for what, number in sorted(kinds.items(), key=lambda item: -item[1]):
        table.add_row(what, str(number))
    table.add_section()
    table.add_row("writes in all", str(len(proxy.writes)))
    table.add_row("reads (watches apart)", str(reads))
    return table


def _what(write: str) -> str:
    """`PATCH pods`, `PATCH finetunejobs/status`: a write without names."""
    method, path, _ = write.split()
    parts = path.split(f"/namespaces/{NAMESPACE}/", 1)[-1].split("/")
    return f"{method} {'/'.join(parts[::2])}"


async def many_lives(folder: Path, number: int) -> Table:
    """Memory, latencies, throughput and writes while so many jobs go from creation to Complete."""
    written = folder / "turns"
    async with stage_in(folder) as (server, stage):
        operator = stage.operator(server.admin_kubeconfig, **AS_IN_PRODUCTION, BENCH_TURNS=str(written))
        operator.module = "tests.bench.timed"
        async with stage.player().playing(), operator.running():
            await operator.wait_until_ready()
            assert operator.process is not None
            idle, begun = use_of(operator.process.pid), time.monotonic()
            await _create(stage.kube, number)
            created = time.monotonic() - begun
            await _until_complete(stage.kube, operator, number)
            whole, use = time.monotonic() - begun, use_of(operator.process.pid)
            writes = await writes_of(operator)
    turns = turns_in(written)
    rows = {
        "memory before the first job; peak": f"{idle.resident / 2**20:.0f} MiB; {use.peak / 2**20:.0f} MiB",
        "creating the jobs took": f"{created:.0f} s",
        "all Complete after": f"{whole:.0f} s ({number / whole:.1f} jobs/s; the player of the pods shares the CPUs)",
        "turns": f"{len(turns)} ({len(turns) / number:.1f} per job)",
        "from when a turn was due to its end, p50; p99": in_both([turn.end - turn.due for turn in turns]),
        "a turn, from its begin to its end, p50; p99": in_both([turn.end - turn.begin for turn in turns]),
        "operator's CPU per job": f"{1000 * (use.cpu_seconds - idle.cpu_seconds) / number:.0f} ms",
        "writes per job": f"{writes / number:.1f}",
    }
    table = Table(title=f"The operator with {number} whole lives at once (two workers each, pods played)", title_justify="left")
    table.add_column("figure")
    table.add_column("value")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


async def _create(kube: Kube, number: int) -> None:
    gate = asyncio.Semaphore(8)

    async def create(index: int) -> None:
        manifest: Object = {**job_manifest(), "metadata": {"name": f"tune-{index}"}}
        async with gate:
            await kube.create("FineTuneJob", manifest, NAMESPACE)

    async with asyncio.TaskGroup() as group:
        for index in range(number):
            group.create_task(create(index))


async def _until_complete(kube: Kube, operator: Operator, number: int) -> None:
    shown = -1
    async with asyncio.timeout(QUEUE_SECONDS):
        while True:
            operator.check_alive()
            done = sum(is_true(job, "Complete") for job in await kube.list("FineTuneJob", NAMESPACE))
            if done * 10 // number != shown:
                shown = done * 10 // number
                print(f"lives: {done} of {number} jobs are Complete", flush=True)
            if done == number:
                return
            await asyncio.sleep(5)  # listing many jobs costs the API server and this process as much as some reconciles


async def writes_of(operator: Operator) -> float:
    """Requests that change something, which the operator has made so far, its Lease apart."""
    status, text = await operator.get("/metrics")
    if status != 200:
        raise RuntimeError(f"/metrics answered {status}")
    series = r'^finetune_operator_api_requests_total{[^}]*verb="(?:create|update|patch|delete|deletecollection)"[^}]*} (\S+)$'
    return sum(float(value) for value in re.findall(series, text, flags=re.MULTILINE))
