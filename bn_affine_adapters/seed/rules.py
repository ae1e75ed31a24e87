"""Redraw every tensor of a network from one seed, in place, by the scheme `bnaffine-init-v1`.

The module that owns a tensor decides its rule: convolution, linear layer, norm layer, embedding, token or position
table. Any other tensor keeps its constant if its constructor fills it with one, and is an error otherwise.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..errors import ReinitError, check_choice
from ..norms.find import STATISTICS, affine, is_norm, plain_tensors
from . import draws
from .draws import NORM_INITS, WEIGHT_INITS, check_seed
from .generator import OwnGenerator

GAIN2 = 2.0  # the squared gain of ReLU
TABLE_SCALE = 0.02

_TABLE = re.compile(
    r"(cls|dist|distillation|reg|mask|class|register)_?tokens?_?\d*|latent|patch_pos|pixel_pos"
    r"|(pos|position)_?(emb|embed|embedding|embeddings)(_\w+|\d*)|position_embedding_table"
    r"|relative_position_bias_table|rel_pos_[hw]|(height|width)_rel|attention_biases"
)


class Rule(NamedTuple):
    """How one tensor is drawn: a distribution with its scale, an orthogonal matrix, rotations, or a constant."""

    kind: str  # a draws.Distribution, "orthogonal", "rotations" or "constant"
    scale: float = 1.0  # of rotations: the temperature
    shift: float = 0.0  # added after scaling


_GAMMA_RULES = {"uniform": Rule("unit"), "symmetric": Rule("uniform")}  # U(0, 1), the paper's; U(-1, 1)


def fan_in(weight: torch.Tensor) -> int:
    """Return a weight's fan_in by torch's convention: shape[1] times the kernel's size, groups ignored."""
    return math.prod(weight.shape[1:])


def weight_rule(weight: torch.Tensor, weight_init: str) -> Rule:
    """Return the rule of a convolution's or linear layer's weight.

    Raises:
        ConfigError: ``weight_init`` is none of WEIGHT_INITS.
    """
    check_choice("weight_init", weight_init, WEIGHT_INITS)
    match weight_init:
        case "kaiming_normal":
            return Rule("normal", math.sqrt(GAIN2 / fan_in(weight)))
        case "kaiming_uniform":
            return Rule("uniform", math.sqrt(3 * (GAIN2 / fan_in(weight))))
        case "binary":
            return Rule("sign", math.sqrt(GAIN2 / fan_in(weight)))
        case _:
            return Rule("orthogonal")


def rule_for(owner: nn.Module, attribute: str, weight_init: str, norm_init: str) -> Rule | None:
    """Return the rule of a parameter, or None if only a constant set by its constructor can be its rule."""
    if is_norm(owner):
        check_choice("norm_init", norm_init, NORM_INITS)
        gamma, beta = affine(owner)
        if attribute == gamma:
            return _GAMMA_RULES.get(norm_init, Rule("constant", 1.0))
        if attribute == beta:
            return Rule("constant", 1.0 if norm_init == "ones_beta_one" else 0.0)
        return None
    if isinstance(owner, nn.modules.conv._ConvNd | nn.Linear):
        if attribute == "weight":
            return weight_rule(owner.weight, weight_init)
        if attribute == "bias":
            return Rule("uniform", math.sqrt(1 / fan_in(owner.weight)))
        return None
    if isinstance(owner, nn.Embedding) or _TABLE.fullmatch(attribute):
        return Rule("normal", TABLE_SCALE)
    return _rule_by_class(owner, attribute, weight_init)


def _rule_by_class(owner: Any, attribute: str, weight_init: str) -> Rule | None:
    """Return the rule of a parameter that only one class of torch or timm has: as its constructor draws it."""
    if isinstance(owner, nn.RNNBase):
        return Rule("uniform", math.sqrt(1 / owner.hidden_size))
    if isinstance(owner, nn.MultiheadAttention) and attribute == "in_proj_weight":
        return weight_rule(owner.in_proj_weight, weight_init)
    if not type(owner).__module__.startswith("timm."):
        return None
    match type(owner).__name__, attribute:
        case "CondConv2d", "weight" if weight_init != "orthogonal":
            return weight_rule(torch.empty(owner.weight_shape, device="meta"), weight_init)
        case "CondConv2d", "bias":
            return Rule("uniform", math.sqrt(1 / math.prod(owner.weight_shape[1:])))
        case "RotaryEmbeddingMixed", "freqs":
            return Rule("rotations", owner.temperature)
        case "DiffAttention" | "DiffParallelScalingBlock", "lambda_q1" | "lambda_k1" | "lambda_q2" | "lambda_k2":
            return Rule("normal", 0.1)
        case "HSMSSD", "A":
            low, high = owner.a_init_range
            return Rule("unit", high - low, low)
        case "EfficientAdditiveAttention", "w_g":
            return Rule("normal")
    return None


