"""What is saved, resumed, copied and renamed: state dicts, deepcopy, pickle, wrapped models."""

from __future__ import annotations

import copy
import itertools
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from saved_runs import resume, saved, through_a_file
from torch import nn
from torch.optim import lr_scheduler
from toy import (
    BASES,
    FORMS,
    batches,
    each_form,
    make,
    net,
    nets,
    same,
    train,
    train_by_closures,
    train_on,
    watched,
    weights,
)

import lwkd

base = pytest.mark.parametrize("base", BASES)


@each_form
@base
@pytest.mark.parametrize("policy", [lwkd.Relative(), lwkd.Decay(gamma=0.5), lwkd.Relative(normalize=True)])
def test_resume_in_the_middle_is_bitwise(form: str, base: str, policy: Any) -> None:
    data = list(batches(6))
    student, teacher, optimizer, shown = watched(form, BASES[base], policy=policy, every=2)
    train_on(optimizer, student, teacher, data[:3])
    # A pass that no update has taken in yet is part of the state too.
    with torch.no_grad():
        teacher(data[3][0])
    student(data[3][0])
    state = saved(student, optimizer, shown)
    train_on(optimizer, student, teacher, data[3:])
    expected, rates = weights(student), shown.rates

    student, teacher, optimizer, shown = watched(form, BASES[base], policy=policy, every=2)
    resume(state, student, optimizer, shown)
    train_on(optimizer, student, teacher, data[3:])
    assert same(weights(student), expected)
    assert shown.rates == rates
    assert len(set(rates.values())) > 1, "the run must have had rates to lose"


@each_form
def test_lbfgs_resumes_bitwise(form: str) -> None:
    data = list(batches(4))
    base = partial(torch.optim.LBFGS, lr=0.1, max_iter=2)
    student, teacher, optimizer, shown = watched(form, base)
    student.eval()
    train_by_closures(optimizer, student, teacher, data[:2])
    state = saved(student, optimizer, shown)
    train_by_closures(optimizer, student, teacher, data[2:])
    expected, rates = weights(student), shown.rates

    student, teacher, optimizer, shown = watched(form, base)
    student.eval()
    resume(state, student, optimizer, shown)
    train_by_closures(optimizer, student, teacher, data[2:])
    assert same(weights(student), expected)
    assert shown.rates == rates
    assert set(rates.values()) != {1.0}


@pytest.mark.parametrize(("saves", "loads"), itertools.permutations(("bare", *FORMS), 2))
@base
def test_checkpoints_cross_between_both_forms_and_the_bare_optimizer(base: str, saves: str, loads: str) -> None:
    data = list(batches(4))
    student, teacher, optimizer, _ = watched("bare", BASES[base])
    train_on(optimizer, student, teacher, data)
    expected = weights(student)

    student, teacher, optimizer, _ = watched(saves, BASES[base], policy=lwkd.Constant(1.0))
    train_on(optimizer, student, teacher, data[:2])
    state = through_a_file([student.state_dict(), optimizer.state_dict()])
    student, teacher, optimizer, shown = watched(loads, BASES[base], policy=lwkd.Constant(1.0))
    student.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    train_on(optimizer, student, teacher, data[2:])
    assert same(weights(student), expected)
    assert shown is None or shown.rates == {"low": 1.0, "high": 1.0}


class InEightBits(torch.optim.SGD):
    """A base whose momentum has eight bits: torch's ``load_state_dict`` makes 32 of them, its own does not."""

    loaded: tuple[str, ...] = ()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                average = (0.9 * state.get("average", 0) + 4096 * p.grad).round().clamp(-127, 127)
                state["average"] = average.to(torch.int8)
                p.sub_(group["lr"] / 4096 * average)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.loaded += tuple(state_dict)
        for state in self.state.values():
            state["average"] = state["average"].to(torch.int8)


