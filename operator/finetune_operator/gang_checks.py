"""What becomes of a job whose workers a queue lets in as one gang, and takes away as one. Pure."""

from typing import Any

from finetune_api.reasons import Reason
from finetune_operator.endings import counted
from finetune_operator.failures import Ending, death_of, failure
from finetune_operator.gangs import gang_size, in_queue, members
from finetune_operator.look import Look, Verdict
from finetune_operator.observed import Pod
from finetune_operator.times import rfc3339


def gang_is_whole(look: Look) -> bool:
    """Whether every worker of a gang that a queue lets in is there, be it gated or running."""
    size = gang_size(look.spec, look.status.workers_wanted)
    return size > 0 and in_queue(look.job, look.settings) and len(_members(look)) == size


def gang_lost(look: Look) -> Verdict | None:
    """A group is let in once: when one of its workers has gone or is going, the attempt ends, and the next one queues with its own group.

    What the queue or the cluster took is a preemption; a worker that failed by itself is a failure, or it would be queued without end.
    """
    size = gang_size(look.spec, look.status.workers_wanted)
    if size == 0 or not look.attempt.running or not in_queue(look.job, look.settings):
        return None
    found = _members(look)
    broken = next((pod for pod in found if pod.finished and pod.disruption is None and pod.exit is not None and pod.exit.code != 0), None)
    if broken is not None and broken.deletion is None and broken.exit is not None:
        words = f"pod {broken.name} ended ({broken.exit.reason}, exit code {broken.exit.code})"
        why = death_of(broken) or failure(Reason.WORKERS_LOST, words)
        return counted(look, Ending(Reason(why.reason), words, why.model_copy(update={"message": words})))
    if going := next((pod for pod in found if pod.deletion or pod.disruption), None):
        reason, words = (going.disruption.reason, going.disruption.words) if going.disruption else (Reason.PREEMPTED, "it was told to go")
        return counted(look, Ending(reason, f"pod {going.name}: {words}", None))
    if len(found) < size and (look.attempt.gang_seen or any(pod.let_in for pod in found)):
        return counted(
            look, Ending(Reason.PREEMPTED, f"{size - len(found)} of the {size} workers that were let in together are gone", None)
        )
    return None


def held_back(look: Look) -> str:
    """Which pods a queue holds back, and by what."""
    head = look.observed.head(look.attempt.number)
    gated = [pod for pod in (head, *_members(look)) if pod and pod.gated]
    gates = sorted({gate for pod in gated for gate in pod.gates})
    return f"a queue holds back {len(gated)} pods" + (f": {', '.join(gates)}" if gates else "")


def queued(look: Look) -> dict[str, Any]:
    """Since when the queue has held the job back; activeDeadlineSeconds does not count it."""
    return {"queued_time": look.status.queued_time or rfc3339(look.now)}


def _members(look: Look) -> tuple[Pod, ...]:
    return members(look.observed, look.attempt.number, gang_size(look.spec, look.status.workers_wanted))
