"""Norm + activation on a GPU, in Triton: one pass over memory each way. `triton_ops` launches these.

A tensor is read as a matrix, P rows of Q columns: in channels_last as rows of channels; else as planes, a row for each
image and channel. What they compute is said in `operators`. Bit k of byte (g, i) of a mask is of
row 8 g + k, column i.
"""

import triton
import triton.language as tl

from . import constants
from .constants import BFLOAT16, BYTE

# The activations that `_activate` and `_through` compute: any other does not compile.
IDENTITY, RELU, RELU6 = (tl.constexpr(name) for name in (constants.IDENTITY, constants.RELU, constants.RELU6))
SILU, HARDSWISH = tl.constexpr(constants.SILU), tl.constexpr(constants.HARDSWISH)
GELU, GELU_TANH = tl.constexpr(constants.GELU), tl.constexpr(constants.GELU_TANH)
KEEPS_HALF, KEEPS_BYTE = tl.constexpr(BFLOAT16), tl.constexpr(BYTE)
ROOT_HALF = tl.constexpr(0.7071067811865476)  # sqrt(1 / 2)
DENSITY = tl.constexpr(0.3989422804014327)  # of a normal number at zero, 1 / sqrt(2 pi)
TANH_SCALE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi): tanh(x) is 2 sigmoid(2 x) - 1
TANH_CUBE = tl.constexpr(0.044715)


@triton.jit
def _sigmoid(u):
    return 1 / (1 + tl.exp(-u))


@triton.jit
def _activate(u, ACT: tl.constexpr):
    if ACT == RELU:
        u = tl.where(u <= 0, 0.0, u)  # what is not a number stays so
    elif ACT == RELU6:
        u = tl.where(u <= 0, 0.0, tl.where(u >= 6, 6.0, u))
    elif ACT == SILU:
        u = u * _sigmoid(u)
    elif ACT == HARDSWISH:
        u = u * tl.where(u > -3, tl.where(u < 3, (u + 3) / 6, 1.0), 0.0)
    elif ACT == GELU:
        u = u * 0.5 * (1 + tl.erf(u * ROOT_HALF))
    elif ACT == GELU_TANH:
        u = u * _sigmoid(u * (u * u * TANH_CUBE + 1) * TANH_SCALE)
    else:
        tl.static_assert(ACT == IDENTITY, "no kernel for this activation")
    return u


@triton.jit
def _passes(u, ACT: tl.constexpr):
    if ACT == RELU6:
        return (u > 0) & (u < 6)
    else:
        return u > 0


@triton.jit
def _through(dy, u, ACT: tl.constexpr):
    """Return the gradient of an activation's input u."""
    if ACT == RELU or ACT == RELU6:  # noqa: SIM109  # Triton has no tuples here
        dy = tl.where(_passes(u, ACT), dy, 0.0)
    elif ACT == SILU:
        s = _sigmoid(u)
        dy = dy * s * (1 + u * (1 - s))
    elif ACT == HARDSWISH:
        dy = dy * tl.where(u > -3, tl.where(u < 3, u / 3 + 0.5, 1.0), 0.0)
    elif ACT == GELU:
        dy = dy * (0.5 * (1 + tl.erf(u * ROOT_HALF)) + u * DENSITY * tl.exp(-0.5 * u * u))
    elif ACT == GELU_TANH:
        s = _sigmoid(u * (u * u * TANH_CUBE + 1) * TANH_SCALE)
        dy = dy * s * (1 + u * (1 - s) * TANH_SCALE * (u * u * TANH_CUBE * 3 + 1))
    else:
        tl.static_assert(ACT == IDENTITY, "no kernel for this activation")
    return dy


@triton.jit
def _line(values, rows, cols, Q, C, LAST: tl.constexpr):
    """Return a number per channel in a shape that fits a tile."""
    if LAST:
        return tl.load(values + cols, cols < Q, 0.0)[None, :]
    else:
        return tl.load(values + rows % C)[:, None]


