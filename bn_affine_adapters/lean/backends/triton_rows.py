"""LayerNorm, activations and what is kept of rows on a GPU, in Triton: a program holds whole rows.

What is kept of a row x, in 8 bits a value, is floor((x - low) / step + 1/2), with its own low and step, (..., 2).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .constants import BYTE
from .triton_kernels import _activate, _through
from .triton_ops import OUT, TILE, implement

PARTS = 1024  # into how many parts sums over rows are split, about


@triton.jit
def _tile(step, STEPS: tl.constexpr, P, C, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    return rows, cols, rows[:, None] * C + cols[None, :], (rows < P)[:, None] & (cols < C)[None, :]


@triton.jit
def _keep(x, kept, scale, rows, at, here, P, IN_BYTES: tl.constexpr):
    """Store rows in bfloat16, or in 8 bits with the least value and the step of each."""
    if IN_BYTES:
        low = tl.min(tl.where(here, x, float("inf")), 1)
        high = tl.max(tl.where(here, x, float("-inf")), 1)
        step = (high - low) / 255
        step = tl.where(step < 1e-18, 1e-18, step)  # where a row is constant, nothing is divided by zero
        tl.store(scale + 2 * rows, low, rows < P)
        tl.store(scale + 2 * rows + 1, step, rows < P)
        x = tl.floor(tl.minimum(tl.maximum((x - low[:, None]) / step[:, None] + 0.5, 0.0), 255.0))
    tl.store(kept + at, x.to(tl.float32).to(kept.dtype.element_ty), here)


@triton.jit
def _kept(kept, scale, rows, at, here, P, W: tl.constexpr, IN_BYTES: tl.constexpr):
    """Load what `_keep` stored."""
    x = tl.load(kept + at, here, 0).to(W)
    if IN_BYTES:
        low, step = tl.load(scale + 2 * rows, rows < P, 0.0), tl.load(scale + 2 * rows + 1, rows < P, 0.0)
        x = tl.fma(x, step[:, None], low[:, None])
    return x


@triton.jit
def layer_norm(
    z, gamma, beta, y, kept, scale, inverse, P, C,
    EPS: tl.constexpr, IN_BYTES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The output, the normalised input as it is kept, and one over the standard deviation of each row."""
    rows, cols, at, here = _tile(0, 1, P, C, ROWS, COLS)
    x = tl.load(z + at, here, 0.0).to(inverse.dtype.element_ty)
    mean = tl.sum(x, 1) / C
    x = tl.where(here, x - mean[:, None], 0.0)
    over = 1 / tl.sqrt(tl.sum(x * x, 1) / C + EPS)
    x = x * over[:, None]
    scales, shifts = tl.load(gamma + cols, cols < C, 0.0), tl.load(beta + cols, cols < C, 0.0)
    tl.store(y + at, tl.fma(x, scales[None, :], shifts[None, :]).to(y.dtype.element_ty), here)
    tl.store(inverse + rows, over, rows < P)
    _keep(x, kept, scale, rows, at, here, P, IN_BYTES)


