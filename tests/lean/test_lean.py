"""Lean training's gradients: PyTorch's where they are exact, within measured bounds where rounding is allowed.

Layers are run as a rewritten network runs them, through `dispatch`, with kernels in C++ and with PyTorch's operators.
"""

import copy
import itertools
from functools import partial

import pytest
import torch
from lean_tensors import ACTS, LAYOUTS, channel_maps, distance, drawn, planes, rows
from timm import layers as timm_layers
from torch import nn
from torch.autograd import gradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bn_affine_adapters.lean import LEVELS, backends, dispatch, saved_bytes
from bn_affine_adapters.lean.backends import constants as k
from bn_affine_adapters.lean.backends import cpp, portable
from bn_affine_adapters.lean.batch_norm import Norm, NormAct, PooledNorm
from bn_affine_adapters.lean.conv_pool import FrozenConv, Geometry, GlobalPool, MaxPool
from bn_affine_adapters.lean.row_norm import KeptAct, RoundedAttention, RowNorm

CORNERS = {k.RELU: (0,), k.RELU6: (0, 6), k.HARDSWISH: (-3, 3)}
LAYERS = {k.IDENTITY: nn.Identity, k.RELU: nn.ReLU, k.RELU6: nn.ReLU6, k.SILU: nn.SiLU, k.HARDSWISH: nn.Hardswish}
# Gamma and beta: training, frozen, or not there.
KINDS = (("trains", "trains"), ("frozen", "trains"), ("trains", "frozen"), (None, None), ("frozen", "frozen"))
PRECISE = {"eps": 1e-6, "atol": 1e-7, "rtol": 1e-6}  # a hundred and a thousand times stricter than gradcheck's own


# Exact: gradients of float64 against differences of the function itself.


