"""What a sweep is: conditions x networks x replicates from one YAML file, their order, and how far each has come."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from yaml import YAMLError

from ..errors import BNAdapterError, ConfigError, check_keys
from .network import forward_cost
from .recipe import Recipe, read_recipe, recorded, run_key

OWN = {"model", "replicates", "output_dir", "overwrite", "resume", "checkpoint_every", "results"}  # set by the sweep


@dataclass
class Sweep:
    """Every key of a sweep's YAML file."""

    config: str  # the recipe that all runs start from
    conditions: dict[str, dict[str, Any]]  # a name for people: changes
    networks: list[str]
    results: str  # the .jsonl file
    set: dict[str, Any] = field(default_factory=dict)  # changes for all runs
    replicates: int = 1  # replicate r has seed = data_seed = r
    analyse: bool = False  # recipes/analyse.py after every run


@dataclass
class Run:
    """One run: its place in the sweep, the arguments of recipes/train.py, what they mean, its folder."""

    condition: str
    network: str
    replicate: int
    words: list[str]
    recipe: Recipe
    key: str
    folder: Path

    def __str__(self) -> str:
        """Return its place, for people."""
        return f"{self.condition}, {self.network}, replicate {self.replicate}"


def read_sweep(path: Path) -> Sweep:
    """Return what a YAML file says.

    Raises:
        ConfigError: the file is not a sweep.
        UnknownKeyError: there is no such key.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            raise ValueError("a list, not keys with values")
        check_keys(dict(loaded), set(Sweep.__dataclass_fields__), "the sweep")
        merged = OmegaConf.merge(OmegaConf.structured(Sweep), loaded)
        sweep = Sweep(**OmegaConf.to_container(merged, throw_on_missing=True))  # type: ignore[arg-type]  # str keys
        if not (sweep.conditions and sweep.networks and sweep.replicates > 0):
            raise ValueError("no run: conditions, networks or replicates are empty")
    except (OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        if isinstance(error, BNAdapterError):
            raise
        raise ConfigError(
            f"{path} is not a sweep.",
            seen=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            do="give config, conditions, networks and results, as the files in recipes/configs/sweeps do",
        ) from error
    return sweep


def plan(sweep: Sweep, arguments: list[str], output: Path, threads: int = 0) -> list[Run]:
    """Return all runs in their order: replicate by replicate, in it cheap networks first, then as the file says.

    Raises:
        ConfigError: a recipe is not usable, sets what the sweep sets itself, or two runs are the same.
    """
    runs: dict[str, Run] = {}
    first = [one_run(sweep, arguments, output, next(iter(sweep.conditions)), name, 0, 0) for name in sweep.networks]
    costs = {run.network: forward_cost(run.recipe) for run in first}
    for replicate in range(sweep.replicates):
        for network in sorted(sweep.networks, key=costs.__getitem__):
            for condition in sweep.conditions:
                run = one_run(sweep, arguments, output, condition, network, replicate, threads)
                if run.key in runs:
                    raise ConfigError(
                        "Two runs of the sweep are the same.",
                        seen=f"{runs[run.key]} and {run}: {run.key}",
                        do="leave one out, and seed= and data_seed= to the replicates",
                    )
                runs[run.key] = run
    return list(runs.values())


def one_run(
    sweep: Sweep, arguments: list[str], output: Path, condition: str, network: str, replicate: int, threads: int
) -> Run:
    """Return a run: the recipe, then the changes for all, the replicate, the condition and the command line."""
    changes = {**sweep.set, "seed": replicate, "data_seed": replicate, **sweep.conditions[condition]}
    given = {*changes, *(word.partition("=")[0] for word in arguments)}
    if given & OWN:
        do = "name networks under networks:, and choose --output and results:"
        raise ConfigError("The sweep sets this itself.", seen=", ".join(sorted(given & OWN)), do=do)
    words = ["--config", sweep.config, *(f"{key}={shown(value)}" for key, value in changes.items()), *arguments]
    words.append(f"model={network}")
    recipe = read_recipe(words, Path(sweep.config))
    key = run_key(json.loads(json.dumps(recorded(recipe))))
    if not recipe.threads and threads:
        words.append(f"threads={threads}")
        recipe.threads = threads
    name = "-".join(re.sub(r"[^\w.+]+", "-", part) for part in (network, condition))
    # Another recipe is another folder: the checkpoint in the old one would be refused.
    folder = output / f"{name}-r{replicate}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    words += [f"output_dir={folder}", "checkpoint_every=1", "resume=true"]
    return Run(condition, network, replicate, words, recipe, key, folder)


def shown(value: Any) -> str:
    """Return a value as a key=value argument gives it."""
    return value if isinstance(value, str) else json.dumps(value)


def result_of(run: Run) -> dict[str, Any] | None:
    """Return what a run's folder tells of its end, or None where it has not come to it."""
    try:
        result = json.loads((run.folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or killed while it was written
        return None
    return result if run_key(result["recipe"]) == run.key else None


def epochs_done(run: Run) -> int:
    """Return the epochs of a run's checkpoint."""
    path = run.folder / "checkpoint.pt"
    if not path.exists():
        return 0
    return len(torch.load(path, weights_only=True, map_location="cpu", mmap=True)["run"]["replicates"][0]["epochs"])
