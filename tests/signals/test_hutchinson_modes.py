"""hessian_trace and ggn_trace in the settings that callers may be in, and what they refuse."""

from __future__ import annotations

from typing import Any

import curved
import pytest
import torch
import torch.nn.functional as F
from tolerances import CURVATURE, assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lwkd


def small() -> curved.Case:
    """In float32, unlike the other cases."""
    torch.manual_seed(0)
    return curved.Case(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), torch.randn(6, 5))


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@curved.estimators
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_callers_settings_play_no_part(estimator: Any, setting: str) -> None:
    """Backward passes take autocast and inference mode from whoever calls them."""
    case = small()
    expected = case.estimate(estimator)
    with SETTINGS[setting]():
        found = case.estimate(estimator)
    assert torch.equal(found.trace, expected.trace)
    assert torch.equal(found.stderr, expected.stderr)


@curved.estimators
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_in_float32(estimator: Any, dtype: torch.dtype) -> None:
    net, x = case = small()
    net.to(dtype)
    found = case.estimate(estimator)
    net.float()
    assert torch.equal(found.trace, case.estimate(estimator).trace), "to half and back: the same values"
    double = curved.Case(net.double(), x.double()).estimate(estimator)
    assert_close(found.trace, double.trace, CURVATURE[torch.float32])


@curved.estimators
def test_a_wrapped_or_compiled_model_is_measured_inside(estimator: Any) -> None:
    net, x = case = small()
    expected = case.estimate(estimator)
    for wrapper in (nn.DataParallel(net), torch.compile(net, backend="eager")):
        found = curved.Case(wrapper, x).estimate(estimator)
        assert found.names == expected.names
        assert torch.equal(found.trace, expected.trace)


@curved.estimators
def test_checkpointing_changes_nothing(estimator: Any) -> None:
    """The recomputation must find the measured parameters, and not the model's own in half precision."""
    net, x = case = small()
    net.bfloat16()
    expected = case.estimate(estimator)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    assert torch.equal(curved.Case(Checkpointed(), x).estimate(estimator).trace, expected.trace)


def test_a_loss_of_the_models_attributes() -> None:
    case = curved.case("conv")
    expected = lwkd.hessian_trace(case.net, case.loss)
    found = lwkd.hessian_trace(case.net, lambda net: F.cross_entropy(net[5](net[:5](case.x)), curved.TARGETS))
    assert torch.equal(found.trace, expected.trace)
    decay = lwkd.hessian_trace(case.net, lambda net: sum(p.square().sum() for p in net.parameters()), probes=1)
    assert decay.trace.tolist() == [2.0 * p.numel() for p in case.net.parameters()]


def test_logits_for_every_token_count_as_rows() -> None:
    net, _ = small()
    x = torch.randn(3, 2, 5)
    tokens = lwkd.ggn_trace(net, lambda net: net(x), seed=1)
    rows = lwkd.ggn_trace(net, lambda net: net(x.flatten(0, 1)), seed=1)
    assert_close(tokens.trace, rows.trace, CURVATURE[torch.float32])


@curved.estimators
def test_refused_layers_and_probes(estimator: Any) -> None:
    case = small()
    with pytest.raises(ValueError, match=r"model \(Sequential\): no parameter is called '0.gain'"):
        case.estimate(estimator, layers={"a": ["0.weight", "0.gain"]})
    with pytest.raises(ValueError, match=r"'0\.bias' belongs to layers 'a' and 'b'"):
        case.estimate(estimator, layers={"a": ["0.weight", "0.bias"], "b": ["0.bias"]})
    for probes in (0, -1, 2.0):
        with pytest.raises(ValueError, match=f"probes is {probes}; expected a whole number of at least 1"):
            case.estimate(estimator, probes=probes)


def test_refused_losses_and_logits() -> None:
    net, x = small()
    with pytest.raises(ValueError, match=r"the loss returned shape \(6, 3\); expected a scalar tensor"):
        lwkd.hessian_trace(net, lambda net: net(x))
    with pytest.raises(ValueError, match="the loss returned float; expected a scalar tensor"):
        lwkd.hessian_trace(net, lambda net: net(x).sum().item())
    for logits, found in ((lambda net: net(x)[:, 0], r"shape \(6,\)"), (lambda net: net(x)[:, :1], r"shape \(6, 1\)")):
        with pytest.raises(ValueError, match=rf"the model returned {found}; expected logits"):
            lwkd.ggn_trace(net, logits)
    with pytest.raises(ValueError, match="the model returned dict; expected logits"):
        lwkd.ggn_trace(net, lambda net: {"logits": net(x)})


def test_an_op_without_a_second_derivative_is_named_and_ggn_does_without() -> None:
    net, x = small()
    case = curved.Case(nn.Sequential(net[0], nn.Hardsigmoid(), net[2]), x)
    with pytest.raises(
        RuntimeError, match=r"loss of Sequential cannot be differentiated twice.*hardsigmoid.*ggn_trace"
    ):
        case.estimate(lwkd.hessian_trace)
    assert (case.estimate(lwkd.ggn_trace).trace > 0).all()
    assert all(p.grad is None for p in case.net.parameters())
