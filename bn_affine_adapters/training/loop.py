"""The training loop: what is trained, an epoch of it, a step of that."""

import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from ..adapter.method import BNOnlyConfig
from ..errors import ConfigError
from ..norms.statistics import sync_norms_
from .checkpoint import load_checkpoint, save_checkpoint
from .data import Batch
from .features import head_only
from .feed import Feed, accuracy, side_by_side
from .network import build_network, configuration
from .optimizer import create_optimizer
from .recipe import Recipe, members
from .schedule import lr_at
from .stacked import Stacked

FIRST = 20  # losses of so many first steps are kept


@dataclass
class Replicate:
    """A run that has a network, a result line and a folder of its own, whether it trains alone or side by side."""

    recipe: Recipe
    feed: Feed
    config: BNOnlyConfig
    network: nn.Module
    epochs: list[dict[str, float]] = field(default_factory=list)
    first_losses: list[float] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)  # its line, once it has trained

    @property
    def history(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"epochs": self.epochs, "first_losses": self.first_losses}


@dataclass
class Training:
    """Everything that a training run works with."""

    recipe: Recipe
    accelerator: Any
    replicates: list[Replicate]
    network: nn.Module  # the replicate's, or those of all replicates stacked: what a checkpoint holds
    model: Any  # what is called: the network, or its head alone, as Accelerate and the compiler prepared it
    optimizer: Any
    seconds: float

    @property
    def checkpoint(self) -> Path:
        """The file of its state."""
        return Path(self.recipe.output_dir, "checkpoint.pt")

    @property
    def stacked(self) -> Stacked | None:
        """The network, where replicates train side by side."""
        return self.network if isinstance(self.network, Stacked) else None

    def say(self, text: Any) -> None:
        """Tell a person, once for all processes."""
        self.accelerator.print(text, file=sys.stderr)


def build(recipe: Recipe, accelerator: Any) -> list[Replicate]:
    """Return the replicates of a recipe: the images decoded once, a network for each."""
    if recipe.replicates > 1 and accelerator.num_processes > 1:
        do = "one process, or replicates=1"
        raise ConfigError("Replicates side by side train in one process.", seen=f"{accelerator.num_processes}", do=do)
    first = Feed(recipe, accelerator)
    replicates = []
    for member in members(recipe):
        config = configuration(member, first)
        feed = first.reordered(member.data_seed) if recipe.replicates > 1 else first
        replicates.append(Replicate(member, feed, config, build_network(member, config, first)))
    return replicates


def prepare(recipe: Recipe, accelerator: Any, replicates: list[Replicate]) -> Training:
    """Return what trains replicates: the network as it runs on this device, its optimiser; resumed if asked to."""
    first = replicates[0]
    several = len(replicates) > 1
    network = Stacked([r.network for r in replicates]) if several else first.network.to(memory_format=first.feed.format)
    first.feed.load()  # outside the time of the training
    start = time.perf_counter()
    part, first.feed, why = head_only(network, first.feed) if recipe.lean else (network, first.feed, "")
    seconds = time.perf_counter() - start
    if accelerator.num_processes > 1 and recipe.sync_norm:
        part = sync_norms_(part, accelerator.device)
    model, optimizer = accelerator.prepare(part, create_optimizer(recipe, part))
    if recipe.compile:
        model = torch.compile(model, mode=recipe.compile, dynamic=False)  # a last, smaller batch has its own graph
    training = Training(recipe, accelerator, replicates, network, model, optimizer, seconds)
    if why:
        training.say(why)
    if recipe.resume and training.checkpoint.exists():
        resume(training)
    return training


def resume(training: Training) -> None:
    """Restore the state that a checkpoint holds."""
    scaler = training.accelerator.scaler
    history = load_checkpoint(training.checkpoint, training.recipe, training.network, training.optimizer, scaler)
    names = list(training.replicates[0].feed.label_names)
    if names != (trained := history.get("label_names", names)):
        do = "name the classes of the data as before, or overwrite=true to start again"
        raise ConfigError("The checkpoint was trained on other classes.", seen=f"{trained} -> {names}", do=do)
    training.seconds += history["seconds"]
    for replicate, before in zip(training.replicates, history["replicates"], strict=True):
        replicate.epochs, replicate.first_losses = before["epochs"], before["first_losses"]
    if training.stacked:
        training.stacked.write_back()  # where no epoch is left, what is saved comes from here


