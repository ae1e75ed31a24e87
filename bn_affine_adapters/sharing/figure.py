"""The picture in a model card: the distribution of gamma. Needs matplotlib."""

import io
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from .contents import NEAR_ZERO
from .folder import write_file

FIGURE_NAME = "gamma.png"


def write_figure(folder: Path, gammas: Mapping[str, ArrayLike]) -> str | None:
    """Draw the distribution of gamma over all norm layers, and the share near zero, into a folder.

    Returns the file's name, or None if there is no gamma. Without matplotlib it warns and returns None.

    Source: the paper's Figure 5.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        warnings.warn("No picture in the model card: pip install 'bn-affine-adapters[plots]'", stacklevel=4)
        return None
    if not gammas:
        return None
    values = np.concatenate([np.ravel(np.asarray(gamma)) for gamma in gammas.values()])
    figure = Figure(figsize=(6, 3), layout="constrained")
    ax = figure.subplots()
    ax.hist(values, bins=60, color="#4477aa")
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_xlabel(r"$\gamma$")
    ax.set_ylabel("features")
    share = 100 * np.mean(np.abs(values) < NEAR_ZERO)
    ax.set_title(f"{values.size:,} gammas in {len(gammas)} layers, {share:.1f} % near zero", fontsize=10)
    # Without the date and the version, so that an unchanged adapter has an unchanged picture.
    figure.savefig(image := io.BytesIO(), dpi=120, metadata={"Software": None})
    write_file(folder / FIGURE_NAME, image.getvalue())
    return FIGURE_NAME
