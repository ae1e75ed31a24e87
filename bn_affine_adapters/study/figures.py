"""Draw the panels of figures: each function takes an Axes `ax` to draw on, and plain data. Needs matplotlib.

`save` lays panels side by side in one style, with their legend beside them, as SVG on white: it reads the same on
paper and on a dark page.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .replicates import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#222255", "#999933", "#882255")
MARKERS = "osD^vPX*"
STYLE = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "bn-affine-adapters",  # the same lines make the same picture
}
Curves = Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]]  # by condition: (x, y) of every replicate
Points = Mapping[str, Sequence[tuple[int, float]]]  # (gammas and betas, accuracy in %), under "depth" and "width"


def save(path: Path, panels: Sequence[Callable[["Axes"], Any]], title: str = "") -> None:
    """Draw panels side by side into an SVG file."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2 + 3.2 * len(panels), 3.2), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, panel in zip(axes, panels, strict=True):
            panel(ax)
        named = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        if named:
            figure.legend(named.values(), named.keys(), loc="outside right center")
        figure.suptitle(title, x=0.01, ha="left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def affine_gain(ax: "Axes", accuracies: Mapping[str, Mapping[str, Spread]], paper: tuple[float, float]) -> None:
    """Draw accuracy in % by network, of "all" and "no-affine", and the gain in points above each pair.

    Source: the paper's Figure 1, and its range of the gain.
    """
    _bars(ax, accuracies)
    lowest = min(mean for pair in accuracies.values() for mean, _, _ in pair.values())
    ax.set_ylim(max(0, lowest - 8), 101)
    for index, pair in enumerate(accuracies.values()):
        gain = pair["all"][0] - pair["no-affine"][0]
        top = max(mean + deviation for mean, deviation, _ in pair.values())
        ax.text(index, top + 0.4, f"{gain:+.2f}", ha="center")
    ax.set_ylabel("test accuracy, %")
    ax.set_title(f"gain in points; the paper's {paper[0]:g} to {paper[1]:g}")


def accuracy_by_network(
    ax: "Axes",
    networks: Sequence[str],
    ours: Mapping[str, Mapping[str, Spread]],
    paper: Mapping[str, Mapping[str, float]],
) -> None:
    """Draw accuracy in % by condition, against networks: ours with deviations, the paper's as circles.

    Source: the paper's Figure 2.
    """
    places = {network: index for index, network in enumerate(networks)}
    for index, (condition, spreads) in enumerate(ours.items()):
        theirs = {places[network]: value for network, value in paper.get(condition, {}).items() if network in places}
        color, marker = _color(index), _marker(index)
        ax.plot(list(theirs), list(theirs.values()), f"{marker}--", color=color, markerfacecolor="white", linewidth=0.8)
        here = [(places[network], *spread[:2]) for network, spread in spreads.items() if network in places]
        if here:
            x, y, deviations = zip(*sorted(here), strict=True)
            ax.errorbar(x, y, deviations, color=color, marker=marker, capsize=2, label=condition)
    ax.set_xticks(range(len(networks)), networks, rotation=30, ha="right", fontsize=7)
    ax.set_ylabel("test accuracy, %")
    ax.set_title("full: ours; hollow and dashed: the paper's")


def accuracy_by_parameters(ax: "Axes", ours: Points, paper: Points, slopes: Mapping[str, Any] | None) -> None:
    """Draw accuracy against log2 of gamma and beta, along depth and along width, with the lines fitted to ours.

    Source: the paper's Figure 3; ``slopes`` is what `networks.depth_width_slopes` returns for ours.
    """
    for index, name in enumerate(("depth", "width")):
        color = _color(index)
        for points, fill in ((paper.get(name, ()), "none"), (ours.get(name, ()), color)):
            x, y = [size for size, _ in points], [accuracy for _, accuracy in points]
            ax.plot(x, y, _marker(index), color=color, markersize=5, markerfacecolor=fill)
        if slopes and ours.get(name):
            ends = np.array([min(p for p, _ in ours[name]), max(p for p, _ in ours[name])])
            line, error = slopes[name], slopes[name]["error"]
            about = "" if error is None else f" ± {error:.2f}"
            label = f"{name}: {line['slope']:.2f}{about} points a doubling"
            ax.plot(ends, line["intercept"] + line["slope"] * np.log2(ends), color=color, linewidth=1, label=label)
    ax.set_xscale("log", base=2)
    ax.set_xlabel("gammas and betas")
    ax.set_ylabel("test accuracy, %")
    ax.set_title("dots: ours; circles: the paper's")


def gamma_densities(ax: "Axes", histograms: Curves, title: str) -> None:
    """Draw the density of gamma by condition, a line a replicate, from (edges, counts).

    Source: the paper's Figure 4.
    """
    for edges, counts, style in _lines(histograms):
        ax.stairs(np.asarray(counts) / max(1, sum(counts)) / np.diff(edges), edges, **style)
    ax.set_yscale("log")
    ax.set_xlabel("γ")
    ax.set_ylabel("density")
    ax.set_title(title)


def near_zero_shares(
    ax: "Axes", shares: Mapping[str, Mapping[str, Spread]], title: str, paper: Mapping[str, float]
) -> None:
    """Draw the share of gammas in %, with |gamma| below each threshold, by condition; the paper's is below 0.01.

    Source: the paper's Figure 5.
    """
    _bars(ax, shares, {"0.01": paper})
    ax.set_xlabel("threshold of |γ|")
    ax.set_ylabel("gammas below, %")
    ax.set_title(title)


def clamped_accuracies(ax: "Axes", changes: Mapping[str, Mapping[str, Spread]]) -> None:
    """Draw the change of accuracy in points, by network and by condition and threshold, with small gammas at zero.

    Source: the paper's Figure 6.
    """
    _bars(ax, changes)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_ylabel("change of accuracy, points")


def dead_share_curves(ax: "Axes", curves: Curves, title: str, paper: Mapping[str, tuple[float, float]]) -> None:
    """Draw the share in % of ReLU channels that are zero more often than a threshold, by condition, a line a replicate.

    Source: the paper's Figure 7, and its range at 0.99 by condition.
    """
    for thresholds, shares, style in _lines(curves):
        ax.plot(thresholds, shares, **style)
    for index, condition in enumerate(curves):
        if condition in paper:
            ax.plot([0.99, 0.99], paper[condition], color=_color(index), linewidth=5, alpha=0.35)
    ax.set_xlabel("t")
    ax.set_ylabel("channels with Pr[activation = 0] > t, %")
    ax.set_title(f"{title}; thick: the paper's range at 0.99")


def weight_decay_control(ax: "Axes", values: Mapping[str, Mapping[str, Spread]], label: str) -> None:
    """Draw a measurement by network, and by condition and weight decay; ``label`` names it with its unit.

    Source: none; a gamma without gradient shrinks by weight decay alone, which the paper does not control for.
    """
    _bars(ax, values)
    ax.set_ylabel(label)


def memory_against_time(ax: "Axes", points: Mapping[str, Mapping[str, tuple[float, float]]], title: str) -> None:
    """Draw saved bytes of a training step against its time, by network and way, as ratios to full training.

    ``points`` holds (time, saved bytes). Each way of training has a colour, each network a marker.
    """
    ways = list(dict.fromkeys(way for measured in points.values() for way in measured))
    for marker, (network, measured) in zip(cycle(MARKERS), points.items(), strict=False):
        for way, (time, saved) in measured.items():
            ax.plot([time], [saved], marker, color=_color(ways.index(way)), markersize=6)
        ax.plot([], [], marker, color="black", markerfacecolor="none", label=network)
    for index, way in enumerate(ways):
        ax.plot([], [], "s", color=_color(index), label=way)
    ax.set_xlabel("time of a step / full training")
    ax.set_ylabel("saved bytes / full training")
    ax.set_ylim(bottom=0)
    ax.set_title(title)


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def _lines(curves: Curves) -> Iterator[tuple[Sequence[float], Sequence[float], dict[str, Any]]]:
    """Yield x, y and style of each replicate: a colour a condition, which is named once."""
    for index, (condition, replicates) in enumerate(curves.items()):
        for number, (x, y) in enumerate(replicates):
            yield x, y, {"color": _color(index), "linewidth": 0.9, "label": "" if number else condition}


def _bars(
    ax: "Axes", groups: Mapping[str, Mapping[str, Spread]], paper: Mapping[str, Mapping[str, float]] | None = None
) -> None:
    """Draw groups of bars, a colour a series, with deviations and, as diamonds, the paper's values."""
    series = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / max(1, len(series))
    for index, name in enumerate(series):
        offset = (index - (len(series) - 1) / 2) * width
        here = [(place + offset, *group[name][:2]) for place, group in enumerate(groups.values()) if name in group]
        x, y, deviations = zip(*here, strict=True)
        ax.bar(x, y, width, yerr=deviations, color=_color(index), label=name, error_kw={"linewidth": 0.8})
        marks = [(place + offset, (paper or {}).get(group, {}).get(name)) for place, group in enumerate(groups)]
        for place, value in marks:
            if value is not None:
                ax.plot([place], [value], "D", color="black", markerfacecolor="white", markersize=5)
    long = max(len(name) for name in groups) > 8
    ax.set_xticks(
        range(len(groups)), list(groups), fontsize=7, rotation=20 if long else 0, ha="right" if long else "center"
    )
