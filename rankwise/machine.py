"""What this machine is, and the choices that follow from it: device, precision, threads, memory."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from rankwise.config import TrainConfig
from rankwise.errors import RankwiseError

PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy", "scipy", "pydantic", "pyarrow")


def device_for(train: TrainConfig) -> str:
    """Return "cuda" or "cpu" for a training configuration.

    Raises:
        RankwiseError: when CUDA is asked for and absent.
    """
    if train.device == "cuda" and not torch.cuda.is_available():
        raise RankwiseError("train.device is cuda, but PyTorch sees no CUDA device here; use auto or cpu.")
    return "cuda" if train.device != "cpu" and torch.cuda.is_available() else "cpu"


def bf16_native(device: str) -> bool:
    """Whether the processor multiplies bf16 itself (a flag, not a timing: it must never waver)."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def dtype_for(train: TrainConfig, device: str) -> str:
    """Return "fp32" or "bf16", the precision of the frozen weights."""
    if train.dtype != "auto":
        return train.dtype
    return "bf16" if bf16_native(device) else "fp32"


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return allowed or 1


def threads_for(train: TrainConfig) -> int:
    """Return the number of CPU threads, and set it: results depend on it in the last bits."""
    threads = train.threads or cores()
    torch.set_num_threads(threads)
    return threads


def available_memory() -> int:
    """Return the bytes that new work may take: free on the machine, and within this process's cgroup."""
    free = psutil.virtual_memory().available
    try:
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):
        return free  # no limit ("max"), or not Linux's second kind of control groups
    return min(free, max(0, limit - used))


def resident_memory() -> int:
    """Return the bytes that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free instead of giving it back and faulting it in again.

    A training step frees and takes the same gigabytes; without this a run spends its time on page faults
    (LOG.md has the figures). Elsewhere than on glibc this does nothing.
    """
    trim_threshold, mmap_threshold = -1, -3  # names of <malloc.h>
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
    except (OSError, AttributeError):
        return


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of "fp32" or "bf16"."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def reset_peak_memory(device: str) -> None:
    """Start a new peak: the process's own (where Linux allows it) and the device's.

    What `keep_freed_memory` has kept goes back first, else a peak would be that of any run before it.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass  # not glibc
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # not Linux, or not permitted: the peak is then the whole process's


def peak_memory(device: str) -> dict[str, int]:
    """Return peak bytes since `reset_peak_memory`: of the process, and of the device if it is CUDA."""
    peak = _peak_resident()
    if device == "cuda":
        return {"process_peak_bytes": peak, "device_peak_bytes": torch.cuda.max_memory_allocated()}
    return {"process_peak_bytes": peak}


def _peak_resident() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: the whole process's peak below
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def processor() -> str:
    """Return the processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version(), "rankwise": importlib.metadata.version("rankwise")}
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}


def describe(device: str, threads: int) -> dict[str, Any]:
    """Return the machine's description for `env.json`: host, time, hardware, versions."""
    return {
        "host": platform.node(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "system": platform.platform(),
        "processor": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "packages": versions(),
    }
