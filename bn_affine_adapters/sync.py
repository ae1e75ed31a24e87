"""Synchronised batch normalisation on every device: torch's own refuses the CPU."""

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn


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


class _CpuSyncBatchNorm(nn.SyncBatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or not self.training or self.running_mean is None or self.running_var is None:
            return super().forward(x)
        shape = (1, -1) + (1,) * (x.dim() - 2)
        axes = [d for d in range(x.dim()) if d != 1]
        wide = x.float()
        count = torch.full((1,), x.numel() / x.shape[1], device=x.device)
        total = _SumOverProcesses.apply(torch.cat([wide.sum(axes), count]))
        n = total[-1].detach()
        mean = total[:-1] / n
        centred = wide - mean.view(shape)
        # In two passes: the difference of E[x^2] and E[x]^2 would lose most of its digits.
        variance = _SumOverProcesses.apply(centred.square().sum(axes)) / n
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        with torch.no_grad():
            rate = 1 / float(self.num_batches_tracked or 1) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
            self.running_var.lerp_((variance * n / (n - 1)).to(self.running_var.dtype), rate)
        out = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)


def sync_norms_(model: nn.Module) -> nn.Module:
    """Make every BatchNorm of a network, timm's fused ones included, use the statistics of all processes; return it.

    Needs an initialised process group. Names and values in the state dict stay as they are.
    """
    model = convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm) and not isinstance(module, _CpuSyncBatchNorm):
            kind = type(module)
            # Between timm's subclass, which adds the activation, and torch's forward, which refuses the CPU.
            bases = (_CpuSyncBatchNorm,) if kind is nn.SyncBatchNorm else (kind, _CpuSyncBatchNorm)
            module.__class__ = type(kind.__name__, bases, {})
    return model.train(model.training)
