"""Controls of BatchNorm's size: two weights per output channel, and a scale and shift per input channel."""

import numpy as np
import pytest
import timm
import torch
from conftest import each_once
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from bn_affine_adapters import BNOnlyConfig, export, get_bn_only_model, load_bn_only_model, reinit_
from bn_affine_adapters.adapter.control import Control, InputAffine, TwoWeights, choose
from bn_affine_adapters.adapter.layer import BNOnlyLayer
from bn_affine_adapters.errors import AdapterError, ConfigError
from bn_affine_adapters.norms.find import plain_modules
from bn_affine_adapters.sharing.card import write_card
from bn_affine_adapters.sharing.contents import describe, read_tensors
from bn_affine_adapters.sharing.folder import read_config

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NETWORKS = ("cifar_resnet14", "test_resnet", "test_efficientnet")  # the last has depthwise and squeezing convolutions


def controlled(name="cifar_resnet14", control="two_weights", seed=0, **settings):
    settings = {"train_gamma": False, "train_beta": False, **settings}
    return get_bn_only_model(timm.create_model(name), BNOnlyConfig(seed=seed, control=control, **settings))


def controls(model):
    """The control of every convolution by the convolution's name."""
    layers = [layer for layer in model.modules() if isinstance(layer, BNOnlyLayer)]
    found = {layer.canonical_name: layer.active_module() for layer in layers}
    found = {name: module for name, module in found.items() if isinstance(module, Control)}
    assert found, "no control in the network"
    return found


# -- which weights


def test_the_choice_follows_from_seed_and_name_alone_and_stays():
    assert choose(2, 27, 0, "conv1").tolist() == [[17, 4], [20, 16]]
    assert choose(2, 27, 1, "conv1").tolist() != choose(2, 27, 0, "conv1").tolist()
    assert choose(2, 27, 0, "conv2").tolist() != choose(2, 27, 0, "conv1").tolist()
    assert choose(4, 27, 0, "conv1")[:2].tolist() == choose(2, 27, 0, "conv1").tolist()


@pytest.mark.parametrize(("weights", "chosen"), [(0, 0), (1, 1), (2, 2), (3, 2), (9, 2), (4608, 2), (200_000, 2)])
def test_two_different_weights_a_filter_are_chosen_where_there_are_two(weights, chosen):
    places = choose(500, weights, 3, "layer.conv")
    assert places.shape == (500, chosen)
    assert ((places >= 0) & (places < weights)).all()
    assert all(len(set(row)) == chosen for row in places.tolist())


def test_every_weight_is_as_likely_as_any_other():
    places = choose(40_000, 10, 0, "conv")
    for column in places.T:
        counts = np.bincount(column, minlength=10)
        # chi-squared with 9 degrees of freedom: 27.9 is its 99.9 % quantile
        assert ((counts - 4000) ** 2 / 4000).sum() < 27.9


# -- what trains, what moves


@pytest.mark.parametrize(("name", "expected"), [("cifar_resnet14", 1_120), ("cifar_wrn14_2", 2_240)])
def test_two_weights_are_as_many_as_gamma_and_beta_where_each_convolution_has_a_norm_layer(name, expected):
    assert controlled(name).get_nb_trainable_parameters()[0] == expected
    norms = get_bn_only_model(timm.create_model(name), BNOnlyConfig(seed=0)).get_nb_trainable_parameters()
    assert controlled(name).get_nb_trainable_parameters() == norms


def test_an_input_affine_counts_two_an_input_channel_beside_the_network():
    model = controlled(control="input_affine")
    convs = [m for _, m in plain_modules(model) if isinstance(m, nn.Conv2d)]
    expected = sum(2 * conv.in_channels for conv in convs)
    assert len(convs) == 15
    assert model.get_nb_trainable_parameters() == (expected, 175_258 + expected)


def steps(parameters, loss, weight_decay=0.1):
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=weight_decay)
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def moved(before, after):
    """How many weights of every filter changed, by convolution."""
    return {name: (before[name] != after[name]).flatten(1).sum(1).tolist() for name in before}


def weights_of(model):
    return {name: control.weight.detach().clone() for name, control in controls(model).items()}


def exactly_two(counts):
    return all(count == 2 for filters in counts.values() for count in filters)


@pytest.mark.parametrize("name", NETWORKS)
def test_exactly_two_weights_a_filter_move_and_no_other_moves_or_decays(name, train_step):
    model = controlled(name)
    before = weights_of(model)
    frozen = {key: m.weight.clone() for key, m in plain_modules(model) if isinstance(m, nn.Conv2d)}
    train_step(model, steps=4)
    counts = moved(before, weights_of(model))
    assert exactly_two({key: n for key, n in counts.items() if before[key][0].numel() > 1})
    assert len(counts) >= 11
    after = {key: m.weight for key, m in plain_modules(model) if isinstance(m, nn.Conv2d)}
    assert all(torch.equal(tensor, after[key]) for key, tensor in frozen.items())


