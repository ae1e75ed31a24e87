"""The training loop: what is trained, an epoch of it, a step of that."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..adapter.method import BNOnlyConfig
from ..errors import ConfigError, DataError, DivergedError
from ..norms.statistics import sync_norms_
from .checkpoint import load_checkpoint, save_checkpoint
from .data import Batch, check_training
from .divergence import nonfinite_layer, nonfinite_value
from .features import head_only
from .feed import Feed, accuracy, side_by_side
from .generators import generator_states, restore_generators
from .network import build_network, configuration
from .optimizer import create_optimizer
from .recipe import CHECKPOINT, Recipe, members
from .rounding import Rounding
from .schedule import lr_at
from .stacked import Stacked
from .stopping import Stopping

FIRST = 20  # losses of so many first steps are kept
LOOK = 50  # steps after which losses on another device than the CPU are looked at, since that waits for the device


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
    rounding: Rounding  # of what trains, while the network runs
    group: Any = None  # the processes, where there are several: they agree through it, on their CPUs
    stopping: Stopping = field(default_factory=Stopping)
    since: float = 0.0  # up to when `seconds` counts
    step: int = 0  # optimiser steps done in this epoch
    losses: list[Tensor] = field(default_factory=list)  # of these steps: this process's part, for each replicate
    skipped: int = 0  # steps left out because their loss was not finite
    buffers: list[Tensor] = field(default_factory=list)  # as they were before this step, where it may be left out
    generators: list[Any] = field(default_factory=list)  # each process's, in the checkpoint that was resumed
    kept: bool = False  # whether this run has a checkpoint

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.replicates[0].epochs)

    @property
    def steps(self) -> int:
        """Optimiser steps of an epoch."""
        return self.replicates[0].feed.steps

    @property
    def place(self) -> str:
        """How far it has come, for people."""
        return f"epoch {self.epoch + 1}/{self.recipe.epochs}, step {self.step}/{self.steps}"

    @property
    def checkpoint(self) -> Path:
        """The file of its state."""
        return Path(self.recipe.output_dir, CHECKPOINT)

    @property
    def stacked(self) -> Stacked | None:
        """The network, where replicates train side by side."""
        return self.network if isinstance(self.network, Stacked) else None

    def say(self, text: Any) -> None:
        """Tell a person, once for all processes."""
        if self.accelerator.is_main_process:
            tqdm.write(str(text), file=sys.stderr)

    def agreed(self, *numbers: int) -> list[int]:
        """Return the largest of all processes' numbers, each in its place."""
        if self.group is None:
            return [*numbers]
        together = torch.tensor(numbers)
        torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX, group=self.group)
        return together.tolist()


def build(recipe: Recipe, accelerator: Any) -> list[Replicate]:
    """Return the replicates of a recipe: the images decoded once, a network for each."""
    if recipe.replicates > 1 and accelerator.num_processes > 1:
        do = "one process, or replicates=1"
        raise ConfigError("Replicates side by side train in one process.", seen=f"{accelerator.num_processes}", do=do)
    first = Feed(recipe, accelerator)
    check_training(first.train)
    replicates = []
    for member in members(recipe):
        config = configuration(member, first.label_names)
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
    rounding = Rounding(first.network, recipe.quantise_bits)
    training = Training(recipe, accelerator, replicates, network, model, optimizer, seconds, rounding)
    if accelerator.num_processes > 1:
        limit = timedelta(seconds=recipe.timeout)
        training.group = torch.distributed.new_group(backend="gloo", timeout=limit)
    if why:
        training.say(why)
    if recipe.resume and training.checkpoint.exists():
        resume(training)
    return training


