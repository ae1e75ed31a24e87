"""Recompute running statistics over a data set: after blending, weight averaging, or on images of another domain."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..adapter.layer import adapter_layers
from ..errors import ConfigError, DataError
from ..norms.copies import uncompiled, with_own_statistics


class _Pool:
    """The mean and variance of all values of each channel that a norm layer has got, exact over all batches."""

    def __init__(self) -> None:
        self.count, self.batches = 0, 0
        self.mean: Any = 0.0
        self.squares: Any = 0.0  # the sum of squared differences from the mean

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs
        axes = [axis for axis in range(x.dim()) if axis != 1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = (each.double() for each in torch.var_mean(wide, axes, correction=0))
        count = x.numel() // x.shape[1]
        total, difference = self.count + count, mean - self.mean
        # Two samples are pooled by the law of total variance (Chan, Golub and LeVeque, 1983).
        self.squares = self.squares + variance * count + difference.square() * (self.count * count / total)
        self.mean = self.mean + difference * (count / total)
        self.count, self.batches = total, self.batches + 1

    def write_(self, module: _BatchNorm) -> None:
        module.running_mean.copy_(self.mean)  # type: ignore[union-attr]
        module.running_var.copy_(self.squares / (self.count - 1))  # type: ignore[union-attr]
        if module.num_batches_tracked is not None:
            module.num_batches_tracked.fill_(self.batches)


@torch.no_grad()
def recalibrate(model: nn.Module, loader: Iterable[Any]) -> None:
    """Replace the running statistics of BatchNorm layers by those of a data set, in place.

    One pass over the images: each layer normalises by the statistics of its batch, as in training, and its running
    mean and variance become those of all values that it got, every image counted once. So there is no momentum, and no
    mean of the batches' variances, as `torch.optim.swa_utils.update_bn` takes. Dropout is off. Parameters, the base
    and other adapters do not change; if an image cannot be run, nothing does.

    Args:
        model: with adapters, those layers change that the active adapter owns; of a plain network, all of them.
        loader: batches: images (N, C, H, W), or tuples and lists that begin with them. Large batches are better: their
            statistics are those that the next layers see.

    Raises:
        ConfigError: there is no BatchNorm with running statistics to change.
        DataError: the loader is empty.
        AdapterError: the adapter is compact.

    >>> import timm
    >>> from bn_affine_adapters import BNOnlyConfig, get_bn_only_model, recalibrate
    >>> model = get_bn_only_model(timm.create_model("test_resnet", num_classes=2), BNOnlyConfig(seed=0))
    >>> recalibrate(model, [torch.rand(8, 3, 32, 32) for _ in range(2)])
    """
    network = uncompiled(model)
    norms = changing(network)
    if not norms:
        raise ConfigError(
            "There are no running statistics to recompute.",
            seen="the active adapter owns no BatchNorm layer with running statistics, or adapters are disabled",
            do="recalibrate a network with BatchNorm, with its adapter enabled; or adapt_to(model, loader, 'tent')",
        )
    ran = [(norm, pool) for norm, pool in zip(norms, _pools(network, loader), strict=True) if pool.count > 1]
    if not ran:
        raise DataError("There are no images to recompute statistics from.", seen="an empty loader", do="give batches")
    for norm, pool in ran:
        pool.write_(norm)


def _pools(network: nn.Module, loader: Iterable[Any]) -> list[_Pool]:
    """Run a copy of a network, whose running statistics are its own, and return what each of its layers got."""
    copy = by_batch(network)
    pools = []
    for norm in changing(copy):
        pools.append(_Pool())
        norm.register_forward_pre_hook(pools[-1])
    for batch in loader:
        copy(images_of(batch, network))
    return pools


def images_of(batch: Any, network: nn.Module) -> Tensor:
    """Return the images of a batch, on a network's device and of its type."""
    first = next(network.parameters())
    images = batch[0] if isinstance(batch, list | tuple) else batch
    return images.to(first.device, first.dtype)


def by_batch(network: Any) -> Any:
    """Return a copy in evaluation mode, but for BatchNorm whose statistics may change: it uses those of its batch."""
    copy = with_own_statistics(network)
    for module in copy.modules():
        module.__dict__["training"] = False
    for norm in changing(copy):
        norm.__dict__["training"] = True
    return copy


def changing(network: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers whose statistics may change: those of the adapter that runs.

    Raises:
        AdapterError: it is compact.
    """
    layers = list(adapter_layers(network))
    for layer in layers:
        layer.check_trainable(layer.active_module())
    running = [layer.active_module() for layer in layers]
    roots = [module for layer, module in zip(layers, running, strict=True) if module is not layer.base_layer]
    roots = roots if layers else [network]
    modules = [module for root in roots for module in root.modules()]
    return [m for m in modules if isinstance(m, _BatchNorm) and m.running_mean is not None]
