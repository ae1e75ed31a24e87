"""The model card: an adapter's folder in, README.md, its figure and its results out. No network, no model."""

import json
import math
import os
import re
import statistics
import warnings
from collections.abc import Mapping, Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from torch import Tensor

from .config import CUSTOM, BNOnlyConfig
from .contents import parts, read_tensors
from .errors import ConfigError, TooLargeError, printable
from .files import COMMIT, HUB_ID, read_config
from .limits import MAX_PARAMETERS, build_within
from .plots import gamma_histogram

RESULTS_NAME = "results.json"
CARD_NAME, FIGURE_NAME = "README.md", "gamma.png"
TAGS = ("timm", "peft", "bn-only", "image-classification")
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{16,}")


class Score(NamedTuple):
    """Accuracy on one split, in %: of this adapter, and of the n replicates of its recipe."""

    dataset: str
    split: str
    top1: float
    top5: float | None
    n: int
    mean: float
    deviation: float


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
    """Write an adapter's model card, figure and results.

    Args:
        folder: an adapter's, with results.json if `recipes/train.py` wrote one.
        repo_id: the repository's name, for the snippet.
        results: what was measured: dictionaries with "dataset", "top1" (%), and if known "split", "top5" (%), "seed",
            or lines of `recipes/train.py`; or a .jsonl file of those, of which replicates of this recipe are taken.
            The first of a data set is this adapter's own.
        license: an identifier of the Hub; left out when not given.
        tags: besides those that every adapter has.
        datasets: Hub ids of the training data; by default those of the results that are Hub ids.
        output: where to write; by default the adapter's folder.
        write_readme: False writes the results alone.

    Raises:
        ConfigError: the results are not readable as such.
    """
    lines = merged(folder, results)
    output = output or folder
    output.mkdir(parents=True, exist_ok=True)
    if lines:
        (output / RESULTS_NAME).write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    if not write_readme:
        return
    found = scores(lines)
    _write_eval_results(output, found)
    config, tensors = read_config(folder), read_tensors(folder)
    figure = _draw(output, config, tensors)
    text = render(repo_id, config, tensors, lines, figure=figure, license=license, tags=tags, datasets=datasets)
    (output / CARD_NAME).write_text(text, encoding="utf-8")


def render(
    repo_id: str,
    config: BNOnlyConfig,
    tensors: Mapping[str, Tensor],
    results: Sequence[Mapping[str, Any]] = (),
    *,
    figure: str | None = None,
    license: str | None = None,
    tags: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
) -> str:
    """Return the text of a model card. Args: as `write_card`; ``figure`` is the name of a file beside it."""
    from jinja2 import Environment, StrictUndefined

    found = scores(results)
    sizes = {
        part: (len(names), sum(tensors[n].numel() for n in names)) for part, names in parts(config, tensors).items()
    }
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"md": md, "code": code}
    template = package_files(__package__).joinpath("card_template.md").read_text(encoding="utf-8")
    text = environment.from_string(template).render(
        metadata=_metadata(repo_id, config, found, license, tags, datasets),
        repo_id=repo_id,
        config=config,
        given=config.seed is None or config.architecture == CUSTOM,
        pinned=_pinned(config),
        trained=_trained(config),
        total=_total(config),
        snippet=_snippet(repo_id, config),
        sizes={part: size for part, size in sizes.items() if size[0]},
        kilobytes=sum(t.numel() * t.element_size() for t in tensors.values()) / 1000,
        figure=figure,
        scores=found,
        command=code(results[0].get("command") or "") if results else "",
        data={key: _numbers(config, key) for key in ("input_size", "mean", "std")},
    )
    return _TOKEN.sub("hf_***", text)


