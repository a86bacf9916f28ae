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
async def _stage(folder: Path) -> AsyncIterator[tuple[ApiServer, Stage]]:
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
    async with _stage(folder) as (server, stage), Proxy(server.url).serving() as proxy:
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


async def many_jobs(folder: Path, number: int) -> Table:
    """Memory, reconcile latency and throughput while so many jobs go from creation to Complete."""
    async with _stage(folder) as (server, stage):
        operator = stage.operator(server.admin_kubeconfig, **AS_IN_PRODUCTION)
        async with stage.player().playing(), operator.running():
            await operator.wait_until_ready()
            idle = _memory(await _metrics(operator))
            begun = time.monotonic()
            await _create(stage.kube, number)
            created = time.monotonic() - begun
            peak = await _until_complete(stage.kube, operator, number)
            whole = time.monotonic() - begun
            metrics = await _metrics(operator)
            operator.kill()
            await operator.exited()
            again = time.monotonic()
            await operator.start()
            await operator.wait_until_ready()
            restarted = time.monotonic() - again
            settled = _memory(await _metrics(operator))
    count, total = (
        _value(metrics, "finetune_operator_reconcile_duration_seconds_count"),
        _value(metrics, "finetune_operator_reconcile_duration_seconds_sum"),
    )
    rows = {
        "memory before the first job": f"{idle / 2**20:.0f} MiB",
        f"memory, peak with {number} jobs": f"{peak / 2**20:.0f} MiB",
        f"memory after a restart with {number} jobs there": f"{settled / 2**20:.0f} MiB",
        "from a restart to ready": f"{restarted:.1f} s",
        "creating the jobs took": f"{created:.0f} s",
        "all Complete after": f"{whole:.0f} s ({number / whole:.1f} jobs/s; the player of the pods shares the CPUs)",
        "reconciles": f"{count:.0f} ({count / number:.1f} per job)",
        "reconcile latency, mean": f"{1000 * total / count:.0f} ms",
        **{f"reconcile latency, p{q}": f"<= {1000 * _quantile(metrics, q / 100):.0f} ms" for q in (50, 99)},
        "operator CPU per job": f"{1000 * _value(metrics, 'process_cpu_seconds_total') / number:.0f} ms",
    }
    table = Table(title=f"The operator with {number} jobs (two workers each, pods played)", title_justify="left")
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


async def _until_complete(kube: Kube, operator: Operator, number: int) -> float:
    """Wait for all jobs; the operator's largest memory meanwhile, in bytes."""
    peak, shown = 0.0, -1
    async with asyncio.timeout(QUEUE_SECONDS):
        while True:
            operator.check_alive()
            peak = max(peak, _memory(await _metrics(operator)))
            done = sum(is_true(job, "Complete") for job in await kube.list("FineTuneJob", NAMESPACE))
            if done * 10 // number != shown:
                shown = done * 10 // number
                print(f"jobs: {done} of {number} are Complete", flush=True)
            if done == number:
                return peak
            await asyncio.sleep(5)  # listing a thousand jobs costs the API server and this process as much as some reconciles


async def _metrics(operator: Operator) -> str:
    status, text = await operator.get("/metrics")
    if status != 200:
        raise RuntimeError(f"/metrics answered {status}")
    return text


def _value(metrics: str, name: str) -> float:
    """Sum over the series of a metric."""
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", metrics, flags=re.MULTILINE))


def _memory(metrics: str) -> float:
    return _value(metrics, "process_resident_memory_bytes")


def _quantile(metrics: str, share: float) -> float:
    """Upper bound of the histogram's bucket that holds the quantile, in seconds."""
    buckets = re.findall(
        r'^finetune_operator_reconcile_duration_seconds_bucket{[^}]*le="([^"]+)"[^}]*} (\S+)$', metrics, flags=re.MULTILINE
    )
    counts: Counter[float] = Counter()
    for bound, count in buckets:
        counts[float(bound)] += float(count)  # type: ignore[assignment]
    return next(bound for bound in sorted(counts) if counts[bound] >= share * max(counts.values()))