def draw_into_(tensor: torch.Tensor, rule: Rule, seed: int, name: str) -> None:
    """Draw a tensor's values in binary32 on the CPU: into its own memory if it is float32 there, else by a copy."""
    in_place = tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()
    target = tensor.detach() if in_place else torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
    out = target.numpy()
    if rule.kind == "constant":
        out.fill(rule.scale)
    elif rule.kind == "orthogonal":
        draws.fill(out.reshape(-1), seed, name, "normal")
        out[...] = _orthogonal(out)
    elif rule.kind == "rotations":
        draws.rotations(out, seed, name, rule.scale)
    else:
        draws.fill(out.reshape(-1), seed, name, rule.kind, rule.scale)  # type: ignore[arg-type]  # a Distribution
        if rule.shift:
            out += np.float32(rule.shift)
    if not in_place:
        tensor.copy_(target)


def _orthogonal(normal: NDArray[np.float32]) -> NDArray[np.float32]:
    # Not portable: LAPACK's QR differs between machines. The fingerprint tells when it did.
    rows = normal.reshape(normal.shape[0], -1).astype(np.float64)
    wide = rows.shape[0] < rows.shape[1]
    q, r = np.linalg.qr(rows.T if wide else rows)
    q = q * np.sign(np.diag(r))
    return (q.T if wide else q).astype(np.float32).reshape(normal.shape)


def parameter_rules(
    model: nn.Module,
    *,
    weight_init: str,
    norm_init: str,
    ones: Collection[str] = (),
    reference: Callable[[], nn.Module] | None = None,
) -> Iterator[tuple[str, nn.Parameter, Rule]]:
    """Yield (canonical name, parameter, its rule) for every parameter that `reinit_` redraws. Args: as there.

    Raises:
        ReinitError: a parameter has no rule, is parametrised, or lies on the meta device.
    """
    constants: dict[str, torch.Tensor] | None = None
    taken: dict[str, nn.Module] = {}
    for name, owner, attribute, tensor in plain_tensors(model):
        if not isinstance(tensor, nn.Parameter):
            continue
        _check(name, owner, tensor, taken)
        if norm_init == "keep" and is_norm(owner) and attribute in affine(owner):
            continue
        rule = Rule("constant", 1.0) if name in ones else rule_for(owner, attribute, weight_init, norm_init)
        if rule is None:
            if constants is None:
                constants = {n: t for n, _, _, t in plain_tensors(reference() if reference else model)}
            rule = _constant_rule(name, owner, constants[name])
        yield name, tensor, rule


def _check(name: str, owner: nn.Module, tensor: torch.Tensor, taken: dict[str, nn.Module]) -> None:
    if name in taken:
        raise ReinitError(
            f"Two parameters have the name {name!r} in the plain network.",
            seen=f"one in {type(taken[name]).__name__}, one in {type(owner).__name__}",
            do="pass the network before it is wrapped",
        )
    taken[name] = owner
    if "parametrizations." in name:
        shown = name.replace("parametrizations.", "").rpartition(".original")[0] or name
        raise ReinitError(
            f"{shown} is computed by a parametrisation, so that it has no values of its own to redraw.",
            seen=f"torch.nn.utils.parametrize on {type(owner).__name__}",
            do="call torch.nn.utils.parametrize.remove_parametrizations first",
        )
    check_memory(name, tensor)


def check_memory(name: str, tensor: torch.Tensor) -> None:
    """Raise ReinitError if a parameter lies on the meta device."""
    if tensor.is_meta:
        raise ReinitError(
            f"{name} lies on the meta device and has no values.",
            seen="device meta",
            do='build the network on a real device, or call model.to_empty(device="cpu") first',
        )


def _constant_rule(name: str, owner: nn.Module, tensor: torch.Tensor) -> Rule:
    flat = tensor.detach().reshape(-1).float()
    first = flat[0].item() if flat.numel() else 0.0
    if math.isnan(first) or not bool((flat == first).all()):
        raise ReinitError(
            f"{name} has no rule in {draws.SCHEME}: it cannot be redrawn from a seed.",
            seen=f"attribute of {type(owner).__module__}.{type(owner).__name__}, shape {tuple(tensor.shape)}, "
            "which its constructor does not fill with one constant",
            do="use seed=None to keep the weights given, or choose another architecture",
        )
    return Rule("constant", first)


