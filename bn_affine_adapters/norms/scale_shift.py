"""Scales and shifts of a norm layer's copies, one row a copy: images of several adapters pass the layer together."""

from collections.abc import Callable, Sequence
from importlib import import_module
from operator import is_
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from .find import affine

# Where the channels are: in the second dimension, or in the last ones. BatchNorm has them in the second, and its
# running statistics are folded into scale and shift. Other classes run copy by copy: see `kind_of`.
BATCH, SECOND, LAST = "batch", "second", "last"
_TIMM = {
    SECOND: "GroupNorm GroupNorm1 LayerNorm2d LayerNorm2dFp32 LayerNormExp2d RmsNorm2d RmsNorm2dFp32 SimpleNorm2d "
    "SimpleNorm2dFp32 GroupNormAct GroupNorm1Act LayerNormAct2d LayerNormAct2dFp32 RmsNormAct2d RmsNormAct2dFp32",
    LAST: "LayerNorm LayerNormFp32 RmsNorm RmsNormFp32 SimpleNorm SimpleNormFp32 LayerNormAct LayerNormActFp32 "
    "RmsNormAct RmsNormActFp32",
    BATCH: "SyncBatchNormAct",
}
_KINDS: dict[type[nn.Module], str] = {
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d), BATCH),
    nn.GroupNorm: SECOND,
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), LAST),
    **{
        found: kind
        for kind, names in _TIMM.items()
        for name in names.split()
        for module in ("timm.layers.norm", "timm.layers.norm_act")
        if (found := getattr(import_module(module), name, None)) is not None
    },
}
_BEHIND = ("drop", "act")  # what timm's fused layers run after the norm, in this order


def kind_of(module: nn.Module) -> str | None:
    """Return where a norm layer has its channels; None if scale and shift do not tell all that its copies differ in.

    Classes are compared exactly, since a subclass may compute anything.
    """
    kind = _KINDS.get(type(module))
    if kind is None or not _runs_as_its_class(module):
        return None
    behind = list(module._modules.items())
    if any(name not in _BEHIND or next(child.parameters(), None) is not None for name, child in behind if child):
        return None
    return None if kind == BATCH and module._buffers.get("running_mean") is None else kind


def _runs_as_its_class(module: nn.Module) -> bool:
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


class ScaleShift:
    """The scales and shifts of a norm layer's copies, kept ready.

    A row is computed again when a tensor of its copy is another one, or has changed in place. As autograd does, this
    relies on the version counter of a tensor, which counts no change through ``.data``.
    """

    def __init__(self, names: tuple[str, ...], module_of: Callable[[str], nn.Module], kind: str) -> None:
        """Stack the copies of all names, which are of the same class: see `built`."""
        modules = [module_of(name) for name in names]
        self.names, self.kind = names, kind
        self.states = [_state(module) for module in modules]
        self.table = _folded(modules, kind)
        self.bare = None if kind == BATCH else _bare(modules[0])
        self.behind = [module for name in _BEHIND if (module := modules[0]._modules.get(name)) is not None]

    @classmethod
    def built(cls, names: tuple[str, ...], module_of: Callable[[str], nn.Module]) -> "ScaleShift | None":
        """Return the stacked scales and shifts, or None for layers that have to run copy by copy."""
        modules = [module_of(name) for name in names]
        kind = kind_of(modules[0])
        one_kind = kind is not None and all(_fits(module, modules[0], kind) for module in modules)
        return cls(names, module_of, kind) if kind is not None and one_kind else None

    @torch.no_grad()
    def refresh_(self, module_of: Callable[[str], nn.Module], rows: Sequence[int]) -> bool:
        """Compute those of these rows again whose copies have changed; return False if all must be stacked anew."""
        modules = [module_of(self.names[row]) for row in rows]
        states = [_state(module) for module in modules]
        changed = [place for place, row in enumerate(rows) if not _same(states[place], self.states[row])]
        if not changed:
            return True
        others = [modules[place] for place in changed]
        base = module_of(self.names[0])
        if not all(_fits(module, base, self.kind) for module in others):
            return False
        new = _folded(others, self.kind)
        if (new.device, new.dtype) != (self.table.device, self.table.dtype):
            return False
        self.table[[rows[place] for place in changed]] = new
        for place in changed:
            self.states[rows[place]] = states[place]
        return True

    def __call__(self, x: Tensor, rows: Tensor) -> Tensor:
        """Run the layer on x, whose first dimension is as long as ``rows``, (N,): the row of each image."""
        picked = self.table.index_select(0, rows)
        shape = [len(picked), *picked.shape[2:]]
        ones = [1] * (x.dim() - len(shape))
        shape = [shape[0], *ones, *shape[1:]] if self.kind == LAST else [*shape, *ones]
        x = x if self.bare is None else self.bare(x)
        x = torch.addcmul(picked[:, 1].view(shape), x, picked[:, 0].view(shape)).to(x.dtype)
        for module in self.behind:
            x = module(x)
        return x


