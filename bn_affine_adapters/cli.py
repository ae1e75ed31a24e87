"""The command line: bn-adapters inspect | verify | predict | push | card | export | prune | diff, and what trains.

Exit codes: 0; 1 where two adapters, or a network and its fingerprint, differ; 2 where something could not be done;
3 where training diverged; 130 and 143 where Ctrl-C or SIGTERM stopped it.
"""

import csv
import io
import json
import math
import signal
import time
from collections.abc import Callable
from difflib import get_close_matches
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .errors import (
    DIVERGED,
    BNAdapterError,
    ConfigError,
    DataError,
    DivergedError,
    FingerprintError,
    OutputFolderError,
    printable,
)
from .settings import MAX_PARAMETERS, Settings
from .training.advice import as_command_line
from .training.recipe import config_files
from .training.tables import text_table
from .training.terminal import naming_files, printing

COLUMNS = 20  # of a table of differences; a layer of a network has fewer tensors

# What needs torch, or takes long to import, is imported by the command that needs it.
if TYPE_CHECKING:
    from .model.peft_model import BNOnlyPeftModel
    from .model.prediction import Prediction
    from .sharing.contents import Stored


class _Commands(click.Group):
    def main(self, *args: Any, **kwargs: Any) -> Any:
        with printing(status=2):
            return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with naming_files():
                return super().invoke(ctx)
        except BNAdapterError as error:
            click.echo(as_command_line(error, keys=ctx.invoked_subcommand in _SCRIPTS), err=True)
            ctx.exit(1 if isinstance(error, FingerprintError) else DIVERGED if isinstance(error, DivergedError) else 2)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="bn-affine-adapters")
def main() -> None:
    """Train, look at, verify, use and share adapters of norm layers.

    ADAPTER is a folder or a Hub id. The token is that of `hf auth login`, or HF_TOKEN.

    \b
    Example:
      bn-adapters inspect me/cifar10-resnet110-bn-only
    """


def _options(*options: Callable) -> Callable:
    return lambda command: reduce(lambda done, option: option(done), reversed(options), command)


