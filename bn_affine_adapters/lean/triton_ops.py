"""The operators of a GPU, whose kernels are in Triton: torch.ops.bnaa_triton, with the functions of `kernels`.

They take tensors in any layout, and compute in that of the input: channels_last, or planes.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import Library, register_fake

from . import triton_kernels as kernels
from .native import BFLOAT16, BYTE, wide

NAMESPACE = "bnaa_triton"
TILE = 2048  # numbers that a program holds at once


class Matrix(NamedTuple):
    """A tensor as a matrix, P rows of Q columns.

    Attributes:
        P: rows.
        Q: columns.
        C: channels.
        LAST: whether the columns are the channels; else row i is of channel i % C.
    """

    P: int
    Q: int
    C: int
    LAST: bool

    @classmethod
    def of(cls, t: Tensor) -> "Matrix":
        """Read a tensor, (N, C, ...), that `_dense` returned."""
        if _rows_of_channels(t):
            return cls(t.numel() // t.shape[1], t.shape[1], t.shape[1], True)
        return cls(t.shape[0] * t.shape[1], math.prod(t.shape[2:]), t.shape[1], False)

    @property
    def chunk(self) -> int:
        """The rows of channels that one program sums: fewer where there would be too few programs."""
        return 512 if self.P >= 2**15 else 64


def _rows_of_channels(t: Tensor) -> bool:
    return t.dim() == 2 or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))


def _dense(t: Tensor, like: bool | None = None) -> Tensor:
    """Return a tensor with its channels last, or as planes; by default as it is, if it is one of the two."""
    if _rows_of_channels(t) if like is None else like:
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.contiguous()
    return t.contiguous()


def _aligned(dy: Tensor, kept: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Matrix]:
    """Return a gradient and what was kept in one layout: that of the mask, if there is one."""
    kept = _dense(kept, None if mask is None else mask.dim() == 2)
    dy = _dense(dy, _rows_of_channels(kept))
    return dy, kept, Matrix.of(kept)


def _launch(kernel: Any, m: Matrix, *tensors: Tensor, **constants: Any) -> None:
    """Launch a program for each tile."""
    columns = min(128 if m.LAST else 256, triton.next_power_of_2(m.Q))
    rows = min(512, TILE // columns)  # a multiple of 8, as masks need it
    grid = triton.cdiv(m.P, rows), triton.cdiv(m.Q, columns)
    if m.P and m.Q:
        with torch.cuda.device_of(tensors[0]):
            kernel[grid](*tensors, m.P, m.Q, m.C, LAST=m.LAST, ROWS=rows, COLS=columns, **constants)


def _sum(kernel: Any, kinds: int, m: Matrix, *tensors: Tensor, **constants: Any) -> Tensor:
    """Launch a program for each part of some channels; return the partial sums, (kinds, parts, C)."""
    columns = min(128 if m.LAST else TILE, triton.next_power_of_2(m.Q))
    rows = min(m.chunk, TILE // columns)
    across, along = triton.cdiv(m.Q, columns), triton.cdiv(m.P, rows)
    parts = triton.cdiv(m.P, m.chunk) if m.LAST else m.P // m.C
    grid, steps = ((parts, across), m.chunk // rows) if m.LAST else ((along, 1), across)
    found = tensors[0].new_empty((kinds, parts, m.C), dtype=wide(tensors[0].dtype))
    constants |= {"LAST": m.LAST, "ROWS": rows, "COLS": columns, "CHUNK": m.chunk, "STEPS": steps}
    with torch.cuda.device_of(tensors[0]):
        kernel[grid](*tensors, found, m.P, m.Q, m.C, parts, **constants)
    return found


# The operators. Without ``real`` they say what they return and compute nothing, for torch.compile.


def stats(real: bool, z: Tensor, range: bool) -> Tensor:
    """Return mean and biased variance of each channel, and its least and greatest value: (2 or 4, C)."""
    kinds, channels = 4 if range else 2, z.shape[1]
    out = z.new_empty((kinds, channels), dtype=wide(z.dtype))
    if real:
        m = Matrix.of(z := _dense(z))
        found = _sum(kernels.stats, kinds, m, z, RANGE=range)
        parts, columns = found.shape[1], min(32, triton.next_power_of_2(channels))
        rows = min(TILE // columns, triton.next_power_of_2(parts))
        steps = triton.next_power_of_2(triton.cdiv(parts, rows))
        constants = {"LAST": m.LAST, "RANGE": range, "ROWS": rows, "COLS": columns, "CHUNK": m.chunk, "STEPS": steps}
        with torch.cuda.device_of(z):
            kernels.merge[(triton.cdiv(channels, columns),)](found, out, m.P, m.Q, m.C, parts, **constants)
    return out


def forward(
    real: bool,
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
    """Return act(z * slope + level (+ residual)), what is kept of z, which is (z - zero) * step, and the mask."""
    m = Matrix.of(z := _dense(z))
    dtype = torch.uint8 if keep == BYTE else torch.bfloat16
    y = torch.empty_like(z)
    kept = torch.empty_like(z, dtype=dtype) if keep in (BFLOAT16, BYTE) else z.new_empty(0, dtype=dtype)
    mask = z.new_empty((-(-m.P // 8) if with_mask else 0, m.Q), dtype=torch.uint8)
    if real:
        other = z if residual is None else _dense(residual, m.LAST)
        _launch(
            kernels.forward, m, z, other, slope, level, zero, step, y, kept, mask,
            ACT=act, KEEP=keep, ADDS=residual is not None, MASKS=with_mask,
        )  # fmt: skip
    return y, kept, mask if m.LAST else mask[None]


def sums(
    real: bool,
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
    dy, kept, m = _aligned(dy, kept, mask)
    du = torch.empty_like(dy) if want_du else dy.new_empty(0)
    if not real:
        return slope.new_empty((2, m.C)), du
    other = dy if more is None else _dense(more, m.LAST)
    found = _sum(
        kernels.sums, 2, m, dy, other, kept, kept if mask is None else mask, slope, level, zero, du,
        ACT=act, MASKED=mask is not None, WRITES=want_du, ADDS=more is not None,
    )  # fmt: skip
    return found.sum(1), du


def input_gradient(
    real: bool,
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
    dy, kept, m = _aligned(dy, kept, mask)
    dz = torch.empty_like(dy)
    if real:
        lines = (slope, level, zero, by, along, constant)
        _launch(
            kernels.input_gradient, m, dy, kept, kept if mask is None else mask, *lines, dz,
            ACT=act, MASKED=mask is not None,
        )  # fmt: skip
    return dz


def restore(real: bool, kept: Tensor, slope: Tensor, level: Tensor, act: int) -> Tensor:
    """Return the activation's output from what was kept."""
    m = Matrix.of(kept := _dense(kept))
    y = torch.empty_like(kept, dtype=slope.dtype)
    if real:
        _launch(kernels.restore, m, kept, slope, level, y, ACT=act)
    return y


_library = Library(NAMESPACE, "DEF")


def define(function: Callable[..., Any], arguments: str) -> None:
    """Register an operator and what it tells torch.compile; its arguments and results as PyTorch writes them."""
    name = function.__name__
    _library.define(f"{name}({arguments}")
    for device in ("CUDA", "CPU"):  # the latter in Triton's interpreter alone
        _library.impl(name, partial(function, True), device)
    register_fake(f"{NAMESPACE}::{name}", partial(function, False), lib=_library)


_LINE = "Tensor slope, Tensor level, Tensor zero"
define(stats, "Tensor z, bool range) -> Tensor")
define(
    forward,
    f"Tensor z, Tensor? residual, {_LINE}, Tensor step, int act, int keep, bool with_mask) -> (Tensor, Tensor, Tensor)",
)
define(
    sums,
    f"Tensor dy, Tensor kept, Tensor? mask, {_LINE}, int act, bool want_du, Tensor? more=None) -> (Tensor, Tensor)",
)
define(
    input_gradient,
    f"Tensor dy, Tensor kept, Tensor? mask, {_LINE}, int act, Tensor by, Tensor along, Tensor constant) -> Tensor",
)
define(restore, "Tensor kept, Tensor slope, Tensor level, int act) -> Tensor")
