"""The kernels of lean training: C++ and PyTorch's own operators compute the same, and C++ the same bits every time."""

import itertools

import pytest
import torch
from lean_tensors import LAYOUTS, distance, drawn, planes, strided, table, terms

from bn_affine_adapters.lean.backends import cpp as cpp_kernels
from bn_affine_adapters.lean.backends import of_layer, portable
from bn_affine_adapters.lean.backends.constants import (
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
    wide,
)

pytestmark = pytest.mark.usefixtures("cpp")

ACTS = (IDENTITY, RELU, RELU6, SILU, HARDSWISH)
KEEPS = (INPUT, BFLOAT16, BYTE, NOTHING)
DTYPES = cpp_kernels.DTYPES
# Odd channels, rows that no 8 divides, several rows read as one, more than one chunk of rows.
SHAPES = ((3, 1, 5, 7), (2, 3, 4, 4), (7, 5), (3, 5, 3, 3), (2, 130, 3, 5), (301, 3), (4, 16, 33, 32))
# How far two ways to compute may be apart, as a share of the result: a few roundings of the type of the numbers.
CLOSE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 5e-3}


def columns(shape, dtype, seed):
    """Slope and offset per channel with which an activation's input lies on all sides of its corners."""
    return drawn(shape[1], dtype=dtype, seed=seed, scale=3), drawn(shape[1], dtype=dtype, seed=seed + 1)


def away_from_corners(u, act):
    """Tell where rounding cannot move an activation's input over one of its corners."""
    return (u.abs() > 1e-4) & ((u - 6).abs() > 1e-4) if act == RELU6 else u.abs() > 1e-4


