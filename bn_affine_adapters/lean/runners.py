"""What a rewritten forward calls in the place of layers: lean where that is right at this moment, else the layers.

Nothing is decided before it runs: an adapter may have been exchanged, a weight unfrozen, a hook registered since.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ..norms.statistics import group_of, update_statistics_
from . import kernels as k
from .batch_norm import Norm, NormAct, NormActConv, PooledNorm, lines
from .plans import Plan, act_of, frozen, hooked, plan_of, pooling
from .rows import KeptAct, RoundedAttention, RoundedLayerNorm, RowNorm
from .spatial import FrozenConv, Geometry, GlobalPool, MaxPool, convolve

AUTOCAST_LEAVES = ("cpu",)  # devices whose autocast lets LayerNorm and GroupNorm run in half precision
SHORTEST = 4  # the row that is kept in 8 bits a value


def _run_act(act: Any, x: Tensor) -> Tensor:
    if isinstance(act, int):
        return k.activate(x, act)
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
    level: str, module: nn.Module, act: Any, x: Tensor, residual: Tensor | None = None, twice: bool = False
) -> Any:
    """Run a norm layer, add a residual if there is one, then the activation.

    Args:
        level: one of `LEVELS`.
        module: the norm layer, in which an activation may be fused.
        act: a module behind it, the code of an activation, or None.
        x: (N, C, ...).
        residual: in the shape of the layer's output.
        twice: return two of the output where that spares something.
    """
    outer = act_of(act)
    if residual is not None and (outer is None or outer not in (k.IDENTITY, *k.MASKED)):
        return _run_act(act, norm(level, module, None, x, residual))
    plan = plan_of(module)
    if residual is not None and (plan is None or plan.act or plan.kind != "batch" or not _alike(residual, x)):
        return _run_act(act, norm(level, module, None, x) + residual)
    if plan is None or outer is None or (plan.act and outer):
        return _run_act(act, module(x))
    code = plan.act or outer
    if plan.kind == "batch":
        found = _batch_norm(level, plan.module, code, x, residual, twice)
    else:
        found = _row_norm(level, plan, code, x)
    if found is None:
        x = module(x)
        return _run_act(act, x if residual is None else x + residual)
    return found


def _alike(residual: Tensor, x: Tensor) -> bool:
    """Tell whether adding them needs neither broadcasting nor another type, which the kernels do not know."""
    return residual.shape == x.shape and residual.dtype == x.dtype


def _trains(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _batch_norm(level: str, own: Any, act: int, x: Tensor, residual: Tensor | None, twice: bool) -> Any:
    if not _trains(x, own.weight, own.bias, residual):
        return None
    how, maps = _statistics(own, act, x, keep_of(level, own, act, x))
    return NormAct.apply(x, own.weight, own.bias, residual, maps, how._replace(twice=twice))


def _of_batch(own: Any) -> bool:
    return own.training or own.running_mean is None


def keep_of(level: str, own: Any, act: int, x: Tensor) -> int:
    """Return what a BatchNorm layer has to keep of its input x."""
    if not _of_batch(own) and not _trains(own.weight) and act in (k.IDENTITY, *k.MASKED):
        return k.NOTHING
    if level == "smallest":
        return k.BYTE
    return k.BFLOAT16 if level == "rounded" and x.dtype in (torch.float32, torch.float64) else k.INPUT


@torch.no_grad()
def _statistics(own: Any, act: int, x: Tensor, keep: int) -> tuple[Norm, Tensor]:
    """Return how a BatchNorm layer is computed, and its `lines`; update its running statistics in training mode."""
    own._check_input_dim(x)
    count: Any = x.numel() // x.shape[1]
    if not _of_batch(own):
        found = torch.stack([own.running_mean, own.running_var]).to(k.wide(x.dtype))
        if keep == k.BYTE:
            found = torch.cat([found, k.kernels(x, act).stats(x, True)[2:]])
        return Norm(act, keep, False, count), lines(found, own.eps, own.weight, own.bias, keep)
    group = group_of(own)
    if group is None and count <= 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    found = k.kernels(x, act).stats(x, keep == k.BYTE)
    if group is not None:
        found, count = _over_processes(found, count, group)
    if own.training:
        update_statistics_(own, found[0], found[1] * (count / (count - 1)))
    return Norm(act, keep, True, count, group), lines(found, own.eps, own.weight, own.bias, keep)


def _over_processes(found: Tensor, count: int, group: Any) -> tuple[Tensor, Tensor]:
    """Return the statistics of all processes from those of each, and their count; the range stays each one's own."""
    n = found.new_full((1,), count)
    total = torch.cat([found[0] * n, n])
    dist.all_reduce(total, group=group)
    mean = total[:-1] / total[-1]
    squares = (found[1] + (found[0] - mean).square()) * n
    dist.all_reduce(squares, group=group)
    return torch.cat([torch.stack([mean, squares / total[-1]]), found[2:]]), total[-1]


