"""Blend adapters into a new one: parameters are averaged, running statistics pooled, heads matched by class name."""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError, ConfigError, check_adapter, check_choice
from ..norms.find import plain_modules
from ..settings import MASKS
from .control import Control
from .layer import BNOnlyLayer, adapter_layers
from .method import BNOnlyConfig
from .mixed import copy_or_base

_WRITTEN = ("fingerprint", "sampled", "digests", "digest", "hash")  # ends of the settings that wrapping writes


def blended(
    model: nn.Module, configs: Mapping[str, BNOnlyConfig], adapters: Any, weights: Any, head: str | None
) -> BNOnlyConfig:
    """Check what is to be blended, and return the configuration of the new adapter, which owns all of their layers.

    Args:
        model: the network with its layers with copies.
        configs: of all adapters.
        adapters: the names of those that are blended.
        weights: of each; the base has what is left of 1.
        head: the adapter whose head the new one has; by default the average of heads with the same class names.

    Raises:
        AdapterError: there is no such adapter, the heads do not match, or there are no statistics for these weights.
        ConfigError: adapters and weights do not match.
    """
    _check(configs, adapters, weights)
    own = [configs[name] for name in adapters]
    new = deepcopy(own[0])
    for field in fields(new):
        if field.name.endswith(_WRITTEN):
            setattr(new, field.name, None)
    new.versions = {}
    _check_statistics(model, adapters, weights)
    _check_controls([config.control for config in own])
    order = [name for name, _ in plain_modules(model)]
    for key in ("norm_layers", "extra_trainable_modules", "control_layers"):
        names = {name for config in own for name in getattr(config, key) or ()}
        setattr(new, key, [name for name in order if name in names])
    for key in ("train_gamma", "train_beta"):
        setattr(new, key, any(getattr(config, key) for config in own))
    if scaled := next((config for config in own if config.trained_scales), None):
        new.layer_scale, new.layer_scales = scaled.layer_scale, scaled.layer_scales
    theirs = configs[_head_owner(configs, adapters, head)]
    new.train_head, new.head_layers, new.label_names = theirs.train_head, theirs.head_layers, theirs.label_names
    new.model_args = dict(theirs.model_args)
    return new


def _check(configs: Mapping[str, BNOnlyConfig], adapters: Any, weights: Any) -> None:
    listed = isinstance(adapters, list | tuple) and isinstance(weights, list | tuple)
    if not listed or len(adapters) != len(weights) or not adapters or len({*map(str, adapters)}) < len(adapters):
        do = 'adapters=["one", "two"], weights=[0.5, 0.5]'
        raise ConfigError(
            "Blending takes a list of different adapters and a weight for each.",
            seen=f"adapters={adapters!r}, weights={weights!r}"[:200],
            do=do,
        )
    for name in adapters:
        check_adapter(name, configs, "to blend")
    if not all(isinstance(weight, int | float) and math.isfinite(weight) for weight in weights):
        raise ConfigError(
            "A weight is not a finite number.", seen=f"weights={weights!r}"[:200], do="weights=[0.5, 0.5]"
        )


def _check_controls(controls: Sequence[str | None]) -> None:
    if len({*controls}) > 1:
        what, do = "Adapters with different controls cannot be blended.", "blend adapters of the same control"
        raise AdapterError(what, seen=", ".join(map(str, controls)), do=do)
    if controls[0] in MASKS:
        what, do = "Masks cannot be averaged.", "average the logits of the adapters"
        raise AdapterError(what, seen=f"control={controls[0]!r}", do=do)


def _check_statistics(model: nn.Module, adapters: Sequence[str], weights: Sequence[float]) -> None:
    if min(weights) >= 0 and sum(weights) <= 1 + 1e-6:
        return
    for layer in adapter_layers(model):
        for name in set(adapters) & layer.configs.keys():
            if any(module._buffers.get("running_var") is not None for module in layer.bn_only_layers[name].modules()):
                raise AdapterError(
                    "There are no running statistics for these weights: they are pooled as those of a mixture.",
                    seen=f"weights={list(weights)}, sum {sum(weights):g}; {layer.canonical_name} is a BatchNorm",
                    do="weights of at least 0 whose sum is at most 1; the base has what is left of 1",
                )


