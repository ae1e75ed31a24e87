"""Differentiable convolutions and poolings that keep no input for backward. They are differentiable once."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
PIXELWISE_DEVICE = "cpu"  # where the gradient of a 1 x 1 convolution is fastest as a product of matrices


class Geometry(NamedTuple):
    """How a convolution moves over its input; each a tuple with a number per axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Return the convolution of x."""
    return CONV[weight.dim() - 2](x, weight, bias, *geometry)


def conv_gradient(dy: Tensor, weight: Tensor, size: torch.Size, geometry: Geometry) -> Tensor:
    """Return the gradient of a convolution's input, whose spatial size is given, from the weight alone.

    A transposed convolution computes it from gradient and weight. PyTorch's `convolution_backward` wants the input too,
    if only for its shape, and so has kept it.
    """
    stride, padding, dilation, groups = geometry
    weight, kernel = weight.to(dy.dtype), weight.shape[2:]
    if dy.device.type == PIXELWISE_DEVICE and dy.dim() == 4 and kernel.numel() == groups == 1 and not any(padding):
        return _pixelwise(dy, weight.flatten(1), size, stride)
    rest = tuple(
        full - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
        for full, out, s, p, d, k in zip(size, dy.shape[2:], stride, padding, dilation, kernel, strict=True)
    )
    return torch.convolution(dy, weight, None, stride, padding, dilation, True, rest, groups)


def _pixelwise(dy: Tensor, weight: Tensor, size: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """Return the gradient of a 1 x 1 convolution's input as one product of matrices."""
    batch, _, rows, columns = dy.shape
    dx = (dy.permute(0, 2, 3, 1).flatten(0, 2) @ weight).view(batch, rows, columns, -1)
    if stride != (1, 1):
        whole = dx.new_zeros(batch, *size, dx.shape[-1])
        whole[:, :: stride[0], :: stride[1]] = dx
        dx = whole
    return dx.permute(0, 3, 1, 2)


class FrozenConv(Function):
    """A convolution whose weight does not train: its input is not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        """Return the convolution of x."""
        ctx.save_for_backward(weight)
        ctx.geometry, ctx.size, ctx.dtype = geometry, x.shape[2:], x.dtype
        return convolve(x, weight, bias, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the input's gradient."""
        (weight,) = ctx.saved_tensors
        return conv_gradient(dy, weight, ctx.size, ctx.geometry).to(ctx.dtype), None, None, None


class GlobalPool(Function):
    """The average over all pixels, of whose input PyTorch keeps everything for its shape alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, adaptive: bool) -> Tensor:
        """Return the averages of x, (N, C, 1, 1), added up as either of PyTorch's operators does."""
        ctx.shape = x.shape
        return F.adaptive_avg_pool2d(x, 1) if adaptive else F.avg_pool2d(x, x.shape[-2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x."""
        return (dy / ctx.shape[-2:].numel()).expand(ctx.shape), None


class MaxPool(Function):
    """Max-pooling that keeps of each window which of its values was the greatest, in a byte."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, options: dict[str, Any]) -> Tensor:
        """Return the maxima of x, (N, C, H, W). ``options``: the keyword arguments of `F.max_pool2d`, a pair each."""
        y, index = F.max_pool2d(x, **options, return_indices=True)
        ctx.options, ctx.shape = options, x.shape
        rows, columns = _window_starts(y.shape, options, x.device)
        (_, width), (down, right) = options["kernel_size"], options["dilation"]
        row = (torch.div(index, x.shape[3], rounding_mode="floor") - rows) // down
        column = (index % x.shape[3] - columns) // right
        ctx.save_for_backward((row * width + column).to(torch.uint8))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x."""
        (place,) = ctx.saved_tensors
        rows, columns = _window_starts(dy.shape, ctx.options, dy.device)
        (_, width), (down, right) = ctx.options["kernel_size"], ctx.options["dilation"]
        place = place.long()
        index = (rows + place // width * down) * ctx.shape[3] + columns + place % width * right
        dx = dy.new_zeros(*ctx.shape[:2], ctx.shape[2] * ctx.shape[3])
        return dx.scatter_add_(2, index.flatten(2), dy.flatten(2)).view(ctx.shape), None


def _window_starts(shape: torch.Size, options: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the row and the column at which each window starts, (h, 1) and (w)."""
    (down, right), (top, left) = options["stride"], options["padding"]
    rows = torch.arange(shape[2], device=device)[:, None] * down - top
    return rows, torch.arange(shape[3], device=device) * right - left
