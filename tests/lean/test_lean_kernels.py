"""The kernels of lean training: C++ and PyTorch's own operators compute the same, and C++ the same bits every time."""

import itertools

import pytest
import torch

from bn_affine_adapters.lean import native
from bn_affine_adapters.lean.kernels import (
    BFLOAT16,
    BYTE,
    GELU,
    HARDSWISH,
    IDENTITY,
    INPUT,
    MASKED,
    NOTHING,
    RELU,
    RELU6,
    SILU,
    Portable,
    kernels,
)
from bn_affine_adapters.lean.rows import RoundedLayerNorm, RowNorm

pytestmark = pytest.mark.usefixtures("cpp")

ACTS = (IDENTITY, RELU, RELU6, SILU, HARDSWISH)
KEEPS = (INPUT, BFLOAT16, BYTE, NOTHING)
# Odd channels, rows that no 8 divides, several rows read as one, more than one chunk of rows.
SHAPES = ((3, 1, 5, 7), (2, 3, 4, 4), (7, 5), (3, 5, 3, 3), (2, 130, 3, 5), (301, 3), (4, 16, 33, 32))
# How far two ways to compute may be apart, as a share of the result: a few roundings of the type of the numbers.
CLOSE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 5e-3}
WIDE = {torch.float32: torch.float32, torch.float64: torch.float64, torch.bfloat16: torch.float32}
NAMES = ("identity", "relu", "relu6", "silu", "hardswish")


def drawn(shape, dtype, *, seed=0, scale=1.0, shift=0.0):
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (numbers * scale + shift).to(dtype)


def columns(shape, dtype, seed):
    """Slope and level per channel with which an activation's input lies on all sides of its corners."""
    return drawn(shape[1], dtype, seed=seed, scale=3), drawn(shape[1], dtype, seed=seed + 1)


def distance(found, wanted):
    """Return how far two tensors are apart, as a share of the second."""
    assert found.shape == wanted.shape
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-300)).item()


