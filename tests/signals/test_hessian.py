"""The Hessian signal: curvature per parameter against the exact matrix, maps along a tangent, the teacher's memory."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import curved
import pytest
import torch
import torch.nn.functional as F
from paired_nets import Given, paired
from saved_runs import through_a_file
from tolerances import CURVATURE, SECOND_DIFFERENCE, STANDARD_ERRORS, assert_close
from torch import Tensor, nn
from toy import train, watched

import lwkd
from lwkd import ops
from lwkd.nets.functional_module import FunctionalModule
from lwkd.signals import Hessian
from lwkd.signals import hessian as module
from lwkd.signals.hessian import TeacherCurvature

Norm = Callable[[int, int], nn.Module]
"""From channels and map size."""


def net(width: int, norm: Norm) -> nn.Sequential:
    """Two smooth stages and a head; images of 4×4."""
    return nn.Sequential(
        OrderedDict(
            low=nn.Sequential(nn.Conv2d(1, width, 2), norm(width, 3), nn.Tanh()),
            high=nn.Sequential(nn.Conv2d(width, width + 1, 2), norm(width + 1, 2), nn.Softplus()),
            head=nn.Sequential(nn.Flatten(), nn.Linear(4 * (width + 1), 3)),
        )
    )


def nets(norm: Norm = lambda *_: nn.Identity()) -> Given:
    torch.manual_seed(0)
    return paired(net(1, norm).double(), net(2, norm).double(), torch.randn(6, 1, 4, 4, dtype=torch.float64))


def assert_mean(found: list[Tensor], exact: Tensor) -> None:
    """The mean of independent measurements is within the standard errors."""
    values = torch.stack(found)
    stderr = values.std(0) / len(found) ** 0.5
    assert ((values.mean(0) - exact).abs() <= STANDARD_ERRORS * stderr + CURVATURE[torch.float64]).all()
    assert (stderr < 0.3 * exact.abs().max()).all(), "too noisy to say anything"


def squared(out: Tensor, target: Tensor) -> Tensor:
    return (out - target).square().mean()


@pytest.mark.parametrize(
    "options",
    [{"curvature": "ggn"}, {"curvature": "hessian"}, {"curvature": "hessian", "loss": squared}],
    ids=["ggn", "hessian", "loss"],
)
def test_curvature_per_parameter_is_the_exact_one(options: dict[str, Any]) -> None:
    student, teacher, _, x = given = nets()
    target = teacher(x).detach()
    criterion = options.get("loss", lambda z, target: F.cross_entropy(z, target.softmax(-1)))
    found = [Hessian(probes=16, **options).measure(*given, seed=seed) for seed in range(40)]
    assert found[0].shape == (2, 2)
    assert found[0].dtype == torch.float64
    for column, model in enumerate((student, teacher)):
        if options["curvature"] == "ggn":
            matrix = curved.ggn(model, x)
        else:
            matrix = curved.hessian(model, x, lambda z: criterion(z, target))
        assert_mean([statistics[:, column] for statistics in found], curved.per_parameter(matrix, model))


def test_both_curvatures_of_the_teacher_are_the_same_and_those_of_the_student_are_not() -> None:
    """Against its own softmax the teacher has no residual, and the residual is all that sets the two apart."""
    student, teacher, _, x = nets()
    p = torch.softmax(teacher(x).detach(), -1)
    whole, gauss_newton = curved.hessian(teacher, x, lambda z: F.cross_entropy(z, p)), curved.ggn(teacher, x)
    assert_close(whole, gauss_newton, CURVATURE[torch.float64])
    apart = curved.hessian(student, x, lambda z: F.cross_entropy(z, p)) - curved.ggn(student, x)
    assert apart.abs().max() > 0.01


def test_half_precision_is_measured_in_float32() -> None:
    student, teacher, pairing, x = nets()
    for model in (student, teacher):
        model.bfloat16()
    for curvature in ("hessian", "ggn"):
        signal = Hessian(curvature=curvature)
        half = signal.measure(student, teacher, pairing, x.bfloat16())
        single = [copy.deepcopy(model).float() for model in (student, teacher)]
        assert torch.equal(half, signal.measure(*single, pairing, x.bfloat16().float()))


NORMS: dict[str, Norm] = {
    "none": lambda *_: nn.Identity(),
    "batch": lambda width, _: nn.BatchNorm2d(width),
    "batch in eval mode": lambda width, _: nn.BatchNorm2d(width).eval(),
    "instance": lambda width, _: nn.InstanceNorm2d(width, affine=True),
    "layer": lambda _, size: nn.LayerNorm([size, size]),
    "group": lambda width, _: nn.GroupNorm(1, width),
}


@pytest.mark.parametrize("norm", NORMS)
def test_second_derivatives_of_the_maps_along_the_input(norm: str) -> None:
    """Against a second difference of maps that are written out here."""
    student, teacher, _, x = given = nets(NORMS[norm])
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    found = Hessian("input", probes=2).measure(*given, seed=5)
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())

    def maps(model: nn.Sequential, x: Tensor) -> list[Tensor]:
        low = model.low(x)
        squares = [f.square().sum(1).flatten(1) for f in (low, model.high(low))]
        return [s / s.sum(1, keepdim=True) for s in squares]

    expected, step = torch.zeros(2, 4, dtype=torch.float64), 1e-4
    for probe in range(2):
        (tangent,) = ops.rademacher([x], 5 + probe)
        curvatures = []
        with torch.no_grad():
            for model in (student, teacher):
                behind, here, ahead = (maps(model, x + s * step * tangent) for s in (-1, 0, 1))
                curvatures.append([(a - 2 * h + b) / step**2 for b, h, a in zip(behind, here, ahead, strict=True)])
        for layer, (a, b) in enumerate(zip(*curvatures, strict=True)):
            expected[layer] += torch.stack([(a * a).sum(), (b * b).sum(), (a * b).sum(), (a - b).square().sum()])
    assert_close(found, expected / (2 * len(x)), SECOND_DIFFERENCE)
    assert Hessian("input").divergence(found).gt(0).all()


def test_a_layer_without_parameters_has_no_curvature_and_no_distance() -> None:
    student, teacher, _, x = nets()
    pairing = lwkd.pair(student, teacher, x, layers={"low.0": "low.0", "low.2": "low.2", "high": "high"})
    signal = Hessian()
    found = signal.measure(student, teacher, pairing, x)
    assert found[1].tolist() == [0.0, 0.0]
    assert (signal.divergence(found) > 0).tolist() == [True, False, True]


def test_identical_nets_read_near_zero_because_traces_are_averaged_first() -> None:
    """With the same seed exactly 0; with noise of its own on either side, far below the mean of the single ratios."""
    _, teacher, _, x = nets()
    given = paired(copy.deepcopy(teacher), teacher, x)
    signal, memory, policy = Hessian(), TeacherCurvature(2, 1e-9), lwkd.Relative()
    assert signal.divergence(signal.measure(*given)).tolist() == [0.0, 0.0]
    state, singles = policy.start(2, 2), []
    for k in range(200):
        one, other = (signal.measure(*given, seed=seed) for seed in (2 * k, 2 * k + 1))
        statistics = torch.stack([one[:, 0], other[:, 1]], 1)
        singles.append(signal.divergence(statistics))
        state = policy.update(state, memory.fold(statistics).float(), signal.ratio)
    assert float(state.divergences.max()) < 0.5 * float(torch.stack(singles).mean())
    assert float(state.divergences.max()) < 0.15


def fed(memory: TeacherCurvature, values: Tensor) -> list[Tensor]:
    """Fold one measurement of the teacher after another; those without the teacher lie between them."""
    found = []
    for h in values:
        while memory.at_hand is not None and memory.known is None:
            memory.fold(torch.stack([torch.zeros_like(memory.mean), memory.at_hand], 1))
        found.append(memory.fold(torch.stack([torch.zeros_like(h), h], 1)))
    return found


def test_the_teachers_memory_is_the_mean_with_its_standard_error() -> None:
    values = 2 + torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    memory = TeacherCurvature(3, 1e-6)
    assert memory.stderr.isinf().all()
    for count, statistics in enumerate(fed(memory, values), 1):
        assert_close(statistics[:, 1], values[:count].mean(0), CURVATURE[torch.float64])
        assert statistics[:, 0].eq(0).all()
    assert memory.known is None
    assert_close(memory.stderr, values.std(0) / 20**0.5, CURVATURE[torch.float64])


def test_it_settles_when_every_layer_is_known_well_enough_and_not_before_eight() -> None:
    memory = TeacherCurvature(2, 0.1)
    fed(memory, torch.full((7, 2), 3.0))
    assert memory.known is None, "seven equal values may be chance"
    fed(memory, torch.full((1, 2), 3.0))
    assert torch.equal(memory.known, torch.full((2,), 3.0).double())
    noisy = torch.tensor([[1.0, 0.0], [1.0, 4.0]]).repeat(200, 1)
    memory = TeacherCurvature(2, 0.1)
    needed = next(
        count for count in range(1, 400) if fed(memory, noisy[count - 1 : count]) and memory.known is not None
    )
    # Deviations of 2 about a mean of 2: the error of the mean is a tenth of it when n − 1 reaches 100.
    assert 100 <= needed <= 102
    fed(memory, torch.full((1, 2), 50.0))
    assert memory.count == needed, "nothing moves it any more"


def test_after_the_first_the_teacher_is_measured_one_time_in_four_until_it_settles() -> None:
    memory, measured = TeacherCurvature(1, 1e-9), []
    for number in range(20):
        if memory.at_hand is None:
            measured.append(number)
        memory.fold(torch.tensor([[0.0, float(number % 3 + 1)]], dtype=torch.float64))
    assert measured == [0, 1, 2, 3, 7, 11, 15, 19], "the first updates would pay for it, were it measured in a row"
    assert memory.count == len(measured)
    resumed = TeacherCurvature(1, 1e-9)
    resumed.load_state_dict(memory.state_dict())
    assert resumed.rests == memory.rests > 0
    assert torch.equal(resumed.at_hand, memory.mean)


def test_what_is_not_finite_is_not_remembered() -> None:
    memory = TeacherCurvature(2, 0.1)
    fed(memory, torch.ones(3, 2))
    memory.rests = 0  # the next one takes in the teacher
    for bad in (float("nan"), float("inf")):
        statistics = torch.tensor([[1.0, 1.0], [1.0, bad]], dtype=torch.float64)
        assert memory.fold(statistics) is statistics
        assert memory.count == 3
    found = memory.fold(torch.tensor([[float("nan"), 5.0], [1.0, 5.0]], dtype=torch.float64))
    assert memory.count == 4, "the student's trouble is not the teacher's"
    assert found[:, 1].tolist() == [2.0, 2.0]


def test_a_settled_teacher_is_not_measured_again_and_stays_settled_over_a_resume(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured: Counter[int] = Counter()
    estimate = module.ggn_of

    def counting(functional: FunctionalModule, *args: Any, **options: Any) -> lwkd.TraceEstimate:
        measured[id(functional.net)] += 1
        return estimate(functional, *args, **options)

    monkeypatch.setattr(module, "ggn_of", counting)
    student, teacher, optimizer, shown = watched(signal=Hessian(tolerance=1e9), every=1)
    monkeypatch.setattr(TeacherCurvature, "EAGER", TeacherCurvature.AT_LEAST)
    train(optimizer, student, teacher, 12)
    assert (measured[id(student)], measured[id(teacher)]) == (12, TeacherCurvature.AT_LEAST)
    state = through_a_file(optimizer.state_dict())
    student, teacher, optimizer, resumed = watched(signal=Hessian(tolerance=1e9), every=1)
    optimizer.load_state_dict(state)
    assert torch.equal(resumed._rates.teacher.known, shown._rates.teacher.known)
    train(optimizer, student, teacher, 2)
    assert (measured[id(student)], measured[id(teacher)]) == (2, 0)
    assert all(error > 0 for error in resumed.standard_errors.values())


def test_a_known_teacher_is_taken_at_its_word() -> None:
    given = nets()
    calls: list[int] = []
    given[1].register_forward_hook(lambda *_: calls.append(1))
    known = torch.tensor([3.0, 4.0])
    found = Hessian().measure(*given, known=known)
    assert torch.equal(found[:, 1], known.double())
    assert torch.equal(found[:, 0], Hessian().measure(*given)[:, 0])
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wrt": "output"}, "wrt is 'output'; expected one of parameters, input"),
        ({"curvature": "fisher"}, "curvature is 'fisher'; expected one of hessian, ggn"),
        ({"probes": 0}, "probes is 0; expected a whole number of at least 1"),
        ({"samples": 1.5}, "samples is 1.5; expected a whole number"),
        ({"loss": F.mse_loss}, "goes with wrt='parameters' and curvature='hessian'; found 'parameters', 'ggn'"),
        ({"loss": F.mse_loss, "wrt": "input"}, "found 'input', 'ggn'"),
        ({"curvature": "hessian", "wrt": "input"}, "curvature is 'hessian'; with wrt='input' the maps are curved"),
        ({"tolerance": 0.0}, "tolerance is 0.0; expected a positive number"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Hessian(**options)


def test_outputs_without_classes_are_refused_and_a_mapping_of_them_is_not() -> None:
    student, teacher, pairing, x = nets()
    expected = {c: Hessian(curvature=c).measure(student, teacher, pairing, x) for c in ("hessian", "ggn")}
    plain = nn.Sequential.forward
    for curvature in ("hessian", "ggn"):
        signal = Hessian(curvature=curvature)
        for model in (student, teacher):
            model.forward = lambda x, model=model: {"mask": torch.ones(1).long(), "logits": plain(model, x)}
        assert torch.equal(signal.measure(student, teacher, pairing, x), expected[curvature])
        for output, found in ((lambda z: z[:, 0], r"shape \(6,\)"), (lambda z: "text", "no tensor")):
            for model in (student, teacher):
                model.forward = lambda x, model=model, output=output: output(plain(model, x))
            with pytest.raises(ValueError, match=rf"gives {found}; expected logits \(..., classes\)"):
                signal.measure(student, teacher, pairing, x)
    teacher.forward = lambda x: plain(teacher, x)[:, :2]
    student.forward = lambda x: plain(student, x)
    with pytest.raises(ValueError, match=r"student gives shape \(6, 3\), the teacher \(6, 2\)"):
        Hessian(curvature="hessian").measure(student, teacher, pairing, x)
