"""The files of a folder: written whole or not at all; read within bounds, never unpickled, checked."""

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from errno import EISDIR
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from safetensors import SafetensorError, safe_open

from ..errors import (
    AdapterFileError,
    AdapterTensorError,
    BNAdapterError,
    ConfigError,
    NoSpaceError,
    disk_is_full,
    file_error,
    reading,
    system_codes,
)
from ..norms import COPIES, SCALE_SUFFIX
from ..settings import (
    BN_ONLY,
    COMPACT_NAME,
    CONFIG_NAME,
    MAX_PARAMETERS,
    MAX_TENSORS,
    PEFT_PREFIX,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
    Settings,
    bare,
)
from .untrusted import MAX_BYTES, cleared, opened, present, too_large

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..adapter.method import BNOnlyConfig

COMMIT = re.compile(r"[0-9a-f]{40}")
SCRATCH = ".saving-"  # how the names of half-written files and folders begin
MAX_LISTS = 100_000  # opening brackets in a configuration's text, those in label names included
DTYPES = {  # torch's names
    "F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64", "I64": "int64", "U8": "uint8",
}  # fmt: skip
AnySettings = TypeVar("AnySettings", bound=Settings)


class Entry(NamedTuple):
    """A tensor's shape and type, as the header of a safetensors file says."""

    shape: list[int]
    dtype: str


@contextmanager
def writing(target: Path, full_disk_alone: bool = False) -> Iterator[None]:
    """Turn the system's errors while a file or folder is written, whichever library reports them, into FileError.

    Args:
        target: what was to be written.
        full_disk_alone: leave every other error as it is.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        ours = isinstance(error, BNAdapterError) or not system_codes(error)
        if ours or (full_disk_alone and not disk_is_full(error)):
            raise
        target = Path(*takewhile(lambda part: not part.startswith(SCRATCH), target.parts))
        raise file_error(error, target, "written") from error


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Give a scratch folder on the same disk, and move its files to ``target`` when the block ends without an error.

    If the target does not exist, the folder appears at once. If it does (it may be a mount), files are replaced one by
    one, .json files last: without them no adapter or network is loaded. When this returns, the files are on the disk.

    Raises:
        FileError: it cannot be written, or the disk is full; what was there before is untouched.
    """
    with writing(target):
        outer = target if target.exists() else target.parent
        outer.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=outer) as scratch:
            files = Path(scratch, "files")
            files.mkdir()  # only the owner may open the scratch folder itself
            yield files
            written = [path for path in files.rglob("*") if path.is_file()]
            folders = [path for path in files.rglob("*") if path.is_dir()]
            for path in written:  # safetensors lets only the owner read its files, whatever the umask says
                path.chmod(files.stat().st_mode & 0o666)
            sync(*written, *folders, files)
            if outer != target:
                os.replace(files, target)
                sync(outer)
                return
            places = [target / path.relative_to(files) for path in written]
            for file, place in sorted(zip(written, places, strict=True), key=lambda pair: pair[0].suffix == ".json"):
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, place)
            sync(*{place.parent for place in places}, target)


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; when this returns, it is on the disk. A device, or a pipe, is written into.

    Raises:
        FileError: it cannot be written, or the disk is full; a file that was there before is untouched.
    """
    scratch = path.with_name(f"{SCRATCH}{os.getpid()}-{path.name}")  # of this process: no other one writes to it
    with writing(path):
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        scratch.unlink(missing_ok=True)
        try:
            with scratch.open("xb") as file:  # never through a link
                file.write(content)
            sync(scratch)
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
        sync(path.parent)


def try_writing(path: Path, replaced: bool) -> None:
    """Do now to a file what may fail after hours: make its folder, write there, replace or open the file.

    Args:
        path: the file, which stays as it is.
        replaced: it will be replaced; otherwise appended to.

    Raises:
        FileError: it cannot be written.
    """
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(EISDIR, "it is a folder", str(path))
        if path.exists() and not path.is_file():
            return  # a device or a pipe
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as file:
            file.write(b"\n")
        if path.exists() and replaced:
            write_file(path, path.read_bytes())
        elif path.exists():
            path.open("ab").close()


def check_space(folder: Path, needed: int) -> None:
    """Raise NoSpaceError if the file system of a folder has no room for so many bytes."""
    found = shutil.disk_usage(folder)
    if found.free < needed and found.total:  # some network file systems do not tell
        seen = f"{found.free:,} bytes free; {needed:,} are needed"
        raise NoSpaceError(f"There is no space left to write {folder}.", seen=seen, do="free some space and try again")


def replace_file(folder: Path, name: str, content: bytes) -> None:
    """Write a file into a folder that a stranger may have made; a link of that name is replaced, never followed.

    Raises:
        AdapterFileError: a folder on the way is a link, or a folder has the file's name.
        NoSpaceError: the disk is full; a file that was there before is untouched.
    """
    path = cleared(folder, name)
    path.parent.mkdir(exist_ok=True)
    write_file(path, content)


def sync(*paths: Path) -> None:
    """Have files, or the names in folders, on the disk: a rename is durable after that alone."""
    for path in paths:
        if path.is_dir() and os.name == "nt":
            continue  # Windows opens no folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_litter(folder: Path) -> None:
    """Remove what a killed process left half written in a folder; no other process may be writing there."""
    for path in [*folder.glob(f"{SCRATCH}*"), *folder.glob("*.part")]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def missing_file(where: object, name: str, pickled: bool, seen: str, do: str) -> AdapterFileError:
    """Return the error for a folder or repository that lacks a file, and says so if it has a pickle instead."""
    end = f"; {WEIGHTS_NAME} is a pickle and is never loaded." if pickled else "."
    return AdapterFileError(f"{where} has no {name}{end}", seen=seen, do=do)


def max_bytes(max_parameters: int | None) -> int | None:
    """Return the most bytes of an adapter's tensors file: as many values as the network has, in float32."""
    return None if max_parameters is None else MAX_BYTES + 4 * max_parameters


