"""Choose hyper-parameters on images held out of the training split, with Optuna.

    python recipes/tune.py recipes/configs/tune/NAME.yaml [key=value ...] [--trials N] [--output runs/tune/NAME]

A trial is one run of recipes/train.py. Trials are kept in OUTPUT/study.db: the same command goes on where it stopped.
Prints the best trial as one JSON line, with the command that trains its settings on the whole training split.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import optuna
from omegaconf import OmegaConf
from optuna.trial import TrialState

from bn_affine_adapters import BNAdapterError
from bn_affine_adapters.config import check_keys
from bn_affine_adapters.errors import ConfigError
from bn_affine_adapters.recipe import Recipe, read_recipe
from bn_affine_adapters.results import read_results

HERE = Path(__file__).parent
KEYS = {"config", "set", "space", "trials", "results"}


def read_plan(file: Path) -> dict[str, Any]:
    """Read a tuning plan.

    Raises:
        ConfigError: it is no such plan, or its trials would look at the test split.
        UnknownKeyError: it has a key that no plan or no recipe has.
    """
    plan: Any = OmegaConf.to_container(OmegaConf.load(file))
    if not isinstance(plan, dict) or KEYS - plan.keys():
        seen = ", ".join(map(str, plan)) if isinstance(plan, dict) else type(plan).__name__
        raise ConfigError(f"{file} is no tuning plan.", seen=seen, do=f"give the keys {', '.join(sorted(KEYS))}")
    check_keys(plan, KEYS, str(file))
    check_keys(plan["space"], set(vars(Recipe())), "the space")
    if not recipe(plan, {}, []).held_out:
        do = "set: {held_out: 5000}"
        raise ConfigError("Hyper-parameters would be chosen on the test split.", seen="held_out=0", do=do)
    return plan


def words(settings: dict[str, Any]) -> list[str]:
    """Return settings as the key=value arguments of recipes/train.py."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]


def recipe(plan: dict[str, Any], chosen: dict[str, Any], more: list[str]) -> Recipe:
    """Return the recipe of a trial's settings."""
    return read_recipe(["--config", plan["config"], *words({**plan["set"], **chosen}), *more], Path(plan["config"]))


def suggest(trial: optuna.Trial, space: dict[str, Any]) -> dict[str, Any]:
    """Choose a value of every key: from a list, or between low and high, log-uniform if the space says so."""
    return {
        key: trial.suggest_categorical(key, values)
        if isinstance(values, list)
        else trial.suggest_float(key, values["low"], values["high"], log=values.get("log", False))
        for key, values in space.items()
    }


def run_trial(trial: optuna.Trial, plan: dict[str, Any], more: list[str], output: Path) -> float:
    """Train with the trial's settings; return the accuracy on the images held out, in %."""
    folder = output / f"trial-{trial.number}"
    settings = {**plan["set"], **suggest(trial, plan["space"])}
    where = [f"output_dir={folder}", "overwrite=true", f"results={plan['results']}"]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "w") as log:
        command = [sys.executable, str(HERE / "train.py"), "--config", plan["config"], *words(settings), *more, *where]
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise optuna.TrialPruned(f"exit status {done.returncode}, see {folder / 'log.txt'}")
    return json.loads((folder / "result.json").read_text())["top1"]


def open_study(name: str, output: Path, own: dict[str, Any]) -> optuna.Study:
    """Open the study, or make it with the recipe's own settings first; a trial that was killed comes next again."""
    output.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name=name, storage=f"sqlite:///{output / 'study.db'}", direction="maximize", load_if_exists=True
    )
    # With a fixed seed the sampler would draw the same first trials again after a restart.
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
    if not study.trials:
        study.enqueue_trial(own)
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params)
    return study


def summary(study: optuna.Study, plan: dict[str, Any]) -> dict[str, Any]:
    """Return the best trial, what mattered, and the command that trains its settings on all images."""
    done = study.get_trials(states=[TrialState.COMPLETE])
    settings = {key: value for key, value in {**plan["set"], **study.best_params}.items() if key != "held_out"}
    several = len(done) > 1 and len({trial.value for trial in done}) > 1
    importance = optuna.importance.get_param_importances(study) if several else {}
    return {
        "top1": study.best_value,
        "trials": len(done),
        "best": study.best_params,
        "importance": {key: round(value, 3) for key, value in importance.items()},
        "command": shlex.join(
            ["accelerate", "launch", "recipes/train.py", "--config", plan["config"], *words(settings)]
        ),
    }


@click.command(help=__doc__)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("settings", nargs=-1)
@click.option("--trials", type=click.IntRange(min=1), help="How many in all; by default the file's.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="By default runs/tune/NAME.")
def main(file: Path, settings: tuple[str, ...], trials: int | None, output: Path | None) -> None:
    """Tune."""
    try:
        plan, more = read_plan(file), list(settings)
        start = vars(recipe(plan, {}, more))
        own = {key: start[key] for key in plan["space"] if start[key] is not None}
        output = output or Path("runs", "tune", file.stem)
        study = open_study(file.stem, output, own)
        finished = study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED])
        left = (trials or plan["trials"]) - len(finished)
        Path(plan["results"]).parent.mkdir(parents=True, exist_ok=True)
        study.optimize(lambda trial: run_trial(trial, plan, more, output), n_trials=left) if left > 0 else None
        if not study.get_trials(states=[TrialState.COMPLETE]):
            do = f"read {output}/trial-*/log.txt"
            raise ConfigError("No trial came to its end.", seen=f"{len(study.trials)} trials", do=do)
        read_results(Path(plan["results"]))
    except BNAdapterError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    click.echo(json.dumps(summary(study, plan)))


if __name__ == "__main__":
    main()