def md(text: object) -> str:
    """Return a text from anywhere as plain words of one line of Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~$&])", r"\\\1", _line(text))


def code(text: object) -> str:
    """Return a text from anywhere as what may stand in a code span, in a table too."""
    return _line(text).replace("`", "'").replace("|", "\\|")


def _line(text: object) -> str:
    return printable(" ".join(str(text).split()), 500)


def _trained(config: BNOnlyConfig) -> str:
    words = ["gamma"] * config.train_gamma + ["beta"] * config.train_beta + ["the head"] * config.train_head
    words += [f"{len(config.extra_trainable_modules)} further modules"] * bool(config.extra_trainable_modules)
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words) or "nothing"


def _total(config: BNOnlyConfig) -> int | None:
    if config.architecture is None or config.architecture == CUSTOM:
        return None
    try:
        return sum(parameter.numel() for parameter in build_within(config, MAX_PARAMETERS).parameters())
    except TooLargeError:
        return None


def _numbers(config: BNOnlyConfig, key: str) -> list[float]:
    values = (config.data_config or {}).get(key)
    return values if isinstance(values, list) and all(isinstance(value, int | float) for value in values) else []


def _pinned(config: BNOnlyConfig) -> str | None:
    base = config.base_model_name_or_path or ""
    return base if config.seed is None and HUB_ID.fullmatch(base) and COMMIT.fullmatch(config.revision or "") else None


def _snippet(repo_id: str, config: BNOnlyConfig) -> str:
    lines = ["from bn_affine_adapters import load_bn_only_model, predict", ""]
    given = ""
    if config.architecture == CUSTOM:
        lines, given = ["# network: the one that it was trained on, from your own code", *lines], ", model=network"
    elif config.seed is None and not _pinned(config):
        args = "".join(f", {key}={value!r}" for key, value in config.model_args.items())
        lines = ["import timm", *lines, f'base = timm.create_model("{config.architecture}", pretrained=True{args})']
        given = ", model=base"
    return "\n".join(
        [*lines, f'model = load_bn_only_model("{repo_id}"{given})', 'print(predict(model, "image.png", top_k=5))']
    )


def _metadata(
    repo_id: str,
    config: BNOnlyConfig,
    found: list[Score],
    license: str | None,
    tags: Sequence[str] | None,
    datasets: Sequence[str] | None,
) -> str:
    base = _pinned(config)
    data = ModelCardData(
        library_name="bn_affine_adapters",
        pipeline_tag="image-classification",
        license=license,
        tags=list(dict.fromkeys([*TAGS, *(tags or ())])),
        datasets=list(datasets or sorted({score.dataset for score in found if HUB_ID.fullmatch(score.dataset)}))
        or None,
        metrics=["accuracy"] if found else None,
        base_model=base,
        base_model_relation="adapter" if base else None,
        model_name=repo_id.partition("/")[2] if found else None,
        eval_results=[_evaluation(score) for score in found] or None,
    )
    return data.to_yaml()


def _evaluation(score: Score) -> EvalResult:
    spread = {"n": score.n, "mean": score.mean, "standard_deviation": score.deviation}
    return EvalResult(
        task_type="image-classification",
        dataset_type=score.dataset,
        dataset_name=score.dataset,
        dataset_split=score.split,
        metric_type="accuracy",
        metric_name="top-1 accuracy, %",
        metric_value=score.top1,
        metric_args=spread if score.n > 1 else {"n": 1},
    )


def _write_eval_results(folder: Path, found: list[Score]) -> None:
    """Write the Hub's newer form of evaluation results, which knows only data sets of the Hub."""
    for score in found:
        if not HUB_ID.fullmatch(score.dataset):
            continue
        file = folder / ".eval_results" / f"{re.sub(r'[^A-Za-z0-9.-]', '_', score.dataset.partition('/')[2])}.yaml"
        file.parent.mkdir(exist_ok=True)
        entry = EvalResultEntry(score.dataset, "default", score.top1, notes=f"top-1 accuracy in %, {score.split} split")
        file.write_text(yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False), encoding="utf-8")


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
            given = list(results)
        runs = [(_run(line), dict(line)) for line in [*lines, *given]]
        scores([line for _, line in runs])
    except (ValueError, OSError, AttributeError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise ConfigError(
            "The results cannot be read.",
            seen=f"{type(error).__name__}: {error}",
            do='give dictionaries with "dataset" and "top1" in %, or a .jsonl file that recipes/train.py wrote',
        ) from error
    return [line for i, (run, line) in enumerate(runs) if run not in [other for other, _ in runs[:i]]]


def _recipe(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line["recipe"].items() if key not in ("seed", "data_seed")}


def _run(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells one run from another: recipe and seeds; without a recipe, everything."""
    return {"recipe": line["recipe"]} if line.get("recipe") else dict(line)


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
    if not all(map(math.isfinite, [*values, float(top5 or 0)])):
        raise ValueError(f"not a finite accuracy on {dataset}")
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    own, mean = round(values[0], 2), round(statistics.mean(values), 2)
    return Score(dataset, split, own, top5 and round(float(top5), 2), len(values), mean, round(deviation, 2))


def _draw(folder: Path, config: BNOnlyConfig, tensors: Mapping[str, Tensor]) -> str | None:
    """Draw the histogram of gamma into a folder; return its name, or None where there is nothing to draw it with."""
    gammas = {name: tensors[name].float().numpy() for name in parts(config, tensors)["gamma"] if tensors[name].numel()}
    try:
        from matplotlib.figure import Figure
    except ImportError:
        warnings.warn("No picture in the model card: pip install 'bn-affine-adapters[plots]'", stacklevel=4)
        return None
    if not gammas:
        return None
    figure = Figure(figsize=(6, 3), layout="constrained")
    gamma_histogram(figure.subplots(), gammas)
    # Without the date and the version, so that an unchanged adapter has an unchanged picture.
    figure.savefig(folder / FIGURE_NAME, dpi=120, metadata={"Software": None})
    return FIGURE_NAME