def test_the_naive_mask_on_the_gradient_lets_the_other_weights_decay():
    model = reinit_(timm.create_model("cifar_resnet14"), 0).train()
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    for name, conv in convs.items():
        index = torch.from_numpy(choose(conv.out_channels, conv.weight[0].numel(), 0, name))
        mask = torch.zeros_like(conv.weight).flatten(1).scatter(1, index, 1.0).view_as(conv.weight)
        conv.weight.register_hook(lambda grad, mask=mask: grad * mask)
    before = {name: conv.weight.detach().clone() for name, conv in convs.items()}
    parameters = [conv.weight for conv in convs.values()]
    steps(parameters, lambda: F.cross_entropy(model(IMAGES), torch.tensor([0, 1])))
    counts = moved(before, {name: conv.weight for name, conv in convs.items()})
    assert not exactly_two(counts)
    # Without weight decay the mask is right: the check sees the decay, nothing else.
    for name, conv in convs.items():
        conv.weight.data.copy_(before[name])
    steps(parameters, lambda: F.cross_entropy(model(IMAGES), torch.tensor([0, 1])), weight_decay=0)
    counts = moved(before, {name: conv.weight for name, conv in convs.items()})
    assert max(count for filters in counts.values() for count in filters) == 2


def test_the_gradient_is_the_whole_weights_at_the_chosen_places():
    model = controlled("test_resnet").train()
    F.cross_entropy(model(IMAGES), torch.tensor([0, 1])).backward()
    plain = reinit_(timm.create_model("test_resnet"), 0).train()
    F.cross_entropy(plain(IMAGES), torch.tensor([0, 1])).backward()
    for name, control in controls(model).items():
        whole = plain.get_submodule(name).weight.grad.flatten(1)
        torch.testing.assert_close(control.values.grad, whole.gather(1, control.index))


def test_gamma_beta_and_head_stay_and_running_statistics_move(train_step):
    model = controlled()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    train_step(model)
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    kinds = {key.rpartition(".")[2] for key in changed}
    assert kinds == {"values", "running_mean", "running_var", "num_batches_tracked"}
    assert len(changed) == 15 + 3 * 15


# -- the network computes what it should


@each_once(name=NETWORKS, control=["two_weights", "input_affine"])
def test_before_training_a_control_changes_nothing(name, control):
    plain = reinit_(timm.create_model(name), 0).eval()
    assert torch.equal(controlled(name, control).eval()(IMAGES), plain(IMAGES))


@pytest.mark.parametrize("name", NETWORKS)
def test_merging_gives_plain_convolutions_with_the_same_logits(name, train_step, tmp_path):
    model = train_step(controlled(name))
    logits = model(IMAGES)
    exported = export(model, tmp_path / "plain")
    assert torch.equal(timm.create_model(f"local-dir:{exported}", pretrained=True).eval()(IMAGES), logits)
    plain = model.merge_and_unload()
    assert {type(m) for m in plain.modules()} == {type(m) for m in timm.create_model(name).modules()}
    assert torch.equal(plain(IMAGES), logits)


def test_an_input_affine_cannot_be_merged_and_the_model_stays_as_it_is(refused, train_step):
    model = train_step(controlled(control="input_affine"))
    logits = model(IMAGES)
    with refused(AdapterError, "zero padding"):
        model.merge_and_unload()
    assert torch.equal(model(IMAGES), logits)
    assert all(isinstance(control, InputAffine) for control in controls(model).values())


def test_an_input_affine_scales_and_shifts_each_input_channel_within_the_padding():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    control = InputAffine(conv)
    control.scale.data.copy_(torch.tensor([2.0, -1.0, 0.5]))
    control.shift.data.copy_(torch.tensor([1.0, 0.0, -3.0]))
    changed = torch.stack([2 * IMAGES[:, 0] + 1, -IMAGES[:, 1], 0.5 * IMAGES[:, 2] - 3], dim=1)
    torch.testing.assert_close(control(IMAGES), conv(changed))
    assert control.stride == (1, 1)


def test_disabling_the_adapter_gives_the_frozen_network(train_step):
    model = train_step(controlled())
    plain = reinit_(timm.create_model("cifar_resnet14"), 0).eval()
    assert not torch.equal(model(IMAGES), plain(IMAGES))
    with model.disable_adapter():
        assert torch.equal(model(IMAGES), plain(IMAGES))


