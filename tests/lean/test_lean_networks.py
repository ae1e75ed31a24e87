"""Lean training of whole networks: what is replaced, that it computes the same, and when it stands aside.

The gradients are compared in float64, where a rounding does not flip a ReLU. In float32 one of a million inputs of a
ReLU lies so near zero that two ways to compute it disagree, which moves gradients by thousandths in either way.
"""

import copy
import logging
from collections import namedtuple

import pytest
import timm
import torch
from timm.models.densenet import DenseNet
from timm.models.resnet import BasicBlock, ResNet
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model
from bn_affine_adapters.errors import ConfigError, NetworkError
from bn_affine_adapters.lean import LEVELS, lean_, plain_, saved_bytes
from bn_affine_adapters.lean.backends import cpp

BATCH = 4


class Untraceable(nn.Module):
    """A network whose own forward torch.fx cannot follow, of parts that it can."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        if x.mean() > -1:
            x = self.body(x)
        return self.fc(x.mean((2, 3)))


def from_timm(name, **settings):
    def create():
        return timm.create_model(name, num_classes=5, **settings)

    create.model_args = settings  # which the oldest timm does not keep
    return create


# What creates it, the size of its images, the norm layers and convolutions that are replaced, and the greatest share
# of the bytes that plain freezing saves, at each level.
Case = namedtuple("Case", "create size norms convs shares")
NETWORKS = {
    "resnet18": Case(from_timm("resnet18"), 64, 20, 20, (0.38, 0.21, 0.09)),
    "mobilenetv3_small_050": Case(from_timm("mobilenetv3_small_050"), 64, 34, 53, (0.48, 0.31, 0.23)),
    "convnext_atto": Case(from_timm("convnext_atto"), 64, 17, 40, (0.49, 0.42, 0.26)),
    "vit_tiny": Case(from_timm("vit_tiny_patch16_224", img_size=32, patch_size=8), 32, 25, 1, (1.0, 0.91, 0.27)),
    "densenet": Case(lambda: DenseNet(8, (2, 2), num_classes=5), 64, 11, 10, (0.50, 0.30, 0.20)),
}  # fmt: skip
MORE = {
    "cifar_vgg11": Case(from_timm("cifar_vgg11"), 32, 8, 8, (0.30, 0.17, 0.11)),
    "resnet50": Case(from_timm("resnet50"), 64, 53, 53, (0.53, 0.29, 0.11)),
    "efficientnet_b0": Case(from_timm("efficientnet_b0"), 64, 49, 81, (0.45, 0.29, 0.19)),
    "tf_efficientnet_lite0": Case(from_timm("tf_efficientnet_lite0"), 64, 49, 49, (0.37, 0.22, 0.11)),
    "regnety_002": Case(from_timm("regnety_002"), 64, 44, 70, (0.62, 0.41, 0.29)),
    "mobilevit_xxs": Case(from_timm("mobilevit_xxs"), 64, 50, 32, (0.46, 0.30, 0.12)),
}  # fmt: skip
UNTRACED = {"mobilevit_xxs": ["stages.2.1", "stages.3.1", "stages.4.1"]}

Step = namedtuple("Step", "loss gradients statistics saved")


def adapted(create, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    data = {"input_size": [3, 32, 32]}  # on which lean is tried
    config = BNOnlyConfig(seed=0, data_config=data, model_args=getattr(create, "model_args", {}), **settings)
    return get_bn_only_model(create(), config).to(dtype).train()


def step(model, size, seed=0):
    """Run forward and backward once on drawn images; the network stays as it was."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(BATCH, 3, size, size, generator=generator).to(next(model.parameters()).dtype)
    torch.manual_seed(seed)
    loss, saved = saved_bytes(model, lambda: F.cross_entropy(model(images), torch.arange(BATCH) % 3))
    loss.backward()
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None for gradient in trained)
    statistics = {name: buffer.double() for name, buffer in model.named_buffers()}
    return Step(loss.item(), torch.cat([g.flatten() for g in trained]).double(), statistics, saved)


