"""A redrawn network holds its specification's bits in every tensor, however it lies in memory; or nothing changes."""

import hashlib
import json
import math
import random
from functools import cache
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import timm
import torch
from conftest import each_once
from timm.layers.evo_norm import EvoNorm2dB0
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from bn_affine_adapters import reinit_
from bn_affine_adapters.errors import ConfigError, ReinitError
from bn_affine_adapters.norms.find import affine, is_norm, norm_layers, plain_tensors
from bn_affine_adapters.seed.rules import (
    NORM_INITS,
    WEIGHT_INITS,
    Rule,
    constants_only,
    draw_into_,
    draw_norm_,
    parameter_rules,
    rule_for,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "init-v1.json").read_text(encoding="utf-8"))

# The rules, written a second time from shared/init-v1's specification.


@cache
def z_table(distribution):
    codes = np.arange(65536)
    if distribution == "normal":
        inverse = NormalDist().inv_cdf
        positive = [round(2**20 * inverse((c + 0.5) / 65536)) for c in range(32768, 65536)]
        return np.array([-q for q in reversed(positive)] + positive) / 2**20
    return {"uniform": (2 * codes - 65535) / 2**16, "sign": np.sign(codes - 32767.5), "unit": (2 * codes + 1) / 2**17}[
        distribution
    ]


