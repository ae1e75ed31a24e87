"""Norm layers are found by type, heads and shortcuts by what they are, and names are those of the plain network."""

import importlib
import inspect
import warnings
from pathlib import Path

import pytest
import timm
import timm.layers
import torch
import torch.distributed as dist
from torch import nn

import bn_affine_adapters  # noqa: F401  # registers the paper's networks
from bn_affine_adapters import BNOnlyConfig, get_bn_only_model, shortcut_convs
from bn_affine_adapters.errors import MissingModuleError, NoNormLayerError
from bn_affine_adapters.norms.find import (
    affine,
    canonical,
    head_layers,
    is_norm,
    named_layers,
    norm_layers,
    plain_modules,
    plain_tensors,
)


def meta(name, **arguments):
    """Build a timm network without memory: names and types are all that these tests look at."""
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


class Stack(nn.Sequential):
    """A network that is not timm's."""


NETWORKS = {
    "BatchNorm1d": lambda: meta("efficientvit_m0"),
    "BatchNorm2d": lambda: meta("cifar_resnet14"),
    "BatchNorm3d": lambda: Stack(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4)),
    "BatchNormAct2d": lambda: meta("test_efficientnet"),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(meta("resnet18")),
    "SyncBatchNormAct": lambda: timm.layers.convert_sync_batchnorm(meta("test_efficientnet")),
    "InstanceNorm2d": lambda: Stack(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True)),
    "GroupNorm": lambda: meta("resnet50_gn"),
    "GroupNorm1": lambda: meta("poolformer_s12"),
    "GroupNorm1NoBias": lambda: meta("poolformerv2_s12"),
    "GroupNormAct": lambda: meta("test_efficientnet_gn"),
    "LayerNorm": lambda: meta("test_vit"),
    "LayerNorm2d": lambda: meta("test_convnext"),
    "LayerNormAct2d": lambda: meta("test_efficientnet_ln"),
    "LayerNormNoBias": lambda: meta("caformer_s18"),
    "LayerNorm2dNoBias": lambda: meta("convformer_s18"),
    "RMSNorm": lambda: Stack(nn.Linear(3, 4), nn.RMSNorm(4)),
    "RmsNorm": lambda: meta("test_vit4"),
    "RmsNormFp32": lambda: meta("deepseek_vit_412m"),
    "RmsNorm2d": lambda: meta("convnext_atto_rms"),
    "RmsNormAct2d": lambda: meta("mobilenetv5_300m"),
    "SimpleNorm2d": lambda: meta("convnext_zepto_rms"),
    "EvoNorm2dS0": lambda: meta("test_efficientnet_evos"),
    "EvoNorm2dS0a": lambda: meta("regnetz_b16_evos"),
    "FilterResponseNormTlu2d": lambda: meta("resnetv2_50d_frn"),
    "Affine": lambda: meta("resmlp_12_224"),
}
NO_BETA = {"GroupNorm1NoBias", "LayerNormNoBias", "LayerNorm2dNoBias", "RMSNorm", "RmsNorm", "RmsNormFp32",
           "RmsNorm2d", "RmsNormAct2d", "SimpleNorm2d"}  # fmt: skip


@pytest.mark.parametrize("kind", NETWORKS)
def test_norm_layers_of_every_type_are_found_in_a_network(kind):
    model = NETWORKS[kind]()
    found = norm_layers(model)
    # The oracle knows class names only: all classes above, and which of their objects hold parameters.
    expected = {n: m for n, m in model.named_modules() if type(m).__name__ in NETWORKS and m._parameters}
    expected = {name: m for name, m in expected.items() if any(p is not None for p in m._parameters.values())}
    assert list(found.items()) == list(expected.items())
    here = [m for m in found.values() if type(m).__name__ == kind]
    assert len(here) >= 1, f"this network has no {kind}"
    gamma, beta = ("alpha", "beta") if kind == "Affine" else ("weight", None if kind in NO_BETA else "bias")
    assert {affine(module) for module in here} == {(gamma, beta)}


def test_the_networks_are_26_and_their_norm_layers_are_counted():
    counts = {
        kind: len(norm_layers(NETWORKS[kind]())) for kind in ("BatchNorm2d", "SyncBatchNorm", "LayerNorm", "Affine")
    }
    assert counts == {"BatchNorm2d": 15, "SyncBatchNorm": 20, "LayerNorm": 13, "Affine": 25}
    assert len(NETWORKS) == 26


