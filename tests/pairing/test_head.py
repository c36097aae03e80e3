"""The logits as a last pair: what is compared, which parameters follow, and what is refused."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lwkd
from lwkd.nets.layout import Layout
from lwkd.pairing import PairingError, pair
from lwkd.reference import attention_divergence
from lwkd.signals import Attention, Hessian, Jacobian

X = torch.linspace(-1, 1, 4 * 3 * 8 * 8).view(4, 3, 8, 8).sin()


@dataclass
class Output:
    loss: Tensor
    logits: Tensor


class Net(nn.Module):
    """Two stages and a head, which may be dense, and return its logits in several ways."""

    def __init__(self, width: int, classes: int = 5, dense: bool = False, returns: str = "tensor") -> None:
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.Tanh())
        self.high = nn.Sequential(nn.Conv2d(width, 2 * width, 2, 2), nn.Tanh())
        self.head: nn.Module = nn.Linear(2 * width, classes)
        if dense:
            self.head = nn.Conv2d(2 * width, classes, 1)
        self.dense, self.returns = dense, returns

    def forward(self, x: Tensor) -> Any:
        x = self.high(self.low(x))
        z = self.head(x if self.dense else x.mean((2, 3)))
        if self.returns == "dataclass":
            return Output(z.sum(), z)
        if self.returns == "dict":
            return {"loss": z.sum(), "logits": z, "hidden": x.flatten(1)}
        if self.returns == "doubled":
            return z.repeat(2, 1)
        if self.returns == "cut into three":
            return z.reshape(-1, 5, 3)
        return (z, z.mean()) if self.returns == "tuple" else (z, 2 * z) if self.returns == "two" else z


def nets(dense: bool = False, **options: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return Net(4, dense=dense, **options), Net(6, dense=dense).eval()


def jsd(z_S: Tensor, z_T: Tensor, dim: int = 1) -> float:
    """Mean over rows and positions of the JSD of two softmax outputs, in nats, float64."""
    q, p = (torch.softmax(z.double(), dim) for z in (z_S, z_T))
    m = (q + p) / 2
    each = 0.5 * (torch.xlogy(q, q) - torch.xlogy(q, m) + torch.xlogy(p, p) - torch.xlogy(p, m)).sum(dim)
    return float(each.mean())


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("returns", ["tensor", "dict", "tuple"])
def test_the_rate_of_the_tail_comes_from_the_softmax_outputs(dense: bool, returns: str):
    student, teacher = nets(dense, returns=returns)
    pairing = pair(student, teacher, X, layers={"low": "low", "high": "high"}, head=True)
    assert pairing.head
    assert pairing.names == ("low", "high", "(logits)")
    assert pairing.pairs[-1].parameters == pairing.pairs[-1].teacher_parameters == ("head.weight", "head.bias")
    assert pairing.tail == ()
    optimizer = lwkd.LayerwiseOptimizer(
        torch.optim.SGD(student.parameters(), lr=0.0), student, teacher, pairing, policy=lwkd.Relative()
    )
    z_S = student(X)
    with torch.no_grad():
        z_T = teacher(X)
    z_S = z_S if returns == "tensor" else z_S["logits"] if returns == "dict" else z_S[0]
    z_S.sum().backward()
    optimizer.step()
    found = optimizer.divergences
    assert found["(logits)"] == pytest.approx(jsd(z_S.detach(), z_T), rel=1e-5)
    mean = sum(found.values()) / 3
    assert optimizer.rates["(logits)"] == pytest.approx(min(max(found["(logits)"] / mean, 0.5), 1.5), rel=1e-5)


@pytest.mark.parametrize("shape", [(3, 7), (3, 7, 4), (2, 5, 3, 4), (2, 3, 2, 2, 2)])
def test_the_view_has_the_softmax_for_its_map(shape: tuple[int, ...]):
    torch.manual_seed(0)
    z_S, z_T = 3 * torch.randn(shape, dtype=torch.float64), 3 * torch.randn(shape, dtype=torch.float64)
    first, last = Layout("logits"), Layout("logits_last")
    for layout, turn in ((first, lambda z: z), (last, lambda z: z.movedim(1, -1))):
        views = [layout.view(turn(z)) for z in (z_S, z_T)]
        assert tuple(views[0].shape) == layout.shape(turn(z_S).shape) == (shape[0], 1, math.prod(shape[1:]))
        expected = jsd(z_S, z_T)
        assert float(attention_divergence(views[:1], views[1:])[0]) == pytest.approx(expected, rel=1e-9)
        narrow = [layout.view(turn(z.float())) for z in (z_S, z_T)]
        assert float(lwkd.ops.attention_divergence(narrow[:1], narrow[1:])[0]) == pytest.approx(expected, rel=1e-5)


def test_a_masked_class_has_probability_zero_and_a_finite_derivative():
    z = torch.tensor([[0.0, 1.0, -math.inf]], dtype=torch.float64, requires_grad=True)
    seen = Layout("logits").view(z)
    assert torch.allclose(seen.square()[0, 0], torch.softmax(z, 1)[0])
    (seen * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert torch.isfinite(z.grad).all()
    assert Layout("logits").view(z.half()).dtype == torch.float32


def test_the_jacobian_of_the_head_is_that_of_the_softmax():
    student, teacher = (net.double() for net in nets())
    pairing = pair(student, teacher, X.double(), head=True)
    found = {
        estimator: Jacobian(estimator=estimator).measure(student, teacher, pairing, X.double(), seed=3)[-1]
        for estimator in ("jvp", "difference")
    }
    tangent = lwkd.ops.rademacher([X.double()], 3)[0]
    a, b = (
        torch.func.jvp(lambda x, net=net: torch.softmax(net(x), 1), (X.double(),), (tangent,))[1]
        for net in (student, teacher)
    )
    sums = torch.stack([(a * a).sum(), (b * b).sum(), (a * b).sum(), (a - b).square().sum()]) / 4
    assert torch.allclose(found["jvp"], sums, rtol=1e-6)
    assert torch.allclose(found["difference"], sums, rtol=1e-3)
    assert torch.isfinite(Hessian(wrt="input").measure(student, teacher, pairing, X.double())).all()


def test_the_curvature_of_the_head_is_that_of_its_parameters():
    student, teacher = nets()
    pairing = pair(student, teacher, X, head=True)
    h_S, h_T = Hessian(probes=400).measure(student.eval(), teacher, pairing, X)[-1].tolist()
    for net, h in ((student, h_S), (teacher, h_T)):
        p = torch.softmax(net(X).double(), 1)
        features = net.high(net.low(X)).mean((2, 3)).double()
        exact = ((1 - p.square().sum(1)) * (features.square().sum(1) + 1)).mean()
        assert h * (net.head.weight.numel() + 5) == pytest.approx(exact.item(), rel=0.15)


class Tokens(nn.Module):
    """Logits of every token, the classes last, or turned to be second."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.embed, self.turned = nn.Linear(3, 6), turned
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(6, 2, 6, batch_first=True) for _ in range(2)))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        z = self.head(self.blocks(self.embed(x.flatten(2).transpose(1, 2))))
        return z.transpose(1, 2) if self.turned else z


