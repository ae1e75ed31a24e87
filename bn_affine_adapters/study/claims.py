"""A claim of the paper: the measured value, the range in which the claim is confirmed, and the verdict.

A claim is a mapping with the keys that paper.yaml explains; ``measure`` is one of `replicates.MEASURES` or "slopes".
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .networks import depth_width_slopes
from .replicates import FULL, MEASURES, Run, Spread, measured, shown, spread, spread_text

Networks = Mapping[str, Mapping[str, Any]]  # by name: "bn", gammas and betas; "lines", among "depth" and "width"


def slopes(runs: Sequence[Run], variant: str, networks: Networks) -> dict[str, Any] | None:
    """Return the depth and width lines through a variant's runs, or None if there are too few runs for both."""
    lines = on_lines(runs, variant, networks)
    try:
        return depth_width_slopes([(size, y, name) for name, points in lines.items() for size, y in points])
    except ConfigError:
        return None


def on_lines(runs: Sequence[Run], variant: str, networks: Networks) -> dict[str, list[tuple[int, float]]]:
    """Return (gammas and betas, accuracy in %) of every replicate of a variant, under "depth" and "width"."""
    points: dict[str, list[tuple[int, float]]] = {"depth": [], "width": []}
    for network, entry in networks.items():
        for accuracy in measured(runs, network, variant, MEASURES["accuracy"]).values():
            for name in entry["lines"]:
                points[name].append((entry["bn"], accuracy))
    return points


def value_of(claim: Mapping[str, Any], network: str, runs: Sequence[Run], networks: Networks) -> Spread | None:
    """Return the measured value of a claim, or None if it was not run; a difference is between the same seeds.

    For a ratio of slopes, n is the number of runs and the deviation is NaN.
    """
    if claim["measure"] == "slopes":
        if not (lines := slopes(runs, claim["of"], networks)) or lines["ratio"] is None:
            return None
        sizes = (
            measured(runs, name, claim["of"], MEASURES["accuracy"]) for name in networks if networks[name]["lines"]
        )
        return lines["ratio"], math.nan, sum(map(len, sizes))  # a network on both lines counts once
    pick = MEASURES[claim["measure"]]
    ours = measured(runs, network, claim["of"], pick)
    if "minus" in claim:
        others = measured(runs, network, claim["minus"], pick)
        ours = {replicate: value - others[replicate] for replicate, value in ours.items() if replicate in others}
    return spread(ours.values())


def findings(entry: Mapping[str, Any], runs: Sequence[Run], label: Callable[[str], str] = str) -> list[str]:
    """Return the answer to a question, a sentence for each data set, network and schedule.

    Args:
        entry: ``variants``, the first of which the others are compared with, run by run of the same seeds;
            ``measures``, a text for each of `replicates.MEASURES` to report besides the accuracy; ``networks``, or all.
        runs: of all data sets.
        label: a network's name in a text.
    """
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        if run.network in entry.get("networks", (run.network,)):
            groups.setdefault((run.dataset, run.network, run.schedule), []).append(run)
    answers = []
    for (dataset, network, schedule), group in sorted(groups.items()):
        parts = _compared(entry["variants"], group, network, "accuracy")
        if len(parts) < 2:
            continue
        sentences = [f"accuracy in %: {'; '.join(parts)}"]
        for measure, text in entry.get("measures", {}).items():
            if parts := _compared(entry["variants"], group, network, measure):
                sentences.append(f"{text}: {'; '.join(parts)}")
        answers.append(f"*{dataset}, {label(network)}, {schedule}*: {'. '.join(sentences)}.")
    return answers


def _compared(variants: Sequence[str], group: Sequence[Run], network: str, measure: str) -> list[str]:
    """Return each variant with its mean, deviation, n and difference to the first one."""
    values = {variant: measured(group, network, variant, MEASURES[measure]) for variant in variants}
    first, parts = values[variants[0]], []
    digits = 4 if measure == "loss" else 2
    for variant, own in values.items():
        if (total := spread(own.values())) and first:
            pairs = [value - first[replicate] for replicate, value in own.items() if replicate in first]
            apart = f", {sum(pairs) / len(pairs):+.{digits}f}" if variant != variants[0] and pairs else ""
            parts.append(f"{variant} {spread_text(total, digits)} (n = {total[2]}{apart})")
    return parts


def tuned(trials: Sequence[Mapping[str, Any]], label: Callable[[str], str] = str) -> str:
    """Return a sentence with the best trial and the trial of the recipe's own settings."""
    best = max(trials, key=lambda line: line["top1"])
    own = next((line for line in trials if line.get("own")), None)
    if own is None:
        return f"*{label(best['recipe']['model'])}*: the recipe's own settings have not been tried to the end."
    recipe = own["recipe"]
    differ = [f"{key}={shown(value)}" for key, value in best["recipe"].items() if value != recipe[key]]
    where = f"*{Path(recipe['dataset']).name}, {label(recipe['model'])}, {recipe['epochs']} epochs*"
    found = f"best of {len(trials)} trials {best['top1']:.2f} % with {', '.join(differ) or 'the same settings'}"
    return f"{where}, accuracy on {own['split']}: the recipe's own settings {own['top1']:.2f} %; {found}."


def bounds(claim: Mapping[str, Any], network: str, paper: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the range in which a claim is confirmed, or None if the paper has none."""
    value = claim["paper"] if "paper" in claim else paper["accuracy"][claim["of"]][network]
    if isinstance(value, list):
        low, high = value
        return (-math.inf if low is None else low, math.inf if high is None else high)
    return None if value is None else (value - claim["within"], value + claim["within"])


def paper_text(claim: Mapping[str, Any], network: str, paper: Mapping[str, Any]) -> str:
    """Return the paper's value or range with its source, and the tolerance."""
    if "paper" not in claim:
        stated = network in paper["stated"].get(claim["of"], ())
        about = "about " if network in paper["about"].get(claim["of"], ()) else ""
        value = paper["accuracy"][claim["of"]][network]
        return f"{about}{value:g} [{'P' if stated else 'F'}], ± {claim['within']:g}"
    if isinstance(claim["paper"], list):
        low, high = claim["paper"]
        text = f"at most {high:g}" if low is None else f"at least {low:g}" if high is None else f"{low:g} to {high:g}"
        return f"{text} [{claim['source']}]"
    return "none" if claim["paper"] is None else f"{claim['paper']:g} [{claim['source']}], ± {claim['within']:g}"


def verdict(claim: Mapping[str, Any], limits: tuple[float, float] | None, value: float, schedule: str) -> str:
    """Return the verdict on a claim; a short schedule is judged by its direction alone."""
    than: Any = claim.get("than")
    short = "" if schedule == FULL else ", short schedule"
    if limits is None:
        return f"{'equal' if value == than else 'lower' if value < than else 'higher'}{short}"
    low, high = limits
    if schedule == FULL:
        return "confirmed" if low <= value <= high else "not confirmed"
    if than is None:
        return "no verdict, short schedule"
    same = low <= value <= high if low < than < high else value > than if low >= than else value < than
    return f"{'same' if same else 'other'} direction{short}"
