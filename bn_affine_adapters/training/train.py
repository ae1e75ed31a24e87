"""Train norm parameters of a network that is redrawn from a seed, and save them as an adapter.

    bn-adapters train [NAME|FILE.yaml] [key=value ...] [--json]

NAME is a recipe of `bn-adapters configs`; by default digits, scikit-learn's handwritten digits, without download.
Several processes: accelerate launch -m bn_affine_adapters.training.train [NAME|FILE.yaml] [key=value ...]
Prints a summary, or with --json one JSON line: the recipe, seeds, versions, accuracy, seconds. The line is in
OUTPUT/result.json too.

Example:
  bn-adapters train digits epochs=10 output_dir=runs/short

Keys with their defaults and ranges:
"""

import atexit
import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BNAdapterError, ConfigError, LostProcessError, OutputFolderError, reading
from ..sharing.folder import SCRATCH, check_space, try_writing, write_file, writing, written_whole
from ..sharing.results import RESULTS_NAME, strict_json
from . import recipe as recipes
from .lines import RESULT, append, append_once, recorded_in
from .lock import NAME as LOCK
from .lock import locked
from .recipe import CHECKPOINT, CONFIGS, Recipe, help_text, members, recorded, run_key
from .scripts import accuracy_text, check_readable, cores, provenance, run_script
from .stopping import Stopping
from .tables import text_table

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from .loop import Replicate, Training

DEFAULT = CONFIGS / "digits.yaml"


def read_recipe(arguments: list[str]) -> Recipe:
    """Return the recipe that the command line asks for."""
    return recipes.read_recipe(arguments, DEFAULT)


def train(recipe: Recipe) -> "list[Replicate]":
    """Train, evaluate and save; return the replicates, each with its result line.

    Raises:
        BNAdapterError: it cannot be done, or diverged; the disk is full; another process is lost.
        SystemExit: a signal, or the end of the launcher, stopped it, after it wrote a checkpoint.
    """
    stopping = Stopping()  # before torch and the data are read: the launcher may die while they are
    from .loop import build, fit, prepare
    from .network import check_buildable

    check_buildable(recipe)
    accelerator = start(recipe)
    full_disk = writing(Path("the log or a file of the tracker"), full_disk_alone=True)
    with naming_lost_process(recipe, accelerator), full_disk, alone(recipe, accelerator):
        replicates = build(recipe, accelerator)
        check_room(recipe, replicates)
        announce(recipe, replicates[0], accelerator)
        training = prepare(recipe, accelerator, replicates)
        training.stopping = stopping
        with stopping:
            fit(training)
            finish(training)
        with redirect_stdout(sys.stderr):
            accelerator.end_training()
    return replicates


def finish(training: "Training") -> None:
    """Save what was trained, and write the result lines."""
    accelerator = training.accelerator
    training.rounding.round_()
    for replicate in training.replicates:
        replicate.result = result_line(replicate, training)
        if accelerator.is_main_process:
            # Without the autocast that Accelerate has put around it, which would be saved with it.
            save(accelerator.unwrap_model(replicate.network, keep_fp32_wrapper=False), replicate)
            write_result(replicate, training.recipe)


@contextmanager
def naming_lost_process(recipe: Recipe, accelerator: "Accelerator") -> Iterator[None]:
    """Turn what gloo and NCCL say of a process that has ended, or does not answer, into LostProcessError."""
    try:
        yield
    except RuntimeError as error:
        words = ("gloo", "nccl", "timed out", "timeout", "connection", "broken pipe")
        if accelerator.num_processes == 1 or not any(word in str(error).lower() for word in words):
            raise
        raise LostProcessError(
            f"Another of the {accelerator.num_processes} processes has ended, or not answered for "
            f"{recipe.timeout:g} s.",
            seen=str(error).splitlines()[0],
            do="look at its output, then the same command with resume=true; timeout=SECONDS waits longer",
        ) from error


@contextmanager
def alone(recipe: Recipe, accelerator: "Accelerator") -> Iterator[None]:
    """Keep other runs out of the output folders, for all processes; refuse those that cannot be used to the end."""
    from accelerate.utils import broadcast_object_list

    with ExitStack() as stack:
        refusal = None
        if accelerator.is_main_process:
            try:
                check_output(recipe)  # before the folder is swept, and again, in case another run has just ended
                stack.enter_context(locked(Path(recipe.output_dir)))
                check_output(recipe)
                check_resumable(recipe)
                for member in members(recipe) if recipe.replicates > 1 else []:
                    stack.enter_context(locked(Path(member.output_dir)))
                try_files(recipe)
            except BNAdapterError as error:
                refusal = error
        (refusal,) = broadcast_object_list([refusal])
        if refusal:
            raise refusal
        yield


