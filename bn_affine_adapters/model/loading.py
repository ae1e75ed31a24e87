"""Wrap a network, or rebuild one from an adapter; register the method in PEFT."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from torch import nn

from ..adapter.checks import check_network, choose_layers
from ..adapter.fold import copies, parameters, settle_
from ..adapter.limits import build_within
from ..adapter.method import BNOnlyConfig
from ..adapter.rebuild import build, create_pretrained, verify_layout
from ..adapter.tensors import check_tensors
from ..adapter.tuner import BNOnlyTuner, unwrap_
from ..errors import AdapterError, BaseRequiredError, ConfigError, check_choice
from ..settings import BN_ONLY, CUSTOM, LEAN, MAX_PARAMETERS, VERIFY, zoo_of
from ..sharing.compact import compact_file, read_adapter, read_values
from ..sharing.folder import check_header
from ..sharing.hub import fetch, fetch_base
from .peft_model import BNOnlyPeftModel

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def register() -> None:
    """Add the method to PEFT's registries, which are dictionaries keyed by strings."""
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[BN_ONLY] = BNOnlyConfig
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[BN_ONLY] = BNOnlyTuner
    peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[BN_ONLY] = BNOnlyTuner.prefix
    peft.auto.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[BN_ONLY] = BNOnlyPeftModel


def get_bn_only_model(
    model: nn.Module, config: BNOnlyConfig | None = None, adapter_name: str = "default"
) -> BNOnlyPeftModel:
    """Freeze a network, redraw it from the configuration's seed if it has one, and adapt its norm layers, in place.

    Args:
        model: any timm network, or one of Transformers or torchvision that is listed in docs/other-networks.md; an
            adapter of any other module loads only with ``model=``.
        config: what trains and how the rest is drawn; by default gamma and beta train on the weights given.
        adapter_name: as in PEFT.

    Returns:
        A `peft.PeftModel` that trains only gamma, beta and the other parameters that the configuration names.

    Raises:
        NoNormLayerError: there is no norm layer to train.
        NetworkError: ``model`` is no network, has an adapter already, or has one module under two names.
        ConfigError: ``config`` is no BNOnlyConfig.
        RebuildError: the network cannot be built again from its name: give ``model_args``.
        ReinitError: a tensor has no rule that redraws it.

    >>> import timm
    >>> model = get_bn_only_model(timm.create_model("resnet18", num_classes=10), BNOnlyConfig(seed=0))
    >>> model.print_trainable_parameters()
    trainable params: 9,600 || all params: 11,181,642 || trainable%: 0.0859
    """
    check_network(model)
    if not isinstance(config, BNOnlyConfig | None):
        what, seen = "The configuration is not a BNOnlyConfig.", f"{type(config).__name__} {config!r}"[:200]
        raise ConfigError(
            what, seen=seen, do="BNOnlyConfig(**config)" if isinstance(config, dict) else "BNOnlyConfig(seed=0)"
        )
    return peft.get_peft_model(model, config or BNOnlyConfig(), adapter_name=adapter_name)


