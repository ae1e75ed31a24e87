"""Items that train in full: `bn-adapters train` in a process of its own, which goes on from its checkpoint.

The first epochs of a run are its measured cost. If it does not fit into the time left and another run would, by its
operations, it is stopped then, and the other begins. What is left at the end goes on with the first that was stopped.
"""

import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...errors import NetworkError
from ...training.network import forward_cost
from ...training.recipe import Recipe, find_config, read_recipe
from ...training.sweep import STARTER, measured_cost
from .options import NotEnoughTime, Options

Run = tuple[str, str, int]  # network, condition, replicates side by side

# What a claim gains most from comes first. Small networks leave a GPU idle: five replicates in one process.
RUNS: dict[str, list[Run]] = {
    "cifar10": [
        ("cifar_resnet14", "bn", 5),
        ("cifar_resnet14", "random2", 5),
        ("cifar_resnet14", "all", 5),
        ("cifar_resnet56", "bn", 1),
        ("cifar_wrn14_2", "bn", 1),
        ("cifar_resnet110", "bn", 1),
        ("cifar_resnet32", "bn", 1),
        ("cifar_resnet14", "bn+shortcut+head", 5),
        ("cifar_resnet14", "shortcut+head", 5),
        ("cifar_wrn14_4", "bn", 1),
    ],
    "deep": [("cifar_resnet218", "bn", 1), ("cifar_resnet434", "bn", 1)],
}
TOY: dict[str, list[Run]] = {
    "cifar10": [("cifar_resnet14", "bn", 2), ("cifar_resnet14", "random2", 1)],
    "deep": [("cifar_resnet20", "bn", 1)],
}
EPOCH = re.compile(r"^epoch (\d+)/(\d+)  ", re.MULTILINE)  # as training says it
POLL = 0.2  # seconds
REST = "rest"


@dataclass(frozen=True)
class Plan:
    """A run: the arguments of `bn-adapters train`, the recipe that they give, the operations of its forward passes."""

    words: list[str]
    recipe: Recipe
    work: float


def items(part: str, options: Options) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the runs of a part, and what uses the time that they leave."""
    names = [named(run) for run in (TOY if options.toy else RUNS)[part]]
    return {**{name: partial(train, part, options, name) for name in names}, REST: partial(go_on, part, options)}


def named(run: Run) -> str:
    """Return the name of a run."""
    return "{} {} x{}".format(*run)


def planned(part: str, options: Options) -> dict[str, Plan]:
    """Return the runs of a part by name."""
    plans = {}
    for run in (TOY if options.toy else RUNS)[part]:
        words = arguments(options, *run)
        recipe = read_recipe(words, find_config("digits"))
        plans[named(run)] = Plan(words, recipe, forward_cost(recipe) * recipe.replicates * recipe.epochs)
    return plans


def arguments(options: Options, model: str, condition: str, replicates: int) -> list[str]:
    """Return the arguments of `bn-adapters train`: the paper's recipe; at toy size, two epochs of small digits."""
    toy = ["digits", "image_size=8", "epochs=2", "milestones=[1]", "threads=1"]
    recipe = toy if options.toy else ["cifar10", f"dataset={options.data}", "eval_every=20"]
    if options.device == "cuda":
        recipe.append("compile=reduce-overhead")
    what = [f"model={model}", f"condition={condition}", f"replicates={replicates}"]
    folder, results = Path(options.out, "runs", f"{model}-{condition}"), Path(options.out, "results.jsonl")
    return [*recipe, *what, f"output_dir={folder}", f"results={results}", "checkpoint_every=1", "resume=true"]


def train(part: str, options: Options, name: str, to_the_end: bool = True) -> dict[str, Any]:
    """Train a run or go on with it; return its accuracies and its cost.

    ``to_the_end``: one that would not end in time makes room for others that fit; else it goes on as long as it can.

    Raises:
        NotEnoughTime: it was not begun, or stopped; its checkpoint stays.
        NetworkError: training failed.
    """
    plans, lines = planned(part, options), {name: line for (of, name), line in options.read().items() if of == part}
    plan = plans[name]
    known = {key: lines[name][key] for key in ("epoch", "epoch_seconds") if key in lines.get(name, {})}
    if to_the_end and (needs := expected(name, plans, lines)) > options.left:
        raise NotEnoughTime("skipped", **known, left_seconds=round(needs, 1))
    left = [other for key, other in plans.items() if key != name and lines.get(key, {}).get("state") != "done"]
    smallest = min((other.work / plan.work for other in left), default=math.inf) if to_the_end else math.inf
    found = watch(plan, options, smallest)
    paths = sorted(Path(plan.recipe.output_dir).rglob("result.json"))
    return {"top1": [json.loads(path.read_text(encoding="utf-8"))["top1"] for path in paths], **found}


