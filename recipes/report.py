"""Write docs/reproduction.md and its figures from result lines: what the paper says, and what was measured here.

    python recipes/report.py [--results recipes/results] [--page docs/reproduction.md] [--figures docs/figures]
                             [--only figure1 ... figure8, table1, claims, runs or missing]

The paper's numbers and claims are recipes/paper.yaml, the page's text recipes/report_template.md. The same lines make
the same bytes. --only draws one figure, or prints one table; a figure without its runs is an error then.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from bn_affine_adapters import BNAdapterError
from bn_affine_adapters.study import figures as plots
from bn_affine_adapters.study.claims import bounds, findings, on_lines, paper_text, slopes, tuned, value_of, verdict
from bn_affine_adapters.study.networks import parameter_table
from bn_affine_adapters.study.replicates import (
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
    read_runs,
    spread,
    spread_text,
)
from bn_affine_adapters.training.lines import read_results

HERE = Path(__file__).parent
PAPER: dict[str, Any] = yaml.safe_load((HERE / "paper.yaml").read_text(encoding="utf-8"))
NETWORKS: dict[str, Any] = PAPER["networks"]
THRESHOLDS, CLAMPS = ("0.001", "0.01", "0.05", "0.1"), ("0.01", "0.05")
CIFAR, PANELS = "cifar10", 3  # networks in one figure
Panel = Callable[[Any], Any]  # draws on an Axes


def label(network: str | None) -> str:
    """Return the paper's name of a network; of none, a claim on all of them."""
    return NETWORKS.get(network, {}).get("label", network) if network else "all"


def known(runs: Iterable[Run]) -> list[str]:
    """Return the paper's CIFAR networks among runs, from the smallest to the largest."""
    here = {run.network for run in runs}
    return [name for name, entry in NETWORKS.items() if entry["lines"] and name in here]


# The claims.


def command_of(claim: Mapping[str, Any], network: str) -> str:
    """Return the command whose runs a claim needs."""
    if "sweep" in claim:
        return f"python recipes/sweep.py recipes/configs/sweeps/{claim['sweep']}.yaml"
    arguments = f"model={network} condition={claim['of']}"
    return f"accelerate launch recipes/train.py --config recipes/configs/imagenet.yaml {arguments}"


def claim_row(claim: Mapping[str, Any], network: str, runs: Sequence[Run]) -> list[str] | None:
    """Return a claim on a network: paper, ours, n, schedule, verdict; None if it was not run."""
    for schedule, group in by_schedule(runs, claim.get("dataset", CIFAR)):
        if found := value_of(claim, network, group, NETWORKS):
            judged = verdict(claim, bounds(claim, network, PAPER), found[0], schedule)
            return [paper_text(claim, network, PAPER), spread_text(found), str(found[2]), schedule, judged]
    return None


# The tables, as rows of text.


def claims_table(runs: Sequence[Run]) -> str:
    """Return every claim on every network it is made of; networks on which it was not run share a row."""
    rows = []
    for claim in PAPER["claims"]:
        judged = {name: claim_row(claim, name, runs) for name in claim["networks"]}
        rows += [[claim["claim"], label(name), *row] for name, row in judged.items() if row]
        if lack := [name for name, row in judged.items() if not row]:
            papers = [paper_text(claim, name, PAPER) for name in lack]
            commands = dict.fromkeys(f"`{command_of(claim, name)}`" for name in lack)
            names, waits = ", ".join(map(label, lack)), f"not run: {', '.join(commands)}"
            rows.append(
                [claim["claim"], names, "; ".join(papers[: None if len({*papers}) > 1 else 1]), "", "0", "", waits]
            )
    return table(["claim", "network", "paper", "ours", "n", "schedule", "verdict"], rows)


def parameters_table(runs: Sequence[Run]) -> str:
    """Return the paper's table of networks, recounted from the networks themselves."""
    keys, rows = ("all", "bn", "head", "shortcut"), []
    for name, paper in NETWORKS.items():
        (found,) = parameter_table([name])
        cells = [f"{found[k]:,}" + ("" if found[k] == paper[k] else f" (paper {paper[k]:,})") for k in keys]
        rows.append([paper["label"], *cells, "differs" if any("(" in c for c in cells) else "equal"])
    return table(["network", "all parameters", "gamma and beta", "head", "shortcut convolutions", "the paper's"], rows)


