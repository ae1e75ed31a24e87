"""The kernels of a GPU compute what PyTorch's operators do, without a GPU in Triton's interpreter; and they compile."""

import itertools
import json
import logging
import os
import subprocess
import sys

import lean_tensors
import pytest
import timm
import torch
from lean_tensors import ACTS, LAYOUTS, channel_maps, distance, planes, rows, strided, table, terms
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model
from bn_affine_adapters.lean import lean_, saved_bytes
from bn_affine_adapters.lean.backends import cpp, gpu, of_layer, of_layer_norm, portable
from bn_affine_adapters.lean.backends.constants import (
    BFLOAT16,
    BYTE,
    IDENTITY,
    INPUT,
    MASKED,
    NOTHING,
    RELU,
    RELU6,
    SILU,
    wide,
)
from bn_affine_adapters.lean.batch_norm import Norm, NormAct, gradient_terms
from bn_affine_adapters.lean.row_norm import KeptAct, RoundedAttention, RoundedLayerNorm, RowNorm
from bn_affine_adapters.norms.find import norm_layers

pytest.importorskip("triton", reason="Triton comes with PyTorch on Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there conftest lets Triton interpret
# A unit in the last place: the interpreter cuts bfloat16 off.
CLOSE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 2**-7, torch.float16: 1e-3}
# Each with channels, rows or pixels that fill no tile; the last is not of images.
SHAPES = ((2, 5, 3, 7), (1, 130, 3, 3), (67, 9))


@pytest.fixture(scope="module")
def ops():
    assert gpu.load()
    return torch.ops.bnaa_triton


@pytest.fixture
def chosen(ops, monkeypatch):
    """Let lean training take these kernels here, whatever the device."""
    monkeypatch.setattr(cpp, "loaded", False)
    monkeypatch.setattr(gpu, "loaded", True)
    monkeypatch.setattr(gpu, "DEVICE", DEVICE)
    return ops


def drawn(shape, dtype, seed=0):
    return lean_tensors.drawn(*(shape if isinstance(shape, tuple) else (shape,)), seed=seed).to(DEVICE, dtype)


def columns(z, *seeds):
    return [drawn(z.shape[1], wide(z.dtype), seed) for seed in seeds]


@pytest.mark.parametrize("act", ACTS)
def test_every_kernel_agrees_with_pytorchs_operators(ops, act):
    cases = itertools.product(CLOSE, SHAPES)
    ways = itertools.cycle(itertools.product((BYTE, BFLOAT16, INPUT, NOTHING), (planes, rows)))
    for (dtype, shape), (keep, layout) in zip(cases, ways, strict=False):
        z, dy, close = layout(drawn(shape, dtype, 1)), drawn(shape, dtype, 2), CLOSE[dtype]
        slope, offset, by, along = columns(z, 3, 4, 5, 6)
        statistics = ops.stats(z, True)
        assert distance(statistics, portable.stats(z, True)) < CLOSE[statistics.dtype]
        assert torch.equal(statistics[:2], ops.stats(z, False))
        zero, step = statistics[0], 255 / (statistics[3] - statistics[2]) if keep == BYTE else slope.abs()
        maps, masked = table(slope, offset, zero, step, by), act in MASKED
        for residual in (None, dy, z) if masked else (None,):
            args = (z, residual, table(slope, offset, zero, step), act, keep, masked)
            (y, kept, mask), (wanted, wanted_kept, wanted_mask) = ops.forward(*args), portable.forward(*args)
            assert distance(y, wanted) < close
            assert (y.dtype, kept.dtype) == (dtype, torch.uint8 if keep == BYTE else torch.bfloat16)
            assert kept.numel() == (z.numel() if keep in (BYTE, BFLOAT16) else 0)
            if kept.numel():
                unit = 1 if keep == BYTE else wanted_kept.double().abs() / 2**7
                assert ((kept.double() - wanted_kept.double()).abs() <= unit).all()
            seen = kept if kept.numel() else z
            bits = (mask, wanted_mask) if masked else (None, None)
            dy2 = None if residual is None else strided(residual)
            found, expected = (
                [*side.sums(dy, seen, each, maps, act, True, dy2),
                 side.input_gradient(dy, seen, each, maps, act, terms(along, offset))]
                for side, each in zip((ops, portable), bits, strict=True)
            )  # fmt: skip
            bounds = (10 * CLOSE[statistics.dtype], close, close)
            assert all(distance(*pair) < bound for *pair, bound in zip(found, expected, bounds, strict=True))
            assert not ops.sums(dy, seen, bits[0], maps, act, False)[1].numel()
            assert distance(ops.restore(seen, maps, act), portable.restore(seen, maps, act)) < 2e-6