def drawn(seed, name, shape, distribution, scale=1.0):
    count, streams = math.prod(shape), []
    for chunk in range(-(-count // 2**20)):
        key = f"bnaffine-init-v1\n{seed}\n{chunk}\n{name}".encode()
        streams.append(np.frombuffer(hashlib.shake_128(key).digest(2**21), dtype="<u2"))
    values = z_table(distribution)[np.concatenate(streams)[:count]].astype(np.float32)
    return torch.from_numpy((values * np.float32(scale)).reshape(shape))


WEIGHT = {
    "kaiming_normal": lambda fan_in: ("normal", math.sqrt(2 / fan_in)),
    "kaiming_uniform": lambda fan_in: ("uniform", math.sqrt(3 * (2 / fan_in))),
    "binary": lambda fan_in: ("sign", math.sqrt(2 / fan_in)),
}
GAMMA_BETA = {"uniform": ("unit", 0.0), "symmetric": ("uniform", 0.0), "ones": (1.0, 0.0), "ones_beta_one": (1.0, 1.0)}
TABLES = {"cls_token", "reg_token", "pos_embed", "relative_position_bias_table"}


def expected(model, seed, weight_init="kaiming_normal", norm_init="uniform", constants=None):
    """Return every parameter of a network by the rules above, and how many each rule gave."""
    values, counts = {}, dict.fromkeys(("weight", "bias", "gamma", "beta", "table", "constant"), 0)
    for name, parameter in model.named_parameters():
        path, _, attribute = name.rpartition(".")
        owner, shape = model.get_submodule(path), tuple(parameter.shape)
        if isinstance(owner, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm) or "Norm" in type(owner).__name__:
            rule = GAMMA_BETA[norm_init][0 if attribute == "weight" else 1]
            kind = "gamma" if attribute == "weight" else "beta"
            values[name] = torch.full(shape, rule) if isinstance(rule, float) else drawn(seed, name, shape, rule)
        elif isinstance(owner, nn.Conv2d | nn.Linear) and attribute in ("weight", "bias"):
            kind, fan_in = attribute, owner.weight[0].numel()
            rule = ("uniform", math.sqrt(1 / fan_in)) if kind == "bias" else WEIGHT[weight_init](fan_in)
            values[name] = drawn(seed, name, shape, *rule)
        elif attribute in TABLES:
            kind, values[name] = "table", drawn(seed, name, shape, "normal", 0.02)
        else:
            kind, values[name] = "constant", torch.full(shape, constants[name])
        counts[kind] += 1
    return values, counts


def build(name, **arguments):
    """Build a network as its constructor leaves its constants, quickly; everything else is NaN or anything."""
    with constants_only():
        return timm.create_model(name, **arguments)


def bits(model):
    return {name: tensor.detach().clone() for name, _, _, tensor in plain_tensors(model)}


def assert_same(found, wanted):
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert different == []
    assert found.keys() == wanted.keys()


# name: how many (weights, biases, gammas, betas, tables, constants)
NETWORKS = {
    "cifar_resnet14": (16, 1, 15, 15, 0, 0),
    "test_efficientnet": (18, 5, 13, 13, 0, 0),
    "test_vit": (26, 26, 13, 13, 2, 0),
    "test_convnext2": (17, 17, 9, 9, 0, 4),
}


@each_once(name=list(NETWORKS), weight_init=list(WEIGHT))
def test_every_parameter_is_the_specifications(name, weight_init):
    model = build(name)
    constants = {n: p.flatten()[0].item() for n, p in model.named_parameters()}
    reinit_(model, 7, weight_init=weight_init, reference=lambda: build(name))
    values, counts = expected(model, 7, weight_init, constants=constants)
    assert_same(dict(model.named_parameters()), values)
    assert tuple(counts.values()) == NETWORKS[name]


@each_once(norm_init=list(GAMMA_BETA), name=["cifar_resnet14", "test_vit"])
def test_every_norm_initialisation_is_the_papers(name, norm_init):
    model = reinit_(build(name), 2**64 - 1, norm_init=norm_init)
    values, counts = expected(model, 2**64 - 1, norm_init=norm_init)
    assert_same(dict(model.named_parameters()), values)
    assert counts["gamma"] == counts["beta"] >= 13


def test_every_choice_is_tested():
    assert {*WEIGHT, "orthogonal"} == set(WEIGHT_INITS)
    assert {*GAMMA_BETA, "keep"} == set(NORM_INITS)


def test_keep_leaves_gamma_and_beta_and_redraws_the_rest():
    model = timm.create_model("cifar_resnet14")
    for layer in norm_layers(model).values():
        nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    before = bits(model)
    reinit_(model, 0, norm_init="keep")
    names = [f"{name}.{key}" for name in norm_layers(model) for key in ("weight", "bias")]
    assert len(names) == 30
    assert_same({n: bits(model)[n] for n in names}, {n: before[n] for n in names})
    values, _ = expected(model, 0)
    assert_same(
        {n: p for n, p in model.named_parameters() if n not in names}, {n: values[n] for n in values.keys() - {*names}}
    )


def test_orthogonal_weights_are_orthonormal():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 20, 1), nn.Conv2d(20, 20, 3, groups=20))
    model.append(nn.Linear(20, 20)).append(nn.Linear(20, 5))
    reinit_(model, 0, weight_init="orthogonal")
    wide = tall = 0
    for module in model:
        if isinstance(module, nn.Conv2d | nn.Linear):
            rows = module.weight.detach().flatten(1).double()  # (out, in * k * k), gain 1
            wide, tall = wide + (len(rows) <= rows.shape[1]), tall + (len(rows) > rows.shape[1])
            gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
            assert (gram - torch.eye(len(gram))).abs().max() < 1e-6
    assert (wide, tall) == (3, 2)


def test_orthogonal_weights_come_from_the_seeds_normals():
    model = reinit_(nn.ModuleDict({"conv1": nn.Conv2d(3, 16, 3)}), 3, weight_init="orthogonal")
    normal = drawn(3, "conv1.weight", (16, 3, 3, 3), "normal").flatten(1).double()
    # normal.T = q r with a positive diagonal of r: the rows of q.T are Gram and Schmidt's.
    rows = torch.zeros_like(normal)
    for i, row in enumerate(normal):
        row = row - rows[:i].T @ (rows[:i] @ row)
        rows[i] = row / row.norm()
    assert torch.allclose(model["conv1"].weight.flatten(1).double(), rows, atol=1e-6)


# However the network lies in memory.


@pytest.fixture(scope="module")
def reference_bits():
    return bits(reinit_(build("cifar_resnet14"), 5))


