"""Image data: decode once to uint8, then cut the same batches on every process and device.

``load_splits`` -> ``decode`` -> ``batches`` and ``eval_batches``; or ``stream``, for data sets too large for memory.
What is random follows from (data_seed, epoch): the first 8 bytes of sha256(``"bnaffine-data-v1/<data_seed>/<epoch>"``),
little-endian, seed one generator on the CPU, so neighbouring data seeds and epochs are unrelated.
"""

import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, WebPImagePlugin  # noqa: F401  # PIL tries formats as registered: WebP opens faster if first
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms import Compose, PILToTensor, Resize

from ..errors import ConfigError, DataError
from .generators import drawn_from


@dataclass(frozen=True)
class Split:
    """One split: a ``datasets.Dataset``, its image and label columns, and the class names in label order."""

    dataset: Any
    image_column: str
    label_column: str
    label_names: tuple[str, ...]


@dataclass(frozen=True)
class TensorData:
    """A split: images uint8 (N, C, size, size), or float features; labels int64 (N,); class names in label order."""

    images: Tensor
    labels: Tensor
    label_names: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def to(self, device: torch.device | str) -> "TensorData":
        """Return the same data with images and labels on ``device``."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


class Batch(NamedTuple):
    """One process's part of a global batch."""

    images: Tensor  # float32 (n, C, H, W), normalised
    labels: Tensor  # int64 (n,)
    global_count: int  # how many images the global batch has, all parts together, repeats not counted


def load_splits(
    name: str, *, train_split: str = "train", test_split: str = "test", config_name: str | None = None,
    image_column: str | None = None, label_column: str | None = None,
) -> tuple[Split, Split]:  # fmt: skip
    """Load the train and the test split of an image data set.

    ``name`` is an existing folder, a Hub id, or ``"digits"``: scikit-learn's 1,797 grey 8x8 digits, every fifth of them
    (index % 5 == 4) for test. Columns not given are found by type, then by name. Integer labels: 0..train's largest.

    Raises:
        DataError: a split or a column is missing, the class lists differ, or a label is missing.

    Example:
        >>> [len(split.dataset) for split in load_splits("digits")]
        [1438, 359]
    """
    import datasets

    splits = _digits() if name == "digits" else datasets.load_dataset(os.path.expanduser(name), config_name)
    if missing := {train_split, test_split} - set(splits):
        raise DataError(f"{name} lacks {sorted(missing)}.", seen=f"splits {[*splits]}", do="name its splits")
    train, test = splits[train_split], splits[test_split]
    image, label = _column(train, "image", image_column), _column(train, "label", label_column)
    _column(test, "image", image), _column(test, "label", label)  # the same ones, not others of that type
    names, others = (getattr(split.features[label], "names", None) for split in (train, test))
    if names != others:
        raise DataError(f"{name}: the splits' classes differ.", seen=f"{names}; {others}", do="choose equal ones")
    names = tuple(names or map(str, range(int(_labels(train, label).max()) + 1)))
    return Split(train, image, label, names), Split(test, image, label, names)


def check_classes(data: Split | TensorData, num_classes: int) -> None:
    """Raise DataError unless the data have as many classes as the network has outputs, ``num_classes``."""
    if (count := len(data.label_names)) != num_classes:
        do = f"create the network with num_classes={count}, or load another label_column"
        raise DataError("Network and data disagree.", seen=f"{num_classes} outputs, {count} classes", do=do)


