"""Our rules of forward mode against torch's own, in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import VALUE
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from lwkd.signals.forward_mode import ExplicitNorms, JointForwardMode, ReplacedFunctions


class Unlike(nn.Module):
    """Calls the functions in other ways than torch's modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 3, 3)), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv1d(input=x, weight=self.weight, bias=self.bias, padding="same", dilation=2)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d by keywords": (Unlike, (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 6, 3, stride=2, padding=1), (2, 3, 7, 7)),
    "conv2d, groups, no bias": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (2, 4, 5, 6)),
    "conv2d, circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 5, 5)),
    "conv2d without rows": (lambda: nn.Conv2d(3, 4, 3), (3, 5, 5)),
    "conv2d, then in place": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)), (2, 3, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 3, 5)),
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "linear of tokens": (lambda: nn.Linear(5, 4, bias=False), (2, 7, 5)),
    "linear without rows": (lambda: nn.Linear(5, 4), (5,)),
    "batch norm": (lambda: nn.BatchNorm2d(3), (4, 3, 5, 5)),
    "batch norm of vectors": (lambda: nn.BatchNorm1d(6), (5, 6)),
    "batch norm, not affine": (lambda: nn.BatchNorm2d(3, affine=False), (4, 3, 2, 2)),
    "batch norm of the batch only": (lambda: nn.BatchNorm3d(2, track_running_stats=False), (3, 2, 2, 3, 2)),
    "batch norm, then in place": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU6(inplace=True)), (4, 3, 5, 5)),
}


def made(name: str, train: bool) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, shape = NETS[name]
    net = make().double().train(train)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return net, 3 + torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


def jvp(call: Callable[[Tensor], Tensor], x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), forward_ad.dual_level():
        found = forward_ad.unpack_dual(call(forward_ad.make_dual(x.clone(), t.clone())))
        assert found.tangent is not None
        return found.primal.clone(), found.tangent.clone()


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETS)
def test_rules_are_those_of_torch(name: str, train: bool) -> None:
    net, x, t = made(name, train)
    expected = jvp(net, x, t)
    again = made(name, train)[0]
    with JointForwardMode():
        found = jvp(again, x, t)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= VALUE[torch.float64] * other.norm()
        assert one.stride() == other.stride()
    for one, other in zip(again.buffers(), net.buffers(), strict=True):  # running statistics
        assert torch.allclose(one, other, rtol=VALUE[torch.float64])


def test_channels_last_stays() -> None:
    net, x, t = made("conv2d", False)
    net.to(memory_format=torch.channels_last)
    x, t = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, t))
    with JointForwardMode():
        for found in jvp(net, x, t):
            assert found.is_contiguous(memory_format=torch.channels_last)


class Calls(TorchDispatchMode):
    """Counts calls of ATen ops."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "op"), [("conv2d", "convolution"), ("linear of tokens", "mm")])
def test_input_and_tangent_go_together(name: str, op: str) -> None:
    """What the rules are for: torch's own rule takes three calls for a convolution, and two for a linear layer."""
    net, x, t = made(name, False)
    with Calls() as plain:
        jvp(net, x, t)
    with JointForwardMode(), Calls() as calls:
        jvp(net, x, t)
    assert calls.counts[op] == 1 < plain.counts[op]


@pytest.mark.parametrize("name", ["conv2d", "linear", "batch norm"])
def test_what_has_no_tangent_is_left_alone(name: str) -> None:
    net, x, _ = made(name, True)
    expected = made(name, True)[0](x)
    with JointForwardMode(), forward_ad.dual_level():
        assert torch.equal(net(x), expected)


def test_a_weight_that_moves_goes_by_torchs_rule() -> None:
    x, weight, t = (torch.randn(4, 4, dtype=torch.float64) for _ in range(3))
    with JointForwardMode(), forward_ad.dual_level():
        moving = forward_ad.make_dual(weight, t)
        for given in (x, forward_ad.make_dual(x, torch.zeros_like(x))):
            tangent = forward_ad.unpack_dual(nn.functional.linear(given, moving)).tangent
            assert torch.allclose(tangent, x @ t.T)


def test_one_value_a_channel_is_torchs_error() -> None:
    net = nn.BatchNorm1d(3)
    with JointForwardMode(), pytest.raises(ValueError, match="more than 1 value per channel"):
        jvp(net, torch.rand(1, 3), torch.rand(1, 3))


@pytest.mark.parametrize("mode", [JointForwardMode, ExplicitNorms])
def test_a_group_norm_of_channels_last_pictures_has_the_derivatives_of_the_same_pictures_in_order(
    mode: type[ReplacedFunctions],
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.Tanh()).double()
    x, tangent = torch.randn(2, 2, 3, 6, 6, dtype=torch.float64).unbind()

    def along(z: Tensor) -> tuple[Tensor, Tensor]:
        with mode():
            if mode is JointForwardMode:
                with torch.no_grad(), forward_ad.dual_level():
                    return forward_ad.unpack_dual(net(forward_ad.make_dual(z, tangent)))
            first = lambda y: torch.func.jvp(net, (y,), (tangent,))[1]  # noqa: E731
            return torch.func.jvp(first, (z,), (tangent,))

    expected, found = along(x), along(x.contiguous(memory_format=torch.channels_last))
    for ordered, last in zip(expected, found, strict=True):
        torch.testing.assert_close(last, ordered, rtol=VALUE[torch.float64], atol=VALUE[torch.float64])
