"""Differentiable BatchNorm with what is around it, of which backward needs one tensor. It is differentiable once.

What it keeps is seen by `torch.autograd.graph.saved_tensors_hooks`.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import backends
from .backends.constants import IDENTITY, INPUT, MASKED, NOTHING
from .conv_pool import Geometry, conv_gradient, convolve


class Norm(NamedTuple):
    """How a norm layer is computed and what of it is kept.

    Attributes:
        act: the activation behind it, which a back end knows.
        keep: what is kept of its input.
        of_batch: whether its statistics are those of the batch, and so pass a gradient on.
        values: how many each mean is of, in all processes.
        group: the processes that share the statistics, if there are several.
        two_outputs: whether its output is returned twice, so that two uses' gradients are added where they are read.
    """

    act: str
    keep: int
    of_batch: bool
    values: int
    group: Any = None
    two_outputs: bool = False


def gradient_terms(sums: Tensor, maps: Tensor, norm: Norm) -> Tensor:
    """Return what the operator `gradient_terms` does, from the sums of all processes that share the statistics."""
    if norm.group is None or not norm.of_batch:
        return backends.of_channels(sums).gradient_terms(sums, maps, norm.values, norm.of_batch)
    slope, step = maps[0], maps[-1]
    dgamma = sums[1] * step
    total = torch.stack([dgamma, sums[0]])
    dist.all_reduce(total, group=norm.group)
    along, constant = (-slope / norm.values * total).unbind()
    return torch.stack([dgamma, along * step, constant])


class NormAct(Function):
    """act(norm(z) + residual), of which backward needs one tensor, rounded or not, and at most a bit a value more."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None, maps: Tensor,
        norm: Norm,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """Return the output, in the type of z, or two of it if the norm says so.

        Args:
            ctx: autograd's.
            z: (N, C, ...).
            gamma: (C) or None; here it only gets its gradient.
            beta: likewise.
            residual: added before the activation, which then is the identity or one of `MASKED`.
            maps: its `ChannelMaps`, (8, C).
            norm: how it is computed.
        """
        with_mask = norm.act in MASKED and (norm.keep != INPUT or residual is not None)
        y, kept, mask = backends.of_layer(z, norm.act).forward(z, residual, maps, norm.act, norm.keep, with_mask)
        ctx.save_for_backward(z if norm.keep == INPUT else kept, mask, maps)
        ctx.norm, ctx.with_mask = norm, with_mask
        ctx.dtypes = [None if t is None else t.dtype for t in (z, gamma, beta, residual)]
        return (y, y.detach()) if norm.two_outputs else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dy2: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Return the gradients of z, gamma, beta and residual."""
        kept, mask, maps = ctx.saved_tensors
        mask = mask if ctx.with_mask else None
        gradients = norm_gradients(dy, kept, mask, maps, ctx.norm, ctx.needs_input_grad[:4], ctx.dtypes, dy2)
        return (*gradients, None, None)


def norm_gradients(
    dy: Tensor, kept: Tensor, mask: Tensor | None, maps: Tensor, norm: Norm, needs: tuple[bool, ...], dtypes: list[Any],
    dy2: Tensor | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients of a norm layer's input, gamma, beta and residual, each where needed and in its type.

    ``dy2`` is added to the output's gradient. Source: Ioffe and Szegedy, "Batch Normalization", section 3.
    """
    ops, act, du = backends.of_layer(dy, norm.act), norm.act, dy
    kept = dy if norm.keep == NOTHING else kept
    dz: Tensor | None = None
    want_du = (needs[3] and act != IDENTITY) or (dy2 is not None and (needs[0] or needs[3]))
    if norm.of_batch or needs[1] or needs[2] or want_du:
        sums, written = ops.sums(dy, kept, mask, maps, act, want_du, dy2)
        passes = norm.of_batch and needs[0]  # else nothing of the statistics' own gradient is needed
        dbeta, terms = sums[0], gradient_terms(sums, maps, norm._replace(of_batch=passes))
        if want_du:
            du, mask, act = written, None, IDENTITY
    else:
        terms = maps.new_zeros((3, maps.shape[1]))
        dbeta = terms[0]
    if needs[0]:
        dz = ops.input_gradient(du, kept, mask, maps, act, terms)
    gradients = (dz, terms[0], dbeta, du)
    return tuple(g.to(d) if n and g is not None else None for g, d, n in zip(gradients, dtypes, needs, strict=True))


