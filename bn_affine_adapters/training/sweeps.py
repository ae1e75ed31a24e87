"""What a sweep is: conditions x networks x replicates from one YAML file, their order, and how far each has come."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .recipe import CHECKPOINT, Recipe, config_files, find_config, read, read_recipe, recorded, run_key, words

# The sweep sets these keys itself.
OWN = {"model", "replicates", "output_dir", "overwrite", "resume", "checkpoint_every", "results"}


@dataclass
class Sweep:
    """Every key of a sweep's YAML file; the first four are always given."""

    config: str = ""  # the recipe that all runs start from
    conditions: dict[str, dict[str, Any]] = field(default_factory=dict)  # a name for people: changes
    networks: list[str] = field(default_factory=list)
    results: str = ""  # the .jsonl file
    set: dict[str, Any] = field(default_factory=dict)  # changes for all runs
    replicates: int = 1  # replicate r has seed = data_seed = r
    analyse: bool = False  # `bn-adapters analyse` after every run


@dataclass
class PlannedRun:
    """One run of a sweep: its place, the arguments of `bn-adapters train`, the recipe that they give, its folder."""

    condition: str
    network: str
    replicate: int
    arguments: list[str]
    recipe: Recipe
    key: str  # see `run_key`
    folder: Path

    def __str__(self) -> str:
        """Return its place, for people."""
        return f"{self.condition}, {self.network}, replicate {self.replicate}"


def read_sweep(name: str | Path) -> Sweep:
    """Return the sweep in a YAML file.

    Args:
        name: a file, or a packaged sweep such as "paper".

    Raises:
        ConfigError: the file is not a sweep.
        UnknownKeyError: there is no such key.
    """
    do = f"give a YAML file with config, conditions, networks and results, or one of {packaged('sweeps')}"
    sweep = read(Sweep, find_config(str(name), "sweeps"), what=f"The sweep {name}", do=do)
    needed = {key: getattr(sweep, key) for key in ("config", "conditions", "networks", "results", "replicates")}
    if lack := [key for key, value in needed.items() if not value]:
        raise ConfigError(f"The sweep {name} has no runs.", seen=f"no {', '.join(lack)}", do=do)
    return sweep


def packaged(folder: str) -> str:
    """Return the names of the packaged YAML files of a kind, "sweeps" or "tune"."""
    return ", ".join(Path(name).name for name in config_files() if name.startswith(f"{folder}/"))


def planned_runs(sweep: Sweep, arguments: list[str], output: Path, threads: int = 0) -> list[PlannedRun]:
    """Return all runs in their order: replicate by replicate, in it cheap networks first, then as the file says.

    Args:
        sweep: what to run.
        arguments: key=value, for every run.
        output: the folder in which each run has a folder.
        threads: of each run whose recipe sets none; 0 leaves it to training.

    Raises:
        NetworkError: a network cannot be created.
        ConfigError: a recipe is not usable, sets a key that the sweep sets itself, or two runs are the same.
    """
    from .network import check_buildable, forward_cost

    runs: dict[str, PlannedRun] = {}
    first = next(iter(sweep.conditions))
    costs = {name: forward_cost(planned_run(sweep, arguments, output, first, name).recipe) for name in sweep.networks}
    networks = sorted(sweep.networks, key=costs.__getitem__)
    for condition in sweep.conditions:  # every network was built for its cost
        check_buildable(planned_run(sweep, arguments, output, condition, networks[0]).recipe)
    for replicate in range(sweep.replicates):
        for network in networks:
            for condition in sweep.conditions:
                run = planned_run(sweep, arguments, output, condition, network, replicate, threads)
                if run.key in runs:
                    raise ConfigError(
                        "Two runs of the sweep are the same.",
                        seen=f"{runs[run.key]} and {run}: {run.key}",
                        do="remove one of them, and leave seed= and data_seed= to the replicates",
                    )
                runs[run.key] = run
    return list(runs.values())


def planned_run(
    sweep: Sweep,
    arguments: list[str],
    output: Path,
    condition: str,
    network: str,
    replicate: int = 0,
    threads: int = 0,
) -> PlannedRun:
    """Return one run: the recipe, then the changes for all, the replicate, the condition and the command line."""
    changes = {**sweep.set, "seed": replicate, "data_seed": replicate, **sweep.conditions[condition]}
    given = {*changes, *(argument.partition("=")[0] for argument in arguments)}
    if given & OWN:
        do = "name networks under networks:, and choose --output and results:"
        raise ConfigError("The sweep sets this itself.", seen=", ".join(sorted(given & OWN)), do=do)
    arguments = ["--config", sweep.config, *words(changes), *arguments, f"model={network}"]
    recipe = read_recipe(arguments, Path(sweep.config))
    key = run_key(json.loads(json.dumps(recorded(recipe))))
    if not recipe.threads and threads:
        arguments.append(f"threads={threads}")
        recipe.threads = threads
    name = "-".join(re.sub(r"[^\w.+]+", "-", part) for part in (network, condition))
    # Another recipe has another folder: training refuses the checkpoint of another recipe.
    folder = output / f"{name}-r{replicate}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    arguments += [f"output_dir={folder}", "checkpoint_every=1", "resume=true"]
    return PlannedRun(condition, network, replicate, arguments, recipe, key, folder)


def result_of(run: PlannedRun) -> dict[str, Any] | None:
    """Return the result line in a run's folder, or None where training has not ended."""
    try:
        result = json.loads((run.folder / "result.json").read_text(encoding="utf-8"))
        return result if run_key(dict(result["recipe"])) == run.key else None
    except (OSError, ValueError, LookupError, TypeError):  # not there, or not one that training wrote
        return None


def epochs_done(run: PlannedRun) -> int:
    """Return the number of whole epochs in a run's checkpoint; raise CheckpointError if it is none."""
    path = run.folder / CHECKPOINT
    if not path.exists():
        return 0
    from .checkpoint import read_checkpoint

    return len(read_checkpoint(path)["run"]["replicates"][0]["epochs"])
