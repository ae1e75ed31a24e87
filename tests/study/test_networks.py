"""The analysis tells what is there: each figure against arithmetic done again by hand, on real networks."""

import json

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model
from bn_affine_adapters.errors import AdapterTensorError, ConfigError, DataError, NetworkError, NoNormLayerError
from bn_affine_adapters.study.networks import (
    GRID,
    clamped,
    dead_activations,
    dead_share,
    depth_width_slopes,
    distribution,
    norm_values,
    redrawn,
    weight_layers,
)
from bn_affine_adapters.study.paper import NETWORKS, PAPER

# name: creation arguments, activations that run
TESTED = {
    "test_resnet": ({}, 12),
    "cifar_resnet14": ({}, 13),
    "test_efficientnet": ({"act_layer": "relu"}, 11),  # in fused norm layers, in place
}


def network(name, wrapped=False):
    """A network whose gammas are of both signs and of every size around the thresholds."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **TESTED[name][0])
    if wrapped:
        model = get_bn_only_model(model, BNOnlyConfig(seed=0, model_args=TESTED[name][0]))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.normal_(0, 0.1)
                module.bias.normal_(0, 0.1)
    return model.eval()


def bits(model):
    return {key: tensor.clone().view(torch.uint8) for key, tensor in model.state_dict().items() if tensor.ndim}


def same(one, other):
    assert len(one) == len(other) >= 10
    return all(torch.equal(tensor, other[key]) for key, tensor in one.items())


# gamma and beta


@pytest.mark.parametrize(
    ("name", "wrapped"), [("test_resnet", False), ("cifar_resnet14", True), ("test_efficientnet", True)]
)
def test_gamma_and_beta_are_the_norm_layers_weight_and_bias(name, wrapped):
    model = network(name, wrapped)
    plain = model.merge_and_unload() if wrapped else model
    norms = {n: m for n, m in plain.named_modules() if isinstance(m, nn.BatchNorm2d)}
    found = norm_values(model)
    assert list(found) == ["gamma", "beta"]
    assert list(found["gamma"]) == list(found["beta"]) == list(norms)
    for layer, module in norms.items():
        assert np.array_equal(found["gamma"][layer], module.weight.detach().numpy())
        assert np.array_equal(found["beta"][layer], module.bias.detach().numpy())


def test_of_a_wrapped_network_it_is_what_runs_now():
    model = get_bn_only_model(timm.create_model("test_resnet", num_classes=3), BNOnlyConfig(seed=0))
    model.add_adapter("other", BNOnlyConfig(seed=0))

    def gamma():
        return norm_values(model)["gamma"]["bn1"]

    before = gamma()
    with torch.no_grad():
        model.base_model.model.bn1.bn_only_layers["other"].weight.fill_(7)
        model.base_model.model.bn1.base_layer.weight.fill_(5)
    assert np.array_equal(gamma(), before)
    model.set_adapter("other")
    assert set(gamma()) == {7}
    with clamped(model, 8):
        assert set(gamma()) == {0}
        model.set_adapter("default")
        assert np.array_equal(gamma(), before)
        model.set_adapter("other")
    with model.disable_adapter():
        assert set(gamma()) == {5}
    model.merge_adapter()
    assert set(gamma()) == {7}


def test_values_are_a_copy_and_a_shared_norm_layer_comes_once():
    shared = nn.BatchNorm2d(4)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": nn.Sequential(shared)})
    found = norm_values(model)["gamma"]
    assert list(found) == ["a.0"]
    found["a.0"][:] = 9
    assert shared.weight.eq(1).all()
    with clamped(model, 2) as count:
        assert count == 4


def test_layers_without_beta_and_networks_without_norm_layers(refused):
    model = nn.Sequential(nn.RMSNorm(3))
    assert norm_values(model)["beta"] == {}
    assert distribution(norm_values(model)["beta"]) == {"count": 0}
    with refused(NoNormLayerError, "no norm layer"):
        norm_values(nn.Sequential(nn.Linear(2, 2)))


def test_a_distribution_is_that_of_all_values_together():
    values = norm_values(network("test_resnet"))["gamma"]
    joined = np.concatenate(list(values.values()))
    found = distribution(values)
    assert json.loads(json.dumps(found)) == found
    assert found["count"] == len(joined) == 1_040
    assert found["mean"] == pytest.approx(sum(joined) / 1_040, abs=1e-6)
    assert found["std"] == pytest.approx((sum((joined - joined.mean()) ** 2) / 1_040) ** 0.5, abs=1e-6)
    assert found["negative"] == pytest.approx(100 * sum(v < 0 for v in joined) / 1_040, abs=1e-6)
    assert list(found["below"]) == ["0.001", "0.01", "0.05", "0.1"]
    for key, share in found["below"].items():
        assert share == pytest.approx(100 * sum(abs(v) < float(key) for v in joined) / 1_040, abs=1e-6)
    assert 0 < found["below"]["0.01"] < found["below"]["0.1"] < 100
    edges, counts = found["histogram"].values()
    assert (len(edges), len(counts), sum(counts)) == (81, 80, 1_040)
    for low, high, count in zip(edges[:-1], edges[1:-1], counts[:-1], strict=False):
        assert count == sum(low <= v < high for v in joined)
    assert list(found["layers"]) == list(values)
    assert found["layers"]["bn1"]["mean"] == pytest.approx(values["bn1"].mean(), abs=1e-6)
    assert found["layers"]["bn1"]["near_zero"] == pytest.approx(100 * (abs(values["bn1"]) < 0.01).mean(), abs=1e-6)


def test_zero_is_not_negative_and_a_threshold_is_not_below_itself():
    found = distribution({"a": [-1.0, -0.0, 0.0, 0.01]})
    assert (found["negative"], found["below"]["0.01"], found["below"]["0.05"]) == (25, 50, 75)
    assert found["layers"]["a"]["near_zero"] == 50


@pytest.mark.parametrize(("scale", "digits"), [(0, 4), (1e-12, 6), (1e-5, 4), (1e-5, 6), (0.3, 6), (1e6, 4)])
def test_no_value_is_left_out_of_the_histogram(scale, digits):
    for seed in range(20):
        values = np.random.default_rng(seed).normal(size=50) * scale + seed / 10
        edges, counts = distribution({"a": values}, digits=digits)["histogram"].values()
        assert sum(counts) == 50
        assert edges == sorted(set(edges))
        assert edges[0] <= values.min() + 1e-9
        assert values.max() - 1e-9 <= edges[-1]


def test_values_that_are_not_finite_are_refused(refused):
    with refused(AdapterTensorError, "not finite", "bn2"):
        distribution({"bn1": [1.0], "bn2": [1.0, float("nan")]})


# clamped


@pytest.mark.parametrize(
    ("name", "wrapped", "dtype"),
    [
        ("test_resnet", False, torch.float32),
        ("cifar_resnet14", True, torch.float32),
        ("test_efficientnet", True, torch.bfloat16),
    ],
)
def test_clamping_sets_small_gammas_to_zero_and_gives_the_bits_back(name, wrapped, dtype):
    model = network(name, wrapped).to(dtype)
    first = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    with torch.no_grad():
        first.weight[:4] = torch.tensor([-0.0, float("nan"), 0.05, -0.05])
    before, gammas = bits(model), norm_values(model)["gamma"]
    with clamped(model, 0.05) as count:
        inside = norm_values(model)
        set_now = 0
        for layer, values in gammas.items():
            small = np.abs(values) < 0.05
            assert np.array_equal(inside["gamma"][layer], np.where(small, 0, values), equal_nan=True)
            set_now += small.sum()
        assert count == set_now > 50
        assert not same(before, bits(model))
        betas = sum(key.endswith("bias") and torch.equal(t, before[key]) for key, t in bits(model).items())
        assert betas == sum(key.endswith("bias") for key in before)
    assert same(before, bits(model))


def test_clamping_counts_what_the_distribution_counts_also_at_float32s_nearest_number():
    model = network("cifar_resnet14")
    with torch.no_grad():
        model.bn1.weight.fill_(0.01)  # 0.00999999977 in float32
    found = distribution(norm_values(model)["gamma"])
    with clamped(model, 0.01) as count:
        assert count == round(found["below"]["0.01"] * found["count"] / 100) >= 16


def test_an_exception_in_the_block_gives_the_bits_back_too():
    model = network("test_resnet", wrapped=True)
    before = bits(model)
    with pytest.raises(KeyError, match="mine"), clamped(model, 10), torch.inference_mode():  # noqa: PT012
        assert not same(before, bits(model))
        raise KeyError("mine")
    assert same(before, bits(model))
    with torch.inference_mode(), clamped(model, 10):
        pass
    assert same(before, bits(model))


def test_what_is_clamped_is_what_the_network_computes_with():
    model, images = network("test_resnet", wrapped=True), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
        with clamped(model, 0):
            assert torch.equal(model(images), before)
        with clamped(model, 0.05):
            assert not torch.equal(model(images), before)
        assert torch.equal(model(images), before)


@pytest.mark.parametrize("threshold", [-0.01, float("nan")])
def test_a_threshold_below_which_nothing_is_is_refused(threshold, refused):
    with refused(ConfigError, "threshold"), clamped(network("test_resnet"), threshold):
        pass


# dead activations


def recorded(model, images, monkeypatch):
    """The output of every ReLU by order of running, seen in torch's function and not by a hook."""
    outputs, original = [], F.relu

    def record(x, inplace=False):
        outputs.append((output := original(x, inplace)).clone())
        return output

    monkeypatch.setattr(F, "relu", record)
    with torch.no_grad():
        model(images)
    monkeypatch.undo()
    return outputs


