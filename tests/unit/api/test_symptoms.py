"""Texts as libraries, drivers and the kernel print them, and texts that only look like it."""

import time

import pytest

from finetune_api.reasons import ADVICE, Reason
from finetune_api.symptoms import CONSEQUENCES, SYMPTOMS, recognise

PRINTED = {
    Reason.GPU_HARDWARE_ERROR: [
        "RuntimeError: CUDA error: uncorrectable ECC error encountered",
        "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered",
        "[rank3]: torch.AcceleratorError: CUDA error: uncorrectable NVLink error detected during the execution",
        "Cuda failure 214 'uncorrectable ECC error encountered'",
        "[ 1843.308145] NVRM: Xid (PCI:0000:44:00): 79, GPU has fallen off the bus.",
        "NVRM: GPU 0000:b3:00.0: GPU has fallen off the bus.",
        "Unable to determine the device handle for GPU 0000:BA:00.0: Unknown Error",
    ],
    Reason.GPU_UNAVAILABLE: [
        "RuntimeError: No CUDA GPUs are available",
        "RuntimeError: CUDA error: no CUDA-capable device is detected",
        "RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver from",
        "RuntimeError: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver",
        "RuntimeError: Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling NumCudaDevices()",
        "RuntimeError: CUDA error: no kernel image is available for execution on the device",
        "Failed to initialize NVML: Driver/library version mismatch",
    ],
    Reason.GPU_OUT_OF_MEMORY: [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB.",
        "(RayTrainWorker pid=411, ip=10.0.0.2) [rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.",
        "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 23.69 GiB total capacity)",
        "RuntimeError: CUDA out of memory. Tried to allocate 20.00 MiB",
        "ray.exceptions.RayTaskError(OutOfMemoryError): CUDA out of memory. Tried to allocate 1.00 GiB",
        "RuntimeError: CUDA error: out of memory",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Cuda failure 2 'out of memory'",
        "node-1:534:1763 [3] include/alloc.h:102 NCCL WARN Cuda failure 2 'out of memory'",
    ],
    Reason.SHARED_MEMORY_FULL: [
        "RuntimeError: DataLoader worker (pid 46794) is killed by signal: Bus error. It is possible that dataloader's workers are out of",
        "ERROR: Unexpected bus error encountered in worker. This might be caused by insufficient shared memory (shm).",
        "Fatal Python error: Bus error",
        "Bus error (core dumped)",
        "Error while creating shared memory segment /dev/shm/nccl-mHWzQ9 (size 9637888)",
        "Error: failed to extend /dev/shm/nccl-abc123 to 33030532 bytes, error: No space left on device (28)",
        "RuntimeError: unable to write to file </torch_345_1128392_0>: No space left on device (28)",
        "RuntimeError: unable to mmap 4096 bytes from file </torch_345_1128392_0>: Cannot allocate memory (12)",
    ],
    Reason.STORAGE_FULL: [
        "OSError: [Errno 28] No space left on device",
        "OSError: [Errno 28] No space left on device: '/mnt/finetune/claims/models/x'",
        "OSError: [Errno 122] Disk quota exceeded",
        "safetensors_rust.SafetensorError: Error while serializing: I/O error: No space left on device (os error 28)",
        "ray.exceptions.OutOfDiskError: Local disk is full",
        "botocore.exceptions.ClientError: An error occurred (XMinioStorageFull) when calling the PutObject operation: Storage backend full",
    ],
    Reason.HOST_OUT_OF_MEMORY: [
        "MemoryError",
        "MemoryError: ",
        "MemoryError: Unable to allocate 7.45 GiB for an array with shape (1000000000,) and data type float64",
        "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 7.45 GiB for an array with shape (1000000000,)",
        "pyarrow.lib.ArrowMemoryError: malloc of size 137438953472 failed",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to",
        "OSError: [Errno 12] Cannot allocate memory",
        "terminate called after throwing an instance of 'std::bad_alloc'",
        "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory.",
        "Task was killed due to the node running low on memory.",
        "ray.exceptions.OutOfMemoryError: Memory on the node (IP: 10.0.0.1, ID: ab) was 15.2GB used / 16.0GB limit (0.95)",
        "(raylet) [2025-12-07 09:57:19,206 E 393463 393463] (raylet) node_manager.cc:3277: nothing of this line\n"
        "2 Workers (tasks / actors) killed due to memory pressure (OOM), 0 Workers crashed due to other reasons at node",
    ],
    Reason.AUTHENTICATION_FAILED: [
        "botocore.exceptions.ClientError: An error occurred (AccessDenied) when calling the PutObject operation: Access Denied",
        "botocore.exceptions.ClientError: An error occurred (403) when calling the HeadObject operation: Forbidden",
        "OSError: When reading information for key 'm' in bucket 'b': AWS Error ACCESS_DENIED during HeadObject operation: No response",
        "OSError: When listing objects: AWS Error EXPIRED_TOKEN during ListObjectsV2 operation: The provided token has expired.",
    ],
    Reason.STORAGE_UNAVAILABLE: [
        "OSError: [Errno 30] Read-only file system: '/mnt/finetune/claims/models/bot'",
        "OSError: [Errno 116] Stale file handle",
        "OSError: [Errno 5] Input/output error",
        "safetensors_rust.SafetensorError: Error while serializing: I/O error: Read-only file system (os error 30)",
        "PermissionError: [Errno 13] Permission denied: '/mnt/finetune/claims/models/bot/.finetune'",
        "botocore.exceptions.ClientError: An error occurred (SlowDown) when calling the PutObject operation (reached max retries: 4):",
        "botocore.errorfactory.NoSuchBucket: An error occurred (NoSuchBucket) when calling the PutObject operation"
        "\nbotocore.exceptions.ClientError: An error occurred (NoSuchBucket) when calling the ListObjects operation: none",
        "OSError: When initiating multiple part upload: AWS Error SLOW_DOWN during CreateMultipartUpload operation: Please slow down.",
        "OSError: When testing for existence of bucket 'b': AWS Error NETWORK_CONNECTION during HeadBucket operation: curlCode: 6",
    ],
    Reason.GPU_KERNEL_FAILED: [
        "RuntimeError: CUDA error: device-side assert triggered",
        "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
        "RuntimeError: CUDA error: unspecified launch failure",
        "RuntimeError: CUDA error: an illegal instruction was encountered",
        "Cuda failure 700 'an illegal memory access was encountered'",
        "RuntimeError: Triton Error [CUDA]: an illegal memory access was encountered",
        "/pytorch/aten/src/ATen/native/cuda/Indexing.cu:1553: indexSelectLargeIndex: block: [73,0,0], thread: [32,0,0] Assertion "
        "`srcIndex < srcSelectDimSize` failed.",
    ],
    Reason.CONTAINER_START_FAILED: [
        "exec /usr/local/bin/python: exec format error",
        "/usr/local/bin/python: No module named finetune_trainer",
    ],
    Reason.NCCL_HANG: [
        "[rank0]:[E321 02:07:08.408271257 ProcessGroupNCCL.cpp:607] [Rank 0] Watchdog caught collective operation timeout: WorkNCCL(Seq",
        "[E ProcessGroupNCCL.cpp:458] [Rank 7] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=96120, OpType=ALLREDUCE)",
        "  what():  [PG ID 0 PG GUID 0(default_pg) Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=808)",
        "torch.distributed.DistBackendError: [Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5)",
        "torch.distributed.DistStoreError: wait timeout after 300000ms, keys: /default_pg/0//cuda//0",
        "ray.train.v2._internal.exceptions.BroadcastCollectiveTimeoutError: The collective operation timed out after 300.01 seconds.",
        "RuntimeError: [../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation",
    ],
    Reason.COMMUNICATION_FAILED: [
        "torch.distributed.DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:275, unhandled cuda error (run",
        "[rank7]: ncclUnhandledCudaError: Call to CUDA function failed.",
        "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
        "RuntimeError: Gloo connectFullMesh failed with [../third_party/gloo/gloo/transport/tcp/pair.cc:144] no error",
        "torch.distributed.DistStoreError: Timed out after 601 seconds waiting for clients. 1/2 clients joined.",
    ],
    Reason.PROCESS_CRASHED: [
        "Fatal Python error: Segmentation fault",
        "Segmentation fault (core dumped)",
        "*** SIGSEGV received at time=1700000000 on cpu 3 ***",
        "double free or corruption (!prev)",
    ],
    Reason.WORKERS_LOST: [
        "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\n"
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker",
        "The actor died because its node has died. Node Id: 8289f87b",
        "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:598] Connection closed by peer [10.0.0.2]:31337",
    ],
}
CASES = [(reason, text) for reason, texts in PRINTED.items() for text in texts]


