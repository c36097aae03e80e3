"""Whether a training loop does what rates per layer need; where it does not, that is said once."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn

STEPS_WITHOUT = 3
"""Steps in a row without a measurement, or updates without a step, after which a warning is given."""


class LoopWatch:
    """Notices updates of the student without a step, and steps without a measurement.

    Args:
        student: one of its parameters tells that it was updated.
    """

    def __init__(self, student: nn.Module) -> None:
        self._weight = next((parameter for parameter in student.parameters() if parameter.requires_grad), None)
        self._version: int | None = None  # of that parameter at the last student pass
        self._in_step = False
        self._updates_without_step = 0
        self._steps_without = 0
        self._said: set[str] = set()

    def warn_once(self, what: str, message: str) -> None:
        """Warn of something that was not said yet."""
        if what not in self._said:
            self._said.add(what)
            warnings.warn(message, UserWarning, stacklevel=2)

    def begin_step(self) -> None:
        """The optimizer's step begins, in which it may change the student between passes."""
        self._in_step = True

    def end_step(self) -> None:
        """The optimizer's step has ended."""
        self._in_step, self._updates_without_step, self._version = False, 0, None

    def student_pass(self) -> None:
        """A pass with gradients: warn where parameters change between such passes, and no step says so."""
        if self._weight is None or self._in_step:
            return
        version = self._weight._version
        self._updates_without_step += self._version is not None and version != self._version
        self._version = version
        if self._updates_without_step == STEPS_WITHOUT:
            self.warn_once(
                "no step",
                "the student's parameters were changed three times between its passes, and step() of the optimizer "
                "that lwkd was given was not called: no rate acts and none is measured. Give lwkd the optimizer whose "
                "step() the loop calls, or call step() instead of another method of it.",
            )

    def count_step(self, measured: bool, passes: Mapping[str, int], missing: str) -> None:
        """A step was measured, on whichever rank, or not; warns after three steps in a row that were not.

        Args:
            measured: whether it was.
            passes: counts by outcome.
            missing: what was wrong with the last pass in which a layer did not run.
        """
        self._steps_without = 0 if measured else self._steps_without + 1
        if self._steps_without == STEPS_WITHOUT:
            self.warn_once(
                "no pass",
                f"three steps in a row had no student pass matched with a teacher pass (counts: {dict(passes)}), "
                "so the rates stay as they are. Call the very student and teacher objects that were given to lwkd, "
                "the student with gradients enabled. Methods other than the call, such as net.forward(x) or "
                "net.encode_image(x), run past their hooks: call net(x), or give lwkd the module that these call. Call "
                "the teacher on a batch in the student's step, or one step ahead."
                + (f" Passes were left out because {missing}" if missing else ""),
            )
