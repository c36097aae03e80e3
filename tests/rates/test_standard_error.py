"""The standard error of an averaged divergence against the scatter of simulated runs whose truth is constant."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from saved_runs import through_a_file
from tolerances import SPREAD, VALUE, assert_close
from torch import Tensor

from lwkd.rates.standard_error import StandardErrorEstimator
from lwkd.reference import Ratio, divergence_of
from lwkd.signals.hessian import TeacherCurvature

L, RUNS = 50, 200

TRUTH: dict[Ratio, list[float]] = {
    "hessian": [3.0, 1.0],
    "direction": [2.0, 1.5, 1.0, 1.5],
    "norm": [2.0, 1.5, 1.0, 1.5],
    "relative": [2.0, 1.5, 1.0, 1.5],
}
MIXING = torch.tensor(
    [[0.1, 0.0, 0.0, 0.0], [0.05, 0.08, 0.0, 0.0], [0.03, -0.05, 0.06, 0.0], [0.02, 0.02, -0.04, 0.05]],
    dtype=torch.float64,
)
"""Root of the covariance of the statistics: what one measurement's noise is made of."""


def noisy(ratio: Ratio, generator: torch.Generator, layers: int) -> Tensor:
    truth = torch.tensor(TRUTH[ratio], dtype=torch.float64)
    noise = torch.randn(layers, len(truth), dtype=torch.float64, generator=generator)
    return truth + noise @ MIXING[: len(truth), : len(truth)].T


def simulated(ratio: Ratio, momentum: float, measurements: int) -> tuple[StandardErrorEstimator, Tensor]:
    """All runs at once, as layers that know nothing of each other; the spread and the momentum average."""
    generator = torch.Generator().manual_seed(measurements)
    spread = StandardErrorEstimator(L * RUNS, len(TRUTH[ratio]), momentum)
    average = torch.zeros(L * RUNS, len(TRUTH[ratio])).double()
    for count in range(measurements):
        found = noisy(ratio, generator, L * RUNS)
        spread.update(found, average)
        average = found if count == 0 else momentum * average + (1 - momentum) * found
    return spread, average


@pytest.mark.parametrize("measurements", [3, 10, 60])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("ratio", TRUTH)
def test_the_standard_error_is_the_scatter_of_the_divergence(ratio: Ratio, momentum: float, measurements: int) -> None:
    """In the root mean square: its square is unbiased from the third measurement on."""
    spread, average = simulated(ratio, momentum, measurements)
    divergences = divergence_of(average, ratio)
    said = spread.stderr(average, lambda s: divergence_of(s, ratio)).square().mean().sqrt()
    assert abs(math.log(float(said / divergences.std()))) < SPREAD


def test_it_is_small_when_nothing_scatters_and_not_when_the_layer_moves() -> None:
    def run(slope: float) -> Tensor:
        spread, average = StandardErrorEstimator(1, 2, 0.9), torch.zeros(1, 2).double()
        for count in range(30):
            found = torch.tensor([[3.0 + slope * count, 1.0]], dtype=torch.float64)
            spread.update(found, average)
            average = found if count == 0 else 0.9 * average + 0.1 * found
        return spread.stderr(average, lambda s: divergence_of(s, "hessian"))

    assert float(run(0.0)) < 1e-7
    assert float(run(0.1)) > 1e-3


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_teacher_that_is_averaged_elsewhere_keeps_its_own_error(momentum: float) -> None:
    """The teacher's column arrives as a running mean that settles: without its error the sum would be too small."""
    layers, generator = 2000, torch.Generator().manual_seed(0)
    teacher = TeacherCurvature(layers, tolerance=1e9)  # settles at once, after AT_LEAST measurements
    spread, average = StandardErrorEstimator(layers, 2, momentum), torch.zeros(layers, 2).double()
    for count in range(80):
        found = noisy("hessian", generator, layers)
        found[:, 1] = teacher.mean if teacher.known is not None else 1 + 3 * (found[:, 1] - 1)
        found = teacher.fold(found)
        spread.update(found, average)
        average = found if count == 0 else momentum * average + (1 - momentum) * found
    assert teacher.count == TeacherCurvature.AT_LEAST
    scatter = divergence_of(average, "hessian").std()

    def said(elsewhere: Tensor | None) -> Tensor:
        return spread.stderr(average, lambda s: divergence_of(s, "hessian"), elsewhere).square().mean().sqrt()

    own = torch.stack([torch.zeros(layers).double(), teacher.stderr], 1)
    assert abs(math.log(float(said(own) / scatter))) < SPREAD
    assert said(None) < 0.8 * scatter


def test_nan_before_the_third_measurement() -> None:
    for measurements in range(3):
        spread, average = simulated("hessian", 0.9, measurements)
        assert spread.stderr(average, lambda s: divergence_of(s, "hessian")).isnan().all()
    spread, average = simulated("hessian", 0.9, 3)
    assert torch.isfinite(spread.stderr(average, lambda s: divergence_of(s, "hessian"))).all()


def test_weights_of_the_average() -> None:
    """q is the sum of the squared weights that a measurement has in the momentum average."""
    for momentum in (0.0, 0.5, 0.9):
        spread, weights = StandardErrorEstimator(1, 1, momentum), torch.zeros(0).double()
        for count in range(12):
            spread.update(torch.zeros(1, 1), torch.zeros(1, 1))
            new = 1.0 if count == 0 else 1 - momentum
            weights = torch.cat([weights * momentum, torch.tensor([new]).double()])
            assert_close(torch.tensor([spread.weight]), weights.square().sum().view(1), VALUE[torch.float32])


def test_state_round_trip() -> None:
    generator = torch.Generator().manual_seed(3)
    one, average = simulated("norm", 0.9, 5)
    other = StandardErrorEstimator(L * RUNS, 4, 0.9)
    other.load_state_dict(through_a_file(one.state_dict()))
    found: list[Any] = []
    new = noisy("norm", generator, L * RUNS)
    for spread in (one, other):
        spread.update(new, average)
        found.append(spread.stderr(0.9 * average + 0.1 * new, lambda s: divergence_of(s, "norm")))
    assert torch.equal(*found)
