"""Measure compact adapters: bytes and accuracy at each number of bits, and the sizes of larger networks.

    python recipes/benchmarks/compact.py ADAPTER [ADAPTER ...] [--write]

Each ADAPTER is a run of the recipe `digits` with another seed, e.g.
`accelerate launch recipes/train.py threads=1 seed=1 data_seed=1 output_dir=runs/digits1`. The rounding below 8 bits is
fitted to 400 training images without labels. --write puts the tables into docs/compact-adapters.md.
"""

import argparse
import statistics
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import timm
import torch

from bn_affine_adapters import BNOnlyConfig, export, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.sharing.compact import BITS
from bn_affine_adapters.study.pages import write_section
from bn_affine_adapters.training.tables import markdown_table
from bn_affine_adapters.training.validate import sample

PAGE = Path(__file__).parents[2] / "docs" / "compact-adapters.md"
LARGER = {"cifar_resnet110": 10, "resnet50": 1000}  # classes


def accuracies(adapter: str, bits: int) -> tuple[int, float, float]:
    """Return (bytes of the compact file, accuracy in % before, after)."""
    images, test = sample(adapter, "digits", 400)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()) as said:
        made = export(
            load_bn_only_model(adapter), Path(folder, "x"), format="compact", bits=bits, images=images, test=test
        )
        size = made.stat().st_size
    words = said.getvalue().splitlines()[1].split()  # "accuracy 94.71 % before, 94.99 % after, 359 images"
    return size, float(words[1]), float(words[4])


def size_of(architecture: str, classes: int, bits: int) -> int:
    """Return the bytes of the compact file of a network that was only drawn; one image is enough to write it."""
    model = get_bn_only_model(timm.create_model(architecture, num_classes=classes), BNOnlyConfig(seed=0)).eval()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        made = export(model, Path(folder, "x"), format="compact", bits=bits, images=torch.zeros(1, 3, 64, 64))
        return made.stat().st_size


def page(adapters: list[str]) -> str:
    """Return the section of docs/compact-adapters.md."""
    rows = []
    for bits in sorted(BITS, reverse=True):
        found = [accuracies(adapter, bits) for adapter in adapters]
        sizes, before, after = ([each[i] for each in found] for i in range(3))
        lost = [b - a for b, a in zip(before, after, strict=True)]
        spread = f" ± {statistics.stdev(after):.2f}" if len(after) > 1 else ""
        row = [bits, f"{max(sizes):,}", f"{statistics.mean(after):.2f}{spread}", f"{statistics.mean(lost):.2f}"]
        rows.append([*row, f"{max(lost):.2f}"])
        print(*rows[-1], sep="\t", flush=True)
    title = f"accuracy, %, n = {len(adapters)}"
    digits = markdown_table(["bits", "bytes", title, "lost, points", "lost at most"], rows)
    larger = [[name, f"{size_of(name, classes, 8):,}"] for name, classes in LARGER.items()]
    text = f"Digits, ResNet-14, 40 epochs; {statistics.mean(before):.2f} % in float32:"
    return f"{text}\n\n{digits}\n\nOther networks, without label names:\n\n" + markdown_table(
        ["network", "bytes at 8 bits"], larger
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    section = page(options.adapters)
    print(section)
    if options.write:
        write_section(PAGE, "compact", section)
