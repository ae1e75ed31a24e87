"""One batch, several adapters: one pass through the frozen layers, each image with its own adapter.

A norm layer gathers a scale and a shift per image (`norms.scale_shift`). Other layers of which adapters have copies
(heads, extra modules, controls, rare norm classes) run copy by copy, each on its own images.
"""

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import AdapterError, check_adapter
from ..norms.find import Scale, logits_of
from ..norms.scale_shift import ScaleShift
from ..settings import zoo_of
from .method import BNOnlyConfig

BASE = "__base__"  # PEFT's word for the network without an adapter


@dataclass(frozen=True, eq=False)
class Batch:
    """Which image of a batch has which adapter.

    Attributes:
        order: the base, then the adapters; a row is a place in it.
        rows: of each image, int64 (N,).
        parts: each row that occurs, and the images that have it, int64.
        widths: of each row, the number of its logits; None if all are equal.
        known: whether the network is one of timm's, in which the entries of an image stand together wherever a layer
            gets several for each image, e.g. its windows.
    """

    order: tuple[str, ...]
    rows: Tensor
    parts: list[tuple[int, Tensor]]
    widths: list[int] | None
    known: bool

    def has_any(self, names: Collection[str]) -> bool:
        """Tell whether an image has one of these adapters."""
        return any(self.order[row] in names for row, _ in self.parts)


class Mixture:
    """The batch that runs through a network's layers with copies: one in each thread, or the one that is traced."""

    def __init__(self) -> None:
        """Begin without a batch."""
        self.running: dict[int, Batch] = {}
        self.traced: Batch | None = None  # compiled code cannot tell threads apart

    def now(self) -> Batch | None:
        """Return the batch that runs in this thread."""
        if torch.compiler.is_compiling():
            return self.traced
        return self.running.get(threading.get_ident()) if self.running else None

    def run(self, network: Callable[..., Any], batch: Batch, *args: Any, **kwargs: Any) -> Any:
        """Run a network on a batch."""
        if torch.compiler.is_compiling():
            self.traced = batch
            try:
                return network(*args, **kwargs)
            finally:
                self.traced = None
        self.traced = self.running[threading.get_ident()] = batch
        try:
            return network(*args, **kwargs)
        finally:
            self.traced = None
            del self.running[threading.get_ident()]


# -- before the network runs


def batch_of(
    network: Any, layers: Sequence[Any], configs: Mapping[str, BNOnlyConfig], names: Any, inputs: Sequence[Any]
) -> Batch:
    """Check a mixed batch, and bring the scales and shifts of the layers up to date.

    Args:
        network: with its layers with copies.
        layers: these layers.
        configs: of all adapters.
        names: the adapter of each image, as the user gave them.
        inputs: the network's arguments; the first tensor holds the images.

    Raises:
        AdapterError: this batch or network cannot be mixed.
    """
    images = next((each for each in inputs if isinstance(each, Tensor)), None)
    order = (BASE, *configs)
    _check_names(names, order, images)
    _check_state(network, layers)
    rows = [order.index(name) for name in names]
    used = sorted(set(rows))
    device = images.device if images is not None else None
    for layer in layers:
        _check_layer(layer, [order[row] for row in used])
        _refresh(layer, order, used)
    every = torch.tensor(rows, device=device)
    parts = [(row, torch.tensor([n for n, own in enumerate(rows) if own == row], device=device)) for row in used]
    known = all(zoo_of(config.architecture) == "timm" for config in configs.values())
    return Batch(order, every, parts, _widths(layers, configs, order), known)


def _check_names(names: Any, order: Sequence[str], images: Tensor | None) -> None:
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        do = 'adapter_names=["one", "two", ...], a name for each image'
        raise AdapterError("adapter_names is a list of names.", seen=repr(names)[:200], do=do)
    if images is None or len(names) != len(images):
        raise AdapterError(
            "adapter_names has to name an adapter for each image of the batch.",
            seen=f"{len(names)} names, {'no' if images is None else len(images)} images",
            do=f"a list as long as the batch; {BASE!r} stands for the network without an adapter",
        )
    for name in dict.fromkeys(names):
        if name != BASE:
            check_adapter(name, order[1:], "for an image of the batch")


def _check_state(network: nn.Module, layers: Sequence[Any]) -> None:
    if network.training or any(layer.training for layer in layers):
        what = "A batch with several adapters runs in evaluation mode only: in training mode its images would share "
        raise AdapterError(f"{what}batch statistics.", seen="training mode", do="model.eval()")
    if merged := [layer.merged_adapters[0] for layer in layers if layer.merged_adapters]:
        what = "A batch with several adapters needs an unmerged network."
        raise AdapterError(what, seen=f"merged: {merged[0]}", do="model.unmerge_adapter()")
    if any(layer.disable_adapters for layer in layers):
        what = "A batch with several adapters needs adapters that are enabled."
        raise AdapterError(what, seen="disabled adapters", do=f"name {BASE!r} for images without an adapter")


def _check_layer(layer: Any, names: Sequence[str]) -> None:
    """Raise AdapterError if images of different adapters cannot pass a layer together."""
    owners = [name for name in names if name in layer.configs]
    if owners and isinstance(layer.base_layer, Scale):
        seen = f"{layer.canonical_name.removesuffix('_scale')} of adapter {owners[0]!r}"
        what = "A layer scale that an adapter trains cannot be mixed: the network reads it once for the whole batch."
        raise AdapterError(what, seen=seen, do="run a batch for each adapter, after model.set_adapter(name)")
    for copy in (layer.bn_only_layers[name] for name in owners):
        for module in copy.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is None:
                what = "A norm layer without running statistics cannot be mixed: it would use those of the batch."
                do = "run a batch for each adapter, after model.set_adapter(name)"
                raise AdapterError(what, seen=f"{layer.canonical_name}, {module}"[:200], do=do)


