"""Remove the channels of a network that are the same for every image; it computes the same with less."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..adapter.method import BNOnlyConfig
from ..errors import ConfigError, NetworkError, OutputFolderError, check_choice
from ..lean.rewrite import trace
from ..model.peft_model import BNOnlyPeftModel
from ..norms.statistics import BATCH_NORMS
from ..settings import as_channels
from ..sharing.folder import write_file
from .channels import Analysis, Channels, Layer, pads_zeros
from .compact import _accuracies, _logits
from .exporting import _chosen, _creation, _merged, _on_cpu
from .graphs import graph_of

# Why a channel stays; the last of these that holds is reported.
READ = "read by another layer, where it varies"
TIED = "added to or multiplied with a channel that varies"
BORDER = "before zero padding, behind which it would vary at the borders"
LAST = "the last channel of a layer"
ERROR = 1e-4  # of the largest output; rounding makes less than 1e-5


@dataclass
class PruneReport:
    """What `prune` removed. Pairs are (before, after).

    Attributes:
        dead: channels of norm layers that are constant there, or behind the activation that follows.
        kept: how many of the dead ones stay, by the reason.
        channels: of norm layers.
        parameters: of the network.
        multiply_adds: for one image.
        difference: of the outputs for two random images, over the largest output.
        accuracy: before and after, with the threshold; "" without ``test``.
    """

    dead: int
    kept: dict[str, int]
    channels: tuple[int, int]
    parameters: tuple[int, int]
    multiply_adds: tuple[int, int]
    difference: float
    accuracy: str = ""

    def __str__(self) -> str:
        """Say it in a few lines."""
        lines = [f"{self.dead:,} of {self.channels[0]:,} channels of norm layers are constant"]
        lines += [f"{count:,} of them stay: {reason}" for reason, count in self.kept.items()]
        if self.parameters[0] == self.parameters[1]:
            return "\n".join([*lines, "nothing to remove"])
        for key in ("channels", "parameters", "multiply_adds"):
            before, after = getattr(self, key)
            lines.append(f"{key.replace('_', '-')}: {before:,} before, {after:,} after, {1 - after / before:.1%} less")
        lines.append(f"largest difference {self.difference:.1e} of the largest output, for random images")
        return "\n".join([*lines, self.accuracy]).rstrip()


def prune(
    model: nn.Module, threshold: float = 0.0, *, inputs: Literal["any", "images"] = "any",
    input_size: Sequence[int] | None = None, test: Iterable[tuple[Tensor, Tensor]] = (),
    file: str | os.PathLike[str] | None = None,
) -> tuple[nn.Module, PruneReport]:  # fmt: skip
    """Return a smaller network for inference that computes the same, and what was removed; the model is not changed.

    A channel leaves if it is proved to be constant for every input: its gamma is 0, or a ReLU gets nothing above 0.
    Its constant moves into the layers that read it. The same adapter always gives the same network.

    Args:
        model: of `get_bn_only_model` or `load_bn_only_model`, or a plain network.
        threshold: gammas of BatchNorm that are smaller, without sign, are set to 0 first, which changes the outputs.
        inputs: "any" tensor; or "images" alone, prepared as data_config says, from pixels between 0 and 1.
        input_size: (C, H, W) of an image; by default that of data_config, or timm's.
        test: batches (images, labels), to measure the accuracy before and after.
        file: a new file for the network as a program, ``torch.export.load(file).module()(images)``.

    Raises:
        ConfigError: the threshold is no number from 0, or the size of images is not known.
        NetworkError: torch.fx or torch.export cannot trace the network, or the smaller one computes something else.
        OutputFolderError, FileError: the file exists, or cannot be written.

    >>> import timm
    >>> network = timm.create_model("cifar_resnet14")
    >>> _ = network.blocks[0].bn1.weight.data[:8].zero_()
    >>> prune(network)[1].channels
    (560, 552)
    """
    _check(threshold, inputs, file)
    before, config = _plain(model)
    network = _zero_(deepcopy(before), threshold)
    low, high, images = _images(network, config, inputs, input_size)
    report = _prune_(network, low, high, images)
    report.accuracy = _accuracies(before, network, batches) if (batches := list(test)) else ""
    if file is not None:
        write_file(Path(file), graph_of(network, {}, config, [*images.shape[1:]], "pt2")[0])
    return network, report


def _check(threshold: Any, inputs: Any, file: str | os.PathLike[str] | None) -> None:
    check_choice("inputs", inputs, ("any", "images"))
    if not isinstance(threshold, int | float) or not threshold >= 0:
        raise ConfigError("The threshold is no number from 0.", seen=f"threshold={threshold!r}", do="threshold=0.01")
    if file is not None and Path(file).exists():
        raise OutputFolderError(f"{file} exists.", seen=str(file), do="choose another name")


def _plain(model: nn.Module) -> tuple[nn.Module, BNOnlyConfig]:
    """Return a copy of the network in float32 on the CPU, and the adapter's settings."""
    if not isinstance(model, BNOnlyPeftModel):
        return _on_cpu(deepcopy(model)).float(), BNOnlyConfig()
    name = _chosen(model, None)
    model.base_model.check_unchanged(name)
    return _merged(model, name).float(), model.peft_config[name]