def norm_act(act, of_batch, two_outputs=False):
    """Return NormAct as a function of z, gamma, beta and residual, with statistics of the batch or fixed ones."""

    def run(z, gamma, beta, residual=None):
        with torch.no_grad():
            statistics = backends.of_layer(z, act).stats(z, False)
            if not of_batch:
                statistics = torch.stack([torch.linspace(-1, 1, z.shape[1]), torch.ones(z.shape[1])]).to(z)
            maps = channel_maps(statistics, 1e-5, gamma, beta, k.INPUT)
        how = Norm(act, k.INPUT, of_batch, z.numel() // z.shape[1], two_outputs=two_outputs)
        return NormAct.apply(z, gamma, beta, residual, maps, how)

    return run


def trainable(kind, channels, seed, scale=1.0):
    """Return gamma or beta: one that trains, a frozen one, or None."""
    return None if kind is None else drawn(channels, seed=seed, scale=scale, grad=kind == "trains")


@pytest.mark.parametrize("of_batch", [True, False], ids=["batch statistics", "eval statistics"])
@pytest.mark.parametrize("act", ACTS)
def test_batch_norm_has_the_gradient_of_its_function(backend, act, of_batch):
    cases, sides, corners = 0, set(), CORNERS.get(act, (0,))
    kinds = KINDS if act in (k.RELU, k.SILU) else KINDS[:1]
    options = [((2, 3, 2, 2), kind) for kind in kinds] + [((4, 2), KINDS[0]), ((2, 2, 3), KINDS[0])]
    for (shape, (gammas, betas)), adds in itertools.product(options, (False, True)):
        if adds and act not in k.ADDABLE:
            continue
        z = drawn(*shape, seed=1, grad=True)
        gamma, beta = trainable(gammas, shape[1], 2, 12), trainable(betas, shape[1], 3, 3)
        residual = drawn(*shape, seed=4, scale=2, grad=True) if adds else None
        in_cpp = backend == "C++" and len(shape) != 3 and act in cpp.ACTIVATIONS
        assert backends.of_layer(z, act) is (torch.ops.bnaa if in_cpp else portable)
        assert gradcheck(norm_act(act, of_batch), (z, gamma, beta, residual), **PRECISE)
        if shape == (2, 3, 2, 2):
            assert gradcheck(norm_act(act, of_batch, two_outputs=True), (z, gamma, beta, residual), **PRECISE)
        u = norm_act(k.IDENTITY, of_batch)(z, gamma, beta, residual)
        sides |= {sum(value > corner for corner in corners) for value in u.flatten().tolist()}
        cases += 1
    assert cases == len(options) * (2 if act in k.ADDABLE else 1) >= 3
    assert len(sides) == len(corners) + 1, "the activation was not tried on all sides of its corners"


def test_the_gradient_check_finds_what_is_missing(backend):
    """It fails where the statistics' own gradient is left out, and where their count is wrong by one."""
    z, gamma, beta = drawn(3, 3, 2, 3, grad=True), drawn(3, grad=True), drawn(3, grad=True)

    def run(norm):
        def with_statistics(z):
            maps = channel_maps(backends.of_layer(z, k.SILU).stats(z.detach(), False), 1e-5, gamma, beta, k.INPUT)
            return NormAct.apply(z, gamma, beta, None, maps, norm)

        return with_statistics

    assert gradcheck(run(Norm(k.SILU, k.INPUT, True, 18)), (z,), **PRECISE)
    for wrong in (Norm(k.SILU, k.INPUT, False, 18), Norm(k.SILU, k.INPUT, True, 17)):
        with pytest.raises(GradcheckError, match="Jacobian mismatch"):
            gradcheck(run(wrong), (z,), **PRECISE)


def test_frozen_convolution_has_the_gradient_of_its_function():
    """In 1, 2 and 3 dimensions, also where the stride leaves pixels over that no output has seen."""
    cases = left_over = 0
    options = itertools.product((1, 2, 3), (1, 3), (1, 2, 3), (0, 1, 2), (1, 2), (6, 7))
    for axes, kernel, stride, padding, dilation, size in options:
        groups = 1 + cases // 2 % 2
        shape = (size, size + 1, 5)[:axes]
        x, bias = drawn(1, 2, *shape, seed=cases, grad=True), drawn(4) if cases % 2 else None
        weight = drawn(4, 2 // groups, *(kernel,) * axes, seed=1)
        geometry = Geometry(*((number,) * axes for number in (stride, padding, dilation)), groups)
        wanted = (F.conv1d, F.conv2d, F.conv3d)[axes - 1](x, weight, bias, *geometry)
        found = FrozenConv.apply(x, weight, bias, geometry)
        assert torch.equal(found, wanted)
        dy = drawn(*wanted.shape, seed=2)
        (dx,), (wanted_dx,) = (torch.autograd.grad(y, x, dy) for y in (found, wanted))
        assert distance(dx, wanted_dx) < 1e-14
        left_over += (size + 2 * padding - dilation * (kernel - 1) - 1) % stride > 0
        if axes < 3 and cases % 11 == 0:
            assert gradcheck(lambda x_: FrozenConv.apply(x_, weight, bias, geometry), (x,), **PRECISE)  # noqa: B023
        cases += 1
    assert cases == 3**3 * 2**3
    assert left_over > 50


def test_a_convolution_that_is_frozen_here_keeps_only_its_weight():
    own = nn.Conv2d(4, 6, 3, stride=2, padding=1).requires_grad_(False)
    x = drawn(2, 4, 8, 8, dtype=torch.float32, grad=True)
    assert saved_bytes(own, lambda: dispatch.conv(own, x))[1] == 0
    own.weight.requires_grad_(True)
    assert saved_bytes(own, lambda: dispatch.conv(own, x))[1] == x.nbytes


POOLS = [
    dict(zip(("kernel_size", "stride", "padding", "dilation", "ceil_mode"), options, strict=True))
    for options in itertools.product(
        [(3, 3), (2, 3)], [(2, 2), (3, 1)], [(1, 1), (0, 1)], [(1, 1), (2, 1)], [False, True]
    )
]


def test_max_pooling_has_the_gradient_of_its_function():
    """With windows that overlap, and values that are equal, of which PyTorch's own takes the gradient."""
    cases = 0
    for (options, size), layout in zip(
        itertools.product(POOLS, ((7, 6), (8, 9))), itertools.cycle(LAYOUTS), strict=False
    ):
        x = drawn(2, 3, *size, seed=cases, grad=True)
        equal = layout(x.detach().mul(2).round()).requires_grad_(True)
        found, wanted = MaxPool.apply(equal, options), F.max_pool2d(equal, **options)
        assert torch.equal(found, wanted)
        dy = rows(drawn(*wanted.shape, seed=1))
        (dx,), (wanted_dx,) = (torch.autograd.grad(y, equal, dy) for y in (found, wanted))
        assert distance(dx, wanted_dx) < 1e-15
        if cases % 9 == 0:
            assert gradcheck(lambda x_: MaxPool.apply(x_, options), (x,), **PRECISE)  # noqa: B023
        cases += 1
    assert cases == 32 * 2


@pytest.mark.parametrize("act", [k.RELU, k.RELU6], ids=["relu", "relu6"])
def test_pooled_norm_has_the_gradient_of_its_function(backend, act):
    """Where nothing in front trains: of gamma and beta, from nothing but the values that the pooling took."""
    cases = 0
    gamma, beta = drawn(3, seed=1, scale=3, grad=True), drawn(3, seed=2, shift=2, grad=True)
    for options, layout in itertools.product(POOLS, (rows, planes)):
        z = layout(drawn(2, 3, 7, 6, seed=cases))
        statistics = backends.of_layer(z, act).stats(z, False)

        def run(gamma, beta, z=z, statistics=statistics, options=options):
            maps = channel_maps(statistics, 1e-5, gamma, beta, k.INPUT)
            return PooledNorm.apply(z, gamma, beta, maps, Norm(act, k.INPUT, True, 84), options)

        wanted = F.max_pool2d(norm_act(act, True)(z, gamma, beta), **options)
        found = run(gamma, beta)
        assert torch.equal(found, wanted)
        dy = drawn(*found.shape, seed=1)
        for one, other in zip(*(torch.autograd.grad(y, (gamma, beta), dy) for y in (found, wanted)), strict=True):
            assert distance(one, other) < 1e-13
        if cases % 16 == 0:
            assert gradcheck(run, (gamma, beta), **PRECISE)
        cases += 1
    assert cases == 64


def test_global_pooling_has_the_gradient_of_its_function():
    x = drawn(2, 3, 5, 4, grad=True)
    for adaptive in (True, False):
        plain = F.adaptive_avg_pool2d(x, 1) if adaptive else F.avg_pool2d(x, (5, 4))
        assert torch.equal(GlobalPool.apply(x, adaptive), plain)
        assert gradcheck(lambda x_: GlobalPool.apply(x_, adaptive), (x,), **PRECISE)  # noqa: B023


@pytest.mark.parametrize("act", ACTS)
def test_layer_norm_and_group_norm_have_the_gradient_of_their_function(act):
    cases = 0
    shapes = {0: ((4, 6), (2, 2, 4)), 1: ((2, 4, 3),), 2: ((2, 4, 2, 2),), 4: ((2, 4, 3),)}
    for groups, (gammas, betas) in itertools.product(shapes, (*KINDS[:4], ("trains", None))):
        for shape in shapes[groups]:
            channels = shape[1] if groups else shape[-1]
            gamma, beta = trainable(gammas, channels, 1, 4), trainable(betas, channels, 2)
            z = drawn(*shape, seed=3, grad=True)

            def run(z, gamma, beta, groups=groups):
                return RowNorm.apply(z, gamma, beta, groups, 1e-5, act, k.INPUT)

            plain = F.group_norm(z, groups, gamma, beta) if groups else F.layer_norm(z, (channels,), gamma, beta)
            assert torch.equal(run(z, gamma, beta), portable.activate(plain, act))
            assert gradcheck(run, (z, gamma, beta), **PRECISE)
            cases += 1
    assert cases == 25


def test_layer_norm_of_images_has_the_gradient_of_its_function():
    own = timm_layers.LayerNormAct2d(4, act_layer=nn.GELU).double()
    for layout in LAYOUTS:
        x = layout(drawn(2, 4, 3, 2)).requires_grad_(True)
        assert distance(dispatch.norm("exact", own, None, x), own(x)) < 1e-15
        assert gradcheck(lambda x_, *_: dispatch.norm("exact", own, None, x_), (x, *own.parameters()), **PRECISE)


def test_relu_that_keeps_a_bit_has_the_gradient_of_its_function():
    for act, layout in itertools.product((k.RELU, k.RELU6), LAYOUTS):
        x = layout(drawn(3, 5, 3, 3, scale=4)).requires_grad_(True)
        assert torch.equal(KeptAct.apply(x, act), portable.activate(x, act))
        assert gradcheck(lambda x_: KeptAct.apply(x_, act), (x,), **PRECISE)  # noqa: B023


# Exact in float32: no further from float64 than PyTorch's own layers.


def plain_block(norm, act, z, residual):
    y = norm(z)
    return LAYERS[act]()(y if residual is None else y + residual)


def gradients(run, z, residual, norm, dy):
    """Return the output and the gradients of z, gamma, beta and the residual."""
    z = z.detach().requires_grad_(True)
    residual = None if residual is None else residual.detach().requires_grad_(True)
    y = run(z, residual)
    leaves = [z, norm.weight, norm.bias] + ([] if residual is None else [residual])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("act", LAYERS, ids=[layer.__name__ for layer in LAYERS.values()])
def test_float32_is_as_near_to_float64_as_pytorch_in_every_layout(backend, act):
    """Input, residual and gradient each channels_last, contiguous or in neither layout; odd channels, rows by no 8.

    An error of at most twice PyTorch's own, and of three roundings of the size of the terms where its own is less.
    """
    cases = 0
    for channels, adds in itertools.product((1, 3, 5, 130), (False, True)):
        shape = (3, channels, 5, 7)
        norm = nn.BatchNorm2d(channels)
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
        nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(2))
        z, residual, dy = (drawn(*shape, seed=seed, dtype=torch.float32, shift=seed) for seed in range(3))
        residual = residual if adds else None
        precise = copy.deepcopy(norm).double()
        wide = [None if t is None else t.double() for t in (z, residual)]
        exact = gradients(lambda z, r: plain_block(precise, act, z, r), *wide, precise, dy.double())  # noqa: B023
        terms = (dy * F.batch_norm(wide[0], None, None, training=True)).abs(), dy.double().abs()
        sizes = [exact[0], exact[1], *(term.sum((0, 2, 3)) for term in terms), *exact[4:]]
        own = gradients(lambda z, r: plain_block(norm, act, z, r), z, residual, norm, dy)  # noqa: B023
        for layout_z, layout_dy, layout_r in itertools.product(LAYOUTS, LAYOUTS, LAYOUTS if adds else (rows,)):
            found = gradients(
                lambda z, r: dispatch.norm("exact", norm, act, z, r),  # noqa: B023
                layout_z(z), layout_r(residual) if adds else None, norm, layout_dy(dy),
            )  # fmt: skip
            for a, b, c, size in zip(found, own, exact, sizes, strict=True):
                assert (a - c).norm() < 2 * (b - c).norm() + 4e-7 * size.norm()
            cases += 1
    assert cases == 4 * (9 + 27)


def test_a_mask_read_in_another_layout_would_be_found(monkeypatch):
    """The comparison above sees the error it is there for: bits packed for one layout, read for the other."""
    monkeypatch.setattr(cpp, "loaded", False)
    norm, z, dy = (
        nn.BatchNorm2d(3),
        drawn(2, 3, 5, 7, dtype=torch.float32),
        drawn(2, 3, 5, 7, dtype=torch.float32, seed=1),
    )
    run = lambda z, r: dispatch.norm("rounded", norm, k.RELU, z, r)  # noqa: E731
    right = gradients(run, z, None, norm, dy)
    unpack = portable.unpack
    turned = lambda packed, shape: unpack(packed, torch.Size([2, 5, 7, 3])).permute(0, 3, 1, 2)  # noqa: E731
    monkeypatch.setattr(portable, "unpack", turned)
    wrong = gradients(run, z, None, norm, dy)
    assert all(distance(a, b) > 0.1 for a, b in zip(wrong[1:], right[1:], strict=True))


# Rounded and smallest.


def test_what_is_kept_is_off_by_half_a_step_at_most(backend):
    """Normalised input and activation's input from what was kept, in float64; a constant channel's are exact."""
    z = torch.cat([drawn(4, 5, 6, 7, scale=3, shift=10), torch.full((4, 1, 6, 7), 10.0).double()], 1)
    gamma, beta = drawn(6, seed=1), drawn(6, seed=2)
    statistics = backends.of_layer(z, k.IDENTITY).stats(z, True)
    x = F.batch_norm(z, None, None, training=True)
    u = F.batch_norm(z, None, None, gamma, beta, training=True)
    spread = (x.amax((0, 2, 3)) - x.amin((0, 2, 3))) / 255
    for keep in (k.INPUT, k.BFLOAT16, k.BYTE):
        table = channel_maps(statistics, 1e-5, gamma, beta, keep)
        _, kept, _ = backends.of_layer(z, k.IDENTITY).forward(z, None, table, k.IDENTITY, keep, False)
        kept = (z if keep == k.INPUT else kept).double()
        slope, level, zero, step = (line.view(1, -1, 1, 1) for line in table[4:])
        half = {k.INPUT: 0 * x, k.BFLOAT16: x.abs() / 256, k.BYTE: spread.view(1, -1, 1, 1) / 2}[keep] + 1e-12
        assert (((kept - zero) * step - x).abs() <= half).all()
        assert ((kept * slope + level - u).abs() <= half * gamma.abs().view(1, -1, 1, 1) + 1e-12).all()


class Chain(nn.Module):
    """Frozen convolutions, norm layers and residuals, as a residual network has them; plain, or lean at a level."""

    def __init__(self, channels=16, level=None, blocks=3, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.level = level
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2 * blocks + 1))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2 * blocks))
        self.head = nn.Linear(channels, 10)
        for norm in self.norms:
            nn.init.normal_(norm.weight, 1, 0.3)
            nn.init.normal_(norm.bias, 0, 0.3)
        for part in (self.stem, self.convs, self.head):
            part.requires_grad_(False)

    def forward(self, x):
        level, acts = self.level, (F.relu, F.silu) * len(self.norms)
        if level is None:
            h = F.relu(self.norms[0](self.stem(x)))
            for i in range(0, len(self.convs), 2):
                inner = acts[i // 2](self.norms[i + 1](self.convs[i](h)))
                h = F.relu(self.norms[i + 2](self.convs[i + 1](inner)) + h)
            return self.head(h.mean((2, 3)))
        codes = (k.RELU, k.SILU) * len(self.norms)
        h = dispatch.norm(level, self.norms[0], k.RELU, dispatch.conv(self.stem, x))
        for i in range(0, len(self.convs), 2):
            z, (one, two), last = dispatch.conv(self.convs[i], h), self.norms[i + 1 : i + 3], self.convs[i + 1]
            if level == "smallest":
                h = dispatch.pair(level, one, codes[i // 2], last, two, k.RELU, z, h)
            else:
                h = dispatch.norm(
                    level, two, k.RELU, dispatch.conv(last, dispatch.norm(level, one, codes[i // 2], z)), h
                )
        return self.head(dispatch.avg_pool(h, h.shape[-2:]).flatten(1))


def trained(level, dtype=torch.float32, **kwargs):
    """Return a chain's output, its gradients of the images, all gammas and all betas, and its running statistics."""
    chain = Chain(level=level, **kwargs).to(dtype)
    images = rows(drawn(16, 3, 12, 12, dtype=torch.float32).to(dtype)).requires_grad_(True)
    logits = chain(images)
    F.cross_entropy(logits, torch.arange(16) % 10).backward()
    gammas, betas = (torch.cat([getattr(norm, name).grad for norm in chain.norms]) for name in ("weight", "bias"))
    return logits.detach(), (images.grad, gammas, betas), dict(chain.named_buffers())


def errors(level, **kwargs):
    """Return how far a chain's gradients are from float64's: the images', gammas' and betas', the worst of 5 draws."""
    found = []
    for seed in range(5):
        _, wanted, _ = trained(None, dtype=torch.float64, seed=seed, **kwargs)
        _, got, _ = trained(level, seed=seed, **kwargs)
        found.append([distance(a, b) for a, b in zip(got, wanted, strict=True)])
    return [max(column) for column in zip(*found, strict=True)]


@pytest.mark.parametrize("channels", [3, 5, 16])
def test_a_chains_float32_gradients_are_as_near_to_float64_as_pytorchs(backend, channels):
    """At most twice as far."""
    for error, own in zip(errors("exact", channels=channels), errors(None, channels=channels), strict=True):
        assert error < 2 * own


def test_rounding_changes_neither_outputs_nor_running_statistics(backend):
    logits, _, statistics = trained("exact")
    assert len(statistics) == 3 * 7
    for level in ("rounded", "smallest"):
        found, _, found_statistics = trained(level)
        assert torch.equal(found, logits)
        assert all(torch.equal(found_statistics[name], value) for name, value in statistics.items())


# Level: how far the gradients of the images, gammas and betas may be from exact ones, as a share of them: about twice
# what was measured, which is 0.05, 0.13 and 0.02 % in bfloat16, and 0.5, 0.8 and 0.15 % in 8 bits.
BOUNDS = {"rounded": (0.001, 0.0026, 0.0004), "smallest": (0.01, 0.015, 0.003)}


@pytest.mark.parametrize("level", BOUNDS)
def test_errors_of_rounding_are_within_measured_bounds(backend, level):
    """And not far within: a bound that nothing could exceed would say nothing."""
    found = errors(level)
    assert all(bound / 4 < error < bound for error, bound in zip(found, BOUNDS[level], strict=True)), found


@pytest.mark.parametrize("act", [k.RELU, k.RELU6], ids=["relu", "relu6"])
def test_masks_are_exact_at_every_level(backend, act):
    """A residual's gradient is the output's behind the mask: the same bits, whatever is kept of the norm's input."""
    norm, shape = nn.BatchNorm2d(5), (3, 5, 7, 3)
    z, residual, dy = (drawn(*shape, seed=seed, dtype=torch.float32, scale=4) for seed in range(3))
    exact = plain_block(norm, act, z, residual)
    for level, layout in itertools.product(LEVELS, LAYOUTS):
        found = gradients(lambda z, r: dispatch.norm(level, norm, act, z, r), z, residual, norm, layout(dy))  # noqa: B023
        assert torch.equal(found[4], dy * ((exact > 0) & (exact < 6) if act == k.RELU6 else exact > 0))


@pytest.mark.parametrize("kind", ["LayerNorm", "GroupNorm", "LayerNorm2d"])
@pytest.mark.parametrize("level", ["rounded", "smallest"])
def test_rows_are_rounded_within_measured_bounds(kind, level):
    """LayerNorm and GroupNorm before GELU: outputs are exact's to the bit, gradients as far off as BatchNorm's."""
    layers = {
        "LayerNorm": nn.LayerNorm(32),
        "GroupNorm": nn.GroupNorm(4, 32),
        "LayerNorm2d": timm_layers.LayerNorm2d(32),
    }
    own, shape = layers[kind], (4, 50, 32) if kind == "LayerNorm" else (4, 32, 7, 7)
    nn.init.normal_(own.weight, 1, 0.3, generator=torch.Generator().manual_seed(0))
    z, dy = drawn(*shape, dtype=torch.float32), drawn(*shape, seed=1, dtype=torch.float32)
    wanted = gradients(lambda z, _: F.gelu(own(z)), z, None, own, dy)
    exact = gradients(lambda z, _: dispatch.norm("exact", own, k.GELU, z), z, None, own, dy)
    found = gradients(lambda z, _: dispatch.norm(level, own, k.GELU, z), z, None, own, dy)
    assert torch.equal(found[0], exact[0])
    assert max(distance(a, b) for a, b in zip(exact, wanted, strict=True)) < 1e-6
    bound = {"rounded": 0.003, "smallest": 0.012}[level]
    shares = [distance(a, b) for a, b in zip(found[1:], wanted[1:], strict=True)]
    assert bound / 20 < max(shares) < bound, shares


def test_activations_and_attention_are_rounded_within_measured_bounds():
    """At "smallest", where 8 bits are kept of an activation's input, of q, k and v; outputs are PyTorch's bits."""
    x, dy = (drawn(3, 40, 64, seed=seed, dtype=torch.float32) for seed in (0, 1))
    shares = []
    for act in (k.SILU, k.HARDSWISH, k.GELU, k.GELU_TANH):
        x.requires_grad_(True)
        found, wanted = KeptAct.apply(x, act), portable.activate(x, act)
        assert torch.equal(found, wanted)
        shares.append(distance(*(torch.autograd.grad(y, x, dy)[0] for y in (found, wanted))))
    qkv = [drawn(2, 3, 20, 16, seed=seed, dtype=torch.float32, grad=True) for seed in range(3)]
    found, wanted = RoundedAttention.apply(*qkv, 0.25), F.scaled_dot_product_attention(*qkv, scale=0.25)
    assert torch.equal(found, wanted)
    dy = drawn(*wanted.shape, seed=3, dtype=torch.float32)
    pairs = zip(*(torch.autograd.grad(y, qkv, dy) for y in (found, wanted)), strict=True)
    shares += [distance(a, b) for a, b in pairs]
    assert len(shares) == 7
    assert all(1e-4 < share < 0.02 for share in shares), shares


# What a layer does besides.


@pytest.mark.parametrize("level", LEVELS)
def test_running_statistics_are_those_of_nn_batch_norm(backend, level):
    """Once a forward, also where backward computes a convolution again; not in evaluation mode."""
    cases = 0
    settings = [{}, {"momentum": 0.3}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}]
    for options, paired in itertools.product(settings, (False, True)):
        conv = nn.Conv2d(4, 6, 3).requires_grad_(False)
        lean = nn.ModuleList([nn.BatchNorm2d(4, **options), nn.BatchNorm2d(6, **options)])
        plain = copy.deepcopy(lean)
        for step in range(3):
            x = drawn(3, 4, 5, 6, seed=step, shift=step, dtype=torch.float32, grad=True)
            for norms, level_ in ((plain, None), (lean, level)):
                norms.train(step < 2)
                if level_ is None:
                    y = norms[1](conv(norms[0](x).relu())).relu()
                elif paired:
                    y = dispatch.pair(level_, norms[0], k.RELU, conv, norms[1], k.RELU, x)
                else:
                    h = dispatch.norm(level_, norms[0], k.RELU, x)
                    y = dispatch.norm(level_, norms[1], k.RELU, dispatch.conv(conv, h))
                y.sum().backward()
            assert lean.state_dict().keys() == plain.state_dict().keys()
            for (name, found), wanted in zip(lean.state_dict().items(), plain.state_dict().values(), strict=True):
                assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6), name
                assert "batches" not in name or found == min(step + 1, 2)
        cases += 1
    assert cases == 10


def test_what_batch_norm_refuses_is_refused_in_its_words(backend):
    """One value per channel in training mode, or an input of another dimension; in evaluation one is fine."""
    cases = 0
    for own, shape in [
        (nn.BatchNorm2d(3), (1, 3, 1, 1)), (nn.BatchNorm1d(3), (1, 3)), (nn.BatchNorm1d(3), (1, 3, 1)),
        (nn.BatchNorm2d(3), (3, 3, 3)), (nn.BatchNorm1d(3), (2, 3, 3, 3)),
    ]:  # fmt: skip
        before = copy.deepcopy(own.state_dict())
        with pytest.raises(ValueError, match="xpected") as wanted:
            copy.deepcopy(own)(torch.zeros(shape))
        with pytest.raises(ValueError, match="xpected") as found:
            dispatch.norm("exact", own, None, torch.zeros(shape))
        assert str(found.value) == str(wanted.value)
        assert all(torch.equal(own.state_dict()[name], value) for name, value in before.items())
        cases += 1
    assert cases == 5
    one = torch.ones(1, 3, 1, 1)
    assert torch.allclose(dispatch.norm("exact", nn.BatchNorm2d(3).eval(), None, one), one, atol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_a_residual_of_another_shape_or_type_is_added_as_pytorch_adds_it(backend, level):
    """Broadcast both ways, and promoted: kernels, which know neither, would read beyond the end of the smaller one."""
    one, two, conv = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    x = drawn(2, 4, 5, 5, dtype=torch.float32)
    residuals = [drawn(1, 4, 1, 1), drawn(4, 1, 1), drawn(2, 2, 4, 5, 5), drawn(2, 4, 5, 5)]
    for residual, dtype in itertools.product(residuals, (torch.float32, torch.float64, torch.bfloat16)):
        residual = residual.to(dtype).requires_grad_(True)
        x_ = x.clone().requires_grad_(True)
        wanted = (copy.deepcopy(two)(conv(copy.deepcopy(one)(x_).relu())) + residual).relu()
        h = dispatch.norm(level, one, k.RELU, x_)
        for found in (
            dispatch.norm(level, two, k.RELU, conv(h), residual),
            dispatch.pair(level, one, k.RELU, conv, two, k.RELU, x_, residual),
        ):
            assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
            assert distance(found, wanted) < (1e-6 if found.dtype != torch.bfloat16 else 5e-3)
            grads = (torch.autograd.grad(y.sum(), (residual, x_), retain_graph=True) for y in (found, wanted))
            (a, a_x), (b, b_x) = grads
            assert (a.shape, a.dtype) == (residual.shape, dtype)
            assert distance(a, b) < 0.02
            assert (a_x - b_x).norm() < 0.05 * b_x.norm() + 1e-3


def test_without_a_gradient_for_the_input_nothing_is_computed_for_one(cpp, monkeypatch):
    """No sum of gradients is written, and processes that share statistics exchange none."""
    asked, exchanged = [], []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            asked.extend([args[5]] if operator is torch.ops.bnaa.sums.default else [])
            return operator(*args, **(kwargs or {}))

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **kwargs: exchanged.append(args))
    for grad in (False, True):
        z, gamma, beta = drawn(2, 3, 4, 4, grad=grad), drawn(3, grad=True), drawn(3, grad=True)
        maps = channel_maps(torch.ones(2, 3, dtype=z.dtype), 1e-5, gamma, beta, k.INPUT)
        both = NormAct.apply(
            z, gamma, beta, None, maps, Norm(k.RELU, k.INPUT, True, 32, group="some", two_outputs=True)
        )
        with Recorded():
            (both[0] + both[1]).sum().backward()
        assert asked == [False, True][: grad + 1]
        assert len(exchanged) == grad


@pytest.mark.parametrize("layer", [nn.ReLU, nn.GELU])
def test_an_activation_keeps_the_layout_of_images_and_rounds_along_their_channels(layer):
    for layout, short in ((rows, 2 * 7 * 5), (planes, 2 * 16 * 7)):
        x = layout(drawn(2, 16, 7, 5, dtype=torch.float32)).requires_grad_(True)
        y, saved = saved_bytes(nn.Identity(), partial(dispatch.activation, "smallest", layer(), x))
        (dx,) = torch.autograd.grad(y, x, layout(torch.ones_like(y)))
        wanted = layer()(x)
        (wanted_dx,) = torch.autograd.grad(wanted, x, torch.ones_like(x))
        assert distance(y, wanted) < 1e-6
        assert distance(dx, wanted_dx) < 0.01
        assert y.stride() == dx.stride() == x.stride()
        assert saved == (x.numel() // 8 if layer is nn.ReLU else x.numel() + 8 * short)


@pytest.mark.parametrize("level", ["rounded", "smallest"])
def test_under_autocast_rows_have_the_type_that_pytorchs_have(backend, level):
    """On a CPU they stay in half precision, on a GPU they do not."""
    norms = nn.LayerNorm(32), nn.GroupNorm(4, 32), nn.LayerNorm(32, elementwise_affine=False)
    for own, shape in zip(norms, ((4, 5, 32), (4, 32, 3, 3), (4, 5, 32)), strict=True):
        x, dy = drawn(*shape, dtype=torch.bfloat16), drawn(*shape, seed=1, dtype=torch.bfloat16)
        found = []
        for run in (own, lambda x, own=own: dispatch.norm(level, own, None, x)):
            x_ = x.detach().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                y = run(x_)
            found.append((y, *torch.autograd.grad(y, (x_, *own.parameters()), dy)))
        assert found[1][0].dtype == found[0][0].dtype == torch.bfloat16
        assert all(distance(ours, plain) < 0.02 for plain, ours in zip(*found, strict=True))
