"""The gains of residual branches are the constructor's, one, or trained; each comes back from the adapter's file."""

import copy
import json
import pickle

import pytest
import timm
import torch
from conftest import images
from peft.utils import CONFIG_NAME

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.errors import AdapterError, AdapterTensorError, ConfigError, ReinitError
from bn_affine_adapters.norms.scales import layer_scales

NAME = "test_convnext2"
SCALES = ["stages.0.blocks.0.gamma", "stages.1.blocks.0.gamma", "stages.2.blocks.0.gamma", "stages.3.blocks.0.gamma"]


def wrapped(name=NAME, **config):
    return get_bn_only_model(timm.create_model(name, num_classes=3), BNOnlyConfig(seed=0, **config))


def gains(model):
    """Return the values of the layer scales of the network that runs, one after the other."""
    plain = copy.deepcopy(model).merge_and_unload()
    return torch.cat([plain.get_parameter(name).detach() for name in SCALES])


START = {None: 1.0, "constructor": 1e-6, "one": 1.0, "train": 1e-6}


@pytest.mark.parametrize("choice", START)
def test_layer_scales_start_as_asked_train_only_if_asked_and_come_back(choice, train_step, tmp_path):
    model = wrapped(layer_scale=choice)
    assert gains(model).tolist() == pytest.approx([START[choice]] * 320)
    assert model.get_nb_trainable_parameters()[0] == 1344 + 320 * (choice == "train")
    train_step(model)
    assert bool((gains(model) != gains(wrapped(layer_scale=choice))).all()) == (choice == "train")
    model.save_pretrained(tmp_path)
    logits = model(images())
    for base in (None, timm.create_model(NAME, num_classes=3)):
        assert torch.equal(load_bn_only_model(tmp_path, base)(images()), logits)
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["layer_scale"] == (choice or "one")


FAMILIES = {  # a network, how many layer scales it has
    "test_convnext2": 4, "edgenext_xx_small": 15, "xcit_nano_12_p16_224": 40, "resmlp_12_224": 24,
    "poolformer_s12": 24, "beit_base_patch16_224": 24, "resnet18": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layer_scales_of_a_family_are_found(name):
    with torch.device("meta"):
        assert len(layer_scales(timm.create_model(name))) == FAMILIES[name]


def test_an_older_adapter_keeps_the_constructors_constant(tmp_path):
    model = wrapped(layer_scale="constructor")
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / CONFIG_NAME).read_text())
    del content["layer_scale"], content["layer_scales"]
    (tmp_path / CONFIG_NAME).write_text(json.dumps(content))
    assert torch.equal(gains(load_bn_only_model(tmp_path)), gains(model))


def test_given_weights_keep_their_layer_scales():
    base = timm.create_model(NAME, num_classes=3)
    base.stages[0].blocks[0].gamma.data.fill_(0.25)
    model = get_bn_only_model(base, BNOnlyConfig())
    assert model.peft_config["default"].layer_scale == "constructor"
    assert (gains(model)[:32] == 0.25).all()


def test_each_adapter_trains_layer_scales_of_its_own(train_step):
    model = wrapped(layer_scale="train")
    model.add_adapter("two", BNOnlyConfig(seed=0))
    train_step(model)
    first = gains(model)
    model.set_adapter("two")
    assert (gains(model) == torch.tensor(1e-6)).all(), "the second inherits layer_scale, and starts anew"
    train_step(model, steps=3)
    assert not torch.equal(gains(model), first)
    model.set_adapter("default")
    assert torch.equal(gains(model), first)
    with model.disable_adapter():
        assert model.get_base_model().stages[0].blocks[0].gamma.tolist() == pytest.approx([1e-6] * 32)
    with pytest.raises(AdapterError, match="frozen weights"):
        model.add_adapter("three", BNOnlyConfig(seed=0, layer_scale="one"))


def test_lean_training_trains_layer_scales(train_step):
    plain, lean = wrapped(layer_scale="train"), wrapped(layer_scale="train", lean="exact")
    assert torch.allclose(gains(train_step(lean)), gains(train_step(plain)), rtol=1e-4, atol=1e-7)


def test_a_network_is_a_plain_one_again_when_it_is_unloaded(train_step):
    base = timm.create_model(NAME, num_classes=3)
    keys, kinds = list(base.state_dict()), [type(module) for module in base.modules()]
    model = train_step(get_bn_only_model(base, BNOnlyConfig(seed=0, layer_scale="train")))
    again = pickle.loads(pickle.dumps(model.get_base_model()))
    assert torch.equal(again(images()), model(images()))
    plain = model.unload()
    assert plain is base
    assert (list(plain.state_dict()), [type(module) for module in plain.modules()]) == (keys, kinds)


def test_a_network_that_cannot_be_redrawn_keeps_its_parameters():
    base = timm.create_model(NAME, num_classes=3)
    base.register_parameter("mixing", torch.nn.Parameter(torch.randn(3)))
    keys = list(base.state_dict())
    with pytest.raises(ReinitError):
        get_bn_only_model(base, BNOnlyConfig(seed=0, layer_scale="train", architecture="custom"))
    assert list(base.state_dict()) == keys


def test_what_is_no_layer_scale_is_refused(refused):
    with refused(ConfigError, "no layer scale", "convnext_atto"):
        wrapped("test_resnet", layer_scale="train")
    with refused(ConfigError, "not a layer scale", "head.fc.weight"):
        wrapped(layer_scale="train", layer_scales=["head.fc.weight"])
    with refused(ConfigError, "layer_scale", "two"):
        BNOnlyConfig(layer_scale="two")


def test_a_file_without_its_layer_scales_is_refused(tmp_path, refused):
    model = wrapped(layer_scale="train")
    model.save_pretrained(tmp_path)
    wrapped(layer_scale="one").save_pretrained(tmp_path / "one")
    (tmp_path / "one" / "adapter_model.safetensors").replace(tmp_path / "adapter_model.safetensors")
    with refused(AdapterTensorError, "missing", "gamma_scale"):
        load_bn_only_model(tmp_path)
