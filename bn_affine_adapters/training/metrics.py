"""Top-k accuracy, in %, as an ``evaluate.Metric``: nothing is fetched, and nothing is written to disk."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError

_DESCRIPTION = """\
Top-k accuracy: the share of images, in %, whose label is among the first k classes of the prediction.
Where there are at most k classes, it is 100 by definition."""

_INPUTS = """
Args:
    predictions (`list` of `list` of `int`): for each image its class ids, most likely first; as many for every image.
    references (`list` of `int`): for each image its label.
    k (`int` or `tuple` of `int`): which k; (1, 5) unless given.

Returns:
    `dict` of `float`, in %: {"top1": ..., "top5": ...} for k = (1, 5).

Example:
    >>> metric = TopKAccuracy()
    >>> metric.add_batch(predictions=[[2, 0, 1], [1, 2, 0]], references=[2, 0])
    >>> metric.compute(k=(1, 2))
    {'top1': 50.0, 'top2': 50.0}
"""


def ranked(logits: Tensor, k: int = 5) -> Tensor:
    """Return the k most likely classes of each row, most likely first; all of them if there are fewer than k.

    Among equal logits the lower class id comes first, on every device, so that a network whose logits are all equal (or
    all NaN: NaN ranks before every number) always predicts classes 0, 1, 2, ...

    Args:
        logits: (n, classes), of any floating type.
        k: how many classes to rank, 1 or more.

    Returns:
        int64 (n, min(k, classes)).

    Raises:
        ConfigError: k is less than 1.

    Example:
        >>> ranked(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), k=3)
        tensor([[1, 3, 2]])
    """
    if k < 1:
        raise ConfigError("Top-k accuracy needs a k of at least 1.", seen=f"k={k}", do="pass 1 or more")
    # Not topk(): it gives no promise about ties, and keeps none across devices.
    return torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :k]


class TopKAccuracy(evaluate.Metric):
    """Top-k accuracy in %, from ranked class ids (see ``ranked``) and labels.

    Call ``add_batch`` as often as needed, then ``compute``, after which the metric is empty again. With several
    processes, gather the predictions first and add each image once (see ``data.eval_batches``).

    Example:
        >>> TopKAccuracy().compute(predictions=[[2, 0, 1], [1, 2, 0]], references=[2, 0])
        {'top1': 50.0, 'top5': 100.0}
    """

    def __init__(self) -> None:
        """Create an empty metric that keeps what is added in memory."""
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.Value("int64")
        features = datasets.Features({"predictions": datasets.Sequence(ids), "references": ids})
        return evaluate.MetricInfo(description=_DESCRIPTION, citation="", features=features, inputs_description=_INPUTS)

    def _build_data_dir(self) -> str:
        # evaluate would create a folder in the user's cache here, even for a metric that keeps all in memory.
        return ""

    def _finalize(self) -> None:
        if self.writer is None:  # evaluate would fail with an AttributeError
            raise DataError("There is nothing to compute.", seen="no predictions", do="call add_batch first")
        super()._finalize()

    def _compute(
        self, *, predictions: Sequence[Sequence[int]], references: Sequence[int], k: int | Sequence[int] = (1, 5)
    ) -> dict[str, float]:
        wanted = (k,) if isinstance(k, int) else tuple(k)
        if not wanted or min(wanted) < 1:
            raise ConfigError("Top-k accuracy needs a k of at least 1.", seen=f"k={k}", do="pass k=(1, 5), say")
        lengths = {len(row) for row in predictions}
        if len(lengths) != 1:
            do = "rank as many classes for every image"
            raise DataError("The predictions differ in length.", seen=f"{sorted(lengths)} classes", do=do)
        hits = np.asarray(predictions) == np.asarray(references)[:, None]
        # A k beyond the ranked classes is right only if they are all classes; then each label is among them.
        if max(wanted) > (length := lengths.pop()) and not hits.any(1).all():
            do = f"rank {max(wanted)} classes, or ask for smaller k"
            raise DataError("Too few classes are ranked.", seen=f"{length} for k={max(wanted)}", do=do)
        return {f"top{n}": 100.0 * int(hits[:, :n].any(1).sum()) / len(hits) for n in wanted}
