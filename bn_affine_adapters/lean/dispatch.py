"""What a rewritten forward calls in the place of layers: lean where that is right at this moment, else the layers.

Nothing is decided before it runs: an adapter may have been exchanged, a weight unfrozen, a hook registered since.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ..norms.statistics import group_of, update_statistics_
from . import backends
from .backends.constants import ADDABLE, BFLOAT16, BYTE, IDENTITY, INPUT, MASKED, NOTHING, wide
from .backends.portable import activate
from .batch_norm import Norm, NormAct, NormActConv, PooledNorm
from .conv_pool import FrozenConv, Geometry, GlobalPool, MaxPool, convolve
from .known import KnownNorm, act_of, frozen, hooked, known_norm, pooling
from .row_norm import KeptAct, RoundedAttention, RoundedLayerNorm, RowNorm

AUTOCAST_LEAVES = ("cpu",)  # devices whose autocast lets LayerNorm and GroupNorm run in half precision
SHORTEST = 4  # the row that is kept in 8 bits a value


def _run_act(act: Any, x: Tensor) -> Tensor:
    if isinstance(act, str):
        return activate(x, act)
    return x if act is None else act(x)


def conv(module: nn.Module, x: Tensor) -> Tensor:
    """Run a convolution; where its weight is frozen, its input is not kept."""
    own, geometry, padded = frozen(module, x) if x.requires_grad else (None, None, x)
    if own is None:
        return module(x)
    return FrozenConv.apply(padded, own.weight, own.bias, geometry)


def fork(y: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return an output for two uses; where it comes twice, backward gets two gradients.

    Autograd would add them in a pass over memory of its own.
    """
    return y if isinstance(y, tuple) else (y, y)


def norm(
    level: str, module: nn.Module, act: Any, x: Tensor, residual: Tensor | None = None, two_outputs: bool = False
) -> Any:
    """Run a norm layer, add a residual if there is one, then the activation.

    Args:
        level: one of `LEVELS`.
        module: the norm layer, in which an activation may be fused.
        act: a module behind it, the name of an activation, or None.
        x: (N, C, ...).
        residual: in the shape of the layer's output.
        two_outputs: return two of the output where that spares something.
    """
    outer = act_of(act)
    if residual is not None and (outer is None or outer not in ADDABLE):
        return _run_act(act, norm(level, module, None, x, residual))
    known = known_norm(module)
    fuses = known is not None and known.kind == "batch" and known.act == IDENTITY
    if residual is not None and not (fuses and _alike(residual, x)):
        return _run_act(act, norm(level, module, None, x) + residual)
    code = None if known is None else _single_act(known, outer)
    if known is None or code is None:
        return _run_act(act, module(x))
    if known.kind == "batch":
        y = _batch_norm(level, known.module, code, x, residual, two_outputs)
    else:
        y = _row_norm(level, known, code, x)
    if y is None:
        x = module(x)
        return _run_act(act, x if residual is None else x + residual)
    return y


def _single_act(known: KnownNorm, outer: str | None) -> str | None:
    """Return the activation of a norm layer and what is behind it; None if there are two, or an unknown one."""
    if outer is None or IDENTITY not in (known.act, outer):
        return None
    return outer if known.act == IDENTITY else known.act


def _alike(residual: Tensor, x: Tensor) -> bool:
    """Tell whether adding them needs neither broadcasting nor another type, which the kernels do not know."""
    return residual.shape == x.shape and residual.dtype == x.dtype


