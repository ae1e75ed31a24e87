"""Layer scales: a gain per channel on a residual branch, which many networks start at 1e-6."""

import re
from collections.abc import Collection
from functools import cache
from typing import Any

from torch import nn

from . import SCALE_SUFFIX
from .find import Scale, is_norm, plain_tensors

# As timm names them: in LayerScale and LayerScale2d, ConvNeXt, EdgeNeXt, BEiT, EVA, CaiT, XCiT, ResMLP and others.
# Then as torchvision's and Transformers' ConvNeXt do, and Transformers' BEiT.
_NAME = re.compile(r"gamma(\d|_\w+)?|ls\d|layer_scale(_parameter)?|lambda_[12]")


def layer_scales(model: nn.Module) -> list[str]:
    """Return the canonical names of the parameters that scale a residual branch, in the order of the definition.

    They are known by name, in any module but a norm layer: gamma, gamma_1, gamma1, gamma_xca, ls1 and so on; and the
    ``scale`` of MetaFormer's class Scale.
    """
    return [name for name, owner, attribute, _ in plain_tensors(model) if _is_layer_scale(owner, attribute)]


def _is_layer_scale(owner: nn.Module, attribute: str) -> bool:
    if isinstance(owner, Scale):
        return True
    if (type(owner).__module__, type(owner).__name__) == ("timm.models.metaformer", "Scale"):
        return attribute == "scale"
    return attribute in owner._parameters and not is_norm(owner) and bool(_NAME.fullmatch(attribute))


def scales_as_modules_(model: nn.Module, names: Collection[str]) -> None:
    """Move layer scales into modules of their own, in place, so that an adapter can have a copy of each.

    A block's parameter ``gamma`` becomes its module ``gamma_scale``; the block still reads it as ``gamma``.
    """
    owners: dict[int, tuple[nn.Module, dict[str, nn.Parameter]]] = {}
    for name, owner, attribute, parameter in list(plain_tensors(model)) if names else ():
        if name in names and not isinstance(owner, Scale):
            owners.setdefault(id(owner), (owner, {}))[1][attribute] = parameter
    for owner, attributes in owners.values():
        for attribute, parameter in attributes.items():
            del owner._parameters[attribute]
            owner.add_module(attribute + SCALE_SUFFIX, Scale(parameter))
        owner.__class__ = _reading(type(owner), tuple(attributes))  # type: ignore[arg-type]  # a class is hashable


def scales_as_parameters_(model: nn.Module) -> None:
    """Undo `scales_as_modules_`."""
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, Scale):
                del owner._modules[name]
                owner.__class__ = getattr(type(owner), "plain_class", type(owner))
                owner.register_parameter(name.removesuffix(SCALE_SUFFIX), child.weight)


@cache
def _reading(kind: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    """Return a class that reads these attributes from the modules that hold them, and is the same otherwise."""

    def reader(attribute: str) -> property:
        return property(lambda self: self._modules[attribute + SCALE_SUFFIX].weight)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _new, (kind, attributes), self.__dict__

    names = {key: getattr(kind, key) for key in ("__module__", "__qualname__", "__doc__")}
    readers = {attribute: reader(attribute) for attribute in attributes}
    return type(kind.__name__, (kind,), {**names, **readers, "plain_class": kind, "__reduce_ex__": reduce})


def _new(kind: type[nn.Module], attributes: tuple[str, ...]) -> nn.Module:
    reading = _reading(kind, attributes)  # type: ignore[arg-type]
    return reading.__new__(reading)
