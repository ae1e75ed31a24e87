"""Try ideas for a higher accuracy at the same bytes, on the digits: gamma and beta of cifar_resnet14, seed by seed.

    python recipes/benchmarks/ideas.py [--ideas NAME ...] [--seeds 2] [--epochs 12] [--confirm] [--output FILE.jsonl]

An idea is tried on 144 of the training images (every tenth), which are left out of training; the test images are read
with --confirm alone, which trains on all training images. A line of the file that has an idea, seed and schedule is not
computed again. What the recipe has no key for is done here: it becomes one if it helps.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from bn_affine_adapters.norms.find import affine, is_norm
from bn_affine_adapters.seed.draws import draw
from bn_affine_adapters.training.feed import Feed, accuracy
from bn_affine_adapters.training.lines import append
from bn_affine_adapters.training.loop import build
from bn_affine_adapters.training.optimizer import create_optimizer
from bn_affine_adapters.training.schedule import lr_at
from bn_affine_adapters.training.train import read_recipe

HELD_OUT = 144
OUTPUT = Path(__file__).parents[1] / "results" / "frontier" / "ideas.jsonl"
# Keys of the recipe, and under "here" what this script does itself.
IDEAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lr 0.1": {"lr": 0.1},
    "lr 0.6": {"lr": 0.6},
    "norm_init ones": {"norm_init": "ones"},
    "norm_init ones_beta_one": {"norm_init": "ones_beta_one"},
    "norm_init symmetric": {"norm_init": "symmetric"},
    "warm-up, 2 epochs": {"warmup_epochs": 2},
    "adamw, lr 0.03": {"optimizer": "adamw", "lr": 0.03},
    "adamw, lr 0.1": {"optimizer": "adamw", "lr": 0.1},
    "beta's lr x 3": {"here": {"beta": 3.0}},
    "beta's lr x 1/3": {"here": {"beta": 1 / 3}},
    "no weight decay": {"weight_decay": 0},
    "label smoothing 0.1": {"here": {"smoothing": 0.1}},
    "distillation": {"here": {"teacher": True}},
    "batch 32": {"batch_size": 32},
    "weights binary": {"weight_init": "binary"},
    "weights sparse, 1/4": {"here": {"sparse": 0.25}},
    "weights sparse, 1/16": {"here": {"sparse": 1 / 16}},
    "gamma shared by 2": {"here": {"shared": 2}},
    "gamma shared by 4": {"here": {"shared": 4}},
    "batch 32, beta's lr x 3": {"batch_size": 32, "here": {"beta": 3.0}},
}


def recipe_of(idea: str, seed: int, epochs: int, confirm: bool, **changes: Any) -> Any:
    """Return the recipe of an idea; of what is ``here`` it knows nothing."""
    keys = {key: value for key, value in IDEAS[idea].items() if key != "here"} | changes
    held_out = 0 if confirm else HELD_OUT
    words = ["digits", f"seed={seed}", f"data_seed={seed}", f"epochs={epochs}", f"held_out={held_out}"]
    return read_recipe([*words, *(f"{key}={value}" for key, value in keys.items())])


def sparse_(network: nn.Module, share: float, seed: int) -> None:
    """Keep a share of each convolution's weights, at least one a filter, larger by the root of what is left out."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            rows = module.weight.data.flatten(1)
            kept = max(1, round(share * rows.shape[1]))
            order = np.argsort(draw(tuple(rows.shape), seed, f"{name}:sparse", "unit"), axis=1, kind="stable")
            keep = torch.zeros_like(rows).scatter(1, torch.from_numpy(order[:, :kept].copy()), 1.0)
            rows.mul_(keep * (rows.shape[1] / kept) ** 0.5)