def reversed_children(module):
    """Register a module's children and parameters in the opposite order, under the same names."""
    for child in module.children():
        reversed_children(child)
    for registry in (module._modules, module._parameters):
        items = list(reversed(registry.items()))
        registry.clear()
        registry.update(items)
    return module


def strided(model):
    """Lay every parameter out in memory with its axes reversed and a gap between its values."""
    for parameter in model.parameters():
        shape = parameter.shape
        parameter.data = torch.zeros(*reversed(shape), 2).permute(*range(len(shape) - 1, -1, -1), len(shape))[..., 0]
    return model


def trained(model):
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(9)
    return model


LAYOUTS = {  # how a network lies in memory, and what shows that it does
    "channels last": (
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.conv1.weight.is_contiguous(memory_format=torch.channels_last),
    ),
    "with gaps": (strided, lambda m: sum(not p.is_contiguous() for p in m.parameters()) == 47),
    "in another order": (reversed_children, lambda m: next(iter(m.state_dict())).startswith("fc.")),
    "compiled": (torch.compile, lambda m: all(name.startswith("_orig_mod.") for name, _ in m.named_parameters())),
    "trained": (trained, lambda m: True),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_however_a_network_lies_in_memory_it_gets_the_same_bits(kind, reference_bits):
    change, shows = LAYOUTS[kind]
    model = change(build("cifar_resnet14"))
    assert shows(model)
    before = [parameter.data_ptr() for parameter in model.parameters()]
    for _ in range(2):
        reinit_(model, 5)
        assert_same(bits(model), reference_bits)
    assert shows(model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_another_dtype_gets_the_cast_of_the_float32_bits(dtype, reference_bits):
    model = reinit_(build("cifar_resnet14").to(dtype), 5)
    found = bits(model)
    assert {found[n].dtype for n, _ in model.named_parameters()} == {dtype}
    assert_same(found, {n: t.to(dtype) if t.is_floating_point() else t for n, t in reference_bits.items()})


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_draws_the_same_bits(threads, reference_bits):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(bits(reinit_(build("cifar_resnet14"), 5)), reference_bits)
    finally:
        torch.set_num_threads(before)


def test_the_network_is_redrawn_in_place_and_returned():
    model = timm.create_model("cifar_resnet14")
    model.conv1.requires_grad_(False)
    before = [(id(p), p.data_ptr(), p.requires_grad) for p in model.parameters()]
    assert reinit_(model, 0) is model
    assert [(id(p), p.data_ptr(), p.requires_grad) for p in model.parameters()] == before
    assert all(p.grad_fn is None for p in model.parameters())


def generators():
    """Return a digest of each global generator's state."""
    states = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())
    return [hashlib.sha256(repr(state).encode()).hexdigest()[:8] for state in states]


@pytest.mark.parametrize("weight_init", WEIGHT_INITS)
def test_the_global_generators_are_untouched(weight_init):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), timm.layers.LayerScale2d(4), nn.Linear(4, 4))
    network = timm.create_model("test_convnext2")
    before = generators()
    reinit_(model, 0, weight_init=weight_init)
    reinit_(network, 0, weight_init=weight_init, reference=lambda: build("test_convnext2"))
    assert generators() == before


def test_a_generator_that_moves_is_noticed():
    before = generators()
    torch.rand(1)
    assert generators() != before


def test_the_global_generators_do_not_matter(reference_bits):
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    assert_same(bits(reinit_(build("cifar_resnet14"), 5)), reference_bits)


def test_running_statistics_are_reset():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            instance = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
            self.layers = nn.Sequential(nn.BatchNorm2d(3), instance, EvoNorm2dB0(3), timm.layers.BatchNormAct2d(3))

        def forward(self, x):
            return self.layers(x)

    model = Mixed()
    fresh = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(4, 3, 8, 8) + 3)
    moved = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, fresh[name])]
    assert set(fresh) - set(moved) == {"layers.1.num_batches_tracked"}, "torch never counts for InstanceNorm"
    assert len(fresh) == 10
    reinit_(model, 0)
    assert_same(dict(model.named_buffers()), fresh)


