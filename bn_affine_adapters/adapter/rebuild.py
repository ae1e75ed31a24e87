"""The frozen backbone: build its architecture again, write its fingerprints, verify it."""

import json
import warnings
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import nn

from ..errors import (
    BaseRequiredError,
    BNAdapterError,
    FingerprintError,
    RebuildError,
    ReinitError,
)
from ..norms.find import FUSING, STATISTICS, affine, is_norm, is_response_norm, plain_modules, plain_tensors
from ..seed.fingerprint import fingerprint, first_difference, float32, layout, sampled
from ..seed.generator import OwnGenerator
from ..seed.rules import constants_only, draw_into_, parameter_rules
from ..settings import CUSTOM, FORBIDDEN_ARGS, FORMAT_VERSION, OTHERS, Settings, creation_call, is_plain, zoo_of
from .method import BNOnlyConfig
from .traits import MODULE_DIGEST, Traits, digest, traits
from .zoos import architecture_of, arguments_of, builder_of

SHORT = 16  # bytes that a compact adapter stores of a fingerprint


def versions() -> dict[str, str]:
    """Return the versions of the libraries that the frozen weights depend on."""
    names = ("bn-affine-adapters", "torch", "timm", "peft", "numpy")
    return {name: version(name) for name in names}


def create(architecture: str, model_args: dict[str, Any], device: str | torch.device = "cpu") -> nn.Module:
    """Build a network by its name, with the constants of its constructor and NaN for every random tensor.

    Raises:
        UnknownArchitectureError: no zoo has the name; the message gives the nearest one.
        RebuildError: the constructor does not take the arguments.
    """
    builder = builder_of(architecture)
    try:
        with torch.device(device), constants_only():
            return builder(**model_args)
    except BNAdapterError:
        raise
    except Exception as error:  # arguments from a file make constructors fail in any way
        raise RebuildError(
            f"{architecture} cannot be built with these arguments.",
            seen=f"model_args={model_args}; {type(error).__name__}: {error}",
            do="give the creation arguments of the architecture as model_args",
        ) from error


def build(config: Settings, device: str | torch.device = "cpu") -> nn.Module:
    """Build the network that a configuration names, as `create` does."""
    assert config.architecture is not None
    return create(config.architecture, config.model_args, device)


def build_outline(config: Settings) -> nn.Module:
    """Build a configuration's network as `outline` does."""
    assert config.architecture is not None
    return outline(config.architecture, config.model_args)


def outline(architecture: str, model_args: dict[str, Any]) -> nn.Module:
    """Build a network as `create` does, on the meta device, or on the CPU if its constructor computes with values."""
    try:
        return create(architecture, model_args, "meta")
    except RebuildError:
        return create(architecture, model_args)


def create_pretrained(architecture: str, model_args: dict[str, Any], file: Path) -> nn.Module:
    """Build a network registered in timm, with the pretrained weights of a safetensors file.

    Raises:
        BaseRequiredError: the network is one of Transformers or torchvision.
        UnknownArchitectureError, RebuildError: as in `create`.
        FingerprintError: the file's tensors do not fit the network.
    """
    if zoo_of(architecture) in OTHERS:
        what, do = (
            "Pretrained weights are read from a file for timm's networks only.",
            "load the adapter with model=base",
        )
        raise BaseRequiredError(what, seen=architecture[:80], do=do)
    create(architecture, model_args, "meta")  # so that any error below is caused by the file
    overlay: dict[str, Any] = {"file": str(file)}
    head = getattr(timm.get_pretrained_cfg(architecture), "classifier", None)
    try:
        with safe_open(file, "pt") as opened:
            if isinstance(head, str) and f"{head}.weight" in opened.keys():  # noqa: SIM118  # not a dict
                # timm drops a head whose number of classes differs from the one in its own configuration.
                overlay["num_classes"] = opened.get_slice(f"{head}.weight").get_shape()[0]
        with OwnGenerator():
            return timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=overlay, **model_args)
    except Exception as error:  # every architecture converts a file's tensors in its own way
        raise FingerprintError(
            f"The weights fetched are not those of a {architecture}.",
            seen=f"{type(error).__name__}: {error}",
            do="load the adapter with model=base",
        ) from error


def infer_architecture(model: nn.Module) -> str:
    """Return the name under which a network can be built again, or "custom" if nothing tells one."""
    if (named := architecture_of(model)) is not None:
        return named
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    name = cfg.get("architecture") if isinstance(cfg, dict) else getattr(cfg, "architecture", None)
    return name if name and timm.is_model(name) else CUSTOM