def resume(training: Training) -> None:
    """Restore the state that a checkpoint holds."""
    accelerator = training.accelerator
    what = training.network, training.optimizer, accelerator.scaler
    history, training.generators = load_checkpoint(training.checkpoint, training.recipe, *what)
    training.kept = True
    names = list(training.replicates[0].feed.label_names)
    if names != (trained := history.get("label_names", names)):
        do = "name the classes of the data as before; to start again, overwrite=true resume=false"
        raise ConfigError("The checkpoint was trained on other classes.", seen=f"{trained} -> {names}", do=do)
    training.seconds += history["seconds"]
    training.step, training.skipped = history.get("step", 0), history.get("skipped", 0)
    training.losses = own_losses(history.get("losses", []), accelerator)
    for replicate, before in zip(training.replicates, history["replicates"], strict=True):
        replicate.epochs, replicate.first_losses = before["epochs"], before["first_losses"]
    if training.stacked:
        training.stacked.write_back()  # where no epoch is left, what is saved comes from here
    if len(training.generators) != accelerator.num_processes:
        saved = f"the random generators of {len(training.generators)} processes, not {accelerator.num_processes}"
        training.say(f"{training.checkpoint} holds {saved}: dropout and the like draw other numbers from here on")


def own_losses(parts: list[Tensor], accelerator: Any) -> list[Tensor]:
    """Return this process's parts of the losses in a checkpoint; of another number of processes, the first has all."""
    rank = accelerator.process_index
    if not parts or not len(parts[0]):
        return []
    if len(parts) == accelerator.num_processes:
        own = parts[rank]
    else:
        own = torch.stack(parts).sum(0) if rank == 0 else torch.zeros_like(parts[0])
    return list(own.to(accelerator.device).unbind())


def fit(training: Training) -> None:
    """Train what is left, evaluate, and write checkpoints when they are due or a signal asks to stop."""
    recipe, accelerator = training.recipe, training.accelerator
    if len(training.generators) == accelerator.num_processes:
        restore_generators(training.generators[accelerator.process_index], accelerator.device)
    for epoch in range(training.epoch, recipe.epochs):
        losses = train_epoch(training, epoch)
        finish_epoch(training, epoch, losses)
        if recipe.checkpoint_every and (epoch + 1) % recipe.checkpoint_every == 0:
            checkpoint(training)
        if epoch + 1 < recipe.epochs:
            stop_if_asked(training)


def checkpoint(training: Training) -> None:
    """Write the state of all processes; a diverged one is an error and never written."""
    from accelerate.utils import gather_object

    training.rounding.restore_()
    check_finite(training)
    accelerator = training.accelerator
    losses = torch.stack(training.losses).cpu() if training.losses else torch.empty(0)
    parts = gather_object([(losses, generator_states(accelerator.device))])
    history = {
        "seconds": training.seconds,
        "step": training.step,
        "losses": [part for part, _ in parts],
        "skipped": training.skipped,
        "label_names": list(training.replicates[0].feed.label_names),
        "replicates": [replicate.history for replicate in training.replicates],
    }
    if accelerator.is_main_process:
        what = training.network, training.optimizer, accelerator.scaler
        save_checkpoint(training.checkpoint, training.recipe, *what, history, [state for _, state in parts])
    training.kept = True


def stop_if_asked(training: Training) -> None:
    """Stop if any process has got a signal."""
    (number,) = training.agreed(training.stopping.asked())
    if number:
        stop(training, number)


def stop(training: Training, number: int) -> NoReturn:
    """Write a checkpoint, say how to go on, and end the process as a signal of this number does."""
    training.stopping.number = number
    checkpoint(training)
    where = f"{training.stopping.reason}, {training.place}"
    training.say(f"{where}: the state is in {training.checkpoint}; the same command with resume=true goes on")
    raise SystemExit(128 + number)


def train_epoch(training: Training, epoch: int) -> list[list[float]]:
    """Train for what is left of an epoch; return the mean loss of each step, over all processes, for each replicate."""
    recipe, accelerator = training.recipe, training.accelerator
    training.model.train()
    training.since = time.perf_counter()
    suspect: Batch | None = None  # the first of the step whose loss is not finite
    for index, batch in enumerate(progress(training, epoch), training.step * recipe.accumulation):
        part = index % recipe.accumulation
        last = part == recipe.accumulation - 1
        if part == 0 and recipe.skip_nonfinite_steps:
            training.buffers = [buffer.clone() for buffer in training.network.buffers()]
        training.rounding.round_()
        with nullcontext() if last else accelerator.no_sync(training.model):
            loss = backward(training, batch)
        if part == 0:
            suspect = None
            training.losses.append(torch.zeros_like(loss))
        training.losses[-1] += loss
        if suspect is None and not looks_finite(training):
            suspect = batch
        if last:
            finish_step(training, epoch, suspect, batch)
    if not training.losses:
        raise diverged(training, "every step of the epoch was skipped", None)
    losses = accelerator.reduce(torch.stack(training.losses), reduction="sum").T.tolist()
    count_time(training)
    return losses


