"""Differentiable functions whose statistics belong to a row: LayerNorm, GroupNorm; and activations and attention.

What they keep for backward is rounded. They are differentiable once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import backends
from .backends.constants import BFLOAT16, BYTE, IDENTITY, INPUT, MASKED, wide
from .backends.portable import act_gradient, activate, pack, passes, unpack


def rounded(x: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Return x as it is kept and what `restored` needs besides: of 8 bits, the least value and the step of each row."""
    if keep == BFLOAT16:
        return x.to(torch.bfloat16), x.new_empty(0)
    return backends.of_rows(x, IDENTITY).keep_rows(x, IDENTITY, False)[:2]


def restored(kept: Tensor, scale: Tensor, keep: int, dtype: torch.dtype) -> Tensor:
    """Return in a type what `rounded` kept."""
    if keep == BYTE:
        return backends.of_rows(kept, IDENTITY).restore_rows(kept, scale, None, IDENTITY, dtype)
    return kept.to(dtype)


class RowNorm(Function):
    """act(norm(z)) with LayerNorm over the last axis, or GroupNorm: the normalised input is kept, rounded."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, gamma: Tensor | None, beta: Tensor | None, groups: int, eps: float, act: str, keep: int
    ) -> Tensor:
        """Return the output.

        Args:
            ctx: autograd's.
            z: (..., C) for LayerNorm, (N, C, ...) for GroupNorm.
            gamma: (C), or None for ones.
            beta: (C), or None for zeros.
            groups: of GroupNorm; 0 for LayerNorm.
            eps: added to the variance.
            act: which activation.
            keep: what is kept.
        """
        ctx.groups, ctx.act, ctx.keep, ctx.dtype, ctx.shape = groups, act, keep, z.dtype, z.shape
        dtype, z = wide(z.dtype), z.contiguous() if groups else z
        source, scales, shifts = z, gamma, beta
        if gamma is None or gamma.dtype != dtype:  # where a CPU computes the statistics in the type of z
            source = z.to(dtype)
            scales, shifts = (None if t is None else t.to(dtype) for t in (gamma, beta))
        if groups:
            size = z.shape[0], z.shape[1], z.shape[2:].numel()
            y, mean, inverse = torch.native_group_norm(source, scales, shifts, *size, groups, eps)
            lines = z.view(z.shape[0] * groups, -1)
        else:
            y, mean, inverse = torch.native_layer_norm(source, z.shape[-1:], scales, shifts, eps)
            lines = z
        column = (-1, 1) if groups else (*z.shape[:-1], 1)
        mean, inverse = mean.to(dtype).view(column), inverse.to(dtype).view(column)
        kept, scale = (lines, mean) if keep == INPUT else rounded((lines.to(dtype) - mean).mul_(inverse), keep)
        ctx.save_for_backward(kept, scale, inverse, gamma, beta)
        y = activate(y, act)
        return y if y.dtype == z.dtype else y.to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of z, gamma and beta."""
        kept, scale, inverse, gamma, beta = ctx.saved_tensors
        dtype = inverse.dtype
        x = (kept.to(dtype) - scale) * inverse if ctx.keep == INPUT else restored(kept, scale, ctx.keep, dtype)
        du, wide_gamma = dy.to(dtype), None if gamma is None else gamma.to(dtype)
        shape = (1, -1, *(1,) * (len(ctx.shape) - 2)) if ctx.groups else (-1,)
        if ctx.act != IDENTITY:
            u = x.view(ctx.shape)
            u = u if wide_gamma is None else u * wide_gamma.view(shape)
            u = u if beta is None else u + beta.to(dtype).view(shape)
            du = act_gradient(du, u, ctx.act)
        needs = (ctx.needs_input_grad[0], gamma is not None and ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        # PyTorch's own backward of an input that is normalised already: mean 0, deviation 1.
        zero, one = torch.zeros_like(inverse), torch.ones_like(inverse)
        if ctx.groups:
            size = ctx.shape[0], ctx.shape[1], ctx.shape[2:].numel()
            zero, one = zero.view(ctx.shape[0], ctx.groups), one.view(ctx.shape[0], ctx.groups)
            found = torch.ops.aten.native_group_norm_backward(
                du.contiguous(), x.view(ctx.shape), zero, one, wide_gamma, *size, ctx.groups, needs
            )
        else:
            wide_beta = None if beta is None else beta.to(dtype)
            found = torch.ops.aten.native_layer_norm_backward(
                du, x, ctx.shape[-1:], zero, one, wide_gamma, wide_beta, needs
            )
        dz, dgamma, dbeta = (gradient if need else None for gradient, need in zip(found, needs, strict=True))
        if dz is not None:
            dz = dz.view(kept.shape).mul_(inverse).view(ctx.shape).to(ctx.dtype)
        return (
            dz,
            None if dgamma is None or gamma is None else dgamma.to(gamma.dtype),
            None if dbeta is None or beta is None else dbeta.to(beta.dtype),
            None, None, None, None,
        )  # fmt: skip


class RoundedLayerNorm(Function):
    """LayerNorm over the last axis in Triton: one pass over memory each way."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, keep: int) -> Tensor:
        """Return the output. Args: as `RowNorm`."""
        dtype = wide(z.dtype)
        scale = z.new_ones(z.shape[-1], dtype=dtype) if gamma is None else gamma.to(dtype)
        shift = z.new_zeros(z.shape[-1], dtype=dtype) if beta is None else beta.to(dtype)
        y, *kept = backends.of_layer_norm(z).row_forward(z, scale, shift, eps, keep)
        ctx.save_for_backward(*kept, gamma)
        ctx.dtypes = [None if t is None else t.dtype for t in (z, gamma, beta)]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of z, gamma and beta."""
        *kept, inverse, gamma = ctx.saved_tensors
        scale = inverse.new_ones(dy.shape[-1]) if gamma is None else gamma.to(inverse.dtype)
        gradients = backends.of_layer_norm(dy).row_backward(dy, *kept, inverse, scale)
        wanted = zip(gradients, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
        return (*(gradient.to(dtype) if need else None for gradient, dtype, need in wanted), None, None)


class KeptAct(Function):
    """An activation of whose input a bit is kept where that is enough, else 8 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, act: str) -> Tensor:
        """Return the activation of x, (..., C)."""
        ctx.act, ctx.dtype, ctx.shape = act, x.dtype, x.shape
        if act in MASKED:
            kept, scale, y = pack(passes(x, act)), x.new_empty(0), activate(x, act)
        else:
            kept, scale, y = backends.of_rows(x, act).keep_rows(x, act, True)
        ctx.save_for_backward(kept, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x."""
        kept, scale = ctx.saved_tensors
        if ctx.act in MASKED:
            return dy * unpack(kept, ctx.shape), None
        return backends.of_rows(kept, ctx.act).restore_rows(kept, scale, dy, ctx.act, ctx.dtype), None


class RoundedAttention(Function):
    """softmax(q k' scale) v whose q, k and v are kept in 8 bits a value, and nothing else."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Return the attention's output, (..., L, D), of q (..., L, D), k and v (..., S, D)."""
        kept = [rounded(x, BYTE) for x in (q, k, v)]
        ctx.save_for_backward(*(tensor for pair in kept for tensor in pair))
        ctx.scale, ctx.dtype = scale, q.dtype
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of q, k and v; the weights are computed again."""
        saved = ctx.saved_tensors
        q, k, v = (restored(saved[i], saved[i + 1], BYTE, dy.dtype) for i in (0, 2, 4))
        if not torch.compiler.is_compiling():  # PyTorch's fused ones never hold all the weights, but take autograd
            with torch.enable_grad():
                y = F.scaled_dot_product_attention(
                    q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), scale=ctx.scale
                )
            dq, dk, dv = torch.autograd.grad(y, (q, k, v), dy)
            return dq.to(ctx.dtype), dk.to(ctx.dtype), dv.to(ctx.dtype), None
        weights = torch.softmax(q @ k.mT * ctx.scale, -1)
        dv = weights.mT @ dy
        dweights = dy @ v.mT
        dscores = weights * (dweights - (dweights * weights).sum(-1, keepdim=True)) * ctx.scale
        dq, dk = dscores @ k, dscores.mT @ q
        return dq.to(ctx.dtype), dk.to(ctx.dtype), dv.to(ctx.dtype), None
