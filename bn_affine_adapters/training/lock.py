"""A lock on an output folder: one run writes to it at a time."""

import errno
import json
import os
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import OutputFolderError
from ..sharing.folder import remove_litter, writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"


@contextmanager
def locked(folder: Path) -> Generator[None, None, None]:
    """Create a folder and keep other runs out of it; remove what a killed run left half written there.

    A folder that was created here and is still empty at the end is removed.

    The kernel gives the lock back when this process ends, however it ends: a lock of a process that is gone is stale
    at once. Where the file system has no locks, the process that the file names is looked for.

    Raises:
        OutputFolderError: another run writes to the folder.
        FileError: it cannot be written.
    """
    path = folder / NAME
    with writing(folder):
        created = not folder.exists()
        descriptor = _open(path)
    try:
        about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        os.ftruncate(descriptor, 0)
        with writing(folder):
            os.pwrite(descriptor, json.dumps(about, allow_nan=False).encode(), 0)
            for place in (folder, folder / "adapter", folder / "network"):
                remove_litter(place)
        yield
    finally:
        with suppress(OSError):  # e.g. the disk has become read-only
            path.unlink(missing_ok=True)
            if created:
                folder.rmdir()  # an error if something is in it
        os.close(descriptor)


def _open(path: Path) -> int:
    """Return the descriptor of a lock's file, which is locked while the descriptor is open."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another run has just removed its empty folder
            continue
        try:
            _lock(descriptor, path)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner removed the file between the two lines


def _lock(descriptor: int, path: Path) -> None:
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no locks on this system")
        # Not flock, which a forked worker of a data loader would keep after this process was killed.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = _owner(descriptor)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise _in_use(path, owner, "wait for it") from error
        here = owner.get("host") == socket.gethostname()
        if owner and (not here or _alive(owner.get("pid"))):
            raise _in_use(path, owner, "wait for it" if here else f"delete {path} if it has ended") from error


def _owner(descriptor: int) -> dict[str, Any]:
    """Return what the owner of a lock wrote about itself; nothing if that is not readable."""
    try:
        found = json.loads(os.pread(descriptor, 1000, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, TypeError, ValueError):
        return True  # another user's, or unreadable
    return True


def _in_use(path: Path, owner: dict[str, Any], do: str) -> OutputFolderError:
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}, since {owner.get('since', '?')}"
    stop = f", end it with `kill {owner['pid']}` (its launcher may have died before it)" if "pid" in owner else ""
    return OutputFolderError(
        f"Another run writes to {path.parent}.", seen=who, do=f"{do}{stop}, or choose another output_dir="
    )
