"""The PEFT layer: a module of the network with one copy of it, parameters and buffers, per adapter."""

import warnings
from collections.abc import Collection, Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ..errors import AdapterError
from ..norms import COPIES
from ..norms.copies import with_own_statistics
from ..norms.find import Scale, affine, is_norm
from ..norms.scale_shift import ScaleShift
from ..norms.statistics import hold_statistics_, recomputing
from ..seed.rules import Rule, draw_into_, rule_for
from .control import Control
from .method import BNOnlyConfig
from .mixed import Mixture, impossible, run_layer


def trained(module: nn.Module, name: str, config: BNOnlyConfig) -> list[str]:
    """Return which parameters an adapter's configuration trains of a module (copy or base layer) of canonical name."""
    if name in config.whole_modules or isinstance(module, Control | Scale):
        return [key for key, _ in module.named_parameters()]
    gamma, beta = affine(module)
    # EvoNorm's v weights its input, and FRN's tau is a threshold in place of ReLU's 0: they train with gamma and beta.
    further = [key if key in module._parameters and is_norm(module) else None for key in ("v", "tau")]
    on = zip((gamma, beta, *further), (config.train_gamma, config.train_beta) * 2, strict=True)
    return [key for key, trains in on if key and trains and module._parameters[key] is not None]


def drawn(module: nn.Module, name: str, config: BNOnlyConfig) -> dict[str, Rule]:
    """Return the rules of a norm layer's gamma and beta that do not train and are drawn from the seed.

    An adapter's file need not hold them. Args: as in `trained`.
    """
    if config.seed is None or config.norm_init in (None, "keep") or not is_norm(module):
        return {}
    fixed = [key for key in affine(module) if key and key not in trained(module, name, config)]
    rules = {key: rule_for(module, key, config.weight_init, config.norm_init) for key in fixed}
    return {key: rule for key, rule in rules.items() if rule is not None}