@pytest.mark.parametrize(("reason", "text"), CASES, ids=[f"{reason}-{number}" for number, (reason, _) in enumerate(CASES)])
def test_what_is_really_printed_is_recognised(reason: Reason, text: str) -> None:
    found = recognise(["Traceback (most recent call last):", '  File "loop.py", line 1, in train', *text.splitlines(), ""])
    assert found is not None
    assert found.reason is reason
    assert found.line in text


@pytest.mark.parametrize("text", [text for _, text in CASES])
def test_the_same_words_in_somebodys_data_say_nothing(text: str) -> None:
    """Messages quote columns, rows and servers; logs show samples."""
    for line in text.splitlines():
        assert recognise([f"ValueError: train.jsonl:3: not a message: {line!r}"]) is None
        assert recognise([f'sample: {{"prompt": "why {line}"}}']) is None
        assert recognise([f"step 12/600  loss 1.2  answered: {line}"]) is None


@pytest.mark.parametrize(
    "line",
    [
        "the GPU was out of memory, so micro-batches are smaller now",
        "user: my program says CUDA out of memory. Tried to allocate 2 GiB, what can I do?",
        "ValueError: CUDA out of memory. Tried to allocate",
        "pydantic_core.ValidationError: NCCL error in: the spec",
        "KeyError: 'CUDA error: device-side assert triggered'",
        "ValueError: the column 'MemoryError' is missing",
        "FileNotFoundError: [Errno 2] No such file or directory: '/data/No space left on device'",
        "warning: no space left on device is what you will see when the disk is full",
        "INFO ncclRemoteError is documented elsewhere",
        "PermissionError: [Errno 13] Permission denied: '/root/x'",
        "a MemoryError",
        "MemoryErrors: 0",
        "",
    ],
)
def test_a_line_that_only_speaks_of_it_is_none(line: str) -> None:
    assert recognise([line]) is None


