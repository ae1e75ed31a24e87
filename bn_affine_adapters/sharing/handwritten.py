"""What a person wrote into a model card stays when the card is written again: text outside our marks, and metadata."""

import hashlib
import re
import warnings
from typing import Any, NamedTuple

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump

from ..errors import ConfigError, HubConflictError

METRIC = "top-1 accuracy, %"  # the name of our entries in the model index
_BEGIN = "<!-- bn-adapters:begin: every push writes this section again; write above or below it -->"
_BEGINS = re.compile(r"^<!-- bn-adapters:begin\b[^\n]*-->\n", re.M)
_ENDS = re.compile(r"^<!-- bn-adapters:end (\w*) *-->\n?", re.M)
MAX_METADATA = 50_000  # characters; YAML of this size is read in about a second


def marked(text: str) -> str:
    """Put a text between the marks; the second one has its digest, by which an edit is noticed."""
    return f"{_BEGIN}\n{text}<!-- bn-adapters:end {_digest(text)} -->\n"


class _Section(NamedTuple):
    """What stands before, between and after the marks of a card, and the digest in the second mark."""

    before: str
    text: str
    after: str
    digest: str


def _section(card: str) -> _Section | None:
    """Return the section from the first mark that begins one to the last that ends one; None if there is none."""
    begin = _BEGINS.search(card)
    ends = [*_ENDS.finditer(card, begin.end())] if begin else []
    if begin is None or not ends:
        return None
    return _Section(card[: begin.start()], card[begin.end() : ends[-1].start()], card[ends[-1].end() :], ends[-1][1])


def _without_section(card: str) -> str:
    there = _section(card)
    return card if there is None else there.before + there.after


def sealed_again(card: str) -> str:
    """Return a card after a change of ours between the marks."""
    there = _section(card)
    return card if there is None else there.before + marked(there.text) + there.after


class _Loader(yaml.SafeLoader):
    """Reads YAML without aliases: a few lines with them stand for more values than fit into memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name)")
        return super().compose_node(parent, index)


def _digest(text: str) -> str:
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]


def _parsed(card: str) -> tuple[dict[str, Any], str]:
    """Return a card's metadata and its text."""
    found = REGEX_YAML_BLOCK.search(card)
    if found is None:
        return {}, card
    try:
        if len(found[2]) > MAX_METADATA:
            raise ValueError(f"it has {len(found[2]):,} characters; {MAX_METADATA:,} are allowed")
        data = yaml.load(found[2], _Loader) or {}
        if not isinstance(data, dict):
            raise ValueError(f"the metadata is a {type(data).__name__}")
        yaml_dump(data)  # an integer may have too many digits to be written
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
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
    there, ours = _section(old_text), _section(new_text)
    assert ours is not None
    section = marked(ours.text)
    if there is not None and _digest(there.text) != there.digest:
        raise ConfigError(
            "The section of the model card that every push writes again was edited by hand.",
            seen="README.md, between the marks bn-adapters:begin and bn-adapters:end",
            do="move your text above or below the marks and delete the section between them, or push without a card",
        )
    if there is not None:
        text = there.before + section + there.after
    elif old_text.split() in ([], ours.text.split()):  # none, or ours from before there were marks
        text = new_text
    else:
        warnings.warn(
            "The model card that is there has no section of bn-adapters: its text is kept, and the section is below it."
            " If an earlier version wrote that text, delete it.",
            stacklevel=2,
        )
        text = f"{old_text.rstrip()}\n\n{section}"
    return _joined(_updated_metadata(old_data, new_data, drawn), text)


def _updated_metadata(old: dict[str, Any], new: dict[str, Any], drawn: bool) -> dict[str, Any]:
    """Return the new values, and the old ones that are not ours or to which a person may have added."""
    merged = {**old, **new}
    for key in ("tags", "datasets", "metrics"):
        if listed := [*_items(new.get(key)), *_items(old.get(key))]:
            merged[key] = [*{repr(item): item for item in listed}.values()]
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
    around, outside = _without_section(own_text).split(), _without_section(text)
    if _section(own_text) and around in ([], outside.split()):
        return updated(there, own, drawn)
    known = {line.strip() for line in own_text.splitlines()} | {""}
    lost = [line for line in outside.splitlines() if line.strip() not in known]
    if lost:
        raise HubConflictError(
            "The model card on the Hub has text that README.md of the folder lacks.",
            seen=f"{len(lost)} lines, the first is {lost[0][:100]!r}; nothing was pushed",
            do="copy that text into the folder's README.md; or delete this file, and the Hub's text is kept; or push "
            "without a card",
        )
    return _joined(_updated_metadata(data, own_data, drawn), own_text)
