"""The tables of docs/reproduction.md, as Markdown. A new table is a function in TABLES and a place in the template."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..training.tables import markdown_table
from .claims import bounds, ours_text, paper_text, rounding_text, share_of, value_of, verdict
from .networks import parameter_table
from .paper import NETWORKS, PAPER, command_of, label
from .replicates import (
    CIFAR,
    FULL,
    MEASURES,
    OTHER,
    Run,
    by_replicate,
    by_schedule,
    measured,
    picked,
    repeats_text,
    spread,
    spread_text,
)


def claims_table(runs: Sequence[Run]) -> str:
    """Return every claim on every network on which it was run."""
    rows = []
    for claim in PAPER["claims"]:
        judged = {name: _claim_row(claim, name, runs) for name in claim["networks"]}
        rows += [[claim["claim"], label(name), *row] for name, row in judged.items() if row]
    return markdown_table(["claim", "network", "paper", "ours", "n", "schedule", "verdict"], rows)


def open_claims_table(runs: Sequence[Run]) -> str:
    """Return the networks on which each claim was not run, what the paper says of them, and the command."""
    rows = []
    for claim in PAPER["claims"]:
        if lack := [name for name in claim["networks"] if not _claim_row(claim, name, runs)]:
            papers = [paper_text(claim, name, PAPER) for name in lack]
            paper = papers[0] if len({*papers}) == 1 else "; ".join(papers)
            commands = dict.fromkeys(f"`{command_of(claim, name)}`" for name in lack)
            rows.append([claim["claim"], ", ".join(map(label, lack)), paper, ", ".join(commands)])
    return markdown_table(["claim", "networks", "paper", "command"], rows)


def _claim_row(claim: Mapping[str, Any], network: str, runs: Sequence[Run]) -> list[str] | None:
    """Return a claim on a network: paper, ours, n, schedule, verdict; None if it was not run."""
    for schedule, group in by_schedule(runs, claim.get("dataset", CIFAR)):
        if ours := value_of(claim, network, group, NETWORKS):
            share = share_of(claim, network, group)
            judged = verdict(claim, bounds(claim, network, PAPER), ours, group[0].kind, share and share[0])
            n = f"{ours[2]} runs" if claim["measure"] == "slopes" else str(ours[2])
            text = ours_text(claim, network, group, ours) + rounding_text(claim, ours, runs)
            return [paper_text(claim, network, PAPER), text, n, schedule, judged]
    return None


def parameters_table(runs: Sequence[Run]) -> str:
    """Return the paper's table of networks, counted again in the networks themselves."""
    keys, rows = ("all", "bn", "head", "shortcut"), []
    for name, paper in NETWORKS.items():
        (ours,) = parameter_table([name])
        cells = [f"{ours[k]:,}" + ("" if ours[k] == paper[k] else f" (paper {paper[k]:,})") for k in keys]
        rows.append([paper["label"], *cells, "differs" if any("(" in c for c in cells) else "equal"])
    head = ["network", "all parameters", "gamma and beta", "head", "shortcut convolutions", "the paper's"]
    return markdown_table(head, rows)


def runs_table(runs: Sequence[Run]) -> str:
    """Return the runs, a row for those that differ in the replicate alone."""
    cells: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        cells.setdefault((run.dataset, label(run.network), run.named, run.schedule), []).append(run)
    rows = [[*cell, *_runs_row(group)] for cell, group in sorted(cells.items())]
    head = ["data", "network", "condition and settings", "schedule", "accuracy, %", "n", "runs"]
    return markdown_table([*head, "seconds a run", "hardware", "commits"], rows)


def _runs_row(group: Sequence[Run]) -> list[str]:
    """Return accuracy, n, runs, seconds, hardware and commits of one cell."""
    values = by_replicate(group, group[0].network, group[0].named, MEASURES["accuracy"])
    accuracy = spread(map(statistics.mean, values.values()))
    seconds = spread(run.line["seconds"] for run in group if "seconds" in run.line)
    places = sorted({_hardware(run.line.get("hardware", {})) for run in group})
    commits = sorted({str(run.line.get("commit")) for run in group})
    assert accuracy
    taken = spread_text(seconds, 0) if seconds else ""
    text = spread_text(accuracy) + repeats_text(values)
    return [text, str(accuracy[2]), str(len(group)), taken, "; ".join(places), ", ".join(commits)]


def _hardware(used: Mapping[str, Any]) -> str:
    """Return a processor's name and how many of it, or of its threads, a run used."""
    key, unit = ("processes", "GPU") if used.get("device") == "cuda" else ("threads", "thread")
    return f"{used.get('name', 'unknown')}, {used.get(key, 1)} x {unit}"


def missing_table(runs: Sequence[Run]) -> str:
    """Return the variants that lack runs of the full recipe: networks, replicates, GPU-hours, command."""
    full = dict(by_schedule(runs, CIFAR)).get(FULL, [])
    rows = []
    for entry in PAPER["to_run"]:
        wanted = entry.get("replicates", PAPER["replicates"])
        for variant in entry["variants"]:
            done = {name: len(measured(full, name, variant, MEASURES["accuracy"])) for name in entry["networks"]}
            if lack := {name: wanted - number for name, number in done.items() if number < wanted}:
                names = ", ".join(f"{label(name)} ({number})" for name, number in lack.items())
                rows.append([variant, names, _hours_text(runs, variant, lack), f"`{command_of(entry)}`"])
    return markdown_table(["condition and settings", "networks (replicates)", "GPU-hours", "command"], rows)


def _hours_text(runs: Sequence[Run], variant: str, lack: Mapping[str, int]) -> str:
    """Return the GPU-hours that the missing replicates will take, from the seconds an epoch of such runs here."""
    cifar = [run for run in runs if run.dataset == CIFAR and run.kind != OTHER]  # which may take another time
    medians = {name: _median_epoch(cifar, name, variant) for name in lack}
    known = {name: seconds for name, seconds in medians.items() if seconds is not None}
    hours = sum(seconds * lack[name] for name, seconds in known.items()) * PAPER["recipes"][CIFAR]["epochs"] / 3600
    part = "" if len(known) == len(lack) else f" for {', '.join(map(label, known))}; the others not measured"
    return f"{hours:.1f}{part}" if known else "not measured"


def _median_epoch(runs: Iterable[Run], network: str, variant: str) -> float | None:
    """Return the median GPU-seconds of an epoch of a cell, whatever its schedule; None if none ran on a GPU."""

    def pick(line: Mapping[str, Any]) -> float | None:
        used = line.get("hardware", {})
        gpu = used.get("device") == "cuda" and "seconds" in line
        return line["seconds"] * used.get("processes", 1) / line["recipe"]["epochs"] if gpu else None

    seconds = [value for _, value in picked(runs, network, variant, pick)]
    return statistics.median(seconds) if seconds else None


TABLES = {
    "table1": parameters_table,
    "claims": claims_table,
    "runs": runs_table,
    "open": open_claims_table,
    "missing": missing_table,
}
