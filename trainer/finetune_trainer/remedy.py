"""What a worker does where a computation fails, so that the job goes on and no figure changes.

- Memory does not hold what is computed at once: half as much at a time.
- A layer that torch.compile has made fails, in its backward pass or at a shape that came later: the layers as they are.

A worker whose model is whole does either by itself. Where each worker holds a part of every layer, the others wait in the midst of a pass
for this one's part: only a new start of all helps them, and what it is to do otherwise is kept in the storage.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import torch

from finetune_api.estimate import AUTO_TOKENS
from finetune_api.reasons import Reason
from finetune_api.scrub import telling_lines
from finetune_api.v1alpha1 import Training
from finetune_trainer.data.shares import Limit
from finetune_trainer.errors import JobError
from finetune_trainer.failures import as_job_error
from finetune_trainer.model import CausalModel
from finetune_trainer.sharding import decoder_layers
from finetune_trainer.storage import Storage
from finetune_trainer.worker import Worker

T = TypeVar("T")
R = TypeVar("R")
Warn = Callable[[str], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """A kind of work, in words for the job's owner."""

    halved: str
    """That less is held at once now; `{limit}` stands for how much."""
    hopeless: str
    """That it cannot be less, and what to change."""


TRAINING = Work(
    "a micro-batch did not fit into memory: micro-batches are of {limit} now; the global batch is as it was",
    "a single sequence does not fit into the memory of a worker: lower training.maxSequenceLength",
)
"""Steps, and the losses of data that is not trained on."""


def compiled(layer: torch.nn.Module) -> bool:
    """Whether a layer is computed by what torch.compile has made of it."""
    return hasattr(vars(layer).get("forward"), "_torchdynamo_orig_callable")


def uncompile(model: CausalModel) -> bool:
    """Have the model's layers computed as they are. Returns whether any was compiled."""
    found = [layer for layer in decoder_layers(model.transformer) if compiled(layer)]
    for layer in found:
        del layer.forward  # what its class says is there again
    return bool(found)


def uncompiled_because(error: BaseException) -> str:
    """What to tell the job's owner."""
    while isinstance(inner := getattr(error, "inner_exception", None), BaseException):
        error = inner  # what torch puts around it begins with a line that names its backend, and nothing else
    reason = telling_lines(str(error))
    return f"the model is trained without torch.compile: {reason[0].strip() if reason else type(error).__name__}"


FAILED_ELSEWHERE = uncompiled_because(RuntimeError("it failed on another worker"))


def limit_of(training: Training, model: CausalModel) -> Limit:
    """How much a worker holds at once where nothing has failed: what is asked for, or fits its memory."""
    return Limit(training.micro_batch_size, model.auto_tokens or AUTO_TOKENS[model.device.type])


@dataclass(frozen=True)
class Notes:
    """What one start leaves for the next: {"most": of the limit, "uncompiled": why}."""

    storage: Storage
    """The job's own folder."""
    file: str


