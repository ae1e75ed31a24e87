"""Choose the layers that an adapter owns, and refuse what does not fit, before a network is wrapped."""

import warnings
from copy import deepcopy
from typing import Any

import timm.data
import torch
from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from ..errors import AdapterError, AdapterNameError, ConfigError, MissingModuleError, NetworkError
from ..norms import COPIES
from ..norms.find import (
    affine,
    canonical,
    is_norm,
    is_response_norm,
    named_layers,
    norm_layers,
    plain_modules,
    unwrapped,
)
from ..norms.scales import layer_scales
from ..seed.rules import draw_norm_
from ..settings import PEFT_PREFIX
from .control import is_conv
from .layer import adapter_layers
from .method import BNOnlyConfig
from .rebuild import holder, infer_architecture, infer_args
from .zoos import head_of, image_size_of, is_transformers

TUNER_PREFIX = "bn_only_"  # of the attributes that hold copies, by which PEFT recognises an adapter's tensors


def check_network(model: Any) -> None:
    """Raise NetworkError unless a value is a network that has no adapter yet."""
    if not isinstance(model, nn.Module):
        raise NetworkError(
            "An adapter needs a network.",
            seen=f"{type(model).__name__} {model!r}"[:200],
            do='give a module, e.g. timm.create_model("resnet18")',
        )
    names = sorted({name for layer in adapter_layers(model) for name in layer.configs})
    if names:
        raise NetworkError(
            "The network has an adapter already.",
            seen=f"{type(model).__name__} with {', '.join(names)}",
            do="model.add_adapter(name, config) or model.load_adapter(folder, name) for another, or model.unload()",
        )


def check_adapter_name(model: nn.Module, name: str) -> None:
    """Raise AdapterNameError if PEFT or torch cannot use a name as a key without confusing it with another one."""
    why = None
    if not isinstance(name, str) or not name.isprintable() or not name or set(name) & set("./\\"):
        why = "it is empty, or holds a dot, a slash or an unprintable character"
    elif len(name) > 100:
        why = f"it has {len(name)} characters, and becomes the name of a folder"
    elif hasattr(nn.ModuleDict, name):
        why = "torch.nn.ModuleDict has an attribute of that name"
    elif name in TUNER_PREFIX:
        why = f"PEFT takes it for part of the prefix {TUNER_PREFIX!r}"
    else:
        keys = [*model.state_dict(), f"{PEFT_PREFIX}base_layer.{COPIES}"]
        adapters = {adapter for layer in adapter_layers(model) for adapter in layer.configs}
        if name in {part for key in keys for part in key.split(".")} - adapters:
            why = "the network has a module or tensor of that name"
    if why:
        raise AdapterNameError(
            f"{name!r} cannot be the name of an adapter.", seen=why, do='choose another, e.g. "default" or "task_1"'
        )


def check_wrappable(model: nn.Module) -> None:
    """Raise NetworkError, before anything changes, for what hides norm layers or would change while it is frozen."""
    for name, module in model.named_modules():
        seen = f"{type(module).__name__} at {name or 'the top'}"
        if not name and unwrapped(module) is not module:
            do = "adapt the network itself, then compile or distribute what that returns"
            raise NetworkError("The network is inside a wrapper.", seen=seen, do=do)
        if isinstance(module, torch.jit.ScriptModule):
            what, do = "TorchScript hides norm layers.", "wrap the network before it is scripted or traced"
            raise NetworkError(what, seen=seen, do=do)
        hooks = (*module._forward_pre_hooks.values(), module)
        if any(isinstance(hook, SpectralNorm | _SpectralNorm) for hook in hooks):
            what = "Spectral normalisation changes in every training step what the adapter holds frozen."
            do = "torch.nn.utils.parametrize.remove_parametrizations, or remove_spectral_norm, first"
            raise NetworkError(what, seen=seen, do=do)


def warn_of_lost_base(model: nn.Module, config: BNOnlyConfig) -> None:
    """Warn if nobody can have an adapter's base again: no seed draws it, and it is no known pretrained network."""
    if config.seed is not None or config.base_model_name_or_path is not None:
        return
    known = getattr(model, "pretrained_cfg", None) or {}
    layers = norm_layers(model).values()
    tensors = [layer.get_parameter(name) for layer in layers for name in affine(layer) if name]
    # In a new network gamma and beta are constants.
    if all(bool((tensor == tensor.flatten()[0]).all()) for tensor in tensors if tensor.numel()):
        why = "they are those of a new network, drawn at random"
    elif any(known.get(key) for key in ("hf_hub_id", "url", "file")) or getattr(model, "name_or_path", None):
        return
    else:
        why = "nothing tells where they come from"
    warnings.warn(
        f"This adapter belongs to weights that nobody else can have: no seed draws them, and {why}. Keep the base "
        "network's weights, to pass it as model= when the adapter is loaded, or redraw them: BNOnlyConfig(seed=0).",
        stacklevel=2,
    )


