"""Copies of a network's modules that share its tensors, and have modes and attributes of their own."""

import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from .find import STATISTICS

_PLAIN = {bool, int, float, str, type(None), torch.Tensor, nn.Parameter}
_CONTAINERS = {dict, OrderedDict, list, set}


def shared_copy(network: nn.Module) -> nn.Module:
    """Return a copy of a network's modules with the same parameters, buffers, settings and hooks.

    A mode, buffer or attribute that is set on the copy does not change the network. Where the network's attributes and
    hooks refer to its own modules (a bound method, a patched forward, a list of layers), the copy's refer to its own.
    A compiled module is replaced by a copy of what was compiled, since its forward would run the original.
    """
    modules = {id(module): uncompiled(module) for module in network.modules()}
    copies: dict[int, Any] = {id(module): object.__new__(type(module)) for module in modules.values()}
    copies |= {key: copies[id(module)] for key, module in modules.items()}
    for key, module in modules.items():
        if key != id(module):
            continue
        own = copies[key].__dict__
        own |= module.__dict__
        for name, value in [item for item in own.items() if type(item[1]) not in _PLAIN]:
            if type(value) in _CONTAINERS:
                empty = not value or name in ("_parameters", "_buffers")  # of modules
                new = value if empty else _mapped(value, copies)
                own[name] = value.copy() if new is value else new
            else:
                own[name] = _mapped(value, copies)
        own.pop("_compiled_call_impl", None)  # of `module.compile()`
    return copies[id(network)]


def evaluation_copy(network: nn.Module) -> nn.Module:
    """Return a `shared_copy` in evaluation mode.

    Its forward changes neither a mode that another thread sees nor running statistics.
    """
    copy = shared_copy(network)
    for module in copy.modules():
        module.__dict__["training"] = False
    return copy


def with_own_statistics(network: nn.Module) -> nn.Module:
    """Return a `shared_copy` whose running statistics are its own, so that its forward does not move the network's."""
    copy = shared_copy(network)
    for module in copy.modules():
        for name in STATISTICS:
            if (tensor := module._buffers.get(name)) is not None:
                module._buffers[name] = tensor.clone()
    return copy


def uncompiled(module: nn.Module) -> nn.Module:
    """Return what `torch.compile` was given, or the module itself."""
    while "_orig_mod" in module._modules:
        module = module.get_submodule("_orig_mod")
    return module


def _mapped(value: Any, copies: dict[int, Any]) -> Any:
    """Return a value that refers to copies where it refers to the network's modules; itself if it refers to none.

    Args:
        value: an attribute, or a part of one.
        copies: by the id of the original; values that live as long as the network are added.
    """
    if type(value) in _PLAIN:
        return value
    if id(value) in copies:
        return copies[id(value)]
    if type(value) is weakref.ref:
        return weakref.ref(copies[id(value())]) if id(value()) in copies else value
    copies[id(value)] = value  # for a value that contains itself
    parts, rebuild = _parts(value)
    new = [_mapped(part, copies) for part in parts]
    if any(a is not b for a, b in zip(new, parts, strict=True)):
        copies[id(value)] = rebuild(new)
    return copies[id(value)]


def _parts(value: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Return the parts of a value that may refer to modules, and what makes such a value of parts."""
    kind = type(value)
    if kind is dict or kind is OrderedDict:
        both = [part for item in list(value.items()) for part in item]
        return both, lambda new: kind(zip(new[::2], new[1::2], strict=True))
    if kind is list or kind is tuple:
        return list(value), kind
    if kind is MethodType:
        return [value.__func__, value.__self__], lambda new: MethodType(*new)
    if kind is partial:
        return [value.func, value.args, value.keywords], lambda new: partial(new[0], *new[1], **new[2])
    if kind is FunctionType:
        return list(value.__closure__ or ()), lambda new: _with_closure(value, new)
    if kind is CellType and value != CellType():  # not one that is still empty
        return [value.cell_contents], lambda new: CellType(*new)
    return [], lambda _: value


def _with_closure(function: FunctionType, cells: list[CellType]) -> FunctionType:
    new = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells))
    new.__kwdefaults__ = function.__kwdefaults__
    new.__dict__.update(function.__dict__)
    return new
