"""The operators of a GPU, whose kernels are in Triton: torch.ops.bnaa_triton. `operators` says what they compute.

They take tensors in any layout, and compute in that of the input: channels_last, or planes. Experimental: without a GPU
they have run in Triton's interpreter alone.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import Library

from . import triton_kernels as kernels
from .constants import wide
from .operators import ChannelMaps, Operators

TILE = 2048  # numbers that a program holds at once


class TritonOperators(Operators):
    """Outputs have the layout of what they are computed from: channels last or planes."""

    def channels_last(self, t: Tensor, mask: Tensor | None) -> bool:
        """Tell whether a tensor is read as rows of channels; a mask says how it was when the mask was written."""
        if mask is not None:
            return mask.dim() == 2
        return t.dim() == 2 or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))

    def mask_shape(self, z: Tensor) -> tuple[int, ...]:
        """Return (P / 8, Q) of rows of channels, and (P / 8, Q, 1) of planes."""
        m = Matrix.of(z)
        return (-(-m.P // 8), m.Q) if m.LAST else (-(-m.P // 8), m.Q, 1)


OUT = TritonOperators()
LIBRARY = Library("bnaa_triton", "DEF")


def implement(described: Callable[..., Any], function: Callable[..., Any]) -> None:
    """Register an operator and what computes it."""
    OUT.register(LIBRARY, described)
    for device in ("CUDA", "CPU"):  # the latter in Triton's interpreter alone
        LIBRARY.impl(described.__name__, function, device)


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
    def of(cls, t: Tensor, mask: Tensor | None = None) -> "Matrix":
        """Read a tensor, (N, C, ...); a mask of it says in which layout."""
        if OUT.channels_last(t, mask):
            return cls(t.numel() // t.shape[1], t.shape[1], t.shape[1], True)
        return cls(t.shape[0] * t.shape[1], math.prod(t.shape[2:]), t.shape[1], False)

    @property
    def chunk(self) -> int:
        """The rows of channels that one program sums: fewer where there would be too few programs."""
        return 512 if self.P >= 2**15 else 64


def _dense(t: Tensor, m: Matrix) -> Tensor:
    """Return a tensor in the layout of a matrix."""
    last = m.LAST and t.dim() == 4
    return t.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


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
    partial = tensors[0].new_empty((kinds, parts, m.C), dtype=wide(tensors[0].dtype))
    constants |= {"LAST": m.LAST, "ROWS": rows, "COLS": columns, "CHUNK": m.chunk, "STEPS": steps}
    with torch.cuda.device_of(tensors[0]):
        kernel[grid](*tensors, partial, m.P, m.Q, m.C, parts, **constants)
    return partial


def stats(z: Tensor, with_range: bool) -> Tensor:
    """Return mean and variance, least and greatest value of each channel."""
    out, m = OUT.stats(z, with_range), Matrix.of(z)
    z = _dense(z, m)
    partial = _sum(kernels.stats, out.shape[0], m, z, RANGE=with_range)
    parts, columns = partial.shape[1], min(32, triton.next_power_of_2(m.C))
    rows = min(TILE // columns, triton.next_power_of_2(parts))
    steps = triton.next_power_of_2(triton.cdiv(parts, rows))
    constants = {"LAST": m.LAST, "RANGE": with_range, "ROWS": rows, "COLS": columns, "CHUNK": m.chunk, "STEPS": steps}
    with torch.cuda.device_of(z):
        kernels.merge[(triton.cdiv(m.C, columns),)](partial, out, m.P, m.Q, m.C, parts, **constants)
    return out


def forward(
    z: Tensor, residual: Tensor | None, maps: Tensor, act: str, keep: int, with_mask: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the layer's output, what is kept of z, and the mask."""
    (y, kept, mask), m = OUT.forward(z, residual, maps, act, keep, with_mask), Matrix.of(z)
    z, of = _dense(z, m), ChannelMaps(*maps)
    _launch(
        kernels.forward, m, z, z if residual is None else _dense(residual, m), of.slope, of.offset, of.zero, of.step,
        y, kept, mask, ACT=act, KEEP=keep, ADDS=residual is not None, MASKS=with_mask,
    )  # fmt: skip
    return y, kept, mask


def sums(
    dy: Tensor, kept: Tensor, mask: Tensor | None, maps: Tensor, act: str, want_du: bool, dy2: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the sums of du and of du (kept - kept_zero), and du itself if asked for."""
    (_, du), m = OUT.sums(dy, kept, mask, maps, act, want_du, dy2), Matrix.of(kept, mask)
    dy, kept, of = _dense(dy, m), _dense(kept, m), ChannelMaps(*maps)
    partial = _sum(
        kernels.sums, 2, m, dy, dy if dy2 is None else _dense(dy2, m), kept, kept if mask is None else mask,
        of.kept_slope, of.kept_offset, of.kept_zero, du,
        ACT=act, MASKED=mask is not None, WRITES=want_du, ADDS=dy2 is not None,
    )  # fmt: skip
    return partial.sum(1), du


def input_gradient(dy: Tensor, kept: Tensor, mask: Tensor | None, maps: Tensor, act: str, terms: Tensor) -> Tensor:
    """Return the gradient of z."""
    dz, m = OUT.input_gradient(dy, kept, mask, maps, act, terms), Matrix.of(kept, mask)
    kept, of = _dense(kept, m), ChannelMaps(*maps)
    _launch(
        kernels.input_gradient, m, _dense(dy, m), kept, kept if mask is None else mask,
        of.kept_slope, of.kept_offset, of.kept_zero, of.slope, terms[1], terms[2], dz,
        ACT=act, MASKED=mask is not None,
    )  # fmt: skip
    return dz


def restore(kept: Tensor, maps: Tensor, act: str) -> Tensor:
    """Return the activation's output from what was kept."""
    y, m, of = OUT.restore(kept, maps, act), Matrix.of(kept), ChannelMaps(*maps)
    _launch(kernels.restore, m, _dense(kept, m), of.kept_slope, of.kept_offset, y, ACT=act)
    return y


implement(OUT.stats, stats)
implement(OUT.forward, forward)
implement(OUT.sums, sums)
implement(OUT.input_gradient, input_gradient)
implement(OUT.restore, restore)
