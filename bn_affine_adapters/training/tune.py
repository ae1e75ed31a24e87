"""Choose hyper-parameters on images held out of the training split, with Optuna.

    python recipes/tune.py recipes/configs/tune/NAME.yaml [key=value ...] [--trials N] [--output runs/tune/NAME]

A trial is one run of recipes/train.py. Trials are kept in OUTPUT/study.db: the same command goes on where it stopped.
Prints the best trial as one JSON line, with the command that trains its settings by the whole recipe.
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

from .. import BNAdapterError
from ..errors import ConfigError, check_keys
from .lines import read_results
from .recipe import Recipe, read_recipe, recorded

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
    start = recipe(plan, {}, [])
    if start.replicates != 1:
        raise ConfigError("A trial is one run.", seen=f"replicates={start.replicates}", do="leave it out")
    if not start.held_out:
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


def run_trial(trial: optuna.Trial, plan: dict[str, Any], more: list[str], output: Path, own: dict[str, Any]) -> float:
    """Train with the trial's settings, add its result line, return the accuracy on the images held out, in %."""
    folder, chosen = output / f"trial-{trial.number}", suggest(trial, plan["space"])
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [*words({**plan["set"], **chosen}), *more, f"output_dir={folder}", "overwrite=true"]
    with open(folder / "log.txt", "w") as log:
        command = [sys.executable, "-m", "bn_affine_adapters.training.train", "--config", plan["config"], *arguments]
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise optuna.TrialPruned(f"exit status {done.returncode}, see {folder / 'log.txt'}")
    result = json.loads((folder / "result.json").read_text())
    line = {key: value for key, value in result.items() if key not in ("adapter", "network")}
    with open(plan["results"], "a") as file:
        file.write(json.dumps({**line, "trial": trial.number, "own": chosen == own}) + "\n")
    return result["top1"]


def own_settings(plan: dict[str, Any], start: Recipe) -> dict[str, Any]:
    """Return the recipe's own value of every key of the space."""
    usual = {"norm_init": "uniform"}  # what None means with a seed
    values = {key: getattr(start, key) for key in plan["space"]}
    return {key: usual.get(key) if value is None else value for key, value in values.items()}


def inside(settings: dict[str, Any], space: dict[str, Any]) -> bool:
    """Tell whether settings lie in a space."""
    values = [(settings[key], allowed) for key, allowed in space.items()]
    return all(v in a if isinstance(a, list) else a["low"] <= v <= a["high"] for v, a in values)


def open_study(name: str, output: Path, plan: dict[str, Any], start: Recipe) -> optuna.Study:
    """Open the study, or make it with the recipe's own settings first; a trial that was killed comes next again.

    Raises:
        ConfigError: the study there is one of another plan.
    """
    output.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name=name, storage=f"sqlite:///{output / 'study.db'}", direction="maximize", load_if_exists=True
    )
    about, own = json.dumps([recorded(start), plan["space"]], sort_keys=True), own_settings(plan, start)
    if study.user_attrs.get("plan", about) != about:
        do = "--output for another folder, or the settings that it was begun with"
        raise ConfigError(f"The study in {output} has other settings or another space.", seen=about[:200], do=do)
    study.set_user_attr("plan", about)
    # With a fixed seed the sampler would draw the same first trials again after a restart.
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params)
    alive = study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED, TrialState.WAITING])
    if inside(own, plan["space"]) and own not in [
        trial.params or trial.system_attrs.get("fixed_params") for trial in alive
    ]:
        study.enqueue_trial(own)
    return study


def summary(study: optuna.Study, plan: dict[str, Any], more: list[str]) -> dict[str, Any]:
    """Return the best trial, what mattered, and the command that trains its settings by the whole recipe."""
    done = study.get_trials(states=[TrialState.COMPLETE])
    model = {key: value for key, value in plan["set"].items() if key == "model"}
    several = len(done) > 1 and len({trial.value for trial in done}) > 1
    importance = optuna.importance.get_param_importances(study) if several else {}
    arguments = [*words({**model, **study.best_params}), *more]
    return {
        "top1": study.best_value,
        "trials": len(done),
        "best": study.best_params,
        "importance": {key: round(value, 3) for key, value in importance.items()},
        "command": shlex.join(["accelerate", "launch", "recipes/train.py", "--config", plan["config"], *arguments]),
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
        start = recipe(plan, {}, more)
        output = output or Path("runs", "tune", file.stem)
        study = open_study(file.stem, output, plan, start)
        finished = study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED])
        left = (trials or plan["trials"]) - len(finished)
        Path(plan["results"]).parent.mkdir(parents=True, exist_ok=True)
        own = own_settings(plan, start)
        study.optimize(lambda trial: run_trial(trial, plan, more, output, own), n_trials=left) if left > 0 else None
        if not study.get_trials(states=[TrialState.COMPLETE]):
            do = f"read {output}/trial-*/log.txt"
            raise ConfigError("No trial came to its end.", seen=f"{len(study.trials)} trials", do=do)
        read_results(Path(plan["results"]))
    except BNAdapterError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    click.echo(json.dumps(summary(study, plan, more)))


if __name__ == "__main__":
    main()
