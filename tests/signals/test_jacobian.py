"""The Jacobian signal against the exact Jacobian, and its estimators against each other, on small nets."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from tolerances import (
    DIFFERENCE_RELU,
    DIFFERENCE_SMOOTH,
    STANDARD_ERRORS,
    VALUE,
    assert_close,
)
from torch import Tensor, nn
from toy import weights

import lwkd
from lwkd import reference
from lwkd.nets.hooks import FeatureHooks
from lwkd.pairing.pairs import layouts_of
from lwkd.signals import Jacobian, estimators
from lwkd.signals.measured_net import measured_nets

ESTIMATORS = ("jvp", "difference", "vjp", "output")


def conv(
    width: int, activation: Callable[[], nn.Module] = nn.Tanh, *, norm: bool = False, stride: int = 2
) -> nn.Module:
    """Two stages and a head for pictures ``(B, 1, 6, 6)``."""

    def stage(before: int, after: int, stride: int) -> nn.Sequential:
        normed = [nn.BatchNorm2d(after)] if norm else []
        return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), *normed, activation())

    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width + 1, 3))
    return nn.Sequential(OrderedDict(low=stage(1, width, 1), high=stage(width, width + 1, stride), head=head))


class Block(nn.Module):
    """One transformer block on tokens ``(B, 5, 3)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.low = nn.Linear(3, width)
        self.high = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, "gelu", batch_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.high(self.low(x)).mean(1))


Trio = tuple[nn.Module, nn.Module, Tensor]


def conv_nets() -> Trio:
    """Other channels and other sizes: the teacher keeps the full size in its second stage."""
    torch.manual_seed(0)
    return conv(2).double().eval(), conv(3, stride=1).double().eval(), torch.rand(2, 1, 6, 6).double()


def batch_norm_nets() -> Trio:
    torch.manual_seed(1)
    return conv(2, norm=True).double(), conv(3, norm=True).double(), torch.rand(2, 1, 4, 4).double()


def token_nets() -> Trio:
    torch.manual_seed(2)
    return Block(4).double(), Block(6).double(), torch.randn(2, 5, 3).double()


NETS = pytest.mark.parametrize("nets", [conv_nets, batch_norm_nets, token_nets], ids=lambda make: make.__name__)


def paired(nets: Trio) -> lwkd.Pairing:
    return lwkd.pair(*nets, layers={"low": "low", "high": "high"})