def test_they_know_their_activations_and_refuse_others(cpp):
    assert set(ACTS) == cpp_kernels.ACTIVATIONS
    z, maps = torch.ones(2, 3, 4, 4), torch.ones(8, 3)
    for call in (
        lambda: cpp.forward(z, None, maps, GELU, INPUT, False),
        lambda: cpp.sums(z, z, None, maps, GELU, False),
        lambda: cpp.input_gradient(z, z, None, maps, GELU, maps[:3]),
        lambda: cpp.restore(z, maps, GELU),
    ):
        with pytest.raises(RuntimeError, match="bn_affine_adapters: no kernel for gelu"):
            call()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_forward_and_what_it_keeps_agree(cpp, act, dtype):
    """Of what is kept one unit in its last place may differ, in a few places, where two roundings are one in C++."""
    cases = 0
    for shape, keep, adds in itertools.product(SHAPES, KEEPS, (False, True)):
        z, residual = drawn(*shape, dtype=dtype, seed=1), drawn(*shape, dtype=dtype, seed=2) if adds else None
        slope, offset = columns(shape, wide(dtype), 3)
        mean, _, low, high = portable.stats(z, True)
        maps = table(slope, offset, *((low, 255 / (high - low)) if keep == BYTE else (mean, slope.abs())))
        args = (z, residual, maps, act, keep, act in MASKED)
        (y, kept, mask), (expected, expected_kept, _) = cpp.forward(*args), portable.forward(*args)
        assert distance(y, expected) < CLOSE[dtype]
        assert (y.dtype, kept.dtype) == (dtype, torch.uint8 if keep == BYTE else torch.bfloat16)
        assert kept.numel() == (z.numel() if keep in (BYTE, BFLOAT16) else 0)
        if keep == BYTE:
            apart = (kept.int() - expected_kept.int()).abs()
            assert apart.max() <= 1
            assert apart.count_nonzero() <= 1 + kept.numel() // 1000
        elif keep == BFLOAT16:
            assert distance(kept, expected_kept) < 1e-3
        if act in MASKED:
            lines = (-1, *(1,) * (z.dim() - 2))
            u = z.double() * slope.double().view(lines) + offset.double().view(lines)
            u = u if residual is None else u + residual.double()
            _, passed = cpp.sums(torch.ones_like(z), z, mask, torch.zeros_like(maps), act, True)
            clear = away_from_corners(u, act)
            assert torch.equal(passed.bool()[clear], portable.passes(u, act)[clear])
            assert mask.numel() < z.numel() / 8 + 8 * max(128, 2 * shape[1])  # a bit a value, and unfinished bytes
        cases += 1
    assert cases == len(SHAPES) * len(KEEPS) * 2 == 56


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_gradients_agree_whatever_was_kept(cpp, act, dtype):
    """Sums, input gradients and restored outputs, with the activation's input from what was kept or a mask for it."""
    cases = 0
    w = wide(dtype)
    for shape, keep in itertools.product(SHAPES, (INPUT, BFLOAT16, BYTE)):
        z, dy = drawn(*shape, dtype=dtype, seed=1), drawn(*shape, dtype=dtype, seed=4)
        kept = {INPUT: z, BFLOAT16: z.bfloat16(), BYTE: ((z.float() + 4) * 30).clamp(0, 255).byte()}[keep]
        slope, offset = columns(shape, w, 5)
        if keep == BYTE:
            slope, offset = slope / 30, offset - 4 * slope
        zero, by, along, constant = (drawn(shape[1], dtype=w, seed=seed) for seed in range(7, 11))
        maps, rest = table(slope, offset, zero, by=by), terms(along, constant)
        for masked in (False, True) if act in MASKED else (False,):
            there = (z, None, table(slope, offset), act, NOTHING, True)
            masks = (cpp.forward(*there)[2], portable.forward(*there)[2]) if masked else (None, None)
            for dy2 in (None, dy.flip(0)):
                (sums, du), (expected_sums, expected_du) = (
                    side.sums(dy, kept, mask, maps, act, True, dy2)
                    for side, mask in zip((cpp, portable), masks, strict=True)
                )
                assert distance(sums, expected_sums) < 10 * CLOSE[w]  # terms of both signs, added in another order
                assert distance(du, expected_du) < CLOSE[dtype]
                assert (sums.dtype, du.dtype) == (w, dtype)
            dz = cpp.input_gradient(dy, kept, masks[0], maps, act, rest)
            assert distance(dz, portable.input_gradient(dy, kept, masks[1], maps, act, rest)) < CLOSE[dtype]
            assert dz.dtype == dtype
            assert not cpp.sums(dy, kept, masks[0], maps, act, False)[1].numel()
            args = (kept, masks[0], maps, act, True)
            for dy2 in (dy.flip(0), strided(dy)) if dtype == w else ():
                both = zip(cpp.sums(dy, *args, dy2), cpp.sums(dy + dy2, *args), strict=True)
                assert all(torch.equal(*pair) for pair in both)
            cases += 1
        if keep != INPUT or dtype == w:
            h = cpp.restore(kept, maps, act)
            assert h.dtype == w
            assert distance(h, portable.restore(kept, maps, act)) < CLOSE[w]
    assert cases == len(SHAPES) * 3 * (2 if act in MASKED else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_are_those_of_float64(cpp, dtype):
    """For channels far from zero too, for constant, huge and tiny ones: a square of a large mean never comes in."""
    kinds = {
        "usual": (1, 0), "far": (1, 1e4), "farther": (1e-2, -1e4), "huge": (1e17, 1e18), "tiny": (1e-12, 1e-12),
        "constant": (0, 1e4), "zero": (0, 0),
    }  # fmt: skip
    cases = 0
    for (name, (scale, shift)), shape in itertools.product(kinds.items(), SHAPES):
        z = drawn(*shape, dtype=dtype, scale=scale, shift=shift)
        # Exact enough to judge float64 as well: near the mean nothing cancels.
        mean, variance, low, high = portable.stats(z.double() - shift, True)
        found = cpp.stats(z, True)
        assert torch.equal(found[:2], cpp.stats(z, False))
        assert torch.equal(found[2:], torch.stack([low + shift, high + shift]).to(found.dtype)), name
        eps, deviation = torch.finfo(found.dtype).eps, variance.sqrt()
        bound = eps * (4 * (mean + shift).abs() + 8 * deviation)
        assert ((found[0].double() - (mean + shift)).abs() <= bound).all(), name
        parts = torch.finfo(torch.float64).eps * (shift / deviation.clamp_min(1e-300)).abs()  # put together in float64
        assert ((found[1].double() - variance).abs() <= (32 * eps + 2 * parts) * variance).all(), name
        cases += 1
    assert cases == len(kinds) * len(SHAPES) == 49


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout_of_the_arguments_gives_the_same_bits(cpp, dtype):
    """A mask, in the order of the rows of its forward, is read in no other: not for a gradient in another layout."""
    cases = 0
    for shape in ((2, 3, 4, 4), (3, 5, 3, 3), (2, 130, 3, 5), (3, 1, 5, 7)):
        z, residual, dy = (drawn(*shape, dtype=dtype, seed=seed) for seed in (1, 2, 3))
        slope, offset = columns(shape, wide(dtype), 4)
        maps, rest, found = table(slope, offset), terms(slope, offset), []
        for layouts in itertools.product(LAYOUTS, repeat=3):
            z_, residual_, dy_ = (layout(t) for layout, t in zip(layouts, (z, residual, dy), strict=True))
            y, kept, mask = cpp.forward(z_, residual_, maps, RELU, BFLOAT16, True)
            sums, du = cpp.sums(dy_, planes(kept), mask, maps, RELU, True)
            dz = cpp.input_gradient(dy_, kept, mask, maps, RELU, rest)
            found.append((cpp.stats(z_, True), y, kept, mask, sums, du, dz, cpp.restore(planes(kept), maps, SILU)))
        assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))
        wanted = dy * (z * slope.view(1, -1, 1, 1) + offset.view(1, -1, 1, 1) + residual > 0)
        if dtype != torch.bfloat16:  # whose sum is rounded here before it is compared with zero
            assert torch.equal(found[0][5], wanted.to(dtype))
        cases += len(found)
    assert cases == 4 * 27


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_thread_and_two_give_the_same_bits(cpp, dtype):
    def compute():
        z, dy, residual = (drawn(8, 17, 32, 31, dtype=dtype, seed=seed) for seed in (1, 2, 3))
        stats = cpp.stats(z, True)
        maps = table(*columns(z.shape, stats.dtype, 4), stats[0])
        y, kept, mask = cpp.forward(z, residual, maps, RELU6, BFLOAT16, True)
        sums, du = cpp.sums(dy, kept, mask, maps, RELU6, True)
        dz = cpp.input_gradient(dy, kept, mask, maps, RELU6, maps[:3])
        return stats, y, kept, mask, sums, du, dz, cpp.restore(kept, maps, SILU)

    before, one = torch.get_num_threads(), compute()
    assert before == 1
    torch.set_num_threads(2)
    try:
        two = compute()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("act", ACTS)
