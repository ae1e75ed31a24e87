"""Running statistics move once a batch, in the active adapter's copies and nowhere else, whoever moves them."""

import pytest
import timm
import torch
from timm.layers import set_reentrant_ckpt
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model

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
