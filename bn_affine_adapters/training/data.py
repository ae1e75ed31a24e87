"""Image data: decode once to uint8, then cut the same batches on every process and device.

``load_splits`` -> ``decode`` -> ``batches`` and ``eval_batches``; or ``stream``, for data sets too large for memory.
What is random follows from (data_seed, epoch): the first 8 bytes of sha256(``"bnaffine-data-v1/<data_seed>/<epoch>"``),
little-endian, seed one generator on the CPU, so neighbouring data seeds and epochs are unrelated. What is random in one
streamed image follows from (data_seed, epoch, its row) in the same way.
"""

import hashlib
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, WebPImagePlugin  # noqa: F401  # PIL tries formats as registered: WebP opens faster if first
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import ConfigError, DataError
from ..model.images import as_mode, evaluation_transform, normaliser

VALIDATION = ("validation", "valid", "val")  # names of a split to test on, where there is none called "test"
NAMED = ("string", "large_string", "bool")  # types of a label column whose values are the names of the classes


@dataclass(frozen=True)
class Split:
    """One split: a ``datasets.Dataset``, its image and label columns, and the class names in label order.

    ``codes`` maps the values of the label column to labels; by default the values are the labels.
    """

    dataset: Any
    image_column: str
    label_column: str
    label_names: tuple[str, ...]
    name: str = ""  # what it is a split of, e.g. "test" or "100 held out of train"
    codes: Mapping[Any, int] | None = None
    rows: Sequence[int] | None = None  # where its images are in the whole split, if it is a part of it

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.dataset)

    def part(self, rows: Sequence[int]) -> "Split":
        """Return the images of these rows."""
        known = range(len(self)) if self.rows is None else self.rows
        return replace(self, dataset=self.dataset.select(rows), rows=[known[row] for row in rows])

    def place(self, row: int) -> str:
        """Return how an error names an image: by its place in the whole split."""
        whole = self.name.rpartition(" held out of ")[2]
        return f"image {row if self.rows is None else self.rows[row]}" + (f" of the split {whole}" if whole else "")


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
    image_column: str | None = None, label_column: str | None = None, held_out: int = 0,
) -> tuple[Split, Split]:  # fmt: skip
    """Load the train and the test split of an image data set.

    ``name`` is an existing folder, a Hub id, or ``"digits"``: scikit-learn's 1,797 grey 8x8 digits, every fifth of them
    (index % 5 == 4) for test. With ``held_out``, so many images of the train split are the test split. Where there is
    no split "test", "validation", "valid" or "val" is taken; if the train split is the only one, a fifth is held out.

    Columns not given are found by type, then by name. Integer labels: 0..train's largest. Strings: sorted.

    Raises:
        DataError: a split or a column is missing, the class lists differ, or a label is missing.

    Example:
        >>> [len(split) for split in load_splits("digits")]
        [1438, 359]
    """
    import datasets

    splits = _digits() if name == "digits" else datasets.load_dataset(os.path.expanduser(name), config_name)
    usual = (test_split, *(VALIDATION if test_split in ("test", *VALIDATION) else ()))
    test_split = next((split for split in usual if split in splits), test_split)
    alone = held_out or (test_split == "test" and [*splits] == [train_split])
    if missing := {train_split, *(() if alone else (test_split,))} - set(splits):
        raise DataError(f"{name} lacks {sorted(missing)}.", seen=f"splits {[*splits]}", do="name its splits")
    train, test = splits[train_split], splits[train_split if alone else test_split]
    image, label = _column(train, "image", image_column), _column(train, "label", label_column)
    _column(test, "image", image), _column(test, "label", label)  # the same ones, not others of that type
    names, codes = _classes(name, train, test, label)
    whole = Split(train, image, label, names, train_split, codes)
    if not isinstance(train.features[label], datasets.ClassLabel):
        _labels(whole)  # of a value missing here, nobody knows which class it is
    if alone:
        return hold_out(whole, held_out or max(1, len(train) // 5))
    return whole, replace(whole, dataset=test, name=test_split)


def hold_out(split: Split, count: int) -> tuple[Split, Split]:
    """Return (what is left of a split, ``count`` images taken out of it): the same ones for every data seed.

    Raises:
        DataError: the split has no more than ``count`` images.
    """
    total = len(split)
    if not 0 < count < total:
        do = "hold out some images, and leave some to train on"
        raise DataError("So many images cannot be held out.", seen=f"{count} of {total}", do=do)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    out, left = (split.part(sorted(part.tolist())) for part in (order[:count], order[count:]))
    return left, replace(out, name=f"{count} held out of {split.name}")


def numbered(split: Split, names: Sequence[str]) -> Split:
    """Return a split whose classes are numbered in the order of ``names``; one of plain integers stays as it is.

    Raises:
        DataError: the split has other classes.
    """
    own = split.label_names
    has_names = split.codes or getattr(split.dataset.features[split.label_column], "names", None)
    if not has_names or own == tuple(names):
        return split
    if sorted(own) != sorted(names) or len(set(own)) < len(own):
        lack, more = ([n for n in one if n not in other][:20] for one, other in ((names, own), (own, names)))
        raise DataError(
            "The classes of the data are not those of the network.",
            seen=f"missing in the data: {lack}; unknown to the network: {more}; {len(own)} and {len(names)} classes",
            do="give the data set that the network was trained for, with classes of the same names, each once",
        )
    place = {name: label for label, name in enumerate(names)}
    codes = split.codes or {label: label for label in range(len(own))}
    codes = {value: place[own[label]] for value, label in codes.items()}
    return replace(split, label_names=tuple(names), codes=codes)


def check_classes(data: Split | TensorData, num_classes: int) -> None:
    """Raise DataError unless the data have as many classes as the network has outputs, ``num_classes``."""
    if (count := len(data.label_names)) != num_classes:
        do = f"create the network with num_classes={count}, or load another label_column"
        raise DataError("Network and data disagree.", seen=f"{num_classes} outputs, {count} classes", do=do)


def decode(
    split: Split, *, size: int | Sequence[int], channels: int = 3, workers: int | None = None, **preparation: Any
) -> TensorData:
    """Decode every image once, to uint8 (N, channels, height, width), as `as_mode` and timm's evaluation prepare it.

    Args:
        split: of images.
        size: of the square, or (height, width).
        channels: 3, or 1 for grey.
        workers: processes; by default, on Linux, one per usable core, at most 8, from 4,096 images on, else none.
        preparation: more keys of a data configuration; by default the whole image is resized, bilinear.

    Raises:
        DataError: an image cannot be decoded; a label is missing or out of range.
        ConfigError: the size, the channels or the preparation is not usable.
    """
    height, width = (size, size) if isinstance(size, int) else size
    how = {"crop_pct": 1.0, "crop_mode": "squash", **preparation, "input_size": [channels, height, width]}
    items = _Items(split, evaluation_transform(how), channels)
    labels = _labels(split)
    workers = _workers(len(labels)) if workers is None else workers
    length = max(1, 2**20 // (channels * height * width))  # 1 MiB a batch fits the small shared memory of a container
    images = torch.empty((len(labels), channels, height, width), dtype=torch.uint8)
    with _naming_images():
        for here, pixels in zip(images.split(length), DataLoader(items, length, num_workers=workers), strict=True):
            here.copy_(pixels)
    return TensorData(images, labels, split.label_names)


def readable(split: Split, *, channels: int = 3, workers: int | None = None) -> tuple[Split, list[str]]:
    """Return the images of a split that can be decoded, and what is wrong with each of the others, by its place.

    Args: as in `decode`; every image is decoded once.
    """
    items = _Tried(_Items(split, _no_pixels, channels))
    loader = DataLoader(items, 64, num_workers=_workers(len(split)) if workers is None else workers, collate_fn=list)
    problems = [problem for batch in loader for problem in batch]
    if not any(problems):
        return split, []
    return split.part([row for row, problem in enumerate(problems) if not problem]), [*filter(None, problems)]


def epoch_order(n: int, data_seed: int, epoch: int, crop_padding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw what is random in an epoch over n images, on the CPU, in the order returned; row i is about the i-th shown.

    Returns the order, int64 (n,); flips, bool (n,); and crop offsets (row, column), int64 (n, 2), 0..2 * crop_padding.
    """
    generator = torch.Generator("cpu").manual_seed(_seed(data_seed, epoch))
    order = torch.randperm(n, generator=generator, device="cpu")
    flips = torch.rand(n, generator=generator, device="cpu") < 0.5
    return order, flips, torch.randint(2 * crop_padding + 1, (n, 2), generator=generator, device="cpu")


def steps_per_epoch(n: int, batch_size: int, world: int = 1, accumulation: int = 1) -> int:
    """Return how many optimiser steps an epoch of n images has; raise DataError or ConfigError if none.

    Images that are left at the end are a step of their own if they are two or more for each part, or else belong to the
    step before: BatchNorm takes no batch of one image where one pixel is left of it.
    """
    parts = world * accumulation
    full, left = divmod(n, batch_size) if batch_size >= parts > 0 else (0, 0)
    steps = full + (left >= 2 * parts) if full else int(left >= parts > 0)
    if steps < 1:
        error = DataError if 0 < parts <= batch_size else ConfigError
        seen = f"{n} images, {batch_size=}, {world=}, {accumulation=}"
        raise error("An epoch has no step.", seen=seen, do="use world * accumulation <= batch_size <= images")
    return steps


def batches(
    data: TensorData, *, batch_size: int, data_seed: int, epoch: int, flip: bool, crop_padding: int,
    mean: Sequence[float], std: Sequence[float], rank: int = 0, world: int = 1, accumulation: int = 1,
    memory_format: torch.memory_format = torch.contiguous_format, first_step: int = 0,
) -> Iterator[Batch]:  # fmt: skip
    """Iterate over process ``rank``'s micro-batches of one epoch, from ``first_step`` on, made on the data's device.

    A global batch is the ``batch_size`` images of one optimiser step over all processes and accumulation steps. It is
    cut into world * accumulation contiguous parts, equal but for one image; process r gets part a * world + r in
    accumulation step a. Hence each process gets equally many micro-batches, and the parts join to the single process's
    batch bit for bit. The last global batch of an epoch may be smaller; if it would have less than two images a part,
    they belong to the batch before. The global mean loss is the sum of ``loss_sum / global_count`` over all parts.

    ``crop_padding`` pads this many black pixels (before normalisation) on each side and crops the old size at random;
    ``flip`` mirrors half of the images. ``mean`` and ``std`` are per channel, of values in 0..1. Source: the paper's
    CIFAR-10 recipe (batch 128, last batch kept, flip, crop with padding 4).

    Raises:
        ConfigError: an argument does not fit the others or the data; DataError: there are too few images for a step.
    """
    scale = _scaler(data, mean, std, rank, world)
    order, flips, offsets = (t.to(data.images.device) for t in epoch_order(len(data), data_seed, epoch, crop_padding))
    for here, count in _parts(len(data), batch_size, rank, world, accumulation, first_step):
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
    for here, count in _shares(len(data), batch_size, rank, world):
        here = here.to(data.images.device)
        yield Batch(scale(data.images[here]).contiguous(memory_format=memory_format), data.labels[here], count)


def stream(
    split: Split, transform: Callable[[Image.Image], Tensor], *, batch_size: int, epoch: int | None, data_seed: int = 0,
    channels: int = 3, rank: int = 0, world: int = 1, accumulation: int = 1, workers: int = 0, first_step: int = 0,
) -> Iterator[Batch]:  # fmt: skip
    """Return process ``rank``'s micro-batches of one epoch, on the CPU, of images that are decoded as they are needed.

    They hold the same images as those of `batches`, in the same order; or, where ``epoch`` is None, of `eval_batches`.
    ``transform`` makes a tensor of an image that `as_mode` has prepared. In a training epoch its draws, by the global
    generators of Python, NumPy and torch on the CPU, follow from data_seed, epoch and the image's row: neither the
    number of processes nor that of ``workers`` changes them, nor does ``first_step``, before which no image is decoded.

    Raises:
        DataError: a label is missing; there are too few images for a step; while it runs: an image cannot be decoded.
    """
    labels = _labels(split)
    if epoch is None:
        parts = list(_shares(len(labels), batch_size, rank, world))
    else:
        order, cut = epoch_order(len(labels), data_seed, epoch)[0], (batch_size, rank, world, accumulation, first_step)
        parts = [(order[part], count) for part, count in _parts(len(labels), *cut)]
    items = _Items(split, transform, channels, None if epoch is None else (data_seed, epoch))
    loader = DataLoader(
        items, batch_sampler=[here.tolist() for here, _ in parts], num_workers=workers, worker_init_fn=_leave_signals,
        pin_memory=torch.cuda.is_available(), generator=torch.Generator(),  # its own: it draws once an epoch
    )  # fmt: skip
    return _streamed(loader, [(labels[here], count) for here, count in parts])


def _streamed(loader: DataLoader[Tensor], shown: list[tuple[Tensor, int]]) -> Iterator[Batch]:
    with _naming_images():
        for images, (labels, count) in zip(loader, shown, strict=True):
            yield Batch(images, labels, count)


def _parts(
    n: int, batch_size: int, rank: int, world: int, accumulation: int, first_step: int
) -> Iterator[tuple[slice, int]]:
    """Yield process ``rank``'s parts of the global batches of n images in training, and the size of each batch."""
    steps, parts = steps_per_epoch(n, batch_size, world, accumulation), world * accumulation
    for first in range(first_step * batch_size, steps * batch_size, batch_size):
        count = batch_size if first < (steps - 1) * batch_size else n - first
        for part in range(rank, parts, world):
            yield slice(first + part * count // parts, first + (part + 1) * count // parts), count


def _shares(n: int, batch_size: int, rank: int, world: int) -> Iterator[tuple[Tensor, int]]:
    """Yield process ``rank``'s equal shares of n images in order, the last image repeated, and the batches' sizes."""
    for first in range(0, n, batch_size):
        count = min(batch_size, n - first)
        share = -(-count // world)
        yield torch.arange(rank * share, (rank + 1) * share).clamp(max=count - 1) + first, count


class _UndecodedError(ValueError):
    """An image cannot be decoded: one message, so that torch raises it again when it comes from a worker."""


@contextmanager
def _naming_images() -> Generator[None, None, None]:
    """Say in three parts which image cannot be decoded."""
    try:
        yield
    except _UndecodedError as error:
        seen = str(error).rpartition("_UndecodedError: ")[2]  # after the traceback of a worker
        do = "repair, convert or remove the image"
        # Without its own traceback, for which workers would wait.
        raise DataError("An image cannot be decoded.", seen=seen, do=do) from error.with_traceback(None)


class _Items(Dataset[Tensor]):
    """``transform(image)`` by row of a split; its draws follow from ``drawn`` and the row, if given."""

    def __init__(
        self,
        split: Split,
        transform: Callable[[Image.Image], Tensor],
        channels: int,
        drawn: tuple[int, int] | None = None,
    ) -> None:
        self.rows = split.dataset.select_columns([split.image_column]).with_format("arrow")
        self.feature = split.dataset.features[split.image_column]
        self.transform, self.channels, self.drawn = transform, channels, drawn
        self.place = replace(split, dataset=()).place  # without the images, which need not go to a worker twice

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        (encoded,) = self.rows[index].to_pylist()[0].values()
        try:
            image = as_mode(self.feature.decode_example(encoded), self.channels)
        except Exception as error:  # PIL raises OSError, ValueError, SyntaxError and more, by format
            path = f" ({encoded['path']})" if isinstance(encoded, dict) and encoded.get("path") else ""
            raise _UndecodedError(f"{self.place(index)}{path}: {' '.join(str(error).split())}") from error
        with _drawn_from(_seed(*self.drawn, index)) if self.drawn else nullcontext():
            return self.transform(image)


class _Tried(Dataset[str | None]):
    """What is wrong with an image, by row; None if it can be decoded."""

    def __init__(self, items: _Items) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> str | None:
        try:
            self.items[index]
        except _UndecodedError as error:
            return str(error)
        return None


def _no_pixels(image: Image.Image) -> Tensor:
    return torch.empty(0)


def _workers(images: int) -> int:
    """Return how many processes decode so many images: not threads, since PIL holds the interpreter."""
    # Only Linux starts processes without a new import.
    return min(len(os.sched_getaffinity(0)), 8) if sys.platform == "linux" and images >= 4096 else 0


@contextmanager
def _drawn_from(seed: int) -> Generator[None, None, None]:
    """Let the global generators on the CPU start from a seed, and leave them as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would change those of GPUs too
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


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
    plain = [name for name in types if role == "label" and ("int" in types[name] or types[name] in NAMED)]
    plain = [name for name in plain if name in (*usual, given)]
    found = typed or plain if given is None else [name for name in typed + plain if name == given]
    found = found if len(found) < 2 else [name for name in found if name in usual] or found
    files = getattr(dataset.info, "builder_name", None) == "imagefolder"
    if role == "label" and given is None and files and set(types.values()) == {"Image"}:
        what = "The images have no labels: they lie in one folder, or there is a folder of one class alone."
        do = "a folder for each class, two or more, in train and in test: train/cat, train/dog, test/cat, test/dog"
        raise DataError(what, seen=f"columns {types}", do=do)
    if len(found) != 1:
        what = f"{len(found)} columns can be {role}_column={given!r}."
        do = f"pass {role}_column=, of type {kind}" + (", integer or string" if role == "label" else "")
        raise DataError(what, seen=f"columns {types}", do=do)
    return found[0]


def _classes(name: str, train: Any, test: Any, column: str) -> tuple[tuple[str, ...], dict[Any, int] | None]:
    """Return the names of the classes in the order of their labels, and the label of each value that is no label."""
    names, others = (getattr(split.features[column], "names", None) for split in (train, test))
    if names != others:
        raise DataError(f"{name}: the splits' classes differ.", seen=f"{names}; {others}", do="choose equal ones")
    if names:
        return tuple(names), None
    if train.features[column].dtype not in NAMED:
        return _numbers(name, _integers(train, column)), None
    values, there = (sorted({*split.unique(column)} - {None}) for split in (train, test))
    if unseen := [value for value in there if value not in values]:
        do = "give every class some images to train on"
        raise DataError(f"{name}: the splits' classes differ.", seen=f"in the test split alone: {unseen[:20]}", do=do)
    return tuple(map(str, values)), {value: label for label, value in enumerate(values)}


def _numbers(name: str, labels: Tensor) -> tuple[str, ...]:
    """Return the names of classes that are plain integers: 0, 1, ... up to the largest, each with an image.

    Raises:
        DataError: a number is left out, as in 0, 1, 5: nobody knows whether that is a class.
    """
    there = labels[labels >= 0].unique().tolist()
    if there != [*range(len(there))]:
        absent = next(number for number, label in enumerate([*there, -1]) if number != label)
        raise DataError(
            f"{name}: the labels are integers that leave numbers out.",
            seen=f"no image to train on has label {absent}; the largest of {len(there):,} labels is {there[-1]}",
            do="number the classes 0, 1, 2, ..., or give names: a column of strings, or a ClassLabel",
        )
    return tuple(map(str, there))


def _integers(dataset: Any, column: str) -> Tensor:
    values = dataset.select_columns(column).with_format("arrow")[:][column].cast("int64")
    return torch.tensor(values.fill_null(-1).to_numpy())


def _labels(split: Split) -> Tensor:
    """Return all labels, int64 (N,), after a check that there are some and that each is a class."""
    dataset, column, count = split.dataset, split.label_column, len(split.label_names)
    if split.codes is None:
        labels = _integers(dataset, column)
    else:
        values = dataset.select_columns(column).with_format("arrow")[:][column].to_pylist()
        labels = torch.tensor([split.codes.get(value, -1) for value in values], dtype=torch.int64)
    if not len(labels) or labels.min() < 0 or labels.max() >= count:
        wrong = ((labels < 0) | (labels >= count)).nonzero().flatten()
        first = f"the first without is {split.place(int(wrong[0]))}; " if len(wrong) else ""
        seen = f"{first}{len(labels)} rows, labels {labels.unique()[:20].tolist()} (-1: none), {count} classes"
        raise DataError(f"Not every row has a label in {column!r}.", seen=seen, do="choose a split with all labels")
    return labels


def check_training(split: Split) -> None:
    """Warn of classes that no image of a training split has; raise DataError if there is one class alone."""
    names = split.label_names
    if len(names) < 2:
        do = "give images of at least two classes, each class in a folder of its own"
        raise DataError("There is nothing to tell apart.", seen=f"one class: {', '.join(names)}", do=do)
    empty = sorted({*range(len(names))} - {*_labels(split).tolist()})
    if empty:
        shown = ", ".join(names[label] for label in empty[:20]) + (", ..." if empty[20:] else "")
        warnings.warn(f"No image to train on is of {len(empty)} of {len(names)} classes: {shown}", stacklevel=2)


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
    return normaliser(mean, std, data.images.device)


def _seed(*parts: int | str) -> int:
    digest = hashlib.sha256("/".join(["bnaffine-data-v1", *map(str, parts)]).encode()).digest()
    return int.from_bytes(digest[:8], "little")