def test_other_buffers_are_left_alone():
    model = timm.create_model("cifar_resnet14")
    model.register_buffer("table", torch.arange(5.0))
    reinit_(model, 0)
    assert model.table.tolist() == [0, 1, 2, 3, 4]


# Constants of a constructor.


def test_a_layer_scale_is_its_constructors_whatever_the_network_holds():
    model = build("convnext_atto")
    gammas = {name: p for name, p in model.named_parameters() if name.endswith(".gamma")}
    for parameter in gammas.values():
        nn.init.normal_(parameter)
    reinit_(model, 0, reference=lambda: build("convnext_atto"))
    assert len(gammas) == 12
    assert all((p == np.float32(1e-6)).all() for p in gammas.values())


def test_a_layer_scale_given_as_an_argument_is_read_from_the_reference_or_kept():
    def create():
        return build("test_convnext2", ls_init_value=0.125)

    model = create()
    reinit_(model, 0)
    assert (model.stages[0].blocks[0].gamma == 0.125).all()
    model.stages[0].blocks[0].gamma.data.fill_(5)
    reinit_(model, 0, reference=create)
    assert (model.stages[0].blocks[0].gamma == 0.125).all()


def test_without_a_reference_a_trained_gain_is_an_error():
    model = build("test_convnext2")
    gamma = model.stages[0].blocks[0].gamma
    gamma.data[0] = 0.5
    with pytest.raises(ReinitError, match=r"stages\.0\.blocks\.0\.gamma"):
        reinit_(model, 0)


def test_the_reference_is_asked_for_only_where_a_constant_has_to_be_read():
    asked = []

    def reference(name):
        asked.append(name)
        return build(name)

    reinit_(build("cifar_resnet14"), 0, reference=lambda: reference("cifar_resnet14"))
    assert asked == []
    reinit_(build("test_convnext2"), 0, reference=lambda: reference("test_convnext2"))
    assert asked == ["test_convnext2"]


# Embeddings, tokens and tables.


class Tables(nn.Module):
    def __init__(self):
        super().__init__()
        for name in self.names:
            setattr(self, name, nn.Parameter(torch.randn(1, 4)))
        self.words = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)

    names = (
        "cls_token", "dist_token", "reg_token", "mask_token", "register_tokens", "class_token", "cls_token_1", "latent",
        "pos_embed", "pos_embed_win", "pos_embed1", "position_embedding", "position_embedding_table", "pos_emb",
        "relative_position_bias_table", "rel_pos_h", "rel_pos_w", "height_rel", "width_rel", "attention_biases",
    )  # fmt: skip


def test_embeddings_tokens_and_tables_are_small_normals():
    model = reinit_(Tables(), 11)
    names = {name: (1, 4) for name in Tables.names} | {"words.weight": (5, 4)}
    assert len(names) == 21
    assert_same(
        {name: model.get_parameter(name) for name in names},
        {name: drawn(11, name, shape, "normal", 0.02) for name, shape in names.items()},
    )


@pytest.mark.parametrize(
    "attribute", ["scale", "temperature", "logit_scale", "freqs", "w_g", "token", "position", "query"]
)
def test_a_random_parameter_of_another_name_is_no_table(attribute):
    model = nn.Sequential(nn.LayerNorm(4))
    model.register_parameter(attribute, nn.Parameter(torch.randn(1, 4)))
    assert rule_for(model, attribute, "kaiming_normal", "uniform") is None
    with pytest.raises(ReinitError, match=attribute):
        reinit_(model, 0)


