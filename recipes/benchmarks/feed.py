"""Images per second of the data path: uint8 tensors on the device, and a DataLoader's workers over the same images.

    python recipes/benchmarks/feed.py [--write] [--size 32] [--batch 128] [--workers 0 2 4] [--rounds 5]

Both sides flip, crop with padding 4 and normalise the embedded digits, decoded once, and end in batches on the device.
In each round they take turns; what is printed is the median over rounds. One JSON line, then a table.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from bn_affine_adapters.study.pages import write_section
from bn_affine_adapters.training.data import TensorData, decode
from bn_affine_adapters.training.feed import DataOptions, Feed

PADDING, REPEATS = 4, 5  # the digits are few: that often through in an epoch


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


def compare(size: int = 32, batch: int = 128, workers: Iterable[int] = (0, 2, 4), rounds: int = 5) -> dict[str, Any]:
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

The feed of `recipes/train.py` cuts its batches out of uint8 tensors on the device; the other side is a `DataLoader`
with workers over the same decoded images, through torchvision's transforms of one image. Both flip, crop with padding
{padding} and normalise, {size} px, batches of {batch}; medians of {rounds} rounds in which the sides take turns, their
workers started before.

{table}
{gpu}"""


def table(result: dict[str, Any]) -> str:
    """Return the rates and ratios as a Markdown table."""
    lines = [f"| {side} | {r} | {result['over_feed'][side]} |" for side, r in result["images_per_second"].items()]
    return "\n".join(["| data path | images/s | / feed |", "|---|---|---|", *lines])


def page(result: dict[str, Any]) -> str:
    """Return the section of docs/performance.md."""
    cpu = result["device"] == "cpu"
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} used" if cpu else result["device"]
    )
    return TEXT.format(
        hardware=f"{machine}, torch {torch.__version__}",
        padding=PADDING,
        table=table(result),
        gpu="\nOn a GPU: not yet measured.\n" if cpu else "",
        **{key: result[key] for key in ("size", "batch", "rounds")},
    )


def main() -> None:
    """Print one JSON line, then the table; with --write, into docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("size", 32), ("batch", 128), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--workers", type=int, nargs="+", default=(0, 2, 4))
    parser.add_argument("--write", action="store_true")
    options = vars(parser.parse_args())
    write = options.pop("write")
    result = compare(**options)
    print(json.dumps(result))
    print(table(result))
    if write:
        write_section(Path(__file__).parents[2] / "docs" / "performance.md", "feed", page(result))


if __name__ == "__main__":
    main()
