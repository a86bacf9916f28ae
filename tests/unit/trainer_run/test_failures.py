"""From exceptions to reasons, and what a message must not hold."""

import errno
import pickle

import pytest
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import TrainingFailedError, WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from finetune_api.reasons import ADVICE, Reason
from finetune_api.scrub import scrub
from finetune_trainer.errors import JobError
from finetune_trainer.failures import MESSAGE_LIMIT, failure_from, is_final

NCCL = "NCCL error in: ../NCCLUtils.hpp:275, unhandled cuda error, NCCL version 2.27\nncclUnhandledCudaError: Call failed.\nLast error:\n{}"


def from_worker(error: Exception) -> TrainingFailedError:
    """As Ray Train raises it on the head: the workers' exceptions by rank, each with its traceback as text."""
    wrapped = UserExceptionWithTraceback(error, "Traceback: ...")
    group = WorkerGroupError("rank 1 failed", {1: wrapped})
    return pickle.loads(pickle.dumps(group))  # noqa: S301 - it crosses processes


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (JobError(Reason.DATASET_INVALID, "line 3"), Reason.DATASET_INVALID),
        (OSError(errno.ENOSPC, "No space left on device"), Reason.STORAGE_FULL),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), Reason.STORAGE_FULL),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), Reason.STORAGE_FULL),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), Reason.GPU_OUT_OF_MEMORY),
        (MemoryError(), Reason.HOST_OUT_OF_MEMORY),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), Reason.HOST_OUT_OF_MEMORY),
        (OSError(errno.EROFS, "Read-only file system"), Reason.STORAGE_UNAVAILABLE),
        (OSError(errno.ESTALE, "Stale file handle"), Reason.STORAGE_UNAVAILABLE),
        (OutOfMemoryError("Task was killed due to the node running low on memory."), Reason.HOST_OUT_OF_MEMORY),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), Reason.GPU_HARDWARE_ERROR),
        (torch.AcceleratorError("CUDA error: device-side assert triggered\nCUDA kernel errors might be"), Reason.GPU_KERNEL_FAILED),
        (RuntimeError("No CUDA GPUs are available"), Reason.GPU_UNAVAILABLE),
        (torch.distributed.DistBackendError(NCCL.format("Cuda failure 2 'out of memory'")), Reason.GPU_OUT_OF_MEMORY),
        (torch.distributed.DistBackendError(NCCL.format("Cuda failure 1 'invalid argument'")), Reason.COMMUNICATION_FAILED),
        (torch.distributed.DistBackendError("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL("), Reason.NCCL_HANG),
        (ActorDiedError(), Reason.WORKERS_LOST),
        (ValueError("boom"), Reason.INTERNAL_ERROR),
    ],
)
def test_each_error_has_its_reason_wherever_it_was_raised(error: Exception, reason: Reason) -> None:
    for raised in (error, from_worker(error)):
        failure = failure_from(raised, "Train")
        assert failure.reason == reason
        assert failure.stage == "Train"
        assert (failure.retryable, failure.hint) == (ADVICE[reason].retryable, ADVICE[reason].hint)


def test_what_an_error_was_raised_from_counts() -> None:
    error = RuntimeError("while doing something")
    error.__cause__ = JobError(Reason.MODEL_NOT_FOUND, "hf://a/b")
    assert failure_from(error, "Prepare").message == "hf://a/b"


def test_the_cause_is_told_and_not_that_the_others_lost_the_worker() -> None:
    lost = UserExceptionWithTraceback(JobError(Reason.WORKERS_LOST, "rank 0 lost rank 1"), "")
    full = UserExceptionWithTraceback(OSError(errno.ENOSPC, "No space left on device"), "")
    assert failure_from(WorkerGroupError("", {0: lost, 1: full}), "Train").reason == Reason.STORAGE_FULL
    assert failure_from(WorkerGroupError("", {0: lost, 1: ActorDiedError()}), "Train").message == "rank 0 lost rank 1"


