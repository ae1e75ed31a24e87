"""What is saved is what ran: a network that has changed since it was wrapped is refused, or the change does nothing."""

import copy
import warnings

import peft
import pytest
import timm
import torch
from conftest import each_once
from safetensors.torch import load_file
from timm.layers import freeze_batch_norm_2d, unfreeze_batch_norm_2d
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.errors import AdapterError, NetworkError, RebuildError
from bn_affine_adapters.norms.find import STATISTICS

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NORMS = 14  # of test_resnet, with those in its stem and shortcuts


def wrapped(name="test_resnet", **settings):
    return get_bn_only_model(timm.create_model(name, num_classes=5), BNOnlyConfig(**{"seed": 0, **settings}))


def same_after_loading(model, folder, base=None):
    model.save_pretrained(folder)
    with torch.no_grad():
        return torch.equal(load_bn_only_model(folder, base)(IMAGES), model.eval()(IMAGES))


# -- what is refused, and what the sentence says


def reset_classifier(model):
    model.get_base_model().reset_classifier(5)


def other_classes(model):
    model.get_base_model().reset_classifier(7)


def no_classes(model):
    model.get_base_model().reset_classifier(0)


def unfreeze_head(model):
    model.get_base_model().get_classifier().requires_grad_(True)


def train_head(model):
    head = model.get_base_model().get_classifier()
    nn.init.ones_(head.weight)


def unfreeze_norm(model):
    model.get_base_model().layer1[0].bn1.weight.requires_grad_(True)