def away_from_corners(u, act):
    """Tell where rounding cannot move an activation's input over one of its corners."""
    return (u.abs() > 1e-4) & ((u - 6).abs() > 1e-4) if act == RELU6 else u.abs() > 1e-4


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS, ids=NAMES)
def test_forward_and_what_it_keeps_agree(cpp, act, dtype):
    """Of what is kept one unit in its last place may differ, in a few places, where two roundings are one in C++."""
    cases = 0
    for shape, keep, adds in itertools.product(SHAPES, KEEPS, (False, True)):
        z, residual = drawn(shape, dtype, seed=1), drawn(shape, dtype, seed=2) if adds else None
        wide = WIDE[dtype]
        slope, level = columns(shape, wide, 3)
        statistics = Portable.stats(z, True)
        zero, step = (
            (statistics[2], 255 / (statistics[3] - statistics[2])) if keep == BYTE else (statistics[0], slope.abs())
        )
        args = (z, residual, slope, level, zero, step, act, keep, act in MASKED)
        y, kept, mask = cpp.forward(*args)
        wanted, wanted_kept, _ = Portable.forward(*args)
        assert distance(y, wanted) < CLOSE[dtype]
        assert y.dtype == dtype
        if keep == BYTE:
            apart = (kept.int() - wanted_kept.int()).abs()
            assert kept.dtype == torch.uint8
            assert apart.max() <= 1
            assert apart.count_nonzero() <= 1 + kept.numel() // 1000
        elif keep == BFLOAT16:
            assert kept.dtype == torch.bfloat16
            assert distance(kept, wanted_kept) < 1e-3
        else:
            assert not kept.numel()
        if act in MASKED:
            lines = (-1, *(1,) * (z.dim() - 2))
            u = z.double() * slope.double().view(lines) + level.double().view(lines)
            u = u if residual is None else u + residual.double()
            ones, nothing = torch.ones_like(z), torch.zeros(shape[1], dtype=wide)
            _, passed = cpp.sums(ones, z, mask, nothing, nothing, nothing, act, True)
            wanted_passed = (u > 0) & (u < 6) if act == RELU6 else u > 0
            clear = away_from_corners(u, act)
            assert torch.equal(passed.bool()[clear], wanted_passed[clear])
            assert mask.numel() < z.numel() / 8 + 8 * max(128, 2 * shape[1])  # a bit a value, and unfinished bytes
        cases += 1
    assert cases == len(SHAPES) * len(KEEPS) * 2 == 56


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS, ids=NAMES)
def test_gradients_agree_whatever_was_kept(cpp, act, dtype):
    """Sums, input gradients and restored outputs, with the activation's input from what was kept or a mask for it."""
    cases = 0
    wide = WIDE[dtype]
    for shape, keep in itertools.product(SHAPES, (INPUT, BFLOAT16, BYTE)):
        z, dy = drawn(shape, dtype, seed=1), drawn(shape, dtype, seed=4)
        kept = {INPUT: z, BFLOAT16: z.bfloat16(), BYTE: ((z.float() + 4) * 30).clamp(0, 255).byte()}[keep]
        slope, level = columns(shape, wide, 5)
        if keep == BYTE:
            slope, level = slope / 30, level - 4 * slope
        zero, by, along, constant = (drawn(shape[1], wide, seed=seed) for seed in range(7, 11))
        for masked in (False, True) if act in MASKED else (False,):
            if masked:
                zeros = torch.zeros_like(slope)
                there = (z, None, slope, level, zeros, zeros, act, NOTHING, True)
                mask, wanted_mask = cpp.forward(*there)[2], Portable.forward(*there)[2]
            else:
                mask = wanted_mask = None
            sums, du = cpp.sums(dy, kept, mask, slope, level, zero, act, True)
            wanted_sums, wanted_du = Portable.sums(dy, kept, wanted_mask, slope, level, zero, act, True)
            rows = (by, along, constant)
            dz = cpp.input_gradient(dy, kept, mask, slope, level, zero, act, *rows)
            wanted_dz = Portable.input_gradient(dy, kept, wanted_mask, slope, level, zero, act, *rows)
            assert distance(sums, wanted_sums) < 10 * CLOSE[wide]  # terms of both signs, added in another order
            assert distance(du, wanted_du) < CLOSE[dtype]
            assert distance(dz, wanted_dz) < CLOSE[dtype]
            assert (sums.dtype, du.dtype, dz.dtype) == (wide, dtype, dtype)
            assert not cpp.sums(dy, kept, mask, slope, level, zero, act, False)[1].numel()
            args = (kept, mask, slope, level, zero, act, True)
            for more in (dy.flip(0), strided(dy)) if dtype == wide else ():
                both = zip(cpp.sums(dy, *args, more), cpp.sums(dy + more, *args), strict=True)
                assert all(torch.equal(*pair) for pair in both)
            wanted_sums, wanted_du = Portable.sums(dy, kept, wanted_mask, *args[2:], dy.flip(0))
            sums, du = cpp.sums(dy, *args, dy.flip(0))
            assert distance(sums, wanted_sums) < 10 * CLOSE[wide]
            assert distance(du, wanted_du) < CLOSE[dtype]
            cases += 1
        if keep != INPUT or dtype == wide:
            h = cpp.restore(kept, slope, level, act)
            assert h.dtype == wide
            assert distance(h, Portable.restore(kept, slope, level, act)) < CLOSE[wide]
    assert cases == len(SHAPES) * 3 * (2 if act in MASKED else 1)


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_statistics_are_those_of_float64(cpp, dtype):
    """For channels far from zero too, for constant, huge and tiny ones: a square of a large mean never comes in."""
    kinds = {
        "usual": (1, 0), "far": (1, 1e4), "farther": (1e-2, -1e4), "huge": (1e17, 1e18), "tiny": (1e-12, 1e-12),
        "constant": (0, 1e4), "zero": (0, 0),
    }  # fmt: skip
    cases = 0
    for (name, (scale, shift)), shape in itertools.product(kinds.items(), SHAPES):
        z = drawn(shape, dtype, scale=scale, shift=shift)
        # Exact enough to judge float64 as well: near the mean nothing cancels.
        mean, variance, low, high = Portable.stats(z.double() - shift, True)
        found = cpp.stats(z, True)
        assert torch.equal(found[:2], cpp.stats(z, False))
        assert torch.equal(found[2:], torch.stack([low + shift, high + shift]).to(found.dtype)), name
        eps, deviation = torch.finfo(found.dtype).eps, variance.sqrt()
        assert ((found[0].double() - (mean + shift)).abs() <= eps * (4 * (mean + shift).abs() + 8 * deviation)).all(), (
            name
        )
        parts = torch.finfo(torch.float64).eps * (shift / deviation.clamp_min(1e-300)).abs()  # put together in float64
        assert ((found[1].double() - variance).abs() <= (32 * eps + 2 * parts) * variance).all(), name
        cases += 1
    assert cases == len(kinds) * len(SHAPES) == 49


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_every_layout_of_the_arguments_gives_the_same_bits(cpp, dtype):
    """A mask, in the order of the rows of its forward, is read in no other: not for a gradient in another layout."""
    cases = 0
    for shape in ((2, 3, 4, 4), (3, 5, 3, 3), (2, 130, 3, 5), (3, 1, 5, 7)):
        z, residual, dy = (drawn(shape, dtype, seed=seed) for seed in (1, 2, 3))
        slope, level = columns(shape, WIDE[dtype], 4)
        zero, step = torch.zeros_like(slope), torch.ones_like(slope)
        found = []
        for layouts in itertools.product((rows, planes, strided), repeat=3):
            z_, residual_, dy_ = (layout(t) for layout, t in zip(layouts, (z, residual, dy), strict=True))
            y, kept, mask = cpp.forward(z_, residual_, slope, level, zero, step, RELU, BFLOAT16, True)
            sums, du = cpp.sums(dy_, planes(kept), mask, slope, level, zero, RELU, True)
            dz = cpp.input_gradient(dy_, kept, mask, slope, level, zero, RELU, slope, step, level)
            h = cpp.restore(planes(kept), slope, level, SILU)
            found.append((cpp.stats(z_, True), y, kept, mask, sums, du, dz, h))
        assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))
        wanted = dy * (z * slope.view(1, -1, 1, 1) + level.view(1, -1, 1, 1) + residual > 0)
        if dtype != torch.bfloat16:  # whose sum is rounded here before it is compared with zero
            assert torch.equal(found[0][5], wanted.to(dtype))
        cases += len(found)
    assert cases == 4 * 27


