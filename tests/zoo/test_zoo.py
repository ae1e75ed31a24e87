"""The zoo's networks are the paper's: every integer of its table, and open_lth's logits bit for bit."""

import importlib
import pickle

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import bn_affine_adapters.zoo
from bn_affine_adapters.errors import ConfigError

# name: all parameters, gamma + beta, head, shortcut convolutions
TABLE = {
    "cifar_resnet14": (175_258, 1_120, 650, 2_560),
    "cifar_resnet32": (466_906, 2_464, 650, 2_560),
    "cifar_resnet56": (855_770, 4_256, 650, 2_560),
    "cifar_resnet110": (1_730_714, 8_288, 650, 2_560),
    "cifar_resnet218": (3_480_602, 16_352, 650, 2_560),
    "cifar_resnet434": (6_980_378, 32_480, 650, 2_560),
    "cifar_resnet866": (13_979_930, 64_736, 650, 2_560),
    "cifar_wrn14_1": (175_258, 1_120, 650, 2_560),
    "cifar_wrn14_2": (696_618, 2_240, 1_290, 10_240),
    "cifar_wrn14_4": (2_777_674, 4_480, 2_570, 40_960),
    "cifar_wrn14_8": (11_093_130, 8_960, 5_130, 163_840),
    "cifar_wrn14_16": (44_337_418, 17_920, 10_250, 655_360),
    "cifar_wrn14_32": (177_279_498, 35_840, 20_490, 2_621_440),
    "cifar_vgg11": (9_231_114, 5_504, 5_130, 0),
    "cifar_vgg13": (9_416_010, 5_888, 5_130, 0),
    "cifar_vgg16": (14_728_266, 8_448, 5_130, 0),
    "cifar_vgg19": (20_040_522, 11_008, 5_130, 0),
    "resnet18": (11_689_512, 9_600, 513_000, 172_032),
    "resnet34": (21_797_672, 17_024, 513_000, 172_032),
    "resnet50": (25_557_032, 53_120, 2_049_000, 2_768_896),
    "resnet101": (44_549_160, 105_344, 2_049_000, 2_768_896),
    "resnet200": (64_673_832, 176_000, 2_049_000, 2_768_896),
}
NOT_IN_TABLE = {"cifar_resnet", "cifar_resnet20", "cifar_resnet44", "cifar_vgg"}
SMALL = ["cifar_resnet14", "cifar_wrn14_2", "cifar_vgg11"]


def count(model):
    def size(modules):
        return sum(p.numel() for module in modules for p in module.parameters())

    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    shortcuts = [m for name, m in model.named_modules() if "downsample" in name and isinstance(m, nn.Conv2d)]
    return size([model]), size(norms), size([model.get_classifier()]), size(shortcuts)