def _refresh(layer: Any, order: tuple[str, ...], used: Sequence[int]) -> None:
    if not layer.configs:
        return
    module_of = partial(copy_or_base, layer)
    stack = layer.scale_shift
    if stack is None or stack.names != order or not stack.refresh_(module_of, used):
        layer.scale_shift = ScaleShift.built(order, module_of)


def copy_or_base(layer: Any, name: str) -> nn.Module:
    """Return the module that a layer runs for an adapter: its copy, or the base layer if it has none."""
    return layer.bn_only_layers._modules.get(name, layer.base_layer)


def _widths(layers: Sequence[Any], configs: Mapping[str, BNOnlyConfig], order: Sequence[str]) -> list[int] | None:
    heads = {name for config in configs.values() if config.train_head for name in config.head_layers or ()}
    for layer in layers:
        if layer.canonical_name in heads and isinstance(layer.base_layer, nn.Linear | nn.Conv2d):
            modules: list[Any] = [copy_or_base(layer, name) for name in order]
            found = [m.out_features if isinstance(m, nn.Linear) else m.out_channels for m in modules]
            return found if len(set(found)) > 1 else None
    return None


# -- while it runs


def run_layer(layer: Any, batch: Batch, *args: Any, **kwargs: Any) -> Any:
    """Run a layer with copies on entries of several adapters."""
    if not layer.configs:
        return layer.base_layer(*args, **kwargs)
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
        raise impossible(layer, f"{len(args)} arguments, {', '.join(kwargs) or 'none'} by name", "takes one tensor")
    x, images = args[0], len(batch.rows)
    times = x.shape[0] // images
    if x.shape[0] != images * times or (times != 1 and not batch.known):
        raise impossible(layer, f"{x.shape[0]} entries for {images} images", "gets one entry for each image")
    rows = batch.rows if times == 1 else batch.rows.repeat_interleave(times)
    if layer.scale_shift is not None:
        if layer.scale_shift.names != batch.order:
            raise impossible(layer, "an adapter was added or deleted by another thread", "stays as it is")
        return layer.scale_shift(x, rows)
    return _selected(layer, batch, x, rows) if torch.compiler.is_compiling() else _in_parts(layer, batch, x, times)


def impossible(layer: Any, seen: str, needs: str) -> AdapterError:
    """Return the error of a layer that a mixed batch cannot pass."""
    return AdapterError(
        f"Images of several adapters can pass a layer together only if it {needs}.",
        seen=f"{layer.canonical_name}: {seen}",
        do="run a batch for each adapter, after model.set_adapter(name)",
    )


def _in_parts(layer: Any, batch: Batch, x: Tensor, times: int) -> Tensor:
    """Run each copy on its own entries; shorter outputs, those of a head with fewer classes, are filled with zeros."""
    within = torch.arange(times, device=x.device)
    places = [(images[:, None] * times + within).flatten() for _, images in batch.parts]
    copies = [copy_or_base(layer, batch.order[row]) for row, _ in batch.parts]
    outputs = [copy(x[place]) for copy, place in zip(copies, places, strict=True)]
    shapes = [_shape(layer, output) for output in outputs]
    whole = outputs[0].new_zeros([len(x), *map(max, zip(*shapes, strict=True))])
    for place, output, shape in zip(places, outputs, shapes, strict=True):
        whole[(place, *map(slice, shape))] = output
    return whole


def _selected(layer: Any, batch: Batch, x: Tensor, rows: Tensor) -> Tensor:
    """Run each copy on all entries and select: in a graph no shape depends on how many images an adapter has."""
    outputs = {0: layer.base_layer(x)}
    for row, name in enumerate(batch.order):
        if name in layer.bn_only_layers:
            outputs[row] = layer.bn_only_layers[name](x)
    widest = [max(sizes) for sizes in zip(*(_shape(layer, output) for output in outputs.values()), strict=True)]
    whole = _filled(outputs.pop(0), widest)
    for row, output in outputs.items():
        own = (rows == row).view(-1, *[1] * (output.dim() - 1))
        whole = torch.where(own, _filled(output, widest), whole)
    return whole


def _filled(output: Tensor, widest: Sequence[int]) -> Tensor:
    missing = [(0, wide - own) for wide, own in zip(widest, output.shape[1:], strict=True)]
    return F.pad(output, [n for pair in reversed(missing) for n in pair])


def _shape(layer: Any, output: Any) -> list[int]:
    if not isinstance(output, Tensor):
        raise impossible(layer, f"a {type(output).__name__}", "returns one tensor")
    return list(output.shape[1:])


# -- after it has run


@torch.compiler.disable
def split_logits(logits: Any, batch: Batch, padded: bool) -> Any:
    """Return (N, classes) if all images have the same number; else a list of each image's, or (N, most) ``padded``."""
    rows = batch.rows.tolist()
    if batch.widths is None:
        return logits
    logits = logits_of(logits)
    own = [batch.widths[row] for row in rows]
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < max(own):
        seen = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        what = "Heads of different widths can be mixed only if the network returns one row of logits for each image."
        raise AdapterError(what, seen=seen, do="mix adapters of the same number of classes")
    if len(set(own)) == 1:
        return logits[:, : own[0]]
    if not padded:
        return [each[:width] for each, width in zip(logits, own, strict=True)]
    places = torch.arange(max(own), device=logits.device)
    return logits[:, : max(own)].masked_fill(places >= torch.tensor(own, device=logits.device)[:, None], -torch.inf)