def parts(network: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gammas and betas that train."""
    norms = [module for module in network.modules() if is_norm(module)]
    pairs = [(m.get_parameter(g), m.get_parameter(b)) for m in norms for g, b in [affine(m)] if g and b]
    return [g for g, _ in pairs if g.requires_grad], [b for _, b in pairs if b.requires_grad]


def share_(gammas: list[Tensor], count: int, what: Callable[[Tensor], Tensor | None]) -> None:
    """Replace values, or gradients, of gammas by their mean over groups of neighbouring channels."""
    for gamma in gammas:
        tensor = what(gamma)
        assert tensor is not None
        tensor.copy_(tensor.view(-1, count).mean(1, keepdim=True).expand(-1, count).reshape(-1))


def fit(network: nn.Module, feed: Feed, recipe: Any, here: dict[str, Any], teacher: nn.Module | None) -> None:
    """Train as the recipe says, with what an idea does besides."""
    optimizer, step = create_optimizer(recipe, network), 0
    gammas, betas = parts(network) if here.keys() & {"beta", "shared"} else ([], [])
    if "beta" in here:
        usual = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        optimizer.param_groups[:] = [{**usual, "params": gammas}, {**usual, "params": betas}]
    if "shared" in here:
        with torch.no_grad():
            share_(gammas, here["shared"], lambda gamma: gamma)
    for epoch in range(recipe.epochs):
        network.train()
        for batch in feed.epoch(epoch):
            for group, factor in zip(optimizer.param_groups, (1.0, here.get("beta", 1.0)), strict=False):
                group["lr"] = factor * lr_at(recipe, step, feed.steps)
            logits = network(batch.images)
            loss = F.cross_entropy(logits, batch.labels, label_smoothing=here.get("smoothing", 0.0))
            if teacher is not None:
                with torch.no_grad():
                    soft = (teacher(batch.images) / 4).softmax(1)
                loss = 0.1 * loss + 0.9 * 16 * F.kl_div((logits / 4).log_softmax(1), soft, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            if "shared" in here:
                share_(gammas, here["shared"], lambda gamma: gamma.grad)
            optimizer.step()
            step += 1


def taught(seed: int, epochs: int, confirm: bool) -> nn.Module:
    """Return a network of the same architecture and seed that trained whole, on the same images."""
    recipe = recipe_of("plain", seed, epochs, confirm, condition="all", lr=0.1)
    (run,) = build(recipe, Accelerator(cpu=True))
    fit(run.network.to(memory_format=run.feed.format), run.feed, recipe, {}, None)
    return run.network.eval()


def tried(idea: str, seed: int, epochs: int, confirm: bool) -> dict[str, Any]:
    """Return the line of one run."""
    here, start = IDEAS[idea].get("here", {}), time.process_time()
    recipe = recipe_of(idea, seed, epochs, confirm)
    (run,) = build(recipe, Accelerator(cpu=True))
    network = run.network.to(memory_format=run.feed.format)
    if "sparse" in here:
        sparse_(network, here["sparse"], seed)
    fit(network, run.feed, recipe, here, taught(seed, epochs, confirm) if here.get("teacher") else None)
    network.eval()
    with torch.no_grad():
        losses = [F.cross_entropy(network(b.images), b.labels, reduction="sum") for b in run.feed.evaluation()]
    found = {"top1": accuracy(network, run.feed)["top1"], "loss": float(sum(losses)) / len(run.feed.test)}
    key = {"idea": idea, "seed": seed, "epochs": epochs, "confirm": confirm}
    return {**key, **{k: round(v, 4) for k, v in found.items()}, "seconds": round(time.process_time() - start, 1)}


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ideas", nargs="+", choices=IDEAS, default=[*IDEAS])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--confirm", action="store_true")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    done = {tuple(json.loads(line)[key] for key in ("idea", "seed", "epochs", "confirm")) for line in lines}
    for seed in range(options.seeds):
        for idea in options.ideas:
            if (idea, seed, options.epochs, options.confirm) not in done:
                line = tried(idea, seed, options.epochs, options.confirm)
                append(options.output, line)
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
