"""Scores of nets with one class and with many, against counting by hand."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from lwkd.program.data.datasets import load
from lwkd.program.data.loader import Batches
from lwkd.program.metrics import multilabel_scores, scores

pytest.importorskip("torchmetrics")

LOGITS = torch.tensor(
    [
        [30.0, 0.9, -1.0, 0.2],
        [40.0, 0.1, -2.0, -0.2],
        [20.0, -0.5, -3.0, -0.3],
        [-1.0, 0.3, -4.0, -0.4],
    ]
)
TARGETS = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 1, 0]], dtype=torch.uint8)


def test_multilabel_scores_by_hand() -> None:
    """Column 0: order 1, 0, 2, 3; column 1: 0, 3, 1, 2; column 2: 0, 1, 2, 3; no picture has class 3."""
    average = [(1 / 2 + 2 / 3) / 2, 1.0, (1 / 2 + 2 / 4) / 2]
    # Predicted: column 0 rows 0 to 2 (two right), column 1 rows 0, 1, 3 (two right), none, column 3 row 0 (wrong).
    cp, cr = (2 / 3 + 2 / 3 + 0) / 3, (2 / 2 + 2 / 2 + 0) / 3
    op, orr = 4 / 7, 4 / 6
    expected = {"mAP": sum(average) / 3, "OF1": 2 * op * orr / (op + orr), "CF1": 2 * cp * cr / (cp + cr)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = multilabel_scores(LOGITS, TARGETS)
    assert list(found) == ["mAP", "OF1", "CF1"]
    assert found == pytest.approx(expected, abs=1e-6)


def test_logits_between_0_and_1_are_logits() -> None:
    """Torchmetrics alone would take them for probabilities, half of them below its threshold."""
    found = multilabel_scores(torch.tensor([[0.2, 0.9], [0.3, 0.1]]), torch.tensor([[1, 1], [1, 1]]))
    assert found == {"mAP": 1.0, "OF1": 1.0, "CF1": 1.0}


def test_a_net_that_is_no_longer_finite_has_no_score() -> None:
    broken = LOGITS.clone()
    broken[1, 1] = float("nan")
    assert all(score != score for score in multilabel_scores(broken, TARGETS).values())
    assert all(score != score for score in multilabel_scores(LOGITS, torch.zeros_like(TARGETS)).values())


def test_scores_leave_the_net_as_it_was() -> None:
    data = load("digits", Path("unused"))
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 10))
    looked = []
    found = scores(net, Batches(data, 64, seed=0).test(), data, check=lambda: looked.append(net.training))
    x, y = data.test.images, data.test.labels
    net.eval()
    shown = (x.float() / 255 - data.mean[0]) / data.std[0]
    assert found == {"accuracy": float((net(shown).argmax(1) == y).sum()) / len(y)}
    net.train()
    assert looked == [False, False]
    assert scores(net, Batches(data, 64, seed=0).test(), data) == found
    assert net.training