def test_a_cause_counts_before_what_follows_from_it() -> None:
    hang, lost = PRINTED[Reason.NCCL_HANG][0], PRINTED[Reason.WORKERS_LOST][1]
    short = PRINTED[Reason.GPU_OUT_OF_MEMORY][1]
    for lines in ([hang, lost, short], [short, lost, hang], [lost, short]):
        found = recognise(lines)
        assert found is not None
        assert (found.reason, found.line) == (Reason.GPU_OUT_OF_MEMORY, short)


def test_what_cuda_said_to_nccl_is_told() -> None:
    """An error of NCCL in four lines: the last one is the cause."""
    lines = [PRINTED[Reason.COMMUNICATION_FAILED][0], "ncclUnhandledCudaError: Call to CUDA function failed.", "Last error:"]
    generic, full = recognise([*lines, "Cuda failure 1 'invalid argument'"]), recognise([*lines, "Cuda failure 2 'out of memory'"])
    assert generic is not None
    assert full is not None
    assert (generic.reason, full.reason) == (Reason.COMMUNICATION_FAILED, Reason.GPU_OUT_OF_MEMORY)


def test_every_reason_of_the_table_is_a_failure_with_a_text_here() -> None:
    assert {symptom.reason for symptom in SYMPTOMS} == set(PRINTED) <= set(ADVICE)
    assert set(CONSEQUENCES) <= set(PRINTED)
    for symptom in SYMPTOMS:
        texts = [line for text in PRINTED[symptom.reason] for line in text.splitlines()]
        assert any(symptom.pattern.match(line) for line in texts), symptom.pattern.pattern


@pytest.mark.parametrize(
    "line", ["[rank0]:" * 500, " " * 5000, "(raylet" * 800, "[PG " * 900, "a" * 100_000, "-" * 3000 + ":1:2 [0]", "A" * 2000 + "Error: "]
)
def test_a_long_line_is_looked_at_quickly(line: str) -> None:
    begun = time.perf_counter()
    recognise([line] * 20)
    assert time.perf_counter() - begun < 2
