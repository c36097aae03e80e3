"""The Jacobian signal against the exact Jacobian, and its estimators against each other, on small nets."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from paired_nets import Given, conv, every_signal, paired
from tolerances import (
    DIFFERENCE_RELU,
    DIFFERENCE_SMOOTH,
    STANDARD_ERRORS,
    VALUE,
    assert_close,
)
from torch import Tensor, nn
from toy import weights

from lwkd import reference
from lwkd.nets.feature_hooks import FeatureHooks
from lwkd.pairing.pairs import layouts_of
from lwkd.signals import Jacobian, estimators
from lwkd.signals.measured_net import measured_nets


class Block(nn.Module):
    """One transformer block on tokens ``(B, 5, 3)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.low = nn.Linear(3, width)
        self.high = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, "gelu", batch_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.high(self.low(x)).mean(1))


def conv_nets() -> Given:
    """Other channels and other sizes: the teacher keeps the full size in its second stage."""
    torch.manual_seed(0)
    return paired(conv(2).double().eval(), conv(3, stride=1).double().eval(), torch.rand(2, 1, 6, 6).double())


def batch_norm_nets() -> Given:
    torch.manual_seed(1)
    return paired(conv(2, norm=True).double(), conv(3, norm=True).double(), torch.rand(2, 1, 4, 4).double())


def token_nets() -> Given:
    torch.manual_seed(2)
    return paired(Block(4).double(), Block(6).double(), torch.randn(2, 5, 3).double())


NETS = pytest.mark.parametrize("nets", [conv_nets, batch_norm_nets, token_nets], ids=lambda make: make.__name__)


def estimated(estimate: estimators.Estimate, given: Given, seed: int) -> estimators.Pair:
    """The derivatives themselves, L of the student and L of the teacher."""
    return estimate(*measured_nets(*given, None, 0), seed, 2.0)