@each_form
def test_a_state_is_loaded_by_the_bases_own_method(form: str) -> None:
    data, base = list(batches(6)), partial(InEightBits, lr=0.05)
    student, teacher, optimizer, shown = watched(form, base)
    train_on(optimizer, student, teacher, data[:3])
    state = saved(student, optimizer, shown)
    train_on(optimizer, student, teacher, data[3:])
    expected, rates = weights(student), shown.rates

    student, teacher, optimizer, shown = watched(form, base)
    resume(state, student, optimizer, shown)
    assert getattr(optimizer, "base", optimizer).loaded == ("state", "param_groups"), "once, without the rates"
    assert {s["average"].dtype for s in optimizer.state.values()} == {torch.int8}
    train_on(optimizer, student, teacher, data[3:])
    assert same(weights(student), expected)
    assert shown.rates == rates
    assert set(rates.values()) != {1.0}


def test_state_of_another_pairing_is_refused_and_changes_nothing() -> None:
    student, teacher, pairing = nets()
    wrapper = lwkd.LayerwiseOptimizer(BASES["sgd"](student.parameters()), student, teacher, pairing)
    train(wrapper, student, teacher, 2)
    one = lwkd.pair(student, teacher, torch.rand(1, 1, 8, 8), layers={"low": "low"})
    other = lwkd.LayerwiseOptimizer(BASES["sgd"](student.parameters()), student, teacher, one)
    with pytest.raises(ValueError, match=r"rate state has layers \['low', 'high'\], expected \['low'\]"):
        other.load_state_dict(wrapper.state_dict())
    assert not other.state
    assert other.rates == {"low": 1.0}


@each_form
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_steps_like_the_original_and_watches_nothing(form: str, scheduled: bool, how: str) -> None:
    student, teacher, optimizer, shown = watched(form)
    if scheduled:
        lr_scheduler.StepLR(optimizer, 1)
    train(optimizer, student, teacher, 2)
    copied = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    mine = [p for g in copied.param_groups for p in g["params"]]
    theirs = list(student.parameters())
    assert all(a is not b for a, b in zip(mine, theirs, strict=True))
    for a, b in zip(mine, theirs, strict=True):
        a.grad = torch.ones_like(a)
        b.grad = torch.ones_like(b)
    if form == "wrapper":
        assert copied.rates == optimizer.rates
        assert "watching nothing" in repr(copied)
    else:
        shown.detach()  # a copy of an attached optimizer is a bare one
    passes = shown.passes
    copied.step()
    assert shown.passes == passes
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_copy_can_be_put_to_work_with_the_copied_student() -> None:
    student, teacher, pairing = nets()
    optimizer = lwkd.LayerwiseOptimizer(BASES["sgd"](student.parameters()), student, teacher, pairing)
    train(optimizer, student, teacher, 2)
    copied_student, copied = copy.deepcopy((student, optimizer))
    copied.watch(copied_student, teacher)
    optimizer.close()
    train(copied, copied_student, teacher, 2, seed=5)
    assert copied.passes["measured"] == 2
    optimizer.watch(student, teacher)
    copied.close()
    train(optimizer, student, teacher, 2, seed=5)
    assert same(weights(student), weights(copied_student))


@each_form
def test_names_survive_wrappers(form: str) -> None:
    student, teacher, pairing = nets()
    parallel = nn.DataParallel(student)  # on a CPU it only calls its module
    compiled = torch.compile(parallel, backend="eager")
    optimizer, shown = make(form, BASES["sgd"](compiled.parameters()), compiled, teacher, pairing)
    train(optimizer, compiled, teacher, 2)
    assert shown.passes["measured"] == 2
    assert list(shown.rates) == ["low", "high"]
    assert set(shown.rates.values()) != {1.0}
    again = lwkd.pair(compiled, torch.compile(teacher), torch.rand(1, 1, 8, 8), layers={"low": "low"})
    assert again.names == ("low",)


def test_a_pairing_for_another_model_is_refused() -> None:
    student, teacher, pairing = nets()
    stranger = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU())
    with pytest.raises(lwkd.PairingError, match="low"):
        lwkd.LayerwiseOptimizer(BASES["sgd"](stranger.parameters()), stranger, teacher, pairing)
    with pytest.raises(lwkd.PairingError, match="low"):
        lwkd.LayerwiseOptimizer(BASES["sgd"](student.parameters()), student, net(3).low, pairing)
