"""Features from the passes that the user makes anyway.

Layer hooks write each paired layer's output into a fixed slot, and a hook on the root module harvests the slots when
a pass is complete: a layer that runs again (checkpoint recomputation, a reused module) only overwrites its slot.
:mod:`lwkd.rates.pass_matcher` decides what becomes of a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lwkd.nets.inputs import Inputs
from lwkd.nets.layout import Layout
from lwkd.nets.names import named_modules

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


class FeatureHooks:
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


class InputHooks:
    """The inputs of one net's passes, for signals that make passes of their own; used as :class:`FeatureHooks` is.

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
