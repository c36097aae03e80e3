"""Frameworks that run a method of theirs in place of a net's forward, for the length of one call of the net."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import batches, make, nets, same, train, watched, weights

import lwkd


def redirected(net: nn.Module, method: Callable[..., Any], *args: Any) -> Any:
    """``method(*args)`` inside of a call of the net, so that wrappers and hooks of the net take effect."""
    own = net.forward

    def in_its_place(*given: Any) -> Any:
        net.forward = own
        return method(*given)

    net.forward = in_its_place
    return net(*args)


def logits(net: nn.Sequential, batch: dict[str, Tensor]) -> Tensor:
    """What a framework computes with parts of the net."""
    return net.head(net.high(net.low(batch["x"])))


def loss_of(student: nn.Sequential, batch: dict[str, Tensor], teacher: nn.Sequential) -> Tensor:
    with torch.no_grad():
        t = redirected(teacher, logits, teacher, batch)
    return lwkd.losses.distillation(logits(student, batch), t, batch["y"])


def test_attention_is_measured_on_the_training_passes() -> None:
    student, teacher, optimizer, shown = watched()
    train(optimizer, student, teacher)
    expected = shown.divergences, weights(student)

    student, teacher, optimizer, shown = watched()
    for x, y in batches(3):
        optimizer.zero_grad()
        redirected(student, loss_of, student, {"x": x, "y": y}, teacher).backward()
        optimizer.step()
    assert shown.passes == {"measured": 3}
    assert shown.divergences == expected[0]
    assert same(weights(student), expected[1])


@pytest.mark.parametrize("signal", ["jacobian", "hessian"])
def test_passes_that_cannot_be_repeated_are_an_error_that_says_what_to_do(signal: str) -> None:
    student, teacher, pairing = nets()
    base = torch.optim.SGD(student.parameters(), lr=0.05)
    optimizer, shown = make("wrapper", base, student, teacher, pairing, signal=signal, every=1)
    for x, y in batches(1):
        with pytest.raises(RuntimeError, match=r"the teacher's forward \(Sequential\).*Use signal='attention'"):
            redirected(student, loss_of, student, {"x": x, "y": y}, teacher)
        student_alone = lambda net, batch: logits(net, batch).sum()  # noqa: E731
        with pytest.raises(RuntimeError, match=r"the student's forward \(Sequential\).*Use signal='attention'"):
            redirected(student, student_alone, student, {"x": x, "y": y})
    train(optimizer, student, teacher)  # the run goes on
    assert shown.measurements == 3
