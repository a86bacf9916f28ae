"""The folder of a job's report in output.storage: for people, and for other jobs that are compared with it.

    report/<namespace>/<name>/report.md          for people
    report/<namespace>/<name>/*.svg              its pictures
    report/<namespace>/<name>/results.json       the figures, for programs and for `evaluation.compareWith`
    report/<namespace>/<name>/manifest.json      complete: whose it is, and its files

It stands outside the artifacts, since it is there also when nothing is published: the reader must see why.
"""

import json
import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

from finetune_api.v1alpha1 import FineTuneJob
from finetune_trainer.evaluation.markdown import LOSSES, PROMPTS, SEARCH, Findings, markdown, metrics_picture
from finetune_trainer.evaluation.plots import loss_curves, metric_bars, strategies
from finetune_trainer.evaluation.search_plots import search_picture
from finetune_trainer.manifest import describe_files, write_manifest
from finetune_trainer.storage import Storage

T = TypeVar("T")
REPORT, RESULTS = "report.md", "results.json"


def report_folder(namespace: str, name: str) -> str:
    """Where in output.storage the report of a job is. A job of the same name that comes later replaces it, as it does the artifacts."""
    return f"report/{namespace}/{name}"


def report_uri(storage: Storage, job: FineTuneJob) -> str:
    """Where people find the report."""
    return storage.locate(f"{report_folder(job.metadata.namespace, job.metadata.name)}/{REPORT}")


def publish_report(storage: Storage, findings: Findings) -> str:
    """Put the report in its place, whole; doing it again changes nothing. Returns report_uri.

    `storage` is output.storage. Raises JobError (StorageFull, StorageUnavailable).
    """
    meta = findings.job.metadata
    with storage.new_folder(report_folder(meta.namespace, meta.name)) as folder:
        for name, content in files_of(findings).items():
            (folder / name).write_bytes(content)
        owner = {"namespace": meta.namespace, "name": meta.name, "uid": meta.uid}
        write_manifest(folder, {"job": owner, "files": describe_files(folder)})
    return report_uri(storage, findings.job)


def files_of(findings: Findings) -> dict[str, bytes]:
    """All files but the manifest, by name."""
    pictures = dict(_pictures(findings))
    results = json.dumps(_results(findings), indent=2, sort_keys=True, allow_nan=False) + "\n"
    return {**pictures, RESULTS: results.encode(), REPORT: markdown(findings, tuple(pictures)).encode()}


def _pictures(findings: Findings) -> Iterator[tuple[str, bytes]]:
    """Each with its name. One that cannot be drawn is left out: the tables have its figures, and a job must not fail for it."""
    bars = _drawn(lambda: metric_bars(findings.evaluation.results)) or []
    found = {metrics_picture(place): picture for place, picture in enumerate(bars, start=1)}
    yield from found.items()
    if curves := _drawn(lambda: loss_curves(findings.course, findings.evaluation.candidate)):
        yield LOSSES, curves
    if prompts := _drawn(lambda: strategies(findings.report.baseline)):
        yield PROMPTS, prompts
    if search := _drawn(lambda: _search(findings)):
        yield SEARCH, search


def _search(findings: Findings) -> bytes | None:
    plan, summary = findings.job.spec.search, findings.report.search
    best = summary.best.trial if summary and summary.best else None
    return search_picture(findings.trials, best, plan.goal.metric) if plan else None


def _drawn(draw: Callable[[], T]) -> T | None:
    try:
        return draw()
    except Exception:
        logging.getLogger(__name__).warning("a picture of the report could not be drawn", exc_info=True)
        return None


def _results(findings: Findings) -> dict[str, object]:
    meta, report = findings.job.metadata, findings.report
    return {
        "job": {"namespace": meta.namespace, "name": meta.name, "uid": meta.uid},
        "ending": findings.ending,
        "resolved": report.resolved.to_json() if report.resolved else None,
        "baseline": [entry.to_json() for entry in report.baseline],
        "evaluation": findings.evaluation.to_json(),
    }