def other_eps(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-2


def eps_of_a_copy(model):
    model.get_base_model().bn1.bn_only_layers["default"].eps = 1e-2


def eps_of_a_base(model):
    model.get_base_model().bn1.base_layer.eps = 1e-2


def freeze_norms(model):
    freeze_batch_norm_2d(model)


def change_weight(model):
    with torch.no_grad():
        model.get_base_model().layer1[0].conv1.weight[0, 0, 0, 0] += 1


def other_activation(model):
    model.get_base_model().layer1[0].act1 = nn.GELU()


def parametrise(model):
    parametrizations.weight_norm(model.get_base_model().layer1[0].conv1)


def prune_weights(model):
    prune.l1_unstructured(model.get_base_model().layer1[0].conv1, "weight", 0.5)


def drop_layer(model):
    del model.get_base_model().layer1[0].act1


CHANGES = {
    reset_classifier: ["require a gradient", "fc.weight"],
    other_classes: ["fc: extra_repr", "out_features=7", "reset_classifier before"],
    no_classes: ["fc: class was 'Linear', and is 'Identity'", "reset_classifier before"],
    unfreeze_head: ["require a gradient", "2, the first is fc.weight", "train_head=True"],
    train_head: ["the frozen head or norm layers differ"],
    unfreeze_norm: ["require a gradient", "1, the first is layer1.0.bn1.weight"],
    other_eps: ["eps", "0.01"],
    eps_of_a_copy: ["bn1: extra_repr", "eps=0.01"],
    eps_of_a_base: ["bn1: extra_repr", "eps=0.01"],
    freeze_norms: ["BatchNorm", "Frozen", "unfreeze_batch_norm_2d"],
    change_weight: ["frozen weights differ", "layer1.0.conv1.weight"],
    other_activation: ["layer1.0.act1: class was 'ReLU', and is 'GELU'"],
    parametrise: ["layer1.0.conv1: class was 'Conv2d', and is 'ParametrizedConv2d'"],
    prune_weights: ["layer1.0.conv1: shape of weight"],
    drop_layer: ["layer1.0.act1"],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_network_that_changed_is_not_saved(change, tmp_path, refused, train_step):
    model = train_step(wrapped(norm_layers=["bn1"]))
    change(model)
    with refused(AdapterError, "has changed since it was wrapped", *CHANGES[change]):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("change", [reset_classifier, other_classes, no_classes])
def test_a_trained_head_that_was_replaced_is_missed(change, tmp_path, refused, train_step):
    model = train_step(wrapped(train_head=True))
    change(model)
    words = ["a module that the adapter owns was replaced", "fc is a new", "reset_classifier before"]
    with refused(AdapterError, *words):
        model.save_pretrained(tmp_path)
    with refused(AdapterError, *words):
        peft.get_peft_model_state_dict(model)


@pytest.mark.parametrize("change", [other_eps, other_activation, change_weight])
def test_no_adapter_is_added_to_a_network_that_changed(change, refused):
    model = wrapped()
    change(model)
    with refused(AdapterError, "has changed since it was wrapped"):
        model.add_adapter("two", BNOnlyConfig(seed=0))


def test_a_frozen_network_can_be_thawed_and_saved(tmp_path, train_step):
    model = train_step(wrapped())
    assert same_after_loading(unfreeze_batch_norm_2d(freeze_batch_norm_2d(model)), tmp_path)


def test_what_only_acts_in_training_may_change(tmp_path, train_step):
    model = train_step(wrapped())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5
        if isinstance(module, nn.ReLU):
            module.inplace = not module.inplace
    model.get_base_model().drop_rate = 0.5
    assert same_after_loading(model, tmp_path)


def test_a_lean_network_is_saved(tmp_path, train_step):
    model = wrapped()
    model.set_lean("exact")
    assert same_after_loading(train_step(model), tmp_path)


# -- frozen norm layers keep their statistics, whoever calls train()


def statistics(model):
    return {n: t.clone() for n, t in model.state_dict().items() if n.endswith(STATISTICS) and "bn_only_layers" not in n}


MODES = {
    "the model": lambda model: model.train(),
    "the network": lambda model: model.get_base_model().train(),
    "a part": lambda model: model.get_base_model().layer1.train(),
    "its layers": lambda model: [layer.train() for layer in model.get_base_model().layer1.children()],
}


@pytest.mark.parametrize("mode", MODES)
def test_frozen_norm_layers_count_no_batch(mode, tmp_path):
    model = wrapped(norm_layers=["bn1"]).eval()
    before, answer = statistics(model), model.get_base_model().layer1(torch.ones(1, 32, 8, 8))
    MODES[mode](model)
    for _ in range(3):
        model(IMAGES)
    now = statistics(model)
    assert len(now) == 3 * (NORMS + 1)
    assert all(torch.equal(now[key], before[key]) for key in before)
    assert torch.equal(model.get_base_model().layer1(torch.ones(1, 32, 8, 8)), answer)
    assert same_after_loading(model, tmp_path)


def test_a_second_adapter_may_own_what_the_first_left_frozen(tmp_path, train_step):
    model = wrapped(norm_layers=["bn1"])
    extra = {"extra_trainable_modules": ["layer2.0.downsample"], "norm_layers": ["layer1.0.bn1"]}
    model.add_adapter("two", BNOnlyConfig(seed=0, **extra))
    model.set_adapter("two")
    train_step(model)
    model.save_pretrained(tmp_path, selected_adapters=["two"])
    again = load_bn_only_model(tmp_path / "two")
    assert torch.equal(again(IMAGES), model(IMAGES))
    plain = model.unload()
    assert not [name for name, _ in plain.named_modules() if name.endswith("base_layer")]


# -- wrappers inside and outside


def compiled(module):
    return torch.compile(module, backend="eager")


def test_a_compiled_part_is_looked_through(tmp_path):
    network = timm.create_model("test_resnet", num_classes=5)
    network.layer1 = compiled(network.layer1)
    model = get_bn_only_model(network, BNOnlyConfig(seed=0)).eval()
    assert model.get_nb_trainable_parameters() == wrapped().get_nb_trainable_parameters()
    with torch.no_grad():
        network.layer1._orig_mod[0].bn1.weight.mul_(2)
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if "_orig_mod" in name]
    answer = model(IMAGES)
    assert torch.equal(load_bn_only_model(tmp_path)(IMAGES), answer)
    base = timm.create_model("test_resnet", num_classes=5)
    base.layer1 = compiled(base.layer1)
    assert torch.equal(load_bn_only_model(tmp_path, base)(IMAGES), answer)


def test_a_part_that_is_compiled_later_is_looked_through(tmp_path, train_step):
    model = train_step(wrapped())
    model.get_base_model().layer1 = compiled(model.get_base_model().layer1)
    assert same_after_loading(model, tmp_path)
    compiled(model).save_pretrained(tmp_path / "whole")
    assert (
        load_file(tmp_path / "whole" / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "adapter_model.safetensors").keys()
    )


WRAPPERS = {"compile": compiled, "DataParallel": nn.DataParallel, "TorchScript": torch.jit.script}


@each_once(wrapper=WRAPPERS, seed=[0, None])
def test_a_network_inside_a_wrapper_is_refused(wrapper, seed, refused):
    network = timm.create_model("test_resnet")
    before = copy.deepcopy(network.state_dict())
    inside = wrapper(network)
    with refused(NetworkError, "at the top"):
        get_bn_only_model(inside, BNOnlyConfig(seed=seed))
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())


def test_a_scripted_part_is_refused(refused):
    network = timm.create_model("test_resnet")
    network.layer1 = torch.jit.script(network.layer1)
    with refused(NetworkError, "TorchScript", "layer1"):
        get_bn_only_model(network, BNOnlyConfig())


