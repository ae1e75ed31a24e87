"""Train norm parameters of a network redrawn from a seed, and save them as an adapter.

    accelerate launch recipes/train.py [--config recipes/configs/NAME.yaml] [key=value ...]

Without --config: recipes/configs/digits.yaml, scikit-learn's handwritten digits, no download. `--help` lists every key.
Prints one JSON line: the recipe, seeds, versions, accuracy, seconds; writes it to OUTPUT/result.json.
"""

import json
import math
import os
import shlex
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

# Else recipes/evaluate.py hides the library `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from bn_affine_adapters import BNAdapterError, BNOnlyConfig, BNOnlyPeftModel, get_bn_only_model, shortcut_convs
from bn_affine_adapters.config import CONDITIONS, check_keys
from bn_affine_adapters.data import check_classes
from bn_affine_adapters.errors import ConfigError, OutputFolderError
from bn_affine_adapters.feed import DataOptions, Feed, accuracy
from bn_affine_adapters.reinit import check_choice
from bn_affine_adapters.results import RESULTS_NAME
from bn_affine_adapters.runs import cores, provenance
from bn_affine_adapters.sync import sync_norms_


@dataclass
class Recipe(DataOptions):
    """Every key of a recipe; a YAML file and key=value arguments change them, in this order."""

    # The network
    model: str = "cifar_resnet14"
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False  # keep pretrained weights; needs seed=null
    pretrained_file: str | None = None  # a .safetensors file instead of timm's download
    seed: int | None = 0
    condition: str = "bn"
    weight_init: str = "kaiming_normal"
    norm_init: str | None = None
    running_statistics: str = "update"
    # The optimiser: SGD without Nesterov
    epochs: int = 160
    lr: float = 0.1
    schedule: str = "multistep"  # or "cosine"
    milestones: list[float] = field(default_factory=list)  # epochs at which lr is multiplied by lr_decay
    lr_decay: float = 0.1
    warmup_epochs: float = 0.0
    sgd_momentum: float = 0.9
    weight_decay: float = 1e-4
    # The run
    precision: str = "no"  # or bf16, fp16
    sync_norm: bool = True  # with several processes: batch statistics over all of them
    threads: int = 0  # CPU threads a process; 0: all cores over the local processes
    tracker: str | None = None  # e.g. tensorboard, wandb: any that Accelerate knows
    output_dir: str = "runs/latest"
    overwrite: bool = False
    resume: bool = False  # go on from OUTPUT/checkpoint.pt, if it is there
    checkpoint_every: int = 0  # epochs; 0: none
    eval_every: int = 1  # epochs; the last is always evaluated
    results: str | None = None  # a .jsonl file to append the result line to


DEFAULT = Path(__file__).parent / "configs" / "digits.yaml"
WHERE_ONLY = {"output_dir", "overwrite", "resume", "results", "threads", "workers", "tracker", "checkpoint_every"}


def read_recipe(arguments: list[str]) -> Recipe:
    """Merge the defaults, the YAML file after ``--config`` and the key=value arguments."""
    if "-h" in arguments or "--help" in arguments:
        print(__doc__, *(f"  {f.name}={json.dumps(getattr(Recipe(), f.name))}" for f in fields(Recipe)), sep="\n")
        raise SystemExit(0)
    try:
        file = str(DEFAULT)
        if "--config" in arguments:
            at = arguments.index("--config")
            file, arguments = arguments[at + 1], arguments[:at] + arguments[at + 2 :]
        layers = [OmegaConf.load(file), OmegaConf.from_cli(arguments)]
        for layer in layers:
            check_keys(dict(layer), {f.name for f in fields(Recipe)}, "the recipe")
        merged = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(Recipe), *layers))
        recipe = Recipe(**merged)  # type: ignore[arg-type]  # OmegaConf promises no str keys
    except (OmegaConfBaseException, OSError, IndexError) as error:
        raise ConfigError(
            "The recipe cannot be read.",
            seen=str(error).splitlines()[0],
            do="accelerate launch recipes/train.py --config recipes/configs/NAME.yaml key=value ...",
        ) from error
    check_choice("condition", recipe.condition, tuple(CONDITIONS))
    check_choice("schedule", recipe.schedule, ("multistep", "cosine"))
    if recipe.pretrained == (recipe.seed is not None):
        raise ConfigError(
            "A network is either redrawn from a seed or keeps pretrained weights.",
            seen=f"pretrained={recipe.pretrained}, seed={recipe.seed}",
            do="pretrained=true seed=null, or pretrained=false seed=0",
        )
    return recipe


def prepare_output(recipe: Recipe) -> Path:
    """Return the output folder, refusing one that holds something unless asked to overwrite or resume."""
    output = Path(recipe.output_dir)
    if not (recipe.overwrite or recipe.resume) and output.is_dir() and any(output.iterdir()):
        raise OutputFolderError(
            f"{output} exists and is not empty.",
            seen=", ".join(sorted(path.name for path in output.iterdir())[:5]),
            do="choose another output_dir=, or overwrite=true, or resume=true",
        )
    return output