@torch.no_grad()
def reinit_(
    model: nn.Module,
    seed: int,
    *,
    weight_init: str = "kaiming_normal",
    norm_init: str = "uniform",
    ones: Collection[str] = (),
    reference: Callable[[], nn.Module] | None = None,
) -> nn.Module:
    """Redraw a network from a seed in place and reset its running statistics; return it.

    Values are drawn in binary32 on the CPU and then copied, so that every device gets the same bits; other dtypes
    get the cast of the binary32 value. torch's, numpy's and Python's generators are not touched.

    Args:
        model: the network, on any device but meta.
        seed: 0 <= seed < 2^64.
        weight_init: one of WEIGHT_INITS; "orthogonal" is not portable between machines.
        norm_init: one of NORM_INITS; "keep" leaves gamma and beta as they are.
        ones: names of parameters that become 1, e.g. `norms.scales.layer_scales(model)`.
        reference: builds the network under `constants_only`, if a constant has to be read; default ``model``.

    Raises:
        ConfigError: an argument is not one of those listed.
        ReinitError: a parameter has no rule, is parametrised, or lies on the meta device; nothing has been changed.

    >>> import timm
    >>> model = reinit_(timm.create_model("resnet18"), seed=0)
    >>> model.conv1.weight[0, 0, 0, :2].tolist()
    [-0.09398301690816879, 0.055595945566892624]
    """
    seed = check_seed(seed)
    check_choice("weight_init", weight_init, WEIGHT_INITS)
    check_choice("norm_init", norm_init, NORM_INITS)
    # All rules first: a network that cannot be redrawn is not changed.
    rules = list(parameter_rules(model, weight_init=weight_init, norm_init=norm_init, ones=ones, reference=reference))
    for name, tensor, rule in rules:
        draw_into_(tensor, rule, seed, name)
    _reset_statistics_(model)
    return model


def _reset_statistics_(model: nn.Module) -> None:
    for _, owner, attribute, tensor in plain_tensors(model):
        if is_norm(owner) and attribute in STATISTICS:
            tensor.fill_(1 if attribute == "running_var" else 0)


@torch.no_grad()
def draw_norm_(module: nn.Module, name: str, seed: int, norm_init: str) -> None:
    """Redraw one norm layer's gamma and beta, in place, under the layer's canonical name."""
    for attribute in affine(module):
        if attribute is not None and (rule := rule_for(module, attribute, "kaiming_normal", norm_init)) is not None:
            draw_into_(module.get_parameter(attribute), rule, seed, f"{name}.{attribute}")


_RANDOM = {"uniform_", "normal_", "log_normal_", "cauchy_", "exponential_", "geometric_", "bernoulli_", "random_"}
_RANDOM_FACTORIES = {"rand", "randn", "rand_like", "randn_like", "normal", "bernoulli"}
_ARITHMETIC = {"add_", "sub_", "mul_", "div_", "clamp_", "erfinv_"}  # in place: NaN stays NaN
_COMPARISONS = {"lt", "le", "gt", "ge"}
_MAX_READS = 10_000  # of single values by one constructor; those of timm read at most a few hundred


class _RandomIsNaN(OwnGenerator):
    """A random tensor is not drawn: a NaN as its first value stands for a tensor that holds nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _RANDOM and args[0].is_floating_point():
            # Filling all of it would take time, and it is redrawn anyway.
            if args[0].numel():
                _first(args[0]).fill_(torch.nan)
            return args[0]
        if name in _ARITHMETIC and _marked(args[0]):
            return args[0]  # as all of it is redrawn: this saves most of the time of building a vision transformer
        out = self.run(func, args, kwargs or {})
        if name == "linalg_qr" and args[0].isnan().any():  # called by orthogonal_; LAPACK may drop a NaN
            return tuple(part.fill_(torch.nan) for part in out)
        if name in _COMPARISONS and any(_marked(arg) for arg in args):
            # As for NaN: `nn.init.trunc_normal_` draws again while a value is out of bounds, as old memory may be.
            return out.fill_(False)
        if name == "_local_scalar_dense":
            self._count_read()
        return out.fill_(torch.nan) if name in _RANDOM_FACTORIES else out

    def _count_read(self) -> None:
        self.reads += 1
        if self.reads > _MAX_READS:
            raise ReinitError(
                "A constructor waits for random values, but no value is drawn while a network is rebuilt.",
                seen=f"{_MAX_READS:,} values read, as by a loop that draws again until all values are in bounds",
                do="give architecture='custom' for a network that then loads only with model=",
            )


def _first(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[(0,) * tensor.dim()]


def _marked(value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.is_meta or not value.numel():
        return False
    return math.isnan(_first(value).item())


@contextmanager
def constants_only() -> Iterator[None]:
    """Build networks whose random tensors begin with NaN and whose constants are as the constructor sets them.

    This saves the time of an initialisation that is redrawn anyway, leaves the global generators alone, and tells
    constants from random tensors: a tensor that still holds a NaN after `reinit_` has no rule. Other threads build
    their networks as ever.
    """
    with _RandomIsNaN():
        yield
