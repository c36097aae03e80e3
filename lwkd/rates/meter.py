"""Measurements that need passes of their own: the Jacobian and Hessian signals on a few rows of the last batch."""

from __future__ import annotations

from torch import Tensor, nn

from lwkd.nets.inputs import Inputs
from lwkd.pairing.pairs import Pairing
from lwkd.signals import Hessian, Jacobian, Signal

SEEDS_APART = 2**20
"""Distance between the seeds of two updates: more than any number of probes."""


class BatchReplay:
    """Keeps the inputs of the last matched passes, and measures both nets on them.

    Args:
        signal: what is measured.
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
        """Before the first measurement: does forward mode agree with a finite difference on these nets?

        Raises:
            RuntimeError: it does not; the layer is named.
        """
        if self._latest is not None and not self._checked and isinstance(self.signal, Jacobian):
            inputs_S, inputs_T, _ = self._latest
            self.signal.check(self.student, self.teacher, self.pairing, inputs_S, inputs_T, seed=update * SEEDS_APART)
        self._checked = self._checked or self._latest is not None

    def measure(self, update: int, known: Tensor | None) -> tuple[Tensor, int] | None:
        """Statistics ``(L, S)`` and the rows they were measured on; None where no pass was matched.

        Args:
            update: number of the update, which gives the seed of the probes: a resumed run draws the same ones.
            known: curvature of the teacher ``(L,)``, where it need not be measured again.
        """
        if self._latest is None:
            return None
        inputs_S, inputs_T, rows = self._latest
        nets, seed = (self.student, self.teacher, self.pairing), update * SEEDS_APART
        if isinstance(self.signal, Hessian):
            return self.signal.measure(*nets, inputs_S, inputs_T, seed=seed, known=known), rows
        return self.signal.measure(*nets, inputs_S, inputs_T, seed=seed), rows
