"""Train norm parameters of a network that is redrawn from a seed, and save them as an adapter.

    bn-adapters train [NAME|FILE.yaml] [key=value ...] [--json]

NAME is a recipe of `bn-adapters configs`; by default digits, scikit-learn's handwritten digits, without download.
Several processes: accelerate launch -m bn_affine_adapters.training.train [NAME|FILE.yaml] [key=value ...]
Prints a summary, or with --json one JSON line: the recipe, seeds, versions, accuracy, seconds. The line is in
OUTPUT/result.json too.

Example:
  bn-adapters train digits epochs=10 output_dir=runs/short

Keys with their defaults and the range of numbers:
"""

import atexit
import json
import os
import shlex
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OutputFolderError, check_choice
from ..sharing.results import RESULTS_NAME
from . import recipe as recipes
from .recipe import CONFIGS, Recipe, help_text, recorded
from .scripts import accuracy_text, cores, provenance, run_script
from .tables import text_table

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from ..adapter.method import BNOnlyConfig
    from .loop import Replicate, Training

DEFAULT = CONFIGS / "digits.yaml"


def read_recipe(arguments: list[str]) -> Recipe:
    """Return the recipe that the command line asks for."""
    return recipes.read_recipe(arguments, DEFAULT)


def train(recipe: Recipe) -> "list[Replicate]":
    """Train, evaluate and save; return the replicates, each with its result line."""
    from .loop import build, fit, prepare

    accelerator = start(recipe)
    replicates = build(recipe, accelerator)
    Path(recipe.output_dir).mkdir(parents=True, exist_ok=True)
    announce(recipe, replicates[0], accelerator)
    training = prepare(recipe, accelerator, replicates)
    fit(training)
    for replicate in replicates:
        replicate.result = result_line(replicate, training)
        if accelerator.is_main_process:
            # Without the autocast that Accelerate has put around it, which would be saved with it.
            network = accelerator.unwrap_model(replicate.network, keep_fp32_wrapper=False)
            saved = save(network, replicate.config, Path(replicate.recipe.output_dir))
            write_result(replicate, saved, recipe.results)
    with redirect_stdout(sys.stderr):
        accelerator.end_training()
    return replicates


