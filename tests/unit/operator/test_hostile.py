"""A head is a tenant's pod: what it makes up costs the cluster little. So do pods that somebody else holds on to."""

from dataclasses import replace

from tests.builders import SETTINGS, at, make_job, make_pod, make_report, raw_pod, stages
from tests.unit.operator.looks import HEAD, PREPARING, TRAINING, WORKERS, step

from finetune_api.status import DataSummary, Progress
from finetune_operator.observed import Observed, pod_from
from finetune_operator.pace import SOON_SECONDS, next_look
from finetune_operator.plan import surplus


def test_words_that_change_at_every_look_are_written_every_poll() -> None:
    status, written = PREPARING, 0
    for second in range(0, 100, 2):
        claim = make_report(
            "Prepare", warnings=(f"warning {second}",), data=DataSummary(train=second), progress=Progress(step=second, total_steps=100)
        )
        after = step(status, HEAD, report=claim, now=at(1000 + second))
        written += after != status
        status = after
    assert written == 10, "100 seconds, every 10"


def test_a_head_that_goes_to_and_fro_between_stages_is_not_believed() -> None:
    back = step(TRAINING, HEAD, *WORKERS, report=make_report("Prepare"), now=at(100))
    assert (back.phase, back.stages) == ("Training", TRAINING.stages)
    on = step(TRAINING, HEAD, *WORKERS, report=make_report("Evaluate"), now=at(100))
    assert (on.phase, on.stages) == ("Evaluating", stages("Evaluate"))


def test_a_pod_that_somebodys_finalizer_keeps_is_deleted_once_and_looked_at_seldom() -> None:
    job = make_job(status=step(TRAINING, HEAD, now=at(100), suspend=True), suspend=True)
    raw = raw_pod(deletion=at(100))
    overdue, kept = pod_from(raw), pod_from({**raw, "metadata": {**raw["metadata"], "deletionGracePeriodSeconds": 0}})
    removed = {pod.forced: surplus((), job, job.status, Observed((pod,)), SETTINGS, at(1000)) for pod in (overdue, kept)}
    assert [(removal.name, removal.grace) for removal in removed[False]] == [("bot-1-head", 0)]
    assert removed[True] == ()
    assert next_look(job, job.status, Observed((overdue,)), SETTINGS, at(1000)) == SOON_SECONDS
    assert next_look(job, job.status, Observed((kept,)), SETTINGS, at(1000)) == SETTINGS.poll_seconds
    assert not make_pod().forced
    assert replace(make_pod(), deletion=at(1)).forced is False
