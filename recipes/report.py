"""Write docs/reproduction.md and its figures from result lines: what the paper says, and what was measured here.

    python recipes/report.py [--results recipes/results] [--page docs/reproduction.md] [--figures docs/figures]
                             [--only figure1 ... figure8, table1, claims, runs or missing]

The paper's numbers and claims are recipes/paper.yaml, the page's text recipes/report_template.md. The same lines make
the same bytes. --only draws one figure, or prints one table; a figure without its runs is an error then.
"""

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from bn_affine_adapters import BNAdapterError, plots
from bn_affine_adapters.analysis import depth_width_slopes, parameter_table
from bn_affine_adapters.errors import ConfigError
from bn_affine_adapters.plots import Spread
from bn_affine_adapters.recipe import Recipe, run_key
from bn_affine_adapters.results import read_results

HERE = Path(__file__).parent
PAPER: dict[str, Any] = yaml.safe_load((HERE / "paper.yaml").read_text(encoding="utf-8"))
CIFAR = "cifar10"
THRESHOLDS, CLAMPS = ("0.001", "0.01", "0.05", "0.1"), ("0.01", "0.05")
PANELS = 3  # networks in one figure
Panel = Callable[[Any], Any]  # draws on an Axes


def label(network: str) -> str:
    """Return the paper's name of a network."""
    return PAPER["networks"].get(network, {}).get("label", network)


def known(runs: Iterable[Run]) -> list[str]:
    """Return the paper's CIFAR networks among runs, from the smallest to the largest."""
    here = {run.network for run in runs}
    return [name for name, entry in PAPER["networks"].items() if entry["lines"] and name in here]


# The claims.


def slopes(runs: Sequence[Run], variant: str) -> dict[str, Any] | None:
    """Return the depth and width lines through a variant's runs, or None where there is not enough for both."""
    try:
        return depth_width_slopes([(p, y, name) for name, points in on_lines(runs, variant).items() for p, y in points])
    except ConfigError:
        return None


def on_lines(runs: Sequence[Run], variant: str) -> dict[str, list[tuple[int, float]]]:
    """Return (gammas and betas, accuracy in %) of every replicate of a variant, under "depth" and "width"."""
    found: dict[str, list[tuple[int, float]]] = {"depth": [], "width": []}
    for network in known(runs):
        for accuracy in measured(runs, network, variant, MEASURES["accuracy"]).values():
            for name in PAPER["networks"][network]["lines"]:
                found[name].append((PAPER["networks"][network]["bn"], accuracy))
    return found


def value_of(claim: Mapping[str, Any], network: str, runs: Sequence[Run]) -> Spread | None:
    """Return what was measured of a claim, a difference between replicates of the same seeds; None if nothing was."""
    if claim["measure"] == "slopes":
        lines = slopes(runs, claim["of"])
        return lines and (lines["ratio"], math.nan, lines["depth"]["n"] + lines["width"]["n"])
    pick = MEASURES[claim["measure"]]
    ours = measured(runs, network, claim["of"], pick)
    if "minus" in claim:
        others = measured(runs, network, claim["minus"], pick)
        ours = {replicate: value - others[replicate] for replicate, value in ours.items() if replicate in others}
    return spread(ours.values())


def bounds(claim: Mapping[str, Any], network: str) -> tuple[float, float] | None:
    """Return between which values a claim is confirmed, or None where the paper has none."""
    value = claim["paper"] if "paper" in claim else PAPER["accuracy"][claim["of"]][network]
    if isinstance(value, list):
        low, high = value
        return (-math.inf if low is None else low, math.inf if high is None else high)
    return None if value is None else (value - claim["within"], value + claim["within"])


def paper_text(claim: Mapping[str, Any], network: str) -> str:
    """Return the paper's value with its source, and how far from it is still confirmed."""
    if "paper" not in claim:
        stated = network in PAPER["stated"].get(claim["of"], ())
        about = "about " if network in PAPER["about"].get(claim["of"], ()) else ""
        value = PAPER["accuracy"][claim["of"]][network]
        return f"{about}{value:g} [{'P' if stated else 'F'}], ± {claim['within']:g}"
    if isinstance(claim["paper"], list):
        low, high = claim["paper"]
        text = f"at most {high:g}" if low is None else f"at least {low:g}" if high is None else f"{low:g} to {high:g}"
        return f"{text} [{claim['source']}]"
    return "none" if claim["paper"] is None else f"{claim['paper']:g} [{claim['source']}], ± {claim['within']:g}"


def verdict(claim: Mapping[str, Any], limits: tuple[float, float] | None, value: float, schedule: str) -> str:
    """Say what a measurement says of a claim; of a short schedule only the direction counts."""
    than = claim.get("than")
    short = "" if schedule == FULL else ", short schedule"
    if limits is None:
        return f"{'no difference' if value == than else 'lower' if value < than else 'higher'}{short}"
    low, high = limits
    if schedule == FULL:
        return "confirmed" if low <= value <= high else "not confirmed"
    if than is None:
        return "no verdict, short schedule"
    same = low <= value <= high if low < than < high else value > than if low >= than else value < than
    return f"{'same' if same else 'other'} direction{short}"


def command_of(claim: Mapping[str, Any], network: str) -> str:
    """Return the command whose runs a claim needs."""
    if "sweep" in claim:
        return f"python recipes/sweep.py recipes/configs/sweeps/{claim['sweep']}.yaml"
    arguments = f"model={network} condition={claim['of']}"
    return f"accelerate launch recipes/train.py --config recipes/configs/imagenet.yaml {arguments}"


def claim_row(claim: Mapping[str, Any], network: str, runs: Sequence[Run]) -> list[str]:
    """Return a claim on a network: claim, network, paper, ours, n, schedule, verdict."""
    head = [claim["claim"], label(network) if network else "all", paper_text(claim, network)]
    for schedule, group in by_schedule(runs, claim.get("dataset", CIFAR)):
        if found := value_of(claim, network, group):
            judged = verdict(claim, bounds(claim, network), found[0], schedule)
            return [*head, spread_text(found), str(found[2]), schedule, judged]
    return [*head, "", "0", "", f"not run: `{command_of(claim, network)}`"]


# The tables, as rows of text.

