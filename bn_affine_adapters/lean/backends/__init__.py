"""The arithmetic of lean training, and who does it: PyTorch's operators anywhere, C++ on a CPU, Triton on a GPU."""

from typing import Any

import torch
from torch import Tensor

from . import cpp, gpu, portable


def of_layer(z: Tensor, act: str) -> Any:
    """Return the back end that computes a norm layer of z with an activation; None where none knows it."""
    if cpp.has(z) and z.dim() in (2, 4) and act in cpp.ACTIVATIONS:
        return torch.ops.bnaa
    if gpu.has(z) and z.is_floating_point() and act in gpu.ACTIVATIONS:
        return torch.ops.bnaa_triton
    return portable if act in portable.ACTIVATIONS else None


def of_channels(statistics: Tensor) -> Any:
    """Return the back end of `channel_maps` and `gradient_terms`."""
    return torch.ops.bnaa_triton if gpu.has(statistics) else portable


def of_rows(x: Tensor, act: str) -> Any:
    """Return the back end of `keep_rows` and `restore_rows` for rows, (..., C), and an activation of them."""
    if gpu.has_rows(x) and act in gpu.ACTIVATIONS:
        return torch.ops.bnaa_triton
    return portable


def of_layer_norm(z: Tensor) -> Any:
    """Return the back end of `row_forward` and `row_backward` for rows, (..., C); None where it has none."""
    return torch.ops.bnaa_triton if gpu.has_rows(z) else None