def infer(model: nn.Module, config: BNOnlyConfig, first: BNOnlyConfig | None) -> None:
    """Infer what a new adapter's configuration leaves open: architecture, creation arguments, data configuration."""
    if first is not None:
        config.architecture = config.architecture or first.architecture
        config.model_args = {**first.model_args, **config.model_args}
        config.layer_scale = config.layer_scale or first.layer_scale
        if config.layer_scale == first.layer_scale and config.layer_scales is None:
            config.layer_scales = first.layer_scales
        _choose_scales(model, config)  # before `check_agreement` compares them
    else:
        config.architecture = config.architecture or infer_architecture(model)
        config.model_args = infer_args(model, config.architecture, config.model_args)
        config.layer_scale = config.layer_scale or ("constructor" if config.seed is None else "one")
    if config.data_config is not None and (size := image_size_of(model)) is not None:
        config.data_config.setdefault("input_size", size)
    of_timm: Any = model.timm_model if is_transformers(model) and "timm_model" in model._modules else model
    if config.data_config is None and getattr(of_timm, "pretrained_cfg", None):
        data = timm.data.resolve_model_data_config(of_timm)
        channels = config.model_args.get("in_chans", data["input_size"][0])
        if channels != data["input_size"][0]:
            # timm's mean and std are for three channels: another number gets their average.
            data["input_size"] = (channels, *data["input_size"][1:])
            data |= {key: (sum(data[key]) / len(data[key]),) * channels for key in ("mean", "std")}
        if (side := config.model_args.get("img_size")) is not None:
            data["input_size"] = (channels, *((side, side) if isinstance(side, int) else side))
        config.data_config = {key: list(v) if isinstance(v, tuple) else v for key, v in sorted(data.items())}


def choose_layers(model: nn.Module, config: BNOnlyConfig) -> None:
    """Fill in the exact names of the layers that the adapter owns, and check those given.

    Raises:
        MissingModuleError: there is no head to train, or a name is not in the network.
        ConfigError: a module is of the wrong kind, or nothing is adapted.
    """
    _choose_head(model, config)
    named_layers(model, config.whole_modules, "head or extra_trainable_modules")
    _choose_norms(model, config)
    _choose_scales(model, config)
    _choose_convolutions(model, config)
    if not config.target_modules:
        raise ConfigError("Nothing is adapted.", seen="norm_layers=[] and no head", do="leave norm_layers out for all")


def _choose_head(model: nn.Module, config: BNOnlyConfig) -> None:
    heads = head_of(model, config.architecture)
    if config.head_layers is None:
        config.head_layers = list(heads)
    elif heads and (strange := [name for name in config.head_layers if name not in heads]):
        raise ConfigError(
            "head_layers names a module that is not part of the head.",
            seen=repr(strange[0])[:200],
            do="leave head_layers out",
        )
    classes = config.model_args.get("num_classes")
    if config.label_names and classes and len(config.label_names) != classes:
        raise ConfigError(
            "label_names has to name every class once.",
            seen=f"{len(config.label_names)} names, {classes} classes",
            do="give the names in the order of the logits",
        )
    if config.train_head and not config.head_layers:
        raise MissingModuleError(
            f"{type(model).__name__} has no head that could train.",
            seen=f"get_classifier() gives no module with parameters; num_classes={getattr(model, 'num_classes', None)}",
            do="create the network with num_classes=..., or name its last layer in extra_trainable_modules",
        )


def _choose_norms(model: nn.Module, config: BNOnlyConfig) -> None:
    if config.norm_layers is None:
        # A norm layer inside a module that the adapter owns as a whole is part of that module's copy.
        whole, found = set(config.whole_modules), norm_layers(model)
        owned = [name for name, module in plain_modules(model) if name in found or is_response_norm(module)]
        config.norm_layers = [name for name in owned if not holder(name, whole)]
    layers = named_layers(model, config.norm_layers, "norm_layers")
    if strange := [name for name, module in layers.items() if not (is_norm(module) or is_response_norm(module))]:
        raise ConfigError(
            "norm_layers names a module that is not a norm layer.",
            seen=strange[0],
            do="name it in extra_trainable_modules to train it as a whole",
        )


def _choose_scales(model: nn.Module, config: BNOnlyConfig) -> None:
    if config.layer_scales == [] and config.layer_scale != "train":
        return
    found = layer_scales(model)
    if config.layer_scales is None:
        whole = set(config.whole_modules)
        config.layer_scales = [] if config.layer_scale == "constructor" else [n for n in found if not holder(n, whole)]
    if strange := [name for name in config.layer_scales if name not in found]:
        seen, do = strange[0][:200], "leave layer_scales out for all of them"
        raise ConfigError("layer_scales names a parameter that is not a layer scale.", seen=seen, do=do)
    if config.layer_scale == "train" and not config.layer_scales:
        do = 'layer_scale="constructor", or a network with layer scales, e.g. convnext_atto'
        raise ConfigError(f"{type(model).__name__} has no layer scale to train.", seen="layer_scale='train'", do=do)


