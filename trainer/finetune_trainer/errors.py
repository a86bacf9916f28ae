"""The one error that a job's own fault, or the platform's, ends in: a reason of the closed set and a sentence for people."""

from finetune_api.reasons import Reason


class JobError(Exception):
    """A stage cannot go on, and it is known why.

    `reason` is what conditions, Events and metrics say; `message` names the field, file, line or URI at fault and never a secret.
    Any other exception that leaves a stage is an InternalError.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type["JobError"], tuple[Reason, str]]:
        """Pickled by its two parts, so that it crosses process borders (Ray) whole."""
        return type(self), (self.reason, self.message)
