"""The Triton kernels of a GPU, loaded when they are first asked for. Experimental: they have not run on a GPU yet."""

import logging

import torch
from torch import Tensor

from . import cpp
from .constants import GELU, GELU_TANH, HARDSWISH, IDENTITY, RELU, RELU6, SILU

DEVICE = "cuda"  # PyTorch's name for AMD's too
ACTIVATIONS = frozenset((IDENTITY, RELU, RELU6, SILU, HARDSWISH, GELU, GELU_TANH))  # that `triton_kernels` compute
LONGEST = 8192  # numbers in a row that a program of Triton holds

log = logging.getLogger(__name__)
loaded: bool | None = None  # None: not asked for yet


def load() -> bool:
    """Load the kernels, once, and try one; return whether they work. The log says why not.

    Triton compiles each when it first runs, for which it needs a C compiler itself.
    """
    global loaded
    if loaded is None:
        loaded = not cpp.left_out() and _load()
    return loaded


def _load() -> bool:
    try:
        from . import triton_columns, triton_ops, triton_rows  # noqa: F401  # whose operators are registered with it

        if torch.cuda.is_available():
            triton_ops.stats(torch.zeros(2, 1, device="cuda"), False)
    except Exception as error:  # no Triton, no compiler, a GPU it does not know: whatever it is, there is another way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        log.warning("lean training runs in PyTorch's own kernels, which torch.compile makes fast: Triton: %s", reason)
        return False
    return True


def has(z: Tensor) -> bool:
    """Tell whether there are kernels for a tensor's device."""
    return bool(loaded) and z.device.type == DEVICE


def has_rows(z: Tensor) -> bool:
    """Tell whether the kernels can hold a row of a tensor, (..., C)."""
    return has(z) and 0 < z.shape[-1] <= LONGEST
