"""The front door: wrap a network, load an adapter."""

import os
from pathlib import Path
from typing import Literal

import peft
import torch
from torch import nn

from .backbone import create
from .config import BN_ONLY, CUSTOM, BNOnlyConfig
from .errors import BaseRequiredError
from .peft_model import BNOnlyPeftModel, check_files, read_config
from .tuner import BNOnlyTuner, unwrap_


def register() -> None:
    """Enter the method into PEFT's registries, which are plain dicts keyed by strings."""
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[BN_ONLY] = BNOnlyConfig
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[BN_ONLY] = BNOnlyTuner
    peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[BN_ONLY] = BNOnlyTuner.prefix
    peft.auto.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[BN_ONLY] = BNOnlyPeftModel


def get_bn_only_model(
    model: nn.Module, config: BNOnlyConfig | None = None, adapter_name: str = "default"
) -> BNOnlyPeftModel:
    """Freeze a network, redraw it from the configuration's seed if it has one, and adapt its norm layers, in place.

    Args:
        model: any timm network; any other module loads again only with ``model=``.
        config: what trains and how the rest is drawn; by default gamma and beta train on the weights given.
        adapter_name: as in PEFT.

    Returns:
        A `peft.PeftModel` that trains gamma and beta (and what else the configuration says) and nothing else.

    Raises:
        NoNormLayerError: there is no norm layer to train.
        RebuildError: the network cannot be built again from its name: give ``model_args``.
        ReinitError: a tensor has no rule by which it could be redrawn.

    >>> import timm
    >>> model = get_bn_only_model(timm.create_model("resnet18", num_classes=10), BNOnlyConfig(seed=0))
    >>> model.print_trainable_parameters()
    trainable params: 9,600 || all params: 11,181,642 || trainable%: 0.0859
    """
    return peft.get_peft_model(model, config or BNOnlyConfig(), adapter_name=adapter_name)


def load_bn_only_model(
    adapter: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    verify: Literal["full", "sampled", "off"] = "full",
    device: str | torch.device = "cpu",
) -> BNOnlyPeftModel:
    """Rebuild a network from an adapter folder: architecture + seed redraw the weights, which are then verified.

    Args:
        adapter: a folder that ``model.save_pretrained`` wrote.
        model: the base of an adapter without a seed; verified against the adapter's fingerprint. With a seed it may
            be any network of the same architecture, which is redrawn in place.
        adapter_name: as in PEFT.
        is_trainable: train on; otherwise the adapter is frozen and the network in evaluation mode.
        verify: compare every frozen value, at most 4,096 a tensor, or none.
        device: where the network goes after it was drawn on the CPU.

    Raises:
        AdapterFileError: a file is missing, truncated or not safetensors.
        BaseRequiredError: the adapter belongs to given weights: pass ``model``.
        FingerprintError: the network is not the one that the adapter was trained on.
        AdapterTensorError: the adapter's tensors do not fit the network.
    """
    folder = Path(adapter)
    check_files(folder)
    config = read_config(folder)
    config.verify = verify
    if model is None:
        model = _build(config, folder)
        config.built_here = True
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        # The configuration as an argument, so that the run-time choice of `verify` reaches the tuner.
        wrapped = peft.PeftModel.from_pretrained(
            model, str(folder), adapter_name=adapter_name, is_trainable=is_trainable, config=config, torch_device="cpu"
        )
    except Exception:
        unwrap_(model)
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    return wrapped.to(device)


def _build(config: BNOnlyConfig, folder: Path) -> nn.Module:
    assert config.architecture is not None
    if config.seed is None or config.architecture == CUSTOM:
        raise BaseRequiredError(
            f"{folder} was trained on {'given weights' if config.seed is None else 'a network of your own code'}.",
            seen=f"seed={config.seed}, architecture={config.architecture!r}, model_args={config.model_args}",
            do=f"load_bn_only_model({str(folder)!r}, model=base)",
        )
    return create(config.architecture, config.model_args).eval()
