"""Measure compact adapters: bytes and accuracy at each number of bits, and the sizes of larger networks.

    python recipes/benchmarks/compact.py ADAPTER [ADAPTER ...] [--train] [--write]

Each ADAPTER is a run of the recipe `digits` with another seed, e.g.
`accelerate launch recipes/train.py threads=1 seed=1 data_seed=1 output_dir=runs/digits1`. The rounding below 8 bits is
fitted to 400 training images without labels. With --train instead, 4 bits alone: the fit is compared with training
through the rounding, from the adapter and from its fitted file. --write puts the tables into docs/compact-adapters.md.
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
from bn_affine_adapters.training.train import read_recipe, train
from bn_affine_adapters.training.validate import sample

PAGE = Path(__file__).parents[2] / "docs" / "compact-adapters.md"
STARTS = {"the adapter": (10, 0.01), "its fitted file": (8, 0.003)}  # epochs, learning rate of Adam
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


def trained(adapter: str, start: Path, epochs: int, lr: float) -> float:
    """Return the accuracy in % of the 4-bit file after training through the rounding, which loses nothing more."""
    seed = load_bn_only_model(adapter).peft_config["default"].seed
    with tempfile.TemporaryDirectory() as folder:
        keys = {"adapter": start, "quantise_bits": 4, "epochs": epochs, "optimizer": "adam", "lr": lr, "threads": 1}
        keys |= {"seed": seed, "data_seed": seed, "running_statistics": "frozen", "weight_decay": 0, "tracker": "null"}
        keys |= {"output_dir": f"{folder}/run", "eval_every": 100}
        (run,) = train(read_recipe(["digits", *(f"{key}={value}" for key, value in keys.items())]))
        _, before, after = accuracies(run.result["adapter"], 4)
    assert before == after, f"the file lost {before - after} points of what was trained"
    return after


def training_page(adapters: list[str]) -> str:
    """Return the section of docs/compact-adapters.md about training through the rounding."""
    found: dict[str, list[float]] = {"float32": [], "rounding fitted": []}
    for adapter in adapters:
        _, before, after = accuracies(adapter, 4)
        found["float32"].append(before)
        found["rounding fitted"].append(after)
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
            images, _ = sample(adapter, "digits", 400)
            file = export(load_bn_only_model(adapter), Path(folder, "x"), format="compact", bits=4, images=images)
            load_bn_only_model(file).save_pretrained(Path(folder, "fitted"))
            for name, how in STARTS.items():
                start = Path(adapter) if name == "the adapter" else Path(folder, "fitted")
                found.setdefault(f"trained, from {name}", []).append(trained(adapter, start, *how))
        print(adapter, {name: values[-1] for name, values in found.items()}, flush=True)
    rows = [[name, f"{statistics.mean(each):.2f}", ", ".join(f"{x:.2f}" for x in each)] for name, each in found.items()]
    return markdown_table(["4 bits", f"mean of {len(adapters)}, %", "each seed, %"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    section = (training_page if options.train else page)(options.adapters)
    print(section)
    if options.write:
        write_section(PAGE, "training" if options.train else "compact", section)