def check_files(folder: Path, max_parameters: int | None = MAX_PARAMETERS) -> None:
    """Check that a folder holds a configuration and a safetensors file, each regular and of bounded size.

    Args:
        folder: of the adapter.
        max_parameters: of the largest network; None where the network, against which the tensors are checked, is given.

    Raises:
        AdapterFileError: a file is missing, leads out of the folder, or is no safetensors file.
        TooLargeError: a file is larger than an adapter of such a network.
        FileError: the folder or a file cannot be read.
    """
    with reading(folder):
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            _check_present(folder, name)
        opened(folder, CONFIG_NAME).close()
        check_size(folder, SAFETENSORS_WEIGHTS_NAME, max_parameters)
    read_entries(folder)


def _check_present(folder: Path, name: str) -> None:
    if present(folder, name):
        return
    names = sorted(path.name for path in folder.iterdir())[:10] if folder.is_dir() else None
    seen = "no such folder" if names is None else f"the folder holds {', '.join(names) or 'nothing'}"
    do = 'give a folder that model.save_pretrained(...) wrote, or "owner/name" on the Hub; a tag is revision='
    if folder.is_file() or present(folder, COMPACT_NAME):
        seen, do = "a compact adapter", "load_bn_only_model(it).save_pretrained(folder), and use that folder"
    pickled = name == SAFETENSORS_WEIGHTS_NAME and present(folder, WEIGHTS_NAME)
    raise missing_file(folder, name, pickled, seen, do)


def check_size(folder: Path, name: str, max_parameters: int | None) -> None:
    """Check that a safetensors file is regular, inside its folder, and of bounded size, and its header too.

    Raises:
        AdapterFileError: it leads out of the folder, or is no regular file.
        TooLargeError: it is larger than an adapter of such a network, or has more names than any adapter.
    """
    with opened(folder, name, max_bytes(max_parameters)) as file:
        # The first 8 bytes are the length of the header, little-endian.
        size = min(int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size)
    if size > MAX_BYTES:
        raise too_large(folder / name, f"{size:,} bytes of names and shapes; {MAX_BYTES:,} are allowed")


def read_entries(folder: Path) -> dict[str, Entry]:
    """Return the shapes and types of an adapter's tensors, by name in the network.

    Raises:
        AdapterFileError: it is not a whole safetensors file.
        TooLargeError: it has more tensors than any adapter.
        AdapterTensorError: a tensor has a type or shape that no adapter has, or two tensors have the same name.
    """
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    entries: dict[str, Entry] = {}
    try:
        with safe_open(weights, "np") as file:
            names = list(file.keys())
            if len(names) > MAX_TENSORS:
                raise too_large(weights, f"{len(names):,} tensors; {MAX_TENSORS:,} are allowed")
            for name in names:
                part = file.get_slice(name)
                entries[bare(name)] = Entry(part.get_shape(), part.get_dtype())
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(
            f"{weights} is not a whole safetensors file.",
            seen=f"{weights.stat().st_size:,} bytes; {error}",
            do="download or save the adapter again",
        ) from error
    _check_entries(entries)
    if len(entries) < len(names):
        raise AdapterTensorError(
            f"The adapter holds a tensor twice, with {PEFT_PREFIX!r} before its name and without.",
            seen=f"{len(names)} tensors, {len(entries)} names",
            do="download or save the adapter again",
        )
    return entries


def read_header(folder: Path) -> "dict[str, torch.Tensor]":
    """Return an adapter's tensors by name in the network, on the meta device: no values. Raises: as `read_entries`."""
    import torch

    return {
        name: torch.empty(entry.shape, dtype=getattr(torch, DTYPES[entry.dtype]), device="meta")
        for name, entry in read_entries(folder).items()
    }


