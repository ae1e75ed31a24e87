"""Pruning: what leaves was constant, what stays computes the same, and the report says both."""

import json
import os
from copy import deepcopy
from dataclasses import asdict

import pytest
import timm
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bn_affine_adapters import BNOnlyConfig, export, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.cli import main
from bn_affine_adapters.deploy.channels import Analysis
from bn_affine_adapters.deploy.pruning import BORDER, LAST, READ, TIED, prune
from bn_affine_adapters.errors import AdapterError, ConfigError, NetworkError, OutputFolderError
from bn_affine_adapters.lean.rewrite import trace
from bn_affine_adapters.norms.statistics import BATCH_NORMS

# name: (architecture, creation arguments, share of parameters left by half of the gammas being 0, at most)
NETWORKS = {
    "resnet18": ("test_resnet", {}, 0.5),
    "mobilenetv2": ("mobilenetv2_050", {}, 0.4),
    "mobilenetv3": ("mobilenetv3_small_050", {}, 0.8),
    "densenet": ("densenet121", {"growth_rate": 8, "block_config": (2, 3, 2)}, 0.6),
    "efficientnet": ("test_efficientnet", {}, 0.6),
    "same padding": ("tf_efficientnet_lite0", {}, 0.4),
    "vgg": ("cifar_vgg11", {}, 0.4),
    "cifar": ("cifar_resnet14", {}, 0.6),
    "grouped": ("test_byobnet", {}, 0.7),
}


def norms(network):
    return [module for module in network.modules() if type(module).forward in BATCH_NORMS]


def draw_(network, share=0.5):
    """Draw the norm layers of a network, with a share of gammas that are 0; return it for inference."""
    for norm in norms(network):
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2)
        norm.weight.data.normal_(1, 0.3)
        norm.bias.data.normal_(0, 0.5)
        norm.weight.data[torch.rand(len(norm.weight)) < share] = 0
    return network.eval().requires_grad_(False)


def difference(one, other, images):
    """Return the largest difference of two networks' outputs, over the largest output."""
    with torch.no_grad():
        a, b = one(images), other(images)
    return float((a - b).abs().max() / a.abs().max())


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_smaller_network_computes_the_same(name):
    torch.manual_seed(0)
    architecture, args, share = NETWORKS[name]
    network, images = draw_(timm.create_model(architecture, num_classes=5, **args)), torch.randn(3, 3, 40, 40)
    before = deepcopy(network.state_dict())
    smaller, report = prune(network, input_size=(3, 40, 40))
    assert difference(network, smaller, images) <= 1e-5
    assert report.difference <= 1e-5
    assert report.parameters == (parameters(network), parameters(smaller))
    assert report.parameters[1] <= share * report.parameters[0]
    assert report.multiply_adds[1] < report.multiply_adds[0]
    channels = [sum(len(norm.weight) for norm in norms(each)) for each in (network, smaller)]
    assert list(report.channels) == channels
    zero = sum(int((norm.weight == 0).sum()) for norm in norms(network))
    assert zero <= report.dead < channels[0]  # one that only reads constants is constant too
    assert sum(report.kept.values()) >= report.dead - (channels[0] - channels[1])
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items()), "it is not changed"


class Net(nn.Module):
    """Two convolutions with a norm layer and an activation between them; the second one may be padded."""

    def __init__(self, act=nn.ReLU, padding=1, middle=None):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.act, self.middle = act(), middle or nn.Identity()
        self.conv2 = nn.Conv2d(8, 4, 3, padding=padding, bias=False)

    def forward(self, x):
        return self.conv2(self.middle(self.act(self.norm(self.conv1(x)))))


IMAGES = torch.linspace(-2, 2, 2 * 3 * 8 * 8).sin().view(2, 3, 8, 8) * 3


def constants(network, beta):
    """Set the gammas of five of the eight channels to 0, and their betas."""
    network.norm.weight.data[:5] = 0
    network.norm.bias.data[:5] = torch.tensor(beta)
    return network.eval()


