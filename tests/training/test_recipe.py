"""A recipe: its keys, their ranges, the files and arguments that set them, the commands that lead back to it."""

import json
import math
import shlex
from dataclasses import fields, replace

import pytest
from accelerate.commands.launch import launch_command_parser

from bn_affine_adapters.errors import ConfigError, UnknownKeyError
from bn_affine_adapters.training import recipe as recipes
from bn_affine_adapters.training.recipe import (
    CHOICES,
    CONFIGS,
    ELEMENTWISE,
    RANGES,
    Recipe,
    config_files,
    find_config,
    in_range,
    members,
    recorded,
    run_key,
    validate_command,
    words,
)
from bn_affine_adapters.training.train import command, read_recipe
from bn_affine_adapters.training.validate import Options


def test_every_recipe_that_comes_with_the_package_reads():
    read = {name: read_recipe([name]) for name in config_files() if "/" not in name}
    assert sorted(read) == ["adapt", "cifar10", "digits", "fashion_mnist", "imagenet"]
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
        (["epochs=many"], ConfigError, "cannot be read"),
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


def test_every_number_has_a_range():
    kinds = (int, float, list)
    numbers = {f.name for f in fields(Recipe) if isinstance(getattr(Recipe(), f.name), kinds)}
    numbers -= {f.name for f in fields(Recipe) if isinstance(getattr(Recipe(), f.name), bool)}
    assert numbers - {"seed", "data_seed"} == set(
        RANGES
    )  # any seed orders the data; the configuration checks the other
    assert len(RANGES) == 25
    assert all(in_range(getattr(Recipe(), key), interval) for key, interval in RANGES.items())


def outside(key):
    """A value just outside of a key's range, of the key's type."""
    low = float(RANGES[key][1:].partition(",")[0])
    value = -math.inf if math.isinf(low) else low - 1 if RANGES[key][0] == "[" else low
    usual = getattr(Recipe(), key)
    return [value] * 3 if isinstance(usual, list) else int(value) if isinstance(usual, int) else value


@pytest.mark.parametrize("key", RANGES)
def test_a_number_out_of_range_is_refused_by_its_key(key, refused):
    with refused(ConfigError, f"{key} is out of range", RANGES[key]):
        read_recipe(words({key: outside(key)}))


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
        members(read_recipe(wrong))


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
    assert all(shown[key].endswith(interval) for key, interval in RANGES.items())


def test_choices_are_keys_and_allow_the_default():
    assert all(getattr(Recipe(), key) in choices for key, choices in CHOICES.items())
    assert len(CHOICES) == 8


def test_accelerate_launches_the_module():
    line = ["-m", "bn_affine_adapters.training.train", "digits", "epochs=2", "--json"]
    parsed = launch_command_parser().parse_args(line)
    assert parsed.module
    assert parsed.training_script_args == ["digits", "epochs=2", "--json"]