def test_the_words_of_nccl_are_told_where_no_worker_died() -> None:
    """That the connection is lost follows from both; a death explains it, a hang is the explanation."""
    hang = torch.distributed.DistBackendError("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5)")
    lost = JobError(Reason.WORKERS_LOST, "worker 0 lost the connection to another")
    lost.__cause__ = hang
    assert failure_from(WorkerGroupError("", {0: lost}), "Train").reason == Reason.NCCL_HANG
    assert failure_from(WorkerGroupError("", {0: lost, 1: ActorDiedError()}), "Train").reason == Reason.WORKERS_LOST
    assert failure_from(WorkerGroupError("", {0: lost, 1: MemoryError()}), "Train").reason == Reason.HOST_OUT_OF_MEMORY


@pytest.mark.parametrize(
    "error",
    [
        ValueError("train.jsonl:3: 'CUDA out of memory. Tried to allocate 2 GiB'"),
        ValueError("CUDA out of memory. Tried to allocate"),
        ValueError("two lines\nRuntimeError: CUDA error: out of memory"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/No space left on device"),
    ],
)
def test_a_message_that_quotes_somebody_is_no_symptom(error: Exception) -> None:
    assert failure_from(error, "Prepare").reason == Reason.INTERNAL_ERROR


def test_an_unknown_error_shows_its_kind_and_last_line() -> None:
    assert failure_from(ValueError("first\n\nlast line\n"), None).message == "ValueError: last line"
    assert failure_from(KeyError(), None).message == "KeyError: no message"
    assert failure_from(ValueError("not YAML: a: b: c\n             ~~~^\n"), None).message == "ValueError: not YAML: a: b: c"
    assert failure_from(ValueError("  ^^^^  "), None).message == "ValueError: no message"


@pytest.mark.parametrize(
    ("reason", "final"),
    [
        (Reason.TRAINING_DIVERGED, True),
        (Reason.CHECKPOINT_INCOMPATIBLE, True),
        (Reason.GPU_OUT_OF_MEMORY, True),
        (Reason.STORAGE_FULL, True),
        (Reason.GPU_HARDWARE_ERROR, True),
        (Reason.GPU_KERNEL_FAILED, False),
        (Reason.WORKERS_LOST, False),
        (Reason.STORAGE_UNAVAILABLE, False),
    ],
)
def test_what_ends_the_worker_group_for_good(reason: Reason, final: bool) -> None:
    assert is_final(JobError(reason, "")) is final


@pytest.mark.parametrize(
    "secret",
    [
        "hf_abcdefghijklmnopqrst",
        "AKIAIOSFODNN7EXAMPLE",
        "Authorization: Bearer eyJhbGciOi",
        "https://user:hunter2@host/path",
        "secret_key=wJalrXUtnFEMI",
    ],
)
def test_secrets_do_not_pass(secret: str) -> None:
    message = failure_from(JobError(Reason.STORAGE_UNAVAILABLE, f"could not read with {secret} at all"), None).message
    for word in ("hf_abc", "AKIAIO", "eyJhb", "hunter2", "wJalr"):
        assert word not in message
    assert "***" in message


def test_plain_words_pass() -> None:
    text = "train.jsonl, line 3: the field 'prompt' is missing (bearer of bad news: s3://bucket/key)"
    assert scrub("train.jsonl, line 3: s3://bucket/key of pvc://claim/a") == "train.jsonl, line 3: s3://bucket/key of pvc://claim/a"
    assert "line 3" in scrub(text)


def test_a_long_message_is_cut() -> None:
    message = failure_from(JobError(Reason.DATASET_INVALID, "x" * 5000), None).message
    assert len(message) == MESSAGE_LIMIT


@pytest.mark.parametrize("sign", ["\x1b[2J", "\r", "\x08", "\x9b31m", "\u202e", "\x00"])
def test_a_strangers_words_do_not_rule_the_readers_terminal(sign: str) -> None:
    """A column's name, or what a server says, stands in messages; a log is read in a terminal."""
    message = failure_from(JobError(Reason.DATASET_INVALID, f"the columns are a{sign}b,\n\tnot text"), "Prepare").message
    assert message == f"the columns are a\ufffd{sign[1:]}b,\n\tnot text"
