"""Find norm layers, the head and shortcuts in a network; give the names of gamma and beta.

Layers are found by type or by identity, never by a pattern of names. All names are canonical: a wrapped network's
layers have the names that they have in the plain network.
"""

import re
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..errors import MissingModuleError, NoNormLayerError, nearest_name
from . import COPIES, SCALE_SUFFIX

WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_HOLDERS = {*WRAPPERS, "module"}  # names of the only child of a wrapper
_WRAPPED = re.compile("|".join([*WRAPPERS, r"^module\.", r"^base_model\.model\."]))  # in a name that is not canonical
FUSING = ("fuse", "reparameterize", "switch_to_deploy")  # timm's methods, which put convolutions for norm layers
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

# timm's norm layers that are not subclasses of torch's. They are looked up by name, because not every version of timm
# has all of them.
_TIMM_NORMS = {
    "timm.layers.norm": (
        "RmsNorm RmsNormFp32 RmsNorm2d RmsNorm2dFp32 SimpleNorm SimpleNormFp32 SimpleNorm2d SimpleNorm2dFp32"
    ),
    "timm.layers.evo_norm": "EvoNorm2dB0 EvoNorm2dB1 EvoNorm2dB2 EvoNorm2dS0 EvoNorm2dS1 EvoNorm2dS2",
    "timm.layers.filter_response_norm": "FilterResponseNormTlu2d FilterResponseNormAct2d",
    "timm.layers.inplace_abn": "InplaceAbn",
    "timm.models.mlp_mixer": "Affine",
}
_RESPONSE_NORMS = {
    ("timm.layers.grn", "GlobalResponseNorm"),
    ("transformers.models.convnextv2.modeling_convnextv2", "ConvNextV2GRN"),
}
NORM_TYPES: tuple[type[nn.Module], ...] = (
    _NormBase,  # BatchNorm1d/2d/3d, SyncBatchNorm, InstanceNorm, and timm's BatchNormAct2d
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    *(
        kind
        for module, names in _TIMM_NORMS.items()
        for name in names.split()
        if (kind := getattr(import_module(module), name, None)) is not None
    ),
)


class Affine(NamedTuple):
    """The names of a norm layer's gamma and beta; None for one that it does not have."""

    gamma: str | None
    beta: str | None


class Scale(nn.Module):
    """Holds the parameter NAME of the module that it lies in, under the name NAME_scale: see `scales`."""

    def __init__(self, weight: nn.Parameter) -> None:
        """Hold a parameter."""
        super().__init__()
        self.weight = weight


def affine(module: nn.Module) -> Affine:
    """Return the attribute names of a norm layer's gamma and beta: ("weight", "bias") almost everywhere."""
    names = ("alpha", "beta") if "alpha" in module._parameters else ("weight", "bias")
    gamma, beta = (name if module._parameters.get(name) is not None else None for name in names)
    return Affine(gamma, beta)


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is a norm layer with gamma, beta or running statistics."""
    if not isinstance(module, NORM_TYPES):
        return False
    return any(affine(module)) or module._buffers.get("running_mean") is not None


def without_wrappers(name: str) -> str:
    """Return a name without the parts that torch.compile, FSDP or recomputation put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def is_response_norm(module: nn.Module) -> bool:
    """Tell whether a module is a GlobalResponseNorm (ConvNeXt V2), of timm or Transformers.

    An adapter trains it like a norm layer, but it is redrawn as its constructor sets it, gamma and beta 0. Older
    adapters, saved before it trained, have it among their frozen tensors.
    """
    return (type(module).__module__, type(module).__name__) in _RESPONSE_NORMS


def canonical(name: str) -> str:
    """Return a parameter's or module's name in the plain network, without what wrappers put around it.

    >>> canonical("module.base_model.model.layer1._orig_mod.0.conv1.weight")
    'layer1.0.conv1.weight'
    """
    if not _WRAPPED.search(name):
        return name  # as almost always: this function is called for every module many times
    name = without_wrappers(name)
    while (rest := name.removeprefix("module.").removeprefix("base_model.model.")) != name:
        name = rest
    return name


def plain_modules(model: nn.Module, active: bool = False) -> list[tuple[str, nn.Module]]:
    """Return (canonical name, module) of the plain network: base layers instead of their wrappers, no copies.

    With ``active``, return the network that runs now: the active adapter's copies instead of the base layers.
    """
    found: list[tuple[str, nn.Module]] = []

    def walk(module: nn.Module, name: str) -> None:
        module = unwrapped(module, active)
        found.append((canonical(name), module))
        if module._modules:  # most modules are leaves, and this walk is the longest part of loading a small network
            for child_name, child in module.named_children():
                walk(child, f"{name}.{child_name}" if name else child_name)

    walk(model, "")
    return found


