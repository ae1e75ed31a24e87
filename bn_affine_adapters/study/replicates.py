"""Group result lines into replicates, the runs that differ only in their seeds, and summarise what was measured."""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..training.lines import read_results
from ..training.recipe import computed, run_key

# How near a recipe comes to the paper's: all of it, all but the length, or neither.
FULL, SHORT, OTHER = "the full recipe", "short schedule", "another recipe"
CIFAR = "cifar10"
USUAL: dict[str, Any] = computed({})
# What a cell and its replicates are named by, and a schedule's first words. Every other key of a recipe is named where
# it is not the usual one, be it with the condition or with the schedule.
CELL, STEPS = ("dataset", "model", "condition", "seed", "data_seed"), ("epochs", "schedule", "milestones")
# The settings that are named with the condition, since runs that differ in them are compared with each other.
SETTINGS = (
    "weight_decay", "norm_init", "weight_init", "layer_scale", "running_statistics", "pretrained", "pretrained_file",
    "model_args", "precision", "lean",
)  # fmt: skip
VARIED = ("weight_decay", "norm_init", "weight_init")  # in claims about the full recipe, which name their values
Pick = Callable[[Mapping[str, Any]], Any]  # a number of a result line, or None
Spread = tuple[float, float, int]  # mean, standard deviation, n


class Run(NamedTuple):
    """A result line and its cell: data set, network, variant and schedule. Runs of one cell are replicates.

    Attributes:
        variant: the condition and the settings that change what is computed.
        named: the variant and, besides, ``lean=exact``, which computes the same in another way.
        steps: the schedule, and the other settings in which the recipe differs from the paper's or the default.
        kind: FULL, SHORT or OTHER.
    """

    line: dict[str, Any]
    dataset: str
    network: str
    variant: str
    named: str
    steps: str
    kind: str
    replicate: str

    @property
    def schedule(self) -> str:
        """The name of the schedule on the page."""
        return FULL if self.kind == FULL else self.steps


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
    recipe = computed(line["recipe"])
    recipe["milestones"] = [drop for drop in recipe["milestones"] if drop < recipe["epochs"]]  # others never come
    named = variant_name(recipe)
    if recipe["lean"] == "exact":
        recipe["lean"] = None
    full = recipes.get(recipe["dataset"])
    replicate = f"{recipe['seed']}/{recipe['data_seed']}"
    network, steps = names.get(recipe["model"], recipe["model"]), schedule_name(recipe, full)
    return Run(line, recipe["dataset"], network, variant_name(recipe), named, steps, kind_of(recipe, full), replicate)


def variant_name(recipe: Mapping[str, Any]) -> str:
    """Return the condition, and the settings that are named with it where they are not the default."""
    return ", ".join([recipe["condition"], *_differing(recipe, USUAL, SETTINGS)])


def schedule_name(recipe: Mapping[str, Any], full: Mapping[str, Any] | None = None) -> str:
    """Return a recipe's schedule, and every other setting that is not the full recipe's, or else the default.

    >>> schedule_name({**USUAL, "epochs": 12, "milestones": [6, 9], "lr": 0.2})
    '12 epochs, drops at 6 and 9, lr=0.2'
    """
    drops = " and ".join(map(shown, recipe["milestones"]))
    steps = [recipe["schedule"]] if recipe["schedule"] != "multistep" else [] if drops else ["no drop"]
    steps += [f"drops at {drops}"] if drops else []
    others = [key for key in recipe if key not in (*CELL, *STEPS, *SETTINGS)]
    differ = _differing(recipe, {**USUAL, **(full or {})}, others)
    return ", ".join([f"{recipe['epochs']} epochs", *steps, *differ])


def kind_of(recipe: Mapping[str, Any], full: Mapping[str, Any] | None) -> str:
    """Return FULL if a recipe is the full one in every key that changes what is computed, SHORT if it is but shorter.

    What a claim names itself may differ: network, condition, seeds, and the settings of VARIED.
    """
    usual = {**USUAL, **(full or {})}
    differ = {key for key in recipe.keys() - {*CELL, *VARIED} if recipe[key] != usual.get(key)}
    if full and not differ:
        return FULL
    short = full and differ <= {"epochs", "milestones"} and recipe["epochs"] < full["epochs"]
    return SHORT if short else OTHER