def test_the_format_in_memory_stays():
    model = controlled().to(memory_format=torch.channels_last)
    formats = {torch.channels_last, torch.contiguous_format}
    for control in controls(model).values():
        ours, theirs = (
            {f for f in formats if w.is_contiguous(memory_format=f)} for w in (control.weight, control.conv.weight)
        )
        assert ours == theirs
        assert torch.channels_last in ours


# -- saved and loaded


@each_once(name=NETWORKS, control=["two_weights", "input_affine"])
def test_an_adapter_stores_the_trained_values_and_running_statistics_and_gives_the_same_logits(
    name, control, train_step, tmp_path
):
    model = train_step(controlled(name, control))
    model.save_pretrained(tmp_path)
    kinds = {"two_weights": {"values"}, "input_affine": {"scale", "shift"}}[control]
    stored = load_file(tmp_path / "adapter_model.safetensors")
    own = {key: tensor for key, tensor in stored.items() if key.rpartition(".")[2] in kinds}
    assert sum(tensor.numel() for tensor in own.values()) == model.get_nb_trainable_parameters()[0]
    assert {key.rpartition(".")[2] for key in stored} == kinds | {"running_mean", "running_var", "num_batches_tracked"}
    assert max(tensor.dim() for tensor in stored.values()) <= 2
    again = load_bn_only_model(tmp_path)
    assert torch.equal(again(IMAGES), model(IMAGES))
    assert again.get_nb_trainable_parameters()[1] == model.get_nb_trainable_parameters()[1]


def test_an_adapter_trains_on_after_loading(train_step, tmp_path):
    model = controlled()
    model.save_pretrained(tmp_path)
    again = load_bn_only_model(tmp_path, is_trainable=True)
    assert again.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    train_step(again)
    assert exactly_two(moved(weights_of(model), weights_of(again)))


def test_norm_adapter_and_control_share_a_backbone(train_step):
    model = train_step(get_bn_only_model(timm.create_model("cifar_resnet14"), BNOnlyConfig(seed=0)))
    logits = model(IMAGES)
    model.add_adapter("control", BNOnlyConfig(seed=0, control="two_weights", train_gamma=False, train_beta=False))
    model.set_adapter("control")
    train_step(model)
    assert not torch.equal(model(IMAGES), logits)
    model.set_adapter("default")
    assert torch.equal(model.eval()(IMAGES), logits)


# -- gamma and beta without normalisation: no control, a setting


def test_frozen_statistics_from_a_seed_are_a_scale_and_shift_per_filter():
    config = BNOnlyConfig(seed=0, running_statistics="frozen")
    layer = get_bn_only_model(timm.create_model("cifar_resnet14"), config).train().get_base_model().bn1
    layer.active_module().bias.data.fill_(0.5)
    x = torch.randn(2, 16, 4, 4)
    expected = x * layer.weight.view(-1, 1, 1) / (1 + 1e-5) ** 0.5 + 0.5
    torch.testing.assert_close(layer(x), expected)


# -- told


def test_the_card_and_the_contents_say_what_trained(tmp_path):
    controlled().save_pretrained(tmp_path)
    write_card(tmp_path, "me/control")
    text = (tmp_path / "README.md").read_text()
    assert "of which only two weights per output channel of 15 convolutions were trained" in text
    found = describe(tmp_path, read_config(tmp_path), read_tensors(tmp_path))
    assert found["trains"] == ["two_weights"]
    assert found["contents"]["control"] == {"tensors": 15, "values": 1_120, "bytes": 4_480}
    assert "other modules" not in found["contents"]


# -- refused


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"control": "two_weights", "seed": None}, "seed"),
        ({"control": "two_weights", "control_layers": ["fc"]}, "fc"),
        ({"control": "two_weights", "control_layers": ["bn1"]}, "bn1"),
        ({"control": "two_weights", "control_layers": ["blocks.0"]}, "blocks.0"),
        ({"control_layers": ["conv1"]}, "control_layers"),
    ],
)
def test_a_control_needs_a_seed_and_convolutions(settings, word, refused):
    with refused(ConfigError, word):
        get_bn_only_model(timm.create_model("cifar_resnet14"), BNOnlyConfig(**{"seed": 0, **settings}))


def test_a_convolution_without_filters_chooses_nothing():
    assert TwoWeights(nn.Conv2d(3, 0, 3), "conv", 0).values.shape == (0, 2)


def test_a_network_without_convolutions_cannot_be_controlled(refused):
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with refused(ConfigError, "no convolution"):
        get_bn_only_model(network, BNOnlyConfig(seed=0, control="input_affine", architecture="custom"))


def test_named_convolutions_alone_are_controlled():
    model = controlled(control_layers=["blocks.0.conv1"])
    assert list(controls(model)) == ["blocks.0.conv1"]
    assert isinstance(controls(model)["blocks.0.conv1"], TwoWeights)
    assert model.get_nb_trainable_parameters()[0] == 32
