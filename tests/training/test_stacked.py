"""Replicates trained side by side end where each ends alone.

Twenty steps are compared in float64, where stacking is exact to 1e-13. In float32 rounding changes the sign of an
activation that is nearly zero, and the runs part: no fixed bound holds on every processor. So one step is compared in
float32, and its error is compared with the error that a single run has on the same machine; float64 tells both.
"""

import itertools
import statistics
from dataclasses import replace

import pytest
import timm
import torch
from conftest import script
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional as F

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model, load_bn_only_model, shortcut_convs
from bn_affine_adapters.errors import NetworkError
from bn_affine_adapters.training.data import batches, decode, load_splits
from bn_affine_adapters.training.recipe import CONDITIONS
from bn_affine_adapters.training.stacked import Stacked

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(scope="module")
def digits():
    """The n-th replicate's images and labels: scikit-learn's digits at 16 pixels in the order of its own data_seed."""
    split = load_splits("digits")[0]
    data = decode(replace(split, dataset=split.dataset.select(range(100))), size=16)

    def feed(data_seed, steps, dtype=torch.float64):
        found = batches(
            data,
            batch_size=4,
            data_seed=data_seed,
            epoch=0,
            flip=False,
            crop_padding=0,
            mean=[0.5] * 3,
            std=[0.5] * 3,
        )
        return [(batch.images.to(dtype), batch.labels) for batch in itertools.islice(found, steps)]

    return feed


def adapted(seed, condition="bn", name="cifar_resnet", depth=8, dtype=torch.float64, **settings):
    """A small network as recipes/train.py builds it, in float64 unless said."""
    args = {"num_classes": 10} | ({"depth": depth} if name == "cifar_resnet" else {})
    network = timm.create_model(name, **args)
    extra = shortcut_convs(network) if "shortcut" in condition else []
    # timm keeps a network's creation arguments only from 1.0.31 on.
    config = BNOnlyConfig(
        seed=seed, model_args=args, extra_trainable_modules=extra, **CONDITIONS[condition], **settings
    )
    return get_bn_only_model(network, config).to(dtype).train()


def plain(seed):
    """A network without an adapter, all of which trains."""
    torch.manual_seed(seed)
    return timm.create_model("cifar_resnet", depth=8, num_classes=10).double().train()


def optimizer_of(model, lr):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr, momentum=0.9, weight_decay=1e-4)


def train_alone(networks, feeds, lr=0.1):
    """Train each network by itself; return the losses, (steps, R)."""
    columns = []
    for network, feed in zip(networks, feeds, strict=True):
        optimizer, losses = optimizer_of(network, lr), []
        for images, labels in feed:
            loss = F.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        columns.append(torch.stack(losses))
    return torch.stack(columns, dim=1)


def train_stacked(stacked, feeds, lr=0.1, run=None):
    """Train all replicates at once; return the losses, (steps, R)."""
    optimizer, rows = optimizer_of(stacked, lr), []
    for step in zip(*feeds, strict=True):
        logits = (stacked if run is None else run)(torch.stack([images for images, _ in step]))
        pairs = zip(logits, step, strict=True)
        losses = torch.stack([F.cross_entropy(own, labels) for own, (_, labels) in pairs])
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        rows.append(losses.detach())
    return torch.stack(rows)


def apart(found, expected):
    """Return the largest difference of each kind of tensor, relative to its largest value where that is over 1.

    A beta that a norm layer takes out again is rounding alone, with no size of its own to compare with.
    """
    worst = {}
    for one, other in zip(found, expected, strict=True):
        states = one.state_dict(), other.state_dict()
        assert states[0].keys() == states[1].keys()
        for key, tensor in states[0].items():
            there = states[1][key]
            ratio = ((tensor - there).abs().max() / there.abs().max().clamp(min=1)).item()
            kind = key.split(".")[-1]
            worst[kind] = max(worst.get(kind, 0.0), ratio)
    return worst


def farthest(losses, expected):
    return ((losses - expected) / expected).abs().max().item()


