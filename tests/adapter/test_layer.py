"""The PEFT layer alone: it is the module it wraps, whichever copy is active."""

import pytest
import torch
from timm.layers import BatchNormAct2d, GroupNormAct, LayerNorm2d, RmsNorm
from torch import nn

from bn_affine_adapters import BNOnlyConfig
from bn_affine_adapters.adapter.layer import BNOnlyLayer
from bn_affine_adapters.errors import AdapterError

IMAGES = torch.randn(4, 8, 5, 5, generator=torch.Generator().manual_seed(0))
NORMS = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(8, eps=0.5, momentum=0.3),
    "BatchNormAct2d": lambda: BatchNormAct2d(8, eps=0.5, momentum=0.3, act_layer=nn.SiLU),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(8, eps=0.5, momentum=0.3),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(8, eps=0.5, affine=True),
    "GroupNorm": lambda: nn.GroupNorm(4, 8, eps=0.5),
    "GroupNormAct": lambda: GroupNormAct(8, 4, eps=0.5, act_layer=nn.SiLU),
    "LayerNorm": lambda: nn.LayerNorm((8, 5, 5), eps=0.5, bias=False),
    "LayerNorm2d": lambda: LayerNorm2d(8, eps=0.5),
    "RmsNorm": lambda: RmsNorm(5, eps=0.5),
    "Linear": lambda: nn.Linear(5, 3),
}


def fill(module, start):
    """Give every parameter and floating-point buffer other values."""
    for number, tensor in enumerate(module.state_dict().values()):
        if tensor.is_floating_point():
            tensor.copy_(torch.linspace(start, start + 1 + number, tensor.numel()).reshape(tensor.shape))
    return module


def wrap(base, *names, **settings):
    """A layer with one copy an adapter, all of them different from each other and from the base."""
    layer = BNOnlyLayer(fill(base, 0.5), "norm")
    for number, name in enumerate(names):
        layer.add_copy(name, fill(layer.copy_of_base(), 2.0 + number), BNOnlyConfig(**settings))
    layer.set_adapter(names[0])
    return layer


def same_state(one, other):
    theirs = other.state_dict()
    return one.state_dict().keys() == theirs.keys() and all(
        torch.equal(tensor, theirs[key]) for key, tensor in one.state_dict().items()
    )


@pytest.mark.parametrize("kind", NORMS)
def test_a_copy_is_the_whole_module_and_shares_nothing_with_it(kind):
    base = NORMS[kind]().eval()
    layer = BNOnlyLayer(base, "norm")
    copy = layer.copy_of_base()
    assert type(copy) is type(base)
    assert copy.extra_repr() == base.extra_repr()
    assert same_state(copy, base)
    pairs = list(zip(copy.state_dict().values(), base.state_dict().values(), strict=True))
    assert pairs, "the module has no tensors to compare"
    assert all(ours.data_ptr() != theirs.data_ptr() for ours, theirs in pairs)
    assert torch.equal(copy(IMAGES), base(IMAGES))


@pytest.mark.parametrize("kind", NORMS)
def test_forward_runs_the_active_copy_and_the_base_when_disabled(kind):
    layer = wrap(NORMS[kind]().eval(), "one", "two")
    answers = {name: layer.bn_only_layers[name](IMAGES) for name in ("one", "two")}
    assert torch.equal(layer(IMAGES), answers["one"])
    layer.set_adapter("two")
    assert torch.equal(layer(IMAGES), answers["two"])
    layer.enable_adapters(False)
    assert torch.equal(layer(IMAGES), layer.base_layer(IMAGES))
    assert not torch.equal(answers["one"], answers["two"])


def test_an_adapter_without_a_copy_here_runs_the_base():
    layer = wrap(nn.BatchNorm2d(8).eval(), "one")
    layer.set_adapter("elsewhere")
    assert torch.equal(layer(IMAGES), layer.base_layer(IMAGES))


@pytest.mark.parametrize("kind", ["BatchNorm2d", "BatchNormAct2d", "Linear"])
def test_the_layer_answers_for_the_active_module(kind):
    layer = wrap(NORMS[kind](), "one", "two")
    settings = [name for name in ("eps", "momentum", "num_features", "in_features", "act") if hasattr(layer, name)]
    assert settings, "no setting was compared"
    for active in ("one", "two"):
        layer.set_adapter(active)
        copy = layer.bn_only_layers[active]
        assert layer.weight is copy.weight
        assert layer.bias is copy.bias
        assert all(getattr(layer, name) is getattr(copy, name) for name in settings)


def test_an_attribute_that_no_module_has_is_missing():
    layer = wrap(RmsNorm(5), "one")
    assert getattr(layer, "bias", None) is None
    with pytest.raises(AttributeError, match="out_features"):
        _ = layer.out_features