@triton.jit
def _du(
    dy, x, mask, slope, offset, rows, cols, here, Q, C,
    LAST: tl.constexpr, ACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return the gradient of the activation's input, by the mask or from what was kept, x."""
    if MASKED:
        byte = tl.load(mask + (rows // 8)[:, None] * Q + cols[None, :], here, 0).to(tl.int32)
        dy = tl.where(((byte >> (rows % 8).to(tl.int32)[:, None]) & 1) != 0, dy, 0.0)
    elif ACT != IDENTITY:
        u = tl.fma(x, _line(slope, rows, cols, Q, C, LAST), _line(offset, rows, cols, Q, C, LAST))
        dy = _through(dy, u, ACT)
    return dy


@triton.jit
def _count(part, P, Q, LAST: tl.constexpr, CHUNK: tl.constexpr):
    """Return how many numbers of a channel are in a part."""
    if LAST:
        return tl.minimum(P - part * CHUNK, CHUNK)
    else:
        return part * 0 + Q


@triton.jit(do_not_specialize=["parts"])
def stats(
    z, out, P, Q, C, parts,
    LAST: tl.constexpr, RANGE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    CHUNK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Mean, squares about it, least and greatest value of a part of each channel: `out` is (2 or 4, parts, C)."""
    W: tl.constexpr = out.dtype.element_ty
    part = tl.program_id(0).to(tl.int64)
    first = part * (CHUNK if LAST else ROWS)
    rows, cols = first + tl.arange(0, ROWS), tl.program_id(1) * COLS + tl.arange(0, COLS)
    # A sum that starts near the mean loses no digits.
    if LAST:
        shift = tl.load(z + first * Q + cols, cols < Q, 0.0).to(W)
        about, index, there = shift[None, :], part * C + cols, cols < Q
    else:
        shift = tl.load(z + rows * Q, rows < P, 0.0).to(W)
        about, index, there = shift[:, None], rows, rows < P
    total, square = tl.zeros((ROWS, COLS), W), tl.zeros((ROWS, COLS), W)
    low, high = tl.full((ROWS, COLS), float("inf"), W), tl.full((ROWS, COLS), float("-inf"), W)
    for _ in range(STEPS):
        here = (rows < P)[:, None] & (cols < Q)[None, :]
        x = tl.load(z + rows[:, None] * Q + cols[None, :], here, 0.0).to(W)
        d = tl.where(here, x - about, 0.0)
        total += d
        square += d * d
        if RANGE:
            low, high = tl.minimum(low, tl.where(here, x, low)), tl.maximum(high, tl.where(here, x, high))
        if LAST:
            rows += ROWS
        else:
            cols += COLS
    AXIS: tl.constexpr = 0 if LAST else 1
    added = tl.sum(total, AXIS)
    mean = added / _count(part, P, Q, LAST, CHUNK)
    size = parts * C
    tl.store(out + index, mean + shift, there)
    tl.store(out + size + index, tl.sum(square, AXIS) - added * mean, there)
    if RANGE:
        tl.store(out + 2 * size + index, tl.min(low, AXIS), there)
        tl.store(out + 3 * size + index, tl.max(high, AXIS), there)


@triton.jit(do_not_specialize=["parts"])
def merge(
    found, out, P, Q, C, parts,
    LAST: tl.constexpr, RANGE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    CHUNK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """What `stats` found of parts as that of whole channels: `out` is (2 or 4, C).

    Source: the rule of Chan, Golub and LeVeque for the variance of parts.
    """
    W: tl.constexpr = out.dtype.element_ty
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    size = parts * C
    near = tl.load(found + cols, cols < C, 0.0)
    total, square = tl.zeros((ROWS, COLS), W), tl.zeros((ROWS, COLS), W)
    low, high = tl.full((ROWS, COLS), float("inf"), W), tl.full((ROWS, COLS), float("-inf"), W)
    count = (P if LAST else P // C * Q) * tl.full((), 1.0, W)
    for step in range(STEPS):
        rows = step * ROWS + tl.arange(0, ROWS)
        here = (rows < parts)[:, None] & (cols < C)[None, :]
        at = found + rows[:, None] * C + cols[None, :]
        n = _count(rows, P, Q, LAST, CHUNK).to(W)[:, None]
        total += tl.where(here, n * (tl.load(at, here, 0.0) - near[None, :]), 0.0)
        if RANGE:
            low = tl.minimum(low, tl.load(at + 2 * size, here, float("inf")))
            high = tl.maximum(high, tl.load(at + 3 * size, here, float("-inf")))
    mean = near + tl.sum(total, 0) / count
    for step in range(STEPS):
        rows = step * ROWS + tl.arange(0, ROWS)
        here = (rows < parts)[:, None] & (cols < C)[None, :]
        at = found + rows[:, None] * C + cols[None, :]
        n = _count(rows, P, Q, LAST, CHUNK).to(W)[:, None]
        off = tl.load(at, here, 0.0) - mean[None, :]
        square += tl.where(here, tl.load(at + size, here, 0.0) + n * off * off, 0.0)
    variance = tl.sum(square, 0) / count
    tl.store(out + cols, mean, cols < C)
    tl.store(out + C + cols, tl.where(variance < 0, 0.0, variance), cols < C)  # what is not a number stays so
    if RANGE:
        tl.store(out + 2 * C + cols, tl.min(low, 0), cols < C)
        tl.store(out + 3 * C + cols, tl.max(high, 0), cols < C)


@triton.jit
def forward(
    z, residual, slope, offset, zero, step, y, kept, mask, P, Q, C,
    LAST: tl.constexpr, ACT: tl.constexpr, KEEP: tl.constexpr, ADDS: tl.constexpr, MASKS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """act(z * slope + offset (+ residual)), what is kept of z, which is (z - zero) * step, and the mask."""
    W: tl.constexpr = slope.dtype.element_ty
    group = tl.program_id(0).to(tl.int64) * (ROWS // 8)
    rows, cols = group * 8 + tl.arange(0, ROWS), tl.program_id(1) * COLS + tl.arange(0, COLS)
    here = (rows < P)[:, None] & (cols < Q)[None, :]
    at = rows[:, None] * Q + cols[None, :]
    x = tl.load(z + at, here, 0.0).to(W)
    u = tl.fma(x, _line(slope, rows, cols, Q, C, LAST), _line(offset, rows, cols, Q, C, LAST))
    if ADDS:
        u += tl.load(residual + at, here, 0.0).to(W)
    tl.store(y + at, _activate(u, ACT).to(y.dtype.element_ty), here)
    if KEEP == KEEPS_HALF or KEEP == KEEPS_BYTE:  # noqa: SIM109
        v = (x - _line(zero, rows, cols, Q, C, LAST)) * _line(step, rows, cols, Q, C, LAST)
        if KEEP == KEEPS_BYTE:
            v = tl.floor(tl.minimum(tl.maximum(v + 0.5, 0.0), 255.0))
        tl.store(kept + at, v.to(tl.float32).to(kept.dtype.element_ty), here)
    if MASKS:
        bits = tl.reshape(_passes(u, ACT).to(tl.int32), (ROWS // 8, 8, COLS))
        byte = tl.sum(bits << tl.arange(0, 8)[None, :, None], 1)
        groups = group + tl.arange(0, ROWS // 8)
        within = (groups * 8 < P)[:, None] & (cols < Q)[None, :]
        tl.store(mask + groups[:, None] * Q + cols[None, :], byte.to(tl.uint8), within)


@triton.jit(do_not_specialize=["parts"])
def sums(
    dy, more, kept, mask, slope, offset, zero, du, out, P, Q, C, parts,
    LAST: tl.constexpr, ACT: tl.constexpr, MASKED: tl.constexpr, WRITES: tl.constexpr, ADDS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
    CHUNK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The sums of du and du (kept - zero) over a part of each channel, of dy + more: `out` is (2, parts, C)."""
    W: tl.constexpr = out.dtype.element_ty
    part = tl.program_id(0).to(tl.int64)
    rows = part * (CHUNK if LAST else ROWS) + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total, product = tl.zeros((ROWS, COLS), W), tl.zeros((ROWS, COLS), W)
    for _ in range(STEPS):
        here = (rows < P)[:, None] & (cols < Q)[None, :]
        at = rows[:, None] * Q + cols[None, :]
        x, d = tl.load(kept + at, here, 0).to(W), tl.load(dy + at, here, 0.0).to(W)
        if ADDS:
            d += tl.load(more + at, here, 0.0).to(W)
        d = _du(d, x, mask, slope, offset, rows, cols, here, Q, C, LAST, ACT, MASKED)
        if WRITES:
            tl.store(du + at, d.to(du.dtype.element_ty), here)
        total += d
        product += tl.where(here, d * (x - _line(zero, rows, cols, Q, C, LAST)), 0.0)
        if LAST:
            rows += ROWS
        else:
            cols += COLS
    AXIS: tl.constexpr = 0 if LAST else 1
    if LAST:
        index, there = part * C + cols, cols < Q
    else:
        index, there = rows, rows < P
    tl.store(out + index, tl.sum(total, AXIS), there)
    tl.store(out + parts * C + index, tl.sum(product, AXIS), there)


@triton.jit
def input_gradient(
    dy, kept, mask, slope, offset, zero, by, along, constant, dz, P, Q, C,
    LAST: tl.constexpr, ACT: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Return du * by + (kept - zero) * along + constant, with du from dy as in `sums`."""
    W: tl.constexpr = slope.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    here = (rows < P)[:, None] & (cols < Q)[None, :]
    at = rows[:, None] * Q + cols[None, :]
    x, d = tl.load(kept + at, here, 0).to(W), tl.load(dy + at, here, 0.0).to(W)
    d = _du(d, x, mask, slope, offset, rows, cols, here, Q, C, LAST, ACT, MASKED)
    rest = tl.fma(
        x - _line(zero, rows, cols, Q, C, LAST),
        _line(along, rows, cols, Q, C, LAST),
        _line(constant, rows, cols, Q, C, LAST),
    )
    d = tl.fma(d, _line(by, rows, cols, Q, C, LAST), rest)
    tl.store(dz + at, d.to(dz.dtype.element_ty), here)


@triton.jit
def restore(
    kept, slope, offset, y, P, Q, C,
    LAST: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """act(kept * slope + offset)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    here = (rows < P)[:, None] & (cols < Q)[None, :]
    at = rows[:, None] * Q + cols[None, :]
    x = tl.load(kept + at, here, 0).to(slope.dtype.element_ty)
    u = tl.fma(x, _line(slope, rows, cols, Q, C, LAST), _line(offset, rows, cols, Q, C, LAST))
    tl.store(y + at, _activate(u, ACT), here)