def build_model(recipe: Recipe, feed: Feed) -> BNOnlyPeftModel:
    """Create the timm network, redraw or load it, and wrap its norm layers as the condition asks."""
    args = {"num_classes": len(feed.label_names), **recipe.model_args}
    check_classes(feed.train, args["num_classes"])
    overlay = {"pretrained_cfg_overlay": {"file": recipe.pretrained_file}} if recipe.pretrained_file else {}
    network = timm.create_model(recipe.model, pretrained=recipe.pretrained, **args, **overlay)
    config = BNOnlyConfig(
        seed=recipe.seed,
        weight_init=recipe.weight_init,
        norm_init=recipe.norm_init,
        running_statistics=recipe.running_statistics,
        model_args=args,
        label_names=list(feed.label_names),
        data_config={
            "input_size": [3, recipe.image_size, recipe.image_size],
            "mean": recipe.mean,
            "std": recipe.std,
            "interpolation": "bilinear",
            "crop_pct": recipe.test_crop if recipe.streaming else 1.0,
            "crop_mode": "center" if recipe.streaming else "squash",  # as the images were prepared here
        },
        extra_trainable_modules=shortcut_convs(network) if "shortcut" in recipe.condition else [],
        **CONDITIONS[recipe.condition],
    )
    return get_bn_only_model(network, config)


def lr_at(recipe: Recipe, step: int, steps: int) -> float:
    """Return the learning rate of an optimiser step, ``steps`` of which make an epoch."""
    warmup = recipe.warmup_epochs * steps
    factor = min(1.0, step / warmup) if warmup else 1.0
    if recipe.schedule == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * step / (recipe.epochs * steps)))
    drops = sum(step >= milestone * steps for milestone in recipe.milestones)
    return recipe.lr * factor * recipe.lr_decay**drops


def train_epoch(
    model: nn.Module, optimizer: Any, feed: Feed, recipe: Recipe, accelerator: Accelerator, epoch: int
) -> list[float]:
    """Train for one epoch; return the mean loss of every step, over all processes."""
    model.train()
    losses: list[torch.Tensor] = []
    bar = tqdm(
        feed.epoch(epoch),
        desc=f"epoch {epoch + 1}/{recipe.epochs}",
        total=feed.steps * recipe.accumulation,
        unit="batch",
        mininterval=1.0,
        leave=False,
        disable=not accelerator.is_main_process,
    )
    for index, batch in enumerate(bar):
        step, part = divmod(index, recipe.accumulation)
        last = part == recipe.accumulation - 1
        with nullcontext() if last else accelerator.no_sync(model):
            loss = F.cross_entropy(model(batch.images), batch.labels, reduction="sum") / batch.global_count
            # Processes average their gradients; the gradient of the global mean is the sum of their parts.
            accelerator.backward(loss * accelerator.num_processes)
        if part == 0:
            losses.append(torch.zeros((), device=accelerator.device))
        losses[-1] += loss.detach()
        if last:
            for group in optimizer.param_groups:
                group["lr"] = lr_at(recipe, epoch * feed.steps + step, feed.steps)
            optimizer.step()
            optimizer.zero_grad()
    return accelerator.reduce(torch.stack(losses), reduction="sum").tolist()


def recorded(recipe: Recipe) -> dict[str, Any]:
    """Return what of a recipe decides its result; a local folder is named without its path."""
    kept = {key: value for key, value in asdict(recipe).items() if key not in WHERE_ONLY}
    for key in ("dataset", "pretrained_file"):
        if kept[key] and Path(kept[key]).exists():
            kept[key] = Path(kept[key]).name
    return kept


def command(recipe: Recipe) -> str:
    """Return the line that trains a recipe again, from the keys in which it differs from the default."""
    default, own = recorded(read_recipe([])), recorded(recipe)
    changed = {key: value for key, value in own.items() if value != default[key]}
    words = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changed.items()]
    return shlex.join(["accelerate", "launch", "recipes/train.py", *words])


def save_checkpoint(path: Path, recipe: Recipe, model: BNOnlyPeftModel, optimizer: Any, scaler: Any, run: dict) -> None:
    """Write the adapter, the optimiser's state and the history so far, whole or not at all."""
    state = {
        "recipe": json.dumps(recorded(recipe)),
        "adapter": get_peft_model_state_dict(model, save_embedding_layers=False),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict() if scaler else {},
        "run": run,
    }
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def load_checkpoint(path: Path, recipe: Recipe, model: BNOnlyPeftModel, optimizer: Any, scaler: Any) -> dict:
    """Restore what `save_checkpoint` wrote; return the history.

    Raises:
        ConfigError: the checkpoint belongs to another recipe.
    """
    state = torch.load(path, weights_only=True, map_location="cpu")
    before, now = json.loads(state["recipe"]), json.loads(json.dumps(recorded(recipe)))
    if before != now:
        raise ConfigError(
            f"{path} belongs to another recipe.",
            seen=", ".join(f"{k}: {before.get(k)!r} -> {now[k]!r}" for k in now if before.get(k) != now[k]),
            do="resume with the same keys, or overwrite=true to start again",
        )
    set_peft_model_state_dict(model, state["adapter"])
    optimizer.load_state_dict(state["optimizer"])
    if scaler and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    return state["run"]


