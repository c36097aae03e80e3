"""Features from the passes that the user makes anyway.

Layer hooks write each paired layer's output into a fixed slot, and a hook on the root module harvests the slots when
a pass is complete: a layer that runs again (checkpoint recomputation, a reused module) only overwrites its slot.
A student pass is matched with a teacher pass of the same batch and handed on; everything else is let go and counted.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lwkd.layout import Layout
from lwkd.muting import is_muted
from lwkd.names import named_modules
from lwkd.pairing import Pairing

Slots = list["Tensor | None"]


def _in_backward() -> bool:
    """Whether autograd is running: a pass made now is a recomputation."""
    return torch._C._current_graph_task_id() != -1


class _Inert:
    """What a hook becomes when its module is copied or pickled: an EMA copy must not write into our slots."""

    def __call__(self, *_: Any) -> None:
        return None


class _Hook:
    """A forward hook that turns into :class:`_Inert` when it is copied or pickled."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Inert:
        return _Inert()

    def __reduce__(self) -> tuple[type[_Inert], tuple[()]]:
        return _Inert, ()


class _Write(_Hook):
    def __init__(self, slots: Slots, index: int, layer: str, *, detach: bool) -> None:
        self.slots, self.index, self.layer, self.detach = slots, index, layer, detach

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"layer {self.layer!r} returned {type(output).__name__}, expected a tensor; pair another layer"
            )
        self.slots[self.index] = output.detach() if self.detach else output


class _Harvest(_Hook):
    def __init__(self, harvest: Callable[[nn.Module], None]) -> None:
        self.harvest = harvest

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.harvest(module)


class Side:
    """The slots of one net: hooks on its paired layers, and one on its root.

    Args:
        model: the net as the user calls it (a DDP or compiled wrapper included).
        layers: names of the layers, as in the pairing.
        layouts: how each layer's output is seen as ``(B, C, *spatial)``; None leaves it as it is.
        whose: "student" or "teacher", for messages.
        harvest: called with the module when a pass of it is complete.
        detach: whether features leave the graph.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        layouts: Sequence[Layout] | None,
        whose: str,
        harvest: Callable[[nn.Module], None] | None = None,
        *,
        detach: bool = True,
    ) -> None:
        self.layers, self.layouts, self.whose = list(layers), layouts, whose
        self.slots: Slots = [None] * len(self.layers)
        modules = named_modules(model)
        self._handles = [
            modules[name].register_forward_hook(_Write(self.slots, index, name, detach=detach))
            for index, name in enumerate(self.layers)
        ]
        if harvest is not None:
            self._handles.append(model.register_forward_hook(_Harvest(torch.compiler.disable(harvest))))

    def take(self) -> list[Tensor]:
        """The features of the pass that just ended, as ``(B, C, *spatial)`` views; empties the slots.

        Raises:
            RuntimeError: a layer left its slot empty.
        """
        features = []
        for index, name in enumerate(self.layers):
            feature = self.slots[index]
            if feature is None:
                self.clear()
                raise RuntimeError(
                    f"layer {name!r} of the {self.whose} gave no feature in this pass: it was not executed, or the "
                    "model was compiled and called before lwkd was attached (hooks added later never fire). "
                    "Attach first, or pair another layer."
                )
            features.append(feature if self.layouts is None else self.layouts[index].view(feature))
        self.clear()
        return features

    def clear(self) -> None:
        """Empty the slots, so that no activation outlives its step."""
        self.slots[:] = [None] * len(self.slots)

    def close(self) -> None:
        """Remove the hooks and let go of all features."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()


class Capture:
    """Features of both nets with the student's graph, for losses on features such as attention transfer.

    After a pass of each net, ``student`` and ``teacher`` are lists of ``(B, C, *spatial)`` views, one a pair; reading
    them empties the slots. A context manager; :meth:`close` removes the hooks.

    Args:
        student: the student.
        teacher: the teacher; its features are detached.
        pairing: which layers.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, pairing: Pairing) -> None:
        pairing.check(student, teacher)
        layouts_S, layouts_T = _layouts(pairing)
        self._student = Side(student, pairing.student_layers, layouts_S, "student", detach=False)
        self._teacher = Side(teacher, pairing.teacher_layers, layouts_T, "teacher")

    @property
    def student(self) -> list[Tensor]:
        """Features of the student's last pass, carrying its graph."""
        return self._student.take()

    @property
    def teacher(self) -> list[Tensor]:
        """Features of the teacher's last pass, detached."""
        return self._teacher.take()

    def close(self) -> None:
        """Remove the hooks."""
        self._student.close()
        self._teacher.close()

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _layouts(pairing: Pairing) -> tuple[list[Layout], list[Layout]]:
    return [p.student_layout for p in pairing], [p.teacher_layout for p in pairing]