@pytest.mark.parametrize(
    ("name", "wrapped"), [("test_resnet", False), ("cifar_resnet14", False), ("test_efficientnet", True)]
)
def test_counts_are_those_of_every_value_at_any_batch_size(name, wrapped, monkeypatch):
    model = network(name, wrapped).double()  # no rounding, which depends on the batch size, comes near zero
    images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    outputs = recorded(model, images, monkeypatch)
    counts = dead_activations(model, images.split(5))
    assert len(counts) == len(outputs) == TESTED[name][1]
    zeros = 0
    for entry, output in zip(counts.values(), outputs, strict=True):
        rows = output.transpose(0, 1).flatten(1)
        assert entry["total"] == rows.shape[1]
        assert entry["zeros"] == [sum(v == 0 for v in row) for row in rows.tolist()]
        zeros += sum(entry["zeros"])
    assert zeros > 0
    assert dead_activations(model, [images]) == counts
    assert json.loads(json.dumps(counts)) == counts


def test_names_are_those_of_the_plain_network():
    counts = dead_activations(network("test_efficientnet", wrapped=True), [torch.randn(1, 3, 32, 32)])
    assert set(counts) <= {name for name, _ in network("test_efficientnet").named_modules()}
    assert "bn1.act" in counts


@pytest.mark.parametrize("control", ["two_weights", "input_affine", "mask"])
def test_a_control_is_analysed_with_the_norm_layers_it_leaves_frozen(control):
    config = BNOnlyConfig(seed=0, control=control, train_gamma=False, train_beta=False)
    model = get_bn_only_model(timm.create_model("cifar_resnet14"), config)
    assert distribution(norm_values(model)["gamma"])["count"] == 560
    assert len(dead_activations(model, [torch.randn(2, 3, 32, 32)])) == 13


