"""Choose hyper-parameters on images held out of the training split, with Optuna.

    bn-adapters tune NAME|FILE.yaml [key=value ...] [--trials N] [--output runs/tune/NAME]

NAME is a packaged tuning: `digits` or `cifar10`. A trial is one run of training. Trials are kept in OUTPUT/study.db:
the same command continues where it stopped. Result lines are in OUTPUT/results.jsonl. Prints the best trial as one JSON
line, with the command that trains its settings by the whole recipe.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError, FileError, causes, check_keys
from ..sharing.folder import try_writing, writing
from ..sharing.results import strict_json
from .lines import append
from .ranges import in_range
from .recipe import Recipe, find_config, read, read_recipe, recorded, words
from .scripts import run_script
from .sweeps import packaged

if TYPE_CHECKING:
    import optuna

DATABASE = "study.db"
TRAIN = [sys.executable, "-m", "bn_affine_adapters.training.train"]


@dataclass
class Tuning:
    """Every key of a tuning's YAML file; all but the changes are always given."""

    config: str = ""  # the recipe that the trials change
    set: dict[str, Any] = field(default_factory=dict)  # changes for all trials
    space: dict[str, Any] = field(default_factory=dict)  # of a key: a list of values, or low and high, and log
    trials: int = 0
    results: str | None = None  # a .jsonl file for the result lines, instead of OUTPUT/results.jsonl


def read_tuning(name: str | Path) -> Tuning:
    """Return the tuning in a YAML file.

    Args:
        name: a file, or a packaged tuning such as "cifar10".

    Raises:
        ConfigError: it cannot be read, lacks a key, has a value out of its range, or would use the test split.
        UnknownKeyError: it has a key that no tuning or no recipe has.
    """
    do = f"give a YAML file with config, space and trials, or one of {packaged('tune')}"
    tuning = read(Tuning, find_config(str(name), "tune"), what=f"The tuning {name}", do=do)
    if lack := [key for key in ("config", "space", "trials") if not getattr(tuning, key)]:
        raise ConfigError(f"The tuning {name} has no trials.", seen=f"no {', '.join(lack)}", do=do)
    check_keys(tuning.space, set(vars(Recipe())), "the space")
    for key in tuning.space:
        check_axis(tuning, key)
    start = recipe(tuning, [])
    if start.replicates != 1:
        raise ConfigError("A trial is one run.", seen=f"replicates={start.replicates}", do="leave it out")
    if not start.held_out:
        do = "set: {held_out: 5000}"
        raise ConfigError("Hyper-parameters would be chosen on the test split.", seen="held_out=0", do=do)
    return tuning


def check_axis(tuning: Tuning, key: str) -> None:
    """Raise ConfigError unless each value of a key of the space, or low and high, can be trained with."""
    axis = tuning.space[key]
    values = axis if isinstance(axis, list) else []
    if isinstance(axis, dict) and {"low", "high"} <= axis.keys() <= {"low", "high", "log"}:
        ends = [axis[end] for end in ("low", "high")]
        if all(in_range(end, "(-inf, inf)") for end in ends) and (ends[0] > 0 or not axis.get("log")):
            values = [float(end) for end in ends] if ends[0] <= ends[1] else []  # as a trial gets them
    if not values:
        do = f"space: {{{key}: [A, B]}}, or {{low: A, high: B, log: true}} with numbers, A above 0 if log"
        raise ConfigError(f"The space of {key} has no values.", seen=f"{key}: {axis!r}"[:200], do=do)
    for value in values:
        recipe(tuning, words({key: value}))


def recipe(tuning: Tuning, arguments: list[str]) -> Recipe:
    """Return the recipe that the trials change."""
    return read_recipe(["--config", tuning.config, *words(tuning.set), *arguments], Path(tuning.config))


def suggest(trial: "optuna.Trial", space: dict[str, Any]) -> dict[str, Any]:
    """Choose a value of every key: from a list, or between low and high, log-uniform if the space says so."""
    return {
        key: trial.suggest_categorical(key, values)
        if isinstance(values, list)
        else trial.suggest_float(key, values["low"], values["high"], log=values.get("log", False))
        for key, values in space.items()
    }


def run_trial(trial: "optuna.Trial", tuning: Tuning, arguments: list[str], output: Path, own: dict[str, Any]) -> float:
    """Train with the trial's settings, add its result line, return the accuracy on the images held out, in %."""
    import optuna

    folder, chosen = output / f"trial-{trial.number}", suggest(trial, tuning.space)
    command = [*TRAIN, "--config", tuning.config, *words({**tuning.set, **chosen}), *arguments]
    command += [f"output_dir={folder}", "overwrite=true"]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "w") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise optuna.TrialPruned(f"exit status {done.returncode}, see {folder / 'log.txt'}")
    result = json.loads((folder / "result.json").read_text())
    line = {key: value for key, value in result.items() if key not in ("adapter", "network")}
    append(Path(tuning.results or output / "results.jsonl"), {**line, "trial": trial.number, "own": chosen == own})
    return result["top1"]


