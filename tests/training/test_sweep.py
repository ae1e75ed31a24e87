"""recipes/sweep.py: every run once and whole, whatever is killed; the order, the costs, the packaged sweeps."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from click.testing import CliRunner
from test_lines import LINE

from bn_affine_adapters.errors import BNAdapterError, ConfigError, NetworkError, UnknownKeyError
from bn_affine_adapters.training import sweep as sweeping
from bn_affine_adapters.training.lines import TIMES, read_results
from bn_affine_adapters.training.recipe import CONFIGS, read_recipe, recorded, run_key
from bn_affine_adapters.training.sweeps import planned_runs, read_sweep

ROOT = Path(__file__).parents[2]
TINY = {"image_size": 8, "epochs": 2, "batch_size": 128, "threads": 1}
# Stands in for training: it writes a line of its log and the result. A slow one waits in the run of replicate 1.
STAND_IN = """
import json, os, sys, time
from pathlib import Path
output = Path(next(word for word in sys.argv if word.startswith("output_dir=")).partition("=")[2])
recipe = RECIPES[output.name]
print("trains", recipe["condition"], recipe["seed"], flush=True)
output.joinpath("new").write_text(f"{os.getpid()} {os.getppid()}")
output.joinpath("new").rename(output / "pid")
if recipe["condition"] == FAILS:
    sys.exit("no luck")
while SLOW and recipe["seed"] == 1 and not Path(output, "again").exists():
    time.sleep(0.05)
line = LINE | {"recipe": recipe, "adapter": str(output / "adapter"), "top1": 10.0 + recipe["seed"]}
Path(output, "result.json").write_text(json.dumps(line))
"""
ANALYSIS = """
import json, sys
words = dict(word.split("=", 1) for word in sys.argv[1:])
open(words.pop("output"), "w").write(json.dumps({"analysis": sorted(words)}))
"""


def comparable(lines):
    """What repeated runs have in common, in one order."""
    return sorted(json.dumps({k: v for k, v in line.items() if k not in TIMES}, sort_keys=True) for line in lines)


def write_sweep(folder, name="sweep", **changes):
    """Write a sweep of two conditions and two replicates into a folder; None leaves a key out."""
    sweep = {
        "config": "digits",
        "set": TINY,
        "conditions": {"bn": {}, "the head, only": {"condition": "head"}},
        "networks": ["cifar_resnet14"],
        "replicates": 2,
        "results": str(folder / f"{name}.jsonl"),
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({k: v for k, v in (sweep | changes).items() if v is not None}), encoding="utf-8")
    return path


@pytest.fixture
def write(tmp_path):
    return partial(write_sweep, tmp_path)


@pytest.fixture
def stand_ins(tmp_path):
    """Write stand-ins for the scripts that a sweep of a file starts; return how to start each."""
    folder = tmp_path / "stand-ins"
    folder.mkdir()
    folder.joinpath("analyse.py").write_text(ANALYSIS, encoding="utf-8")

    def prepare(path, fails="", slow=False):
        runs = planned_runs(read_sweep(path), [], path.with_suffix(""))
        recipes = {run.folder.name: recorded(run.recipe) for run in runs}
        values = f"FAILS, SLOW, LINE, RECIPES = {fails!r}, {slow}, {LINE!r}, {recipes!r}"
        folder.joinpath("train.py").write_text(values + STAND_IN, encoding="utf-8")
        return {name: [str(folder / f"{name}.py")] for name in ("train", "analyse")}

    return prepare


@pytest.fixture
def inside(stand_ins, monkeypatch):
    """Return a function that runs a sweep of stand-ins in this process, and returns what it printed."""
    before = signal.getsignal(signal.SIGTERM)

    def run(path, status=0, workers=2, **how):
        monkeypatch.setattr(sweeping, "SCRIPTS", stand_ins(path, **how))
        words = [str(path), "--output", str(path.with_suffix("")), "--workers", str(workers)]
        result = CliRunner().invoke(sweeping.command, words)
        printed = result.output + (str(result.exception) if result.exit_code else "")
        assert bool(result.exit_code) == bool(status), printed
        assert isinstance(result.exception, SystemExit | BNAdapterError | None), repr(result.exception)
        return printed

    yield run
    signal.signal(signal.SIGTERM, before)


def begin(path, *options, scripts=None):
    """Start a sweep as a process, with other scripts if some are given."""
    code = f"from bn_affine_adapters.training import sweep\nsweep.SCRIPTS.update({scripts or {}!r})\n"
    if scripts and "--ray" in options:  # or else Ray's workers would import the module with its own scripts
        code += "import ray.cloudpickle\nray.cloudpickle.register_pickle_by_value(sweep)\n"
    code += "sweep.main()"
    command = [sys.executable, "-c", code, str(path), "--output", str(path.with_suffix("")), *options]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def ended(process, status=0):
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == status, printed
    return printed


def wait_for(folder, pattern, process):
    deadline = time.monotonic() + 200
    while not (paths := sorted(folder.glob(pattern))) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert paths, process.communicate()[0]
    return paths[0]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The result lines of a sweep of real runs, a replicate each, that was never killed."""
    path = write_sweep(tmp_path_factory.mktemp("whole"), replicates=1)
    assert "2/2" in ended(begin(path, "--workers", "2"))
    lines = read_results(path.with_suffix(".jsonl"))
    assert sorted((line["recipe"]["condition"], line["recipe"]["seed"]) for line in lines) == [("bn", 0), ("head", 0)]
    assert all(line["recipe"]["data_seed"] == line["recipe"]["seed"] for line in lines)
    assert all(line["hardware"]["threads"] == 1 and not {"adapter", "network"} & set(line) for line in lines)
    assert len(set(comparable(lines))) == 2
    return lines