def test_tied_parameters_take_the_bytewise_smallest_name():
    model = nn.ModuleDict({"b": nn.Linear(4, 4), "a": nn.Linear(4, 4), "Z": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    model["a"].weight = model["Z"].weight = model["b"].weight
    reinit_(model, 0)
    assert torch.equal(model["b"].weight, drawn(0, "Z.weight", (4, 4), "normal", math.sqrt(0.5)))
    assert torch.equal(model["b"].bias, drawn(0, "b.bias", (4,), "uniform", 0.5))


def test_a_norm_layer_is_drawn_alone_as_with_its_network():
    model = reinit_(build("cifar_resnet14"), 9)
    alone = nn.BatchNorm2d(16)
    draw_norm_(alone, "blocks.0.bn1", 9, "uniform")
    assert torch.equal(alone.weight, model.blocks[0].bn1.weight)
    assert torch.equal(alone.bias, model.blocks[0].bn1.bias)


# Parameters that only one class has.


def rotated(seed, name, shape, temperature):
    """Return the frequencies of mixed rotary embeddings: the specification's, an angle at a time."""
    codes = np.frombuffer(hashlib.shake_128(f"bnaffine-init-v1\n{seed}\n0\n{name}".encode()).digest(2**10), "<u2")
    out, steps = torch.empty(shape), shape[-1] // 2
    for at, (depth, head) in enumerate(np.ndindex(shape[1:3])):
        angle = math.tau * (int(codes[at]) + 0.5) / 65536
        sine, cosine = (round(2**20 * part(angle)) / 2**20 for part in (math.sin, math.cos))
        for i in range(steps):
            m = np.float32(round(2**20 * temperature ** (-i / steps)) / 2**20)
            values = [m * np.float32(v) for v in (cosine, -sine, sine, cosine)]
            for place, value in zip(((0, i), (0, i + steps), (1, i), (1, i + steps)), values, strict=True):
                out[place[0], depth, head, place[1]] = float(value)
    return out


BY_CLASS = {  # a module, its parameter's name, shape, and how it is drawn
    "recurrent": (lambda: nn.LSTM(4, 8), "weight_ih_l0", (32, 4), ("uniform", math.sqrt(1 / 8))),
    "recurrent bias": (lambda: nn.GRU(4, 8), "bias_hh_l0", (24,), ("uniform", math.sqrt(1 / 8))),
    "experts": (
        lambda: timm.layers.CondConv2d(4, 6, 3, num_experts=2), "weight", (2, 216), ("normal", math.sqrt(2 / 36)),
    ),
    "experts' bias": (
        lambda: timm.layers.CondConv2d(4, 6, 3, num_experts=2, bias=True), "bias", (2, 6), ("uniform", 1 / 6),
    ),
    "rotations": (lambda: timm.layers.RotaryEmbeddingMixed(32, 2, 4, 100.0), "freqs", (2, 2, 4, 4), None),
    "lambda": (
        lambda: pytest.importorskip("timm.layers.diff_attention").DiffAttention(32, 2),
        "lambda_k2", (8,), ("normal", 0.1),
    ),
    "state decay": (
        lambda: pytest.importorskip("timm.models.efficientvim").HSMSSD(8, state_dim=16), "A", (16,), ("unit", 15.0),
    ),
    "additive query": (
        lambda: timm.models.swiftformer.EfficientAdditiveAttention(8, 4), "w_g", (4, 1), ("normal", 1.0),
    ),
}  # fmt: skip


def redrawn(kind, seed=0, name="mixer", **arguments):
    create, attribute, shape, rule = BY_CLASS[kind]
    model = reinit_(nn.ModuleDict({name: create()}), seed, **arguments)
    found = model[name].get_parameter(attribute).detach()
    assert tuple(found.shape) == shape
    return found, f"{name}.{attribute}", shape, rule


@pytest.mark.parametrize("kind", BY_CLASS)
def test_a_parameter_of_one_class_is_drawn_as_its_constructor_does(kind):
    found, name, shape, rule = redrawn(kind, seed=4)
    expected = rotated(4, name, shape, 100.0) if rule is None else drawn(4, name, shape, *rule)
    assert torch.equal(found, expected + (1 if kind == "state decay" else 0))
    create, attribute = BY_CLASS[kind][:2]
    torch.manual_seed(0)
    usual = torch.stack([create().get_parameter(attribute).detach() for _ in range(200)])
    many = torch.stack([redrawn(kind, seed)[0] for seed in range(200)])
    if not kind.startswith("expert"):  # He's standard deviation instead of the constructor's, as for a convolution
        assert (many.mean() - usual.mean()).abs() < 0.1 * usual.std()
        assert 0.9 < many.std() / usual.std() < 1.1


@pytest.mark.parametrize("kind", BY_CLASS)
def test_a_parameter_of_one_class_is_the_golden_one(kind):
    case = GOLDEN["by_class"][kind]
    found, name, shape, _ = redrawn(kind)
    assert (case["name"], tuple(case["shape"])) == (name, shape)
    values = found.numpy().astype("<f4")
    assert values.reshape(-1)[:4].view("<u4").tolist() == [int(bits, 16) for bits in case["first4_f32_bits"]]
    assert hashlib.sha256(values.tobytes()).hexdigest() == case["sha256_le_f32"]
    assert GOLDEN["by_class"].keys() == BY_CLASS.keys()


@pytest.mark.parametrize("weight_init", WEIGHT)
def test_experts_are_drawn_by_weight_init(weight_init):
    found, name, shape, _ = redrawn("experts", weight_init=weight_init)
    assert torch.equal(found, drawn(0, name, shape, *WEIGHT[weight_init](36)))


def test_orthogonal_experts_have_no_rule():
    with pytest.raises(ReinitError, match=r"mixer\.weight has no rule"):
        redrawn("experts", weight_init="orthogonal")


def test_a_users_class_of_the_same_name_keeps_its_constant():
    class HSMSSD(nn.Module):
        def __init__(self):
            super().__init__()
            self.A = nn.Parameter(torch.full((4,), 3.0))

    assert reinit_(nn.Sequential(nn.LayerNorm(4), HSMSSD()), 0)[1].A.tolist() == [3.0] * 4


# Networks that cannot be redrawn are left as they were.


def with_batch_norm(*layers):
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), *layers)


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.mixing = nn.Parameter(torch.randn(4, 4))