def test_an_unknown_activation_does_not_compile_and_is_left_to_pytorch(chosen, monkeypatch):
    z, maps = drawn((2, 3, 4, 4), torch.float32), torch.ones(8, 3, device=DEVICE)
    assert of_layer(z, SILU) is chosen
    assert of_layer(z, "mish") is None
    monkeypatch.setitem(portable.ACTIVATIONS, "mish", portable.ACTIVATIONS[SILU])
    assert of_layer(z, "mish") is portable
    for call in (
        lambda: chosen.forward(z, None, maps, "mish", INPUT, False),
        lambda: chosen.sums(z, z, None, maps, "mish", False),
        lambda: chosen.restore(z, maps, "mish"),
    ):
        with pytest.raises(Exception, match="no kernel for this activation"):
            call()


@pytest.mark.parametrize("layout", [planes, rows])
def test_statistics_of_many_parts_are_those_of_float64(ops, layout):
    """Of channels far from zero too: more than one chunk of rows, the last one short, and planes of several tiles."""
    z = layout(drawn((15, 3, 13, 17), torch.float32) + torch.tensor([0.0, 1e3, -1e4], device=DEVICE).view(1, 3, 1, 1))
    found, wanted = ops.stats(z, True), portable.stats(z.double(), True)
    assert ((found[0] - wanted[0]).abs() < 1e-6 * wanted[0].abs() + 1e-6).all()
    assert ((found[1] - wanted[1]).abs() < 1e-5 * wanted[1]).all()
    assert torch.equal(found[2:].double(), wanted[2:])


