"""What a network learned: gamma and beta, dead activations, accuracy against size. Plain data in, plain data out.

Every function takes any network, and of a wrapped one analyses what runs now: the active adapter's copies.

Source: the paper's Figures 3 to 7 and its table of parameters.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from ..adapter.rebuild import create
from ..errors import AdapterTensorError, ConfigError, DataError, NetworkError, check_choice
from ..norms.copies import evaluation_copy
from ..norms.find import affine, head_layers, norm_layers, plain_modules, shortcut_convs
from ..seed.rules import draw_into_, rule_for
from ..sharing.contents import NEAR_ZERO

BELOW = (0.001, NEAR_ZERO, 0.05, 0.1)  # of |gamma|: the shares that `distribution` tells
BINS = 80
DEAD = 0.99  # a channel is dead where it is zero more often than this, as in the paper
GRID = tuple(i / 100 for i in range(101))  # not i * 0.01, which is beside 0.29
ACTIVATIONS = (nn.ReLU, nn.ReLU6)  # what answers with exact zeros; fused norm layers hold one of them


class Zeros(TypedDict):
    """How often each channel of an activation was zero, of how many values that each channel had."""

    zeros: list[int]
    total: int


def norm_values(model: nn.Module) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Return {"gamma": {layer: values}, "beta": {layer: values}} of the norm layers, copied, shape (C,) as a rule.

    Raises:
        NoNormLayerError: there is no norm layer with gamma or beta.
    """
    return {
        kind: {name: tensor.detach().double().cpu().numpy().copy() for name, tensor in tensors.items()}
        for kind, tensors in _parameters(model).items()
    }


