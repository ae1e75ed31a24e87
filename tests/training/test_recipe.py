"""A recipe: its keys, their ranges, the files and arguments that set them, the commands that lead back to it."""

import json
import math
import shlex
from dataclasses import dataclass, fields, replace

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from bn_affine_adapters.errors import (
    ConfigError,
    FileError,
    NoNormLayerError,
    RebuildError,
    UnknownArchitectureError,
    UnknownKeyError,
)
from bn_affine_adapters.study.analyse import Options as AnalyseOptions
from bn_affine_adapters.study.analyse import read_options as read_analysis
from bn_affine_adapters.training import recipe as recipes
from bn_affine_adapters.training.ranges import SWITCH, TEXT, TEXTS, VALUES, in_range
from bn_affine_adapters.training.recipe import (
    CONFIGS,
    ELEMENTWISE,
    RANGES,
    Recipe,
    config_files,
    find_config,
    members,
    recorded,
    run_key,
    validate_command,
)
from bn_affine_adapters.training.sweeps import Sweep, read_sweep
from bn_affine_adapters.training.train import command, read_recipe
from bn_affine_adapters.training.tune import Tuning, read_tuning
from bn_affine_adapters.training.validate import Options, read_options


def test_every_recipe_that_comes_with_the_package_reads():
    read = {name: read_recipe([name]) for name in config_files() if "/" not in name}
    assert sorted(read) == ["cifar10", "digits", "fashion_mnist", "finetune", "imagenet"]
    assert read["digits"] == read_recipe([])
    cifar = read["cifar10"]
    assert (cifar.epochs, cifar.batch_size, cifar.lr, cifar.weight_decay) == (160, 128, 0.1, 1e-4)
    assert (
        cifar == read_recipe(["--config", "cifar10.yaml"]) == read_recipe(["--config", str(CONFIGS / "cifar10.yaml")])
    )
    assert cifar == read_recipe(["condition=bn", "--config", "cifar10"])