def _state(module: Any) -> tuple[tuple[Tensor, ...], int | None]:
    """Return a layer's tensors, to be compared by identity, and a hash of their versions and of its settings.

    The hash is None if only reading the tensors tells whether they have changed.
    """
    tensors = tuple(t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)
    # Tensors made in inference mode have no version. And PyTorch's kernel moves running statistics without a new
    # version: that of the counter tells.
    uncounted = module._buffers.get("running_mean") is not None and module._buffers.get("num_batches_tracked") is None
    if uncounted or any(tensor.is_inference() for tensor in tensors):
        return tensors, None
    numbers = [number for tensor in tensors for number in (tensor._version, tensor.data_ptr())]
    return tensors, hash((type(module), module.eps, _runs_as_its_class(module), *numbers))


def _same(one: tuple[tuple[Tensor, ...], int | None], other: tuple[tuple[Tensor, ...], int | None]) -> bool:
    counted = one[1] is not None and one[1] == other[1] and len(one[0]) == len(other[0])
    return counted and all(map(is_, one[0], other[0]))


def _fits(module: Any, base: Any, kind: str) -> bool:
    """Tell whether a layer is normalised as the base layer is."""
    return kind_of(module) == kind and type(module) is type(base) and (kind == BATCH or module.eps == base.eps)


@torch.no_grad()
def _folded(modules: Sequence[Any], kind: str) -> Tensor:
    """Return scale and shift of each layer, (len(modules), 2, C), or the layer's own shape instead of C."""
    like = next(t for t in (*modules[0]._parameters.values(), modules[0]._buffers.get("running_var")) if t is not None)
    wide = torch.promote_types(like.dtype, torch.float32)
    gammas, betas = zip(*(_affine(module, like) for module in modules), strict=True)
    scale, shift = torch.stack(gammas).to(wide), torch.stack(betas).to(wide)
    if kind == BATCH:
        eps = torch.tensor([module.eps for module in modules], dtype=wide, device=like.device)
        mean, variance = (torch.stack([m._buffers[f"running_{n}"] for m in modules]).to(wide) for n in ("mean", "var"))
        scale = scale * torch.rsqrt(variance + eps[:, None])
        shift = torch.addcmul(shift, mean, scale, value=-1)
    return torch.stack([scale, shift], 1)


def _affine(module: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    gamma, beta = (None if name is None else module._parameters[name] for name in affine(module))
    return torch.ones_like(like) if gamma is None else gamma, torch.zeros_like(like) if beta is None else beta


def _bare(module: nn.Module) -> nn.Module:
    """Return a layer that normalises as this one does, with gamma 1 and beta 0, and runs nothing behind."""
    bare = object.__new__(type(module))
    bare.__dict__ = {**vars(module), "training": False}
    gamma, _ = affine(module)
    fill = {name: torch.ones_like if name == gamma else torch.zeros_like for name in module._parameters}
    bare._parameters = {
        name: None if p is None else nn.Parameter(fill[name](p), requires_grad=False)
        for name, p in module._parameters.items()
    }
    bare._modules = {name: nn.Identity() for name in module._modules}
    return bare