@pytest.mark.parametrize("turned", [False, True])
def test_the_graph_says_where_the_classes_of_tokens_are(turned: bool):
    net = Tokens(turned)
    head = pair(net, net, X, head=True).pairs[-1]
    assert head.student_layout == Layout("logits" if turned else "logits_last")


def test_the_table_and_the_value():
    pairing = pair(*nets(), X, head=True)
    assert "(logits)" in str(pairing)
    assert "5 (softmax)" in str(pairing)
    assert str(pairing).endswith("100.0 % of 293 parameters follow a pair.")
    assert pickle.loads(pickle.dumps(pairing)) == pairing
    pairing.check(*nets())
    assert not pair(*nets(), X).head


def test_compiled_and_wrapped_nets():
    student, teacher = nets()
    pairing = pair(student, teacher, X, head=True)
    assert pair(nn.DataParallel(student), teacher, X, head=True) == pairing
    compiled = torch.compile(student, backend="eager")
    optimizer = lwkd.LayerwiseOptimizer(torch.optim.SGD(student.parameters(), lr=0.0), compiled, teacher, pairing)
    z_S, z_T = compiled(X), teacher(X).detach()
    z_S.sum().backward()
    optimizer.step()
    assert optimizer.divergences["(logits)"] == pytest.approx(jsd(z_S.detach(), z_T), rel=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (Net(4, 5), Net(4, 7), r"the student \(Net\) gives \(4, 5\), the teacher \(Net\) \(4, 7\)"),
        (Net(4, 5), Net(4, 5, dense=True), r"gives \(4, 5\), the teacher \(Net\) \(4, 5, 4, 4\)"),
        (
            Net(4, 5),
            Net(4, 5, returns="two"),
            r"the teacher \(Net\) gives \[0\] \(4, 5\), \[1\] \(4, 5\); none is called",
        ),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(0)), Net(4), r"the student \(Sequential\) gives"),
        (Net(4, returns="doubled"), Net(4), r"the student \(Net\) gives shape \(8, 5\) for a batch of 4"),
        (Net(4, 15, returns="cut into three"), Net(4), r"gives logits of shape \(4, 5, 3\), whose classes may be"),
    ],
)
def test_no_logits_of_one_shape(student: nn.Module, teacher: nn.Module, expected: str):
    with pytest.raises(PairingError, match=expected) as caught:
        pair(student, teacher, X, head=True)
    assert "out head=True" in str(caught.value)


@pytest.mark.parametrize(
    "signal",
    [Jacobian(estimator="output"), Jacobian(power=3.0), Attention(power=1.0), Attention(source="probabilities")],
    ids=["output", "jacobian power", "power", "probabilities"],
)
def test_signals_that_cannot_measure_logits(signal: Any):
    student, teacher = nets()
    pairing = pair(student, teacher, X, head=True)
    with pytest.raises(ValueError, match="head=True"):
        lwkd.LayerwiseOptimizer(torch.optim.SGD(student.parameters(), lr=0.1), student, teacher, pairing, signal=signal)
    if isinstance(signal, Jacobian):
        with pytest.raises(ValueError, match="head=True"):
            signal.measure(student, teacher, pairing, X)
    pair(student, teacher, X).check_signal(signal)