def test_repr_names_the_method_and_shows_base_and_copies():
    text = repr(wrap(nn.BatchNorm2d(8, eps=0.5), "task_1"))
    assert text.startswith("bn_only.BNOnlyLayer(")
    assert text.count("BatchNorm2d(8, eps=0.5") == 2
    assert "(base_layer)" in text
    assert "(task_1)" in text


@pytest.mark.parametrize("kind", NORMS)
def test_merge_and_unmerge_change_no_bit(kind):
    layer = wrap(NORMS[kind]().eval(), "one", "two")
    base, copy, answer = layer.base_layer, layer.bn_only_layers["one"], layer(IMAGES)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    layer.merge()
    assert layer.merged
    layer.set_adapter("two")  # what is merged runs, whichever adapter is active
    assert layer.active_module() is layer.remaining() is copy
    assert layer.base_layer is base
    assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())
    assert torch.equal(layer(IMAGES), answer)
    layer.unmerge()
    layer.set_adapter("one")
    assert not layer.merged
    assert layer.base_layer is base
    assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())
    assert torch.equal(layer(IMAGES), answer)


def test_merging_another_adapter_unmerges_the_first_and_says_so():
    layer = wrap(nn.BatchNorm2d(8).eval(), "one", "two")
    answer = layer.bn_only_layers["two"](IMAGES)
    layer.merge(adapter_names=["one"])
    with pytest.warns(UserWarning, match="merged"):
        layer.merge(adapter_names=["two"])
    assert layer.merged_adapters == ["two"]
    assert torch.equal(layer(IMAGES), answer)


def test_merging_twice_is_merging_once():
    layer = wrap(nn.BatchNorm2d(8).eval(), "one")
    layer.merge()
    with pytest.warns(UserWarning, match="already merged"):
        layer.merge()
    assert layer.merged_adapters == ["one"]


def test_merging_an_adapter_that_is_not_here_leaves_the_base():
    layer = wrap(nn.BatchNorm2d(8).eval(), "one")
    base = layer.base_layer
    layer.merge(adapter_names=["elsewhere"])
    assert layer.active_module() is layer.remaining() is base


def test_two_active_adapters_are_refused(refused):
    layer = wrap(nn.BatchNorm2d(8), "one", "two")
    layer.set_adapter(["one", "two"])
    with refused(AdapterError, "one, two", "set_adapter"):
        layer(IMAGES)


def test_merging_two_adapters_is_refused(refused):
    layer = wrap(nn.BatchNorm2d(8), "one", "two")
    base = layer.base_layer
    with refused(AdapterError, "one, two", "merge_and_unload"):
        layer.merge(adapter_names=["one", "two"])
    assert layer.base_layer is base


@pytest.mark.parametrize("training", [True, False])
def test_a_new_copy_inherits_the_mode_and_the_base_stays_in_evaluation(training):
    layer = wrap(nn.BatchNorm2d(8).train(training), "one")
    assert layer.training is training
    assert layer.bn_only_layers["one"].training is training
    assert not layer.base_layer.training


@pytest.mark.parametrize("statistics", ["update", "frozen"])
def test_running_statistics_of_the_active_copy_move_unless_frozen(statistics):
    layer = wrap(nn.BatchNorm2d(8), "one", "two", running_statistics=statistics)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    layer.train()
    layer(IMAGES)
    moved = {key for key, tensor in layer.state_dict().items() if not torch.equal(tensor, before[key])}
    names = {"running_mean", "running_var", "num_batches_tracked"}
    assert moved == ({f"bn_only_layers.one.{name}" for name in names} if statistics == "update" else set())


def test_frozen_running_statistics_hold_while_merged():
    layer = wrap(nn.BatchNorm2d(8), "one", running_statistics="frozen")
    layer.merge()
    layer.train()
    before = layer.active_module().running_mean.clone()
    layer(IMAGES)
    assert torch.equal(layer.active_module().running_mean, before)


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({}, {"weight", "bias"}),
        ({"train_beta": False}, {"weight"}),
        ({"train_gamma": False}, {"bias"}),
        ({"train_gamma": False, "train_beta": False}, set()),
        ({"train_gamma": False, "extra_trainable_modules": ["norm"]}, {"weight", "bias"}),
        ({"train_gamma": False, "train_head": True, "head_layers": ["norm"]}, {"weight", "bias"}),
        ({"train_gamma": False, "train_head": False, "head_layers": ["norm"]}, {"bias"}),
    ],
    ids=["both", "gamma", "beta", "none", "extra", "head", "norm-in-a-head-that-does-not-train"],
)
def test_gradients_follow_the_configuration(settings, trained):
    layer = wrap(nn.BatchNorm2d(8), "one", **settings)
    assert {name for name, p in layer.bn_only_layers["one"].named_parameters() if p.requires_grad} == trained
    layer.set_adapter("one", inference_mode=True)
    assert not any(p.requires_grad for p in layer.bn_only_layers.parameters())
