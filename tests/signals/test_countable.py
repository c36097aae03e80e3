"""Every kind of parameter and gradient: counted as its free numbers are, or refused by name."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import curved
import pytest
import torch
import torch.nn.functional as F
from paired_nets import paired
from tolerances import CURVATURE, STANDARD_ERRORS, assert_close
from torch import Tensor, nn

import lwkd
from lwkd import ops
from lwkd.nets.countable import check_countable
from lwkd.signals import Hessian, Jacobian, hutchinson

DOUBLE = CURVATURE[torch.float64]


class Fourier(nn.Module):
    """A layer with complex weights, real outside (B, C, N)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(before, after, 3, dtype=torch.cdouble))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.weight.is_complex() else torch.complex(*self.weight.unbind(-1))
        return torch.fft.irfft(torch.einsum("bif,iof->bof", torch.fft.rfft(x)[..., :3], weight), n=8).tanh()


def fourier(width: int) -> nn.Sequential:
    head = nn.Sequential(nn.Flatten(), nn.Linear(8 * width, 3))
    return nn.Sequential(OrderedDict(low=Fourier(1, width), high=Fourier(width, width), head=head)).double()


def as_reals(net: nn.Sequential) -> nn.Sequential:
    """The same net with two reals for every complex number."""
    real = fourier(net.low.weight.shape[1])
    real.load_state_dict(net.state_dict())
    for layer in (real.low, real.high):
        layer.weight = nn.Parameter(torch.view_as_real(layer.weight.detach()).clone())
    return real


@curved.estimators
def test_complex_parameters_are_their_real_and_imaginary_parts(estimator: Any) -> None:
    torch.manual_seed(0)
    net, x, y = fourier(2), torch.randn(6, 1, 8, dtype=torch.float64), curved.TARGETS
    real = as_reals(net)
    matrix = curved.hessian(real, x) if estimator is lwkd.hessian_trace else curved.ggn(real, x)
    expected = curved.traces(matrix, curved.sizes(real))

    def measured(net: Any) -> Tensor:
        return F.cross_entropy(net(x), y) if estimator is lwkd.hessian_trace else net(x)

    found = estimator(net, measured, probes=600)
    assert ((found.trace - expected).abs() <= STANDARD_ERRORS * found.stderr + DOUBLE).all()
    assert (found.stderr[:2] < 0.5 * expected[:2].abs()).all(), "too noisy to say anything"
    assert_close(estimator(net, measured, probes=2).trace, estimator(real, measured, probes=2).trace, DOUBLE)


@pytest.mark.parametrize("signal", [Hessian(), Hessian(curvature="hessian"), Jacobian("parameters"), Jacobian()])
def test_signals_on_nets_with_complex_parameters_measure_their_reals(signal: Any) -> None:
    torch.manual_seed(0)
    student, teacher, x = fourier(2), fourier(3), torch.randn(3, 1, 8, dtype=torch.float64)
    found = signal.measure(*paired(student, teacher, x))
    expected = signal.measure(*paired(as_reals(student), as_reals(teacher), x))
    assert expected.abs().sum() > 0
    assert_close(found, expected, DOUBLE)


class Words(nn.Module):
    """Token ids (B, 4), two stages."""

    def __init__(self, width: int, sparse: bool) -> None:
        super().__init__()
        self.low = nn.Embedding(7, width, sparse=sparse)
        self.high, self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh()), nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.high(self.low(ids)).mean(1))


def words(sparse: bool) -> tuple[Any, ...]:
    torch.manual_seed(0)
    return paired(Words(2, sparse).double(), Words(3, sparse).double(), torch.randint(7, (5, 4)))


@pytest.mark.parametrize(
    "signal", [Hessian(), Hessian(curvature="hessian"), Jacobian("parameters"), Jacobian(estimator="output")]
)
def test_sparse_gradients_of_token_ids_count_as_dense_ones(signal: Any) -> None:
    expected = signal.measure(*words(sparse=False))
    assert_close(signal.measure(*words(sparse=True)), expected, DOUBLE)
    assert expected[0].abs().sum() > 0, "the embedding itself"


@curved.estimators
def test_sparse_gradients_against_the_exact_matrix(estimator: Any) -> None:
    net, _, _, ids = words(sparse=True)
    dense = words(sparse=False)[0]
    y = torch.tensor([0, 1, 2, 0, 1])

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, y)

    hessian = estimator is lwkd.hessian_trace
    matrix = curved.hessian(dense, ids, loss) if hessian else curved.ggn(dense, ids)
    found = estimator(net, lambda net: loss(net(ids)) if hessian else net(ids), probes=1, seed=5)
    if hessian:
        v = torch.cat([v.flatten() for v in ops.rademacher(curved.parameters(net), hutchinson._key(5, 0))])
        expected = torch.stack([part.sum() for part in (v * (matrix @ v)).split(curved.sizes(net))])
        assert_close(found.trace, expected, DOUBLE)
    else:
        many = estimator(net, lambda net: net(ids), probes=300)
        expected = curved.traces(matrix, curved.sizes(dense))
        assert ((many.trace - expected).abs() <= STANDARD_ERRORS * many.stderr + DOUBLE).all()


