"""The settings of an adapter: everything that rebuilds a network from it, as adapter_config.json holds it, checked.

Needs neither torch nor PEFT, so that a file can be looked at without them.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from .errors import ConfigError, FormatVersionError, check_choice, check_keys
from .norms import SCALE_SUFFIX
from .seed.draws import LAYER_SCALES, NORM_INITS, SCHEME, WEIGHT_INITS, check_seed

FORMAT_VERSION = 2
HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)  # owner/name, of a repository or a data set
# PEFT's names of an adapter's files, and of what stands before the names of its tensors
CONFIG_NAME = "adapter_config.json"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"  # a pickle
PEFT_PREFIX = "base_model.model."
COMPACT_NAME = "adapter_compact.safetensors"  # of a compact adapter in a folder or repository


CUSTOM = "custom"  # the architecture of a network that timm cannot build: loads only with model=


OTHERS = ("transformers", "torchvision")  # zoos besides timm, whose name and a colon begin an architecture's
# The classes of Transformers that an adapter may name; a configuration cannot have code of its own imported.
_FAMILIES = ("ResNet", "ViT", "DeiT", "ConvNext", "ConvNextV2", "MobileNetV2", "Swin", "Beit", "TimmWrapper")
TRANSFORMERS = tuple(f"{family}ForImageClassification" for family in _FAMILIES)
WRAPPER = TRANSFORMERS[-1]  # holds a network of timm


class MethodName(str):
    """The method's name where PEFT expects a member of its PeftType enum."""

    @property
    def value(self) -> str:
        """The name, as an enum's member has it."""
        return self[:]

    name = value

    def __str__(self) -> str:
        """Print as PEFT's own methods do: its status cuts off what is before the dot."""
        return f"PeftType.{self[:]}"


BN_ONLY = MethodName("BN_ONLY")

# The keys of PEFT's base configurations, in all releases that are supported. A key of a newer PEFT is added here, so
# that the files it writes can be read; a conformance test fails when one is missing.
PEFT_KEYS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
}  # fmt: skip
VERIFY = ("full", "sampled", "off")
LEAN = (None, "exact", "rounded", "smallest")
MASKS = ("mask", "signed_mask")
FROM_SEED = ("two_weights", *MASKS)  # controls that the seed chooses, or starts
# What timm does with images: it takes an unknown crop_mode for "center", and fails late on another interpolation.
RUN_TIME = ("verify", "lean")  # settings of this run, never written to adapter_config.json

# Creation arguments that would load something, or build something other than a classifier.
FORBIDDEN_ARGS = {
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "features_only",
    "scriptable", "exportable", "no_jit", "device", "dtype", "pretrained_strict", "pretrained_filter_fn",
    "pretrained_model_args", "kwargs_filter", "model_cfg", "feature_cfg", "feature_cls", "pruned",
}  # fmt: skip

# Bounds on each key of a file, so that no check takes long. Real ones are nested 3 deep and have 30 values a key.
MAX_DEPTH = 8
MAX_VALUES = 1_000
MAX_CLASSES = 2**40  # so that no shape overflows; `limits` refuses what is too large for the memory
# Bounds on the network that a file asks for: see adapter/limits.py.
MAX_PARAMETERS = 200_000_000  # 800 MB in float32
MAX_TENSORS = 20_000  # in a constructor and in an adapter's file; cifar_resnet866, the deepest, has 4,337 and 4,335
LIFT = "load_bn_only_model(..., max_parameters=N), or None for no limit, if you trust whoever made it"
# How images are prepared, in timm's words
CROP_MODES = ("center", "border", "squash")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
NAME_LISTS = (
    "extra_trainable_modules", "norm_layers", "head_layers", "layer_scales", "control_layers", "label_names",
)  # fmt: skip


