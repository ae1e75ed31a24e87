"""A claim of a paper: what was measured of it, between which values it is confirmed, and the verdict. Plain data.

A claim is a mapping: ``measure``, one of `replicates.MEASURES` or "slopes"; ``of``, a variant; ``minus``, another one;
``paper``, [low, high] of which an end may be None, or a value, which then holds ``within``, or None; without it the
paper's accuracy of the network; ``source``; ``than``, from where the claim has a direction. See recipes/paper.yaml.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .analysis import depth_width_slopes
from .errors import ConfigError
from .replicates import FULL, MEASURES, Run, Spread, measured, spread

Networks = Mapping[str, Mapping[str, Any]]  # by name: "bn", gammas and betas; "lines", among "depth" and "width"


def slopes(runs: Sequence[Run], variant: str, networks: Networks) -> dict[str, Any] | None:
    """Return the depth and width lines through a variant's runs, or None where there is not enough for both."""
    lines = on_lines(runs, variant, networks)
    try:
        return depth_width_slopes([(size, y, name) for name, points in lines.items() for size, y in points])
    except ConfigError:
        return None


def on_lines(runs: Sequence[Run], variant: str, networks: Networks) -> dict[str, list[tuple[int, float]]]:
    """Return (gammas and betas, accuracy in %) of every replicate of a variant, under "depth" and "width"."""
    found: dict[str, list[tuple[int, float]]] = {"depth": [], "width": []}
    for network, entry in networks.items():
        for accuracy in measured(runs, network, variant, MEASURES["accuracy"]).values():
            for name in entry["lines"]:
                found[name].append((entry["bn"], accuracy))
    return found


def value_of(claim: Mapping[str, Any], network: str, runs: Sequence[Run], networks: Networks) -> Spread | None:
    """Return what was measured of a claim, a difference between replicates of the same seeds; None if nothing was.

    Of a ratio of slopes n is the number of runs, and there is no deviation: it is not a number.
    """
    if claim["measure"] == "slopes":
        if not (lines := slopes(runs, claim["of"], networks)) or lines["ratio"] is None:
            return None
        return lines["ratio"], math.nan, lines["depth"]["n"] + lines["width"]["n"]
    pick = MEASURES[claim["measure"]]
    ours = measured(runs, network, claim["of"], pick)
    if "minus" in claim:
        others = measured(runs, network, claim["minus"], pick)
        ours = {replicate: value - others[replicate] for replicate, value in ours.items() if replicate in others}
    return spread(ours.values())


def bounds(claim: Mapping[str, Any], network: str, paper: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return between which values a claim is confirmed, or None where the paper has none."""
    value = claim["paper"] if "paper" in claim else paper["accuracy"][claim["of"]][network]
    if isinstance(value, list):
        low, high = value
        return (-math.inf if low is None else low, math.inf if high is None else high)
    return None if value is None else (value - claim["within"], value + claim["within"])


def paper_text(claim: Mapping[str, Any], network: str, paper: Mapping[str, Any]) -> str:
    """Return the paper's value with its source, and how far from it is still confirmed."""
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
    """Say what a measurement says of a claim; of a short schedule only the direction counts."""
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