def start(recipe: Recipe) -> "Accelerator":
    """Return the accelerator; set the threads and the seed of this process; refuse an output folder in use."""
    import torch
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import set_seed

    trackers = [str(tracker) for tracker in get_available_trackers()]
    check_choice("tracker", recipe.tracker, (None, "all", *trackers))  # Accelerate itself trains without a missing one
    accelerator = Accelerator(mixed_precision=recipe.precision, log_with=recipe.tracker, project_dir=recipe.output_dir)
    torch.set_num_threads(recipe.threads or max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    check_output(recipe)
    accelerator.wait_for_everyone()  # no process creates the folder before all have looked
    set_seed(recipe.data_seed)
    return accelerator


def check_output(recipe: Recipe) -> None:
    """Raise OutputFolderError if the folder holds something, unless asked to overwrite or resume."""
    output = Path(recipe.output_dir)
    if not (recipe.overwrite or recipe.resume) and output.is_dir() and any(output.iterdir()):
        raise OutputFolderError(
            f"{output} exists and is not empty.",
            seen=", ".join(sorted(path.name for path in output.iterdir())[:5]),
            do=_how_to_go_on(output),
        )


def _how_to_go_on(output: Path) -> str:
    saved = output / "adapter"
    if not saved.is_dir():
        return "add resume=true to go on from a checkpoint, overwrite=true to begin again, or another output_dir="
    use = shlex.join(["bn-adapters", "validate", str(saved)])
    return f"{use} measures what was trained; to train again, add overwrite=true or another output_dir="


def announce(recipe: Recipe, first: "Replicate", accelerator: "Accelerator") -> None:
    """Tell what trains, and start the trackers."""
    from .network import count

    shown = "{}: {:,} of {:,} parameters train".format(recipe.condition, *count(first.network))
    accelerator.print(shown, file=sys.stderr)
    if recipe.lean:
        accelerator.print(first.network.lean, file=sys.stderr)
    if recipe.tracker:
        with redirect_stdout(sys.stderr):
            accelerator.init_trackers("bn_affine_adapters", config={k: str(v) for k, v in recorded(recipe).items()})
        atexit.register(leave_stdout)  # after theirs, hence called before


def leave_stdout() -> None:
    """Let what trackers say when the process ends go to stderr: stdout is for the result."""
    sys.stdout.flush()
    sys.stdout = sys.stderr


def result_line(replicate: "Replicate", training: "Training") -> dict[str, Any]:
    """Return the result line of a finished run; its seconds are its share of those that trained together."""
    from .network import count

    recipe, epochs, together = replicate.recipe, replicate.epochs, len(training.replicates)
    tested = replicate.feed.test.name
    trained, total = count(replicate.network)
    seconds = training.seconds / together
    ran_on = provenance(training.accelerator)
    ran_on["hardware"]["side_by_side"] = together
    return {
        **{key: round(value, 4) for key, value in epochs[-1].items()},
        **({"split": tested} if tested != recipe.test_split else {}),
        "trained": trained,
        "parameters": total,
        "seconds": round(seconds, 2),
        "images_per_second": round(replicate.feed.steps * recipe.batch_size * recipe.epochs / max(seconds, 1e-9), 1),
        **ran_on,
        "recipe": recorded(recipe),
        "command": recipes.command(recipe, read_recipe([])),
        "first_losses": [round(loss, 6) for loss in replicate.first_losses],
        "epochs": [{key: round(value, 4) for key, value in entry.items()} for entry in epochs],
    }


def save(network: "nn.Module", config: "BNOnlyConfig", output: Path) -> Path:
    """Write the adapter, or a network that trained whole as a timm checkpoint; return the file of tensors."""
    from ..deploy.exporting import export_network
    from ..model.peft_model import BNOnlyPeftModel

    if isinstance(network, BNOnlyPeftModel):
        network.save_pretrained(output / "adapter")
        return output / "adapter" / "adapter_model.safetensors"
    shutil.rmtree(output / "network", ignore_errors=True)
    return export_network(network, config, output / "network") / "model.safetensors"


def write_result(replicate: "Replicate", saved: Path, results: str | None) -> None:
    """Keep the result line beside what was saved, in the output folder, and at the end of a file of results."""
    kind = saved.parent.name  # "adapter", or "network" where the whole of it trained
    result = replicate.result
    result |= {f"{kind}_bytes": saved.stat().st_size}
    Path(saved.parent, RESULTS_NAME).write_text(json.dumps([result]) + "\n")  # for its model card
    if results:
        with open(results, "a") as file:
            file.write(json.dumps(result) + "\n")
    result |= {kind: str(saved.parent)}
    Path(replicate.recipe.output_dir, "result.json").write_text(json.dumps(result) + "\n")


def summary(replicate: "Replicate") -> str:
    """Return what a person wants to know of a finished run."""
    result, recipe, feed = replicate.result, replicate.recipe, replicate.feed
    kind = "adapter" if "adapter" in result else "network"
    share = 100 * result["trained"] / result["parameters"]
    rows = {
        "accuracy": accuracy_text(recipe.dataset, feed.test.name, result["top1"], len(feed.test)),
        "trained": f"{result['trained']:,} of {result['parameters']:,} parameters ({share:.2f} %)",
        kind: f"{result[kind]}, {result[f'{kind}_bytes'] / 1000:,.1f} kB",
        "time": f"{result['seconds']:.1f} s",
    }
    if kind == "adapter":
        rows["next"] = recipes.validate_command(recipe, result["adapter"])
    return text_table([*rows.items()])


def command(arguments: list[str]) -> None:
    """Train as the arguments ask; print the summary, or with ``--json`` the result line, of every replicate."""
    if {"-h", "--help"} & {*arguments}:
        print(__doc__, help_text(), sep="\n")
        return
    from accelerate import PartialState

    replicates = train(read_recipe([word for word in arguments if word != "--json"]))
    if PartialState().is_main_process:
        for replicate in replicates:
            print(json.dumps(replicate.result) if "--json" in arguments else summary(replicate))


def main() -> None:
    """Run from the command line."""
    run_script(command)


if __name__ == "__main__":
    main()