class BNOnlyLayer(nn.Module, BaseTunerLayer):
    """Run the active adapter's copy of a module, or the module itself if that adapter has no copy.

    The whole module is copied, so that fused activations (`BatchNormAct2d`), eps, momentum, dtype and running
    statistics are kept. The running statistics of the base layer and of inactive copies never change: the base layer
    always runs in evaluation mode, and so do the norm layers of an adapter whose running statistics are frozen.
    """

    adapter_layer_names = (COPIES,)
    other_param_names = ("configs",)
    mixture: Mixture | None = None  # of the network: whether a batch of several adapters runs
    scale_shift: ScaleShift | None = None  # of the base layer and all copies, for such a batch

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        """Wrap ``base_layer``, whose canonical name in the network is ``name``."""
        super().__init__()
        self.base_layer = base_layer
        self.bn_only_layers = nn.ModuleDict()
        self.configs: dict[str, BNOnlyConfig] = {}
        self.merged_adapters: list[str] = []
        self.canonical_name = name
        self._active_adapter: str | list[str] = []
        self._flags_while_disabled: dict[str, bool] = {}
        self._with_gradients: set[str] = set()  # adapters that may have parameters with gradients
        self.training = base_layer.training

    def add_copy(self, adapter_name: str, copy: nn.Module, config: BNOnlyConfig) -> None:
        """Hold ``copy`` for an adapter; the adapter's configuration decides which of its parameters train."""
        self.bn_only_layers[adapter_name] = copy
        self.configs[adapter_name] = config
        copy.requires_grad_(False)
        self.train(self.training)

    def copy_of_base(self) -> nn.Module:
        """Return a deep copy of the base layer, in this layer's mode."""
        return deepcopy(self.base_layer).train(self.training)

    def active_module(self) -> nn.Module:
        """Return the module that `forward` runs."""
        names = self.merged_adapters or self.active_adapters
        if self.disable_adapters or not names:
            return self.base_layer
        if len(names) > 1:
            raise AdapterError(
                "Two adapters of norm layers cannot be active at once.",
                seen=f"active: {', '.join(names)}",
                do="model.set_adapter(one_name)",
            )
        return self.bn_only_layers[names[0]] if names[0] in self.bn_only_layers else self.base_layer  # noqa: SIM401

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the active adapter's copy; its running statistics move once a step, not while it is computed again.

        In a batch of several adapters, run each image's own: see `mixed`.
        """
        if self.mixture is not None and (batch := self.mixture.now()) is not None:
            return run_layer(self, batch, *args, **kwargs)
        active = self.active_module()
        if self.training:
            self.check_trainable(active)
        if self.training and recomputing():
            active = with_own_statistics(active)
        return active(*args, **kwargs)

    def check_trainable(self, active: nn.Module) -> None:
        """Raise AdapterError if the module that runs belongs to a compact adapter, which is for inference."""
        names = self.merged_adapters or self.active_adapters
        if active is not self.base_layer and self.configs[names[0]].compact:
            raise AdapterError(
                "A compact adapter is for inference: its statistics are folded into gamma and beta.",
                seen=f"{names[0]!r} runs in training mode, or on other statistics",
                do="model.eval(); to go on training, load the adapter that it was exported from",
            )

    def trainable(self, adapter_name: str) -> list[str]:
        """Return the parameters that an adapter's configuration trains, as named in `bn_only_layers`."""
        copy, config = self.bn_only_layers[adapter_name], self.configs[adapter_name]
        return [f"{adapter_name}.{key}" for key in trained(copy, self.canonical_name, config)]

    def drawn(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """Return the tensors of an adapter's copy that follow from its seed, drawn anew, named as in `trainable`."""
        copy, config = self.bn_only_layers[adapter_name], self.configs[adapter_name]
        tensors = {}
        for key, rule in drawn(copy, self.canonical_name, config).items():
            assert config.seed is not None  # or nothing is drawn
            tensor = torch.empty_like(copy.get_parameter(key), device="cpu", requires_grad=False)
            draw_into_(tensor, rule, config.seed, f"{self.canonical_name}.{key}")
            tensors[f"{adapter_name}.{key}"] = tensor
        return tensors

    def train(self, mode: bool = True) -> "BNOnlyLayer":
        """Set the mode of the copies; the base layer and frozen running statistics stay in evaluation mode."""
        super().train(mode)
        self.base_layer.train(False)
        for name, copy in self.bn_only_layers.items():
            if self.configs[name].running_statistics == "frozen":
                for module in copy.modules():
                    if is_norm(module):
                        module.train(False)
        self._hold_statistics()
        return self

    def _hold_statistics(self, among: Collection[str] | None = None) -> None:
        """Protect all running statistics but those that move: of the copy that runs. Without names, look at all."""
        if among is None:
            hold_statistics_(self.base_layer)
        running = () if self.disable_adapters else self.merged_adapters or self.active_adapters
        for name in self.configs if among is None else self.configs.keys() & among:
            held = name not in running or self.configs[name].running_statistics == "frozen"
            hold_statistics_(self.bn_only_layers[name], held)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate an adapter: its trainable parameters require gradients, unless in inference mode."""
        before = self.active_adapters
        self._active_adapter = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        # In inference mode only those that were given gradients, so that switching stays fast with many adapters.
        for name in (self._with_gradients if inference_mode else self.configs.keys()) & self.configs.keys():
            self._require_grad({f"{name}.{key}": False for key, _ in self.bn_only_layers[name].named_parameters()})
        self._with_gradients.clear()
        if not inference_mode:
            self.set_requires_grad(self._active_adapter)
        self._hold_statistics({*before, *self._active_adapter})

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Turn gradients on or off for what the adapters train."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in set(names) & set(self.bn_only_layers):
            self._require_grad(dict.fromkeys(self.trainable(name), requires_grad))
            self._with_gradients.add(name)

    def _require_grad(self, flags: dict[str, bool]) -> None:
        # While the adapters are disabled nothing requires gradients; the flags are kept for when they are enabled.
        if self.disable_adapters:
            self._flags_while_disabled.update(flags)
            return
        for name, flag in flags.items():
            self.bn_only_layers.get_parameter(name).requires_grad_(flag)

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable the adapters; enabling restores which parameters require gradients."""
        if enabled != self.disable_adapters:
            return
        if self.merged:
            self.unmerge()
        if not enabled:
            self._flags_while_disabled = {n: p.requires_grad for n, p in self.bn_only_layers.named_parameters()}
            self.bn_only_layers.requires_grad_(False)
        self._disable_adapters = not enabled
        if enabled:
            self._require_grad(self._flags_while_disabled)
        self._hold_statistics()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter's copy; the tuner chooses which adapter is active next, the same for all layers."""
        if adapter_name in self.bn_only_layers:
            del self.bn_only_layers[adapter_name]
            del self.configs[adapter_name]
        self._with_gradients.discard(adapter_name)
        kept = {n: flag for n, flag in self._flags_while_disabled.items() if not n.startswith(f"{adapter_name}.")}
        self._flags_while_disabled = kept
        self._active_adapter = [name for name in self.active_adapters if name != adapter_name]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Run an adapter's copy, whichever adapter is active, until `unmerge`.

        Nothing is computed and nothing moves: the copy and the base layer keep their values and their names in the
        state dict, so that saving and loading reach the same tensors as before.

        Args:
            safe_merge: unused here; `BNOnlyTuner` checks all layers before the first is merged.
            adapter_names: one name; by default the active adapter.
        """
        names = check_adapters_to_merge(self, adapter_names)
        if len(names) > 1:
            raise AdapterError(
                "Only one adapter of norm layers can be merged.",
                seen=f"asked for: {', '.join(names)}",
                do=f"merge_and_unload(adapter_names=[{names[0]!r}])",
            )
        if names and self.merged:
            warnings.warn(f"Already merged with {self.merged_adapters[0]}. Unmerging first.", stacklevel=2)
            self.unmerge()
        self.merged_adapters.extend(names)
        self._hold_statistics()

    def unmerge(self) -> None:
        """Undo `merge`."""
        self.merged_adapters.clear()
        self._hold_statistics()

    def remaining(self) -> nn.Module:
        """Return what takes this layer's place in the plain network: the merged copy, or the base layer."""
        owned = [self.bn_only_layers[name] for name in self.merged_adapters if name in self.bn_only_layers]
        return owned[0] if owned else self.base_layer

    @property
    def weight(self) -> torch.Tensor:
        """The active module's weight: some networks read it instead of calling the layer."""
        return self._read("weight")

    @property
    def bias(self) -> torch.Tensor:
        """The active module's bias."""
        return self._read("bias")

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the active module, e.g. `eps` or `in_features`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", COPIES):  # not set yet, while __init__ or unpickling runs
                raise
            return self._read(name)

    def _read(self, name: str) -> Any:
        batch = None if self.mixture is None else self.mixture.now()
        value = getattr(self.active_module() if batch is None else self.base_layer, name)
        if batch is not None and isinstance(value, torch.Tensor) and batch.has_any(self.configs):
            raise impossible(self, f"the network reads its {name}", "is called, and its tensors are not read")
        return value

    def __repr__(self) -> str:
        """Show the layer as PEFT's other tuners do."""
        return "bn_only." + super().__repr__()


def adapter_layers(model: nn.Module) -> Iterator[BNOnlyLayer]:
    """Yield the layers of a network that hold per-adapter copies, each once.

    None lies inside another, so that the copies, which may be thousands of modules, are not walked.
    """
    waiting, seen = [model], {model}
    while waiting:
        module = waiting.pop()
        if isinstance(module, BNOnlyLayer):
            yield module
            continue
        new = [child for child in module._modules.values() if child is not None and child not in seen]
        seen.update(new)
        waiting += reversed(new)
