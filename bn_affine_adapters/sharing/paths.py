"""Paths of this machine, which must not travel with an adapter."""

import os
import re
from pathlib import Path
from typing import Any

ELSEWHERE = "PATH/TO/"  # before the name of a file or folder in a command that others read
_PATH = re.compile(r"(?<![\w./\\~-])(?:~|[A-Za-z]:)?[/\\][^\s'\"]*")


def _is_local(path: str) -> bool:
    """Tell whether the first folder of an absolute path is here; /m/01g317, a class of Open Images, is no path."""
    drive, rest = os.path.splitdrive(os.path.expanduser(path))
    top, _, under = rest.replace(os.sep, "/").partition("/")
    name = under.lstrip("/").partition("/")[0]
    return not top and bool(name) and os.path.exists(f"{drive}/{name}")  # False for a name that no file can have


def local_paths(value: Any) -> list[str]:
    """Return the absolute paths of this machine in all strings of a value as JSON has it."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [path for item in value for path in local_paths(item)]
    return [path for path in _PATH.findall(value) if _is_local(path)] if isinstance(value, str) else []


def without_paths(value: Any, before: str = "") -> Any:
    """Return a value as JSON has it; of an absolute path of this machine only the last name is left, after a text."""
    if isinstance(value, dict):
        return {key: without_paths(item, before) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item, before) for item in value]
    if isinstance(value, str):
        return _PATH.sub(lambda found: before + Path(found[0]).name if _is_local(found[0]) else found[0], value)
    return value
