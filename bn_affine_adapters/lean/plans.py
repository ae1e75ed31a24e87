"""What of a network can be replaced, as it is at this moment: known kinds, frozen weights, no hooks."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from timm import layers as timm_layers
from torch import Tensor, nn
from torch.nn import functional as F

from ..norms.find import running
from ..norms.statistics import BATCH_NORMS
from . import kernels as k
from .spatial import Geometry

LEVELS = ("exact", "rounded", "smallest")

ACTS: dict[Any, int] = {
    nn.Identity: k.IDENTITY, nn.ReLU: k.RELU, nn.ReLU6: k.RELU6, nn.SiLU: k.SILU, timm_layers.Swish: k.SILU,
    nn.Hardswish: k.HARDSWISH, timm_layers.HardSwish: k.HARDSWISH, nn.GELU: k.GELU, timm_layers.GELU: k.GELU,
    timm_layers.GELUTanh: k.GELU_TANH,
    F.relu: k.RELU, torch.relu: k.RELU, F.relu6: k.RELU6, F.silu: k.SILU, F.hardswish: k.HARDSWISH, F.gelu: k.GELU,
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


def act_of(act: Any) -> int | None:
    """Return which activation a module, or the code of one, is; None for an unknown one or one with hooks."""
    if act is None:
        return k.IDENTITY
    if isinstance(act, int):
        return act
    if hooked(act):
        return None
    code = ACTS.get(type(act))
    return k.GELU_TANH if code == k.GELU and getattr(act, "approximate", "none") == "tanh" else code


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


class Plan(NamedTuple):
    """A norm layer that can be computed here: its module, the activation inside it, and how it normalises."""

    module: Any
    act: int
    kind: str


def plan_of(module: nn.Module) -> Plan | None:
    """Return how the norm layer that runs in a module is computed; None where only it knows."""
    own = running(module)
    forward = type(own).forward
    if hooked(module) or hooked(own) or getattr(own, "_fast_norm", False):
        return None
    if forward in BATCH_NORMS:
        kind = "batch"
    elif forward in GROUP_NORMS:
        kind = "group"
    elif forward in LAYER_NORMS or forward in LAYER_NORMS_2D:
        kind = "layer" if forward in LAYER_NORMS else "layer2d"
        if len(own.normalized_shape) != 1:
            return None
    else:
        return None
    inner = act_of(getattr(own, "act", None))
    drop = getattr(own, "drop", None)
    if inner is None or not (drop is None or isinstance(drop, nn.Identity)):
        return None
    return Plan(own, inner, kind)


def pooling(own: Any) -> dict[str, Any]:
    """Return the keyword arguments of `F.max_pool2d` that a module stands for, each with a number per axis."""
    pairs = ("kernel_size", "stride", "padding", "dilation")
    both = {key: (value, value) if isinstance(value := getattr(own, key), int) else value for key in pairs}
    return {**both, "ceil_mode": own.ceil_mode}
