"""Networks of Transformers and of torchvision: how they are named, built from plain arguments, and looked at.

``transformers:ViTForImageClassification`` has the settings of its configuration as creation arguments, and num_classes
for num_labels. Those of TimmWrapper are ``architecture``, and timm's own. ``torchvision:resnet18`` has those of
torchvision's function. Nothing is loaded, and no code but that of the installed libraries runs: see docs/threat-model.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any

import timm
from torch import nn

from ..errors import UnknownArchitectureError, nearest_name
from ..norms.find import head_layers, plain_modules, unwrapped
from ..settings import OTHERS, TRANSFORMERS, WRAPPER, is_plain, zoo_of

NAME = re.compile(r"\w+(\.\w+)?", re.ASCII)  # of an architecture of timm, with its optional tag of weights
_HEADS = ("fc", "classifier", "head", "heads")  # attributes, of which the last layer gives the logits

Builder = Callable[..., nn.Module]


def builder_of(architecture: str) -> Builder:
    """Return what builds an architecture from its creation arguments, without pretrained weights.

    Raises:
        UnknownArchitectureError: the name is none of timm's, Transformers' or torchvision's that may be built.
    """
    zoo, _, name = architecture.rpartition(":")
    if zoo == "transformers":
        return _of_transformers(name)
    if zoo == "torchvision":
        return _of_torchvision(name)
    _check_timm(architecture)
    # No functools.partial: an argument of the same name would replace the False.
    return lambda **args: timm.create_model(architecture, pretrained=False, **args)


def _check_timm(name: str) -> None:
    if not NAME.fullmatch(name) or not timm.is_model(name):  # for "hf-hub:..." and "local-dir:..." timm loads something
        known = timm.list_models()
        do = "import the package that registers it, or choose from timm.list_models()"
        raise _unknown(f"timm {timm.__version__}", name, known, do)


def _of_torchvision(name: str) -> Builder:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)  # the classifiers; others load a backbone
    if name not in known:
        do = "choose from torchvision.models.list_models(module=torchvision.models)"
        raise _unknown(f"torchvision {torchvision.__version__}", name, known, do)
    return lambda **args: torchvision.models.get_model(name, weights=None, **args)


def _of_transformers(name: str) -> Builder:
    try:
        import transformers
    except ImportError:
        what, do = "This adapter needs Transformers.", "pip install 'bn-affine-adapters[transformers]'"
        raise UnknownArchitectureError(what, seen="no module named transformers", do=do) from None
    kind = getattr(transformers, name, None) if name in TRANSFORMERS else None
    if kind is None:
        do = f"choose from {', '.join(TRANSFORMERS)}; any other class loads with architecture='custom' and model="
        raise _unknown(f"Transformers {transformers.__version__}", name, TRANSFORMERS, do)
    return lambda **args: kind(_configuration(kind, args))


def _unknown(zoo: str, name: str, known: Any, do: str) -> UnknownArchitectureError:
    what = f"{zoo} has no architecture {name[:80]!r} that an adapter may name."
    return UnknownArchitectureError(what, seen=f"{len(known)} registered names" + nearest_name(name[:80], known), do=do)


def _configuration(kind: Any, args: dict[str, Any]) -> Any:
    """Return the configuration of a class of Transformers; only the settings that the class itself declares pass."""
    args = dict(args)
    labels = {"num_labels": args.pop("num_classes")} if "num_classes" in args else {}
    if kind.__name__ == WRAPPER:
        _check_timm(name := str(args.pop("architecture", "")))
        return kind.config_class(architecture=name, model_args=args, **labels)
    if strange := sorted(args.keys() - _settings(kind)):
        raise TypeError(f"{kind.config_class.__name__} has no setting {', '.join(strange)[:200]}")
    return kind.config_class(**args, **labels)


def _settings(kind: Any) -> set[str]:
    """Return the settings that a class's configuration declares, without those that all configurations have."""
    from transformers import PretrainedConfig

    own, shared = (set(inspect.signature(c.__init__).parameters) for c in (kind.config_class, PretrainedConfig))
    return {key for key in own - shared - {"self", "kwargs", "out_features", "out_indices"} if key[0] != "_"}


def is_transformers(model: nn.Module) -> bool:
    """Tell whether a network is of one of the classes of Transformers that can be built again."""
    kind = type(model)
    return kind.__name__ in TRANSFORMERS and kind.__module__.startswith("transformers.models.")


def configuration_of(model: Any) -> dict[str, Any]:
    """Return those settings of a network of Transformers that are not the defaults of its class."""
    config = model.config
    if type(model).__name__ == WRAPPER:
        return {"architecture": config.architecture, **(config.model_args or {})}
    default = type(config)()
    values = {key: (getattr(config, key), getattr(default, key)) for key in sorted(_settings(type(model)))}
    return {key: _as_list(value) for key, (value, usual) in values.items() if _as_list(value) != _as_list(usual)}


def _as_list(value: Any) -> Any:
    return [_as_list(item) for item in value] if isinstance(value, list | tuple) else value


def architecture_of(model: nn.Module) -> str | None:
    """Return the architecture of a network of Transformers whose settings can all be written; None for any other."""
    plain = is_transformers(model) and all(map(is_plain, configuration_of(model).values()))
    return f"transformers:{type(model).__name__}" if plain else None


def arguments_of(model: Any, architecture: str) -> dict[str, Any]:
    """Return the creation arguments that a network of Transformers or torchvision shows."""
    if is_transformers(model):
        return {**configuration_of(model), "num_classes": model.num_labels}
    head: Any = next(iter(head_of(model, architecture).values()), None)
    return {} if head is None else {"num_classes": len(head.weight)}


def head_of(model: nn.Module, architecture: str | None) -> dict[str, nn.Module]:
    """Return the head's layers by canonical name: as timm says, or the last layer of what others call the head."""
    if zoo_of(architecture) not in OTHERS:
        return head_layers(model)
    plain: Any = unwrapped(model)
    if type(plain).__name__ == WRAPPER:
        return head_layers(model, plain.timm_model.get_classifier())
    part = next((plain.get_submodule(name) for name in _HEADS if name in plain._modules), nn.Identity())
    layers = [module for _, module in plain_modules(part) if isinstance(module, nn.Linear | nn.Conv2d)]
    return head_layers(model, layers[-1:])


def image_size_of(model: Any) -> list[int] | None:
    """Return (C, H, W) of the images of a network of Transformers, if its configuration says it."""
    size = getattr(model.config, "image_size", None) if is_transformers(model) else None
    if size is None:
        return None
    return [model.config.num_channels, *([size, size] if isinstance(size, int) else size)]
