"""The errors of this package: what happened, what was seen, what to do.

BNAdapterError
├── ConfigError               (ValueError)         a value of a configuration is not usable
│   ├── UnknownKeyError       (TypeError)          a configuration key that does not exist
│   └── FormatVersionError                         an adapter of a newer format
├── NetworkError              (ValueError)         the network cannot be adapted, analysed or stacked
│   ├── NoNormLayerError                           it has no norm layer with gamma or beta
│   ├── UnknownArchitectureError                   no zoo of networks has its name
│   ├── MissingModuleError                         it has no head, or no module of that name
│   ├── RebuildError                               its creation arguments cannot be inferred
│   └── ReinitError                                no rule redraws a tensor from the seed
├── AdapterError              (ValueError)         an adapter cannot be used
│   ├── AdapterNameError                           the adapter's name would clash
│   ├── AdapterFileError      (OSError)            a file is missing, truncated or not safetensors
│   ├── AdapterTensorError                         tensors are missing, extra, or of another shape or type
│   ├── TooLargeError                              a file or network is larger than the limit
│   ├── FingerprintError                           the frozen network is not the one it was trained on
│   └── BaseRequiredError                          it was trained on given weights: pass model=
├── HubError                  (OSError)            a request to the Hub failed
│   ├── HubAccessError        (PermissionError)    no token, or no permission: 401, 403
│   ├── HubNotFoundError      (FileNotFoundError)  no such repository, revision or file: 404
│   ├── HubConflictError                           changed by somebody else, or exists: 409, 412
│   └── HubUnavailableError   (ConnectionError)    busy, failing or unreachable: 429, 5xx, offline
├── DataError                 (ValueError)         a data set cannot be used
├── DivergedError             (ArithmeticError)    a loss or a trained value is not finite
│   └── CollapseError                              adapting to images, the predictions fell into one class
├── CheckpointError           (OSError)            a checkpoint is truncated, or no checkpoint
├── LostProcessError          (RuntimeError)       another process of a training run does not answer
├── OutputFolderError         (FileExistsError)    the output folder is not empty, or in use
└── FileError                 (OSError)            a file or folder cannot be read or written
    ├── FileAccessError       (PermissionError)    its permissions or its file system do not allow it
    └── NoSpaceError                               the disk is full
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from errno import EACCES, EDQUOT, ENOSPC, EPERM, EROFS
from functools import partial
from pathlib import Path
from shutil import disk_usage
from typing import Any


class BNAdapterError(Exception):
    """Base of every error here; ``what``, ``seen`` and ``do`` are its three parts."""

    def __init__(self, what: str, *, seen: str, do: str) -> None:
        """Make the three parts printable, keep them, and join them to the message."""
        what, seen, do = printable(what), printable(seen), printable(do)
        super().__init__(f"{what}\n  seen:  {seen}\n  do:    {do}")
        self.what, self.seen, self.do = what, seen, do

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the three parts, so that an error survives the way to another process."""
        return partial(type(self), seen=self.seen, do=self.do), (self.what,), self.__dict__


def printable(text: str, limit: int = 2000) -> str:
    """Return a text, which may come from a stranger's file, with control characters escaped, cut to ``limit``.

    Lines that begin with "seen:" or "do:" are indented, so that they cannot be taken for a part of the error.
    """
    text = re.sub(r"\n\s*(?=(?:seen|do):)", "\n         ", text)
    shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text[: limit + 1])
    return shown if len(text) <= limit else f"{shown[:limit]} ..."


class ConfigError(BNAdapterError, ValueError):
    """A value of a configuration is not usable."""


class UnknownKeyError(ConfigError, TypeError):
    """A configuration key does not exist; the message names the nearest one that does."""


class FormatVersionError(ConfigError):
    """The adapter was written in a newer format than this version reads."""


class NetworkError(BNAdapterError, ValueError):
    """The network given or named cannot be adapted, analysed or stacked."""


class NoNormLayerError(NetworkError):
    """The network has no norm layer with gamma or beta."""


class UnknownArchitectureError(NetworkError):
    """The name of the architecture is not registered in timm, or none of the other zoos that may be named."""


class MissingModuleError(NetworkError):
    """The network has no head, or no module of the name given."""


class RebuildError(NetworkError):
    """Rebuilding the architecture from its name and arguments gives another network."""


class ReinitError(NetworkError):
    """A tensor has no rule that redraws it from the seed."""


class AdapterError(BNAdapterError, ValueError):
    """An adapter cannot be used."""


class AdapterNameError(AdapterError):
    """The name of an adapter would clash with a name in the network."""


class AdapterFileError(AdapterError, OSError):
    """A file of the adapter is missing, truncated or not in safetensors format."""


class AdapterTensorError(AdapterError):
    """The adapter's tensors do not fit the network: missing, extra, other shape, type, or not finite."""


class TooLargeError(AdapterError):
    """A file, or the network that a configuration asks for, is larger than the limit."""


class FingerprintError(AdapterError):
    """The frozen network is not the one that the adapter was trained on."""


class BaseRequiredError(AdapterError):
    """The adapter was trained on given weights, which have to be passed as ``model=``."""


class HubError(BNAdapterError, OSError):
    """A request to the Hub failed; ``status`` is the HTTP status, or None if there was no answer."""

    status: int | None = None