@dataclass
class Settings:
    """Configure which parameters of a network train, and how the rest is redrawn.

    Settings that are None are inferred from the network when it is wrapped, and saved.

    Args:
        seed: draws every weight by `bnaffine-init-v1`; None keeps the weights given (a pretrained network).
        weight_init: convolutions and linear layers: "kaiming_normal", "kaiming_uniform", "binary" (sign times the
            He standard deviation) or "orthogonal", which is not portable between machines.
        norm_init: gamma and beta: "uniform" (gamma U(0, 1), beta 0; the paper's, default with a seed), "ones",
            "symmetric" (gamma U(-1, 1)), "ones_beta_one", or "keep" (default without a seed).
        train_gamma: train the norm layers' scale.
        train_beta: train the norm layers' shift.
        layer_scale: the gains of residual branches (LayerScale): "one" redraws them as 1 and "constructor" as what the
            constructor sets, often 1e-6, frozen either way; "train" trains them from there. By default "one" with a
            seed, and "constructor" without one, which keeps the values given.
        train_head: train what timm's `get_classifier()` returns.
        control: parameters per channel of every convolution that train as well: "two_weights" (chosen from the seed;
            the paper's control, with train_gamma and train_beta off) or "input_affine" (scale and shift of its input).
            "mask" instead chooses which weights of every convolution stay, and "signed_mask" their signs too.
        mask_share: the share of a convolution's weights that a mask keeps; with a mask 0.5 by default.
        extra_trainable_modules: exact names of modules that train as a whole, e.g. the paper's shortcuts.
        norm_layers: exact names of the norm layers that the adapter owns, by default all of them. The others are
            frozen whole: running statistics too.
        running_statistics: "update" in training mode, or "frozen" (tiny batches on a pretrained network).
        architecture: a name registered in timm; "transformers:" and one of nine classes, which is inferred;
            "torchvision:" and a name, which is not; or "custom" for a network that only your own code builds.
        model_args: creation arguments of the architecture. num_classes, in_chans and img_size are inferred, of
            Transformers all.
        head_layers: exact names of the head's modules; inferred.
        layer_scales: exact names of the parameters that layer_scale is for; inferred.
        control_layers: exact names of the convolutions under control; inferred: all outside head and extra modules.
        data_config: timm's data configuration: input_size (C, H, W), mean, std, interpolation, crop_pct.
        label_names: the classes' names in the order of the logits.
        init_scheme: the version of the rule that draws the weights.
        format_version: of the adapter folder.
        backbone_fingerprint: sha256 over the frozen tensors outside norm layers, head and extra modules.
        backbone_fingerprint_sampled: the same over at most 4,096 values a tensor.
        backbone_digests: the first 8 digits of each of those tensors' sha256, in the order of sorted names.
        frozen_fingerprint: sha256 over a drawn head that does not train and norm layers outside the adapter, if any.
        layout_hash: sha256 over the backbone's names and shapes.
        traits_fingerprint: sha256 over the classes and settings of all modules.
        traits_digests: the first 4 digits of each module's own, in the order of sorted names.
        tensors_digest: sha256 over the adapter's tensors, written when it is saved.
        versions: of the libraries that made the adapter.
        verify: "full", "sampled" or "off": how the frozen network is compared when an adapter is loaded. Not saved.
        lean: "exact", "rounded" or "smallest": train in less memory and time, see `bn_affine_adapters.lean`. Not saved.

    Raises:
        UnknownKeyError: a key does not exist.
        ConfigError: a value is not usable.

    >>> from bn_affine_adapters import BNOnlyConfig
    >>> BNOnlyConfig(seed=0).norm_init, BNOnlyConfig().norm_init
    ('uniform', 'keep')
    """

    # PEFT's own, in its order.
    task_type: Any = None
    peft_type: Any = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    # Ours.
    seed: int | None = None
    weight_init: str = "kaiming_normal"
    norm_init: str | None = None
    train_gamma: bool = True
    train_beta: bool = True
    layer_scale: str | None = None
    train_head: bool = False
    control: str | None = None
    mask_share: float | None = None
    extra_trainable_modules: list[str] = field(default_factory=list)
    norm_layers: list[str] | None = None
    running_statistics: str = "update"
    architecture: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    head_layers: list[str] | None = None
    layer_scales: list[str] | None = None
    control_layers: list[str] | None = None
    data_config: dict[str, Any] | None = None
    label_names: list[str] | None = None
    init_scheme: str = SCHEME
    format_version: int = FORMAT_VERSION
    backbone_fingerprint: str | None = None
    backbone_fingerprint_sampled: str | None = None
    backbone_digests: str | None = None
    frozen_fingerprint: str | None = None
    layout_hash: str | None = None
    traits_fingerprint: str | None = None
    traits_digests: str | None = None
    tensors_digest: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    verify: Literal["full", "sampled", "off"] = "full"
    lean: Literal["exact", "rounded", "smallest"] | None = None

    compact = False  # True if it comes from a compact file: for inference, with the first digits of its fingerprints
    built_here = False  # True if the network was just built from this configuration: not built again to compare

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuse unknown keys before the dataclass does, naming the nearest one."""
        check_keys(kwargs, {f.name for f in fields(cls)}, "BNOnlyConfig")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check every value and fill in the defaults that depend on the seed."""
        # PEFT chooses its model class by task type: this one stands for BNOnlyPeftModel in its registry.
        self.peft_type = self.task_type = BN_ONLY
        if self.norm_init is None:
            self.norm_init = "keep" if self.seed is None else "uniform"
        if self.mask_share is None and self.control in MASKS:
            self.mask_share = 0.5
        self.check()

    def check(self) -> None:
        """Check every value: when the configuration is made, and again when a network is wrapped with it.

        Raises:
            ConfigError: a value is not usable.
        """
        if self.seed is not None:
            self.seed = check_seed(self.seed)
        check_choice("weight_init", self.weight_init, WEIGHT_INITS)
        check_choice("norm_init", self.norm_init, NORM_INITS)
        check_choice("layer_scale", self.layer_scale, (None, *LAYER_SCALES))
        check_choice("running_statistics", self.running_statistics, ("update", "frozen"))
        check_choice("verify", self.verify, VERIFY)
        check_choice("lean", self.lean, LEAN)
        check_choice("init_scheme", self.init_scheme, (SCHEME,))
        for key in ("train_gamma", "train_beta", "train_head"):
            _check_type(key, getattr(self, key), bool)
        for key in NAME_LISTS:
            self._check_names(key)
        for key in ("model_args", "versions", "data_config"):
            self._check_plain_dict(key, optional=key == "data_config")
        ends = ("fingerprint", "sampled", "digest", "digests", "hash")
        digests = [f.name for f in fields(self) if f.name.endswith(ends)]
        for key in (*digests, "architecture", "base_model_name_or_path", "revision", "peft_version"):
            _check_type(key, getattr(self, key), str | None)
        _check_type("auto_mapping", self.auto_mapping, type(None))  # by which PEFT would import a base's class
        self._check_control()
        if self.fresh and self.data_config is not None:  # `predict` checks what a file says
            check_choice("data_config's crop_mode", self.data_config.get("crop_mode"), (None, *CROP_MODES))
            check_choice("data_config's interpolation", self.data_config.get("interpolation"), (None, *INTERPOLATIONS))
        self._check_format()
        self._check_args()
        if self.architecture is None and not self.fresh:
            seen, do = "architecture=None, with a fingerprint", "save the adapter again with model.save_pretrained"
            raise ConfigError("The adapter does not say which network it belongs to.", seen=seen, do=do)

    def _check_control(self) -> None:
        check_choice("control", self.control, (None, "two_weights", "input_affine", *MASKS))
        if self.control in FROM_SEED and self.seed is None:
            raise ConfigError(f"control={self.control!r} begins with the seed.", seen="seed=None", do="seed=0")
        share = self.mask_share
        if share is None and self.control not in MASKS:
            return
        if self.control not in MASKS or not isinstance(share, int | float) or share is True or not 0 < share <= 1:
            seen, do = f"mask_share={share!r}, control={self.control!r}"[:200], 'control="mask", mask_share=0.5'
            raise ConfigError("mask_share is a number above 0, at most 1, of a mask.", seen=seen, do=do)

    def _check_format(self) -> None:
        _check_type("format_version", self.format_version, int)
        if self.format_version < 1:
            raise ConfigError("format_version counts from 1.", seen=str(self.format_version), do="leave it out")
        if self.format_version > FORMAT_VERSION:
            raise FormatVersionError(
                "The adapter was written in a newer format.",
                seen=f"format_version {self.format_version}; this version reads up to {FORMAT_VERSION}",
                do="pip install -U bn-affine-adapters",
            )

    def _check_names(self, key: str) -> None:
        value = getattr(self, key)
        if value is None and key != "extra_trainable_modules":
            return
        names = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
        if not names or (key != "label_names" and len(set(value)) < len(value)):
            raise ConfigError(
                f"{key} is not a list of {'different names' if names else 'names'}.",
                seen=repr(value)[:200],
                do=f"{key}=['exact.name', ...]",
            )
        setattr(self, key, list(value))

    def _check_plain_dict(self, key: str, optional: bool) -> None:
        value = getattr(self, key)
        _check_type(key, value, dict | None if optional else dict)
        strange = [name for name, item in (value or {}).items() if not isinstance(name, str) or not is_plain(item)]
        if strange:
            raise ConfigError(
                f"{key} holds values that cannot be written as JSON: {', '.join(map(str, strange))}.",
                seen=repr(value)[:200],
                do="give finite numbers, strings, booleans, None or lists of them",
            )
        if value is not None:
            # Through JSON, so that a configuration equals the one that is read from its file.
            setattr(self, key, json.loads(json.dumps(value)))

    def _check_args(self) -> None:
        refused = {key for key in self.model_args if key in FORBIDDEN_ARGS or not key.isidentifier()}
        if refused:
            raise ConfigError(
                f"model_args holds keys that cannot travel with an adapter: {', '.join(sorted(map(str, refused)))}.",
                seen=repr({key: self.model_args[key] for key in refused})[:200],
                do="give the architecture's own creation arguments",
            )
        classes = self.model_args.get("num_classes")
        if classes is not None and (type(classes) is not int or not 0 <= classes <= MAX_CLASSES):
            raise ConfigError(
                "num_classes is not a usable number of classes.", seen=repr(classes)[:200], do="give an integer"
            )

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The exact names of all modules of which the adapter has a copy; a tuple, because PEFT changes lists."""
        controlled = self.control_layers or [] if self.control else []
        scales = [name + SCALE_SUFFIX for name in self.trained_scales]
        return tuple(dict.fromkeys([*(self.norm_layers or []), *self.whole_modules, *scales, *controlled]))

    @property
    def whole_modules(self) -> list[str]:
        """The exact names of the modules that train as a whole: a head that trains, and extra modules."""
        return [*((self.head_layers or []) if self.train_head else []), *self.extra_trainable_modules]

    @property
    def trained_scales(self) -> list[str]:
        """The exact names of the layer scales that train."""
        return (self.layer_scales or []) if self.layer_scale == "train" else []

    @property
    def ones(self) -> list[str]:
        """The exact names of the parameters that are redrawn as 1."""
        return (self.layer_scales or []) if self.layer_scale == "one" else []

    @property
    def portable(self) -> bool:
        """Whether the frozen weights have the same bits on every machine."""
        return self.seed is None or self.weight_init != "orthogonal"

    @property
    def fresh(self) -> bool:
        """Whether no network has been wrapped with this configuration yet."""
        return self.backbone_fingerprint is None

    def to_dict(self) -> dict[str, Any]:
        """Return what adapter_config.json holds: every field but the settings of this run, and no path of a base."""
        content = {key: value for key, value in asdict(self).items() if key not in RUN_TIME}
        if self.mask_share is None:  # so that a version that knows no masks reads other adapters
            del content["mask_share"]
        if self.base_model_name_or_path and hub_id(self.base_model_name_or_path) is None:
            content["base_model_name_or_path"] = content["revision"] = None
        return content

    @classmethod
    def check_kwargs(cls, /, **kwargs: Any) -> dict[str, Any]:
        """Check the keys of a configuration file, and drop those of PEFT that this class does not have."""
        for key, value in kwargs.items():
            _check_size(key, value)
        kwargs.setdefault("layer_scale", "constructor")  # of a file that was written before there was a choice
        known = {f.name for f in fields(cls)} - set(RUN_TIME)
        # First, so that a file of a newer format is refused as such and not for a new key.
        version = kwargs.get("format_version", FORMAT_VERSION)
        if isinstance(version, int) and version > FORMAT_VERSION:
            cls(format_version=version)
        check_keys(kwargs, known | PEFT_KEYS, "adapter_config.json")
        return {key: value for key, value in kwargs.items() if key in known}


def _check_size(key: str, value: Any) -> None:
    values, count = [value], 0
    for _ in range(MAX_DEPTH):
        containers = (v.values() if isinstance(v, dict) else v for v in values if isinstance(v, dict | list))
        values = [item for container in containers for item in container]
        count += len(values)
    if values or (count > MAX_VALUES and key not in NAME_LISTS):
        seen = f"{count:,} values" + (f", nested {MAX_DEPTH} deep or deeper" if values else "")
        do = f"do not load it; {MAX_VALUES:,} values are allowed"
        raise ConfigError(f"{key[:80]} of adapter_config.json holds too much.", seen=seen, do=do)


def _check_type(key: str, value: Any, kind: Any) -> None:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        wanted = getattr(kind, "__name__", str(kind))
        raise ConfigError(
            f"{key} has the wrong type.", seen=f"{key}={value!r}"[:200], do=f"give a value of type {wanted}"
        )


def is_plain(value: Any) -> bool:
    """Tell whether a value can be written as JSON: a finite number, string, boolean, None, or a list of them."""
    if isinstance(value, list | tuple):
        return all(is_plain(item) for item in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int | str)


def zoo_of(architecture: str | None) -> str:
    """Return which library builds an architecture: "timm", "transformers", "torchvision", or "custom"."""
    if architecture is None or architecture == CUSTOM:
        return CUSTOM
    zoo = architecture.partition(":")[0]
    return zoo if zoo in OTHERS else "timm"


def creation_call(architecture: str, model_args: dict[str, Any], **more: Any) -> str:
    """Return the call that builds an architecture, as one writes it in Python."""
    zoo, name = zoo_of(architecture), architecture.rpartition(":")[2]
    if zoo == "transformers":
        model_args = {{"num_classes": "num_labels"}.get(key, key): value for key, value in model_args.items()}
        if name == WRAPPER:
            own: dict[str, Any] = {key: model_args[key] for key in ("architecture", "num_labels") if key in model_args}
            model_args = {**own, "model_args": {key: each for key, each in model_args.items() if key not in own}}
    shown = [f"{key}={value!r}" for key, value in {**more, **model_args}.items()]
    if zoo == "transformers":
        family = name.removesuffix("ForImageClassification")
        return f"transformers.{name}(transformers.{family}Config({', '.join(shown)}))"
    function = "timm.create_model" if zoo == "timm" else "torchvision.models.get_model"
    return f"{function}({', '.join([json.dumps(name), *shown])})"


def hub_id(name: str | None) -> str | None:
    """Return a name if it is one of a repository on the Hub; None if it is a folder here, or anything else."""
    return name if name and HUB_ID.fullmatch(name) and not Path(name).exists() else None


def bare(key: str) -> str:
    """Return a tensor's name in the network, without PEFT's prefix."""
    return key.removeprefix(PEFT_PREFIX)


def as_channels(values: Sequence[float], channels: int) -> list[float]:
    """Return a mean or std for so many channels: as it is if it has them, or else its average for each."""
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels
