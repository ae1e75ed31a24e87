"""Write docs/tasks.md and its figure from the lines of `bn-adapters compare`.

    python recipes/benchmarks/tasks.py [FILE.jsonl]

The lines of FILE, if it is given, replace recipes/results/compare/tasks.jsonl first.
"""

import json
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bn_affine_adapters.study import figures as plots
from bn_affine_adapters.study.pages import write_section
from bn_affine_adapters.training.compare import METHODS
from bn_affine_adapters.training.tables import markdown_table

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "recipes" / "results" / "compare" / "tasks.jsonl"
PAGE, FIGURE = ROOT / "docs" / "tasks.md", ROOT / "docs" / "figures" / "tasks.svg"
# A ridge classifier on the same backbone's features of 128 px, from the data's own descriptions; and the runs planned.
PROBES = {
    "flowers102": 73.3, "uc_merced": 92.0, "trashnet": 81.2, "elpv": 82.8, "pneumoniamnist": 84.0, "omniglot": 54.1,
    "cifar95": 49.1, "gtsrb-32-mini": None,
}  # fmt: skip
PLANNED = {"head": 3, "norm+head": 3, "norm": 1, "lora": 1, "whole": 1}
Runs = dict[tuple[str, str], list[dict[str, Any]]]  # by method and task: its tested runs


def read(file: Path = FILE) -> list[dict[str, Any]]:
    """Return the lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def grouped(lines: Iterable[dict[str, Any]], tested: bool = True) -> Runs:
    """Return the runs by method and task: those that trained on all images, or those that tried a learning rate."""
    found: Runs = {}
    for line in lines:
        info = line["run_info"]
        if (not info["train_config"]["held_out"]) == tested and line["train_info"]["status"] == "success":
            found.setdefault((info["method"], info["task"]), []).append(line)
    return found


def metric(name: str) -> Callable[[dict[str, Any]], float]:
    """Return what reads a metric of a run's test."""
    return lambda line: line["train_info"]["metrics"][-1][name]


def info(name: str) -> Callable[[dict[str, Any]], float]:
    """Return what reads a cost of a run."""
    return lambda line: line["train_info"][name]


def mean(runs: Iterable[dict[str, Any]], of: Callable[[dict[str, Any]], float]) -> float:
    """Return the mean of something over runs."""
    return statistics.mean(map(of, runs))


def shown(runs: list[dict[str, Any]] | None, of: Callable[[dict[str, Any]], float]) -> str:
    """Return mean, deviation and number of runs; a dash where there is none."""
    if not runs:
        return "-"
    spread = f" ± {statistics.stdev(map(of, runs)):.1f} ({len(runs)})" if len(runs) > 1 else ""
    return f"{mean(runs, of):.1f}{spread}"


def accuracies(runs: Runs, methods: list[str], tasks: list[str], common: list[str]) -> str:
    """Return the table of accuracies, and of balanced ones where a class is more frequent than the others."""
    rows = [[task, PROBES.get(task) or "-", *(shown(runs.get((m, task)), metric("accuracy")) for m in methods)]
            for task in tasks]  # fmt: skip
    for task in tasks:
        some = next(runs[m, task][0] for m in methods if (m, task) in runs)
        if metric("largest class")(some) * some["meta_info"]["dataset_info"]["classes"] > 120:
            cells = [shown(runs.get((m, task)), metric("balanced accuracy")) for m in methods]
            rows.append([f"{task}, balanced", "-", *cells])
    if common:
        means = [statistics.mean(mean(runs[m, task], metric("accuracy")) for task in common) for m in methods]
        rows.append([f"mean of {len(common)}", "-", *(f"{value:.1f}" for value in means)])
    return markdown_table(["accuracy, %", "probe, 128 px", *methods], rows)


def costs(runs: Runs, methods: list[str], common: list[str]) -> str:
    """Return the table of costs: the mean over the tasks that all methods have, or over its own if there is none."""
    rows = []
    for method in methods:
        found = [line for (m, task), lines in runs.items() if m == method and (task in common or not common)
                 for line in lines]  # fmt: skip
        numbers = [mean(found, info(name)) for name in ("num_trainable_params", "file_size", "train_time")]
        memory = mean(found, info("accelerator_memory_max"))
        rows.append([method, *(f"{number:,.0f}" for number in numbers), f"{memory / 1e6:,.0f}"])
    return markdown_table(["method", "trained parameters", "bytes a task", "seconds", "peak memory, MB"], rows)


