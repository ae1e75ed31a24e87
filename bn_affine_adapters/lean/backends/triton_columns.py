"""The arithmetic of BatchNorm with a number per channel on a GPU, in Triton: a launch where PyTorch needs a dozen."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .constants import BFLOAT16, BYTE
from .triton_ops import OUT, implement

KEEPS_HALF, KEEPS_BYTE = tl.constexpr(BFLOAT16), tl.constexpr(BYTE)
COLUMNS = 128  # that a program computes


@triton.jit
def _channel_maps(
    statistics, gamma, beta, out, C,
    EPS: tl.constexpr, KEEP: tl.constexpr, SCALES: tl.constexpr, SHIFTS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = out.dtype.element_ty
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    here = cols < C
    mean = tl.load(statistics + cols, here, 0.0)
    inverse = 1 / tl.sqrt(tl.load(statistics + C + cols, here, 1.0) + EPS)
    g, b = tl.full((COLS,), 1.0, W), tl.zeros((COLS,), W)
    if SCALES:
        g = tl.load(gamma + cols, here, 0.0).to(W)
    if SHIFTS:
        b = tl.load(beta + cols, here, 0.0).to(W)
    slope = g * inverse
    offset = b - mean * slope
    zero, step, kept_slope, kept_offset, kept_zero, kept_step = mean, inverse, slope, offset, mean, inverse
    if KEEP == KEEPS_HALF:
        kept_slope, kept_offset, kept_zero, kept_step = g, b, tl.zeros((COLS,), W), tl.full((COLS,), 1.0, W)
    elif KEEP == KEEPS_BYTE:
        low, high = tl.load(statistics + 2 * C + cols, here, 0.0), tl.load(statistics + 3 * C + cols, here, 0.0)
        width = (high - low) / 255
        width = tl.where(width < 1e-18, 1e-18, width)  # where a channel is constant, nothing is divided by zero
        zero, step = low, 1 / width
        kept_slope, kept_offset, kept_zero, kept_step = (
            width * slope,
            low * slope + offset,
            (mean - low) / width,
            width * inverse,
        )
    tl.store(out + cols, slope, here)
    tl.store(out + C + cols, offset, here)
    tl.store(out + 2 * C + cols, zero, here)
    tl.store(out + 3 * C + cols, step, here)
    tl.store(out + 4 * C + cols, kept_slope, here)
    tl.store(out + 5 * C + cols, kept_offset, here)
    tl.store(out + 6 * C + cols, kept_zero, here)
    tl.store(out + 7 * C + cols, kept_step, here)


@triton.jit(do_not_specialize=["values"])
def _gradient_terms(sums, maps, out, values, C, OF_BATCH: tl.constexpr, COLS: tl.constexpr):
    W: tl.constexpr = out.dtype.element_ty
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    here = cols < C
    slope, step = tl.load(maps + cols, here, 0.0), tl.load(maps + 7 * C + cols, here, 0.0)
    dbeta, dgamma = tl.load(sums + cols, here, 0.0), tl.load(sums + C + cols, here, 0.0) * step
    by = tl.zeros((COLS,), W)
    if OF_BATCH:
        by = -slope / values.to(W)
    tl.store(out + cols, dgamma, here)
    tl.store(out + C + cols, by * dgamma * step if OF_BATCH else by, here)
    tl.store(out + 2 * C + cols, by * dbeta if OF_BATCH else by, here)


def _launch(kernel: Any, like: Tensor, *tensors: Any, **constants: Any) -> None:
    with torch.cuda.device_of(like):
        kernel[(triton.cdiv(like.shape[1], COLUMNS),)](*tensors, like.shape[1], COLS=COLUMNS, **constants)


def channel_maps(statistics: Tensor, eps: float, gamma: Tensor | None, beta: Tensor | None, keep: int) -> Tensor:
    """Return `ChannelMaps` as one tensor."""
    out = OUT.channel_maps(statistics, eps, gamma, beta, keep)
    given = [statistics if t is None else t.contiguous() for t in (gamma, beta)]
    there = {"SCALES": gamma is not None, "SHIFTS": beta is not None}
    _launch(_channel_maps, statistics, statistics.contiguous(), *given, out, EPS=eps, KEEP=keep, **there)
    return out


def gradient_terms(sums: Tensor, maps: Tensor, values: int, of_batch: bool) -> Tensor:
    """Return gamma's gradient and the terms of the input's."""
    out = OUT.gradient_terms(sums, maps, values, of_batch)
    _launch(_gradient_terms, sums, sums.contiguous(), maps, out, values, OF_BATCH=of_batch)
    return out


implement(OUT.channel_maps, channel_maps)
implement(OUT.gradient_terms, gradient_terms)