@pytest.mark.slow
def test_a_killed_sweep_of_real_runs_started_again_gives_the_results_of_one_never_killed(whole, write):
    path = write(replicates=1)
    process = begin(path)
    wait_for(path.with_suffix(""), "*head*r0*/checkpoint.pt", process)
    os.killpg(process.pid, signal.SIGKILL)
    printed = process.communicate()[0]
    before = path.with_suffix(".jsonl").read_text()
    assert len(before.splitlines()) == 1, printed
    assert "2 runs, 1 finished" in ended(begin(path, "--workers", "2"))
    assert path.with_suffix(".jsonl").read_text().startswith(before)
    lines = read_results(path.with_suffix(".jsonl"))
    assert comparable(lines) == comparable(whole)
    assert comparable([lines[0] | {"top1": 0}, *lines[1:]]) != comparable(whole)


@pytest.mark.slow
def test_two_ray_workers_give_the_results_of_one_process(whole, write):
    pytest.importorskip("ray")
    path = write(replicates=1)
    printed = ended(begin(path, "--ray", "--workers", "2"))
    assert comparable(read_results(path.with_suffix(".jsonl"))) == comparable(whole)
    assert len(set(re.findall(r"process (\d+) on", printed))) >= 2, printed


@pytest.mark.slow
def test_the_hours_of_a_dry_run_are_those_of_the_runs(whole, write, dry):
    row = dry(write())["runs"][0]
    line = next(line for line in whole if line["recipe"]["condition"] == row["condition"])
    # Within what a busy machine may do to it.
    assert 0.05 < row["hours"] * 3600 / line["seconds"] < 20


def test_a_ray_worker_that_is_killed_costs_its_run_alone_which_is_tried_again(write, stand_ins):
    pytest.importorskip("ray")
    path = write(conditions={"bn": {}})
    process = begin(path, "--ray", "--workers", "2", scripts=stand_ins(path, slow=True))
    pid = wait_for(path.with_suffix(""), "*r1*/pid", process)
    wait_for(path.with_suffix(""), "*r0*/result.json", process)
    run, worker = map(int, pid.read_text().split())
    pid.with_name("again").touch()
    pid.unlink()
    os.kill(worker, signal.SIGKILL)
    ended(process)
    log = pid.with_name("log.txt").read_text()
    assert log.count("trains bn 1") in (1, 2)
    assert not alive(run)
    assert sorted(line["top1"] for line in read_results(path.with_suffix(".jsonl"))) == [10.0, 11.0]