def runs_table(runs: Sequence[Run]) -> str:
    """Return the runs by cell: what differs in the replicate alone is one row."""
    cells: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        cells.setdefault((run.dataset, label(run.network), run.variant, run.schedule), []).append(run)
    rows = [[*cell, *runs_row(group)] for cell, group in sorted(cells.items())]
    head = ["data", "network", "condition and settings", "schedule", "accuracy, %", "n", "runs"]
    return table([*head, "seconds a run", "hardware", "commits"], rows)


def runs_row(group: Sequence[Run]) -> list[str]:
    """Return accuracy, n, runs, seconds, hardware and commits of one cell."""
    accuracy = spread(measured(group, group[0].network, group[0].variant, MEASURES["accuracy"]).values())
    seconds = spread(run.line["seconds"] for run in group if "seconds" in run.line)
    places = sorted({hardware(run.line.get("hardware", {})) for run in group})
    commits = sorted({str(run.line.get("commit")) for run in group})
    assert accuracy
    taken = spread_text(seconds, 0) if seconds else ""
    return [spread_text(accuracy), str(accuracy[2]), str(len(group)), taken, "; ".join(places), ", ".join(commits)]


def hardware(found: Mapping[str, Any]) -> str:
    """Return a processor's name and how many of it, or of its threads, a run used."""
    key, unit = ("processes", "GPU") if found.get("device") == "cuda" else ("threads", "thread")
    return f"{found.get('name', 'unknown')}, {found.get(key, 1)} x {unit}"


def missing_table(runs: Sequence[Run]) -> str:
    """Return the variants that lack runs of the full recipe: networks, replicates, GPU-hours, command."""
    full = dict(by_schedule(runs, CIFAR)).get(FULL, [])
    rows = []
    for plan in PAPER["to_run"]:
        for variant in plan["variants"]:
            done = {name: len(measured(full, name, variant, MEASURES["accuracy"])) for name in plan["networks"]}
            wanted = plan.get("replicates", PAPER["replicates"])
            if lack := {name: wanted - number for name, number in done.items() if number < wanted}:
                names = ", ".join(f"{label(name)} ({number})" for name, number in lack.items())
                rows.append([variant, names, hours_text(runs, variant, lack), f"`{command_of(plan, '')}`"])
    return table(["condition and settings", "networks (replicates)", "GPU-hours", "command"], rows)


def hours_text(runs: Sequence[Run], variant: str, lack: Mapping[str, int]) -> str:
    """Return the GPU-hours that the missing replicates will take, from the seconds an epoch of such runs here."""
    cifar = [run for run in runs if run.dataset == CIFAR]
    found = {name: median_epoch(cifar, name, variant) for name in lack}
    known = {name: seconds for name, seconds in found.items() if seconds is not None}
    hours = sum(seconds * lack[name] for name, seconds in known.items()) * PAPER["recipes"][CIFAR]["epochs"] / 3600
    part = "" if len(known) == len(lack) else f" for {', '.join(map(label, known))}; the others not measured"
    return f"{hours:.1f}{part}" if known else "not measured"


def median_epoch(runs: Iterable[Run], network: str, variant: str) -> float | None:
    """Return the median GPU-seconds of an epoch of a cell, whatever its schedule; None if none ran on a GPU."""

    def pick(line: Mapping[str, Any]) -> float | None:
        used = line.get("hardware", {})
        same = line["recipe"].get("batch_size", 128) == PAPER["recipes"][CIFAR]["batch_size"]
        gpu = used.get("device") == "cuda" and same and "seconds" in line
        return line["seconds"] * used.get("processes", 1) / line["recipe"]["epochs"] if gpu else None

    seconds = [value for _, value in picked(runs, network, variant, pick)]
    return statistics.median(seconds) if seconds else None


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows as a Markdown table."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [head, *rows]]
    lines = [f"| {' | '.join(row)} |".replace("|  |", "| |").replace("|  |", "| |") for row in cells]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


