"""Rates that do nothing are said; frozen layers have no say in the mean; a rate of 0 is a rate."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from doubles import staying_on_the_device
from optimizer_doubles import Script
from torch import Tensor, nn
from toy import BASES, each_form, make

import lwkd
from lwkd.policies import Decay, Relative


def _net(width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in (5, width, width):
        layers += [nn.Linear(size, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def _nets(paired: tuple[str, ...] = ("1", "3", "5")) -> tuple[nn.Sequential, nn.Sequential, lwkd.Pairing]:
    torch.manual_seed(0)
    student, teacher = _net(4), _net(8).eval()
    return student, teacher, lwkd.pair(student, teacher, torch.rand(2, 4, 5), layers={name: name for name in paired})


def _step(optimizer: Any, student: nn.Module, teacher: nn.Module, step: int) -> Tensor:
    """One step; what each pair measures then, in float64 from the definition."""
    x = torch.rand(6, 4, 5, generator=torch.Generator().manual_seed(step))
    found = []
    with torch.no_grad():
        target, s, t = teacher(x), x.double(), x.double()
        mine, theirs = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
        for index in range(6):
            s, t = mine[index](s), theirs[index](t)
            if index % 2:
                a, b = (f.square().mean(-1) / f.square().mean(-1).sum(-1, keepdim=True) for f in (s, t))
                m = (a + b) / 2
                found.append((((a * (a / m).log()).sum(-1) + (b * (b / m).log()).sum(-1)) / 2).mean())
    optimizer.zero_grad()
    (student(x) - target).square().mean().backward()
    optimizer.step()
    return torch.stack(found)


def _freeze(student: nn.Sequential, *indices: int) -> None:
    for index in indices:
        student[index].requires_grad_(False)


# Said


def _said(call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(w.category is UserWarning and w.filename.endswith(("toy.py", "test_idle_layers.py")) for w in caught)
    return [str(w.message) for w in caught]


@each_form
def test_a_single_pair_under_relative_is_said(form: str) -> None:
    def messages(policy: Any) -> list[str]:
        student, teacher, pairing = _nets(("3",))
        return _said(lambda: make(form, BASES["sgd"](student.parameters()), student, teacher, pairing, policy=policy))

    for policy in (None, Relative(), Decay(normalize=True)):
        (message,) = messages(policy)
        assert message.startswith("3 is the only layer that is compared")
        assert "its rate is always 1" in message
        assert "lwkd.Decay()" in message
    for policy in (Decay(), lwkd.Constant(0.5)):
        assert messages(policy) == []


@each_form
def test_layers_that_own_nothing_to_train_are_said(form: str) -> None:
    student, teacher, pairing = _nets()
    _freeze(student, 0)
    base = BASES["sgd"]([*student[0].parameters(), *student[4].parameters(), *student[6].parameters()])
    first, second = _said(lambda: make(form, base, student, teacher, pairing))
    assert first.startswith("2 of 3 paired layers have no trainable parameter in this optimizer (1, 3)")
    assert "Unfreeze them" in first
    assert second.startswith("5 is the only layer")


@each_form
@pytest.mark.parametrize("held", [True, False])
def test_nothing_to_train_but_the_tail_is_said(form: str, held: bool) -> None:
    student, teacher, pairing = _nets()
    _freeze(student, 0, 2, 4)
    base = BASES["sgd"](student.parameters() if held else student[6].parameters())
    (message,) = _said(lambda: make(form, base, student, teacher, pairing))
    assert message.startswith("3 of 3 paired layers have no trainable parameter in this optimizer (all of them: ")
    _step(base, student, teacher, 0)


@each_form
def test_nothing_is_said_where_rates_act(form: str) -> None:
    student, teacher, pairing = _nets()
    assert _said(lambda: make(form, BASES["sgd"](student.parameters()), student, teacher, pairing)) == []


# Who counts


def _expected(found: list[Tensor], counted: list[int], *, normalize: bool = False) -> Tensor:
    """Multipliers of the layers that count, in float64: momentum 0.5, exponent 2, clamped to (0.2, 3)."""
    average = found[0]
    for new in found[1:]:
        average = 0.5 * average + 0.5 * new
    e = average[counted]
    m = (e / e.mean()).square().clamp(0.2, 3)
    return m / m.mean() if normalize else m


@each_form
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("how", ["frozen", "not held"])
def test_a_frozen_layer_has_no_say_in_the_mean(
    form: str, on_device: bool, normalize: bool, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher, pairing = _nets()
    parameters = list(student.parameters())
    if how == "frozen":
        _freeze(student, 2)
    else:
        parameters = [p for index in (0, 4, 6) for p in student[index].parameters()]
    lr: Any = 0.05
    if on_device:
        staying_on_the_device(monkeypatch)
        lr = torch.tensor(lr)
    policy = Relative(gamma=2.0, momentum=0.5, clamp=(0.2, 3.0), normalize=normalize)
    base = BASES["sgd"](parameters, lr=lr)
    with pytest.warns(UserWarning, match=r"1 of 3 paired layers .* \(3\)"):
        optimizer, shown = make(form, base, student, teacher, pairing, policy=policy)
    found = []
    for step in range(3):
        found.append(_step(optimizer, student, teacher, step))
        rates = torch.tensor(list(shown.rates.values()), dtype=torch.float64)
        torch.testing.assert_close(rates[[0, 2]], _expected(found, [0, 2], normalize=normalize), rtol=1e-4, atol=0)
        assert rates[1] == 1
        if step == 0:
            shown_all = torch.tensor(list(shown.divergences.values()), dtype=torch.float64)
            torch.testing.assert_close(shown_all, found[0], rtol=1e-4, atol=1e-9)
    assert shown.measurements == 3
    assert shown.skipped == 0
    # Given to the optimizer and set free, it counts from the next measurement on, with all that was seen of it.
    student[2].requires_grad_(True)
    if how == "not held":
        optimizer.add_param_group({"params": list(student[2].parameters()), "lr": lr})
    found.append(_step(optimizer, student, teacher, 3))
    rates = torch.tensor(list(shown.rates.values()), dtype=torch.float64)
    torch.testing.assert_close(rates, _expected(found, [0, 1, 2], normalize=normalize), rtol=1e-4, atol=0)


def test_what_a_frozen_layer_measures_cannot_stop_the_others() -> None:
    policy, state = Relative(momentum=0.5), Relative().start(3, 1)
    counted = torch.tensor([0, 2])
    state = policy.update(state, torch.tensor([[0.3], [0.7], [0.1]]), "attention", counted=counted)
    assert state.multipliers.tolist() == pytest.approx([1.5, 1.0, 0.5])
    bad = policy.update(state, torch.tensor([[0.1], [float("nan")], [0.1]]), "attention", counted=counted)
    assert bad.counts.tolist() == [2, 0]
    assert bad.average.flatten().tolist() == pytest.approx([0.2, 0.7, 0.1])
    assert bad.multipliers.tolist() == pytest.approx([0.2 / 0.15, 1.0, 0.1 / 0.15])
    none = policy.update(state, torch.tensor([[0.0], [0.7], [float("nan")]]), "attention", counted=counted)
    assert none.counts.tolist() == [1, 1]
    for name in ("baseline", "divergences", "multipliers"):
        assert getattr(none, name)[[0, 2]].tolist() == getattr(state, name)[[0, 2]].tolist()


def test_masked_updates_change_nothing_with_frozen_layers_either() -> None:
    policy, counted = Relative(momentum=0.5), torch.tensor([0, 2])
    state = policy.update(policy.start(3, 1), torch.tensor([[0.3], [0.7], [0.1]]), "attention", counted=counted)
    masked = policy.update(state, torch.ones(3, 1), "attention", torch.ones(()), counted)
    assert all(torch.equal(one, other) for one, other in zip(masked, state, strict=True))


class OwnPolicy(Script):
    """A policy of the user's, which knows nothing of frozen layers."""

    def update(self, state: Any, statistics: Tensor, ratio: Any, found_inf: Tensor | None = None) -> Any:
        assert statistics.shape == (3, 1)
        return super().update(state, statistics, ratio, found_inf)


