"""Memory that is held, and the most of it: of this process as Linux counts it, or of PyTorch's allocator on a GPU."""

import ctypes
import gc
from pathlib import Path

import torch


def held_memory(device: str) -> int:
    """Return the bytes that are held now; `most_memory` counts from here."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _resident("VmRSS")


def most_memory(device: str) -> int:
    """Return the most bytes that were held since `held_memory`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _resident("VmHWM")


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
