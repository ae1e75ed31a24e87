"""A claim of the paper: the measured value, the range in which the claim is confirmed, and the verdict.

A claim is a mapping with the keys that paper.yaml explains; ``measure`` is one of `replicates.MEASURES` or "slopes".
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from .networks import depth_width_slopes
from .replicates import (
    CIFAR,
    FULL,
    MEASURES,
    Run,
    Spread,
    by_replicate,
    measured,
    repeats_text,
    rounding,
    spread,
    spread_text,
)

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

    For a ratio of slopes, n is the number of runs, and the deviation is the standard error, NaN where there is none.
    """
    if claim["measure"] == "slopes":
        if not (lines := slopes(runs, claim["of"], networks)) or lines["ratio"] is None:
            return None
        sizes = (
            measured(runs, name, claim["of"], MEASURES["accuracy"]) for name in networks if networks[name]["lines"]
        )
        error = math.nan if lines["error"] is None else lines["error"]
        return lines["ratio"], error, sum(map(len, sizes))  # a network on both lines counts once
    pick = MEASURES[claim["measure"]]
    ours = measured(runs, network, claim["of"], pick)
    if "minus" in claim:
        others = measured(runs, network, claim["minus"], pick)
        ours = {replicate: value - others[replicate] for replicate, value in ours.items() if replicate in others}
    return spread(ours.values())


def share_of(claim: Mapping[str, Any], network: str, runs: Sequence[Run]) -> Spread | None:
    """Return the share of gammas, in %, that a claim about clamping has set to zero; None for other claims."""
    if claim["measure"] != "clamped":
        return None
    return spread(measured(runs, network, claim["of"], MEASURES["clamped share"]).values())


def ours_text(claim: Mapping[str, Any], network: str, runs: Sequence[Run], ours: Spread) -> str:
    """Return the measured value with its deviation, the share of gammas that it is about, and repeated runs."""
    if claim["measure"] == "slopes":
        return f"{spread_text(ours)} (standard error)" if "±" in spread_text(ours) else spread_text(ours)
    share = share_of(claim, network, runs)
    set_to_zero = f"; {spread_text(share)} % set to zero" if share else ""
    variants = [claim[key] for key in ("of", "minus") if key in claim]
    again = [by_replicate(runs, network, variant, MEASURES[claim["measure"]]) for variant in variants]
    return spread_text(ours) + set_to_zero + "".join(map(repeats_text, again))


def rounding_text(claim: Mapping[str, Any], ours: Spread, runs: Sequence[Run]) -> str:
    """Return how far rounding alone moves a value of one or two replicates; "" for others, or if it was not measured.

    Args:
        claim: of paper.yaml.
        ours: the measured value.
        runs: of all schedules.
    """
    if claim["measure"] == "slopes" or ours[2] > 2:
        return ""
    here = [run for run in runs if run.dataset == claim.get("dataset", CIFAR)]
    variants = [claim[key] for key in ("of", "minus") if key in claim]
    each = [rounding([run for run in here if run.variant == v], MEASURES[claim["measure"]]) for v in variants]
    total = sum(found[0] ** 2 if found else math.nan for found in each)
    return "" if math.isnan(total) else f"; rounding ± {math.sqrt(total / ours[2]):.2f}"


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
    share = "; {:g} to {:g} % set to zero".format(*claim["share"]) if "share" in claim else ""
    return "none" if claim["paper"] is None else f"{claim['paper']:g} [{claim['source']}], ± {claim['within']:g}{share}"


def verdict(
    claim: Mapping[str, Any], limits: tuple[float, float] | None, ours: Spread, kind: str, share: float | None = None
) -> str:
    """Return the verdict on a claim; what is not the full recipe is judged by its direction alone.

    Args:
        claim: of paper.yaml.
        limits: what `bounds` returns.
        ours: the measured value.
        kind: of the runs' recipe, FULL, SHORT or OTHER.
        share: of the gammas, in %, if the claim is about setting them to zero.
    """
    value, but = ours[0], "" if kind == FULL else f", {kind}"
    if share is not None and "share" in claim and not claim["share"][0] <= share <= claim["share"][1]:
        return f"no verdict, another share of gammas{but}"
    if limits and kind == FULL:
        return "confirmed" if limits[0] <= value <= limits[1] else "not confirmed"
    if (than := claim.get("than")) is None:
        return f"no verdict{but}"
    low, high = limits or (math.nan, math.nan)
    if low < than < high:  # the claim is that nothing changes
        return f"{'inside' if low <= value <= high else 'outside'} the range{but}"
    if value != than and abs(value - than) <= ours[1]:  # one deviation; NaN and the 0 of a single run say nothing
        return f"direction unclear{but}"
    if not limits:
        return f"{'equal' if value == than else 'lower' if value < than else 'higher'}{but}"
    return f"{'same' if (value > than if low >= than else value < than) else 'other'} direction{but}"
