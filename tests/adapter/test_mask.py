"""Masks: the scores choose which of the seed's weights stay, and the file holds a bit for each of them."""

import shutil

import numpy as np
import pytest
import timm
import torch
from conftest import each_once
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from bn_affine_adapters import BNOnlyConfig, export, get_bn_only_model, load_bn_only_model, reinit_
from bn_affine_adapters.adapter.control import Mask
from bn_affine_adapters.adapter.layer import adapter_layers
from bn_affine_adapters.adapter.tensors import digest_of
from bn_affine_adapters.errors import AdapterError, AdapterTensorError, ConfigError
from bn_affine_adapters.norms.find import plain_modules
from bn_affine_adapters.settings import bare
from bn_affine_adapters.sharing.card import write_card
from bn_affine_adapters.sharing.contents import describe, read_tensors
from bn_affine_adapters.sharing.folder import read_config

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
BITS = "base_model.model.blocks.0.conv1.bn_only_layers.bits"
MASKS = ("mask", "signed_mask")


def masked(control="mask", name="cifar_resnet14", **settings):
    config = BNOnlyConfig(seed=0, control=control, train_gamma=False, train_beta=False, norm_init="ones", **settings)
    return get_bn_only_model(timm.create_model(name), config)


def masks(model):
    found = {layer.canonical_name: layer.active_module() for layer in adapter_layers(model)}
    found = {name: module for name, module in found.items() if isinstance(module, Mask)}
    assert found, "no mask in the network"
    return found


# -- what it computes


@each_once(control=MASKS, share=[0.5, 0.3, 1, 1e-9])
def test_exactly_the_share_of_each_layer_stays_before_and_after_training(control, share, train_step):
    model = masked(control, mask_share=share)
    frozen = {key: m.weight.clone() for key, m in plain_modules(model) if isinstance(m, nn.Conv2d)}
    before = {name: mask.weight.detach() for name, mask in masks(model).items()}
    train_step(model, steps=3)
    for name, mask in masks(model).items():
        n = mask.weight.numel()
        kept = mask.weight != 0
        assert kept.sum() == max(1, int(share * n + 0.5)) == (before[name] != 0).sum()
        assert torch.equal(mask.weight[kept].abs(), frozen[name][kept].abs())
        assert control == "signed_mask" or torch.equal(mask.weight[kept], frozen[name][kept])
    assert len(frozen) == len(masks(model)) == 15
    moved = [not torch.equal(mask.weight != 0, before[name] != 0) for name, mask in masks(model).items()]
    assert any(moved) or share in (1, 1e-9)