class TwoOfAName(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.module = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1)})


def parametrised():
    model = with_batch_norm()
    parametrizations.weight_norm(model[0])
    return model


WITHOUT_RULE = {
    "Bilinear": (lambda: with_batch_norm(nn.Bilinear(4, 4, 4)), "2.weight"),
    "custom parameter": (Custom, "mixing"),
    "two of a name": (TwoOfAName, "conv.weight"),
    "parametrised": (parametrised, "0.weight"),
    "meta device": (lambda: with_batch_norm(nn.Linear(4, 4, device="meta")), "2.weight"),
}


@pytest.mark.parametrize("kind", WITHOUT_RULE)
def test_a_parameter_without_a_rule_is_named_and_nothing_changes(kind):
    create, name = WITHOUT_RULE[kind]
    model = create()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ReinitError) as caught:
        reinit_(model, 0)
    assert name in caught.value.what
    assert isinstance(caught.value, ValueError)
    assert caught.value.seen
    assert caught.value.do
    same = {
        n: torch.equal(t.nan_to_num(), before[n].nan_to_num()) for n, t in model.state_dict().items() if not t.is_meta
    }
    unchanged = [n for n in model.state_dict() if same.get(n, True)]
    assert unchanged == list(before)
    assert len(before) >= 4


def test_a_parametrisation_that_is_removed_can_be_redrawn():
    model = parametrised()
    parametrize.remove_parametrizations(model[0], "weight")
    reinit_(model, 0)
    assert torch.equal(model[0].weight, drawn(0, "0.weight", (4, 4), "normal", math.sqrt(0.5)))


def test_a_plan_changes_nothing():
    model = timm.create_model("cifar_resnet14")
    before = bits(model)
    found = list(parameter_rules(model, weight_init="kaiming_normal", norm_init="uniform"))
    assert len(found) == 47
    assert_same(bits(model), before)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "0", None, True, float("nan"), [0]], ids=repr)
