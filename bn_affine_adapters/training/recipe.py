"""A training recipe: every key with its default and its range, the conditions, and the YAML files that set keys."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from ..errors import BNAdapterError, ConfigError, check_choice, check_keys
from ..seed.draws import LAYER_SCALES, NORM_INITS, WEIGHT_INITS
from ..settings import CROP_MODES, INTERPOLATIONS, LEAN, as_channels
from ..sharing.compact import BITS
from ..sharing.paths import ELSEWHERE
from .options import DataOptions
from .ranges import SWITCH, TEXT, TEXTS, VALUES, Range, check_range

Options = TypeVar("Options")

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
    "mask": {**_NORMS_OFF, "control": "mask"},
    "signed-mask": {**_NORMS_OFF, "control": "signed_mask"},
    "filter-affine": {"running_statistics": "frozen"},
}
CONFIGS = Path(__file__).parent / "configs"
FULL_CONDITIONS = ("all", "no-affine")  # train the network itself, and save it whole


@dataclass
class Recipe(DataOptions):
    """Every key of a recipe, with those of its data; a YAML file and key=value arguments change them, in this order.

    A new key needs a default here, and a range below.
    """

    # The network
    model: str = "cifar_resnet14"
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False  # keep pretrained weights; needs seed=null
    pretrained_file: str | None = None  # a .safetensors file instead of timm's download
    seed: int | None = 0
    condition: str = "bn"
    adapter: str | None = None  # start from its values: a folder or Hub id
    quantise_bits: int | None = None  # train through the rounding of a compact file of 4, 6, 8 or 16 bits
    weight_init: str = "kaiming_normal"
    norm_init: str | None = None
    layer_scale: str = "one"  # or "constructor", "train": the gains of residual branches in a network from a seed
    running_statistics: str = "update"
    head_init: str | None = None  # "zero": a head that trains begins with logits of 0
    # The optimiser
    optimizer: str = "sgd"  # without Nesterov; or one of timm's: adamw, lamb, muon, ...
    optimizer_args: dict[str, Any] = field(default_factory=dict)  # more for timm's, e.g. {betas: [0.9, 0.99]}
    epochs: int = 160
    lr: float = 0.1
    schedule: str = "multistep"  # or "cosine"
    milestones: list[float] = field(default_factory=list)  # epochs at which lr is multiplied by lr_decay
    lr_decay: float = 0.1
    warmup_epochs: float = 0.0
    sgd_momentum: float = 0.9  # of every optimiser that has a momentum
    weight_decay: float = 1e-4
    # The run
    precision: str = "no"  # or bf16, fp16
    lean: str | None = None  # "exact", "rounded" or "smallest": less memory and time for a network with frozen weights
    compile: str | None = None  # a mode of torch.compile; "reduce-overhead" captures the step in CUDA graphs
    replicates: int = 1  # trained side by side, with seed, seed + 1, ... and data_seed, data_seed + 1, ...
    sync_norm: bool = True  # with several processes: batch statistics over all of them
    threads: int = 0  # CPU threads a process; 0: all cores over the local processes
    tracker: str | None = None  # e.g. tensorboard, trackio, wandb: any that Accelerate knows
    output_dir: str = "runs/latest"
    overwrite: bool = False
    resume: bool = False  # go on from OUTPUT/checkpoint.pt, if it is there
    checkpoint_every: int = 0  # epochs; 0: none
    checkpoint_every_steps: int = 0  # optimiser steps, from the first of the run; 0: none
    skip_nonfinite_steps: int = 0  # leave out at most so many steps whose loss is not finite
    timeout: float = 600.0  # s: how long a process waits for another one
    eval_every: int = 1  # epochs; the last is always evaluated
    results: str | None = None  # a .jsonl file to append the result line to

    def __post_init__(self) -> None:
        """Take the average of mean and std where the network has another number of channels."""
        super().__post_init__()
        channels = self.model_args.get("in_chans", 3)
        self.mean, self.std = as_channels(self.mean, channels), as_channels(self.std, channels)


# The range of every key of a recipe, and of what validate, analyse, sweep and tune read besides.
RANGES: dict[str, Range] = {
    # The data
    "dataset": TEXT, "dataset_config": TEXT, "train_split": TEXT, "test_split": TEXT, "held_out": "[0, 1e9]",
    "image_column": TEXT, "label_column": TEXT, "data_seed": "[0, 4294967296)",  # all that NumPy takes
    "streaming": SWITCH, "workers": "[0, 1024]", "image_size": "[1, 4096]", "interpolation": INTERPOLATIONS,
    "mean": "some of [-1e6, 1e6]", "std": "some of [1e-6, 1e6]", "flip": SWITCH, "crop_padding": "[0, 4096]",
    "crop_scale": "two of (0, 1e3]", "crop_ratio": "two of (0, 1e3]", "crop_mode": (None, *CROP_MODES),
    "test_crop": "[0.1, 2]", "batch_size": "[1, 1e6]", "accumulation": "[1, 1e6]", "channels_last": SWITCH,
    "on_bad_image": ("stop", "skip"),
    # The network
    "model": TEXT, "model_args": VALUES, "pretrained": SWITCH, "pretrained_file": TEXT,
    "seed": "[0, 18446744073709551616)", "condition": (*CONDITIONS, *FULL_CONDITIONS), "weight_init": WEIGHT_INITS,
    "quantise_bits": (None, *BITS),
    "norm_init": (None, *NORM_INITS), "layer_scale": LAYER_SCALES, "running_statistics": ("update", "frozen"),
    "head_init": (None, "zero"),
    # The optimiser
    "optimizer": TEXT, "optimizer_args": VALUES, "epochs": "[1, 1e6]", "lr": "[0, inf)",
    "schedule": ("multistep", "cosine"), "milestones": "[0, inf)", "lr_decay": "[0, 10]",
    "warmup_epochs": "[0, 1e6]", "sgd_momentum": "[0, 1)", "weight_decay": "[0, inf)",
    # The run
    "precision": ("no", "bf16", "fp16"), "lean": LEAN,
    "compile": (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "replicates": "[1, 1000]", "sync_norm": SWITCH, "threads": "[0, 1024]", "tracker": TEXT, "output_dir": TEXT,
    "overwrite": SWITCH, "resume": SWITCH, "checkpoint_every": "[0, 1e9]", "checkpoint_every_steps": "[0, 1e9]",
    "skip_nonfinite_steps": "[0, 1e9]", "timeout": "[1, 1e9]", "eval_every": "[1, 1e9]", "results": TEXT,
    # validate and analyse
    "adapter": TEXT, "clamp": "[0, inf)", "layers": SWITCH, "redraw": "[0, 18446744073709551616)", "output": TEXT,
    # sweep and tune
    "config": TEXT, "conditions": VALUES, "networks": TEXTS, "set": VALUES, "analyse": SWITCH, "space": VALUES,
    "trials": "[1, 1e6]",
}  # fmt: skip
# What an optimiser would get besides from its own keys of a recipe.
SET_ELSEWHERE = {"lr": "lr", "momentum": "sgd_momentum", "weight_decay": "weight_decay"}
ELEMENTWISE = ("sgd", "momentum", "nesterov", "adam", "adamw")  # each value's update depends on its own gradients alone

# What decides on which images, and in what precision, an adapter is tested.
TEST_KEYS = (
    "dataset", "dataset_config", "train_split", "test_split", "held_out", "image_column", "label_column", "streaming",
    "pretrained", "pretrained_file", "precision",
)  # fmt: skip
# What decides what is computed is every key but these, which say where and how a run is done: a new key is part of the
# recipe unless it is named here. The first ones are not recorded in result lines.
WHERE_ONLY = {
    "output_dir", "overwrite", "resume", "results", "threads", "workers", "tracker", "checkpoint_every", "replicates",
    "checkpoint_every_steps", "timeout",
}  # fmt: skip
# Recorded; the results agree to rounding, or would have been none: too many steps were not finite.
ROUNDING_ONLY = {"eval_every", "compile", "channels_last", "skip_nonfinite_steps"}

CHECKPOINT = "checkpoint.pt"  # in the output folder
PATHS = ("dataset", "pretrained_file", "adapter")  # may name a folder or file of this machine


def find_config(name: str, folder: str = "") -> Path:
    """Return a YAML file: the one of that path if it is there, or else the packaged one of that name.

    Args:
        name: a path, or e.g. "cifar10"; "sweeps/digits", as `bn-adapters configs` lists it, is a sweep's.
        folder: of the packaged ones, "sweeps", "tune", or none for recipes.
    """
    packaged = CONFIGS / folder / f"{name.removesuffix('.yaml').removeprefix(f'{folder}/')}.yaml"
    return packaged if packaged.is_file() and not Path(name).is_file() else Path(name)


def config_files() -> dict[str, Path]:
    """Return the packaged YAML files by name: recipes, sweeps/NAME and tune/NAME."""
    found = {path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in CONFIGS.rglob("*.yaml")}
    return dict(sorted(found.items(), key=lambda entry: (entry[0].count("/"), entry[0])))


def help_text(options: Any) -> str:
    """Return every key of options with its default, and the numbers or words that it may be, a line each."""
    lines = []
    for key, value in vars(options).items():
        allowed = RANGES[key]
        if isinstance(allowed, tuple):
            allowed = " | ".join("null" if word is None else str(word) for word in allowed)
        shown = "" if allowed in (SWITCH, TEXT, VALUES) else allowed
        lines.append(f"  {f'{key}={json.dumps(value)}':38}{shown}".rstrip())
    return "\n".join(lines)


def read(options: type[Options], *sources: Path | Sequence[str] | Mapping[str, Any], what: str, do: str) -> Options:
    """Return a dataclass of options from its defaults and what sources change, the last one winning.

    Args:
        options: its fields all have defaults.
        sources: YAML files, key=value arguments, or settings.
        what: the name of all this in messages.
        do: the advice in a message.

    Raises:
        UnknownKeyError: there is no such key.
        ConfigError: a file cannot be read, or a value is of the wrong type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    names, layers = {f.name for f in fields(options)}, []  # type: ignore[arg-type]  # a dataclass
    try:
        for source in sources:
            layer: Any = source
            if not isinstance(source, Mapping):
                given = OmegaConf.load(source) if isinstance(source, Path) else OmegaConf.from_cli(list(source))
                layer = OmegaConf.to_container(given, resolve=True)
            if not isinstance(layer, Mapping):
                raise ConfigError(f"{source} is a list, not keys with values.", seen=str(layer)[:80], do=do)
            check_keys(layer, names, what)
            if layer.get("precision") is False:  # YAML reads the bare word no as false
                layer = {**layer, "precision": "no"}
            check_ranges(layer)  # before they are merged, which turns 2 into true, and true into "True"
            layers.append(layer)
        merged = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(options), *layers))
        return options(**merged)  # type: ignore[arg-type]  # OmegaConf promises no str keys
    except (OmegaConfBaseException, YAMLError, OSError, TypeError) as error:  # a TypeError: a list for a mapping
        if isinstance(error, BNAdapterError):
            raise
        seen, key = str(error).splitlines()[0], getattr(error, "full_key", None)
        raise ConfigError(f"{what} cannot be read.", seen=f"{key}: {seen}" if key else seen, do=do) from error