@pytest.mark.parametrize(("forward", "backward"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_a_mask_is_read_as_it_was_written_whatever_the_gradients_layout(ops, forward, backward):
    z, dy = drawn((3, 5, 4, 3), torch.float64, 1), drawn((3, 5, 4, 3), torch.float64, 2)
    slope, offset = columns(z, 3, 4)
    maps = table(slope, offset, by=torch.ones_like(slope))
    for act in (RELU, RELU6):
        _, _, mask = ops.forward(forward(z), None, table(slope, offset), act, NOTHING, True)
        wanted = dy * portable.passes(z * slope.view(1, -1, 1, 1) + offset.view(1, -1, 1, 1), act)
        assert torch.equal(ops.sums(backward(dy), backward(dy), mask, maps, act, True)[1], wanted)
        assert torch.equal(ops.input_gradient(backward(dy), forward(z), mask, maps, act, 0 * maps[:3]), wanted)


ROWS = ((67, 9), (3, 5, 130), (2, 1, 1), (2100, 8))  # the last in several tiles a program


def derived(function, *given, dtype=None):
    """Return what a function returns and its gradients."""
    given = [t.detach().to(dtype or t.dtype).requires_grad_() for t in given]
    y = function(*given)
    dy = drawn(y.shape, torch.float64, 9).to(given[0].dtype)
    return [y.detach(), *torch.autograd.grad(y, given, strided(dy) if dy.dim() == 2 else dy)]


@pytest.mark.parametrize("keep", [BFLOAT16, BYTE], ids=["bfloat16", "byte"])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_layer_norm_agrees_with_pytorchs_in_float64(chosen, monkeypatch, dtype, keep):
    # What is kept may be rounded to the other side where the normalised input differs in its last digit; bfloat16 is
    # cut off by the interpreter.
    allowed = max(CLOSE[dtype], 2**-7 if keep == BFLOAT16 else 2e-3)
    for shape in ROWS:
        z, gamma, beta = drawn(shape, dtype, 1) * 3 + 1, drawn(shape[-1], dtype, 2), drawn(shape[-1], dtype, 3)
        assert of_layer_norm(z) is torch.ops.bnaa_triton
        found = derived(lambda *given: RoundedLayerNorm.apply(*given, 1e-5, keep), z, gamma, beta)
        with monkeypatch.context() as without:
            without.setattr(gpu, "loaded", False)
            wanted = derived(
                lambda *given: RowNorm.apply(*given, 0, 1e-5, IDENTITY, keep), z, gamma, beta, dtype=torch.float64
            )
        if shape[-1] > 1:  # else there is no variance
            assert distance(found[0], wanted[0]) < max(CLOSE[dtype], 1e-12)
            assert all(distance(*pair) < allowed for pair in zip(found[1:], wanted[1:], strict=True))
        assert found[0].dtype == dtype
        assert torch.isfinite(found[1]).all()


@pytest.mark.parametrize("act", [act for act in ACTS if act not in MASKED])
def test_activations_and_rows_kept_in_8_bits_agree_with_pytorchs_operators(chosen, monkeypatch, act):
    for dtype, shape in itertools.product(CLOSE, ROWS):
        x = drawn(shape, dtype, 1) * 3
        for layout in (planes, strided):
            found = derived(lambda x: KeptAct.apply(x, act), layout(x))
            with monkeypatch.context() as without:
                without.setattr(gpu, "loaded", False)
                wanted = derived(lambda x: KeptAct.apply(x, act), layout(x), dtype=torch.float64)
            assert distance(found[0], wanted[0]) < CLOSE[dtype]
            assert distance(found[1], wanted[1]) < max(CLOSE[dtype], 1e-5)  # 8 bits that are another's by one
            assert found[0].dtype == found[1].dtype == dtype


def test_attention_keeps_rows_in_8_bits(chosen):
    qkv = [drawn((2, 3, 20, 16), torch.float32, seed) for seed in range(3)]
    saved = saved_bytes(nn.Module(), lambda: RoundedAttention.apply(*(t.requires_grad_() for t in qkv), 0.25))[1]
    assert saved == sum(t.numel() + t.numel() // 16 * 8 for t in qkv)
    found = derived(lambda *given: RoundedAttention.apply(*given, 0.25), *qkv)
    wanted = derived(lambda *given: F.scaled_dot_product_attention(*given, scale=0.25), *qkv)
    assert torch.equal(found[0], wanted[0])
    assert all(1e-4 < distance(*pair) < 0.02 for pair in zip(found[1:], wanted[1:], strict=True))


def test_rows_that_fit_no_program_are_left_to_pytorch(chosen):
    assert of_layer_norm(torch.zeros(2, gpu.LONGEST, device=DEVICE)) is torch.ops.bnaa_triton
    assert of_layer_norm(torch.zeros(2, gpu.LONGEST + 1, device=DEVICE)) is None
    empty = derived(
        lambda *given: RoundedLayerNorm.apply(*given, 1e-5, BYTE), *(torch.zeros(s) for s in ((0, 5), 5, 5))
    )
    assert not empty[2].any()


def test_the_arithmetic_of_channels_agrees_with_pytorchs_operators(chosen, monkeypatch):
    cases = list(itertools.product((torch.float32, torch.float64), (1, 3, 300), (BFLOAT16, BYTE, INPUT, NOTHING)))
    for dtype, channels, keep in cases:
        statistics = drawn((4, channels), dtype).abs().cumsum(0)  # a variance, and the least value below the greatest
        statistics[:, 0] = 0  # a constant channel
        gamma, beta, product, dbeta = (drawn(channels, dtype, seed) for seed in range(1, 5))
        for given in ((gamma, beta), (gamma.bfloat16(), None), (None, None)):
            for of_batch, values in ((True, 77), (True, 1), (False, 77)):
                norm, found = Norm(RELU, keep, of_batch, values), []
                for there in (True, False):
                    monkeypatch.setattr(gpu, "loaded", there)
                    maps = channel_maps(statistics[: 4 if keep == BYTE else 2], 1e-5, *given, keep)
                    found.append([maps, gradient_terms(torch.stack([dbeta, product]), maps, norm)])
                for ours, theirs in zip(*found, strict=True):
                    assert ((ours - theirs).abs() <= 4 * torch.finfo(dtype).eps * theirs.abs()).all()
    assert len(cases) == 24


def test_what_is_not_a_number_stays_so_and_what_is_masked_is_zero(ops):
    maps, zero = torch.ones(8, 3, device=DEVICE), torch.zeros(2, 3, 2, 2, device=DEVICE)
    nan, infinite = zero + float("nan"), zero + float("inf")
    for act in ACTS:
        assert ops.forward(nan, None, maps, act, NOTHING, False)[0].isnan().all()
    _, _, mask = ops.forward(-infinite, None, maps, RELU, NOTHING, True)
    assert not ops.sums(infinite, nan, mask, maps, RELU, True)[1].any()


def test_compilers_are_told_the_shapes_that_the_operators_return(ops):
    for layout, shape in ((rows, SHAPES[0]), (planes, SHAPES[0]), (planes, SHAPES[2])):
        z = layout(drawn(shape, torch.float32))
        maps = table(*columns(z, 3, 4))
        _, kept, mask = ops.forward(z, None, maps, RELU, BFLOAT16, True)
        calls = {
            ops.stats: (z, True),
            ops.forward: (z, z, maps, RELU, BYTE, True),
            ops.sums: (strided(z), kept, mask, maps, RELU, True, z),
            ops.input_gradient: (z, kept, mask, maps, RELU, maps[:3]),
            ops.restore: (kept, maps, SILU),
        }
        for operator, args in calls.items():
            torch.library.opcheck(operator.default, args, test_utils=("test_schema", "test_faketensor"))
    statistics = ops.stats(z, True)
    args = (statistics, 1e-5, maps[0], None, BYTE)
    torch.library.opcheck(ops.channel_maps.default, args, test_utils=("test_faketensor",))
    args = (statistics[:2], ops.channel_maps(*args), 7, True)
    torch.library.opcheck(ops.gradient_terms.default, args, test_utils=("test_faketensor",))
    x, gamma = drawn((4, 7, 9), torch.float32), drawn(9, torch.float32)
    for keep in (BFLOAT16, BYTE):
        _, *kept = ops.row_forward(x, gamma, gamma, 1e-5, keep)
        torch.library.opcheck(ops.row_forward.default, (x, gamma, gamma, 1e-5, keep), test_utils=("test_faketensor",))
        torch.library.opcheck(ops.row_backward.default, (x, *kept, gamma), test_utils=("test_faketensor",))
    kept, scale, _ = ops.keep_rows(x, SILU, False)
    torch.library.opcheck(ops.keep_rows.default, (x, SILU, True), test_utils=("test_faketensor",))
    args = (kept, scale, x, SILU, torch.bfloat16)
    torch.library.opcheck(ops.restore_rows.default, args, test_utils=("test_faketensor",))


@pytest.mark.parametrize("layout", [rows, pytest.param(planes, marks=pytest.mark.slow)])
def test_one_graph_serves_images_of_every_number_and_size(chosen, layout):
    gamma, beta = (torch.full((3,), value, device=DEVICE, requires_grad=True) for value in (0.7, 0.1))

    def run(z):
        maps = channel_maps(of_layer(z, RELU).stats(z.detach(), False), 1e-5, gamma, beta, BFLOAT16)
        return NormAct.apply(z, gamma, beta, None, maps, Norm(RELU, BFLOAT16, True, z.numel() // 3))

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, backend=counter, dynamic=True, fullgraph=True)
    try:
        for count, size in ((4, 6), (5, 7), (7, 40)):
            found = []
            for function in (run, compiled):
                z = layout(drawn((count, 3, size, size), torch.float32)).requires_grad_()
                y = function(z)
                found.append((y, *torch.autograd.grad(y.square().sum(), (z, gamma, beta))))
            assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
        assert counter.frame_count == 1
    finally:
        torch.compiler.reset()


CASES = (
    ("test_resnet", "exact", 1e-8, planes),
    ("test_resnet", "smallest", 0.05, rows),
    ("test_vit", "smallest", 0.05, rows),
)


@pytest.mark.parametrize(("name", "level", "bound", "layout"), CASES)
def test_a_network_has_the_gradients_of_plain_freezing(chosen, name, level, bound, layout):
    settings = {"img_size": 32} if name == "test_vit" else {}
    size = settings.get("img_size", 16)
    images, labels = layout(drawn((3, 3, size, size), torch.float64)), torch.tensor([0, 1, 2], device=DEVICE)
    found = []
    for lean in (None, level):
        network = timm.create_model(name, num_classes=3, **settings).to(DEVICE, torch.float64)
        config = BNOnlyConfig(seed=0, lean=lean, model_args=settings, data_config={"input_size": [3, size, size]})
        model = get_bn_only_model(network, config).train()
        F.cross_entropy(model(images), labels).backward()
        layers = norm_layers(model, active=True).values()
        trained = [t.grad.flatten() for each in layers for t in (each.weight, each.bias)]
        statistics = [b.flatten() for key, b in model.named_buffers() if "running" in key]
        found.append([torch.cat(trained), torch.cat([*statistics, labels * 0.0])])
    assert model.base_model.lean.share < 0.7
    for ours, plain, limit in zip(found[1], found[0], (bound, 1e-10), strict=True):
        assert distance(ours, plain) < limit


def test_compiled_it_keeps_as_little_as_it_does_without(chosen):
    """The compiler saves what the operators return; where it sees through them it saves z as well."""

    def block():
        return [nn.Conv2d(4, 4, 3, padding=1, bias=False).requires_grad_(False), nn.BatchNorm2d(4), nn.ReLU()]

    network, images = nn.Sequential(*block(), *block(), *block()).to(DEVICE), drawn((2, 4, 16, 16), torch.float32)
    kept = {}
    for level in (None, "rounded"):
        if level:
            lean_(network, level, (4, 16, 16))
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager_decomp_partition")
        kept[level] = [saved_bytes(network, lambda run=run: run(images))[1] for run in (network, compiled)]
        torch.compiler.reset()
    assert kept["rounded"][1] < 1.05 * kept["rounded"][0] < 0.35 * kept[None][0]


COMPILE = """
import json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bn_affine_adapters.lean.backends import triton_columns, triton_kernels, triton_rows

Z, F, B = "*bf16", "*fp32", "*u8"
TYPES = dict.fromkeys(("z", "x", "residual", "y", "dy", "more", "du", "dz", "dx"), Z) | {"kept": B, "mask": B}
SWITCHES = dict(RANGE=True, ACT="relu", KEEP=2, ADDS=True, MASKS=True, MASKED=True, WRITES=True, CHUNK=512, STEPS=32,
                EPS=1e-6, IN_BYTES=True, READS=True, SCALES=True, SHIFTS=True, OF_BATCH=True)
found, ACTS = {}, sys.argv[1:]
CASES = [(name, {"LAST": last}) for name in ("stats", "merge", "forward", "sums", "input_gradient", "restore")
         for last in (True, False)]
CASES += [(name, {"LAST": True, "MASKED": False, "ACT": act}) for name in ("input_gradient", "restore")
          for act in ACTS]
# What is 1 Triton takes for a constant.
CASES += [(name, {"LAST": last, "P": 1, "Q": 1, "C": 1}) for name in ("stats", "merge", "sums")
          for last in (True, False)]
CASES = [(triton_kernels, *case) for case in CASES]
CASES += [(triton_rows, name, {"IN_BYTES": in_bytes}) for name in ("layer_norm", "layer_norm_gradients")
          for in_bytes in (True, False)]
CASES += [(triton_rows, name, {"ACT": act}) for name in ("keep", "restore") for act in ACTS]
CASES += [(triton_columns, "_channel_maps", {"KEEP": keep}) for keep in range(4)]
CASES += [(triton_columns, "_gradient_terms", {"OF_BATCH": of_batch}) for of_batch in (True, False)]
for module, name, settings in CASES:
    kernel = getattr(module, name)
    TYPES["kept"] = B if settings.get("IN_BYTES", True) else Z
    constants = {**SWITCHES, **settings, "ROWS": 16, "COLS": 128}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    types = {n: "constexpr" if n in constants else "i32" if n in ("P", "Q", "C", "parts", "values") else TYPES.get(n, F)
             for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n not in constants}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    found[f"{name} {settings} {module.__name__}"] = re.findall(r"(?:ld|st)[.]global[.]v4[.]b32", compiled.asm["ptx"])
print(json.dumps(found))
"""


@pytest.mark.parametrize("acts", [(SILU,), pytest.param(ACTS, marks=pytest.mark.slow)], ids=["silu", "all"])
def test_the_kernels_compile_for_a_gpu_that_is_not_here_and_move_16_bytes_at_a_time(acts):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *acts],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 12 + 6 + 4 + 4 + 2 + 4 * len(acts)
    for name, moves in found.items():
        if "'C': 1" not in name and not name.startswith(("merge", "_channel_maps", "_gradient_terms")):
            assert "ld.global.v4.b32" in moves, name
            assert "st.global.v4.b32" in moves or name.startswith(("stats", "sums")), name


def test_they_are_chosen_for_a_gpu_alone_and_can_be_left_out(ops, monkeypatch, caplog):
    z = torch.zeros(2, 3, 4, 4)
    assert of_layer(z.half(), RELU) is portable
    monkeypatch.setattr(gpu, "DEVICE", "meta")
    assert of_layer(z.to("meta"), RELU) is ops
    monkeypatch.setattr(gpu, "loaded", None)
    monkeypatch.setenv("BN_AFFINE_ADAPTERS_NATIVE", "0")
    with caplog.at_level(logging.INFO):
        assert gpu.load() is False
    assert "PyTorch's own kernels" in caplog.text
    assert of_layer(z.to("meta"), RELU) is portable


def test_without_triton_the_log_says_what_runs_instead(monkeypatch, caplog):
    monkeypatch.setattr(gpu, "loaded", None)
    monkeypatch.setitem(sys.modules, "bn_affine_adapters.lean.backends.triton_ops", None)
    monkeypatch.delattr("bn_affine_adapters.lean.backends.triton_ops", raising=False)
    assert gpu.load() is False
    assert "PyTorch's own kernels, which torch.compile makes fast: Triton: " in caplog.text