def _differing(recipe: Mapping[str, Any], usual: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Return ``key=value`` of the settings that are not the usual ones."""
    return [f"{key}={shown(recipe[key])}" for key in keys if recipe[key] != usual.get(key)]


def shown(value: Any) -> str:
    """Return a setting for a person: numbers without trailing zeros, other values as a recipe's argument."""
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def by_schedule(runs: Sequence[Run], dataset: str) -> list[tuple[str, list[Run]]]:
    """Return a data set's runs by schedule: the paper's first, then short ones, then others, each the longest first."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if run.dataset == dataset:
            groups.setdefault((run.kind, run.schedule), []).append(run)

    def order(group: tuple[str, str]) -> tuple[int, int, str]:
        return (FULL, SHORT, OTHER).index(group[0]), -groups[group][0].line["recipe"]["epochs"], group[1]

    return [(group[1], groups[group]) for group in sorted(groups, key=order)]


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


def clamped_share(line: Mapping[str, Any]) -> float | None:
    """Return the share of gammas, in %, that an analysis set to zero: those with |gamma| < 0.01."""
    count, gammas = analysed("clamped", "0.01", "set")(line), analysed("gamma", "count")(line)
    return None if count is None or not gammas else 100 * count / gammas


MEASURES: dict[str, Pick] = {
    "accuracy": lambda line: line["top1"],
    "top5": lambda line: line.get("top5"),
    "loss": lambda line: line.get("loss"),
    "gamma mean": analysed("gamma", "mean"),
    "gamma std": analysed("gamma", "std"),
    "negative": analysed("gamma", "negative"),
    "near zero": analysed("gamma", "below", "0.01"),
    "clamped": clamp_change("0.01"),
    "clamped share": clamped_share,
    "dead": analysed("dead", "0.99"),
}


def picked(runs: Iterable[Run], network: str, variant: str, pick: Pick) -> list[tuple[str, Any]]:
    """Return (replicate, value) of one cell, without the runs that lack the value.

    A run that computed the same in another way counts only where no plain run has its seeds.
    """
    cell = [(run, pick(run.line)) for run in runs if run.network == network and variant in (run.variant, run.named)]
    found = [(run, value) for run, value in cell if value is not None]
    plain = {run.replicate for run, _ in found if run.named == variant}
    return [(run.replicate, value) for run, value in found if run.named == variant or run.replicate not in plain]


def by_replicate(runs: Iterable[Run], network: str, variant: str, pick: Pick) -> dict[str, list[float]]:
    """Return the measurements of every replicate of one cell: several where the same seeds ran more than once."""
    values: dict[str, list[float]] = {}
    for replicate, value in picked(runs, network, variant, pick):
        values.setdefault(replicate, []).append(float(value))
    return values


def measured(runs: Iterable[Run], network: str, variant: str, pick: Pick) -> dict[str, float]:
    """Return the measurement of every replicate of one cell; runs of the same seeds are averaged."""
    values = by_replicate(runs, network, variant, pick)
    return {replicate: statistics.mean(several) for replicate, several in values.items()}


def rounding(runs: Iterable[Run], pick: Pick) -> tuple[float, int] | None:
    """Return how far runs of one cell and the same seeds scatter, which differ by rounding alone.

    Returns:
        The standard deviation, pooled over all cells with several such runs, and the degrees of freedom.
    """
    cells: dict[tuple[str, ...], list[float]] = {}
    for run in runs:
        if (value := pick(run.line)) is not None:
            cells.setdefault((run.dataset, run.network, run.variant, run.steps, run.replicate), []).append(value)
    several = [values for values in cells.values() if len(values) > 1]
    if not (freedom := sum(len(values) - 1 for values in several)):
        return None
    squares = sum((len(values) - 1) * statistics.variance(values) for values in several)
    return math.sqrt(squares / freedom), freedom


def repeats_text(values: Mapping[str, Sequence[float]], digits: int = 2) -> str:
    """Return the values of the seeds that ran more than once, in brackets; "" where none did.

    >>> repeats_text({"0/0": [34.94, 37.07], "1/1": [40.0]})
    ' (seeds 0/0: mean of 34.94 and 37.07)'
    """
    listed = {seeds: " and ".join(f"{v:.{digits}f}" for v in own) for seeds, own in values.items() if len(own) > 1}
    return f" ({'; '.join(f'seeds {seeds}: mean of {own}' for seeds, own in listed.items())})" if listed else ""


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
