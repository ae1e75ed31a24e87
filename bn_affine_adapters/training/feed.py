"""Feed a network: a data set's two splits, cut into each process's batches of every epoch; measure its accuracy.

The one place that knows whether the images lie in memory on the device or stream from workers.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform
from torch import Tensor, nn

from ..errors import BNAdapterError, DataError, nearest_name, printable
from ..model.images import completed, evaluation_transform, normaliser
from .data import (
    Batch,
    Split,
    TensorData,
    batches,
    decode,
    eval_batches,
    load_splits,
    numbered,
    readable,
    steps_per_epoch,
    stream,
)
from .options import DataOptions

EVAL_BATCH = 512
NAMED = 100  # of the images that are left out


def own_options(data_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the `DataOptions` that prepare images as a network's own data configuration says, with timm's defaults.

    Raises:
        ConfigError: the data configuration is not usable.
    """
    if not data_config:
        return {}
    own = completed(data_config)
    (_, height, width), crop_pct = own.pop("input_size"), own.pop("crop_pct")
    return {**own, "test_crop": crop_pct, "image_size": height if height == width else [height, width]}


class Feed:
    """A data set's splits, and how each is cut into this process's batches.

    Attributes:
        label_names: the classes in the order of their labels.
        steps: optimiser steps of an epoch.
        left_out: how many images of each split cannot be decoded, where these are skipped.
    """

    def __init__(self, options: DataOptions, accelerator: Any) -> None:
        """Find the data set; images are decoded when an epoch first needs them.

        Raises:
            DataError: the data set, a split or a column is missing, or there are too few images for one step.
            ConfigError: it is not clear how images are prepared.
        """
        completed(options.data_config)
        self.options, self.accelerator = options, accelerator
        self.format = torch.channels_last if options.channels_last else torch.contiguous_format
        with accelerator.main_process_first():  # the cache of `datasets` is written once
            self.train, self.test = load_data(options)
        if not options.held_out and self.test.name != options.test_split:
            said = f"no split {options.test_split}: tested on {self.test.name}, {len(self.test):,} images"
            accelerator.print(f"{options.dataset} has {said}", file=sys.stderr)
        self.left_out: dict[str, int] = {}
        if options.on_bad_image == "skip":
            self.train, self.test = self._readable(self.train), self._readable(self.test)
        self.label_names = self.train.label_names
        self.steps = steps_per_epoch(
            len(self.train),
            batch_size=options.batch_size,
            world=accelerator.num_processes,
            accumulation=options.accumulation,
        )

    def _readable(self, split: Split) -> Split:
        """Return the images of a split that can be decoded; count and name the others."""
        left, problems = readable(split, channels=len(self.options.mean))
        if problems:
            self.left_out[split.name] = len(problems)
            shown = "\n  ".join([*problems[:NAMED], *(["..."] if problems[NAMED:] else [])])
            said = f"{len(problems):,} of {len(split):,} images of {split.name} cannot be decoded, and are left out:"
            self.accelerator.print(f"{said}\n  {printable(shown, 10_000)}", file=sys.stderr)
        return left

    def number_classes(self, names: Sequence[str]) -> None:
        """Number the classes in the order of a network's names; those of plain integers stay as they are.

        Raises:
            DataError: the data have other classes.
        """
        self.train, self.test = numbered(self.train, names), numbered(self.test, names)
        self.label_names = self.train.label_names
        for decoded in ("_train_tensors", "_test_tensors"):
            self.__dict__.pop(decoded, None)

    def load(self) -> None:
        """Decode the images now, where they lie in memory."""
        if not self.options.streaming:
            _ = self._train_tensors, self._test_tensors

    @property
    def share(self) -> dict[str, Any]:
        """This process, and how many there are."""
        return {"rank": self.accelerator.process_index, "world": self.accelerator.num_processes}

    @property
    def common(self) -> dict[str, Any]:
        """What training and test batches in memory have in common."""
        return {"mean": self.options.mean, "std": self.options.std, "memory_format": self.format, **self.share}

    def _decoded(self, split: Split) -> TensorData:
        how = self.options.data_config
        channels, *size = how.pop("input_size")
        return decode(split, size=size, channels=channels, **how).to(self.accelerator.device)

    @cached_property
    def _train_tensors(self) -> TensorData:
        return self._decoded(self.train)

    @cached_property
    def _test_tensors(self) -> TensorData:
        return self._decoded(self.test)

    def _streamed(self, split: Split, **how: Any) -> Iterator[Batch]:
        """Yield a split's micro-batches, normalised and on the device."""
        o, device = self.options, self.accelerator.device
        normalise = normaliser(o.mean, o.std, device)
        for images, labels, count in stream(split, **how, channels=len(o.mean), workers=o.workers, **self.share):
            pixels = normalise(images.to(device, non_blocking=True))
            yield Batch(pixels.contiguous(memory_format=self.format), labels.to(device), count)

    def _augmentation(self) -> Callable[[Any], Tensor]:
        """Return timm's training transform, to uint8 pixels."""
        o = self.options
        change = {"scale": o.crop_scale, "ratio": o.crop_ratio, "hflip": 0.5 * o.flip, "color_jitter": None}
        size = tuple(o.data_config["input_size"])
        return create_transform(size, is_training=True, interpolation=o.interpolation, normalize=False, **change)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yield this process's micro-batches of one training epoch, from its step ``first`` on."""
        o = self.options
        cut: dict[str, Any] = {
            "batch_size": o.batch_size,
            "data_seed": o.data_seed,
            "epoch": epoch,
            "accumulation": o.accumulation,
            "first_step": first,
        }
        if o.streaming:
            yield from self._streamed(self.train, transform=self._augmentation(), **cut)
        else:
            yield from batches(self._train_tensors, flip=o.flip, crop_padding=o.crop_padding, **cut, **self.common)

    def reordered(self, data_seed: int) -> "Feed":
        """Return a feed of the same images, decoded once, in the order of another data seed."""
        self.load()
        other = copy(self)
        other.options = replace(self.options, data_seed=data_seed)
        return other

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Feed":
        """Return a feed of what a function makes of the images in memory, computed now, in the same order."""
        other = copy(self)
        other.format = torch.contiguous_format
        other._train_tensors, other._test_tensors = map(
            lambda data: self._computed(data, function), (self._train_tensors, self._test_tensors)
        )
        return other

    def _computed(self, data: TensorData, function: Callable[[Tensor], Tensor]) -> TensorData:
        found: list[Tensor] = []
        for batch in eval_batches(data, batch_size=EVAL_BATCH, **self.common):
            # A copy: it may look into a tensor that is many times as large.
            found.append(self.accelerator.gather(function(batch.images))[: batch.global_count].clone())
        return replace(data, images=torch.cat(found))

    @property
    def nbytes(self) -> int:
        """Bytes of the images, or features, that lie in memory."""
        return self._train_tensors.images.nbytes + self._test_tensors.images.nbytes

    def unlabelled(self, count: int) -> Tensor:
        """Return at most so many images of the training split, evenly spread, prepared as for evaluation."""
        whole = self._train_tensors
        chosen = torch.linspace(0, len(whole) - 1, min(count, len(whole))).long()
        part = TensorData(whole.images[chosen], whole.labels[chosen], whole.label_names)
        return torch.cat([batch.images for batch in eval_batches(part, batch_size=EVAL_BATCH, **self.common)])

    def evaluation(self) -> Iterator[Batch]:
        """Yield this process's share of the test split, in order; `global_count` of all shares are real."""
        o = self.options
        if o.streaming:
            how = {"transform": evaluation_transform(o.data_config), "epoch": None}
            yield from self._streamed(self.test, batch_size=max(1, o.batch_size // o.accumulation), **how)
        else:
            yield from eval_batches(self._test_tensors, batch_size=EVAL_BATCH, **self.common)


def load_data(options: DataOptions) -> tuple[Split, Split]:
    """Return the training and the test split.

    Raises:
        DataError: the data set, a split or a column is missing or cannot be read.
    """
    try:
        return load_splits(
            options.dataset,
            train_split=options.train_split,
            test_split=options.test_split,
            config_name=options.dataset_config,
            image_column=options.image_column,
            label_column=options.label_column,
            held_out=options.held_out,
        )
    except (OSError, ValueError) as error:  # what `datasets` raises for a name or folder that it cannot read
        if isinstance(error, BNAdapterError):
            raise
        path, near = Path(options.dataset), ""
        if not path.exists() and path.parent.is_dir():
            near = nearest_name(path.name, [entry.name for entry in path.parent.iterdir() if entry.is_dir()])
        raise DataError(
            f"The data set {options.dataset} cannot be loaded.",
            seen=f"{type(error).__name__}: {str(error).splitlines()[0]}{near}",
            do='give "digits", a Hub id, or a folder that datasets.load_dataset reads',
        ) from error


def side_by_side(feeds: Sequence[Feed], epoch: int, first: int = 0) -> Iterator[Batch]:
    """Yield batches of R feeds of equal length together: images (R, n, C, H, W), labels (R, n)."""
    for batches_ in zip(*(feed.epoch(epoch, first) for feed in feeds), strict=True):
        images, labels, counts = zip(*batches_, strict=True)
        yield Batch(torch.stack(images), torch.stack(labels), counts[0])


@torch.no_grad()
def accuracy(model: nn.Module, feed: Feed, between: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Return {"top1": %, "top5": %} of a network over the whole test split, over all processes.

    The network is set to evaluation mode. Give `evaluation_copy(network)` of a network that others use.

    Args:
        model: the network.
        feed: of the test split.
        between: called before each batch.
    """
    from .metrics import TopKAccuracy, ranked

    model.eval()
    metric = TopKAccuracy()
    for batch in feed.evaluation():
        between()
        share = torch.cat([ranked(model(batch.images)), batch.labels[:, None]], dim=1)
        rows = feed.accelerator.gather(share)[: batch.global_count].cpu()
        metric.add_batch(predictions=rows[:, :-1], references=rows[:, -1])
    return metric.compute()