@pytest.mark.parametrize("normalise", [spectral_norm, parametrizations.spectral_norm])
def test_spectral_normalisation_is_refused_and_weight_normalisation_is_not(normalise, refused, tmp_path, train_step):
    network = timm.create_model("test_resnet")
    normalise(network.layer1[0].conv1)
    with refused(NetworkError, "Spectral", "layer1.0.conv1"):
        get_bn_only_model(network, BNOnlyConfig(architecture="custom"))
    network = timm.create_model("test_resnet")
    parametrizations.weight_norm(network.layer1[0].conv1)
    base = copy.deepcopy(network)
    model = train_step(get_bn_only_model(network, BNOnlyConfig(architecture="custom")))
    assert same_after_loading(model, tmp_path, base)


# -- timm's reparameterisation


def test_a_reparameterised_network_is_refused_before_and_after(refused):
    name = "repghostnet_050"
    with refused(RebuildError, "has been reparameterised", "before timm.utils.reparameterize_model"):
        get_bn_only_model(reparameterize_model(timm.create_model(name)), BNOnlyConfig(seed=0))
    model = get_bn_only_model(timm.create_model(name), BNOnlyConfig(seed=0)).eval()
    with refused(NetworkError, "cannot be reparameterised", "merge_and_unload"):
        reparameterize_model(model)
    with torch.no_grad():
        answer, plain = model(IMAGES), model.merge_and_unload()
        count = len(list(plain.modules()))
        fused = reparameterize_model(plain)
        assert len(list(fused.modules())) < count
        torch.testing.assert_close(fused(IMAGES), answer, rtol=1e-3, atol=1e-3)


# -- casts, and what was loaded without verification


def test_a_cast_network_is_saved(tmp_path):
    model = wrapped().bfloat16()
    model.save_pretrained(tmp_path)
    again = load_bn_only_model(tmp_path, dtype=torch.bfloat16)
    images = IMAGES.bfloat16()
    assert torch.equal(again(images), model.eval()(images))
    again.save_pretrained(tmp_path / "again")
    wrapped().double().save_pretrained(tmp_path / "double")
    assert torch.equal(load_bn_only_model(tmp_path / "again", dtype=torch.bfloat16)(images), model(images))


def test_given_weights_that_were_cast_later_are_saved_with_a_warning(tmp_path):
    base = timm.create_model("test_resnet")
    model = get_bn_only_model(copy.deepcopy(base), BNOnlyConfig()).bfloat16().eval()
    with pytest.warns(UserWarning, match="was cast after it was wrapped"):
        model.save_pretrained(tmp_path)
    again = load_bn_only_model(tmp_path, base, dtype=torch.bfloat16)
    assert torch.equal(again(IMAGES.bfloat16()), model(IMAGES.bfloat16()))


def test_an_adapter_moved_to_other_weights_names_those(tmp_path, train_step):
    base, other = (timm.create_model("test_resnet", num_classes=5) for _ in range(2))
    get_bn_only_model(copy.deepcopy(base), BNOnlyConfig()).save_pretrained(tmp_path / "one")
    moved = train_step(load_bn_only_model(tmp_path / "one", copy.deepcopy(other), verify="off", is_trainable=True))
    with pytest.warns(UserWarning, match="verify='off', and now belongs to the weights in memory"):
        moved.save_pretrained(tmp_path / "two")
    assert torch.equal(load_bn_only_model(tmp_path / "two", other)(IMAGES), moved(IMAGES))


# -- somebody's own attributes


class Counting(nn.Module):
    """Counts its calls in a plain attribute, as many people's modules do."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.bn(self.conv(x)).mean((2, 3))


def test_a_counter_of_ones_own_class_warns_and_is_saved(tmp_path, train_step):
    model = train_step(get_bn_only_model(Counting(), BNOnlyConfig(seed=0)))
    with pytest.warns(UserWarning, match="the network: calls was 0, and is 2"):
        model.save_pretrained(tmp_path)
    assert torch.equal(load_bn_only_model(tmp_path, Counting())(IMAGES), model(IMAGES))


# -- weights that nobody can have again


def test_a_base_that_nobody_can_have_again_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="a new network, drawn at random"):
        model = get_bn_only_model(timm.create_model("test_resnet"), BNOnlyConfig())
    with pytest.warns(UserWarning, match="BNOnlyConfig\\(seed=0\\)"):
        model.save_pretrained(tmp_path)
    own = Counting()
    nn.init.uniform_(own.bn.weight)
    with pytest.warns(UserWarning, match="nothing tells where they come from"):
        get_bn_only_model(own)


def test_a_base_that_is_drawn_or_pretrained_is_not(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped().save_pretrained(tmp_path)
        network = timm.create_model("test_resnet")
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight)
        get_bn_only_model(network).save_pretrained(tmp_path)
