"""The range of a key: an interval of numbers, a choice of words, true or false, a text, or names with values.

A range is a tuple of words, one of the names below, or an interval such as "[0, 1)": a number, or each one of a list,
lies in it. "some of [0, 1)" is a list that is not empty, "two of [0, 1)" is a pair whose second number is not smaller.
"""

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, check_choice

SWITCH, TEXT, TEXTS, VALUES = "true or false", "a text", "a list of texts", "names with values"

Range = str | tuple[str | int | None, ...]


def check_range(key: str, value: Any, allowed: Range) -> None:
    """Raise ConfigError, which names the key, for a value outside of its range; None may stand where a type has it."""
    if isinstance(allowed, tuple):
        check_choice(key, value, allowed)
    elif value is not None and not in_range(value, allowed):
        choose = f"choose {key} from" if allowed.endswith((")", "]")) else f"give {key}"
        raise ConfigError(f"{key} is out of range.", seen=f"{key}={value!r}"[:200], do=f"{choose} {allowed}")


def in_range(value: Any, allowed: str) -> bool:
    """Tell whether a value lies in a range that is no choice of words; nan lies in none.

    >>> in_range([0.5, 1], "[0, 1)"), in_range([0.2, 0.5], "two of [0, 1)"), in_range(1, "true or false")
    (False, True, False)
    """
    if allowed == SWITCH:
        return isinstance(value, bool)
    if allowed == TEXT:  # a number is one too: a folder may be called 2026
        return isinstance(value, str | int) and not isinstance(value, bool) and value != "" and "\0" not in str(value)
    if allowed == TEXTS:
        return isinstance(value, list) and bool(value) and all(in_range(each, TEXT) for each in value)
    if allowed == VALUES:
        return isinstance(value, Mapping) and all(isinstance(name, str) and name for name in value)
    count, _, interval = allowed.rpartition(" of ")
    if not isinstance(value, list):
        return not count and _inside(value, interval)
    counted = {"": True, "some": bool(value), "two": len(value) == 2}[count]
    return counted and all(_inside(each, interval) for each in value) and (count != "two" or value[0] <= value[1])


def _inside(value: Any, interval: str) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    low, high = map(float, interval[1:-1].split(","))
    above = low <= value if interval[0] == "[" else low < value
    return above and (value <= high if interval[-1] == "]" else value < high)
