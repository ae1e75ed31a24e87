"""Running statistics move once a batch, in the active adapter's copies and nowhere else, whoever moves them."""

import pickle
from copy import deepcopy

import pytest
import timm
import torch
from timm.layers import set_reentrant_ckpt
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model
from bn_affine_adapters.adapter.layer import adapter_layers

IMAGES = torch.randn(3, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def wrapped(name="test_resnet", **settings):
    return get_bn_only_model(timm.create_model(name, num_classes=3), BNOnlyConfig(**{"seed": 0, **settings})).train()


def train(model, forward=None):
    """Three steps of SGD; the values that they leave."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for batch in IMAGES:
        F.cross_entropy((forward or model)(batch), LABELS).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def counted(values):
    return {int(tensor) for key, tensor in values.items() if key.endswith("default.num_batches_tracked")}


@pytest.fixture(params=[False, True], ids=["not reentrant", "reentrant"])
def reentrant(request):
    set_reentrant_ckpt(request.param)
    yield request.param
    set_reentrant_ckpt(False)


OWNED = {
    "bn": {},
    "fewer norm layers": {"norm_layers": ["bn1", "layer2.0.bn2"]},
    "frozen statistics": {"running_statistics": "frozen"},
    "a whole module": {"extra_trainable_modules": ["layer2.0"]},
    "two weights": {"control": "two_weights"},
}


@pytest.mark.parametrize("owned", OWNED.values(), ids=OWNED)
def test_recomputation_leaves_the_statistics_of_training_without_it(owned, reentrant):
    expected = train(wrapped(**owned))
    model = wrapped(**owned)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.set_grad_checkpointing(True)
    found = train(model)
    assert found.keys() == expected.keys()
    different = [key for key in expected if not torch.equal(found[key], expected[key])]
    assert not different
    assert counted(found) == ({0} if owned.get("running_statistics") else {3})
    moved = {key for key in found if not torch.equal(found[key], before[key])}
    assert all(".bn_only_layers.default." in key for key in moved)
    assert moved


@pytest.mark.parametrize("name", ["test_efficientnet", "test_byobnet", "cifar_resnet14"])
def test_a_network_of_other_norm_layers_or_checkpointed_whole(name, reentrant):
    """Nested, too: a checkpoint inside a checkpoint."""
    expected = train(wrapped(name))
    model = wrapped(name)

    def inner(x):
        return checkpoint(model, x, use_reentrant=False)

    found = train(model, lambda x: checkpoint(inner, x.requires_grad_(reentrant), use_reentrant=reentrant))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert counted(found) == {3}


@pytest.mark.parametrize("level", ["exact", "rounded", "smallest"])
def test_lean_layers_too(level, reentrant):
    expected = train(wrapped(lean=level))
    model = wrapped(lean=level)
    assert model.base_model.lean.places > 5
    found = train(model, lambda x: checkpoint(model, x.requires_grad_(), use_reentrant=reentrant))
    close = [key for key in expected if key.endswith(("running_mean", "running_var"))]
    assert len(close) > 20
    assert all(torch.allclose(found[key], expected[key], rtol=1e-3, atol=1e-4) for key in close)
    assert counted(found) == counted(expected) == {3}


def test_checkpointing_turned_on_after_lean_training(reentrant):
    expected, model = wrapped(), wrapped(lean="exact")
    for network in (expected, model):
        network.set_grad_checkpointing(True)
    expected, found = train(expected), train(model)
    assert all(torch.allclose(found[key], expected[key], rtol=1e-3, atol=1e-4) for key in expected)
    assert counted(found) == {3}


def test_the_statistics_of_a_batch_are_still_those_that_normalise_it_again(reentrant):
    """Gradients are those without checkpointing."""
    models = [wrapped(), wrapped()]
    models[1].set_grad_checkpointing(True)
    for model in models:
        F.cross_entropy(model(IMAGES[0]), LABELS).backward()
    pairs = list(zip(*(model.parameters() for model in models), strict=True))
    assert all((a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad) for a, b in pairs)
    assert sum(a.grad is not None for a, _ in pairs) > 20


# -- torch.optim.swa_utils.update_bn


def two_adapters(**owned):
    model = wrapped(**owned)
    model.add_adapter("two", BNOnlyConfig(**{"seed": 0, **owned}))
    for name in ("two", "default"):
        model.set_adapter(name)
        train(model)
    return model


def averaged(model):
    """The statistics that update_bn has to leave: means over the batches, computed without it on a copy."""
    copy = deepcopy(model).train()
    for layer in adapter_layers(copy):
        for norm in layer.bn_only_layers["default"].modules() if "default" in layer.bn_only_layers else ():
            if isinstance(norm, nn.BatchNorm2d) and norm.training:
                norm.reset_running_stats()
                norm.momentum = None
    with torch.no_grad():
        for batch in IMAGES:
            copy(batch)
    return copy.state_dict()


@pytest.mark.parametrize("owned", OWNED.values(), ids=OWNED)
def test_update_bn_changes_the_active_adapters_statistics_alone_and_gives_their_means(owned):
    model = two_adapters(**owned)
    expected, before = averaged(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    update_bn(IMAGES, model)
    found = model.state_dict()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []
    moved = {key for key in found if not torch.equal(found[key], before[key])}
    assert all(".bn_only_layers.default." in key for key in moved)
    assert bool(moved) == (owned.get("running_statistics") != "frozen")
    momenta = {norm.momentum for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)}
    assert momenta == {0.1}


@pytest.mark.parametrize(
    "state",
    [
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: (model.add_adapter("new", BNOnlyConfig(seed=0)), model.delete_adapter("default")),
        lambda model: [model.delete_adapter(name) for name in ("two", "default")],
    ],
    ids=["disabled", "deleted", "all deleted"],
)
def test_update_bn_leaves_the_base_alone_in_every_state(state):
    model = two_adapters()
    state(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    active = f".bn_only_layers.{model.active_adapters[0]}." if model.active_adapters else "none"
    update_bn(IMAGES, model)
    moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert all(active in key for key in moved)


def test_update_bn_follows_a_switch_and_a_merge():
    model = two_adapters()
    for switch in (
        lambda: model.set_adapter("two"),
        lambda: (model.set_adapter("default"), model.merge_adapter(["two"])),
    ):
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        switch()
        update_bn(IMAGES[:2], model)
        moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
        assert moved
        assert all(".bn_only_layers.two.running" in key or ".two.num_batches" in key for key in moved)
        model.unmerge_adapter()
        model.set_adapter("two")
        train(model)


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_a_plain_network_resets_as_ever(how):
    plain = getattr(two_adapters(norm_layers=["bn1"]), how)()
    update_bn(IMAGES, plain)
    norms = [norm for norm in plain.modules() if isinstance(norm, nn.BatchNorm2d)]
    assert len(norms) > 5
    assert all(int(norm.num_batches_tracked) == 3 for norm in norms)
    assert not any("reset_running_stats" in vars(norm) for norm in norms)


def test_an_average_of_models_is_updated_too():
    """Copied and pickled models keep what protects their statistics."""
    model = two_adapters()
    for copy in (AveragedModel(model).module, pickle.loads(pickle.dumps(model))):
        before = {key: tensor.clone() for key, tensor in copy.state_dict().items()}
        update_bn(IMAGES, copy)
        moved = {key for key, tensor in copy.state_dict().items() if not torch.equal(tensor, before[key])}
        assert moved
        assert all(".bn_only_layers.default." in key for key in moved)
