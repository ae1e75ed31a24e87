"""The process that does a part: its items one after another, a line when each begins and when it has ended.

    python -m bn_affine_adapters.study.gpu.child PART OPTIONS ITEM ...

An item that fails does not end the others. If the device does not answer after it, this process ends, and the parent
starts another for the items that are left.
"""

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from . import checks, runs, steps
from .options import NotEnoughTime, Options

Items = Callable[[Options], dict[str, Callable[[], dict[str, Any]]]]

ITEMS: dict[str, Items] = {
    "checks": checks.items,
    "tests": checks.files,
    "steps": steps.items,
    "cifar10": partial(runs.items, "cifar10"),
    "deep": partial(runs.items, "deep"),
    "feed": steps.feeds,
}


def do(options: Options, part: str, name: str, item: Callable[[], dict[str, Any]]) -> None:
    """Do an item and write its lines."""
    options.note(part, name, "started")
    start = time.perf_counter()
    try:
        state, found = "done", item()
    except NotEnoughTime as stopped:
        state, found = stopped.state, stopped.found
    except Exception as error:  # whatever it is, the other items are done
        traceback.print_exc()
        memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "t allocate memory" in str(error)
        state, found = "failed", {"error": f"{type(error).__name__}: {error}"[:1000], "out_of_memory": memory}
    options.note(part, name, state, seconds=round(time.perf_counter() - start, 2), **found)


def clean(device: str) -> None:
    """Free what an item held; raise if the device does not answer any more."""
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def main(part: str, options: str, *names: str) -> None:
    """Do the items of a part."""
    told = Options(**json.loads(options))
    if told.device == "cuda":
        torch.cuda.init()
    items = ITEMS[part](told)
    for name in names:
        do(told, part, name, items[name])
        clean(told.device)


if __name__ == "__main__":
    main(*sys.argv[1:])