def decode(split: Split, *, size: int, channels: int = 3, workers: int | None = None) -> TensorData:
    """Decode every image once, to uint8 (N, channels, size, size).

    With 3 channels grey is replicated; with 1, colours become their ITU-R 601 luma. Palettes are looked up, alpha is
    dropped. Another size is resized by PIL, bilinear, to the square. ``workers`` counts processes; by default, on
    Linux, one per usable core, at most 8, from 4,096 images on, else none.

    Raises:
        DataError: an image cannot be decoded or has more than 8 bits a value; a label is missing or out of range.
    """
    if channels not in (1, 3):
        raise ConfigError("Images decode to 1 or 3 channels.", seen=f"channels={channels}", do="pass 1 or 3")
    labels = _labels(split.dataset, split.label_column, len(split.label_names))
    if workers is None:  # not threads: PIL holds the interpreter. Only Linux starts processes without a new import.
        workers = min(len(os.sched_getaffinity(0)), 8) if sys.platform == "linux" and len(labels) >= 4096 else 0
    items = _Items(split, Compose([Resize((size, size)), PILToTensor()]), "RGB" if channels == 3 else "L")
    length = max(1, 2**20 // (channels * size**2))  # 1 MiB a batch fits the small shared memory of a container
    images = torch.empty((len(labels), channels, size, size), dtype=torch.uint8)
    try:
        for here, (pixels, _) in zip(images.split(length), DataLoader(items, length, num_workers=workers), strict=True):
            here.copy_(pixels)
    except ValueError as error:  # its last line, after a worker's traceback; its own would keep the workers waiting
        seen, do = str(error).splitlines()[-1], "repair or remove the image; it needs 8 bits a value"
        raise DataError("An image cannot be decoded.", seen=seen, do=do) from error.with_traceback(None)
    return TensorData(images, labels, split.label_names)


def epoch_order(n: int, data_seed: int, epoch: int, crop_padding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw what is random in an epoch over n images, on the CPU, in the order returned; row i is about the i-th shown.

    Returns the order, int64 (n,); flips, bool (n,); and crop offsets (row, column), int64 (n, 2), 0..2 * crop_padding.
    """
    generator = torch.Generator("cpu").manual_seed(_seed(data_seed, epoch))
    order = torch.randperm(n, generator=generator, device="cpu")
    flips = torch.rand(n, generator=generator, device="cpu") < 0.5
    return order, flips, torch.randint(2 * crop_padding + 1, (n, 2), generator=generator, device="cpu")


def steps_per_epoch(
    n: int, batch_size: int, world: int = 1, accumulation: int = 1, drop_remainder: bool = False
) -> int:
    """Return how many optimiser steps ``batches`` makes of n images; raise DataError or ConfigError if none."""
    parts = world * accumulation
    steps = n // batch_size + (not drop_remainder and n % batch_size >= parts) if batch_size >= parts > 0 else 0
    if steps < 1:
        error = DataError if 0 < parts <= batch_size else ConfigError
        seen = f"{n} images, {batch_size=}, {world=}, {accumulation=}"
        raise error("An epoch has no step.", seen=seen, do="use world * accumulation <= batch_size <= images")
    return steps


def batches(
    data: TensorData, *, batch_size: int, data_seed: int, epoch: int, flip: bool, crop_padding: int,
    mean: Sequence[float], std: Sequence[float], rank: int = 0, world: int = 1, accumulation: int = 1,
    drop_remainder: bool = False, memory_format: torch.memory_format = torch.contiguous_format, first_step: int = 0,
) -> Iterator[Batch]:  # fmt: skip
    """Iterate over process ``rank``'s micro-batches of one epoch, from ``first_step`` on, made on the data's device.

    A global batch is the ``batch_size`` images of one optimiser step over all processes and accumulation steps. It is
    cut into world * accumulation contiguous parts, equal but for one image; process r gets part a * world + r in
    accumulation step a. Hence each process gets equally many micro-batches, and the parts join to the single process's
    batch bit for bit. The last global batch of an epoch may be smaller; it is left out if ``drop_remainder``, or if it
    has less than one image a part. The global mean loss is the sum of ``loss_sum / global_count`` over all parts.

    ``crop_padding`` pads this many black pixels (before normalisation) on each side and crops the old size at random;
    ``flip`` mirrors half of the images. ``mean`` and ``std`` are per channel, of values in 0..1. Source: the paper's
    CIFAR-10 recipe (batch 128, last batch kept, flip, crop with padding 4).

    Raises:
        ConfigError: an argument does not fit the others or the data; DataError: there are too few images for a step.
    """
    steps = steps_per_epoch(len(data), batch_size, world, accumulation, drop_remainder)
    parts, scale = world * accumulation, _scaler(data, mean, std, rank, world)
    order, flips, offsets = (t.to(data.images.device) for t in epoch_order(len(data), data_seed, epoch, crop_padding))
    for first in range(first_step * batch_size, steps * batch_size, batch_size):
        count = min(batch_size, len(data) - first)
        for part in range(rank, parts, world):
            here = slice(first + part * count // parts, first + (part + 1) * count // parts)
            images = data.images.index_select(0, order[here])
            if flip or crop_padding:
                images = _crop_and_flip(images, flips[here] & flip, offsets[here], crop_padding)
            yield Batch(scale(images).contiguous(memory_format=memory_format), data.labels[order[here]], count)


def eval_batches(
    data: TensorData, *, batch_size: int, mean: Sequence[float], std: Sequence[float], rank: int = 0, world: int = 1,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Iterator[Batch]:  # fmt: skip
    """Iterate over process ``rank``'s share of the images in order, not augmented.

    A global batch is the next ``global_count`` <= ``batch_size`` images. Each process gets ceil(global_count / world),
    in rank order; where they run out, the last one repeats (and norms in training mode would count it), so that
    ``accelerator.gather(predictions)[: batch.global_count]`` is the predictions for just these images, in order.
    """
    scale = _scaler(data, mean, std, rank, world)
    for first in range(0, len(data), batch_size):
        count = min(batch_size, len(data) - first)
        share = -(-count // world)
        here = torch.arange(rank * share, (rank + 1) * share, device=data.images.device).clamp(max=count - 1) + first
        yield Batch(scale(data.images[here]).contiguous(memory_format=memory_format), data.labels[here], count)


def stream(
    split: Split, transform: Callable[[Image.Image], Tensor], *, batch_size: int, data_seed: int, shuffle: bool,
    workers: int = 0, drop_remainder: bool = False,
) -> DataLoader[tuple[Tensor, int]]:  # fmt: skip
    """Return a loader of [images, labels] that decodes as it goes; ``accelerator.prepare`` shards it.

    ``transform`` takes an RGB PIL image, as ``timm.data.create_transform``'s do. ``batch_size`` is the loader's: one
    process's once prepared. The order follows from data_seed and ``loader.sampler.set_epoch(epoch)``, which a prepared
    loader calls; what ``transform`` draws for an image follows from data_seed, the epoch and the image's row alone, so
    that an epoch may be entered at any batch. ValueError: a broken image.
    """
    _labels(split.dataset, split.label_column, len(split.label_names))
    items, seed = _SeededItems(split, transform, "RGB", data_seed), _seed(data_seed, "stream") % 2**32
    return DataLoader(
        items, batch_size, num_workers=workers, drop_last=drop_remainder, pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed), sampler=_RowsOfEpoch(items, 1, 0, shuffle, seed),
        worker_init_fn=_leave_signals,
    )  # fmt: skip


class _Items(Dataset[tuple[Tensor, int]]):
    """``(transform(image), label)`` by row of a split; the image is in PIL mode ``mode``, RGB or L."""

    def __init__(self, split: Split, transform: Callable[[Image.Image], Tensor], mode: str) -> None:
        self.rows = split.dataset.select_columns([split.image_column, split.label_column]).with_format("arrow")
        self.transform, self.mode, self.feature = transform, mode, split.dataset.features[split.image_column]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        encoded, label = self.rows[index].to_pylist()[0].values()
        try:
            image = self.feature.decode_example(encoded)
            if image.mode[0] in "IF":
                raise ValueError(f"mode {image.mode}")  # PIL would clip 16 bits to 8 without a word
            image = image.convert("RGBA") if image.mode == "P" else image  # or PIL warns of transparent palettes
        except Exception as error:  # PIL raises OSError, ValueError, SyntaxError and more, by format
            raise ValueError(f"image {index}: {error}") from error
        return self.transform(image.convert(self.mode)), label


class _SeededItems(_Items):
    """The same by (epoch, row): what the transform draws follows from these and the data seed."""

    def __init__(self, split: Split, transform: Callable[[Image.Image], Tensor], mode: str, data_seed: int) -> None:
        super().__init__(split, transform, mode)
        self.data_seed = data_seed

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int]:  # type: ignore[override]
        epoch, index = place
        with drawn_from(_seed(self.data_seed, epoch, "row", index)):
            return super().__getitem__(index)


class _RowsOfEpoch(DistributedSampler[Any]):
    """Pairs (epoch, row), in the order of the epoch: workers learn of the epoch in this way alone."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, row) for row in super().__iter__())


def _leave_signals(_: int) -> None:
    """Ignore in a worker what asks the run to stop: the main process ends its workers when it is done."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _digits() -> dict[str, Any]:
    import datasets
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = ((pixels.astype(np.int64) * 255 + 8) // 16).astype(np.uint8).reshape(-1, 8, 8)  # 0..16 to 0..255, rounded
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[*"0123456789"])})
    rows = datasets.Dataset.from_dict({"image": list(images), "label": labels}, features=features)
    held_out = np.arange(len(rows)) % 5 == 4
    return {"train": rows.select(np.flatnonzero(~held_out)), "test": rows.select(np.flatnonzero(held_out))}


def _column(dataset: Any, role: str, given: str | None) -> str:
    """Return the column to use as ``role``, image or label: the given one, or the only one that can be meant."""
    kind, usual = {"image": ("Image", ("image", "img")), "label": ("ClassLabel", ("label", "labels", "target"))}[role]
    types = {name: type(feature).__name__ for name, feature in dataset.features.items()}
    types |= {name: dataset.features[name].dtype for name in types if types[name] == "Value"}
    typed = [name for name in types if types[name] == kind]
    integers = [name for name in types if "int" in types[name] and role == "label" and name in (*usual, given)]
    found = typed or integers if given is None else [name for name in typed + integers if name == given]
    found = found if len(found) < 2 else [name for name in found if name in usual] or found
    if len(found) != 1:
        what, do = f"{len(found)} columns can be {role}_column={given!r}.", f"pass {role}_column=, of type {kind}"
        raise DataError(what, seen=f"columns {types}", do=do)
    return found[0]


def _labels(dataset: Any, column: str, count: int | None = None) -> Tensor:
    """Return all labels, int64 (N,), after a check that there are some and that each is in 0..count-1."""
    values = dataset.select_columns(column).with_format("arrow")[:][column].cast("int64")
    labels = torch.tensor(values.fill_null(-1).to_numpy())
    if not len(labels) or labels.min() < 0 or (count and labels.max() >= count):
        seen = f"{len(labels)} rows, labels {labels.unique()[:20].tolist()} (-1: none), {count} classes"
        raise DataError(f"Not every row has a label in {column!r}.", seen=seen, do="choose a split with all labels")
    return labels


def _crop_and_flip(images: Tensor, flips: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Return crops of the padded images, some mirrored, by one gather over flat planes."""
    (n, channels, height, width), planes = images.shape, torch.nn.functional.pad(images, (padding,) * 4).flatten(2)
    down, across = (torch.arange(length, device=images.device) for length in (height, width))
    columns = offsets[:, 1:] + torch.where(flips[:, None], width - 1 - across, across)
    index = (offsets[:, :1] + down)[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    return planes.gather(2, index.view(n, 1, -1).expand(-1, channels, -1)).view_as(images)


def _scaler(data: TensorData, mean: Sequence[float], std: Sequence[float], rank: int, world: int) -> Callable:
    """Return the map from uint8 images to normalised float32 ones, after a check that all arguments fit."""
    if data.images.is_floating_point():  # features
        return lambda images: images
    if not (len(mean) == len(std) == data.images.shape[1] and 0 <= rank < world):
        seen = f"{data.images.shape[1]} channels, {len(mean)} means, {len(std)} stds, rank {rank} of {world}"
        raise ConfigError("Batches cannot be made.", seen=seen, do="give a mean and a std per channel, rank < world")
    pair = torch.tensor([mean, std], dtype=torch.float32, device=data.images.device).mul_(255).view(2, -1, 1, 1)
    # Not one multiply-add: fused, it may round by an element's place in the tensor, and ranks would differ.
    return lambda images: images.float().sub_(pair[0]).div_(pair[1])


def _seed(*parts: int | str) -> int:
    digest = hashlib.sha256("/".join(["bnaffine-data-v1", *map(str, parts)]).encode()).digest()
    return int.from_bytes(digest[:8], "little")
