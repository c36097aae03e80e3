"""Which forward passes of the user's count, and which student pass belongs to which teacher pass.

The same input tensors decide first, also where the teacher runs one step ahead. Where a loop gives the two nets
different tensors (a copy, another augmentation), the order among passes of equal batch size decides, as long as it
leaves no doubt. Everything else is not compared.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from lwkd.nets.feature_hooks import FeatureHooks
from lwkd.nets.input_hooks import InputHooks
from lwkd.nets.inputs import InputIdentity, Inputs
from lwkd.nets.names import unwrap
from lwkd.nets.passes import hooks_disabled, in_backward
from lwkd.nets.transforms import untransformed
from lwkd.nets.walk import modules_of
from lwkd.pairing import Pairing
from lwkd.pairing.pairs import layouts_of
from lwkd.rates.loop_watch import LoopWatch
from lwkd.rates.waiting import REMEMBERED, Confirm, SameSize, StudentPass, TeacherPass
from lwkd.signals import Samples, rows_of


class PassMatcher:
    """Matches student passes with teacher passes, and calls back with what a signal is measured on.

    A student pass counts when gradients are enabled and no backward is running. It belongs to the teacher passes that
    were called with the same input tensors (same memory, version and shape) since the last step, before or after it, or
    between that one and the one before (a teacher that runs one batch ahead). If no pass of the step has such a
    partner, or one in an earlier step (a buffer of the teacher's answers), and there are as many student as teacher
    passes of a batch size, they belong together in their order. What remains is not compared. Teacher passes of a
    validation (the student's last pass was made in eval mode without gradients) take no part in the order. Where the
    teacher is the student or a part of it, its passes are those without gradients.

    ``passes`` counts the student's passes by outcome: ``measured``, ``no_grad`` (validation), ``in_backward``
    (recomputation), ``empty`` (no rows), ``incomplete`` (a paired layer did not run), ``late`` (the teacher's pass of
    these inputs was made in an earlier step), ``unmatched`` (no teacher pass of that batch size until the step),
    ``ambiguous`` (there were some, and it is not certain which), ``not_due``.

    Args:
        student: the student as the user calls it.
        teacher: the teacher as the user calls it.
        pairing: which layers.
        source: what a pass leaves behind: ``"features"`` (``(B, C, *spatial)`` views), ``"probabilities"`` (layer
            outputs as they are), or ``"passes"`` (the inputs).
        samples: rows that are measured.
        on_match: called with the student's, the teacher's and the number of rows of a pair of passes; measures them,
            and returns what takes the measurement into account once the pair is certain.
        due: whether the update so many behind the coming one is measured at all.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairing: Pairing,
        *,
        source: str,
        samples: Samples,
        on_match: Callable[[Any, Any, int], Confirm],
        due: Callable[[int], bool],
    ) -> None:
        self.passes: Counter[str] = Counter()
        self._on_match, self._due, self._rows_of = on_match, due, partial(rows_of, samples)
        self._net = student
        self._inside = unwrap(teacher) in modules_of(unwrap(student))
        self._kind = "inputs" if source == "passes" else "features"
        wanted_S, end_S = _weakly(self._wanted), _weakly(self._student_pass)
        wanted_T, end_T = _weakly(self._wanted_of_teacher), _weakly(self._teacher_pass)
        passed_over = untransformed(_weakly(self._remember))
        self._student: FeatureHooks | InputHooks
        self._teacher: FeatureHooks | InputHooks
        if source == "passes":
            self._student = InputHooks(student, "student", self._rows_of, wanted_S, end_S)
            self._teacher = InputHooks(teacher, "teacher", self._rows_of, wanted_T, end_T, passed_over)
        else:
            attends = source == "probabilities"
            layouts_S, layouts_T = (None, None) if attends else layouts_of(pairing)
            layers_S, layers_T = pairing.student_layers, pairing.teacher_layers
            self._student = FeatureHooks(
                student, layers_S, layouts_S, "student", end_S, wanted_S, probabilities=attends
            )
            self._teacher = FeatureHooks(
                teacher, layers_T, layouts_T, "teacher", end_T, wanted_T, passed_over, probabilities=attends
            )
        # The nets outlive an optimizer that is dropped without close(), and the other net would live in these hooks.
        weakref.finalize(self, _close, self._student, self._teacher).atexit = False
        self._waiting: defaultdict[int, SameSize] = defaultdict(SameSize)  # by batch size
        self._validated: dict[int, TeacherPass] = {}  # by batch size, the latest teacher pass of a validation
        self._validating = False
        # Teacher passes that had no student's in their step.
        self._earlier: deque[InputIdentity] = deque(maxlen=REMEMBERED)
        self._ahead: list[TeacherPass] = []  # those of the step before, with what they left
        self._runs_ahead: bool | None = None  # whether such a pass was ever asked for; None until one might have been
        self._by_inputs = False  # whether a pair of this step was found by its inputs
        # Whether passes that had a partner were ever asked for again; None until a first step has shown it.
        self.asks_again: bool | None = None
        self.idle = True  # no student pass with gradients since the last step
        self._loop = LoopWatch(student)

    # Passes

    def _wanted(self) -> bool:
        return self._due(0) and not hooks_disabled() and not in_backward()

    def _wanted_of_teacher(self) -> bool:
        return (self._due(0) or (bool(self._runs_ahead) and self._due(1))) and self._is_teachers()

    def _is_teachers(self) -> bool:
        """Whether a pass of the teacher that is made now is the user's, and the teacher's."""
        # A teacher that is (part of) the student, with adapters switched off, say, runs in the student's passes, too.
        return not (hooks_disabled() or in_backward() or (self._inside and torch.is_grad_enabled()))

    def _remember(self, inputs: Inputs) -> None:
        """A teacher's pass in a step that is not measured: its student's may come in one that is."""
        if self._is_teachers():
            self._earlier.append(inputs.identity())

    def _student_pass(self, module: nn.Module) -> None:
        if hooks_disabled():
            self._student.clear()
            return
        outcome = self._why_not_measured()
        if outcome == "no_grad" and not module.training:
            self._note_validation()
        if outcome is None:
            made = self._student.take()
            outcome = "incomplete" if made.kept is None else "empty" if made.rows == 0 else None
        if outcome is not None:
            self.passes[outcome] += 1
            self._student.clear()
            return
        self._validating = False
        student, same_size = StudentPass(made), self._waiting[made.rows]
        teachers = [*reversed(same_size.teachers), *filter(None, [self._validated.get(made.rows)]), *self._ahead]
        teacher = next((one for one in teachers if one.made.inputs.matches(made.inputs)), None)
        if teacher is not None:
            self._note_asked_again(teacher.matched or teacher.partner is not None)
            self._match_by_inputs(student, teacher)
            self._let_go(teacher)
        else:
            for earlier in same_size.students:
                if earlier.confirm is not None:
                    earlier.made.kept = None
            student.late = any(earlier.matches(made.inputs) for earlier in self._earlier)
            if same_size.wait(student):
                self.passes["unmatched"] += 1
            self._match_by_order(same_size)

    def _note_validation(self) -> None:
        """Teacher passes that wait may be those of a validation, too: only their inputs can match them from now on."""
        self._validating = True
        for rows, same_size in self._waiting.items():
            for teacher in same_size.teachers:
                if not teacher.matched and teacher.partner is None:
                    self._validated[rows] = teacher
            same_size.teachers = [t for t in same_size.teachers if t.matched or t.partner is not None]

    def _why_not_measured(self) -> str | None:
        if in_backward():
            return "in_backward"
        if not torch.is_grad_enabled():
            return "no_grad"
        self.idle = False
        self._loop.student_pass()
        return None if self._due(0) else "not_due"

    def _teacher_pass(self, module: nn.Module) -> None:
        if not self._wanted_of_teacher():
            self._teacher.clear()
            return
        if module.training:
            self._loop.warn_once(
                "train mode",
                "the teacher is in train mode: its features, and so the learning rates, change with dropout and batch "
                "statistics. Call teacher.eval() unless this is meant.",
            )
        made = self._teacher.take()
        if made.kept is None or made.rows == 0:
            return
        teacher, same_size = TeacherPass(made), self._waiting[made.rows]
        waiting = [student for student in same_size.students if student.made.inputs.matches(made.inputs)]
        # By now a pass of the same inputs, which would be the better partner, has most likely been made.
        for earlier in same_size.teachers:
            if earlier.matched or earlier.partner is not None:
                earlier.made.kept = None
        if waiting:
            same_size.students = [student for student in same_size.students if student not in waiting]
            for student in waiting:
                self._note_asked_again(student.confirm is not None)
                self._match_by_inputs(student, teacher)
            self._let_go(teacher)
        if self._validating and not self._net.training:
            teacher.keep()
            self._validated[made.rows] = teacher
            return
        same_size.wait(teacher)
        self._match_by_order(same_size)

    # Pairs

    def _match_by_inputs(self, student: StudentPass, teacher: TeacherPass) -> None:
        self._by_inputs = teacher.matched = True
        if teacher.partner is not None:  # another pass had only seemed to belong to it
            teacher.partner.confirm, teacher.partner = None, None
        if student.made.kept is None or teacher.made.kept is None:
            self.passes["unmatched"] += 1
            return
        self._measure(student, teacher)()
        self.passes["measured"] += 1

    def _note_asked_again(self, asked: bool) -> None:
        if asked:
            self.asks_again = True

    def _let_go(self, *measured: TeacherPass | StudentPass) -> None:
        """Let go of features that were measured, unless another pass may ask for them.

        They take memory that the passes behind could use; on a CPU, to get other memory takes longer than to measure.
        A second student pass of the same inputs (two dropout masks, a step that looks ahead) is compared with the same
        teacher's pass. Loops make such passes in the first step already, or never.
        """
        if self.asks_again is False:
            for one in measured:
                one.made.kept = None

    def _match_by_order(self, same_size: SameSize) -> None:
        """Measure the next two passes that would belong together by their order."""
        if self._by_inputs or same_size.in_doubt:
            return
        student = next((one for one in same_size.students if one.confirm is None), None)
        teacher = next((one for one in same_size.without_partner() if one.partner is None), None)
        if student is None or teacher is None or student.made.kept is None or teacher.made.kept is None:
            return
        student.confirm, teacher.partner = self._measure(student, teacher), student
        self._let_go(teacher, student)

    def _measure(self, student: StudentPass, teacher: TeacherPass) -> Confirm:
        student.read(f"the student's {self._kind}")
        teacher.read(f"the teacher's {self._kind}")
        of_S, of_T = student.made.padding, teacher.made.padding
        of_student = self._student.compared(student.made.kept, of_S, of_T)
        of_teacher = self._teacher.compared(teacher.made.kept, of_T, of_S)
        return self._on_match(of_student, of_teacher, self._rows_of(student.made.rows))

    def confirm(self) -> None:
        """Before the measurement of a step: what was matched by order counts, where the order leaves no doubt."""
        left = {rows: passes for rows, passes in self._waiting.items() if passes.students}
        for passes in left.values():
            certain = not (self._by_inputs or passes.in_doubt)
            late = [student for student in passes.students if student.late]
            if late:
                self._runs_ahead = True
                self.passes["late"] += len(late)
            students, teachers = [one for one in passes.students if not one.late], passes.without_partner()
            if not students:
                continue
            confirms = [student.confirm for student in students if student.confirm is not None]
            certain = certain and len(confirms) == len(students) == len(teachers)
            if certain:
                for confirm in confirms:
                    confirm()
            self.passes["measured" if certain else "ambiguous" if teachers else "unmatched"] += len(students)
            if teachers and not certain:
                self._loop.warn_once(
                    "ambiguous",
                    f"{len(students)} student and {len(teachers)} teacher passes of equal batch size were made before "
                    "a step, and their inputs do not tell which belong together, so they are not compared. Call both "
                    "nets with the same tensor.",
                )
        lonely = sorted(rows for rows, passes in left.items() if not passes.teachers)
        others = sorted(rows for rows, passes in self._waiting.items() if passes.teachers)
        if lonely and others and not self._by_inputs:
            self._loop.warn_once(
                "batch sizes",
                f"student passes with batch size {lonely} met teacher passes with batch size {others}: only passes of "
                "equal batch size are compared, so the rates stay as they are. Give both nets the same batch.",
            )

    # Steps

    def begin_step(self) -> None:
        """The optimizer's step begins: passes made from now on may be those of its closure."""
        self._loop.begin_step()

    def end_step(self) -> None:
        """The optimizer's step has ended: let go of all passes before it."""
        if self.asks_again is None and self.passes["measured"]:
            self.asks_again = False
        self._loop.end_step()
        if self._ahead and self._runs_ahead is None:
            self._runs_ahead = any(teacher.matched for teacher in self._ahead)
        without = (teacher for same_size in self._waiting.values() for teacher in same_size.without_partner())
        left = [teacher for teacher in without if teacher.partner is None]
        self._earlier.extend(teacher.made.inputs for teacher in left)
        self._ahead = [] if self._runs_ahead is False else left
        self._by_inputs, self.idle = False, True
        self._waiting.clear()
        self._validated.clear()
        self._student.clear()
        self._teacher.clear()

    def count_step(self, measured: bool) -> None:
        """A step was measured, on whichever rank, or not; warns after three steps in a row that were not."""
        self._loop.count_step(measured, self.passes, self._student.missing or self._teacher.missing)

    def close(self) -> None:
        """Remove all hooks and let go of all passes."""
        self.end_step()
        self._ahead.clear()
        _close(self._student, self._teacher)


def _close(*hooks: FeatureHooks | InputHooks) -> None:
    for one in hooks:
        one.close()


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, without keeping its object: None once that is gone."""
    found = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        bound = found()
        return None if bound is None else bound(*args)

    return call