def infer_args(model: nn.Module, architecture: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the creation arguments: those given, those recorded by timm, those that the network's layers show."""
    if zoo_of(architecture) in OTHERS:
        return json.loads(json.dumps({**arguments_of(model, architecture), **given}))
    cfg = getattr(model, "pretrained_cfg", None) or {}
    # timm records them from 1.0.31 on, in a private attribute that may change: `check_rebuild` compares the result.
    recorded = getattr(model, "_model_args", None) or {}
    args = {key: value for key, value in recorded.items() if key not in FORBIDDEN_ARGS and is_plain(value)}
    input_size = cfg.get("input_size") or (3,)
    if "in_chans" not in given and _first_channels(model) not in (None, input_size[0]):
        args["in_chans"] = _image_channels(model, {**args, **given}, input_size[0])
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None and tuple(size) != tuple(input_size[1:]):
        args["img_size"] = list(size)
    if (classes := getattr(model, "num_classes", None)) is not None:
        args["num_classes"] = classes
    return json.loads(json.dumps({**args, **given}))  # lists instead of tuples, as in a file


def _first_channels(model: nn.Module) -> int | None:
    """Return the channels that the first convolution takes, or the network's own number if timm names none."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or ()
    first = dict(model.named_modules()).get(names if isinstance(names, str) else next(iter(names), ""))
    return getattr(first, "in_channels", getattr(model, "in_chans", None))


def _image_channels(model: nn.Module, args: dict[str, Any], usual: int) -> int | None:
    """Return how many channels the images have whose first convolution has others than usual.

    A stem may change the channels before it, e.g. from 3 to 48 in TResNet. Then the network as timm builds it shows by
    which factor.
    """
    ours, name = _first_channels(model), infer_architecture(model)
    theirs = None if name == CUSTOM else _first_channels(outline(name, args))
    expected = args.get("in_chans", usual)
    if ours is None or theirs is None:
        return ours
    return expected * ours // theirs


def check_rebuild(found: Mapping[str, Traits], config: BNOnlyConfig) -> None:
    """Build the architecture again and compare names, shapes, classes, extra_repr and settings of all modules.

    Args:
        found: the traits of the network given.
        config: of the adapter.

    Some creation arguments (``output_stride=8``) change neither a name nor a shape, and timm may not have recorded
    them. A network that passes this comparison is the one that loading the adapter builds.

    Raises:
        RebuildError: the two networks differ; the message names the first difference.
    """
    outline = build_outline(config)
    rebuilt = traits(outline)
    ours, theirs = _by_place(found), _by_place(rebuilt)
    different = [key for key in [*ours, *theirs] if ours.get(key) != theirs.get(key)]
    if not config.fresh:
        # The adapter has its own head: the base may have another one.
        heads = [f"{name}:" for name in config.head_layers or []]
        own = (*heads, "the network: num_classes", "the network: num_labels")
        different = [key for key in different if not key.startswith(own)]
    if different and len(found) < len(rebuilt) and any(hasattr(type(m), n) for m in outline.modules() for n in FUSING):
        raise RebuildError(
            f"This {config.architecture} has been reparameterised: its norm layers are fused into convolutions.",
            seen=f"{len(found)} modules, {len(rebuilt)} before",
            do="adapt the network before timm.utils.reparameterize_model; afterwards, on model.merge_and_unload()",
        )
    if different:
        key = different[0]
        raise RebuildError(
            f"{config.architecture} built with {config.model_args} is not the network given.",
            seen=f"{len(different)} differences, the first at {key}: {ours.get(key)!r} in the network given, "
            f"{theirs.get(key)!r} in the rebuilt one",
            do="give the creation arguments as BNOnlyConfig(model_args={...}), or architecture='custom' for a network "
            "changed by hand, which then loads only with model="
            if config.fresh
            else f"pass the network of {creation_call(str(config.architecture), config.model_args)}",
        )


def _by_place(found: Mapping[str, Traits]) -> dict[str, Any]:
    return {f"{name or 'the network'}: {key}": value for name, own in found.items() for key, value in own.items()}


def holder(name: str, modules: Collection[str]) -> str | None:
    """Return the module that a name is or lies in, or None; the time grows with the name's depth alone."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def frozen_tensors(model: nn.Module, config: BNOnlyConfig) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return (backbone, rest) by canonical name, in the order of the network's definition.

    The backbone is every parameter and persistent buffer except the norm layers' gamma, beta and running statistics,
    the head and the extra trainable modules; adapters with other heads share it. The rest is what this adapter leaves
    frozen besides: a head that does not train, and norm layers that it does not own.
    """
    backbone: dict[str, torch.Tensor] = {}
    rest: dict[str, torch.Tensor] = {}
    extra, heads = set(config.extra_trainable_modules), set(config.head_layers or ())
    norms, scales = set(config.norm_layers or ()), set(config.trained_scales)
    for name, owner, attribute, tensor in plain_tensors(model):
        if holder(name, extra) or name in scales:
            continue
        if holder(name, heads):
            if not config.train_head:
                rest[name] = tensor
        elif is_response_norm(owner) and holder(name, norms):
            continue
        elif is_norm(owner) and attribute in (*affine(owner), *STATISTICS):
            if not holder(name, norms):
                rest[name] = tensor
        else:
            backbone[name] = tensor
    return backbone, rest


def _arrays(
    model: nn.Module, config: BNOnlyConfig, tensors: Mapping[str, torch.Tensor]
) -> dict[str, NDArray[np.float32]]:
    # If a network was cast to bfloat16, its fingerprint is that of the float32 values, if the seed draws them.
    cast = {name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.dtype != torch.float32}
    arrays: dict[str, NDArray[np.float32]] = {}
    if config.seed is not None and cast:
        for name, parameter, rule in parameter_rules(model, weight_init=config.weight_init, norm_init="keep"):
            if name in cast:
                drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
                draw_into_(drawn, rule, config.seed, name)
                if torch.equal(drawn.to(parameter.dtype), parameter.detach().cpu()):
                    arrays[name] = float32(drawn)
    for name, tensor in tensors.items():
        array = arrays.setdefault(name, float32(tensor))
        if not np.isfinite(array).all():
            raise ReinitError(
                f"{name} has values that are not finite and cannot be part of a frozen network.",
                seen=f"shape {tuple(tensor.shape)}, {int((~np.isfinite(array)).sum())} of {array.size} not finite",
                do="pass a network whose buffers do not depend on a random generator",
            )
    return arrays


def write_fingerprints(model: nn.Module, config: BNOnlyConfig, found: dict[str, Traits]) -> None:
    """Write the frozen tensors' fingerprints, the layout, the traits and the versions into a configuration."""
    backbone, rest = frozen_tensors(model, config)
    hashes = fingerprint(_arrays(model, config, backbone))
    config.backbone_fingerprint = hashes.full
    config.backbone_fingerprint_sampled = hashes.sampled
    config.backbone_digests = hashes.tensors
    config.layout_hash = _layout(model, config, backbone)
    config.frozen_fingerprint = fingerprint(_arrays(model, config, rest)).full if rest else None
    config.versions = versions()
    write_traits(found, config)


def write_traits(found: dict[str, Traits], config: BNOnlyConfig) -> None:
    """Write the digest of a network's traits into a configuration, which may come from a file without one."""
    config.traits_fingerprint, config.traits_digests = digest(found, config)
    config.format_version = FORMAT_VERSION


def check_traits(found: dict[str, Traits], config: BNOnlyConfig) -> None:
    """Compare the classes and settings of a network of somebody's own code with a configuration's.

    A network that timm builds is compared in `check_rebuild`, with what this version of timm builds.

    Raises:
        FingerprintError: they differ. If torch or timm had another version then, this warns: a newer one may have
            another name for the same.
    """
    if config.architecture != CUSTOM or config.verify == "off" or config.traits_fingerprint is None:
        return
    ours = digest(found, config)
    if ours.full == config.traits_fingerprint:
        return
    theirs = config.traits_digests or ""
    name = first_difference(list(found), ours.modules, theirs, MODULE_DIGEST)
    own = found.get(name, {})
    shown = f"{own.get('class', '')}({own.get('extra_repr', '')})"
    seen = f"{len(found)} modules, then {len(theirs) // MODULE_DIGEST}; the first that differs is "
    error = _mismatch(config, "a module has another class or setting", seen + f"{name or 'the network'}, now {shown}")
    now = versions()
    if all(config.versions.get(library) == now[library] for library in ("torch", "timm")):
        raise error
    warnings.warn(str(error), stacklevel=2)


def _layout(model: nn.Module, config: BNOnlyConfig, backbone: Mapping[str, torch.Tensor]) -> str:
    shapes = {name: tuple(tensor.shape) for name, tensor in backbone.items()}
    heads = set(config.head_layers or ())
    for name, owner, attribute, tensor in plain_tensors(model):
        if is_norm(owner) and attribute in affine(owner) and not holder(name, heads):
            shapes[name] = tuple(tensor.shape)
    return layout(shapes, config.init_scheme)


def verify_layout(model: nn.Module, config: BNOnlyConfig) -> None:
    """Compare names and shapes of a network's layers with a configuration's, before anything is redrawn.

    Raises:
        FingerprintError: they differ; the message names a layer that is missing.
    """
    if config.verify == "off":
        return
    if not _equal(_layout(model, config, frozen_tensors(model, config)[0]), config.layout_hash, config):
        call = creation_call(str(config.architecture), config.model_args)
        advice = "" if config.architecture == CUSTOM else f"pass {call}, or "
        raise _mismatch(config, "its layers have other names or shapes", _absent(model, config), advice)


def verify(model: nn.Module, config: BNOnlyConfig) -> None:
    """Compare a network's frozen tensors with a configuration's fingerprints, as thoroughly as ``config.verify`` says.

    Raises:
        FingerprintError: they differ; the message names the first layer that does, and the versions then and now.
    """
    if config.verify == "off" or not (found := frozen_difference(model, config, config.verify == "sampled")):
        return
    now, then = getattr(model, "num_classes", None), config.model_args.get("num_classes")
    if zoo_of(config.architecture) == "timm" and now != then and not config.train_head:
        what = "This is not the network that the adapter was trained on: its head has another number of classes."
        seen = f"num_classes={now}, the adapter's num_classes={then}"
        raise FingerprintError(what, seen=seen, do=f"pass {creation_call(str(config.architecture), config.model_args)}")
    raise _mismatch(config, *found)


def frozen_difference(model: nn.Module, config: BNOnlyConfig, sample: bool = False) -> tuple[str, str] | None:
    """Return (what of a network's frozen tensors differs from a configuration's fingerprints, where), or None.

    Args:
        model: the network.
        config: its fingerprints.
        sample: compare at most 4,096 values a tensor.
    """
    backbone, rest = frozen_tensors(model, config)
    arrays = _arrays(model, config, backbone)
    if sample and sampled(arrays) != config.backbone_fingerprint_sampled:
        return "the sampled values differ", "4,096 values a tensor were compared"
    if not sample and not _equal((hashes := fingerprint(arrays)).full, config.backbone_fingerprint, config):
        name = first_difference(list(backbone), hashes.tensors, config.backbone_digests or "")
        dtype = f" ({backbone[name].dtype})" if name in backbone else ""
        return "frozen weights differ", f"the first layer that differs is {name}{dtype}"
    if rest and not _equal(fingerprint(_arrays(model, config, rest)).full, config.frozen_fingerprint, config):
        return "the frozen head or norm layers differ", f"among {', '.join(list(rest)[:3])} ..."
    return None


def _equal(found: str, stored: str | None, config: BNOnlyConfig) -> bool:
    """Compare two sha256 in hex; a compact adapter stores the first 16 of 32 bytes."""
    return stored in ((found, found[: 2 * SHORT]) if config.compact else (found,))


def _absent(model: nn.Module, config: BNOnlyConfig) -> str:
    names = {name for name, _ in plain_modules(model)}
    absent = [name for name in config.target_modules if name not in names]
    if absent:
        return f"{len(absent)} of the adapter's layers are not in it, the first is {absent[0]}"
    return f"{len(names)} modules"


def _mismatch(config: BNOnlyConfig, why: str, seen: str, advice: str = "") -> FingerprintError:
    now = versions()
    changed = [f"{k} {v} -> {now.get(k)}" for k, v in config.versions.items() if now.get(k) != v]
    shown = ", ".join(changed) or ("not stored" if config.compact else "the same")
    if config.seed is None:
        do = "pass the base that the adapter was trained on as model="
    elif changed or config.compact:
        do = "install the versions that made the adapter"
    else:
        do = f"report this: seed {config.seed} promises the same bits"
    return FingerprintError(
        f"This is not the network that the adapter was trained on: {why}.",
        seen=f"{seen}; {config.architecture}, versions then and now: {shown}",
        do=advice + do,
    )
