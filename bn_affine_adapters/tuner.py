"""BNOnlyTuner: injects per-adapter copies of norm layers, head and extra modules into a network."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import timm.data
import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from .backbone import check_rebuild, create, describe, infer_architecture, infer_args, inside, verify, verify_layout
from .config import CUSTOM, BNOnlyConfig
from .errors import AdapterError, AdapterNameError, AdapterTensorError, ConfigError, MissingModuleError
from .layer import BNOnlyLayer
from .norms import COPIES, head_layers, is_norm, named_layers, norm_layers
from .reinit import draw_into_, draw_norm_, reinit_, rule_for


class BNOnlyTuner(BaseTuner):
    """Inject per-adapter copies of norm layers into a network.

    The first adapter decides the backbone: with a seed the network is redrawn in place. Every further adapter has to
    agree with it, and brings its own gamma, beta, running statistics and head.
    """

    prefix = "bn_only_"
    tuner_layer_cls = BNOnlyLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Redraw and verify the network, complete a copy of the configuration, then inject the copies."""
        check_adapter_name(model, adapter_name)
        # A copy, so that the caller's configuration can be used for another network.
        config = self.peft_config[adapter_name] = deepcopy(self.peft_config[adapter_name])
        first = next((other for name, other in self.peft_config.items() if name != adapter_name), None)
        fresh, training = config.fresh, model.training
        if first is not None:
            _check_agreement(model, config, first)
        if fresh:
            _infer(model, config, first)
        else:
            verify_layout(model, config)
        _choose_layers(model, config)
        _check_nesting(model, config)
        # Everything that can be refused has been: from here on the network changes.
        if config.seed is not None and first is None:
            reinit_(
                model,
                config.seed,
                weight_init=config.weight_init,
                norm_init=config.norm_init or "uniform",
                reference=None if config.architecture == CUSTOM else lambda: _as_constructed(config),
            )
        (describe if fresh else verify)(model, config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self.train(training)

    def _prepare_adapter_config(self, peft_config: BNOnlyConfig, model_config: dict[str, Any]) -> BNOnlyConfig:
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: BNOnlyConfig, key: str) -> bool:
        return key in peft_config.target_modules

    def _create_and_replace(
        self,
        peft_config: BNOnlyConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, BNOnlyLayer) else BNOnlyLayer(target, current_key)
        copy = layer.copy_of_base()
        if current_key in (peft_config.head_layers or []):
            _fit_head(copy, current_key, peft_config)
        if peft_config.seed is not None and is_norm(copy):
            draw_norm_(copy, current_key, peft_config.seed, peft_config.norm_init or "uniform")
        layer.add_copy(adapter_name, copy, peft_config)
        setattr(parent, target_name, layer)

    def train(self, mode: bool = True) -> "BNOnlyTuner":
        """Set the mode; norm layers that no adapter owns stay in evaluation mode, so that they never drift."""
        super().train(mode)
        for module in _outside_adapters(self.model):
            if is_norm(module):
                module.train(False)
        return self

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # The copies keep the dtype of what they copy: the layers around them expect it.
        return

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        # PEFT's own would take any module with an attribute `base_layer`, such as DLA's, for one of its layers.
        names = adapter_names or self.active_adapters
        for name, layer in list(self.model.named_modules()):
            if isinstance(layer, BNOnlyLayer):
                if merge:
                    layer.merge(safe_merge, names)
                elif layer.merged:
                    layer.unmerge()
                self.model.set_submodule(name, layer.base_layer)
        if merge and names and hasattr(self.model, "num_classes"):
            self.model.num_classes = self.peft_config[names[0]].model_args.get("num_classes", self.model.num_classes)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model.train(self.model.training)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: BNOnlyConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        return {key: value for key, value in state_dict.items() if f".{COPIES}.{adapter_name}." in key}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".{COPIES}.{adapter_name}.", f".{COPIES}.", 1)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: BNOnlyConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Map a file's keys to the network's. Nothing but this adapter's own tensors is ever let through."""
        own = cls._get_adapter_state_dict(model, config, adapter_name, model.state_dict(), [])
        keys = {_bare(cls._remove_adapter_name_from_key(key, adapter_name)): key for key in own}
        given = {_bare(key): tensor for key, tensor in state_dict.items()}
        check_tensors(given, {bare: own[key] for bare, key in keys.items()})
        return {keys[bare]: tensor for bare, tensor in given.items()}


def _bare(key: str) -> str:
    return key.removeprefix("base_model.model.")