# Modules of timm that define norm layers. The frozen one has buffers in the place of parameters.
DEFINED_IN = ("norm", "norm_act", "evo_norm", "filter_response_norm", "inplace_abn")
NOT_TRAINED = {"FrozenBatchNormAct2d"}


def test_every_norm_class_that_timm_defines_is_a_norm():
    found = {}
    for name in DEFINED_IN:
        module = importlib.import_module(f"timm.layers.{name}")
        for key, kind in vars(module).items():
            if inspect.isclass(kind) and issubclass(kind, nn.Module) and kind.__module__ == module.__name__:
                found[key] = kind(32)
    norms = {key for key, layer in found.items() if is_norm(layer)}
    assert set(found) - norms == NOT_TRAINED
    assert len(norms) >= 35, f"only {len(norms)} norm classes found"
    per_channel = {key for key in norms if all(p.shape == (32,) for p in found[key].parameters())}
    assert per_channel == norms


def test_a_norm_class_that_is_not_known_would_be_noticed(monkeypatch):
    from timm.layers.evo_norm import EvoNorm2dB0

    monkeypatch.setattr("bn_affine_adapters.norms.find.NORM_TYPES", (nn.LayerNorm,))
    assert not is_norm(EvoNorm2dB0(8))
    assert not is_norm(nn.BatchNorm2d(8))


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.BatchNorm2d(4), True),
        (nn.BatchNorm2d(4, affine=False), True),  # its running statistics are part of an adapter
        (nn.BatchNorm2d(4, affine=False, track_running_stats=False), False),
        (nn.InstanceNorm2d(4), False),
        (nn.LayerNorm(4, elementwise_affine=False), False),
        (nn.LayerNorm(4, bias=False), True),
        (nn.Linear(4, 4), False),
        (nn.PReLU(4), False),
        (nn.LocalResponseNorm(4), False),
        (nn.Identity(), False),
    ],
    ids=str,
)
def test_a_norm_layer_has_gamma_or_beta_or_running_statistics(layer, expected):
    assert is_norm(layer) is expected


def test_a_subclass_of_a_norm_is_a_norm():
    class Mine(nn.BatchNorm2d):
        pass

    assert list(norm_layers(Stack(nn.Conv2d(3, 4, 1), Mine(4)))) == ["1"]


def test_a_layer_named_like_a_norm_is_not_one():
    model = nn.ModuleDict({"bn1": nn.Conv2d(3, 4, 1), "norm": nn.Identity(), "real": nn.BatchNorm2d(4)})
    assert list(norm_layers(model)) == ["real"]


def test_a_network_without_norm_layers_is_refused_with_a_list_of_what_was_seen():
    with pytest.raises(NoNormLayerError) as caught:
        norm_layers(meta("test_nfnet"))
    assert "NormFreeNet" in caught.value.what
    assert caught.value.seen.startswith("0 of 99 modules")
    assert all(kind in caught.value.seen for kind in ("Conv2d", "Linear", "ScaledStdConv2d"))
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "model", [nn.Sequential(), nn.Sequential(nn.BatchNorm2d(3, affine=False))], ids=["empty", "no affine"]
)
def test_a_network_without_gamma_and_beta_is_refused(model):
    with pytest.raises(NoNormLayerError, match="none"):
        norm_layers(model)