def test_a_finished_run_is_never_run_again_and_a_missing_line_is_written(write, inside):
    path, results = write(), write().with_suffix(".jsonl")  # two workers may end in any order
    inside(path, workers=1)
    logs = {log: log.read_bytes() for log in path.with_suffix("").glob("*/log.txt")}
    assert len(logs) == len(read_results(results)) == 4
    text = results.read_bytes()
    assert "4 runs, 4 finished" in inside(path, workers=1)
    results.write_bytes(b"".join(text.splitlines(keepends=True)[:2]))  # killed between a run and its line
    assert "4 runs, 2 finished" in inside(path, workers=1)
    assert results.read_bytes() == text
    assert {log: log.read_bytes() for log in logs} == logs
    next(iter(logs)).with_name("result.json").write_text("{")  # killed while it was written
    results.unlink()
    inside(path, workers=1)
    assert [log.read_bytes() == before for log, before in logs.items()] == [False, True, True, True]
    assert comparable(read_results(results)) == comparable(map(json.loads, text.splitlines()))


def test_a_sweep_that_now_analyses_analyses_what_was_trained_before(write, inside):
    path = write()
    inside(path)
    before = comparable(read_results(path.with_suffix(".jsonl")))
    result = next(path.with_suffix("").glob("*/result.json"))
    result.rename(kept := path.with_name("kept"))
    assert "4 runs, 1 finished, 1 of them without analysis: their folders are not here" in inside(write(analyse=True))
    kept.rename(result)
    assert "4 runs, 3 finished" in inside(path)
    assert "4 runs, 4 finished" in inside(path)
    lines = read_results(path.with_suffix(".jsonl"))
    assert all(line.pop("analysis") for line in lines)
    assert comparable(lines) == before
    log = next(path.with_suffix("").glob("*/log.txt")).read_text()
    assert log.count("trains") == 1


def test_a_torn_last_line_is_removed_with_a_message(write, inside):
    path = write(conditions={"bn": {}})
    results = path.with_suffix(".jsonl")
    inside(path, workers=1)
    text = results.read_bytes()
    for cut, message in ((-30, "it is torn, and was removed"), (-1, "it is whole, and its newline was added")):
        results.write_bytes(text[:cut])
        with pytest.raises(ConfigError, match="torn"):
            read_results(results)
        assert message in inside(path, workers=1)
        assert results.read_bytes() == text


def test_a_run_that_fails_costs_only_itself_and_shows_the_end_of_its_log(write, inside):
    path = write(analyse=True)
    printed = inside(path, 1, fails="head")
    assert printed.count("no luck") == 2
    assert re.search("2 of 4 runs failed:\n( *the head, only, cifar_resnet14, replicate [01]\n?){2}", printed)
    lines = read_results(path.with_suffix(".jsonl"))
    assert {line["recipe"]["seed"]: line["analysis"] for line in lines} == {0: ["adapter"], 1: ["adapter", "data_seed"]}
    assert "4 runs, 2 finished" in inside(path)
    assert len(read_results(path.with_suffix(".jsonl"))) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_is_stopped_stops_its_runs_and_goes_on_where_it_was(number, write, stand_ins, inside):
    path = write(conditions={"bn": {}})
    process = begin(path, "--workers", "2", scripts=stand_ins(path, slow=True))
    pid = int(wait_for(path.with_suffix(""), "*r1*/pid", process).read_text().split()[0])
    wait_for(path.with_suffix(""), "*r0*/result.json", process)
    if number == signal.SIGTERM:
        assert "Another sweep writes to" in inside(path, 1, slow=True)
    assert alive(pid)
    os.kill(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode == (128 + number if number == signal.SIGTERM else -number)
    deadline = time.monotonic() + 20
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)
    inside(path)
    assert sorted(line["top1"] for line in read_results(path.with_suffix(".jsonl"))) == [10.0, 11.0]
    logs = [log.read_text().splitlines() for log in sorted(path.with_suffix("").glob("*/log.txt"))]
    assert logs == [["trains bn 0"], ["trains bn 1"] * 2]


