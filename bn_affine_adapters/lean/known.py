"""What lean training can replace in a network, as it is at this moment: known kinds, frozen weights, no hooks."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from timm import layers as timm_layers
from torch import Tensor, nn
from torch.nn import functional as F

from ..norms.find import running
from ..norms.statistics import BATCH_NORMS
from .backends import portable
from .backends.constants import GELU, GELU_TANH, HARDSWISH, IDENTITY, RELU, RELU6, SILU
from .conv_pool import Geometry

# "exact" keeps a norm layer's input once for it, its activation and the convolution behind; "rounded" keeps it in
# bfloat16; "smallest" in 8 bits, and computes some convolutions again. Rounding changes gradients alone.
LEVELS = ("exact", "rounded", "smallest")

# Modules and functions, and the activation that each is. Those that `portable` does not know run plain.
ACTIVATIONS: dict[Any, str] = {
    nn.Identity: IDENTITY, nn.ReLU: RELU, nn.ReLU6: RELU6, nn.SiLU: SILU, timm_layers.Swish: SILU,
    nn.Hardswish: HARDSWISH, timm_layers.HardSwish: HARDSWISH, nn.GELU: GELU, timm_layers.GELU: GELU,
    timm_layers.GELUTanh: GELU_TANH,
    F.relu: RELU, torch.relu: RELU, F.relu6: RELU6, F.silu: SILU, F.hardswish: HARDSWISH, F.gelu: GELU,
}  # fmt: skip
CONVS = tuple(kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, timm_layers.Conv2dSame))
LAYER_NORMS = {nn.LayerNorm.forward, timm_layers.LayerNorm.forward, timm_layers.LayerNormAct.forward}
LAYER_NORMS_2D = {timm_layers.LayerNorm2d.forward, timm_layers.LayerNormAct2d.forward}
GROUP_NORMS = {
    kind.forward
    for kind in (nn.GroupNorm, timm_layers.GroupNorm, timm_layers.GroupNorm1, timm_layers.GroupNormAct)
}  # fmt: skip


@dataclass
class Report:
    """What was replaced in a network, and how much of what is saved for backward is left.

    Attributes:
        level: "exact", "rounded" or "smallest".
        norms: norm layers, each with its activation, addition and pooling.
        convs: convolutions.
        recomputed: those of them that backward runs once more.
        others: activations, attentions and poolings.
        untraced: modules whose forward torch.fx cannot follow; their parts were tried.
        share: bytes saved for backward over those of plain freezing, on a small random batch; None where unknown.
    """

    level: str
    norms: int = 0
    convs: int = 0
    recomputed: int = 0
    others: int = 0
    untraced: list[str] = field(default_factory=list)
    share: float | None = None

    @property
    def places(self) -> int:
        """How many layers were replaced."""
        return self.norms + self.convs + self.others

    def __str__(self) -> str:
        """Say it in a line."""
        share = "" if self.share is None else f"; {self.share:.2f} of the bytes that plain freezing saves for backward"
        rest = f"; {len(self.untraced)} modules could not be traced as a whole" if self.untraced else ""
        counts = f"{self.norms} norm layers, {self.convs} convolutions, {self.others} others"
        return f"lean {self.level}: {counts}{share}{rest}"


def hooked(module: nn.Module) -> bool:
    """Tell whether somebody listens to a module, or gave it a forward of its own, and would not be called any more."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or "forward" in module.__dict__


def activation_of(kind: Any) -> str | None:
    """Return which activation a module's class or a function is; None for one that no back end knows."""
    name = ACTIVATIONS.get(kind)
    return name if name in portable.ACTIVATIONS else None


def act_of(act: Any) -> str | None:
    """Return which activation a module is, or its name already; None for an unknown one or one with hooks."""
    if act is None:
        return IDENTITY
    if isinstance(act, str):
        return act
    if hooked(act):
        return None
    name = activation_of(type(act))
    return GELU_TANH if name == GELU and getattr(act, "approximate", "none") == "tanh" else name


def frozen(module: nn.Module, x: Tensor) -> tuple[Any, Any, Tensor]:
    """Return a frozen convolution, how it moves, and its input, padded if need be; (None, None, x) if it is another."""
    own = running(module)
    if (
        type(own).forward not in CONVS
        or own.padding_mode != "zeros"
        or isinstance(own.padding, str)
        or x.dim() != own.weight.dim()
        or own.weight.requires_grad
        or (own.bias is not None and own.bias.requires_grad)
        or hooked(own)
        or hooked(module)
    ):
        return None, None, x
    if type(own).forward is timm_layers.Conv2dSame.forward:
        x = timm_layers.pad_same(x, own.weight.shape[-2:], own.stride, own.dilation)
    return own, Geometry(own.stride, own.padding, own.dilation, own.groups), x


class KnownNorm(NamedTuple):
    """A norm layer that can be computed here.

    Attributes:
        module: the layer itself, of the active adapter.
        act: the activation inside it.
        kind: "batch", "group", "layer" or "layer2d".
    """

    module: Any
    act: str
    kind: str


def known_norm(module: nn.Module) -> KnownNorm | None:
    """Return how the norm layer that runs in a module is computed; None where only it knows."""
    own = running(module)
    kind = _norm_kind(own)
    drop = getattr(own, "drop", None)
    inner = act_of(getattr(own, "act", None))
    refused = hooked(module) or hooked(own) or getattr(own, "_fast_norm", False)
    if refused or kind is None or inner is None or not (drop is None or isinstance(drop, nn.Identity)):
        return None
    return KnownNorm(own, inner, kind)


def _norm_kind(own: Any) -> str | None:
    forward = type(own).forward
    if forward in BATCH_NORMS:
        return "batch"
    if forward in GROUP_NORMS:
        return "group"
    if forward not in LAYER_NORMS | LAYER_NORMS_2D or len(own.normalized_shape) != 1:
        return None
    return "layer" if forward in LAYER_NORMS else "layer2d"


def pooling(own: Any) -> dict[str, Any]:
    """Return the keyword arguments of `F.max_pool2d` that a module stands for, each with a number per axis."""
    pairs = ("kernel_size", "stride", "padding", "dilation")
    both = {key: (value, value) if isinstance(value := getattr(own, key), int) else value for key in pairs}
    return {**both, "ceil_mode": own.ceil_mode}
