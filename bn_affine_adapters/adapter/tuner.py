"""BNOnlyTuner: put an adapter's copies of norm layers, head and extra modules into a network, and take them out."""

import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, _check_adapters_not_merged
from torch import nn

from ..lean import Report, lean_, plain_
from ..norms.find import COPIES, is_norm
from ..norms.scales import scales_as_modules_, scales_as_parameters_
from ..seed.rules import check_memory, draw_into_, draw_norm_, reinit_, rule_for
from .checks import (
    TUNER_PREFIX,
    check_adapter_name,
    check_agreement,
    check_frozen_norms,
    check_nesting,
    choose_layers,
    infer,
)
from .config import CUSTOM, BNOnlyConfig
from .control import Control, controlled
from .layer import BNOnlyLayer, adapter_layers
from .limits import bounded
from .rebuild import build, check_rebuild, verify, verify_layout, write_fingerprints
from .tensors import bare, check_tensors


class BNOnlyTuner(BaseTuner):
    """Inject per-adapter copies of norm layers into a network.

    The first adapter decides the backbone: with a seed the network is redrawn in place. Every further adapter has to
    have the same backbone, and has its own gamma, beta, running statistics and head.
    """

    lean: Report | None = None  # what lean training saves, while it is on
    prefix = TUNER_PREFIX
    tuner_layer_cls = BNOnlyLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Redraw and verify the network, complete a copy of the configuration, then inject the copies."""
        check_adapter_name(model, adapter_name)
        for name, parameter in model.named_parameters():
            check_memory(name, parameter)
        # A copy, so that the caller's configuration can be used for another network.
        config = self.peft_config[adapter_name] = deepcopy(self.peft_config[adapter_name])
        first = next((other for name, other in self.peft_config.items() if name != adapter_name), None)
        fresh, training = config.fresh, model.training
        if fresh:
            infer(model, config, first)
        elif not config.built_here:
            verify_layout(model, config)
        if first is not None:
            check_agreement(model, config, first)
        elif config.architecture != CUSTOM and not config.built_here and config.verify != "off":
            # A configuration from a file must not ask for a larger network than the one it is loaded on.
            most = None if fresh else 2 * sum(p.numel() for p in model.parameters())
            with bounded(config, most):
                check_rebuild(model, config)
        choose_layers(model, config)
        check_nesting(model, config)
        check_frozen_norms(model, config, first)
        # Up to here nothing has changed the network; all checks that need no redrawing have passed.
        if config.seed is not None and first is None:
            reinit_(
                model,
                config.seed,
                weight_init=config.weight_init,
                norm_init=config.norm_init or "uniform",
                ones=config.ones,
                reference=None if config.architecture == CUSTOM else lambda: build(config),
            )
        (write_fingerprints if fresh else verify)(model, config)
        scales_as_modules_(model, config.trained_scales)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self.train(training)
        level = config.lean or (self.lean.level if self.lean else None)
        if level is not None:  # again for every further adapter, which puts its own layers into the network
            self.lean = lean_(model, level, (config.data_config or {}).get("input_size"))

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
        if current_key in (peft_config.control_layers or []):
            copy: nn.Module = controlled(layer.base_layer, current_key, peft_config)
        else:
            copy = layer.copy_of_base()
        if current_key in (peft_config.head_layers or []):
            _fit_head(copy, current_key, peft_config)
        if peft_config.seed is not None and peft_config.norm_init not in (None, "keep") and is_norm(copy):
            draw_norm_(copy, current_key, peft_config.seed, peft_config.norm_init)
        layer.add_copy(adapter_name, copy, peft_config)
        setattr(parent, target_name, layer)

    def train(self, mode: bool = True) -> "BNOnlyTuner":
        """Set the mode; norm layers that no adapter owns stay in evaluation mode, so that their statistics are kept."""
        super().train(mode)
        for module in _outside_adapters(self.model):
            if is_norm(module):
                module.train(False)
        return self

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # The copies keep the dtype of their base layers, which the layers around them expect.
        return

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        # PEFT's own method would unwrap any module with an attribute `base_layer`, e.g. those of timm's DLA.
        names = adapter_names or self.active_adapters
        if merge:
            _check_plain(self.model, names)
        for layer in adapter_layers(self.model):
            if merge:
                layer.merge(safe_merge, names)
            else:
                layer.unmerge()
        if merge and names and hasattr(self.model, "num_classes"):
            self.model.num_classes = self.peft_config[names[0]].model_args.get("num_classes", self.model.num_classes)
        return unwrap_(self.model)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was active, the first of those left is activated on every layer."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        _check_adapters_not_merged(self.model, adapter_name)
        was_active = adapter_name in self.active_adapters
        del self.peft_config[adapter_name]
        for layer in adapter_layers(self.model):
            layer.delete_adapter(adapter_name)
        if was_active and self.peft_config:
            name = next(iter(self.peft_config))
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {name}.",
                stacklevel=3,
            )
            self.set_adapter(name)
        elif was_active:
            self.active_adapter: str | list[str] = []

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: BNOnlyConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """Return the adapter's tensors except those that follow from its seed."""
        own = _own(state_dict, adapter_name)
        drawn = _drawn(model, adapter_name)
        # The given tensors may have another dtype than the network's.
        pairs = {key: (own[key].cpu(), drawn[key].to(own[key].dtype)) for key in own.keys() & drawn.keys()}
        follow = {key for key, pair in pairs.items() if torch.equal(*pair)}
        return {key: tensor for key, tensor in own.items() if key not in follow}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".{COPIES}.{adapter_name}.", f".{COPIES}.", 1)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: BNOnlyConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Map a file's keys to the network's; only this adapter's own tensors pass."""
        own, drawn = _own(model.state_dict(), adapter_name), _drawn(model, adapter_name)
        keys = {bare(cls._remove_adapter_name_from_key(key, adapter_name)): key for key in own}
        given = {bare(key): tensor for key, tensor in state_dict.items()}
        optional = {name for name, key in keys.items() if key in drawn}
        check_tensors(given, {name: own[key] for name, key in keys.items()}, optional)
        return drawn | {keys[name]: tensor for name, tensor in given.items()}


def unwrap_(model: nn.Module) -> nn.Module:
    """Replace each wrapped layer by its current base layer, and remove PEFT's attributes from the network."""
    plain_(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BNOnlyLayer):
            base = layer.base_layer
            model.set_submodule(name, base.plain() if isinstance(base, Control) else base)
    scales_as_parameters_(model)
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model.train(model.training)


def _own(state_dict: Mapping[str, torch.Tensor], adapter_name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state_dict.items() if f".{COPIES}.{adapter_name}." in key}


def _drawn(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """Return those tensors of an adapter that follow from its seed, under their names in the state dict."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, BNOnlyLayer)]
    return {
        f"{name}.{COPIES}.{key}": tensor
        for name, layer in layers
        if adapter_name in layer.bn_only_layers
        for key, tensor in layer.drawn(adapter_name).items()
    }


def _check_plain(model: nn.Module, names: list[str]) -> None:
    """Raise AdapterError before anything changes if a control of these adapters has no plain convolution."""
    for layer in adapter_layers(model):
        for name in names:
            if name in layer.bn_only_layers and isinstance(copy := layer.bn_only_layers[name], Control):
                copy.plain()


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
