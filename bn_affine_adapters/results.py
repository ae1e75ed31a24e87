"""What was measured of an adapter: result lines read from anywhere, and one score a data set."""

import json
import os
import statistics
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .errors import ConfigError

RESULTS_NAME = "results.json"  # beside an adapter: the list of its result lines
# What may come out otherwise when a run is done again: times, and where, with what and how it was started.
TIMES = ("seconds", "images_per_second", "hardware", "versions", "commit", "command")


class Score(NamedTuple):
    """Accuracy on one split, in %: of this adapter, and of the n replicates of its recipe."""

    dataset: str
    split: str
    top1: float
    top5: float | None
    n: int
    mean: float
    deviation: float


def read_results(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the result lines of a .jsonl file, each run once; of equal lines the one that was also analysed.

    Raises:
        ConfigError: the file cannot be read, a line is not a run's result, the last line was not written to its
            end, or two lines tell different results of one run.
    """
    # Only who reads a file of them needs it, and a card or an adapter does not.
    from .recipe import run_key

    found: dict[str, tuple[int, dict[str, Any]]] = {}
    for number, line in enumerate(_lines(Path(path)), 1):
        key = run_key(line["recipe"])
        first, before = found.setdefault(key, (number, line))
        if differing := _differing(before, line):
            raise ConfigError(
                f"{path} tells two results of one run, in lines {first} and {number}.",
                seen=", ".join(f"{k}: {_shown(before.get(k))} and {_shown(line.get(k))}" for k in differing),
                do=f"keep the line that is right; the run is {key}",
            )
        if "analysis" in line and "analysis" not in before:
            found[key] = number, line
    return [line for _, line in found.values()]


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        do = "give a .jsonl file that recipes/train.py or recipes/sweep.py wrote"
        raise ConfigError(f"{path} cannot be read.", seen=str(error), do=do) from error
    *whole, rest = text.split("\n")
    if rest:
        raise ConfigError(
            f"{path} has a torn last line, {len(whole) + 1}: it was not written to its end.",
            seen=f"{len(rest)} characters without a newline: {rest[:80]}",
            do="cut it off, or run the sweep that wrote it again, which does that",
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
            do='every line is a JSON object with "recipe" and "top1", as recipes/train.py writes it',
        ) from error
    return line


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return in which results two lines of one run differ; one may be analysed alone or evaluated more often."""
    keys = sorted((a.keys() | b.keys()) - {*TIMES, "recipe"} - ({"analysis"} - (a.keys() & b.keys())))
    if a is b:
        return []
    # As text, in which a loss that is no number equals itself.
    return [key for key in keys if _text(a.get(key)) != _text(b.get(key)) and not (key == "epochs" and _alike(a, b))]


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    epochs = a.get("epochs", []), b.get("epochs", [])
    pairs = zip(*epochs, strict=False)
    return len(epochs[0]) == len(epochs[1]) and all(x[k] == y[k] for x, y in pairs for k in x.keys() & y.keys())


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."


def merged(folder: Path, results: Sequence[Mapping[str, Any]] | str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return an adapter's own results, then those given, each once.

    Raises:
        ConfigError: a line is not JSON, or has no "dataset" and no finite "top1".
    """
    own = folder / RESULTS_NAME
    try:
        lines = json.loads(own.read_text(encoding="utf-8")) if own.exists() else []
        given: list[Mapping[str, Any]]
        if isinstance(results, str | os.PathLike):
            given = [json.loads(text) for text in Path(results).read_text(encoding="utf-8").splitlines()]
            given = [line for line in given if not lines or _recipe(line) == _recipe(lines[0])]
        else:
            given = [results] if isinstance(results, Mapping) else list(results or ())
        runs = [(_run(line), dict(line)) for line in [*lines, *given]]
        scores([line for _, line in runs])
    except (ValueError, OSError, AttributeError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise ConfigError(
            "The results cannot be read.",
            seen=f"{type(error).__name__}: {error}",
            do='give dictionaries with "dataset" and "top1" in %, or a .jsonl file that recipes/train.py wrote',
        ) from error
    return [line for i, (run, line) in enumerate(runs) if run is None or run not in [other for other, _ in runs[:i]]]


def _recipe(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line["recipe"].items() if key not in ("seed", "data_seed")}


def _run(line: Mapping[str, Any]) -> dict[str, Any] | None:
    return line.get("recipe")  # with its seeds it tells one run from another; without it, every line is one


def scores(lines: Sequence[Mapping[str, Any]]) -> list[Score]:
    """Return one score a data set and split, over all the lines that measured it; the first line is the adapter's."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for line in lines:
        recipe = line.get("recipe") or {}
        key = line.get("dataset") or recipe["dataset"], line.get("split") or recipe.get("test_split", "test")
        groups.setdefault((str(key[0]), str(key[1])), []).append(line)
    return [_score(dataset, split, group) for (dataset, split), group in groups.items()]


def _score(dataset: str, split: str, group: Sequence[Mapping[str, Any]]) -> Score:
    values = [float(line["top1"]) for line in group]
    top5 = group[0].get("top5")
    if not all(0 <= value <= 100 for value in [*values, float(top5 or 0)]):
        raise ValueError(f"an accuracy on {dataset} is not between 0 and 100 %")
    if 0 < values[0] <= 1:
        warnings.warn(f"{values[0]} % on {dataset}: accuracies are given in %, not as fractions", stacklevel=5)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    own, mean = round(values[0], 2), round(statistics.mean(values), 2)
    return Score(dataset, split, own, top5 and round(float(top5), 2), len(values), mean, round(deviation, 2))
