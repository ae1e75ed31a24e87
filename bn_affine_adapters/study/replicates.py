"""Group result lines into replicates, the runs that differ only in their seeds, and summarise what was measured."""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ..training.lines import read_results
from ..training.recipe import Recipe, run_key

FULL = "the full recipe"
# What a recipe leaves to its defaults. With a seed, None as norm_init means "uniform".
USUAL: dict[str, Any] = {**asdict(Recipe()), "norm_init": "uniform"}
# The settings that make another variant of a condition.
SETTINGS = (
    "weight_decay", "norm_init", "weight_init", "running_statistics", "pretrained", "model_args", "train_split",
    "held_out", "accumulation", "precision", "lean",
)  # fmt: skip
# What a schedule is, besides its epochs and drops; named where it is not the full recipe's, or else the default.
SCHEDULE = ("lr", "lr_decay", "warmup_epochs", "batch_size", "sgd_momentum", "flip", "crop_padding", "image_size")
Pick = Callable[[Mapping[str, Any]], Any]  # a number of a result line, or None
Spread = tuple[float, float, int]  # mean, standard deviation, n


class Run(NamedTuple):
    """A result line and its cell: data set, network, variant and schedule. Runs of one cell are replicates."""

    line: dict[str, Any]
    dataset: str
    network: str
    variant: str
    schedule: str
    replicate: str


def read_runs(
    folder: Path, recipes: Mapping[str, Mapping[str, Any]], names: Mapping[str, str] | None = None
) -> list[Run]:
    """Return the runs of every .jsonl file in a folder, in an order that does not depend on the files'.

    Args:
        folder: of files that `bn-adapters train` wrote.
        recipes: by data set, the settings of the full recipe.
        names: other names of networks, with the name that stands for both.

    Raises:
        ConfigError: as `read_results` does.
    """
    lines = read_results(*sorted(folder.glob("*.jsonl")))
    return [run_of(line, recipes, names or {}) for line in sorted(lines, key=lambda line: run_key(line["recipe"]))]


def run_of(line: dict[str, Any], recipes: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]) -> Run:
    """Return a result line with its cell; see `read_runs`."""
    recipe = {**USUAL, **line["recipe"]}
    recipe["norm_init"] = recipe["norm_init"] or "uniform"
    dataset = Path(recipe["dataset"]).name
    differ = [f"{key}={shown(recipe[key])}" for key in SETTINGS if recipe[key] != USUAL[key]]
    differ += [f"test_split={recipe['test_split']}"] * (recipe["test_split"] not in ("test", "validation"))
    network = names.get(recipe["model"], recipe["model"])
    variant, replicate = ", ".join([recipe["condition"], *differ]), f"{recipe['seed']}/{recipe['data_seed']}"
    return Run(line, dataset, network, variant, schedule_name(recipe, recipes.get(dataset)), replicate)


def schedule_name(recipe: Mapping[str, Any], full: Mapping[str, Any] | None = None) -> str:
    """Return FULL if a recipe has every setting of ``full``, or else a description of its schedule.

    >>> schedule_name({**asdict(Recipe()), "epochs": 12, "milestones": [6, 9], "lr": 0.2})
    '12 epochs, drops at 6 and 9, lr=0.2'
    """
    if full and all(recipe[key] == value for key, value in full.items()):
        return FULL
    usual = {**USUAL, **(full or {})}
    drops = " and ".join(shown(drop) for drop in recipe["milestones"] if drop < recipe["epochs"])
    steps = recipe["schedule"] if recipe["schedule"] != "multistep" else f"drops at {drops}" if drops else "no drop"
    differ = [f"{key}={shown(recipe[key])}" for key in SCHEDULE if recipe[key] != usual[key]]
    return ", ".join([f"{recipe['epochs']} epochs", steps, *differ])


def shown(value: Any) -> str:
    """Return a setting for a person: numbers without trailing zeros, other values as a recipe's argument."""
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def by_schedule(runs: Sequence[Run], dataset: str) -> list[tuple[str, list[Run]]]:
    """Return a data set's runs by schedule: the paper's first, then the longest."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.dataset == dataset:
            groups.setdefault(run.schedule, []).append(run)

    def order(name: str) -> tuple[bool, int, str]:
        return name != FULL, -max(run.line["recipe"]["epochs"] for run in groups[name]), name

    return [(name, groups[name]) for name in sorted(groups, key=order)]


def analysed(*path: str) -> Pick:
    """Return a function from a line to an entry of its analysis, None where there is none."""

    def pick(line: Mapping[str, Any]) -> Any:
        value: Any = line.get("analysis")
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    return pick


def clamp_change(threshold: str) -> Pick:
    """Return a function from a line to the change of accuracy, in points, when |gamma| < threshold is set to zero."""
    pick, whole = analysed("clamped", threshold, "top1"), analysed("top1")

    def change(line: Mapping[str, Any]) -> float | None:
        # Training may have been in another precision than the analysis, which has an accuracy of its own.
        before = line["top1"] if whole(line) is None else whole(line)
        return None if pick(line) is None else pick(line) - before

    return change


MEASURES: dict[str, Pick] = {
    "accuracy": lambda line: line["top1"],
    "top5": lambda line: line.get("top5"),
    "loss": lambda line: line.get("loss"),
    "gamma mean": analysed("gamma", "mean"),
    "gamma std": analysed("gamma", "std"),
    "negative": analysed("gamma", "negative"),
    "near zero": analysed("gamma", "below", "0.01"),
    "clamped": clamp_change("0.01"),
    "dead": analysed("dead", "0.99"),
}


def picked(runs: Iterable[Run], network: str, variant: str, pick: Pick) -> list[tuple[str, Any]]:
    """Return (replicate, value) of one cell, without the runs that lack the value."""
    cell = [(run.replicate, pick(run.line)) for run in runs if (run.network, run.variant) == (network, variant)]
    return [(replicate, value) for replicate, value in cell if value is not None]


def measured(runs: Iterable[Run], network: str, variant: str, pick: Pick) -> dict[str, float]:
    """Return the measurement of every replicate of one cell; runs of the same seeds are averaged."""
    values: dict[str, list[float]] = {}
    for replicate, value in picked(runs, network, variant, pick):
        values.setdefault(replicate, []).append(float(value))
    return {replicate: statistics.mean(several) for replicate, several in values.items()}


def spread(values: Iterable[float]) -> Spread | None:
    """Return (mean, sample standard deviation, n), or None of nothing."""
    several = list(values)
    deviation = statistics.stdev(several) if len(several) > 1 else 0.0
    return (statistics.mean(several), deviation, len(several)) if several else None


def paired(runs: Sequence[Run], network: str, variants: Sequence[str], pick: Pick) -> dict[str, Spread]:
    """Return {variant: spread} over the replicates that all variants have; nothing where there is none."""
    values = {variant: measured(runs, network, variant, pick) for variant in variants}
    same = set.intersection(*(set(own) for own in values.values()))
    spreads = {variant: spread(own[replicate] for replicate in sorted(same)) for variant, own in values.items()}
    return {variant: value for variant, value in spreads.items() if value}


def spread_text(values: Spread, digits: int = 2) -> str:
    """Return mean ± standard deviation, or the only value."""
    mean, deviation, n = values
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if n > 1 and not math.isnan(deviation) else "")