def rates(lines: list[dict[str, Any]]) -> str:
    """Return the table of the rates that were chosen, each with the accuracy on held-out images of all three."""
    rows = []
    tested = grouped(lines)
    for (method, task), trials in grouped(lines, tested=False).items():
        if (method, task) in tested:
            tried = sorted((line["run_info"]["train_config"]["lr"], metric("accuracy")(line)) for line in trials)
            chosen = tested[method, task][0]["run_info"]["train_config"]["lr"]
            rows.append([method, task, f"{chosen:g}", ", ".join(f"{lr:g}: {value:.1f}" for lr, value in tried)])
    return markdown_table(["method", "task", "chosen", "rate: accuracy on held-out images, %"], rows)


def findings(runs: Runs, methods: list[str]) -> str:
    """Return how far norm+head is from the head alone and from whole fine-tuning, on the tasks that both have."""
    texts = []
    for other in ("head", "norm", "lora", "whole"):
        both = [task for method, task in runs if method == "norm+head" and (other, task) in runs]
        if both and other in methods:
            differences = [mean(runs["norm+head", t], metric("accuracy")) - mean(runs[other, t], metric("accuracy"))
                           for t in both]  # fmt: skip
            size = [statistics.mean(mean(runs[m, t], info("file_size")) for t in both) for m in ("norm+head", other)]
            texts.append(
                f"- `norm+head` is {statistics.mean(differences):+.1f} points against `{other}`, the mean of "
                f"{len(both)} tasks ({min(differences):+.1f} to {max(differences):+.1f}),\n"
                f"  with {size[0] / size[1]:.2f} times the bytes."
            )
    return "\n".join(texts)


def missing(runs: Runs) -> str:
    """Return which of the planned runs have not been done."""
    lacking: dict[tuple[str, int], list[str]] = {}
    for method, wanted in PLANNED.items():
        for task in PROBES:
            if count := max(0, wanted - len(runs.get((method, task), []))):
                lacking.setdefault((method, count), []).append(task)
    if not lacking:
        return "All planned runs are done."
    rows = [[method, count, ", ".join(tasks)] for (method, count), tasks in lacking.items()]
    return "Planned and not done yet:\n\n" + markdown_table(["method", "seeds", "tasks"], rows)


def section(lines: list[dict[str, Any]]) -> str:
    """Return the part of the page that is written from the lines, a part for each backbone."""
    texts = []
    for model in dict.fromkeys(line["run_info"]["train_config"]["model"] for line in lines):
        own = [line for line in lines if line["run_info"]["train_config"]["model"] == model]
        if not (runs := grouped(own)):
            continue
        methods = [method for method in METHODS if any(m == method for m, _ in runs)]
        tasks = [task for task in PROBES if any(t == task for _, t in runs)]
        common = [task for task in tasks if all((m, task) in runs for m in methods)]
        first = next(iter(runs.values()))[0]
        recipe, ran_on = first["run_info"]["train_config"], first["meta_info"]
        about = f"{recipe['image_size']} px, {recipe['epochs']} epochs"
        machine = f"{ran_on['system_info']['threads']} thread of {ran_on['system_info']['name']}"
        texts += [
            f"## {model}", f"{about}, {machine}, torch {ran_on['package_info']['torch']}.",
            "### Accuracy", accuracies(runs, methods, tasks, common), findings(runs, methods),
            "### Cost", costs(runs, methods, common), "### Learning rates", rates(own),
            "### What was cut", missing(runs),
        ]  # fmt: skip
    return "\n\n".join(text for text in texts if text)


def figure(lines: list[dict[str, Any]], file: Path) -> None:
    """Draw accuracy against bytes."""
    points: dict[str, dict[str, tuple[float, float]]] = {}
    for (method, task), found in grouped(lines).items():
        points.setdefault(method, {})[task] = mean(found, info("file_size")), mean(found, metric("accuracy"))
    plots.save(file, [partial(panel, points=points)])


def panel(ax: Any, points: Mapping[str, Mapping[str, tuple[float, float]]]) -> None:
    """Draw the tasks of each method, and their mean."""
    for color, (method, measured) in zip(plots.COLORS, points.items(), strict=False):
        sizes, values = zip(*measured.values(), strict=True)
        ax.plot(sizes, values, "o", color=color, markersize=3, alpha=0.6)
        middle = statistics.geometric_mean(sizes), statistics.mean(values)
        ax.plot(*middle, "D", color=color, markersize=8, markeredgecolor="black", label=method)
    ax.set_xscale("log")
    ax.set_xlabel("bytes a task")
    ax.set_ylabel("test accuracy, %")


def main() -> None:
    """Write the page and the figure."""
    if sys.argv[1:]:
        FILE.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(sys.argv[1], FILE)
    lines = read()
    write_section(PAGE, "tasks", section(lines))
    figure(lines, FIGURE)


if __name__ == "__main__":
    main()
