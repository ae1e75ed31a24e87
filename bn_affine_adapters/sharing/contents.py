"""What an adapter holds: its tensors by part, as plain data, and two adapters compared."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from ..adapter.config import BNOnlyConfig
from ..adapter.tensors import bare
from ..errors import AdapterTensorError
from ..norms.find import COPIES, Scale

NEAR_ZERO = 0.01  # |gamma| below which a feature counts as disabled, as in the paper
_KINDS = {"gamma": ("weight", "alpha"), "beta": ("bias", "beta")}  # as norm layers name them: see `norms.find.affine`


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors by name in the network; their number and size were bounded by `check_files`.

    Raises:
        AdapterTensorError: a value is not finite.
    """
    tensors = {bare(name): tensor for name, tensor in load_file(folder / SAFETENSORS_WEIGHTS_NAME).items()}
    if strange := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        what, do = "The adapter has values that are not finite.", "download it again, or train it again"
        raise AdapterTensorError(what, seen=f"{len(strange)} tensors, the first is {strange[0][:200]}", do=do)
    return tensors


def parts(config: BNOnlyConfig, names: Iterable[str]) -> dict[str, list[str]]:
    """Sort an adapter's tensors into "gamma", "beta", "running statistics", "head", "control" and "other modules"."""
    norms = set(config.norm_layers or ())
    others = dict.fromkeys(config.head_layers or (), "head") | dict.fromkeys(config.control_layers or (), "control")
    others |= {name + Scale.SUFFIX: "layer scale" for name in config.trained_scales}
    names_of_parts = (*_KINDS, "running statistics", "head", "layer scale", "control", "other modules")
    by_part: dict[str, list[str]] = {part: [] for part in names_of_parts}
    for name in names:
        layer, _, key = name.partition(f".{COPIES}.")
        kind = next((part for part, keys in _KINDS.items() if key in keys), "running statistics")
        by_part[kind if layer in norms else others.get(layer, "other modules")].append(name)
    return by_part


def describe(folder: Path, config: BNOnlyConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return what an adapter holds as plain data: settings, tensors by part, a summary of gamma, file sizes."""
    keys = ["architecture", "model_args", "seed", "init_scheme", "weight_init", "norm_init", "running_statistics"]
    keys += ["label_names", "data_config"]
    named = parts(config, tensors)
    trains = [name for name in ("gamma", "beta", "head") if getattr(config, f"train_{name}")]
    return {
        **{key: getattr(config, key) for key in keys},
        "trains": trains + [config.control] * bool(config.control) + config.extra_trainable_modules,
        "base": config.base_model_name_or_path and f"{config.base_model_name_or_path}@{config.revision}",
        "fingerprint": config.backbone_fingerprint,
        "format_version": config.format_version,
        "versions": config.versions,
        "contents": {
            part: {
                "tensors": len(names),
                "values": sum(tensors[name].numel() for name in names),
                "bytes": sum(tensors[name].nbytes for name in names),
            }
            for part, names in named.items()
            if names
        },
        "gamma": _summary([tensors[name] for name in named["gamma"]]),
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()},
    }


def _summary(gammas: list[torch.Tensor]) -> dict[str, float]:
    """Return the extremes and mean of gamma, and the shares in % near zero and below."""
    if not sum(gamma.numel() for gamma in gammas):
        return {}
    values = torch.cat([gamma.flatten().double() for gamma in gammas])
    shares = {f"|gamma| < {NEAR_ZERO}, %": values.abs() < NEAR_ZERO, "negative, %": values < 0}
    return {
        "smallest": round(values.min().item(), 6),
        "mean": round(values.mean().item(), 6),
        "largest": round(values.max().item(), 6),
        **{name: round(100 * share.double().mean().item(), 2) for name, share in shares.items()},
    }


def compare(
    ours: BNOnlyConfig, tensors: Mapping[str, torch.Tensor], theirs: BNOnlyConfig, others: Mapping[str, torch.Tensor]
) -> tuple[dict[str, list[Any]], dict[str, dict[str, str | float]]]:
    """Return the settings that differ, and by layer and tensor the largest difference, or what differs, in words."""
    before, after = ours.to_dict(), theirs.to_dict()
    settings = {key: [before[key], after[key]] for key in before if before[key] != after[key]}
    layers: dict[str, dict[str, str | float]] = {}
    for name in [*tensors, *(others.keys() - tensors.keys())]:
        layer, _, tensor = name.partition(f".{COPIES}.")
        if difference := _difference(tensors.get(name), others.get(name)):
            layers.setdefault(layer, {})[tensor] = difference
    return settings, layers


def _difference(one: torch.Tensor | None, other: torch.Tensor | None) -> str | float | None:
    if one is None or other is None:
        return "only in the second" if one is None else "only in the first"
    if one.shape != other.shape:
        return f"shapes {tuple(one.shape)}, {tuple(other.shape)}"
    return float(f"{(one.double() - other.double()).abs().max():.4g}") if one.numel() else None
