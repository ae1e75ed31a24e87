"""Optimisers by name, and the learning rate, decay and update of every step: those of the loop before timm's."""

import copy
import math

import pytest
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from bn_affine_adapters.errors import ConfigError
from bn_affine_adapters.training.optimizer import create_optimizer
from bn_affine_adapters.training.recipe import Recipe
from bn_affine_adapters.training.schedule import lr_at
from bn_affine_adapters.training.train import read_recipe, train

STEPS = 12  # of an epoch of the digits in batches of 128


pytestmark = pytest.mark.usefixtures("each_run_begins_as_in_a_process_of_its_own")


def lr_before(step, steps, *, lr, epochs, schedule, milestones, lr_decay, warmup_epochs):
    """The learning rate as the loop computed it before it took timm's optimisers."""
    warmup = warmup_epochs * steps
    factor = min(1.0, step / warmup) if warmup else 1.0
    if schedule == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * step / (epochs * steps)))
    drops = sum(step >= milestone * steps for milestone in milestones)
    return lr * factor * lr_decay**drops


@pytest.fixture
def steps():
    """Every optimiser step: the groups' settings, gradients, and parameters before and after."""
    seen = []

    def before(optimizer, args, kwargs):
        groups = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append([groups, [p.detach().clone() for p in tensors], [p.grad.clone() for p in tensors]])

    def after(optimizer, args, kwargs):
        seen[-1].append([p.detach().clone() for group in optimizer.param_groups for p in group["params"]])

    handles = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
    yield seen
    for handle in handles:
        handle.remove()


SCHEDULES = {
    "multistep": {"warmup_epochs": 0.0, "milestones": [0.5, 1.5], "lr_decay": 0.1},
    "cosine": {"warmup_epochs": 0.75, "milestones": [], "lr_decay": 0.1},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_steps_learning_rate_decay_and_update_are_those_of_the_loop_before(schedule, steps, tmp_path):
    told = {"lr": 0.2, "epochs": 2, "schedule": schedule, **SCHEDULES[schedule]}
    more = ["image_size=8", "batch_size=128", "threads=1", "weight_decay=0.01", f"output_dir={tmp_path / 'run'}"]
    train(read_recipe([*(f"{key}={value}" for key, value in told.items()), *more]))
    recorded = list(steps)  # the reference steps too
    assert len(recorded) == 2 * STEPS
    ours = [nn.Parameter(tensor.clone()) for tensor in recorded[0][1]]
    reference = torch.optim.SGD(ours, 0.2, momentum=0.9, weight_decay=0.01)
    for step, (groups, before, gradients, after) in enumerate(recorded):
        (group,) = reference.param_groups
        group["lr"] = lr_before(step, STEPS, **told)
        assert groups == [(group["lr"], 0.01)]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, before, strict=True))
        for parameter, gradient in zip(ours, gradients, strict=True):
            parameter.grad = gradient
        reference.step()
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, after, strict=True))
    assert len(ours) == 30
    assert len({groups[0][0] for groups, *_ in recorded}) >= 3


def test_the_papers_schedules_come_out():
    cifar = read_recipe(["cifar10"])
    at = {epoch: lr_at(cifar, epoch * 391, 391) for epoch in (0, 79, 80, 119, 120, 159)}
    assert at == pytest.approx({0: 0.1, 79: 0.1, 80: 0.01, 119: 0.01, 120: 0.001, 159: 0.001})
    assert lr_at(cifar, 80 * 391 - 1, 391) == 0.1
    imagenet = read_recipe(["imagenet"])
    at = {epoch: lr_at(imagenet, int(epoch * 1251), 1251) for epoch in (0, 2.5, 5, 29, 30, 60, 80)}
    assert at == pytest.approx({0: 0, 2.5: 0.2, 5: 0.4, 29: 0.4, 30: 0.04, 60: 0.004, 80: 0.0004}, rel=1e-3)


def test_timms_schedulers_are_still_other_ones():
    """As lr_at says; where timm's come to the same one day, they can take its place."""

    def rate(kind, step, **settings):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
        kind(optimizer, t_in_epochs=False, **settings).step_update(step)
        return optimizer.param_groups[0]["lr"]

    drops = Recipe(milestones=[8])
    assert lr_at(drops, 79, 10) == 0.1
    assert rate(MultiStepLRScheduler, 79, decay_t=[80], decay_rate=0.1) == pytest.approx(0.01)
    cosine = Recipe(schedule="cosine", epochs=10, warmup_epochs=5)
    assert lr_at(cosine, 49, 10) == pytest.approx(0.1 * 0.98 * 0.5157, rel=1e-3)
    assert rate(CosineLRScheduler, 49, t_initial=100, warmup_t=50) == pytest.approx(0.098)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3))


def groups_of(optimizer, model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "muon"])
def test_weight_decay_is_on_gamma_and_beta_too(name):
    model = network()
    model(torch.zeros(2, 3, 5, 5))
    decays = groups_of(create_optimizer(Recipe(optimizer=name, weight_decay=0.3), model), model)
    assert decays == dict.fromkeys(dict(model.named_parameters()), 0.3)
    assert len(decays) == 6
    given_the_network = groups_of(create_optimizer_v2(model, name, lr=0.1, weight_decay=0.3), model)
    assert {key for key, decay in given_the_network.items() if not decay} >= {"1.weight", "1.bias"}


def test_sgd_is_plain_momentum_and_what_is_frozen_is_left_out():
    model = network()
    model(torch.zeros(2, 3, 5, 5))
    model[0].requires_grad_(False)
    optimizer = create_optimizer(Recipe(sgd_momentum=0.7), model)
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.SGD
    assert (group["momentum"], group["nesterov"], len(group["params"])) == (0.7, False, 4)
    assert create_optimizer(Recipe(optimizer="nesterov"), model).param_groups[0]["nesterov"]
    (group,) = create_optimizer(Recipe(optimizer="adamw", optimizer_args={"betas": [0.5, 0.6]}), model).param_groups
    assert list(group["betas"]) == [0.5, 0.6]


def steps_of(name, first):
    """Gamma after two steps, or None where a package that is not installed is needed."""
    model, images = copy.deepcopy(first), torch.randn(4, 3, 5, 5)
    try:
        optimizer = create_optimizer(Recipe(optimizer=name, lr=0.01), model)
    except ConfigError:
        return None
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    return model[1].weight.detach()


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "muon", "lion"])
def test_an_optimiser_of_timm_takes_steps(name):
    first = network()
    first(torch.zeros(2, 3, 5, 5))
    assert not torch.equal(steps_of(name, first), first[1].weight)


@pytest.mark.slow
def test_each_of_timms_optimisers_takes_steps_unless_it_needs_another_package():
    first = network()
    first(torch.zeros(2, 3, 5, 5))
    after = {name: steps_of(name, first) for name in set(list_optimizers()) - {"adahessian"}}
    assert all(name.startswith(("bnb", "fused")) for name, gamma in after.items() if gamma is None)
    stepped = [name for name, gamma in after.items() if gamma is not None]
    assert len(stepped) >= 60
    assert not [name for name in stepped if torch.equal(after[name], first[1].weight)]


def test_an_argument_that_an_optimiser_does_not_take_is_refused(refused):
    with refused(ConfigError, "optimizer_args={'betta': 1}"):
        create_optimizer(Recipe(optimizer="adamw", optimizer_args={"betta": 1}), nn.BatchNorm2d(3))
