"""A TuningProfile in a file, for commands that have no cluster to ask: `--profile FILE` of `finetune validate`, `local` and `plan`."""

from pathlib import Path

from pydantic import ValidationError

from finetune_api.profile import PROFILE_KIND, TuningProfile, parse_profile
from finetune_api.v1alpha1 import FineTuneJob
from finetune_operator.manifest import ManifestError, explain, read_file
from finetune_operator.profiles import merged, problem_of, remote_code_without_profile, snapshot, violations


class ProfileError(Exception):
    """What is wrong with a profile, or with a job under it; the message says it, a line of text for each fault."""


def read_profile(path: Path) -> TuningProfile:
    """The one TuningProfile of a file. Raises ProfileError."""
    try:
        found = [each for each in read_file(path) if each.get("kind") == PROFILE_KIND]
    except ManifestError as error:
        raise ProfileError(f"{path}: {error}") from error
    if len(found) != 1:
        raise ProfileError(f"{path}: holds {len(found)} objects of kind {PROFILE_KIND}; give one")
    try:
        return parse_profile(found[0])
    except ValidationError as error:
        raise ProfileError("\n".join(f"{path}: {line}" for line in explain(error, found[0]))) from None


def under(job: FineTuneJob, profile: TuningProfile | None, *, local: bool) -> FineTuneJob:
    """The job as it runs under the profile: that which it names, or the default where it names none. Raises ProfileError."""
    spec = job.spec
    named = spec.profile_ref.name if spec.profile_ref else None
    if profile is None:
        problem = f"spec.profileRef names the TuningProfile {named}: give its file with --profile" if named else ""
        if problem := problem or remote_code_without_profile(spec):
            raise ProfileError(problem)
        return job
    if named not in (None, profile.metadata.name):
        raise ProfileError(f"spec.profileRef names the TuningProfile {named}, and --profile gives {profile.metadata.name}")
    kept = snapshot(profile, "given with --profile", spec, job.metadata.namespace, job.metadata.name)
    if found := violations(spec, job.metadata.labels, kept, profile):
        raise ProfileError("\n".join(found))
    given = merged(spec, kept)
    if problem := problem_of(given, local=local):
        raise ProfileError(f"with what the profile {kept.name} gives: {problem}")
    return job.model_copy(update={"spec": given})
