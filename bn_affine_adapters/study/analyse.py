"""Analyse a trained network: gamma and beta, accuracy with small gammas set to zero, dead activations, on a test split.

    bn-adapters analyse [ADAPTER] [dataset=digits] [key=value ...]

ADAPTER is a folder or a Hub id, as for `bn-adapters validate`, or the folder of a plain timm network, config.json and
model.safetensors, as `export` writes it. Image size, mean and std are its own. Prints one JSON line, and writes it to
output=FILE. One process.

Example:
  bn-adapters analyse runs/digits/adapter

Keys with their defaults and ranges:
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, NetworkError, RebuildError, reading
from ..sharing.folder import try_writing, write_file
from ..sharing.results import strict_json
from ..training.options import AdapterOptions
from ..training.scripts import data_options, load_adapter, run_script
from ..training.scripts import read_options as read

if TYPE_CHECKING:
    from torch import nn

    from ..training.feed import Feed

DIGITS = 4  # after the point, of every number in the line


@dataclass
class Options(AdapterOptions):
    """Every key: the network, its base if it has one, the data, and what to analyse."""

    clamp: list[float] = field(default_factory=lambda: [0.01, 0.05])  # thresholds of |gamma|
    layers: bool = False  # also mean, std and near zero of each layer: about 130 bytes a layer
    redraw: int | None = None  # a seed: also the accuracy with one layer's weights drawn from it, for each layer
    output: str | None = None


def is_plain(adapter: str) -> bool:
    """Tell whether this is a folder with a plain timm network, and no adapter."""
    with reading(adapter):
        here = {path.name for path in Path(adapter).iterdir()} if Path(adapter).is_dir() else set()
    return {"config.json", "model.safetensors"} <= here and "adapter_config.json" not in here


def own(adapter: str) -> dict[str, Any]:
    """Return the data options in the network's own configuration."""
    if is_plain(adapter):
        from ..training.feed import own_options

        return own_options(plain_config(adapter)["pretrained_cfg"])
    return data_options(adapter)


def plain_config(adapter: str) -> dict[str, Any]:
    """Return what the config.json of a plain timm network holds."""
    with reading(file := Path(adapter, "config.json")):
        return json.loads(file.read_text(encoding="utf-8"))


def read_options(arguments: list[str]) -> Options:
    """Merge the network's own data configuration with the key=value arguments."""
    return read(arguments, Options, "bn-adapters analyse", __doc__, own)


def load(options: Options, feed: "Feed") -> "nn.Module":
    """Return the network, wrapped or plain; refuse one with other classes than the data."""
    if is_plain(options.adapter):
        from ..training.data import check_classes

        if names := plain_config(options.adapter).get("label_names"):
            feed.number_classes(names)
        model = load_plain(Path(options.adapter).resolve())
        check_classes(feed.test, model.num_classes)
        return model.to(feed.accelerator.device)
    return load_adapter(options, feed)


def load_plain(folder: Path) -> Any:
    """Return the network that timm loads from a folder."""
    import timm

    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:  # every architecture takes arguments and converts tensors in its own way
        raise RebuildError(
            f"timm does not load the network in {folder}.",
            seen=f"{type(error).__name__}: {error}",
            do="give a folder that bn_affine_adapters.export(model, folder) or timm's save_for_hf wrote",
        ) from error


def analyse(model: "nn.Module", feed: "Feed", options: Options, top1: float) -> dict[str, Any]:
    """Return the result line's "analysis"; ``top1`` is the accuracy without clamping."""
    from ..norms.copies import evaluation_copy
    from ..training.feed import accuracy
    from .networks import clamped, distribution, norm_values, redrawn, weight_layers

    analysis: dict[str, Any] = {"top1": top1}
    for kind, values in norm_values(model).items():
        analysis[kind] = distribution(values, digits=DIGITS)
        if not options.layers:
            analysis[kind].pop("layers", None)
    analysis["clamped"] = {}
    for threshold in options.clamp:
        with clamped(model, threshold) as count:
            top1 = accuracy(evaluation_copy(model), feed)["top1"]
        analysis["clamped"][f"{threshold:g}"] = {"set": count, "top1": round(top1, DIGITS)}
    if options.redraw is not None:
        analysis["redrawn"] = {}
        for layer in weight_layers(model):
            with redrawn(model, layer, options.redraw):
                analysis["redrawn"][layer] = round(accuracy(evaluation_copy(model), feed)["top1"], DIGITS)
    try:
        analysis["dead"] = dead(model, feed)
    except NetworkError as error:
        print(error, file=sys.stderr)
        analysis["dead"] = None
    return analysis


def dead(model: "nn.Module", feed: "Feed") -> dict[str, Any]:
    """Return the share of dead channels, in %, at every threshold of the grid and at the paper's."""
    from .networks import DEAD, GRID, dead_activations, dead_share

    counts = dead_activations(model, (batch.images for batch in feed.evaluation()))
    share = [round(value, DIGITS) for value in dead_share(counts)]
    channels = sum(len(entry["zeros"]) for entry in counts.values())
    return {"thresholds": list(GRID), "share": share, f"{DEAD:g}": share[GRID.index(DEAD)], "channels": channels}


def run(options: Options) -> dict[str, Any]:
    """Load, evaluate, analyse; return the result line."""
    import torch
    from accelerate import Accelerator

    from ..norms.copies import evaluation_copy
    from ..training.feed import Feed, accuracy

    if options.output:
        try_writing(Path(options.output), replaced=True)
    accelerator = Accelerator()
    if accelerator.num_processes > 1:  # their shares of the last batch overlap, and would be counted twice
        seen, do = (
            f"{accelerator.num_processes} processes",
            "start it alone, without accelerate launch",
        )
        raise ConfigError("Activations are counted by one process.", seen=seen, do=do)
    feed = Feed(options, accelerator)
    model = load(options, feed).to(memory_format=feed.format)
    scores = {key: round(value, DIGITS) for key, value in accuracy(evaluation_copy(model), feed).items()}
    with torch.inference_mode():
        result = {**scores, "images": len(feed.test.dataset), "analysis": analyse(model, feed, options, scores["top1"])}
    line = strict_json(result)
    print(line)
    if options.output:
        write_file(Path(options.output), f"{line}\n".encode())
    return result


def command(arguments: list[str]) -> None:
    """Analyse as the arguments ask, and print the result line."""
    run(read_options(arguments))


def main() -> None:
    """Run from the command line."""
    run_script(command)


if __name__ == "__main__":
    main()