def test_five_replicates_of_resnet14_equal_five_single_runs(digits):
    steps, bound = 20, 1e-10
    feeds = [digits(seed, steps) for seed in range(5)]
    networks, alone = ([adapted(seed, depth=14) for seed in range(5)] for _ in range(2))
    expected = train_alone(alone, feeds)
    stacked = Stacked(networks)
    losses = train_stacked(stacked, feeds)
    stacked.write_back()
    assert losses.shape == expected.shape == (steps, 5)
    assert farthest(losses, expected) < bound
    worst = apart(networks, alone)
    assert set(worst) == {"weight", "bias", *STATISTICS}
    assert {key: value for key, value in worst.items() if not value < bound} == {}
    assert worst["num_batches_tracked"] == 0
    assert len({round(loss, 6) for loss in losses[0].tolist()}) == 5
    assert (losses[-1] != losses[0]).all()


class Coarse(Stacked):
    """Stacking that loses digits: eight bits of the images are left."""

    def forward(self, images):
        return super().forward(images.bfloat16().to(images.dtype))


def errors(networks, truth):
    """Return the median replicate's error of each kind of tensor, as a root of mean squares.

    In the median, because rounding may change the sign of an activation in one replicate, whose error is then large.
    """
    found = []
    for network, exact in zip(networks, truth, strict=True):
        states = [[(key, t.double()) for key, t in each.state_dict().items()] for each in (network, exact)]
        kinds = {}
        for (key, tensor), (_, there) in zip(*states, strict=True):
            kinds.setdefault(key.split(".")[-1], []).append((tensor - there).flatten())
        found.append({kind: torch.cat(parts).square().mean().sqrt().item() for kind, parts in kinds.items()})
    return {kind: statistics.median(each[kind] for each in found) for kind in found[0]}


@pytest.mark.parametrize("way", [Stacked, Coarse])
def test_in_float32_stacking_rounds_no_more_than_a_single_run(way, digits):
    feeds, exact = ([digits(seed, 1, dtype=dtype) for seed in range(5)] for dtype in (torch.float32, torch.float64))
    networks, alone = ([adapted(seed, depth=14, dtype=torch.float32) for seed in range(5)] for _ in range(2))
    truth = [adapted(seed, depth=14) for seed in range(5)]
    train_alone(truth, exact)
    train_alone(alone, feeds)
    stacked = way(networks)
    train_stacked(stacked, feeds)
    stacked.write_back()
    single, together = errors(alone, truth), errors(networks, truth)
    assert single["num_batches_tracked"] == together["num_batches_tracked"] == 0
    compared = {kind: together[kind] / single[kind] for kind in ("weight", "bias", "running_mean", "running_var")}
    # Both errors are sums of many roundings: the ratio is 1 within a tenth. A lost digit is a factor of ten or more.
    noticed = [kind for kind, ratio in compared.items() if ratio > 3]
    assert noticed == (list(compared) if way is Coarse else [])


