"""The figures of docs/reproduction.md: which runs each of them shows.

A new figure is a function in FIGURES, which takes the runs of one schedule and yields its panels, none if it lacks
runs; an entry under ``figures`` in paper.yaml, with its title and what it needs; and a function in `figures` that draws
a panel. The template places every entry of FIGURES.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import figures as plots
from .claims import on_lines, slopes
from .paper import NETWORKS, PAPER, cifar_networks, command_of, label
from .replicates import (
    CIFAR,
    FULL,
    MEASURES,
    Pick,
    Run,
    Spread,
    analysed,
    by_schedule,
    clamp_change,
    measured,
    paired,
    picked,
    spread,
)

THRESHOLDS, CLAMPS = ("0.001", "0.01", "0.05", "0.1"), ("0.01", "0.05")
PANELS = 3  # networks in one figure
Panel = Callable[[Any], Any]  # draws on an Axes


def figure1(runs: Sequence[Run]) -> Iterator[Panel]:
    """Gain of training gamma and beta, from the same seeds."""
    rows = {label(n): paired(runs, n, ("all", "no-affine"), MEASURES["accuracy"]) for n in cifar_networks(runs)}
    if pairs := {name: row for name, row in rows.items() if row}:
        yield partial(plots.affine_gain, accuracies=pairs, paper=PAPER["marks"]["gain"])


def figure2(runs: Sequence[Run]) -> Iterator[Panel]:
    """Accuracy by condition, against depth and width."""
    variants = list(dict.fromkeys([*PAPER["accuracy"], *sorted({run.variant for run in runs})]))
    rows = _spreads(runs, variants, MEASURES["accuracy"])
    by_variant = {v: {label(n): row[v] for n, row in rows.items() if v in row} for v in variants}
    ours = {v: values for v, values in by_variant.items() if values}
    paper = {v: {label(name): value for name, value in values.items()} for v, values in PAPER["accuracy"].items()}
    for line in ("depth", "width") if ours else ():
        networks = [entry["label"] for entry in NETWORKS.values() if line in entry["lines"]]
        yield partial(plots.accuracy_by_network, networks=networks, ours=ours, paper=paper)


def figure3(runs: Sequence[Run]) -> Iterator[Panel]:
    """Accuracy against log2 of gamma and beta."""
    ours, bn = on_lines(runs, "bn", NETWORKS), PAPER["accuracy"]["bn"]
    lines = {n: [name for name, e in NETWORKS.items() if n in e["lines"]] for n in ours}
    paper = {n: [(NETWORKS[name]["bn"], bn[name]) for name in names] for n, names in lines.items()}
    if len({parameters for points in ours.values() for parameters, _ in points}) > 1:
        yield partial(plots.accuracy_by_parameters, ours=ours, paper=paper, slopes=slopes(runs, "bn", NETWORKS))


def figure4(runs: Sequence[Run]) -> Iterator[Panel]:
    """Distribution of gamma."""
    for name, row in _replicates(runs, analysed("gamma", "histogram")).items():
        pairs = {v: [(h["edges"], h["counts"]) for h in several] for v, several in row.items()}
        yield partial(plots.gamma_densities, histograms=pairs, title=label(name))


def figure5(runs: Sequence[Run]) -> Iterator[Panel]:
    """Share of small gammas, with weight decay and without."""
    variants = [v + decay for v in ("all", "bn") for decay in ("", ", weight_decay=0")]
    rows = {t: _spreads(runs, variants, analysed("gamma", "below", t)) for t in THRESHOLDS}
    for name in _largest(rows["0.01"]):
        shares = {t: row[name] for t, row in rows.items() if name in row}
        paper = PAPER["marks"]["near_zero"].get(name, {})
        yield partial(plots.near_zero_shares, shares=shares, title=label(name), paper=paper)


def figure6(runs: Sequence[Run]) -> Iterator[Panel]:
    """Change of accuracy with small gammas at zero."""
    rows: dict[str, dict[str, Spread]] = {}
    for threshold in CLAMPS:
        for name, row in _spreads(runs, ("all", "bn"), clamp_change(threshold)).items():
            rows.setdefault(label(name), {}).update({f"{v}, < {threshold}": value for v, value in row.items()})
    if rows:
        yield partial(plots.clamped_accuracies, changes=rows)


def figure7(runs: Sequence[Run]) -> Iterator[Panel]:
    """Channels that a ReLU sets to zero."""
    for name, row in _replicates(runs, analysed("dead")).items():
        pairs = {v: [(dead["thresholds"], dead["share"]) for dead in several] for v, several in row.items()}
        yield partial(plots.dead_share_curves, curves=pairs, title=label(name), paper=PAPER["marks"]["dead"])


def figure8(runs: Sequence[Run]) -> Iterator[Panel]:
    """Weight decay 1e-4 and 0."""
    texts = {"near zero": "|gamma| < 0.01, %", "accuracy": "test accuracy, %"}
    for measure, text in texts.items():
        rows: dict[str, dict[str, Spread]] = {}
        for v in ("all", "bn"):
            pair = (v, f"{v}, weight_decay=0")
            for name, row in _spreads(runs, pair, MEASURES[measure]).items():
                if len(row) == 2:
                    rows.setdefault(label(name), {}).update(row)
        if rows:
            yield partial(plots.weight_decay_control, values=rows, label=text)


FIGURES = {f.__name__: f for f in (figure1, figure2, figure3, figure4, figure5, figure6, figure7, figure8)}


def draw(name: str, runs: Sequence[Run], folder: Path) -> tuple[Path, str] | str:
    """Draw a figure of the first schedule that has what it needs; return its file and its runs, or what is missing."""
    path = folder / f"{name}.svg"
    for schedule, group in by_schedule(runs, CIFAR):
        if panels := list(FIGURES[name](group)):
            plots.save(path, panels, schedule)
            kind = group[0].kind
            return path, schedule if kind == FULL else f"{schedule} ({kind})"
    path.unlink(missing_ok=True)  # of an earlier page
    entry = PAPER["figures"][name]
    return f"{name.replace('figure', 'Figure ')}: no run with {entry['needs']}; run: `{command_of(entry)}`"


def _spreads(runs: Sequence[Run], variants: Iterable[str], pick: Pick) -> dict[str, dict[str, Spread]]:
    """Return {network: {variant: spread}} of all that was measured."""
    rows = {n: {v: spread(measured(runs, n, v, pick).values()) for v in variants} for n in cifar_networks(runs)}
    present = {name: {v: value for v, value in row.items() if value} for name, row in rows.items()}
    return {name: row for name, row in present.items() if row}


def _replicates(runs: Sequence[Run], pick: Pick) -> dict[str, dict[str, list[Any]]]:
    """Return {network: {variant: [the value of each replicate]}} of `all` and `bn`, of the largest networks."""
    rows = {n: {v: [x for _, x in picked(runs, n, v, pick)] for v in ("all", "bn")} for n in cifar_networks(runs)}
    present = {name: {v: several for v, several in row.items() if several} for name, row in rows.items()}
    return _largest({name: row for name, row in present.items() if row})


def _largest(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return at most PANELS networks, those with the most variants and then the largest first."""
    order = sorted(rows, key=lambda name: (-len(rows[name]), -NETWORKS[name]["bn"]))
    return {name: rows[name] for name in order[:PANELS]}