def rows(t):
    """Channels innermost."""
    return t.contiguous(memory_format=torch.channels_last)


def planes(t):
    """One channel after the other."""
    return t.contiguous()


def strided(t):
    """Every other number of a tensor twice as large: no layout of its own."""
    return torch.stack([t, t + 1], -1)[..., 0]


@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_one_thread_and_two_give_the_same_bits(cpp, dtype):
    def compute():
        z, dy, residual = (drawn((8, 17, 32, 31), dtype, seed=seed) for seed in (1, 2, 3))
        stats = cpp.stats(z, True)
        slope, level = columns(z.shape, stats.dtype, 4)
        y, kept, mask = cpp.forward(z, residual, slope, level, stats[0], slope, RELU6, BFLOAT16, True)
        sums, du = cpp.sums(dy, kept, mask, slope, level, stats[0], RELU6, True)
        dz = cpp.input_gradient(dy, kept, mask, slope, level, stats[0], RELU6, slope, level, stats[0])
        return stats, y, kept, mask, sums, du, dz, cpp.restore(kept, slope, level, SILU)

    before, one = torch.get_num_threads(), compute()
    assert before == 1
    torch.set_num_threads(2)
    try:
        two = compute()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("act", ACTS, ids=NAMES)
def test_what_is_not_a_number_stays_so(cpp, act):
    """A network that diverged has a loss that says so: no activation makes a zero of a NaN."""
    z = torch.full((2, 3, 4, 5), float("nan"))
    ones = torch.ones(3)
    for keep in KEEPS:
        y, _, _ = cpp.forward(z, None, ones, ones, ones, ones, act, keep, act in MASKED)
        assert y.isnan().all()


def test_exponentials_are_exact_to_rounding_over_the_whole_range(cpp):
    """SiLU in float32, whose exponential is a polynomial, from where it vanishes to where it is the identity."""
    z = torch.linspace(-200, 200, 100_001).view(1, 1, -1, 1)
    one, nothing = torch.ones(1), torch.zeros(1)
    y, _, _ = cpp.forward(z, None, one, nothing, nothing, one, SILU, NOTHING, False)
    dz = cpp.input_gradient(torch.ones_like(z), z, None, one, nothing, nothing, SILU, one, nothing, nothing)
    x = z.double().requires_grad_()
    wanted = torch.nn.functional.silu(x)
    (slope,) = torch.autograd.grad(wanted.sum(), x)
    assert ((y - wanted).abs() <= 5e-7 * wanted.abs() + 1e-30).all()
    assert ((dz - slope).abs() <= 1e-6).all()


