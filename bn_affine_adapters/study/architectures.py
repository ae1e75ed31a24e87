"""Which architectures of timm this package takes: what trains of each, and how large the file of an adapter is."""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import safetensors.torch
import timm
import torch
from torch import nn

from ..adapter.checks import choose_layers, infer
from ..adapter.layer import trained
from ..adapter.method import BNOnlyConfig
from ..adapter.rebuild import build_outline
from ..errors import NoNormLayerError, UnknownArchitectureError, nearest_name
from ..norms import COPIES
from ..norms.find import named_layers
from ..settings import PEFT_PREFIX


class Architecture(NamedTuple):
    """An architecture with its own creation arguments, and its adapter with ``BNOnlyConfig(seed=0)``.

    Attributes:
        name: in timm.
        family: timm's module that defines it.
        norms: the classes of its norm layers, the most frequent first; "" if it has none.
        parameters: of the network.
        trained: of the adapter: gamma and beta.
        bytes: of ``adapter_model.safetensors``, running statistics included.
    """

    name: str
    family: str
    norms: str
    parameters: int
    trained: int
    bytes: int

    @property
    def share(self) -> float:
        """The trained parameters in % of all."""
        return 100 * self.trained / self.parameters


def architectures(pattern: str = "*") -> list[str]:
    """Return the names that timm has registered and that match a pattern, e.g. ``"resnet*"``, in alphabetical order.

    Raises:
        UnknownArchitectureError: no name matches.
    """
    if names := sorted(timm.list_models(pattern)):
        return names
    known = timm.list_models()
    raise UnknownArchitectureError(
        f"timm {timm.__version__} has no architecture that matches {pattern[:80]!r}.",
        seen=f"{len(known)} registered names" + nearest_name(pattern[:80], known),
        do='give a name or a pattern, e.g. "resnet*"',
    )


def describe(name: str) -> Architecture:
    """Return what an adapter of an architecture trains; the network is built without memory for its weights.

    Raises:
        UnknownArchitectureError: the name is not registered.

    >>> describe("resnet18")[2:]
    ('BatchNorm2d', 11689512, 9600, 88576)
    """
    config = BNOnlyConfig(seed=0, architecture=name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some constructors of timm warn
        model = build_outline(config)
    size = sum(parameter.numel() for parameter in model.parameters())
    try:
        infer(model, config, None)
        choose_layers(model, config)
    except NoNormLayerError:
        return Architecture(name, family(name), "", size, 0, 0)
    layers = named_layers(model, config.target_modules, "the architecture's")
    count = sum(
        module.get_parameter(key).numel() for layer, module in layers.items() for key in trained(module, layer, config)
    )
    classes = ", ".join(kind for kind, _ in Counter(type(module).__name__ for module in layers.values()).most_common())
    return Architecture(name, family(name), classes, size, count, file_size(layers))


def family(name: str) -> str:
    """Return the name of the module that defines an architecture."""
    return timm.models.model_entrypoint(name).__module__.rpartition(".")[2]


def file_size(layers: Mapping[str, nn.Module]) -> int:
    """Return the bytes of an adapter's safetensors file that holds these layers."""
    tensors = {
        f"{PEFT_PREFIX}{name}.{COPIES}.{key}": torch.zeros(tensor.shape, dtype=tensor.dtype)
        for name, module in layers.items()
        for key, tensor in module.state_dict().items()
    }
    return len(safetensors.torch.save(tensors, {"format": "pt"}))


def table(found: Iterable[Architecture]) -> list[list[str]]:
    """Return the rows of a table, its head first; of a network without norm layers, most cells are empty."""
    head = ["architecture", "family", "norm layers", "parameters", "trained", "%", "adapter, bytes"]
    return [head] + [
        [each.name, each.family, each.norms or "none: refused", f"{each.parameters:,}"]
        + ([f"{each.trained:,}", f"{each.share:.3f}", f"{each.bytes:,}"] if each.norms else ["", "", ""])
        for each in found
    ]