def test_the_largest_scores_stay_and_their_gradient_goes_straight_through():
    conv = nn.Conv2d(1, 1, (1, 4), bias=False)
    conv.weight.data = torch.tensor([1.0, -2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    config = BNOnlyConfig(seed=0, control="mask")
    for control, scores, weight in (
        ("mask", [0.1, 0.4, -0.9, 0.2], [0.0, -2.0, 0.0, 4.0]),
        ("signed_mask", [0.1, 0.4, -0.9, 0.2], [0.0, -2.0, -3.0, 0.0]),
        ("mask", [0.5, 0.5, 0.5, 0.5], [1.0, -2.0, 0.0, 0.0]),  # of equal scores the first ones
    ):
        config.control = control
        mask = Mask(conv, "conv", config)
        mask.scores.requires_grad_().data = torch.tensor(scores)
        assert mask.weight.flatten().tolist() == weight
        (mask.weight.flatten() * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
        assert mask.scores.grad.tolist() == [1.0, -20.0, 300.0, 4000.0]


def test_scores_begin_with_the_seed():
    first, again = masks(masked()), masks(masked())
    torch.manual_seed(5)
    assert all(torch.equal(mask.scores, again[name].scores) for name, mask in first.items())
    scores = first["blocks.0.conv1"].scores * 144**0.5  # fan_in 16 * 9
    assert 0 < scores.min() < 0.01 < 0.99 < scores.max() < 1
    config = BNOnlyConfig(seed=1, control="mask")
    other = Mask(nn.Conv2d(16, 16, 3), "blocks.0.conv1", config)
    assert not torch.equal(other.scores, first["blocks.0.conv1"].scores)


def test_a_mask_learns():
    model = masked(name="test_resnet").train()
    labels, losses = torch.tensor([0, 1]), []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for _ in range(20):
        loss = F.cross_entropy(model(IMAGES), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-4:]) < losses[0] / 2


def test_all_weights_count_as_those_of_the_network():
    assert masked().get_nb_trainable_parameters() == (173_488, 175_258)  # all convolutions


# -- saved and loaded


@each_once(control=MASKS, name=["cifar_resnet14", "test_efficientnet"])
def test_an_adapter_holds_a_bit_a_weight_and_gives_the_same_bits(control, name, train_step, tmp_path):
    model = train_step(masked(control, name), steps=2)
    model.save_pretrained(tmp_path / "one")
    stored = load_file(tmp_path / "one" / "adapter_model.safetensors")
    kinds = {key.rpartition(".")[2] for key in stored}
    assert kinds == {"bits", "running_mean", "running_var", "num_batches_tracked"}
    for layer, mask in masks(model).items():
        bits = stored[f"base_model.model.{layer}.bn_only_layers.bits"]
        n = mask.weight.numel()
        assert bits.dtype == torch.uint8
        assert bits.numel() == -(-(n + (mask.kept if control == "signed_mask" else 0)) // 8)
        ones = np.unpackbits(bits.numpy(), bitorder="little")
        assert np.array_equal(ones[:n].astype(bool), (mask.weight != 0).flatten().numpy())
    again = load_bn_only_model(tmp_path / "one")
    assert torch.equal(again(IMAGES), model(IMAGES))
    again.save_pretrained(tmp_path / "two")
    assert (tmp_path / "one/adapter_model.safetensors").read_bytes() == (
        tmp_path / "two/adapter_model.safetensors"
    ).read_bytes()
    found = describe(tmp_path / "one", read_config(tmp_path / "one"), read_tensors(tmp_path / "one"))
    assert found["trains"] == [control]
    assert found["contents"]["control"]["tensors"] == len(masks(model))


@pytest.mark.parametrize(("control", "expected"), [("mask", [0b11010010, 0]), ("signed_mask", [0b00011010, 0b101010])])
def test_the_packed_bits_are_those_of_the_format(control, expected):
    config = BNOnlyConfig(seed=0, control=control, mask_share=0.36)  # 0.36 * 10 + 1/2 is 4.1
    mask = Mask(nn.Conv2d(1, 1, (2, 5), bias=False), "conv", config)
    scores = torch.tensor([0.1, 0.9, -0.2, -0.7, 0.8, 0.0, 0.2, 0.3, -0.1, -0.5])
    assert mask.stored({"scores": scores})["bits"].tolist() == expected
    again = mask.loaded({"bits": torch.tensor(expected, dtype=torch.uint8)})["scores"]
    assert mask.stored({"scores": again})["bits"].tolist() == expected
    unit = torch.tensor(10**-0.5)
    signs = {"mask": [0, 1, 0, 0, 1, 0, 1, 1, 0, 0], "signed_mask": [0, 1, 0, -1, 1, 0, 0, 0, 0, -1]}[control]
    assert torch.equal(again, unit * torch.tensor(signs))


@pytest.mark.parametrize("control", MASKS)
def test_merging_and_exporting_give_plain_convolutions_with_the_same_logits(control, train_step, tmp_path):
    model = train_step(masked(control, "test_resnet"))
    logits = model(IMAGES)
    exported = export(model, tmp_path / "plain")
    assert torch.equal(timm.create_model(f"local-dir:{exported}", pretrained=True).eval()(IMAGES), logits)
    assert torch.equal(model.merge_and_unload()(IMAGES), logits)


def test_a_loaded_mask_trains_on_and_keeps_its_share(train_step, tmp_path):
    model = train_step(masked("signed_mask", "test_resnet"))
    model.save_pretrained(tmp_path)
    again = train_step(load_bn_only_model(tmp_path, is_trainable=True), steps=3)
    assert all((mask.weight != 0).sum() == mask.kept for mask in masks(again).values())
    assert not torch.equal(again(IMAGES), model(IMAGES))


def test_disabling_the_adapter_gives_the_frozen_network(train_step):
    model = train_step(masked())
    plain = reinit_(timm.create_model("cifar_resnet14"), 0, norm_init="ones").eval()
    with model.disable_adapter():
        assert torch.equal(model.eval()(IMAGES), plain(IMAGES))


def test_the_card_says_what_share_stays(honest, tmp_path):
    for control, words in (("mask", "a mask that keeps 30%"), ("signed_mask", "with their signs of 15 convolutions")):
        folder = shutil.copytree(honest / control, tmp_path / control)
        write_card(folder, "me/mask")
        assert words in (folder / "README.md").read_text()


def test_an_adapter_without_mask_has_no_new_key():
    assert "mask_share" not in BNOnlyConfig(seed=0).to_dict()
    assert BNOnlyConfig(seed=0, control="mask").to_dict()["mask_share"] == 0.5


# -- refused


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    for control in MASKS:
        masked(control, mask_share=0.3).save_pretrained(folder / control)
    return folder


def changed(folder, change):
    """Change the tensors of an adapter's file, and their digest with them, as a stranger would."""
    import json

    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    content = json.loads(config.read_text())
    content["tensors_digest"] = digest_of({bare(name): tensor for name, tensor in tensors.items()})
    config.write_text(json.dumps(content))
    return folder


def flip(bit):
    def change(tensors):
        bits = np.unpackbits(tensors[BITS].numpy(), bitorder="little")
        bits[bit] ^= 1
        tensors[BITS] = torch.from_numpy(np.packbits(bits, bitorder="little"))

    return change


HOSTILE = {
    "too long": lambda t: t.update({BITS: torch.cat([t[BITS], t[BITS][:1]])}),
    "too short": lambda t: t.update({BITS: t[BITS][:-1].clone()}),
    "empty": lambda t: t.update({BITS: t[BITS][:0].clone()}),
    "one bit more": flip(7),
    "all": lambda t: t[BITS].fill_(255),
    "none": lambda t: t[BITS].fill_(0),
    "after the last": flip(-1),  # 2,304 weights and, signed, 691 signs: 5 bits of the last byte are not used
    "wide": lambda t: t.update({BITS: t[BITS].long() + 256}),
    "as floats": lambda t: t.update({BITS: t[BITS].float()}),
    "missing": lambda t: t.pop(BITS),
    "scores": lambda t: t.update({BITS.replace("bits", "scores"): torch.zeros(2304)}),
    "a byte for a count": lambda t: t.update({k: v.to(torch.uint8) for k, v in t.items() if k.endswith("tracked")}),
}


@each_once(control=MASKS, attack=HOSTILE)
def test_a_mask_of_another_length_share_or_type_is_refused(control, attack, honest, tmp_path, refused):
    folder = changed(shutil.copytree(honest / control, tmp_path / "a"), attack)
    with refused(AdapterTensorError):
        load_bn_only_model(folder)
    model = masked(control, mask_share=0.3)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with refused(AdapterTensorError):
        model.load_adapter(folder, "stranger")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items() if key in before)


def test_bytes_for_norm_layers_are_refused(honest, tmp_path, refused):
    gamma = "base_model.model.bn1.bn_only_layers.running_mean"
    folder = changed(
        shutil.copytree(honest / "mask", tmp_path / "a"), lambda t: t.update({gamma: t[gamma].to(torch.uint8)})
    )
    with refused(AdapterTensorError, "running_mean"):
        load_bn_only_model(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"control": "mask", "seed": None},
        {"control": "mask", "mask_share": 0},
        {"control": "mask", "mask_share": 1.1},
        {"control": "mask", "mask_share": float("nan")},
        {"control": "mask", "mask_share": True},
        {"control": "mask", "mask_share": "half"},
        {"mask_share": 0.5},
        {"control": "two_weights", "mask_share": 0.5},
    ],
)
def test_a_share_that_is_none_is_refused(settings, refused):
    with refused(ConfigError):
        BNOnlyConfig(**{"seed": 0, **settings})


def test_compact_files_and_blends_refuse_a_mask(tmp_path, refused):
    model = masked(name="test_resnet")
    with refused(AdapterError, "mask"):
        export(model, tmp_path / "a", format="compact")
    model.add_adapter("two", BNOnlyConfig(seed=0, control="mask", norm_init="ones"))
    with refused(AdapterError, "average"):
        model.add_weighted_adapter(["default", "two"], [0.5, 0.5], "three")