def maps_of(nets: Trio, pairing: lwkd.Pairing, side: int, state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """Maps of all layers as a function of parameters and input, in plain PyTorch; no buffer of the net is written."""
    sizes = []
    for one, other in zip(pairing, layouts_of(pairing)[0], strict=True):
        both = one.student_layout.shape(one.student_shape), one.teacher_layout.shape(one.teacher_shape)
        assert other is one.student_layout
        sizes.append(tuple(min(s, t) for s, t in zip(both[0][2:], both[1][2:], strict=True)))
    layers = (pairing.student_layers, pairing.teacher_layers)[side]
    hooked = FeatureHooks(nets[side], layers, layouts_of(pairing)[side], "net", detach=False)
    buffers = {name: buffer.clone() for name, buffer in nets[side].named_buffers()}
    torch.func.functional_call(nets[side], {**buffers, **state}, (x,))
    features = hooked.features()
    hooked.close()
    return reference.attention_maps(features, sizes=sizes)


def jacobians(nets: Trio, pairing: lwkd.Pairing, side: int) -> list[Tensor]:
    """Exact Jacobian of each layer's maps of the whole batch in the whole input, as a matrix."""
    x = nets[2]
    state = {name: p.detach() for name, p in nets[side].named_parameters()}
    found = torch.func.jacrev(lambda x: tuple(maps_of(nets, pairing, side, state, x)))(x)
    return [j.reshape(-1, x.numel()) for j in found]


def quadratic(one: Tensor, other: Tensor, probes: int) -> tuple[Tensor, Tensor]:
    """Mean and standard error over ``probes`` random signs v of ``vᵀMv``, with M the symmetric part of oneᵀ other."""
    M = one.T @ other
    M = (M + M.T) / 2
    variance = 2 * (M.square().sum() - M.diagonal().square().sum())
    return M.trace(), (variance / probes).sqrt()


def assert_converged(statistics: Tensor, a: list[Tensor], b: list[Tensor], rows: int, probes: int) -> None:
    """Every sum is within a few of its own standard errors, which fall with the root of the number of probes."""
    for layer, (j, k) in enumerate(zip(a, b, strict=True)):
        for column, (one, other) in enumerate(((j, j), (k, k), (j, k), (j - k, j - k))):
            expected, error = quadratic(one, other, probes)
            off = (statistics[layer, column] * rows - expected).abs()
            assert off <= STANDARD_ERRORS * error + VALUE[torch.float64] * (j.norm() + k.norm()) ** 2


@NETS
@pytest.mark.parametrize("estimator", ["jvp", "vjp"])
def test_probes_converge_to_the_exact_jacobian(nets: Callable[[], Trio], estimator: str) -> None:
    trio = nets()
    pairing = paired(trio)
    a, b = (jacobians(trio, pairing, side) for side in (0, 1))
    if estimator == "vjp":  # the random signs are on the side of the maps
        a, b = [j.T for j in a], [j.T for j in b]
    for probes in (64, 1024) if (estimator, nets) == ("jvp", conv_nets) else (16, 128):
        found = Jacobian(estimator=estimator, probes=probes).measure(*trio[:2], pairing, trio[2], seed=5)  # type: ignore[arg-type]
        assert found.dtype == torch.float64
        assert_converged(found, a, b, len(trio[2]), probes)


@NETS
def test_parameters_converge_to_the_exact_norms(nets: Callable[[], Trio]) -> None:
    trio, probes = nets(), 128
    pairing = paired(trio)
    found = Jacobian("parameters", probes=probes).measure(*trio[:2], pairing, trio[2])
    assert found[:, 2:].eq(0).all()
    for side, owned in enumerate(([p.parameters for p in pairing], [p.teacher_parameters for p in pairing])):
        state = {name: p.detach() for name, p in trio[side].named_parameters()}
        for layer, names in enumerate(owned):
            assert names

            def own(given: dict[str, Tensor], side: int = side, layer: int = layer) -> Tensor:
                return maps_of(trio, pairing, side, {**state, **given}, trio[2])[layer]  # noqa: B023

            blocks = torch.func.jacrev(own)({name: state[name] for name in names})
            j = torch.cat([block.flatten(2).flatten(0, 1) for block in blocks.values()], 1).T
            expected, error = quadratic(j, j, probes)
            assert (found[layer, side] * len(trio[2]) - expected).abs() <= STANDARD_ERRORS * error


@NETS
def test_one_forward_mode_pass_is_the_product_with_the_tangent(nets: Callable[[], Trio]) -> None:
    trio = nets()
    pairing = paired(trio)
    tangent = reference.rademacher([trio[2]], 3)[0].flatten()
    found = estimators.jvp(*measured_nets(*trio[:2], pairing, trio[2], None, 0), 3, 2.0)
    for side in (0, 1):
        for moved, j in zip(found[side], jacobians(trio, pairing, side), strict=True):
            assert_close(moved.flatten(), j @ tangent, VALUE[torch.float64])


@pytest.mark.parametrize("activation", [nn.GELU, nn.Tanh])
@pytest.mark.parametrize("norm", [False, True])
def test_difference_is_forward_mode_on_smooth_nets(activation: Callable[[], nn.Module], norm: bool) -> None:
    torch.manual_seed(0)
    student, teacher = conv(3, activation, norm=norm).double(), conv(5, activation, norm=norm).double()
    assert_agree(student, teacher, torch.rand(4, 1, 6, 6).double(), DIFFERENCE_SMOOTH)


@pytest.mark.parametrize("norm", [False, True])
def test_difference_is_near_forward_mode_on_relu_nets(norm: bool) -> None:
    torch.manual_seed(0)
    assert_agree(conv(8, nn.ReLU, norm=norm), conv(16, nn.ReLU, norm=norm), torch.rand(8, 1, 6, 6), DIFFERENCE_RELU)


def assert_agree(student: nn.Module, teacher: nn.Module, x: Tensor, tolerance: float) -> None:
    pair = measured_nets(student, teacher, paired((student, teacher, x)), x, None, 0)
    exact, approximate = estimators.jvp(*pair, 1, 2.0), estimators.difference(*pair, 1, 2.0)
    for side in (0, 1):
        for one, other in zip(approximate[side], exact[side], strict=True):
            assert_close(one, other, tolerance)


@pytest.mark.parametrize("power", [2.0, 1.0])
def test_output_is_the_gradient_by_hand(power: float) -> None:
    student, teacher, x = conv_nets()
    pairing = paired((student, teacher, x))
    gradients = []
    top = teacher(x).argmax(1)
    for net in (student, teacher):
        low = net.low(x)
        high = net.high(low)
        logit = net.head(high)[range(2), top].sum()
        gradients.append(torch.autograd.grad(logit, [low, high]))
    sizes = [reference.common_size(s, t) for s, t in zip(*gradients, strict=True)]
    a, b = (reference.attention_maps(g, power=power, sizes=sizes) for g in gradients)
    found = Jacobian(estimator="output", power=power).measure(student, teacher, pairing, x)
    assert_close(found, reference.jacobian_sums(a, b) / 2, VALUE[torch.float64])


@pytest.mark.parametrize("signal", [*(Jacobian(estimator=e) for e in ESTIMATORS), Jacobian("parameters")], ids=str)  # type: ignore[arg-type]
def test_identical_nets_have_distance_zero(signal: Jacobian) -> None:
    """In train mode, with dropout: tangent and dropped units are the same for both nets, bit for bit."""
    torch.manual_seed(0)
    student = conv(3, nn.ReLU, norm=True)
    student.low.append(nn.Dropout(0.5))
    x = torch.rand(3, 1, 6, 6)
    teacher = copy.deepcopy(student)
    found = signal.measure(student, teacher, paired((student, teacher, x)), x, seed=4)
    assert torch.equal(found[:, 0], found[:, 1])
    assert found[:, 0].gt(0).all()
    assert found[:, 3].eq(0).all()
    assert signal.divergence(found).eq(0).all()


def test_statistics_are_means_over_rows() -> None:
    student, teacher, x = conv_nets()
    pairing = paired((student, teacher, x))
    a, b = estimators.jvp(*measured_nets(student, teacher, pairing, x, None, 0), 6, 2.0)
    found = Jacobian().measure(student, teacher, pairing, x, seed=6)
    assert_close(found, reference.jacobian_sums(a, b) / 2, VALUE[torch.float64])
    # In eval mode rows know nothing of each other, and the first signs are the same for any number of rows.
    alone, _ = estimators.jvp(*measured_nets(student, teacher, pairing, x[:1], None, 0), 6, 2.0)
    for one, both in zip(alone, a, strict=True):
        assert_close(one, both[:1], VALUE[torch.float64])


@pytest.mark.parametrize("signal", [*(Jacobian(estimator=e) for e in ESTIMATORS), Jacobian("parameters")], ids=str)  # type: ignore[arg-type]
def test_probes_are_averaged_and_seeds_reproduce(signal: Jacobian) -> None:
    student, teacher, x = conv_nets()
    given = (student, teacher, paired((student, teacher, x)), x)
    three = Jacobian(signal.wrt, signal.estimator, probes=3)
    before = weights(student)
    singles = [signal.measure(*given, seed=seed) for seed in (7, 8, 9)]
    assert_close(three.measure(*given, seed=7), torch.stack(singles).mean(0), VALUE[torch.float64])
    assert torch.equal(three.measure(*given, seed=7), three.measure(*given, seed=7))
    assert torch.equal(singles[0], singles[1]) == (signal.estimator == "output")  # which draws nothing
    assert all(torch.equal(before[name], after) for name, after in weights(student).items())


@pytest.mark.parametrize("kind", ["direction", "norm", "relative"])
def test_kinds_are_distances_of_the_same_sums(kind: reference.JacobianKind) -> None:
    student, teacher, x = conv_nets()
    given = (student, teacher, paired((student, teacher, x)), x)
    signal = Jacobian(kind=kind)
    assert signal.ratio == kind
    assert torch.equal(signal.measure(*given), Jacobian().measure(*given))
    found = signal.divergence(signal.measure(*given))
    assert torch.equal(found, reference.jacobian_distance(Jacobian().measure(*given), kind))
    assert found.gt(0).all()


def test_defaults() -> None:
    inward, own = Jacobian(), Jacobian("parameters")
    assert (inward.estimator, inward.ratio, own.estimator, own.ratio) == ("jvp", "direction", "vjp", "norm")
