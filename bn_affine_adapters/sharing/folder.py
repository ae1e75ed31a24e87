"""The files of an adapter folder: read within bounds, never unpickled, refused where they do not fit."""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from ..adapter.config import BN_ONLY, BNOnlyConfig
from ..adapter.control import controlled
from ..adapter.layer import drawn
from ..adapter.tensors import PEFT_PREFIX, bare, check_tensors
from ..errors import AdapterFileError, AdapterTensorError, ConfigError, TooLargeError
from ..norms.find import COPIES, named_layers

HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)  # owner/name, of a repository or a data set
COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_BYTES = 8_000_000  # of a configuration, and of the names and shapes at the head of a safetensors file
MAX_LISTS = 100_000  # in a configuration's text, brackets in label names included
MAX_TENSORS = 20_000  # in an adapter; cifar_resnet866, the deepest, has 4,335
_DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64, "I64": torch.int64,
}  # fmt: skip


def check_files(folder: Path) -> None:
    """Raise AdapterFileError or TooLargeError unless a folder holds a configuration and a safetensors file."""
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    here = sorted(path.name for path in folder.iterdir())[:10] if folder.is_dir() else None
    seen = "no such folder" if here is None else f"the folder holds {', '.join(here) or 'nothing'}"
    for file in (folder / CONFIG_NAME, weights):
        if file.is_file():
            _check_size(file)
            continue
        pickled = file == weights and (folder / WEIGHTS_NAME).exists()
        raise AdapterFileError(
            f"{folder} has no {file.name}" + (f"; {WEIGHTS_NAME} is a pickle and is never loaded." if pickled else "."),
            seen=seen,
            do='give a folder that model.save_pretrained(...) wrote, or "owner/name" on the Hub; a tag is revision=',
        )
    read_header(folder)


def _check_size(file: Path) -> None:
    size = file.stat().st_size
    if file.name == SAFETENSORS_WEIGHTS_NAME:
        with open(file, "rb") as opened:  # begins with the length of its header, 8 bytes, little-endian
            size = min(size, int.from_bytes(opened.read(8), "little"))
    if size > MAX_BYTES:
        raise _too_large(file, f"{size:,} bytes of names and settings; {MAX_BYTES:,} are allowed")


def _too_large(file: Path, seen: str) -> TooLargeError:
    do = "do not load it; a few kB were meant to be there"
    return TooLargeError(f"{file} is larger than any adapter needs.", seen=seen, do=do)


def read_header(folder: Path) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors by name in the network, on the meta device: shapes and types, no values.

    Raises:
        AdapterFileError: it is not a whole safetensors file.
        TooLargeError: it has more tensors than any adapter.
        AdapterTensorError: a tensor has a type or shape that no adapter has, or two have one name.
    """
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    found = {}
    try:
        with safe_open(weights, "pt") as file:
            names = list(file.keys())
            if len(names) > MAX_TENSORS:
                raise _too_large(weights, f"{len(names):,} tensors; {MAX_TENSORS:,} are allowed")
            for name in names:
                part = file.get_slice(name)
                found[bare(name)] = part.get_shape(), part.get_dtype()
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(
            f"{weights} is not a whole safetensors file.",
            seen=f"{weights.stat().st_size:,} bytes; {error}",
            do="download or save the adapter again",
        ) from error
    strange = [f"{name[:200]} is {dtype}" for name, (_, dtype) in found.items() if dtype not in _DTYPES]
    # A product beyond 64 bits can be there where another size is zero.
    huge = {name: shape for name, (shape, _) in found.items() if math.prod(size or 1 for size in shape) > 2**40}
    strange += [f"{name[:200]} has shape {shape[:9]}" for name, shape in huge.items()]
    if strange:
        raise AdapterTensorError(
            "The adapter holds tensors of a type or shape that no adapter has.",
            seen="; ".join(strange[:3]),
            do=f"save them as one of {', '.join(_DTYPES)}",
        )
    if len(found) < len(names):
        raise AdapterTensorError(
            f"The adapter holds tensors of one name, with {PEFT_PREFIX!r} and without.",
            seen=f"{len(names)} tensors, {len(found)} names",
            do="download or save the adapter again",
        )
    return {name: torch.empty(shape, dtype=_DTYPES[dtype], device="meta") for name, (shape, dtype) in found.items()}


def check_header(folder: Path, model: nn.Module, config: BNOnlyConfig) -> None:
    """Compare the names, shapes and types in an adapter's file with a network's, before any value is read.

    The layers of the configuration have been chosen: see `prepare.choose_layers`.

    Raises:
        MissingModuleError: the configuration names a module that the network does not have.
        AdapterTensorError: something is missing, extra, or not as expected.
    """
    classes = config.model_args.get("num_classes")
    expected, optional = {}, set()
    for name, module in named_layers(model, list(config.target_modules), "the adapter's").items():
        held = controlled(module, name, config) if name in (config.control_layers or ()) else module
        for key, tensor in held.state_dict().items():
            shape = tuple(tensor.shape)
            if name in (config.head_layers or ()) and classes and isinstance(module, nn.Linear | nn.Conv2d):
                shape = (classes, *shape[1:])  # each adapter's head has its own number of classes
            expected[f"{name}.{COPIES}.{key}"] = torch.empty(shape, dtype=tensor.dtype, device="meta")
        optional |= {f"{name}.{COPIES}.{key}" for key in drawn(held, name, config)}
    check_tensors(read_header(folder), expected, optional)


def read_config(folder: Path) -> BNOnlyConfig:
    """Read and check an adapter folder's configuration.

    Raises:
        AdapterFileError: it is not JSON, or belongs to another PEFT method.
        TooLargeError: it holds more lists than any configuration.
        UnknownKeyError, FormatVersionError, ConfigError: a key or value is not usable, or it names no network.
    """
    path = folder / CONFIG_NAME
    try:
        text = path.read_text(encoding="utf-8")
        lists = text.count("[") + text.count("{")  # each takes time out of all proportion
        content: Any = json.loads(text) if lists <= MAX_LISTS else None
    except (ValueError, OSError, RecursionError) as error:
        raise AdapterFileError(
            f"{path} is not a JSON file.", seen=str(error), do="download or save the adapter again"
        ) from error
    if lists > MAX_LISTS:
        raise _too_large(path, f"{lists:,} lists; {MAX_LISTS:,} are allowed")
    method = content.get("peft_type") if isinstance(content, dict) else None
    if method != BN_ONLY:
        raise AdapterFileError(
            f"{folder} holds no adapter of norm layers.",
            seen=f"peft_type={method!r}"[:200],
            do="load it with peft itself",
        )
    config = BNOnlyConfig(**BNOnlyConfig.check_kwargs(**content))
    if config.architecture is None or config.fresh:
        raise ConfigError(
            f"{folder} does not say which network it belongs to.",
            seen=f"architecture={config.architecture!r}, backbone_fingerprint={config.backbone_fingerprint!r}",
            do="save the adapter again with model.save_pretrained",
        )
    return config
