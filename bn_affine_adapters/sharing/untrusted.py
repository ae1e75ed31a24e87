"""The one way to open, and to replace, a file in a folder that a stranger may have made."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import AdapterFileError, BNAdapterError, TooLargeError

MAX_BYTES = 8_000_000  # of a configuration, a card, a picture, and the header of a safetensors file


def present(folder: Path, name: str) -> bool:
    """Tell whether a folder has an entry of this name, of any kind; `opened` decides whether it can be read."""
    return os.path.lexists(folder / name)


def opened(folder: Path, name: str, max_bytes: int | None = MAX_BYTES) -> BinaryIO:
    """Open a file of a folder for reading: a regular one, inside the folder, of bounded size.

    A link is followed if it leads to a file inside the folder; from a snapshot in the Hub's cache, where every file is
    one, also if it leads to the cache's folders of contents, `blobs`.

    Raises:
        AdapterFileError: it leads out of the folder or nowhere, is no regular file, or cannot be read.
        TooLargeError: it is larger than ``max_bytes``.
    """
    path = folder / name
    try:
        real = Path(os.path.realpath(path, strict=True))
        if not any(real.is_relative_to(root) for root in _roots(folder)):
            raise _refused(path, f"a link to {real}, which is outside the folder")
        if not real.is_file():
            raise _refused(path, "no regular file")
        # A FIFO, if the file has become one meanwhile, would wait for its writer.
        descriptor = os.open(real, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:  # it leads nowhere, or to itself; what may not be read is no fault of the folder
        if isinstance(error, BNAdapterError | PermissionError):
            raise
        raise _refused(path, str(error)) from error
    file = os.fdopen(descriptor, "rb")
    if max_bytes is not None and (size := os.fstat(descriptor).st_size) > max_bytes:
        file.close()
        raise too_large(path, f"{size:,} bytes; {max_bytes:,} are allowed")
    return file


def read_text(folder: Path, name: str, max_bytes: int = MAX_BYTES) -> str:
    """Return the text of a file. Raises: as `opened`, and AdapterFileError if it is not UTF-8."""
    with opened(folder, name, max_bytes) as file:
        try:
            return file.read(max_bytes).decode()
        except UnicodeDecodeError as error:
            raise _refused(folder / name, str(error)) from error


def cleared(folder: Path, name: str) -> Path:
    """Return the path of a file that is written next; what has its name and is no regular file, as a link, is removed.

    Raises:
        AdapterFileError: a folder on the way is a link, or a folder has the file's name.
    """
    path = folder / name
    if path.is_dir() and not path.is_symlink():
        raise _refused(path, "a folder")
    within = path.parent
    if within != folder and os.path.lexists(within) and (within.is_symlink() or not within.is_dir()):
        raise _refused(within, "a link or a file, where a folder belongs")
    if path.is_symlink() or (os.path.lexists(path) and not path.is_file()):
        path.unlink()
    return path


def too_large(file: Path, seen: str) -> TooLargeError:
    """Return the error for a file that is larger than any adapter's."""
    do = "do not load it; an adapter has a few kB of names and settings"
    return TooLargeError(f"{file} is larger than any adapter needs.", seen=seen, do=do)


def _refused(path: Path, seen: str) -> AdapterFileError:
    do = "remove it if you did not put it there; an adapter is regular files in one folder"
    return AdapterFileError(f"{path} cannot be used.", seen=seen, do=do)


def _roots(folder: Path) -> Iterator[Path]:
    """Yield the folders in which the files of a folder may lie."""
    real = Path(os.path.realpath(folder, strict=True))
    yield real
    for snapshots in real.parents:  # CACHE/models--OWNER--NAME/snapshots/COMMIT
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
            yield snapshots.parent / "blobs"
            yield snapshots.parents[1] / "blobs"  # what repositories share, since huggingface_hub 2