def run(recipe: Recipe) -> dict[str, Any]:
    """Train, evaluate and save; return the result line."""
    accelerator = Accelerator(mixed_precision=recipe.precision, log_with=recipe.tracker, project_dir=recipe.output_dir)
    torch.set_num_threads(recipe.threads or max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    output = prepare_output(recipe)
    accelerator.wait_for_everyone()  # no process creates the folder before all have looked
    set_seed(recipe.data_seed)
    feed = Feed(recipe, accelerator)
    plain = build_model(recipe, feed)
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        plain.print_trainable_parameters()
    if recipe.tracker:
        accelerator.init_trackers("bn_affine_adapters", config={k: str(v) for k, v in recorded(recipe).items()})
    network = sync_norms_(plain, accelerator.device) if accelerator.num_processes > 1 and recipe.sync_norm else plain
    network = network.to(memory_format=feed.format)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, recipe.lr, momentum=recipe.sgd_momentum, weight_decay=recipe.weight_decay)
    model, optimizer = accelerator.prepare(network, optimizer)
    feed.load()  # outside the time of the training
    history: dict[str, Any] = {"epochs": [], "first_losses": [], "seconds": 0.0}
    checkpoint = output / "checkpoint.pt"
    if recipe.resume and checkpoint.exists():
        history = load_checkpoint(checkpoint, recipe, plain, optimizer, accelerator.scaler)
    for epoch in range(len(history["epochs"]), recipe.epochs):
        start = time.perf_counter()
        losses = train_epoch(model, optimizer, feed, recipe, accelerator, epoch)
        history["seconds"] += time.perf_counter() - start
        history["first_losses"] = (history["first_losses"] + losses)[:20]
        entry = {"loss": sum(losses) / len(losses)}
        if (epoch + 1) % recipe.eval_every == 0 or epoch + 1 == recipe.epochs:
            entry |= accuracy(model, feed)
        history["epochs"].append(entry)
        shown = "  ".join(f"{key} {value:.4g}" for key, value in entry.items())
        accelerator.print(f"epoch {epoch + 1}/{recipe.epochs}  {shown}", file=sys.stderr)
        if recipe.tracker:
            accelerator.log(entry, step=epoch + 1)
        due = recipe.checkpoint_every and (epoch + 1) % recipe.checkpoint_every == 0
        if due and accelerator.is_main_process:
            save_checkpoint(checkpoint, recipe, plain, optimizer, accelerator.scaler, history)
    plain.save_pretrained(output / "adapter", is_main_process=accelerator.is_main_process)
    result = summary(recipe, feed, plain, history, accelerator)
    if accelerator.is_main_process:
        write_result(recipe, output, result)
    accelerator.end_training()
    return result


def summary(
    recipe: Recipe, feed: Feed, model: BNOnlyPeftModel, history: dict[str, Any], accelerator: Accelerator
) -> dict[str, Any]:
    """Return the result line of a finished run."""
    trained, total = model.get_nb_trainable_parameters()
    weights = Path(recipe.output_dir, "adapter", "adapter_model.safetensors")
    return {
        **{key: round(value, 4) for key, value in history["epochs"][-1].items()},
        "trained": trained,
        "parameters": total,
        "adapter": str(weights.parent),
        "adapter_bytes": weights.stat().st_size if accelerator.is_main_process else None,
        "seconds": round(history["seconds"], 2),
        "images_per_second": round(feed.steps * recipe.batch_size * recipe.epochs / max(history["seconds"], 1e-9), 1),
        **provenance(accelerator, Path(__file__).parent),
        "recipe": recorded(recipe),
        "command": command(recipe),
        "first_losses": [round(loss, 6) for loss in history["first_losses"]],
        "epochs": [{key: round(value, 4) for key, value in entry.items()} for entry in history["epochs"]],
    }


def write_result(recipe: Recipe, output: Path, result: dict[str, Any]) -> None:
    """Print the result as one JSON line, and keep it beside the adapter and where the recipe asks for it."""
    line = json.dumps(result)
    (output / "result.json").write_text(line + "\n")
    published = {key: value for key, value in result.items() if key != "adapter"}
    Path(result["adapter"], RESULTS_NAME).write_text(json.dumps([published]) + "\n")  # for its model card
    if recipe.results:
        with open(recipe.results, "a") as file:
            file.write(json.dumps(published) + "\n")
    print(line)
    print(f"test accuracy {result['top1']:.2f} % with {result['trained']:,} trained parameters")
    print(f"adapter {result['adapter']}, {result['adapter_bytes'] / 1000:.1f} kB")


if __name__ == "__main__":
    try:
        run(read_recipe(sys.argv[1:]))
    except BNAdapterError as error:
        sys.exit(f"{type(error).__name__}: {error}")
