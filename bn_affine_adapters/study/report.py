"""Write docs/reproduction.md and its figures from result lines: what the paper says, and what was measured here.

    python recipes/report.py [--results recipes/results] [--page docs/reproduction.md] [--figures docs/figures]
                             [--only figure1 ... figure8, table1, claims, runs, open or missing]

The paper's numbers and claims are in study/paper.yaml, the page's text in study/report_template.md. The same lines make
the same bytes. --only draws one figure, or prints one table; it fails if the figure lacks its runs.
"""

import argparse
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from ..errors import BNAdapterError
from ..training.lines import read_results
from ..training.terminal import naming_files, printing
from .findings import findings, papers_decay, tuned
from .paper import PAPER, command_of
from .replicates import CIFAR, FULL, MEASURES, OTHER, SHORT, Run, by_schedule, read_runs, rounding
from .report_figures import FIGURES, draw
from .report_tables import TABLES


def page(runs: Sequence[Run], figures: Mapping[str, tuple[Path, str] | str], at: Path, tuning: Path) -> str:
    """Return the page's text.

    Args:
        runs: of all data sets.
        figures: what `draw` returned of each.
        at: where the page will lie; links to the figures start there.
        tuning: a folder with the results of `bn-adapters tune`.
    """
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string(Path(__file__).with_name("report_template.md").read_text(encoding="utf-8"))
    shown = []
    for name, drawn in figures.items():
        path, text = (None, drawn) if isinstance(drawn, str) else (os.path.relpath(drawn[0], at.parent), drawn[1])
        shown.append((name.replace("figure", "Figure "), PAPER["figures"][name], path, text))
    text = template.render(
        paper=PAPER,
        runs=len(runs),
        schedules={kind: schedules(runs, kind) for kind in (FULL, SHORT, OTHER)},
        rounding=rounding([run for run in runs if (run.dataset, run.variant) == (CIFAR, "bn")], MEASURES["accuracy"]),
        figures=shown,
        tables={name: make(runs) for name, make in TABLES.items()},
        findings=[(entry, list(findings(entry, runs))) for entry in PAPER["findings"]],
        decay=papers_decay(),
        tuned=[tuned(read_results(path)) for path in sorted(tuning.glob("*.jsonl"))],
        command_of=command_of,
    )
    return "\n".join(map(wrapped, text.split("\n")))


def schedules(runs: Sequence[Run], kind: str) -> dict[str, int]:
    """Return how many runs on CIFAR-10 are of a kind, by schedule and the settings named with the condition."""
    groups = [(name, group) for name, group in by_schedule(runs, CIFAR) if group[0].kind == kind]
    names = [", ".join([name, *run.variant.split(", ")[1:]]) for name, group in groups for run in group]
    return dict(Counter(names))


def wrapped(line: str) -> str:
    """Return a line of Markdown in lines of at most 120 characters, unless it is of a table, a heading or a figure."""
    if line.startswith(("|", "#", "!")):
        return line
    return textwrap.fill(line, 120, break_long_words=False, break_on_hyphens=False)


def write(arguments: list[str], checkout: Path) -> int:
    """Write the page and its figures, or with --only one of them; return 1 if that one cannot be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=checkout / "recipes" / "results")
    parser.add_argument("--page", type=Path, default=checkout / "docs" / "reproduction.md")
    parser.add_argument("--figures", type=Path, default=checkout / "docs" / "figures")
    parser.add_argument("--only", choices=[*FIGURES, *TABLES])
    options = parser.parse_args(arguments)
    runs = read_runs(options.results, PAPER["recipes"], PAPER["same"])
    if options.only in TABLES:
        print(TABLES[options.only](runs))
        return 0
    figures = {name: draw(name, runs, options.figures) for name in FIGURES if options.only in (None, name)}
    for drawn in figures.values():
        print(drawn if isinstance(drawn, str) else drawn[0])
    if options.only:
        return int(isinstance(figures[options.only], str))
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(page(runs, figures, options.page, options.results / "tune"), encoding="utf-8")
    print(options.page)
    return 0


def main(checkout: Path) -> None:
    """Run from the command line.

    Args:
        checkout: has recipes/results, and docs to write into.
    """
    with printing(status=1):
        try:
            with naming_files():
                sys.exit(write(sys.argv[1:], checkout))
        except BNAdapterError as error:
            sys.exit(f"{type(error).__name__}: {error}")
