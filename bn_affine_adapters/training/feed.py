"""Feed a network: a data set's two splits, cut into each process's batches of every epoch; measure its accuracy.

The one place that knows whether the images lie in memory on the device or stream from workers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor, nn

from ..errors import BNAdapterError, DataError
from .data import Batch, Split, TensorData, batches, decode, eval_batches, load_splits, steps_per_epoch, stream

EVAL_BATCH = 512


@dataclass
class DataOptions:
    """Which data, how they are decoded, augmented and batched."""

    # The data: "digits", a Hub id or a folder
    dataset: str = "digits"
    dataset_config: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    held_out: int = 0  # images taken out of the training split and tested on instead of the test split
    image_column: str | None = None
    label_column: str | None = None
    data_seed: int = 0
    streaming: bool = False  # decode in workers with timm's transforms, instead of once into memory
    workers: int = 4  # of the loader, where streaming
    image_size: int = 32
    mean: list[float] = field(default_factory=lambda: list(IMAGENET_DEFAULT_MEAN))
    std: list[float] = field(default_factory=lambda: list(IMAGENET_DEFAULT_STD))
    flip: bool = False
    crop_padding: int = 0  # in memory: zero padding before a random crop
    crop_scale: list[float] = field(default_factory=lambda: [0.1, 1.0])  # streaming: RandomResizedCrop
    crop_ratio: list[float] = field(default_factory=lambda: [0.8, 1.25])
    test_crop: float = 0.875  # streaming: centre crop over resized side
    batch_size: int = 128  # images an optimiser step, over all processes and accumulation steps
    accumulation: int = 1
    channels_last: bool = True


def own_options(data_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `DataOptions` that a network's own data configuration, as timm has it, says: size, mean and std."""
    own: dict[str, Any] = {key: list(data_config[key]) for key in ("mean", "std") if key in data_config}
    return own | ({"image_size": data_config["input_size"][-1]} if "input_size" in data_config else {})


class Feed:
    """A data set's splits, and how each is cut into this process's batches.

    Attributes:
        label_names: the classes in the order of their labels.
        steps: optimiser steps of an epoch.
    """

    def __init__(self, options: DataOptions, accelerator: Any) -> None:
        """Find the data set; images are decoded when an epoch first needs them.

        Raises:
            DataError: the data set, a split or a column is missing, or there are too few images for one step.
        """
        self.options, self.accelerator = options, accelerator
        self.format = torch.channels_last if options.channels_last else torch.contiguous_format
        with accelerator.main_process_first():  # the cache of `datasets` is written once
            self.train, self.test = _load(options)
        if options.held_out:
            self.train, self.test = hold_out(self.train, options.held_out)
        self.label_names = self.train.label_names
        self.steps = steps_per_epoch(
            len(self.train.dataset),
            batch_size=options.batch_size,
            world=accelerator.num_processes,
            accumulation=options.accumulation,
            drop_remainder=options.streaming,
        )

    def load(self) -> None:
        """Decode the images now, where they lie in memory."""
        if not self.options.streaming:
            _ = self._train_tensors, self._test_tensors

    @property
    def common(self) -> dict[str, Any]:
        """What training and test batches in memory have in common."""
        accelerator, o = self.accelerator, self.options
        share = {"rank": accelerator.process_index, "world": accelerator.num_processes}
        return {"mean": o.mean, "std": o.std, "memory_format": self.format, **share}

    def _decoded(self, split: Split) -> TensorData:
        return decode(split, size=self.options.image_size).to(self.accelerator.device)

    @cached_property
    def _train_tensors(self) -> TensorData:
        return self._decoded(self.train)

    @cached_property
    def _test_tensors(self) -> TensorData:
        return self._decoded(self.test)

    def _loader(self, split: Split, training: bool) -> Any:
        o, world = self.options, self.accelerator.num_processes
        common = {"input_size": (3, o.image_size, o.image_size), "mean": o.mean, "std": o.std}
        if training:
            change = {"scale": o.crop_scale, "ratio": o.crop_ratio, "hflip": 0.5 * o.flip, "color_jitter": None}
        else:
            change = {"crop_pct": o.test_crop}
        transform = create_transform(**common, **change, is_training=training, interpolation="bilinear")
        loader = stream(
            split,
            transform,
            batch_size=max(1, o.batch_size // (world * o.accumulation)),
            data_seed=o.data_seed,
            shuffle=training,
            workers=o.workers,
            drop_remainder=training,
        )
        return self.accelerator.prepare(loader)

    @cached_property
    def _train_loader(self) -> Any:
        return self._loader(self.train, training=True)

    @cached_property
    def _test_loader(self) -> Any:
        return self._loader(self.test, training=False)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yield this process's micro-batches of one training epoch, from its step ``first`` on."""
        o = self.options
        if o.streaming:
            self._train_loader.set_epoch(epoch)
            loader = self._train_loader
            if first:  # skipped images are not decoded
                loader = self.accelerator.skip_first_batches(loader, first * o.accumulation)
            for images, labels in islice(loader, (self.steps - first) * o.accumulation):
                yield Batch(images.to(memory_format=self.format), labels, o.batch_size)
        else:
            yield from batches(
                self._train_tensors,
                batch_size=o.batch_size,
                data_seed=o.data_seed,
                epoch=epoch,
                flip=o.flip,
                crop_padding=o.crop_padding,
                accumulation=o.accumulation,
                first_step=first,
                **self.common,
            )

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

    def evaluation(self) -> Iterator[Batch]:
        """Yield this process's share of the test split, in order; `global_count` of all shares are real."""
        if not self.options.streaming:
            yield from eval_batches(self._test_tensors, batch_size=EVAL_BATCH, **self.common)
            return
        left = len(self.test.dataset)
        for images, labels in self._test_loader:
            count = min(left, len(labels) * self.accelerator.num_processes)
            left -= count
            yield Batch(images.to(memory_format=self.format), labels, count)


def hold_out(split: Split, count: int) -> tuple[Split, Split]:
    """Return (what is left of a split, ``count`` images taken out of it): the same ones for every data seed.

    Raises:
        DataError: the split has no more than ``count`` images.
    """
    total = len(split.dataset)
    if not 0 < count < total:
        do = "hold out some images, and leave some to train on"
        raise DataError("So many images cannot be held out.", seen=f"{count} of {total}", do=do)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    out, left = (sorted(part.tolist()) for part in (order[:count], order[count:]))
    return replace(split, dataset=split.dataset.select(left)), replace(split, dataset=split.dataset.select(out))


def _load(options: DataOptions) -> tuple[Split, Split]:
    try:
        return load_splits(
            options.dataset,
            train_split=options.train_split,
            test_split=options.test_split,
            config_name=options.dataset_config,
            image_column=options.image_column,
            label_column=options.label_column,
        )
    except (OSError, ValueError) as error:  # what `datasets` raises for a name or folder that it cannot read
        if isinstance(error, BNAdapterError):
            raise
        raise DataError(
            f"The data set {options.dataset} cannot be loaded.",
            seen=f"{type(error).__name__}: {str(error).splitlines()[0]}",
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
