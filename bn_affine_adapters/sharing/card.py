"""Write the model card from an adapter's folder: README.md, its figure and its results. Needs no network access."""

import os
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from ..errors import TooLargeError, printable
from ..settings import CUSTOM, HUB_ID, MAX_PARAMETERS, Settings, creation_call, zoo_of
from .compact import bits_of, compact_file, read_compact
from .contents import Stored, parts, read_tensors
from .figure import write_figure
from .folder import COMMIT, read_settings, replace_file, writing
from .handwritten import METRIC, marked, updated
from .paths import ELSEWHERE
from .results import RESULTS_NAME, Score, merged, scores, strict_json
from .untrusted import present, read_text

CARD_NAME = "README.md"
EVAL_RESULTS = ".eval_results/bn-affine-adapters--"  # how our files among the Hub's evaluation results begin
TAGS = ("timm", "peft", "bn-only", "image-classification")
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{16,}")


def write_card(
    folder: Path,
    repo_id: str,
    *,
    results: Sequence[Mapping[str, Any]] | str | os.PathLike[str] = (),
    license: str | None = None,
    tags: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
    output: Path | None = None,
    write_readme: bool = True,
) -> None:
    """Write an adapter's model card, figure and results; of a card that is there, what a person wrote is kept.

    Args:
        folder: an adapter's, with results.json if `bn-adapters train` wrote one.
        repo_id: the repository's name, for the snippet.
        results: what was measured: a dictionary with "dataset", "top1" (%), and if known "split" and "top5" (%), a line
            of `bn-adapters train`, or a list of those; or a .jsonl file, of which replicates of this recipe are used.
            The first result on a data set is this adapter's own.
        license: an identifier of the Hub; left out when not given.
        tags: added to those that every adapter has.
        datasets: Hub ids of the training data; by default those that the results' recipes name.
        output: where to write; by default the adapter's folder.
        write_readme: False writes the results alone.

    Raises:
        ConfigError: the results or the card that is there cannot be read, or its own section was edited by hand.
        FileError: a file cannot be written, or the disk is full; each that was there before is whole.
    """
    lines = merged(folder, results)
    output = output or folder
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        _write_results(output, lines)
        if write_readme:
            _write_eval_results(output, scores(lines))
            _write_readme(folder, output, repo_id, lines, license=license, tags=tags, datasets=datasets)


def _write_readme(folder: Path, output: Path, repo_id: str, lines: list[dict[str, Any]], **about: Any) -> None:
    if (compact := compact_file(folder)) is not None:
        about |= {"compact": {"bytes": compact.stat().st_size, "bits": bits_of(compact)}}
        config, tensors, figure = read_compact(compact, Settings), dict[str, Stored](), None
    else:
        tensors = read_tensors(folder, config := read_settings(folder))
        figure = write_figure(output, [tensors[name] for name in parts(config, tensors)["gamma"]])
    text = render(repo_id, config, tensors, lines, figure=figure, **about)
    if present(output, CARD_NAME):
        text = updated(read_text(output, CARD_NAME), text, drawn=config.seed is not None)
    replace_file(output, CARD_NAME, text.encode())


def _write_results(folder: Path, lines: list[dict[str, Any]]) -> None:
    if lines:
        text = strict_json(lines, indent=1, default=float)  # numbers of NumPy and torch too
        replace_file(folder, RESULTS_NAME, f"{_TOKEN.sub('hf_***', text)}\n".encode())


def render(
    repo_id: str,
    config: Settings,
    tensors: Mapping[str, Stored],
    results: Sequence[Mapping[str, Any]] = (),
    *,
    figure: str | None = None,
    license: str | None = None,
    tags: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
    compact: Mapping[str, int] | None = None,
) -> str:
    """Return the text of a model card.

    Args: as in `write_card`; ``figure`` is the name of a file beside it, ``compact`` the bytes and bits of a compact
    file, which has no tensors of its own.
    """
    measured = scores(results)
    by_part = {part: names for part, names in parts(config, tensors).items() if names}
    text = _template().render(
        metadata=_metadata(repo_id, config, measured, license, tags, datasets or _trained_on(results)),
        repo_id=repo_id,
        config=config,
        given=config.seed is None or config.architecture == CUSTOM,
        pinned=_pinned(config),
        trained=_trained(config),
        total=_total(config),
        snippet=_snippet(repo_id, config),
        sizes={part: (len(names), sum(tensors[n].size for n in names)) for part, names in by_part.items()},
        kilobytes=sum(tensor.bytes for tensor in tensors.values()) / 1000,
        figure=figure,
        compact=compact,
        scores=measured,
        command=_line(results[0].get("command") or "").replace("```", "") if results else "",  # in a code block
        elsewhere=ELSEWHERE,
        data={key: _numbers(config, key) for key in ("input_size", "mean", "std")},
    )
    front, rest = _TOKEN.sub("hf_***", text).split("\n---\n", 1)
    return f"{front}\n---\n\n{marked(rest.lstrip())}"