def test_what_is_not_a_number_stays_so(cpp, act):
    """A network that diverged has a loss that says so: no activation makes a zero of a NaN."""
    z = torch.full((2, 3, 4, 5), float("nan"))
    for keep in KEEPS:
        y, _, _ = cpp.forward(z, None, torch.ones(8, 3), act, keep, act in MASKED)
        assert y.isnan().all()


def test_exponentials_are_exact_to_rounding_over_the_whole_range(cpp):
    """SiLU in float32, whose exponential is a polynomial, from where it vanishes to where it is the identity."""
    z = torch.linspace(-200, 200, 100_001).view(1, 1, -1, 1)
    maps = table(torch.ones(1), torch.zeros(1))
    y, _, _ = cpp.forward(z, None, maps, SILU, NOTHING, False)
    dz = cpp.input_gradient(torch.ones_like(z), z, None, maps, SILU, torch.zeros(3, 1))
    x = z.double().requires_grad_()
    wanted = torch.nn.functional.silu(x)
    (slope,) = torch.autograd.grad(wanted.sum(), x)
    assert ((y - wanted).abs() <= 5e-7 * wanted.abs() + 1e-30).all()
    assert ((dz - slope).abs() <= 1e-6).all()


def test_what_cpp_does_not_know_is_computed_by_pytorch(cpp):
    assert of_layer(torch.zeros(2, 3, 4, 4), HARDSWISH) is cpp
    unknown = [
        (torch.zeros(2, 3, 4, 4), GELU), (torch.zeros(2, 3, 4), RELU), (torch.zeros(2, 3, 4, 4, 4), RELU),
        (torch.zeros(2, 3, 4, 4, dtype=torch.float16), RELU), (torch.zeros(2, 3, 4, 4, device="meta"), RELU),
    ]  # fmt: skip
    assert all(of_layer(*case) is portable for case in unknown)
    with pytest.raises(RuntimeError, match="bn_affine_adapters: no kernel for Half"):
        cpp.stats(torch.zeros(2, 3, 4, 4, dtype=torch.float16), False)


def test_compilers_are_told_the_shapes_that_the_operators_return(cpp):
    """torch.compile asks the operators' stand-ins; what they say of shapes, types and strides is what comes out."""
    cases = 0
    for (dtype, keep), shape in zip(itertools.product(DTYPES, KEEPS), itertools.cycle(SHAPES[1:5]), strict=False):
        z, dy = drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype, seed=1)
        maps = table(*columns(shape, wide(dtype), 2))
        _, kept, mask = cpp.forward(z, dy, maps, RELU, keep, True)
        kept = kept if kept.numel() else z
        calls = {
            cpp.stats: (z, keep == BYTE),
            cpp.forward: (z, dy, maps, RELU, keep, True),
            cpp.sums: (dy, kept, mask, maps, RELU, keep == BYTE, *([dy] if keep == BYTE else [])),
            cpp.input_gradient: (dy, kept, mask, maps, RELU, maps[:3]),
        }
        if kept.dtype != torch.bfloat16 or keep == BFLOAT16:
            calls[cpp.restore] = (kept, maps, SILU)
        for operator, args in calls.items():
            torch.library.opcheck(operator.default, args, test_utils=("test_schema", "test_faketensor"))
            cases += 1
    assert cases == 3 * 4 * 5 - 2  # bfloat16 itself is not restored, where it is kept or nothing is
