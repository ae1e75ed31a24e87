"""The configuration: JSON both ways, every value checked, nothing unknown, nothing of this run written down."""

import copy
import json
import pickle
import shutil
from dataclasses import asdict, fields, make_dataclass, replace

import peft
import pytest
import timm
from conftest import each_once
from peft import PeftConfig
from peft.utils import CONFIG_NAME

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.errors import ConfigError, FormatVersionError, UnknownKeyError
from bn_affine_adapters.seed.rules import WEIGHT_INITS
from bn_affine_adapters.settings import BN_ONLY, FORBIDDEN_ARGS, FORMAT_VERSION, PEFT_KEYS, RUN_TIME

FULL = dict(
    seed=2**64 - 1,
    weight_init="binary",
    norm_init="symmetric",
    train_gamma=False,
    train_beta=True,
    train_head=True,
    control="signed_mask",
    mask_share=0.3,
    extra_trainable_modules=["layer2.0.downsample.0", "Blöcke.0"],
    norm_layers=["bn1"],
    running_statistics="frozen",
    architecture="resnet18",
    model_args={"num_classes": 7, "output_stride": 8, "layers": [2, 2, 2, 2], "drop_rate": 0.25, "global_pool": None},
    layer_scale="train",
    layer_scales=["layer1.0.gamma"],
    head_layers=["fc"],
    control_layers=["conv1"],
    data_config={"input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "interpolation": "bilinear", "crop_pct": 0.875},
    label_names=["cat", "Kühe"],
    backbone_fingerprint="ab" * 32,
    backbone_fingerprint_sampled="cd" * 32,
    backbone_digests="12345678" * 3,
    frozen_fingerprint="ef" * 32,
    layout_hash="01" * 32,
    traits_fingerprint="23" * 32,
    traits_digests="4567" * 3,
    tensors_digest="89" * 32,
    versions={"torch": "2.15.0", "timm": "1.0.31"},
)
CONFIGS = {
    "defaults": {},
    "seed": {"seed": 0},
    "every_field": FULL,
    "pretrained_with_head": {"train_head": True, "norm_init": "keep"},
}
OURS = {f.name for f in fields(BNOnlyConfig)} - {f.name for f in fields(PeftConfig)}


def write(folder, **changes):
    """Write a configuration's file with some keys changed by hand, as another program might; return the folder."""
    BNOnlyConfig(seed=0).save_pretrained(str(folder))
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return str(folder)


def test_the_defaults_are_the_issues():
    config = BNOnlyConfig()
    assert (config.seed, config.norm_init, config.weight_init) == (None, "keep", "kaiming_normal")
    assert (config.train_gamma, config.train_beta, config.train_head) == (True, True, False)
    assert (config.running_statistics, config.verify) == ("update", "full")
    assert (config.norm_layers, config.extra_trainable_modules, config.model_args) == (None, [], {})
    assert (config.peft_type, config.format_version, config.init_scheme) == ("BN_ONLY", 2, "bnaffine-init-v1")
    assert BNOnlyConfig(seed=0).norm_init == "uniform"
    assert BNOnlyConfig(seed=0, norm_init="ones").norm_init == "ones"


def test_two_configurations_share_no_mutable_default():
    first, second = BNOnlyConfig(), BNOnlyConfig()
    first.extra_trainable_modules.append("fc")
    first.model_args["num_classes"] = 10
    first.versions["torch"] = "1"
    assert (second.extra_trainable_modules, second.model_args, second.versions) == ([], {}, {})


def test_the_full_example_changes_every_field_that_a_file_holds():
    # format_version and init_scheme have one value each, so far.
    assert OURS - set(RUN_TIME) - {"format_version", "init_scheme"} == set(FULL)
    unchanged = [key for key, value in FULL.items() if getattr(BNOnlyConfig(), key) == value and key != "train_beta"]
    assert unchanged == []


@each_once(name=list(CONFIGS), reader=[BNOnlyConfig, PeftConfig])
def test_a_configuration_comes_back_equal_from_json(name, reader, tmp_path):
    config = BNOnlyConfig(**CONFIGS[name])
    config.save_pretrained(str(tmp_path))
    again = reader.from_pretrained(str(tmp_path))
    assert type(again) is BNOnlyConfig
    assert again == config
    again.save_pretrained(str(tmp_path / "again"))
    assert (tmp_path / "again" / CONFIG_NAME).read_bytes() == (tmp_path / CONFIG_NAME).read_bytes()


def test_tuples_come_back_equal_from_json(tmp_path):
    # timm's own configurations hold tuples, so that users pass them.
    config = BNOnlyConfig(
        model_args={"img_size": (32, 32)}, data_config={"mean": (0.5, 0.5, 0.5)}, norm_layers=("bn1",)
    )
    config.save_pretrained(str(tmp_path))
    assert BNOnlyConfig.from_pretrained(str(tmp_path)) == config


def test_the_file_is_flat_strict_json(tmp_path):
    BNOnlyConfig(**FULL).save_pretrained(str(tmp_path))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads((tmp_path / CONFIG_NAME).read_text(encoding="utf-8"), parse_constant=refuse)
    assert content["peft_type"] == content["task_type"] == "BN_ONLY"
    assert content["seed"] == 2**64 - 1
    assert set(content) == {f.name for f in fields(BNOnlyConfig)} - set(RUN_TIME)
    nested = {key for key, value in content.items() if isinstance(value, dict)}
    assert nested == {"model_args", "data_config", "versions"}


def test_the_two_run_time_choices_are_never_written(tmp_path):
    assert RUN_TIME == ("verify", "lean")
    BNOnlyConfig(seed=0, verify="off", lean="exact").save_pretrained(str(tmp_path))
    assert not set(RUN_TIME) & set(json.loads((tmp_path / CONFIG_NAME).read_text(encoding="utf-8")))
    assert set(RUN_TIME) < set(asdict(BNOnlyConfig()))


READERS = {
    "BNOnlyConfig": BNOnlyConfig.from_pretrained,
    "PeftModel": lambda folder: peft.PeftModel.from_pretrained(timm.create_model("cifar_resnet14"), folder),
    "load_bn_only_model": load_bn_only_model,
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A whole adapter folder, to be copied before it is changed."""
    folder = tmp_path_factory.mktemp("adapter")
    get_bn_only_model(timm.create_model("cifar_resnet14"), BNOnlyConfig(seed=0)).save_pretrained(folder)
    return folder


@each_once(reader=list(READERS), key=RUN_TIME)
def test_a_run_time_choice_in_a_file_is_refused(key, reader, adapter, tmp_path):
    # A file that could turn its own verification off would not be verified at all.
    folder = shutil.copytree(adapter, tmp_path / "copy")
    content = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    (folder / CONFIG_NAME).write_text(json.dumps(content | {key: "off"}), encoding="utf-8")
    with pytest.raises(UnknownKeyError, match=key):
        READERS[reader](str(folder))


@pytest.mark.parametrize("reader", READERS)
def test_the_same_folder_unchanged_is_read(reader, adapter):
    found = READERS[reader](str(adapter))
    assert (found if reader == "BNOnlyConfig" else found.peft_config["default"]).seed == 0


NEAREST = {"trian_head": "train_head", "sead": "seed", "norm_layer": "norm_layers", "weights_init": "weight_init"}


@pytest.mark.parametrize("key", NEAREST)
def test_an_unknown_key_is_an_error_with_the_nearest_match(key):
    with pytest.raises(UnknownKeyError) as caught:
        BNOnlyConfig(**{key: 1})
    assert f"{key!r}" in caught.value.what
    assert caught.value.do == f"use {NEAREST[key]!r}"


@each_once(key=list(NEAREST), reader=[BNOnlyConfig, PeftConfig])
def test_an_unknown_key_in_a_file_is_an_error_with_the_nearest_match(key, reader, tmp_path):
    with pytest.raises(UnknownKeyError) as caught:
        reader.from_pretrained(write(tmp_path, **{key: 1}))
    assert f"{key!r}" in caught.value.what
    assert (CONFIG_NAME in caught.value.what) == (reader is BNOnlyConfig)
    assert caught.value.do == f"use {NEAREST[key]!r}"


def test_an_unknown_key_like_no_other_lists_the_keys():
    with pytest.raises(UnknownKeyError) as caught:
        BNOnlyConfig(xyzzy=1)
    listed = {key for key in OURS if key in caught.value.do}
    assert listed == OURS
    assert isinstance(caught.value, TypeError)


# What no field may hold. PEFT's own fields are PEFT's to check.
BAD = {
    "seed": [-1, 2**64, 1.0, "0", True, [0]],
    "weight_init": ["kaiming", "", None, 1, ["binary"]],
    "norm_init": ["zeros", "Uniform", 0, ["ones"]],
    "train_gamma": [1, "true", None],
    "train_beta": [0, "false", None],
    "train_head": [1, "head", None],
    "control": ["two", "", 2, True, ["two_weights"]],
    "mask_share": [0, -0.5, 1.5, True, "0.5", float("nan"), 0.5],
    "extra_trainable_modules": ["fc", [1], [None], 5],
    "layer_scale": ["two", "", 1, True, ["one"]],
    "layer_scales": ["gamma", [1], 5],
    "norm_layers": ["bn1", [1], [["bn1"]], 5],
    "running_statistics": ["freeze", None, False],
    "architecture": [5, ["resnet18"], True],
    "model_args": [None, [], "num_classes=10", {"f": print}, {"t": {1}}, {1: 2}, {"nested": [object()]}],
    "head_layers": ["fc", [1], 5],
    "control_layers": ["conv1", [1], 5],
    "data_config": [[], "imagenet", 5, {"mean": [float("nan")] * 3}, {"input_size": object()}],
    "label_names": ["cat", [1, 2], 5],
    "init_scheme": ["bnaffine-init-v0", "", None],
    "format_version": ["1", 1.0, None, True, 0, -1],
    "backbone_fingerprint": [5, b"ab", ["ab"]],
    "backbone_fingerprint_sampled": [5, b"ab", ["ab"]],
    "backbone_digests": [5, b"ab", ["ab"]],
    "frozen_fingerprint": [5, b"ab", ["ab"]],
    "layout_hash": [5, b"ab", ["ab"]],
    "traits_fingerprint": [5, b"ab", ["ab"]],
    "traits_digests": [5, b"ab", ["ab"]],
    "tensors_digest": [5, b"ab", ["ab"]],
    "versions": [None, [], "2.15", {"torch": object()}],
    "verify": ["none", None, True, "FULL"],
    "lean": ["smaller", True, "", 1],
}


def test_bad_values_are_tried_for_every_field():
    assert set(BAD) == OURS
    assert sum(map(len, BAD.values())) == 124


@pytest.mark.parametrize(
    ("key", "value"),
    [pytest.param(key, value, id=f"{key}={value!r:.30}".split(" at 0x")[0]) for key in BAD for value in BAD[key]],
)
def test_a_bad_value_is_an_error_that_names_its_field(key, value):
    with pytest.raises(ConfigError) as caught:
        BNOnlyConfig(**{key: value})
    assert key in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert caught.value.seen
    assert caught.value.do


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), [0.1, [float("inf")]]], ids=str)
def test_a_float_that_is_not_finite_is_refused_in_model_args(value, tmp_path):
    with pytest.raises(ConfigError, match="drop_rate"):
        BNOnlyConfig(model_args={"drop_rate": value})
    with pytest.raises(ConfigError, match="drop_rate"):
        BNOnlyConfig.from_pretrained(write(tmp_path, model_args={"drop_rate": value}))


def test_no_extra_modules_can_be_written_as_none():
    # A file or a YAML recipe may well say null for "none"; what must not happen is a TypeError when wrapping.
    try:
        config = BNOnlyConfig(extra_trainable_modules=None)
    except ConfigError:
        return
    assert config.target_modules == ()


def test_a_generator_of_names_is_not_silently_empty():
    try:
        config = BNOnlyConfig(norm_layers=(name for name in ["bn1", "bn2"]))
    except ConfigError:
        return
    assert config.norm_layers == ["bn1", "bn2"]


@pytest.mark.parametrize("key", sorted(FORBIDDEN_ARGS))
def test_a_creation_argument_that_loads_or_changes_the_kind_is_refused(key):
    with pytest.raises(ConfigError, match=key):
        BNOnlyConfig(model_args={"num_classes": 10, key: False})


def test_the_forbidden_arguments_hold_those_that_load_files():
    assert {"pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"} <= FORBIDDEN_ARGS
    assert len(FORBIDDEN_ARGS) == 19


@pytest.mark.parametrize("extra", [{}, {"a_key_of_tomorrow": 1}, {"weight_init": "tomorrows"}], ids=str)
def test_a_newer_format_says_so_before_anything_else(extra, tmp_path):
    with pytest.raises(FormatVersionError) as caught:
        BNOnlyConfig.from_pretrained(write(tmp_path, format_version=FORMAT_VERSION + 1, **extra))
    assert f"format_version {FORMAT_VERSION + 1}" in caught.value.seen
    assert "pip install -U" in caught.value.do


def unlisted(config_class):
    """Return the keys of a PEFT's base configuration that config.PEFT_KEYS does not list."""
    return {f.name for f in fields(config_class)} - PEFT_KEYS


def test_pefts_base_keys_are_listed():
    # Conformance: when a newer PEFT brings a key, this fails, and the key is added to config.PEFT_KEYS.
    assert unlisted(PeftConfig) == set(), f"peft {peft.__version__} has keys that config.PEFT_KEYS does not list"
    assert len(fields(PeftConfig)) >= 7


def test_a_key_of_a_newer_peft_would_be_noticed():
    assert unlisted(make_dataclass("Newer", [("key_of_a_newer_peft", int, 0)], bases=(PeftConfig,))) == {
        "key_of_a_newer_peft"
    }


def test_a_key_that_only_a_newer_peft_writes_is_let_through(tmp_path, monkeypatch):
    monkeypatch.setattr("bn_affine_adapters.settings.PEFT_KEYS", PEFT_KEYS | {"key_of_a_newer_peft"})
    config = BNOnlyConfig.from_pretrained(write(tmp_path, key_of_a_newer_peft=[1, 2]))
    assert config == BNOnlyConfig(seed=0)


def test_the_method_reads_as_pefts_enum_members_do():
    config = BNOnlyConfig()
    for text in (config.peft_type, config.task_type):
        assert (text, text.value, text.name) == (BN_ONLY, "BN_ONLY", "BN_ONLY")
    assert json.dumps(config.peft_type) == '"BN_ONLY"'


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda c: pickle.loads(pickle.dumps(c)),
    "replace": replace,
}


@each_once(way=COPIES, name=list(CONFIGS))
def test_a_copy_is_equal(way, name):
    config = BNOnlyConfig(**CONFIGS[name])
    again = way(config)
    assert again is not config
    assert again == config
    assert again.peft_type.value == "BN_ONLY"


def test_a_deep_copy_shares_no_list():
    config = BNOnlyConfig(**FULL)
    again = copy.deepcopy(config)
    again.norm_layers.append("bn2")
    again.model_args["num_classes"] = 8
    assert (config.norm_layers, config.model_args["num_classes"]) == (["bn1"], 7)


def test_target_modules_are_norm_layers_then_head_then_extras_each_once():
    config = BNOnlyConfig(norm_layers=["bn1", "bn2"], head_layers=["fc"], extra_trainable_modules=["bn2", "conv"])
    assert config.target_modules == ("bn1", "bn2", "conv")
    assert replace(config, train_head=True).target_modules == ("bn1", "bn2", "fc", "conv")
    # PEFT runs a string as a regular expression; a tuple it leaves as it is.
    assert isinstance(config.target_modules, tuple)


def test_only_orthogonal_weights_from_a_seed_are_not_portable():
    choices = [(seed, init) for seed in (None, 0) for init in WEIGHT_INITS]
    found = {(seed, init): BNOnlyConfig(seed=seed, weight_init=init).portable for seed, init in choices}
    assert [key for key, portable in found.items() if not portable] == [(0, "orthogonal")]
    assert len(found) == 8


def test_a_configuration_is_fresh_until_it_has_a_fingerprint():
    assert BNOnlyConfig(seed=0).fresh
    assert not BNOnlyConfig(**FULL).fresh
