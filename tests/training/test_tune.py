"""recipes/tune.py: hyper-parameters chosen on images held out of the training split."""

import json
import sys

import optuna
import pytest
from click.testing import CliRunner

from bn_affine_adapters.errors import ConfigError, FileError, UnknownKeyError
from bn_affine_adapters.study.findings import tuned
from bn_affine_adapters.training import tune
from bn_affine_adapters.training.lines import read_results
from bn_affine_adapters.training.recipe import CONFIGS

TUNING = """
config: digits
set: {held_out: 288, epochs: 1, image_size: 8, batch_size: 128, threads: 1}
space: {lr: {low: 0.1, high: 1.0, log: true}, norm_init: [uniform, ones]}
trials: 2
"""


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(TUNING)
    return file


def run(file, *arguments):
    output = ["--output", str(file.parent / "study")]
    return CliRunner().invoke(tune.command, [str(file), *output, *arguments], catch_exceptions=False)


def test_trials_are_trained_on_the_rest_and_a_second_call_goes_on(file, refused):
    first = json.loads(run(file, "--trials", "1").stdout.splitlines()[-1])
    assert first["trials"] == 1
    both = json.loads(run(file).stdout.splitlines()[-1])
    lines = read_results(file.parent / "study" / "results.jsonl")
    assert [line["split"] for line in lines] == ["288 held out of train"] * 2
    assert [line["own"] for line in lines] == [True, False], "the first trial has the recipe's own settings"
    assert (lines[0]["recipe"]["lr"], lines[0]["recipe"]["norm_init"]) == (0.3, "uniform")
    assert 0.1 <= lines[1]["recipe"]["lr"] <= 1.0
    assert tuned(lines).count(f"own settings reach {lines[0]['top1']:.2f} %") == 1
    assert (both["trials"], both["top1"]) == (2, max(line["top1"] for line in lines))
    best = next(line["recipe"] for line in lines if line["top1"] == both["top1"])
    assert {key: best[key] for key in both["best"]} == both["best"]
    assert "held_out" not in both["command"]
    assert run(file).exit_code == 0
    assert len(read_results(file.parent / "study" / "results.jsonl")) == 2
    with refused(ConfigError, "other settings or another space"):
        run(file, "lr=0.2")


def test_a_trial_that_was_killed_is_the_next_one(file):
    def study():
        tuning = tune.read_tuning(file)
        return tune.open_study("tiny", file.parent / "study", tuning, tune.recipe(tuning, []))

    tune.suggest(study().ask(), tune.read_tuning(file).space)  # and it never says how it ended
    killed, waiting = study().trials
    assert killed.state == optuna.trial.TrialState.FAIL
    assert waiting.state == optuna.trial.TrialState.WAITING
    assert waiting.system_attrs["fixed_params"] == killed.params
    assert set(killed.params) == {"lr", "norm_init"}


def test_a_trial_that_fails_costs_only_itself(file, monkeypatch, refused):
    monkeypatch.setattr(tune, "TRAIN", [sys.executable, "-c", "import sys; sys.exit('no luck')"])
    with refused(ConfigError, "No trial came to its end.", "2 trials"):
        run(file)
    logs = sorted((file.parent / "study").glob("trial-*/log.txt"))
    assert [log.read_text() for log in logs] == ["no luck\n"] * 2


def test_a_study_that_is_no_database_or_has_no_room_is_an_own_error(file, small_disk, refused):
    (file.parent / "study").mkdir()
    (file.parent / "study" / "study.db").write_text("garbage, not a database" * 10)
    with refused(FileError, "study.db cannot be read or written", "file is not a database"):
        run(file)
    with refused(FileError, "study.db cannot be read or written", "full"):  # of 256 kB
        (small_disk / "filler").write_bytes(bytes(200_000))
        run(file, "--output", str(small_disk / "study"))


def test_the_packaged_tunings_read():
    names = sorted(path.stem for path in (CONFIGS / "tune").glob("*.yaml"))
    assert names == ["cifar10", "digits"]
    for name in names:
        assert tune.recipe(tune.read_tuning(name), []).held_out >= 288


@pytest.mark.parametrize(
    ("old", "new", "kind", "word"),
    [
        ("held_out: 288, ", "", ConfigError, "held_out=0"),
        ("trials: 2", "", ConfigError, "no trials"),
        ("lr: {", "learning_rate: {", UnknownKeyError, "learning_rate"),
        ("epochs: 1", "epoch: 1", UnknownKeyError, "epochs"),
        ("set: {", "set: [", ConfigError, "cannot be read"),
        ("trials: 2", "trials: 0", ConfigError, "trials is out of range"),
        ("low: 0.1", "low: -1", ConfigError, "The space of lr has no values"),
        ("low: 0.1", "low: 2", ConfigError, "The space of lr has no values"),
        ("high: 1.0", "hihg: 1.0", ConfigError, "The space of lr has no values"),
        ("high: 1.0, log: true", "high: .inf", ConfigError, "The space of lr has no values"),
        ("[uniform, ones]", "uniform", ConfigError, "The space of norm_init has no values"),
        ("[uniform, ones]", "[uniform, once]", ConfigError, "norm_init has no such value"),
        ("lr: {low: 0.1", "sgd_momentum: {low: 0.1", ConfigError, "sgd_momentum is out of range"),
        ("lr: {low: 0.1", "epochs: {low: 1", ConfigError, "epochs: Value"),
    ],
)
def test_a_tuning_that_makes_no_sense_is_refused(old, new, kind, word, file, refused):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with refused(kind, word):
        tune.read_tuning(file)


def test_a_tuning_that_is_not_there_is_refused_with_the_packaged_names(refused):
    with refused(ConfigError, "The tuning digit cannot be read", "cifar10, digits"):
        tune.read_tuning("digit")
