"""Measure a saved adapter's accuracy: rebuild its network, verify it, run a test split through it.

    bn-adapters validate [ADAPTER] [dataset=digits] [key=value ...] [--json]

ADAPTER is a folder or a Hub id; image size, mean and std are its own. One on pretrained weights that does not name
them on the Hub needs pretrained_file=FILE or pretrained=true.
Several processes: accelerate launch -m bn_affine_adapters.training.validate ADAPTER [key=value ...]
Prints a summary, or with --json one JSON line.

Example:
  bn-adapters validate runs/digits/adapter

Keys and their defaults:
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from ..model.loading import load_bn_only_model
from ..sharing.folder import check_files, read_config
from ..sharing.hub import fetch
from . import scripts as runs
from .data import check_classes
from .feed import DataOptions, Feed, accuracy, own_options


@dataclass
class Options(DataOptions):
    """Every key: the adapter, its base if it has one, and the data."""

    adapter: str = "runs/digits/adapter"
    pretrained: bool = False
    pretrained_file: str | None = None
    precision: str = "no"


def read_options(arguments: list[str]) -> Options:
    """Merge the adapter's own data configuration with the key=value arguments."""

    def own(adapter: str) -> dict[str, Any]:
        check_files(folder := fetch(adapter))
        return own_options(read_config(folder).data_config or {})

    return runs.read_options(arguments, Options, "validate.py", __doc__, own)


def run(options: Options) -> dict[str, Any]:
    """Rebuild, verify, evaluate; return the accuracy, the number of images and the adapter's seed."""
    accelerator = Accelerator(mixed_precision=options.precision)
    config = read_config(fetch(options.adapter))
    feed = Feed(options, accelerator)
    check_classes(feed.test, config.model_args.get("num_classes", len(feed.label_names)))
    base = runs.given_base(config, options.pretrained, options.pretrained_file)
    model = load_bn_only_model(options.adapter, base, device=accelerator.device)
    with torch.inference_mode():
        scores = accuracy(model.to(memory_format=feed.format), feed)
    return {**{k: round(v, 4) for k, v in scores.items()}, "images": len(feed.test.dataset), "seed": config.seed}


def command(arguments: list[str]) -> None:
    """Measure as the arguments ask; print a summary, or with ``--json`` the result line."""
    options = read_options([word for word in arguments if word != "--json"])
    result = run(options)
    if PartialState().is_main_process:
        print(json.dumps(result) if "--json" in arguments else summary(options, result))


def summary(options: Options, result: dict[str, Any]) -> str:
    """Return what a person wants to know."""
    weights = "pretrained weights" if result["seed"] is None else f"the weights of seed {result['seed']}"
    return runs.table(
        {
            "accuracy": runs.accuracy_text(options, result["top1"], result["images"]),
            "adapter": f"{options.adapter}, on {weights}, verified",
        }
    )


def main() -> None:
    """Run from the command line."""
    runs.run_script(command)


if __name__ == "__main__":
    main()
