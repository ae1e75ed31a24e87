"""recipes/tune.py: hyper-parameters chosen on images held out of the training split."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import optuna
import pytest
from click.testing import CliRunner

from bn_affine_adapters.errors import BNAdapterError, ConfigError, UnknownKeyError
from bn_affine_adapters.study.claims import tuned
from bn_affine_adapters.training.lines import read_results

ROOT = Path(__file__).parents[2]
PLAN = """
config: {config}
set: {{held_out: 288, epochs: 1, image_size: 8, batch_size: 128, threads: 1}}
space: {{lr: {{low: 0.1, high: 1.0, log: true}}, norm_init: [uniform, ones]}}
trials: 2
results: {results}
"""


@pytest.fixture(scope="module")
def tune():
    return import_module("bn_affine_adapters.training.tune")


@pytest.fixture
def plan(tmp_path):
    file = tmp_path / "tiny.yaml"
    config = ROOT / "bn_affine_adapters" / "training" / "configs" / "digits.yaml"
    file.write_text(PLAN.format(config=config, results=tmp_path / "results.jsonl"))
    return file


def run(tune, plan, *arguments):
    output = ["--output", str(plan.parent / "study")]
    return CliRunner().invoke(tune.main, [str(plan), *output, *arguments], catch_exceptions=False)


def test_trials_are_trained_on_the_rest_and_a_second_call_goes_on(tune, plan):
    first = json.loads(run(tune, plan).stdout.splitlines()[-1])
    lines = [json.loads(text) for text in (plan.parent / "results.jsonl").read_text().splitlines()]
    assert [line["split"] for line in lines] == ["288 held out of train"] * 2
    assert first["top1"] == max(line["top1"] for line in lines)
    assert first["trials"] == 2
    assert [line["own"] for line in lines] == [True, False], "the first trial has the recipe's own settings"
    assert (lines[0]["recipe"]["lr"], lines[0]["recipe"]["norm_init"]) == (0.3, "uniform")
    assert tuned(read_results(plan.parent / "results.jsonl")).count(f"own settings {lines[0]['top1']:.2f} %") == 1
    best = next(line["recipe"] for line in lines if line["top1"] == first["top1"])
    assert {key: best[key] for key in first["best"]} == first["best"]
    assert 0.1 <= best["lr"] <= 1.0
    assert "held_out" not in first["command"]
    again = json.loads(run(tune, plan, "--trials", "3").stdout.splitlines()[-1])
    assert again["trials"] == 3
    lines = [json.loads(text) for text in (plan.parent / "results.jsonl").read_text().splitlines()]
    assert len({line["recipe"]["lr"] for line in lines}) == 3
    assert run(tune, plan, "--trials", "3").exit_code == 0
    assert len((plan.parent / "results.jsonl").read_text().splitlines()) == 3
    assert "other settings or another space" in str(run(tune, plan, "lr=0.2").exception)


def test_a_killed_trial_is_the_next_one(tune, plan):
    command = [sys.executable, str(ROOT / "recipes/tune.py"), str(plan), "--output", str(plan.parent / "study")]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    log = plan.parent / "study" / "trial-0" / "log.txt"
    while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert log.exists()
    read = tune.read_plan(plan)
    study = tune.open_study("tiny", plan.parent / "study", read, tune.recipe(read, {}, []))
    killed, waiting = study.trials
    assert killed.state == optuna.trial.TrialState.FAIL
    assert waiting.state == optuna.trial.TrialState.WAITING
    assert waiting.system_attrs["fixed_params"] == killed.params
    assert set(killed.params) == {"lr", "norm_init"}


def test_a_trial_that_fails_costs_only_itself(tune, plan):
    # What the recipe itself has is chosen first, and is no part of this space.
    plan.write_text(plan.read_text().replace("[uniform, ones]", "[zeros]").replace("trials: 2", "trials: 1"))
    result = run(tune, plan)
    assert result.exit_code == 1
    assert "No trial came to its end." in result.output
    assert "norm_init has no such value" in (plan.parent / "study" / "trial-0" / "log.txt").read_text()


def test_the_plans_in_configs_read(tune):
    found = sorted((ROOT / "bn_affine_adapters" / "training" / "configs" / "tune").glob("*.yaml"))
    plans = {path.stem: tune.read_plan(path) for path in found}
    assert set(plans) == {"digits", "cifar10"}
    for plan in plans.values():
        assert tune.recipe(plan, {}, []).held_out >= 288


@pytest.mark.parametrize(
    ("old", "new", "kind", "word"),
    [
        ("held_out: 288, ", "", ConfigError, "held_out=0"),
        ("trials: 2", "", ConfigError, "no tuning plan"),
        ("lr: {", "learning_rate: {", UnknownKeyError, "learning_rate"),
        ("epochs: 1", "epoch: 1", UnknownKeyError, "epochs"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(old, new, kind, word, tune, plan):
    text = plan.read_text()
    assert old in text
    plan.write_text(text.replace(old, new))
    with pytest.raises(BNAdapterError, match=word) as caught:
        tune.read_plan(plan)
    assert type(caught.value) is kind
