"""Follow the channels of a network: which layers they pass, and between which bounds their values lie.

The network is in evaluation mode, where a norm layer scales and shifts. Bounds are proved by interval arithmetic, for
every input. What goes into or comes out of an operation that is not known here is pinned, and may have any value.
"""

import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from timm import layers as timm_layers
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..lean.backends.constants import GELU, GELU_TANH, HARDSWISH, SILU
from ..lean.known import ACTIVATIONS, CONVS, hooked
from ..lean.rewrite import ADDS
from ..norms.statistics import BATCH_NORMS

MULTIPLIES = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
IN_PLACE = (operator.iadd, operator.imul)
KNOWN = {  # activations; those in DIPS fall, to no less than -0.4, before they rise
    *ACTIVATIONS, nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.LeakyReLU, timm_layers.Sigmoid, timm_layers.HardSigmoid,
    torch.sigmoid, F.hardsigmoid, "sigmoid", "relu",
}  # fmt: skip
DIPS = {SILU, HARDSWISH, GELU, GELU_TANH}
UNCHANGED = {nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout, F.adaptive_avg_pool2d, F.dropout}


@dataclass
class Channels:
    """The channels of a tensor, along its dimension 1.

    Attributes:
        ids: a number for each; channels with the same number stay or leave together.
        low: no value is smaller, float64.
        high: no value is larger.
    """

    ids: Tensor
    low: Tensor
    high: Tensor

    @property
    def constant(self) -> Tensor:
        """Where a channel has one value only."""
        return self.low == self.high

    def between(self, *corners: Tensor) -> "Channels":
        """Return these channels with values from the smallest to the largest of the corners."""
        stacked = torch.stack(corners)
        return Channels(self.ids, stacked.amin(0), stacked.amax(0))


@dataclass
class Layer:
    """A norm layer, convolution or linear layer, and the channels that it reads and writes.

    Attributes:
        module: its tensors have an entry for each channel.
        inputs: if it does not mix channels, their ids are those of the outputs.
        outputs: of a norm layer with the activation inside it.
        dead: where the output is constant, or that of the activation behind a norm layer.
    """

    module: Any
    inputs: Channels
    outputs: Channels
    dead: Tensor

    @property
    def is_norm(self) -> bool:
        """Whether it is a norm layer."""
        return type(self.module).forward in BATCH_NORMS

    @property
    def mixes(self) -> bool:
        """Whether each output is computed from all inputs."""
        return self.outputs.ids is not self.inputs.ids


def pads_zeros(module: Any) -> bool:
    """Tell whether a layer is a convolution that puts zeros around its input."""
    if getattr(module, "padding_mode", "") != "zeros":
        return False
    if module.padding == "same" or isinstance(module, timm_layers.Conv2dSame):
        return max(module.kernel_size) > 1
    return module.padding != "valid" and any(module.padding)


def times(a: Tensor, b: Tensor) -> Tensor:
    """Return a product in which 0 times infinity is 0: an infinite bound stands for finite values."""
    return torch.where((a == 0) | (b == 0), 0.0, a * b)


def activated(kind: Any, module: nn.Module | None, x: Channels) -> Channels | None:
    """Return the channels of an activation: a module of this kind, a function or a method; None for others."""
    if kind not in KNOWN or (module and hooked(module)):
        return None
    function = module or (getattr(torch, kind) if isinstance(kind, str) else kind)
    corners = [x.low, x.high, torch.zeros_like(x.low).clamp(x.low, x.high)]
    dips = ACTIVATIONS.get(kind) in DIPS
    found = x.between(*(function(corner.clamp(min=-1e3) if dips else corner.clone()) for corner in corners))
    if dips:  # by -1,000 they are 0, and at -infinity they have no value
        found.low[(x.low < 0) & ~x.constant] = -0.4
    return found


