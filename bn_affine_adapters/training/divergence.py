"""Values that are not finite: where in a network they arise."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..norms import COPIES
from ..settings import bare
from .checkpoint import trained_tensors


def first_nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with a value that is not finite; the device is asked once."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if not floats:
        return None
    finite = torch.stack([tensor.isfinite().all() for tensor in floats.values()]).tolist()
    return next((name for name, whole in zip(floats, finite, strict=True) if not whole), None)


def nonfinite_value(network: nn.Module) -> str | None:
    """Return the name of a trained tensor or buffer with a value that is not finite."""
    return first_nonfinite(trained_tensors(network))


@torch.no_grad()
def nonfinite_layer(model: Any, network: nn.Module, images: Tensor) -> str:
    """Run a batch again, and return the first layer whose output is not finite, for people.

    Args:
        model: what is called, e.g. the network in DistributedDataParallel.
        network: whose layers are looked at.
        images: the batch on which the loss was not finite.
    """
    if not bool(images.isfinite().all()):
        return "none: the images are not finite"
    found: list[str] = []

    def look(name: str, layer: nn.Module, output: Any) -> None:
        outputs = output if isinstance(output, tuple | list) else [output]
        tensors = {str(i): each for i, each in enumerate(outputs) if isinstance(each, Tensor)}
        if not found and first_nonfinite(tensors):
            shown = bare(name).split(f".{COPIES}")[0] or "the network"
            found.append(f"{shown} ({type(layer).__name__})")

    hooks = [
        layer.register_forward_hook(lambda layer, _, output, name=name: look(name, layer, output))
        for name, layer in network.named_modules()
    ]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "none: its output is finite when the batch is run again"
