"""Measurements by passes of the library's own, on a few rows of the last batch: the Jacobian and Hessian signals."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lwkd.nets.feature_hooks import LayerNotRunError
from lwkd.nets.inputs import Inputs
from lwkd.nets.sharding import any_sharded, gathered
from lwkd.pairing import Pairing
from lwkd.rates.device import Written
from lwkd.rates.distributed import Ranks
from lwkd.signals import Signal

SEEDS_APART = 2**20
"""Distance between the seeds of two updates: more than any number of probes."""


_one_at_a_time = threading.RLock()
"""For measurements of several threads: torch has one forward mode, and a teacher may be that of two students."""


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
        self._written: Written | None = None
        self._checked = False
        self.sharded = any_sharded(student) or any_sharded(teacher)
        self.incomplete = 0  # measurements in which a paired layer did not run

    def remember(self, student: Inputs, teacher: Inputs, rows: int, written: Written | None = None) -> None:
        """Inputs of a matched pair of passes, and on which stream they were copied; they replace those before."""
        self._latest, self._written = (student, teacher, rows), written

    def forget(self) -> None:
        """Let go of the inputs."""
        self._latest = self._written = None

    def _inputs(self, latest: tuple[Inputs, Inputs, int]) -> tuple[Inputs, Inputs, int]:
        """The inputs, to be read on the current stream."""
        if self._written is not None:
            self._written.read([*latest[0].tensors(), *latest[1].tensors()], "the nets' inputs")
            self._written = None
        return latest

    @contextmanager
    def gathered(self, ranks: Ranks) -> Iterator[None]:
        """Inside, sharded nets have whole parameters: all ranks gather them, or none where one has no batch."""
        ready = torch.tensor(float(self._latest is not None), dtype=torch.float32, device="cpu")
        if ranks.summed(ready).item() < ranks.count:
            self.forget()
            yield
            return
        with gathered(self.student, self.teacher):
            yield

    def check(self, update: int) -> None:
        """Before the first measurement: whatever the signal checks on these nets.

        Raises:
            RuntimeError: the signal cannot be measured on them; the layer is named.
        """
        if self._latest is not None and not self._checked:
            inputs_S, inputs_T, rows = self._inputs(self._latest)
            with contextlib.suppress(LayerNotRunError), _own_passes(rows):  # the next pass may take another path
                self.signal.check(
                    self.student, self.teacher, self.pairing, inputs_S, inputs_T, seed=update * SEEDS_APART
                )
                self._checked = True

    def measure(self, update: int, known: Tensor | None) -> tuple[Tensor, int] | None:
        """Statistics ``(L, S)`` and the rows they were measured on; None where there are none.

        There are none where no pass was matched, and where a net took a path without a paired layer in a pass of its
        own (LayerDrop, early exit), which is counted in ``incomplete``.

        Args:
            update: number of the update, which gives the seed of the probes: a resumed run draws the same ones.
            known: curvature of the teacher ``(L,)``, where it need not be measured again.
        """
        if self._latest is None:
            return None
        inputs_S, inputs_T, rows = self._inputs(self._latest)
        more = {} if known is None else {"known": known}
        try:
            with _own_passes(rows):
                statistics = self.signal.measure(
                    self.student, self.teacher, self.pairing, inputs_S, inputs_T, seed=update * SEEDS_APART, **more
                )
        except LayerNotRunError:
            self.incomplete += 1
            return None
        return statistics, rows


@contextmanager
def _own_passes(rows: int) -> Iterator[None]:
    """Passes of one thread. Errors, which may be the net's own, say in a note that fewer rows may be the reason."""
    try:
        with _one_at_a_time:
            yield
    except Exception as error:
        if hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(
                f"This was a pass of lwkd's own, on the first {rows} rows of what the net was called with. If the net "
                "needs all of them (the longest of some lengths, the nodes of a graph), give samples= the size of the "
                "batch, or use signal='attention'"
            )
        raise