class NormActConv(Function):
    """act2(norm2(conv(act1(norm1(z)))) + residual), of which the convolution's output is computed again in backward.

    Kept are z, rounded to 8 bits, and the masks.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, gamma: Tensor | None, beta: Tensor | None, gamma2: Tensor | None, beta2: Tensor | None,
        residual: Tensor | None, kept: Tensor, mask: Tensor | None, maps: Tensor, norm: Norm, weight: Tensor,
        bias: Tensor | None, geometry: Geometry, z2: Tensor, maps2: Tensor, norm2: Norm,
    ) -> Tensor:  # fmt: skip
        """Return the output, from the second norm layer's input z2, which is not kept.

        Args: as `NormAct`, twice; ``kept`` and ``mask`` are what is kept of the first norm layer, ``geometry`` is the
        convolution's.
        """
        with_mask = norm2.act in MASKED
        y, _, mask2 = backends.of_layer(z2, norm2.act).forward(z2, residual, maps2, norm2.act, NOTHING, with_mask)
        ctx.save_for_backward(kept, mask, maps, weight, bias, mask2 if with_mask else None, maps2)
        ctx.norms, ctx.geometry, ctx.dtype = (norm, norm2), geometry, z.dtype
        ctx.dtypes = [None if t is None else t.dtype for t in (z, gamma, beta, z2, gamma2, beta2, residual)]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of z, both gammas and betas, and the residual."""
        kept, mask, maps, weight, bias, mask2, maps2 = ctx.saved_tensors
        norm, norm2 = ctx.norms
        needs = ctx.needs_input_grad
        h = backends.of_layer(dy, norm.act).restore(kept, maps, norm.act).to(ctx.dtype)
        size = h.shape[2:]
        z2 = convolve(h, weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype), ctx.geometry)
        del h
        needed = (any(needs[:3]), *needs[3:6])
        dz2, *second = norm_gradients(dy, z2, mask2, maps2, norm2._replace(keep=INPUT), needed, ctx.dtypes[3:])
        del z2
        first: tuple[Tensor | None, ...] = (None, None, None)
        if dz2 is not None:
            dh = conv_gradient(dz2, weight, size, ctx.geometry)
            first = norm_gradients(dh, kept, mask, maps, norm, (*needs[:3], False), [*ctx.dtypes[:3], None])[:3]
        return (*first, *second, *(None,) * 10)


class PooledNorm(Function):
    """max_pool(relu(norm(z))) where z needs no gradient: of z only the values are kept that the pooling took."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, gamma: Tensor | None, beta: Tensor | None, maps: Tensor, norm: Norm, pool: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """Return the output. Args: as `NormAct`; ``pool`` holds the keyword arguments of `F.max_pool2d`."""
        y, _, _ = backends.of_layer(z, norm.act).forward(z, None, maps, norm.act, NOTHING, False)
        y, index = F.max_pool2d(y, **pool, return_indices=True)
        taken = z.flatten(2).gather(2, index.flatten(2)).view(y.shape)
        taken = taken.contiguous(memory_format=torch.channels_last)
        ops = backends.of_layer(taken, norm.act)
        _, kept, mask = ops.forward(taken, None, maps, norm.act, norm.keep, norm.keep != INPUT)
        ctx.save_for_backward(taken if norm.keep == INPUT else kept, mask, maps)
        ctx.norm, ctx.dtypes = norm, [None if t is None else t.dtype for t in (None, gamma, beta, None)]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of gamma and beta."""
        kept, mask, maps = ctx.saved_tensors
        mask = None if ctx.norm.keep == INPUT else mask
        needs = (False, *ctx.needs_input_grad[1:3], False)
        _, dgamma, dbeta, _ = norm_gradients(dy, kept, mask, maps, ctx.norm, needs, ctx.dtypes)
        return None, dgamma, dbeta, None, None, None
