"""Which forward passes of the user's count, and which student pass belongs to which teacher pass."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lwkd.nets.hooks import FeatureHooks, InputHooks
from lwkd.nets.passes import hooks_disabled
from lwkd.pairing.pairs import Pairing, layouts_of

STEPS_WITHOUT = 3
"""Steps in a row without a measurement after which a warning is given."""


def _in_backward() -> bool:
    """Whether autograd is running: a pass made now is a recomputation."""
    return torch._C._current_graph_task_id() != -1


class PassMatcher:
    """Matches student passes with teacher passes, and calls back with what a signal is measured on.

    A student pass counts when gradients are enabled and no backward is running. It is matched with the latest teacher
    pass of equal batch size since the last step; a student pass that came first waits for the next one. ``passes``
    counts the student's passes by outcome: ``measured``, ``no_grad`` (validation), ``in_backward`` (recomputation),
    ``empty`` (no rows), ``unmatched`` (no teacher pass of that batch size until the step), ``not_due``.

    Args:
        student: the student as the user calls it.
        teacher: the teacher as the user calls it.
        pairing: which layers.
        source: what a pass leaves behind: ``"features"`` (``(B, C, *spatial)`` views), ``"probabilities"`` (layer
            outputs as they are), or ``"passes"`` (the inputs).
        samples: rows that are kept; None is all.
        on_match: called with the student's, the teacher's and the number of rows of a matched pair.
        due: whether this step is measured at all.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairing: Pairing,
        *,
        source: str,
        samples: int | None,
        on_match: Callable[[Any, Any, int], None],
        due: Callable[[], bool],
    ) -> None:
        self.passes: Counter[str] = Counter()
        self._on_match, self._due, self._samples = on_match, due, samples
        self._student: FeatureHooks | InputHooks
        self._teacher: FeatureHooks | InputHooks
        if source == "passes":
            self._student = InputHooks(student, "student", samples, self._wanted, self._student_pass)
            self._teacher = InputHooks(teacher, "teacher", samples, self._wanted, self._teacher_pass)
        else:
            layouts_S, layouts_T = (None, None) if source == "probabilities" else layouts_of(pairing)
            self._student = FeatureHooks(
                student, pairing.student_layers, layouts_S, "student", self._student_pass, self._wanted
            )
            self._teacher = FeatureHooks(
                teacher, pairing.teacher_layers, layouts_T, "teacher", self._teacher_pass, self._wanted
            )
        self._waiting: dict[int, list[Any]] = {}  # student passes without a teacher pass yet, by batch size
        self._latest: dict[int, Any] = {}  # the teacher's latest pass, by batch size
        self._steps_without = 0
        self._warned: set[str] = set()

    def _wanted(self) -> bool:
        return self._due() and not hooks_disabled() and not _in_backward()

    def _student_pass(self, module: nn.Module) -> None:
        if hooks_disabled():
            self._student.clear()
            return
        why_not = self._why_not_measured()
        if why_not is not None:
            self.passes[why_not] += 1
            self._student.clear()
            return
        found, rows = self._student.take()
        if rows == 0:
            self.passes["empty"] += 1
        elif rows in self._latest:
            self._match(found, self._latest[rows], rows)
        else:
            self._waiting.setdefault(rows, []).append(found)

    def _why_not_measured(self) -> str | None:
        if _in_backward():
            return "in_backward"
        if not torch.is_grad_enabled():
            return "no_grad"
        return None if self._due() else "not_due"

    def _teacher_pass(self, module: nn.Module) -> None:
        if not self._wanted():
            self._teacher.clear()
            return
        if module.training:
            self._warn_once(
                "train mode",
                "the teacher is in train mode: its features, and so the learning rates, change with dropout and batch "
                "statistics. Call teacher.eval() unless this is meant.",
            )
        found, rows = self._teacher.take()
        waiting = self._waiting.get(rows)
        if waiting:
            self._match(waiting.pop(0), found, rows)
        else:
            self._latest[rows] = found

    def _match(self, student: Any, teacher: Any, rows: int) -> None:
        self._on_match(student, teacher, rows if self._samples is None else min(rows, self._samples))
        self.passes["measured"] += 1

    def end_step(self) -> None:
        """Let go of all passes of this step; those that were not matched are counted."""
        unmatched = {rows: len(waiting) for rows, waiting in self._waiting.items() if waiting}
        if unmatched:
            self.passes["unmatched"] += sum(unmatched.values())
            if self._latest:
                self._warn_once(
                    "batch sizes",
                    f"student passes with batch size {sorted(unmatched)} met teacher passes with batch size "
                    f"{sorted(self._latest)}: only passes of equal batch size are compared, so the rates stay as they "
                    "are. Give both nets the same batch.",
                )
        self._waiting.clear()
        self._latest.clear()
        self._student.clear()
        self._teacher.clear()

    def count_step(self, measured: bool) -> None:
        """A step was measured, on whichever rank, or not; warns after three steps in a row that were not."""
        self._steps_without = 0 if measured else self._steps_without + 1
        if self._steps_without == STEPS_WITHOUT:
            self._warn_once(
                "no pass",
                f"three steps in a row had no student pass matched with a teacher pass (counts: {dict(self.passes)}), "
                "so the rates stay as they are. Call the very student and teacher objects that were given to lwkd, "
                "the student with gradients enabled.",
            )

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, UserWarning, stacklevel=2)

    def close(self) -> None:
        """Remove all hooks and let go of all passes."""
        self._student.close()
        self._teacher.close()
        self._waiting.clear()
        self._latest.clear()
