"""The call to stop: SIGTERM from the kubelet, Ctrl-C from a person."""

import signal
from types import FrameType


class InterruptedRunError(BaseException):
    """The head was asked to stop. Not an Exception, since it comes in the middle of anything and is nobody's failure."""


class Interruption:
    """Hears the call. While `at_once` it raises InterruptedRunError in the main thread; else it is only noted, so that workers can save."""

    def __init__(self) -> None:
        self.requested = False
        """Whether the call came."""
        self.at_once = True
        """Whether there is nothing to save, so that the head may end right where it is."""

    def listen(self) -> None:
        """Hear the signals from now on. Called again after anything that takes them for itself, as Ray does."""
        signal.signal(signal.SIGTERM, self._hear)
        signal.signal(signal.SIGINT, self._hear)

    def ignore(self) -> None:
        """Hear nothing more: the attempt ends anyway."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def check(self) -> None:
        """Raise InterruptedRunError where the call came."""
        if self.requested:
            raise InterruptedRunError

    def _hear(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.requested = True
        if self.at_once:
            raise InterruptedRunError