def load_bn_only_model(
    adapter: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    verify: Literal["full", "sampled", "off"] = "full",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    lean: Literal["exact", "rounded", "smallest"] | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    max_parameters: int | None = MAX_PARAMETERS,
) -> BNOnlyPeftModel:
    """Rebuild a network from an adapter: architecture + seed redraw the weights, which are then verified.

    Args:
        adapter: a folder that ``model.save_pretrained`` wrote, or the Hub id of what ``model.push_to_hub`` pushed; or
            a compact file that `export` wrote, or a folder or repository that holds one and no adapter_config.json.
        model: the base of an adapter without a seed; verified against the adapter's fingerprint. By default it is
            fetched from the Hub, if the adapter names its repository and commit. With a seed it may be any network of
            the same architecture, which is redrawn in place.
        adapter_name: as in PEFT.
        is_trainable: continue training; otherwise the adapter is frozen and the network in evaluation mode.
        verify: compare every frozen value, at most 4,096 values a tensor (of a compact file every value), or none.
        device: where the network is moved after it was drawn on the CPU.
        dtype: of the whole network, cast after it was verified, e.g. torch.bfloat16 or "bfloat16".
        lean: with ``is_trainable``, train in less memory and time, see `bn_affine_adapters.lean`.
        revision: a branch, tag or commit on the Hub.
        subfolder: where the adapter is in the folder or repository.
        token: of the Hub; by default that of ``hf auth login``.
        cache_dir: of the Hub's client.
        local_files_only: use only files in the cache, without network access.
        max_parameters: refuse a network with more; None lifts this and every other bound on what is built.

    Raises:
        ConfigError: ``verify`` or ``lean`` is none of the words above.
        AdapterFileError: a file is missing, truncated or not safetensors.
        BaseRequiredError: the adapter belongs to given weights: pass ``model``.
        FingerprintError: the network is not the one that the adapter was trained on.
        AdapterTensorError: the adapter's tensors do not fit the network.
        AdapterError: ``is_trainable`` asks for a compact file to be trained.
        TooLargeError: the network asked for, or a file, is over the limit.
        NetworkError: ``model`` is no network, or has an adapter already.
        ConfigError: there is no such ``dtype``.
        HubError: the adapter is not on the Hub, needs another token, or the Hub cannot be reached.
    """
    check_choice("verify", verify, VERIFY)
    check_choice("lean", lean, LEAN)
    if model is not None:
        check_network(model)
    dtype = _floating(dtype)
    client: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    folder = fetch(adapter, revision=revision, subfolder=subfolder, max_parameters=max_parameters, **client)
    most = max_parameters if model is None else None
    compact, config = compact_file(folder), read_adapter(folder, BNOnlyConfig, most)
    if compact and is_trainable:
        what = "A compact adapter is for inference: its statistics are folded into gamma and beta."
        raise AdapterError(what, seen=f"is_trainable=True, {compact}", do="train the adapter that it was exported from")
    config.verify = "full" if compact and verify == "sampled" else verify  # a compact file has no sampled fingerprint
    if model is None:
        model = _build(config, str(adapter), folder, max_parameters, client)
        config.built_here = True
    # The configuration is passed so that the tuner sees `verify`, which is not in the file.
    how: dict[str, Any] = {"adapter_name": adapter_name, "config": config}
    with _restored_on_error(model):
        if compact is not None:
            wrapped = _wrap_compact(model, compact, **how)
        else:
            how |= {"is_trainable": is_trainable, "torch_device": "cpu"}
            wrapped = peft.PeftModel.from_pretrained(model, str(folder), **how)
    wrapped.to(device, dtype)
    if lean is not None:
        wrapped.set_lean(lean)
    return wrapped


@contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """Give a network back unwrapped, as it was, if wrapping it or loading its adapter fails."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    classes = getattr(model, "num_classes", None)
    try:
        yield
    except Exception:
        unwrap_(model)
        for parameter in trained:
            parameter.requires_grad_(True)
        if classes is not None:
            model.num_classes = classes
        raise


def _wrap_compact(model: nn.Module, file: Path, adapter_name: str, config: BNOnlyConfig) -> BNOnlyPeftModel:
    """Redraw and verify a network, and fill the copies of a compact adapter from its file."""
    config.inference_mode = True
    wrapped = BNOnlyPeftModel(model, config, adapter_name)
    held = copies(wrapped.get_base_model(), adapter_name, wrapped.peft_config[adapter_name])
    targets = parameters(held)
    values = read_values(file, [tensor.numel() for tensor in targets.values()])
    given = {k: torch.from_numpy(v).view(t.shape) for (k, t), v in zip(targets.items(), values, strict=True)}
    check_tensors(given, targets)
    settle_(held)
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(given[name])
    return wrapped.eval()


def _floating(dtype: Any) -> torch.dtype | None:
    """Return the floating-point type that a value or its name is."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if (found is not None and found not in FLOATING) or (found is None and dtype is not None):
        do = f"choose from {', '.join(map(str, FLOATING))}, or their names"
        raise ConfigError("A network cannot be of this dtype.", seen=f"dtype={dtype!r}", do=do)
    return found


def _build(
    config: BNOnlyConfig, adapter: str, folder: Path, max_parameters: int | None, client: dict[str, Any]
) -> nn.Module:
    assert config.architecture is not None
    zoo, given = zoo_of(config.architecture), config.seed is None
    if zoo == CUSTOM or (given and (zoo != "timm" or config.base_model_name_or_path is None)):
        raise BaseRequiredError(
            f"{adapter} was trained on {'given weights' if given else 'a network of your own code'}.",
            seen=f"seed={config.seed}, architecture={config.architecture!r}, model_args={config.model_args}",
            do=f"load_bn_only_model({adapter!r}, model=base)",
        )
    outline = build_within(config, max_parameters)
    if config.compact:  # it leaves out the names of layers that follow from the network
        choose_layers(outline, config)
    verify_layout(outline, config)
    choose_layers(outline, config)
    if not config.compact:
        check_header(folder, outline, config)
    if config.seed is not None:
        return build(config).eval()
    base = fetch_base(config, max_parameters=max_parameters, **client)
    return create_pretrained(config.architecture, config.model_args, base).eval()


register()