def check_tensors(given: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare names, shapes, kinds and finiteness of an adapter's tensors with what the network expects.

    Raises:
        AdapterTensorError: something is missing, extra, or not as expected.
    """
    problems = [f"missing {name}" for name in expected if name not in given]
    problems += [f"extra {name[:200]}" for name in given if name not in expected]
    for name in expected.keys() & given.keys():
        ours, theirs = expected[name], given[name]
        if ours.shape != theirs.shape:
            problems.append(f"{name} has shape {tuple(theirs.shape)}, the network needs {tuple(ours.shape)}")
        elif ours.is_floating_point() != theirs.is_floating_point() or theirs.is_complex():
            problems.append(f"{name} has dtype {theirs.dtype}, the network needs {ours.dtype}")
        elif theirs.is_floating_point() and not bool(theirs.isfinite().all()):
            problems.append(f"{name} has values that are not finite")
    if problems:
        raise AdapterTensorError(
            "The adapter's tensors do not fit the network.",
            seen=f"{len(problems)} problems; {'; '.join(sorted(problems)[:3])}",
            do="load it on the architecture it was made for, or download it again",
        )


def check_adapter_name(model: nn.Module, name: str) -> None:
    """Refuse names that are unusable as a key, or that PEFT would mistake for part of another tensor's name.

    Raises:
        AdapterNameError: with the reason.
    """
    why = None
    if not isinstance(name, str) or not name.isprintable() or not name or set(name) & set("./\\"):
        why = "it is empty, or holds a dot, a slash or an unprintable character"
    elif hasattr(nn.ModuleDict, name):
        why = "torch.nn.ModuleDict has an attribute of that name"
    elif name in BNOnlyTuner.prefix:
        why = f"PEFT takes it for part of the prefix {BNOnlyTuner.prefix!r}"
    else:
        parts = {
            part for key in [*model.state_dict(), f"base_model.model.base_layer.{COPIES}"] for part in key.split(".")
        }
        adapters = {key for layer in model.modules() if isinstance(layer, BNOnlyLayer) for key in layer.configs}
        if name in parts - adapters:
            why = "the network has a module or tensor of that name"
    if why:
        raise AdapterNameError(
            f"{name!r} cannot be the name of an adapter.", seen=why, do='choose another, e.g. "default" or "task_1"'
        )


def _check_agreement(model: nn.Module, config: BNOnlyConfig, first: BNOnlyConfig) -> None:
    mine, theirs = ((c.seed, c.weight_init if c.seed is not None else None, c.init_scheme) for c in (config, first))
    if mine != theirs:
        raise AdapterError(
            "Adapters on one network share its frozen weights, and this one was made for others.",
            seen=f"seed, weight_init and scheme {mine}; the network was drawn with {theirs}",
            do="use the same seed and weight_init, or load the adapter on a network of its own",
        )
    if any(layer.merged for layer in model.modules() if isinstance(layer, BNOnlyLayer)):
        raise AdapterError(
            "An adapter cannot be added while another is merged: it would copy merged weights.",
            seen="merged norm layers",
            do="model.unmerge_adapter() first",
        )


def _infer(model: nn.Module, config: BNOnlyConfig, first: BNOnlyConfig | None) -> None:
    if first is not None:
        config.architecture = config.architecture or first.architecture
        config.model_args = {**first.model_args, **config.model_args}
    else:
        config.architecture = config.architecture or infer_architecture(model)
        config.model_args = infer_args(model, config.model_args)
        if config.architecture != CUSTOM:
            check_rebuild(model, config)
    if config.data_config is None and getattr(model, "pretrained_cfg", None):
        data = timm.data.resolve_model_data_config(model)
        config.data_config = {key: list(v) if isinstance(v, tuple) else v for key, v in sorted(data.items())}


def _as_constructed(config: BNOnlyConfig) -> nn.Module:
    assert config.architecture is not None
    return create(config.architecture, config.model_args)


def _choose_layers(model: nn.Module, config: BNOnlyConfig) -> None:
    if config.head_layers is None:
        config.head_layers = list(head_layers(model))
    if config.train_head and not config.head_layers:
        raise MissingModuleError(
            f"{type(model).__name__} has no head that could train.",
            seen=f"get_classifier() gives no module with parameters; num_classes={getattr(model, 'num_classes', None)}",
            do="create the network with num_classes=..., or name its last layer in extra_trainable_modules",
        )
    whole = [*(config.head_layers if config.train_head else []), *config.extra_trainable_modules]
    named_layers(model, whole, "head or extra_trainable_modules")
    if config.norm_layers is None:
        # A norm layer inside a module that the adapter owns as a whole is part of that module's copy.
        config.norm_layers = [name for name in norm_layers(model) if not inside(name, whole)]
    strange = [n for n, m in named_layers(model, config.norm_layers, "norm_layers").items() if not is_norm(m)]
    if strange:
        raise ConfigError(
            "norm_layers names a module that is no norm layer.",
            seen=strange[0],
            do="name it in extra_trainable_modules to train it as a whole",
        )
    if not config.target_modules:
        raise ConfigError("Nothing is adapted.", seen="norm_layers=[] and no head", do="leave norm_layers out for all")


def _check_nesting(model: nn.Module, config: BNOnlyConfig) -> None:
    names = [*config.target_modules, *(m.canonical_name for m in model.modules() if isinstance(m, BNOnlyLayer))]
    nested = [(a, b) for a in names for b in names if b.startswith(f"{a}.")]
    if nested:
        raise ConfigError(
            "One module that an adapter owns lies inside another.",
            seen=f"{nested[0][1]} lies inside {nested[0][0]}",
            do="adapters on one network have to choose the same one of the two",
        )


def _fit_head(head: nn.Module, name: str, config: BNOnlyConfig) -> None:
    """Give a copied head this adapter's number of classes, drawing the new weights from its seed."""
    classes = config.model_args.get("num_classes")
    size = "out_features" if isinstance(head, nn.Linear) else "out_channels"
    if classes is None or getattr(head, size, classes) == classes or not isinstance(head, nn.Linear | nn.Conv2d):
        return
    setattr(head, size, classes)
    for key, tensor in list(head._parameters.items()):
        if tensor is not None:
            new = nn.Parameter(tensor.new_empty(classes, *tensor.shape[1:]), requires_grad=False)
            head.register_parameter(key, new)
    if config.seed is None:
        head.reset_parameters()
        return
    for key, tensor in head.named_parameters():
        if (rule := rule_for(head, key, config.weight_init, "keep")) is not None:
            draw_into_(tensor, rule, config.seed, f"{name}.{key}")


def _outside_adapters(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if not isinstance(child, BNOnlyLayer):
            yield child
            yield from _outside_adapters(child)
