"""torch.distributed.checkpoint: its getters and setters, its fake step, and rates under a key of their own."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from saved_runs import assert_continues
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.nn import functional as F
from toy import BASES, batches, each_form, watched

STEPS = 6


def train(student: nn.Module, teacher: nn.Module, optimizer: Any, steps: range) -> None:
    for x, y in list(batches(STEPS))[steps.start : steps.stop]:
        with torch.no_grad():
            teacher(x)
        F.cross_entropy(student(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


@each_form
@pytest.mark.parametrize(("base", "signal"), [("sgd", "attention"), ("adamw", "hessian")])
def test_a_run_continues_bitwise(form: str, base: str, signal: str, tmp_path: Any) -> None:
    """What is saved in the middle has tensors that a fresh run has not: the teacher's curvature."""

    def run(steps: range, *, load: bool = False, save: bool = False) -> tuple[list[Tensor], dict[str, float]]:
        student, teacher, optimizer, shown = watched(form, BASES[base], signal=signal)
        assert isinstance(shown.rate_state, Stateful)
        if load:
            model, state = get_state_dict(student, optimizer)
            dcp.load({"model": model, "optim": state, "rates": shown.rate_state}, checkpoint_id=tmp_path, no_dist=True)
            set_state_dict(student, optimizer, model_state_dict=model, optim_state_dict=state)
        train(student, teacher, optimizer, steps)
        if save:
            model, state = get_state_dict(student, optimizer)
            dcp.save({"model": model, "optim": state, "rates": shown.rate_state}, checkpoint_id=tmp_path, no_dist=True)
        return [p.detach().clone() for p in student.parameters()], shown.rates

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*rates per layer were not")
        assert_continues(run, STEPS)


@each_form
@pytest.mark.parametrize("base", ["sgd", "adam_fused"])
@pytest.mark.parametrize("tensor_rate", [False, True])
def test_the_step_that_makes_states_is_no_update(form: str, base: str, tensor_rate: bool) -> None:
    rate: Any = torch.tensor(0.01) if tensor_rate else 0.01
    student, teacher, optimizer, shown = watched(form, partial(BASES[base], lr=rate))
    before = [p.detach().clone() for p in student.parameters()]
    get_optimizer_state_dict(student, optimizer)
    assert shown.updates == 0
    assert all(map(torch.equal, before, (p.detach() for p in student.parameters())))
    train(student, teacher, optimizer, range(2))
    assert shown.updates == shown.measurements == 2


@each_form
def test_a_first_update_at_a_rate_of_zero_is_one(form: str) -> None:
    """As a warm-up from 0 makes it: there was a pass, so it is an update."""
    student, teacher, optimizer, shown = watched(form, partial(BASES["sgd"], lr=0.0))
    train(student, teacher, optimizer, range(1))
    assert shown.updates == shown.measurements == 1


@each_form
@pytest.mark.parametrize("loaded", ["base", "base, then rates", "rates, then base"])
def test_rates_that_are_missing_at_a_resume_are_said(form: str, loaded: str) -> None:
    student, teacher, optimizer, shown = watched(form)
    train(student, teacher, optimizer, range(2))
    base, rates = {k: v for k, v in optimizer.state_dict().items() if k != "lwkd"}, shown.rate_state.state_dict()

    student, teacher, optimizer, shown = watched(form)
    if loaded == "rates, then base":
        shown.rate_state.load_state_dict(rates)
    optimizer.load_state_dict(base)
    if loaded == "base, then rates":
        shown.rate_state.load_state_dict(rates)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(student, teacher, optimizer, range(2, 4))
    said = [str(w.message) for w in caught if "rates per layer were not" in str(w.message)]
    assert len(said) == (loaded == "base")
    assert all("rate_state" in one for one in said)
