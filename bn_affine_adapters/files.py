"""The files of an adapter folder: read within bounds, never unpickled, refused where they do not fit."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from .config import BN_ONLY, BNOnlyConfig
from .errors import AdapterFileError, AdapterTensorError, ConfigError, TooLargeError
from .norms import COPIES, named_layers

HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)  # owner/name, of a repository or a data set
MAX_BYTES = 8_000_000  # of a configuration, and of the names and shapes at the head of a safetensors file
_PREFIX = "base_model.model."
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
            do="give a folder that model.save_pretrained(...) wrote",
        )
    read_header(folder)


def _check_size(file: Path) -> None:
    size = file.stat().st_size
    if file.name == SAFETENSORS_WEIGHTS_NAME:
        with open(file, "rb") as opened:  # begins with the length of its header, 8 bytes, little-endian
            size = min(size, int.from_bytes(opened.read(8), "little"))
    if size > MAX_BYTES:
        raise TooLargeError(
            f"{file} is larger than any adapter needs.",
            seen=f"{size:,} bytes of names and settings; {MAX_BYTES:,} are allowed",
            do="do not load it; a few kB were meant to be there",
        )


def read_header(folder: Path) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors by name in the network, on the meta device: shapes and types, no values.

    Raises:
        AdapterFileError: it is not a whole safetensors file.
        AdapterTensorError: a tensor has a type that no adapter has.
    """
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    found = {}
    try:
        with safe_open(weights, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                part = file.get_slice(name)
                found[bare(name)] = part.get_shape(), part.get_dtype()
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(
            f"{weights} is not a whole safetensors file.",
            seen=f"{weights.stat().st_size:,} bytes; {error}",
            do="download or save the adapter again",
        ) from error
    strange = [f"{name[:200]} is {dtype}" for name, (_, dtype) in found.items() if dtype not in _DTYPES]
    if strange:
        raise AdapterTensorError(
            "The adapter holds tensors of a type that no adapter has.",
            seen="; ".join(strange[:3]),
            do=f"save them as one of {', '.join(_DTYPES)}",
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
    expected = {}
    for name, module in named_layers(model, list(config.target_modules), "the adapter's").items():
        for key, tensor in module.state_dict().items():
            shape = tuple(tensor.shape)
            if name in (config.head_layers or ()) and classes and isinstance(module, nn.Linear | nn.Conv2d):
                shape = (classes, *shape[1:])  # each adapter's head has its own number of classes
            expected[f"{name}.{COPIES}.{key}"] = torch.empty(shape, dtype=tensor.dtype, device="meta")
    check_tensors(read_header(folder), expected)


def bare(key: str) -> str:
    """Return a tensor's name in the network, without PEFT's prefix."""
    return key.removeprefix(_PREFIX)


def check_tensors(given: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Compare names, shapes, kinds and finiteness of an adapter's tensors with what the network expects.

    Raises:
        AdapterTensorError: something is missing, extra, or not as expected.
    """
    problems = [f"missing {name}" for name in expected if name not in given]
    problems += [f"extra {name[:200]}" for name in given if name not in expected]
    for name in expected.keys() & given.keys():
        ours, theirs = expected[name], given[name]
        if ours.shape != theirs.shape:
            problems.append(f"{name} has shape {tuple(theirs.shape)}, the network needs {tuple(ours.shape)}")
        elif ours.is_floating_point() != theirs.is_floating_point():
            problems.append(f"{name} has dtype {theirs.dtype}, the network needs {ours.dtype}")
        elif theirs.is_floating_point() and not theirs.is_meta and not bool(theirs.isfinite().all()):
            problems.append(f"{name} has values that are not finite")
    if problems:
        raise AdapterTensorError(
            "The adapter's tensors do not fit the network.",
            seen=f"{len(problems)} problems; {'; '.join(sorted(problems)[:3])}",
            do="load it on the architecture it was made for, or download it again",
        )


def read_config(folder: Path) -> BNOnlyConfig:
    """Read and check an adapter folder's configuration.

    Raises:
        AdapterFileError: it is not JSON, or belongs to another PEFT method.
        UnknownKeyError, FormatVersionError, ConfigError: a key or value is not usable, or it names no network.
    """
    path = folder / CONFIG_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise AdapterFileError(
            f"{path} is not a JSON file.", seen=str(error), do="download or save the adapter again"
        ) from error
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