class Remedy:
    """How much a worker holds in memory at once for one kind of work, and what has been mended of it so far."""

    def __init__(self, work: Work, model: CausalModel, limit: Limit, warn: Warn | None = None, notes: Notes | None = None) -> None:
        """`warn` is told what the job's owner should know; without it that waits for `tell_to`."""
        self.limit = limit
        self._warn, self._unsaid = warn, list[str]()
        self._work, self._model, self._notes = work, model, notes
        self._uncompiled = ""
        """Why, where it is."""
        self._mended = False
        self._told_most, self._told_uncompiled = limit.most, False

    @property
    def mended(self) -> bool:
        """Whether this worker has had to do something since all of them last `settle`d."""
        return self._mended

    def warn(self, text: str) -> None:
        """Something that the job's owner should know."""
        log.warning(text)
        if self._warn is None:
            self._unsaid.append(text)
        else:
            self._warn(text)

    def tell_to(self, warn: Warn) -> None:
        """Whom to tell from now on, and what was not told so far."""
        self._warn = warn
        for text in self._unsaid:
            warn(text)
        self._unsaid.clear()

    def resume(self, worker: Worker) -> None:
        """Do as an earlier start found out. Every worker calls it."""
        known = self._notes.storage.read_json(self._notes.file) if worker.leads and self._notes else None
        known = known if isinstance(known, dict) else {}
        most = worker.agree(min(self.limit.most, int(known.get("most", self.limit.most))))
        self.limit = self.limit.at_most(most)
        self._tell_limit()
        why = str(known.get("uncompiled", ""))
        if worker.agree(int(bool(why))) and uncompile(self._model):
            self._uncompiled = why
            self._tell_uncompiled(why)

    def each(
        self, batches: Sequence[Sequence[T]], taken: Callable[[Sequence[T]], int], compute: Callable[[Sequence[T]], R]
    ) -> Iterator[tuple[Sequence[T], R]]:
        """Each batch with what is made of it, in their order; in parts where memory is short.

        `taken` says what a batch comes to, by what the limit counts. Raises JobError (GPUOutOfMemory) where one thing alone does not fit,
        and JobError (WorkersLost) where all workers must begin anew.
        """
        waiting = list(batches)[::-1]
        while waiting:
            batch = waiting.pop()
            middle = len(batch) // 2
            if middle and taken(batch) > self.limit.most:  # others did not fit before
                waiting += [batch[middle:], batch[:middle]]
                continue
            made = list[R]()
            with suppress(torch.OutOfMemoryError):  # mended below: the error holds on to the tensors of the frames that it comes through
                made.append(self.computed(lambda batch=batch: compute(batch)))  # type: ignore[misc]
            if made:
                yield batch, made[0]
                continue
            self.halve(taken(batch), single=not middle)
            waiting.append(batch)

    def halve(self, taken: int, *, single: bool) -> None:
        """Hold half of what did not fit: so much was `taken`, by what the limit counts; `single` says that it was one thing alone.

        Raises JobError as `each` does.
        """
        if single:
            raise JobError(Reason.GPU_OUT_OF_MEMORY, self._work.hopeless)
        self.limit = self.limit.halved(taken)
        self._mended = True
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        if self._model.sharded:
            raise self._give_up(self._work.halved.format(limit=self.limit))

    def computed(self, call: Callable[[], R]) -> R:
        """What a call makes; where it fails with compiled layers, what it makes with the layers as they are.

        Raises what the call raises then.
        """
        try:
            return call()
        except (torch.OutOfMemoryError, JobError):
            raise
        except Exception as error:
            # In the midst of a pass that all make together it may be another worker's fault, or the network's.
            elsewhere = self._model.sharded and as_job_error(error).reason != Reason.INTERNAL_ERROR
            if elsewhere or not uncompile(self._model):
                raise
            why = uncompiled_because(error)
        if self._model.sharded:
            self._uncompiled = why
            raise self._give_up(why)
        made = call()
        self._uncompiled, self._mended = why, True
        return made

    def settle(self, worker: Worker, mended: float) -> None:
        """Have all workers do what any of them has had to, and say so. Every worker calls it; `mended` is the sum of theirs."""
        if not mended:
            return
        self._mended = False
        self.limit = self.limit.at_most(worker.least(self.limit.most))
        self._tell_limit()
        if worker.sum(float(bool(self._uncompiled))) > 0:
            uncompile(self._model)
            self._tell_uncompiled(self._uncompiled or FAILED_ELSEWHERE)

    def _tell_limit(self) -> None:
        if self.limit.most < self._told_most:
            self._told_most = self.limit.most
            self.warn(self._work.halved.format(limit=self.limit))

    def _tell_uncompiled(self, why: str) -> None:
        if not self._told_uncompiled:
            self._told_uncompiled = True
            self.warn(why)

    def _give_up(self, why: str) -> JobError:
        """What ends the group of workers, for them to begin anew with what this one has found out."""
        if self._notes is not None:
            self._notes.storage.write_json(self._notes.file, {"most": self.limit.most, "uncompiled": self._uncompiled})
        return JobError(Reason.WORKERS_LOST, why)