def test_what_cpp_does_not_know_is_computed_by_pytorch(cpp):
    assert kernels(torch.zeros(2, 3, 4, 4), HARDSWISH) is cpp
    unknown = [
        (torch.zeros(2, 3, 4, 4), GELU), (torch.zeros(2, 3, 4), RELU), (torch.zeros(2, 3, 4, 4, 4), RELU),
        (torch.zeros(2, 3, 4, 4, dtype=torch.float16), RELU), (torch.zeros(2, 3, 4, 4, device="meta"), RELU),
    ]  # fmt: skip
    assert all(kernels(*case) is Portable for case in unknown)
    with pytest.raises(RuntimeError, match="bn_affine_adapters: no kernel for Half"):
        cpp.stats(torch.zeros(2, 3, 4, 4, dtype=torch.float16), False)


def test_compilers_are_told_the_shapes_that_the_operators_return(cpp):
    """torch.compile asks the operators' stand-ins; what they say of shapes, types and strides is what comes out."""
    cases = 0
    for shape, dtype, keep in itertools.product(SHAPES[1:5], native.DTYPES, KEEPS):
        z, dy = drawn(shape, dtype), drawn(shape, dtype, seed=1)
        slope, level = columns(shape, WIDE[dtype], 2)
        line = (slope, level, level)
        _, kept, mask = cpp.forward(z, dy, *line, slope, RELU, keep, True)
        kept = kept if kept.numel() else z
        calls = {
            cpp.stats: (z, keep == BYTE),
            cpp.forward: (z, dy, *line, slope, RELU, keep, True),
            cpp.sums: (dy, kept, mask, *line, RELU, keep == BYTE, *([dy] if keep == BYTE else [])),
            cpp.input_gradient: (dy, kept, mask, *line, RELU, *line),
        }
        if kept.dtype != torch.bfloat16 or keep == BFLOAT16:
            calls[cpp.restore] = (kept, slope, level, SILU)
        for operator, args in calls.items():
            torch.library.opcheck(operator.default, args, test_utils=("test_schema", "test_faketensor"))
            cases += 1
    assert cases == 4 * (3 * 4 * 5 - 2)  # bfloat16 itself is not restored, where it is kept or nothing is


def layer_norm(function, dtype, shape, affine, computed=None):
    """Return a LayerNorm's output and the gradients of its input, gamma and beta, of numbers of one type in another."""
    z, dy = (drawn(shape, dtype, seed=seed, scale=3, shift=1).to(computed or dtype) for seed in (0, 5))
    gamma, beta = (c.to(computed or dtype) for c in columns((1, shape[-1]), dtype, 1)) if affine else (None, None)
    given = [tensor.requires_grad_() for tensor in (z, gamma, beta) if tensor is not None]
    y = function(z, gamma, beta)
    return [y.detach(), *torch.autograd.grad(y, given, dy)]


@pytest.mark.parametrize("keep", [BFLOAT16, BYTE], ids=["bfloat16", "byte"])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_layer_norm_agrees_with_pytorchs_in_float64(dtype, keep):
    cases = list(itertools.product([(5, 7), (3, 4, 16), (2, 9, 130), (301, 3), (2, 3, 5, 33), (4, 1)], [True, False]))
    # What is kept may be rounded to the other side where the normalised input differs in its last digit.
    allowed = max(CLOSE[dtype], 2e-4 if keep == BFLOAT16 else 2e-3)
    for shape, affine in cases:
        found = layer_norm(lambda *args: RoundedLayerNorm.apply(*args, 1e-5, keep), dtype, shape, affine)
        wanted = layer_norm(
            lambda *args: RowNorm.apply(*args, 0, 1e-5, IDENTITY, keep), dtype, shape, affine, torch.float64
        )
        assert distance(found[0], wanted[0]) < max(CLOSE[dtype], 1e-12), (shape, affine)
        for ours, theirs in zip(found[1:], wanted[1:], strict=True):
            assert distance(ours, theirs) < allowed, (shape, affine)
    assert len(cases) == 12


@pytest.mark.parametrize("keep", [BFLOAT16, BYTE], ids=["bfloat16", "byte"])
def test_layer_norm_in_one_thread_and_two_gives_the_same_bits(keep):
    before, shape = torch.get_num_threads(), (700, 33)
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            run = lambda *args: RoundedLayerNorm.apply(*args, 1e-5, keep)  # noqa: E731
            found.append(layer_norm(run, torch.float32, shape, True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
