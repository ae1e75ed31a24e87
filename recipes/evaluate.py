"""Measure a saved adapter's accuracy: rebuild its network, verify it, run a test split through it.

    accelerate launch recipes/evaluate.py adapter=runs/digits/adapter [dataset=digits] [key=value ...]

The adapter is a folder or a Hub id; image size, mean and std are its own. One on pretrained weights that does not
name them on the Hub needs pretrained_file=FILE or pretrained=true. `--help` lists every key. Prints one JSON line.
"""

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

# Else recipes/evaluate.py hides the library `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import timm
import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from bn_affine_adapters import BNAdapterError, BNOnlyConfig, load_bn_only_model
from bn_affine_adapters.config import check_keys
from bn_affine_adapters.data import check_classes
from bn_affine_adapters.errors import ConfigError
from bn_affine_adapters.feed import DataOptions, Feed, accuracy
from bn_affine_adapters.files import check_files, read_config
from bn_affine_adapters.hub import fetch


@dataclass
class Options(DataOptions):
    """Every key: the adapter, its base if it has one, and the data."""

    adapter: str = "runs/digits/adapter"
    pretrained: bool = False
    pretrained_file: str | None = None
    precision: str = "no"


def read_options(arguments: list[str]) -> Options:
    """Merge the adapter's own data configuration with the key=value arguments."""
    if "-h" in arguments or "--help" in arguments:
        print(__doc__, *(f"  {f.name}={json.dumps(getattr(Options(), f.name))}" for f in fields(Options)), sep="\n")
        raise SystemExit(0)
    try:
        given = OmegaConf.from_cli(arguments)
        check_keys(dict(given), {f.name for f in fields(Options)}, "evaluate.py")
        folder = fetch(given.get("adapter", Options.adapter))
        check_files(folder)
        data = read_config(folder).data_config or {}
        own: dict[str, Any] = {key: list(data[key]) for key in ("mean", "std") if key in data}
        if "input_size" in data:
            own["image_size"] = data["input_size"][-1]
        return Options(**OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(Options), own, given)))  # type: ignore[arg-type]  # str keys
    except OmegaConfBaseException as error:
        raise ConfigError(
            "The arguments cannot be read.", seen=str(error).splitlines()[0], do="recipes/evaluate.py --help"
        ) from error


def base_of(options: Options, config: BNOnlyConfig) -> nn.Module | None:
    """Return the pretrained base that the adapter's configuration names, or None for a seeded one."""
    if config.seed is not None or not (options.pretrained or options.pretrained_file):
        return None
    overlay = {"pretrained_cfg_overlay": {"file": options.pretrained_file}} if options.pretrained_file else {}
    return timm.create_model(config.architecture, pretrained=True, **config.model_args, **overlay)


def run(options: Options) -> dict[str, Any]:
    """Rebuild, verify, evaluate; return the result line."""
    accelerator = Accelerator(mixed_precision=options.precision)
    config = read_config(fetch(options.adapter))
    feed = Feed(options, accelerator)
    check_classes(feed.test, config.model_args.get("num_classes", len(feed.label_names)))
    model = load_bn_only_model(options.adapter, base_of(options, config), device=accelerator.device)
    with torch.inference_mode():
        scores = accuracy(model.to(memory_format=feed.format), feed)
    result = {**{k: round(v, 4) for k, v in scores.items()}, "images": len(feed.test.dataset), "seed": config.seed}
    accelerator.print(json.dumps(result))
    return result


if __name__ == "__main__":
    try:
        run(read_options(sys.argv[1:]))
    except BNAdapterError as error:
        sys.exit(f"{type(error).__name__}: {error}")
