"""Compact files: an adapter in one small file, read within bounds; the values of each tensor are on a grid.

docs/adapter-format.md describes the format to the byte.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ..errors import AdapterFileError, AdapterTensorError, ConfigError, FormatVersionError, check_keys, reading
from ..settings import COMPACT_NAME, CONFIG_NAME, CUSTOM, MAX_PARAMETERS, Settings
from .folder import AnySettings, check_files, check_network_named, check_size, parsed, read_folder
from .untrusted import present

VERSION = 1
BITS = (4, 6, 8, 16)
METADATA, TENSOR = "bn_only_compact", "values"  # the key in the file's metadata; the tensor's name
DIGEST = 16  # bytes of each of these, which the tensor begins with
DIGESTS = ("backbone_fingerprint", "frozen_fingerprint", "layout_hash", "values_digest")
# The settings that are stored where they are not the default
KEYS = (
    "architecture", "model_args", "seed", "init_scheme", "weight_init", "norm_init", "train_gamma", "train_beta",
    "train_head", "layer_scale", "layer_scales", "control", "control_layers", "extra_trainable_modules",
    "norm_layers", "head_layers", "running_statistics", "data_config", "label_names", "base_model_name_or_path",
    "revision", "traits_fingerprint", "versions",
)  # fmt: skip
OF_CUSTOM = ("traits_fingerprint", "versions")  # stored for a network of one's own code alone
IMAGES: dict[str, Any] = {  # what a key of data_config is if it is not stored; null stands for no such key
    "crop_mode": "center", "crop_pct": 0.875, "input_size": [3, 224, 224], "interpolation": "bicubic",
    "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
}  # fmt: skip


class Rounded(NamedTuple):
    """A tensor's codes, and the grid that they count on: binary16 step, and offset where there are few bits."""

    codes: NDArray[np.uint16]
    grid: NDArray[np.float16]

    def values(self, bits: int) -> NDArray[np.float32]:
        """Return offset + (code - 2^(bits - 1)) * step in float32: the product is rounded, then the sum."""
        step, *offset = self.grid.astype(np.float32)
        products = (self.codes.astype(np.float32) - np.float32(2 ** (bits - 1))) * step
        return products + offset[0] if offset else products


def grid_size(bits: int) -> int:
    """Return how many numbers the grid of a tensor has: a step, and below 8 bits an offset."""
    return 2 if bits < 8 else 1


