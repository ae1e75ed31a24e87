"""What the paper states: paper.yaml as data, the names of its networks, and the commands that make a run of it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from .replicates import Run

PAPER: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8"))
NETWORKS: dict[str, Any] = PAPER["networks"]


def label(network: str | None) -> str:
    """Return the paper's name of a network, or "all" for a claim about all of them."""
    return NETWORKS.get(network, {}).get("label", network) if network else "all"


def cifar_networks(runs: Iterable[Run]) -> list[str]:
    """Return the paper's CIFAR networks among runs, from the smallest to the largest."""
    here = {run.network for run in runs}
    return [name for name, entry in NETWORKS.items() if entry["lines"] and name in here]


def command_of(entry: Mapping[str, Any], network: str = "") -> str:
    """Return the command that makes the runs that an entry of paper.yaml needs."""
    if "sweep" in entry:
        return f"bn-adapters sweep {entry['sweep']}"
    return f"bn-adapters train imagenet model={network} condition={entry['of']} precision=no"
