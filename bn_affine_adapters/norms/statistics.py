"""Batch statistics over all processes, on every device; torch's SyncBatchNorm does not run on the CPU."""

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total


class _Synchronised(_BatchNorm):
    """Mixin for a BatchNorm class: its forward in training mode uses the statistics of all processes."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        out = self._normalise(x)
        return self.act(self.drop(out)) if isinstance(self, BatchNormAct2d) else out

    def _normalise(self, x: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.dim() - 2)
        axes = [axis for axis in range(x.dim()) if axis != 1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = wide.new_full((1,), x.numel() / x.shape[1])
        total = _SumOverProcesses.apply(torch.cat([wide.sum(axes), count]))
        n = total[-1].detach()
        if n <= 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
        mean = total[:-1] / n
        centred = wide - mean.view(shape)
        # In two passes, because E[x^2] - E[x]^2 would lose most of its digits.
        variance = _SumOverProcesses.apply(centred.square().sum(axes)) / n
        update_statistics_(self, mean.detach(), variance.detach() * n / (n - 1))
        out = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)


def recomputing() -> bool:
    """Tell whether backward runs this forward: activation checkpointing runs a forward for a second time there."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def hold_statistics_(module: nn.Module, held: bool = True) -> None:
    """Make `reset_running_stats` of every norm layer in a module do nothing, or its work again.

    `torch.optim.swa_utils.update_bn` resets all layers that it finds, and runs those that are active.
    """
    for layer in module.modules():
        if isinstance(layer, _NormBase):
            layer.__dict__.pop("reset_running_stats", None)
            if held:
                layer.__dict__["reset_running_stats"] = _held


def _held() -> None:
    """Stand in for the method of a layer whose statistics belong to a frozen network or an inactive adapter."""


@torch.no_grad()
def update_statistics_(norm: Any, mean: Tensor, variance: Tensor) -> None:
    """Update a BatchNorm layer's running statistics as PyTorch does, from a batch's mean and unbiased variance, (C).

    A batch that is computed again, by activation checkpointing, is not counted again.
    """
    if not norm.track_running_stats or norm.running_mean is None or recomputing():
        return
    rate: Any = norm.momentum or 0.0
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # a tensor: a number read from the device would break a compiled graph
            rate = norm.num_batches_tracked.reciprocal().to(norm.running_mean.dtype)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), rate)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), rate)


# Forward methods that normalise over a batch as `nn.BatchNorm2d` does; some apply an activation afterwards.
BATCH_NORMS = (_BatchNorm.forward, BatchNormAct2d.forward, nn.SyncBatchNorm.forward, _Synchronised.forward)


def group_of(module: nn.Module) -> Any:
    """Return the process group with which a norm layer in training mode shares its statistics, or None."""
    if not (module.training and isinstance(module, _Synchronised | nn.SyncBatchNorm) and dist.is_initialized()):
        return None
    group = getattr(module, "process_group", None) or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def sync_norms_(model: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """Make every BatchNorm of a network, timm's fused ones included, use the statistics of all processes; return it.

    Needs an initialised process group. Names and values of the state dict do not change.

    Args:
        model: changed in place.
        device: where it will run. On the CPU this package's implementation is used, elsewhere torch's SyncBatchNorm.
    """
    if torch.device(device).type != "cpu":
        return convert_sync_batchnorm(model)
    for module in model.modules():
        kind = type(module)
        # A subclass with another forward is left alone: it keeps the statistics of its own process.
        if isinstance(module, _BatchNorm) and kind.forward in (_BatchNorm.forward, BatchNormAct2d.forward):
            module.__class__ = type(kind.__name__, (_Synchronised, kind), {})
    return model
