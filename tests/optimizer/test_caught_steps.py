"""Steps that reach the base past a patched ``step``: whoever kept the method that it saw first calls that one."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from toy import BASES, FORMS, batches, loss_of, make, nets, watched

import lwkd


def test_a_step_that_was_kept_before_is_an_update_like_others() -> None:
    def run(kept: bool) -> tuple[list[Any], dict[str, float]]:
        student, teacher, pairing = nets()
        base = BASES["sgd"](student.parameters())
        before = base.step
        handle = lwkd.attach(base, student, teacher, pairing)
        for x, y in batches(4):
            base.zero_grad()
            loss_of(student, teacher, x, y).backward()
            before() if kept else base.step()
        assert handle.measurements == 4
        return [p.detach().clone() for p in student.parameters()], handle.rates

    (mine, rates), (expected, others) = run(True), run(False)
    assert rates == others
    assert all(map(torch.equal, mine, expected))


def test_groups_come_back_after_a_kept_step_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, pairing = nets()
    base = BASES["sgd"](student.parameters())
    before, groups = base.step, list(base.param_groups)
    handle = lwkd.attach(base, student, teacher, pairing, policy=lwkd.policies.Constant([0.5, 2.0]))
    for number, (x, y) in enumerate(batches(3)):
        base.zero_grad()
        loss_of(student, teacher, x, y).backward()
        if number == 1:
            monkeypatch.setattr(sys.modules["torch.optim.sgd"], "sgd", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                before()
            assert len(base.state_dict()["param_groups"]) == len(groups)
            monkeypatch.undo()
        else:
            before()
        assert [id(group) for group in base.param_groups] == [id(group) for group in groups]
    assert handle.measurements == 2


def test_a_detached_optimizer_steps_as_a_bare_one() -> None:
    student, teacher, pairing = nets()
    base = BASES["sgd"](student.parameters())
    before = base.step
    handle = lwkd.attach(base, student, teacher, pairing)
    handle.detach()
    before()
    assert handle.measurements == 0
    assert not base._optimizer_step_pre_hooks
    assert not base._optimizer_step_post_hooks


@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_step_is_the_same_step(form: str) -> None:
    def run(compiled: bool) -> tuple[list[Any], dict[str, float]]:
        student, teacher, optimizer, shown = watched(form, BASES["adamw"])
        step = torch.compile(lambda: optimizer.step(), backend="eager") if compiled else optimizer.step
        for x, y in batches(3):
            optimizer.zero_grad()
            loss_of(student, teacher, x, y).backward()
            step()
        return [p.detach().clone() for p in student.parameters()], shown.rates

    torch.compiler.reset()
    (mine, rates), (expected, others) = run(True), run(False)
    assert rates == others
    assert all(map(torch.equal, mine, expected))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_whole_graph_of_a_net_that_lwkd_has_says_what_to_do(in_place: bool) -> None:
    student, *_ = watched()
    compiled = student if in_place else torch.compile(student, fullgraph=True, backend="eager")
    if in_place:
        student.compile(fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"Give lwkd what torch.compile\(net, fullgraph=True\) returns"):
        compiled(next(batches(1))[0])


@pytest.mark.parametrize("form", FORMS)
def test_a_net_that_was_compiled_as_a_whole_graph_before_is_measured(form: str) -> None:
    def run(compiled: bool) -> dict[str, float]:
        student, teacher, pairing = nets()
        called = torch.compile(student, fullgraph=True, backend="aot_eager") if compiled else student
        optimizer, shown = make(form, torch.optim.SGD(student.parameters(), lr=0.1), called, teacher, pairing)
        for x, y in batches(3):
            optimizer.zero_grad()
            loss_of(called, teacher, x, y).backward()
            optimizer.step()
        assert shown.measurements == 3
        return shown.divergences

    torch.compiler.reset()
    assert run(True) == pytest.approx(run(False), rel=1e-5)
