"""Measurements by passes of the library's own, on a few rows of the last batch: the Jacobian and Hessian signals."""

from __future__ import annotations

from torch import Tensor, nn

from lwkd.nets.inputs import Inputs
from lwkd.pairing import Pairing
from lwkd.signals import Signal

SEEDS_APART = 2**20
"""Distance between the seeds of two updates: more than any number of probes."""


class BatchReplay:
    """Keeps the inputs of the last matched passes, and measures both nets on them.

    Args:
        signal: what is measured; one with ``replays``.
        student: the student.
        teacher: the teacher.
        pairing: which layers.
    """

    def __init__(self, signal: Signal, student: nn.Module, teacher: nn.Module, pairing: Pairing) -> None:
        self.signal, self.student, self.teacher, self.pairing = signal, student, teacher, pairing
        self._latest: tuple[Inputs, Inputs, int] | None = None
        self._checked = False

    def remember(self, student: Inputs, teacher: Inputs, rows: int) -> None:
        """Inputs of a matched pair of passes; they replace those before."""
        self._latest = student, teacher, rows

    def forget(self) -> None:
        """Let go of the inputs."""
        self._latest = None

    def check(self, update: int) -> None:
        """Before the first measurement: whatever the signal checks on these nets.

        Raises:
            RuntimeError: the signal cannot be measured on them; the layer is named.
        """
        if self._latest is not None and not self._checked:
            inputs_S, inputs_T, _ = self._latest
            self.signal.check(self.student, self.teacher, self.pairing, inputs_S, inputs_T, seed=update * SEEDS_APART)
            self._checked = True

    def measure(self, update: int, known: Tensor | None) -> tuple[Tensor, int] | None:
        """Statistics ``(L, S)`` and the rows they were measured on; None where no pass was matched.

        Args:
            update: number of the update, which gives the seed of the probes: a resumed run draws the same ones.
            known: curvature of the teacher ``(L,)``, where it need not be measured again.
        """
        if self._latest is None:
            return None
        inputs_S, inputs_T, rows = self._latest
        more = {} if known is None else {"known": known}
        statistics = self.signal.measure(
            self.student, self.teacher, self.pairing, inputs_S, inputs_T, seed=update * SEEDS_APART, **more
        )
        return statistics, rows
