"""What an adapter holds: its tensors by part, as plain data, and two adapters compared."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import AdapterFileError, AdapterTensorError
from ..norms import COPIES, SCALE_SUFFIX
from ..seed.digest import tensors_digest
from ..settings import SAFETENSORS_WEIGHTS_NAME, Settings, bare
from .compact import VERSION, bits_of, read_compact
from .folder import DTYPES
from .untrusted import opened

BLOCK = 2**20  # values that are looked at together
NEAR_ZERO = 0.01  # |gamma| below which a feature counts as disabled, as in the paper
_KINDS = {"gamma": ("weight", "alpha"), "beta": ("bias", "beta")}  # as norm layers name them: see `norms.find.affine`


class Stored(NamedTuple):
    """A tensor of a file. Its values are read when they are asked for: a file may hold more than fits into memory."""

    folder: Path
    start: int  # of its bytes in the file
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it

    @property
    def size(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return self.size * _TYPES[self.dtype].itemsize

    @property
    def values(self) -> NDArray[Any]:
        """All values; those in bfloat16 as float32."""
        blocks = [*self.blocks()]
        return (np.concatenate(blocks) if blocks else np.empty(0, np.float32)).reshape(self.shape)

    def blocks(self) -> Iterator[NDArray[Any]]:
        """Yield the values in order, at most `BLOCK` at a time."""
        with opened(self.folder, SAFETENSORS_WEIGHTS_NAME, None) as file:
            for data in self.read(file):
                yield _decoded(data, self.dtype)

    def read(self, file: BinaryIO) -> Iterator[memoryview]:
        """Yield the bytes in order, those of at most `BLOCK` values at a time."""
        kind, left = _TYPES[self.dtype], self.size
        file.seek(self.start)
        while left:
            count = min(left, BLOCK)
            data = file.read(count * kind.itemsize)
            if len(data) < count * kind.itemsize:
                what, do = f"A tensor in {self.folder} is cut off.", "download or save the adapter again"
                raise AdapterFileError(what, seen=f"{left:,} values from byte {self.start:,} on", do=do)
            yield memoryview(data)
            left -= count


_TYPES = {
    key: np.dtype(kind) for key, kind in dict(F32="<f4", F16="<f2", F64="<f8", I64="<i8", BF16="<u2", U8="u1").items()
}


def _decoded(data: memoryview, dtype: str) -> NDArray[Any]:
    values = np.frombuffer(data, _TYPES[dtype])
    # bfloat16 is the upper half of a float32
    return (values.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else values


def read_tensors(folder: Path, config: Settings | None = None) -> dict[str, Stored]:
    """Return an adapter's tensors by name in the network, each read once; the file was checked by `check_files`.

    Args:
        folder: of the adapter.
        config: that it was saved with, to check that both files are of one adapter.

    Raises:
        AdapterTensorError: a value is not finite, or the tensors are not those that the configuration was saved with.
    """
    digests, strange = {}, []
    with opened(folder, SAFETENSORS_WEIGHTS_NAME, None) as file:
        tensors = _header(folder, file)
        for name, tensor in tensors.items():
            digest, finite = hashlib.sha256(), True
            for data in tensor.read(file):
                digest.update(data)
                finite = finite and bool(np.isfinite(_decoded(data, tensor.dtype)).all())
            digests[name] = digest.hexdigest()
            if not finite:
                strange.append(name)
    if strange:
        what, do = "The adapter has values that are not finite.", "download it again, or train it again"
        raise AdapterTensorError(what, seen=f"{len(strange)} tensors, the first is {strange[0][:200]}", do=do)
    if config is not None and config.tensors_digest is not None:  # format 1 has none
        _check_digest(folder, tensors, digests, config.tensors_digest)
    return tensors


def _header(folder: Path, file: BinaryIO) -> dict[str, Stored]:
    """Return the tensors that a file's header names; `read_entries` has found that it is one."""
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        bare(name): Stored(folder, 8 + size + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"])
        for name, entry in header.items()
    }


def _check_digest(folder: Path, tensors: Mapping[str, Stored], digests: Mapping[str, str], digest: str) -> None:
    found = tensors_digest((name, DTYPES[t.dtype], t.shape, digests[name]) for name, t in tensors.items())
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


def describe_compact(file: Path) -> dict[str, Any]:
    """Return what a compact file holds as plain data; which tensors these are, its network alone tells."""
    config = read_compact(file, Settings)
    held = {"bits": bits_of(file), "compact_version": VERSION, "files": {file.name: file.stat().st_size}}
    return _described(config) | held


def describe(folder: Path, config: Settings, tensors: Mapping[str, Stored]) -> dict[str, Any]:
    """Return what an adapter holds as plain data: settings, tensors by part, a summary of gamma, file sizes."""
    named = parts(config, tensors)
    return {
        **_described(config),
        "format_version": config.format_version,
        "versions": config.versions,
        "contents": {
            part: {
                "tensors": len(names),
                "values": sum(tensors[name].size for name in names),
                "bytes": sum(tensors[name].bytes for name in names),
            }
            for part, names in named.items()
            if names
        },
        "gamma": _summary([tensors[name] for name in named["gamma"]]),
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()},
    }


def _described(config: Settings) -> dict[str, Any]:
    keys = ["architecture", "model_args", "seed", "init_scheme", "weight_init", "norm_init", "running_statistics"]
    keys += ["label_names", "data_config"]
    trains = [name for name in ("gamma", "beta", "head") if getattr(config, f"train_{name}")]
    return {
        **{key: getattr(config, key) for key in keys},
        "trains": trains + [config.control] * bool(config.control) + config.extra_trainable_modules,
        "base": config.base_model_name_or_path and f"{config.base_model_name_or_path}@{config.revision}",
        "fingerprint": config.backbone_fingerprint,
    }


def _summary(gammas: list[Stored]) -> dict[str, float]:
    """Return the extremes and mean of gamma, and the shares in % near zero and below."""
    if not (count := sum(gamma.size for gamma in gammas)):
        return {}
    found = np.array([_of_block(block.astype(np.float64)) for gamma in gammas for block in gamma.blocks()])
    total, near_zero, negative = found[:, 2:].sum(axis=0)
    return {
        "smallest": round(float(found[:, 0].min()), 6),
        "mean": round(float(total / count), 6),
        "largest": round(float(found[:, 1].max()), 6),
        f"|gamma| < {NEAR_ZERO}, %": round(100 * float(near_zero / count), 2),
        "negative, %": round(100 * float(negative / count), 2),
    }


def _of_block(values: NDArray[Any]) -> tuple[float, ...]:
    return values.min(), values.max(), values.sum(), (np.abs(values) < NEAR_ZERO).sum(), (values < 0).sum()


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
    if one.shape != other.shape:
        return f"shapes {one.shape}, {other.shape}"
    pairs = zip(one.blocks(), other.blocks(), strict=True)
    largest = max((np.abs(a.astype(np.float64) - b).max() for a, b in pairs), default=None)
    return None if largest is None else float(f"{largest:.4g}")
