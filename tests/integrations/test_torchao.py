"""Optimizers of torchao, whose states are tensors of their own kind, in eight bits."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from toy import each_form, make

import lwkd

optimizers = pytest.importorskip("torchao.optim")


@pytest.fixture(autouse=True)
def _uncompiled() -> Iterator[None]:
    """They compile their step, which takes minutes and changes nothing here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def net(width: int) -> nn.Sequential:
    """Wide enough for weights of 4,096 numbers, which are the first to be kept in eight bits."""
    layers = nn.Conv2d(1, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 3))


def run(steps: range, form: str, state: Any = None, *, how: str = "lwkd") -> tuple[list[Any], Any, Any]:
    """Parameters, rates and the state after these steps; they begin in the state of an earlier run."""
    torch.manual_seed(0)
    student, teacher = net(32), net(40).eval()
    x = torch.rand(8, 4, 1, 12, 12)
    pairing = lwkd.pair(student, teacher, x[0])
    policy = lwkd.policies.Constant([0.5, 2.0]) if how != "lwkd" else None
    if how == "groups":
        groups: Any = [
            {"params": student[0].parameters(), "lr": 0.005},
            {"params": student[2].parameters(), "lr": 0.02},
        ]
        stepped, shown = optimizers.AdamW8bit([*groups, {"params": student[6].parameters(), "lr": 0.01}]), None
    else:
        base = optimizers.AdamW8bit(student.parameters(), lr=0.01)
        stepped, shown = make(form, base, student, teacher, pairing, policy=policy)
    if state is not None:
        saved = torch.load(io.BytesIO(state), weights_only=True)
        student.load_state_dict(saved["student"])
        stepped.load_state_dict(saved["optimizer"])
        shown.rate_state.load_state_dict(saved["rates"])
    for number in steps:
        stepped.zero_grad()
        with torch.no_grad():
            target = teacher(x[number])
        (student(x[number]) - target).square().mean().backward()
        stepped.step()
    file = io.BytesIO()
    kept = {"student": student.state_dict(), "optimizer": stepped.state_dict()}
    torch.save(copy.copy(kept) | ({} if shown is None else {"rates": shown.rate_state.state_dict()}), file)
    return [p.detach().clone() for p in student.parameters()], shown and shown.rates, file.getvalue()


@each_form
def test_a_layer_moves_as_a_group_of_its_own(form: str) -> None:
    expected, _, _ = run(range(4), form, how="groups")
    found, rates, _ = run(range(4), form, how="constant rates")
    assert set(rates.values()) == {0.5, 2.0}
    assert all(map(torch.equal, found, expected))


@each_form
def test_a_resume_is_bitwise(form: str) -> None:
    whole, rates, _ = run(range(6), form)
    _, _, state = run(range(3), form)
    found, again, _ = run(range(3, 6), form, state)
    assert again == rates
    assert set(rates.values()) != {1.0}
    assert all(map(torch.equal, found, whole))


@each_form
def test_a_state_is_loaded_by_its_own_methods(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They fill in what a state of an older version lacks."""
    called = []

    def spied(own: Any) -> Any:
        def method(self: Any, state: Any) -> None:
            called.append((own.__name__, sorted(state)))
            own(self, state)

        return method

    for own in (optimizers.AdamW8bit.load_state_dict, optimizers.AdamW8bit.__setstate__):
        monkeypatch.setattr(optimizers.AdamW8bit, own.__name__, spied(own))
    whole, _, _ = run(range(6), form)
    saved = torch.load(io.BytesIO(run(range(3), form)[2]), weights_only=True)
    for group in saved["optimizer"]["param_groups"]:
        del group["amsgrad"]
    file = io.BytesIO()
    torch.save(saved, file)
    called.clear()
    found, _, _ = run(range(3, 6), form, file.getvalue())
    keys = ["param_groups", "state"]
    assert called == [("load_state_dict", keys), ("__setstate__", keys)]
    assert all(map(torch.equal, found, whole))
