"""The report: what the result lines say of the paper's claims, every figure, every gap, the same bytes each time."""

import json
import math
import re
from dataclasses import fields
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from bn_affine_adapters.study import report, report_tables
from bn_affine_adapters.study.claims import bounds, rounding_text, verdict
from bn_affine_adapters.study.findings import decay_factor, decay_text, findings, papers_decay
from bn_affine_adapters.study.networks import parameter_table
from bn_affine_adapters.study.paper import NETWORKS, PAPER, command_of
from bn_affine_adapters.study.replicates import (
    CELL,
    CIFAR,
    FULL,
    MEASURES,
    OTHER,
    SHORT,
    VARIED,
    measured,
    paired,
    read_runs,
    rounding,
    run_of,
    spread,
    spread_text,
)
from bn_affine_adapters.study.report_figures import FIGURES, draw
from bn_affine_adapters.study.report_tables import (
    claims_table,
    missing_table,
    open_claims_table,
    parameters_table,
    runs_table,
)
from bn_affine_adapters.training.recipe import ROUNDING_ONLY, WHERE_ONLY, Recipe, find_config, read_recipe, recorded
from bn_affine_adapters.training.schedule import lr_at
from bn_affine_adapters.training.sweeps import planned_run, read_sweep

ROOT = Path(__file__).parents[2]
FULL_RECIPE = {"dataset": "uoft-cs/cifar10", "milestones": [80.0, 120.0], "flip": True, "crop_padding": 4}
SHORT_RECIPE = {**FULL_RECIPE, "epochs": 12, "milestones": [6, 9]}
# Invented numbers, near the paper's only if a test needs a confirmed claim.
TOP1 = {"all": 90.0, "bn": 48.0, "no-affine": 89.0, "random2": 29.0, "head": 20.0}


def line(top1, condition="bn", network="cifar_resnet14", seed=0, analysis=None, recipe=FULL_RECIPE, **keys):
    """An invented result line."""
    own = {"epochs": 160, **recipe, "model": network, "condition": condition, "seed": seed, "data_seed": seed, **keys}
    gpu = {"device": "cuda", "name": "Invented GPU", "processes": 1, "threads": 1}
    scores = {"top1": top1, "top5": 90.0, "loss": 1.0, "seconds": 36.0 * own["epochs"], "hardware": gpu}
    own_line = {**scores, "commit": "0000000", "trained": 1120, "recipe": own}
    return own_line | ({"analysis": analysis} if analysis else {})


def analysis(near_zero, top1, dead):
    gamma = {"count": 4, "mean": 0.2, "std": 0.48, "negative": 25.0}
    gamma["below"] = {"0.001": near_zero / 2, "0.01": near_zero, "0.05": near_zero + 5, "0.1": near_zero + 9}
    gamma["histogram"] = {"edges": [-1.0, 0.0, 1.0, 2.0], "counts": [1, 2, 1]}
    return {
        "gamma": gamma,
        "beta": gamma,
        "clamped": {"0.01": {"set": 1, "top1": top1}, "0.05": {"set": 2, "top1": top1 - 1}},
        "dead": {"thresholds": [0.0, 0.5, 0.99, 1.0], "share": [90.0, 60.0, dead, 0.0], "0.99": dead, "channels": 9},
    }