def own_settings(tuning: Tuning, start: Recipe) -> dict[str, Any]:
    """Return the recipe's own value of every key of the space."""
    usual = {"norm_init": "uniform"}  # what None means with a seed
    values = {key: getattr(start, key) for key in tuning.space}
    return {key: usual.get(key) if value is None else value for key, value in values.items()}


def inside(settings: dict[str, Any], space: dict[str, Any]) -> bool:
    """Tell whether settings lie in a space."""
    values = [(settings[key], allowed) for key, allowed in space.items()]
    return all(v in a if isinstance(a, list) else a["low"] <= v <= a["high"] for v, a in values)


def open_study(name: str, output: Path, tuning: Tuning, start: Recipe) -> "optuna.Study":
    """Open the study, or create it with the recipe's own settings as its first trial; repeat a killed trial first.

    Raises:
        ConfigError: the study there has another recipe or another space.
    """
    import optuna
    from optuna.trial import TrialState

    try_writing(output / DATABASE, replaced=False)
    study = optuna.create_study(
        study_name=name, storage=f"sqlite:///{output / DATABASE}", direction="maximize", load_if_exists=True
    )
    about, own = json.dumps([recorded(start), tuning.space], sort_keys=True), own_settings(tuning, start)
    if study.user_attrs.get("plan", about) != about:
        do = "--output for another folder, or the settings of the first call"
        raise ConfigError(f"The study in {output} has other settings or another space.", seen=about[:200], do=do)
    study.set_user_attr("plan", about)
    # With a fixed seed the sampler would draw the same first trials again after a restart.
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params)
    alive = study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED, TrialState.WAITING])
    tried = [trial.params or trial.system_attrs.get("fixed_params") for trial in alive]
    if inside(own, tuning.space) and own not in tried:
        study.enqueue_trial(own)
    return study


def summary(study: "optuna.Study", tuning: Tuning, arguments: list[str]) -> dict[str, Any]:
    """Return the best trial, the importance of each key, and the command that trains its settings by the recipe."""
    import optuna
    from optuna.trial import TrialState

    done = study.get_trials(states=[TrialState.COMPLETE])
    model = {key: value for key, value in tuning.set.items() if key == "model"}
    several = len(done) > 1 and len({trial.value for trial in done}) > 1
    importance = optuna.importance.get_param_importances(study) if several else {}
    command = ["bn-adapters", "train", tuning.config]
    return {
        "top1": study.best_value,
        "trials": len(done),
        "best": study.best_params,
        "importance": {key: round(value, 3) for key, value in importance.items()},
        "command": shlex.join([*command, *words({**model, **study.best_params}), *arguments]),
    }


@click.command(help=__doc__)
@click.argument("file", metavar="NAME|FILE.yaml")
@click.argument("changes", nargs=-1)
@click.option("--trials", type=click.IntRange(min=1), help="How many in all; by default the file's.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="By default runs/tune/NAME.")
def command(file: str, changes: tuple[str, ...], trials: int | None, output: Path | None) -> None:
    """Run the trials that are left, and print the best."""

    tuning, arguments = read_tuning(file), list(changes)
    output = output or Path("runs", "tune", Path(file).stem)
    with naming_database(output / DATABASE):
        click.echo(strict_json(run_trials(tuning, arguments, Path(file).stem, output, trials or tuning.trials)))


def run_trials(tuning: Tuning, arguments: list[str], name: str, output: Path, trials: int) -> dict[str, Any]:
    """Run the trials that are left of so many, and return the summary."""
    from optuna.trial import TrialState

    from .network import check_buildable

    start = recipe(tuning, arguments)
    check_buildable(start)
    study, own = open_study(name, output, tuning, start), own_settings(tuning, start)
    ended = study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED])
    try_writing(Path(tuning.results or output / "results.jsonl"), replaced=False)
    if (left := trials - len(ended)) > 0:
        study.optimize(lambda trial: run_trial(trial, tuning, arguments, output, own), n_trials=left)
    if not study.get_trials(states=[TrialState.COMPLETE]):
        do = f"read {output}/trial-*/log.txt"
        raise ConfigError("No trial came to its end.", seen=f"{len(study.trials)} trials", do=do)
    return summary(study, tuning, arguments)


@contextmanager
def naming_database(path: Path) -> Iterator[None]:
    """Turn what SQLite says of a full disk, or of a file that is no database, into FileError."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        seen = str(causes(error)[-1]).splitlines()[0]
        do = "free some space if the disk is full; otherwise put back a copy of it, or choose another --output"
        raise FileError(f"{path} cannot be read or written.", seen=seen, do=do) from error


def main() -> None:
    """Run from the command line."""
    run_script(command, "tune")


if __name__ == "__main__":
    main()