def test_a_policy_of_the_users_sees_all_layers() -> None:
    student, teacher, pairing = _nets()
    _freeze(student, 2)
    base, policy = BASES["sgd"](student.parameters()), OwnPolicy([(1.5, 0.5, 1.0)])
    with pytest.warns(UserWarning, match="1 of 3"):
        optimizer, shown = make("wrapper", base, student, teacher, pairing, policy=policy)
    _step(optimizer, student, teacher, 0)
    assert list(shown.rates.values()) == [1.5, 0.5, 1.0]


# A rate of 0

DECAYING: dict[str, Any] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1),
    "asgd": lambda groups: torch.optim.ASGD(groups, lr=0.1, t0=2, weight_decay=0.1),  # keeps a rate of the last step
}


@each_form
@pytest.mark.parametrize("name", DECAYING)
def test_a_layer_at_rate_0_stands_still_and_its_averages_go_on(form: str, name: str) -> None:
    student, teacher, pairing = _nets()
    with torch.no_grad():
        student[2].bias.copy_(torch.tensor([-0.0, 0.0, 1.0, -1.0]))
    expected = copy.deepcopy(student)
    base = DECAYING[name](student.parameters())
    optimizer, _ = make(form, base, student, teacher, pairing, policy=lwkd.Constant([1.0, 0.0, 1.0]))
    explicit = DECAYING[name](
        [
            {"params": [p for index in (0, 4, 6) for p in expected[index].parameters()]},
            {"params": expected[2].parameters(), "lr": 0.0},
        ]
    )
    start = [p.detach().clone() for p in student[2].parameters()]
    for step in range(4):
        _step(optimizer, student, teacher, step)
        _step(explicit, expected, teacher, step)
        for before, parameter in zip(start, student[2].parameters(), strict=True):
            assert torch.equal(before.view(torch.int32), parameter.detach().view(torch.int32)), (
                "bitwise, signs of zeros too"
            )
        if name == "asgd":
            continue  # there a learning rate of 0 moves the parameters by the last one, and with them all gradients
        for parameter, other in zip(student.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(parameter, other, rtol=0, atol=0)
            for key, value in explicit.state[other].items():
                torch.testing.assert_close(base.state[parameter][key], value, rtol=0, atol=0)


@each_form
def test_a_layer_at_rate_0_survives_infinite_gradients(form: str) -> None:
    student, teacher, pairing = _nets()
    base = BASES["sgd"](student.parameters())
    optimizer, _ = make(form, base, student, teacher, pairing, policy=lwkd.Constant([1.0, 0.0, 1.0]))
    before = student[2].weight.detach().clone()
    for parameter in student.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    optimizer.step()
    assert torch.equal(student[2].weight, before)


@each_form
def test_lbfgs_at_rate_0(form: str) -> None:
    student, teacher, pairing = _nets()
    base = torch.optim.LBFGS(student.parameters(), lr=0.1, max_iter=2)
    optimizer, _ = make(form, base, student, teacher, pairing, policy=lwkd.Constant([1.0, 0.0, 1.0]))
    x = torch.rand(3, 4, 5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = student(x).square().mean()
        loss.backward()
        return loss

    before = copy.deepcopy(student.state_dict())
    optimizer.step(closure)
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("2.")


@each_form
def test_a_clamp_from_0_lets_a_layer_stop_and_go_on(form: str) -> None:
    student, teacher, pairing = _nets()
    base = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    policy = Relative(gamma=50.0, momentum=0.0, clamp=(0.0, 1.5))
    optimizer, shown = make(form, base, student, teacher, pairing, policy=policy)
    _step(optimizer, student, teacher, 0)
    rates = dict(shown.rates)
    stopped = [name for name, rate in rates.items() if rate < 1e-6]
    assert stopped
    assert any(rate > 1 for rate in rates.values())
    assert all(torch.isfinite(p).all() for p in student.parameters())
