"""What a person wrote into a model card stays when the card is written again: text outside our marks, and metadata."""

import hashlib
import re
import warnings
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump

from ..errors import ConfigError, HubConflictError

METRIC = "top-1 accuracy, %"  # the name of our entries in the model index
_BEGIN = "<!-- bn-adapters:begin: every push writes this section again; write above or below it -->"
_SECTION = re.compile(r"^<!-- bn-adapters:begin\b.*?-->\n(.*)^<!-- bn-adapters:end (\w*) *-->\n?", re.M | re.S)


def marked(text: str) -> str:
    """Put a text between the marks; the second one has its digest, by which an edit is noticed."""
    return f"{_BEGIN}\n{text}<!-- bn-adapters:end {_digest(text)} -->\n"


def sealed_again(card: str) -> str:
    """Return a card after a change of ours between the marks."""
    return _SECTION.sub(lambda found: marked(found[1]), card)


def _digest(text: str) -> str:
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]


def _parsed(card: str) -> tuple[dict[str, Any], str]:
    """Return a card's metadata and its text."""
    found = REGEX_YAML_BLOCK.search(card)
    if found is None:
        return {}, card
    try:
        data = yaml.safe_load(found[2]) or {}
        if not isinstance(data, dict):
            raise ValueError(f"the metadata is a {type(data).__name__}")
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(
            "The metadata of the model card that is there cannot be read.",
            seen=" ".join(str(error).split())[:300],
            do="mend the YAML between the two lines --- of README.md, or push without a card",
        ) from error
    return data, card[found.end() :]


def _joined(data: dict[str, Any], text: str) -> str:
    return f"---\n{yaml_dump(data, sort_keys=False).strip()}\n---\n{text}" if data else text


def updated(old: str, new: str, drawn: bool = False) -> str:
    """Return a new card with what a person wrote into the old one.

    Args:
        old: the card that is there.
        new: the card as it would be written for the first time, with its marks.
        drawn: the frozen weights come from a seed, and hence from no base.

    Raises:
        ConfigError: the section between the marks was edited, or the metadata cannot be read.
    """
    (old_data, old_text), (new_data, new_text) = _parsed(old), _parsed(new)
    there, ours = _SECTION.search(old_text), _SECTION.search(new_text)
    assert ours is not None
    if there is not None and _digest(there[1]) != there[2]:
        raise ConfigError(
            "The section of the model card that every push writes again was edited by hand.",
            seen="README.md, between the marks bn-adapters:begin and bn-adapters:end",
            do="move your text above or below the marks and delete the section between them, or push without a card",
        )
    if there is not None:
        text = old_text[: there.start()] + ours[0] + old_text[there.end() :]
    elif old_text.split() in ([], ours[1].split()):  # none, or ours from before there were marks
        text = new_text
    else:
        warnings.warn(
            "The model card that is there has no section of bn-adapters: its text is kept, and the section is below it."
            " If an earlier version wrote that text, delete it.",
            stacklevel=2,
        )
        text = f"{old_text.rstrip()}\n\n{ours[0]}"
    return _joined(_updated_metadata(old_data, new_data, drawn), text)


def _updated_metadata(old: dict[str, Any], new: dict[str, Any], drawn: bool) -> dict[str, Any]:
    """Return the new values, and the old ones that are not ours or to which a person may have added."""
    merged = {**old, **new}
    for key in ("tags", "datasets", "metrics"):
        if listed := [*_items(new.get(key)), *_items(old.get(key))]:
            merged[key] = [item for i, item in enumerate(listed) if item not in listed[:i]]
    index = [*_items(new.get("model-index")), *_foreign_results(old.get("model-index"))]
    merged["model-index"] = _one_index(index)
    if not merged["model-index"]:
        del merged["model-index"]
        merged["metrics"] = [metric for metric in _items(merged.get("metrics")) if metric != "accuracy"]
    if drawn:
        merged = {key: value for key, value in merged.items() if key not in ("base_model", "base_model_relation")}
    return {key: value for key, value in merged.items() if value not in (None, [])}


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _results(entry: Any) -> list[Any] | None:
    results = entry.get("results") if isinstance(entry, dict) else None
    return results if isinstance(results, list) else None


def _foreign_results(index: Any) -> list[Any]:
    """Return the entries of a model index without our own results."""
    kept = []
    for entry in _items(index):
        if (results := _results(entry)) is None:
            kept.append(entry)
        elif others := [result for result in results if METRIC not in str(result)]:
            kept.append({**entry, "results": others})
    return kept


def _one_index(entries: list[Any]) -> list[Any]:
    """Join the results of entries that have the same name."""
    index: list[Any] = []
    for entry in entries:
        results = _results(entry)
        same = next((e for e in index if results and _results(e) and e.get("name") == entry.get("name")), None)
        if same is None:
            index.append(entry)
        else:
            same["results"] = [*same["results"], *(results or [])]
    return index


def joined(there: str, own: str, drawn: bool) -> str:
    """Return the card to push from the one on the Hub and the one that lies beside the adapter.

    Raises:
        HubConflictError: the one on the Hub has text that the other lacks.
        ConfigError: as in `updated`.
    """
    (data, text), (own_data, own_text) = _parsed(there), _parsed(own)
    around = _SECTION.sub("", own_text).split()
    if _SECTION.search(own_text) and around in ([], _SECTION.sub("", text).split()):
        return updated(there, own, drawn)
    lost = [line for line in _SECTION.sub("", text).splitlines() if line.strip() and line not in own_text]
    if lost:
        raise HubConflictError(
            "The model card on the Hub has text that README.md of the folder lacks.",
            seen=f"{len(lost)} lines, the first is {lost[0][:100]!r}; nothing was pushed",
            do="copy that text into the folder's README.md; or delete this file, and the Hub's text is kept; or push "
            "without a card",
        )
    return _joined(_updated_metadata(data, own_data, drawn), own_text)
