"""What a training recipe says: every key, the conditions, the YAML file and key=value arguments that set them."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, check_choice, check_keys
from .feed import DataOptions

# What trains. The first seven are the paper's; those with shortcuts name them in extra_trainable_modules besides.
# "filter-affine" is gamma and beta without normalisation: the running statistics stay 0 and 1.
_NORMS_OFF = {"train_gamma": False, "train_beta": False}
CONDITIONS: dict[str, dict[str, Any]] = {
    "bn": {},
    "bn+head": {"train_head": True},
    "head": {**_NORMS_OFF, "train_head": True},
    "random2": {**_NORMS_OFF, "control": "two_weights"},
    "bn+shortcut+head": {"train_head": True},
    "shortcut+head": {**_NORMS_OFF, "train_head": True},
    "gamma": {"train_beta": False},
    "beta": {"train_gamma": False},
    "input-affine": {**_NORMS_OFF, "control": "input_affine"},
    "filter-affine": {"running_statistics": "frozen"},
}
CONFIGS = Path(__file__).parent / "configs"
COMPILE_MODES = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
FULL_CONDITIONS = ("all", "no-affine")  # train the network itself, and save it whole


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
    lean: str | None = None  # "exact", "rounded" or "smallest": less memory and time for a network with frozen weights
    compile: str | None = None  # a mode of torch.compile; "reduce-overhead" captures the step in CUDA graphs
    replicates: int = 1  # trained side by side, with seed, seed + 1, ... and data_seed, data_seed + 1, ...
    sync_norm: bool = True  # with several processes: batch statistics over all of them
    threads: int = 0  # CPU threads a process; 0: all cores over the local processes
    tracker: str | None = None  # e.g. tensorboard, wandb: any that Accelerate knows
    output_dir: str = "runs/latest"
    overwrite: bool = False
    resume: bool = False  # go on from OUTPUT/checkpoint.pt, if it is there
    checkpoint_every: int = 0  # epochs; 0: none
    eval_every: int = 1  # epochs; the last is always evaluated
    results: str | None = None  # a .jsonl file to append the result line to


# Where and how a run is done, not what comes out of it.
WHERE_ONLY = {
    "output_dir", "overwrite", "resume", "results", "threads", "workers", "tracker", "checkpoint_every", "replicates",
}  # fmt: skip


def find_config(name: str, folder: str = "") -> Path:
    """Return a YAML file: the one of that path if it is there, or else the packaged one of that name.

    Args:
        name: a path, or e.g. "cifar10".
        folder: of the packaged ones, "sweeps", "tune", or none for recipes.
    """
    packaged = CONFIGS / folder / f"{Path(name).stem}.yaml"
    return packaged if not Path(name).is_file() and name in (packaged.stem, packaged.name) else Path(name)


def help_text() -> str:
    """Return every key with its default, a line each."""
    return "\n".join(f"  {f.name}={json.dumps(getattr(Recipe(), f.name))}" for f in fields(Recipe))


def read_recipe(arguments: list[str], default: Path) -> Recipe:
    """Merge the defaults, a YAML file (that after ``--config``, or ``default``) and the key=value arguments.

    Raises:
        ConfigError: the file cannot be read, or a value is not usable.
        UnknownKeyError: there is no such key.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        file = str(default)
        if "--config" in arguments:
            at = arguments.index("--config")
            file, arguments = arguments[at + 1], arguments[:at] + arguments[at + 2 :]
        layers = [OmegaConf.load(find_config(file)), OmegaConf.from_cli(arguments)]
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
    check_choice("condition", recipe.condition, (*CONDITIONS, *FULL_CONDITIONS))
    check_choice("schedule", recipe.schedule, ("multistep", "cosine"))
    check_choice("compile", recipe.compile, COMPILE_MODES)
    check_choice("lean", recipe.lean, (None, "exact", "rounded", "smallest"))
    if recipe.lean and (recipe.condition in FULL_CONDITIONS or recipe.replicates > 1):
        seen = f"lean={recipe.lean}, condition={recipe.condition}, replicates={recipe.replicates}"
        do = "leave lean out, or train one replicate of a condition that freezes the convolutions"
        raise ConfigError("Lean training is for one network with frozen weights.", seen=seen, do=do)
    if recipe.pretrained == (recipe.seed is not None):
        raise ConfigError(
            "A network is either redrawn from a seed or keeps pretrained weights.",
            seen=f"pretrained={recipe.pretrained}, seed={recipe.seed}",
            do="pretrained=true seed=null, or pretrained=false seed=0",
        )
    return recipe


def recorded(recipe: Recipe) -> dict[str, Any]:
    """Return what of a recipe decides its result; a local folder is named without its path."""
    kept = {key: value for key, value in asdict(recipe).items() if key not in WHERE_ONLY}
    for key in ("dataset", "pretrained_file"):
        if kept[key] and Path(kept[key]).exists():
            kept[key] = Path(kept[key]).name
    return kept


def members(recipe: Recipe) -> list[Recipe]:
    """Return the recipes of replicates that train side by side: each is a run of its own, in OUTPUT/seed-SEED.

    Raises:
        ConfigError: there is no replicate, or they cannot be stacked.
    """
    if recipe.replicates == 1:
        return [recipe]
    # In fp16 the overflow of one would skip the step of all.
    if recipe.replicates < 1 or recipe.seed is None or recipe.streaming or recipe.precision == "fp16":
        keys = ("replicates", "seed", "streaming", "precision")
        seen = ", ".join(f"{key}={getattr(recipe, key)}" for key in keys)
        do = "replicates=5 with a seed, a data set in memory, and precision no or bf16"
        raise ConfigError("So many replicates cannot train side by side.", seen=seen, do=do)
    seeds = [recipe.seed + i for i in range(recipe.replicates)]
    first = recipe.data_seed - recipe.seed
    folders = [str(Path(recipe.output_dir, f"seed-{seed}")) for seed in seeds]
    return [
        replace(recipe, replicates=1, seed=seed, data_seed=first + seed, output_dir=folder)
        for seed, folder in zip(seeds, folders, strict=True)
    ]


def command(recipe: Recipe, default: Recipe) -> str:
    """Return the line that trains a recipe again, from the keys in which it differs from the script's default."""
    usual, own = recorded(default), recorded(recipe)
    changed = {key: value for key, value in own.items() if value != usual[key]}
    words = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changed.items()]
    return shlex.join(["accelerate", "launch", "recipes/train.py", *words])


def run_key(recorded: Mapping[str, Any]) -> str:
    """Return what tells one run from another: the settings of a result line that are not the defaults, as JSON.

    How often it was evaluated, whether it was compiled and where the data set was found make no other run; a key that
    a later version adds, at its default, makes none either.

    >>> run_key({"model": "cifar_resnet14", "seed": 1, "eval_every": 5, "dataset": "uoft-cs/cifar10"})
    '{"dataset": "cifar10", "seed": 1}'
    """
    usual = json.loads(json.dumps(asdict(Recipe())))
    own = {**recorded, "dataset": Path(recorded.get("dataset", usual["dataset"])).name}
    if own.get("norm_init") == "uniform" and own.get("seed", 0) is not None:
        own["norm_init"] = None  # which means it
    own = {key: value for key, value in own.items() if key not in ("eval_every", "compile") and value != usual.get(key)}
    return json.dumps(dict(sorted(own.items())))
