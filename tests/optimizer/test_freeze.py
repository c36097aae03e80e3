"""Frozen layers stand still at rate 0 and are left out of the backward pass, until they train again."""

from __future__ import annotations

import copy
import pickle
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from doubles import copies_deferred, staying_on_the_device
from optimizer_doubles import Script
from saved_runs import resume, saved
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from toy import batches, each_form, loss_of, make, nets, same, train, train_on, watched, weights

import lwkd
from lwkd.optimizer.backward_cut import why_not_cut


def _freezing(freeze: int, thaw: int = 1000) -> Script:
    """Freezes the first layer after some measurements, and lets it go after some more."""
    return Script([(1.0, 1.0)] * freeze + [(0.0, 1.0)] * (thaw - freeze) + [(1.0, 1.0)], freezes=True)


def _sgd(parameters: Any, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, **{"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1} | options)


def _trains(module: nn.Module) -> set[bool]:
    return {parameter.requires_grad for parameter in module.parameters()}


@each_form
@pytest.mark.parametrize("set_to_none", [True, False])
def test_it_moves_as_a_loop_that_does_the_same_by_hand(form: str, set_to_none: bool) -> None:
    """Frozen by measurement 2, so at rate 0 in update 2, and out of the backward pass of updates 3 to 5."""
    student, teacher, optimizer, shown = watched(form, _sgd, policy=_freezing(2, 5))
    by_hand, _, _ = nets()
    base = _sgd(
        [{"params": by_hand.low.parameters()}, {"params": [*by_hand.high.parameters(), *by_hand.head.parameters()]}]
    )
    switched, rates = [], []
    for step, (x, y) in enumerate(batches(8)):
        switched.append(_trains(student.low))
        rates.append(shown.rates["low"])
        optimizer.zero_grad(set_to_none)
        x.requires_grad_(step == 4)  # whoever asks for the gradient of the input gets it
        loss_of(student, teacher, x, y).backward()
        optimizer.step()

        base.zero_grad()
        base.param_groups[0]["lr"] = 0.0 if 2 <= step < 5 else 0.05
        other = x.detach().clone().requires_grad_(x.requires_grad)
        loss_of(by_hand, teacher, other, y).backward()
        if 3 <= step <= 5:
            for parameter in by_hand.low.parameters():
                parameter.grad = None
        base.step()
        assert same(weights(student), weights(by_hand)), step
        if step == 4:
            torch.testing.assert_close(x.grad, other.grad, rtol=0, atol=0)
        if step in (2, 3, 4):
            seen = copy.deepcopy(student)  # batch statistics of the student stay as they are
            x = x.detach()
            assert seen.low(x).grad_fn is None, "autograd has nothing to go back through"
            assert seen.high(seen.low(x)).grad_fn is not None
            assert all(parameter.grad is None for parameter in student.low.parameters())
    assert switched == [{True}] * 3 + [{False}] * 3 + [{True}] * 2
    assert rates == [1, 1, 0, 0, 0, 1, 1, 1]
    assert shown.passes["measured"] == 8


@each_form
def test_what_the_user_froze_stays_frozen_and_closing_puts_the_rest_back(form: str) -> None:
    student, teacher, optimizer, shown = watched(form, _sgd, policy=_freezing(1))
    student.low[0].bias.requires_grad_(False)
    train(optimizer, student, teacher, 2)
    assert _trains(student.low) == {False}
    shown.close() if form == "wrapper" else shown.detach()
    assert [name for name, p in student.named_parameters() if not p.requires_grad] == ["low.0.bias"]
    before = weights(student.low[0])
    train(optimizer, student, teacher, 2)
    assert same(weights(student.low[0]), before) == (form == "wrapper"), "a closed wrapper keeps its rates"
    assert _trains(student.high) == {True}


@each_form
@pytest.mark.parametrize("at", [2, 3, 5])
def test_resumes_bitwise_while_layers_freeze_and_thaw(form: str, at: int) -> None:
    data = list(batches(8))
    student, teacher, optimizer, shown = watched(form, _sgd, policy=_freezing(2, 5))
    train_on(optimizer, student, teacher, data[:at])
    state = saved(student, optimizer, shown)
    flags = _trains(student.low)
    copied = None
    if form == "wrapper":
        copied = copy.deepcopy((student, teacher, optimizer)), pickle.loads(pickle.dumps((student, teacher, optimizer)))
    train_on(optimizer, student, teacher, data[at:])
    expected = weights(student), shown.rates, _trains(student.low)

    def resumed(policy: Any, start: int) -> Any:
        student, teacher, optimizer, shown = watched(form, _sgd, policy=policy)
        train(optimizer, student, teacher, start, seed=5)  # the state that is loaded says who is left out
        resume(copy.deepcopy(state), student, optimizer, shown)
        return student, teacher, optimizer, shown

    for start in (0, 4):
        student, teacher, optimizer, shown = resumed(_freezing(2, 5), start)
        assert _trains(student.low) == flags
        train_on(optimizer, student, teacher, data[at:])
        assert same(weights(student), expected[0]), start
        assert (shown.rates, _trains(student.low)) == expected[1:]
    student, *_ = resumed(lwkd.Relative(), 0)
    assert _trains(student.low) == {True}, "a policy that freezes nothing"
    for student, teacher, optimizer in copied or ():
        optimizer.watch(student, teacher)
        assert _trains(student.low) == flags
        train_on(optimizer, student, teacher, data[at:])
        assert same(weights(student), expected[0])
        optimizer.close()
        assert _trains(student) == {True}


@pytest.mark.parametrize("signal", ["attention", "jacobian", lwkd.signals.Jacobian(wrt="parameters"), "hessian"])
def test_frozen_layers_are_measured_as_before(signal: Any) -> None:
    """A run at a learning rate of 0 measures the same, whether or not a layer is left out of the backward pass."""
    found = []
    for policy in (_freezing(1), lwkd.Constant()):
        student, teacher, optimizer, shown = watched("wrapper", _sgd, policy=policy, signal=signal, every=1)
        optimizer.param_groups[0]["lr"] = 0.0
        seen = []
        for seed in range(4):
            train(optimizer, student, teacher, 1, seed=seed)
            seen.append(shown.divergences)
        found.append(seen)
        assert _trains(student.low) == {isinstance(policy, lwkd.Constant)}
    assert found[0] == found[1]


@each_form
def test_a_shift_of_the_data_thaws(form: str) -> None:
    policy = lwkd.Freeze(window=1, warmup=0, tolerance=0.5, rise=0.2)
    student, teacher, optimizer, shown = watched(form, _sgd, policy=policy)
    frozen = []
    for step in range(7):
        x, y = next(batches(1))
        optimizer.zero_grad()
        plain = torch.linspace(0, 5, 8).expand_as(x)
        loss_of(student, teacher, plain if step < 4 else x, y).backward()
        optimizer.step()
        frozen.append((shown.rates["low"], _trains(student.low)))
    assert frozen[1:5] == [(0, {True}), (0, {False}), (0, {False}), (1, {False})]
    assert frozen[5] == (1, {True}), "a window passes before it may be frozen again"


@each_form
def test_accumulated_passes_infinite_gradients_and_a_closure(form: str) -> None:
    """Nothing is switched between the passes of an update, nor in a step that is none."""
    student, teacher, optimizer, shown = watched(form, _sgd, policy=_freezing(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    seen = []
    for step in range(4):
        optimizer.zero_grad()
        for x, y in batches(2, seed=step):
            seen.append(_trains(student.low))
            loss = loss_of(student, teacher, x, y) * (float("inf") if step == 1 else 1)
            scaler.scale(loss).backward()
        before = weights(student.low[0])
        scaler.step(optimizer)
        scaler.update()
        assert same(weights(student.low[0]), before) == (step > 0)
    assert seen == [{True}] * 6 + [{False}] * 2, "skipped, the update at rate 0 is the third"

    base = partial(torch.optim.LBFGS, lr=0.1, max_iter=2)
    student, teacher, optimizer, shown = watched(form, base, policy=_freezing(1))
    x, y = next(batches(1))
    trained = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(student, teacher, x, y)
        loss.backward()
        trained.append(_trains(student.low))
        return loss

    for step in range(4):
        before = weights(student)
        trained.clear()
        optimizer.step(closure)
        assert trained == [{step < 2}] * len(trained)
        parts = [{k: v for k, v in w.items() if k.startswith("low.0")} for w in (before, weights(student))]
        assert same(*parts) == (step > 0)
        assert not torch.equal(before["head.2.weight"], student.head[2].weight)
    assert shown.rates["low"] == 0


class Checkpointed(nn.Sequential):
    """Keeps no activations of its second stage."""

    reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.high, self.low(x), use_reentrant=self.reentrant))


@each_form
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradients_that_end_with_those_of_frozen_layers_are_seen(form: str, reentrant: bool) -> None:
    student, teacher, optimizer, shown = watched(form, _sgd, policy=_freezing(1))
    student.__class__ = Checkpointed
    student.reentrant = reentrant
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(optimizer, student, teacher, 5)
    said = [str(w.message) for w in caught if "frozen layers" in str(w.message)]
    assert len(said) == reentrant
    assert all("took the gradients of high along" in one and "use_reentrant=False" in one for one in said)
    assert _trains(student.low) == {reentrant}
    before = weights(student)
    train(optimizer, student, teacher, 1, seed=2)
    moved = {name.split(".")[0] for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"high", "head"}
    assert shown.rates["low"] == 0


def test_reducers_keep_their_backward_pass_whole() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        student, teacher, pairing = nets()
        parallel = DistributedDataParallel(student)
        optimizer, shown = make("wrapper", _sgd(student.parameters()), parallel, teacher, pairing, policy=_freezing(1))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(optimizer, parallel, teacher, 1)
            before = weights(student.low[0])
            train(optimizer, parallel, teacher, 4)
        (said,) = [str(w.message) for w in caught if "saves no time" in str(w.message)]
        assert "DistributedDataParallel waits for a gradient of every parameter" in said
        assert same(weights(student.low[0]), before)
        assert _trains(student) == {True}
        assert shown.rates["low"] == 0
    finally:
        dist.destroy_process_group()
    assert "2 ranks train the student together" in str(why_not_cut(student, 2))
    assert why_not_cut(student, 1) is None


@each_form
def test_frozen_layers_count_and_an_unfrozen_one_joins(form: str) -> None:
    """Layers frozen here still have a say; one that the user froze is at rest, and counts once he lets it go."""
    student, teacher, pairing = nets()
    student.low.requires_grad_(False)
    policy = lwkd.Freeze(window=1, warmup=0, tolerance=0.99)
    with pytest.warns(UserWarning, match="1 of 2 paired layers"):
        optimizer, shown = make(form, _sgd(student.parameters()), student, teacher, pairing, policy=policy)
    train(optimizer, student, teacher, 3)
    assert shown.rates == {"low": 1, "high": 1}
    student.low.requires_grad_(True)
    train(optimizer, student, teacher, 3, seed=3)
    assert shown.rates == {"low": 0, "high": 1}
    assert shown._layerwise._trained_layers() == [0, 1]
    assert _trains(student.low) == {False}


def test_rates_that_come_late_switch_at_the_same_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where the host knows the rates when the next step begins."""
    found = []
    for late in (False, True):
        if late:
            copies_deferred(monkeypatch)
        student, teacher, optimizer, _ = watched("wrapper", _sgd, policy=_freezing(2, 5))
        seen = []
        for seed in range(8):
            train(optimizer, student, teacher, 1, seed=seed)
            seen.append((_trains(student.low), weights(student)))
        found.append(seen)
    for (flags, mine), (late_flags, late_ones) in zip(*found, strict=True):
        assert flags == late_flags
        assert same(mine, late_ones)
    assert {False} in [flags for flags, _ in found[1]]


def test_a_graph_is_refused_and_the_rates_are_read_by_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    staying_on_the_device(monkeypatch)
    base = partial(_sgd, lr=torch.tensor(0.05))
    student, teacher, optimizer, shown = watched("wrapper", base, policy=_freezing(1))
    train(optimizer, student, teacher, 3)
    assert shown._rates.store.mode == "host"
    assert _trains(student.low) == {False}
    monkeypatch.setattr("lwkd.rates.layer_rates.capturing", lambda: True)
    with pytest.raises(RuntimeError, match="changes the backward pass, and a graph does the same at every replay"):
        optimizer.step()


def test_a_compiled_student_follows() -> None:
    torch.compiler.reset()
    student, teacher, optimizer, _ = watched("wrapper", _sgd, policy=_freezing(1, 3))
    compiled = torch.compile(student, backend="aot_eager")
    by_hand, same_teacher, plain, _ = watched("wrapper", _sgd, policy=_freezing(1, 3))
    for seed in range(6):
        train(optimizer, compiled, teacher, 1, seed=seed)
        train(plain, by_hand, same_teacher, 1, seed=seed)
        assert _trains(student.low) == _trains(by_hand.low)
        for mine, other in zip(student.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(mine, other)
