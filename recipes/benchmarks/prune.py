"""Measure pruning: what share of a network leaves, whether it computes the same, and the time of a batch on a CPU.

    python recipes/benchmarks/prune.py ADAPTER [ADAPTER ...] [--write]

The adapters trained with a weight decay that makes small gammas, e.g. with
`bn-adapters train weight_decay=1e-2 seed=1 data_seed=1 output_dir=runs/sparse1`. Rows are means over adapters of one
recipe. --write puts the tables into docs/pruning.md.
"""

import argparse
import json
import statistics
import time
from copy import deepcopy
from itertools import groupby
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from bn_affine_adapters import load_bn_only_model
from bn_affine_adapters.deploy.pruning import PruneReport, prune
from bn_affine_adapters.norms.statistics import BATCH_NORMS
from bn_affine_adapters.study.pages import machine, write_section
from bn_affine_adapters.training.tables import markdown_table
from bn_affine_adapters.training.validate import sample

PAGE = Path(__file__).parents[2] / "docs" / "pruning.md"
THRESHOLDS = (0.0, 0.01, 0.03)
ROUNDS, BATCH = 15, 64
FAMILIES: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "mobilenetv2_050": {},
    "mobilenetv3_small_050": {},
    "densenet121": {"growth_rate": 16, "block_config": (3, 6, 6)},
    "efficientnet_lite0": {},
    "test_efficientnet": {},
}
LEFT = ["constant", "channels", "parameters", "multiply-adds", "time"]


def cpu_seconds(network: nn.Module, images: Tensor, count: int) -> float:
    """Return the processor time of one thread, which other processes do not lengthen."""
    start = time.process_time()
    for _ in range(count):
        network(images)
    return time.process_time() - start


@torch.inference_mode()
def time_ratio(network: nn.Module, smaller: nn.Module, images: Tensor) -> float:
    """Return the median of the ratios of neighbouring runs, which take turns."""
    cpu_seconds(smaller, images, 3)
    count = max(1, int(0.1 / cpu_seconds(network, images, 3) * 3))
    rounds = [[cpu_seconds(each, images, count) for each in (smaller, network)] for _ in range(ROUNDS)]
    return statistics.median(new / old for new, old in rounds)


def left(report: PruneReport, ratio: float) -> list[float]:
    """Return what is constant, and what is left of channels, parameters, multiply-adds and time, in %."""
    pairs = (report.channels, report.parameters, report.multiply_adds)
    shares = [report.dead / report.channels[0], *(after / before for before, after in pairs), ratio]
    return [100 * share for share in shares]


def recipe_of(adapter: str) -> dict[str, Any]:
    """Return the recipe that an adapter was trained by."""
    return json.loads(Path(adapter, "results.json").read_text(encoding="utf-8"))[0]["recipe"]


def name_of(adapter: str) -> str:
    """Return what tells one recipe from another."""
    recipe = recipe_of(adapter)
    data = Path(recipe["dataset"]).name
    return f"{data}, {recipe['model']}, {recipe['epochs']} epochs, decay {recipe['weight_decay']:g}"


def measure(adapter: str, threshold: float) -> list[float]:
    """Return `left`, and (accuracy before, after, in %; difference of the outputs) of a trained adapter."""
    recipe = recipe_of(adapter)
    _, test = sample(adapter, recipe["dataset"], 1)
    model = load_bn_only_model(adapter)
    smaller, report = prune(model, threshold, test=test)
    words = report.accuracy.split()  # "accuracy 94.71 % before, 94.99 % after, 359 images"
    ratio = time_ratio(model.merge_and_unload().eval(), smaller, test[0][0][:BATCH])
    return [*left(report, ratio), float(words[1]), float(words[4]), report.difference]


def trained(adapters: list[str]) -> str:
    """Return the table of trained adapters."""
    rows = []
    for name, group in groupby(sorted(adapters, key=name_of), key=name_of):
        folders = list(group)
        for threshold in THRESHOLDS:
            found = [measure(folder, threshold) for folder in folders]
            means = [statistics.mean(column) for column in zip(*found, strict=True)]
            accuracy = f"{means[-3]:.2f} to {means[-2]:.2f}"
            rows.append([name, len(found), threshold, *(f"{mean:.1f}" for mean in means[:-3]), accuracy])
            print(*rows[-1], f"{max(row[-1] for row in found):.1e}", sep="\t", flush=True)
    return markdown_table(["recipe", "n", "threshold", *LEFT, "accuracy"], rows)


def families() -> str:
    """Return the table of networks, half of whose gammas are 0."""
    rows = []
    for name, args in FAMILIES.items():
        torch.manual_seed(0)
        network = timm.create_model(name, num_classes=10, **args).eval().requires_grad_(False)
        for norm in [module for module in network.modules() if type(module).forward in BATCH_NORMS]:
            norm.weight[torch.rand(len(norm.weight)) < 0.5] = 0
            norm.bias.normal_(0, 0.5)
        images = torch.randn(8, 3, 96, 96)
        smaller, report = prune(network, input_size=images.shape[1:])
        expected, got = network(images), smaller(images)
        difference = (expected - got).abs().max() / expected.abs().max()
        ratio = time_ratio(deepcopy(network), smaller, images)
        rows.append([name, *(f"{share:.1f}" for share in left(report, ratio)), f"{difference:.1e}"])
        print(*rows[-1], sep="\t", flush=True)
    return markdown_table(["network", *LEFT, "difference"], rows)


def page(adapters: list[str]) -> str:
    """Return the section of docs/pruning.md."""
    return f"""{machine()}.
Shares in %: constant channels of norm layers; then what is left.
Time is that of a batch, the median of {ROUNDS} pairs of neighbouring runs.

{trained(adapters)}

Networks that were not trained, half of the gammas 0 at random, betas drawn from a normal distribution with standard
deviation 0.5, 96 x 96 pixels; the difference is the largest one of the outputs over the largest output:

{families()}"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    section = page(options.adapters)
    print(section)
    if options.write:
        write_section(PAGE, "prune", section)