class Reused(nn.Module):
    """As torchvision's blocks: one ReLU for several layers, of different width."""

    def __init__(self):
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1)
        self.relu = nn.ReLU(inplace=True)
        self.again = self.relu
        self.unused = nn.ReLU()

    def forward(self, x):
        return self.again(self.wide(self.relu(self.narrow(x)))).mean((2, 3))


def test_a_module_that_runs_twice_has_an_entry_for_each_run():
    counts = dead_activations(Reused(), [torch.randn(2, 3, 5, 5), torch.randn(3, 3, 5, 5)])
    assert {key: (len(entry["zeros"]), entry["total"]) for key, entry in counts.items()} == {
        "relu": (4, 5 * 25),
        "relu, run 2": (6, 5 * 25),
    }


@pytest.mark.parametrize("shape", [(4, 7), (4, 5, 7), (4, 7, 3, 2), (4, 7, 2, 3, 2)], ids=str)
def test_channels_lie_where_the_shape_has_them(shape):
    dim = 2 if len(shape) == 3 else 1
    x = torch.ones(shape)
    x.select(dim, 6).fill_(-1)
    x.select(dim, 2)[0] = 0
    counts = dead_activations(nn.Sequential(nn.ReLU6()), [x])
    total = x.numel() // 7
    assert counts == {"0": {"zeros": [0, 0, total // 4, 0, 0, 0, total], "total": total}}


def test_counts_are_exact_beyond_what_float32_holds():
    x = torch.zeros(1, 1, 4097, 4097)  # more values than 2^24, and an odd number
    assert dead_activations(nn.Sequential(nn.ReLU()), [x])["0"] == {"zeros": [4097**2], "total": 4097**2}


def test_neither_modes_nor_hooks_of_the_network_change_while_it_is_counted():
    model = network("test_resnet").train()
    model.bn1.eval()
    before, modes = bits(model), [m.training for m in model.modules()]
    assert set(modes) == {True, False}

    def failing():
        yield torch.randn(2, 3, 32, 32)
        assert [m.training for m in model.modules()] == modes
        assert not any(m._forward_hooks for m in model.modules())
        raise KeyError("mine")

    dead_activations(model, [torch.randn(2, 3, 32, 32)])
    with pytest.raises(KeyError, match="mine"):
        dead_activations(model, failing())
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())
    assert same(before, bits(model))


def test_a_network_in_bfloat16_takes_the_images_as_they_are():
    assert dead_activations(network("test_resnet").to(torch.bfloat16), [torch.randn(1, 3, 32, 32)])


def test_networks_whose_zeros_cannot_be_counted_are_refused(refused):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.unused = nn.Conv2d(3, 4, 1), nn.ReLU()

        def forward(self, x):
            return F.relu(self.conv(x))

    images = [torch.randn(1, 3, 32, 32)]
    with refused(NetworkError, "Functional", "1 such modules, none of which ran"):
        dead_activations(Functional(), images)
    with refused(NetworkError, "0 such modules"):
        dead_activations(timm.create_model("test_efficientnet"), images)
    with refused(DataError, "0 batches"):
        dead_activations(network("test_resnet"), [])


def test_a_channel_is_dead_above_the_threshold_and_not_at_it():
    for n in range(101):
        counts = {"a": {"zeros": [7 * n], "total": 700}}
        assert dead_share(counts) == [100.0 if n > t else 0.0 for t in range(101)], n
    assert (len(GRID), GRID[29], GRID[-1]) == (101, 0.29, 1.0)


def test_shares_are_of_all_channels_of_all_layers(refused):
    counts = {"a": {"zeros": [10, 0, 0], "total": 10}, "b": {"zeros": [10**12], "total": 10**12 + 1}}
    assert dead_share(counts, [0, 0.99, 1]) == [50, 50, 0]
    with refused(DataError, "0 channels"):
        dead_share({})


# the slopes of depth and width

# The paper's BN-only networks: parameters of BN, accuracy in %. ResNet-14 begins both lines.
BN_ONLY = PAPER["accuracy"]["bn"]
DEPTH = [(NETWORKS[name]["bn"], BN_ONLY[name]) for name in BN_ONLY if "depth" in NETWORKS[name]["lines"]]
WIDTH = [(NETWORKS[name]["bn"], BN_ONLY[name]) for name in BN_ONLY if "width" in NETWORKS[name]["lines"]][1:]


def points(depth, width):
    return [(*p, "depth") for p in depth] + [(*p, "width") for p in width]


def test_the_papers_depth_line_is_about_18_percent_steeper_than_its_width_line():
    found = depth_width_slopes(points(DEPTH, WIDTH))
    assert (found["depth"]["n"], found["width"]["n"]) == (7, 5)
    # Both lines begin at ResNet-14, which is WRN-14-1; without it the width line is flatter.
    assert depth_width_slopes(points(DEPTH, DEPTH[:1] + WIDTH))["ratio"] == pytest.approx(1.18, abs=0.005)
    assert found["ratio"] == pytest.approx(1.238, abs=0.005)


def test_points_on_a_line_give_the_line():
    found = depth_width_slopes(points([(2**i, 10 + 3 * i) for i in range(4)], [[2**i, 2 * i] for i in (3, 3, 9)]))
    assert found["depth"] == pytest.approx({"slope": 3, "error": 0, "intercept": 10, "n": 4}, abs=1e-7)
    assert found["width"] == pytest.approx({"slope": 2, "error": 0, "intercept": 0, "n": 3}, abs=1e-7)
    assert found["ratio"] == pytest.approx(1.5)
    assert depth_width_slopes(points(DEPTH, [(2, 50), (4, 50)]))["ratio"] is None


def test_slopes_and_their_ratio_have_standard_errors():
    found = depth_width_slopes(points(DEPTH, WIDTH))
    slopes, errors = [], []
    for line, group in {"depth": DEPTH, "width": WIDTH}.items():
        x, y = np.array(group).T
        (slope, _), covariance = np.polyfit(np.log2(x), y, 1, cov=True)
        assert found[line]["error"] == pytest.approx(covariance[0, 0] ** 0.5)
        slopes.append(slope)
        errors.append(covariance[0, 0] ** 0.5)
    draws = np.random.default_rng(0).normal(slopes, errors, (100_000, 2))
    assert found["error"] == pytest.approx((draws[:, 0] / draws[:, 1]).std(), rel=0.05)
    assert depth_width_slopes(points(DEPTH, WIDTH[:2]))["error"] is None  # two points have no residual


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (points(DEPTH, WIDTH[:1] * 3), ("width", "3 points of 1 sizes")),
        (points([], WIDTH), ("depth", "0 points")),
        ([*points(DEPTH, WIDTH), (2, 50, "height")], ("height",)),
        ([*points(DEPTH, WIDTH), (0, 50, "depth")], ("(0, 50",)),
        ([*points(DEPTH, WIDTH), (2, float("nan"), "depth")], ("nan",)),
    ],
    ids=["one size", "none", "group", "no parameters", "accuracy"],
)
def test_points_that_make_no_line_are_refused(given, words, refused):
    with refused(ConfigError, *words):
        depth_width_slopes(given)


# Layers drawn again


def test_a_redrawn_layer_has_the_seeds_bits_within_the_block_and_its_own_after():
    model = get_bn_only_model(timm.create_model("test_resnet", num_classes=4), BNOnlyConfig(seed=0, train_head=True))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    other = timm.create_model("test_resnet", num_classes=4)
    wanted = get_bn_only_model(other, BNOnlyConfig(seed=7)).get_base_model()
    layers = weight_layers(model)
    assert {"conv1.0", "fc"} <= set(layers)
    for name in ("conv1.0", "fc"):
        with redrawn(model, name, seed=7):
            for key, parameter in layers[name].named_parameters():
                assert torch.equal(parameter, wanted.get_parameter(f"{name}.{key}"))
            changed = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])]
            assert len(changed) == len(list(layers[name].parameters()))
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_layer_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="conv1"), redrawn(timm.create_model("cifar_resnet14"), "conv"):
        pass