def fit(training: Training) -> None:
    """Train the epochs that are left, evaluate, and write checkpoints when they are due."""
    recipe = training.recipe
    for epoch in range(len(training.replicates[0].epochs), recipe.epochs):
        start = time.perf_counter()
        losses = train_epoch(training, epoch)
        training.seconds += time.perf_counter() - start
        finish_epoch(training, epoch, losses)
        due = recipe.checkpoint_every and (epoch + 1) % recipe.checkpoint_every == 0
        if due and training.accelerator.is_main_process:
            names = list(training.replicates[0].feed.label_names)
            history = {"seconds": training.seconds, "label_names": names}
            history["replicates"] = [replicate.history for replicate in training.replicates]
            scaler = training.accelerator.scaler
            save_checkpoint(training.checkpoint, recipe, training.network, training.optimizer, scaler, history)


def train_epoch(training: Training, epoch: int) -> list[list[float]]:
    """Train for one epoch; return the mean loss of every step, over all processes, for each replicate."""
    recipe, accelerator, optimizer = training.recipe, training.accelerator, training.optimizer
    training.model.train()
    steps = training.replicates[0].feed.steps
    losses: list[torch.Tensor] = []
    for index, batch in enumerate(progress(training, epoch)):
        step, part = divmod(index, recipe.accumulation)
        last = part == recipe.accumulation - 1
        with nullcontext() if last else accelerator.no_sync(training.model):
            loss = backward(training, batch)
        if part == 0:
            losses.append(torch.zeros_like(loss))
        losses[-1] += loss
        if last:
            for group in optimizer.param_groups:
                group["lr"] = lr_at(recipe, epoch * steps + step, steps)
            optimizer.step()
            optimizer.zero_grad()
    return accelerator.reduce(torch.stack(losses), reduction="sum").T.tolist()


def progress(training: Training, epoch: int) -> Iterable[Batch]:
    """Return this process's micro-batches of an epoch, shown to a person as they pass."""
    recipe, feeds = training.recipe, [replicate.feed for replicate in training.replicates]
    return tqdm(
        side_by_side(feeds, epoch) if training.stacked else feeds[0].epoch(epoch),
        desc=f"epoch {epoch + 1}/{recipe.epochs}",
        total=feeds[0].steps * recipe.accumulation,
        unit="batch",
        mininterval=1.0,
        leave=False,
        disable=not training.accelerator.is_main_process,
    )


def backward(training: Training, batch: Batch) -> torch.Tensor:
    """Add the gradients of a micro-batch; return its part of the step's mean loss, for each replicate."""
    if training.recipe.compile:
        torch.compiler.cudagraph_mark_step_begin()  # what the last step's graphs wrote may be overwritten
    logits, labels = training.model(batch.images), batch.labels
    pairs = zip(logits, labels, strict=True) if training.stacked else [(logits, labels)]
    loss = torch.stack([F.cross_entropy(ours, right, reduction="sum") for ours, right in pairs]) / batch.global_count
    # Processes average their gradients; the gradient of the global mean is the sum of their parts.
    training.accelerator.backward(loss.sum() * training.accelerator.num_processes)
    return loss.detach()


def finish_epoch(training: Training, epoch: int, losses: list[list[float]]) -> None:
    """Evaluate where it is due; keep, show and log what came out of an epoch."""
    recipe, accelerator = training.recipe, training.accelerator
    evaluated = (epoch + 1) % recipe.eval_every == 0 or epoch + 1 == recipe.epochs
    if training.stacked and evaluated:
        training.stacked.write_back()
    for replicate, own in zip(training.replicates, losses, strict=True):
        replicate.first_losses = (replicate.first_losses + own)[:FIRST]
        entry = {"loss": sum(own) / len(own)}
        if evaluated:
            model = replicate.network.to(accelerator.device) if training.stacked else training.model
            with accelerator.autocast():
                entry |= accuracy(model, replicate.feed)
        replicate.epochs.append(entry)
        shown = "  ".join(f"{key} {value:.4g}" for key, value in entry.items())
        training.say(f"epoch {epoch + 1}/{recipe.epochs}  {shown}")
    if recipe.tracker:
        accelerator.log(training.replicates[0].epochs[-1], step=epoch + 1)
