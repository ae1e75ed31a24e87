"""Every argument that takes words refuses any other value, wherever it is given and however it gets there."""

from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import timm
import torch

import bn_affine_adapters as package
from bn_affine_adapters import BNOnlyConfig, adapt_to, export, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.errors import ConfigError, check_choice
from bn_affine_adapters.seed.draws import Distribution, draw
from bn_affine_adapters.seed.rules import NORM_INITS, WEIGHT_INITS, draw_norm_, reinit_, rule_for
from bn_affine_adapters.settings import LEAN, VERIFY
from bn_affine_adapters.training.recipe import RANGES, Recipe, check_values
from bn_affine_adapters.training.validate import read_options


def wrapped():
    return get_bn_only_model(timm.create_model("test_resnet", num_classes=3), BNOnlyConfig(seed=0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    wrapped().save_pretrained(folder := tmp_path_factory.mktemp("adapter"))
    return folder


def network():
    return timm.create_model("test_resnet", num_classes=3)


def recipe(key):
    return lambda folder, value: check_values(Recipe(**{key: value}))


def option(key):
    return lambda folder, value: read_options([str(folder), f"{key}={value}"])


def data(key):
    return lambda folder, value: BNOnlyConfig(data_config={key: value})


# argument: (its words, what is called with a value)
ARGUMENTS = {
    "load_bn_only_model(verify)": (VERIFY, lambda folder, value: load_bn_only_model(folder, verify=value)),
    "load_bn_only_model(lean)": (LEAN, lambda folder, value: load_bn_only_model(folder, lean=value)),
    "set_lean(level)": (LEAN, lambda folder, value: wrapped().set_lean(value)),
    "adapt_to(method)": (
        ("statistics", "tent"),
        lambda folder, value: adapt_to(wrapped(), [torch.rand(4, 3, 32, 32)], value),
    ),
    "export(format)": (("timm", "ln_tuning"), lambda folder, value: export(wrapped(), folder / "out", value)),
    "reinit_(weight_init)": (WEIGHT_INITS, lambda folder, value: reinit_(network(), 0, weight_init=value)),
    "reinit_(norm_init)": (NORM_INITS, lambda folder, value: reinit_(network(), 0, norm_init=value)),
    "rule_for(weight_init)": (WEIGHT_INITS, lambda folder, v: rule_for(torch.nn.Linear(2, 2), "weight", v, "ones")),
    "rule_for(norm_init)": (NORM_INITS, lambda folder, v: rule_for(torch.nn.BatchNorm2d(2), "weight", "binary", v)),
    "draw_norm_(norm_init)": (NORM_INITS, lambda folder, value: draw_norm_(torch.nn.BatchNorm2d(2), "bn", 0, value)),
    "draw(distribution)": (get_args(Distribution), lambda folder, value: draw((2,), 0, "x", value)),
    "BNOnlyConfig(verify)": (VERIFY, lambda folder, value: BNOnlyConfig(verify=value)),
    "BNOnlyConfig(lean)": (LEAN, lambda folder, value: BNOnlyConfig(lean=value)),
    "data_config(crop_mode)": (("center", "squash", "border", None), data("crop_mode")),
    "data_config(interpolation)": (("bilinear", "bicubic", None), data("interpolation")),
    "validate(precision)": (RANGES["precision"], option("precision")),
    **{f"Recipe({key})": (words, recipe(key)) for key, words in RANGES.items() if isinstance(words, tuple)},
}
TYPED = (
    "adapt_to(method)",
    "load_bn_only_model(verify)",
    "load_bn_only_model(lean)",
    "export(format)",
    "BNOnlyConfig(verify)",
)
WRONG = [True, False, 0, "", "Full", "OFF ", "Exact", "none", ["full"], {"full"}, np.array(["full", "off"]), b"full"]


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_an_argument_of_words_refuses_all_others(argument, folder, refused):
    words, call = ARGUMENTS[argument]
    wrong = [value for value in WRONG if not (isinstance(value, str) and value in words)]
    if argument.startswith("validate"):  # a line of text
        wrong = [value for value in wrong if isinstance(value, str) and value.strip("OF ")]
    if argument.startswith("data_config"):  # another check refuses what is not JSON
        wrong = [value for value in wrong if isinstance(value, bool | int | str | list)]
    for value in [*wrong, *([] if None in words or argument.startswith("validate") else [None])]:
        with refused(ConfigError, "choose from"):
            call(folder, value)


@pytest.mark.parametrize("argument", [name for name in ARGUMENTS if not name.startswith(("load", "export", "set"))])
def test_its_own_words_are_taken(argument, folder):
    words, call = ARGUMENTS[argument]
    for word in words:
        if argument != "Recipe(lean)" or word is None:  # which needs a condition that freezes
            call(folder, word)


def test_every_literal_of_the_public_functions_is_tried():
    found = set()
    for name in package.__all__:
        target = getattr(package, name)
        classes = target.__mro__ if isinstance(target, type) else [target]
        hints = {key: hint for each in classes for key, hint in getattr(each, "__annotations__", {}).items()}
        for key, hint in hints.items():
            if Literal in (get_origin(part) for part in (hint, *get_args(hint))):
                found.add(f"{name}({key})")
    assert found == {*TYPED, "BNOnlyConfig(lean)"} <= ARGUMENTS.keys()


def test_a_configuration_that_is_changed_later_is_checked_when_it_is_used(folder, refused):
    changes = {"verify": True, "norm_init": "Ones", "weight_init": None, "running_statistics": "freeze", "seed": "0"}
    for key, value in changes.items():
        config = BNOnlyConfig(seed=0)
        setattr(config, key, value)
        base = network()
        before = base.conv1[0].weight.clone()
        with refused(ConfigError, key):
            get_bn_only_model(base, config)
        assert torch.equal(base.conv1[0].weight, before)


def test_a_wrong_level_leaves_lean_training_on(refused):
    model = wrapped()
    model.set_lean("exact")
    with refused(ConfigError, "lean"):
        model.set_lean("Exact")
    assert model.base_model.lean.level == "exact"


def test_the_refusal_is_short_whatever_was_given(refused):
    with refused(ConfigError, "choose from a, None") as caught:
        check_choice("key", "x" * 10_000, ("a", None))
    assert len(caught.value.seen) <= 200