def count_time(training: Training) -> None:
    """Add the time since it was last counted."""
    now = time.perf_counter()
    training.seconds += now - training.since
    training.since = now


def looks_finite(training: Training) -> bool:
    """Tell whether the losses are finite; on a GPU, where that waits for it, only every `LOOK` steps, else True."""
    if training.accelerator.device.type == "cpu" or training.recipe.skip_nonfinite_steps:
        return bool(training.losses[-1].isfinite().all())
    return (training.step + 1) % LOOK > 0 or bool(torch.stack(training.losses).isfinite().all())


def finish_step(training: Training, epoch: int, suspect: Batch | None, batch: Batch) -> None:
    """Update what trains, or skip the step if its loss is not finite; write a checkpoint, or stop, if that is due."""
    recipe, optimizer = training.recipe, training.optimizer
    training.rounding.restore_()
    number, wrong = training.agreed(training.stopping.asked(), int(suspect is not None))
    if wrong:
        skip_step(training, suspect or batch)
    else:
        for group in optimizer.param_groups:
            group["lr"] = lr_at(recipe, epoch * training.steps + training.step, training.steps)
        optimizer.step()
    optimizer.zero_grad()
    training.step += 1
    done = epoch * training.steps + training.step
    if number or (recipe.checkpoint_every_steps and done % recipe.checkpoint_every_steps == 0):
        count_time(training)
        if number:
            stop(training, number)
        checkpoint(training)
        training.since = time.perf_counter()


def skip_step(training: Training, batch: Batch) -> None:
    """Leave out a step whose loss is not finite; the running statistics are as before it.

    Raises:
        DivergedError: as many steps as may be were left out before.
    """
    if training.skipped >= training.recipe.skip_nonfinite_steps:
        raise diverged(training, "the loss is not finite", batch)
    training.skipped += 1
    training.say(f"{training.place}: the loss of the next step is not finite; skipped, {training.skipped} in all")
    training.losses.pop()
    with torch.no_grad():
        for buffer, before in zip(training.network.buffers(), training.buffers, strict=True):
            buffer.copy_(before)


def check_finite(training: Training) -> None:
    """Raise DivergedError unless all losses of this epoch, and all that trains, are finite."""
    losses = training.losses
    what = None if not losses or bool(torch.stack(losses).isfinite().all()) else "the loss is not finite"
    name = None if what else nonfinite_value(training.network)
    (wrong,) = training.agreed(int(bool(what or name)))
    if wrong:
        raise diverged(training, what or f"{name or 'what another process trains'} is not finite", None)


def diverged(training: Training, what: str, batch: Batch | None) -> DivergedError:
    """Return the error of a run that cannot go on; every process has to call this."""
    finite = [bool(loss.isfinite().all()) for loss in training.losses]
    later = len(finite) - 1 - finite.index(False) if False in finite else 0  # steps since the first such loss
    step = training.epoch * training.steps + training.step + (batch is not None) - later
    layer = first_layer(training, batch)
    kept = str(training.checkpoint) if training.kept else None
    error = DivergedError(
        f"Training diverged at step {step} (epoch {training.epoch + 1}): {what}.",
        seen=f"first layer whose output is not finite: {layer}; lr={training.recipe.lr}; "
        f"last good checkpoint: {kept or 'none'}",
        do="a smaller lr with overwrite=true, or skip_nonfinite_steps=N with resume=true to leave out such steps",
    )
    error.step, error.layer, error.checkpoint = step, layer, kept
    return error