KINDS = {
    **{condition: (lambda seed, condition=condition: adapted(seed, condition)) for condition in CONDITIONS},
    "frozen statistics": lambda seed: adapted(seed, running_statistics="frozen"),
    "a plain network": plain,
    "fused norm and activation": lambda seed: adapted(seed, name="test_efficientnet"),
    "group norms": lambda seed: adapted(seed, name="test_efficientnet_gn"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_condition_and_network_trains_and_evaluates_as_alone(kind, digits):
    steps = 2
    feeds = [digits(seed, steps) for seed in range(3)]
    if kind in ("fused norm and activation", "group norms"):
        feeds = [[(F.interpolate(images, scale_factor=2.0), labels) for images, labels in feed] for feed in feeds]
    networks, alone = ([KINDS[kind](seed) for seed in range(3)] for _ in range(2))
    before = [{key: value.clone() for key, value in network.state_dict().items()} for network in networks]
    expected = train_alone(alone, feeds)
    stacked = Stacked(networks)
    assert farthest(train_stacked(stacked, feeds), expected) < 1e-10
    assert all(torch.equal(v, b[k]) for n, b in zip(networks, before, strict=True) for k, v in n.state_dict().items())

    images = torch.stack([feed[0][0] for feed in feeds])
    with torch.no_grad():
        state = {key: value.clone() for key, value in stacked.state_dict().items()}
        logits = stacked.eval()(images)
        single = torch.stack([network.eval()(own) for network, own in zip(alone, images, strict=True)])
    assert (logits - single).abs().max() < 1e-10 * single.abs().max()
    assert all(torch.equal(value, state[key]) for key, value in stacked.state_dict().items())
    stacked.write_back()
    assert max(apart(networks, alone).values()) < 1e-10
    changed = {k for n, b in zip(networks, before, strict=True) for k, v in n.state_dict().items() if (v != b[k]).any()}
    assert changed

    trained = {name for name, parameter in stacked.network.named_parameters() if parameter.requires_grad}
    count = sum(p.numel() for p in stacked.parameters() if p.requires_grad)
    assert count == sum(p.numel() for network in networks for p in network.parameters() if p.requires_grad)
    assert {name for name, p in stacked.network.named_parameters() if p.grad is not None} == trained


def test_a_replicate_that_was_written_back_is_saved_and_loaded_alone(digits, tmp_path):
    feeds = [digits(seed, 2, dtype=torch.float32) for seed in range(2)]
    stacked = Stacked([adapted(seed, "bn+head", dtype=torch.float32) for seed in range(2)])
    train_stacked(stacked, feeds)
    stacked.write_back()
    images = torch.stack([feed[0][0] for feed in feeds])
    logits = stacked.eval()(images)
    for index, network in enumerate(stacked.networks):
        network.save_pretrained(tmp_path / str(index))
        loaded = load_bn_only_model(tmp_path / str(index))(images[index])
        assert (loaded - logits[index]).abs().max() < 1e-5 * logits.abs().max()
    assert (logits[0] - logits[1]).abs().max() > 0.1


def test_write_back_finds_the_adapter_that_was_active_and_networks_that_moved(digits):
    networks = [adapted(seed) for seed in range(2)]
    stacked = Stacked(networks)
    train_stacked(stacked, [digits(seed, 2) for seed in range(2)])
    for network in networks:
        network.add_adapter("other", BNOnlyConfig(seed=network.peft_config["default"].seed))
        network.set_adapter("other")
        network.to(torch.float32)  # which replaces every buffer
    others = [{key: v.clone() for key, v in n.state_dict().items() if ".other." in key} for n in networks]
    stacked.write_back()
    for index, network in enumerate(networks):
        assert all(torch.equal(network.state_dict()[key], value) for key, value in others[index].items())
        network.set_adapter("default")
        layer = network.get_base_model().bn1
        assert torch.equal(layer.weight, stacked.network.bn1.weight[index].float())
        assert torch.equal(layer.running_mean, stacked.network.bn1.running_mean[index].float())


def test_a_tensor_that_is_used_twice_stays_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(torch.relu(self.one(x)))

    networks, x = [Tied() for _ in range(3)], torch.randn(3, 5, 4)
    stacked = Stacked(networks)
    assert len(list(stacked.parameters())) == 2
    stacked(x).square().sum().backward()
    for index, network in enumerate(networks):
        network(x[index]).square().sum().backward()
        torch.testing.assert_close(stacked.network.one.weight.grad[index], network.one.weight.grad)


# A captured step


def tiny(seed):
    """A network that is soon compiled."""
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    return get_bn_only_model(nn.Sequential(*layers), BNOnlyConfig(seed=seed)).double().train()


def test_the_compiled_step_is_one_graph_over_static_tensors_and_computes_the_same(digits):
    graphs = []

    def backend(graph, inputs):
        places = [node for node in graph.graph.nodes if node.op == "placeholder"]
        graphs.append([node.meta["tensor_dict"].get("_dynamo_static_input_type") for node in places])
        return aot_eager(graph, inputs)

    feeds = [digits(seed, 3) for seed in range(2)]
    compiled, eager = (Stacked([tiny(seed) for seed in range(2)]) for _ in range(2))
    addresses = {name: buffer.data_ptr() for name, buffer in compiled.named_buffers()}
    run = torch.compile(compiled, fullgraph=True, backend=backend)
    losses = train_stacked(compiled, feeds, run=run)
    assert farthest(losses, train_stacked(eager, feeds)) < 1e-10
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[key], value, rtol=1e-10, atol=1e-12)
    assert {name: buffer.data_ptr() for name, buffer in compiled.named_buffers()} == addresses
    # CUDA graphs take a step that changes its inputs only if these stay where they are: all but the images.
    assert len(graphs) == 1
    tensors = len(list(compiled.parameters())) + len(list(compiled.buffers()))
    assert len(graphs[0]) == tensors + 1
    assert sum(kind is None for kind in graphs[0]) == 1
    assert compiled.network[1].num_batches_tracked.tolist() == [3, 3]


# Mistakes that would be noticed


class SharedStatistics(Stacked):
    def forward(self, images):
        logits = super().forward(images)
        for buffer in self.network.buffers():
            buffer.data.copy_(buffer[:1].expand_as(buffer))
        return logits


class FirstBatchForAll(Stacked):
    def forward(self, images):
        return super().forward(images[:1].expand_as(images))


class OneDirection(Stacked):
    def _stack(self, name, tensor):
        stacked = super()._stack(name, tensor)
        if stacked.requires_grad:
            stacked.register_hook(lambda grad: grad.mean(0, keepdim=True).expand_as(grad))
        return stacked


@pytest.mark.parametrize("wrong", [SharedStatistics, FirstBatchForAll, OneDirection, Stacked])
def test_a_mistake_would_be_noticed(wrong, digits):
    feeds = [digits(seed, 3) for seed in range(2)]
    networks, alone = ([adapted(seed) for seed in range(2)] for _ in range(2))
    expected = train_alone(alone, feeds)
    stacked = wrong(networks)
    losses = train_stacked(stacked, feeds)
    stacked.write_back()
    worst = apart(networks, alone)
    noticed = max(farthest(losses, expected), *worst.values())
    assert noticed < 1e-10 if wrong is Stacked else noticed > 1e-3
    if wrong is SharedStatistics:
        assert worst["running_mean"] > 1e-3


# The benchmark


def test_the_benchmark_compares_both_sides_and_invents_no_figure_of_a_gpu():
    replicates = script("benchmarks/replicates")
    result = replicates.compare(batch=2, replicates=2, steps=1, rounds=1)
    rates, (ratio,) = result["images_per_second"], result["stacked_over_single"].values()
    assert set(rates) == {"single eager", "stacked eager"}
    # The rates are rounded to a tenth of an image per second, the ratio to a thousandth.
    rounding = sum(0.05 / rate for rate in rates.values()) + 0.0005 / ratio
    assert ratio == pytest.approx(rates["stacked eager"] / rates["single eager"], rel=2 * rounding)
    page = replicates.page(result | {"device": "cpu"})
    assert "--model cifar_resnet14 --batch 2 --replicates 2 --steps 1 --rounds 1`" in page
    assert "On a GPU: not yet measured." in page
    assert "On a GPU" not in replicates.page(result | {"device": "A GPU"})
    assert f"| cifar_resnet14 | 2 | 2 | eager | {rates['single eager']} |" in page


# What draws


def test_dropout_is_drawn_for_each_replicate():
    networks = [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    stacked = Stacked(networks)
    x = torch.randn(1, 64, 4).expand(2, -1, -1)
    dropped = stacked(x) == 0
    assert 0.3 < dropped.float().mean() < 0.7
    assert not torch.equal(dropped[0], dropped[1])
    assert torch.equal(*stacked.eval()(x))


# What is refused


def cumulative():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=None))


