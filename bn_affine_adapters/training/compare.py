"""Compare methods of fine-tuning: tasks x backbones x methods x seeds, one JSON line for each training.

    bn-adapters compare TASK ... [key=value ...] [--methods norm+head,head,whole,lora] [--seeds 3] [--results FILE]

A TASK is a folder or a Hub id. key=value arguments change the recipe of all runs. The learning rate of each task,
backbone and method is the best of three on a fifth of the training images, held out, after a third of the epochs. Then
all training images train for all epochs, and the test split is used once. More seeds keep the rate of the first. The
same command goes on where it was stopped: what has a line in FILE is done.

Example:
  bn-adapters compare data/flowers data/signs --methods norm+head,head epochs=10
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ..errors import ConfigError, DivergedError, nearest_name
from ..sharing.folder import try_writing
from .lines import append, mend
from .recipe import Recipe, check_values, read_recipe, recorded, run_key
from .scripts import provenance, run_script

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .loop import Training

STEPS = (1 / 3, 1.0, 3.0)  # the rates that are tried, over the method's usual one
PART = 5  # a fifth of the training images is held out, and a third of the epochs trained, to choose a rate
RANK = 4  # of LoRA: about as many bytes as the norm layers of an EfficientNet


class Method(NamedTuple):
    """A way to fine-tune: what it changes in the recipe, its rate over the recipe's, what it makes of the network."""

    changes: dict[str, Any]
    scale: float = 1.0
    adapt: Callable[[Any], Any] | None = None  # networks; this file is read without torch


def lora(network: "nn.Module") -> "nn.Module":
    """Return a network with PEFT's LoRA beside every linear layer and ungrouped convolution; the head trains whole."""
    from peft import LoraConfig, get_peft_model
    from torch import nn

    from ..norms.find import head_layers

    heads = [*head_layers(network)]
    layers = {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    targets = [name for name, m in layers.items() if getattr(m, "groups", 1) == 1 and name not in heads]
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, modules_to_save=heads)
    return get_peft_model(network, config)


def ln_tuning(network: "nn.Module") -> "nn.Module":
    """Return a network with PEFT's LN tuning of every norm layer; the head trains too."""
    from peft import LNTuningConfig, get_peft_model

    from ..norms.find import head_layers, norm_layers

    config = LNTuningConfig(target_modules=[*norm_layers(network)], modules_to_save=[*head_layers(network)])
    return get_peft_model(network, config)


def biases(network: "nn.Module") -> "nn.Module":
    """Freeze a network but for its biases, betas included, and its head."""
    from ..norms.find import head_layers

    heads = tuple(f"{name}." for name in head_layers(network))
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.endswith("bias") or name.startswith(heads))
    return network


_PLAIN = {"condition": "all", "lean": None, "running_statistics": "update"}
_FEATURES = {"flip": False, "crop_padding": 0, "running_statistics": "frozen"}  # computed once for each image
METHODS = {
    "norm": Method({"condition": "bn"}),  # the new head stays as it was drawn
    "norm+head": Method({"condition": "bn+head"}),
    "head": Method({"condition": "head", "lean": "exact", **_FEATURES}, 0.3),
    "whole": Method(_PLAIN, 0.1),
    "lora": Method(_PLAIN, 0.3, lora),
    "ln-tuning": Method(_PLAIN, 1.0, ln_tuning),
    "biases": Method(_PLAIN, 1.0, biases),
}


