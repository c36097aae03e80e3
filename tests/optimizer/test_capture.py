"""A whole step in a CUDA graph: what is allowed in it, and what is refused while one is captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from doubles import held_tensors, resident, staying_on_the_device, unread
from toy import BASES, batches, each_form, loss_of, nets, same, train, watched, weights

import lwkd
from lwkd.optimizer import step as module
from lwkd.optimizer.lr_scaling import why_on_host

CUDA = torch.device("cuda", 0)


def capture(patch: pytest.MonkeyPatch) -> None:
    for place in ("lwkd.rates.layer_rates.capturing", "lwkd.rates.schedule.capturing"):
        patch.setattr(place, lambda: True)


@each_form
def test_a_captured_step_reads_nothing_and_times_nothing(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    staying_on_the_device(monkeypatch)
    student, teacher, optimizer, shown, _ = resident(form)
    train(optimizer, student, teacher, 2)
    schedule, held = shown._rates.schedule, held_tensors(shown)
    x, y = next(batches(1, seed=3))
    optimizer.zero_grad()
    spent = schedule._spent
    with pytest.MonkeyPatch.context() as patch:
        capture(patch)
        patch.setattr(schedule.clock, "mark", None)
        loss_of(student, teacher, x, y).backward()
        with unread():
            optimizer.step()
    assert held_tensors(shown) == held
    assert shown.measurements == 3
    assert schedule._spent == spent
    train(optimizer, student, teacher, 2)
    assert shown.measurements == 5


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "jacobian": ({"signal": "jacobian", "every": 1}, "the jacobian signal makes passes of its own. Use signal='attent"),
    "hessian": ({"signal": "hessian", "every": 1}, "the hessian signal makes passes of its own"),
    "every": ({"every": 2}, "found every=2, and a graph does the same at every replay. Use every=1"),
    "budget": ({"budget": 0.5}, r"found budget=0\.5"),
    "float": ({}, "the host reads the rates: the learning rate of parameter group 0 is 0.05, not a tensor"),
    "base": ({}, "the host reads the rates: parameter group 0 is neither fused nor capturable. Use a fused"),
    "ranks": ({}, "statistics are summed over 2 ranks"),
}


@each_form
@pytest.mark.parametrize("in_pass", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_captured_is_refused_and_nothing_is_lost(form: str, case: str, in_pass: bool) -> None:
    options, message = REFUSED[case]
    with pytest.MonkeyPatch.context() as patch:
        if case == "float":
            student, teacher, optimizer, shown = watched(form, BASES["sgd_fused"])
            patch.setattr(module, "why_on_host", lambda groups, *_: why_on_host(groups, CUDA))
        else:
            if case == "base":
                patch.setattr(module, "why_on_host", lambda *_: "parameter group 0 is neither fused nor capturable")
            else:
                staying_on_the_device(patch)
            student, teacher, optimizer, shown, _ = resident(form, **options)
        train(optimizer, student, teacher, 2)
        group = optimizer.param_groups[0]
        optimizer.zero_grad()
        x, y = next(batches(1, seed=3))
        if not in_pass:
            loss_of(student, teacher, x, y).backward()
        before, state = weights(student), str(shown.state_dict())
        with pytest.MonkeyPatch.context() as captured:
            capture(captured)
            if case == "ranks":
                captured.setattr("lwkd.rates.distributed.world_size", lambda _: 2)
            with pytest.raises(RuntimeError, match=f"a CUDA graph is being captured; .*{message}"):
                loss_of(student, teacher, x, y) if in_pass else optimizer.step()
        assert same(weights(student), before) or in_pass  # a pass moves the batch statistics, as ever
        assert str(shown.state_dict()) == state
        assert optimizer.param_groups[0] is group
        count = shown.measurements
        if in_pass:
            loss_of(student, teacher, x, y).backward()
        optimizer.step()
        assert shown.measurements == count + 1


def test_a_base_that_was_changed_before_the_capture_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    staying_on_the_device(monkeypatch)
    student, teacher, pairing = nets()
    base = BASES["sgd_fused"](student.parameters())
    optimizer = lwkd.LayerwiseOptimizer(base, student, teacher, pairing)
    train(optimizer, student, teacher, 1)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.05)
    loss_of(student, teacher, *next(batches(1))).backward()
    with monkeypatch.context() as patch:
        capture(patch)
        with pytest.raises(RuntimeError, match="the base was changed after its last step"):
            optimizer.step()
    optimizer.step()
    assert optimizer._rates.store.mode == "device"
