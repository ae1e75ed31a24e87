"""What a network computes besides its tensors: class, description and plain settings of every module, and a digest.

Format `bnaffine-traits-v1`: a header line, then a line a module, names sorted by their UTF-8 bytes: name and traits,
the latter as JSON with sorted keys, separated by a tab.
"""

import hashlib
import json
import re
from typing import Any, NamedTuple

from torch import nn

from ..norms import SCALE_SUFFIX
from ..norms.find import Scale, plain_modules
from ..settings import Settings
from .zoos import configuration_of, is_transformers

Traits = dict[str, Any]
MODULE_DIGEST = 4  # hex digits kept of each module's own hash, to name the module that differs

# Attributes that differ between equal networks, or change only how the same numbers are computed.
_INCIDENTAL = {
    "training", "grad_checkpointing", "gradient_checkpointing", "use_checkpoint", "fused_attn", "fast_norm",
    "name_or_path", "device",
}  # fmt: skip
# Settings that change nothing that a network in evaluation mode computes.
_IN_TRAINING = {"momentum", "inplace", "dropout", "drop_prob", "drop_rate", "drop_path_rate"}
_DROPS = re.compile(r"\w*Dropout\w*|DropPath|DropBlock\w*|StochasticDepth")
_SHOWN_IN_TRAINING = re.compile(rf"\b(?:{'|'.join(sorted(_IN_TRAINING))})=[^,]*(?:, )?")
# A network with synchronised batch statistics is the same network.
_SYNCHRONISED = re.compile(r"(?:Sync)?BatchNorm(Act)?(?:[123]d)?")
_PLAIN = (bool, int, float, str)
_LIBRARIES = ("torch", "timm", "bn_affine_adapters")


class Digest(NamedTuple):
    """The sha256 over all modules, and the first digits of each module's own, in the order of sorted names."""

    full: str
    modules: str


def traits(model: nn.Module) -> dict[str, Traits]:
    """Return the traits of every module of the plain network by canonical name, "" for the network itself."""
    found: dict[str, Traits] = {}
    for name, module in plain_modules(model):
        if not name and is_transformers(module):
            found[name] = {**traits_of(module), "configuration": configuration_of(module)}
        elif isinstance(module, Scale):  # stands for a parameter of the module that it lies in
            where, _, attribute = f".{name.removesuffix(SCALE_SUFFIX)}".rpartition(".")
            found[where[1:]][f"shape of {attribute}"] = tuple(module.weight.shape)
        else:
            found[name] = traits_of(module)
    return found


def traits_of(module: nn.Module) -> Traits:
    """Return one module's class, description, shapes and plain settings."""
    found: Traits = {
        "class": _SYNCHRONISED.sub(r"BatchNorm\1", type(module).__name__),
        "extra_repr": module.extra_repr(),
    }
    for name, parameter in module._parameters.items():
        if parameter is not None:
            found[f"shape of {name}"] = tuple(parameter.shape)
    for key, value in vars(module).items():
        if key[0] != "_" and isinstance(value, _PLAIN) and key not in _INCIDENTAL:
            found[key] = value
    return found


def computed(found: Traits) -> Traits:
    """Return those of a module's traits that change what it computes in evaluation mode."""
    if _DROPS.fullmatch(found["class"]):
        return {"class": found["class"]}
    kept = {key: value for key, value in found.items() if key not in _IN_TRAINING}
    return kept | {"extra_repr": _SHOWN_IN_TRAINING.sub("", found["extra_repr"]).removesuffix(", ")}


def is_library(module: nn.Module) -> bool:
    """Tell whether a module's class comes from a library, whose plain attributes are settings and never counters."""
    return type(module).__module__.partition(".")[0] in _LIBRARIES


def digest(found: dict[str, Traits], config: Settings) -> Digest:
    """Return the digest of a network's traits; shapes have hashes of their own, and each adapter its own head."""
    total, modules = hashlib.sha256(b"bnaffine-traits-v1\n"), []
    for name in sorted(found, key=str.encode):
        own = {key: value for key, value in computed(found[name]).items() if not key.startswith("shape of ")}
        if name in (config.head_layers or ()):
            own = {"class": own["class"]}
        elif not name:
            own.pop("num_classes", None)
            own.pop("configuration", None)  # of architecture="custom", as before there was another for Transformers
        line = f"{name}\t{json.dumps(own, sort_keys=True)}\n".encode()
        total.update(line)
        modules.append(hashlib.sha256(line).hexdigest()[:MODULE_DIGEST])
    return Digest(total.hexdigest(), "".join(modules))
