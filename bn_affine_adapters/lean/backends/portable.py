"""The operators in PyTorch's own: any device and layout; torch.compile fuses them.

`operators` says what each computes. An activation is one entry of `ACTIVATIONS`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .constants import (
    BFLOAT16,
    BYTE,
    GELU,
    GELU_TANH,
    HARDSWISH,
    IDENTITY,
    RELU,
    RELU6,
    SILU,
    wide,
)
from .operators import ChannelMaps

aten = torch.ops.aten


class Activation(NamedTuple):
    """An activation.

    Attributes:
        value: of the input u.
        gradient: of u, from the output's gradient and u.
    """

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    IDENTITY: Activation(lambda u: u, lambda dy, u: dy),
    RELU: Activation(F.relu, lambda dy, u: dy * passes(u, RELU)),
    RELU6: Activation(F.relu6, lambda dy, u: dy * passes(u, RELU6)),
    SILU: Activation(F.silu, aten.silu_backward),
    HARDSWISH: Activation(F.hardswish, aten.hardswish_backward),
    GELU: Activation(F.gelu, aten.gelu_backward),
    GELU_TANH: Activation(
        lambda u: F.gelu(u, approximate="tanh"), lambda dy, u: aten.gelu_backward(dy, u, approximate="tanh")
    ),
}


def activate(u: Tensor, act: str) -> Tensor:
    """Return the activation of u."""
    return ACTIVATIONS[act].value(u)


def act_gradient(dy: Tensor, u: Tensor, act: str) -> Tensor:
    """Return the gradient of an activation's input u."""
    return ACTIVATIONS[act].gradient(dy, u)


def passes(u: Tensor, act: str) -> Tensor:
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


def _maps(maps: Tensor, z: Tensor) -> ChannelMaps:
    """Return the maps, each in a shape that fits z."""
    return ChannelMaps(*maps.view(8, 1, -1, *(1,) * (z.dim() - 2)))


def stats(z: Tensor, with_range: bool) -> Tensor:
    """Return mean and variance, least and greatest value of each channel."""
    z = z.to(wide(z.dtype))
    axes = _axes(z)
    variance, mean = torch.var_mean(z, axes, correction=0)
    return torch.stack([mean, variance, *((z.amin(axes), z.amax(axes)) if with_range else ())])


def channel_maps(statistics: Tensor, eps: float, gamma: Tensor | None, beta: Tensor | None, keep: int) -> Tensor:
    """Return `ChannelMaps` as one tensor."""
    mean, inverse = statistics[0], torch.rsqrt(statistics[1] + eps)
    gamma = torch.ones_like(mean) if gamma is None else gamma.to(mean.dtype)
    beta = torch.zeros_like(mean) if beta is None else beta.to(mean.dtype)
    slope = gamma * inverse
    offset = beta - mean * slope
    if keep == BFLOAT16:
        maps = ChannelMaps(slope, offset, mean, inverse, gamma, beta, torch.zeros_like(mean), torch.ones_like(mean))
    elif keep == BYTE:
        low, high = statistics[2], statistics[3]
        width = ((high - low) / 255).clamp_min(1e-18)  # where a channel is constant, nothing is divided by zero
        step, zero = width * slope, (mean - low) / width
        maps = ChannelMaps(slope, offset, low, 1 / width, step, low * slope + offset, zero, width * inverse)
    else:
        maps = ChannelMaps(slope, offset, mean, inverse, slope, offset, mean, inverse)
    return torch.stack(maps)


def forward(
    z: Tensor, residual: Tensor | None, maps: Tensor, act: str, keep: int, with_mask: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the layer's output, what is kept of z, and the mask, packed."""
    slope, offset, zero, step, *_ = _maps(maps, z)
    u = z.to(slope.dtype) * slope + offset
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


def sums(
    dy: Tensor, kept: Tensor, mask: Tensor | None, maps: Tensor, act: str, want_du: bool, dy2: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the sums of du and of du (kept - kept_zero), and du itself if asked for."""
    axes, dtype = _axes(dy), dy.dtype
    dy = dy if dy2 is None else dy.to(maps.dtype) + dy2
    du = _du(dy, kept, mask, maps, act)
    of_both = torch.stack([du.sum(axes), (du * (kept - _maps(maps, dy).kept_zero)).sum(axes)])
    return of_both, du.to(dtype) if want_du else dy.new_empty(0)


def gradient_terms(sums: Tensor, maps: Tensor, values: int, of_batch: bool) -> Tensor:
    """Return gamma's gradient and the terms of the input's."""
    slope, step = maps[0], maps[-1]
    dgamma = sums[1] * step
    if not of_batch:
        return torch.stack([dgamma, torch.zeros_like(slope), torch.zeros_like(slope)])
    along, constant = (-slope / values * torch.stack([dgamma, sums[0]])).unbind()
    return torch.stack([dgamma, along * step, constant])


def input_gradient(dy: Tensor, kept: Tensor, mask: Tensor | None, maps: Tensor, act: str, terms: Tensor) -> Tensor:
    """Return the gradient of z."""
    du, of = _du(dy, kept, mask, maps, act), _maps(maps, dy)
    _, along, constant = terms.view(3, 1, -1, *(1,) * (dy.dim() - 2))
    return (du * of.slope + (kept - of.kept_zero) * along + constant).to(dy.dtype)


def restore(kept: Tensor, maps: Tensor, act: str) -> Tensor:
    """Return the activation's output from what was kept."""
    of = _maps(maps, kept)
    return activate(kept * of.kept_slope + of.kept_offset, act)


def _du(dy: Tensor, kept: Tensor, mask: Tensor | None, maps: Tensor, act: str) -> Tensor:
    dy = dy.to(maps.dtype)
    if mask is not None:
        return dy * unpack(mask, dy.shape)
    if act == IDENTITY:
        return dy
    of = _maps(maps, dy)
    return act_gradient(dy, kept * of.kept_slope + of.kept_offset, act)


def keep_rows(x: Tensor, act: str, want_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows in 8 bits a value, the least value and the step of each, and their activation if asked for."""
    low = x.amin(-1, keepdim=True).to(wide(x.dtype))
    step = ((x.amax(-1, keepdim=True) - low) / 255).clamp_min(1e-18)
    kept = ((x - low) / step + 0.5).clamp(0, 255).to(torch.uint8)
    return kept, torch.cat([low, step], -1), activate(x, act) if want_y else x.new_empty(0)


def restore_rows(kept: Tensor, scale: Tensor, dy: Tensor | None, act: str, dtype: torch.dtype) -> Tensor:
    """Return the rows that `keep_rows` kept, or the gradient of the activation's input, which they are."""
    x = torch.addcmul(scale[..., :1], kept, scale[..., 1:]).to(dtype)
    return x if dy is None else act_gradient(dy, x, act).to(dtype)