@pytest.mark.parametrize("name", TABLE)
def test_parameters_are_as_many_as_in_the_table(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert all(p.is_meta for p in model.parameters())
    assert count(model) == TABLE[name]


def test_the_table_names_every_registered_network_and_has_22_rows():
    ours = {name for name in TABLE if name.startswith("cifar_")}
    assert ours | NOT_IN_TABLE == set(timm.list_models("cifar_*"))
    assert (len(ours), len(TABLE)) == (17, 22)


# The published networks, written down a second time in the structure of open_lth.


class ReferenceBlock(nn.Module):
    def __init__(self, f_in, f_out, downsample):
        super().__init__()
        self.first = nn.Conv2d(f_in, f_out, kernel_size=3, stride=1 + downsample, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(f_out)
        self.second = nn.Conv2d(f_out, f_out, kernel_size=3, stride=1, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(f_out)
        self.shortcut = nn.Sequential()
        if downsample or f_in != f_out:
            conv = nn.Conv2d(f_in, f_out, kernel_size=1, stride=2, bias=False)
            self.shortcut.extend([conv, nn.BatchNorm2d(f_out)])

    def forward(self, x):
        out = self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))
        return F.relu(out + self.shortcut(x))


class ReferenceResNet(nn.Module):
    def __init__(self, plan):
        super().__init__()
        filters = plan[0][0]
        self.conv = nn.Conv2d(3, filters, kernel_size=3, stride=1, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(filters)
        self.segments = nn.ModuleList()
        for segment, (wider, blocks) in enumerate(plan):
            for block in range(blocks):
                self.segments.append(ReferenceBlock(filters, wider, downsample=segment > 0 and block == 0))
                filters = wider
        self.out = nn.Linear(filters, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        for block in self.segments:
            x = block(x)
        x = F.avg_pool2d(x, x.size(3))
        return self.out(x.view(x.size(0), -1))


class ReferenceVGG(nn.Module):
    def __init__(self, plan):
        super().__init__()
        self.steps = nn.ModuleList()
        filters = 3
        for step in plan.split():
            if step == "M":
                self.steps.append(nn.MaxPool2d(kernel_size=2, stride=2))
            else:
                conv = nn.Conv2d(filters, int(step), kernel_size=3, padding=1)
                filters = conv.out_channels
                self.steps.extend([conv, nn.BatchNorm2d(filters)])
        self.out = nn.Linear(512, 10)

    def forward(self, x):
        for step in self.steps:
            x = F.relu(step(x)) if isinstance(step, nn.BatchNorm2d) else step(x)
        x = nn.AvgPool2d(2)(x)
        return self.out(x.view(x.size(0), -1))


REFERENCES = {
    "cifar_resnet14": lambda: ReferenceResNet([(16, 2), (32, 2), (64, 2)]),
    "cifar_wrn14_2": lambda: ReferenceResNet([(32, 2), (64, 2), (128, 2)]),
    "cifar_wrn14_4": lambda: ReferenceResNet([(64, 2), (128, 2), (256, 2)]),
    "cifar_vgg11": lambda: ReferenceVGG("64 M 128 M 256 256 M 512 512 M 512 512"),
    "cifar_vgg13": lambda: ReferenceVGG("64 64 M 128 128 M 256 256 M 512 512 M 512 512"),
    "cifar_vgg16": lambda: ReferenceVGG("64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512"),
    "cifar_vgg19": lambda: ReferenceVGG("64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512"),
}


def draw_norms_(model):
    """Draw gamma, beta and the running statistics, so that no norm layer is the identity."""
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
        nn.init.normal_(norm.running_mean, std=0.1)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)


@pytest.mark.parametrize("name", REFERENCES)
def test_logits_and_running_statistics_equal_those_of_open_lth(name):
    torch.manual_seed(0)
    model, reference, images = timm.create_model(name), REFERENCES[name](), torch.randn(3, 3, 32, 32)
    draw_norms_(model)
    assert len(model.state_dict()) == len(reference.state_dict())
    reference.load_state_dict(dict(zip(reference.state_dict(), model.state_dict().values(), strict=True)))

    model.eval(), reference.eval()
    logits = model(images)
    assert logits.std() > 1e-3
    assert torch.equal(logits, reference(images))
    model.train(), reference.train()
    assert torch.equal(model(images), reference(images))
    pairs = list(zip(model.state_dict().values(), reference.state_dict().values(), strict=True))
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)

    model.eval(), reference.eval()
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).weight[0] += 0.5
    assert not torch.equal(model(images), reference(images)), "the comparison has to notice one changed gamma"


def test_any_depth_and_width_come_by_keyword():
    with torch.device("meta"):
        resnet = timm.create_model("cifar_resnet", depth=26, width=2)
        vgg = timm.create_model("cifar_vgg", depth=13)
        named = timm.create_model("cifar_resnet14", width=2)
    assert (len(resnet.blocks), resnet.num_features, resnet.default_cfg["architecture"]) == (12, 128, "cifar_resnet")
    assert count(vgg) == TABLE["cifar_vgg13"]
    assert count(named) == TABLE["cifar_wrn14_2"]
    with pytest.raises(TypeError, match="depth"):
        timm.create_model("cifar_resnet14", depth=20)


def test_names_in_the_state_dict_are_these():
    with torch.device("meta"):
        resnet, vgg = timm.create_model("cifar_resnet14"), timm.create_model("cifar_vgg11")
    block = ["conv1", "bn1", "conv2", "bn2"]
    expected = ["conv1", "bn1", *(f"blocks.{i}.{layer}" for i in range(6) for layer in block), "fc"]
    expected += [f"blocks.{i}.downsample.{layer}" for i in (2, 4) for layer in (0, 1)]
    assert {name.rpartition(".")[0] for name in resnet.state_dict()} == set(expected)
    expected = [f"layers.{i}.{layer}" for i in (0, 2, 4, 5, 7, 8, 10, 11) for layer in ("conv", "bn")] + ["fc"]
    assert {name.rpartition(".")[0] for name in vgg.state_dict()} == set(expected)


