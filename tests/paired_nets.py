"""Small nets with two paired stages, ``low`` and ``high``, and the Jacobian signals that are measured on them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lwkd
from lwkd.signals import Jacobian

ESTIMATORS = ("jvp", "difference", "vjp", "output")

every_signal = pytest.mark.parametrize(
    "signal",
    [*(Jacobian(estimator=e) for e in ESTIMATORS), Jacobian("parameters")],  # type: ignore[arg-type]
    ids=lambda signal: f"{signal.wrt}-{signal.estimator}",
)

Given = tuple[nn.Module, nn.Module, lwkd.Pairing, Tensor]
"""What ``measure`` takes: student, teacher, pairing, input."""


def paired(student: nn.Module, teacher: nn.Module, x: Tensor) -> Given:
    """The nets with both of their stages paired."""
    return student, teacher, lwkd.pair(student, teacher, x, layers={"low": "low", "high": "high"}), x


def conv(
    width: int, activation: Callable[[], nn.Module] = nn.Tanh, *, norm: bool = False, stride: int = 2
) -> nn.Module:
    """Two stages and a head for pictures ``(B, 1, 6, 6)``."""

    def stage(before: int, after: int, stride: int) -> nn.Sequential:
        normed = [nn.BatchNorm2d(after)] if norm else []
        return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), *normed, activation())

    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width + 1, 3))
    return nn.Sequential(OrderedDict(low=stage(1, width, 1), high=stage(width, width + 1, stride), head=head))


def conv_nets(activation: Callable[[], nn.Module] = nn.Tanh, width: int = 3) -> tuple[nn.Module, nn.Module, Tensor]:
    """Student and teacher of the same widths with other weights, and two pictures; the same at every call."""
    torch.manual_seed(0)
    return conv(width, activation), conv(width, activation), torch.rand(2, 1, 6, 6)


@torch.library.custom_op("lwkd_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    """Has no rule for forward mode, which PyTorch does not say."""
    return 2 * x


class Twice(nn.Module):
    """Loses the tangent, or only half of it."""

    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + twice(x) if self.branch else twice(x)
