"""A teacher that changes is noticed by the memory of its curvature; one without derivatives is named."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from saved_runs import through_a_file
from torch import Tensor, nn
from toy import BASES, Parts, batches, loss_of, make, nets, train, watched

import lwkd
from lwkd.nets.feature_hooks import LayerNotRunError
from lwkd.signals import Hessian, Jacobian
from lwkd.signals.teacher_curvature import TeacherCurvature

CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "in place": lambda net: _each(net, lambda p: p.mul_(1.01)),
    "through .data": lambda net: [p.data.mul_(1.01) for p in net.parameters()] and None,
    "signs": lambda net: _each(net, lambda p: p.neg_()),
    "another state": lambda net: net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}) and None,
    "other data": lambda net: [setattr(p, "data", p.data * 2) for p in net.parameters()] and None,
    "other objects": lambda net: _replaced(net),
    "one weight of many": lambda net: _each(net[1], lambda p: p.view(-1)[:1].add_(1)),
    "statistics of a norm": lambda net: _doubled(net[0].running_var),
    "the mode": lambda net: net.train() and None,
}


def _each(net: nn.Module, change: Callable[[Tensor], Any]) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            change(parameter)


def _doubled(tensor: Tensor) -> None:
    tensor.mul_(2)


def _replaced(net: nn.Module) -> None:
    net[1].weight = nn.Parameter(net[1].weight.detach().clone())


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()


def measured(memory: TeacherCurvature, value: float, count: int = 1) -> None:
    for _ in range(count):
        memory.fold(torch.tensor([[0.0, value]], dtype=torch.float64))


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed_and_said_once(name: str) -> None:
    net, memory = small(), TeacherCurvature(1, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):  # in the fifth the teacher rests
            memory.follow(net)
            measured(memory, 3.0)
    assert (memory.count, memory.mean.tolist(), memory.moving) == (4, [3.0], False)
    CHANGES[name](net)
    with pytest.warns(UserWarning, match="the teacher's parameters have changed"):
        memory.follow(net)
    assert (memory.count, memory.rests, memory.moving) == (0, 0, True)
    assert memory.at_hand is None
    measured(memory, 5.0)
    assert memory.mean.tolist() == [5.0], "nothing of the teacher before is left"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory.follow(net)
        assert not memory.moving
        measured(memory, 7.0)
        assert memory.mean.tolist() == [6.0]
        CHANGES["in place"](net)
        memory.follow(net)
        assert memory.moving


def test_passes_modes_of_gradients_and_copies_are_no_change() -> None:
    net, memory = small(), TeacherCurvature(1, 0.1)
    memory.follow(net)
    measured(memory, 3.0, 4 + 4 * 4)
    assert memory.known is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(torch.rand(4, 3)).sum().backward()
        net.zero_grad()
        net.requires_grad_(False)
        net.eval()
        net.to(memory_format=torch.channels_last)
        memory.follow(net)
        for other in (copy.deepcopy(memory), memory):
            other.follow(net)
            assert other.known is not None
        resumed = TeacherCurvature(1, 0.1)
        resumed.load_state_dict(memory.state_dict())
        resumed.follow(copy.deepcopy(net))
        assert resumed.known is not None, "the same values in another process"
    with pytest.warns(UserWarning, match="have changed"):
        resumed.follow(nn.Linear(3, 2))
    again = TeacherCurvature(1, 0.1)
    again.load_state_dict(memory.state_dict())
    with pytest.warns(UserWarning, match="have changed"):
        again.follow(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).eval())
    old = {k: v for k, v in memory.state_dict().items() if k not in ("moving", "likeness")}
    again.load_state_dict(old)
    again.follow(net)
    assert again.known is not None, "a state of an earlier version"


def _ema(student: nn.Module, teacher: nn.Module) -> None:
    for p, q in zip(teacher.parameters(), student.parameters(), strict=True):
        p.data.mul_(0.9).add_(q.data, alpha=0.1)


def test_a_teacher_that_changes_at_every_update_is_measured_every_time() -> None:
    student, _, _ = nets()
    teacher = copy.deepcopy(student).eval()
    _each(teacher, lambda p: p.mul_(2))
    pairing = lwkd.pair(student, teacher, torch.rand(1, 1, 8, 8), layers={"low": "low", "high": "high"})
    signal = Hessian()
    optimizer, shown = make(
        "wrapper", BASES["sgd"](student.parameters()), student, teacher, pairing, signal=signal, every=1
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for update, (x, y) in enumerate(batches(14)):
            loss_of(student, teacher, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
            seed = update * 2**20
            fresh = signal.measure(student, teacher, pairing, x, seed=seed)[:, 1]
            assert torch.equal(optimizer._rates.teacher.mean, fresh), "what is taken for the teacher is the teacher"
            _ema(student, teacher)
    assert ["parameters have changed" in str(warning.message) for warning in said] == [True]
    assert all(0 <= error < 1 for error in shown.standard_errors.values()), "its noise is seen in the measurements"


def test_a_resume_with_a_teacher_that_changes_is_bitwise() -> None:
    def run(optimizer: Any, student: nn.Module, teacher: nn.Module, count: int, seed: int) -> None:
        for x, y in batches(count, seed):
            loss_of(student, teacher, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
            _ema(student, teacher) if seed % 2 else None

    def fresh() -> tuple[Any, ...]:
        student, _, _ = nets()
        teacher = copy.deepcopy(student).eval()
        pairing = lwkd.pair(student, teacher, torch.rand(1, 1, 8, 8), layers={"low": "low", "high": "high"})
        base = BASES["sgd"](student.parameters())
        return student, teacher, lwkd.LayerwiseOptimizer(base, student, teacher, pairing, signal="hessian", every=1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        student, teacher, optimizer = fresh()
        run(optimizer, student, teacher, 3, 1)
        run(optimizer, student, teacher, 2, 2)  # a pause in which it stands still
        states = through_a_file([o.state_dict() for o in (student, teacher, optimizer)])
        resumed = fresh()
        for thing, state in zip(resumed, states, strict=True):
            thing.load_state_dict(state)
        for run_seed in (4, 3, 6):
            run(optimizer, student, teacher, 3, run_seed)
            run(resumed[2], resumed[0], resumed[1], 3, run_seed)
            assert optimizer.divergences == resumed[2].divergences
            assert optimizer._rates.teacher.count == resumed[2]._rates.teacher.count
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), resumed[0].parameters(), strict=True))


def test_a_frozen_teacher_is_never_taken_for_one_that_changes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student, teacher, optimizer, shown = watched(signal="hessian", every=1)
        train(optimizer, student, teacher, 12)
    assert shown._rates.teacher.count == 6, "the first four measurements, and one in four after them"
    assert not shown._rates.teacher.moving


# Teachers through which no derivative flows


class Frozen(Parts):
    """A net that runs under no_grad, or is cut off from its head, in its own forward."""

    def __init__(self, net: nn.Module, detach: bool) -> None:
        super().__init__(net)
        self.detach = detach

    def forward(self, x: Tensor) -> Tensor:
        if self.detach:
            return self.head(self.high(self.low(x)).detach())
        with torch.no_grad():
            return self.head(self.high(self.low(x)))


def _quantized(net: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, torch.qint8)


FLAT: dict[str, Callable[[nn.Module], nn.Module]] = {
    "no_grad": lambda net: Frozen(net, detach=False),
    "detach": lambda net: Frozen(net, detach=True),
    "quantized": _quantized,
}


@pytest.mark.parametrize("name", FLAT)
def test_no_derivative_is_no_flat_curvature(name: str) -> None:
    student, teacher, pairing = nets()
    teacher, x = FLAT[name](teacher).eval(), torch.rand(3, 1, 8, 8)
    message = r"layer 'low' of the teacher.*no derivative flows through the teacher.*'attention'"
    for signal in (Hessian(), Hessian(curvature="hessian"), Jacobian(estimator="output")):
        with pytest.raises(RuntimeError, match=message):
            signal.measure(student, teacher, pairing, x)
    by_maps = (Jacobian(estimator="vjp"), Jacobian("parameters"))
    if name == "no_grad":
        for signal in by_maps:
            with pytest.raises(RuntimeError, match=message):
                signal.measure(student, teacher, pairing, x)
    else:
        for signal in by_maps:  # the maps lie before the cut
            assert signal.measure(student, teacher, pairing, x)[:, 1].gt(0).all()
    assert Jacobian(estimator="difference").measure(student, teacher, pairing, x).isfinite().all()
    optimizer, shown = make("wrapper", BASES["sgd"](student.parameters()), student, teacher, pairing)
    train(optimizer, student, teacher, 2)
    assert all(0 < e < 1 for e in shown.divergences.values()), "attention needs none"


def test_a_cut_between_the_layers_is_named_in_every_direction() -> None:
    class Cut(Parts):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.high(self.low(x).detach()))

    student, teacher, pairing = nets()
    teacher, x = Cut(teacher).eval(), torch.rand(3, 1, 8, 8)
    for signal in (Hessian(), Hessian(curvature="hessian")):
        with pytest.raises(RuntimeError, match="layer 'low' of the teacher has no parameter with a derivative"):
            signal.measure(student, teacher, pairing, x)
    with pytest.raises(RuntimeError, match="layer 'high' of the teacher: no derivative flows"):
        Jacobian(estimator="vjp").measure(student, teacher, pairing, x)
    with pytest.raises(RuntimeError, match="layer 'high' of the teacher: the tangent of the input did not arrive"):
        Jacobian().measure(student, teacher, pairing, x)
    with pytest.raises(RuntimeError, match="the teacher"):
        Hessian("input").measure(student, teacher, pairing, x)
    assert Jacobian("parameters").measure(student, teacher, pairing, x)[:, 1].gt(0).all()


# Nets that choose their path


class Drop(Parts):
    """LayerDrop: the second stage is left out when the flag says so, or by chance in train mode."""

    def __init__(self, net: nn.Module, chance: float = 0.0) -> None:
        super().__init__(net)
        self.chance, self.skip = chance, False

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(x)
        if self.skip or (self.training and float(torch.rand(())) < self.chance):
            return self.head(torch.cat([low, low], 1))
        return self.head(self.high(low))


SIGNALS = (
    Hessian(),
    Hessian(curvature="hessian"),
    Hessian("input"),
    *(Jacobian(estimator=e) for e in ("jvp", "difference", "vjp", "output")),  # type: ignore[arg-type]
    Jacobian("parameters"),
)


@pytest.mark.parametrize("signal", SIGNALS, ids=lambda s: f"{s.measured}-{getattr(s, 'estimator', '')}")
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_layer_that_did_not_run_is_not_measured(signal: Any, whose: str) -> None:
    student, teacher, pairing = nets()
    student, teacher, x = Drop(student).eval(), Drop(teacher).eval(), torch.rand(3, 1, 8, 8)
    expected = signal.measure(student, teacher, pairing, x)
    assert expected[1].abs().sum() > 0
    {"student": student, "teacher": teacher}[whose].skip = True
    with pytest.raises(LayerNotRunError, match=f"layer 'high' of the {whose} gave no feature in this pass"):
        signal.measure(student, teacher, pairing, x)
    student.skip = teacher.skip = False
    assert torch.equal(signal.measure(student, teacher, pairing, x), expected), "and nothing is left of it"


@pytest.mark.parametrize("signal", [Hessian(), Jacobian()], ids=["hessian", "jacobian"])
def test_training_goes_on_where_a_signals_own_pass_takes_another_path(signal: Any) -> None:
    student, teacher, pairing = nets()
    student = Drop(student, chance=0.5)
    optimizer, shown = make(
        "wrapper", BASES["sgd"](student.parameters()), student, teacher, pairing, signal=signal, every=1
    )
    train(optimizer, student, teacher, 12)
    assert 0 < optimizer._rates._replay.incomplete < 12
    assert all(rate > 0 for rate in shown.rates.values())
    assert all(divergence > 0 for divergence in shown.divergences.values())
