"""Libraries that put other tensors into the groups: float32 copies that are stepped, or one flat tensor."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from toy import batches, each_form, loss_of, make, nets, same, train, weights

import lwkd

LATER = "after lwkd was given the optimizer"


def with_masters(optimizer: Any, student: nn.Module, which: str = "") -> dict[nn.Parameter, nn.Parameter]:
    """The groups hold copies of the student's parameters with these names; those of each."""
    masters = {p: nn.Parameter(p.detach().clone()) for name, p in student.named_parameters() if name.startswith(which)}
    for group in optimizer.param_groups:
        group["params"] = [masters.get(p, p) for p in group["params"]]
    return masters


@each_form
def test_rates_that_act_on_nothing_are_an_error(form: str) -> None:
    student, teacher, pairing = nets()
    base = torch.optim.SGD(student.parameters(), lr=0.05)
    optimizer, shown = make(form, base, student, teacher, pairing, policy=lwkd.Constant([0.5, 2.0]))
    train(optimizer, student, teacher)
    masters = with_masters(base, student)
    for _ in range(2):  # also where somebody goes on after the first
        before = copy.deepcopy(base.state_dict())
        with pytest.raises(RuntimeError, match=rf"no parameter in the groups of this SGD is the student's.*{LATER}"):
            optimizer.step()
        assert base.state_dict() == before
    if form == "wrapper":
        shown.close()
    else:
        shown.detach()
    for x, y in batches(1):
        loss_of(student, teacher, x, y).backward()
    for parameter, master in masters.items():
        master.grad = parameter.grad
    kept = weights(student)
    base.step()
    assert same(weights(student), kept)
    assert not torch.equal(masters[student.low[0].weight], student.low[0].weight)


@each_form
def test_a_layer_that_is_lost_is_said_once(form: str) -> None:
    student, teacher, pairing = nets()
    base = torch.optim.SGD(student.parameters(), lr=0.05)
    optimizer, _ = make(form, base, student, teacher, pairing)
    with_masters(base, student, "low.")
    with pytest.warns(UserWarning, match=rf"what the optimizer held of low was replaced.*{LATER}"):
        train(optimizer, student, teacher, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, student, teacher, 2)


@each_form
def test_parameters_of_others_beside_the_students_are_no_reason(form: str) -> None:
    student, teacher, pairing = nets()
    metric = nn.Linear(3, 3)
    base = torch.optim.SGD(student.parameters(), lr=0.05)
    optimizer, shown = make(form, base, student, teacher, pairing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, student, teacher, 1)
        optimizer.add_param_group({"params": list(metric.parameters())})
        train(optimizer, student, teacher, 2)
    assert shown.passes["measured"] == 3


@each_form
def test_a_layer_that_is_frozen_later_is_not_lost(form: str) -> None:
    student, teacher, pairing = nets()
    base = torch.optim.SGD(student.parameters(), lr=0.05)
    optimizer, _ = make(form, base, student, teacher, pairing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, student, teacher, 1)
        student.low.requires_grad_(False)
        optimizer.add_param_group({"params": list(nn.Linear(3, 3).parameters())})
        train(optimizer, student, teacher, 1)