def _head_owner(configs: Mapping[str, BNOnlyConfig], adapters: Sequence[str], head: str | None) -> str:
    """Return the adapter whose class names, in their order, the new adapter has."""
    if head is not None:
        check_choice("head", head, adapters)
        return head
    own = [configs[name] for name in adapters]
    names = [config.label_names for config in own]
    alike = all(one is not None and names[0] is not None and {*one} == {*names[0]} for one in names)
    if len(own) == 1 or not any(config.train_head for config in own):
        return adapters[0]
    if not all(config.train_head for config in own) or not alike:
        shown = [f"{name}: {(c.label_names or ['no names'])[:3] if c.train_head else 'the base'}" for name, c in
                 zip(adapters, own, strict=True)]  # fmt: skip
        raise AdapterError(
            "Heads can be averaged only if all adapters have one, with the same class names.",
            seen="; ".join(shown)[:300],
            do=f"head={adapters[0]!r}, the adapter whose head the new one gets",
        )
    return adapters[0]


@torch.no_grad()
def fill_(model: nn.Module, new: str, adapters: Sequence[str], weights: Sequence[float], head: str | None) -> None:
    """Fill the copies of a new adapter with the blend of others. Args: as `blended`."""
    for layer in adapter_layers(model):
        if new not in layer.configs:
            continue
        config = layer.configs[new]
        if layer.canonical_name in (config.head_layers or ()) and config.train_head:
            _fill_head_(layer, new, adapters, weights, head)
            continue
        target = layer.bn_only_layers[new]
        # A control begins as what the convolution computes without one.
        base = deepcopy(target) if isinstance(target, Control) else layer.base_layer
        sources = [layer.bn_only_layers[n] if n in layer.configs else base for n in adapters]
        _average_(target, [base, *sources], [1 - math.fsum(weights), *weights])


def _average_(target: nn.Module, sources: Sequence[nn.Module], weights: Sequence[float]) -> None:
    """Fill a module with the weighted mean of others, its running statistics by the law of total variance."""
    for path, module in target.named_modules():
        inner = [source.get_submodule(path) for source in sources]
        for key, parameter in module._parameters.items():
            if parameter is not None:
                parameter.copy_(_mean([each.get_parameter(key) for each in inner], weights))
        if module._buffers.get("running_mean") is not None:
            means = [each.get_buffer("running_mean").double() for each in inner]
            mean = _mean(means, weights)
            spread = [
                each.get_buffer("running_var").double() + (own - mean).square()
                for each, own in zip(inner, means, strict=True)
            ]
            module.get_buffer("running_mean").copy_(mean)
            module.get_buffer("running_var").copy_(_mean(spread, weights).clamp(min=0))
        if module._buffers.get("num_batches_tracked") is not None:
            counts = [each.get_buffer("num_batches_tracked") for each in inner]
            module.get_buffer("num_batches_tracked").copy_(torch.stack(counts).max())


def _mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([tensor.double() * weight for tensor, weight in zip(tensors, weights, strict=True)]).sum(0)


def _fill_head_(
    layer: BNOnlyLayer, new: str, adapters: Sequence[str], weights: Sequence[float], head: str | None
) -> None:
    """Fill a head with that of one adapter, or with the mean of all, whose rows are matched by class name."""
    owner = adapters[0] if head is None else head
    if head is not None or len(adapters) == 1:
        layer.bn_only_layers[new].load_state_dict(copy_or_base(layer, owner).state_dict())
        return
    names = layer.configs[owner].label_names or []
    ordered = []
    for adapter in adapters:
        copy = deepcopy(layer.bn_only_layers[adapter])
        theirs = layer.configs[adapter].label_names or []
        rows = [theirs.index(name) for name in names]
        if rows != list(range(len(rows))):
            if not isinstance(copy, nn.Linear | nn.Conv2d):
                what, do = "The classes of this head cannot be reordered.", f"head={owner!r}"
                raise AdapterError(what, seen=f"{layer.canonical_name}, a {type(copy).__name__}", do=do)
            for parameter in copy.parameters():
                parameter.copy_(parameter[rows])
        ordered.append(copy)
    total = math.fsum(weights)
    if total == 0:
        raise ConfigError("The weights of heads that are averaged sum to 0.", seen=f"{weights}", do=f"head={owner!r}")
    _average_(layer.bn_only_layers[new], ordered, [weight / total for weight in weights])
