"""Stand-ins for what only a GPU does: deferred copies, reads that would wait, and rates on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import BASES, watched

from lwkd.optimizer import step
from lwkd.rates import layer_rates
from lwkd.rates.device import HostCopy

READS = ("tolist", "item", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy", "__contains__")


@contextmanager
def unread() -> Iterator[None]:
    """Fails where Python takes the value of any tensor: on a GPU it would wait there."""
    kept = {name: getattr(Tensor, name) for name in READS}

    def refuse(name: str) -> Any:
        def read(*_: Any, **__: Any) -> Any:
            raise AssertionError(f"Tensor.{name} reads a value")

        return read

    with pytest.MonkeyPatch.context() as patch:
        for name in kept:
            patch.setattr(Tensor, name, refuse(name))
        yield


class OnCuda(Tensor):
    """Says that it lies on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


class Late(HostCopy):
    """A copy that is pending until somebody asks for it; logs both."""

    log: list[Any]

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.clone())
        tensor.fill_(float("nan"))  # whoever looks at the original sees that it was too early
        self.log.append("launched")

    @property
    def deferred(self) -> bool:
        return True

    def tensor(self) -> Tensor:
        self.log.append("read")
        return super().tensor()


def copies_deferred(patch: pytest.MonkeyPatch) -> list[Any]:
    """Every copy to the host is deferred from now on; returns the log."""
    log: list[Any] = []
    patch.setattr(layer_rates, "HostCopy", type("Logged", (Late,), {"log": log}))
    return log


def staying_on_the_device(patch: pytest.MonkeyPatch) -> None:
    """Tensor learning rates keep the rates beside them, although they are on the CPU."""

    def why_not(groups: list[dict[str, Any]], device: torch.device) -> str | None:
        return None if all(isinstance(group["lr"], Tensor) for group in groups) else "a float"

    patch.setattr(step, "why_on_host", why_not)


def resident(form: str = "wrapper", base: str = "sgd_fused", **options: Any) -> tuple[Any, Any, Any, Any, Tensor]:
    """Student, teacher, the optimizer to step, the object that shows the rates, and the learning rate."""
    rate = torch.tensor(0.02)
    return *watched(form, partial(BASES[base], lr=rate), **options), rate


def held_tensors(shown: Any) -> list[int]:
    """Where the tensors that a captured graph would hold lie."""
    return [tensor.data_ptr() for tensor in shown._rates.store._on_device]
