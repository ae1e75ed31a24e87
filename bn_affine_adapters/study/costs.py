"""What a training step costs: operations, memory, and the largest batch that fits."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from ..training.network import held_memory, most_memory


def operations(step: Callable[[], Any]) -> int:
    """Return the operations of all convolutions and matrix products that PyTorch runs, an addition and a product two.

    Example:
        >>> operations(lambda: torch.ones(2, 3) @ torch.ones(3, 5))
        60
    """
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: conv_backward_operations}
    ) as counter:
        step()
    return counter.get_total_flops()


def conv_backward_operations(dy: Any, x: Any, weight: Any, *rest: Any, out_shape: Any = None) -> int:
    """Return the operations of a convolution's backward from shapes: for each gradient those of forward.

    PyTorch's own count of the weight's gradient takes a convolution in groups for a dense one.
    """
    transposed, needs = rest[4], rest[7]
    return conv_flop_count(x, weight, dy, transposed) * (needs[0] + needs[1])


def seconds_of(step: Callable[[], Any], count: int, device: str = "cpu") -> float:
    """Return how long ``count`` steps take, to the end of what they launch on "cpu" or "cuda"."""
    finish = torch.cuda.synchronize if device == "cuda" else bool
    finish()
    start = time.perf_counter()
    for _ in range(count):
        step()
    finish()
    return time.perf_counter() - start


def peak_memory(step: Callable[[], Any], device: str = "cpu") -> tuple[int, int]:
    """Return the bytes that are held before a step, and at most in it.

    On a CPU the process's resident memory, as Linux counts it, of a step that is not the first; on a GPU what PyTorch's
    allocator holds, of the first two steps, since CUDA graphs keep what the first one allocates.
    """
    if device == "cpu":
        step()
    before = held_memory(device)
    step()
    if device == "cuda":
        step()
    return before, most_memory(device)


def unsaved_buffers(model: nn.Module) -> int:
    """Return the bytes of the buffers that are not saved with a model: copies made once."""
    found = {id(m._buffers[name]): m._buffers[name] for m in model.modules() for name in m._non_persistent_buffers_set}
    return sum(buffer.nbytes for buffer in found.values() if buffer is not None)


def largest(fits: Callable[[int], bool]) -> int:
    """Return the largest batch that fits, to 3 %; 0 if none does.

    Example:
        >>> largest(lambda batch: batch <= 21)
        21
    """
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 32):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def runs_within(step: Callable[[], Any], size: float) -> bool:
    """Tell whether a step runs on a GPU of which PyTorch's allocator gets so many bytes."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / torch.cuda.get_device_properties(0).total_memory))
    try:
        step()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