def frozen_head():
    network = plain(1)
    network.get_classifier().requires_grad_(False)
    return network


SHARED = plain(0)

REFUSED = {
    "none": (list, ("nothing to stack",)),
    "architectures": (lambda: [adapted(0), adapted(1, depth=14)], ("Networks 0 and 1", "blocks")),
    "shapes": (lambda: [nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 4)], ("Networks 0 and 2", "in_features=3")),
    "settings": (lambda: [nn.BatchNorm2d(3), nn.BatchNorm2d(3, eps=1e-3)], ("eps=0.001",)),
    "what trains": (lambda: [plain(0), frozen_head()], ("trained", "frozen")),
    "conditions": (lambda: [adapted(0, "bn"), adapted(1, "bn+head")], ("trained", "frozen")),
    "statistics": (lambda: [adapted(0), adapted(1, running_statistics="frozen")], ("in evaluation mode",)),
    "dtypes": (lambda: [adapted(0), adapted(1, dtype=torch.float32)], ("float64", "float32")),
    "devices": (lambda: [nn.Linear(1, 1), nn.Linear(1, 1, device="meta")], ("on cpu", "on meta")),
    "the same twice": (lambda: [SHARED, SHARED], ("share a tensor", "conv1.weight", "deepcopy")),
    "cumulative statistics": (lambda: [cumulative(), cumulative()], ("bn_momentum None",)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_networks_that_cannot_be_stacked_are_refused(kind, refused):
    build, words = REFUSED[kind]
    with refused(NetworkError, *words):
        Stacked(build())
