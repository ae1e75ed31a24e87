"""Top-k accuracy: scikit-learn's numbers, in %, without a file, a download or a warning."""

import socket
import warnings
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import top_k_accuracy_score

from bn_affine_adapters.errors import ConfigError, DataError
from bn_affine_adapters.training.metrics import TopKAccuracy, ranked


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of real images: minus the distance to the mean image of each class, noisy enough to err."""
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    means = torch.stack([images[labels == label].mean(0) for label in range(10)])
    noise = torch.randn(len(images), 64, generator=torch.Generator().manual_seed(0), dtype=images.dtype)
    return -torch.cdist(images + 12 * noise, means), labels


@pytest.mark.parametrize("k", [1, 2, 3, 5, 9])
def test_top_k_accuracy_is_that_of_scikit_learn(digits, k):
    logits, labels = digits
    expected = 100 * top_k_accuracy_score(labels, logits, k=k)
    found = TopKAccuracy().compute(predictions=ranked(logits, k), references=labels, k=k)
    assert found == {f"top{k}": pytest.approx(expected, abs=1e-12)}
    assert 20 < expected < 100


def test_top_1_and_top_5_are_in_percent_unless_another_k_is_asked_for(digits):
    logits, labels = digits
    found = TopKAccuracy().compute(predictions=ranked(logits), references=labels)
    assert found == {f"top{k}": pytest.approx(100 * top_k_accuracy_score(labels, logits, k=k)) for k in (1, 5)}
    assert all(type(value) is float for value in found.values())


def test_many_batches_of_any_kind_count_as_one(digits):
    logits, labels = digits
    whole = TopKAccuracy().compute(predictions=ranked(logits), references=labels)
    metric = TopKAccuracy()
    for attempt in range(2):  # it starts empty again after compute
        kinds = [lambda t: t, lambda t: t.numpy(), lambda t: t.tolist(), lambda t: t.int()]
        for i, (some, answers) in enumerate(zip(logits.split(100), labels.split(100), strict=True)):
            kind = kinds[i % len(kinds)]
            metric.add_batch(predictions=kind(ranked(some)), references=kind(answers))
        assert len(metric) == len(labels) == 1797
        assert metric.compute() == whole, attempt


@pytest.mark.parametrize("classes", [1, 2, 4, 5])
def test_with_at_most_5_classes_top_5_is_100_and_top_1_is_not_affected(digits, classes):
    few = digits[1] < classes
    logits, labels = digits[0][few][:, :classes], digits[1][few]
    assert ranked(logits).shape == (few.sum(), classes)
    found = TopKAccuracy().compute(predictions=ranked(logits), references=labels)
    share = (logits.argmax(1) == labels).double().mean().item()
    assert found == {"top1": pytest.approx(100 * share), "top5": 100.0}


def test_equal_logits_rank_the_lower_class_first():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0, 1.0], [2.0] * 6, [float("nan")] * 6, [-0.0, 0.0] * 3])
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert ranked(logits.to(dtype)).tolist() == [[1, 2, 4, 0, 5]] + [[0, 1, 2, 3, 4]] * 3
    found = TopKAccuracy().compute(predictions=ranked(logits), references=[4, 0, 1, 5], k=(1, 2, 3, 4))
    assert found == {"top1": 25.0, "top2": 50.0, "top3": 75.0, "top4": 75.0}


def test_ties_do_not_depend_on_how_the_rows_are_split():
    logits = torch.randint(0, 3, (500, 1000), generator=torch.Generator().manual_seed(0)).float()
    by_row = torch.cat([ranked(row[None]) for row in logits])
    assert torch.equal(ranked(logits), by_row)
    for row, best in zip(logits.tolist(), by_row.tolist(), strict=True):
        assert best == [c for _, c in sorted((-logit, c) for c, logit in enumerate(row))][:5]


def test_no_file_no_connection_and_no_warning(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric = TopKAccuracy()
        metric.add_batch(predictions=torch.tensor([[1, 0], [0, 1]]), references=torch.tensor([1, 1]))
        metric.add(prediction=[0, 1], reference=0)
        assert metric.compute(k=1) == {"top1": pytest.approx(200 / 3)}
    assert list(Path(tmp_path).rglob("*")) == []
    # The guard's guard: this is where evaluate would have left a folder.
    monkeypatch.delattr(TopKAccuracy, "_build_data_dir")
    TopKAccuracy()
    assert (tmp_path / "cache" / "top_k_accuracy").is_dir()


def test_what_cannot_be_computed_is_refused(refused):
    metric = TopKAccuracy()
    with refused(DataError, "add_batch"):
        metric.compute()
    with refused(DataError, "1 for k=5", "rank 5 classes"):
        metric.compute(predictions=[[0], [1]], references=[0, 0])
    with refused(DataError, "[1, 2]"):
        metric.compute(predictions=[[0], [1, 0]], references=[0, 0])
    for k in (0, (), (1, -1)):
        with refused(ConfigError, f"k={k}"):
            metric.compute(predictions=[[0, 1]], references=[0], k=k)
    with refused(ConfigError, "k=0"):
        ranked(torch.zeros(2, 3), 0)
    with pytest.raises(ValueError, match="predictions"):
        metric.add_batch(predictions=[[0], [1]], references=[0])
    assert metric.compute(predictions=[[0, 1]], references=[1], k=(1, 2)) == {"top1": 0.0, "top2": 100.0}


def test_it_says_what_it_is():
    metric = TopKAccuracy()
    assert isinstance(metric, evaluate.Metric)
    assert "at most k classes" in metric.description
    assert "top5" in metric.inputs_description
    assert np.dtype("int64") == metric.features["references"].dtype