def test_norm_layers_have_the_papers_eps_and_momentum_and_no_zeroed_gamma():
    norms = [m for name in SMALL for m in timm.create_model(name).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 15 + 15 + 8
    assert {(m.eps, m.momentum, m.weight.min().item()) for m in norms} == {(1e-5, 0.1, 1.0)}


@pytest.mark.parametrize("name", SMALL)
def test_head_and_channels_follow_timms_manners(name):
    model = timm.create_model(name, num_classes=7, in_chans=1, drop_rate=0.5).eval()
    images, width = torch.randn(2, 1, 32, 32), model.num_features
    features = model.forward_features(images)
    pooled = model.forward_head(features, pre_logits=True)
    assert (model.num_classes, model.head_hidden_size, model.fc.out_features, pooled.shape[1]) == (7, width, 7, width)
    assert model.get_classifier() is model.fc is model.get_submodule(model.default_cfg["classifier"])
    assert model.get_submodule(model.default_cfg["first_conv"]).in_channels == 1
    assert features.shape == (2, width, *model.default_cfg["pool_size"])
    assert torch.equal(model.forward_head(features), model(images))
    assert (model.train().forward_head(features + 1, pre_logits=True) == 0).any(), "dropout reaches the head"
    model.eval()
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert len(groups) > 6
    assert sum(map(len, groups.values())) == len(list(model.parameters()))

    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    assert model.num_classes == 3
    model.reset_classifier(0)
    assert torch.equal(model(images), pooled)
    model.reset_classifier(0, "")
    assert torch.equal(model(images), features)
    model.double().reset_classifier(5, "avg")
    assert model(images.double()).shape == (2, 5)


@pytest.mark.parametrize("name", ["cifar_resnet14", "cifar_vgg11"])
def test_default_cfg_says_cifar_images_normalised_as_imagenet(name):
    data, cfg = timm.data.resolve_data_config({}, model=timm.create_model(name)), timm.get_pretrained_cfg(name)
    assert (data["input_size"], data["crop_pct"]) == ((3, 32, 32), 1.0)
    assert (data["mean"], data["std"]) == (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
    assert (cfg.architecture, cfg.num_classes) == (name, 10)


@pytest.mark.parametrize(("name", "shapes"), [("cifar_resnet14", "16 32 64"), ("cifar_vgg11", "64 128 256 512 512")])
def test_features_only_gives_one_map_a_segment(name, shapes):
    features = timm.create_model(name, features_only=True)(torch.randn(2, 3, 32, 32))
    assert [tuple(f.shape[1:]) for f in features] == [(int(c), 32 >> i, 32 >> i) for i, c in enumerate(shapes.split())]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(("name", "depth"), [("cifar_resnet", 8), ("cifar_vgg", 11)])
def test_full_graph_capture_and_scripting_give_the_same_logits(name, depth):
    model, images = timm.create_model(name, depth=depth).eval(), torch.randn(2, 3, 32, 32)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(images), model(images))
    assert torch.equal(torch.jit.script(model)(images), model(images))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("height_width", [(16, 16), (48, 40)])
def test_images_of_other_sizes_pass(name, height_width):
    assert timm.create_model(name).eval()(torch.randn(2, 3, *height_width)).shape == (2, 10)


def test_vgg_refuses_images_below_16x16():
    model = timm.create_model("cifar_vgg11").eval()
    assert model.default_cfg["min_input_size"] == (3, 16, 16)
    with pytest.raises(RuntimeError, match="Output size is too small"):
        model(torch.randn(2, 3, 15, 15))


def test_entry_points_are_importable_documented_and_picklable():
    names = timm.list_models("cifar_*")
    assert len(names) == 21
    for name in names:
        module = importlib.import_module(f"bn_affine_adapters.zoo.cifar_{'vgg' if 'vgg' in name else 'resnet'}")
        entry = getattr(module, name)
        assert timm.is_model(name)
        assert name in module.__all__
        assert timm.models.model_entrypoint(name) is entry
        assert pickle.loads(pickle.dumps(entry)) is entry
        assert entry.__doc__.startswith("Create a ")
    assert bn_affine_adapters.zoo.__all__ == ["cifar_resnet", "cifar_vgg"]


REFUSED = {
    ("cifar_resnet", "depth", r"6 D \+ 2.*choose one of 8, 14, 20"): [15, 2, 0, -4, 14.0, "14", True, float("nan")],
    ("cifar_resnet", "width", "positive integer.*choose width=1, 2, 3"): [0, -1, 1.5, "2"],
    ("cifar_vgg", "depth", "no CIFAR VGG.*choose one of 11, 13, 16, 19"): [12, 0, "16", 16.5],
    ("cifar_resnet", "global_pool", 'cannot pool.*pass global_pool="avg"'): ["max", ""],
    ("cifar_vgg", "global_pool", 'cannot pool.*pass global_pool="avg"'): ["max", ""],
}


@pytest.mark.parametrize(("case", "value"), [(case, value) for case in REFUSED for value in REFUSED[case]])
def test_an_impossible_network_is_refused_with_a_way_out(case, value):
    name, key, message = case
    with pytest.raises(ConfigError, match=f"(?s){message}") as error:
        timm.create_model(name, **{key: value})
    assert f"{key}={value!r}" in error.value.seen


@pytest.mark.parametrize("name", ["cifar_resnet14", "cifar_vgg11"])
def test_pretrained_weights_do_not_exist_and_timm_says_so(name):
    assert not timm.list_models("cifar_*", pretrained=True)
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name}"):
        timm.create_model(name, pretrained=True)
