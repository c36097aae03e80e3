"""The inputs of one net's passes, for signals that make passes of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lwkd.nets.hooks import ForwardPass, begin_hook, check_not_replicated, end_hook, remove_hooks
from lwkd.nets.inputs import Inputs
from lwkd.nets.names import unwrap
from lwkd.nets.padding import Padding
from lwkd.nets.transforms import untransformed


class InputHooks:
    """The inputs of one net's passes, for signals that make passes of their own; used as :class:`FeatureHooks` is.

    Rows are copied before the pass, since nets may work in place on their input. What the net is called with must be
    what its own forward takes: frameworks that put a method of theirs in its place for the length of a call (forward
    redirection, as TRL's ``DistillationTrainer`` has it) call the net with that method's arguments.

    Args:
        model: the net as the user calls it (a DDP or compiled wrapper included).
        whose: "student" or "teacher", for messages.
        rows_of: number of rows to copy of a batch of a size.
        wanted: whether inputs of the pass that begins can be of use.
        on_pass_end: called with the module when a pass of it is complete.
        passed_over: called with what a pass is called with whose inputs are not wanted.
    """

    def __init__(
        self,
        model: nn.Module,
        whose: str,
        rows_of: Callable[[int], int],
        wanted: Callable[[], bool],
        on_pass_end: Callable[[nn.Module], None],
        passed_over: Callable[[Inputs], None] | None = None,
    ) -> None:
        check_not_replicated(model)
        self.whose, self.missing = whose, ""  # no layer can be missing here
        self._net = unwrap(model)
        self._forward: Any = None  # of the pass that was copied
        self._copied: ForwardPass | None = None

        said: set[str] = set()

        def copy_rows(inputs: Inputs) -> None:
            self.clear()  # what a pass that raised has left
            if wanted():
                copy(inputs)
            elif passed_over is not None:
                passed_over(inputs)

        @untransformed
        def copy(inputs: Inputs) -> None:
            batch = inputs.batch
            if batch is not None:
                self._forward = self._net.forward
                self._copied = ForwardPass(inputs.rows(batch, rows_of(batch), said), batch, inputs.identity())

        self._handles = [begin_hook(model, copy_rows), end_hook(model, on_pass_end)]

    def take(self) -> ForwardPass:
        """The pass that just ended, with a copy of the first rows that it was called with.

        Raises:
            RuntimeError: the net was called without a batch, or another function stood in place of its forward.
        """
        copied, self._copied = self._copied, None
        redirected, self._forward = self._forward not in (None, self._net.forward), None
        if redirected:
            raise RuntimeError(
                f"the {self.whose}'s forward ({type(self._net).__name__}) was another function when the call began "
                "than it is now: a method of the framework was run in its place (forward redirection), whose arguments "
                "are not the net's, so that signals with passes of their own cannot repeat the pass. Use "
                "signal='attention', which reads the training's own passes"
            )
        if copied is None:
            raise RuntimeError(
                f"the {self.whose} was called without a batch; its first tensor must have rows (B, ...). Or two "
                "threads called it at the same time: give each training a copy of its own"
            )
        return copied

    def compared(self, inputs: Inputs, own: Padding | None, other: Padding | None) -> Inputs:
        """Inputs as they are: a net's padding is found in them once more, where the net is measured."""
        return inputs

    def clear(self) -> None:
        """Let go of the inputs."""
        self._copied = self._forward = None

    def close(self) -> None:
        """Remove the hooks and let go of the inputs."""
        remove_hooks(self._handles)
        self.clear()