class FeatureWatch:
    """Matches student passes with teacher passes and hands their features on.

    A student pass counts when gradients are enabled and no backward is running. It is matched with the latest teacher
    pass of equal batch size since the last step; a student pass that came first waits for the next one. ``passes``
    counts what happened: ``measured``, ``no_grad`` (validation), ``in_backward`` (recomputation), ``empty`` (no rows),
    ``unmatched`` (no teacher pass of that batch size until the step), ``not_due``.

    Args:
        student: the student as the user calls it.
        teacher: the teacher as the user calls it.
        pairing: which layers.
        measure: called with the features of a matched pair.
        due: whether this step is measured at all.
        raw: hand on layer outputs as they are (attention probabilities), not as ``(B, C, *spatial)`` views.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairing: Pairing,
        measure: Callable[[list[Tensor], list[Tensor]], None],
        due: Callable[[], bool],
        *,
        raw: bool = False,
    ) -> None:
        layouts_S, layouts_T = (None, None) if raw else _layouts(pairing)
        self.passes: Counter[str] = Counter()
        self._measure, self._due = measure, due
        self._student = Side(student, pairing.student_layers, layouts_S, "student", self._student_pass)
        self._teacher = Side(teacher, pairing.teacher_layers, layouts_T, "teacher", self._teacher_pass)
        self._waiting: dict[int, list[list[Tensor]]] = {}
        self._latest: dict[int, list[Tensor]] = {}
        self._steps_without = 0
        self._said: set[str] = set()

    def _student_pass(self, module: nn.Module) -> None:
        if is_muted():
            self._student.clear()
            return
        why_not = self._why_not_measured()
        if why_not is not None:
            self.passes[why_not] += 1
            self._student.clear()
            return
        features = self._student.take()
        rows = features[0].shape[0]
        if rows == 0:
            self.passes["empty"] += 1
        elif rows in self._latest:
            self._pair(features, self._latest[rows])
        else:
            self._waiting.setdefault(rows, []).append(features)

    def _why_not_measured(self) -> str | None:
        if _in_backward():
            return "in_backward"
        if not torch.is_grad_enabled():
            return "no_grad"
        return None if self._due() else "not_due"

    def _teacher_pass(self, module: nn.Module) -> None:
        if is_muted() or _in_backward() or not self._due():
            self._teacher.clear()
            return
        if module.training:
            self._say_once(
                "train mode",
                "the teacher is in train mode: its features, and so the learning rates, change with dropout and batch "
                "statistics. Call teacher.eval() unless this is meant.",
            )
        features = self._teacher.take()
        rows = features[0].shape[0]
        waiting = self._waiting.get(rows)
        if waiting:
            self._pair(waiting.pop(0), features)
        else:
            self._latest[rows] = features

    def _pair(self, student: list[Tensor], teacher: list[Tensor]) -> None:
        self._measure(student, teacher)
        self.passes["measured"] += 1

    def end_step(self, measured: bool) -> None:
        """Let go of all features of this step; says once if steps keep ending without a matched pair."""
        unmatched = {rows: len(waiting) for rows, waiting in self._waiting.items() if waiting}
        if unmatched:
            self.passes["unmatched"] += sum(unmatched.values())
            if self._latest:
                self._say_once(
                    "batch sizes",
                    f"student passes with batch size {sorted(unmatched)} met teacher passes with batch size "
                    f"{sorted(self._latest)}: only passes of equal batch size are compared, so the rates stay as they "
                    "are. Give both nets the same batch.",
                )
        self._steps_without = 0 if measured else self._steps_without + 1
        if self._steps_without == 3:
            self._say_once(
                "no pass",
                f"three steps in a row had no student pass matched with a teacher pass (counts: {dict(self.passes)}), "
                "so the rates stay as they are. Call the very student and teacher objects that were given to lwkd, "
                "the student with gradients enabled.",
            )
        self._waiting.clear()
        self._latest.clear()
        self._student.clear()
        self._teacher.clear()

    def _say_once(self, key: str, message: str) -> None:
        if key not in self._said:
            self._said.add(key)
            warnings.warn(message, UserWarning, stacklevel=2)

    def close(self) -> None:
        """Remove all hooks and let go of all features."""
        self._student.close()
        self._teacher.close()
        self._waiting.clear()
        self._latest.clear()
