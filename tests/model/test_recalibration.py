"""Running statistics are those of a data set, every image counted once, and nothing else moves."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model, recalibrate
from bn_affine_adapters.adapter.layer import adapter_layers
from bn_affine_adapters.errors import ConfigError, DataError

IMAGES = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 + 1
UNEVEN = [*IMAGES[:16].split(8), IMAGES[16:20], (IMAGES[20:], torch.zeros(4))]


def wrapped(**settings):
    return get_bn_only_model(timm.create_model("test_resnet", num_classes=3), BNOnlyConfig(seed=0, **settings)).eval()


def moved(model, before):
    return {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}


def state(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def test_statistics_are_those_of_all_values_that_each_layer_got():
    """A network that normalises by the statistics of its batches, and is asked for all inputs of its layers."""
    model = wrapped()
    slow, got = copy.deepcopy(model).train(), {}
    norms = [(layer.canonical_name, layer.active_module()) for layer in adapter_layers(slow)]
    for name, norm in norms:
        norm.register_forward_pre_hook(lambda _, inputs, name=name: got.setdefault(name, []).append(inputs[0]))
    with torch.no_grad():
        for batch in UNEVEN:
            slow(batch[0] if isinstance(batch, tuple) else batch)
    recalibrate(model, UNEVEN)
    for layer in adapter_layers(model):
        values = torch.cat(got[layer.canonical_name]).double().transpose(0, 1).flatten(1)
        assert values.shape[1] >= 24
        assert torch.allclose(layer.running_mean.double(), values.mean(1), rtol=1e-5, atol=1e-6)
        assert torch.allclose(layer.running_var.double(), values.var(1), rtol=1e-5)
        assert layer.num_batches_tracked == 4
    assert len(got) > 5


def test_one_batch_gives_what_pytorch_gives():
    model, same = wrapped(), wrapped()
    recalibrate(model, [IMAGES])
    update_bn([IMAGES], same)
    for one, other in zip(adapter_layers(model), adapter_layers(same), strict=True):
        assert torch.allclose(one.running_mean, other.running_mean, atol=1e-6)
        assert torch.allclose(one.running_var, other.running_var, rtol=1e-5)
    assert torch.allclose(model(IMAGES), same.eval()(IMAGES), atol=1e-5)


def test_large_offsets_lose_no_digits():
    norm = nn.Sequential(nn.BatchNorm1d(1))
    values = torch.randn(1000, 1, generator=torch.Generator().manual_seed(1)) + 1000
    recalibrate(norm, values.split(10))
    assert torch.allclose(norm[0].running_var.double(), values.double().var(0), rtol=1e-3)
    assert torch.allclose(norm[0].running_mean.double(), values.double().mean(0), rtol=1e-6)


def test_only_the_active_adapters_statistics_move_and_every_mode_stays():
    model = wrapped(norm_layers=["bn1"])
    model.add_adapter("two", BNOnlyConfig(seed=0))
    model.set_adapter("two")
    model.get_base_model().layer1.train()
    before, modes = state(model), [module.training for module in model.modules()]
    recalibrate(model, UNEVEN)
    changed = moved(model, before)
    assert changed
    assert all(".two.running_" in key or ".two.num_batches" in key for key in changed)
    assert modes == [module.training for module in model.modules()]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_dropout_is_off_and_frozen_statistics_can_be_asked_for():
    args = {"num_classes": 3, "drop_rate": 0.9, "drop_path_rate": 0.9}  # given, since timm before 1.0.31 records none
    config = BNOnlyConfig(seed=0, running_statistics="frozen", model_args=args)
    model = get_bn_only_model(timm.create_model("test_resnet", **args), config).train()
    recalibrate(model, [IMAGES])
    first = state(model)
    recalibrate(model, [IMAGES])
    assert not moved(model, first)
    assert not torch.equal(next(adapter_layers(model)).running_mean, torch.zeros(1))


def test_a_plain_network_and_a_compiled_one_are_recalibrated():
    model = wrapped()
    plain = copy.deepcopy(model).merge_and_unload()
    recalibrate(torch.compile(model, backend="eager"), UNEVEN)
    recalibrate(plain, UNEVEN)
    assert torch.equal(plain.eval()(IMAGES), model(IMAGES))


def test_a_shifted_domain_is_normalised_again():
    model = wrapped()
    recalibrate(model, [IMAGES])
    expected = model(IMAGES)
    shifted = IMAGES * 3 + 5
    assert not torch.allclose(model(shifted), expected, atol=0.1)
    recalibrate(model, [shifted])
    # Not the same: the zero padding of the convolutions is not shifted.
    assert (model(shifted) - expected).norm() < expected.norm() / 2


def test_a_broken_batch_changes_nothing():
    model = wrapped()
    before = state(model)
    with pytest.raises(RuntimeError, match="channels"):
        recalibrate(model, [IMAGES, torch.zeros(4, 1, 32, 32)])
    assert not moved(model, before)


def disabled(model):
    model.base_model.disable_adapter_layers()


@pytest.mark.parametrize("change", [disabled, lambda model: model.delete_adapter("default")], ids=["off", "deleted"])
def test_the_frozen_base_is_never_recalibrated(change, refused):
    model = wrapped()
    change(model)
    with refused(ConfigError, "no running statistics", "owns no BatchNorm"):
        recalibrate(model, UNEVEN)


def test_a_network_without_batch_norm_or_a_loader_without_images_is_refused(refused):
    with refused(ConfigError, "no running statistics"):
        recalibrate(timm.create_model("test_vit"), UNEVEN)
    with refused(DataError, "an empty loader"):
        recalibrate(wrapped(), [])
