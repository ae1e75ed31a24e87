"""Methods compared on tasks: what is trained, what is skipped, how a rate is chosen, what is refused."""

import json
import os
from dataclasses import replace

import pytest
import timm
import torch
from accelerate import Accelerator
from click.testing import CliRunner
from PIL import Image
from torch import nn

from bn_affine_adapters.cli import main
from bn_affine_adapters.norms.find import norm_layers
from bn_affine_adapters.training.compare import METHODS, STEPS, accuracy_of, planned, trained_line
from bn_affine_adapters.training.feed import Feed
from bn_affine_adapters.training.network import build_network, configuration
from bn_affine_adapters.training.recipe import CONFIGS, Recipe, read_recipe


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two folders of small images: bright and dark ones; reddish, greenish and bluish ones."""
    folder, draws = tmp_path_factory.mktemp("tasks"), torch.Generator().manual_seed(0)
    shades = {"light": {"dark": (60, 60, 60), "bright": (190, 190, 190)}}
    shades["colour"] = {name: tuple(200 if i == own else 60 for i in range(3)) for own, name in enumerate("rgb")}
    for task, classes in shades.items():
        for split, count in (("train", 10), ("test", 4)):
            for name, shade in classes.items():
                place = folder / task / split / name
                place.mkdir(parents=True)
                for number in range(count):
                    noise = torch.randint(-40, 40, (32, 32, 3), generator=draws)
                    pixels = (torch.tensor(shade) + noise).to(torch.uint8)
                    Image.fromarray(pixels.numpy()).save(place / f"{number}.png")
    return folder


SMALL = ("model=test_resnet", "pretrained=false", "seed=0", "image_size=32", "epochs=3", "batch_size=8", "threads=1")


def compare(tasks, results, *words):
    """Run the command; return its exit code, its output and the lines of the results."""
    names = [str(tasks / word) if (tasks / word).is_dir() else word for word in words]
    done = CliRunner().invoke(main, ["compare", *names, "--results", str(results), *SMALL])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    return done.exit_code, done.output, lines


def test_a_run_has_three_trials_on_held_out_images_and_one_test_with_the_best_rate(tasks, tmp_path):
    code, output, lines = compare(tasks, tmp_path / "x.jsonl", "colour", "--methods", "norm+head")
    assert code == 0, output
    *trials, final = lines
    recipes = [line["run_info"]["train_config"] for line in trials]
    assert [recipe["lr"] for recipe in recipes] == [float(f"{0.01 * step:.3g}") for step in STEPS]
    assert {(recipe["held_out"], recipe["epochs"]) for recipe in recipes} == {(6, 1)}
    assert {line["meta_info"]["dataset_info"]["split"] for line in trials} == {"6 held out of train"}
    found = [accuracy_of(line) for line in trials]
    recipe, info = final["run_info"]["train_config"], final["train_info"]
    assert recipe["lr"] == recipes[found.index(max(found))]["lr"]
    assert (recipe["held_out"], recipe["epochs"]) == (0, 3)
    counts = {"train": 30, "test": 12, "classes": 3, "split": "test"}
    assert final["meta_info"]["dataset_info"] == counts
    assert info["metrics"][-1]["accuracy"] == pytest.approx(info["metrics"][-2]["top1"], abs=1e-3)
    assert info["metrics"][-1]["balanced accuracy"] == pytest.approx(info["metrics"][-2]["top1"], abs=1e-3)
    assert info["accelerator_memory_max"] >= 0


def test_finished_runs_are_skipped_and_a_torn_line_is_trained_again(tasks, tmp_path):
    results = tmp_path / "x.jsonl"
    command = (tasks, results, "light", "--methods", "head")
    _, _, lines = compare(*command)
    assert len(lines) == 4
    whole, before = results.read_bytes(), os.stat(results).st_mtime_ns
    code, output, again = compare(*command)
    assert (code, again, os.stat(results).st_mtime_ns) == (0, lines, before)
    assert f"{accuracy_of(lines[-1]):.2f} %" in output

    results.write_bytes(whole[:-20])
    _, _, again = compare(*command)
    assert again[:3] == lines[:3]
    assert again[3]["run_info"]["train_config"] == lines[3]["run_info"]["train_config"]
    assert accuracy_of(again[3]) == accuracy_of(lines[3])

    _, _, more = compare(*command, "--seeds", "2")  # keeps the rate of the first seed
    assert more[:4] == again
    (recipe,) = [line["run_info"]["train_config"] for line in more[4:]]
    first = again[3]["run_info"]["train_config"]
    assert {key for key in recipe if recipe[key] != first[key]} == {"seed", "data_seed"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("each_run_begins_as_in_a_process_of_its_own")
def test_each_method_trains_and_saves_what_it_says(tasks, method):
    recipe = read_recipe([*SMALL, "optimizer=adamw", "head_init=zero"], CONFIGS / "finetune.yaml")
    ((run, _, images),) = planned(recipe, [str(tasks / "light")], ["test_resnet"], [method])
    assert images == 20
    info = trained_line(run, method)["train_info"]
    assert info["status"] == "success"
    network = timm.create_model("test_resnet", num_classes=2)
    norms = [p.numel() for layer in norm_layers(network).values() for p in layer.parameters()]
    head = sum(p.numel() for p in network.get_classifier().parameters())
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    low_rank = sum(4 * (m.in_channels * m.kernel_size[0] ** 2 + m.out_channels) for m in convs)
    trained = {"norm": sum(norms), "norm+head": sum(norms) + head, "head": head, "lora": low_rank + head}
    trained |= {"whole": sum(p.numel() for p in network.parameters()), "ln-tuning": sum(norms) + head}
    trained |= {"biases": sum(norms) // 2 + head}
    assert info["num_trainable_params"] == trained[method]
    statistics = 0 if method == "head" else sum(norms)  # two of a channel, as gamma and beta
    assert 0 <= info["file_size"] - 4 * (trained[method] + statistics) < 20_000


@pytest.mark.parametrize(("condition", "zero"), {"bn+head": True, "all": True, "bn": False}.items())
def test_a_head_that_trains_begins_at_zero(condition, zero):
    recipe = replace(Recipe(), condition=condition, head_init="zero")
    feed = Feed(recipe, Accelerator())
    network = build_network(recipe, configuration(recipe, feed.label_names), feed)
    logits = network(torch.randn(4, 3, 32, 32))
    assert bool((logits == 0).all()) == zero
    (torch.nn.functional.cross_entropy(logits, torch.arange(4)) if zero else logits.sum()).backward()
    assert any(p.grad.any() for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("light", "--methods", "norm+haed"), "norm+head"),
        (("light", "--backbones", "test_resnt"), "test_resnet"),
        (("model=test_resnet",), "name a folder"),
        (("light", "epoch=3"), "epochs"),
    ],
)
def test_what_is_unknown_is_refused_with_the_nearest_name_before_anything_is_trained(tasks, tmp_path, words, expected):
    code, output, lines = compare(tasks, tmp_path / "x.jsonl", *words)
    assert (code, lines) == (2, [])
    assert expected in output


def test_an_unknown_task_is_refused_with_the_nearest_folder(tasks, tmp_path):
    code, output, lines = compare(tasks, tmp_path / "x.jsonl", "light", str(tasks / "colours"))
    assert (code, lines) == (2, [])
    assert "the nearest name is 'colour'" in output


def test_a_file_of_other_lines_is_refused(tasks, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"top1": 5}\n')
    code, output, _ = compare(tasks, tmp_path / "x.jsonl", "light")
    assert code == 2
    assert "line 1, is no run" in output
