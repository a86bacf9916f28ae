"""What libraries, drivers and the kernel print when something breaks, and the reason that it stands for.

The one table for the trainer, which asks of exceptions, and for the operator, which asks of the last lines of a pod that died silently.
A line counts only where it begins as such a message does, after the marks that loggers and launchers put before it: the same words within a
sentence, or in somebody's data, say nothing.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from finetune_api.reasons import Reason

LINE_MAX = 2000
"""Characters of a line that are looked at."""


@dataclass(frozen=True)
class Symptom:
    """A text, and what it says."""

    reason: Reason
    pattern: re.Pattern[str]


@dataclass(frozen=True)
class Finding:
    """A reason that was recognised, and the line that says it."""

    reason: Reason
    line: str


_MARKS = (
    r"(?:\s*(?:\[rank\d+\]:?|\[Rank \d+\]:?|\[PG [^\]]{0,200}\]|\((?:[\w:.]{1,80} )?pid=\d+[^)]{0,80}\)|\(raylet[^)]{0,80}\)"
    r"|\[[EWIF]\d* ?[\d:. ]{0,40}\w{1,60}\.cpp:\d+\]|what\(\):|[-\w.]{1,120}:\d+:\d+ \[\d+\]|\[\s*\d+\.\d+\]))*\s*"
)
"""[rank0]:, (TrainWorker pid=7, ip=10.0.0.2), [E321 02:07:08.4 ProcessGroupNCCL.cpp:607] [Rank 0], host:1:2 [0], the kernel's clock."""
_ERROR = (
    r"(?!(?:\w+\.)*(?:Value|Key|Type|Index|Attribute|Lookup|Name|Validation)Error)(?:[\w.]{1,120}(?:Error|Exception)(?:\(\w{1,80}\))?: )"
)
"""Python's own errors of wrong values are left out: their words quote the value."""
_CUDA = rf"(?:{_ERROR})?" + r"(?:CUDA|HIP|Triton) [Ee]rror(?: \[CUDA\])?: "
_NCCL_CUDA = r"(?:\S{1,80} NCCL WARN )?Cuda failure (?:\d+ )?'"
_IO = r"(?:[\w.]{0,120}(?:OSError|IOError|RuntimeError|SafetensorError|StorageError|ArrowException|BlockingIOError)(?:\(\w{1,80}\))?: )"
_S3 = r"(?:[\w.]{1,120}: An error occurred )"
"""As botocore begins; and as pyarrow does:"""
_ARROW_S3 = r"(?:OSError: When .{1,400}: AWS Error )"


def _say(reason: Reason, *patterns: str) -> tuple[Symptom, ...]:
    return tuple(Symptom(reason, re.compile(_MARKS + pattern)) for pattern in patterns)


