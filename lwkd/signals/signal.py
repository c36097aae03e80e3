"""What all signals have in common, and what tells them apart (legend: L layers, S statistics of a layer)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lwkd.pairing.pairs import Pairing
from lwkd.reference import Ratio
from lwkd.signals.teacher_curvature import TeacherCurvature


@dataclass(frozen=True)
class RowShare:
    """Rows that are measured as a share of the batch: one in so many, but not fewer than so many, nor more.

    >>> some = RowShare(one_in=8, least=4, most=16)
    >>> [some.of(batch) for batch in (2, 32, 64, 512)]
    [2, 4, 8, 16]
    """

    one_in: int
    least: int
    most: int | None = None

    def of(self, batch: int) -> int:
        """Rows of a batch of this size."""
        rows = max(self.least, batch // self.one_in)
        return min(batch, rows if self.most is None else min(rows, self.most))


Samples = int | RowShare | None
"""Rows of a batch that are measured: a number, a share, or None for all."""


def rows_of(samples: Samples, batch: int) -> int:
    """Rows that are measured of a batch of this size.

    >>> rows_of(16, 8), rows_of(None, 8), rows_of(RowShare(one_in=4, least=1), 8)
    (8, 8, 2)
    """
    if isinstance(samples, RowShare):
        return samples.of(batch)
    return batch if samples is None else min(batch, samples)


def check_counts(probes: int, samples: int | RowShare) -> None:
    """Check the options of signals that make passes of their own.

    Raises:
        ValueError: one is not a whole number of at least 1, or a share of the rows.
    """
    for what, count in (("probes", probes), ("samples", samples)):
        if what == "samples" and isinstance(count, RowShare):
            continue
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{what} is {count!r}; expected a whole number of at least 1")


@runtime_checkable
class Signal(Protocol):
    """What rates, the optimizer and the program ask of a signal; any object with these members is one."""

    @property
    def name(self) -> str:
        """The name by which ``signal=`` and saved states call it."""

    @property
    def source(self) -> str:
        """``"features"`` or ``"probabilities"`` of the training loop's own passes, or ``"passes"`` of the signal."""

    @property
    def replays(self) -> bool:
        """Whether the signal makes passes of its own on rows of the batch, so that a measurement is a random sample.

        False: it is measured on the features of the training loop's own passes.
        """

    @property
    def statistics(self) -> int:
        """S."""

    @property
    def ratio(self) -> Ratio:
        """How a divergence is formed from the statistics."""

    @property
    def measured(self) -> str:
        """Names the measured quantity: a saved average is continued only by measurements of the same one."""

    @property
    def every(self) -> int:
        """Updates from one measurement to the next on a CPU, unless the user gives an interval."""

    @property
    def every_on_gpu(self) -> int:
        """The same where the nets are on another device.

        A few rows take a CPU a part of a step, and a GPU, which waits for its launches, as long as a whole batch.
        """

    @property
    def momentum(self) -> float:
        """Weight of the past in the average of the statistics, unless the user gives a policy."""

    @property
    def samples(self) -> Samples:
        """Rows of the batch that are measured, the first ones, unless the user gives a number; None is all of them."""

    def measure(self, *args: Any, **kwargs: Any) -> Tensor:
        """Statistics ``(L, S)``, without a gradient.

        From the features of both nets, ``(student, teacher)``; or, where the signal :attr:`replays`, from the nets
        themselves, ``(student, teacher, pairing, inputs, teacher_inputs=None, *, seed=0)``. A signal with a
        :meth:`memory` also takes ``known``: the teacher's statistics that the memory has at hand, or None.
        """

    def divergence(self, statistics: Tensor) -> Tensor:
        """Divergence ``(L,)`` of averaged statistics ``(L, S)``."""

    def check(
        self, student: nn.Module, teacher: nn.Module, pairing: Pairing, inputs: Any, teacher_inputs: Any, *, seed: int
    ) -> None:
        """Before the first measurement, where the signal :attr:`replays`: can these nets be measured?

        Raises:
            RuntimeError: they cannot; the layer is named.
        """

    def memory(self, layers: int) -> TeacherCurvature | None:
        """What is remembered of the frozen teacher from measurement to measurement; None for nothing."""


def default_interval(signal: Signal, device: torch.device) -> int:
    """Updates from one measurement of nets on this device to the next, unless the user gives an interval.

    >>> from lwkd.signals import Jacobian
    >>> [default_interval(Jacobian(), torch.device(kind)) for kind in ("cpu", "cuda")]
    [10, 250]
    """
    return signal.every if device.type == "cpu" else signal.every_on_gpu