def test_the_order_is_replicate_by_replicate_and_in_it_cheap_networks_first(write):
    networks = ["cifar_wrn14_2", "inception_v3", "cifar_resnet32", "cifar_resnet14"]  # the second takes no such images
    sweep = read_sweep(write(networks=networks))
    cheap_first = ["cifar_resnet14", "cifar_resnet32", "cifar_wrn14_2", "inception_v3"]
    expected = [(r, n, c) for r in (0, 1) for n in cheap_first for c in ("bn", "the head, only")]
    runs = planned_runs(sweep, [], Path("out"))
    assert [(run.replicate, run.network, run.condition) for run in runs] == expected


def test_a_run_has_its_recipes_own_folder_and_arguments_that_mean_its_recipe(write):
    sweep = read_sweep(write(conditions={"a b": {"milestones": [1, 2], "weight_decay": 0}, "a-b": {"lr": 1}}))
    runs = planned_runs(sweep, ["epochs=3"], Path("out"), threads=7)
    assert len({run.folder for run in runs}) == len({run.key for run in runs}) == 4
    for run in runs:
        assert run.key == run_key(recorded(run.recipe)) == run_key(recorded(read_recipe(run.arguments, Path("none"))))
    assert (runs[0].recipe.epochs, runs[0].recipe.milestones, runs[0].recipe.weight_decay) == (3, [1.0, 2.0], 0.0)
    assert (runs[0].recipe.threads, runs[-1].recipe.data_seed) == (1, 1)
    assert {run.folder for run in planned_runs(sweep, ["epochs=4"], Path("out"))}.isdisjoint(run.folder for run in runs)
    sweep.set.pop("threads")
    assert {run.recipe.threads for run in planned_runs(sweep, [], Path("out"), threads=7)} == {7}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"condition": {}}, UnknownKeyError, ["'condition'", "conditions"]),
        ({"set": {"epoch": 3}}, UnknownKeyError, ["'epoch'", "epochs"]),
        ({"conditions": {"bn": {"conditoin": "bn"}}}, UnknownKeyError, ["condition"]),
        ({"conditions": {"bn": {}, "again": {"condition": "bn"}}}, ConfigError, ["same", "again", "bn"]),
        ({"set": {"output_dir": "x"}}, ConfigError, ["output_dir", "--output"]),
        ({"conditions": ["bn"]}, ConfigError, ["sweep.yaml cannot be read"]),
        ({"conditions": None}, ConfigError, ["has no runs", "no conditions"]),
        ({"results": None}, ConfigError, ["has no runs", "no results"]),
        ({"replicates": "many"}, ConfigError, ["sweep.yaml cannot be read", "many"]),
        ({"replicates": 0}, ConfigError, ["no replicates"]),
        ({"networks": ["cifar_resnet15"]}, NetworkError, ["cifar_resnet15"]),
        ({"config": "nowhere.yaml"}, ConfigError, ["nowhere.yaml"]),
    ],
)
def test_a_sweep_that_cannot_be_used_is_a_clear_error(write, changes, error, words):
    with pytest.raises(error) as caught:
        planned_runs(read_sweep(write(**changes)), [], Path("out"))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("text", "word"), [("- a", "a list"), ("a: [", "cannot be read"), ("", "no config"), ("config: x", "no conditions")]
)
def test_a_file_that_is_no_sweep_is_a_clear_error(tmp_path, refused, text, word):
    (tmp_path / "sweep.yaml").write_text(text)
    with refused(ConfigError, "sweep.yaml", word, "cifar10_layer_scales, controls, digits"):
        read_sweep(tmp_path / "sweep.yaml")


