"""The picture in a model card: the distribution of gamma. Needs matplotlib."""

import warnings
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .contents import NEAR_ZERO, Stored
from .folder import replace_file

BINS = 60
FIGURE_NAME = "gamma.png"


def write_figure(folder: Path, gammas: Sequence[Stored]) -> str | None:
    """Draw the distribution of gamma over all norm layers, and the share near zero, into a folder.

    Returns the file's name, or None if there is no gamma. Without matplotlib it warns and returns None.

    Source: the paper's Figure 5.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        warnings.warn("No picture in the model card: pip install 'bn-affine-adapters[plots]'", stacklevel=4)
        return None
    gammas = [gamma for gamma in gammas if gamma.size]
    if not gammas:
        return None
    counts, edges, near_zero = _histogram(gammas)
    size = sum(gamma.size for gamma in gammas)
    figure = Figure(figsize=(6, 3), layout="constrained")
    ax = figure.subplots()
    ax.hist(edges[:-1], edges.tolist(), weights=counts, color="#4477aa")
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_xlabel(r"$\gamma$")
    ax.set_ylabel("features")
    share = 100 * near_zero / size
    ax.set_title(f"{size:,} gammas in {len(gammas)} layers, {share:.1f} % near zero", fontsize=10)
    file = BytesIO()
    # Without the date and the version, so that an unchanged adapter has an unchanged picture.
    figure.savefig(file, dpi=120, metadata={"Software": None})
    replace_file(folder, FIGURE_NAME, file.getvalue())
    return FIGURE_NAME


def _histogram(gammas: Sequence[Stored]) -> tuple[NDArray[Any], NDArray[Any], int]:
    """Return how many values each of 60 bins has, the bins' edges, and how many values are near zero."""

    def blocks() -> Iterator[NDArray[Any]]:
        for gamma in gammas:
            yield from gamma.blocks()

    ends = np.array([(block.min(), block.max()) for block in blocks()])
    near_zero = sum(int((np.abs(block) < NEAR_ZERO).sum()) for block in blocks())
    counts = [np.histogram(block, BINS, (ends[:, 0].min(), ends[:, 1].max())) for block in blocks()]
    return np.sum([count for count, _ in counts], axis=0), counts[0][1], near_zero
