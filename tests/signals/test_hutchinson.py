"""hessian_trace and ggn_trace: every probe against the exact matrix, which parameters count, and no trace left."""

from __future__ import annotations

import copy
import random
from typing import Any

import curved
import pytest
import torch
import torch.nn.functional as F
from tolerances import CURVATURE, STANDARD_ERRORS, assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lwkd
from lwkd import ops
from lwkd.signals import hutchinson

names = pytest.mark.parametrize("name", curved.NETS)
DOUBLE = CURVATURE[torch.float64]


@names
def test_every_probe_is_a_product_with_the_exact_hessian(name: str) -> None:
    case = curved.case(name)
    matrix, like = curved.hessian(case.net, case.x), curved.parameters(case.net)
    expected = []
    for probe in range(3):
        v = torch.cat([v.flatten() for v in ops.rademacher(like, hutchinson._key(7, probe))])
        expected.append(torch.stack([part.sum() for part in (v * (matrix @ v)).split(curved.sizes(case.net))]))
    found = lwkd.hessian_trace(case.net, case.loss, probes=3, seed=7)
    assert found.names == tuple(n for n, _ in case.net.named_parameters())
    assert_close(found.trace, torch.stack(expected).mean(0), DOUBLE)
    assert_close(found.stderr, torch.stack(expected).std(0) / 3**0.5, DOUBLE)


@names
def test_every_probe_is_a_product_with_the_exact_jacobian(name: str) -> None:
    case = curved.case(name)
    j, p = curved.jacobian(case.net, case.x), torch.softmax(copy.deepcopy(case.net)(case.x).detach(), -1)
    expected = []
    for probe in range(3):
        signed = p.sqrt() * ops.rademacher([p], hutchinson._key(7, probe))[0]
        u = (signed - p * signed.sum(-1, keepdim=True)) / len(p) ** 0.5
        pulled = torch.einsum("bkn,bk->n", j, u)
        expected.append(torch.stack([part.square().sum() for part in pulled.split(curved.sizes(case.net))]))
    found = lwkd.ggn_trace(case.net, case.logits, probes=3, seed=7)
    assert_close(found.trace, torch.stack(expected).mean(0), DOUBLE)
    assert (found.trace >= 0).all()


@names
@curved.estimators
def test_the_mean_over_probes_is_the_exact_trace(name: str, estimator: Any) -> None:
    case = curved.case(name)
    found = case.estimate(estimator, probes=200)
    off = (found.trace - case.exact(estimator)).abs()
    assert (off <= STANDARD_ERRORS * found.stderr + DOUBLE).all()


class Ranks(nn.Module):
    """Parameters of rank 0 to 5, an empty one, and one of integers."""

    def __init__(self) -> None:
        super().__init__()
        for rank in range(6):
            self.register_parameter(f"p{rank}", nn.Parameter(torch.randn((2, 3, 1, 2, 2)[:rank])))
        self.empty = nn.Parameter(torch.randn(0, 3))
        self.steps = nn.Parameter(torch.tensor([1]), requires_grad=False)


def test_one_probe_is_exact_for_a_diagonal_hessian_and_parameters_of_any_rank() -> None:
    torch.manual_seed(0)
    net = Ranks()
    found = lwkd.hessian_trace(
        net, lambda net: sum((k + 1) * getattr(net, f"p{k}").square().sum() / 2 for k in range(6)), probes=1
    )
    assert found.names == (*(f"p{k}" for k in range(6)), "empty", "steps")
    assert found.trace.tolist() == [1, 2 * 2, 3 * 6, 4 * 6, 5 * 12, 6 * 24, 0, 0]
    assert found.stderr.isnan().all(), "one probe says nothing about its own error"
    logits = lwkd.ggn_trace(net, lambda net: net.p2 * net.p0 + net.empty.sum(), probes=1)
    assert (logits.trace > 0).tolist() == [True, False, True, False, False, False, False, False]


@curved.estimators
def test_frozen_parameters_are_measured_and_unused_ones_are_exactly_zero(estimator: Any) -> None:
    case = curved.case("conv")
    expected = case.estimate(estimator)
    case.net[0].requires_grad_(False)
    case.net.unused = nn.Linear(2, 2)
    case.net.forward = lambda x: nn.Sequential(*list(case.net)[:6])(x)  # type: ignore[method-assign]
    found = case.estimate(estimator)
    assert torch.equal(found.trace[:6], expected.trace)
    assert found.trace[6:].tolist() == found.stderr[6:].tolist() == [0.0, 0.0]


