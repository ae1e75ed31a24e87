"""What an adapter holds: its tensors by part, as plain data, and two adapters compared."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import deserialize

from ..errors import AdapterTensorError
from ..norms import COPIES, SCALE_SUFFIX
from ..seed.digest import tensors_digest
from ..settings import SAFETENSORS_WEIGHTS_NAME, Settings, bare
from .folder import DTYPES

NEAR_ZERO = 0.01  # |gamma| below which a feature counts as disabled, as in the paper
_KINDS = {"gamma": ("weight", "alpha"), "beta": ("bias", "beta")}  # as norm layers name them: see `norms.find.affine`


class Stored(NamedTuple):
    """A tensor of a file: its values, those in bfloat16 as float32, and its size in the file."""

    values: NDArray[Any]
    bytes: int


_TYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I64": "<i8"}


def _stored(entry: dict[str, Any]) -> Stored:
    data = entry["data"]
    if entry["dtype"] == "BF16":  # the upper half of a float32
        values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(data, _TYPES[entry["dtype"]])
    return Stored(values.reshape(entry["shape"]), len(data))


def read_tensors(folder: Path, config: Settings | None = None) -> dict[str, Stored]:
    """Return an adapter's tensors by name in the network; their number and size were bounded by `check_files`.

    Args:
        folder: of the adapter.
        config: that it was saved with, to check that both files are of one adapter.

    Raises:
        AdapterTensorError: a value is not finite, or the tensors are not those that the configuration was saved with.
    """
    entries = {bare(name): entry for name, entry in deserialize((folder / SAFETENSORS_WEIGHTS_NAME).read_bytes())}
    tensors = {name: _stored(entry) for name, entry in entries.items()}
    if strange := [name for name, tensor in tensors.items() if not np.isfinite(tensor.values).all()]:
        what, do = "The adapter has values that are not finite.", "download it again, or train it again"
        raise AdapterTensorError(what, seen=f"{len(strange)} tensors, the first is {strange[0][:200]}", do=do)
    if config is not None and config.tensors_digest is not None:  # format 1 has none
        _check_digest(folder, entries, config.tensors_digest)
    return tensors


def _check_digest(folder: Path, entries: Mapping[str, Mapping[str, Any]], digest: str) -> None:
    found = tensors_digest((n, DTYPES[e["dtype"]], e["shape"], e["data"]) for n, e in entries.items())
    if found != digest:
        raise AdapterTensorError(
            f"The tensors in {folder} are not those that its configuration was saved with.",
            seen=f"sha256 {found[:16]}...; the configuration says {digest[:16]}...",
            do="save or download both files again; tensors that you changed go through "
            "peft.set_peft_model_state_dict(model, tensors) and model.save_pretrained(folder)",
        )


def parts(config: Settings, names: Iterable[str]) -> dict[str, list[str]]:
    """Sort an adapter's tensors into "gamma", "beta", "running statistics", "head", "control" and "other modules"."""
    norms = set(config.norm_layers or ())
    others = dict.fromkeys(config.head_layers or (), "head") | dict.fromkeys(config.control_layers or (), "control")
    others |= {name + SCALE_SUFFIX: "layer scale" for name in config.trained_scales}
    names_of_parts = (*_KINDS, "running statistics", "head", "layer scale", "control", "other modules")
    by_part: dict[str, list[str]] = {part: [] for part in names_of_parts}
    for name in names:
        layer, _, key = name.partition(f".{COPIES}.")
        kind = next((part for part, keys in _KINDS.items() if key in keys), "running statistics")
        by_part[kind if layer in norms else others.get(layer, "other modules")].append(name)
    return by_part


def describe(folder: Path, config: Settings, tensors: Mapping[str, Stored]) -> dict[str, Any]:
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
                "values": sum(tensors[name].values.size for name in names),
                "bytes": sum(tensors[name].bytes for name in names),
            }
            for part, names in named.items()
            if names
        },
        "gamma": _summary([tensors[name].values for name in named["gamma"]]),
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()},
    }


def _summary(gammas: list[NDArray[Any]]) -> dict[str, float]:
    """Return the extremes and mean of gamma, and the shares in % near zero and below."""
    if not sum(gamma.size for gamma in gammas):
        return {}
    values = np.concatenate([gamma.ravel().astype(np.float64) for gamma in gammas])
    shares = {f"|gamma| < {NEAR_ZERO}, %": np.abs(values) < NEAR_ZERO, "negative, %": values < 0}
    return {
        "smallest": round(float(values.min()), 6),
        "mean": round(float(values.mean()), 6),
        "largest": round(float(values.max()), 6),
        **{name: round(100 * float(share.mean()), 2) for name, share in shares.items()},
    }


def compare(
    ours: Settings, tensors: Mapping[str, Stored], theirs: Settings, others: Mapping[str, Stored]
) -> tuple[dict[str, list[Any]], dict[str, dict[str, str | float]]]:
    """Return the settings that differ, and by layer and tensor the largest difference, or what differs, in words."""
    before, after = ours.to_dict(), theirs.to_dict()
    # The digest of the tensors differs where these do, which are compared below.
    settings = {k: [before[k], after[k]] for k in before if before[k] != after[k] and k != "tensors_digest"}
    layers: dict[str, dict[str, str | float]] = {}
    for name in [*tensors, *(others.keys() - tensors.keys())]:
        layer, _, tensor = name.partition(f".{COPIES}.")
        if difference := _difference(tensors.get(name), others.get(name)):
            layers.setdefault(layer, {})[tensor] = difference
    return settings, layers


def _difference(one: Stored | None, other: Stored | None) -> str | float | None:
    if one is None or other is None:
        return "only in the second" if one is None else "only in the first"
    a, b = one.values.astype(np.float64), other.values.astype(np.float64)
    if a.shape != b.shape:
        return f"shapes {a.shape}, {b.shape}"
    return float(f"{np.abs(a - b).max():.4g}") if a.size else None
