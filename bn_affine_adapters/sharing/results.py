"""The results of one adapter: its result lines, and one score for each data set."""

import json
import os
import statistics
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError, printable
from .paths import ELSEWHERE, without_paths
from .untrusted import present, read_text

MAX_LINES, MAX_SETS, MAX_RESULTS = 1_000, 100, 2_000_000  # lines of results, splits of data sets, bytes
RESULTS_NAME = "results.json"  # beside an adapter: the list of its result lines


def strict_json(value: Any, **how: Any) -> str:
    """Return a value as JSON that every parser reads: raise ValueError for NaN and infinity. Args: of json.dumps."""
    return json.dumps(value, allow_nan=False, **how)


class Score(NamedTuple):
    """Accuracy on one split, in %: of this adapter, and of the n replicates of its recipe."""

    dataset: str
    split: str
    top1: float
    top5: float | None
    n: int
    mean: float
    deviation: float


def merged(folder: Path, results: Sequence[Mapping[str, Any]] | str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return an adapter's own results, then those given, without duplicates.

    Raises:
        AdapterFileError, TooLargeError: results.json is no regular file in the folder, or larger than a card's.
        ConfigError: a line is not JSON, or has no "dataset" and no finite "top1"; or there are too many.
    """
    own = read_text(folder, RESULTS_NAME, MAX_RESULTS) if present(folder, RESULTS_NAME) else "[]"
    try:
        lines = json.loads(own)
        given: list[Mapping[str, Any]]
        if isinstance(results, str | os.PathLike):
            given = [json.loads(text) for text in Path(results).read_text(encoding="utf-8").splitlines()]
            given = [line for line in given if not lines or _recipe(line) == _recipe(lines[0])]
        else:
            given = [results] if isinstance(results, Mapping) else list(results or ())
        lines = [_public(line) for line in [*lines, *given]]
        sets = len(scores(lines))
        size = len(strict_json(lines, default=float))
        recipes = [strict_json(line.get("recipe"), sort_keys=True, default=float) for line in lines]
    except (ValueError, OSError, AttributeError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise ConfigError(
            "The results cannot be read.",
            seen=f"{type(error).__name__}: {error}",
            do='give dictionaries with "dataset" and "top1" in %, or a .jsonl file that `bn-adapters train` wrote',
        ) from error
    if len(lines) > MAX_LINES or sets > MAX_SETS or size > MAX_RESULTS:
        raise ConfigError(
            "There are more results than a model card has.",
            seen=f"{len(lines):,} lines of {sets:,} data sets, {size:,} bytes",
            do=f"give at most {MAX_LINES:,} lines of {MAX_SETS} data sets, and {MAX_RESULTS:,} bytes",
        )
    # With its seeds, a recipe identifies a run.
    first = {recipe: i for i, recipe in reversed([*enumerate(recipes)])}
    return [line for i, line in enumerate(lines) if recipes[i] == "null" or first[recipes[i]] == i]


def _public(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line without the folder that training saved to, and with the names alone of other files and folders."""
    kept = {key: value for key, value in line.items() if key not in ("adapter", "network")}
    return {key: without_paths(value, ELSEWHERE if key == "command" else "") for key, value in kept.items()}


def _recipe(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line["recipe"].items() if key not in ("seed", "data_seed")}


def scores(lines: Sequence[Mapping[str, Any]]) -> list[Score]:
    """Return one score for each data set and split, over all its lines; the first of them is the adapter's own."""
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
        shown = printable(dataset, 100)  # the line may come from a stranger's folder
        warnings.warn(f"{values[0]} % on {shown}: accuracies are given in %, not as fractions", stacklevel=5)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    own, mean = round(values[0], 2), round(statistics.mean(values), 2)
    return Score(dataset, split, own, top5 and round(float(top5), 2), len(values), mean, round(deviation, 2))