def read_recipe(arguments: Sequence[str], default: Path) -> Recipe:
    """Merge the defaults, a YAML file and the key=value arguments, and check the values.

    The file is the first argument if that has no ``=``, or the one after ``--config``, or else ``default``.

    Raises:
        ConfigError: the file cannot be read, or a value is not usable.
        UnknownKeyError: there is no such key.
    """
    file, changes = str(default), list(arguments)
    if "--config" in changes:
        at = changes.index("--config")
        file, changes = (changes[at + 1 : at + 2] or ["--config"])[0], changes[:at] + changes[at + 2 :]
    elif changes and "=" not in changes[0]:
        file, changes = changes[0], changes[1:]
    names = ", ".join(name for name in config_files() if "/" not in name)
    if file in config_files() and "/" in file and not Path(file).is_file():
        of = file.partition("/")[0].removesuffix("s")
        raise ConfigError(f"{file} is no recipe.", seen=file, do=f"bn-adapters {of} {file}, or a recipe: {names}")
    do = f"give key=value arguments, after a FILE.yaml or one of {names}"
    recipe = read(Recipe, find_config(file), changes, what="The recipe", do=do)
    check_values(recipe)
    return recipe


def check_ranges(values: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first key whose value is out of its range."""
    for key, value in values.items():
        check_range(key, value, RANGES[key])


def check_values(recipe: Recipe) -> None:
    """Raise ConfigError for a value that is out of its range, or excluded by another."""
    check_ranges(vars(recipe))
    try:
        json.dumps(asdict(recipe), allow_nan=False)
    except ValueError as error:
        seen = f"model_args={recipe.model_args}, optimizer_args={recipe.optimizer_args}"
        raise ConfigError("A value is not a finite number.", seen=seen, do="give finite numbers") from error
    check_libraries(recipe)
    for wrong, what, keys, do in contradictions(recipe):
        if wrong:
            seen = ", ".join(f"{key}={getattr(recipe, key)}" for key in keys)
            raise ConfigError(what, seen=seen, do=do)
    for member in members(recipe):
        check_range("seed", member.seed, RANGES["seed"])


def contradictions(recipe: Recipe) -> list[tuple[bool, str, tuple[str, ...], str]]:
    """Return what keys may not say together: whether they do, what is wrong with it, these keys, what to do."""
    whole, several = recipe.condition in FULL_CONDITIONS, recipe.replicates > 1
    # In fp16 the overflow of one would skip the step of all.
    together = recipe.precision != "fp16" and recipe.optimizer in ELEMENTWISE and not recipe.streaming
    return [
        (recipe.lean is not None and (whole or several), "Lean training is for one network with frozen weights.",
         ("lean", "condition", "replicates"),
         "leave lean out, or train one replicate of a condition that freezes the convolutions"),
        (several and recipe.skip_nonfinite_steps > 0, "A step of one replicate cannot be skipped alone.",
         ("skip_nonfinite_steps", "replicates"), "leave one of them out"),
        (several and (recipe.seed is None or not together), "Such replicates cannot train side by side.",
         ("replicates", "seed", "streaming", "precision", "optimizer"),
         f"a seed, data in memory, precision no or bf16, and optimizer {', '.join(ELEMENTWISE)}"),
        (recipe.pretrained == (recipe.seed is not None),
         "A network is either redrawn from a seed or keeps pretrained weights.",
         ("pretrained", "seed"), "pretrained=true seed=null, or pretrained=false seed=0"),
        (whole and recipe.running_statistics != "update", "A network that trains whole updates its running statistics.",
         ("condition", "running_statistics"), "leave running_statistics out"),
        (recipe.quantise_bits is not None and (whole or several), "One adapter trains through the rounding.",
         ("quantise_bits", "condition", "replicates"),
         "leave quantise_bits out, or train one replicate of a condition that gives an adapter"),
        (recipe.adapter is not None and whole, "A network that trains whole starts from no adapter.",
         ("adapter", "condition"), "leave adapter out, or condition=bn"),
        (recipe.accumulation > recipe.batch_size, "A step has fewer images than parts.",
         ("accumulation", "batch_size"), "use accumulation <= batch_size"),
    ]  # fmt: skip


def check_libraries(recipe: Recipe) -> None:
    """Raise ConfigError for an optimiser or tracker that its library lacks, or an argument of an optimiser's."""
    from accelerate.tracking import get_available_trackers
    from timm.optim import list_optimizers

    # AdaHessian takes second derivatives, which the loop does not compute.
    check_choice("optimizer", recipe.optimizer, [name for name in list_optimizers() if name != "adahessian"])
    # Accelerate itself trains without a tracker that is not installed.
    check_choice("tracker", recipe.tracker, (None, "all", *map(str, get_available_trackers())))
    for key in recipe.optimizer_args:
        seen = f"optimizer_args={recipe.optimizer_args}"
        if key in SET_ELSEWHERE:
            do = f"give {SET_ELSEWHERE[key]}={recipe.optimizer_args[key]}"
            raise ConfigError(f"{key} is a key of the recipe, and no further argument.", seen=seen, do=do)
        if key.startswith("layer_decay"):
            do = "leave it out: every layer learns at the rate that lr and schedule say"
            raise ConfigError("layer_decay is not supported.", seen=seen, do=do)


def recorded(recipe: Recipe) -> dict[str, Any]:
    """Return what of a recipe decides its result; a local folder is named without its path."""
    kept = {key: value for key, value in asdict(recipe).items() if key not in WHERE_ONLY}
    for key in PATHS:
        if kept[key] and Path(kept[key]).exists():
            kept[key] = Path(kept[key]).name
    return kept


def members(recipe: Recipe) -> list[Recipe]:
    """Return the recipes of replicates that train side by side: each is a run of its own, in OUTPUT/seed-SEED."""
    if recipe.replicates == 1 or recipe.seed is None:
        return [recipe]
    seeds = [recipe.seed + i for i in range(recipe.replicates)]
    first = recipe.data_seed - recipe.seed
    folders = [str(Path(recipe.output_dir, f"seed-{seed}")) for seed in seeds]
    return [
        replace(recipe, replicates=1, seed=seed, data_seed=first + seed, output_dir=folder)
        for seed, folder in zip(seeds, folders, strict=True)
    ]


def words(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as key=value arguments."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]


def command(recipe: Recipe, default: Recipe) -> str:
    """Return the line that trains a recipe again, from the keys in which it differs from the script's default."""
    usual, own = recorded(default), recorded(recipe)
    for key in PATHS:
        if own[key] != getattr(recipe, key):
            own[key] = f"{ELSEWHERE}{own[key]}"
    return shlex.join(["bn-adapters", "train", *words({k: v for k, v in own.items() if v != usual[k]})])


def validate_command(recipe: Recipe, adapter: str) -> str:
    """Return the line that measures a recipe's adapter on its test images; size, mean and std are the adapter's own."""
    usual, own = Recipe(), {key: getattr(recipe, key) for key in TEST_KEYS}
    changed = {key: value for key, value in own.items() if value != getattr(usual, key)}
    return shlex.join(["bn-adapters", "validate", adapter, *words(changed)])


def computed(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a result line's recipe that decide what is computed, in their order.

    A key that the line lacks was added later, and has its default. Of a data set only the name counts.
    """
    own = {**json.loads(json.dumps(asdict(Recipe()))), **recorded}
    own["dataset"] = Path(own["dataset"]).name
    if own["norm_init"] == "uniform" and own["seed"] is not None:
        own["norm_init"] = None  # which means it
    return {key: value for key, value in own.items() if key not in WHERE_ONLY | ROUNDING_ONLY}


def run_key(recorded: Mapping[str, Any]) -> str:
    """Return what tells one run from another: what is `computed`, without the defaults, as JSON.

    >>> run_key({"model": "cifar_resnet14", "seed": 1, "eval_every": 5, "dataset": "uoft-cs/cifar10"})
    '{"dataset": "cifar10", "seed": 1}'
    """
    usual = computed({})
    own = {key: value for key, value in computed(recorded).items() if key not in usual or value != usual[key]}
    return json.dumps(dict(sorted(own.items())))
