"""Items that train in full: `bn-adapters train` in a process of its own, which goes on from its checkpoint.

The first epochs of a run are its measured cost. A run that does not fit into the time left is stopped after them, and
the next one begins; what is left at the end goes on with the first that was stopped.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...errors import NetworkError
from ...training.recipe import Recipe, find_config, read_recipe
from ...training.sweep import STARTER, measured_cost, mend
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


def items(part: str, options: Options) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the runs of a part, and what uses the time that they leave."""
    runs = planned(part, options)
    return {**{name: partial(train, part, options, name) for name in runs}, REST: partial(go_on, part, options)}


def planned(part: str, options: Options) -> dict[str, list[str]]:
    """Return the arguments of each run of a part, by name."""
    runs = (TOY if options.toy else RUNS)[part]
    return {
        f"{model} {condition} x{count}": arguments(options, model, condition, count) for model, condition, count in runs
    }


def arguments(options: Options, model: str, condition: str, replicates: int) -> list[str]:
    """Return the arguments of `bn-adapters train`: the paper's recipe; at toy size, two epochs of small digits."""
    if options.toy:
        recipe = ["digits", "image_size=8", "epochs=2", "milestones=[1]", "threads=1"]
    else:
        recipe = ["cifar10", f"dataset={options.data}", "eval_every=20"]
    if options.device == "cuda":
        recipe.append("compile=reduce-overhead")
    folder = Path(options.out, "runs", f"{model}-{condition}")
    where = [
        f"output_dir={folder}",
        f"results={Path(options.out, 'results.jsonl')}",
        "checkpoint_every=1",
        "resume=true",
    ]
    return [*recipe, f"model={model}", f"condition={condition}", f"replicates={replicates}", *where]


def train(part: str, options: Options, name: str, to_the_end: bool = True) -> dict[str, Any]:
    """Train a run or go on with it; return its accuracies.

    Args:
        part: whose run it is.
        options: with the time at which the part ends.
        name: of the run.
        to_the_end: stop it if it would not end in time; otherwise only when the time is over.

    Raises:
        NotEnoughTime: it was stopped; its checkpoint stays.
        NetworkError: training failed.
    """
    words = planned(part, options)[name]
    recipe = read_recipe(words, find_config("digits"))
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    before = options.read().get((part, name), {})
    if to_the_end and before.get("left_seconds", 0) > options.left:
        raise NotEnoughTime(
            "skipped", **{key: before[key] for key in ("epoch", "epochs", "epoch_seconds", "left_seconds")}
        )
    if (lines := Path(str(recipe.results))).exists():
        mend(lines)
    start = time.time()
    status, log = watch(words, folder.with_suffix(".log"), recipe.epochs, options, to_the_end)
    if status:
        raise NetworkError(f"Training failed: {name}.", seen=f"exit status {status}: {log[-500:]}", do="read its log")
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("result.json"))]
    return {"top1": [result["top1"] for result in results], "wall_seconds": round(time.time() - start, 1)}


def watch(words: list[str], path: Path, epochs: int, options: Options, to_the_end: bool) -> tuple[int, str]:
    """Run training until it ends or has to be stopped; return its exit status and what it printed.

    Raises:
        NotEnoughTime: it was stopped.
    """
    command = [sys.executable, "-c", STARTER, "-m", "bn_affine_adapters.training.train", *words]
    environment = os.environ | {"TQDM_DISABLE": "1"}
    with path.open("ab") as file:
        begin = file.tell()
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment
        )
    seen: list[tuple[float, int]] = []  # when each epoch ended
    try:
        while child.poll() is None:
            time.sleep(POLL)
            epoch = max((int(found[1]) for found in EPOCH.finditer(path.read_bytes()[begin:].decode())), default=0)
            if epoch and (not seen or epoch > seen[-1][1]):
                seen.append((time.time(), epoch))
            known = cost(seen, epochs)
            if options.left < 1:
                raise NotEnoughTime("cut", epoch=epoch, epochs=epochs, **known)
            if to_the_end and known.get("left_seconds", 0) > options.left:
                raise NotEnoughTime("skipped", epoch=epoch, epochs=epochs, **known)
    finally:
        child.kill()
        child.wait()
    return child.returncode, path.read_bytes()[begin:].decode(errors="replace")


def cost(seen: list[tuple[float, int]], epochs: int) -> dict[str, float]:
    """Return the seconds of an epoch, and those that the epochs left take, once three have ended: the first compiles.

    >>> cost([(50.0, 1), (52.0, 2), (54.0, 3)], 10)
    {'epoch_seconds': 2.0, 'left_seconds': 14.0}
    """
    if len(seen) < 3:
        return {}
    each = statistics.median((b - a) / (y - x) for (a, x), (b, y) in pairwise(seen[1:]))
    return {"epoch_seconds": round(each, 3), "left_seconds": round(each * (epochs - seen[-1][1]), 1)}


def go_on(part: str, options: Options) -> dict[str, Any]:
    """Go on with the first run that is not finished, as far as the time goes."""
    lines = options.read()
    for name in planned(part, options):
        if lines.get((part, name), {}).get("state") == "skipped":
            try:
                found = train(part, options, name, to_the_end=False)
            except NotEnoughTime as stopped:
                options.note(part, name, stopped.state, **stopped.found)
                raise NotEnoughTime("cut", run=name) from stopped
            options.note(part, name, "done", **found)
    return {}


def estimates(part: str, options: Options) -> dict[str, str]:
    """Return what each run takes at most, from a measured eager step of one replicate."""
    from accelerate import Accelerator

    accelerator, found = Accelerator(), {}
    for name, words in planned(part, options).items():
        recipe: Recipe = read_recipe(words, find_config("digits"))
        recipe.compile = None
        _, steps, seconds = measured_cost(recipe, accelerator)
        total = steps * recipe.epochs * recipe.replicates * seconds
        about = f"{recipe.replicates} x {recipe.epochs} x {steps} steps of {1000 * seconds:.1f} ms"
        found[name] = f"{total / 60:.1f} minutes, eager: {about}"
    return found
