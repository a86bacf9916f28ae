"""Which jobs rest: they have ended for good, and nothing of theirs is left that should go. Pure.

It is told from lists, without a read of each job. What a job's own turn would weigh is here looked for by its mere presence: where there
is anything, the job gets its turn.
"""

from collections.abc import Mapping
from typing import Any

from finetune_api import GROUP, LABEL_ROLE

Raw = Mapping[str, Any]


def has_ended_for_good(job: Raw) -> bool:
    """Whether a job, as it is listed, has ended, and neither time nor what its user says can ask for anything more.

    What may be asked by annotations, deleted after a while or measured again is not looked into.
    """
    meta, spec, status = job["metadata"], job.get("spec") or {}, job.get("status") or {}
    facts = status.get("conditions") or ()
    ended = any(fact.get("type") in ("Complete", "Failed") and fact.get("status") == "True" for fact in facts)
    seen = status.get("observedGeneration") == meta.get("generation") and meta.get("deletionTimestamp") is None
    asked = any(name.startswith(f"{GROUP}/") for name in meta.get("annotations") or ())
    later = "ttlSecondsAfterFinished" in spec or "monitoring" in spec or "monitoring" in status
    return ended and seen and not asked and not later


def is_ended_head(pod: Raw) -> bool:
    """Whether it is a head pod that has ended. Of a job that goes on it is no news in a list: such a job is looked at in any case."""
    labels, phase = pod["metadata"].get("labels") or {}, (pod.get("status") or {}).get("phase")
    return labels.get(LABEL_ROLE) == "head" and phase in ("Succeeded", "Failed")