SYMPTOMS: tuple[Symptom, ...] = (
    # Causes before what follows from them: where several are printed, the first of this table counts.
    *_say(
        Reason.GPU_HARDWARE_ERROR,
        _CUDA + r"(?:uncorrectable ECC error encountered|uncorrectable NVLink error|Invalid access of peer GPU memory over nvlink)",
        _NCCL_CUDA + r"uncorrectable (?:ECC|NVLink) error",
        r"NVRM: Xid \([^)]{1,40}\): (?:48|63|64|74|79|94|95|119|120),",
        r"NVRM: (?:GPU \S{1,40}: )?GPU has fallen off the bus",
        r"Unable to determine the device handle for GPU",
    ),
    *_say(
        Reason.GPU_UNAVAILABLE,
        _CUDA + r"(?:no CUDA-capable device is detected|CUDA driver version is insufficient|all CUDA-capable devices are busy)",
        _CUDA + r"(?:no kernel image is available|system not yet initialized|system has unsupported display driver)",
        _ERROR + r"(?:No CUDA GPUs are available|Found no NVIDIA driver on your system|The NVIDIA driver on your system is too old)",
        _ERROR + r"Unexpected error from cudaGetDeviceCount\(\)",
        r"Failed to initialize NVML: ",
    ),
    *_say(
        Reason.GPU_OUT_OF_MEMORY,
        _ERROR + r"(?:CUDA|HIP) out of memory\.",
        r"torch\.(?:cuda\.)?OutOfMemoryError",
        _CUDA + r"(?:out of memory|CUBLAS_STATUS_ALLOC_FAILED)",
        _NCCL_CUDA + r"out of memory'",
    ),
    *_say(
        Reason.SHARED_MEMORY_FULL,
        _ERROR + r"DataLoader worker \(pid[^)]{1,40}\) is killed by signal: Bus error",
        r"ERROR: Unexpected bus error encountered in worker\.",
        r"(?:Fatal Python error: )?Bus error(?: \(core dumped\))?\s*$",
        _ERROR + r"unable to (?:write to|mmap \d+ bytes from|resize) file </?torch_",
        r"(?:\S{1,80} NCCL WARN )?Error while creating shared memory segment /dev/shm/nccl-",
        r"(?:\S{1,80} NCCL WARN )?Error: failed to extend /dev/shm/nccl-",
    ),
    *_say(
        Reason.STORAGE_FULL,
        _IO + r"(?:.{0,400}[:\]] )?(?:No space left on device|Disk quota exceeded)",
        r"ray\.exceptions\.OutOfDiskError",
        _S3 + r"\((?:XMinioStorageFull|QuotaExceeded)\)",
    ),
    *_say(
        Reason.HOST_OUT_OF_MEMORY,
        r"[\w.]{0,120}MemoryError(?:\(\w{1,80}\))?(?::? ?$|: (?:Unable to allocate|[mr]e?alloc of size|Task was killed))",
        r"ray\.exceptions\.OutOfMemoryError",
        _ERROR + r"(?:\[enforce fail at alloc_cpu\.cpp:\d+\] .{0,200})?DefaultCPUAllocator: (?:can't allocate memory|not enough memory)",
        _IO + r"\[Errno 12\] Cannot allocate memory",
        r"(?:terminate called after throwing an instance of 'std::bad_alloc'|std::bad_alloc\s*$)",
        r"Task was killed due to the node running low on memory\.",
        r"\d+ (?:Workers? \(tasks / actors\)|worker\(s\)(?: were)?) killed due to (?:memory pressure|the node running low on memory)",
    ),
    *_say(
        Reason.AUTHENTICATION_FAILED,
        _S3 + r"\((?:AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|403)\) when calling the",
        _ARROW_S3 + r"(?:ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|EXPIRED_TOKEN) during",
    ),
    *_say(
        Reason.STORAGE_UNAVAILABLE,
        _IO + r"\[Errno (?:5|30|107|116)\] (?:Input/output error|Read-only file system|Transport endpoint|Stale (?:NFS )?file handle)",
        _IO + r".{0,400}(?:Read-only file system \(os error 30\)|Stale file handle \(os error 116\)|Input/output error \(os error 5\))",
        r"PermissionError: \[Errno 13\] Permission denied: '/mnt/finetune/",
        _S3 + r"\((?:SlowDown|NoSuchBucket|ServiceUnavailable|RequestTimeout)\) when calling the",
        _ARROW_S3 + r"(?:SLOW_DOWN|NO_SUCH_BUCKET|SERVICE_UNAVAILABLE|NETWORK_CONNECTION|REQUEST_TIMEOUT) during",
    ),
    *_say(
        Reason.GPU_KERNEL_FAILED,
        _CUDA + r"(?:device-side assert triggered|an illegal memory access was encountered|misaligned address|unspecified launch failure)",
        _CUDA + r"an illegal instruction was encountered",
        _NCCL_CUDA + r"(?:an illegal memory access was encountered|device-side assert triggered|unspecified launch failure)'",
        r"\S{1,200}\.cuh?:\d+: .{1,300}Assertion `.{1,200}` failed",
    ),
    *_say(
        Reason.CONTAINER_START_FAILED,
        r"exec \S{1,200}: exec format error",
        r"\S{0,200}python[\d.]*: No module named finetune_trainer",
    ),
    *_say(
        Reason.NCCL_HANG,
        rf"(?:{_ERROR})?" + r"(?:\[[^\]]{1,200}\] ?){0,3}Watchdog caught collective operation timeout: ",
        _ERROR + r"The collective operation timed out after ",
        _ERROR + r"\[\S{1,200}gloo/\S{1,200}:\d+\] Timed out waiting \d+ms for ",
        _ERROR + r"wait timeout after \d+ms, keys: ",
    ),
    *_say(
        Reason.COMMUNICATION_FAILED,
        _ERROR + r"NCCL (?:error in: |Error \d+: )",
        r"nccl(?:UnhandledCuda|System|Internal|Remote|InvalidUsage|InvalidArgument)Error: ",
        _ERROR + r"Gloo connectFullMesh failed",
        _ERROR + r"Timed out after \d+ seconds waiting for clients",
    ),
    *_say(
        Reason.PROCESS_CRASHED,
        r"Fatal Python error: (?:Segmentation fault|Aborted|Illegal instruction|Floating point exception)",
        r"(?:Segmentation fault|Aborted|Illegal instruction|Floating point exception)(?: \(core dumped\))?\s*$",
        r"\*\*\* SIG(?:SEGV|ABRT|ILL|FPE) received at ",
        r"(?:free\(\): invalid|double free or corruption|malloc\(\): |corrupted size vs\. prev_size)",
    ),
    *_say(
        Reason.WORKERS_LOST,
        r"The actor is dead because its worker process has died\. Worker exit type: SYSTEM_ERROR",
        r"The actor died because its node has died\.",
        _ERROR + r"\[\S{1,200}gloo/\S{1,200}:\d+\] (?:Connection closed by peer|Read error |writev )",
    ),
)

CONSEQUENCES = (Reason.WORKERS_LOST, Reason.COMMUNICATION_FAILED, Reason.NCCL_HANG)
"""What the other workers see when one of them fails: told only where nothing else is known."""


def recognise(lines: Iterable[str]) -> Finding | None:
    """What the lines of a log or of an exception say: of several causes the first of SYMPTOMS, in the line that comes first."""
    looked_at = [line[:LINE_MAX].rstrip() for line in lines]
    for symptom in SYMPTOMS:
        for line in looked_at:
            if symptom.pattern.match(line):
                return Finding(symptom.reason, line.strip())
    return None
