"""What the back ends and those who call them agree on."""

import torch

# Activations. Each back end says in `ACTIVATIONS` which of them it computes.
IDENTITY, RELU, RELU6, SILU, HARDSWISH = "identity", "relu", "relu6", "silu", "hardswish"
GELU, GELU_TANH = "gelu", "gelu_tanh"
MASKED = (RELU, RELU6)  # what backward has to know of their input is one bit
ADDABLE = (IDENTITY, *MASKED)  # behind which activations a residual is added in the same kernel

# What forward keeps for backward: the input itself, its normalised value in bfloat16 or in 8 bits, or nothing.
INPUT, BFLOAT16, BYTE, NOTHING = range(4)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type that is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