def pruned(network, **options):
    smaller, report = prune(network, input_size=(3, 8, 8), **options)
    with torch.no_grad():
        torch.testing.assert_close(smaller(IMAGES), network(IMAGES), rtol=1e-5, atol=1e-5)
    return smaller, report


def test_constants_before_zero_padding_become_one_channel():
    network = constants(Net(), [0.5, 1.0, 2.0, -1.0, 0.0])
    smaller, report = pruned(network)
    assert (smaller.conv1.out_channels, len(smaller.norm.weight), smaller.conv2.in_channels) == (4, 4, 4)
    assert smaller.norm.bias[0] == 2
    assert smaller.conv2.bias is None
    assert report.kept == {BORDER: 1}


def test_a_single_constant_before_zero_padding_stays():
    network = constants(Net(), [0.5, 0.0, 0.0, -1.0, 0.0])
    smaller, report = pruned(network)
    assert smaller.conv2.in_channels == 4
    assert torch.equal(smaller.conv2.weight, network.conv2.weight[:, [0, 5, 6, 7]])
    assert report.kept == {BORDER: 1}


@pytest.mark.parametrize("padding", [0, "valid"])
def test_without_padding_constants_become_a_bias(padding):
    smaller, report = pruned(constants(Net(padding=padding), [0.5, 1.0, 2.0, -1.0, 0.0]))
    assert smaller.conv2.in_channels == 3
    assert smaller.conv2.bias.abs().min() > 0
    assert report.kept == {}
    assert report.dead == 5


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_other_padding_than_zeros_repeats_the_constant(mode):
    network = constants(Net(), [0.5, 1.0, 2.0, -1.0, 0.0])
    network.conv2 = nn.Conv2d(8, 4, 3, padding=1, padding_mode=mode)
    smaller, _ = pruned(network)
    assert smaller.conv2.in_channels == 3


def test_a_tensor_that_two_layers_share_is_not_changed_in_place():
    network = constants(Net(padding=1), [0.5, 1.0, 2.0, -1.0, 0.0])
    network.conv3 = nn.Conv2d(8, 4, 3, bias=False)
    network.conv3.weight = network.conv2.weight

    class Both(Net):
        def forward(self, x):
            x = self.act(self.norm(self.conv1(x)))
            return torch.cat([self.conv2(x).flatten(1), self.conv3(x).flatten(1)], 1)

    network.__class__ = Both
    smaller, _ = pruned(network)
    assert (smaller.conv2.in_channels, smaller.conv3.in_channels) == (4, 4)
    assert smaller.conv3.weight.shape[1] == 4


