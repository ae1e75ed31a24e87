"""What an adapter's file leaves out, since it follows from the seed."""

import pytest
import timm
import torch
from conftest import each_once
from safetensors.torch import load_file, save_file

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.errors import AdapterTensorError

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}


def adapted(name="cifar_resnet14", **settings):
    return get_bn_only_model(timm.create_model(name), BNOnlyConfig(**{"seed": 0, **settings}))


def held(folder, layer="bn1"):
    """The names of a layer's tensors in an adapter's file."""
    tensors = load_file(folder / "adapter_model.safetensors")
    start = f"base_model.model.{layer}.bn_only_layers."
    return {key.removeprefix(start) for key in tensors if key.startswith(start)}


STORED = [
    ({}, {"weight", "bias"}),
    ({"train_gamma": False}, {"bias"}),
    ({"train_beta": False}, {"weight"}),
    ({"train_gamma": False, "train_beta": False, "train_head": True}, set()),
    ({"train_gamma": False, "train_beta": False, "extra_trainable_modules": ["bn1"]}, {"weight", "bias"}),
]


@each_once(case=STORED, norm_init=["uniform", "ones", "ones_beta_one", "symmetric"])
def test_gamma_and_beta_that_do_not_train_are_drawn_again(case, norm_init, train_step, tmp_path):
    trains, stored = case
    model = train_step(adapted(norm_init=norm_init, **trains))
    model.save_pretrained(tmp_path)
    assert held(tmp_path) == stored | STATISTICS
    again = load_bn_only_model(tmp_path)
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    assert torch.equal(again(IMAGES), model.eval()(IMAGES))


@pytest.mark.parametrize("settings", [{"seed": None}, {"seed": 0, "norm_init": "keep"}])
def test_what_does_not_follow_from_the_seed_is_stored(settings, tmp_path):
    adapted(train_gamma=False, train_beta=False, train_head=True, **settings).save_pretrained(tmp_path)
    assert held(tmp_path) == STATISTICS | {"weight", "bias"}


def test_what_was_changed_by_hand_is_stored_and_comes_back(tmp_path):
    model = adapted(train_gamma=False)
    model.get_base_model().bn1.weight.data[3] = 0
    model.save_pretrained(tmp_path)
    assert held(tmp_path) == STATISTICS | {"weight", "bias"}
    assert held(tmp_path, "blocks.0.bn1") == STATISTICS | {"bias"}
    again = load_bn_only_model(tmp_path)
    assert torch.equal(again.get_base_model().bn1.weight, model.get_base_model().bn1.weight)


def test_an_adapter_loaded_over_another_one_draws_what_its_file_leaves_out(tmp_path):
    model = adapted(train_gamma=False)
    before = model.get_base_model().bn1.weight.clone()
    model.save_pretrained(tmp_path)
    model.get_base_model().bn1.weight.data.zero_()
    model.load_adapter(tmp_path, "default")
    assert torch.equal(model.get_base_model().bn1.weight, before)


def test_in_half_precision_too(tmp_path):
    model = adapted(train_gamma=False).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert held(tmp_path) == STATISTICS | {"bias"}
    again = load_bn_only_model(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(again.get_base_model().bn1.weight, model.get_base_model().bn1.weight)


def test_a_state_dict_in_another_type_is_saved_too(tmp_path):
    model = adapted(train_gamma=False)
    state = {key: t.bfloat16() if t.is_floating_point() else t for key, t in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    assert held(tmp_path) == STATISTICS | {"bias"}


@pytest.mark.parametrize(("settings", "missing"), [({}, "weight"), ({"train_gamma": False}, "bias")])
def test_what_trains_may_not_be_missing(settings, missing, tmp_path, refused):
    adapted(**settings).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    key = f"base_model.model.bn1.bn_only_layers.{missing}"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != key}, file)
    with refused(AdapterTensorError, f"missing bn1.bn_only_layers.{missing}"):
        load_bn_only_model(tmp_path)
