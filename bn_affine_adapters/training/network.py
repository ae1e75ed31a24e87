"""The network of a recipe: configured, built, drawn, and frozen as its condition asks; what a step of it costs."""

import ctypes
import gc
import json
import statistics
import time
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ..adapter.checks import choose_layers
from ..adapter.method import BNOnlyConfig
from ..adapter.rebuild import create, outline
from ..model.loading import get_bn_only_model
from ..model.peft_model import BNOnlyPeftModel
from ..norms.find import affine, canonical, head_layers, norm_layers, shortcut_convs
from ..norms.scales import layer_scales
from ..seed.rules import reinit_
from ..settings import Settings
from ..sharing.compact import read_adapter
from ..sharing.hub import fetch
from .data import check_classes
from .feed import Feed
from .optimizer import create_optimizer
from .recipe import CONDITIONS, FULL_CONDITIONS, Recipe
from .rounding import start_from_
from .scripts import timm_network

WARM_UP, TIMED, LONGEST = 2, 5, 20.0  # steps, steps, and the seconds after which no further step is timed


def configuration(recipe: Recipe, label_names: Sequence[str]) -> BNOnlyConfig:
    """Return what of a recipe and the classes of its data says how the network is built, drawn and fed."""
    return BNOnlyConfig(
        seed=recipe.seed,
        weight_init=recipe.weight_init,
        norm_init=recipe.norm_init,
        layer_scale=None if recipe.seed is None else recipe.layer_scale,
        architecture=recipe.model.partition(".")[0] if recipe.condition in FULL_CONDITIONS else None,
        model_args={"num_classes": len(label_names), **recipe.model_args},
        label_names=list(label_names),
        lean=recipe.lean,  # type: ignore[arg-type]  # checked by the configuration
        data_config=recipe.data_config,
        **{"running_statistics": recipe.running_statistics, **CONDITIONS.get(recipe.condition, {})},
    )


def check_buildable(recipe: Recipe) -> None:
    """Raise now, before data are read, what would be raised when a network and its optimiser are made.

    Raises:
        ConfigError: a setting of the network, or an argument of the optimiser, is not usable.
        NetworkError: timm cannot create the network, or the condition finds nothing to train in it.
    """
    config = configuration(recipe, [])
    create_optimizer(recipe, nn.Linear(1, 1))
    if recipe.adapter:
        read_adapter(fetch(recipe.adapter), Settings)
    if ":" in recipe.model:  # "hf-hub:..." and "local-dir:...", which timm fetches
        return
    network = outline_of(recipe.model, json.dumps(recipe.model_args, allow_nan=False))
    if recipe.condition not in FULL_CONDITIONS:
        config.extra_trainable_modules = shortcut_convs(network) if "shortcut" in recipe.condition else []
        choose_layers(network, config)


@lru_cache(maxsize=1)
def outline_of(model: str, model_args: str) -> nn.Module:
    """Return the outline of a network, whose arguments are given as JSON; the last one is kept for a sweep's runs."""
    return outline(model, json.loads(model_args))


def build_network(recipe: Recipe, config: BNOnlyConfig, feed: Feed) -> nn.Module:
    """Create the timm network, redraw or load it, and freeze what the condition does not train.

    Raises:
        DataError: the data have another number of classes.
        NetworkError: timm cannot create the network.
    """
    check_classes(feed.train, config.model_args["num_classes"])
    network = _trainable(recipe, config)
    if recipe.head_init == "zero":
        zero_heads_(network)
    return network


def _trainable(recipe: Recipe, config: BNOnlyConfig) -> nn.Module:
    network = timm_network(recipe.model, config.model_args, recipe.pretrained, recipe.pretrained_file)
    if recipe.condition not in FULL_CONDITIONS:
        config.extra_trainable_modules = shortcut_convs(network) if "shortcut" in recipe.condition else []
        model = get_bn_only_model(network, config)
        if recipe.adapter:
            start_from_(model, recipe.adapter)
        return model
    if config.seed is not None:
        drawn: dict[str, Any] = {"weight_init": config.weight_init, "norm_init": config.norm_init}
        drawn["ones"] = layer_scales(network) if recipe.layer_scale == "one" else ()
        reinit_(network, config.seed, **drawn, reference=partial(create, str(config.architecture), config.model_args))
    if recipe.condition == "no-affine":
        for layer in norm_layers(network).values():
            for name in filter(None, affine(layer)):
                layer.get_parameter(name).requires_grad_(False)
    return network


@torch.no_grad()
def zero_heads_(network: nn.Module) -> None:
    """Set the last layer of each head that trains to 0: it learns from the first step on, all else from the second."""
    parameters = {canonical(name): p for name, p in network.named_parameters() if p.requires_grad}
    for head in head_layers(network):
        layers = [name.rpartition(".")[0] for name in parameters if name.startswith(f"{head}.")]
        for name, parameter in parameters.items():
            if name.rpartition(".")[0] in layers[-1:]:
                parameter.zero_()


def count(model: nn.Module) -> tuple[int, int]:
    """Return (trained, all) parameters."""
    if isinstance(model, BNOnlyPeftModel):
        return model.get_nb_trainable_parameters()
    sizes = [(p.numel() * p.requires_grad, p.numel()) for p in model.parameters()]
    return sum(trained for trained, _ in sizes), sum(size for _, size in sizes)


def forward_cost(recipe: Recipe) -> float:
    """Return the operations of one image through a recipe's network, infinite where it takes no such image.

    Raises:
        NetworkError: there is no such network.
    """
    model = create(recipe.model.partition(".")[0], recipe.model_args, "meta").eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, *recipe.data_config["input_size"], device="meta"))
    except (RuntimeError, ValueError, AssertionError):  # most often: it has no pixel left after its last stride
        return float("inf")
    return float(counter.get_total_flops())


def measured_step(recipe: Recipe, feed: Feed) -> tuple[int, float]:
    """Return the parameters that a recipe trains, and the median seconds of an optimiser step on random images."""
    device, config = feed.accelerator.device, configuration(recipe, feed.label_names)
    network = build_network(recipe, config, feed).to(device).to(memory_format=feed.format).train()
    optimizer = create_optimizer(recipe, network)
    model = torch.compile(network, mode=recipe.compile, dynamic=False) if recipe.compile else network
    size, shape = recipe.batch_size // recipe.accumulation, recipe.data_config["input_size"]
    images = torch.randn(size, *shape, device=device).to(memory_format=feed.format)
    labels = torch.randint(len(feed.label_names), (size,), device=device)
    dtype = torch.float16 if recipe.precision == "fp16" else torch.bfloat16
    seconds: list[float] = []
    while len(seconds) < WARM_UP + TIMED and sum(seconds) < LONGEST:
        start = time.perf_counter()
        for _ in range(recipe.accumulation):
            if recipe.compile:
                torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast(device.type, dtype, enabled=recipe.precision != "no"):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return count(network)[0], statistics.median(seconds[WARM_UP:] or seconds)


def held_memory(device: str) -> int:
    """Return the bytes that are held now: resident, as Linux counts them, or in PyTorch's allocator on a GPU.

    `most_memory` counts from here.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _resident("VmRSS")


def most_memory(device: str) -> int:
    """Return the most bytes that were held since `held_memory`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _resident("VmHWM")


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
