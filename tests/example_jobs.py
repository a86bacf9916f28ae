"""The jobs in examples/: which of them run without a GPU and without a hub, why the others do not, and which must run before which."""

from collections.abc import Mapping
from pathlib import Path

from tests.unit.docs.markdown import EXAMPLES, ROOT

from finetune_api import KIND
from finetune_api.references import references_of
from finetune_api.v1alpha1 import FineTuneJob, Spec, parse_job
from finetune_operator.manifest import read_manifests
from finetune_operator.profiles import gpus_of


def job_in(path: Path) -> FineTuneJob | None:
    """The job of a file; None where it holds none."""
    found = [each for each in read_manifests(path.read_text(encoding="utf-8")) if each["kind"] == KIND]
    return parse_job(found[0]) if found else None


def why_not_here(spec: Spec) -> str:
    """What a job needs that a test's cluster has not; empty where it runs there.

    Models, data and results on claims and in ConfigMaps can be put there, and an endpoint served; so nothing else excuses an example.
    """
    far = [each.uri for each in references_of(spec) if each.uri and each.use != "endpoint" and not each.uri.startswith("pvc://")]
    if gpus_of(spec.compute):
        return "asks for a GPU"
    return f"needs {far[0]}" if far else ""


JOBS: Mapping[Path, FineTuneJob] = {path: job for path in EXAMPLES if (job := job_in(path)) is not None}
LEFT_OUT: Mapping[Path, str] = {path: why for path, job in JOBS.items() if (why := why_not_here(job.spec))}
"""Those that run nowhere here, and why."""
RUNNABLE: tuple[Path, ...] = tuple(path for path in JOBS if path not in LEFT_OUT)


def taught_by(path: Path) -> tuple[Path, ...]:
    """The examples that publish the model which an example learns from."""
    teacher = JOBS[path].spec.teacher
    source = teacher.source if teacher else None
    return tuple(other for other, job in JOBS.items() if source in {f"{job.spec.output.storage}/{kind}" for kind in job.spec.artifacts})


def shown(path: Path) -> str:
    """An example as people name it."""
    return str(path.relative_to(ROOT))
