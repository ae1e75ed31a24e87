"""The arithmetic of norm + activation: PyTorch's own operators everywhere, C++ and Triton where `native` has them.

All sides have the functions `stats`, `forward`, `sums`, `input_gradient` and `restore` with the same arguments, which
`kernels.cpp` describes. Tensors have their channels in dimension 1.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import native
from .native import BFLOAT16, BYTE, INPUT, NOTHING, wide  # noqa: F401  # for those who import the kernels

LONGEST = 8192  # numbers in a row that a program of Triton holds
# Activations.
IDENTITY, RELU, RELU6, SILU, HARDSWISH, GELU, GELU_TANH = range(7)
MASKED = (RELU, RELU6)  # what backward has to know of their input is one bit


def kernels(z: Tensor, act: int) -> Any:
    """Return the namespace of functions that computes a norm layer of z; C++ and Triton only once they are loaded."""
    if compiled(z) and z.dim() in (2, 4) and act <= HARDSWISH:
        return torch.ops.bnaa
    if triton(z) and z.is_floating_point():
        return torch.ops.bnaa_triton
    return Portable


def row_kernels(z: Tensor) -> Any:
    """Return the namespace of `row_forward` and `row_backward` for rows, (..., C); None where neither side has them."""
    if compiled(z):
        return torch.ops.bnaa
    return torch.ops.bnaa_triton if triton_rows(z) else None


def compiled(z: Tensor) -> bool:
    """Tell whether there are C++ kernels for a tensor."""
    return bool(native.loaded) and z.device.type == "cpu" and z.dtype in native.DTYPES


def triton(z: Tensor) -> bool:
    """Tell whether there are Triton's kernels for a tensor's device."""
    return bool(native.triton_loaded) and z.device.type == native.TRITON_DEVICE


def triton_rows(z: Tensor) -> bool:
    """Tell whether Triton's kernels can hold a row of a tensor, (..., C)."""
    return triton(z) and 0 < z.shape[-1] <= LONGEST


def activate(u: Tensor, act: int) -> Tensor:
    """Return the activation of u."""
    if act == RELU:
        return F.relu(u)
    if act == RELU6:
        return F.relu6(u)
    if act == SILU:
        return F.silu(u)
    if act == HARDSWISH:
        return F.hardswish(u)
    if act in (GELU, GELU_TANH):
        return F.gelu(u, approximate="tanh" if act == GELU_TANH else "none")
    return u


def act_gradient(dy: Tensor, u: Tensor, act: int) -> Tensor:
    """Return the gradient of an activation's input u."""
    if act in MASKED:
        return dy * passes(u, act)
    if act == SILU:
        return torch.ops.aten.silu_backward(dy, u)
    if act == HARDSWISH:
        return torch.ops.aten.hardswish_backward(dy, u)
    if act in (GELU, GELU_TANH):
        return torch.ops.aten.gelu_backward(dy, u, approximate="tanh" if act == GELU_TANH else "none")
    return dy


def passes(u: Tensor, act: int) -> Tensor:
    """Return where ReLU or ReLU6 lets the gradient of its input u through, bool."""
    return (u > 0) & (u < 6) if act == RELU6 else u > 0


def pack(bits: Tensor) -> Tensor:
    """Return a bool tensor as uint8, 8 values a byte."""
    flat = F.pad(bits.flatten(), (0, -bits.numel() % 8)).view(-1, 8)
    return (flat.to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """Return the bool tensor of a shape that `pack` packed."""
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten()[: shape.numel()].view(shape).bool()


def _axes(z: Tensor) -> list[int]:
    return [axis for axis in range(z.dim()) if axis != 1]


def _columns(z: Tensor, *values: Tensor) -> list[Tensor]:
    """Return one number per channel in a shape that fits z."""
    return [value.view(1, -1, *(1,) * (z.dim() - 2)) for value in values]


class Portable:
    """The kernels in PyTorch's operators: any device and layout; torch.compile fuses them."""

    @staticmethod
    def stats(z: Tensor, range: bool) -> Tensor:
        """Return mean and biased variance of each channel, and its least and greatest value: (2 or 4, C)."""
        z = z.to(wide(z.dtype))
        axes = _axes(z)
        variance, mean = torch.var_mean(z, axes, correction=0)
        return torch.stack([mean, variance, *((z.amin(axes), z.amax(axes)) if range else ())])

    @staticmethod
    def forward(
        z: Tensor,
        residual: Tensor | None,
        slope: Tensor,
        level: Tensor,
        zero: Tensor,
        step: Tensor,
        act: int,
        keep: int,
        with_mask: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the layer's output, what is kept of z, and the packed mask."""
        slope, level, zero, step = _columns(z, slope, level, zero, step)
        u = z.to(slope.dtype) * slope + level
        if residual is not None:
            u = u + residual
        kept = z.new_empty(0)
        if keep == BFLOAT16:
            kept = ((z - zero) * step).to(torch.bfloat16)
        elif keep == BYTE:
            kept = ((z - zero) * step + 0.5).clamp(0, 255).to(torch.uint8)
        mask = pack(passes(u, act)) if with_mask else z.new_empty(0, dtype=torch.uint8)
        y = activate(u, act)
        # Where a Function returns what `to` left as it was, the compiler of PyTorch 2.11 makes all its gradients zero.
        return y if y.dtype == z.dtype else y.to(z.dtype), kept, mask

    @staticmethod
    def sums(
        dy: Tensor,
        kept: Tensor,
        mask: Tensor | None,
        slope: Tensor,
        level: Tensor,
        zero: Tensor,
        act: int,
        want_du: bool,
        more: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the sums of du and of du (kept - zero), (2, C), and du itself if asked for; of dy + more if given."""
        axes, dtype = _axes(dy), dy.dtype
        dy = dy if more is None else dy.to(slope.dtype) + more
        du = _du(dy, kept, mask, slope, level, act)
        (centre,) = _columns(dy, zero)
        found = torch.stack([du.sum(axes), (du * (kept - centre)).sum(axes)])
        return found, du.to(dtype) if want_du else dy.new_empty(0)

    @staticmethod
    def input_gradient(
        dy: Tensor,
        kept: Tensor,
        mask: Tensor | None,
        slope: Tensor,
        level: Tensor,
        zero: Tensor,
        act: int,
        by: Tensor,
        along: Tensor,
        constant: Tensor,
    ) -> Tensor:
        """Return du * by + (kept - zero) * along + constant."""
        du = _du(dy, kept, mask, slope, level, act)
        zero, by, along, constant = _columns(dy, zero, by, along, constant)
        return (du * by + (kept - zero) * along + constant).to(dy.dtype)

    @staticmethod
    def restore(kept: Tensor, slope: Tensor, level: Tensor, act: int) -> Tensor:
        """Return the activation's output from what was kept."""
        slope, level = _columns(kept, slope, level)
        return activate(kept * slope + level, act)


def _du(dy: Tensor, kept: Tensor, mask: Tensor | None, slope: Tensor, level: Tensor, act: int) -> Tensor:
    dy = dy.to(slope.dtype)
    if mask is not None:
        return dy * unpack(mask, dy.shape)
    if act == IDENTITY:
        return dy
    slope, level = _columns(dy, slope, level)
    return act_gradient(dy, kept * slope + level, act)