@triton.jit(do_not_specialize=["parts"])
def layer_norm_gradients(
    dy, kept, scale, inverse, gamma, dz, out, P, C, parts,
    IN_BYTES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The input's gradient, and of a part of the rows the sums that gamma's and beta's are: `out` is (2, parts, C)."""
    W: tl.constexpr = inverse.dtype.element_ty
    scales = tl.load(gamma + tl.arange(0, COLS), tl.arange(0, COLS) < C, 0.0)
    for_gamma, for_beta = tl.zeros((ROWS, COLS), W), tl.zeros((ROWS, COLS), W)
    for step in range(STEPS):
        rows, _, at, here = _tile(step, STEPS, P, C, ROWS, COLS)
        x, g = _kept(kept, scale, rows, at, here, P, W, IN_BYTES), tl.load(dy + at, here, 0.0).to(W)
        d = g * scales[None, :]
        for_gamma += g * x
        for_beta += g
        mean, slope = tl.sum(d, 1) / C, tl.sum(d * x, 1) / C
        dx = (d - mean[:, None] - x * slope[:, None]) * tl.load(inverse + rows, rows < P, 0.0)[:, None]
        tl.store(dz + at, dx.to(dz.dtype.element_ty), here)
    cols = tl.arange(0, COLS)
    part = tl.program_id(0).to(tl.int64)
    tl.store(out + part * C + cols, tl.sum(for_gamma, 0), cols < C)
    tl.store(out + (parts + part) * C + cols, tl.sum(for_beta, 0), cols < C)


@triton.jit
def keep(
    x, y, kept, scale, P, C,
    ACT: tl.constexpr, WRITES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Rows in 8 bits, and their activation."""
    rows, _, at, here = _tile(0, 1, P, C, ROWS, COLS)
    v = tl.load(x + at, here, 0.0).to(scale.dtype.element_ty)
    if WRITES:
        tl.store(y + at, _activate(v, ACT).to(y.dtype.element_ty), here)
    _keep(v, kept, scale, rows, at, here, P, True)


@triton.jit
def restore(
    dy, kept, scale, dx, P, C,
    ACT: tl.constexpr, READS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The gradient of an activation's input, or that input itself, from what `keep` kept."""
    W: tl.constexpr = scale.dtype.element_ty
    rows, _, at, here = _tile(0, 1, P, C, ROWS, COLS)
    v = _kept(kept, scale, rows, at, here, P, W, True)
    if READS:
        v = _through(tl.load(dy + at, here, 0.0).to(W), v, ACT)
    tl.store(dx + at, v.to(dx.dtype.element_ty), here)


def _shape(t: Tensor) -> tuple[int, int]:
    """Return how many rows there are, and how many of them a program holds at once."""
    return t.numel() // t.shape[-1], max(1, TILE // triton.next_power_of_2(t.shape[-1]))


def _launch(kernel: Any, like: Tensor, *tensors: Tensor, steps: int = 1, **rest: Any) -> None:
    """Launch a program for each so many tiles of rows, which are those of ``like``."""
    (count, height), width = _shape(like), like.shape[-1]
    if count:
        columns = triton.next_power_of_2(width)
        rest |= {"P": count, "C": width, "ROWS": height, "COLS": columns}
        rest["num_warps"] = min(16, max(4, columns // 512))  # else a long row does not fit into the registers
        with torch.cuda.device_of(like):
            kernel[(triton.cdiv(count, height * steps),)](*tensors, **rest)


def row_forward(z: Tensor, gamma: Tensor, beta: Tensor, eps: float, keep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return LayerNorm's output, what is kept of the normalised input, and one over each row's standard deviation."""
    y, kept, scale, inverse = OUT.row_forward(z, gamma, beta, eps, keep)
    z = z.contiguous()
    _launch(layer_norm, z, z, gamma, beta, y, kept, scale, inverse, EPS=eps, IN_BYTES=keep == BYTE)
    return y, kept, scale, inverse


def row_backward(
    dy: Tensor, kept: Tensor, scale: Tensor, inverse: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of LayerNorm's input, gamma and beta."""
    dz, _, _ = OUT.row_backward(dy, kept, scale, inverse, gamma)
    dy = dy.contiguous()
    (count, height), width = _shape(dy), dy.shape[-1]
    # The longer a part, the fewer sums there are to add; the more parts, the more run at once.
    steps = min(64, triton.next_power_of_2(max(1, count // (height * PARTS))))
    parts = triton.cdiv(count, height * steps)
    sums = gamma.new_empty((2, parts, width))
    tensors = (dy, kept, scale, inverse, gamma, dz, sums)
    in_bytes = kept.dtype == torch.uint8
    _launch(layer_norm_gradients, dy, *tensors, steps=steps, parts=parts, IN_BYTES=in_bytes, STEPS=steps)
    return dz, sums[0].sum(0), sums[1].sum(0)  # two tensors: results of an operator share no memory


def keep_rows(x: Tensor, act: str, want_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows in 8 bits a value, the least value and the step of each, and their activation if asked for."""
    kept, scale, y = OUT.keep_rows(x, act, want_y)
    x = x.contiguous()
    _launch(keep, x, x, y, kept, scale, ACT=act, WRITES=want_y)
    return kept, scale, y


def restore_rows(kept: Tensor, scale: Tensor, dy: Tensor | None, act: str, dtype: torch.dtype) -> Tensor:
    """Return the rows in a type, or if dy is given the gradient of the activation's input, which they are."""
    x = OUT.restore_rows(kept, scale, dy, act, dtype)
    _launch(restore, kept, x if dy is None else dy.contiguous(), kept, scale, x, ACT=act, READS=dy is not None)
    return x


implement(OUT.row_forward, row_forward)
implement(OUT.row_backward, row_backward)
implement(OUT.keep_rows, keep_rows)
implement(OUT.restore_rows, restore_rows)