@pytest.fixture
def dry():
    """Return a function that makes a dry run in this process, and returns its answer."""
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()

    def run(path):
        arguments = [str(path), "--output", str(path.with_suffix("")), "--dry-run", "--json"]
        result = CliRunner().invoke(sweeping.command, arguments)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    yield run
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_dry_run_prints_order_state_and_cost_and_changes_nothing(write, dry, tmp_path):
    path = write()
    first = planned_runs(read_sweep(path), [], path.with_suffix(""))
    path.with_suffix(".jsonl").write_text(json.dumps(LINE | {"recipe": recorded(first[0].recipe)}) + "\n")
    first[1].folder.mkdir(parents=True)
    past = {"seconds": 1.0, "replicates": [{"epochs": [{}], "first_losses": []}]}
    state = {"recipe": "{}", "tensors": {}, "optimizer": {}, "scaler": {}, "run": past}
    torch.save(state, first[1].folder / "checkpoint.pt")
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    answer = dry(path)
    runs = answer["runs"]
    assert [row["order"] for row in runs] == [1, 2, 3, 4]
    assert [row["condition"] for row in runs] == ["bn", "the head, only"] * 2
    assert [row["state"] for row in runs] == ["finished", "resumes at epoch 1", "to run", "to run"]
    assert [row["trained"] for row in runs] == [1_120, 650] * 2
    assert [row["steps"] for row in runs] == [0, 12, 24, 24]
    assert runs[0]["hours"] == 0
    assert runs[3]["hours"] == pytest.approx(2 * runs[1]["hours"])
    assert answer["total"]["hours"] == pytest.approx(sum(row["hours"] for row in runs))
    if not torch.cuda.is_available():
        assert answer["total"]["unit"] == f"CPU-hours on {platform.machine()}, 1 thread"
    printed = sweeping.dry_run_text(answer).splitlines()
    assert len(printed) == 6
    assert re.search(r"^\d+\.\d{4} [CG]PU-hours on .*, training steps alone$", printed[-1])
    assert "resumes at epoch 1" in printed[2]
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


COUNTS = {
    "cifar10_12_epochs": 12,
    "cifar10_5_epochs": 3,
    "cifar10_layer_scales": 6,
    "controls": 60,
    "digits": 42,
    "digits_families": 20,
    "digits_layer_scales": 9,
    "families": 36,
    "inits": 60,
    "lean": 12,
    "paper": 480,
}


@pytest.mark.parametrize("name", COUNTS)
def test_every_run_of_a_packaged_sweep_has_a_recipe(name, monkeypatch):
    monkeypatch.setattr(
        "bn_affine_adapters.training.network.forward_cost", lambda recipe: 0
    )  # the deep networks take long to build
    sweep = read_sweep(name)
    runs = planned_runs(replace(sweep, replicates=1), [], Path("runs"))  # the others differ in their seeds alone
    assert len(runs) == len(sweep.conditions) * len(sweep.networks)
    assert len(runs) * sweep.replicates == COUNTS[name]
    assert {run.network for run in runs} == set(sweep.networks)
    assert all(map(timm.is_model, sweep.networks))
    assert {run.recipe.dataset for run in runs} == {"digits" if name.startswith("digits") else "uoft-cs/cifar10"}
    assert Path(sweep.results).parent == Path("recipes/results")


def test_every_packaged_sweep_was_read_and_begins_with_a_comment():
    paths = sorted((CONFIGS / "sweeps").glob("*.yaml"))
    assert [path.stem for path in paths] == sorted(COUNTS)
    assert all(path.read_text().startswith("# ") for path in paths)


def test_a_sweep_is_a_file_before_it_is_a_packaged_name(tmp_path, monkeypatch, write, refused):
    assert read_sweep("digits") == read_sweep(CONFIGS / "sweeps" / "digits.yaml") == read_sweep("digits.yaml")
    monkeypatch.chdir(tmp_path)
    write("digits")
    assert read_sweep("digits.yaml").replicates == 2
    with refused(ConfigError, "The sweep digit cannot be read", "cifar10_layer_scales, controls, digits"):
        read_sweep("digit")
