"""Measure images per second of R single training runs, and of the R replicates side by side in one process.

    python recipes/benchmarks/replicates.py [--write] [--captured] [--model cifar_resnet14] [--batch 128]
        [--replicates 5] [--steps 20] [--rounds 5]

Uses a GPU if there is one. A step is forward, loss, backward and SGD in float32. The sides take turns in each round,
with R x STEPS single steps or STEPS stacked ones, so that both see equally many images; ratios are of one round, and
their median is printed. With --captured both sides also run by torch.compile(mode="reduce-overhead"), which captures
CUDA graphs on a GPU. One network stands for the single runs, one after another. Prints one JSON line, then a table.
"""

import statistics
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional as F

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model
from bn_affine_adapters.study.costs import seconds_of
from bn_affine_adapters.study.pages import benchmark, machine
from bn_affine_adapters.training.stacked import Stacked
from bn_affine_adapters.training.tables import markdown_table

CLASSES, SIZE, WARMUP = 10, 32, 3


def network(model: str, seed: int, device: torch.device) -> nn.Module:
    """Return a network as the condition `bn` trains it."""
    return get_bn_only_model(timm.create_model(model, num_classes=CLASSES), BNOnlyConfig(seed=seed)).to(device).train()


def stepper(model: nn.Module, shape: tuple[int, ...], captured: bool, device: torch.device) -> Callable[[], None]:
    """Return a training step on fixed images: of shape (batch,) for a single network, (R, batch) for stacked ones."""
    run = torch.compile(model, mode="reduce-overhead", fullgraph=True) if captured else model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(*shape, 3, SIZE, SIZE, device=device)
    labels = torch.randint(CLASSES, shape, device=device).flatten()
    replicates = labels.numel() // shape[-1]

    def step() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(run(images).reshape(-1, CLASSES), labels) * replicates  # the sum of their means
        loss.backward()
        optimizer.step()

    return step


def compare(
    model: str = "cifar_resnet14",
    batch: int = 128,
    replicates: int = 5,
    steps: int = 20,
    rounds: int = 5,
    captured: bool = False,
) -> dict[str, Any]:
    """Return each side's median images per second, and the stacked sides' median ratio to the single ones."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sides: dict[str, tuple[Callable[[], None], int]] = {}
    for way in ("eager", "captured") if captured else ("eager",):
        alone = network(model, 0, device)
        together = Stacked([network(model, seed, device) for seed in range(replicates)])
        sides[f"single {way}"] = stepper(alone, (batch,), way == "captured", device), steps * replicates
        sides[f"stacked {way}"] = stepper(together, (replicates, batch), way == "captured", device), steps
    for step, _ in sides.values():
        seconds_of(step, WARMUP, device.type)
    images = batch * replicates * steps
    taken = [
        {side: images / seconds_of(step, count, device.type) for side, (step, count) in sides.items()}
        for _ in range(rounds)
    ]
    rate = {side: statistics.median(each[side] for each in taken) for side in sides}
    ways = {side.split()[1] for side in sides}
    ratio = {way: statistics.median(each[f"stacked {way}"] / each[f"single {way}"] for each in taken) for way in ways}
    return {
        "model": model,
        "batch": batch,
        "replicates": replicates,
        "steps": steps,
        "rounds": rounds,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "images_per_second": {side: round(value, 1) for side, value in rate.items()},
        "stacked_over_single": {way: round(value, 3) for way, value in sorted(ratio.items())},
    }


TEXT = """Written by `python recipes/benchmarks/replicates.py {arguments}`;
{hardware}.

A step is forward, loss, backward and SGD in float32 at {size} px. "Single" trains the replicates one after another,
"stacked" trains them side by side. The sides take turns: {rounds} rounds of {steps} stacked steps, and as many images
on the other side. Rates are medians, ratios the median over rounds.{captured}

{table}

{where}
"""
CAPTURED = '\nCaptured: `torch.compile(mode="reduce-overhead")`.'
NO_GPU = """On a GPU: not yet measured. Stacking saves the time in which a GPU waits for the CPU; a CPU does not wait.
If the ratio is under 1, train the replicates one after another, or each in a process of its own."""


def page(result: dict[str, Any]) -> str:
    """Return the section of docs/performance.md."""
    rates, ratios = result["images_per_second"], result["stacked_over_single"]
    keys = ("model", "batch", "replicates", "steps", "rounds")
    head = ["network", "batch", "replicates", "step", "single, images/s", "stacked, images/s", "stacked / single"]
    run, ways = [result[key] for key in keys[:3]], sorted(ratios, reverse=True)
    rows = [[*run, way, rates[f"single {way}"], rates[f"stacked {way}"], ratios[way]] for way in ways]
    captured = "captured" in ratios
    return TEXT.format(
        arguments=" ".join(["--write", *["--captured"] * captured, *(f"--{key} {result[key]}" for key in keys)]),
        hardware=machine(),
        size=SIZE,
        rounds=result["rounds"],
        steps=result["steps"],
        captured=CAPTURED if captured else "",
        table=markdown_table(head, rows),
        where=NO_GPU if result["device"] == "cpu" else "",
    )


if __name__ == "__main__":
    usual: Any = {"model": "cifar_resnet14", "batch": 128, "replicates": 5, "steps": 20, "rounds": 5, "captured": False}
    benchmark(__file__, __doc__, compare, page, **usual)
