"""Features from the passes that the user makes anyway.

Layer hooks write each paired layer's output into a fixed slot, and a hook on the root module harvests the slots when
a pass is complete: a layer that runs again (checkpoint recomputation, a reused module) only overwrites its slot.
:mod:`lwkd.watch` decides what becomes of a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lwkd.layout import Layout
from lwkd.names import named_modules
from lwkd.pairing import Pairing
from lwkd.passes import Inputs

Slots = list["Tensor | None"]


class _Inert:
    """What a hook becomes when its module is copied or pickled: an EMA copy must not write into our slots."""

    def __call__(self, *_: Any) -> None:
        return None


class Hook:
    """A forward hook of lwkd: it turns into :class:`_Inert` when it is copied or pickled."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Inert:
        return _Inert()

    def __reduce__(self) -> tuple[type[_Inert], tuple[()]]:
        return _Inert, ()


class _Write(Hook):
    def __init__(
        self, slots: Slots, index: int, layer: str, wanted: Callable[[], bool] | None, *, detach: bool
    ) -> None:
        self.slots, self.index, self.layer, self.wanted, self.detach = slots, index, layer, wanted, detach

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        # A feature that is kept for nothing takes its memory from the layers behind. A compiled graph always writes:
        # it would have to be compiled again where this changes.
        if self.wanted is not None and not torch.compiler.is_compiling() and not self.wanted():
            return
        if not isinstance(output, Tensor):
            raise TypeError(
                f"layer {self.layer!r} returned {type(output).__name__}, expected a tensor; pair another layer"
            )
        self.slots[self.index] = output.detach() if self.detach else output


class _Harvest(Hook):
    def __init__(self, harvest: Callable[[nn.Module], None]) -> None:
        self.harvest = harvest

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.harvest(module)


class _Keep(Hook):
    """A forward pre-hook that hands on what the root module is called with."""

    def __init__(self, keep: Callable[[Inputs], None]) -> None:
        self.keep = keep

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.keep(Inputs(args, kwargs))


class Side:
    """The slots of one net: hooks on its paired layers, and one on its root.

    Args:
        model: the net as the user calls it (a DDP or compiled wrapper included).
        layers: names of the layers, as in the pairing.
        layouts: how each layer's output is seen as ``(B, C, *spatial)``; None leaves it as it is.
        whose: "student" or "teacher", for messages.
        harvest: called with the module when a pass of it is complete.
        wanted: whether the pass that is being made may count at all; None is always.
        detach: whether features leave the graph.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        layouts: Sequence[Layout] | None,
        whose: str,
        harvest: Callable[[nn.Module], None] | None = None,
        wanted: Callable[[], bool] | None = None,
        *,
        detach: bool = True,
    ) -> None:
        self.layers, self.layouts, self.whose = list(layers), layouts, whose
        self.slots: Slots = [None] * len(self.layers)
        modules = named_modules(model)
        self._handles = [
            modules[name].register_forward_hook(_Write(self.slots, index, name, wanted, detach=detach))
            for index, name in enumerate(self.layers)
        ]
        if harvest is not None:
            self._handles.append(model.register_forward_hook(_Harvest(torch.compiler.disable(harvest))))

    def take(self) -> tuple[list[Tensor], int]:
        """The features of the pass that just ended, and the size of its batch; see :meth:`features`."""
        features = self.features()
        return features, features[0].shape[0]

    def features(self) -> list[Tensor]:
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


class InputSide:
    """The inputs of one net's passes, in the same form as :class:`Side`: for signals that make passes of their own.

    Rows are copied before the pass, since nets may work in place on their input.

    Args:
        model: the net as the user calls it (a DDP or compiled wrapper included).
        whose: "student" or "teacher", for messages.
        samples: rows that are kept; None is all.
        wanted: whether the pass that begins may count at all.
        harvest: called with the module when a pass of it is complete.
    """

    def __init__(
        self,
        model: nn.Module,
        whose: str,
        samples: int | None,
        wanted: Callable[[], bool],
        harvest: Callable[[nn.Module], None],
    ) -> None:
        self.whose = whose
        self._kept: tuple[Inputs, int] | None = None

        def keep(inputs: Inputs) -> None:
            first = next(iter(inputs.tensors()), None)
            if wanted() and first is not None and first.dim() > 0:
                self._kept = inputs.rows(first.shape[0], samples), first.shape[0]

        self._handles = [
            model.register_forward_pre_hook(_Keep(torch.compiler.disable(keep)), with_kwargs=True),
            model.register_forward_hook(_Harvest(torch.compiler.disable(harvest))),
        ]

    def take(self) -> tuple[Inputs, int]:
        """A copy of the first rows that the pass that just ended was called with, and the size of its batch.

        Raises:
            RuntimeError: the net was called without a batch.
        """
        kept, self._kept = self._kept, None
        if kept is None:
            raise RuntimeError(f"the {self.whose} was called without a batch; its first tensor must have rows (B, ...)")
        return kept

    def clear(self) -> None:
        """Let go of the inputs."""
        self._kept = None

    def close(self) -> None:
        """Remove the hooks and let go of the inputs."""
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
        layouts_S, layouts_T = layouts_of(pairing)
        self._student = Side(student, pairing.student_layers, layouts_S, "student", detach=False)
        self._teacher = Side(teacher, pairing.teacher_layers, layouts_T, "teacher")

    @property
    def student(self) -> list[Tensor]:
        """Features of the student's last pass, carrying its graph."""
        return self._student.features()

    @property
    def teacher(self) -> list[Tensor]:
        """Features of the teacher's last pass, detached."""
        return self._teacher.features()

    def close(self) -> None:
        """Remove the hooks."""
        self._student.close()
        self._teacher.close()

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def layouts_of(pairing: Pairing) -> tuple[list[Layout], list[Layout]]:
    """Layouts of the student's and of the teacher's layers."""
    return [p.student_layout for p in pairing], [p.teacher_layout for p in pairing]
