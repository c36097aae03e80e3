"""Ownership of parameters, closures, hooks, and bases that write into their groups. Both forms of the wrapper."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch
from optimizer_doubles import SeesGroups, WritesRate
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from toy import BASES, batches, each_form, loss_of, make, nets, same, train, watched, weights

import lwkd
from lwkd.optimizer.group_memory import alike, private
from lwkd.optimizer.ownership import Ownership

MULTIPLIERS = lwkd.Constant([1.5, 0.5])


def _seen(optimizer: Any, parameter: torch.Tensor) -> float:
    return getattr(optimizer, "base", optimizer).seen[id(parameter)]


def _step_on_gradients(optimizer: torch.optim.Optimizer, *parameters: torch.Tensor) -> None:
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@each_form
def test_one_group_over_several_layers_and_several_groups_in_one_layer(form: str) -> None:
    student, teacher, pairing = nets()
    conv, norm = student.low[0], student.low[1]
    base = SeesGroups(
        [
            {"params": [conv.weight], "lr": 0.1},
            {"params": [conv.bias, *norm.parameters(), *student.high.parameters()], "lr": 0.2},
            {"params": list(student.head.parameters()), "lr": 0.4},
        ],
        lr=1.0,
    )
    optimizer, _ = make(form, base, student, teacher, pairing, policy=MULTIPLIERS)
    _step_on_gradients(optimizer, *student.parameters())
    for parameter, expected in (
        (conv.weight, 0.15),
        (conv.bias, 0.3),
        (norm.weight, 0.3),
        (student.high[0].weight, 0.1),
        (student.head[2].weight, 0.4),
    ):
        assert _seen(optimizer, parameter) == pytest.approx(expected)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.4]


@each_form
def test_what_the_base_writes_into_its_groups_is_kept(form: str) -> None:
    student, teacher, optimizer, _ = watched(form, partial(SeesGroups, lr=0.1), policy=MULTIPLIERS)
    train(optimizer, student, teacher, 3)
    assert optimizer.param_groups[0]["k"] == 3
    assert len(optimizer.param_groups) == 1


@each_form
def test_a_rate_that_the_base_writes_is_kept_unscaled(form: str) -> None:
    student, teacher, optimizer, _ = watched(form, partial(WritesRate, lr=0.8), policy=MULTIPLIERS)
    train(optimizer, student, teacher, 2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


@each_form
def test_groups_added_later_frozen_layers_and_missing_gradients(form: str) -> None:
    student, teacher, pairing = nets()
    student.low.requires_grad_(False)
    base = SeesGroups(student.high.parameters(), lr=0.1)
    optimizer, _ = make(form, base, student, teacher, pairing, policy=MULTIPLIERS)
    extra = nn.Parameter(torch.ones(2))  # not the student's: keeps multiplier 1
    optimizer.add_param_group({"params": list(student.head.parameters())})
    optimizer.add_param_group({"params": [extra]})
    train(optimizer, student, teacher, 2)
    student.low.requires_grad_(True)
    optimizer.add_param_group({"params": list(student.low.parameters()), "lr": 0.2})
    before = student.low[0].weight.detach().clone()
    _step_on_gradients(optimizer, student.low[0].weight, extra)  # all others: grad is None or stale
    assert _seen(optimizer, student.low[0].weight) == pytest.approx(0.3)
    assert _seen(optimizer, extra) == pytest.approx(0.1)
    torch.testing.assert_close(student.low[0].weight, before - 0.3)


@each_form
def test_a_tied_weight_belongs_to_the_first_of_its_layers(form: str) -> None:
    torch.manual_seed(0)

    def tied(width: int) -> nn.Sequential:
        model = nn.Sequential(nn.Conv2d(1, width, 1), nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, width, 1))
        model[3].weight = model[1].weight
        return model

    student, teacher = tied(3), tied(5)
    pairing = lwkd.pair(student, teacher, torch.rand(1, 1, 4, 4), layers={"2": "2", "3": "3"})
    base = SeesGroups(student.parameters(), lr=0.1)
    optimizer, _ = make(form, base, student, teacher, pairing, policy=MULTIPLIERS)
    _step_on_gradients(optimizer, *student.parameters())
    assert _seen(optimizer, student[3].weight) == pytest.approx(0.15)
    assert _seen(optimizer, student[3].bias) == pytest.approx(0.05)


@each_form
def test_named_parameters_stay_beside_their_names(form: str) -> None:
    student, teacher, pairing = nets()
    base = torch.optim.SGD(student.named_parameters(), lr=0.1)
    names = list(base.param_groups[0]["param_names"])
    optimizer, _ = make(form, base, student, teacher, pairing, policy=MULTIPLIERS)
    train(optimizer, student, teacher, 1)
    assert optimizer.param_groups[0]["param_names"] == names
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names


@each_form
def test_replaced_parameters_are_found_again_by_name(form: str) -> None:
    student, _, optimizer, _ = watched(form, partial(SeesGroups, lr=0.1), policy=MULTIPLIERS)
    student.low[0].weight = nn.Parameter(student.low[0].weight.detach() * 2)
    optimizer.param_groups[0]["params"][0] = student.low[0].weight
    _step_on_gradients(optimizer, student.low[0].weight)
    assert _seen(optimizer, student.low[0].weight) == pytest.approx(0.15)


def test_owners_are_looked_up_once_for_parameters_that_are_not_the_students(monkeypatch: Any) -> None:
    student, teacher, optimizer, _ = watched()
    calls: list[int] = []
    resolve = Ownership.resolve
    monkeypatch.setattr(Ownership, "resolve", lambda owners, net: (calls.append(1), resolve(owners, net))[1])
    for added in (1, 2):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        train(optimizer, student, teacher, 3)
        assert len(calls) == added


@each_form
def test_lbfgs_moves_by_the_multiple_of_its_own_step(form: str) -> None:
    def run(multipliers: list[float] | None) -> tuple[dict[str, Any], dict[str, Any], int, float]:
        how, policy = (form, lwkd.Constant(multipliers)) if multipliers else ("bare", None)
        base = partial(torch.optim.LBFGS, lr=0.1, max_iter=3)
        student, teacher, optimizer, shown = watched(how, base, policy=policy)
        student.eval()  # batch statistics would change from call to call
        x, y = next(batches(1))
        calls = 0

        def closure() -> torch.Tensor:
            nonlocal calls
            calls += 1
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = loss_of(student, teacher, x, y)
            loss.backward()
            return loss

        before = weights(student)
        loss = optimizer.step(closure)
        if shown is not None:
            assert shown.passes["measured"] == calls
            assert shown.measurements == 1, "rates advance once, whatever the number of calls"
        return before, weights(student), calls, loss.item()

    before, bare, calls, loss = run(None)
    _, ones, ones_calls, ones_loss = run([1.0, 1.0])
    assert same(ones, bare)
    assert (ones_calls, ones_loss) == (calls, loss)
    _, scaled, scaled_calls, scaled_loss = run([1.5, 0.5])
    assert (scaled_calls, scaled_loss) == (calls, loss)
    for name, multiplier in (("low.0.weight", 1.5), ("high.0.weight", 0.5), ("head.2.weight", 1.0)):
        torch.testing.assert_close(scaled[name] - before[name], multiplier * (bare[name] - before[name]))


class SharpnessAware(torch.optim.SGD):
    """Climbs to a neighbour, asks the closure for its gradient, and steps from where it was."""

    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            for p in parameters:
                p.add_(p.grad, alpha=0.01)
            climbed = [p.grad.clone() for p in parameters]
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            for p, step in zip(parameters, climbed, strict=True):
                p.sub_(step, alpha=0.01)
        super().step()
        return loss


@each_form
def test_a_closure_sees_the_users_groups_and_the_loss_is_passed_on(form: str) -> None:
    student, teacher, optimizer, shown = watched(form, partial(SharpnessAware, lr=0.05), policy=MULTIPLIERS)
    group = optimizer.param_groups[0]
    inside = []

    def closure() -> torch.Tensor:
        inside.append((optimizer.param_groups == [group], group["lr"], torch.is_grad_enabled()))
        optimizer.zero_grad()
        loss = loss_of(student, teacher, *next(batches(1)))
        loss.backward()
        return loss

    expected = closure().item()
    loss = optimizer.step(closure)
    assert inside == [(True, 0.05, True)] * 2
    assert loss.item() == pytest.approx(expected, rel=0.1)
    assert optimizer.param_groups == [group]
    assert shown.passes["measured"] == 2


@each_form
def test_global_hooks_see_optimizers_that_step_inside_a_closure(form: str) -> None:
    """Also where the steps of two threads overlap, of which the one that began first ends first."""
    student, teacher, pairing = nets()
    optimizer, _ = make(form, BASES["sgd"](student.parameters()), student, teacher, pairing, policy=MULTIPLIERS)
    other = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])
    copied, again, pairs_again = nets()
    second, _ = make(form, BASES["sgd"](copied.parameters()), copied, again, pairs_again, policy=MULTIPLIERS)
    seen: list[Any] = []
    handle = register_optimizer_step_pre_hook(lambda stepped, *_: seen.append(stepped))
    entered, left = threading.Event(), threading.Event()

    def late() -> float:
        entered.set()
        left.wait(10)
        return 0.0

    thread = threading.Thread(target=lambda: second.step(late))

    def closure() -> float:
        other.step()
        thread.start()
        entered.wait(10)
        return 0.0

    try:
        optimizer.step(closure)
        left.set()
        thread.join()
        assert [type(one) for one in seen] == [type(optimizer), torch.optim.Adam, type(second)]
        optimizer.step()
        assert len(seen) == 4
        assert seen[3] is optimizer
    finally:
        handle.remove()


@each_form
def test_hooks_fire_once_with_the_users_groups(form: str) -> None:
    student, teacher, pairing = nets()
    base = SeesGroups(student.parameters(), lr=0.05)  # its step calls super().step()
    SeesGroups(student.parameters(), lr=0.05)
    torch.optim.SGD(student.parameters(), lr=0.05)  # patches the parent class as well
    fired: list[str] = []

    def note(name: str) -> Any:
        def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            assert len(optimizer.param_groups) == 1
            assert optimizer.param_groups[0]["lr"] == 0.05
            fired.append(name)

        return hook

    base.register_step_pre_hook(note("pre, on the base"))
    optimizer, _ = make(form, base, student, teacher, pairing, policy=MULTIPLIERS)
    optimizer.register_step_pre_hook(note("pre"))
    optimizer.register_step_post_hook(note("post"))
    optimizer.register_state_dict_pre_hook(lambda _: fired.append("state dict"))
    optimizer.register_load_state_dict_post_hook(lambda _: fired.append("load"))
    everywhere = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    try:
        train(optimizer, student, teacher, 1)
    finally:
        for handle in everywhere:
            handle.remove()
    assert fired == ["global pre", "pre, on the base", "pre", "post", "global post"]
    fired.clear()
    optimizer.load_state_dict(optimizer.state_dict())
    assert fired == ["state dict", "load"]


@each_form
def test_accumulated_passes_are_averaged_by_rows(form: str) -> None:
    student, teacher, pairing = nets()
    student.eval()
    optimizer, shown = make(form, BASES["sgd"](student.parameters()), student, teacher, pairing)
    features: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
    with lwkd.Capture(student, teacher, pairing) as capture:
        for rows in (4, 2):
            loss_of(student, teacher, *next(batches(1, rows=rows, seed=rows))).backward()
            features.append(([f.detach() for f in capture.student], capture.teacher))
    optimizer.step()
    together = [[torch.cat(layer) for layer in zip(*side, strict=True)] for side in zip(*features, strict=True)]
    expected = lwkd.reference.attention_divergence(*together)
    torch.testing.assert_close(torch.tensor(list(shown.divergences.values())), expected)
    assert shown.measurements == 1


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (torch.ones(2), torch.ones(2), True),
        (torch.ones(2), torch.ones(1), False),
        (torch.ones(()), 1.0, False),
        (1, 1.0, True),
        (1, "1", False),
        ({"a": [torch.ones(1)]}, {"a": [torch.ones(1)]}, True),
        ({"a": 1}, {"b": 1}, False),
        ((1, 2), (1, 2, 3), False),
        (float("nan"), float("nan"), False),
    ],
)
def test_which_values_of_a_group_are_known_to_be_equal(one: Any, other: Any, equal: bool) -> None:
    assert alike(one, other) is equal


def test_a_private_copy_shares_nothing_that_is_written_into() -> None:
    value = {"steps": torch.zeros(2), "history": [torch.zeros(1), {"a": torch.zeros(1)}], "name": "sgd"}
    copied = private(value)
    assert alike(copied, value)
    copied["steps"] += 1
    copied["history"][1]["a"] += 1
    assert value["steps"].sum() == value["history"][1]["a"] == 0