def apart(found, expected):
    """Return how far two vectors are apart, relative to the second's length."""
    return ((found - expected).norm() / expected.norm()).item()


def farthest(found, expected):
    """Return the largest difference of two networks' buffers, relative to each one's largest value, or to 1."""
    assert found.keys() == expected.keys()
    pairs = [(found[key], expected[key]) for key in found if found[key].numel()]
    return max([((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in pairs] or [0.0])


@pytest.mark.parametrize("name", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_every_level_finds_the_layers_has_the_plain_networks_loss_and_keeps_less(name):
    case = (NETWORKS | MORE)[name]
    model = adapted(case.create)
    plain = step(model, case.size)
    shares = []
    for level in LEVELS:
        report = model.set_lean(level)
        assert (report.norms, report.convs, report.untraced) == (case.norms, case.convs, UNTRACED.get(name, []))
        lean = step(model, case.size)
        assert lean.loss == pytest.approx(plain.loss, abs=2e-5)
        assert farthest(lean.statistics, plain.statistics) < 1e-4
        assert apart(lean.gradients, plain.gradients) < (0.08 if level == "smallest" else 0.03)
        shares.append(lean.saved / plain.saved)
    assert shares == sorted(shares, reverse=True)
    assert [share for share, bound in zip(shares, case.shares, strict=True) if share > bound] == [], shares
    assert_exact_in_float64(model, case.size)


def assert_exact_in_float64(model, size):
    """Every gradient and statistic of "exact" is the plain network's."""
    model = model.double()
    model.set_lean(None)
    plain = step(model, size)
    assert model.set_lean("exact").recomputed == 0
    lean = step(model, size)
    assert lean.loss == pytest.approx(plain.loss, rel=1e-12)
    assert apart(lean.gradients, plain.gradients) < 1e-10
    assert farthest(lean.statistics, plain.statistics) < 1e-12


def test_of_a_network_that_cannot_be_traced_the_parts_are():
    model = adapted(Untraceable)
    plain = step(model, 32)
    for level in LEVELS:
        report = model.set_lean(level)
        assert (report.norms, report.convs, report.untraced) == (2, 2, [""])
        assert step(model, 32).saved < 0.6 * plain.saved
    assert_exact_in_float64(model, 32)


SMOOTH = {
    "resnet18": from_timm("resnet18", act_layer="silu"),
    "convnext_atto": NETWORKS["convnext_atto"].create,
    "vit_tiny": NETWORKS["vit_tiny"].create,
}


@pytest.mark.parametrize("name", SMOOTH)
def test_in_float32_the_gradients_are_as_near_to_float64s_as_plain_ones(name):
    size = 32 if name == "vit_tiny" else 64
    # In the layout that lean trains in: the other one's convolutions add up in another order.
    model = adapted(SMOOTH[name]).to(memory_format=torch.channels_last)
    expected = step(copy.deepcopy(model).double(), size).gradients
    plain = apart(step(model, size).gradients, expected)
    model.set_lean("exact")
    assert 0 < plain < 1e-4
    assert apart(step(model, size).gradients, expected) < 2 * plain


def test_the_report_says_what_a_user_measures():
    model = adapted(from_timm("cifar_resnet14"))
    plain = step(model, 32)
    report = model.set_lean("rounded")
    assert report.share == pytest.approx(step(model, 32).saved / plain.saved, abs=0.02)
    assert str(report).startswith("lean rounded: 15 norm layers, 15 convolutions, 1 others; 0.2")


def test_in_evaluation_and_without_gradients_the_plain_forward_runs():
    model = adapted(from_timm("test_resnet"))
    twin = copy.deepcopy(model)
    model.set_lean("smallest")
    images = torch.randn(BATCH, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), twin(images))
    with torch.inference_mode():
        assert torch.equal(model(images), twin(images))
    assert torch.equal(model.eval()(images), twin.eval()(images))
    assert farthest(dict(model.named_buffers()), dict(twin.named_buffers())) == 0


class Count(TorchDispatchMode):
    """Count convolutions and matrix products, which 1 x 1 convolutions may be."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += any(word in function.__name__ for word in ("convolution", "mm."))
        return function(*args, **(kwargs or {}))


def products_in_backward(model, images):
    loss = model(images).square().sum()
    with Count() as count:
        loss.backward()
    return count.products


def test_backward_ends_at_the_first_layer_that_trains():
    images = torch.randn(BATCH, 3, 32, 32)
    counts = {}
    for first in ("bn1", "blocks.2", "blocks.4"):
        network = timm.create_model("cifar_resnet14")
        names = [name for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)]
        owned = names[next(i for i, name in enumerate(names) if name.startswith(first)) :]
        model = get_bn_only_model(network, BNOnlyConfig(seed=0, norm_layers=owned, lean="exact")).train()
        counts[first] = products_in_backward(model, images), len(owned)
    # The head, and of 15 convolutions all but the first: nobody asks for the gradient of its input. Where the stages
    # before do not train, neither do they, nor the two convolutions, the shortcut's is one, that a stage begins with.
    assert counts == {"bn1": (1 + 14, 15), "blocks.2": (1 + 8, 10), "blocks.4": (1 + 3, 5)}


def sums_in_backward(network, images):
    """Return how often backward adds two gradients of images in an operator of its own."""
    added = []

    class Adds(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor):
                added.extend([args] if getattr(args[1], "dim", int)() == 4 else [])
            return function(*args, **(kwargs or {}))

    loss = network(images).square().sum()
    with Adds():
        loss.backward()
    return len(added)


@pytest.mark.parametrize("level", LEVELS)
def test_the_gradients_of_a_residual_block_are_added_where_the_norm_layer_reads_them(level, request):
    request.getfixturevalue("cpp")
    model, images = adapted(from_timm("cifar_resnet14")), torch.randn(BATCH, 3, 32, 32)
    assert sums_in_backward(model, images) == 6  # one a block
    model.set_lean(level)
    assert sums_in_backward(model, images) == (6 if level == "smallest" else 0)  # their sum is less memory than both


def test_images_that_ask_for_a_gradient_get_the_plain_networks():
    model = adapted(from_timm("cifar_resnet14"), torch.float64)
    found = []
    for level in (None, "exact"):
        model.set_lean(level)
        images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        model(images.requires_grad_()).square().sum().backward()
        found.append(images.grad)
    torch.testing.assert_close(*found)


def test_an_unknown_level_is_refused_by_name(refused):
    with refused(ConfigError, "lean", "exct"):
        BNOnlyConfig(seed=0, lean="exct")
    model = adapted(from_timm("test_resnet"))
    with refused(ConfigError, "exct"):
        model.set_lean("exct")


def test_a_network_of_which_everything_trains_is_refused(refused):
    network = timm.create_model("test_resnet")
    with refused(NetworkError, "16 of 16"):
        lean_(network, "exact")
    assert not is_lean(network)


def is_lean(network):
    return any("forward" in module.__dict__ for module in network.modules())


def test_convolutions_that_train_beside_frozen_ones_get_their_gradients():
    model = adapted(from_timm("test_resnet"), torch.float64)
    model.get_base_model().layer2[0].conv2.requires_grad_(True)
    plain = step(model, 64)
    model.set_lean("exact")
    assert apart(step(model, 64).gradients, plain.gradients) < 1e-10


def test_half_precision_on_a_cpu_trains_and_says_that_it_is_slower(caplog):
    model = adapted(from_timm("test_resnet"), torch.float16)
    plain = step(model, 64)
    with caplog.at_level(logging.INFO):
        model.set_lean("exact")
    assert "float16 on a CPU" in caplog.text
    assert apart(step(model, 64).gradients, plain.gradients) < 0.2


def small_resnet():
    """All that a hook may be on, in a network whose activations let backward hooks be."""
    network = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5, channels=(8, 16, 24, 32), stem_width=8)
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return network


# A hook on a block or an identity, which are written out, makes the network run plain; on another layer, that layer.
ENTERED = ("layer1.0", "layer1.0.aa", "layer2.0.downsample")
LAYERS = (
    "conv1",
    "layer2.0.conv2",
    "bn1",
    "layer2.0.bn2",
    "layer1.0.act1",
    "layer2.0.act2",
    "maxpool",
    "global_pool.pool",
)


@pytest.mark.parametrize("place", ENTERED + LAYERS)
def test_hooks_are_called_and_change_nothing(place, caplog):
    model = adapted(small_resnet, torch.float64)
    plain = step(model, 64)
    model.set_lean("exact")
    network, calls = model.get_base_model(), []
    module = network.get_submodule(place)
    handles = [
        module.register_forward_hook(lambda *_: calls.append("after")),
        module.register_forward_pre_hook(lambda *_: calls.append("before")),
    ]
    if place != "conv1":  # whose input has no gradient
        handles.append(module.register_full_backward_hook(lambda *_: calls.append("backward")))
    with caplog.at_level(logging.INFO):
        hooked = [step(model, 64) for _ in range(2)]
    assert calls == ["before", "after", "backward"][: len(handles)] * 2
    assert caplog.text.count(f"{place} has hooks: the network runs plain") == (place in ENTERED)
    for handle in handles:
        handle.remove()
    for found in (*hooked, step(model, 64)):
        assert apart(found.gradients, plain.gradients) < 1e-10
        assert farthest(found.statistics, plain.statistics) < 1e-12


def test_a_forward_that_somebody_put_on_a_layer_is_called():
    model = adapted(from_timm("test_resnet"), lean="exact")
    conv, calls = model.get_base_model().layer1[0].conv2, []
    own = conv.forward
    conv.forward = lambda x: (calls.append(1), own(x))[1]
    model(torch.randn(2, 3, 64, 64))
    assert calls == [1]


def change_checkpointing(network):
    network.set_grad_checkpointing(True)


def change_mode(network):
    network.layer1.eval()


def change_rate(network):
    network.drop_rate = 0.5


@pytest.mark.parametrize("change", [change_checkpointing, change_mode, change_rate])
def test_a_setting_that_changes_later_holds(change, caplog):
    model = adapted(from_timm("test_resnet"))
    lean = step(model, 64)
    change(model.get_base_model())
    plain = step(model, 64)
    model = adapted(from_timm("test_resnet"), lean="exact")
    change(model.get_base_model())
    with caplog.at_level(logging.INFO):
        changed = step(model, 64)
    assert "has changed: the network runs plain" in caplog.text
    assert changed.loss == plain.loss
    assert torch.equal(changed.gradients, plain.gradients)
    assert changed.saved == plain.saved
    assert changed.saved != lean.saved or changed.loss != lean.loss


class Mistraced(nn.Module):
    """Its forward asks whether it got a tensor, which what fx traces with is not."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.conv2 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)
        self.bn2 = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.bn(self.conv(x))
        return self.bn2(self.conv2(torch.relu(x) if isinstance(x, torch.Tensor) else x))


class Failing(Mistraced):
    """Traced without a sign, it runs into an error."""

    def forward(self, x):
        x = self.bn2(self.conv2(self.bn(self.conv(x))))
        return x if isinstance(x, torch.Tensor) else x.answer


@pytest.mark.parametrize(("kind", "reason"), [(Mistraced, "differs by"), (Failing, "fails: ")])
def test_a_forward_that_was_traced_wrong_is_taken_back(kind, reason, caplog):
    network = kind().requires_grad_(False)
    network.bn.requires_grad_(True)
    twin = copy.deepcopy(network)
    report = lean_(network, "exact", (3, 16, 16))
    assert f"the network stays plain, since its lean forward {reason}" in caplog.text
    assert not is_lean(network)
    assert (report.places, report.share) == (0, None)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(network(images), twin(images))


def test_a_network_on_the_meta_device_is_prepared_without_a_trial():
    network = adapted(from_timm("test_resnet")).get_base_model().to("meta")
    report = lean_(network, "exact")
    assert (report.norms, report.share) == (15, None)
    plain_(network)
    assert not is_lean(network)


def test_a_rate_that_a_block_reads_from_a_layer_it_does_not_call_holds(caplog):
    """timm's attention hands `attn_drop.p` to PyTorch's function."""
    create = from_timm("vit_tiny_patch16_224", img_size=32, depth=2)
    model, twin = adapted(create, lean="smallest"), adapted(create)
    for network in (model, twin):
        for module in network.modules():
            if hasattr(module, "attn_drop"):
                module.attn_drop.p = 0.9
    assert step(model, 32).loss == step(twin, 32).loss
    assert "attn_drop has changed: the network runs plain" in caplog.text


def test_checkpointing_that_is_on_already_stays_on(caplog):
    model = adapted(from_timm("test_resnet"))
    model.get_base_model().set_grad_checkpointing(True)
    before = step(model, 64).saved
    assert model.set_lean("exact").places == 0
    assert step(model, 64).saved == before
    assert "its blocks are checkpointed" in caplog.text


def test_images_given_by_name_are_the_same_images(caplog):
    model = adapted(from_timm("cifar_resnet14"), lean="smallest")
    images = torch.randn(4, 3, 32, 32)
    named, placed = (saved_bytes(model, run)[1] for run in (lambda: model(x=images), lambda: model(images)))
    assert named == placed
    assert not caplog.text


def test_a_call_that_the_graph_does_not_know_runs_plain_and_says_so(caplog):
    model = adapted(from_timm("vit_tiny_patch16_224", img_size=32, depth=2), lean="smallest")
    mask = torch.ones(5, 5, dtype=torch.bool)
    model(torch.randn(2, 3, 32, 32), attn_mask=mask).sum().backward()
    assert "called with attn_mask=: the network runs plain" in caplog.text


def test_statistics_that_are_no_numbers_stay_so():
    model, twin = (adapted(from_timm("cifar_resnet14"), lean=level) for level in ("exact", None))
    images = torch.randn(4, 3, 32, 32)
    images[0, 0, 0, 0] = torch.inf
    for network in (model, twin):
        network(images)
    assert [b.isnan().any() for b in model.buffers()] == [b.isnan().any() for b in twin.buffers()]
    assert any(b.isnan().any() for b in twin.buffers())


def test_a_part_under_checkpointing_trains_as_plain_does():
    def run(level):
        model = adapted(Untraceable, torch.float64)
        model.set_lean(level)
        body = model.get_base_model().body
        own = body.forward
        body.forward = lambda x: checkpoint(own, x, use_reentrant=False)
        images = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        model(images).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    assert apart(run("exact"), run(None)) < 1e-10


def test_functions_of_the_whole_network_are_differentiated_as_before():
    network = adapted(from_timm("test_resnet"), torch.float64, lean="exact").get_base_model()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    parameters = dict(network.named_parameters())

    def loss(parameters):
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        return torch.func.functional_call(network, (parameters, buffers), (images,)).square().sum()

    found = torch.func.grad(loss)(parameters)
    network(images).square().sum().backward()
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    assert len(trained) == 30
    for name, parameter in trained.items():
        torch.testing.assert_close(found[name], parameter.grad)


def test_without_a_compiler_it_trains_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(cpp, "loaded", None)
    model = adapted(from_timm("test_resnet"), lean="smallest")
    assert cpp.loaded is False
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert sum(p.grad is not None for p in model.parameters()) == 30
    assert caplog.text.count("lean training runs in PyTorch's own kernels, which are slower") == 1
    model.set_lean("exact")
    assert caplog.text.count("which are slower") == 1


def test_the_kernels_are_left_out_where_the_environment_says_so(monkeypatch, caplog):
    monkeypatch.setenv("BN_AFFINE_ADAPTERS_NATIVE", "0")
    monkeypatch.setattr(cpp, "loaded", None)
    with caplog.at_level(logging.INFO):
        assert cpp.load() is False
        assert cpp.load() is False
    assert caplog.text.count("lean training runs in PyTorch's own kernels") == 1
