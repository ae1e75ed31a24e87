"""The operators of lean training: what each takes, means and returns, described once for all back ends.

The signature of a method is the operator's schema. Its body allocates what the operator returns: it tells torch.compile
the shapes, and Triton's launches write into it. `portable` computes all of them in PyTorch's operators, with the same
signatures; `kernels.cpp` and the Triton modules compute those they register.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import Library, infer_schema, register_fake

from .constants import BFLOAT16, BYTE, wide


class ChannelMaps(NamedTuple):
    """Linear maps between the forms of a norm layer's input z, a number per channel each: the rows of maps, (8, C)."""

    slope: Tensor  # the activation's input is z slope + offset
    offset: Tensor
    zero: Tensor  # what is kept is (z - zero) step
    step: Tensor
    kept_slope: Tensor  # the activation's input is kept kept_slope + kept_offset
    kept_offset: Tensor
    kept_zero: Tensor  # the normalised input is (kept - kept_zero) kept_step
    kept_step: Tensor


class Operators:
    """The operators of a back end, which says in two methods how it lays out images and masks.

    Arguments that several operators share: z is a norm layer's input, (N, C, ...); dy the gradient of its activation's
    output; act the activation; keep what is kept of z; kept that; mask a bit a value, whether the activation lets the
    gradient pass, in an order of the back end's own; maps the rows of `ChannelMaps`. du is the gradient of the
    activation's input: by the mask if there is one, else by that input, from kept.
    """

    def channels_last(self, t: Tensor, mask: Tensor | None) -> bool:
        """Tell whether what is computed from a tensor, and from a mask if given, has its channels last."""
        raise NotImplementedError

    def mask_shape(self, z: Tensor) -> tuple[int, ...]:
        """Return the shape of the mask of z, in bytes."""
        raise NotImplementedError

    def empty(self, like: Tensor, kept: Tensor | None = None, mask: Tensor | None = None, dtype: Any = None) -> Tensor:
        """Return a tensor for results in the shape of one tensor and the layout of another."""
        last = like.dim() == 4 and self.channels_last(like if kept is None else kept, mask)
        layout = torch.channels_last if last else torch.contiguous_format
        return torch.empty_like(like, dtype=dtype, memory_format=layout)

    def register(self, library: Library, *described: Callable[..., Any]) -> None:
        """Tell PyTorch the schemas of some of these methods, and the shapes of what they return."""
        for method in described:
            library.define(method.__name__ + infer_schema(method, mutates_args=()))
            register_fake(f"{library.ns}::{method.__name__}", method, lib=library)

    # BatchNorm.

    def stats(self, z: Tensor, with_range: bool) -> Tensor:
        """Mean and biased variance of each channel, and its least and greatest value if asked for: (2 or 4, C)."""
        return z.new_empty((4 if with_range else 2, z.shape[1]), dtype=wide(z.dtype))

    def channel_maps(
        self, statistics: Tensor, eps: float, gamma: Tensor | None, beta: Tensor | None, keep: int
    ) -> Tensor:
        """`ChannelMaps` as one tensor, (8, C), from what `stats` returned; gamma and beta None for ones and zeros."""
        return statistics.new_empty((8, statistics.shape[1]))

    def forward(
        self, z: Tensor, residual: Tensor | None, maps: Tensor, act: str, keep: int, with_mask: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """act(z slope + offset (+ residual)); what is kept of z; and the mask, empty unless asked for."""
        in_bytes, keeps = keep == BYTE, keep in (BFLOAT16, BYTE)
        dtype = torch.uint8 if in_bytes else torch.bfloat16
        kept = self.empty(z, dtype=dtype) if keeps else z.new_empty(0, dtype=dtype)
        rows, *rest = self.mask_shape(z)
        mask = z.new_empty((rows if with_mask else 0, *rest), dtype=torch.uint8)
        return self.empty(z), kept, mask

    def sums(
        self, dy: Tensor, kept: Tensor, mask: Tensor | None, maps: Tensor, act: str, want_du: bool,
        dy2: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The sums of du and of du (kept - kept_zero) over each channel, (2, C); and du if asked for.

        dy2 is added to dy: an output that is used twice has two gradients.
        """
        return maps.new_empty((2, dy.shape[1])), self.empty(dy, kept, mask) if want_du else dy.new_empty(0)

    def gradient_terms(self, sums: Tensor, maps: Tensor, values: int, of_batch: bool) -> Tensor:
        """Gamma's gradient, and what the input's has along kept - kept_zero and besides, (3, C).

        The latter two are the statistics' own gradient, if they are of the batch; each mean is of so many values.
        """
        return sums.new_empty((3, sums.shape[1]))

    def input_gradient(
        self, dy: Tensor, kept: Tensor, mask: Tensor | None, maps: Tensor, act: str, terms: Tensor
    ) -> Tensor:
        """Du slope + (kept - kept_zero) terms[1] + terms[2]."""
        return self.empty(dy, kept, mask)

    def restore(self, kept: Tensor, maps: Tensor, act: str) -> Tensor:
        """act(kept kept_slope + kept_offset): the activation's output from what was kept, in the type of maps."""
        return self.empty(kept, dtype=maps.dtype)

    # Rows, (..., C): LayerNorm, and what is kept in 8 bits with the least value and the step of each row, (..., 2).

    def row_forward(
        self, z: Tensor, gamma: Tensor, beta: Tensor, eps: float, keep: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """LayerNorm's output, what is kept of the normalised input, each row's least value and step, 1 / deviation."""
        in_bytes = keep == BYTE
        kept = self.rows(z, torch.uint8 if in_bytes else torch.bfloat16)
        scale, inverse = (gamma.new_empty((*z.shape[:-1], count)) for count in (2 if in_bytes else 0, 1))
        return self.rows(z, z.dtype), kept, scale, inverse

    def row_backward(
        self, dy: Tensor, kept: Tensor, scale: Tensor, inverse: Tensor, gamma: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of LayerNorm's input, gamma and beta."""
        return self.rows(dy, dy.dtype), torch.empty_like(gamma), torch.empty_like(gamma)

    def keep_rows(self, x: Tensor, act: str, want_y: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Rows in 8 bits a value, the least value and the step of each, and their activation if asked for."""
        scale = x.new_empty((*x.shape[:-1], 2), dtype=wide(x.dtype))
        return self.rows(x, torch.uint8), scale, self.rows(x, x.dtype) if want_y else x.new_empty(0)

    def restore_rows(self, kept: Tensor, scale: Tensor, dy: Tensor | None, act: str, dtype: torch.dtype) -> Tensor:
        """The rows that `keep_rows` kept, in a type; or the gradient of the activation's input, which they are."""
        return self.rows(kept, dtype)

    def rows(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a tensor for results that are rows."""
        return torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)