def _trains(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _batch_norm(level: str, own: Any, act: str, x: Tensor, residual: Tensor | None, two_outputs: bool) -> Any:
    if not _trains(x, own.weight, own.bias, residual):
        return None
    how, maps = _statistics(own, act, x, keep_of(level, own, act, x))
    return NormAct.apply(x, own.weight, own.bias, residual, maps, how._replace(two_outputs=two_outputs))


def _of_batch(own: Any) -> bool:
    return own.training or own.running_mean is None


def keep_of(level: str, own: Any, act: str, x: Tensor) -> int:
    """Return what a BatchNorm layer has to keep of its input x."""
    if not _of_batch(own) and not _trains(own.weight) and act in ADDABLE:
        return NOTHING
    if level == "smallest":
        return BYTE
    return BFLOAT16 if level == "rounded" and x.dtype in (torch.float32, torch.float64) else INPUT


@torch.no_grad()
def _statistics(own: Any, act: str, x: Tensor, keep: int) -> tuple[Norm, Tensor]:
    """Return how a BatchNorm layer is computed, and its maps; update its running statistics in training mode."""
    own._check_input_dim(x)
    count: Any = x.numel() // x.shape[1]
    of_batch, group = _of_batch(own), None
    if of_batch:
        group = group_of(own)
        if group is None and count <= 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
        statistics = backends.of_layer(x, act).stats(x, keep == BYTE)
        if group is not None:
            statistics, count = _over_processes(statistics, count, group)
        if own.training:
            update_statistics_(own, statistics[0], statistics[1] * (count / (count - 1)))
    else:
        statistics = torch.stack([own.running_mean, own.running_var]).to(wide(x.dtype))
        if keep == BYTE:
            statistics = torch.cat([statistics, backends.of_layer(x, act).stats(x, True)[2:]])
    maps = backends.of_channels(statistics).channel_maps(statistics, own.eps, own.weight, own.bias, keep)
    return Norm(act, keep, of_batch, count, group), maps


def _over_processes(statistics: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor]:
    """Return the statistics of all processes from those of each, and their count; the range stays each one's own."""
    n = statistics.new_full((1,), count)
    total = torch.cat([statistics[0] * n, n])
    dist.all_reduce(total, group=group)
    mean = total[:-1] / total[-1]
    squares = (statistics[1] + (statistics[0] - mean).square()) * n
    dist.all_reduce(squares, group=group)
    return torch.cat([torch.stack([mean, squares / total[-1]]), statistics[2:]]), total[-1]


def _row_norm(level: str, known: KnownNorm, act: str, x: Tensor) -> Tensor | None:
    own, kind = known.module, known.kind
    if not _trains(x, own.weight, own.bias) or (level == "exact" and act == IDENTITY):
        return None  # what PyTorch keeps of such a layer is its input, which is the least there is
    keep = {"exact": INPUT, "rounded": BFLOAT16, "smallest": BYTE}[level]
    if x.device.type not in AUTOCAST_LEAVES and torch.is_autocast_enabled(x.device.type):
        x = x.float()  # as autocast does with PyTorch's own
    if kind == "layer2d":
        x = x.permute(0, 2, 3, 1)
    if kind != "group" and act == IDENTITY and backends.of_layer_norm(x) is not None:
        y = RoundedLayerNorm.apply(x, own.weight, own.bias, own.eps, keep)
    else:
        groups = own.num_groups if kind == "group" else 0
        y = RowNorm.apply(x, own.weight, own.bias, groups, own.eps, act, keep)
    return y.permute(0, 3, 1, 2) if kind == "layer2d" else y


def pair(
    level: str, first: nn.Module, act: Any, between: nn.Module, second: nn.Module, act2: Any, x: Tensor,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Run norm, activation, convolution, norm (+ residual), activation; backward runs the convolution once more.

    Args: as `norm`, twice; ``between`` is the convolution.
    """
    one, two = known_norm(first), known_norm(second)
    own, geometry, padded = frozen(between, x)
    if one is not None and two is not None and own is not None and padded is x and one.kind == two.kind == "batch":
        code, code2 = _single_act(one, act_of(act)), _single_act(two, act_of(act2))
        addable = residual is None or (two.act == IDENTITY and code2 in ADDABLE)
        trains = _trains(x, one.module.weight, one.module.bias)
        if code is not None and code2 is not None and addable and trains:
            return _pair(one.module, code, own, geometry, two.module, code2, x, residual)
    return norm(level, second, act2, conv(between, norm(level, first, act, x)), residual)


def _pair(
    one: Any, act: str, own: Any, geometry: Geometry, two: Any, act2: str, x: Tensor, residual: Tensor | None
) -> Tensor:
    with torch.no_grad():
        how, maps = _statistics(one, act, x, BYTE)
        h, kept, mask = backends.of_layer(x, act).forward(x, None, maps, act, BYTE, act in MASKED)
        z = convolve(h, own.weight, own.bias, geometry)
        del h
        apart = residual is not None and not _alike(residual, z)
        how2, maps2 = _statistics(two, IDENTITY if apart else act2, z, INPUT)
    fused, bits = None if apart else residual, mask if act in MASKED else None
    y = NormActConv.apply(
        x, one.weight, one.bias, two.weight, two.bias, fused, kept, bits, maps, how,
        own.weight, own.bias, geometry, z, maps2, how2,
    )  # fmt: skip
    return activate(y + residual, act2) if apart else y


def pooled(level: str, module: nn.Module, act: Any, pool: nn.Module, x: Tensor) -> Tensor:
    """Run norm, activation and max-pooling; where nothing before them trains, only what was pooled is kept."""
    known, pool_ = known_norm(module), cast(Any, pool)
    code = None if known is None else _single_act(known, act_of(act))
    plain_pool = hooked(pool) or pool_.return_indices or x.requires_grad or x.dim() != 4
    if (
        plain_pool
        or known is None
        or known.kind != "batch"
        or code not in MASKED
        or not _trains(known.module.weight, known.module.bias)
    ):
        return max_pool(pool, norm(level, module, act, x))
    own = known.module
    how, maps = _statistics(own, code, x, keep_of(level, own, code, x))
    return PooledNorm.apply(x, own.weight, own.bias, maps, how, pooling(pool_))


def global_pool(module: nn.Module, x: Tensor) -> Tensor:
    """Run average pooling whose output is one pixel without keeping its input."""
    own: Any = module
    if type(own) is not nn.AdaptiveAvgPool2d or own.output_size not in (1, (1, 1)) or hooked(own) or x.dim() != 4:
        return module(x)
    return GlobalPool.apply(x, True)


def avg_pool(x: Tensor, size: Any) -> Tensor:
    """Run `F.avg_pool2d`; over all pixels, without keeping its input."""
    return GlobalPool.apply(x, False) if x.dim() == 4 and size == x.shape[-2:] else F.avg_pool2d(x, size)


def max_pool(module: nn.Module, x: Tensor) -> Tensor:
    """Run max-pooling, keeping a byte for every value of its output."""
    own: Any = module
    options = pooling(own)
    small = torch.Size(options["kernel_size"]).numel() <= 256
    if not x.requires_grad or not small or hooked(own) or own.return_indices or x.dim() != 4:
        return module(x)
    return MaxPool.apply(x, options)


def activation(level: str, act: Any, x: Tensor) -> Tensor:
    """Run an activation that follows no norm layer: of ReLU's input a bit is kept, of others' at "smallest" 8."""
    code = act_of(act)
    # Of 8 bits a row has two numbers more: for short rows that is no saving.
    images = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    rows = x.permute(0, 2, 3, 1) if images else x  # along the channels, as they lie in memory
    worth = code in MASKED or (level == "smallest" and rows.shape[-1] >= SHORTEST)
    if code in (None, IDENTITY) or not x.requires_grad or not worth:
        return _run_act(act, x)
    y = KeptAct.apply(rows, code)
    return y.permute(0, 3, 1, 2) if images else y


def attention(
    q: Tensor, k_: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, **rest: Any,
) -> Tensor:  # fmt: skip
    """Run `F.scaled_dot_product_attention`; without mask and dropout, q, k and v are kept in 8 bits."""
    if attn_mask is None and not dropout_p and not is_causal and not rest and _trains(q, k_, v):
        return RoundedAttention.apply(q, k_, v, q.shape[-1] ** -0.5 if scale is None else scale)
    options: dict[str, Any] = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    return F.scaled_dot_product_attention(q, k_, v, **options, **rest)


def innermost(x: Tensor) -> Tensor:
    """Return images with their channels innermost on a CPU, whose convolutions are faster so."""
    if x.device.type == "cpu" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x