class Residual(nn.Module):
    """A stem, a block with a residual sum, and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = F.relu(self.norm0(self.stem(x)))
        x = F.relu(x + self.norm(self.conv(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def test_a_residual_stream_loses_the_channels_alone_that_are_constant_everywhere():
    network = draw_(Residual(), share=0)
    network.norm.weight.data[:2] = 0
    smaller, report = pruned(network)
    assert report.kept == {TIED: 2}
    assert report.channels == (12, 12)
    network.norm0.weight.data[0] = 0
    network.norm0.bias.data[0] = -1
    smaller, report = pruned(network)
    assert report.channels == (12, 10)
    assert (smaller.stem.out_channels, smaller.conv.in_channels, smaller.head.in_features) == (5, 5, 5)


def test_a_layer_whose_channels_are_all_constant_keeps_one():
    network = Net()
    network.norm.weight.data[:] = 0
    network.norm.bias.data[:] = -1
    with torch.no_grad():  # the output is 0 everywhere: a second path, so that there is something to compare
        network.conv2.bias = nn.Parameter(torch.ones(4))
    smaller, report = pruned(network.eval())
    assert smaller.conv1.out_channels == 1
    assert report.kept == {LAST: 1}


def test_a_concatenated_channel_stays_if_another_layer_reads_it():
    class Dense(Residual):
        def forward(self, x):
            x = self.stem(x)
            x = torch.cat([x, self.conv(F.relu(self.norm0(x)))], 1)
            return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))

    network = draw_(Dense(), share=0)
    network.head = nn.Linear(12, 2)
    network.norm0.weight.data[:2] = 0
    network.norm0.bias.data[:2] = -1
    _, report = pruned(network.eval())
    assert report.kept == {READ: 2}
    network.head.weight.data[:, 0] = 0
    _, report = pruned(network)
    assert report.channels == (6, 5)


class Gate(nn.Module):
    """Squeeze and excitation behind a depthwise convolution, as in EfficientNet."""

    def __init__(self):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x):
        return x * self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


def test_a_gate_loses_what_it_multiplies_with_zero_alone():
    smaller, report = pruned(constants(Net(middle=Gate()), [0.5, 1.0, 0.0, -1.0, 0.0]))
    assert report.kept == {TIED: 2}
    assert (smaller.middle.reduce.in_channels, smaller.middle.expand.out_channels, smaller.conv2.in_channels) == (
        5,
        5,
        5,
    )


def test_a_depthwise_convolution_loses_channels_before_it_and_behind_it():
    middle = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU())
    draw_(middle, share=0)
    middle[0].bias.zero_()
    middle[1].running_mean.zero_()
    middle[1].weight.data[5] = 0  # what is in front of it has another gamma
    middle[1].bias.data[2:6] = -1
    smaller, report = pruned(constants(Net(middle=middle), [0.5, 1.0, 0.0, -1.0, 0.0]))
    assert (smaller.conv1.out_channels, smaller.middle[0].groups, smaller.conv2.in_channels) == (4, 4, 4)
    assert report.kept[BORDER] == 2


class Unlike(nn.Module):
    """Multiply by the number of channels."""

    def forward(self, x):
        return x * x.shape[1]


class Mixed(nn.Module):
    """Exchange channels."""

    def forward(self, x):
        a, b = x.chunk(2, 1)
        return torch.cat([b, a], 1)


PINNING = {
    "grouped Conv2d": nn.Conv2d(8, 8, 1, groups=2),
    "GroupNorm": nn.GroupNorm(4, 8),
    "PReLU": nn.PReLU(8),
    "mul": Unlike(),
    "getitem": Mixed(),
}


@pytest.mark.parametrize("name", PINNING)
def test_what_is_not_known_keeps_all_channels_and_is_named(name):
    _, report = pruned(constants(Net(middle=PINNING[name]), [0.0] * 5))
    assert report.channels == (8, 8)
    assert report.kept == {f"read or written by {name}, which is not pruned": 5}
    assert str(report).endswith("nothing to remove")


def hooked(network):
    network.norm.register_forward_hook(lambda module, inputs, output: output.flip(1))


def used_twice(network):
    network.middle = network.act


def changed_in_place(network):
    class Other(Net):
        def forward(self, x):
            y = self.norm(self.conv1(x))
            return self.conv2(F.relu(y, inplace=True)) + self.conv3(y)

    network.conv3 = deepcopy(network.conv2)
    network.__class__ = Other


def read_elsewhere(network):
    class Other(Net):
        def forward(self, x):
            return super().forward(x) + self.norm.bias.sum()

    network.__class__ = Other


@pytest.mark.parametrize("change", [hooked, used_twice, changed_in_place, read_elsewhere])
def test_a_layer_that_is_more_than_it_seems_keeps_its_channels(change):
    network = constants(Net(), [-1.0] * 5)
    change(network)
    smaller, report = pruned(network)
    assert smaller.conv1.out_channels == 8
    assert report.difference <= 1e-5


# Bounds


def test_a_channel_is_dead_if_its_bounds_say_so():
    """Behind ReLU6 values are at most 6: a beta below what that can add up to gives nothing above 0."""
    network = draw_(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(),
                                  nn.Conv2d(8, 2, 3)), share=0)  # fmt: skip
    network[3].bias.data[:2] = -1000
    _, report = pruned(network)
    assert (report.dead, report.channels) == (2, (8, 6))
    network[1] = nn.ReLU()
    _, report = pruned(network)
    assert (report.dead, report.channels) == (0, (8, 8))


def test_images_have_bounds_that_tensors_have_not():
    network = draw_(Net(), share=0)
    network.norm.bias.data[:2] = -1000
    network.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    assert prune(network)[1].channels == (8, 8)
    smaller, report = prune(network, inputs="images")
    assert report.channels == (8, 6)
    for images in (torch.full((1, 3, 8, 8), -2.0), torch.full((1, 3, 8, 8), 2.0), IMAGES.clamp(-2, 2)):
        assert difference(network, smaller, images) <= 1e-5


class Checked(Analysis):
    """Look at every value: is it between its bounds?"""

    checked = 0

    def run_node(self, n):
        value = super().run_node(n)
        if channels := self.channels[n]:
            values = value.double().transpose(0, 1).flatten(1)
            slack = 1e-5 * (1 + values.abs().max())
            assert bool((values.amin(1) >= channels.low - slack).all()), n
            assert bool((values.amax(1) <= channels.high + slack).all()), n
            self.checked += int((channels.high - channels.low).isfinite().sum())
        return value


ACTS = [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU, nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.LeakyReLU,
        lambda: nn.GELU(approximate="tanh"), lambda: nn.LeakyReLU(-2.0)]  # fmt: skip
BLOCKS = ["conv", "pointwise", "depthwise", "gate", "residual", "cat", "max pool", "avg pool", "norm"]


def first_layer(block, width):
    """Return the layer of a block before its norm layer."""
    if block in ("max pool", "avg pool", "norm"):
        return {"max pool": nn.MaxPool2d(3, 1, padding=1), "avg pool": nn.AvgPool2d(2, 1), "norm": nn.Identity()}[block]
    out = {"conv": 5, "pointwise": 6, "cat": 2}.get(block, width)
    size = 1 if block in ("pointwise", "gate") else 3
    return nn.Conv2d(width, out, size, padding=size // 2, groups=width if block == "depthwise" else 1)


class Random(nn.Module):
    """A network of blocks in any order."""

    def __init__(self, blocks, act):
        super().__init__()
        self.blocks, self.layers, width = blocks, nn.ModuleList(), 3
        for i, block in enumerate(blocks):
            layer = first_layer(block, width)
            out = getattr(layer, "out_channels", width)
            self.layers.append(nn.ModuleList([layer, nn.BatchNorm2d(out), ACTS[(act + i) % len(ACTS)]()]))
            width = out + width * (block == "cat")
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        for block, (conv, norm, act) in zip(self.blocks, self.layers, strict=True):
            if block == "gate":
                x = act(norm(x * conv(x.mean((2, 3), keepdim=True)).sigmoid()))
            elif block == "residual":
                x = act(x + norm(conv(x)))
            elif block == "cat":
                x = torch.cat([x, act(norm(conv(x)))], 1)
            else:
                x = act(norm(conv(x)))
        return self.head(x.mean((2, 3)))


@settings(max_examples=int(os.environ.get("BNAA_PRUNED", "25")), deadline=None, derandomize=True)
@given(
    blocks=st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=6), act=st.integers(0, len(ACTS) - 1),
    share=st.sampled_from([0.2, 0.5, 0.9, 1.0]), seed=st.integers(0, 1000), inputs=st.sampled_from(["any", "images"]),
)  # fmt: skip
def test_any_pattern_of_zeros_in_any_network(blocks, act, share, seed, inputs):
    torch.manual_seed(seed)
    network = draw_(Random(blocks, act), share)
    network.pretrained_cfg = {"input_size": (3, 7, 7), "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 0.2)}
    mean, std = (torch.tensor(network.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    images = torch.randn(4, 3, 7, 7) * 3 if inputs == "any" else (torch.rand(4, 3, 7, 7) - mean) / std
    smaller, _ = prune(network, inputs=inputs)
    a, b = network(images), smaller(images)
    assert (a - b).abs().max() <= 1e-5 * a.abs().max() + 1e-6
    low, high = torch.full((3,), -2.0, dtype=torch.float64), torch.full((3,), 3.0, dtype=torch.float64)
    analysis = Checked(network, trace(network)[0], low, high)
    analysis.run(images.clamp(-2, 3), enable_io_processing=False)
    assert analysis.checked > 0


# Adapters, thresholds, files


@pytest.fixture(scope="module")
def adapter(train_step, tmp_path_factory):
    """A trained adapter, a third of whose gammas are small or 0, and its folder."""
    config = BNOnlyConfig(seed=7, data_config={"input_size": [3, 32, 32]}, label_names=["a", "b", "c"])
    model = train_step(get_bn_only_model(timm.create_model("test_resnet", num_classes=3), config))
    for norm in norms(model):
        norm.weight.data[::3] = 0
        norm.weight.data[1::6] = 1e-3
    folder = tmp_path_factory.mktemp("pruned") / "adapter"
    model.save_pretrained(folder)
    return model, folder


IMAGES_32 = torch.linspace(-2, 2, 2 * 3 * 32 * 32).sin().view(2, 3, 32, 32)


def test_an_adapter_is_pruned_to_the_same_tensors_each_time(adapter):
    model, folder = adapter
    before = deepcopy(model.state_dict())
    one, report = prune(model.train())
    other, again = prune(load_bn_only_model(folder))
    assert report == again
    assert report.parameters[1] < 0.7 * report.parameters[0]
    tensors = other.state_dict()
    assert one.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in one.state_dict().items())
    assert difference(model.eval(), one, IMAGES_32) <= 1e-5
    assert not one.training
    assert not any(parameter.requires_grad for parameter in one.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_an_adapter_that_trains_lean_or_is_merged_is_pruned_too(adapter):
    model = load_bn_only_model(adapter[1], is_trainable=True)
    expected = prune(model)[0](IMAGES_32)
    model.set_lean("exact")
    assert torch.equal(prune(model)[0](IMAGES_32), expected)
    model.set_lean(None)
    model.merge_adapter()
    assert torch.equal(prune(model)[0](IMAGES_32), expected)


def test_the_threshold_sets_gammas_to_zero_first(adapter):
    model = deepcopy(adapter[0])
    smaller, report = prune(model, 0.01)
    for norm in norms(model):
        norm.weight.data[norm.weight.abs() < 0.01] = 0
    expected, by_hand = prune(model)
    assert report == by_hand
    assert report.dead > prune(adapter[0])[1].dead
    assert all(map(torch.equal, smaller.state_dict().values(), expected.state_dict().values()))
    assert difference(model, smaller, IMAGES_32) <= 1e-5


def test_a_scale_that_a_compact_file_rounds_to_zero_leaves(adapter, tmp_path):
    file = export(adapter[0], tmp_path / "small.safetensors", format="compact", bits=8)
    model = load_bn_only_model(file)
    smaller, report = prune(model)
    assert report.dead > prune(adapter[0])[1].dead
    assert difference(model, smaller, IMAGES_32) <= 1e-5


def test_the_accuracy_is_measured_before_and_after(adapter):
    test = [(IMAGES_32, adapter[0](IMAGES_32).argmax(1))]
    _, report = prune(adapter[0], test=iter(test))
    assert report.accuracy == "accuracy 100.00 % before, 100.00 % after, 2 images"
    assert str(report).endswith(report.accuracy)


def test_the_command_writes_the_network_as_a_program_for_any_number_of_images(adapter, tmp_path):
    file = tmp_path / "small.pt2"
    done = CliRunner().invoke(main, ["prune", str(adapter[1]), str(file), "--threshold", "0.01"])
    smaller, report = prune(load_bn_only_model(adapter[1]), 0.01)
    assert (done.exit_code, done.stdout) == (0, f"{report}\n{file}\n")
    program = torch.export.load(file).module()
    for images in (IMAGES_32, torch.cat([IMAGES_32] * 3), IMAGES_32[:1]):
        torch.testing.assert_close(program(images), smaller(images))
    assert sum(tensor.numel() for tensor in program.parameters()) == report.parameters[1]


def test_the_command_prints_json(adapter, tmp_path):
    words = ["prune", str(adapter[1]), str(tmp_path / "small.pt2"), "--inputs", "images", "--json"]
    done = CliRunner().invoke(main, words)
    assert json.loads(done.stdout) == json.loads(json.dumps(asdict(prune(adapter[0], inputs="images")[1])))


BAD_WORDS = {
    "threshold": (["--threshold", "-1"], "ConfigError: The threshold is no number from 0."),
    "inputs": (["--inputs", "some"], "'some' is not one of 'any', 'images'"),
    "dataset": (["--dataset", "digits"], "DataError"),  # it has ten classes, the adapter three
}


@pytest.mark.parametrize("words", BAD_WORDS)
def test_the_command_refuses_bad_words(adapter, tmp_path, words):
    more, message = BAD_WORDS[words]
    done = CliRunner().invoke(main, ["prune", str(adapter[1]), str(tmp_path / "small.pt2"), *more])
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "small.pt2").exists()


# Bad input


@pytest.mark.parametrize("threshold", [-0.01, float("nan"), "0.1", None, torch.ones(2)])
def test_a_threshold_that_is_no_number_from_0_is_refused(adapter, refused, threshold):
    with refused(ConfigError, "threshold="):
        prune(adapter[0], threshold)


def test_other_bad_arguments_are_refused(adapter, refused, tmp_path):
    with refused(ConfigError, "inputs='all'"):
        prune(adapter[0], inputs="all")
    with refused(ConfigError, "It is not known which images the network takes", "input_size=(3, height, width)"):
        prune(Net())
    with refused(ConfigError, "no mean and std"):
        prune(Net(), inputs="images", input_size=(3, 8, 8))
    with refused(NetworkError, "images of [4, 8, 8]", "RuntimeError"):
        prune(Net().eval(), input_size=(4, 8, 8))
    (tmp_path / "there.pt2").write_bytes(b"mine")
    with refused(OutputFolderError, "there.pt2 exists"):
        prune(adapter[0], file=tmp_path / "there.pt2")
    assert (tmp_path / "there.pt2").read_bytes() == b"mine"
    model = deepcopy(adapter[0])
    model.add_adapter("other", BNOnlyConfig(seed=7))
    model.base_model.set_adapter(["default", "other"])
    with refused(AdapterError, "One adapter"):
        prune(model)


class Choosing(Net):
    """A network that looks at its values."""

    def forward(self, x):
        return super().forward(x if x.mean() > 0 else -x)


def test_a_network_that_cannot_be_traced_is_refused_by_name(refused):
    with refused(NetworkError, "Choosing cannot be pruned: torch.fx cannot trace it", "TraceError"):
        prune(Choosing(), input_size=(3, 8, 8))


def test_a_network_that_torch_export_does_not_take_is_refused(refused, tmp_path):
    class OneSize(Net):
        def forward(self, x):
            return super().forward(x.reshape(2, 3, 8, 8))

    with refused(NetworkError, "does not take batches of any number of images"):
        prune(OneSize().eval(), input_size=(3, 8, 8), file=tmp_path / "small.pt2")
    assert [*tmp_path.iterdir()] == []


def test_values_that_are_not_finite_are_refused(refused):
    network = Net().eval()
    network.norm.weight.data[0] = torch.nan
    with refused(NetworkError, "computes something else", "nan"):
        prune(network, input_size=(3, 8, 8))


@pytest.mark.parametrize("architecture", ["test_vit", "test_convnext"])
def test_a_network_without_batch_norm_has_nothing_to_remove(architecture):
    network = timm.create_model(architecture, num_classes=3)
    smaller, report = prune(network)
    assert str(report) == "0 of 0 channels of norm layers are constant\nnothing to remove"
    assert all(map(torch.equal, smaller.state_dict().values(), network.state_dict().values()))