def plain_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """Yield (canonical name, owner, attribute, tensor) for parameters and persistent buffers, each tensor once.

    A tensor that several layers share has the smallest of its names, compared as bytes.
    """
    entries: dict[int, tuple[str, nn.Module, str, Any]] = {}
    for name, module in plain_modules(model):
        buffers = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for attribute, tensor in [*module._parameters.items(), *buffers.items()]:
            if tensor is None:
                continue
            full = name.removesuffix(SCALE_SUFFIX) if isinstance(module, Scale) else f"{name}.{attribute}"
            entry = (full.removeprefix("."), module, attribute, tensor)
            other = entries.get(id(tensor))
            if other is None or entry[0].encode() < other[0].encode():
                entries[id(tensor)] = entry
    yield from entries.values()


def norm_layers(model: nn.Module, active: bool = False) -> dict[str, nn.Module]:
    """Return the network's norm layers by canonical name, in the order of its definition.

    With ``active``, return those that run now: the active adapter's copies instead of the base layers.

    Raises:
        NoNormLayerError: no layer has gamma or beta.
    """
    modules = plain_modules(model, active)
    layers = {name: module for name, module in modules if is_norm(module)}
    if not any(any(affine(module)) for module in layers.values()):
        kinds = sorted({type(module).__name__ for _, module in modules if [*module.parameters(recurse=False)]})
        raise NoNormLayerError(
            f"{type(model).__name__} has no norm layer with gamma and beta to train.",
            seen=f"0 of {len(modules)} modules; those with parameters are {', '.join(kinds) or 'none'}",
            do='choose a network with normalisation, e.g. timm.create_model("resnet50")',
        )
    return layers


def head_layers(model: nn.Module, head: Any = None) -> dict[str, nn.Module]:
    """Return a head's layers by canonical name, by default what timm's ``get_classifier()`` returns; empty if none."""
    if head is None:
        head = getattr(unwrapped(model), "get_classifier", tuple)()
    wanted = {id(unwrapped(part)) for part in _parts(head) if isinstance(part, nn.Module)}
    return {
        name: module
        for name, module in plain_modules(model)
        if id(module) in wanted and next(module.parameters(), None) is not None
    }


def _parts(head: Any) -> Iterator[Any]:
    """Yield the modules of a head; networks iterate over a list of them, so that none may be wrapped as a whole."""
    if isinstance(head, tuple | list | nn.ModuleList):
        for part in head:
            yield from _parts(part)
    else:
        yield head


def logits_of(output: Any) -> Any:
    """Return the logits in what a network returns: Transformers' has them as an attribute."""
    return getattr(output, "logits", output)


def has_copies(module: nn.Module) -> bool:
    """Tell whether a module is a layer that holds a copy of its base layer for each adapter."""
    return COPIES in module._modules


def running(module: Any) -> Any:
    """Return the module that a layer with per-adapter copies runs now; return any other module unchanged."""
    return module.active_module() if has_copies(module) else module


def unwrapped(module: nn.Module, active: bool = False) -> nn.Module:
    """Return what DDP, FSDP, torch.compile, PEFT or a layer with per-adapter copies wraps, or the module itself.

    For a layer with copies this is its base layer, or with ``active`` the module that it runs now.
    """
    while True:
        inner = module._modules
        if has_copies(module):
            module = running(module) if active else module.get_submodule("base_layer")
        elif len(inner) == 1 and (name := next(iter(inner))) in _HOLDERS and not module._parameters:
            module = module.get_submodule(name)
        elif "base_model" in inner and hasattr(module, "peft_config"):
            module = module.get_submodule("base_model.model")
        else:
            return module


def shortcut_convs(model: nn.Module) -> list[str]:
    """Return the names of the convolutions on a residual network's shortcuts.

    Source: the condition "BN + shortcuts + head" of the paper, Figure 2.
    """
    modules = dict(plain_modules(model))
    names = []
    for name, module in modules.items():
        parent, separator, _ = name.partition(".downsample")
        in_block = isinstance(getattr(modules.get(parent), "conv2", None), nn.Module)
        if separator and isinstance(module, nn.Conv2d) and in_block:
            names.append(name)
    return names


def named_layers(model: nn.Module, names: Iterable[str], role: str) -> dict[str, nn.Module]:
    """Return the modules with exactly these canonical names.

    Raises:
        MissingModuleError: a name is not in the network; the message gives the nearest one.
    """
    if not (names := list(names)):
        return {}
    modules = dict(plain_modules(model))
    layers = {}
    for name in names:
        if not name or name not in modules:
            raise MissingModuleError(
                f"{type(model).__name__} has no module named {name[:200]!r} ({role}).",
                seen=f"{len(modules)} modules" + nearest_name(name[:200], modules),
                do="give exact names from model.named_modules()",
            )
        layers[name] = modules[name]
    return layers
