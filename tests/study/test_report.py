"""The report: what the result lines say of the paper's claims, every figure, every gap, the same bytes each time."""

import json
import math
import re
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

from bn_affine_adapters.study import report, report_tables
from bn_affine_adapters.study.claims import bounds
from bn_affine_adapters.study.networks import parameter_table
from bn_affine_adapters.study.paper import NETWORKS, PAPER
from bn_affine_adapters.study.replicates import FULL, MEASURES, paired, read_runs, spread, spread_text
from bn_affine_adapters.study.report_figures import FIGURES, draw
from bn_affine_adapters.study.report_tables import claims_table, missing_table, parameters_table, runs_table
from bn_affine_adapters.training.recipe import find_config, read_recipe
from bn_affine_adapters.training.sweeps import read_sweep

ROOT = Path(__file__).parents[2]
FULL_RECIPE = {"dataset": "uoft-cs/cifar10", "milestones": [80.0, 120.0], "flip": True, "crop_padding": 4}
SHORT = {**FULL_RECIPE, "epochs": 12, "milestones": [6, 9]}
# Invented numbers, near the paper's only if a test needs a confirmed claim.
TOP1 = {"all": 90.0, "bn": 48.0, "no-affine": 89.0, "random2": 29.0, "head": 20.0}


def line(top1, condition="bn", network="cifar_resnet14", seed=0, analysis=None, recipe=FULL_RECIPE, **keys):
    """An invented result line."""
    own = {"epochs": 160, **recipe, "model": network, "condition": condition, "seed": seed, "data_seed": seed, **keys}
    gpu = {"device": "cuda", "name": "Invented GPU", "processes": 1, "threads": 1}
    scores = {"top1": top1, "top5": 90.0, "loss": 1.0, "seconds": 36.0 * own["epochs"], "hardware": gpu}
    return {**scores, "commit": "0000000", "recipe": own} | ({"analysis": analysis} if analysis else {})


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
    path = folder / "docs" / "figures" / f"{name}.png"
    assert 1000 < path.stat().st_size < 60_000
    with Image.open(path) as picture:
        assert min(picture.size) > 300
        assert len(set(picture.convert("L").tobytes())) > 20
    text = (folder / "docs" / "page.md").read_text()
    assert f"](figures/{name}.png)" in text
    assert "no run with" not in text


def test_a_short_schedule_is_named_in_the_page_and_has_no_verdict_on_numbers(tmp_path):
    results = write(tmp_path / "results", everything(SHORT))
    rows = claims(results)
    name = "12 epochs, drops at 6 and 9"
    assert rows["BN only", "ResNet-14"] == ("47.6 [F], ± 1.5", "49.00 ± 1.41", "2", name, "no verdict, short schedule")
    claim = "BN only above two random weights a channel", "ResNet-14"
    assert rows[claim] == ("17 to 21 [P]", "19.00 ± 0.00", "2", name, "same direction, short schedule")
    assert "confirmed" not in claims_table(runs_of(results))
    assert draw("figure4", runs_of(results), tmp_path)[1] == name


def test_a_short_schedule_can_have_the_other_direction(tmp_path):
    lines = [line(40.0, recipe=SHORT), line(41.0, "random2", recipe=SHORT)]
    found = claims(write(tmp_path, lines))["BN only above two random weights a channel", "ResNet-14"]
    assert found[1:] == ("-1.00", "1", "12 epochs, drops at 6 and 9", "other direction, short schedule")


def test_a_claim_of_the_full_recipe_is_confirmed_or_not(tmp_path):
    rows = claims(write(tmp_path, everything()))
    assert rows["BN only", "ResNet-14"] == ("47.6 [F], ± 1.5", "49.00 ± 1.41", "2", FULL, "confirmed")
    assert rows["gain of training gamma and beta", "ResNet-14"][-1] == "confirmed"
    assert rows["dead channels, everything trains", "ResNet-14"][-1] == "not confirmed"
    assert rows["the alternate initialisation above BN only", "ResNet-14"][1:3] == ("2.00", "1")  # one seed in common
    decay = rows[r"\|gamma\| < 0.01, BN only: weight decay 0 less weight decay 1e-4", "ResNet-14"]
    assert decay == ("none", "-18.00", "1", FULL, "lower")
    ratio = rows["depth line over width line", "all"]
    assert ratio[2:] == ("4", FULL, "not confirmed")  # two on both lines, one more on either
    assert float(ratio[1]) == pytest.approx(((58 - 49) / math.log2(2464 / 1120)) / ((53 - 49) / 1), abs=0.01)


def test_a_full_run_comes_before_a_short_one(tmp_path):
    found = claims(write(tmp_path, [line(10.0, recipe=SHORT), line(30.0)]))["BN only", "ResNet-14"]
    assert found[1:] == ("30.00", "1", FULL, "not confirmed")