# The figures. Each takes the runs of one schedule and yields its panels, none if there is nothing to draw.


def cells_of(runs: Sequence[Run], variants: Iterable[str], pick: Pick) -> dict[str, dict[str, Spread]]:
    """Return {network: {variant: spread}} of all that was measured."""
    found = {name: {v: spread(measured(runs, name, v, pick).values()) for v in variants} for name in known(runs)}
    whole = {name: {v: value for v, value in row.items() if value} for name, row in found.items()}
    return {name: row for name, row in whole.items() if row}


def largest(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return at most PANELS networks, those with the most variants and then the largest first."""
    order = sorted(rows, key=lambda name: (-len(rows[name]), -NETWORKS[name]["bn"]))
    return {name: rows[name] for name in order[:PANELS]}


def figure1(runs: Sequence[Run]) -> Iterator[Panel]:
    """Gain of training gamma and beta, from the same seeds."""
    rows = {label(name): paired(runs, name, ("all", "no-affine"), MEASURES["accuracy"]) for name in known(runs)}
    pairs = {name: row for name, row in rows.items() if row}
    yield from [partial(plots.affine_gain, accuracies=pairs, paper=PAPER["marks"]["gain"])] if pairs else []


def figure2(runs: Sequence[Run]) -> Iterator[Panel]:
    """Accuracy by condition, against depth and width."""
    variants = list(dict.fromkeys([*PAPER["accuracy"], *sorted({run.variant for run in runs})]))
    rows = cells_of(runs, variants, MEASURES["accuracy"])
    ours = {v: {label(n): row[v] for n, row in rows.items() if v in row} for v in variants}
    ours = {v: found for v, found in ours.items() if found}
    paper = {v: {label(name): value for name, value in found.items()} for v, found in PAPER["accuracy"].items()}
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


def lists_of(runs: Sequence[Run], pick: Pick) -> dict[str, dict[str, list[Any]]]:
    """Return {network: {variant: [what each replicate has]}} of `all` and `bn`, for a figure with a panel a network."""
    found = {name: {v: [x for _, x in picked(runs, name, v, pick)] for v in ("all", "bn")} for name in known(runs)}
    whole = {name: {v: several for v, several in row.items() if several} for name, row in found.items()}
    return largest({name: row for name, row in whole.items() if row})


def figure4(runs: Sequence[Run]) -> Iterator[Panel]:
    """Distribution of gamma."""
    for name, row in lists_of(runs, analysed("gamma", "histogram")).items():
        pairs = {v: [(h["edges"], h["counts"]) for h in several] for v, several in row.items()}
        yield partial(plots.gamma_densities, histograms=pairs, title=label(name))


def figure5(runs: Sequence[Run]) -> Iterator[Panel]:
    """Share of small gammas, with weight decay and without."""
    variants = [v + decay for v in ("all", "bn") for decay in ("", ", weight_decay=0")]
    rows = {t: cells_of(runs, variants, analysed("gamma", "below", t)) for t in THRESHOLDS}
    for name in largest(rows["0.01"]):
        shares = {t: found[name] for t, found in rows.items() if name in found}
        paper = PAPER["marks"]["near_zero"].get(name, {})
        yield partial(plots.near_zero_shares, shares=shares, title=label(name), paper=paper)


def figure6(runs: Sequence[Run]) -> Iterator[Panel]:
    """Change of accuracy with small gammas at zero."""
    rows: dict[str, dict[str, Spread]] = {}
    for threshold in CLAMPS:
        for name, row in cells_of(runs, ("all", "bn"), clamp_change(threshold)).items():
            rows.setdefault(label(name), {}).update({f"{v}, < {threshold}": value for v, value in row.items()})
    if rows:
        yield partial(plots.clamped_accuracies, changes=rows)


def figure7(runs: Sequence[Run]) -> Iterator[Panel]:
    """Channels that a ReLU sets to zero."""
    for name, row in lists_of(runs, analysed("dead")).items():
        pairs = {v: [(dead["thresholds"], dead["share"]) for dead in several] for v, several in row.items()}
        yield partial(plots.dead_share_curves, curves=pairs, title=label(name), paper=PAPER["marks"]["dead"])


def figure8(runs: Sequence[Run]) -> Iterator[Panel]:
    """Weight decay 1e-4 and 0."""
    texts = {"near zero": "|gamma| < 0.01, %", "accuracy": "test accuracy, %"}
    for measure, text in texts.items():
        rows: dict[str, dict[str, Spread]] = {}
        for v in ("all", "bn"):
            pair = (v, f"{v}, weight_decay=0")
            for name, row in cells_of(runs, pair, MEASURES[measure]).items():
                if len(row) == 2:
                    rows.setdefault(label(name), {}).update(row)
        if rows:
            yield partial(plots.weight_decay_control, values=rows, label=text)


FIGURES = {f.__name__: f for f in (figure1, figure2, figure3, figure4, figure5, figure6, figure7, figure8)}
TABLES = {"table1": parameters_table, "claims": claims_table, "runs": runs_table, "missing": missing_table}


def draw(name: str, runs: Sequence[Run], folder: Path) -> tuple[Path, str] | str:
    """Draw a figure of the first schedule that has what it needs; return its file and schedule, or what is missing."""
    path = folder / f"{name}.png"
    for schedule, group in by_schedule(runs, CIFAR):
        if panels := list(FIGURES[name](group)):
            figure = Figure(figsize=(1 + 3.6 * len(panels), 3.6), layout="constrained")
            for ax, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
                panel(ax)
            figure.suptitle(schedule, fontsize=9)
            folder.mkdir(parents=True, exist_ok=True)
            # Without the version, so that the same lines have the same picture.
            figure.savefig(path, dpi=100, metadata={"Software": None})
            return path, schedule
    path.unlink(missing_ok=True)  # of an earlier page
    needs = PAPER["figures"][name]["needs"]
    return f"{name.replace('figure', 'Figure ')}: no run with {needs}; run: `{command_of(PAPER['figures'][name], '')}`"


def page(runs: Sequence[Run], figures: Mapping[str, tuple[Path, str] | str], at: Path, tuning: Path) -> str:
    """Return the page's text, with links to the figures from where it will lie."""
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string((HERE / "report_template.md").read_text(encoding="utf-8"))
    schedules = [(name, len(group)) for name, group in by_schedule(runs, CIFAR)]
    shown = []
    for name, found in figures.items():
        path, text = (None, found) if isinstance(found, str) else (os.path.relpath(found[0], at.parent), found[1])
        shown.append((name.replace("figure", "Figure "), PAPER["figures"][name]["title"], path, text))
    told = {
        "tables": {name: make(runs) for name, make in TABLES.items()},
        "findings": [(entry, findings(entry, runs, label)) for entry in PAPER["findings"]],
        "tuned": [tuned(read_results(path), label) for path in sorted(tuning.glob("*.jsonl"))],
    }
    return template.render(paper=PAPER, full=FULL, runs=len(runs), schedules=schedules, figures=shown, **told)


def main(arguments: list[str]) -> int:
    """Write the page and its figures, or with --only one of them; return 1 if that one cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "reproduction.md")
    parser.add_argument("--figures", type=Path, default=HERE.parent / "docs" / "figures")
    parser.add_argument("--only", choices=[*FIGURES, *TABLES])
    options = parser.parse_args(arguments)
    runs = read_runs(options.results, PAPER["recipes"], PAPER["same"])
    if options.only in TABLES:
        print(TABLES[options.only](runs))
        return 0
    figures = {name: draw(name, runs, options.figures) for name in FIGURES if options.only in (None, name)}
    for found in figures.values():
        print(found if isinstance(found, str) else found[0])
    if options.only:
        return int(isinstance(figures[options.only], str))
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(page(runs, figures, options.page, options.results / "tune"), encoding="utf-8")
    print(options.page)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BNAdapterError as error:
        sys.exit(f"{type(error).__name__}: {error}")