def start(recipe: Recipe) -> "Accelerator":
    """Return the accelerator; set the threads and the seed of this process."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, set_seed

    accelerator = Accelerator(
        mixed_precision=recipe.precision,
        log_with=recipe.tracker,
        project_dir=recipe.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.timeout))],
    )
    torch.set_num_threads(recipe.threads or max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    set_seed(recipe.data_seed)
    return accelerator


def check_output(recipe: Recipe) -> None:
    """Raise OutputFolderError if the folder holds something, unless asked to overwrite or resume."""
    output = Path(recipe.output_dir)
    with reading(output):
        names = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    names = [name for name in names if name != LOCK and not name.startswith(SCRATCH)]
    if not (recipe.overwrite or recipe.resume) and names:
        raise OutputFolderError(
            f"{output} exists and is not empty.",
            seen=", ".join(names[:5]),
            do=_how_to_go_on(output),
        )


def _how_to_go_on(output: Path) -> str:
    saved = output / "adapter"
    if not saved.is_dir():
        return "add resume=true to go on from a checkpoint, overwrite=true to begin again, or another output_dir="
    use = shlex.join(["bn-adapters", "validate", str(saved)])
    return f"{use} measures what was trained; to train again, add overwrite=true or another output_dir="


def try_files(recipe: Recipe) -> None:
    """Raise FileError now if a file could not be written at the end of the run, or cannot be read when it is needed."""
    check_readable(recipe.pretrained_file)
    if recipe.results:
        try_writing(Path(recipe.results), replaced=False)
    for member in members(recipe):
        output = Path(member.output_dir)
        try_writing(output / RESULT, replaced=True)
        for saved in (output / "adapter", output / "network"):
            if saved.exists():
                try_writing(saved / RESULTS_NAME, replaced=True)


def check_room(recipe: Recipe, replicates: "list[Replicate]") -> None:
    """Raise NoSpaceError now if what is written in the end, beside what is there before, has no room."""
    sizes = [p.nbytes for each in replicates for p in each.network.parameters() if p.requires_grad]
    copies = 1 + (recipe.checkpoint_every + recipe.checkpoint_every_steps > 0)
    check_space(Path(recipe.output_dir), copies * sum(sizes))


def check_resumable(recipe: Recipe) -> None:
    """Raise CheckpointError or ConfigError if a run cannot resume, or would replace what another recipe trained."""
    if not recipe.resume:
        return
    if (checkpoint := Path(recipe.output_dir, CHECKPOINT)).exists():
        from .checkpoint import check_recipe, read_checkpoint

        check_recipe(checkpoint, read_checkpoint(checkpoint), recipe)
        return
    if recipe.overwrite:
        return
    for member in members(recipe):
        ours, output = recorded(member), Path(member.output_dir)
        for path in (output / RESULT, output / "adapter" / RESULTS_NAME, output / "network" / RESULTS_NAME):
            theirs = recorded_in(path)
            if theirs and run_key(theirs) != run_key(json.loads(strict_json(ours))):
                differing = [key for key in ours if key in theirs and ours[key] != theirs[key]]
                raise ConfigError(
                    f"{output} holds the result of another recipe, and no checkpoint.",
                    seen=", ".join(f"{key}: {theirs[key]!r} -> {ours[key]!r}" for key in differing),
                    do="choose another output_dir=, or overwrite=true",
                )


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
        **({"left_out": replicate.feed.left_out} if replicate.feed.left_out else {}),
        "trained": trained,
        "parameters": total,
        **({"skipped_steps": training.skipped} if recipe.skip_nonfinite_steps else {}),
        "seconds": round(seconds, 2),
        "images_per_second": round(replicate.feed.steps * recipe.batch_size * recipe.epochs / max(seconds, 1e-9), 1),
        **ran_on,
        "recipe": recorded(recipe),
        "command": recipes.command(recipe, read_recipe([])),
        "first_losses": [round(loss, 6) for loss in replicate.first_losses],
        "epochs": [{key: round(value, 4) for key, value in entry.items()} for entry in epochs],
    }


def save(network: "nn.Module", replicate: "Replicate") -> None:
    """Write the adapter, or a network that trained whole as a timm checkpoint, with the result line for its card."""
    from ..deploy.exporting import export_network
    from ..model.peft_model import BNOnlyPeftModel

    result, output = replicate.result, Path(replicate.recipe.output_dir)
    kind = "adapter" if isinstance(network, BNOnlyPeftModel) else "network"
    with written_whole(output / kind) as files:
        if isinstance(network, BNOnlyPeftModel):
            network.save_pretrained(files)
        else:
            export_network(network, replicate.config, files)
        (saved,) = files.glob("*.safetensors")
        result |= {f"{kind}_bytes": saved.stat().st_size}
        (files / RESULTS_NAME).write_text(strict_json([result]) + "\n")
    result |= {kind: str(output / kind)}


def write_result(replicate: "Replicate", recipe: Recipe) -> None:
    """Keep the result line in the output folder, and at the end of a file of results.

    A run that was killed after it had appended its line, and resumes, appends no second one.
    """
    result = replicate.result
    if recipe.results:
        line = {key: value for key, value in result.items() if key not in ("adapter", "network")}
        append_once(Path(recipe.results), line) if recipe.resume else append(Path(recipe.results), line)
    write_file(Path(replicate.recipe.output_dir, RESULT), (strict_json(result) + "\n").encode())


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
        print(__doc__, help_text(Recipe()), sep="\n")
        return
    from accelerate import PartialState

    replicates = train(read_recipe([word for word in arguments if word != "--json"]))
    if PartialState().is_main_process:
        for replicate in replicates:
            print(strict_json(replicate.result) if "--json" in arguments else summary(replicate))


def main() -> None:
    """Run from the command line."""
    run_script(command)


if __name__ == "__main__":
    main()
