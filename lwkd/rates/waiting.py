"""Passes that wait for the pass of the other net which belongs to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from lwkd.nets.hooks import ForwardPass
from lwkd.nets.inputs import Inputs
from lwkd.rates.device import Written

MOST_WAITING = 8
"""Passes of one net and batch size that are kept while they wait for their partner; more are not compared."""

REMEMBERED = 256
"""Passes of which only the inputs are known: those of a net and batch size, and the teacher's of earlier steps."""

Confirm = Callable[[], None]
"""Commits a measurement that was made before its pair of passes was certain."""


@dataclass(eq=False)
class _Pass:
    """A pass since the last step, with what it has left."""

    made: ForwardPass
    written: Written | None = None  # when, once it waits for its partner

    def _tensors(self) -> list[Tensor]:
        """What it has left, features or the tensors of its inputs."""
        kept = self.made.kept
        return kept.tensors() if isinstance(kept, Inputs) else kept or []

    def keep(self) -> None:
        """What it has left will be read later, perhaps on another stream."""
        self.written = Written.of(self._tensors())

    def read(self, what: str) -> None:
        """What it has left is read now, by this stream."""
        if self.written is not None:
            self.written.read(self._tensors(), what)


@dataclass(eq=False)
class TeacherPass(_Pass):
    """A pass of the teacher since the last step."""

    matched: bool = False  # with a student pass of the same input tensors
    partner: StudentPass | None = None  # by order alone


@dataclass(eq=False)
class StudentPass(_Pass):
    """A pass of the student since the last step."""

    confirm: Confirm | None = None  # of the comparison with a partner by order
    late: bool = False  # a teacher's pass of an earlier step had the same inputs


@dataclass(eq=False)
class SameSize:
    """The passes since the last step whose batches have one size, in the order in which they were made."""

    students: list[StudentPass] = field(default_factory=list)  # without a teacher pass of the same inputs
    teachers: list[TeacherPass] = field(default_factory=list)
    overflow: bool = False

    @property
    def in_doubt(self) -> bool:
        """Whether their order says nothing."""
        return self.overflow or any(student.late for student in self.students)

    def without_partner(self) -> list[TeacherPass]:
        """Teacher passes that no student pass of the same inputs belongs to."""
        return [teacher for teacher in self.teachers if not teacher.matched]

    def wait(self, one: StudentPass | TeacherPass) -> bool:
        """Keep a pass until its partner comes; whether a student's was forgotten for it."""
        one.keep()
        passes: list[StudentPass] | list[TeacherPass]
        if isinstance(one, StudentPass):
            passes = self.students
            self.students.append(one)
        else:
            passes = self.teachers
            self.teachers.append(one)
        kept = [other for other in passes if other.made.kept is not None]
        if len(kept) > MOST_WAITING:
            kept[0].made.kept, self.overflow = None, True
        if len(passes) <= REMEMBERED:
            return False
        self.overflow = True
        return isinstance(passes.pop(0), StudentPass)
