"""Tensors for the tests of lean training: drawn numbers in every layout, and how far two results are apart."""

import torch

from bn_affine_adapters.lean import backends

ACTS = ("identity", "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh")


def drawn(*shape, seed=0, dtype=torch.float64, scale=1.0, shift=0.0, grad=False):
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (numbers * scale + shift).to(dtype).requires_grad_(grad)


def rows(t):
    """Channels innermost."""
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.contiguous()


def planes(t):
    """One channel after the other."""
    return t.contiguous()


def strided(t):
    """Every other number of a tensor twice as large: no layout of its own."""
    return torch.stack([t, t + 1], -1)[..., 0]


LAYOUTS = (rows, planes, strided)


def distance(result, expected):
    """Return how far two tensors are apart, as a share of the second."""
    assert result.shape == expected.shape
    return ((result.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300)).item()


def table(slope, offset, zero=None, step=None, by=None):
    """Return maps, (8, C), in which what is kept is mapped as the input is; by: the slope of the input's gradient."""
    zero = torch.zeros_like(slope) if zero is None else zero
    step = torch.ones_like(slope) if step is None else step
    by = slope if by is None else by
    return torch.stack([by, offset, zero, step, slope, offset, zero, step])


def terms(along, constant):
    """Return the terms of an input's gradient, (3, C)."""
    return torch.stack([torch.zeros_like(along), along, constant])


@torch.no_grad()
def channel_maps(statistics, *args):
    """Return the maps of a norm layer, as lean training gets them."""
    return backends.of_channels(statistics).channel_maps(statistics, *args)