class Comparison:
    """The runs that are done, in a file of lines, and how one more is done."""

    def __init__(self, results: Path) -> None:
        """Read what is done; a torn last line is removed.

        Raises:
            ConfigError: a line is not the result of a comparison.
        """
        self.results, self.done = results, {}
        try_writing(results, replaced=False)
        with results.open("a+b", buffering=0) as file:
            mend(file)
            file.seek(0)
            lines = file.read().decode().splitlines()
        for number, text in enumerate(lines, 1):
            try:
                line = json.loads(text)
                self.done[key_of(line["run_info"]["train_config"], line["run_info"]["method"])] = line
            except (ValueError, LookupError, TypeError) as error:
                do = "give a file that `bn-adapters compare` wrote"
                raise ConfigError(f"{results}, line {number}, is no run of it.", seen=text[:80], do=do) from error

    def rate(self, recipe: Recipe, method: str, images: int) -> float:
        """Return the rate, of three, that is best on held-out images; the first of two that are equally good."""
        usual = recipe.lr * METHODS[method].scale
        rates = [float(f"{usual * step:.3g}") for step in STEPS]
        trial = replace(recipe, held_out=max(1, images // PART), epochs=max(1, round(recipe.epochs / 3)))
        return max(rates, key=lambda rate: accuracy_of(self.line(replace(trial, lr=rate), method)))

    def line(self, recipe: Recipe, method: str) -> dict[str, Any]:
        """Return the line of a run, which is trained unless it is done."""
        key = key_of(recorded(recipe), method)
        if key not in self.done:
            self.done[key] = trained_line(recipe, method)
            append(self.results, self.done[key])
        return self.done[key]


def key_of(recipe: Mapping[str, Any], method: str) -> str:
    """Return what tells one run from another."""
    return run_key({**recipe, "method": method})


def accuracy_of(line: Mapping[str, Any]) -> float:
    """Return the accuracy of a run in %, -1 if it diverged."""
    return line["train_info"]["metrics"][-1].get("accuracy", -1.0)


def trained_line(recipe: Recipe, method: str) -> dict[str, Any]:
    """Train and test; return the line, in the layout of PEFT's method_comparison, with accuracy in %."""
    from .feed import Feed
    from .loop import Replicate, finish_epoch, prepare, train_epoch
    from .network import build_network, configuration, count, held_memory, most_memory
    from .train import start

    accelerator, begun = start(recipe), time.perf_counter()
    if accelerator.num_processes > 1:
        raise ConfigError("A comparison has one process.", seen=f"{accelerator.num_processes}", do="start one")
    feed, device, adapt = Feed(recipe, accelerator), accelerator.device.type, METHODS[method].adapt
    config = configuration(recipe, feed.label_names)
    network = build_network(recipe, config, feed)
    network = adapt(network) if adapt else network
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    training = prepare(recipe, accelerator, [Replicate(recipe, feed, config, network)])
    before = memory = held_memory(device)
    try:
        for epoch in range(recipe.epochs):
            losses = train_epoch(training, epoch)
            memory = most_memory(device)  # of training alone: evaluation has larger batches
            finish_epoch(training, epoch, losses)
        metrics, error = tested(training), ""
    except DivergedError as diverged:
        metrics, error = {}, str(diverged)
    trained, total = count(network)
    train_info = {
        "accelerator_memory_max": memory - before,
        "train_time": round(training.seconds, 2),
        "file_size": changed_bytes(network, buffers),
        "num_trainable_params": trained,
        "num_total_params": total,
        "status": "failed" if error else "success",
        "metrics": [*training.replicates[0].epochs, metrics],
    }
    total_time = round(time.perf_counter() - begun, 2)
    about = described(training, method)
    about["run_info"] |= {"total_time": total_time, "error_msg": error}
    return about | {"train_info": train_info}


def described(training: "Training", method: str) -> dict[str, Any]:
    """Return what of a line says which run it is, and what it ran on."""
    recipe, feed = recorded(training.recipe), training.replicates[0].feed
    ran_on, task = provenance(training.accelerator), Path(training.recipe.dataset).name
    counts = {"train": len(feed.train), "test": len(feed.test), "classes": len(feed.label_names)}
    return {
        "run_info": {
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "experiment_name": f"{method}/{training.recipe.model}/{task}",
            "method": method,
            "task": task,
            "train_config": recipe,
        },
        "meta_info": {
            "dataset_info": {**counts, "split": feed.test.name},
            "package_info": {**ran_on["versions"], "commit": ran_on["commit"]},
            "system_info": ran_on["hardware"],
        },
    }


def tested(training: "Training") -> dict[str, float]:
    """Return the accuracy on the test split in %, the mean of that of each class, and the largest class's share."""
    import torch

    model = training.model.eval()
    feed = training.replicates[0].feed
    with torch.no_grad():
        pairs = [(model(batch.images).argmax(1), batch.labels) for batch in feed.evaluation()]
    predictions, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    right, classes = (predictions == labels).float(), labels.unique()
    found = {
        "accuracy": right.mean().item(),
        "balanced accuracy": torch.stack([right[labels == each].mean() for each in classes]).mean().item(),
        "largest class": (labels == labels.mode().values).float().mean().item(),
    }
    return {name: round(100 * value, 3) for name, value in found.items()}


def changed_bytes(network: "nn.Module", before: "Mapping[str, torch.Tensor]") -> int:
    """Return the size, as a safetensors file, of what a task has of its own: what trained, and statistics that changed.

    PEFT does not save the running statistics beside its LoRA, and an adapter of a head alone holds the norm layers too.
    """
    import torch
    from safetensors.torch import save

    own = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
    own |= {name: each for name, each in network.named_buffers() if not torch.equal(each.cpu(), before[name])}
    return len(save({name: each.contiguous() for name, each in own.items()}))


def planned(base: Recipe, tasks: Sequence[str], backbones: Sequence[str], methods: Sequence[str]) -> list[Any]:
    """Return (recipe, method, training images) of each method, backbone and task, all checked before one is trained."""
    from .feed import load_data
    from .network import check_buildable

    never = {"results": None, "checkpoint_every": 0, "checkpoint_every_steps": 0, "held_out": 0, "resume": False}
    runs = []
    for method in methods:
        if method not in METHODS:
            seen = f"{method!r}{nearest_name(method, METHODS)}"
            raise ConfigError("There is no such method.", seen=seen, do=f"choose from {', '.join(METHODS)}")
        for backbone in backbones:
            recipe = replace(base, **{**never, **METHODS[method].changes, "model": backbone, "eval_every": base.epochs})
            check_values(recipe)
            check_buildable(recipe)
            runs += [(replace(recipe, dataset=task), method) for task in tasks]
    images = {task: len(load_data(replace(base, dataset=task, held_out=0))[0]) for task in tasks}
    return [(recipe, method, images[recipe.dataset]) for recipe, method in runs]


@click.command(help=__doc__)
@click.argument("words", nargs=-1, required=True, metavar="TASK ... [key=value ...]")
@click.option("--config", default="finetune", show_default=True, help="The recipe of all runs.")
@click.option("--methods", default="norm+head,head", show_default=True, help=", ".join(METHODS))
@click.option("--backbones", help="Names of timm, with commas; by default the recipe's.")
@click.option("--seeds", default=1, type=click.IntRange(1), show_default=True, help="Orders of the images.")
@click.option("--results", default="runs/compare.jsonl", show_default=True, type=click.Path(path_type=Path))
def command(words: tuple[str, ...], config: str, methods: str, backbones: str | None, seeds: int, **to: Path) -> None:
    """Do the runs that are not done, the first seed of all before the second; print a line for each."""
    tasks = [word for word in words if "=" not in word]
    if not tasks:
        raise ConfigError("There is no task.", seen=" ".join(words), do="name a folder of images or a Hub id first")
    base = read_recipe(["--config", config, *(word for word in words if "=" in word)], Path(config))
    runs = planned(base, tasks, (backbones or base.model).split(","), methods.split(","))
    comparison = Comparison(to["results"])
    for seed in range(seeds):
        for recipe, method, images in runs:
            chosen = replace(recipe, lr=comparison.rate(recipe, method, images))
            seeds_of = {"data_seed": base.data_seed + seed, "seed": None if base.seed is None else base.seed + seed}
            line = comparison.line(replace(chosen, **seeds_of), method)
            click.echo(f"{line['run_info']['experiment_name']}, seed {seed}, lr {chosen.lr}: {accuracy_of(line):.2f} %")


def main() -> None:
    """Run from the command line."""
    run_script(command)


if __name__ == "__main__":
    main()
