"""What else a norm layer has trains too: EvoNorm's v, FRN's tau, and the gamma and beta of GlobalResponseNorm."""

import json

import pytest
import timm
import torch
from conftest import images
from peft.utils import CONFIG_NAME

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.norms.find import norm_layers

GRN = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "num_classes": 3}


def convnextv2(**config):
    base = timm.create_model("convnextv2_atto", **GRN)
    return get_bn_only_model(base, BNOnlyConfig(seed=0, model_args=GRN, **config))


def values(model, ending):
    return [p.detach().clone() for name, p in model.named_parameters() if name.endswith(f"default.{ending}")]


def trains(model, ending):
    return {p.requires_grad for name, p in model.named_parameters() if name.endswith(f"default.{ending}")}


def resnet(kind):
    arguments = {"norm_layer": kind, "num_classes": 3}
    return timm.create_model("test_efficientnet", **arguments), arguments


@pytest.mark.parametrize(("kind", "extra"), [("evonormb0", "v"), ("frntlu", "tau")])
def test_a_norm_layers_further_parameter_trains_and_comes_back(kind, extra, train_step, tmp_path):
    base, arguments = resnet(kind)
    model = get_bn_only_model(base, BNOnlyConfig(seed=0, model_args=arguments))
    before = values(model, extra)
    assert len(before) >= 5
    train_step(model)
    assert all(not torch.equal(old, new) for old, new in zip(before, values(model, extra), strict=True))
    model.save_pretrained(tmp_path)
    assert torch.equal(load_bn_only_model(tmp_path)(images()), model(images()))
    only = {"v": {"train_gamma": False}, "tau": {"train_beta": False}}[extra]
    frozen = get_bn_only_model(resnet(kind)[0], BNOnlyConfig(seed=0, model_args=arguments, **only))
    assert trains(frozen, extra) == {False}


def test_global_response_norms_train_from_zero_and_come_back(train_step, tmp_path):
    model = convnextv2()
    names = [name for name in model.peft_config["default"].norm_layers if name.endswith("grn")]
    assert len(names) == 4
    assert not set(names) & set(norm_layers(model)), "it is redrawn as a gain, not as a norm layer"
    grn = [model.get_submodule(f"base_model.model.{name}").active_module() for name in names]
    assert all((parameter == 0).all() for layer in grn for parameter in layer.parameters())
    train_step(model)
    assert all((parameter != 0).any() for layer in grn for parameter in layer.parameters())
    model.save_pretrained(tmp_path)
    assert torch.equal(load_bn_only_model(tmp_path)(images()), model(images()))


def test_an_adapter_saved_before_they_trained_loads(train_step, tmp_path):
    old = [name for name in convnextv2().peft_config["default"].norm_layers if not name.endswith("grn")]
    model = train_step(convnextv2(norm_layers=old))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["norm_layers"] == old
    again = load_bn_only_model(tmp_path)
    assert torch.equal(again(images()), model(images()))
    assert "grn" not in "".join(name for name, p in model.named_parameters() if p.requires_grad)


def test_lean_training_is_right_beside_global_response_norms(train_step):
    plain, lean = train_step(convnextv2()), train_step(convnextv2(lean="exact"))
    for ending in ("weight", "bias"):
        for one, other in zip(values(plain, ending), values(lean, ending), strict=True):
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)