def test_parameters_of_eight_bits_are_measured_in_float32() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.to(x.dtype), self.bias)

    torch.manual_seed(0)
    small, x = Scaled(3, 3), torch.randn(4, 3)
    small.weight = nn.Parameter(small.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    wide = nn.Linear(3, 3)
    wide.load_state_dict({"weight": small.weight.float(), "bias": small.bias.detach()})
    found, expected = (lwkd.ggn_trace(net, lambda net: net(x), probes=4) for net in (small, wide))
    assert torch.equal(found.trace, expected.trace)
    assert (found.trace > 0).all()


class Two(nn.Module):
    """Two parameters and logits that depend on both."""

    def __init__(self, one: Tensor, other: Tensor) -> None:
        super().__init__()
        self.one = one if isinstance(one, nn.Parameter) else nn.Parameter(one)
        self.other = other if isinstance(other, nn.Parameter) else nn.Parameter(other)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.one.to_dense() if self.one.is_sparse else self.one).tanh() + self.other.sum()


def _shared() -> Two:
    whole = torch.randn(6, 3)
    return Two(whole[:3], whole[2:5])


def _same_memory() -> Two:
    weight = torch.randn(3, 3)
    return Two(nn.Parameter(weight), nn.Parameter(weight))


REFUSED: dict[str, tuple[Callable[[], Two], str]] = {
    "expanded": (lambda: Two(torch.randn(1, 3).expand(3, 3), torch.randn(2)), r"'one' repeats numbers in memory"),
    "sparse": (lambda: Two(torch.eye(3).to_sparse(), torch.randn(2)), r"'one' is sparse \(torch.sparse_coo\)"),
    "the same memory": (_same_memory, "'one' shares memory with 'other'"),
    "memory in common": (_shared, "'one' shares memory with 'other'"),
    "quantized": (
        lambda: Two(
            torch.randn(3, 3),
            nn.Parameter(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), requires_grad=False),
        ),
        r"'other' is quantized \(torch.qint8\)",
    ),
}


@curved.estimators
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_counted_is_refused_by_name(name: str, estimator: Any) -> None:
    torch.manual_seed(0)
    make, message = REFUSED[name]
    net, x = make(), torch.randn(2, 3)
    before = [p.dequantize().clone() if p.is_quantized else p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=f"model: parameter {message}"):
        estimator(net, lambda net: net(x).sum() if estimator is lwkd.hessian_trace else net(x))
    for old, new in zip(before, net.parameters(), strict=True):
        assert new.grad is None
        assert torch.equal(old.to_dense(), (new.dequantize() if new.is_quantized else new.detach()).to_dense())
    other = "other" if "one" in message.split()[0] and "shares" not in message else None
    if other and name != "quantized":
        found = estimator(
            net, lambda net: net(x).sin().sum() if estimator is lwkd.hessian_trace else net(x), {"b": [other]}
        )
        assert found.trace.isfinite().all(), "what is not asked for does no harm"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Two(*torch.randn(6, 3).split(3)),
        lambda: Two(torch.randn(3, 6)[:, :3], torch.randn(2)),
        lambda: (lambda w: Two(w[:, :3], w[:, 3:]))(torch.randn(3, 6)),
        lambda: Two(torch.randn(3, 3).T, torch.randn(0)),
        lambda: Two(torch.randn(3, 3), torch.randn(0)),
    ],
    ids=["halves", "a part", "interleaved", "transposed", "empty"],
)
def test_views_without_a_number_in_common_are_counted(make: Callable[[], Two]) -> None:
    torch.manual_seed(0)
    net, x = make(), torch.randn(2, 3)
    plain = Two(net.one.detach().clone(), net.other.detach().clone())
    found, expected = (lwkd.ggn_trace(n, lambda n: n(x), probes=3) for n in (net, plain))
    assert_close(found.trace, expected.trace, CURVATURE[torch.float32])
    assert found.trace[0] > 0


@pytest.mark.parametrize("signal", [Hessian(), Jacobian("parameters")])
def test_a_layer_of_integers_only_is_no_flat_layer(signal: Any) -> None:
    class Packed(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randint(-9, 9, (width, 2)).to(torch.int8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.double() / 9).tanh()

    def net(packed: bool) -> nn.Module:
        high: nn.Module = Packed(2) if packed else nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        low = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
        return nn.Sequential(
            OrderedDict(low=low, high=high, head=nn.Sequential(nn.Flatten(), nn.Linear(8, 3)))
        ).double()

    torch.manual_seed(0)
    given = paired(net(False), net(True), torch.randn(2, 4, 3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"layer 'high' of the teacher has no floating-point parameter.*'attention'"):
        signal.measure(*given)


def test_overlaps_of_other_element_types_and_of_empty_parameters() -> None:
    memory = torch.zeros(8)
    shared = {"whole": nn.Parameter(memory), "halves": nn.Parameter(memory.view(torch.bfloat16))}
    with pytest.raises(ValueError, match=r"whole.*halves"):
        check_countable(shared, ["whole"], "the net")
    check_countable({"whole": nn.Parameter(memory), "empty": nn.Parameter(memory[:0])}, ["whole", "empty"], "the net")