def first_layer(training: Training, batch: Batch | None) -> str:
    """Run a batch again, by default the first of this epoch; return its first layer whose output is not finite."""
    from accelerate.utils import gather_object

    batch = batch or next(iter(epoch_batches(training, training.epoch, 0)))
    network, model, images = training.network, getattr(training.model, "_orig_mod", training.model), batch.images
    if training.stacked:
        training.stacked.write_back()
        wrong = [not bool(loss.isfinite()) for loss in training.losses[-1]] if training.losses else []
        which = wrong.index(True) if True in wrong else 0
        network = model = training.replicates[which].network.to(training.accelerator.device)
        images = images[which]
    model.train()
    with training.accelerator.autocast():
        found = gather_object([nonfinite_layer(model, network, images)])
    return next((layer for layer in found if not layer.startswith("none")), found[0])


def progress(training: Training, epoch: int) -> Iterable[Batch]:
    """Return this process's micro-batches of an epoch, shown to a person as they pass."""
    recipe = training.recipe
    return tqdm(
        epoch_batches(training, epoch, training.step),
        desc=f"epoch {epoch + 1}/{recipe.epochs}",
        total=training.steps * recipe.accumulation,
        initial=training.step * recipe.accumulation,
        unit="batch",
        mininterval=1.0,
        leave=False,
        disable=not training.accelerator.is_main_process,
    )


def epoch_batches(training: Training, epoch: int, first: int) -> Iterable[Batch]:
    """Return this process's micro-batches of an epoch from a step on."""
    feeds = [replicate.feed for replicate in training.replicates]
    return side_by_side(feeds, epoch, first) if training.stacked else feeds[0].epoch(epoch, first)


def backward(training: Training, batch: Batch) -> torch.Tensor:
    """Add the gradients of a micro-batch; return its part of the step's mean loss, for each replicate."""
    if training.recipe.compile:
        torch.compiler.cudagraph_mark_step_begin()  # what the last step's graphs wrote may be overwritten
    with naming_lone_images(batch):
        logits, labels = training.model(batch.images), batch.labels
    pairs = zip(logits, labels, strict=True) if training.stacked else [(logits, labels)]
    loss = torch.stack([F.cross_entropy(ours, right, reduction="sum") for ours, right in pairs]) / batch.global_count
    # Processes average their gradients; the gradient of the global mean is the sum of their parts.
    training.accelerator.backward(loss.sum() * training.accelerator.num_processes)
    return loss.detach()


@contextmanager
def naming_lone_images(batch: Batch) -> Iterator[None]:
    """Turn what torch says of a BatchNorm that has one value per channel into DataError."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise DataError(
            "BatchNorm cannot train on one image of which one pixel is left.",
            seen=f"{len(batch.labels)} image of {batch.global_count} in this process's part of the batch; {error}",
            do="a larger batch_size, a smaller accumulation or fewer processes, or a larger image_size",
        ) from error


def finish_epoch(training: Training, epoch: int, losses: list[list[float]]) -> None:
    """Evaluate where it is due; keep, show and log what came out of an epoch."""
    recipe, accelerator = training.recipe, training.accelerator
    check_finite(training)
    evaluated = (epoch + 1) % recipe.eval_every == 0 or epoch + 1 == recipe.epochs
    if training.stacked and evaluated:
        training.stacked.write_back()
    training.rounding.round_()
    entries = [{"loss": sum(own) / len(own)} for own in losses]
    for replicate, entry in zip(training.replicates, entries, strict=True):
        if evaluated:
            model = replicate.network.to(accelerator.device) if training.stacked else training.model
            with accelerator.autocast():
                entry |= accuracy(model, replicate.feed, lambda: stop_if_asked(training))
    training.rounding.restore_()
    training.step, training.losses = 0, []
    for replicate, own, entry in zip(training.replicates, losses, entries, strict=True):
        replicate.first_losses = (replicate.first_losses + own)[:FIRST]
        replicate.epochs.append(entry)
        shown = "  ".join(f"{key} {value:.4g}" for key, value in entry.items())
        training.say(f"epoch {epoch + 1}/{recipe.epochs}  {shown}")
    if recipe.tracker:
        accelerator.log(training.replicates[0].epochs[-1], step=epoch + 1)
