"""Result lines: append them whole; read each run once, where torn or contradictory files are refused."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ..errors import ConfigError
from ..sharing.folder import writing
from ..sharing.results import strict_json
from .lock import fcntl
from .recipe import run_key

# These may differ when a run is repeated: times, hardware, versions, the commit, the command.
TIMES = ("seconds", "images_per_second", "hardware", "versions", "commit", "command")

RESULT = "result.json"  # a run's line, in its output folder


def recorded_in(path: Path) -> dict[str, Any] | None:
    """Return the recipe in a result line that stands alone in a file, or in a list; None if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return dict((found[0] if isinstance(found, list) else found)["recipe"])
    except (OSError, ValueError, LookupError, TypeError):  # not there, or not one that training wrote
        return None


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Append a result line, whole or not at all, after a torn last line has been removed; it is on the disk then.

    Raises:
        FileError: it cannot be written, or the disk is full; the file is as before.
    """
    with writing(path), _at_the_end(path) as file:
        write_line(file, line)


def append_once(path: Path, line: Mapping[str, Any]) -> None:
    """Append a result line as `append` does, unless the file has one of the same run with the same results."""
    with writing(path), _at_the_end(path) as file:
        file.seek(0)
        if not any(_same_result(text, line) for text in file.read().splitlines()):
            write_line(file, line)


def _same_result(text: bytes, line: Mapping[str, Any]) -> bool:
    try:
        before = json.loads(text)
        return run_key(before["recipe"]) == run_key(line["recipe"]) and not _differing(before, line)
    except (ValueError, LookupError, TypeError, AttributeError):  # not a line that training wrote
        return False


@contextmanager
def _at_the_end(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to append to, `mend` it, and let other runs that append to it wait."""
    with path.open("a+b", buffering=0) as file:
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.lockf(file, fcntl.LOCK_EX)
        mend(file)
        yield file


def mend(file: IO[bytes]) -> str:
    """Remove a torn last line, or add the newline of a whole one; return what was done, "" if nothing was."""
    file.seek(0)
    whole, newline, rest = file.read().rpartition(b"\n")
    if not rest:
        return ""
    about = f"the last line, {len(rest)} bytes, has no newline: "
    try:  # no beginning of a JSON object is a JSON object: this line is whole, perhaps edited by hand
        json.loads(rest)
    except ValueError:
        file.truncate(len(whole + newline))
        return about + "it is torn, and was removed"
    file.write(b"\n")
    return about + "it is whole, and its newline was added"


def write_line(file: IO[bytes], line: Mapping[str, Any]) -> None:
    """Write a result line to the end of an unbuffered file and onto the disk, whole or not at all."""
    end, left = file.seek(0, os.SEEK_END), strict_json(line).encode() + b"\n"
    try:
        while left:  # what has room is written, and the error comes with the rest
            left = left[file.write(left) :]
        os.fsync(file.fileno())
    except OSError:
        file.truncate(end)
        raise


def read_results(*paths: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the result lines of .jsonl files, each run once; of equal lines the one that was also analysed.

    Raises:
        ConfigError: a file cannot be read, a line is not a run's result, the last line was not written to its
            end, or two lines have different results of one run.
    """
    runs: dict[str, tuple[str, dict[str, Any]]] = {}
    for path in map(Path, paths):
        for number, line in enumerate(_lines(path), 1):
            place, key = f"{path}, line {number}", run_key(line["recipe"])
            first, before = runs.setdefault(key, (place, line))
            if differing := _differing(before, line):
                raise ConfigError(
                    f"{first}, and {place}, have two results of one run.",
                    seen=", ".join(f"{k}: {_shown(before.get(k))} and {_shown(line.get(k))}" for k in differing),
                    do=f"keep the line that is right; the run is {key}",
                )
            if "analysis" in line and "analysis" not in before:
                runs[key] = place, line
    return [line for _, line in runs.values()]


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        do = "give a .jsonl file that `bn-adapters train` or `bn-adapters sweep` wrote"
        raise ConfigError(f"{path} cannot be read.", seen=str(error), do=do) from error
    *whole, rest = text.split("\n")
    if rest:
        raise ConfigError(
            f"{path} has a torn last line, {len(whole) + 1}: it was not written to its end.",
            seen=f"{len(rest)} characters without a newline: {rest[:80]}",
            do="remove that line, or repeat the command of the sweep, which does so",
        )
    return [_line(path, number, line) for number, line in enumerate(whole, 1)]


def _line(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
        dict(line["recipe"]), float(line["top1"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(
            f"{path}, line {number}, is not the result of a run.",
            seen=f"{type(error).__name__}: {error}; {text[:80]}",
            do='every line is a JSON object with "recipe" and "top1", as `bn-adapters train` writes it',
        ) from error
    return line


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values differ; only one line may be analysed, and one may be evaluated more often."""
    if a is b:
        return []
    keys = sorted((a.keys() | b.keys()) - {*TIMES, "recipe"} - ({"analysis"} - (a.keys() & b.keys())))
    # Compared as text, since a loss of NaN is not equal to itself.
    texts = {key: [json.dumps(line.get(key), sort_keys=True) for line in (a, b)] for key in keys}
    return [key for key, (x, y) in texts.items() if x != y and not (key == "epochs" and _alike(a, b))]


def _alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Tell whether the epochs of two lines agree in the keys that both have."""
    epochs = a.get("epochs", []), b.get("epochs", [])
    pairs = zip(*epochs, strict=False)
    return len(epochs[0]) == len(epochs[1]) and all(x[k] == y[k] for x, y in pairs for k in x.keys() & y.keys())


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."