@pytest.mark.parametrize(
    "changed",
    [{"epochs": 159}, {"milestones": [80]}, {"lr": 0.2}, {"batch_size": 64}, {"flip": False}, {"crop_padding": 0}],
)
def test_a_recipe_that_is_not_the_papers_is_not_full(tmp_path, changed):
    (run,) = runs_of(write(tmp_path, [line(30.0, **changed)]))
    assert run.schedule != FULL
    assert run.schedule.startswith(f"{changed.get('epochs', 160)} epochs, drops at 80")


def test_the_settings_that_differ_make_another_cell(tmp_path):
    keys = [{}, {"weight_decay": 0.0}, {"norm_init": "ones"}, {"weight_init": "binary"}, {"norm_init": "uniform"},
            {"precision": "bf16"}, {"lean": "rounded"}]  # fmt: skip
    lines = [line(30.0 + i, seed=i, **changed) for i, changed in enumerate(keys)]
    found = {run.variant for run in runs_of(write(tmp_path, lines))}
    assert found == {
        "bn", "bn, weight_decay=0", "bn, norm_init=ones", "bn, weight_init=binary",
        "bn, precision=bf16", "bn, lean=rounded",
    }  # fmt: skip


def test_mean_and_deviation_of_known_numbers():
    assert spread([1.0, 2.0, 3.0]) == (2.0, 1.0, 3)
    assert spread([]) is None
    assert spread_text((2.0, 1.0, 3)) == "2.00 ± 1.00"
    assert spread_text((2.0, 0.0, 1)) == "2.00"


def test_runs_of_one_seed_are_averaged_and_counted_once(tmp_path):
    lines = [line(40.0), line(42.0, mean=[0.0, 0.0, 0.0]), line(50.0, seed=1)]
    row = runs_table(runs_of(write(tmp_path, lines))).splitlines()[2]
    assert "| 45.50 ± 6.36 | 2 | 3 | 5760 ± 0 | Invented GPU, 1 x GPU | 0000000 |" in row


def test_the_gain_is_between_runs_of_the_same_seeds(tmp_path):
    lines = [line(90.0, "all"), line(80.0, "all", seed=1), line(89.0, "no-affine"), line(70.0, "no-affine", seed=2)]
    runs, pick = runs_of(write(tmp_path, lines)), MEASURES["accuracy"]
    both = paired(runs, "cifar_resnet14", ("all", "no-affine"), pick)
    assert both == {"all": (90.0, 0.0, 1), "no-affine": (89.0, 0.0, 1)}
    assert paired(runs, "cifar_resnet14", ("all", "bn"), pick) == {}
    assert len(list(FIGURES["figure1"](runs))) == 1


def test_hours_are_told_where_they_were_measured_and_nowhere_else(tmp_path):
    table = missing_table(runs_of(write(tmp_path, [line(40.0)])))
    (bn, *_) = [row for row in table.splitlines() if row.startswith("| bn | ResNet-14")]
    assert "ResNet-14 (4), ResNet-32 (5)" in bn
    assert "| 6.4 for ResNet-14; the others not measured |" in bn  # 4 replicates of 160 epochs of 36 s
    assert all("not measured" in row for row in table.splitlines()[2:])


def test_without_results_everything_is_a_gap_with_a_command(tmp_path, capsys):
    (tmp_path / "results").mkdir()
    (tmp_path / "docs" / "figures").mkdir(parents=True)
    (tmp_path / "docs" / "figures" / "figure6.png").write_bytes(b"of an earlier page")
    assert make(tmp_path / "results", tmp_path) == 0
    text = (tmp_path / "docs" / "page.md").read_text()
    for number in range(1, 9):
        assert f"\nFigure {number}: no run with " in text
    assert not list((tmp_path / "docs").rglob("*.png"))
    assert {row[-1].split(":")[0] for row in claims(tmp_path / "results").values()} == {"not run"}
    assert "**No run on this page uses it.**" in text
    printed = capsys.readouterr().out
    assert "Figure 7: no run with an analysis of dead channels; run: `bn-adapters sweep paper`\n" in printed


def test_every_command_on_the_page_names_a_packaged_file(tmp_path):
    (tmp_path / "results").mkdir()
    make(tmp_path / "results", tmp_path)
    text = (tmp_path / "docs" / "page.md").read_text()
    sweeps = set(re.findall(r"`bn-adapters sweep ([^` ]+)`", text))
    assert sweeps == {"paper", "inits", "controls", "families", "lean", "cifar10_12_epochs"}
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
    assert [path.name for path in tmp_path.rglob("docs/**/*.*")] == ["figure2.png"]
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
