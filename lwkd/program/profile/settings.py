"""What is to be profiled."""

from __future__ import annotations

from dataclasses import dataclass

from lwkd.program.distill.settings import Settings

TARGETS = {"attention": 0.005, "jacobian": 0.03, "hessian": 0.03}
"""Share of a distillation step that a signal may add, where no budget is given."""


@dataclass(frozen=True)
class ProfileSettings:
    """The options of ``lwkd profile``; the fields are their names.

    >>> ProfileSettings("resnet18", "resnet10").budget_of("jacobian")
    0.03
    """

    teacher: str
    student: str
    batch: int = 128
    signal: tuple[str, ...] = tuple(TARGETS)
    every: int | None = None
    samples: int | None = None
    budget: float | None = None
    image_size: int = 32
    channels: int = 3
    classes: int = 10
    inputs: str | None = None
    pair: tuple[str, ...] = ()
    optimizer: str = "sgd"
    amp: str | None = None
    seconds: float = 120.0
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None
    out: str = "runs/profile"
    trace: bool = False

    def budget_of(self, signal: str) -> float:
        """Share of a step that a signal may add."""
        return TARGETS[signal] if self.budget is None else self.budget

    @property
    def training(self) -> Settings:
        """As settings of a training run; the rate is so small that no step changes what the next ones cost."""
        return Settings(optimizer=self.optimizer, lr=1e-3, amp=self.amp, device=self.device)