def _row_norm(level: str, plan: Plan, act: int, x: Tensor) -> Tensor | None:
    own, kind = plan.module, plan.kind
    if not _trains(x, own.weight, own.bias) or (level == "exact" and act == k.IDENTITY):
        return None  # what PyTorch keeps of such a layer is its input, which is the least there is
    keep = {"exact": k.INPUT, "rounded": k.BFLOAT16, "smallest": k.BYTE}[level]
    if x.device.type not in AUTOCAST_LEAVES and torch.is_autocast_enabled(x.device.type):
        x = x.float()  # as autocast does with PyTorch's own
    if kind == "layer2d":
        x = x.permute(0, 2, 3, 1)
    if kind != "group" and act == k.IDENTITY and k.row_kernels(x) is not None:
        y = RoundedLayerNorm.apply(x, own.weight, own.bias, own.eps, keep)
    else:
        groups = own.num_groups if kind == "group" else 0
        y = RowNorm.apply(x, own.weight, own.bias, groups, own.eps, act, keep)
    return y.permute(0, 3, 1, 2) if kind == "layer2d" else y


def pair(
    level: str,
    first: nn.Module,
    act: Any,
    between: nn.Module,
    second: nn.Module,
    act2: Any,
    x: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    """Run norm, activation, convolution, norm (+ residual), activation; backward runs the convolution once more.

    Args: as `norm`, twice; ``between`` is the convolution.
    """
    one, two, outer, outer2 = plan_of(first), plan_of(second), act_of(act), act_of(act2)
    own, geometry, padded = frozen(between, x)
    if one is not None and two is not None and outer is not None and outer2 is not None and own is not None:
        code, code2 = one.act or outer, two.act or outer2
        twice = (one.act and outer) or (two.act and (outer2 or residual is not None))
        plain = residual is None or code2 in (k.IDENTITY, *k.MASKED)
        trains = _trains(x, one.module.weight, one.module.bias)
        if one.kind == two.kind == "batch" and trains and plain and not twice and padded is x:
            return _pair(one.module, code, own, geometry, two.module, code2, x, residual)
    return norm(level, second, act2, conv(between, norm(level, first, act, x)), residual)


def _pair(
    one: Any, act: int, own: Any, geometry: Geometry, two: Any, act2: int, x: Tensor, residual: Tensor | None
) -> Tensor:
    with torch.no_grad():
        how, maps = _statistics(one, act, x, k.BYTE)
        first = maps[:4].unbind()
        h, kept, mask = k.kernels(x, act).forward(x, None, *first, act, k.BYTE, act in k.MASKED)
        z = convolve(h, own.weight, own.bias, geometry)
        del h
        apart = residual is not None and not _alike(residual, z)
        how2, maps2 = _statistics(two, k.IDENTITY if apart else act2, z, k.INPUT)
    fused, bits = None if apart else residual, mask if act in k.MASKED else None
    y = NormActConv.apply(
        x, one.weight, one.bias, two.weight, two.bias, fused, kept, bits, maps, how,
        own.weight, own.bias, geometry, z, maps2, how2,
    )  # fmt: skip
    return k.activate(y + residual, act2) if apart else y


def pooled(level: str, module: nn.Module, act: Any, pool: nn.Module, x: Tensor) -> Tensor:
    """Run norm, activation and max-pooling; where nothing before them trains, only what was pooled is kept."""
    plan, outer = plan_of(module), act_of(act)
    pool_: Any = pool
    if (
        x.requires_grad
        or x.dim() != 4
        or plan is None
        or plan.kind != "batch"
        or outer is None
        or (plan.act and outer)
        or (plan.act or outer) not in k.MASKED
        or hooked(pool)
        or pool_.return_indices
        or not _trains(plan.module.weight, plan.module.bias)
    ):
        return max_pool(pool, norm(level, module, act, x))
    code = plan.act or outer
    how, maps = _statistics(plan.module, code, x, keep_of(level, plan.module, code, x))
    return PooledNorm.apply(x, plan.module.weight, plan.module.bias, maps, how, pooling(pool_))


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
    worth = code in k.MASKED or (level == "smallest" and rows.shape[-1] >= SHORTEST)
    if code in (None, k.IDENTITY) or not x.requires_grad or not worth:
        return _run_act(act, x)
    y = KeptAct.apply(rows, code)
    return y.permute(0, 3, 1, 2) if images else y


def attention(
    q: Tensor,
    k_: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **rest: Any,
) -> Tensor:
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