_where = _options(
    click.option("--revision", help="A branch, tag or commit on the Hub."),
    click.option("--subfolder", help="Where in the folder or repository the adapter lies."),
    click.option("--local-files-only", is_flag=True, help="Take what is in the cache, and ask no server."),
)
_network = _options(
    _where,
    click.option(
        "--base",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="A .safetensors file with the pretrained weights, for an adapter that does not name them on the Hub.",
    ),
    click.option("--max-parameters", default=MAX_PARAMETERS, show_default=True, help="Refuse a larger network."),
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def _load(adapter: str, base: Path | None, verify: str = "full", **where: Any) -> "BNOnlyPeftModel":
    from .adapter.limits import bounded
    from .adapter.rebuild import create_pretrained
    from .model.loading import load_bn_only_model
    from .sharing.compact import read_adapter
    from .sharing.hub import fetch

    network = None
    if base is not None:
        config = read_adapter(fetch(adapter, **where), Settings)
        with bounded(config, where["max_parameters"]):
            network = create_pretrained(str(config.architecture), config.model_args, base)
    return load_bn_only_model(adapter, network, verify=verify, **where)  # type: ignore[arg-type]  # click's Choice


def _read(folder: Path) -> "tuple[Path, Settings, dict[str, Stored]]":
    from .sharing.contents import read_tensors
    from .sharing.folder import check_files, read_settings

    check_files(folder)
    config = read_settings(folder)
    return folder, config, read_tensors(folder, config)


def _table(rows: list[list[Any]]) -> None:
    click.echo(text_table([["" if cell is None else printable(str(cell), 100) for cell in row] for row in rows]))


def _print_json(value: Any) -> None:
    """Print JSON that every parser reads: a number that is not finite is null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    click.echo(json.dumps(finite(value), allow_nan=False))


_SCRIPTS: set[str] = set()  # they take key=value arguments


def _script(name: str, about: str, part: str = "training", extra: str = "train", **how: Any) -> None:
    """Make a script, which `python -m bn_affine_adapters.PART.NAME` runs too, a command."""
    _SCRIPTS.add(name)

    # The script has a --help of its own.
    @main.command(name, help=about, context_settings={"ignore_unknown_options": True, "help_option_names": []})
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def run(arguments: tuple[str, ...]) -> None:
        from .training.scripts import installed

        try:
            with installed(extra):
                import_module(f".{part}.{name.replace('-', '_')}", __package__).command(list(arguments), **how)
        except KeyboardInterrupt:  # click would end with 1
            raise SystemExit(128 + signal.SIGINT) from None


_script("train", "Train norm parameters by a recipe, and save them as an adapter.")
_script("validate", "Measure an adapter's accuracy on a test split.")
_script("sweep", "Train many recipes, as a YAML file lists them.", prog_name="bn-adapters sweep")
_script("compare", "Compare methods of fine-tuning on several tasks.", prog_name="bn-adapters compare")
_script("tune", "Choose hyper-parameters with Optuna.", extra="tune", prog_name="bn-adapters tune")
_script("analyse", "Analyse gamma, beta and dead activations of a trained network.", "study")
_script(
    "serve",
    "Serve adapters of one network over HTTP, with Ray Serve.",
    "deploy.serving",
    extra="serve",
    prog_name="bn-adapters serve",
)
_script(
    "gpu-check", "Check this package on a GPU, and measure it there.", "study.gpu", prog_name="bn-adapters gpu-check"
)


@main.group(invoke_without_command=True)
@click.pass_context
def configs(context: click.Context) -> None:
    """List the YAML files that come with the package: recipes, sweeps/NAME, tune/NAME.

    `bn-adapters train NAME` finds a recipe by its name, `bn-adapters sweep NAME` a sweep, `bn-adapters tune NAME` a
    tuning plan; a file that is here comes first.

    \b
    Example:
      bn-adapters configs copy cifar10 mine.yaml && bn-adapters train mine.yaml
    """
    if context.invoked_subcommand is None:
        for name, path in config_files().items():
            first = path.read_text(encoding="utf-8").splitlines()[0]
            click.echo(f"{name:24}  {first.lstrip('# ')}")


def _config_text(name: str) -> str:
    files = config_files()
    if name not in files:
        near = ", ".join(get_close_matches(name, files)) or "no name is near it"
        raise ConfigError(f"There is no packaged file {name}.", seen=near, do="bn-adapters configs")
    return files[name].read_text(encoding="utf-8")


@configs.command()
@click.argument("name")
def show(name: str) -> None:
    """Print a file."""
    click.echo(_config_text(name), nl=False)


@configs.command()
@click.argument("name")
@click.argument("file", required=False, type=click.Path(path_type=Path))
def copy(name: str, file: Path | None) -> None:
    """Copy a file here, or to FILE, to change it; nothing is overwritten."""
    from .sharing.folder import write_file

    text, file = _config_text(name), file or Path(f"{Path(name).name}.yaml")
    if file.exists():
        do = f"bn-adapters configs copy {name} another.yaml"
        raise OutputFolderError(f"{file} exists.", seen=str(file), do=do)
    write_file(file, text.encode())
    click.echo(str(file))


@main.command("architectures")
@click.argument("pattern", default="*")
@_json
def architectures_(pattern: str, as_json: bool) -> None:
    """Show what an adapter of timm's architectures trains, and how large its file is.

    \b
    Example:
      bn-adapters architectures "convnext*"
    """
    from .study.architectures import architectures, describe, table

    found = map(describe, architectures(pattern))
    if as_json:
        for each in found:
            _print_json(each._asdict() | {"share": each.share})
    else:
        _table(table(found))


@main.command()
@click.argument("adapter")
@_where
@_json
def inspect(adapter: str, as_json: bool, **where: Any) -> None:
    """Show what an adapter holds, without building its network.

    \b
    Example:
      bn-adapters inspect runs/digits/adapter --json
    """
    from .sharing.compact import compact_file
    from .sharing.contents import describe, describe_compact
    from .sharing.hub import fetch

    compact = compact_file(folder := fetch(adapter, **where))
    found = describe_compact(compact) if compact else describe(*_read(folder))
    if as_json:
        _print_json(found)
        return
    sizes, gamma, files, made_with = (found.pop(key, {}) for key in ("contents", "gamma", "files", "versions"))
    _table([[key, value] for key, value in found.items()])
    click.echo()
    if not compact:
        _table([["made with", "version"], *([name, number] for name, number in made_with.items())])
        click.echo()
        _table([["", "tensors", "values", "bytes"], *([part, *size.values()] for part, size in sizes.items())])
        click.echo()
        if gamma:
            _table([["gamma", *gamma], ["", *gamma.values()]])
        else:
            click.echo("gamma: none in the file; one that does not train is as the seed draws it")
        click.echo()
    _table([["file", "bytes"], *([name, size] for name, size in files.items())])


@main.command()
@click.argument("adapter")
@_network
@click.option("--sampled", is_flag=True, help="Compare at most 4,096 values a tensor.")
@_json
def verify(adapter: str, sampled: bool, as_json: bool, **where: Any) -> None:
    """Rebuild an adapter's network and compare every frozen value with its fingerprint.

    \b
    Example:
      bn-adapters verify me/cifar10-resnet110-bn-only --revision v1
    """
    from .adapter.rebuild import frozen_tensors

    start = time.perf_counter()
    model = _load(adapter, verify="sampled" if sampled else "full", **where)
    seconds = time.perf_counter() - start
    config = model.peft_config[model.active_adapter]
    frozen = [tensor for group in frozen_tensors(model.get_base_model(), config) for tensor in group.values()]
    found = {
        "verified": "sampled" if sampled else "full",
        "tensors": len(frozen),
        "values": sum(tensor.numel() for tensor in frozen),
        "fingerprint": config.backbone_fingerprint_sampled if sampled else config.backbone_fingerprint,
        "seconds": round(seconds, 3),
    }
    if as_json:
        _print_json(found)
    else:
        _table([[key, value] for key, value in found.items()])


@main.command("predict")
@click.argument("adapter")
@click.argument("images", nargs=-1, required=True, type=click.Path())
@_network
@click.option("--top-k", type=click.IntRange(min=1), default=5, show_default=True, help="How many classes.")
@click.option("--out", type=click.Path(path_type=Path), help="Write a CSV file: image, rank, label, probability.")
@_json
def predict_(adapter: str, images: tuple[str, ...], top_k: int, out: Path | None, as_json: bool, **where: Any) -> None:
    """Classify images, or all that are in a folder, with the adapter's own preparation and class names.

    An image that cannot be read is named on stderr; the others are classified, and the exit code is 2.

    \b
    Example:
      bn-adapters predict me/cifar10-resnet110-bn-only cat.png photos --top-k 3 --out predictions.csv
    """
    from .model.images import image_files
    from .model.prediction import predict_each
    from .sharing.folder import try_writing

    if out is not None:
        try_writing(out, replaced=True)
    found: dict[str, list[Prediction]] = {}
    failed = False
    for image, classes in predict_each(_load(adapter, **where), image_files(images), top_k):
        if isinstance(classes, DataError):
            click.echo(f"DataError: {classes}", err=True)
            failed = True
            continue
        found[image] = classes
        if not as_json and out is None:
            click.echo(printable(image))
            _table([[f"  {best.probability:.4f}", best.label] for best in classes])
    if out is not None:
        _write_csv(out, found)
    if as_json:
        _print_json({image: [best._asdict() for best in classes] for image, classes in found.items()})
    if failed:
        click.get_current_context().exit(2)


def _write_csv(out: Path, found: "dict[str, list[Prediction]]") -> None:
    from .model.prediction import Prediction
    from .sharing.folder import write_file

    table = csv.writer(file := io.StringIO(newline=""))
    table.writerow(["image", "rank", *Prediction._fields])
    for image, classes in found.items():
        table.writerows([image, rank, *best] for rank, best in enumerate(classes, 1))
    write_file(out, file.getvalue().encode("utf-8", "surrogateescape"))  # a name may be of bytes that are no text


_about = _options(
    click.option("--license", help="An identifier of the Hub, e.g. apache-2.0; none is stated by default."),
    click.option(
        "--results", type=click.Path(exists=True, dir_okay=False), help="A .jsonl file of replicates' results."
    ),
    click.option("--dataset", "datasets", multiple=True, help="The Hub id of training data; may be repeated."),
)


@main.command()
@click.argument("folder", type=click.Path(exists=True))
@click.argument("repo_id")
@click.option("--private/--public", default=None, help="Of a new repository.")
@click.option("--revision", help="The branch, made if there is none.")
@click.option("--tag", help="Put this new tag on the commit.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead.")
@click.option("--message", "commit_message", help="Of the commit.")
@click.option("--no-card", "card", flag_value=False, default=True, help="Leave the card on the Hub as it is.")
@_about
def push(folder: str, repo_id: str, results: str | None, **options: Any) -> None:
    """Push an adapter's folder, or a compact file, with a model card, in one commit.

    \b
    Example:
      bn-adapters push runs/digits/adapter me/digits-bn-only --private --tag v1
    """
    from .sharing.hub import push_folder

    click.echo(push_folder(folder, repo_id, results=results or (), **options).commit_url)


@main.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.argument("repo_id")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="Where to write; by default FOLDER.")
@_about
def card(folder: str, repo_id: str, output: Path | None, results: str | None, **options: Any) -> None:
    """Write the model card that a push to REPO_ID would write.

    \b
    Example:
      bn-adapters card runs/digits/adapter me/digits-bn-only --output hub_cards/digits
    """
    from .sharing.card import write_card
    from .sharing.compact import read_adapter

    read_adapter(Path(folder), Settings)
    write_card(Path(folder), repo_id, output=output, results=results or (), **options)
    click.echo(str((output or Path(folder)) / "README.md"))


def _sample(adapter: str, dataset: str, count: int) -> Any:
    """Return unlabelled training images of a data set, and the batches of its test split."""
    from .training.scripts import installed

    with installed("train"):
        from .training.validate import sample

        return sample(adapter, dataset, count)


@main.command("export")
@click.argument("adapter")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["timm", "ln_tuning", "compact", "onnx", "pt2", "npz"]),
    default="timm",
    show_default=True,
)
@click.option("--inputs", is_flag=True, help="Of onnx and pt2: adapters are inputs, which --format npz writes.")
@click.option("--bits", type=int, default=8, show_default=True, help="Of compact, a value: 4, 6, 8 or 16.")
@click.option("--dataset", help="Of compact: fit the rounding to its training images, and print its test accuracy.")
@click.option("--qr", type=click.Path(path_type=Path), help="Of compact: a picture of the file as a QR code.")
@_network
def export_(
    adapter: str, folder: Path, form: str, inputs: bool, bits: int, dataset: str | None, qr: Path | None, **where: Any
) -> None:
    """Write a plain timm checkpoint, an adapter that PEFT alone loads on the rebuilt network, or one file.

    onnx and pt2 (torch.export) write a graph for other runtimes; with --inputs one graph serves many adapters, each an
    npz file. A compact file is for inference. Below 8 bits its rounding is fitted to 400 training images of the data
    set, whose labels are not used, or to random ones.

    \b
    Example:
      bn-adapters export me/cifar10-resnet110-bn-only plain && python -c "import bn_affine_adapters, timm;
      timm.create_model('local-dir:plain', pretrained=True)"
      bn-adapters export runs/digits/adapter digits.safetensors --format compact --qr digits.png
      bn-adapters export runs/digits/adapter backbone.onnx --format onnx --inputs
      bn-adapters export runs/digits/adapter digits.npz --format npz
    """
    from .deploy.exporting import export

    options: dict[str, Any] = {"bits": bits, "qr": qr} if form == "compact" or bits != 8 or qr else {}
    if inputs:
        options["adapter"] = "inputs"
    if dataset is not None:
        options["images"], options["test"] = _sample(adapter, dataset, 400)
    click.echo(str(export(_load(adapter, **where), folder, form, **options)))  # type: ignore[arg-type]  # click's Choice


@main.command("prune")
@click.argument("adapter")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--threshold", type=float, default=0.0, show_default=True, help="Set smaller gammas to 0 first.")
@click.option(
    "--inputs", type=click.Choice(["any", "images"]), default="any", show_default=True,
    help="Remove what is constant for any input, or for prepared images alone.",
)  # fmt: skip
@click.option("--dataset", help="Print the accuracy on its test split, before and after.")
@_network
@_json
def prune_(
    adapter: str, file: Path, dataset: str | None, as_json: bool, threshold: float, inputs: Any, **where: Any
) -> None:
    """Write a smaller network that computes the same, without channels that are constant, as a .pt2 file for PyTorch.

    torch.export.load(FILE).module()(images) runs it, without this package.

    \b
    Example:
      bn-adapters prune runs/digits/adapter digits.pt2 --threshold 0.01 --dataset digits
    """
    from .deploy.pruning import prune

    test = _sample(adapter, dataset, 1)[1] if dataset is not None else ()
    _, report = prune(_load(adapter, **where), threshold, inputs=inputs, test=test, file=file)
    if as_json:
        _print_json(vars(report))
    else:
        click.echo(f"{report}\n{file}")


@main.command()
@click.argument("one")
@click.argument("other")
@click.option("--revision", help="A branch, tag or commit of the first, on the Hub.")
@click.option("--other-revision", help="The same of the second.")
@_json
def diff(one: str, other: str, revision: str | None, other_revision: str | None, as_json: bool) -> None:
    """Compare two adapters, setting by setting and layer by layer; exits with 1 where they differ.

    \b
    Example:
      bn-adapters diff runs/digits/adapter me/digits-bn-only
    """
    from .sharing.contents import compare
    from .sharing.hub import fetch

    _, ours, tensors = _read(fetch(one, revision=revision))
    _, theirs, others = _read(fetch(other, revision=other_revision))
    settings, layers = compare(ours, tensors, theirs, others)
    if as_json:
        _print_json({"settings": settings, "layers": layers})
    else:
        columns = sorted({tensor for found in layers.values() for tensor in found})[:COLUMNS]
        if settings:
            _table([["setting", one, other], *([key, *pair] for key, pair in settings.items())])
            click.echo()
        if layers:
            _table([["largest difference", *columns], *([n, *map(found.get, columns)] for n, found in layers.items())])
            click.echo()
        differ = f"{len(settings)} settings and {len(layers)} layers differ" if settings or layers else "identical"
        click.echo(f"{differ}; {len(tensors)} tensors in the first")
    click.get_current_context().exit(1 if settings or layers else 0)


if __name__ == "__main__":
    main()
