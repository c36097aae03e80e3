"""The toy nets on a device, and the training loops that the tests of the wrapper compare."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from backends import DEVICE
from torch import Tensor, nn
from toy import batches, loss_of, make, moving, nets

SIGNALS = ("attention", "jacobian", "hessian")

BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    f"{kind.__name__.lower()} {how}": lambda p, kind=kind, how=how, **options: kind(
        p, **{"lr": 0.05 if kind is torch.optim.SGD else 0.01, **HOW[how], **options}
    )
    for kind in (torch.optim.SGD, torch.optim.AdamW)
    for how in ("plain", "foreach", "fused")
}
HOW = {"plain": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


class Run(NamedTuple):
    """Nets, the optimizer to step, the object that shows the rates (by default the same), and the batches to come."""

    student: nn.Module
    teacher: nn.Module
    optimizer: Any
    handle: Any
    device: torch.device

    def batch(self, seed: int, rows: int = 16) -> tuple[Tensor, Tensor]:
        """Pictures and labels on the device."""
        ((x, y),) = batches(1, seed, rows)
        return x.to(self.device), y.to(self.device)

    def backward(self, x: Tensor, y: Tensor) -> None:
        """Both passes, the loss, and its gradients."""
        self.optimizer.zero_grad()
        loss_of(self.student, self.teacher, x, y).backward()

    def step(self, x: Tensor, y: Tensor) -> None:
        """One whole training step."""
        self.backward(x, y)
        self.optimizer.step()

    def shown(self) -> tuple[list[float], list[float]]:
        """Rates and divergences; waits for the device."""
        return list(self.handle.rates.values()), list(self.handle.divergences.values())


def started(
    base: str = "sgd fused",
    device: torch.device = DEVICE,
    *,
    form: str = "wrapper",
    lr: Any = None,
    capturable: bool = False,
    **options: Any,
) -> Run:
    """Nets with the same weights at every call, with lwkd; their rates are far from the policy's limits."""
    student, teacher, pairing = nets()
    student, teacher = student.to(device), teacher.to(device)
    given = ({} if lr is None else {"lr": lr}) | ({"capturable": True} if capturable else {})
    policy = dataclasses.replace(moving(options.get("signal", "attention")), clamp=(0.01, 100.0))
    options = {"every": 1, "policy": policy, **options}
    optimizer, shown = make(form, BASES[base](student.parameters(), **given), student, teacher, pairing, **options)
    return Run(student, teacher, optimizer, shown, device)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Any wait of the host for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def is_noise(name: str) -> bool:
    """A bias in front of a batch norm, whose gradient is nothing but rounding, which Adam blows up to whole steps; and
    the running mean that takes the bias in."""
    return name.endswith(("low.0.bias", "high.0.bias", "running_mean"))


def assert_alike(one: nn.Module, other: nn.Module, tolerance: float) -> None:
    """Weights and buffers, relative to the largest of each tensor."""
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        a, b = a.double().cpu(), b.double().cpu()
        assert is_noise(name) or (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3), name