def test_a_bad_seed_is_an_error(seed):
    model = with_batch_norm()
    before = bits(model)
    with pytest.raises(ConfigError, match="seed") as caught:
        reinit_(model, seed)
    assert repr(seed) in caught.value.seen
    assert_same(bits(model), before)


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_a_good_seed_draws_its_own_values(seed):
    model = reinit_(with_batch_norm(), seed)
    assert torch.equal(model[0].weight, drawn(seed, "0.weight", (4, 4), "normal", math.sqrt(0.5)))


@pytest.mark.parametrize(("key", "value"), [("weight_init", "xavier"), ("norm_init", "zeros"), ("norm_init", None)])
def test_a_bad_choice_is_an_error(key, value):
    with pytest.raises(ConfigError, match=key):
        reinit_(with_batch_norm(), 0, **{key: value})


# Building without drawing.


RANDOM = {
    "randn": lambda: torch.randn(3, 4),
    "rand": lambda: torch.rand(3, 4),
    "randn_like": lambda: torch.randn_like(torch.zeros(3)),
    "normal": lambda: torch.normal(torch.zeros(3), 1.0),
    "normal_": lambda: torch.zeros(3).normal_(),
    "uniform_": lambda: torch.zeros(3).uniform_(),
    "bernoulli": lambda: torch.bernoulli(torch.full((3,), 0.5)),
    "bernoulli_": lambda: torch.zeros(3).bernoulli_(),
    "exponential_": lambda: torch.zeros(3).exponential_(),
    "transposed": lambda: torch.zeros(3, 4).t().normal_(),
    "part": lambda: torch.cat([torch.ones(2), torch.randn(2)]),
    "orthogonal_": lambda: nn.init.orthogonal_(torch.zeros(3, 4)),
    "torch's trunc_normal_": lambda: nn.init.trunc_normal_(torch.zeros(3, 4), std=0.02),
    "timm's trunc_normal_": lambda: timm.layers.trunc_normal_(torch.zeros(3, 4), std=0.02),
    "timm's trunc_normal_tf_": lambda: timm.layers.trunc_normal_tf_(torch.zeros(3, 4), std=0.02),
    "Linear": lambda: nn.Linear(3, 4).weight,
    "Embedding": lambda: nn.Embedding(3, 4).weight,
    "LSTM": lambda: nn.LSTM(3, 4).weight_hh_l0,
}


@pytest.mark.parametrize("kind", RANDOM)
def test_constants_only_flags_what_is_random(kind):
    before = generators()
    with constants_only():
        tensor = RANDOM[kind]()
    assert tensor.isnan().any()
    assert generators() == before
    assert not RANDOM[kind]().isnan().any(), "outside the context nothing is flagged"


# Torch's trunc_normal_ draws again until all values are within bounds: first by normals, then by uniforms.
BOUNDS = [(0.0, -2.0, 2.0), (0.0, 3.0, 4.0), (0.0, -2.0, -1.0), (5.0, -2.0, 2.0)]


@pytest.mark.filterwarnings("ignore:mean is more than 2 std")
@pytest.mark.parametrize(("mean", "low", "high"), BOUNDS)
@pytest.mark.parametrize("initialise", [nn.init.trunc_normal_, timm.layers.trunc_normal_], ids=["torch's", "timm's"])
def test_a_truncated_normal_ends_in_memory_with_stale_values(initialise, mean, low, high):
    with constants_only():
        tensor = initialise(torch.full((64, 64), 9.0), mean, 1.0, low, high)
    assert tensor[0, 0].isnan()


def test_any_other_loop_that_waits_for_random_values_is_an_error():
    draws = 0

    def draw_again(tensor):
        nonlocal draws
        while not (tensor == tensor.square()).any() and draws < 100_000:
            draws += 1
            tensor.normal_()

    with constants_only(), pytest.raises(ReinitError, match="waits for random values") as caught:
        draw_again(torch.full((8, 8), 9.0))
    assert "custom" in caught.value.do
    assert draws == 10_000