def _check_entries(entries: Mapping[str, Entry]) -> None:
    strange = [f"{name[:200]} is {dtype}" for name, (_, dtype) in entries.items() if dtype not in DTYPES]
    # Sizes whose product overflows 64 bits are possible in a file if another size is zero.
    huge = {name: shape for name, (shape, _) in entries.items() if math.prod(size or 1 for size in shape) > 2**40}
    strange += [f"{name[:200]} has shape {shape[:9]}" for name, shape in huge.items()]
    if strange:
        raise AdapterTensorError(
            "The adapter holds tensors of a type or shape that no adapter has.",
            seen="; ".join(strange[:3]),
            do=f"save them as one of {', '.join(DTYPES)}",
        )


def check_header(folder: Path, model: "nn.Module", config: "BNOnlyConfig") -> None:
    """Compare the names, shapes and types in an adapter's file with a network's, before any value is read.

    `checks.choose_layers` has to be called first.

    Raises:
        MissingModuleError: the configuration names a module that the network does not have.
        AdapterTensorError: something is missing, extra, or not as expected.
    """
    import torch
    from torch import nn

    from ..adapter.control import Control, controlled
    from ..adapter.layer import drawn
    from ..adapter.tensors import check_tensors
    from ..norms.find import named_layers, plain_tensors

    classes = config.model_args.get("num_classes")
    expected, optional = {}, set()
    tensors = {name: tensor for name, _, _, tensor in plain_tensors(model)}
    scales = {name + SCALE_SUFFIX: tensors[name] for name in config.trained_scales}
    for name, tensor in scales.items():
        expected[f"{name}.{COPIES}.weight"] = torch.empty_like(tensor, device="meta")
    modules = [name for name in config.target_modules if name not in scales]
    for name, module in named_layers(model, modules, "the adapter's").items():
        copy = controlled(module, name, config) if name in (config.control_layers or ()) else module
        own = copy.state_dict()
        for key, tensor in (copy.stored(own) if isinstance(copy, Control) else own).items():
            shape = tuple(tensor.shape)
            if name in (config.head_layers or ()) and classes and isinstance(module, nn.Linear | nn.Conv2d):
                shape = (classes, *shape[1:])  # each adapter's head has its own number of classes
            expected[f"{name}.{COPIES}.{key}"] = torch.empty(shape, dtype=tensor.dtype, device="meta")
        optional |= {f"{name}.{COPIES}.{key}" for key in drawn(copy, name, config)}
    check_tensors(read_header(folder), expected, optional)


def read_config(folder: Path) -> "BNOnlyConfig":
    """Read and check an adapter folder's configuration. Raises: as `read_settings`."""
    from ..adapter.method import BNOnlyConfig

    return read_folder(folder, BNOnlyConfig)


def read_settings(folder: Path) -> Settings:
    """Read and check an adapter folder's configuration, without PEFT.

    Raises:
        AdapterFileError: it is not JSON, or belongs to another PEFT method.
        TooLargeError: it holds more lists than any configuration.
        UnknownKeyError, FormatVersionError, ConfigError: a key or value is not usable, or it names no network.
    """
    return read_folder(folder, Settings)


def parsed(path: Path, text: str) -> Any:
    """Return what a stranger's JSON says.

    Raises:
        AdapterFileError: it is not JSON.
        TooLargeError: it holds more lists than any configuration.
    """
    lists = text.count("[") + text.count("{")  # parsing these takes much more time than other text
    if lists > MAX_LISTS:
        raise too_large(path, f"{lists:,} lists; {MAX_LISTS:,} are allowed")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _no_json(path, error) from error


def _no_json(path: Path, error: Exception) -> AdapterFileError:
    return AdapterFileError(f"{path} is not a JSON file.", seen=str(error), do="download or save the adapter again")


def read_folder(folder: Path, kind: type[AnySettings]) -> AnySettings:
    """Read and check an adapter folder's configuration, as this class. Raises: as `read_settings`."""
    path = folder / CONFIG_NAME
    with opened(folder, CONFIG_NAME) as file:
        data = file.read(MAX_BYTES)
    try:
        text = data.decode()
    except ValueError as error:
        raise _no_json(path, error) from error
    content = parsed(path, text)
    method = content.get("peft_type") if isinstance(content, dict) else None
    if method != BN_ONLY:
        raise AdapterFileError(
            f"{folder} holds no adapter of norm layers.",
            seen=f"peft_type={method!r}"[:200],
            do="load it with peft itself",
        )
    config = kind(**kind.check_kwargs(**content))
    check_network_named(config, folder)
    if config.format_version >= 2 and None in (config.traits_fingerprint, config.traits_digests, config.tensors_digest):
        raise ConfigError(
            f"{folder} lacks a digest that every adapter of its format has.",
            seen=f"format_version={config.format_version}, tensors_digest={config.tensors_digest!r}",
            do="save the adapter again with model.save_pretrained",
        )
    return config


def check_network_named(config: Settings, where: Path) -> None:
    """Raise ConfigError unless a configuration says which network it belongs to."""
    if config.architecture is None or config.fresh:
        raise ConfigError(
            f"{where} does not say which network it belongs to.",
            seen=f"architecture={config.architecture!r}, backbone_fingerprint={config.backbone_fingerprint!r}",
            do="save the adapter again with model.save_pretrained",
        )