def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"md": md, "code": code}
    template = package_files(__package__).joinpath("card_template.md").read_text(encoding="utf-8")
    return environment.from_string(template)


def md(text: object) -> str:
    """Return an untrusted text as one line of Markdown without any markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~$&])", r"\\\1", _line(text))


def code(text: object) -> str:
    """Return an untrusted text as one line that is safe in a code span, also in a table."""
    return _line(text).replace("`", "'").replace("|", "\\|")


def _line(text: object) -> str:
    return printable(" ".join(str(text).split()), 500)


def _trained(config: Settings) -> str:
    words = ["gamma"] * config.train_gamma + ["beta"] * config.train_beta + ["the head"] * config.train_head
    if config.control:
        kinds = {
            "two_weights": "two weights per output channel",
            "input_affine": "a scale and shift per input channel",
            "mask": f"a mask that keeps {config.mask_share:.0%} of the weights" if config.mask_share else "",
            "signed_mask": f"a mask that keeps {config.mask_share or 0:.0%} of the weights, with their signs",
        }
        words.append(f"{kinds[config.control]} of {len(config.control_layers or ())} convolutions")
    words += [f"{len(config.extra_trainable_modules)} further modules"] * bool(config.extra_trainable_modules)
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words) or "nothing"


def _total(config: Settings) -> int | None:
    if config.architecture is None or config.architecture == CUSTOM:
        return None
    from ..adapter.limits import build_within

    try:
        return sum(parameter.numel() for parameter in build_within(config, MAX_PARAMETERS).parameters())
    except TooLargeError:
        return None


def _numbers(config: Settings, key: str) -> list[float]:
    values = (config.data_config or {}).get(key)
    return values if isinstance(values, list) and all(isinstance(value, int | float) for value in values) else []


def _pinned(config: Settings) -> str | None:
    base = config.base_model_name_or_path or ""
    return base if config.seed is None and HUB_ID.fullmatch(base) and COMMIT.fullmatch(config.revision or "") else None


def _snippet(repo_id: str, config: Settings) -> str:
    lines, given = ["from bn_affine_adapters import load_bn_only_model, predict", ""], ""
    if config.architecture == CUSTOM:
        lines, given = ["# network: from the code of whoever trained this", *lines], ", model=network"
    elif config.seed is None and not _pinned(config):
        zoo = zoo_of(config.architecture)
        pretrained = {"pretrained": True} if zoo == "timm" else {}
        base = f"base = {creation_call(str(config.architecture), config.model_args, **pretrained)}"
        lines, given = [f"import {zoo}", *lines, f"{base}  # with the weights that it was trained on"], ", model=base"
    return "\n".join(
        [*lines, f'model = load_bn_only_model("{repo_id}"{given})', 'print(predict(model, "image.png", top_k=5))']
    )


def _metadata(
    repo_id: str,
    config: Settings,
    measured: list[Score],
    license: str | None,
    tags: Sequence[str] | None,
    datasets: Sequence[str] | None,
) -> str:
    base = _pinned(config)
    data = ModelCardData(
        library_name="bn_affine_adapters",
        pipeline_tag="image-classification",
        license=license,
        tags=list(dict.fromkeys([*TAGS, *_listed(tags)])),
        datasets=_listed(datasets) or None,
        metrics=["accuracy"] if measured else None,
        base_model=base,
        base_model_relation="adapter" if base else None,
        model_name=repo_id.partition("/")[2] if measured else None,
        eval_results=[_evaluation(score) for score in measured] or None,
    )
    return data.to_yaml()


def _listed(names: Sequence[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())


def _trained_on(results: Sequence[Mapping[str, Any]]) -> list[str]:
    named = {str(line["recipe"].get("dataset")) for line in results if line.get("recipe")}
    return sorted(name for name in named if HUB_ID.fullmatch(name))


def _evaluation(score: Score) -> EvalResult:
    spread = {"n": score.n, "mean": score.mean, "standard_deviation": score.deviation}
    return EvalResult(
        task_type="image-classification",
        dataset_type=score.dataset,
        dataset_name=score.dataset,
        dataset_split=score.split,
        metric_type="accuracy",
        metric_name=METRIC,
        metric_value=score.top1,
        metric_args=spread if score.n > 1 else {"n": 1},
    )


def _write_eval_results(folder: Path, measured: list[Score]) -> None:
    """Write the Hub's newer form of evaluation results, which allows only data sets of the Hub."""
    entries: dict[str, list[EvalResultEntry]] = {}
    for score in measured:
        if HUB_ID.fullmatch(score.dataset):
            notes = f"top-1 accuracy in %, {_line(score.split)} split"
            entry = EvalResultEntry(score.dataset, "default", score.top1, notes=notes)
            entries.setdefault(score.dataset.replace("/", "--"), []).append(entry)
    for name, group in entries.items():
        text = yaml.safe_dump(eval_result_entries_to_yaml(group), sort_keys=False)
        replace_file(folder, f"{EVAL_RESULTS}{name}.yaml", text.encode())
