"""Whether a network is still the one that was wrapped: what it computes with an adapter, loading the adapter gives."""

import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from ..errors import AdapterError, BNAdapterError, NetworkError
from ..norms import COPIES
from ..norms.find import FUSING, Scale, canonical, is_norm, plain_modules
from .control import Control
from .layer import BNOnlyLayer, adapter_layers
from .method import BNOnlyConfig
from .rebuild import frozen_difference, frozen_tensors, holder, write_fingerprints
from .traits import Traits, computed, is_library, traits, traits_of

_HEAD = "call reset_classifier before get_bn_only_model, or give the adapter a head with train_head=True"
_UNDO = "undo the change and save again; a change belongs before get_bn_only_model"
_FROZEN = "timm.layers.unfreeze_batch_norm_2d(model), and save again; running_statistics='frozen' freezes them for good"


def check_unchanged(model: nn.Module, name: str, config: BNOnlyConfig, before: Mapping[str, Traits]) -> None:
    """Check that loading an adapter will give what this network computes with it.

    Args:
        model: the wrapped network.
        name: of the adapter.
        config: of the adapter; loaded with ``verify="off"``, it gets the fingerprints of the weights that are there.
        before: the traits that the network had when it was wrapped.

    Raises:
        AdapterError: a module was replaced or has another setting, parameters outside the adapter train, or frozen
            tensors have other values.
    """
    check_complete(model, name, config)
    check_settings(model, name, config, before)
    # Base layers that the adapter has a copy of do not run.
    idle = {id(p) for m in adapter_layers(model) if name in m.configs and is_norm(m.base_layer) for p in m.parameters()}
    trains = [(path, id(p)) for path, p in model.named_parameters() if p.requires_grad and f".{COPIES}." not in path]
    if outside := [path for path, number in trains if number not in idle]:
        raise _changed(
            "parameters outside the adapter require a gradient, and it does not hold them",
            f"{len(outside)}, the first is {canonical(outside[0]).replace('.base_layer.', '.')}",
            "set requires_grad_(False); to train a module, name it in extra_trainable_modules, or train_head=True",
        )
    if found := frozen_difference(model, config):
        settle(model, config, found)


def check_complete(model: nn.Module, name: str, config: BNOnlyConfig) -> None:
    """Raise AdapterError unless every module that an adapter owns is in the network, with the adapter's copy."""
    owned = {canonical(path) for path, m in model.named_modules() if isinstance(m, BNOnlyLayer) and name in m.configs}
    if lost := [module for module in config.target_modules if module not in owned]:
        here = dict(plain_modules(model)).get(lost[0])
        do = _HEAD if lost[0] in (config.head_layers or ()) else _UNDO
        seen = f"{lost[0]} is {'not there' if here is None else f'a new {type(here).__name__}'}"
        raise _changed("a module that the adapter owns was replaced, and the adapter's copy is lost", seen, do)


def check_settings(model: nn.Module, name: str, config: BNOnlyConfig, before: Mapping[str, Traits]) -> None:
    """Compare the traits of base layers and of an adapter's copies with those before the network was wrapped.

    An attribute of somebody's own class may be a counter, so that a change of it warns.

    Raises:
        AdapterError: a class, a description, a shape or a library's setting is another one.
    """
    bases, heads = dict(plain_modules(model)), set(config.head_layers or ())
    if gone := [where for where in before if where not in bases]:
        raise _changed("a module is gone", gone[0], _UNDO)
    for where, found in traits(model).items():
        _compare(where, bases[where], before.get(where, {}), found, heads)
    for layer in adapter_layers(model):
        copy = layer.bn_only_layers[name] if name in layer.configs else None
        if copy is None or isinstance(copy, Control | Scale):
            continue
        for inner, module in copy.named_modules():
            where = f"{layer.canonical_name}.{inner}".rstrip(".")
            then, now = before.get(where, {}), traits_of(module)
            if holder(where, heads):  # each adapter's has its own number of classes
                then, now = ({key: each.get(key, "") for key in ("class", "extra_repr")} for each in (then, now))
                then["extra_repr"] = now["extra_repr"]
            _compare(where, module, then, now, heads)


def _compare(where: str, module: nn.Module, then: Traits, now: Traits, heads: set[str]) -> None:
    then, now = (computed(each) if each else each for each in (then, now))
    for key in {**then, **now}:
        if then.get(key) == now.get(key) or (key == "num_classes" and not where):
            continue
        seen = f"{where or 'the network'}: {key} was {then.get(key)!r}, and is {now.get(key)!r}"
        if key in ("class", "extra_repr", "configuration") or key.startswith("shape of ") or is_library(module):
            frozen = "FrozenBatchNorm" in type(module).__name__
            do = _FROZEN if frozen else _HEAD if holder(where, heads) else _UNDO
            raise _changed("a module has another class or setting", seen, do)
        what = "An attribute has changed since the network was wrapped, and is not saved with the adapter"
        warnings.warn(f"{what}. If it is no counter, set it after loading: {seen}.", stacklevel=5)


def settle(model: nn.Module, config: BNOnlyConfig, found: tuple[str, str]) -> None:
    """Raise AdapterError for frozen tensors that differ, except where the reason is known, which warns."""
    if config.verify == "off":
        write_fingerprints(model, config, traits(model))
        config.base_model_name_or_path = config.revision = None
        what = "The adapter was loaded with verify='off', and now belongs to the weights in memory: keep them"
        warnings.warn(f"{what} ({found[0]}, {found[1]}).", stacklevel=4)
        return
    tensors = [tensor for group in frozen_tensors(model, config) for tensor in group.values()]
    if config.seed is None and any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors):
        what = "The network was cast after it was wrapped, so that its frozen weights cannot be compared any more"
        warnings.warn(f"{what}: load the adapter with dtype= of that type ({found[1]}).", stacklevel=4)
        return
    raise _changed(found[0], found[1], _UNDO)


def _changed(what: str, seen: str, do: str) -> BNAdapterError:
    return AdapterError(f"The network has changed since it was wrapped: {what}.", seen=seen, do=do)


@cache
def _fusing(kind: type) -> tuple[str, ...]:
    """Return which of these methods a class of timm has."""
    return tuple(name for name in FUSING if hasattr(kind, name)) if kind.__module__.startswith("timm.") else ()


def forbid_fusing_(model: nn.Module) -> None:
    """Give timm's methods that fuse norm layers into convolutions an error, since a wrapped layer cannot be fused."""
    for module in model.modules():
        for name in _fusing(type(module)):  # type: ignore[arg-type]  # a class is hashable
            vars(module)[name] = _cannot_fuse


def allow_fusing_(model: nn.Module) -> None:
    """Undo `forbid_fusing_`."""
    for module in model.modules():
        for name in FUSING:
            if vars(module).get(name) is _cannot_fuse:
                del vars(module)[name]


def _cannot_fuse(*args: Any, **kwargs: Any) -> None:
    raise NetworkError(
        "A network with adapters cannot be reparameterised: its norm layers belong to the adapters.",
        seen="fuse, reparameterize or switch_to_deploy of a wrapped network",
        do="timm.utils.reparameterize_model(model.merge_and_unload())",
    )
