"""What is remembered of worker pods that died: they are made anew at once, and what they died of goes with them. Pure."""

from finetune_api.status import Attempt
from finetune_operator.failures import death_of
from finetune_operator.look import Look


def remembered(look: Look) -> Attempt:
    """The current attempt, with how the last worker pod that died did. One that was taken away, or told to go, did not die."""
    attempt = look.attempt
    if not look.status.workers_wanted and not attempt.worker_failure:
        return attempt
    ended = [pod for pod in look.observed.workers(attempt.number) if pod.finished and pod.exit is not None and pod.exit.code != 0]
    deaths = [death for pod in ended if pod.deletion is None and (death := death_of(pod)) is not None]
    return attempt.model_copy(update={"worker_failure": deaths[-1]}) if deaths else attempt