CONSTANT = {
    "scaled": lambda: torch.ones(3).mul_(0.5).add_(2).clamp_(max=2.2),
    "compared": lambda: (torch.arange(3.0) < 1).float(),
    "zeros": lambda: torch.zeros(3),
    "full": lambda: torch.full((3,), 1e-6),
    "constant_": lambda: nn.init.constant_(torch.empty(3), 0.5),
    "BatchNorm2d": lambda: nn.BatchNorm2d(3).weight,
    "linspace": lambda: torch.linspace(0, 1, 3),
    "eye_": lambda: nn.init.eye_(torch.empty(3, 3)),
}


@pytest.mark.parametrize("kind", CONSTANT)
def test_constants_only_leaves_constants_as_they_are(kind):
    with constants_only():
        tensor = CONSTANT[kind]()
    assert torch.equal(tensor, CONSTANT[kind]())


INTEGERS = {
    "randperm": lambda: torch.randperm(5),
    "randint": lambda: torch.randint(0, 5, (3,)),
    "random_": lambda: torch.zeros(3, dtype=torch.long).random_(),
    "multinomial": lambda: torch.multinomial(torch.ones(5), 2),
}


@pytest.mark.parametrize("kind", INTEGERS)
def test_constants_only_leaves_the_generators_alone_for_random_integers(kind):
    before = generators()
    with constants_only():
        INTEGERS[kind]()
    assert generators() == before


# Many networks: nothing is ever left over.

SENTINEL = -77.0
SOME = [name for name in timm.list_models("test_*") if name != "test_nfnet"] + ["cifar_resnet14", "cifar_vgg11"]
MORE = [
    "resnet18", "mobilenetv3_small_050", "lcnet_035", "ghostnet_050", "tinynet_e", "regnetx_002", "densenet121",
    "dla46_c", "mobilevit_xxs", "efficientvit_b0", "edgenext_xx_small", "levit_128s", "hgnetv2_b0", "repvit_m0_9",
    "xcit_nano_12_p16_224", "deit_tiny_distilled_patch16_224",
]  # fmt: skip
MANY = [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


@pytest.mark.parametrize("name", MANY)
def test_every_parameter_is_redrawn(name):
    model = build(name)
    for parameter in model.parameters():
        parameter.data.fill_(SENTINEL)
    reinit_(model, 1, reference=lambda: build(name))
    left = [n for n, p in model.named_parameters() if (p == SENTINEL).any() or not p.isfinite().all()]
    assert left == []
    first, random_ones = bits(model), 0
    reinit_(model, 2, reference=lambda: build(name))
    for n, owner, attribute, tensor in plain_tensors(model):
        if not isinstance(tensor, nn.Parameter):
            continue
        rule = rule_for(owner, attribute, "kaiming_normal", "uniform")
        if rule is None or rule.kind == "constant":
            assert torch.equal(tensor, first[n])
            assert tensor.unique().numel() == 1
        else:
            assert not torch.equal(tensor, first[n]), f"{n} does not depend on the seed"
            random_ones += 1
    gammas = sum(affine(m).gamma is not None for m in model.modules() if is_norm(m))
    assert random_ones > gammas > 0


def test_the_networks_are_many():
    assert len(MORE) == 16
    assert len(SOME) >= 16  # as many as the oldest timm supported has of them


def test_the_weight_of_attention_is_drawn_as_a_linear_weight():
    """fan_in is 8, whatever the number of heads: a standard deviation of sqrt(2 / 8); its bias is 0, as built."""
    model = reinit_(with_batch_norm(nn.MultiheadAttention(8, 2)), seed=0)
    plain = reinit_(nn.ModuleDict({"2": nn.Linear(8, 24)}), seed=0)
    same = torch.empty(24, 8)
    draw_into_(same, Rule("normal", 0.5), 0, "2.in_proj_weight")
    assert torch.equal(model[2].in_proj_weight, same)
    assert not model[2].in_proj_bias.any()
    assert plain["2"].weight.std().item() == pytest.approx(same.std().item(), rel=0.3)
