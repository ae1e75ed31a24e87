"""Measure images per second of the data path: uint8 tensors on the device, and a DataLoader over the same images.

    python recipes/benchmarks/feed.py [--write] [--size 32] [--batch 128] [--workers 0 2 4] [--rounds 5]

Both sides flip, crop with padding 4 and normalise the embedded digits, decoded once, and put batches on the device.
They take turns in each round; printed is the median over rounds. One JSON line, then a table.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from bn_affine_adapters.study.pages import benchmark, machine
from bn_affine_adapters.training.data import TensorData, decode
from bn_affine_adapters.training.feed import DataOptions, Feed
from bn_affine_adapters.training.tables import markdown_table

PADDING = 4
REPEATS = 5  # passes over the data set that are timed together: the digits are few


class Decoded(Dataset):
    """Decoded images, each augmented when it is asked for."""

    def __init__(self, data: TensorData, options: DataOptions) -> None:
        """Compose torchvision's transforms of what the feed does."""
        self.data = data
        crop = v2.RandomCrop(options.image_size, padding=options.crop_padding)
        scale = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(options.mean, options.std)]
        self.transform = v2.Compose([v2.RandomHorizontalFlip(), crop, *scale])

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an image and its label."""
        return self.transform(self.data.images[index]), self.data.labels[index]


def shown(batches: Iterable[Any], device: torch.device) -> int:
    """Return how many images there are in batches, which end on the device with their channels innermost."""
    count = 0
    for images, labels, *_ in batches:
        images.to(device, memory_format=torch.channels_last, non_blocking=True)
        count += len(labels.to(device, non_blocking=True))
    return count


def rate(epoch: Callable[[], Iterable[Any]], device: torch.device) -> float:
    """Return images per second of some epochs."""
    start = time.perf_counter()
    count = sum(shown(epoch(), device) for _ in range(REPEATS))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - start)


def compare(size: int, batch: int, workers: Iterable[int], rounds: int) -> dict[str, Any]:
    """Return each side's median images per second, and the loaders' median ratios to the feed."""
    options = DataOptions(image_size=size, batch_size=batch, flip=True, crop_padding=PADDING)
    accelerator = Accelerator()
    feed, device = Feed(options, accelerator), accelerator.device
    feed.load()
    images = Decoded(decode(feed.train, size=size), options)
    sides: dict[str, Callable[[], Iterable[Any]]] = {"feed": lambda: feed.epoch(0)}
    for count in workers:
        keep: dict[str, Any] = {"persistent_workers": count > 0, "pin_memory": device.type == "cuda"}
        loader = DataLoader(images, batch, shuffle=True, num_workers=count, **keep)
        sides[f"{count} workers"] = loader.__iter__
    for epoch in sides.values():
        shown(epoch(), device)  # workers start, and stay
    taken = [{side: rate(epoch, device) for side, epoch in sides.items()} for _ in range(rounds)]
    return {
        "size": size,
        "batch": batch,
        "rounds": rounds,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "images_per_second": {side: round(statistics.median(each[side] for each in taken)) for side in sides},
        "over_feed": {side: round(statistics.median(r[side] / r["feed"] for r in taken), 3) for side in sides},
    }


TEXT = """Written by `python recipes/benchmarks/feed.py --write`; {hardware}.

Training takes its batches from uint8 tensors on the device ("feed"). The other side is a `DataLoader` with workers
over the same decoded images, with torchvision's transforms of one image. Both flip, crop with padding {padding} and
normalise, at {size} px in batches of {batch}. Medians of {rounds} rounds in which the sides take turns; workers are
started before.

{table}
{gpu}"""


def section(result: dict[str, Any]) -> str:
    """Return the section of docs/performance.md."""
    rows = [[side, rate, result["over_feed"][side]] for side, rate in result["images_per_second"].items()]
    return TEXT.format(
        hardware=machine(),
        padding=PADDING,
        table=markdown_table(["data path", "images/s", "/ feed"], rows),
        gpu="\nOn a GPU: not yet measured.\n" if result["device"] == "cpu" else "",
        **{key: result[key] for key in ("size", "batch", "rounds")},
    )


if __name__ == "__main__":
    benchmark(__file__, __doc__, compare, section, size=32, batch=128, workers=[0, 2, 4], rounds=5)