class Analysis(fx.Interpreter):
    """Run a network's graph on images, and follow the channels.

    Attributes:
        layers: those that are known, in their order.
        ties: pairs of ids that stay or leave together, because they are added or multiplied.
        pinned: ids that stay, and the name of what reads or writes them.
        count: of ids.
    """

    def __init__(self, network: nn.Module, graph: fx.Graph, low: Tensor, high: Tensor) -> None:
        """Take bounds of each channel of the images."""
        super().__init__(network, graph=graph)
        self.network, self.low, self.high = network, low, high
        self.layers: list[Layer] = []
        self.ties: list[tuple[Tensor, Tensor]] = []
        self.pinned: list[tuple[Tensor, str]] = []
        self.count = 0
        self.channels: dict[fx.Node, Channels | None] = {}
        self.norms: dict[fx.Node, Layer] = {}  # by the node of the layer, and of activations behind it
        uses = (str(n.target) if n.op == "call_module" else str(n.target).rpartition(".")[0] for n in graph.nodes)
        self.uses = Counter(uses)  # of a module or its tensors

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and follow its channels; a number read from a tensor's shape stands for that tensor's."""
        value = super().run_node(n)
        module = self.network.get_submodule(str(n.target)) if n.op == "call_module" else None
        read = [channels for source in n.all_input_nodes if (channels := self.channels[source])]
        writes = n.kwargs.get("inplace") or getattr(module, "inplace", False) or n.target in IN_PLACE
        writes = writes or (n.op == "call_method" and str(n.target).endswith("_"))
        if n.op == "placeholder":
            found = self._pin(n, module, value, self.low, self.high)
        elif writes and len(n.all_input_nodes[0].users) > 1:  # it changes what others read
            found = self.channels[n.all_input_nodes[0]] = self._pin(n, module, value)
        elif isinstance(value, Tensor) or n.op == "output" or len(read) > 1:
            found = self._known(n, module, value) or self._pin(n, module, value)
        else:
            found = read[0] if read else None
        self.channels[n] = found
        return value

    def _pin(self, node: fx.Node, module: Any, value: Any, low: Any = -torch.inf, high: Any = torch.inf) -> Any:
        """Pin what a node reads, and return new channels, pinned too, for what it writes; None if it has none."""
        name = type(module).__name__ if module else str(getattr(node.target, "__name__", node.target))
        name = f"grouped {name}" if getattr(module, "groups", 1) > 1 else name
        self.pinned += [(c.ids, name) for source in node.all_input_nodes if (c := self.channels[source])]
        if not isinstance(value, Tensor) or value.dim() < 2:
            return None
        zeros = torch.zeros(value.shape[1], dtype=torch.float64)
        found = self._new(zeros + low, zeros + high)
        self.pinned.append((found.ids, name))
        return found

    def _new(self, low: Tensor, high: Tensor) -> Channels:
        self.count += len(low)
        return Channels(torch.arange(self.count - len(low), self.count), low, high)

    def _known(self, node: Any, module: Any, value: Tensor) -> Channels | None:
        """Return the channels of an operation that is known; None for any other."""
        sources = [source for source in node.all_input_nodes if isinstance(self.env[source], Tensor)]
        inputs = [c for source in sources if (c := self.channels[source])]
        more, kind = node.args[1:], type(module) if module else node.target
        if not inputs or len(inputs) < len(sources) or (module and (self.uses[str(node.target)] > 1 or hooked(module))):
            return None
        x, before = inputs[0], self.env[sources[0]]
        if module and kind.forward in BATCH_NORMS:
            return self._norm(node, module, x)
        if module and (kind.forward in CONVS or (kind.forward is nn.Linear.forward and value.dim() == 2)):
            return self._conv(module, x)
        if kind in (*ADDS, *MULTIPLIES) and len(inputs) == 2 and not node.kwargs:
            alike = all(self.env[s].dim() == value.dim() and self.env[s].shape[1] == len(x.ids) for s in sources)
            return self._pair(inputs[0], inputs[1], kind in ADDS) if alike else None
        if kind is torch.cat and (more == (1,) or node.kwargs == {"dim": 1}):
            parts = [vars(self.channels[source]) for source in node.args[0]]
            return Channels(**{key: torch.cat([part[key] for part in parts]) for key in vars(x)})
        if kind in (nn.Flatten, torch.flatten, "flatten") and before.flatten(1).shape == value.shape:
            return Channels(*(t.repeat_interleave(before[0, 0].numel()) for t in (x.ids, x.low, x.high)))
        if kind in (torch.mean, "mean"):
            over = more[0] if more else node.kwargs.get("dim")
            return x if isinstance(over, tuple | list) and all(d % before.dim() > 1 for d in over) else None
        if kind in (nn.AvgPool2d, F.avg_pool2d):
            plain = len(more) < 3 and not node.kwargs if module is None else module.padding in (0, (0, 0))
            return x if plain and getattr(module, "divisor_override", None) is None else None
        if kind in UNCHANGED:
            return x
        if module is None and (more or node.kwargs.keys() - {"inplace"}):
            return None
        found = activated(kind, module, x)
        if found and (norm := self.norms.get(sources[0])):
            norm.dead |= found.constant
            self.norms[node] = norm
        return found

    def _pair(self, a: Channels, b: Channels, adds: bool) -> Channels:
        """Return the channels of a sum or product."""
        self.ties.append((a.ids, b.ids))
        if adds:
            return a.between(a.low + b.low, a.high + b.high)
        return a.between(*(times(p, q) for p in (a.low, a.high) for q in (b.low, b.high)))

    def _norm(self, node: fx.Node, module: Any, x: Channels) -> Channels | None:
        """Return the channels of a BatchNorm, and of the activation inside it."""
        tensors = (module.weight, module.bias, module.running_mean, module.running_var)
        drop, act = getattr(module, "drop", None), getattr(module, "act", None)
        if any(tensor is None for tensor in tensors) or not isinstance(drop, nn.Identity | None):
            return None
        gamma, beta, mean, var = (tensor.detach().double() for tensor in tensors)
        scale = gamma / torch.sqrt(var + module.eps)
        shift = beta - mean * scale
        found: Channels | None = x.between(times(scale, x.low) + shift, times(scale, x.high) + shift)
        if act and found:
            found = activated(type(act), act, found)
        if found:
            self.norms[node] = Layer(module, x, found, found.constant)
            self.layers.append(self.norms[node])
        return found

    def _conv(self, module: Any, x: Channels) -> Channels | None:
        """Return the channels of a convolution or linear layer; None if it is grouped, but not depthwise."""
        weight, groups = module._parameters.get("weight"), getattr(module, "groups", 1)
        if weight is None or (groups > 1 and not groups == module.in_channels == module.out_channels):
            return None
        low, high = (x.low.clamp(max=0), x.high.clamp(min=0)) if pads_zeros(module) else (x.low, x.high)
        low, high = (bound[:, None] if groups > 1 else bound for bound in (low, high))
        weight = weight.detach().double().reshape(*weight.shape[:2], -1)
        rises, falls = weight.clamp(min=0).sum(2), weight.clamp(max=0).sum(2)
        bias = 0.0 if module.bias is None else module.bias.detach().double()
        low, high = ((times(rises, a) + times(falls, b)).sum(1) + bias for a, b in ((low, high), (high, low)))
        found = Channels(x.ids, low, high) if groups > 1 else self._new(low, high)
        self.layers.append(Layer(module, x, found, found.constant))
        return found
