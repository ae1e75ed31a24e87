"""Train norm parameters of a network redrawn from a seed, and save them as an adapter.

    accelerate launch recipes/train.py [--config recipes/configs/NAME.yaml] [key=value ...]

Without --config: recipes/configs/digits.yaml, scikit-learn's handwritten digits, no download. `--help` lists every key.
Prints one JSON line: the recipe, seeds, versions, accuracy, seconds; writes it to OUTPUT/result.json.
"""

import json
import math
import os
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from .. import BNAdapterError, BNOnlyConfig, BNOnlyPeftModel
from ..deploy.exporting import export_network
from ..errors import ConfigError, OutputFolderError
from ..norms.statistics import sync_norms_
from ..sharing.results import RESULTS_NAME
from .features import head_only
from .feed import Feed, accuracy, side_by_side
from .network import build_model, configuration, count
from .recipe import Recipe, command, help_text, members, recorded, run_key
from .recipe import read_recipe as read
from .scripts import cores, provenance
from .stacked import Stacked

DEFAULT = Path(__file__).parent / "configs" / "digits.yaml"


def read_recipe(arguments: list[str]) -> Recipe:
    """Return the recipe that the command line asks for."""
    if "-h" in arguments or "--help" in arguments:
        print(__doc__, help_text(), sep="\n")
        raise SystemExit(0)
    return read(arguments, DEFAULT)


def prepare_output(recipe: Recipe) -> Path:
    """Return the output folder, refusing one that holds something unless asked to overwrite or resume."""
    output = Path(recipe.output_dir)
    if not (recipe.overwrite or recipe.resume) and output.is_dir() and any(output.iterdir()):
        raise OutputFolderError(
            f"{output} exists and is not empty.",
            seen=", ".join(sorted(path.name for path in output.iterdir())[:5]),
            do="choose another output_dir=, or overwrite=true, or resume=true",
        )
    return output


def lr_at(recipe: Recipe, step: int, steps: int) -> float:
    """Return the learning rate of an optimiser step, ``steps`` of which make an epoch."""
    warmup = recipe.warmup_epochs * steps
    factor = min(1.0, step / warmup) if warmup else 1.0
    if recipe.schedule == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * step / (recipe.epochs * steps)))
    drops = sum(step >= milestone * steps for milestone in recipe.milestones)
    return recipe.lr * factor * recipe.lr_decay**drops


@dataclass
class Replicate:
    """A run that has a network, a result line and a folder of its own, whether it trains alone or side by side."""

    recipe: Recipe
    feed: Feed
    config: BNOnlyConfig
    network: nn.Module
    epochs: list[dict[str, float]] = field(default_factory=list)
    first_losses: list[float] = field(default_factory=list)

    @property
    def history(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"epochs": self.epochs, "first_losses": self.first_losses}


def build(recipe: Recipe, accelerator: Accelerator) -> list[Replicate]:
    """Return the replicates of a recipe: the images decoded once, a network for each."""
    if recipe.replicates > 1 and accelerator.num_processes > 1:
        do = "one process, or replicates=1"
        raise ConfigError("Replicates side by side train in one process.", seen=f"{accelerator.num_processes}", do=do)
    first = Feed(recipe, accelerator)
    found = []
    for member in members(recipe):
        config = configuration(member, first)
        feed = first.reordered(member.data_seed) if recipe.replicates > 1 else first
        found.append(Replicate(member, feed, config, build_model(member, config, first)))
    return found


def train_epoch(
    model: nn.Module, optimizer: Any, replicates: list[Replicate], recipe: Recipe, accelerator: Accelerator, epoch: int
) -> list[list[float]]:
    """Train for one epoch; return the mean loss of every step, over all processes, for each replicate."""
    model.train()
    losses: list[torch.Tensor] = []
    feed, together = replicates[0].feed, len(replicates) > 1
    bar = tqdm(
        side_by_side([replicate.feed for replicate in replicates], epoch) if together else feed.epoch(epoch),
        desc=f"epoch {epoch + 1}/{recipe.epochs}",
        total=feed.steps * recipe.accumulation,
        unit="batch",
        mininterval=1.0,
        leave=False,
        disable=not accelerator.is_main_process,
    )
    for index, batch in enumerate(bar):
        step, part = divmod(index, recipe.accumulation)
        last = part == recipe.accumulation - 1
        if recipe.compile:
            torch.compiler.cudagraph_mark_step_begin()  # what the last step's graphs wrote may be overwritten
        with nullcontext() if last else accelerator.no_sync(model):
            logits, labels = model(batch.images), batch.labels
            pairs = zip(logits, labels, strict=True) if together else [(logits, labels)]
            each = (
                torch.stack([F.cross_entropy(ours, right, reduction="sum") for ours, right in pairs])
                / batch.global_count
            )
            # Processes average their gradients; the gradient of the global mean is the sum of their parts.
            accelerator.backward(each.sum() * accelerator.num_processes)
        if part == 0:
            losses.append(torch.zeros(len(replicates), device=accelerator.device))
        losses[-1] += each.detach()
        if last:
            for group in optimizer.param_groups:
                group["lr"] = lr_at(recipe, epoch * feed.steps + step, feed.steps)
            optimizer.step()
            optimizer.zero_grad()
    return accelerator.reduce(torch.stack(losses), reduction="sum").T.tolist()