def expected(name: str, plans: Mapping[str, Plan], lines: Mapping[str, Any]) -> float:
    """Return the seconds that a run still takes: by its own epochs, or at least, by those of other runs; 0 if unknown.

    ``lines``: the last line of each run, by name.
    """
    epochs, own = plans[name].recipe.epochs, lines.get(name, {})
    if "epoch_seconds" in own:
        return own["epoch_seconds"] * (epochs - own["epoch"])
    measured = {key: lines[key]["epoch_seconds"] for key in plans if "epoch_seconds" in lines.get(key, {})}
    work = {key: plan.work / plan.recipe.epochs for key, plan in plans.items()}
    return min((seconds * work[name] / work[key] * epochs for key, seconds in measured.items()), default=0.0)


def watch(plan: Plan, options: Options, smallest: float) -> dict[str, Any]:
    """Run training until it ends or has to be stopped; return its cost.

    ``smallest``: the work of the smallest run that is left, as a share of this one's.

    Raises:
        NotEnoughTime: it was stopped.
        NetworkError: it failed.
    """
    path, epochs = Path(f"{plan.recipe.output_dir}.log"), plan.recipe.epochs
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", STARTER, "-m", "bn_affine_adapters.training.train", *plan.words]
    with path.open("ab") as file:
        begin, environment = file.tell(), os.environ | {"TQDM_DISABLE": "1"}
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    seen: list[tuple[float, int]] = []  # when each epoch ended
    try:
        while child.poll() is None:
            time.sleep(POLL)
            said = path.read_bytes()[begin:].decode(errors="replace")
            epoch = max((int(found[1]) for found in EPOCH.finditer(said)), default=0)
            if epoch > (seen[-1][1] if seen else 0):
                seen.append((time.time(), epoch))
            known = cost(seen, epochs)
            if options.left < 1:
                raise NotEnoughTime("cut", **known)
            if known.get("left_seconds", 0) > options.left > smallest * known["epoch_seconds"] * epochs:
                raise NotEnoughTime("skipped", **known)
    finally:
        child.kill()
        child.wait()
    if child.returncode:
        said = path.read_bytes()[begin:].decode(errors="replace")
        status = f"exit status {child.returncode}: {said[-500:]}"
        raise NetworkError("Training failed.", seen=status, do=f"read {path}")
    return cost(seen, epochs)


def cost(seen: list[tuple[float, int]], epochs: int) -> dict[str, float]:
    """Return the last epoch, the seconds of one, and those that the others take, if three ended: the first compiles.

    >>> cost([(50.0, 1), (52.0, 2), (54.0, 3)], 10)
    {'epoch': 3, 'epoch_seconds': 2.0, 'left_seconds': 14.0}
    """
    if len(seen) < 3:
        return {}
    epoch, each = seen[-1][1], statistics.median((b - a) / (y - x) for (a, x), (b, y) in pairwise(seen[1:]))
    return {"epoch": epoch, "epoch_seconds": round(each, 3), "left_seconds": round(each * (epochs - epoch), 1)}


def go_on(part: str, options: Options) -> dict[str, Any]:
    """Go on with the first run that is not finished, as far as the time goes."""
    lines = options.read()
    for name in planned(part, options):
        if lines.get((part, name), {}).get("state") == "skipped":
            try:
                options.note(part, name, "done", **train(part, options, name, to_the_end=False))
            except NotEnoughTime as stopped:
                options.note(part, name, stopped.state, **stopped.found)
                raise NotEnoughTime("cut", run=name) from stopped
    return {}


def estimates(part: str, options: Options) -> dict[str, str]:
    """Return what each run takes at most, from a measured eager step of one replicate."""
    from accelerate import Accelerator

    accelerator, found = Accelerator(), {}
    for name, plan in planned(part, options).items():
        recipe = replace(plan.recipe, compile=None)
        _, steps, seconds = measured_cost(recipe, accelerator)
        total = steps * recipe.epochs * recipe.replicates * seconds
        about = f"{recipe.replicates} x {recipe.epochs} x {steps} steps of {1000 * seconds:.1f} ms"
        found[name] = f"{total / 60:,.1f} minutes, eager: {about}"
    return found
