"""What the paper leaves open: tables of variants with the same schedule, weight decay by itself, chosen settings."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..training.data import steps_per_epoch
from ..training.recipe import Recipe, computed
from ..training.schedule import lr_at
from ..training.tables import markdown_table
from .paper import PAPER, label
from .replicates import (
    CIFAR,
    FULL,
    MEASURES,
    Run,
    by_replicate,
    measured,
    picked,
    repeats_text,
    shown,
    spread,
    spread_text,
)


def findings(entry: Mapping[str, Any], runs: Sequence[Run]) -> Iterator[tuple[str, str, str]]:
    """Yield the answers to a question: data set and schedule, a table of the variants, a remark or "".

    Args:
        entry: ``variants``, the first of which the others are compared with, run by run of the same seeds;
            ``measures``, a text for each of `replicates.MEASURES` to report besides the accuracy; ``networks``, or all;
            ``exact``: `lean=exact` is a variant of its own; ``decay``: tell what weight decay does by itself.
        runs: of all data sets.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        run = run._replace(variant=run.named) if entry.get("exact") else run
        if run.variant in entry["variants"] and run.network in entry.get("networks", (run.network,)):
            groups.setdefault((run.dataset, run.steps), []).append(run)
    measures = {"accuracy": "accuracy, %", **entry.get("measures", {})}
    for (dataset, steps), group in sorted(groups.items()):
        networks = sorted({run.network for run in group})
        if rows := [row for network in networks for row in _rows(entry["variants"], group, network, measures)]:
            table = markdown_table(["network", "trains", "parameters", *measures.values(), "n"], rows)
            decays = [decay_text(dataset, run.line["recipe"]) for run in group] if entry.get("decay") else []
            remark = " ".join(filter(None, dict.fromkeys(decays)))
            yield f"{dataset}, {FULL if all(run.kind == FULL for run in group) else steps}", table, remark


def _rows(variants: Sequence[str], group: Sequence[Run], network: str, measures: Mapping[str, str]) -> list[list[str]]:
    """Return a row for each variant that was run; none if the first one, or every other one, was not."""
    here = [v for v in variants if measured(group, network, v, MEASURES["accuracy"])]
    if len(here) < 2 or here[0] != variants[0]:
        return []
    rows = []
    for variant in here:
        counts = {f"{count:,}" for _, count in picked(group, network, variant, lambda line: line.get("trained"))}
        n = len(measured(group, network, variant, MEASURES["accuracy"]))
        cells = [_cell(group, network, variant, variants[0], measure, n) for measure in measures]
        rows.append([label(network), variant, " or ".join(sorted(counts)), *cells, str(n)])
    return rows


def _cell(group: Sequence[Run], network: str, variant: str, first: str, measure: str, n: int) -> str:
    """Return mean ± deviation and, in brackets, that of the difference from the first variant; "" if not measured."""
    pick, digits = MEASURES[measure], 4 if measure == "loss" else 2
    own, others = (measured(group, network, name, pick) for name in (variant, first))
    if not (total := spread(own.values())):
        return ""
    text = spread_text(total, digits) + (f", n = {total[2]}" if total[2] != n else "")
    pairs = spread(value - others[replicate] for replicate, value in own.items() if replicate in others)
    if variant != first and pairs:
        count = f", n = {pairs[2]}" if pairs[2] != total[2] else ""
        text += f" ({'+' if pairs[0] >= 0 else ''}{spread_text(pairs, digits)}{count})"
    return text + repeats_text(by_replicate(group, network, variant, pick), digits)


def decay_factor(recipe: Mapping[str, Any], steps: int) -> float:
    """Return what SGD's weight decay alone leaves of a parameter of 1 that gets no other gradient.

    Args:
        recipe: of a result line; keys that it lacks have their defaults.
        steps: of an epoch.
    """
    here = Recipe(**{f.name: recipe[f.name] for f in fields(Recipe) if f.name in recipe})
    value, velocity = 1.0, 0.0
    for step in range(here.epochs * steps):
        velocity = here.sgd_momentum * velocity + here.weight_decay * value
        value -= lr_at(here, step, steps) * velocity
    return value


def decay_text(dataset: str, recipe: Mapping[str, Any]) -> str:
    """Return a sentence about what weight decay does to gamma by itself over a recipe; "" where that is not known."""
    images, own = PAPER["training_images"].get(dataset), computed(recipe)
    others = own["optimizer"] != "sgd" or own["norm_init"] is not None or own["held_out"]
    if not images or not own["weight_decay"] or others:
        return ""
    factor = decay_factor(own, steps_per_epoch(images, own["batch_size"]))
    return (
        f"Over this schedule, a weight decay of {own['weight_decay']:g} multiplies a gamma that gets no gradient by "
        f"{factor:.3g}. Of gammas drawn from U(0, 1), 1 % start below 0.01; decay alone makes that "
        f"{min(100.0, 1 / factor):.3g} %."
    )


def papers_decay() -> str:
    """Return the same sentence about the full recipe on CIFAR-10."""
    return decay_text(CIFAR, PAPER["recipes"][CIFAR]).replace("this schedule", "the paper's full recipe")


def tuned(trials: Sequence[Mapping[str, Any]]) -> str:
    """Return what the best trial and the trial of the recipe's own settings reached."""
    best = max(trials, key=lambda line: line["top1"])
    own = next((line for line in trials if line.get("own")), None)
    if own is None:
        return f"{label(best['recipe']['model'])}: the recipe's own settings have not been tried to the end."
    recipe = own["recipe"]
    differ = [f"{key}={shown(value)}" for key, value in best["recipe"].items() if value != recipe[key]]
    where = f"{Path(recipe['dataset']).name}, {label(recipe['model'])}, {recipe['epochs']} epochs"
    images, chosen = own["split"].replace(" held", " images held"), ", ".join(differ) or "the same settings"
    return (
        f"*{where}*, tested on {images}: the recipe's own settings reach {own['top1']:.2f} %. "
        f"The best of {len(trials)} trials reaches {best['top1']:.2f} %, with {chosen}. "
        "It was chosen on these images, so its accuracy on other images is likely to be lower."
    )