HEADS = {
    "cifar_resnet14": ({}, ["fc"]),
    "dla46_c": ({}, ["fc"]),  # a convolution
    "levit_128s": ({}, ["head", "head_dist"]),  # a tuple, each with its own norm
    "deit_tiny_distilled_patch16_224": ({}, ["head", "head_dist"]),
    "crossvit_9_240": ({}, ["head.0", "head.1"]),  # a ModuleList
    "caformer_s18": ({}, ["head.fc"]),  # a block of two linear layers and a norm
    "repvit_m0_9": ({}, ["head"]),
    "resnet18": ({"num_classes": 0}, []),  # an Identity
    "deit_small_distilled_patch16_224": ({"num_classes": 0}, []),  # a tuple of them
    "deepseek_vit_412m_enc": ({}, []),  # None
    "samvit_base_patch16": ({}, []),  # a head without parameters
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_what_timms_get_classifier_returns(name):
    arguments, expected = HEADS[name]
    model = meta(name, **arguments)
    found = head_layers(model)
    assert list(found) == expected
    assert all(model.get_submodule(key) is module for key, module in found.items())


def test_a_network_without_get_classifier_has_no_head():
    assert head_layers(Stack(nn.Linear(3, 4))) == {}


# The column "shortcut convs" of the paper's table.
SHORTCUTS = {
    "cifar_resnet14": (2, 2_560),
    "cifar_resnet110": (2, 2_560),
    "cifar_wrn14_2": (2, 10_240),
    "cifar_wrn14_8": (2, 163_840),
    "cifar_wrn14_32": (2, 2_621_440),
    "resnet18": (3, 172_032),
    "resnet34": (3, 172_032),
    "resnet50": (4, 2_768_896),
    "resnet101": (4, 2_768_896),
    "resnet200": (4, 2_768_896),
    "cifar_vgg11": (0, 0),
    "test_vit": (0, 0),
    "convnext_atto": (0, 0),  # has modules named downsample between stages: no shortcuts
}


@pytest.mark.parametrize("name", SHORTCUTS)
def test_the_shortcut_convolutions_are_as_many_as_in_the_papers_table(name):
    model = meta(name)
    names = shortcut_convs(model)
    modules = [model.get_submodule(n) for n in names]
    assert all(type(module) is nn.Conv2d for module in modules)
    assert (len(names), sum(module.weight.numel() for module in modules)) == SHORTCUTS[name]


CANONICAL = {
    "conv1.weight": "conv1.weight",
    "module.conv1.weight": "conv1.weight",
    "module.module.conv1.weight": "conv1.weight",
    "_orig_mod.conv1.weight": "conv1.weight",
    "module._orig_mod.conv1.weight": "conv1.weight",
    "_orig_mod.module.conv1.weight": "conv1.weight",
    "base_model.model.conv1.weight": "conv1.weight",
    "module.base_model.model.layer1._orig_mod.0.conv1.weight": "layer1.0.conv1.weight",
    "base_model.model.module.conv1.weight": "conv1.weight",
    "_fsdp_wrapped_module.layer1._fsdp_wrapped_module.0.bn1.weight": "layer1.0.bn1.weight",
    "layer1.0._checkpoint_wrapped_module.bn1.weight": "layer1.0.bn1.weight",
    "_orig_mod": "",
    # What only looks like a wrapper's name stays.
    "layer1.module.weight": "layer1.module.weight",
    "base_model.weight": "base_model.weight",
    "module_list.0.weight": "module_list.0.weight",
    "my_orig_mod.weight": "my_orig_mod.weight",
    "base_layer.0.weight": "base_layer.0.weight",
}


@pytest.mark.parametrize("name", CANONICAL)
def test_a_name_is_that_of_the_plain_network(name):
    assert canonical(name) == CANONICAL[name]
    assert canonical(canonical(name)) == CANONICAL[name]


@pytest.fixture(scope="module")
def process_group():
    """A group of one process, in memory: what DDP and FSDP need to wrap."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def wrap_fsdp(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it the older of its two kinds
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def wrap_checkpoint(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ == "Block")
    return model


def wrap_peft(model):
    return get_bn_only_model(model, BNOnlyConfig(seed=0, train_head=True))


WRAPPERS = {
    "DDP": nn.parallel.DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "compile": torch.compile,
    "FSDP": wrap_fsdp,
    "checkpoint": wrap_checkpoint,
    "PEFT": wrap_peft,
    "DDP of compile of PEFT": lambda m: nn.parallel.DistributedDataParallel(torch.compile(wrap_peft(m))),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_network_answers_as_its_plain_self(wrapper, process_group):
    plain = timm.create_model("cifar_resnet14")
    tensors = dict(plain.state_dict())
    norms, shortcuts = list(norm_layers(plain)), shortcut_convs(plain)
    wrapped = WRAPPERS[wrapper](timm.create_model("cifar_resnet14"))
    assert [name for name, _ in wrapped.named_modules()] != [name for name, _ in plain.named_modules()]
    assert list(norm_layers(wrapped)) == norms
    assert shortcut_convs(wrapped) == shortcuts
    assert {name: tuple(t.shape) for name, _, _, t in plain_tensors(wrapped)} == {
        name: tuple(t.shape) for name, t in tensors.items()
    } or wrapper == "FSDP"  # which flattens what it shards
    assert list(head_layers(wrapped)) == ["fc"]


def test_a_second_adapter_is_no_part_of_the_plain_network():
    plain = timm.create_model("cifar_resnet14")
    model = get_bn_only_model(timm.create_model("cifar_resnet14"), BNOnlyConfig(seed=0))
    model.add_adapter("second", BNOnlyConfig(seed=0, norm_init="ones"))
    assert {name for name, *_ in plain_tensors(model)} == set(plain.state_dict())
    assert len(list(plain_tensors(model))) == len(plain.state_dict()) == 92


def test_the_attribute_base_layer_of_dla_is_not_mistaken():
    plain = timm.create_model("dla46_c")
    inside = [name for name in norm_layers(plain) if name.startswith("base_layer.")]
    assert inside == ["base_layer.1"]
    names = list(norm_layers(plain))
    weights = {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()}
    model = get_bn_only_model(plain, BNOnlyConfig(seed=0))
    assert list(norm_layers(model)) == names
    assert {name: tuple(tensor.shape) for name, _, _, tensor in plain_tensors(model)} == weights
    assert any(name.startswith("base_layer.") for name in dict(plain_modules(model)))


def test_a_tied_tensor_comes_once_under_its_bytewise_smallest_name():
    model = nn.ModuleDict({"b": nn.Linear(3, 3), "a": nn.Linear(3, 3), "Z": nn.Linear(3, 3), "ä": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight = model["Z"].weight = model["ä"].weight
    found = [name for name, *_ in plain_tensors(model) if name.endswith("weight")]
    assert found == ["Z.weight"]


def test_a_module_used_twice_gives_its_tensors_once():
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert [name for name, *_ in plain_tensors(model)] == ["0.weight", "0.bias"]


def test_buffers_that_are_not_saved_are_left_out():
    model = nn.BatchNorm2d(3)
    model.register_buffer("scratch", torch.zeros(3), persistent=False)
    model.register_buffer("kept", torch.zeros(3))
    assert {name for name, *_ in plain_tensors(model)} == set(model.state_dict())


def test_modules_are_named_exactly():
    model = meta("resnet18")
    assert list(named_layers(model, ["layer1.0.bn1", "fc"], "norm_layers")) == ["layer1.0.bn1", "fc"]


@pytest.mark.parametrize(
    ("name", "near"), [("layer1.0.bn3", "layer1.0.bn"), ("", None), (".*", None), ("fc.weight", None)]
)
def test_a_name_that_is_not_there_is_an_error_with_the_nearest(name, near):
    with pytest.raises(MissingModuleError) as caught:
        named_layers(meta("resnet18"), [name], "norm_layers")
    assert repr(name) in caught.value.what
    assert "norm_layers" in caught.value.what
    assert (near or "modules") in caught.value.seen


@pytest.mark.slow
def test_the_networks_that_the_readme_excepts_have_no_norm_layer():
    free = [n for n in timm.list_models() if n.startswith("nf_") or "nfnet" in n]
    free += ["vgg11", "vgg13", "vgg16", "vgg19"]
    for name in free:
        with torch.device("meta"), pytest.raises(NoNormLayerError):
            norm_layers(timm.create_model(name))
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"the {len(free)} networks without one: {len(free) - 4} NFNets" in text


def test_a_head_of_two_lists_is_found_part_by_part_and_runs_wrapped():
    if not timm.is_model("efficientvim_m1_dist"):
        pytest.skip(f"timm {timm.__version__} has no EfficientViM")
    network = timm.create_model("efficientvim_m1_dist", num_classes=3)  # two ModuleLists, over which it iterates
    heads, lists = head_layers(network), network.get_classifier()
    assert len(heads) == sum(map(len, lists)) > 2
    assert not any(isinstance(module, nn.ModuleList) for module in heads.values())
    model = get_bn_only_model(network, BNOnlyConfig(seed=0, train_head=True)).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
