"""Measure a saved adapter's accuracy: rebuild its network, verify it, run a test split through it.

    accelerate launch recipes/validate.py adapter=runs/digits/adapter [dataset=digits] [key=value ...]

The adapter is a folder or a Hub id; image size, mean and std are its own. One on pretrained weights that does not
name them on the Hub needs pretrained_file=FILE or pretrained=true. `--help` lists every key. Prints one JSON line.
"""

import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from .. import BNAdapterError, load_bn_only_model
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

    return runs.read_options(arguments, Options, "evaluate.py", __doc__, own)


def run(options: Options) -> dict[str, Any]:
    """Rebuild, verify, evaluate; return the result line."""
    accelerator = Accelerator(mixed_precision=options.precision)
    config = read_config(fetch(options.adapter))
    feed = Feed(options, accelerator)
    check_classes(feed.test, config.model_args.get("num_classes", len(feed.label_names)))
    base = runs.given_base(config, options.pretrained, options.pretrained_file)
    model = load_bn_only_model(options.adapter, base, device=accelerator.device)
    with torch.inference_mode():
        scores = accuracy(model.to(memory_format=feed.format), feed)
    result = {**{k: round(v, 4) for k, v in scores.items()}, "images": len(feed.test.dataset), "seed": config.seed}
    accelerator.print(json.dumps(result))
    return result


def main() -> None:
    """Run from the command line."""
    try:
        run(read_options(sys.argv[1:]))
    except BNAdapterError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