def write(folder, lines, name="fake.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return folder


def everything(recipe=FULL_RECIPE):
    """Runs for every figure."""
    lines = [
        line(top1 + seed, condition, seed=seed, analysis=analysis(20.0, top1 + seed, 30.0), recipe=recipe)
        for condition, top1 in TOP1.items()
        for seed in (0, 2)
    ]
    for network, top1 in {"cifar_resnet32": 58.0, "cifar_wrn14_2": 53.0}.items():
        lines.append(line(top1, network=network, recipe=recipe))
    decay = {"weight_decay": 0.0, "analysis": analysis(2.0, 50.0, 30.0)}
    return [*lines, line(50.0, recipe=recipe, **decay), line(50.0, norm_init="ones_beta_one", recipe=recipe)]


def runs_of(folder):
    return read_runs(folder, PAPER["recipes"], PAPER["same"])


def claims(folder):
    """{(claim, network): (paper, ours, n, schedule, verdict)}."""
    rows = [re.split(r" *(?<!\\)\| *", row)[1:-1] for row in claims_table(runs_of(folder)).splitlines()[2:]]
    return {(claim, network): tuple(rest) for claim, networks, *rest in rows for network in networks.split(", ")}


@pytest.fixture(scope="module", autouse=True)
def each_network_is_counted_once():
    """A deep network takes its time."""
    counted = cache(lambda name: parameter_table([name]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_tables, "parameter_table", lambda names: [row for name in names for row in counted(name)])
        yield


def make(results, output, *arguments):
    paths = ["--page", str(output / "docs" / "page.md"), "--figures", str(output / "docs" / "figures")]
    return report.write(["--results", str(results), *paths, *arguments], ROOT)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page of invented runs of the full recipe, written twice into the same place."""
    folder = tmp_path_factory.mktemp("report")
    write(folder / "results", everything())
    seen = []
    for _ in range(2):
        assert make(folder / "results", folder) == 0
        seen.append({path.name: path.read_bytes() for path in sorted(folder.rglob("docs/**/*.*"))})
    return folder, seen


def test_the_same_runs_make_the_same_bytes(made):
    _, (first, second) = made
    assert len(first) == 9
    assert first == second


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn(made, name):
    folder, _ = made
    path = folder / "docs" / "figures" / f"{name}.svg"
    assert 5000 < path.stat().st_size < 100_000
    drawn = ElementTree.parse(path).getroot()
    words = {text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert FULL in words, "the schedule is named"
    assert len(words) > 10
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}path"))) > 10
    text = (folder / "docs" / "page.md").read_text()
    assert f"](figures/{name}.svg)" in text
    assert "no run with" not in text


def test_a_short_schedule_is_named_in_the_page_and_has_no_verdict_on_numbers(tmp_path):
    results = write(tmp_path / "results", everything(SHORT_RECIPE))
    rows = claims(results)
    name = "12 epochs, drops at 6 and 9"
    assert rows["BN only", "ResNet-14"] == ("47.6 [F], ± 1.5", "49.00 ± 1.41", "2", name, "no verdict, short schedule")
    claim = "BN only above two random weights a channel", "ResNet-14"
    assert rows[claim] == ("17 to 21 [P]", "19.00 ± 0.00", "2", name, "same direction, short schedule")
    assert "confirmed" not in claims_table(runs_of(results))
    assert draw("figure4", runs_of(results), tmp_path)[1] == f"{name} (short schedule)"


def test_a_short_schedule_can_have_the_other_direction(tmp_path):
    lines = [line(40.0, recipe=SHORT_RECIPE), line(41.0, "random2", recipe=SHORT_RECIPE)]
    found = claims(write(tmp_path, lines))["BN only above two random weights a channel", "ResNet-14"]
    assert found[1:] == ("-1.00", "1", "12 epochs, drops at 6 and 9", "other direction, short schedule")


def test_a_claim_of_the_full_recipe_is_confirmed_or_not(tmp_path):
    rows = claims(write(tmp_path, everything()))
    assert rows["BN only", "ResNet-14"] == ("47.6 [F], ± 1.5", "49.00 ± 1.41", "2", FULL, "confirmed")
    assert rows["gain of training gamma and beta", "ResNet-14"][-1] == "confirmed"
    assert rows["dead channels, everything trains", "ResNet-14"][-1] == "not confirmed"
    assert rows["the alternate initialisation above BN only", "ResNet-14"][1:3] == ("2.00", "1")  # one seed in common
    decay = rows[r"\|gamma\| < 0.01, BN only: weight decay 0 less weight decay 1e-4", "ResNet-14"]
    assert rows["head only below BN only", "ResNet-14"][-1] == "confirmed"
    assert decay == ("none", "-18.00", "1", FULL, "lower")
    ratio = rows["depth line over width line", "all"]
    assert ratio[2:] == ("4 runs", FULL, "not confirmed")  # two on both lines, one more on either
    assert float(ratio[1].split()[0]) == pytest.approx(((58 - 49) / math.log2(2464 / 1120)) / ((53 - 49) / 1), abs=0.01)
    assert ratio[1].endswith(" (standard error)")


def test_a_full_run_comes_before_a_short_one(tmp_path):
    found = claims(write(tmp_path, [line(10.0, recipe=SHORT_RECIPE), line(30.0)]))["BN only", "ResNet-14"]
    assert found[1:] == ("30.00", "1", FULL, "not confirmed")


@pytest.mark.parametrize(
    "changed",
    [{"epochs": 159}, {"milestones": [80]}, {"lr": 0.2}, {"batch_size": 64}, {"flip": False}, {"crop_padding": 0}],
)
def test_a_recipe_that_is_not_the_papers_is_not_full(tmp_path, changed):
    (run,) = runs_of(write(tmp_path, [line(30.0, **changed)]))
    assert run.schedule != FULL
    assert run.schedule.startswith(f"{changed.get('epochs', 160)} epochs, drops at 80")


# One other value of each key of a recipe that changes what is computed; a new key needs one here, or in recipe.py a
# place among those that change nothing.
OTHERS = {
    "dataset_config": "other", "train_split": "all", "test_split": "validation", "held_out": 500,
    "image_column": "img", "label_column": "coarse", "streaming": True, "image_size": 64,
    "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "flip": False, "crop_padding": 2, "crop_scale": [0.5, 1.0],
    "crop_ratio": [1.0, 1.0], "test_crop": 1.0, "batch_size": 64, "accumulation": 2, "model_args": {"drop_rate": 0.1},
    "pretrained": True, "pretrained_file": "other.safetensors", "running_statistics": "frozen", "optimizer": "adamw",
    "optimizer_args": {"nesterov": True}, "epochs": 150, "lr": 0.2, "schedule": "cosine", "milestones": [80, 121],
    "lr_decay": 0.2, "warmup_epochs": 5.0, "sgd_momentum": 0.8, "precision": "bf16", "lean": "rounded",
    "sync_norm": False, "interpolation": "bicubic", "crop_mode": "center", "layer_scale": "train",
    "on_bad_image": "skip", "head_init": "zero", "adapter": "other", "quantise_bits": 4,
}  # fmt: skip


def test_every_key_of_a_recipe_is_part_of_it_unless_it_is_said_to_change_nothing():
    rest = {f.name for f in fields(Recipe)} - WHERE_ONLY - ROUNDING_ONLY - {*CELL, *VARIED}
    assert rest - OTHERS.keys() == set()
    assert len(OTHERS) >= 38


@pytest.mark.parametrize("key", OTHERS)
def test_a_run_that_differs_in_what_it_computes_is_no_replicate_of_the_full_recipe(tmp_path, key):
    lines = [line(47.6), line(40.0, seed=1, **{key: OTHERS[key]})]
    plain, other = sorted(runs_of(write(tmp_path, lines)), key=lambda run: -run.line["top1"])
    assert (plain.kind, plain.variant) == (FULL, "bn")
    assert other.kind == (SHORT if key == "epochs" else OTHER)
    assert other.schedule != FULL
    assert key == "epochs" or key == "milestones" or key == "schedule" or key in f"{other.variant} {other.schedule}"
    assert claims(tmp_path)["BN only", "ResNet-14"] == ("47.6 [F], ± 1.5", "47.60", "1", FULL, "confirmed")


def test_a_key_that_this_version_does_not_know_is_part_of_the_recipe(tmp_path):
    (run,) = runs_of(write(tmp_path, [line(47.6, layer_colour="red")]))
    assert (run.kind, run.schedule) == (OTHER, "160 epochs, drops at 80 and 120, layer_colour=red")


@pytest.mark.parametrize(
    "changed",
    [
        {"threads": 1}, {"eval_every": 5}, {"compile": "reduce-overhead"}, {"channels_last": False},
        {"lean": "exact"}, {"milestones": [80, 120, 200]}, {"norm_init": "uniform"}, {"optimizer": "sgd"},
    ],
)  # fmt: skip
def test_what_computes_the_same_is_of_the_full_recipe(tmp_path, changed):
    (run,) = runs_of(write(tmp_path, [line(47.6, **changed)]))
    assert (run.kind, run.variant, run.schedule) == (FULL, "bn", FULL)
    assert claims(tmp_path)["BN only", "ResNet-14"][1:] == ("47.60", "1", FULL, "confirmed")


def test_another_recipe_is_not_called_a_short_schedule(tmp_path):
    verdicts = {}
    for name, changed in {"long": {"flip": False}, "short": {"epochs": 12, "milestones": [6, 9]}}.items():
        folder = write(tmp_path / name, [line(40.0, **changed), line(20.0, "random2", **changed)])
        rows = claims(folder)
        verdicts[name] = [rows[claim, "ResNet-14"][-1] for claim in ("BN only", CLAIM_RANDOM)]
        page = tmp_path / name / "page"
        assert make(folder, page) == 0
        text = (page / "docs" / "page.md").read_text()
        assert ("have another recipe" in text, "are shorter and" in text) == (name == "long", name == "short")
        assert ("(short schedule)" in text, "(another recipe)" in text) == (name == "short", name == "long")
    assert verdicts["long"] == ["no verdict, another recipe", "same direction, another recipe"]
    assert verdicts["short"] == ["no verdict, short schedule", "same direction, short schedule"]


CLAIM_RANDOM = "BN only above two random weights a channel"


def test_the_drops_of_a_cosine_schedule_are_named(tmp_path):
    lines = [line(40.0, schedule="cosine", milestones=drops) for drops in ([], [80])]
    names = {run.schedule for run in runs_of(write(tmp_path, lines))}
    assert names == {"160 epochs, cosine", "160 epochs, cosine, drops at 80"}


def test_every_command_on_the_page_makes_runs_of_the_full_recipe():
    needed = {}
    for entry in [*PAPER["claims"], *PAPER["to_run"]]:
        variants = entry.get("variants", [entry.get("of")])
        for network in entry["networks"]:
            needed.setdefault(command_of(entry, network or ""), set()).update(variants)
    assert len(needed) == 7  # four sweeps, three networks on ImageNet
    for command, variants in needed.items():
        made = [run_of({"top1": 0.0, "recipe": recipe}, PAPER["recipes"], PAPER["same"]) for recipe in trained(command)]
        assert {run.kind for run in made} == {FULL}, command
        assert variants - {"bn"} <= {run.variant for run in made}, command  # controls.yaml leaves bn to paper.yaml


def trained(command):
    """The recipes that a command trains, as result lines record them."""
    _, name, *words = command.split()
    if name == "train":
        return [recorded(read_recipe(words, Path("none")))]
    sweep = read_sweep(*words)
    runs = [planned_run(sweep, [], Path("out"), condition, sweep.networks[0]) for condition in sweep.conditions]
    return [recorded(run.recipe) for run in runs]


def test_the_settings_that_differ_make_another_cell(tmp_path):
    keys = [{}, {"weight_decay": 0.0}, {"norm_init": "ones"}, {"weight_init": "binary"}, {"norm_init": "uniform"},
            {"precision": "bf16"}, {"lean": "rounded"}]  # fmt: skip
    lines = [line(30.0 + i, seed=i, **changed) for i, changed in enumerate(keys)]
    found = {run.named for run in runs_of(write(tmp_path, lines))}
    assert found == {
        "bn", "bn, weight_decay=0", "bn, norm_init=ones", "bn, weight_init=binary",
        "bn, precision=bf16", "bn, lean=rounded",
    }  # fmt: skip


def test_mean_and_deviation_of_known_numbers():
    assert spread([1.0, 2.0, 3.0]) == (2.0, 1.0, 3)
    assert spread([]) is None
    assert spread_text((2.0, 1.0, 3)) == "2.00 ± 1.00"
    assert spread_text((2.0, 0.0, 1)) == "2.00"


def test_runs_of_one_seed_count_once_and_are_listed(tmp_path):
    again = {"milestones": [80, 120, 200]}  # the last one never comes: the same is computed
    lines = [line(40.0), line(42.0, **again), line(50.0, seed=1)]
    row = runs_table(runs_of(write(tmp_path, lines))).splitlines()[2]
    listed = "45.50 ± 6.36 (seeds 0/0: mean of 42.00 and 40.00)"
    assert f"| {listed} | 2 | 3 | 5760 ± 0 | Invented GPU, 1 x GPU | 0000000 |" in row
    assert claims(tmp_path)["BN only", "ResNet-14"][1:3] == (f"{listed}; rounding ± 1.00", "2")
    write(tmp_path, lines[:2])
    assert claims(tmp_path)["BN only", "ResNet-14"][1:3] == (
        "41.00 (seeds 0/0: mean of 42.00 and 40.00); rounding ± 1.41",
        "1",
    )


def test_a_lean_run_that_computes_the_same_stands_in_for_a_plain_one(tmp_path):
    lines = [line(40.0), line(99.0, lean="exact"), line(50.0, seed=1, lean="exact"), line(60.0, seed=2, lean="rounded")]
    runs = runs_of(write(tmp_path, lines))
    assert measured(runs, "cifar_resnet14", "bn", MEASURES["accuracy"]) == {"0/0": 40.0, "1/1": 50.0}
    assert measured(runs, "cifar_resnet14", "bn, lean=exact", MEASURES["accuracy"]) == {"0/0": 99.0, "1/1": 50.0}
    assert {run.named: run.kind for run in runs} == {"bn": FULL, "bn, lean=exact": FULL, "bn, lean=rounded": OTHER}
    entry = next(entry for entry in PAPER["findings"] if entry.get("exact"))
    ((heading, table, _),) = findings(entry, runs)
    assert heading == "cifar10, 160 epochs, drops at 80 and 120"  # rounding is not the full recipe
    cells = [row.split(" | ")[1:4:2] for row in table.splitlines()[2:]]
    assert cells[:2] == [["bn", "40.00"], ["bn, lean=exact", "74.50 ± 34.65 (+59.00, n = 1)"]]


def test_the_gain_is_between_runs_of_the_same_seeds(tmp_path):
    lines = [line(90.0, "all"), line(80.0, "all", seed=1), line(89.0, "no-affine"), line(70.0, "no-affine", seed=2)]
    runs, pick = runs_of(write(tmp_path, lines)), MEASURES["accuracy"]
    both = paired(runs, "cifar_resnet14", ("all", "no-affine"), pick)
    assert both == {"all": (90.0, 0.0, 1), "no-affine": (89.0, 0.0, 1)}
    assert paired(runs, "cifar_resnet14", ("all", "bn"), pick) == {}
    assert len(list(FIGURES["figure1"](runs))) == 1


def test_hours_are_told_where_they_were_measured_and_nowhere_else(tmp_path):
    slower = line(40.0, seed=1, image_size=64) | {"seconds": 1e6}  # another recipe
    table = missing_table(runs_of(write(tmp_path, [line(40.0), slower])))
    (bn, *_) = [row for row in table.splitlines() if row.startswith("| bn | ResNet-14")]
    assert "ResNet-14 (4), ResNet-32 (5)" in bn
    assert "| 6.4 for ResNet-14; the others not measured |" in bn  # 4 replicates of 160 epochs of 36 s
    assert all("not measured" in row for row in table.splitlines()[2:])


def test_without_results_everything_is_a_gap_with_a_command(tmp_path, capsys):
    (tmp_path / "results").mkdir()
    (tmp_path / "docs" / "figures").mkdir(parents=True)
    (tmp_path / "docs" / "figures" / "figure6.svg").write_bytes(b"of an earlier page")
    assert make(tmp_path / "results", tmp_path) == 0
    text = (tmp_path / "docs" / "page.md").read_text()
    for number in range(1, 9):
        assert f"\nFigure {number}: no run with " in text
    assert not list((tmp_path / "docs").rglob("*.svg"))
    assert claims(tmp_path / "results") == {}
    gaps = open_claims_table(runs_of(tmp_path / "results")).splitlines()[2:]
    assert len(gaps) == len(PAPER["claims"])
    assert all(re.search(r"`bn-adapters [^`]+` \|$", row) for row in gaps)
    assert "**No run on this page uses it.**" in text
    printed = capsys.readouterr().out
    assert "Figure 7: no run with an analysis of dead channels; run: `bn-adapters sweep paper`\n" in printed


def test_every_command_on_the_page_names_a_packaged_file(tmp_path):
    (tmp_path / "results").mkdir()
    make(tmp_path / "results", tmp_path)
    text = (tmp_path / "docs" / "page.md").read_text()
    sweeps = set(re.findall(r"`bn-adapters sweep ([^` ]+)`", text))
    assert sweeps == {"paper", "inits", "controls", "families", "lean", "cifar10_12_epochs", "cifar10_layer_scales"}
    assert all(read_sweep(name).networks for name in sweeps)
    launches = set(re.findall(r"`bn-adapters train ([^`]+)`", text))
    assert len(launches) == 3
    assert all(read_recipe(line.split(), Path("none")).dataset.endswith("imagenet-1k") for line in launches)
    assert find_config("cifar10", "tune").is_file()
    assert "`bn-adapters tune cifar10`" in text


def test_a_figure_asked_for_without_its_runs_is_an_error(tmp_path, capsys):
    write(tmp_path / "results", [line(40.0)])
    assert make(tmp_path / "results", tmp_path, "--only", "figure6") == 1
    gap = "Figure 6: no run with an analysis of clamped gammas; run: `bn-adapters sweep paper`"
    assert capsys.readouterr().out.startswith(gap)
    assert make(tmp_path / "results", tmp_path, "--only", "figure2") == 0
    assert [path.name for path in tmp_path.rglob("docs/**/*.*")] == ["figure2.svg"]
    assert make(tmp_path / "results", tmp_path, "--only", "runs") == 0
    assert "| cifar10 | ResNet-14 | bn |" in capsys.readouterr().out


def test_a_run_whose_dead_channels_could_not_be_counted_leaves_a_gap(tmp_path):
    without = analysis(20.0, 40.0, 30.0) | {"dead": None, "gamma": {"count": 0}}
    group = runs_of(write(tmp_path, [line(40.0, analysis=without)]))
    assert [name for name, panels in FIGURES.items() if list(panels(group))] == ["figure2", "figure6"]


def test_the_networks_have_the_papers_parameters():
    rows = parameters_table([]).splitlines()[2:]
    assert len(rows) == 17
    assert all(row.endswith("| equal |") for row in rows)
    assert rows[0] == "| ResNet-14 | 175,258 | 1,120 | 650 | 2,560 | equal |"


def test_a_network_with_other_parameters_would_be_noticed(monkeypatch):
    monkeypatch.setitem(NETWORKS["cifar_resnet14"], "bn", 1121)
    row = parameters_table([]).splitlines()[2]
    assert "| 1,120 (paper 1,121) |" in row
    assert row.endswith("| differs |")


def test_the_papers_data_fits_together():
    cifar = {name for name, entry in NETWORKS.items() if entry["lines"]}
    assert len(cifar) == 12
    assert all(set(row) == cifar for row in PAPER["accuracy"].values())
    assert set(PAPER["figures"]) == set(FIGURES)
    assert len(PAPER["claims"]) >= 25
    for claim in PAPER["claims"]:
        assert claim["measure"] in {*MEASURES, "slopes"}
        assert all(bounds(claim, name, PAPER) for name in claim["networks"]) or claim["paper"] is None


def test_the_page_in_the_tree_is_what_its_results_say(tmp_path):
    docs = tmp_path / "docs"
    assert make(ROOT / "recipes" / "results", tmp_path) == 0
    page = (ROOT / "docs" / "reproduction.md").read_text()
    assert (docs / "page.md").read_text() == page, "python recipes/report.py writes it again"
    drawn, kept = (sorted(path.name for path in at.glob("figure*")) for at in (docs / "figures", ROOT / "docs/figures"))
    assert drawn == kept
    assert re.search(r"from the (\d{2,}) runs", page)


# What the page says beside the claims.


def test_rounding_is_told_beside_one_or_two_seeds_where_it_was_measured(tmp_path):
    # Two repeats of one seed: differences of 2 and of 1 point, variances 2 and 0.5.
    lines = [
        line(40.0),
        line(42.0, lean="exact"),
        line(50.0, seed=1),
        line(51.0, seed=1, lean="exact"),
        line(60.0, "all"),
    ]
    runs = runs_of(write(tmp_path, lines))
    assert rounding(runs, MEASURES["accuracy"]) == (pytest.approx(math.sqrt(1.25)), 2)
    rows = claims(tmp_path)
    assert rows["BN only", "ResNet-14"][1] == f"45.00 ± 7.07; rounding ± {math.sqrt(1.25 / 2):.2f}"
    assert rows["everything trains", "ResNet-14"][1] == "60.00"
    three = runs_of(write(tmp_path, [*lines, line(45.0, seed=2)]))
    assert rounding_text(PAPER["claims"][0], (45.0, 1.0, 3), three) == ""
    assert rounding(runs_of(write(tmp_path, [line(40.0)])), MEASURES["accuracy"]) is None


def test_a_claim_about_clamping_shows_the_share_and_has_no_verdict_on_another_share(tmp_path):
    claim = r"\|gamma\| < 0.01 set to zero: change of accuracy, BN only", "ResNet-14"
    few = {**analysis(25.0, 48.0, 30.0), "top1": 48.0}  # 1 of 4 gammas
    found = claims(write(tmp_path / "near", [line(48.0, analysis=few)]))[claim]
    assert found == ("0 [P], ± 0.1; 24 to 38 % set to zero", "0.00; 25.00 % set to zero", "1", FULL, "confirmed")
    fewer = {**few, "gamma": {**few["gamma"], "count": 50}}
    found = claims(write(tmp_path / "far", [line(48.0, analysis=fewer)]))[claim]
    assert found[1:] == ("0.00; 2.00 % set to zero", "1", FULL, "no verdict, another share of gammas")


def test_a_direction_within_the_deviation_is_unclear():
    claim = {"paper": [17, 21], "than": 0}
    assert verdict(claim, (17, 21), (1.0, 0.9, 2), SHORT) == "same direction, short schedule"
    assert verdict(claim, (17, 21), (1.0, 1.1, 2), SHORT) == "direction unclear, short schedule"
    assert verdict(claim, (17, 21), (-1.0, 0.0, 1), OTHER) == "other direction, another recipe"
    assert verdict({"than": 1}, (1.08, 1.28), (0.8, math.nan, 4), SHORT) == "other direction, short schedule"
    assert verdict({"paper": None, "than": 0}, None, (-1.0, 1.1, 2), FULL) == "direction unclear"
    assert verdict(claim, (17, 21), (18.0, 30.0, 2), FULL) == "confirmed"  # the range decides


def test_weight_decay_alone_is_what_sgd_does_to_a_parameter_without_gradient():
    schedule = {"epochs": 3, "lr": 0.3, "milestones": [1.5], "warmup_epochs": 1}
    recipe = {**schedule, "weight_decay": 0.02, "sgd_momentum": 0.8}
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    sgd = torch.optim.SGD([parameter], lr=1.0, momentum=0.8, weight_decay=0.02)
    for step in range(3 * 4):
        sgd.param_groups[0]["lr"] = lr_at(Recipe(**recipe), step, 4)
        parameter.grad = torch.zeros_like(parameter)
        sgd.step()
    assert decay_factor(recipe, 4) == pytest.approx(parameter.item(), rel=1e-12)
    assert 0.5 < parameter.item() < 0.99


def test_the_page_tells_what_decay_does_over_the_schedule_it_shows():
    assert papers_decay().startswith("Over the paper's full recipe, a weight decay of 0.0001 ")
    assert " by 0.0368. " in papers_decay()
    assert " 27.2 %." in papers_decay()
    short = decay_text(CIFAR, {"epochs": 12, "milestones": [6, 9]})
    assert " by 0.781. " in short
    assert " 1.28 %." in short
    for unknown in ({"optimizer": "adamw"}, {"norm_init": "ones"}, {"held_out": 5000}, {"weight_decay": 0.0}):
        assert decay_text(CIFAR, unknown) == ""
    assert decay_text("someones-pictures", {}) == ""


def test_a_finding_on_weight_decay_tells_what_the_decay_of_its_runs_does(tmp_path):
    runs = runs_of(
        write(tmp_path, [line(40.0, recipe=SHORT_RECIPE), line(41.0, recipe=SHORT_RECIPE, weight_decay=0.0)])
    )
    entry = next(entry for entry in PAPER["findings"] if entry.get("decay"))
    ((heading, _, remark),) = findings(entry, runs)
    assert heading == "cifar10, 12 epochs, drops at 6 and 9"
    assert remark == decay_text(CIFAR, SHORT_RECIPE)
    stronger = {**entry, "variants": [*entry["variants"], "bn, weight_decay=0.001323"]}
    lines = [line(39.0, recipe=SHORT_RECIPE, weight_decay=0.001323)]
    ((_, table, remark),) = findings(stronger, [*runs, *runs_of(write(tmp_path / "more", lines))])
    assert len(table.splitlines()) == 5
    assert (remark.count("by 0.781. "), remark.count("by 0.0368. ")) == (1, 1)


def test_the_number_of_training_images_is_that_of_the_runs():
    checked = set()
    for run in runs_of(ROOT / "recipes" / "results"):
        if images := PAPER["training_images"].get(run.dataset):
            recipe, seen = run.line["recipe"], run.line["seconds"] * run.line["images_per_second"]
            batch = recipe["batch_size"]
            assert seen / recipe["epochs"] / batch == pytest.approx(-(-images // batch), rel=0.02)
            checked.add(run.dataset)
    assert checked == set(PAPER["training_images"])


def test_a_finding_is_a_table_with_the_parameters_that_train(tmp_path):
    head = {**line(28.0, "head"), "trained": 650}
    runs = runs_of(write(tmp_path, [line(40.0), line(42.0, seed=1), head, line(48.0, epochs=159)]))
    entry = next(entry for entry in PAPER["findings"] if "head" in entry["variants"])
    ((heading, table, remark),) = findings(entry, runs)
    assert (heading, remark) == (f"cifar10, {FULL}", "")
    assert table.splitlines()[2:] == [
        "| ResNet-14 | bn | 1,120 | 41.00 ± 1.41 | 2 |",
        "| ResNet-14 | head | 650 | 28.00 (-12.00) | 1 |",
    ]


def test_the_readme_says_whether_the_full_recipe_was_run():
    full = [run for run in runs_of(ROOT / "recipes" / "results") if run.kind == FULL]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert ("the full recipe has not been run here" in readme) == (not full)
    assert "reproduced" not in readme or full
