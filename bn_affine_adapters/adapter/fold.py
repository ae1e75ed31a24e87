"""BatchNorm's running statistics folded into gamma and beta, so that parameters alone say what an adapter computes."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..errors import AdapterError
from ..norms.find import STATISTICS, affine
from ..settings import MASKS
from .layer import adapter_layers
from .method import BNOnlyConfig


def copies(model: nn.Module, adapter_name: str, config: BNOnlyConfig) -> dict[str, nn.Module]:
    """Return an adapter's copies by canonical name, in the order of its configuration's ``target_modules``.

    Raises:
        AdapterError: a copy has running statistics that do not fold into its gamma and beta.
    """
    held = {
        m.canonical_name: m.bn_only_layers[adapter_name] for m in adapter_layers(model) if adapter_name in m.configs
    }
    if config.control in MASKS:
        seen, do = f"control={config.control!r}", "model.save_pretrained(folder): a bit for each weight"
        raise AdapterError("A compact adapter holds no mask.", seen=seen, do=do)
    found = {name: held[name] for name in config.target_modules}
    for name, copy in found.items():
        for _ in _folding(copy, name):
            pass
    return found


def parameters(found: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return the parameters of copies by layer and name, in the order of a compact file."""
    return {f"{name}.{key}": tensor for name, copy in found.items() for key, tensor in copy.named_parameters()}


@torch.no_grad()
def fold_(found: dict[str, nn.Module]) -> None:
    """Fold the statistics of BatchNorm into gamma and beta: scale = gamma / sqrt(var + eps), shift = beta - mean scale.

    Computed in float64. Other norm layers have no statistics, and stay as they are.
    """
    for name, copy in found.items():
        for norm in _folding(copy, name):
            gamma, beta, mean, var = (t.double() for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
            scale = gamma / torch.sqrt(var + norm.eps)
            norm.weight.copy_(scale)
            norm.bias.copy_(beta - mean * scale)
    settle_(found)


@torch.no_grad()
def settle_(found: dict[str, nn.Module]) -> None:
    """Set running statistics to those of folded norm layers, mean 0 and variance 1 - eps, so that they do nothing."""
    for name, copy in found.items():
        for norm in _folding(copy, name):
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - norm.eps)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.zero_()


@torch.no_grad()
def round_folded_(found: dict[str, nn.Module], rounded: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change values so that they are rounded once the statistics are folded; the statistics stay as they are."""
    norms = [norm for name, copy in found.items() for norm in _folding(copy, name)]
    statistics = [[(buffer, buffer.clone()) for buffer in norm.buffers()] for norm in norms]
    fold_(found)
    for tensor in parameters(found).values():
        tensor.copy_(rounded(tensor))
    for norm, before in zip(norms, statistics, strict=True):
        for buffer, value in before:
            buffer.copy_(value)
        scale, shift, mean, var = (t.double() for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
        norm.weight.copy_(scale * torch.sqrt(var + norm.eps))
        norm.bias.copy_(shift + mean * scale)


def _folding(copy: nn.Module, name: str) -> Iterator[Any]:
    """Yield the modules of a copy that have running statistics to fold."""
    for inner, module in copy.named_modules():
        buffers = {k for k, v in module._buffers.items() if v is not None} - module._non_persistent_buffers_set
        if not buffers:
            continue
        if not isinstance(module, _NormBase) or None in affine(module) or not buffers <= {*STATISTICS}:
            raise AdapterError(
                "The statistics of a norm layer do not fold into gamma and beta.",
                seen=f"{name}{inner and '.'}{inner} is a {type(module).__name__} with {', '.join(sorted(buffers))}",
                do="a format that keeps them: model.save_pretrained(folder), format='timm', or ONNX with all inside",
            )
        yield module
