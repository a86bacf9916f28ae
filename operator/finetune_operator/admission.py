"""Whether a job may begin under its platform's profile, and what it keeps of that. Pure."""

from finetune_api.reasons import Reason
from finetune_api.status import Resolved
from finetune_operator.conditions import Summary
from finetune_operator.endings import failed
from finetune_operator.look import Look, Verdict
from finetune_operator.profiles import Choice, choose, merged, problem_of, remote_code_without_profile, snapshot, violations


def undecided(look: Look) -> bool:
    """Whether the job has yet to be told under which profile it runs. On this machine that is done before the loop begins."""
    kept = look.status.resolved.profile if look.status.resolved else None
    return not look.settings.local and look.attempt.number == 0 and kept is None


def admission(look: Look) -> Verdict | None:
    """The first look at a job chooses its profile, refuses what the profile does not allow, and keeps what it gives.

    From then on nothing that becomes of the profile touches the job.
    """
    if not undecided(look):
        return None
    choice = _choice(look)
    if choice.problem:
        return None  # `awaiting_profile` says so, when nothing else is to be said
    if choice.profile is None:
        problem = remote_code_without_profile(look.spec)
        return failed(look, Reason.PROFILE_VIOLATED, problem) if problem else None
    kept = snapshot(choice.profile, choice.how, look.spec, look.job.namespace, look.job.name)
    if found := violations(look.spec, look.job.labels, kept, choice.profile):
        return failed(look, Reason.PROFILE_VIOLATED, "; ".join(found))
    if problem := problem_of(merged(look.spec, kept)):
        return failed(look, Reason.INVALID_SPEC, f"with what the profile {kept.name} gives: {problem}")
    resolved = (look.status.resolved or Resolved()).model_copy(update={"profile": kept})
    return Verdict(Summary("Pending", Reason.PENDING, f"runs under the profile {kept.name}"), {"resolved": resolved})


def awaiting_profile(look: Look) -> Verdict | None:
    """The job waits for its profile, as a PersistentVolumeClaim does for its StorageClass: the two may be applied in any order."""
    if not undecided(look) or not (problem := _choice(look).problem):
        return None
    return Verdict(Summary("Pending", Reason.PROFILE_NOT_FOUND, problem))


def _choice(look: Look) -> Choice:
    return choose(look.spec, look.observed.offered, look.settings)
