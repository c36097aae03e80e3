"""Signals on nets whose logits are dense, wrapped or masked: curvature against the exact matrix of each net."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import curved
import pytest
import torch
import torch.nn.functional as F
from paired_nets import Given, paired
from tolerances import CURVATURE, STANDARD_ERRORS, assert_close
from torch import Tensor, nn

import lwkd
from lwkd import ops
from lwkd.signals import Hessian, Jacobian, hutchinson

DOUBLE = CURVATURE[torch.float64]


class Stages(nn.Module):
    """Two stages, then a head; ``change`` makes of the logits what the net returns."""

    def __init__(self, low: nn.Module, high: nn.Module, head: nn.Module, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.low, self.high, self.head, self.change = low, high, head, change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.head(self.high(self.low(x))))


def pictures(width: int, change: Callable[[Tensor], Any] = lambda z: z) -> Stages:
    """Dense logits (B, 3, 3, 3)."""
    low, high = (nn.Sequential(nn.Conv2d(i, width, 2), nn.Tanh()) for i in (1, width))
    return Stages(low, high, nn.Conv2d(width, 3, 2), change).double()


def sequences(width: int, change: Callable[[Tensor], Any] = lambda z: z) -> Stages:
    """Dense logits (B, 3, 4) of a convolution."""
    low, high = (nn.Sequential(nn.Conv1d(i, width, 2), nn.Tanh()) for i in (2, width))
    return Stages(low, high, nn.Conv1d(width, 3, 1), change).double()


def tokens(width: int, change: Callable[[Tensor], Any] = lambda z: z) -> Stages:
    """Logits (B, 4, 3) of tokens."""
    low, high = (nn.Sequential(nn.Linear(i, width), nn.Tanh()) for i in (2, width))
    return Stages(low, high, nn.Linear(width, 3), change).double()


def rows(width: int, change: Callable[[Tensor], Any] = lambda z: z) -> Stages:
    """Plain logits (B, 3)."""
    low, high = (nn.Sequential(nn.Conv2d(i, width, 2), nn.Tanh()) for i in (1, width))
    return Stages(low, high, nn.Sequential(nn.Flatten(), nn.Linear(4 * width, 3)), change).double()


DENSE: dict[str, tuple[Callable[..., Stages], tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "pictures": (pictures, (2, 1, 6, 6), lambda z: z.movedim(1, -1)),
    "sequences": (sequences, (2, 2, 6), lambda z: z.movedim(1, -1)),
    "tokens": (tokens, (2, 4, 2), lambda z: z),
    "rows": (rows, (5, 1, 4, 4), lambda z: z),
}


def flat(z: Tensor) -> Tensor:
    return z.flatten(0, -2)


def nets(name: str, change: Callable[[Tensor], Any] = lambda z: z) -> Given:
    """Student and teacher, and rows."""
    torch.manual_seed(0)
    make, shape, _ = DENSE[name]
    x = torch.randn(shape, dtype=torch.float64)
    return paired(make(2, change), make(3, change), x)


def exact(net: Stages, name: str, x: Tensor, p: Tensor | None = None) -> Tensor:
    """h of both stages: the Gauss-Newton matrix, or (with a target p) the Hessian, on (rows, classes)."""
    as_rows = DENSE[name][2]
    plain = Stages(net.low, net.high, net.head, lambda z: flat(as_rows(z)))
    matrix = curved.ggn(plain, x) if p is None else curved.hessian(plain, x, lambda z: F.cross_entropy(z, p))
    return curved.per_parameter(matrix, plain)


def assert_mean(measure: Callable[[int], Tensor], expected: Tensor, count: int = 24) -> None:
    values = torch.stack([measure(seed) for seed in range(100, 100 + count)])
    stderr = values.std(0) / count**0.5
    assert ((values.mean(0) - expected).abs() <= STANDARD_ERRORS * stderr + DOUBLE).all()
    assert (stderr < 0.25 * expected.abs().max()).all(), "too noisy to say anything"


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("name", DENSE)
def test_classes_of_dense_logits_are_where_they_are(name: str, curvature: Any) -> None:
    student, teacher, pairing, x = nets(name)
    p = None if curvature == "ggn" else flat(DENSE[name][2](teacher(x))).softmax(-1).detach()
    expected = torch.stack([exact(net, name, x, p) for net in (student, teacher)], 1)
    signal = Hessian(curvature=curvature, probes=16)
    assert_mean(lambda seed: signal.measure(student, teacher, pairing, x, seed=seed), expected)


@pytest.mark.parametrize("name", ["pictures", "sequences", "tokens"])
def test_where_classes_are_does_not_change_a_bit_of_the_trace(name: str) -> None:
    """Against the same net that gives (rows, classes) itself, and the formula written out for one probe."""
    net, _, _, x = nets(name)
    as_rows = DENSE[name][2]
    found = lwkd.ggn_trace(net, lambda net: net(x), probes=1, seed=3)
    by_rows = lwkd.ggn_trace(net, lambda net: flat(as_rows(net(x))), probes=1, seed=3)
    assert_close(found.trace, by_rows.trace, DOUBLE)
    dim = -1 if name == "tokens" else 1
    assert_close(lwkd.ggn_trace(net, lambda net: net(x), classes=dim, probes=1, seed=3).trace, found.trace, DOUBLE)
    z = flat(as_rows(net(x)))
    q = z.detach().softmax(-1)
    # The signs of dense logits are laid out with the classes last.
    signs = flat(ops.rademacher([as_rows(net(x)).detach()], hutchinson._key(3, 0))[0])
    u = (q.sqrt() * signs - q * (q.sqrt() * signs).sum(-1, keepdim=True)) / len(z) ** 0.5
    pulled = torch.autograd.grad(z, list(net.parameters()), u)
    assert_close(found.trace, torch.stack([g.square().sum() for g in pulled]), DOUBLE)


def test_three_dimensions_are_followed_through_the_graph_and_refused_where_it_is_silent() -> None:
    _, _, _, x = nets("tokens")
    for change, dim in (
        (lambda z: z.transpose(1, 2), 1),
        (lambda z: z.log_softmax(-1) * 2, 2),
        (lambda z: z.masked_fill(z > 9, 0.0)[:, 1:], 2),
    ):
        net = tokens(2, change)
        found = lwkd.ggn_trace(net, lambda net: net(x), probes=2)
        assert_close(found.trace, lwkd.ggn_trace(net, lambda net: net(x), classes=dim, probes=2).trace, DOUBLE)
    lost = paired(*(tokens(w, lambda z: torch.bmm(z, torch.eye(3).double().expand(2, 3, 3))) for w in (2, 3)), x)
    for signal in (Hessian(), Hessian(curvature="hessian"), Jacobian(estimator="output")):
        with pytest.raises(
            ValueError, match=r"logits of shape \(2, 4, 3\), whose classes may be .* or last.*output=lambda"
        ):
            signal.measure(*lost)
    by_hand = Hessian(output=lambda z: z.flatten(0, 1)).measure(*lost)
    for net in lost[:2]:
        net.change = flat
    assert_close(by_hand, Hessian().measure(*lost), DOUBLE)
    with pytest.raises(ValueError, match=r"the model gives .* whose classes may be at dimension 1"):
        lwkd.ggn_trace(lost[0], lambda net: net(x).unflatten(0, (2, 4)) @ torch.eye(3).double().expand(2, 3, 3))


@dataclasses.dataclass
class Output:
    logits: Tensor
    loss: Tensor


WRAPPED: dict[str, Callable[[Tensor], Any]] = {
    "labels": lambda z: {"loss": z.square().mean(), "logits": z},
    "dataclass": lambda z: Output(z, z.sum()),
    "model output": lambda z: OrderedDict(loss=z.sum(), logits=z, hidden_states=(z.sin(), z.cos())),
    "tuple": lambda z: (z.sum(), z),
}
SIGNALS = [
    Hessian(),
    Hessian(curvature="hessian"),
    Hessian("input"),
    Jacobian(),
    Jacobian(estimator="output"),
    Jacobian("parameters"),
]


@pytest.mark.parametrize("signal", SIGNALS, ids=lambda s: f"{s.measured}-{getattr(s, 'estimator', '')}")
def test_what_is_around_the_logits_makes_no_difference(signal: Any) -> None:
    expected = signal.measure(*nets("rows"))
    for change in WRAPPED.values():
        assert torch.equal(signal.measure(*nets("rows", change)), expected)
    # The student gets labels and returns a loss; the teacher does not.
    student, teacher, pairing, x = nets("rows")
    student.change = WRAPPED["labels"]
    assert torch.equal(signal.measure(student, teacher, pairing, x), expected)


@pytest.mark.parametrize("choice", ["out", 0, lambda out: out["out"]], ids=["name", "place", "function"])
def test_output_names_the_logits_of_both_nets(choice: Any) -> None:
    def two(z: Tensor) -> dict[str, Tensor]:
        return {"out": z, "aux": z.sin()}

    for curvature in ("ggn", "hessian"):
        expected = Hessian(curvature=curvature).measure(*nets("pictures"))
        assert torch.equal(Hessian(curvature=curvature, output=choice).measure(*nets("pictures", two)), expected)
        with pytest.raises(ValueError, match=r"gives out \(2, 3, 3, 3\), aux \(2, 3, 3, 3\); none is called 'logits'"):
            Hessian(curvature=curvature).measure(*nets("pictures", two))
    expected = Jacobian(estimator="output").measure(*nets("rows"))
    assert torch.equal(Jacobian(estimator="output", output=choice).measure(*nets("rows", two)), expected)
    with pytest.raises(ValueError, match=r"the student gives out .*none is called 'logits'"):
        Jacobian(estimator="output").measure(*nets("rows", two))


def test_a_loss_of_ones_own_gets_what_output_names_or_all() -> None:
    def wrapped(z: Tensor) -> dict[str, Tensor]:
        return {"a": z, "b": z.sin()}

    options: dict[str, Any] = {"curvature": "hessian"}
    expected = Hessian(loss=lambda z, t: (z - t).square().mean(), **options).measure(*nets("rows"))
    named = Hessian(loss=lambda z, t: (z - t).square().mean(), output="a", **options).measure(*nets("rows", wrapped))
    whole = Hessian(loss=lambda z, t: (z["a"] - t["a"]).square().mean(), **options).measure(*nets("rows", wrapped))
    assert torch.equal(named, expected)
    assert torch.equal(whole, expected)


@pytest.mark.parametrize("name", ["pictures", "tokens"])
def test_the_output_gradient_of_dense_logits_is_summed_over_the_positions(name: str) -> None:
    """Against a backward pass written out here."""
    student, teacher, pairing, x = given = nets(name)
    found = Jacobian(estimator="output").measure(*given)
    as_rows = DENSE[name][2]
    top = flat(as_rows(teacher(x))).argmax(-1, keepdim=True)
    maps = []
    for net in (student, teacher):
        low = net.low(x)
        high = net.high(low)
        chosen = flat(as_rows(net.head(high))).gather(1, top).sum()
        squares = [
            g.square().sum(-1 if name == "tokens" else 1).flatten(1) for g in torch.autograd.grad(chosen, [low, high])
        ]
        maps.append([s / s.sum(1, keepdim=True) for s in squares])
    expected = [
        torch.stack([(a * a).sum(), (b * b).sum(), (a * b).sum(), (a - b).square().sum()])
        for a, b in zip(*maps, strict=True)
    ]
    assert len(pairing) == 2
    assert_close(found, torch.stack(expected) / 2, DOUBLE)


# Masked classes


def _added(z: Tensor) -> Tensor:
    mask = torch.zeros(4, dtype=z.dtype)
    mask[1] = float("-inf")
    return _spread(z) + mask


def _spread(z: Tensor) -> Tensor:
    """Room for one class more, which holds a number that nobody may see."""
    return torch.cat([z[:, :1], z[:, 1:2] * 7, z[:, 1:]], 1)


def _filled(z: Tensor) -> Tensor:
    return _spread(z).masked_fill(torch.tensor([False, True, False, False]), float("-inf"))


@pytest.mark.parametrize("masked", [_added, _filled])
def test_masked_classes_are_as_none(masked: Callable[[Tensor], Tensor]) -> None:
    expected = Jacobian(estimator="output").measure(*nets("rows"))
    assert_close(Jacobian(estimator="output").measure(*nets("rows", masked)), expected, DOUBLE)
    student, teacher, pairing, x = nets("rows", masked)
    _, plain_T, _, _ = nets("rows")
    p = plain_T(x).softmax(-1).detach()
    for curvature, target in (("ggn", None), ("hessian", p)):
        expected = torch.stack([exact(net, "rows", x, target) for net in nets("rows")[:2]], 1)
        signal = Hessian(curvature=curvature, probes=16)
        assert_mean(lambda seed, signal=signal: signal.measure(student, teacher, pairing, x, seed=seed), expected)
    # In the teacher only: p = 0 adds nothing, and the class of the student is one of its own.
    student.change = _spread
    for curvature in ("ggn", "hessian"):
        assert Hessian(curvature=curvature).measure(student, teacher, pairing, x).isfinite().all()
    # In the student only.
    student.change, teacher.change = masked, _spread
    for signal in (Hessian(), Hessian(curvature="hessian"), Jacobian(estimator="output")):
        assert signal.measure(student, teacher, pairing, x).isfinite().all()
