"""BNOnlyTuner: put an adapter's copies of norm layers, head and extra modules into a network, and take them out."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..errors import AdapterError, check_adapter, check_choice
from ..lean import Report, lean_, plain_
from ..norms import COPIES
from ..norms.find import STATISTICS, canonical, is_norm, without_wrappers
from ..norms.scales import scales_as_modules_, scales_as_parameters_
from ..norms.statistics import hold_statistics_
from ..seed.generator import OwnGenerator
from ..seed.rules import check_memory, draw_into_, draw_norm_, reinit_, rule_for
from ..settings import CUSTOM, bare
from .blend import blended, fill_
from .checks import (
    TUNER_PREFIX,
    check_adapter_name,
    check_agreement,
    check_frozen_norms,
    check_nesting,
    check_network,
    check_shared,
    check_wrappable,
    choose_layers,
    infer,
    warn_of_lost_base,
)
from .control import Control, Mask, controlled
from .layer import BNOnlyLayer, adapter_layers
from .limits import bounded
from .method import BNOnlyConfig
from .mixed import Batch, Mixture, batch_of
from .rebuild import (
    build,
    check_rebuild,
    check_traits,
    frozen_difference,
    holder,
    verify,
    verify_layout,
    write_fingerprints,
    write_traits,
)
from .tensors import check_tensors, digest_of
from .traits import Traits, traits
from .unchanged import allow_fusing_, check_complete, check_settings, check_unchanged, forbid_fusing_, settle


class BNOnlyTuner(BaseTuner):
    """Inject per-adapter copies of norm layers into a network.

    The first adapter decides the backbone: with a seed the network is redrawn in place. Every further adapter has to
    have the same backbone, and has its own gamma, beta, running statistics and head.
    """

    lean: Report | None = None  # what lean training saves, while it is on
    wrapped: dict[str, Traits]  # the network's traits when it was wrapped
    _base_classes: int | None = None  # of the network without an adapter
    mixture: Mixture  # the batch of several adapters that runs, if one does
    _loading = False  # whether the adapter that is injected comes from a file
    prefix = TUNER_PREFIX
    tuner_layer_cls = BNOnlyLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Redraw and verify the network, complete a copy of the configuration, then inject the copies."""
        check_adapter_name(model, adapter_name)
        for name, parameter in model.named_parameters():
            check_memory(name, parameter)
        # A copy, so that the caller's configuration can be used for another network.
        config = self.peft_config[adapter_name] = deepcopy(self.peft_config[adapter_name])
        others = [name for name in self.peft_config if name != adapter_name]
        first = self.peft_config[others[0]] if others else None
        config.check()  # again, since a value may have been changed after it was made
        training = model.training
        if first is not None:
            check_settings(model, others[0], first, self.wrapped)
        else:
            if not config.built_here:
                check_network(model)
                check_wrappable(model)
            self.wrapped, self.mixture = traits(model), Mixture()
            self._base_classes = getattr(model, "num_classes", None)
        self._check_network(model, config, first)
        # Up to here nothing has changed the network; all checks that need no redrawing have passed.
        if first is None:
            _redraw_(model, config)
        self._loading = not config.fresh
        self._verify_or_record(model, config, first)
        _unwrap_inside(model, config)
        scales_as_modules_(model, config.trained_scales)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        _hold_frozen_norms(model)
        forbid_fusing_(model)
        self.train(training)
        level = config.lean or (self.lean.level if self.lean else None)
        if level is not None:  # again for every further adapter, which puts its own layers into the network
            self.lean = lean_(model, level, (config.data_config or {}).get("input_size"))

    def _check_network(self, model: nn.Module, config: BNOnlyConfig, first: BNOnlyConfig | None) -> None:
        """Complete a configuration, and check that network, configuration and other adapters fit each other."""
        if config.fresh:
            infer(model, config, first)
        elif not config.built_here:
            if config.compact:  # it leaves out the names of layers that follow from the network
                choose_layers(model, config)
            verify_layout(model, config)
            check_traits(self.wrapped, config)
        if first is not None:
            check_agreement(model, config, first)
        elif config.architecture != CUSTOM and not config.built_here and config.verify != "off":
            # A configuration from a file must not ask for a larger network than the one it is loaded on.
            most = None if config.fresh else 2 * sum(p.numel() for p in model.parameters())
            with bounded(config, most):
                check_rebuild(self.wrapped, config)
        choose_layers(model, config)
        check_nesting(model, config)
        check_shared(model, config)
        check_frozen_norms(model, config, first)

    def _verify_or_record(self, model: nn.Module, config: BNOnlyConfig, first: BNOnlyConfig | None) -> None:
        """Compare the network with a loaded adapter's fingerprints, or write those of a new adapter."""
        if config.fresh:
            if first is not None and (found := frozen_difference(model, first)):
                settle(model, first, found)
            write_fingerprints(model, config, self.wrapped)
            warn_of_lost_base(model, config)
            return
        verify(model, config)
        if config.compact:  # its file holds the first digits alone
            write_fingerprints(model, config, self.wrapped)
        elif config.traits_fingerprint is None or config.architecture == CUSTOM:
            write_traits(self.wrapped, config)  # format 1 has none; another one has warned, or was not asked for

    def _prepare_adapter_config(self, peft_config: BNOnlyConfig, model_config: dict[str, Any]) -> BNOnlyConfig:
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: BNOnlyConfig, key: str) -> bool:
        return canonical(key) in peft_config.target_modules

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
        current_key = canonical(current_key)
        layer = target if isinstance(target, BNOnlyLayer) else BNOnlyLayer(target, current_key)
        if current_key in (peft_config.control_layers or []):
            copy: nn.Module = controlled(layer.base_layer, current_key, peft_config)
        else:
            copy = layer.copy_of_base()
        if current_key in (peft_config.head_layers or []):
            # The head of an adapter that is loaded is filled from its file: no number is taken from the process.
            with OwnGenerator() if self._loading else nullcontext():
                _fit_head(copy, current_key, peft_config)
        if peft_config.seed is not None and peft_config.norm_init not in (None, "keep") and is_norm(copy):
            draw_norm_(copy, current_key, peft_config.seed, peft_config.norm_init)
        layer.add_copy(adapter_name, copy, peft_config)
        setattr(parent, target_name, layer)

    def check_unchanged(self, adapter_name: str) -> None:
        """Raise AdapterError unless loading an adapter will give what the network computes with it; see `unchanged`."""
        config = self.peft_config[adapter_name]
        check_unchanged(self.model, adapter_name, config, self.wrapped)
        warn_of_lost_base(self.model, config)

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
            self._check_merge(names, safe_merge)
            _check_plain(self.model, names)
        for layer in adapter_layers(self.model):
            if merge:
                layer.merge(safe_merge, names)
            else:
                layer.unmerge()
        self._follow_classes(names if merge else [])
        return unwrap_(self.model)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Run an adapter on every layer, whichever adapter is active, until `unmerge_adapter`.

        Args:
            adapter_names: one name; by default the active adapter.
            safe_merge: refuse an adapter with values that are not finite.
        """
        self._check_merge(self.active_adapters if adapter_names is None else adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)
        self._follow_classes()

    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`."""
        super().unmerge_adapter()
        self._follow_classes()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate an adapter. Args: as in `peft.PeftModel.set_adapter`."""
        # PEFT's own method would walk the copies of all adapters.
        layers = list(adapter_layers(self.model))
        if merged := [layer for layer in layers if layer.merged_adapters]:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=4)
            for layer in merged:
                layer.unmerge()
        for layer in layers:
            layer.set_adapter(adapter_name, inference_mode)
        self.active_adapter: str | list[str] = adapter_name
        self._follow_classes()

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._follow_classes()

    def _follow_classes(self, names: list[str] | None = None) -> None:
        """Set the network's num_classes to that of the head that runs: of the adapters named, or as the layers say."""
        if self._base_classes is None:
            return
        if names is None:
            layers = (layer for layer in adapter_layers(self.model) if not layer.disable_adapters)
            names = next((layer.merged_adapters or layer.active_adapters for layer in layers), [])
        config = self.peft_config.get(names[0]) if len(names) == 1 else None
        own = config.model_args.get("num_classes") if config is not None and config.train_head else None
        self.model.num_classes = self._base_classes if own is None else own

    @torch.compiler.disable
    @torch.inference_mode(False)
    def batch_of(self, names: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        """Check the adapters named for the images of a batch, and prepare the layers for them: see `mixed`."""
        layers = list(adapter_layers(self.model))
        for layer in layers:
            layer.mixture = self.mixture
        return batch_of(self.model, layers, self.peft_config, names, [*args, *kwargs.values()])

    def _check_merge(self, names: list[str], safe_merge: bool) -> None:
        """Raise AdapterError before anything changes if there is no such adapter, or it is not safe to merge."""
        if isinstance(names, str) or not set(names) <= self.peft_config.keys():
            seen, do = f"{names!r}; adapters: {', '.join(self.peft_config)}", 'adapter_names=["name"]'
            raise AdapterError("One existing adapter can be merged, and its name is given in a list.", seen=seen, do=do)
        for layer in adapter_layers(self.model) if safe_merge else ():
            for name in set(names) & set(layer.configs):
                for key, tensor in layer.bn_only_layers[name].state_dict().items():
                    if not tensor.isfinite().all():
                        seen = f"{layer.canonical_name}.{key}"
                        do = "merge an adapter whose training did not diverge, or safe_merge=False"
                        raise AdapterError(f"The adapter {name!r} has values that are not finite.", seen=seen, do=do)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        head: str | None = None,
    ) -> None:
        """Add an adapter that is the weighted mean of others and the base, which has what is left of 1.

        Running statistics are pooled as those of a mixture, by the law of total variance. They are those of the
        adapters apart: `recalibrate` computes those of the blend.

        Args:
            adapters: their names.
            weights: of each. With BatchNorm, at least 0 and at most 1 in sum.
            adapter_name: of the new adapter.
            combination_type: only "linear"; as in PEFT's LoRA.
            head: the adapter whose head the new one gets. By default heads are averaged, class by class, if all have
                the same ``label_names``; that of a single adapter is kept.

        Raises:
            AdapterError: there is no such adapter, the heads do not match, or there are no statistics for the weights.
            ConfigError: adapters and weights do not match.
        """
        check_choice("combination_type", combination_type, ("linear",))
        if adapter_name in self.peft_config:
            what, do = f"There is an adapter {adapter_name!r} already.", "choose another name, or delete_adapter first"
            raise AdapterError(what, seen=f"adapters: {', '.join(self.peft_config)}", do=do)
        config = blended(self.model, self.peft_config, adapters, weights, head)
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
            fill_(self.model, adapter_name, adapters, weights, head)
        except Exception:
            self.delete_adapter(adapter_name)
            raise

    def scale_adapter(self, adapter_name: str, scale: float, new_name: str) -> None:
        """Add an adapter between the base, at 0, and an adapter, at 1, whose head it keeps.

        Args: as of `add_weighted_adapter`; with BatchNorm, ``scale`` is from 0 to 1.
        """
        self.add_weighted_adapter([adapter_name], [scale], new_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was active, the first of those left is activated on every layer."""
        check_adapter(adapter_name, self.peft_config, "to delete")
        if any(adapter_name in layer.merged_adapters for layer in adapter_layers(self.model)):
            what, do = "An adapter cannot be deleted while it is merged.", "model.unmerge_adapter() first"
            raise AdapterError(what, seen=f"merged: {adapter_name}", do=do)
        was_active = adapter_name in self.active_adapters
        del self.peft_config[adapter_name]
        for layer in adapter_layers(self.model):
            layer.delete_adapter(adapter_name)
        if was_active and self.peft_config:
            name = next(iter(self.peft_config))
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {name}.",
                stacklevel=4,
            )
            self.set_adapter(name)
        elif was_active:
            self.active_adapter = []
            self._follow_classes()

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: BNOnlyConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """Return the adapter's tensors except those that follow from its seed; write their digest to its configuration.

        Raises:
            AdapterError: a module with a copy of this adapter was replaced.
        """
        check_complete(model, adapter_name, config)
        own = _converted(model, adapter_name, _own(state_dict, adapter_name), Mask.stored)
        drawn = _drawn(model, adapter_name)
        # The given tensors may have another dtype than the network's.
        pairs = {key: (own[key].cpu(), drawn[key].to(own[key].dtype)) for key in own.keys() & drawn.keys()}
        follow = {key for key, pair in pairs.items() if torch.equal(*pair)}
        held = {without_wrappers(key): tensor for key, tensor in own.items() if key not in follow}
        names = {key: bare(cls._remove_adapter_name_from_key(key, adapter_name)) for key in held}
        config.tensors_digest = digest_of({names[key]: tensor for key, tensor in held.items()})
        return held

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".{COPIES}.{adapter_name}.", f".{COPIES}.", 1)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: BNOnlyConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Map a file's keys to the network's; only this adapter's own tensors pass."""
        own = _converted(model, adapter_name, _own(model.state_dict(), adapter_name), Mask.stored)
        drawn = _drawn(model, adapter_name)
        keys = {bare(without_wrappers(cls._remove_adapter_name_from_key(key, adapter_name))): key for key in own}
        given = {bare(key): tensor for key, tensor in state_dict.items()}
        optional = {name for name, key in keys.items() if key in drawn}
        check_tensors(given, {name: own[key] for name, key in keys.items()}, optional)
        found = drawn | {keys[name]: tensor for name, tensor in given.items()}
        return _converted(model, adapter_name, found, Mask.loaded)


def _redraw_(model: nn.Module, config: BNOnlyConfig) -> None:
    """Redraw a network in place, if its configuration has a seed."""
    if config.seed is not None:
        reinit_(
            model,
            config.seed,
            weight_init=config.weight_init,
            norm_init=config.norm_init or "uniform",
            ones=config.ones,
            reference=None if config.architecture == CUSTOM else lambda: build(config),
        )


def unwrap_(model: nn.Module) -> nn.Module:
    """Replace each wrapped layer by its merged copy or base layer, and remove PEFT's attributes from the network."""
    plain_(model)
    allow_fusing_(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BNOnlyLayer):
            plain = layer.remaining()
            model.set_submodule(name, plain.plain() if isinstance(plain, Control) else plain)
    hold_statistics_(model, False)
    scales_as_parameters_(model)
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model.train(model.training)


def _own(state_dict: Mapping[str, torch.Tensor], adapter_name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state_dict.items() if f".{COPIES}.{adapter_name}." in key}


def _converted(
    model: nn.Module, adapter_name: str, tensors: dict[str, torch.Tensor], how: Callable[..., dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors, by name in the state dict, with those of each mask as ``how`` gives them."""
    for name, layer in model.named_modules():
        if not isinstance(layer, BNOnlyLayer) or adapter_name not in layer.configs:
            continue
        if not isinstance(mask := layer.bn_only_layers[adapter_name], Mask):
            continue
        prefix = f"{name}.{COPIES}.{adapter_name}."
        held = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        others = {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix)}
        tensors = others | {prefix + key: tensor for key, tensor in how(mask, held).items()}
    return tensors


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


def _hold_frozen_norms(model: nn.Module) -> None:
    """Put norm layers that no adapter owns into a layer without copies, which keeps them in evaluation mode.

    So neither their statistics change nor their output, whoever calls ``train()``, and on whichever part.
    """
    modules = list(model.named_modules())
    wrapped = {path for path, module in modules if isinstance(module, BNOnlyLayer)}
    for path, module in modules:
        counts = module._buffers and any(module._buffers.get(name) is not None for name in STATISTICS)
        if counts and is_norm(module) and not holder(path, wrapped):
            layer = BNOnlyLayer(module, canonical(path))
            model.set_submodule(path, layer.train(module.training))


def _unwrap_inside(model: nn.Module, config: BNOnlyConfig) -> None:
    """Take layers without copies out of modules that an adapter will own as a whole."""
    for path, layer in list(model.named_modules()):
        if not isinstance(layer, BNOnlyLayer) or layer.configs:
            continue
        if holder(layer.canonical_name.rpartition(".")[0], config.whole_modules):
            model.set_submodule(path, layer.base_layer)
