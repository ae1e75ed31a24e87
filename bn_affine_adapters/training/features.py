"""Train a head alone on its inputs, which the frozen network in front of it computes once for each image.

That comes to the same, to rounding, where an image's features are the same in every epoch: without augmentation, batch
statistics and draws.
"""

import os
from functools import partial
from typing import Any

import torch
from timm.layers import DropBlock2d, DropPath, PatchDropout
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..adapter.layer import BNOnlyLayer
from ..norms.find import head_layers, is_norm, plain_modules
from ..seed.generator import OwnGenerator
from .feed import Feed

FEW = 4  # images on which the two ways are compared
LARGEST = 0.25  # of the memory that is free
# How far an image's features may be from themselves in another batch, relative to their norm.
TOLERANCE, TOLERANCE_MIXED = 0.01, 0.05
# Where modules that draw in training mode keep their probability; others are found by their draws.
DRAWS = {_DropoutNd: "p", DropPath: "drop_prob", DropBlock2d: "drop_prob", PatchDropout: "prob"}


def head_only(network: nn.Module, feed: Feed) -> tuple[nn.Module, Feed, str]:
    """Return what to train on which feed: a head on its features if that comes to the same, else the network.

    Args:
        network: as `get_bn_only_model` returns it; moved to the feed's device if its head alone trains.
        feed: of images.

    Returns:
        The module, whose parameters are the network's own, its feed, and a line that says which way and why; empty
        where more than a head trains.
    """
    heads = trained_heads(network)
    if not heads:
        return network, feed, ""
    network.to(feed.accelerator.device)
    if why := _agreed(refusal(network, heads, feed), feed.accelerator):
        return network, feed, f"head only: on the images of every epoch, since {why}"
    inputs: Any = partial(head_input, network, heads[0])
    with feed.accelerator.autocast():
        features = feed.mapped(inputs)
    size = f"{features.nbytes:,} bytes"
    return nn.Sequential(heads[0]), features, f"head only: on features computed once for each image, {size}"


def trained_heads(network: nn.Module) -> list[nn.Module]:
    """Return the heads of an adapted network, if they hold all that trains; else none."""
    names = head_layers(network)
    heads = [m for m in network.modules() if isinstance(m, BNOnlyLayer) and m.canonical_name in names]
    own = {id(parameter) for head in heads for parameter in head.parameters()}
    trained = {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    return list(heads) if trained and trained <= own else []


def refusal(network: nn.Module, heads: list[nn.Module], feed: Feed) -> str | None:
    """Return why heads cannot train on features, or would not come to the same; None if they can and do."""
    o = feed.options
    if o.streaming:
        return "they are streamed: streaming=true"
    if o.flip or o.crop_padding:
        return f"they are augmented: flip={str(o.flip).lower()}, crop_padding={o.crop_padding}"
    if len(heads) > 1:
        return f"the network has {len(heads)} heads"
    images = next(feed.evaluation()).images[:FEW]
    found = network, heads[0], images, feed
    return unsteady_layer(network) or _difference(*found) or _excess(*found)


def unsteady_layer(network: nn.Module) -> str | None:
    """Return a layer that, in training mode, computes what it makes of an image from other images or by chance."""
    network.train()
    for name, module in plain_modules(network, active=True):
        if _of_batch(module):
            return f"{name} takes the statistics of a batch, and none with running_statistics=frozen"
        for kind, probability in DRAWS.items():
            if isinstance(module, kind) and module.training and getattr(module, probability):
                return f"{name} draws: {type(module).__name__} with {probability}={getattr(module, probability):g}"
    return None


def _of_batch(module: nn.Module) -> bool:
    kept = any(module._buffers.get(name) is not None for name in ("running_mean", "running_var"))
    return is_norm(module) and module.training if kept else isinstance(module, _BatchNorm)


@torch.no_grad()
def head_input(network: nn.Module, head: nn.Module, images: Tensor) -> Tensor | None:
    """Return the one tensor that a network gives its head; None unless it returns just what the head makes of it."""
    calls: list[tuple[Any, Any, Any]] = []
    handle = head.register_forward_hook(
        lambda _, inputs, named, output: calls.append((inputs, named, output)), with_kwargs=True
    )
    try:
        logits = network(images)
    finally:
        handle.remove()
    if len(calls) != 1:
        return None
    ((inputs, named, output),) = calls
    single = len(inputs) == 1 and not named and isinstance(inputs[0], Tensor) and len(inputs[0]) == len(images)
    return inputs[0] if single and output is logits else None


def _difference(network: nn.Module, head: nn.Module, images: Tensor, feed: Feed) -> str | None:
    """Return how features differ between training on a batch and evaluation on each image; None if they do not."""
    with OwnGenerator() as generator, feed.accelerator.autocast():
        together = head_input(network.train(), head, images)
        drawn = generator.drawn
        network.eval()
        alone = [head_input(network, head, image[None]) for image in images]
    if drawn:
        return "the network draws random numbers in training mode"
    found = [row for row in alone if row is not None]
    if together is None or len(found) < len(alone):
        return "what the network returns is not just what its head makes of one tensor"
    difference = ((torch.cat(found) - together).float().norm() / together.float().norm()).item()
    if not difference < (TOLERANCE if feed.accelerator.mixed_precision == "no" else TOLERANCE_MIXED):
        return f"features differ by {difference:.2g} of their norm between training and evaluation"
    return None


def _excess(network: nn.Module, head: nn.Module, images: Tensor, feed: Feed) -> str | None:
    """Return how many bytes the features of all images take, if those are too many."""
    with feed.accelerator.autocast():
        row: Any = head_input(network.eval(), head, images[:1])
    needed = row[0].nbytes * (len(feed.train.dataset) + len(feed.test.dataset))
    free = free_bytes(images.device)
    if needed <= LARGEST * free:
        return None
    return f"features would take {needed:,} bytes, over {LARGEST:.0%} of the {free:,} that are free"


def free_bytes(device: torch.device) -> int:
    """Return how many bytes of a device's memory are free for each process of this machine."""
    import psutil

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _agreed(why: str | None, accelerator: Any) -> str | None:
    """Return a reason if any process has one, since all of them go the same way."""
    refused = accelerator.gather(torch.tensor([int(why is not None)], device=accelerator.device)).any()
    return why or ("another process cannot" if refused else None)
