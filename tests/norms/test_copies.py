"""An evaluation copy computes what `model.eval()` does, and leaves the network as it is."""

import weakref
from functools import partial
from types import MethodType

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model
from bn_affine_adapters.norms.copies import evaluation_copy, shared_copy

SMALL = (
    "cifar_resnet14", "efficientvit_b0", "fasternet_t0", "ghostnet_050", "hgnetv2_b0", "levit_128s", "mobileone_s0",
    "mobilenetv3_small_050", "pit_ti_distilled_224", "regnetx_002", "repvit_m0_9", "resnet10t", "semnasnet_075",
    "xcit_nano_12_p16_224",
)  # fmt: skip
NETWORKS = [*timm.list_models("test_*"), *SMALL]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def small():
    return timm.create_model("test_resnet", num_classes=3)


def photograph(model):
    """What no evaluation may change: modes, every value, and what the modules' attributes are."""
    attributes = [
        {key: id(value) for key, value in vars(module).items() if key != "training"} for module in model.modules()
    ]
    lengths = [
        {key: len(value) for key, value in vars(module).items() if isinstance(value, dict | list | set)}
        for module in model.modules()
    ]
    return [module.training for module in model.modules()], attributes, lengths


def outputs(result):
    return result if isinstance(result, tuple | list) else [result]


def check(model, *inputs):
    """Compare the copy of a network in training mode with the network in evaluation mode, and return the answer."""
    values = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    buffers = {key: tensor.clone() for key, tensor in model.named_buffers()}
    before = photograph(model)
    with torch.no_grad():
        found = outputs(evaluation_copy(model)(*inputs))
    assert photograph(model) == before
    assert all(torch.equal(tensor, values[key]) for key, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, buffers[key]) for key, tensor in model.named_buffers())
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        expected = outputs(model.eval()(*inputs))
    for module, training in modes.items():
        module.training = training
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return found[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_copy_answers_as_the_network_in_evaluation_mode_and_nothing_of_that_moves(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, drop_rate=0.5).train()
    size = model.pretrained_cfg["input_size"][-1]
    size = size if model.pretrained_cfg.get("fixed_input_size") or size <= 160 else 64
    answer = check(model, torch.randn(1, 3, size, size))
    assert answer.isfinite().all()


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
@pytest.mark.parametrize("lean", [None, "exact"])
def test_a_wrapped_network_too_with_lean_training_on_and_some_modules_in_another_mode(name, lean):
    model = get_bn_only_model(timm.create_model(name, num_classes=3), BNOnlyConfig(seed=0, train_head=True))
    model.add_adapter("two", BNOnlyConfig(seed=0, train_head=True))
    size = model.pretrained_cfg["input_size"][-1]
    images = torch.randn(2, 3, size, size)
    model.train()
    model(images)
    model.set_lean(lean, (3, size, size))
    next(model.get_base_model().children()).eval()
    assert len({module.training for module in model.modules()}) == 2
    check(model, images)
    model.set_adapter("two")
    check(model, images)
    with model.disable_adapter():
        check(model, images)
    model.merge_adapter(["default"])
    check(model, images)


def test_an_adapter_switched_on_the_copy_stays_on_the_network():
    model = get_bn_only_model(small(), BNOnlyConfig(seed=0))
    model.add_adapter("two", BNOnlyConfig(seed=0, norm_init="ones"))
    copy = evaluation_copy(model)
    copy.set_adapter("two")
    copy.merge_adapter()
    assert model.active_adapters == ["default"]
    assert model.get_layer_status()[0].active_adapters == ["default"]
    assert model.get_layer_status()[0].merged_adapters == []


def test_the_copy_shares_every_tensor():
    model = small()
    copy = shared_copy(model)
    ours, theirs = dict(model.named_parameters()), dict(copy.named_parameters())
    assert ours.keys() == theirs.keys() != set()
    assert all(theirs[key] is tensor for key, tensor in ours.items())
    assert all(dict(copy.named_buffers())[key] is tensor for key, tensor in model.named_buffers())
    assert not {id(module) for module in model.modules()} & {id(module) for module in copy.modules()}
    copy.register_buffer("mine", torch.ones(1), persistent=False)
    copy.bn1.running_mean = torch.ones(1)
    assert "mine" not in dict(model.named_buffers())
    assert "mine" not in model._non_persistent_buffers_set
    assert len(model.bn1.running_mean) > 1


def patched(model):
    old = model.forward
    model.forward = lambda x: old(x) * 2
    return model


def patched_by_partial(model):
    model.forward = partial(type(model).forward, model)
    return model


def patched_by_method(model):
    model.forward = MethodType(lambda self, x: self.forward_head(self.forward_features(x)), model)
    return model


def with_a_list(model):
    """A network that keeps modules where torch does not see them."""
    model.order = [model.conv1, model.bn1, {"rest": (model.layer1, model.layer2)}]
    model.order.append(model.order)
    model.tail = weakref.ref(model.fc)

    def forward(self, x):
        first, second, rest, _ = self.order
        for layer in (first, second, *rest["rest"]):
            x = layer(x)
        return self.tail()(x.mean((2, 3)).repeat(1, 8)[:, : self.fc.in_features])

    model.forward = MethodType(forward, model)
    return model


def shared_twice(model):
    model.layer2 = model.layer1
    model.layer3 = nn.Conv2d(model.layer1[-1].conv2.out_channels, model.layer4[0].conv1.in_channels, 1)
    return model


def parametrised(model):
    weight_norm(model.conv1[0])
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_part(model):
    model.layer1 = torch.compile(model.layer1, backend="eager")
    return model


CHANGES = [
    patched, patched_by_partial, patched_by_method, with_a_list, shared_twice, parametrised, compiled,
    compiled_in_place, compiled_part,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_refers_to_the_networks_modules_refers_to_the_copys(change):
    model = change(small()).train()
    check(model, IMAGES)


def test_hooks_are_called_and_what_they_write_to_is_theirs():
    model, seen = small().train(), []
    names = {model: "the network"}

    class Listener(nn.Module):
        def look(self, module, inputs, output):
            self.output = output

    listener = Listener()
    handle = model.bn1.register_forward_hook(lambda module, inputs, output: seen.append((module.training, output)))
    model.bn1.register_forward_hook(listener.look)
    model.register_forward_pre_hook(lambda module, inputs: seen.append(names[module]))
    check(model, IMAGES)
    assert len(seen) == 4
    assert seen[1][0] is False
    assert torch.equal(listener.output, seen[1][1])
    handle.remove()
    with torch.no_grad():
        evaluation_copy(model)(IMAGES)
    assert seen[4:] == ["the network"]


def test_a_cache_that_evaluation_fills_is_the_copys():
    model = timm.create_model("levit_128s", num_classes=2).train()
    caches = [module for module in model.modules() if hasattr(module, "attention_bias_cache")]
    with torch.no_grad():
        copy = evaluation_copy(model)
        copy(torch.randn(1, 3, 224, 224))
    assert len(caches) > 5
    assert not any(module.attention_bias_cache for module in caches)
    assert any(getattr(module, "attention_bias_cache", None) for module in copy.modules())