def payload_bytes(sizes: Sequence[int], bits: int) -> int:
    """Return the bytes of the grids and codes of tensors with so many values each."""
    return 2 * grid_size(bits) * len(sizes) + -(-sum(sizes) * bits // 8)


def encode(
    settings: Mapping[str, Any], digests: Mapping[str, str | None], found: Sequence[Rounded], bits: int
) -> bytes:
    """Return a compact file. Args: the settings to be stored, `DIGESTS` but the last in hex, and the tensors."""
    whole = {**digests, "values_digest": values_digest([tensor.values(bits) for tensor in found])}
    head = b"".join(bytes.fromhex((whole[key] or "0" * 2 * DIGEST)[: 2 * DIGEST]) for key in DIGESTS)
    codes = np.concatenate([np.zeros(0, np.uint16), *(tensor.codes for tensor in found)]).astype("<u2")
    ones = np.unpackbits(codes.view(np.uint8).reshape(-1, 2), axis=1, count=bits, bitorder="little")
    grids = b"".join(tensor.grid.astype("<f2").tobytes() for tensor in found)
    return as_file(settings, head + grids + np.packbits(ones, bitorder="little").tobytes(), bits)


def as_file(settings: Mapping[str, Any], content: bytes, bits: int) -> bytes:
    """Return the file of a tensor's bytes."""
    from safetensors.numpy import save

    text = json.dumps({"version": VERSION, "bits": bits, **settings}, separators=(",", ":"), allow_nan=False)
    return save({TENSOR: np.frombuffer(content, np.uint8)}, {METADATA: text})


def stored_settings(config: Settings, default: Settings) -> dict[str, Any]:
    """Return the settings that a compact file holds: those that are not as in ``default``."""
    whole, least = config.to_dict(), default.to_dict()
    kept = [key for key in KEYS if key not in OF_CUSTOM or config.architecture == CUSTOM]
    stored = {key: whole[key] for key in kept if whole[key] != least[key]}
    if config.data_config is not None:
        missing = {key: None for key in IMAGES if key not in config.data_config}
        own = {key: value for key, value in config.data_config.items() if IMAGES.get(key) != value}
        stored["data_config"] = own | missing
    return stored


def values_digest(values: Sequence[NDArray[np.float32]]) -> str:
    """Return the sha256 over all values in order, little-endian float32."""
    return hashlib.sha256(b"".join(part.astype("<f4").tobytes() for part in values)).hexdigest()


def compact_file(folder: Path) -> Path | None:
    """Return the compact file that a path is, or that lies in a folder without adapter_config.json; or None."""
    with reading(folder):
        if folder.is_file():
            return Path(os.path.realpath(folder))  # a link that the caller names is the caller's own
        return folder / COMPACT_NAME if present(folder, COMPACT_NAME) and not present(folder, CONFIG_NAME) else None


def read_adapter(folder: Path, kind: type[AnySettings], max_parameters: int | None = MAX_PARAMETERS) -> AnySettings:
    """Read and check the settings of an adapter, a folder or a compact file. Raises: as the functions for each."""
    if (file := compact_file(folder)) is not None:
        return read_compact(file, kind, max_parameters)
    check_files(folder, max_parameters)
    return read_folder(folder, kind)


def read_compact(file: Path, kind: type[AnySettings], max_parameters: int | None = MAX_PARAMETERS) -> AnySettings:
    """Read and check the settings of a compact file; its values are not read.

    Raises:
        AdapterFileError: it is not a whole compact file.
        TooLargeError: its header is larger than any adapter's.
        UnknownKeyError, FormatVersionError, ConfigError: a key or value is not usable, or it names no network.
    """
    with reading(file):
        check_size(file.parent, file.name, max_parameters)
    content, _, head, _ = _header(file)
    check_keys(content, KEYS, file.name)
    content.setdefault("layer_scale", "constructor" if content.get("seed") is None else "one")
    if isinstance(content.get("data_config"), dict):
        merged = IMAGES | content["data_config"]
        content["data_config"] = {key: value for key, value in merged.items() if value is not None}
    for key, at in zip(DIGESTS[:-1], range(0, len(head), DIGEST), strict=False):
        content[key] = head[at : at + DIGEST].hex() if any(head[at : at + DIGEST]) else None
    config = kind(**kind.check_kwargs(**content))
    config.compact = True
    check_network_named(config, file)
    if config.architecture == CUSTOM and config.traits_fingerprint is None:
        what, do = f"{file} lacks a digest that a network of one's own code needs.", "export the adapter again"
        raise ConfigError(what, seen="traits_fingerprint=None", do=do)
    return config


def read_values(file: Path, sizes: Sequence[int]) -> list[NDArray[np.float32]]:
    """Return the tensors of a compact file, flat, in its order; read only if their number of values is as expected.

    Raises:
        AdapterTensorError: it has another number of values, they are not finite, or the digest is of others.
    """
    _, bits, head, size = _header(file)
    expected = len(head) + payload_bytes(sizes, bits)
    if size != expected:
        seen = f"{size:,} bytes; {len(sizes):,} tensors with {sum(sizes):,} values of {bits} bits take {expected:,}"
        raise _unfit("has another number of values than the network needs", file, seen)
    with safe_open(file, "np") as opened:
        data = opened.get_tensor(TENSOR)[len(head) :]
    split = 2 * grid_size(bits) * len(sizes)
    grids = data[:split].view("<f2").reshape(len(sizes), -1)
    ones = np.unpackbits(data[split:], bitorder="little", count=sum(sizes) * bits).reshape(-1, bits)
    codes = np.zeros((len(ones), 2), np.uint8)
    codes[:, : -(-bits // 8)] = np.packbits(ones, axis=1, bitorder="little")
    parts = np.split(codes.view("<u2").reshape(-1), np.cumsum(sizes)[:-1]) if sizes else []
    values = [Rounded(part, grid).values(bits) for part, grid in zip(parts, grids, strict=True)]
    if strange := sum(not np.isfinite(part).all() for part in values):
        raise _unfit("has values that are not finite", file, f"{strange} of {len(values)} tensors")
    if (found := bytes.fromhex(values_digest(values))[:DIGEST]) != (stored := head[-DIGEST:]):
        raise _unfit("has other values than it was exported with", file, f"sha256 {found.hex()}, then {stored.hex()}")
    return values


def _unfit(what: str, file: Path, seen: str) -> AdapterTensorError:
    return AdapterTensorError(f"The compact adapter {file} {what}.", seen=seen, do="download or export it again")


def _header(file: Path) -> tuple[dict[str, Any], int, bytes, int]:
    """Return (settings, bits, digests, size of the tensor) of a compact file."""
    try:
        with safe_open(file, "np") as opened:
            names, text = list(opened.keys())[:2], (opened.metadata() or {}).get(METADATA)
            part = opened.get_slice(names[0]) if names == [TENSOR] else None
            shape, dtype = (part.get_shape(), part.get_dtype()) if part else ([], "")
            size = (
                min(DIGEST * len(DIGESTS), *shape) if len(shape) == 1 else 0
            )  # beyond the end, safetensors 0.5 panics
            head = part[:size].tobytes() if part and size and dtype == "U8" else b""
    except (SafetensorError, OSError) as error:
        raise _strange(file, f"{file.stat().st_size:,} bytes; {error}") from error
    if text is None or len(head) < DIGEST * len(DIGESTS):
        raise _strange(file, f"metadata: {text is not None}, tensors {names}, of type {dtype!r}, shape {shape}"[:300])
    content = parsed(file, text)
    if not isinstance(content, dict):
        raise _strange(file, f"settings of type {type(content).__name__}")
    version, bits = content.pop("version", None), content.pop("bits", None)
    if type(version) is not int or version < 1:
        raise ConfigError(f"{file} has no version of its format.", seen=f"version={version!r}"[:200], do="export again")
    if version > VERSION:
        do, seen = "pip install -U bn-affine-adapters", f"version {version}; this version reads up to {VERSION}"
        raise FormatVersionError(f"{file} was written in a newer format.", seen=seen, do=do)
    check_bits(bits)
    return content, bits, head, shape[0]


def _strange(file: Path, seen: str) -> AdapterFileError:
    do = "give a folder of model.save_pretrained(...), or a file of export(model, file, format='compact')"
    return AdapterFileError(f"{file} is not a whole compact adapter.", seen=seen, do=do)


def bits_of(file: Path) -> int:
    """Return the bits of a value in a compact file. Raises: as `read_compact`."""
    return _header(file)[1]


def check_bits(bits: Any) -> None:
    """Raise ConfigError unless a compact file can have so many bits a value."""
    if type(bits) is not int or bits not in BITS:
        do = f"choose from {', '.join(map(str, BITS))}"
        raise ConfigError("A compact adapter has no such number of bits.", seen=f"bits={bits!r}"[:200], do=do)
