"""A network is architecture + seed + a few kilobytes: it comes back bit for bit, or not at all."""

import copy
import ctypes
import errno
import gc
import hashlib
import json
import shutil
import sys
import time
from pathlib import Path

import peft
import pytest
import timm
import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.adapter.checks import infer
from bn_affine_adapters.adapter.rebuild import check_rebuild
from bn_affine_adapters.adapter.traits import traits
from bn_affine_adapters.errors import (
    AdapterFileError,
    AdapterTensorError,
    BaseRequiredError,
    ConfigError,
    FingerprintError,
    FormatVersionError,
    MissingModuleError,
    NoSpaceError,
    RebuildError,
    ReinitError,
    UnknownArchitectureError,
    UnknownKeyError,
)
from bn_affine_adapters.norms.find import norm_layers
from bn_affine_adapters.seed import draws

pytestmark = pytest.mark.filterwarnings("error", "ignore:This adapter belongs to weights")
NAME = "test_resnet"
FILES = {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME}


def state(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def same_state(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def images(size=32, channels=3):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def reload_is_exact(model, folder, size=32, channels=3, base=None):
    model.save_pretrained(folder)
    again = load_bn_only_model(folder, base)
    return torch.equal(again(images(size, channels)), model(images(size, channels)))


# -- what comes back


@pytest.mark.parametrize(
    ("name", "arguments", "kind"),
    [
        ("test_resnet", {}, "BatchNorm2d"),
        ("test_byobnet", {}, "BatchNormAct2d"),
        ("test_efficientnet", {}, "BatchNormAct2d"),
        ("resnet18", {}, "BatchNorm2d"),
        ("mobilenetv3_small_050", {}, "BatchNormAct2d"),
        ("densenet121", {}, "BatchNormAct2d"),
        ("regnetx_002", {}, "BatchNormAct2d"),
        ("test_efficientnet_gn", {}, "GroupNormAct"),
        ("test_convnext", {}, "LayerNorm"),
        ("test_vit", {"img_size": 32}, "LayerNorm"),
        ("test_vit4", {"img_size": 32}, "RmsNorm"),
    ],
)
def test_reload_gives_bit_identical_logits(name, arguments, kind, tmp_path, train_step):
    model = get_bn_only_model(timm.create_model(name, num_classes=5, **arguments), BNOnlyConfig(seed=7))
    before = state(model)
    train_step(model)
    moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    layers = norm_layers(model)
    assert kind in {type(layer).__name__ for layer in layers.values()}
    last_words = {"weight", "bias"} if kind != "RmsNorm" else {"weight"}
    last_words |= {"running_mean", "running_var", "num_batches_tracked"} if "Batch" in kind else set()
    for word in last_words:
        found = [key for key in moved if key.endswith(f".{word}")]
        assert len(found) == len(layers), f"{len(found)} of {len(layers)} {word} moved"
    assert reload_is_exact(model, tmp_path)


@pytest.mark.parametrize(
    ("name", "arguments", "given"),
    [
        ("test_resnet", {"in_chans": 1, "num_classes": 7}, {}),
        ("resnet18", {"in_chans": 5, "num_classes": 2}, {}),
        ("test_vit", {"img_size": 64, "num_classes": 0}, {}),
        ("resnet18", {"output_stride": 8}, {"output_stride": 8}),
        ("test_resnet", {"global_pool": "max", "drop_rate": 0.1}, {"global_pool": "max", "drop_rate": 0.1}),
        ("test_efficientnet", {"act_layer": "relu", "bn_eps": 0.01}, {"act_layer": "relu", "bn_eps": 0.01}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_creation_arguments_travel(name, arguments, given, tmp_path):
    base = timm.create_model(name, **arguments)
    model = get_bn_only_model(base, BNOnlyConfig(seed=0, model_args=given)).eval()
    assert {key: base.num_classes if key == "num_classes" else value for key, value in arguments.items()}.items() <= {
        **model.peft_config["default"].model_args,
        **({"img_size": 64} if "img_size" in arguments else {}),
    }.items()
    assert reload_is_exact(model, tmp_path, size=64, channels=arguments.get("in_chans", 3))


SMALL_HIERA = {"embed_dim": 24, "stages": [1, 1, 1, 1]}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("hiera_tiny_224", SMALL_HIERA), ("sam2_hiera_tiny", {**SMALL_HIERA, "global_att_blocks": [2]})],
)
def test_a_network_whose_constructor_truncates_normals_loads(name, arguments, tmp_path):
    model = get_bn_only_model(timm.create_model(name, **arguments), BNOnlyConfig(seed=0, model_args=arguments))
    model.save_pretrained(tmp_path)
    stale = [torch.full((size,), 9.0) for size in range(64, 64_000, 64)]
    del stale  # the constructor gets this memory, whose values are out of bounds
    assert same_state(load_bn_only_model(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded by timm", "not recorded"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("name", ["resnet18", "tresnet_m", "crossvit_9_240"])
def test_the_channels_of_an_image_are_inferred_whatever_the_stem_does_to_them(name, channels, recorded):
    with torch.device("meta"):
        model = timm.create_model(name, in_chans=channels)
    if not recorded:
        vars(model).pop("_model_args", None)  # as before timm 1.0.31
    config = BNOnlyConfig(seed=0)
    infer(model, config, None)
    assert config.model_args.get("in_chans", 3) == channels
    check_rebuild(traits(model), config)


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        ({"output_stride": 8}, "layer3.0: stride: 1"),
        ({"global_pool": "max"}, "global_pool: pool_type: 'max'"),
        ({"drop_rate": 0.1}, "drop_rate: 0.1"),
        ({"drop_path_rate": 0.1}, "drop_path: class: 'DropPath'"),
        ({"act_layer": "silu"}, "act1: class: 'SiLU'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_network_whose_arguments_cannot_be_inferred_asks_for_them(arguments, difference, refused):
    base = timm.models.resnet18(**arguments)  # create_model keeps the arguments from timm 1.0.31 on, this does not
    before = state(base)
    with refused(RebuildError, difference, "model_args", "custom"):
        get_bn_only_model(base, BNOnlyConfig(seed=0))
    assert same_state(state(base), before)
    assert not hasattr(base, "peft_config")


def test_arguments_that_timm_kept_need_not_be_given(tmp_path):
    base = timm.create_model("resnet18", output_stride=8, num_classes=3)
    if not hasattr(base, "_model_args"):
        pytest.skip("this timm keeps no creation arguments; 1.0.31 is the first that does")
    model = get_bn_only_model(base, BNOnlyConfig(seed=0)).eval()
    assert model.peft_config["default"].model_args == {"output_stride": 8, "num_classes": 3}
    assert reload_is_exact(model, tmp_path, size=64)


def test_a_network_changed_by_hand_is_custom_and_loads_only_with_its_base(tmp_path, refused, train_step):
    def by_hand():
        base = timm.create_model("resnet18", num_classes=3)
        base.maxpool = nn.Identity()
        return base

    with refused(RebuildError, "maxpool: class: 'Identity'", "custom"):
        get_bn_only_model(by_hand(), BNOnlyConfig(seed=0))
    model = train_step(get_bn_only_model(by_hand(), BNOnlyConfig(seed=0, architecture="custom")))
    assert reload_is_exact(model, tmp_path, base=by_hand())
    with refused(BaseRequiredError, "your own code", "model=base"):
        load_bn_only_model(tmp_path)


def test_data_configuration_and_label_names_travel(tmp_path):
    model = get_bn_only_model(timm.create_model(NAME, num_classes=2), BNOnlyConfig(seed=0, label_names=["cat", "dog"]))
    model.save_pretrained(tmp_path)
    config = load_bn_only_model(tmp_path).peft_config["default"]
    assert config.label_names == ["cat", "dog"]
    assert config.data_config["input_size"] == [3, 160, 160]
    assert config.to_dict() == {**model.peft_config["default"].to_dict(), "inference_mode": True}


def test_data_configuration_has_the_channels_of_the_network():
    model = get_bn_only_model(timm.create_model(NAME, in_chans=1), BNOnlyConfig(seed=0))
    assert model.peft_config["default"].data_config["input_size"] == [1, 160, 160]


def test_an_adapter_of_a_network_with_an_image_size_joins_another(tmp_path):
    # A tuple among the creation arguments is a list in the file; the two mean the same network.
    first, second = (
        get_bn_only_model(timm.create_model("test_vit", img_size=(64, 64)), BNOnlyConfig(seed=0)) for _ in "12"
    )
    assert first.peft_config["default"].model_args["img_size"] == [64, 64]
    first.save_pretrained(tmp_path)
    second.load_adapter(tmp_path, "two")
    assert torch.equal(load_bn_only_model(tmp_path)(torch.ones(1, 3, 64, 64)), first.eval()(torch.ones(1, 3, 64, 64)))


# -- how much it is


@pytest.mark.parametrize(
    ("name", "arguments", "counts", "most"),
    [
        ("resnet18", {"num_classes": 10}, (9_600, 11_181_642), 92_000),
        ("cifar_resnet110", {}, (8_288, 1_730_714), 150_000),
        ("cifar_resnet14", {}, (1_120, 175_258), 25_000),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_counts_and_sizes_are_those_promised(name, arguments, counts, most, tmp_path):
    model = get_bn_only_model(timm.create_model(name, **arguments), BNOnlyConfig(seed=0))
    assert model.get_nb_trainable_parameters() == counts
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    size = (tmp_path / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    print(f"{name}: adapter of {size:,} bytes, configuration of {(tmp_path / CONFIG_NAME).stat().st_size:,}")
    assert counts[0] * 8 < size < most  # gamma, beta and as many running statistics, in float32


def kilobytes(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


def grown(do):
    """Return what a call gives, and by how many bytes it raises this process's peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or the memory left behind would be used again, uncounted
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = kilobytes("VmRSS")
    found = do()
    return found, 1024 * (kilobytes("VmHWM") - before)


def seconds(do):
    """Return the processor time of a call, the less of two."""
    times = []
    for _ in range(2):
        start = time.process_time()
        do()
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc/self/status")
@pytest.mark.parametrize(("name", "most"), [("resnet50", 3), ("cifar_resnet110", 60)])
def test_rebuilding_is_fast_and_needs_little_more_memory_than_the_network(name, most, tmp_path):
    get_bn_only_model(timm.create_model(name), BNOnlyConfig(seed=0)).save_pretrained(tmp_path)
    load_bn_only_model(tmp_path)  # what is imported on first use
    model, more = grown(lambda: load_bn_only_model(tmp_path))
    tensors = model.get_base_model().state_dict().values()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    counts = [tensor.numel() for tensor in tensors if tensor.dim() > 1]

    def draw():
        """Draw as many numbers as the network has, and compute the digest of as many bytes."""
        for count in counts:
            hashlib.sha256(draws.draw((count,), 0, "weight", "normal").tobytes()).hexdigest()

    # A bound for this machine: a large network takes little more, a small and deep one is mostly built and wrapped.
    ratio = seconds(lambda: load_bn_only_model(tmp_path)) / seconds(draw)
    print(f"{name}: {size:,} bytes, peak {more / size:.2f} of them, {ratio:.1f} times the time of its numbers")
    assert ratio < most
    if name == "resnet50":  # the other is too small beside what Python itself takes
        assert 0.95 < more / size < 1.3  # far less than the network would mean that its peak was not seen


# -- the frozen weights are verified


@pytest.mark.parametrize("classes", [1000, 5])
def test_another_number_of_classes_is_named_as_the_cause(classes, folder, refused):
    with refused(FingerprintError, f"num_classes={classes}", "num_classes=3", "its head") as caught:
        load_bn_only_model(folder, timm.create_model(NAME, num_classes=classes))
    assert caught.value.do == f'pass timm.create_model("{NAME}", num_classes=3)'


def test_versions_are_the_advice_only_if_they_differ(edit, refused):
    fault = {"backbone_fingerprint": "0" * 64}
    with refused(FingerprintError, "versions then and now: the same", "report this") as caught:
        load_bn_only_model(edit(**fault))
    assert "install" not in caught.value.do
    with refused(FingerprintError, "timm 0.1 -> ", "install the versions"):
        load_bn_only_model(edit(**fault, versions=lambda versions: {**versions, "timm": "0.1"}))


@pytest.fixture(scope="module")
def seeded(tmp_path_factory, train_step):
    """An adapter on a network drawn from seed 0; copy it before changing it."""
    folder = tmp_path_factory.mktemp("seeded")
    train_step(get_bn_only_model(timm.create_model(NAME, num_classes=3), BNOnlyConfig(seed=0))).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(seeded, tmp_path):
    return shutil.copytree(seeded, tmp_path / "adapter")


@pytest.fixture
def edit(folder):
    """Change adapter_config.json: a value, or a function of the value there was."""

    def change(**values):
        path = folder / CONFIG_NAME
        content = json.loads(path.read_text())
        for key, value in values.items():
            content[key] = value(content[key]) if callable(value) else value
        path.write_text(json.dumps(content))
        return folder

    return change


def flipped(digest):
    return ("0" if digest[0] != "0" else "1") + digest[1:]


@pytest.mark.parametrize(
    ("key", "level", "notices"),
    [
        ("backbone_fingerprint", "full", True),
        ("backbone_fingerprint", "sampled", False),
        ("backbone_fingerprint", "off", False),
        ("backbone_fingerprint_sampled", "full", False),
        ("backbone_fingerprint_sampled", "sampled", True),
        ("backbone_fingerprint_sampled", "off", False),
        ("frozen_fingerprint", "full", True),
        ("layout_hash", "full", True),
        ("layout_hash", "sampled", True),
    ],
)
def test_a_changed_digest_is_refused_where_it_is_compared(key, level, notices, edit, refused):
    folder = edit(**{key: flipped})
    if notices:
        with refused(FingerprintError, NAME, "seed 0"):
            load_bn_only_model(folder, verify=level)
    else:
        load_bn_only_model(folder, verify=level)


@pytest.mark.parametrize("version", ["0.0.1", None], ids=["other", "same"])
def test_a_mismatch_names_the_versions_on_both_sides(version, edit, refused):
    changes = {"versions": lambda there: {**there, "timm": version}} if version else {}
    words = f"timm 0.0.1 -> {timm.__version__}" if version else "versions then and now: the same"
    with refused(FingerprintError, words):
        load_bn_only_model(edit(backbone_fingerprint=flipped, **changes))


@pytest.fixture
def given(tmp_path):
    """A base with weights of its own, and the folder of an adapter on it."""
    base = timm.create_model("resnet18", num_classes=3)
    get_bn_only_model(copy.deepcopy(base), BNOnlyConfig()).save_pretrained(tmp_path / "given")
    return base, tmp_path / "given"


@pytest.mark.parametrize(("level", "notices"), [("full", True), ("sampled", False), ("off", False)])
def test_one_flipped_weight_is_caught_by_full(level, notices, given, refused):
    base, folder = given
    with torch.no_grad():
        base.layer2[0].conv1.weight.view(torch.int32)[3, 2, 1, 1] ^= 1  # the last bit; sampling looks at every 18th
    before = state(base)
    if notices:
        with refused(FingerprintError, "layer2.0.conv1.weight", "pass the base"):
            load_bn_only_model(folder, base, verify=level)
        assert same_state(state(base), before)
        assert not hasattr(base, "peft_config")
    else:
        load_bn_only_model(folder, base, verify=level)


@pytest.mark.parametrize("name", [NAME, "test_convnext", "test_vit3", "regnetx_002", "mobilenetv3_small_050"])
def test_an_adapter_with_a_head_loads_on_its_base_whatever_head_that_has(name, tmp_path):
    base = timm.create_model(name, **({"img_size": 32} if "vit" in name else {}))
    five = copy.deepcopy(base)
    five.reset_classifier(5)
    model = get_bn_only_model(five, BNOnlyConfig(train_head=True)).eval()
    assert reload_is_exact(model, tmp_path, base=base)


@pytest.mark.parametrize("level", ["full", "sampled"])
def test_other_weights_or_another_frozen_head_are_refused(level, given, refused):
    base, folder = given
    with refused(FingerprintError, "resnet18"):
        load_bn_only_model(folder, timm.create_model("resnet18", num_classes=3), verify=level)
    nn.init.zeros_(base.fc.weight)
    with refused(FingerprintError, "fc.weight"):
        load_bn_only_model(folder, base, verify=level)


# -- bad input: a clear error, and the network given is as it was


def without(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def garbage(path):
    path.write_bytes(b"not an adapter at all")


def pickle_only(path):
    path.unlink()
    torch.save({}, path.with_name(WEIGHTS_NAME))


FILE_FAULTS = {
    "no-configuration": (lambda d: without(d / CONFIG_NAME), CONFIG_NAME),
    "no-tensors": (lambda d: without(d / SAFETENSORS_WEIGHTS_NAME), SAFETENSORS_WEIGHTS_NAME),
    "truncated-tensors": (lambda d: truncate(d / SAFETENSORS_WEIGHTS_NAME), "not a whole safetensors file"),
    "no-safetensors": (lambda d: garbage(d / SAFETENSORS_WEIGHTS_NAME), "not a whole safetensors file"),
    "empty-file": (lambda d: (d / SAFETENSORS_WEIGHTS_NAME).write_bytes(b""), "not a whole safetensors file"),
    "pickle": (lambda d: pickle_only(d / SAFETENSORS_WEIGHTS_NAME), f"{WEIGHTS_NAME} is a pickle and is never loaded"),
    "truncated-configuration": (lambda d: truncate(d / CONFIG_NAME), "not a JSON file"),
    "configuration-in-bytes": (lambda d: (d / CONFIG_NAME).write_bytes(b"\xff\xfe\x00"), "not a JSON file"),
    "configuration-is-a-list": (lambda d: (d / CONFIG_NAME).write_text("[]"), "peft_type=None"),
    "empty-folder": (lambda d: shutil.rmtree(d) or d.mkdir(), "holds nothing"),
    "no-folder": (shutil.rmtree, "no such folder"),
}


def refused_and_unchanged(refused, folder, kind, *words):
    """Refused without a network, and with one, which keeps its tensors, modules and mode."""
    with refused(kind, *words):
        load_bn_only_model(folder)
    base = timm.create_model(NAME, num_classes=3)
    before, modules = state(base), [id(module) for module in base.modules()]
    with refused(kind, *words):
        load_bn_only_model(folder, base)
    assert same_state(state(base), before)
    assert [id(module) for module in base.modules()] == modules
    assert base.training


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_a_broken_folder_is_refused(fault, folder, refused):
    damage, words = FILE_FAULTS[fault]
    damage(folder)
    refused_and_unchanged(refused, folder, AdapterFileError, words, folder.name)


# What every door refuses, and how much of it: test_trust. Here is what the error says, and that nothing changes.

CONFIG_FAULTS = {
    "newer-format": ({"format_version": 3, "wings": True}, FormatVersionError, ["format_version 3", "pip install -U"]),
    "unknown-key": ({"train_gama": True}, UnknownKeyError, ["'train_gama'", "'train_gamma'"]),
    "other-method": ({"peft_type": "LN_TUNING"}, AdapterFileError, ["'LN_TUNING'"]),
    "no-method": ({"peft_type": None}, AdapterFileError, ["peft_type=None"]),
    "bad-value": ({"weight_init": "xavier"}, ConfigError, ["weight_init='xavier'", "kaiming_normal"]),
    "other-scheme": ({"init_scheme": "bnaffine-init-v9"}, ConfigError, ["bnaffine-init-v9"]),
    "other-names": ({"layout_hash": flipped}, FingerprintError, ["other names or shapes"]),
    "other-head": ({"head_layers": ["layer4"]}, FingerprintError, ["other names or shapes"]),
    "no-head": ({"head_layers": None}, FingerprintError, ["other names or shapes"]),
    "foreign-norm-layer": ({"norm_layers": ["bn7"]}, MissingModuleError, ["'bn7'", "'bn1'"]),
    "no-norm-layer": ({"norm_layers": ["conv1"]}, ConfigError, ["conv1"]),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_bad_configuration_is_refused(fault, edit, refused):
    changes, kind, words = CONFIG_FAULTS[fault]
    refused_and_unchanged(refused, edit(**changes), kind, *words)


def test_no_list_of_norm_layers_means_all_of_them(edit, folder):
    chosen = load_bn_only_model(folder).peft_config["default"].norm_layers
    assert load_bn_only_model(edit(norm_layers=None)).peft_config["default"].norm_layers == chosen


REBUILD_FAULTS = {  # without a network to load on: what the architecture builds here is not what it built there
    "unknown-architecture": ({"architecture": "test_resnett"}, UnknownArchitectureError, ["'test_resnet'"]),
    "other-architecture": (
        {"architecture": "test_byobnet"},
        FingerprintError,
        ["other names or shapes", "the first is"],
    ),
    "unknown-argument": ({"model_args": {"wings": 2}}, RebuildError, ["wings"]),
    "other-shapes": ({"model_args": {"num_classes": 3, "in_chans": 1}}, FingerprintError, ["other names or shapes"]),
    "other-classes": ({"model_args": {"num_classes": 4}}, FingerprintError, ["head"]),
    "fewer-norm-layers": ({"norm_layers": lambda names: names[1:]}, AdapterTensorError, ["extra conv1.1."]),
    "other-seed": ({"seed": 1}, FingerprintError, ["the first layer that differs is conv1.0.weight", "seed 1"]),
    "base-required": ({"seed": None}, BaseRequiredError, ["given weights", "model=base"]),
    "no-architecture": ({"architecture": None}, ConfigError, ["architecture=None"]),
    "no-fingerprint": ({"backbone_fingerprint": None}, ConfigError, ["backbone_fingerprint=None"]),
}


@pytest.mark.parametrize("fault", REBUILD_FAULTS)
def test_an_architecture_that_no_longer_builds_the_same_tensors_is_refused(fault, edit, refused):
    changes, kind, words = REBUILD_FAULTS[fault]
    with refused(kind, *words):
        load_bn_only_model(edit(**changes))


@pytest.mark.parametrize("load", [load_bn_only_model, lambda d, network: peft.PeftModel.from_pretrained(network, d)])
def test_an_adapter_without_its_fingerprint_is_refused_on_a_given_network(load, given):
    _, folder = given
    content = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**content, "backbone_fingerprint": None}))
    with pytest.raises((ConfigError, FingerprintError)):
        load(folder, timm.create_model("resnet18", num_classes=3))


def test_an_adapter_is_refused_on_a_network_with_other_strides(tmp_path):
    base = timm.create_model("resnet18", output_stride=8)
    get_bn_only_model(base, BNOnlyConfig(seed=0, model_args={"output_stride": 8})).save_pretrained(tmp_path)
    with pytest.raises((RebuildError, FingerprintError)):
        load_bn_only_model(tmp_path, timm.create_model("resnet18"))


GAMMA = "base_model.model.bn1.bn_only_layers.weight"
TENSOR_FAULTS = {
    "missing": (lambda t: t.pop(GAMMA), ["1 problems", "missing bn1.bn_only_layers.weight"]),
    "extra": (
        lambda t: t.update({"base_model.model.conv1.0.weight": torch.zeros(1)}),
        ["1 problems", "extra conv1.0.weight"],
    ),
    "wrong-shape": (lambda t: t.update({GAMMA: torch.ones(3)}), ["bn1.bn_only_layers.weight", "(3,)", "(32,)"]),
    "wrong-kind": (lambda t: t.update({GAMMA: torch.ones(32).long()}), ["torch.int64", "torch.float32"]),
    "not-finite": (lambda t: t[GAMMA].fill_(torch.nan), ["bn1.bn_only_layers.weight", "not finite"]),
    "renamed": (
        lambda t: t.update({GAMMA.replace("weight", "default.weight"): t.pop(GAMMA)}),
        ["2 problems", "extra", "missing"],
    ),
    "none": (lambda t: t.clear(), ["missing"]),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_tensors_that_do_not_fit_are_told_one_by_one(fault, folder, refused):
    damage, words = TENSOR_FAULTS[fault]
    path = folder / SAFETENSORS_WEIGHTS_NAME
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    with refused(AdapterTensorError, *words):
        load_bn_only_model(folder)


def test_a_network_given_is_plain_and_trainable_again_after_a_refusal(given):
    base, folder = given
    save_file({}, folder / SAFETENSORS_WEIGHTS_NAME)
    before, modules = state(base), [id(module) for module in base.modules()]
    with pytest.raises(AdapterTensorError):
        load_bn_only_model(folder, base)
    assert [id(module) for module in base.modules()] == modules
    assert not hasattr(base, "peft_config")
    assert same_state(state(base), before)
    assert {module.training for module in base.modules()} == {True}
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_a_full_disk_loses_nothing(kind, folder, monkeypatch, refused):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device") if kind is OSError else SafetensorError("os error 28")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = get_bn_only_model(timm.create_model(NAME), BNOnlyConfig(seed=1))
    monkeypatch.setattr("peft.peft_model.safe_save_file", full)
    with refused(NoSpaceError, str(folder), "bytes free"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_saving_replaces_the_adapter_that_was_there(folder):
    model = get_bn_only_model(timm.create_model(NAME), BNOnlyConfig(seed=1)).eval()
    assert reload_is_exact(model, folder)
    assert {path.name for path in folder.iterdir()} == FILES


@pytest.mark.parametrize("seed", [0, None])
def test_a_network_on_the_meta_device_is_refused(seed, refused):
    with torch.device("meta"):
        base = timm.create_model(NAME)
    with refused(ReinitError, "meta", "real device"):
        get_bn_only_model(base, BNOnlyConfig(seed=seed))


def test_an_adapter_is_never_pickled(tmp_path, refused):
    model = get_bn_only_model(timm.create_model(NAME), BNOnlyConfig(seed=0))
    with refused(ConfigError, "never pickled"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.iterdir())


def test_every_class_has_a_name_or_none_has(refused):
    with refused(ConfigError, "2 names, 3 classes"):
        get_bn_only_model(timm.create_model(NAME, num_classes=3), BNOnlyConfig(seed=0, label_names=["cat", "dog"]))