def maps_of(given: Given, side: int, state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """Maps of all layers as a function of parameters and input, in plain PyTorch; no buffer of the net is written."""
    net, pairing, sizes = given[side], given[2], []
    for one, other in zip(pairing, layouts_of(pairing)[0], strict=True):
        both = one.student_layout.shape(one.student_shape), one.teacher_layout.shape(one.teacher_shape)
        assert other is one.student_layout
        sizes.append(tuple(min(s, t) for s, t in zip(both[0][2:], both[1][2:], strict=True)))
    layers = (pairing.student_layers, pairing.teacher_layers)[side]
    hooks = FeatureHooks(net, layers, layouts_of(pairing)[side], "net", detach=False)
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    torch.func.functional_call(net, {**buffers, **state}, (x,))
    features = hooks.features()
    hooks.close()
    return reference.attention_maps(features, sizes=sizes)


def jacobians(given: Given, side: int) -> list[Tensor]:
    """Exact Jacobian of each layer's maps of the whole batch in the whole input, as a matrix."""
    x = given[3]
    state = {name: p.detach() for name, p in given[side].named_parameters()}
    found = torch.func.jacrev(lambda x: tuple(maps_of(given, side, state, x)))(x)
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
def test_probes_converge_to_the_exact_jacobian(nets: Callable[[], Given], estimator: str) -> None:
    given = nets()
    a, b = (jacobians(given, side) for side in (0, 1))
    if estimator == "vjp":  # the random signs are on the side of the maps
        a, b = [j.T for j in a], [j.T for j in b]
    for probes in (64, 1024) if (estimator, nets) == ("jvp", conv_nets) else (16, 128):
        found = Jacobian(estimator=estimator, probes=probes).measure(*given, seed=5)  # type: ignore[arg-type]
        assert found.dtype == torch.float64
        assert_converged(found, a, b, len(given[3]), probes)


@NETS
def test_parameters_converge_to_the_exact_norms(nets: Callable[[], Given]) -> None:
    given, probes = nets(), 128
    pairing, x = given[2:]
    found = Jacobian("parameters", probes=probes).measure(*given)
    assert found[:, 2:].eq(0).all()
    for side, owned in enumerate(([p.parameters for p in pairing], [p.teacher_parameters for p in pairing])):
        state = {name: p.detach() for name, p in given[side].named_parameters()}
        for layer, names in enumerate(owned):
            assert names

            def own(changed: dict[str, Tensor], side: int = side, layer: int = layer) -> Tensor:
                return maps_of(given, side, {**state, **changed}, x)[layer]  # noqa: B023

            blocks = torch.func.jacrev(own)({name: state[name] for name in names})
            j = torch.cat([block.flatten(2).flatten(0, 1) for block in blocks.values()], 1).T
            expected, error = quadratic(j, j, probes)
            assert (found[layer, side] * len(x) - expected).abs() <= STANDARD_ERRORS * error


@NETS
def test_one_forward_mode_pass_is_the_product_with_the_tangent(nets: Callable[[], Given]) -> None:
    given = nets()
    tangent = reference.rademacher([given[3]], 3)[0].flatten()
    found = estimated(estimators.jvp, given, 3)
    for side in (0, 1):
        for product, j in zip(found[side], jacobians(given, side), strict=True):
            assert_close(product.flatten(), j @ tangent, VALUE[torch.float64])


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
    given = paired(student, teacher, x)
    exact, approximate = (estimated(estimate, given, 1) for estimate in (estimators.jvp, estimators.difference))
    for side in (0, 1):
        for one, other in zip(approximate[side], exact[side], strict=True):
            assert_close(one, other, tolerance)


@pytest.mark.parametrize("power", [2.0, 1.0])
def test_output_is_the_gradient_by_hand(power: float) -> None:
    student, teacher, pairing, x = conv_nets()
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


@every_signal
def test_identical_nets_have_distance_zero(signal: Jacobian) -> None:
    """In train mode, with dropout: tangent and dropped units are the same for both nets, bit for bit."""
    torch.manual_seed(0)
    student = conv(3, nn.ReLU, norm=True)
    student.low.append(nn.Dropout(0.5))
    x = torch.rand(3, 1, 6, 6)
    found = signal.measure(*paired(student, copy.deepcopy(student), x), seed=4)
    assert torch.equal(found[:, 0], found[:, 1])
    assert found[:, 0].gt(0).all()
    assert found[:, 3].eq(0).all()
    assert signal.divergence(found).eq(0).all()


def test_statistics_are_means_over_rows() -> None:
    given = conv_nets()
    a, b = estimated(estimators.jvp, given, 6)
    assert_close(Jacobian().measure(*given, seed=6), reference.jacobian_sums(a, b) / 2, VALUE[torch.float64])
    # In eval mode rows know nothing of each other, and the first signs are the same for any number of rows.
    alone, _ = estimated(estimators.jvp, (*given[:3], given[3][:1]), 6)
    for one, both in zip(alone, a, strict=True):
        assert_close(one, both[:1], VALUE[torch.float64])


@every_signal
def test_probes_are_averaged_and_seeds_reproduce(signal: Jacobian) -> None:
    given = conv_nets()
    three = Jacobian(signal.wrt, signal.estimator, probes=3)
    before = weights(given[0])
    singles = [signal.measure(*given, seed=seed) for seed in (7, 8, 9)]
    assert_close(three.measure(*given, seed=7), torch.stack(singles).mean(0), VALUE[torch.float64])
    assert torch.equal(three.measure(*given, seed=7), three.measure(*given, seed=7))
    assert torch.equal(singles[0], singles[1]) == (signal.estimator == "output")  # which draws nothing
    assert all(torch.equal(before[name], after) for name, after in weights(given[0]).items())


@pytest.mark.parametrize("kind", ["direction", "norm", "relative"])
def test_kinds_are_distances_of_the_same_sums(kind: reference.JacobianKind) -> None:
    given = conv_nets()
    signal = Jacobian(kind=kind)
    assert signal.ratio == kind
    assert torch.equal(signal.measure(*given), Jacobian().measure(*given))
    found = signal.divergence(signal.measure(*given))
    assert torch.equal(found, reference.jacobian_distance(Jacobian().measure(*given), kind))
    assert found.gt(0).all()


def test_defaults() -> None:
    by_input, by_parameters = Jacobian(), Jacobian("parameters")
    assert (by_input.estimator, by_input.ratio) == ("jvp", "direction")
    assert (by_parameters.estimator, by_parameters.ratio) == ("vjp", "norm")