def _zero_(network: nn.Module, threshold: float) -> nn.Module:
    for module in network.modules():
        if type(module).forward in BATCH_NORMS and (gamma := module._parameters["weight"]) is not None:
            gamma.data[gamma.abs() < threshold] = 0
    return network


def _images(network: Any, config: BNOnlyConfig, inputs: str, size: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return bounds for each channel of an input, float64, and two random images between them."""
    size = size or _creation(network, config)[1]
    data = {**(getattr(network, "pretrained_cfg", None) or {}), **(config.data_config or {})}
    if size is None or (inputs == "images" and not {"mean", "std"} <= data.keys()):
        seen, do = "no input_size, or no mean and std", 'input_size=(3, height, width), and inputs="any"'
        raise ConfigError("It is not known which images the network takes.", seen=seen, do=do)
    images = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    if inputs == "any":
        bound = torch.full((size[0],), torch.inf, dtype=torch.float64)
        return -bound, bound, images
    mean, std = (torch.tensor(as_channels(data[key], size[0]), dtype=torch.float64) for key in ("mean", "std"))
    return -mean / std, (1 - mean) / std, ((images - mean[:, None, None]) / std[:, None, None]).float()


def _prune_(network: nn.Module, low: Tensor, high: Tensor, images: Tensor) -> PruneReport:
    """Take constant channels out of a network."""
    analysis = _analysis(network, low, high, images)
    (expected, *old), staying = _run(network, images), _staying(analysis)
    for layer in analysis.layers:
        _shrink_(layer, staying.codes > 0)
    found, *new = _run(network, images)
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    if not difference <= ERROR:
        seen = f"largest difference {difference:.1e} of the largest output"
        raise NetworkError("The smaller network computes something else.", seen=seen, do="use the network as it is")
    norms = [(staying.codes[layer.inputs.ids], layer.dead) for layer in analysis.layers if layer.is_norm]
    dead = [code for codes, constant in norms for code in codes[constant].tolist()]
    return PruneReport(
        dead=len(dead),
        kept=dict(Counter(staying.reasons[code] for code in dead if code).most_common()),
        channels=(sum(len(codes) for codes, _ in norms), sum(int(codes.count_nonzero()) for codes, _ in norms)),
        parameters=(old[0], new[0]),
        multiply_adds=(old[1], new[1]),
        difference=difference,
    )


def _analysis(network: nn.Module, low: Tensor, high: Tensor, images: Tensor) -> Analysis:
    try:
        graph, _ = trace(deepcopy(network))  # a copy: a forward may leave something behind in its module
        analysis = Analysis(network, graph, low, high)
        with torch.no_grad():
            analysis.run(images, enable_io_processing=False)
    except Exception as error:  # a forward is any code
        what = (
            f"{type(network).__name__} cannot be pruned: torch.fx cannot trace it with images of {[*images.shape[1:]]}."
        )
        do = "input_size=(C, H, W) that it takes, or use the network as it is"
        raise NetworkError(what, seen=f"{type(error).__name__}: {error}", do=do) from error
    return analysis


def _run(network: nn.Module, images: Tensor) -> tuple[Tensor, int, int]:
    """Return the outputs, the number of parameters, and the multiply-adds for one image."""
    with FlopCounterMode(display=False) as counter:
        outputs = _logits(network, images)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return outputs, parameters, counter.get_total_flops() // 2 // len(images)


class _Staying:
    """Why channels stay: by id, the place of the reason in a list; 0 if the channel leaves."""

    def __init__(self, count: int) -> None:
        self.codes = torch.zeros(count, dtype=torch.long)
        self.reasons = ["", READ, TIED, BORDER, LAST]

    def add(self, ids: Tensor, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)
        self.codes[ids] = self.codes[ids].clamp(min=self.reasons.index(reason))


def _staying(analysis: Analysis) -> _Staying:
    """Begin with what is pinned; add what a layer reads for the channels that stay, until that is all."""
    staying = _Staying(analysis.count)
    for ids, name in analysis.pinned:
        staying.add(ids, f"read or written by {name}, which is not pruned")
    before = torch.empty(0)
    while not before.equal(staying.codes):
        before = staying.codes.clone()
        for layer in reversed(analysis.layers):
            _add_read(layer, staying)
        for a, b in analysis.ties:
            either = (staying.codes[a] > 0) | (staying.codes[b] > 0)
            staying.add(torch.cat([a[either], b[either]]), TIED)
        if before.equal(staying.codes):  # a layer without channels could not run
            for layer in analysis.layers:
                for ids in (layer.inputs.ids, layer.outputs.ids):
                    staying.add(ids[: int(not staying.codes[ids].any())], LAST)
    return staying


def _add_read(layer: Layer, staying: _Staying) -> None:
    """Add the input channels that a layer needs for the outputs that stay."""
    x, stays = layer.inputs, staying.codes[layer.outputs.ids] > 0
    shifts = x.constant & (x.low != 0)
    if layer.mixes:
        used = (layer.module.weight[stays] != 0).transpose(0, 1).flatten(1).any(1)
        staying.add(x.ids[used & ~x.constant], READ)
        if pads_zeros(layer.module) and (used & shifts).any():
            staying.add(x.ids[_carrier(x)], BORDER)
    elif pads_zeros(layer.module):
        staying.add(x.ids[stays & shifts], BORDER)


def _carrier(x: Channels) -> Tensor:
    """Return the place of the constant that stands for all before zero padding: the largest."""
    return x.low.abs().where(x.constant, -1.0).argmax()[None]


def _shrink_(layer: Layer, mask: Tensor) -> None:
    """Fold the constants that leave into a layer, and take its channels out."""
    module, reads, writes = layer.module, mask[layer.inputs.ids], mask[layer.outputs.ids]
    if layer.mixes:
        _fold_(module, layer.inputs, reads, writes)
    if reads.all() and writes.all():
        return
    for held in (module._parameters, module._buffers):
        for name, tensor in held.items():
            if tensor is not None and tensor.dim():
                part = tensor[writes][:, reads] if layer.mixes and name == "weight" else tensor[writes]
                held[name] = nn.Parameter(part, requires_grad=False) if held is module._parameters else part
    sizes = {"in": int(reads.sum()), "out": int(writes.sum()), "num": int(writes.sum())}
    for key in ("in_channels", "out_channels", "in_features", "out_features", "num_features"):
        if hasattr(module, key):
            setattr(module, key, sizes[key.split("_")[0]])
    if getattr(module, "groups", 1) > 1:
        module.groups = sizes["out"]


def _fold_(module: Any, x: Channels, reads: Tensor, writes: Tensor) -> None:
    """Fold the constants that leave into the bias; before zero padding, into the weights of the carrier."""
    moved = x.constant & (x.low != 0) & ~reads
    weight = module.weight.double()
    shift = torch.einsum("oi...,i->o...", weight[:, moved], x.low[moved])  # (outputs, kernel)
    if not shift[writes].any():
        return
    if pads_zeros(module):
        one = _carrier(x)
        weight[:, one] += shift[:, None] / x.low[one]
        module.weight = nn.Parameter(weight.float(), requires_grad=False)
    else:
        shift = shift.reshape(len(shift), -1).sum(1) + (0 if module.bias is None else module.bias)
        module.bias = nn.Parameter(shift.float(), requires_grad=False)