def _parameters(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Return the gammas and betas that run now by layer; one that several layers share comes once."""
    parameters: dict[str, dict[str, nn.Parameter]] = {"gamma": {}, "beta": {}}
    seen: set[int] = set()
    for name, module in norm_layers(model, active=True).items():
        for kind, attribute in affine(module)._asdict().items():
            if attribute and id(parameter := module.get_parameter(attribute)) not in seen:
                seen.add(id(parameter))
                parameters[kind][name] = parameter
    return parameters


def distribution(values: Mapping[str, ArrayLike], below: Sequence[float] = BELOW, digits: int = 6) -> dict[str, Any]:
    """Return the distribution of values by layer, one of the two that `norm_values` returns, as JSON has it.

    Args:
        values: of any shape, by layer.
        below: thresholds of |value|.
        digits: after the point; of the edges too, which are rounded before anything is counted.

    Returns:
        count; mean and std, the population's; negative, in %; below: in % by threshold; histogram: 81 edges, rounded
        outwards, and 80 counts, none where there is no value; layers: mean, std and near_zero in % (|value| < 0.01).
        Of no values {"count": 0}.

    Raises:
        AdapterTensorError: a value is not finite.

    Source: the paper's Figures 4 and 5.

    >>> gamma = distribution({"bn1": [-0.5, 0.0, 0.5, 2.0]})
    >>> gamma["mean"], gamma["negative"], gamma["below"]["0.01"], gamma["layers"]["bn1"]["near_zero"]
    (0.5, 25.0, 25.0, 25.0)
    """
    arrays = _finite_arrays(values)
    if not arrays:
        return {"count": 0}
    joined = np.concatenate(list(arrays.values()))
    return {
        "count": joined.size,
        **_moments(joined, digits),
        "negative": _percent(joined < 0, digits),
        "below": {f"{threshold:g}": _percent(np.abs(joined) < threshold, digits) for threshold in below},
        "histogram": _histogram(joined, digits),
        "layers": {
            name: {**_moments(array, digits), "near_zero": _percent(np.abs(array) < NEAR_ZERO, digits)}
            for name, array in arrays.items()
        },
    }


def _finite_arrays(values: Mapping[str, ArrayLike]) -> dict[str, NDArray[np.float64]]:
    """Return the values of each layer as one flat array, without layers that have none."""
    arrays = {name: np.ravel(np.asarray(array, dtype=np.float64)) for name, array in values.items()}
    if strange := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        what, do = "Values that are not finite have no distribution.", "train again: the run diverged"
        raise AdapterTensorError(what, seen=f"{len(strange)} layers, the first is {strange[0][:200]}", do=do)
    return {name: array for name, array in arrays.items() if array.size}


def _moments(values: NDArray[np.float64], digits: int) -> dict[str, float]:
    return {"mean": round(float(values.mean()), digits), "std": round(float(values.std()), digits)}


def _percent(chosen: NDArray[np.bool_], digits: int) -> float:
    return round(100 * float(chosen.mean()), digits)


def _histogram(values: NDArray[np.float64], digits: int) -> dict[str, list[Any]]:
    edges = _edges(values, digits)
    counts = np.histogram(values.clip(edges[0], edges[-1]), edges)[0]
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _edges(values: NDArray[np.float64], digits: int) -> NDArray[Any]:
    """Return the edges of equal bins; their ends lie on a coarser grid, so that rounded edges differ."""
    step = 10.0 ** (2 - digits)  # 100 of the last digit, for 80 bins
    low, high = math.floor(values.min() / step), math.ceil(values.max() / step)
    if low == high:  # all values are one
        low, high = low - 1, high + 1
    return np.round(np.linspace(low * step, high * step, BINS + 1), digits)


@contextmanager
def clamped(model: nn.Module, threshold: float = NEAR_ZERO) -> Iterator[int]:
    """Set every |gamma| < threshold to zero within the block; afterwards every gamma has the bits it had before.

    Yields:
        How many gammas were set, those included that are zero anyway.

    Raises:
        ConfigError: the threshold is negative or no number.
        NoNormLayerError: there is no norm layer with gamma or beta.

    Source: the paper's Figure 6.
    """
    if not threshold >= 0:
        raise ConfigError("No |gamma| is below such a threshold.", seen=f"threshold={threshold}", do="threshold=0.01")
    gammas = list(_parameters(model)["gamma"].values())
    with _restored(gammas):
        with torch.no_grad():
            # In float64, where `distribution` compares too: float32's 0.01 is another number.
            small = [gamma.double().abs() < threshold for gamma in gammas]
            for gamma, chosen in zip(gammas, small, strict=True):
                gamma.masked_fill_(chosen, 0)
        yield sum(int(chosen.sum()) for chosen in small)


@contextmanager
def _restored(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Give parameters the bits back, after the block, that they had before it."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(parameters, before, strict=True):
                parameter.copy_(values)


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions and linear layers that run now, by name."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    return {name: module for name, module in plain_modules(model, active=True) if isinstance(module, kinds)}


@contextmanager
def redrawn(model: nn.Module, layer: str, seed: int = 0, weight_init: str = "kaiming_normal") -> Iterator[None]:
    """Draw a layer's weight and bias from a seed within the block; afterwards they have the bits they had before.

    Args:
        model: any network; of a wrapped one, what runs now.
        layer: one of `weight_layers`.
        seed: of the draw; the layer's name goes into it, as when a network is wrapped.
        weight_init: as in `BNOnlyConfig`.

    Raises:
        ConfigError: there is no such layer.

    Source: Zhang, Bengio and Singer, "Are All Layers Created Equal?" (arXiv 1902.01996), re-randomisation.
    """
    layers = weight_layers(model)
    check_choice("layer", layer, list(layers))
    parameters = {key: p for key, p in layers[layer].named_parameters(recurse=False)}
    rules = {key: rule_for(layers[layer], key, weight_init, "keep") for key in parameters}
    with _restored([*parameters.values()]):
        with torch.no_grad():
            for key, rule in rules.items():
                assert rule  # weights and biases of these classes have one
                draw_into_(parameters[key], rule, seed, f"{layer}.{key}")
        yield


def dead_activations(model: nn.Module, batches: Iterable[torch.Tensor]) -> dict[str, Zeros]:
    """Count how often each channel of each ReLU is zero, over all images and pixels, in one pass.

    Channels are dimension 1 of (N, C), (N, C, H, W) and (N, C, D, H, W), and the last one of tokens (N, L, C). A module
    that runs more than once for a batch has an entry for each run: ``relu``, ``relu, run 2``. ReLUs that the network
    calls as functions cannot be seen.

    Args:
        model: in any mode; it runs in evaluation mode, and its own modes do not change.
        batches: images, which come to the network's device and type.

    Returns:
        {layer: {"zeros": [by channel], "total": values of each channel}}, exact; see `dead_share`.

    Raises:
        NetworkError: no nn.ReLU or nn.ReLU6 is there, or none ran.
        DataError: there is no batch.

    Source: the paper's Figure 7.
    """
    watched = evaluation_copy(model)
    relus, counter, looked = _relus(watched), _ZeroCounter(), 0
    for module, name in relus.items():
        module.register_forward_hook(partial(counter.count, name))
    first = next(model.parameters(), torch.empty(0))
    with torch.no_grad():
        for images in batches:
            counter.runs.clear()
            watched(images.to(first.device, first.dtype))
            looked += 1
    if not looked:
        raise DataError("There is no image to run through the network.", seen="0 batches", do="give batches of images")
    if not counter.zeros:
        raise NetworkError(
            f"{type(model).__name__} runs no module nn.ReLU or nn.ReLU6, whose zeros could be counted.",
            seen=f"{len(relus)} such modules, none of which ran",
            do="choose a network whose ReLUs are modules; other activations are never exactly zero",
        )
    return {key: {"zeros": zeros.tolist(), "total": counter.totals[key]} for key, zeros in counter.zeros.items()}


def _relus(model: nn.Module) -> dict[nn.Module, str]:
    """Return the ReLUs that run now with their names; one that stands in several places has its first name."""
    names: dict[nn.Module, str] = {}
    for name, module in plain_modules(model, active=True):
        if isinstance(module, ACTIVATIONS):
            names.setdefault(module, name)
    return names


class _ZeroCounter:
    """Adds up the zeros of each channel, and how many values each channel had, by module and run within a batch."""

    def __init__(self) -> None:
        self.zeros: dict[str, torch.Tensor] = {}
        self.totals: Counter[str] = Counter()
        self.runs: Counter[str] = Counter()  # in this batch

    def count(self, name: str, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self.runs[name] += 1
        key = name if self.runs[name] == 1 else f"{name}, run {self.runs[name]}"
        channel = 2 if output.ndim == 3 else 1
        zeros = (output == 0).sum([dim for dim in range(output.ndim) if dim != channel])  # int64
        self.zeros[key] = self.zeros[key] + zeros if key in self.zeros else zeros
        self.totals[key] += output.numel() // output.shape[channel]


def dead_share(counts: Mapping[str, Zeros], thresholds: Sequence[float] = GRID) -> list[float]:
    """Return for each threshold t the channels with Pr[activation = 0] > t, in % of all channels.

    Raises:
        DataError: there is no channel.

    >>> dead_share({"act1": {"zeros": [100, 99, 0, 50], "total": 100}}, [0.99, 0.98, 0])
    [25.0, 50.0, 75.0]
    """
    # An exact quotient rounds to the number that a threshold such as 0.99 is read as: equal ones compare as equal.
    rates = np.array([zeros / entry["total"] for entry in counts.values() for zeros in entry["zeros"]])
    if not rates.size:
        raise DataError("There is no channel of which a share could be dead.", seen="0 channels", do="count some first")
    return [100 * float((rates > threshold).mean()) for threshold in thresholds]


def depth_width_slopes(points: Iterable[tuple[int, float, str]]) -> dict[str, Any]:
    """Fit accuracy = intercept + slope * log2(parameters) by least squares, in each group.

    Args:
        points: (gammas and betas, accuracy in %, "depth" or "width"); replicates are points of their own.

    Returns:
        {"depth": {"slope": points per doubling, "error": its standard error, "intercept": %, "n": points}, "width":
        {...}, "ratio": of the slopes, depth over width, None where width has none, "error": its standard error}. The
        errors are those of least squares, which takes all points for independent; None of two points.

    Raises:
        ConfigError: a group is another one, has not two networks of different size, or a point cannot be drawn.

    Source: the paper's Figure 3, where the ratio is about 1.18.
    """
    groups: dict[str, list[tuple[int, float]]] = {"depth": [], "width": []}
    for parameters, accuracy, group in points:
        if group not in groups or not (0 < parameters < math.inf and math.isfinite(accuracy)):
            what, do = "A point is not on the figure.", 'give (parameters > 0, accuracy in %, "depth" or "width")'
            raise ConfigError(what, seen=f"{(parameters, accuracy, group)}", do=do)
        groups[group].append((parameters, accuracy))
    lines: dict[str, Any] = {name: _line(name, group) for name, group in groups.items()}
    return {**lines, **_ratio(lines["depth"], lines["width"])}


def _ratio(depth: Mapping[str, Any], width: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the ratio of two slopes, and its standard error to first order."""
    if not width["slope"]:
        return {"ratio": None, "error": None}
    ratio = depth["slope"] / width["slope"]
    if depth["error"] is None or width["error"] is None:
        return {"ratio": ratio, "error": None}
    return {"ratio": ratio, "error": math.hypot(depth["error"], ratio * width["error"]) / abs(width["slope"])}


def _line(name: str, points: list[tuple[int, float]]) -> dict[str, Any]:
    if len(sizes := {parameters for parameters, _ in points}) < 2:
        seen = f"{len(points)} points of {len(sizes)} sizes"
        raise ConfigError(f"The {name} line needs two networks of different size.", seen=seen, do="add another one")
    x, y = np.array(points, dtype=np.float64).T
    x = np.log2(x)
    squares = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / squares
    intercept = float(y.mean() - slope * x.mean())
    residuals = float(((y - intercept - slope * x) ** 2).sum())
    error = math.sqrt(residuals / (len(points) - 2) / squares) if len(points) > 2 else None
    return {"slope": slope, "error": error, "intercept": intercept, "n": len(points)}


def parameter_table(names: Iterable[str]) -> list[dict[str, str | int]]:
    """Return {"network", "all", "bn", "head", "shortcut"}: parameters in all, gamma and beta, head, shortcuts.

    Args:
        names: of networks that timm has registered; they are built without memory for their weights.

    Raises:
        UnknownArchitectureError: a name is not registered.
        NoNormLayerError: a network has no norm layer.

    Source: the paper's table of networks.

    >>> parameter_table(["resnet18"])
    [{'network': 'resnet18', 'all': 11689512, 'bn': 9600, 'head': 513000, 'shortcut': 172032}]
    """
    return [_row(name, create(name, {}, "meta")) for name in names]


def _row(name: str, model: nn.Module) -> dict[str, str | int]:
    def size(parameters: Iterable[torch.Tensor]) -> int:
        return sum(parameter.numel() for parameter in parameters)

    return {
        "network": name,
        "all": size(model.parameters()),
        "bn": sum(size(tensors.values()) for tensors in _parameters(model).values()),
        "head": sum(size(module.parameters()) for module in head_layers(model).values()),
        "shortcut": sum(size(model.get_submodule(conv).parameters()) for conv in shortcut_convs(model)),
    }