def test_a_file_in_the_working_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("digits.yaml") == CONFIGS / "digits.yaml"
    (tmp_path / "digits.yaml").write_text("epochs: 3\n")
    assert read_recipe(["digits.yaml", "seed=2"]) == replace(Recipe(), epochs=3, seed=2)
    assert read_recipe([]).epochs == read_recipe(["digits"]).epochs == 40
    assert find_config("digits", "sweeps") == CONFIGS / "sweeps" / "digits.yaml"


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (["epoch=3"], UnknownKeyError, "epochs"),
        (["condition=bnn"], ConfigError, "bn\\+head"),
        (["schedule=step"], ConfigError, "cosine"),
        (["precision=fp8"], ConfigError, "bf16"),
        (["epochs=many"], ConfigError, "epochs is out of range"),
        (["epochs=2.5"], ConfigError, "epochs: Value '2.5'"),
        (["epochs=[1"], ConfigError, "cannot be read"),
        (["nowhere"], ConfigError, "fashion_mnist"),
        (["--config", "nowhere.yaml"], ConfigError, "cannot be read"),
        (["--config"], ConfigError, "cannot be read"),
        (["pretrained=true"], ConfigError, "seed"),
        (["seed=null"], ConfigError, "pretrained"),
        (["optimizer=adamv"], ConfigError, "adamw"),
        (["optimizer=adahessian"], ConfigError, "adamw"),
        (["optimizer_args={layer_decay: 0.7}"], ConfigError, "layer_decay is not supported"),
        (["optimizer_args={momentum: 0.7}"], ConfigError, "sgd_momentum=0.7"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_refused(arguments, error, match):
    with pytest.raises(error, match=match) as caught:
        read_recipe(arguments)
    assert caught.value.what
    assert caught.value.seen
    assert caught.value.do


def test_precision_no_can_be_given(tmp_path):
    assert read_recipe(["imagenet"]).precision == "bf16"
    assert read_recipe(["imagenet", "precision=no"]).precision == "no"
    (tmp_path / "mine.yaml").write_text("precision: no\nepochs: 3\n")
    assert read_recipe([str(tmp_path / "mine.yaml")]) == replace(Recipe(), epochs=3)


# -- ranges

LAUNCHERS = {"train": Recipe, "validate": Options, "analyse": AnalyseOptions, "sweep": Sweep, "tune": Tuning}
KEYS = {key: name for name, options in reversed(LAUNCHERS.items()) for key in vars(options())}  # the first that has it
NEEDED = {"config", "conditions", "networks", "results", "trials"}  # by a sweep or a tuning: they have no default


def test_every_key_of_every_launcher_has_a_range_and_its_default_lies_in_it():
    assert set(KEYS) == set(RANGES)
    assert len(KEYS) == 74
    for name, options in LAUNCHERS.items():
        usual = vars(options())
        recipes.check_ranges({key: usual[key] for key in usual if name not in ("sweep", "tune") or key not in NEEDED})


def test_a_key_without_a_range_would_be_noticed():
    @dataclass
    class Longer(Recipe):
        colour: str = "red"

    with pytest.raises(KeyError, match="colour"):
        recipes.read(Longer, {"colour": "blue"}, what="It", do="do")


def beyond(key):
    """Values of a key that are too small, too large, or of another type."""
    allowed = RANGES[key]
    if isinstance(allowed, tuple):
        return ["", "-".join(map(str, allowed)), 5, True, [allowed[-1]], {"a": 1}]
    other = {SWITCH: ["yes, please", 0, 2, [True], {"a": 1}], TEXT: ["", True, 0.5, ["a"], {"a": 1}, "a\0b"]}
    other |= {VALUES: ["a", 5, ["a"], {1: 2}, {"": 2}], TEXTS: ["a", [], [""], [True], {"a": 1}]}
    if allowed in other:
        return other[allowed]
    interval = allowed.rpartition(" of ")[2]
    low, high = (float(end) for end in interval[1:-1].split(","))
    below = low - 1 if interval[0] == "[" else low
    above = high if interval[-1] == ")" else high + 1
    wrong = [int(n) if math.isfinite(n) and n == int(n) else n for n in (below, above)]
    wrong += [math.nan, "many", True, {"a": 1}]
    if isinstance(getattr(LAUNCHERS[KEYS[key]](), key), list):
        return [*wrong, *([n] for n in wrong), *([n, n] for n in wrong)]
    return wrong


def plain(value):
    return yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("...").strip()


def launch(key, value, folder):
    """Start the launcher that has a key; the data, or the adapter, that it would then read are not there."""
    name, file = KEYS[key], folder / "file.yaml"
    if name in ("sweep", "tune"):
        file.write_text(yaml.safe_dump({key: value}))
        return {"sweep": read_sweep, "tune": read_tuning}[name](file)
    missing = "dataset" if name == "train" else "adapter"
    given = [f"{missing}={folder / 'nothing'}"] * (key != missing) + [f"{key}={plain(value)}"]
    return {"train": command, "validate": read_options, "analyse": read_analysis}[name](given)


@pytest.mark.parametrize("key", RANGES)
def test_a_value_out_of_range_is_refused_by_its_key_before_anything_is_read(key, tmp_path):
    for value in beyond(key):
        with pytest.raises(ConfigError) as caught:
            launch(key, value, tmp_path)
        assert key in caught.value.what, f"{key}={value!r}: {caught.value}"
        assert caught.value.seen.startswith(f"{key}="), f"{key}={value!r}: {caught.value}"
        assert caught.value.do
    assert len(beyond(key)) >= 4


REFUSED_LATER = {
    "model=foo": (UnknownArchitectureError, "'foo'"),
    "model=test_nfnet": (NoNormLayerError, "NormFreeNet"),
    "model_args={foo: 1}": (RebuildError, "model_args={'foo': 1}"),
    "model_args={pretrained: true}": (ConfigError, "model_args holds keys"),
    "optimizer=foo": (ConfigError, "optimizer='foo'"),
    "optimizer_args={foo: 1}": (ConfigError, "optimizer_args={'foo': 1}"),
    "tracker=foo": (ConfigError, "tracker='foo'"),
    "batch_size=3; accumulation=4": (ConfigError, "accumulation=4, batch_size=3"),
    "condition=all; running_statistics=frozen": (ConfigError, "running_statistics=frozen"),
    "seed=18446744073709551615; replicates=2": (ConfigError, "seed=18446744073709551616"),
    "replicates=2; streaming=true": (ConfigError, "streaming=True"),
    "pretrained=true; seed=null; pretrained_file=none.safetensors": (FileError, "none.safetensors"),
}


@pytest.mark.parametrize("words", REFUSED_LATER)
@pytest.mark.usefixtures("each_run_begins_as_in_a_process_of_its_own")
def test_what_a_library_or_another_key_does_not_allow_is_refused_before_data_are_read(words, refused, tmp_path):
    error, seen = REFUSED_LATER[words]
    with refused(error, seen):
        command([f"dataset={tmp_path / 'nothing'}", f"output_dir={tmp_path / 'run'}", *words.split("; ")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["lr", "std", "weight_decay"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_or_infinite_is_refused(key, value, refused):
    with refused(ConfigError, f"{key} is out of range"):
        recipes.check_values(replace(Recipe(), **{key: [value] if key == "std" else value}))


def test_intervals_end_where_they_say():
    assert [in_range(value, "[0, 1)") for value in (-1e-9, 0, 0.5, 1)] == [False, True, True, False]
    assert [in_range(value, "(0, 1]") for value in (0, 1e-9, 1, 1.1)] == [False, True, True, False]
    assert in_range([], "(0, 1]")
    assert not in_range([0.5, 2], "(0, 1]")
    assert [in_range(value, "some of [0, 1]") for value in ([], [0], 0)] == [False, True, False]
    pairs = ([0, 1], [1, 1], [1, 0], [1], [0, 0, 1])
    assert [in_range(value, "two of [0, 1]") for value in pairs] == [True, True, False, False, False]
    assert not in_range(2**64, "[0, 18446744073709551616)")
    assert in_range(2**64 - 1, "[0, 18446744073709551616)")


@pytest.mark.parametrize(
    "wrong",
    [
        ["replicates=0"],
        ["replicates=2", "pretrained=true", "seed=null"],
        ["replicates=2", "precision=fp16"],
        ["replicates=2", "optimizer=lamb"],
    ],
)
def test_replicates_that_cannot_be_stacked_are_refused(wrong, refused):
    with refused(ConfigError, "replicates"):
        read_recipe(wrong)


def test_replicates_train_with_an_optimiser_that_looks_at_each_value_alone():
    for name in ELEMENTWISE:
        assert [r.seed for r in members(read_recipe(["replicates=2", f"optimizer={name}"]))] == [0, 1]


def test_the_command_in_a_result_line_means_the_same_recipe(tmp_path):
    changes = ["condition=bn+head", "mean=[0.1,0.2,0.3]", "norm_init=ones", "model_args={drop_rate: 0.1}", "flip=true"]
    recipe = read_recipe([f"output_dir={tmp_path}", "seed=3", *changes])
    line = shlex.split(recipes.command(recipe, read_recipe([])))
    assert line[:2] == ["bn-adapters", "train"]
    assert len(line) == 2 + 1 + len(changes)
    assert recorded(read_recipe(line[2:])) == recorded(recipe)


def test_a_command_for_others_says_where_a_file_of_this_machine_is_to_be_put(tmp_path):
    (tmp_path / "birds").mkdir()
    (tmp_path / "w.safetensors").touch()
    given = [f"dataset={tmp_path}/birds", f"pretrained_file={tmp_path}/w.safetensors", "pretrained=true", "seed=null"]
    recipe = read_recipe(given)
    line = shlex.split(recipes.command(recipe, read_recipe([])))
    assert {"dataset=PATH/TO/birds", "pretrained_file=PATH/TO/w.safetensors"} < {*line}
    assert recorded(recipe)["dataset"] == "birds", "a run is known by the name"
    assert "dataset=me/birds" in recipes.command(read_recipe(["dataset=me/birds"]), read_recipe([]))


def test_the_next_command_tests_on_the_same_images():
    assert validate_command(read_recipe([]), "runs/digits/adapter") == "bn-adapters validate runs/digits/adapter"
    recipe = read_recipe(["cifar10", "held_out=500", "precision=bf16"])
    line = shlex.split(validate_command(recipe, "a b"))
    assert line == ["bn-adapters", "validate", "a b", "dataset=uoft-cs/cifar10", "held_out=500", "precision=bf16"]
    assert set(recipes.TEST_KEYS) <= {f.name for f in fields(Options)}


def test_a_run_of_before_has_the_key_that_it_had():
    old = json.loads(json.dumps(asdict_without_new(read_recipe(["seed=3"]))))
    assert run_key(old) == run_key(recorded(read_recipe(["seed=3"])))
    assert run_key(old) != run_key(recorded(read_recipe(["seed=3", "optimizer=adamw"])))


def asdict_without_new(recipe):
    """What a result line recorded before there was a choice of optimisers."""
    return {key: value for key, value in recorded(recipe).items() if not key.startswith("optimizer")}


def test_help_lists_every_key_its_default_and_range(capsys):
    command(["--help"])
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines() if line.startswith("  ") and "=" in line]
    shown = {line[0].split("=")[0]: " ".join(line[1:]) for line in lines}
    assert {f.name for f in fields(Recipe)} <= set(shown)
    assert shown["eval_every"] == RANGES["eval_every"]
    assert shown["crop_scale"].endswith(RANGES["crop_scale"])
    assert shown["lean"] == "null | exact | rounded | smallest"
    assert shown["tracker"] == ""


def test_accelerate_launches_the_module():
    line = ["-m", "bn_affine_adapters.training.train", "digits", "epochs=2", "--json"]
    parsed = launch_command_parser().parse_args(line)
    assert parsed.module
    assert parsed.training_script_args == ["digits", "epochs=2", "--json"]
