"""The operators of a GPU, whose kernels are in Triton: torch.ops.bnaa_triton, with the functions of `kernels`.

They take tensors in any layout, and compute in that of the input: channels_last, or planes.
"""

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
CHUNK = 512  # rows that one program sums, of a tensor in channels_last
Run = Callable[..., None]  # launches a kernel, or does not, where only shapes are asked for


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
        return cls(t.shape[0] * t.shape[1], t.shape[2:].numel(), t.shape[1], False)

    @property
    def parts(self) -> int:
        """The partial sums of a channel."""
        return -(-self.P // CHUNK) if self.LAST else self.P // self.C


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


def stats(run: Run, z: Tensor, range: bool) -> Tensor:
    """Return mean and biased variance of each channel, and its least and greatest value: (2 or 4, C)."""
    z = _dense(z)
    m = Matrix.of(z)
    found = z.new_empty((4 if range else 2, m.parts, m.C), dtype=wide(z.dtype))
    run(kernels.stats, m, z, found, sums=True, RANGE=range)
    # The rule of Chan, Golub and LeVeque for the variance of parts.
    count = found.new_full((m.parts, 1), CHUNK if m.LAST else m.Q)
    if m.LAST:
        count[-1] = m.P - (m.parts - 1) * CHUNK
    share = count / (z.numel() // m.C)
    near = found[0, 0]
    mean = near + ((found[0] - near) * share).sum(0)
    variance = (found[1] / (z.numel() // m.C) + (found[0] - mean).square() * share).sum(0)
    return torch.stack([mean, variance.clamp_min(0), *((found[2].amin(0), found[3].amax(0)) if range else ())])


def forward(
    run: Run,
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
    z = _dense(z)
    m = Matrix.of(z)
    residual = z if residual is None else _dense(residual, m.LAST)
    dtype = torch.uint8 if keep == BYTE else torch.bfloat16
    y = torch.empty_like(z)
    kept = torch.empty_like(z, dtype=dtype) if keep in (BFLOAT16, BYTE) else z.new_empty(0, dtype=dtype)
    mask = z.new_empty((-(-m.P // 8) if with_mask else 0, m.Q), dtype=torch.uint8)
    run(
        kernels.forward, m, z, residual, slope, level, zero, step, y, kept, mask,
        ACT=act, KEEP=keep, ADDS=residual is not z, MASKS=with_mask,
    )  # fmt: skip
    return y, kept, mask if m.LAST else mask[None]


def sums(
    run: Run,
    dy: Tensor,
    kept: Tensor,
    mask: Tensor | None,
    slope: Tensor,
    level: Tensor,
    zero: Tensor,
    act: int,
    want_du: bool,
) -> tuple[Tensor, Tensor]:
    """Return the sums of du and of du (kept - zero), (2, C), and du itself if asked for."""
    dy, kept, m = _aligned(dy, kept, mask)
    du = torch.empty_like(dy) if want_du else dy.new_empty(0)
    found = slope.new_empty((2, m.parts, m.C))
    run(
        kernels.sums, m, dy, kept, kept if mask is None else mask, slope, level, zero, du, found,
        sums=True, ACT=act, MASKED=mask is not None, WRITES=want_du,
    )  # fmt: skip
    return found.sum(1), du


def input_gradient(
    run: Run,
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
    run(
        kernels.input_gradient, m, dy, kept, kept if mask is None else mask, slope, level, zero, by, along, constant,
        dz, ACT=act, MASKED=mask is not None,
    )  # fmt: skip
    return dz


def restore(run: Run, kept: Tensor, slope: Tensor, level: Tensor, act: int) -> Tensor:
    """Return the activation's output from what was kept."""
    kept = _dense(kept)
    m = Matrix.of(kept)
    y = torch.empty_like(kept, dtype=slope.dtype)
    run(kernels.restore, m, kept, slope, level, y, ACT=act)
    return y


def _launch(kernel: Any, m: Matrix, *tensors: Tensor, sums: bool = False, **constants: Any) -> None:
    columns = min(128, triton.next_power_of_2(m.Q))
    rows = min(CHUNK, TILE // columns)  # a multiple of 8 that divides CHUNK
    grid = triton.cdiv(m.P, rows), triton.cdiv(m.Q, columns)
    sizes = [m.P, m.Q, m.C]
    if sums:
        steps, grid = (CHUNK // rows, (m.parts, grid[1])) if m.LAST else (grid[1], (grid[0], 1))
        sizes, constants = [*sizes, m.parts], {**constants, "CHUNK": CHUNK, "STEPS": steps}
    if grid[0] and grid[1]:
        with torch.cuda.device_of(tensors[0]):
            kernel[grid](*tensors, *sizes, LAST=m.LAST, ROWS=rows, COLS=columns, **constants)


def _pretend(*args: Any, **constants: Any) -> None:
    """Launch nothing, where torch.compile asks for shapes."""


_library = Library(NAMESPACE, "DEF")
_LINE = "Tensor slope, Tensor level, Tensor zero"
_OPERATORS: dict[Callable[..., Any], str] = {
    stats: "Tensor z, bool range) -> Tensor",
    forward: f"Tensor z, Tensor? residual, {_LINE}, Tensor step, int act, int keep, bool with_mask) -> "
    "(Tensor, Tensor, Tensor)",
    sums: f"Tensor dy, Tensor kept, Tensor? mask, {_LINE}, int act, bool want_du) -> (Tensor, Tensor)",
    input_gradient: f"Tensor dy, Tensor kept, Tensor? mask, {_LINE}, int act, Tensor by, Tensor along, "
    "Tensor constant) -> Tensor",
    restore: "Tensor kept, Tensor slope, Tensor level, int act) -> Tensor",
}
for _function, _arguments in _OPERATORS.items():
    _name = _function.__name__
    _library.define(f"{_name}({_arguments}")
    for _device in ("CUDA", "CPU"):  # the latter in Triton's interpreter alone
        _library.impl(_name, partial(_function, _launch), _device)
    register_fake(f"{NAMESPACE}::{_name}", partial(_function, _pretend), lib=_library)