def _choose_convolutions(model: nn.Module, config: BNOnlyConfig) -> None:
    others = {*config.whole_modules, *(config.head_layers or ())}
    if config.control and config.control_layers is None:
        config.control_layers = [n for n, m in plain_modules(model) if is_conv(m) and not holder(n, others)]
    convolutions = named_layers(model, config.control_layers or [], "control_layers")
    if strange := [name for name, module in convolutions.items() if not is_conv(module) or holder(name, others)]:
        what = "control_layers names a module that is not a convolution, or that trains as a whole."
        raise ConfigError(what, seen=strange[0], do="leave control_layers out for all convolutions")
    if convolutions and not config.control:
        raise ConfigError("control_layers needs a control.", seen="control=None", do='control="two_weights"')
    if config.control and not convolutions:
        do = "choose a network with convolutions, or control=None"
        raise ConfigError(f"{type(model).__name__} has no convolution to control.", seen=config.control, do=do)


def check_agreement(model: nn.Module, config: BNOnlyConfig, first: BNOnlyConfig) -> None:
    """Check that a further adapter fits the network as the first adapter made it.

    Raises:
        AdapterError: it belongs to other frozen weights, or an adapter is merged.
        ConfigError: it belongs to another architecture, or has its own number of classes and no head.
    """
    mine, theirs = (
        (c.seed, c.weight_init if c.seed is not None else None, c.init_scheme, c.ones) for c in (config, first)
    )
    if mine != theirs:
        raise AdapterError(
            "Adapters on one network share its frozen weights, and this one was made for others.",
            seen=f"seed, weight_init and scheme {mine}; the network was drawn with {theirs}",
            do="use the same seed and weight_init, or load the adapter on a network of its own",
        )
    built, there = ((c.architecture, {**c.model_args, "num_classes": None}) for c in (config, first))
    if built != there:
        raise ConfigError(
            "All adapters on one network have the same architecture; only num_classes may differ.",
            seen=f"{built[0]} {config.model_args}; the network is {there[0]} {first.model_args}",
            do="load the adapter on a network of its own",
        )
    classes = config.model_args.get("num_classes")
    if not config.train_head and classes != first.model_args.get("num_classes"):
        raise ConfigError(
            "An adapter with another number of classes has to train its head.",
            seen=f"num_classes={classes}; the network has {first.model_args.get('num_classes')}",
            do="train_head=True",
        )
    if any(layer.merged for layer in adapter_layers(model)):
        raise AdapterError(
            "An adapter cannot be added while another is merged: PEFT would unmerge it.",
            seen="merged norm layers",
            do="model.unmerge_adapter() first",
        )


def check_nesting(model: nn.Module, config: BNOnlyConfig) -> None:
    """Raise ConfigError if a module that an adapter owns lies inside another such module."""
    names = {*config.target_modules, *(layer.canonical_name for layer in adapter_layers(model) if layer.configs)}
    nested = [(name, outer) for name in sorted(names) if (outer := holder(name.rpartition(".")[0], names))]
    if nested:
        raise ConfigError(
            "One module that an adapter owns lies inside another.",
            seen=f"{nested[0][0]} lies inside {nested[0][1]}",
            do="adapters on one network have to choose the same one of the two",
        )


def check_shared(model: nn.Module, config: BNOnlyConfig) -> None:
    """Raise NetworkError if a module that an adapter owns has a second name, under which its copy would not run."""
    names: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        own = unwrapped(module)
        if own._parameters or own._buffers:
            names.setdefault(id(own), set()).add(canonical(name))
    owned = set(config.target_modules)
    for ways in names.values():
        if len({holder(name, owned) for name in ways}) > 1:
            raise NetworkError(
                "A module of which the adapter has a copy stands in the network under two names.",
                seen=", ".join(sorted(ways)[:3]),
                do="give each place a module of its own, or leave it out of norm_layers and extra_trainable_modules",
            )


def check_frozen_norms(model: nn.Module, config: BNOnlyConfig, first: BNOnlyConfig | None) -> None:
    """Raise ConfigError if the norm layers that a further adapter does not own differ from what norm_init draws."""
    if first is None or config.seed is None or config.norm_init in (None, "keep"):
        return
    owned = set(config.target_modules)
    for name, layer in norm_layers(model).items():
        if holder(name, owned):
            continue
        drawn = deepcopy(layer)
        draw_norm_(drawn, name, config.seed, config.norm_init)
        if any(not a.equal(b) for a, b in zip(drawn.parameters(), layer.parameters(), strict=True)):
            raise ConfigError(
                "The norm layers that this adapter leaves frozen have other values on this network.",
                seen=f"norm_init={config.norm_init!r} draws another {name}",
                do="give the norm_init that the network was drawn with, or all norm layers",
            )