def moving(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what training changes, by name: trained parameters and buffers."""
    trained = {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}
    return {**trained, **dict(model.named_buffers())}


def save_checkpoint(path: Path, recipe: Recipe, model: nn.Module, optimizer: Any, scaler: Any, run: dict) -> None:
    """Write what training changes, the optimiser's state and the history so far, whole or not at all."""
    state = {
        "recipe": json.dumps(recorded(recipe)),
        "tensors": moving(model),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict() if scaler else {},
        "run": run,
    }
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def load_checkpoint(path: Path, recipe: Recipe, model: nn.Module, optimizer: Any, scaler: Any) -> dict:
    """Restore what `save_checkpoint` wrote; return the history.

    Raises:
        ConfigError: the checkpoint belongs to another recipe.
    """
    state = torch.load(path, weights_only=True, map_location="cpu")
    before, now = json.loads(state["recipe"]), json.loads(json.dumps(recorded(recipe)))
    before["replicates"], now["replicates"] = len(state["run"]["replicates"]), recipe.replicates
    if run_key(before) != run_key(now):
        raise ConfigError(
            f"{path} belongs to another recipe.",
            seen=", ".join(f"{k}: {before.get(k)!r} -> {now[k]!r}" for k in now if before.get(k) != now[k]),
            do="resume with the same keys, or overwrite=true to start again",
        )
    for name, tensor in moving(model).items():
        tensor.copy_(state["tensors"][name])
    optimizer.load_state_dict(state["optimizer"])
    if scaler and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    return state["run"]


def save(model: nn.Module, config: BNOnlyConfig, output: Path) -> Path:
    """Write the adapter, or a network that trained whole as a timm checkpoint; return the file of tensors."""
    if isinstance(model, BNOnlyPeftModel):
        model.save_pretrained(output / "adapter")
        return output / "adapter" / "adapter_model.safetensors"
    shutil.rmtree(output / "network", ignore_errors=True)
    return export_network(model, config, output / "network") / "model.safetensors"


def run(recipe: Recipe) -> dict[str, Any]:
    """Train, evaluate and save; return the result line, of several replicates the first one's."""
    accelerator = Accelerator(mixed_precision=recipe.precision, log_with=recipe.tracker, project_dir=recipe.output_dir)
    torch.set_num_threads(recipe.threads or max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    output = prepare_output(recipe)
    accelerator.wait_for_everyone()  # no process creates the folder before all have looked
    set_seed(recipe.data_seed)
    replicates = build(recipe, accelerator)
    feed, networks = replicates[0].feed, [replicate.network for replicate in replicates]
    output.mkdir(parents=True, exist_ok=True)
    accelerator.print(
        "{}: {:,} of {:,} parameters train".format(recipe.condition, *count(networks[0])), file=sys.stderr
    )
    if recipe.lean:
        accelerator.print(networks[0].lean, file=sys.stderr)
    if recipe.tracker:
        accelerator.init_trackers("bn_affine_adapters", config={k: str(v) for k, v in recorded(recipe).items()})
    stacked = Stacked(networks) if len(networks) > 1 else None
    plain = stacked or networks[0].to(memory_format=feed.format)
    feed.load()  # outside the time of the training
    start = time.perf_counter()
    network, replicates[0].feed, way = head_only(plain, feed) if recipe.lean else (plain, feed, "")
    if way:
        accelerator.print(way, file=sys.stderr)
    seconds = time.perf_counter() - start
    if accelerator.num_processes > 1 and recipe.sync_norm:
        network = sync_norms_(network, accelerator.device)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, recipe.lr, momentum=recipe.sgd_momentum, weight_decay=recipe.weight_decay)
    model, optimizer = accelerator.prepare(network, optimizer)
    if recipe.compile:
        model = torch.compile(model, mode=recipe.compile, dynamic=False)  # a last, smaller batch has its own graph
    checkpoint = output / "checkpoint.pt"
    if recipe.resume and checkpoint.exists():
        history = load_checkpoint(checkpoint, recipe, plain, optimizer, accelerator.scaler)
        seconds += history["seconds"]
        for replicate, before in zip(replicates, history["replicates"], strict=True):
            replicate.epochs, replicate.first_losses = before["epochs"], before["first_losses"]
        if stacked:
            stacked.write_back()  # where no epoch is left, what is saved comes from here
    for epoch in range(len(replicates[0].epochs), recipe.epochs):
        start = time.perf_counter()
        losses = train_epoch(model, optimizer, replicates, recipe, accelerator, epoch)
        seconds += time.perf_counter() - start
        evaluated = (epoch + 1) % recipe.eval_every == 0 or epoch + 1 == recipe.epochs
        if stacked and evaluated:
            stacked.write_back()
        for replicate, own in zip(replicates, losses, strict=True):
            replicate.first_losses = (replicate.first_losses + own)[:20]
            entry = {"loss": sum(own) / len(own)}
            if evaluated:
                with accelerator.autocast():
                    entry |= accuracy(replicate.network.to(accelerator.device) if stacked else model, replicate.feed)
            replicate.epochs.append(entry)
            shown = "  ".join(f"{key} {value:.4g}" for key, value in entry.items())
            accelerator.print(f"epoch {epoch + 1}/{recipe.epochs}  {shown}", file=sys.stderr)
        if recipe.tracker:
            accelerator.log(replicates[0].epochs[-1], step=epoch + 1)
        due = recipe.checkpoint_every and (epoch + 1) % recipe.checkpoint_every == 0
        if due and accelerator.is_main_process:
            history = {"seconds": seconds, "replicates": [replicate.history for replicate in replicates]}
            save_checkpoint(checkpoint, recipe, plain, optimizer, accelerator.scaler, history)
    results = [summary(replicate, seconds / len(replicates), len(replicates), accelerator) for replicate in replicates]
    if accelerator.is_main_process:
        for replicate, result in zip(replicates, results, strict=True):
            folder = Path(replicate.recipe.output_dir)
            # Without the autocast that Accelerate has put around it, which would be saved with it.
            network = accelerator.unwrap_model(replicate.network, keep_fp32_wrapper=False)
            write_result(recipe, folder, result, save(network, replicate.config, folder))
    accelerator.end_training()
    return results[0]


def summary(replicate: Replicate, seconds: float, together: int, accelerator: Accelerator) -> dict[str, Any]:
    """Return the result line of a finished run; its seconds are its share of those that trained together."""
    recipe, epochs = replicate.recipe, replicate.epochs
    trained, total = count(replicate.network)
    found = provenance(accelerator, Path(__file__).parent)
    found["hardware"]["side_by_side"] = together
    return {
        **{key: round(value, 4) for key, value in epochs[-1].items()},
        **({"split": f"{recipe.held_out} held out of {recipe.train_split}"} if recipe.held_out else {}),
        "trained": trained,
        "parameters": total,
        "seconds": round(seconds, 2),
        "images_per_second": round(replicate.feed.steps * recipe.batch_size * recipe.epochs / max(seconds, 1e-9), 1),
        **found,
        "recipe": recorded(recipe),
        "command": command(recipe, read_recipe([])),
        "first_losses": [round(loss, 6) for loss in replicate.first_losses],
        "epochs": [{key: round(value, 4) for key, value in entry.items()} for entry in epochs],
    }


def write_result(recipe: Recipe, output: Path, result: dict[str, Any], saved: Path) -> None:
    """Print the result as one JSON line, and keep it beside what was saved and where the recipe asks for it."""
    kind = saved.parent.name  # "adapter", or "network" where the whole of it trained
    result |= {f"{kind}_bytes": saved.stat().st_size}
    Path(saved.parent, RESULTS_NAME).write_text(json.dumps([result]) + "\n")  # for its model card
    if recipe.results:
        with open(recipe.results, "a") as file:
            file.write(json.dumps(result) + "\n")
    result |= {kind: str(saved.parent)}
    line = json.dumps(result)
    (output / "result.json").write_text(line + "\n")
    print(line)
    print(f"test accuracy {result['top1']:.2f} % with {result['trained']:,} trained parameters")
    print(f"{kind} {saved.parent}, {saved.stat().st_size / 1000:.1f} kB")


def main() -> None:
    """Run from the command line."""
    try:
        run(read_recipe(sys.argv[1:]))
    except BNAdapterError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