class HubAccessError(HubError, PermissionError):
    """There is no token, or it lacks the permission that is needed."""


class HubNotFoundError(HubError, FileNotFoundError):
    """The Hub has no such repository, revision or file, or this token may not see it."""


class HubConflictError(HubError):
    """The branch was changed by somebody else, or the repository, branch or tag exists already."""


class HubUnavailableError(HubError, ConnectionError):
    """The Hub is busy, failing or unreachable, or this process is offline and the file is not in the cache."""


class DataError(BNAdapterError, ValueError):
    """A data set cannot be used: columns, classes or images are not as expected."""


DIVERGED = 3  # the exit status of a command whose training diverged


class DivergedError(BNAdapterError, ArithmeticError):
    """A loss or a trained value is not finite; ``step``, ``layer`` and ``checkpoint`` say where, and what is left."""

    step: int | None = None
    layer: str | None = None
    checkpoint: str | None = None


class CollapseError(DivergedError):
    """Adapting to images without labels, the predictions fell into one class."""


class CheckpointError(BNAdapterError, OSError):
    """A file is not a whole checkpoint of a training run."""


class LostProcessError(BNAdapterError, RuntimeError):
    """Another process of a training run has ended, or has not answered in time."""


class OutputFolderError(BNAdapterError, FileExistsError):
    """The output folder exists and is not empty, or another run writes to it."""


class FileError(BNAdapterError, OSError):
    """A file or folder cannot be read or written; ``errno`` says why, as the system does."""

    errno: int | None = None


class FileAccessError(FileError, PermissionError):
    """The permissions of a file or folder, or a read-only file system, do not allow to read or write it."""


class NoSpaceError(FileError):
    """There is no space left on the device; what was there before is untouched."""

    errno = ENOSPC


def check_choice(key: str, value: Any, choices: Collection[str | int | None]) -> None:
    """Raise ConfigError unless ``value`` is one of ``choices``, which are words, whole numbers or None."""
    # By type first: an array has no truth value, and a list cannot be looked up in a dictionary.
    if not isinstance(value, str | int | None) or value not in choices:
        raise ConfigError(
            f"{key} has no such value.", seen=f"{key}={value!r}"[:200], do=f"choose from {', '.join(map(str, choices))}"
        )


def check_keys(given: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raise UnknownKeyError for the first key that is not known, naming the nearest one that is."""
    for key in given:
        if key not in known:
            shown = str(key)[:80]
            near = get_close_matches(shown, known, n=1, cutoff=0.5)
            raise UnknownKeyError(
                f"{where} has no key {shown!r}.",
                seen=f"{shown!r}" + (f"; the nearest key is {near[0]!r}" if near else ""),
                do=f"use {near[0]!r}" if near else f"choose from {', '.join(sorted(known))}",
            )


def nearest_name(name: str, known: Collection[str]) -> str:
    """Return "; the nearest name is ...", for the middle part of an error about a name, or "" if none is near."""
    near = get_close_matches(name, known, n=1)
    return f"; the nearest name is {near[0]!r}" if near else ""


def check_adapter(name: Any, known: Collection[str], purpose: str) -> None:
    """Raise AdapterError unless there is an adapter of that name, naming the nearest one."""
    if not isinstance(name, str) or name not in known:
        near = nearest_name(name, known) if isinstance(name, str) else ""
        shown = f"{name!r}"[:100]
        raise AdapterError(
            f"There is no adapter {shown} {purpose}: it does not exist.",
            seen=f"{shown}{near}; adapters: {', '.join(known) or 'none'}",
            do="give the name of one of them, or model.load_adapter(folder, name) first",
        )


def causes(error: BaseException | None) -> list[BaseException]:
    """Return an error, the error that it was raised from, and so on."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def system_codes(error: BaseException) -> list[int]:
    """Return the errno of an error and of its causes; libraries in Rust say it only in words."""
    codes = [getattr(cause, "errno", None) for cause in causes(error)]
    words = re.findall(r"(?:os error|Os { code:) (\d+)", str(error))
    return [*map(int, words), *(code for code in codes if isinstance(code, int))]


def disk_is_full(error: BaseException) -> bool:
    """Tell whether an error was caused by a full disk, or a quota that is used up."""
    return not {ENOSPC, EDQUOT}.isdisjoint(system_codes(error))


def file_error(error: BaseException, path: str | os.PathLike[str], verb: str) -> FileError:
    """Return our own error for what the system says of a file or folder that cannot be "read" or "written"."""
    what, seen, codes = f"{os.fspath(path)} cannot be {verb}.", str(error), system_codes(error)
    if disk_is_full(error):
        there = next(folder for folder in (Path(path), *Path(path).absolute().parents) if folder.exists())
        what, seen = f"There is no space left to write {path}.", f"{seen}; {disk_usage(there).free:,} bytes free"
        return NoSpaceError(what, seen=seen, do="free some space and try again; what was there before is untouched")
    if codes and codes[0] in (EACCES, EPERM, EROFS):
        do = "change its permissions (ls -ld, chmod), or give another file or folder"
        ours: FileError = FileAccessError(what, seen=seen, do=do)
    else:
        ours = FileError(what, seen=seen, do="give another file or folder")
    ours.errno = codes[0] if codes else None
    return ours


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the system's errors about a file or folder that is to be read into FileError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, BNAdapterError):
            raise
        raise file_error(error, error.filename or path, "read") from error
