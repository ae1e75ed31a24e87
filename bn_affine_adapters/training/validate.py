"""Measure a saved adapter's accuracy: rebuild its network, verify it, run a test split through it.

    bn-adapters validate [ADAPTER] [dataset=digits] [key=value ...] [--json]

ADAPTER is a folder, a compact file or a Hub id; image size, mean and std are its own. One on pretrained weights that
does not name them on the Hub needs pretrained_file=FILE or pretrained=true.
Several processes: accelerate launch -m bn_affine_adapters.training.validate ADAPTER [key=value ...]
Prints a summary, or with --json one JSON line.

Example:
  bn-adapters validate runs/digits/adapter

Keys with their defaults and ranges:
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..sharing.results import strict_json
from .options import AdapterOptions
from .scripts import accuracy_text, as_the_adapter_counts, data_options, load_adapter, run_script
from .scripts import read_options as read
from .tables import text_table

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Options(AdapterOptions):
    """Every key: the adapter, its base if it has one, and the data."""

    precision: str = "no"


def read_options(arguments: list[str]) -> Options:
    """Merge the adapter's own data configuration with the key=value arguments."""
    return read(arguments, Options, "bn-adapters validate", __doc__, data_options)


def run(options: Options) -> dict[str, Any]:
    """Rebuild, verify, evaluate; return the accuracy, on which images, and the adapter's seed."""
    import torch
    from accelerate import Accelerator

    from ..norms.copies import evaluation_copy
    from .feed import Feed, accuracy

    accelerator = Accelerator(mixed_precision=options.precision)
    feed = Feed(options, accelerator)
    model = load_adapter(options, feed).to(memory_format=feed.format)
    with torch.inference_mode():
        scores = accuracy(evaluation_copy(model), feed)
    seed = model.peft_config[model.active_adapter].seed
    tested = {"split": feed.test.name, "images": len(feed.test), "seed": seed}
    return {**{k: round(v, 4) for k, v in scores.items()}, **tested}


def sample(adapter: str, dataset: str, count: int) -> tuple["Tensor", list[tuple["Tensor", "Tensor"]]]:
    """Return images of a data set's training split without labels, and the batches (images, labels) of its test split.

    They are prepared as the adapter says.

    Raises:
        DataError: there is no such data set, or it has other classes than the adapter.
    """
    from accelerate import Accelerator

    from .feed import Feed

    options = read_options([adapter, f"dataset={dataset}", "channels_last=false"])
    feed = Feed(options, Accelerator(cpu=True))
    as_the_adapter_counts(options, feed)
    test = [(batch.images[: batch.global_count], batch.labels[: batch.global_count]) for batch in feed.evaluation()]
    return feed.unlabelled(count), test


def command(arguments: list[str]) -> None:
    """Measure as the arguments ask; print a summary, or with ``--json`` the result line."""
    options = read_options([word for word in arguments if word != "--json"])
    result = run(options)
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(strict_json(result) if "--json" in arguments else summary(options, result))


def summary(options: Options, result: dict[str, Any]) -> str:
    """Return what a person wants to know."""
    weights = "pretrained weights" if result["seed"] is None else f"the weights of seed {result['seed']}"
    accuracy = accuracy_text(options.dataset, result["split"], result["top1"], result["images"])
    return text_table([("accuracy", accuracy), ("adapter", f"{options.adapter}, on {weights}, verified")])


def main() -> None:
    """Run from the command line."""
    run_script(command)


if __name__ == "__main__":
    main()