@curved.estimators
def test_a_tied_parameter_counts_once_under_either_of_its_names(estimator: Any) -> None:
    case = curved.case("tied")
    plain = case.estimate(estimator)
    assert plain.names == ("encoder.weight", "encoder.bias")
    for tied in (["decoder.weight"], ["encoder.weight"], ["decoder.weight", "encoder.weight"]):
        found = case.estimate(estimator, layers={"bias": ["encoder.bias"], "tied": tied})
        assert torch.equal(found.trace, plain.trace.flip(0))
    with pytest.raises(ValueError, match=r"'encoder\.weight' belongs to layers 'a' and 'b'"):
        case.estimate(estimator, layers={"a": ["decoder.weight"], "b": ["encoder.weight"]})


@curved.estimators
@names
def test_layers_are_sums_of_their_parameters(estimator: Any, name: str) -> None:
    case = curved.case(name)
    single = case.estimate(estimator, probes=2, seed=3)
    groups = {"last": list(single.names[1::2]), "none": [], "first": list(single.names[::2])}
    found = case.estimate(estimator, layers=groups, probes=2, seed=3)
    assert found.names == ("last", "none", "first")
    expected = torch.stack([single.trace[1::2].sum(), torch.zeros(()).double(), single.trace[::2].sum()])
    assert_close(found.trace, expected, DOUBLE)
    assert found.stderr[1] == 0


@curved.estimators
def test_some_layers_only(estimator: Any) -> None:
    """The signs are those of another list, so only the diagonal is shared: within the standard errors."""
    case = curved.case("conv")
    found = case.estimate(estimator, layers={"head": ["5.weight"]}, probes=200)
    assert abs(found.trace[0] - case.exact(estimator)[4]) <= STANDARD_ERRORS * found.stderr[0]


@pytest.mark.parametrize(
    "loss", [lambda net: net(torch.ones(2, 4)).sum(), lambda net: torch.ones(1), lambda net: net.weight.sum()]
)
def test_no_curvature_is_exactly_zero(loss: Any) -> None:
    found = lwkd.hessian_trace(nn.Linear(4, 2), loss)
    assert found.trace.tolist() == found.stderr.tolist() == [0.0, 0.0]


def test_logits_that_depend_on_no_parameter_are_exactly_zero() -> None:
    found = lwkd.ggn_trace(nn.Linear(4, 2), lambda net: torch.ones(2, 3))
    assert found.trace.tolist() == found.stderr.tolist() == [0.0, 0.0]
    assert lwkd.ggn_trace(nn.ReLU(), lambda net: torch.ones(2, 3)).names == ()
    assert lwkd.hessian_trace(nn.ReLU(), lambda net: torch.ones(())).trace.shape == (0,)


def test_neighbouring_seeds_share_no_probe() -> None:
    keys = [hutchinson._key(seed, probe) for seed in (*range(-50, 50), 2**63 - 1, -(2**63)) for probe in range(64)]
    assert len(set(keys)) == len(keys)
    case = curved.case("conv")
    traces = [case.estimate(lwkd.hessian_trace, seed=seed).trace for seed in (0, 1, 2**63 - 1)]
    assert not any(torch.equal(traces[0], trace) for trace in traces[1:])
    assert torch.equal(traces[0], case.estimate(lwkd.hessian_trace).trace)


class Everything(nn.Module):
    """What could leave a trace: batch statistics, dropout, Python's and NumPy's streams, checkpointing, hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def _middle(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self._middle, x, use_reentrant=False)
        return self.last(F.dropout(hidden, 0.5, self.training)) * (1 + 0.1 * random.random())


@curved.estimators
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(estimator: Any, fails: bool) -> None:
    torch.manual_seed(0)
    net, x = Everything(), torch.randn(8, 4)
    net.first.requires_grad_(False)
    net.norm.eval()
    net(x).sum().backward()

    def snapshot() -> Any:
        tensors = [t.clone() for t in (*net.state_dict().values(), net.last.weight.grad, torch.get_rng_state())]
        modes = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
        return tensors, (modes, [p.grad is None for p in net.parameters()], random.getstate())

    def function(given: Any) -> Tensor:
        given.norm.train()
        out = given(x)
        if fails:
            raise KeyError("the loss's own error")
        return out.square().sum() if estimator is lwkd.hessian_trace else out

    before = snapshot()
    if fails:
        with pytest.raises(KeyError, match="the loss's own error"):
            estimator(net, function)
    else:
        assert torch.isfinite(estimator(net, function).trace).all()
    after = snapshot()
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1] == after[1]
    assert all(type(p) is nn.Parameter for p in net.parameters())
