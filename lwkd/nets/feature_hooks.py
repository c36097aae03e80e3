"""The features of one net's passes, read by hooks from the passes that the user makes anyway.

A hook on each paired layer writes that layer's output into its slot, and hooks on the modules around it keep the masks
that these are called with. A layer that runs again (checkpoint recomputation, a reused module) only overwrites its
slot.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lwkd.nets.hooks import NO_INPUTS, ForwardPass, Hook, begin_hook, check_not_replicated, end_hook, remove_hooks
from lwkd.nets.inputs import Inputs
from lwkd.nets.layout import Layout
from lwkd.nets.names import named_modules
from lwkd.nets.outputs import feature_in, find_logits, probabilities_in
from lwkd.nets.padding import Padding, around, mask_places
from lwkd.nets.sharding import is_sharded, whole_output
from lwkd.nets.transforms import outside, untransformed

Slots = list["Tensor | None"]
"""One entry a layer: what it gave out in the current pass."""


class LayerNotRunError(RuntimeError):
    """A paired layer gave no feature in a pass; the message names it."""


class FeatureHooks:
    """The features of one net's passes: hooks on its paired layers, and one on its root.

    Args:
        model: the net as the user calls it (a DDP or compiled wrapper included).
        layers: names of the layers, as in the pairing.
        layouts: how each layer's output is seen as ``(B, C, *spatial)``, and whether its feature is a norm's input;
            None takes the outputs as they are.
        whose: "student" or "teacher", for messages.
        on_pass_end: called with the module when a pass of it is complete.
        wanted: whether features of the pass that begins can be of use; None means always.
        passed_over: called with what a pass is called with whose features are not wanted.
        detach: whether features leave the graph.
        view: whether features are given out as ``(B, C, *spatial)``, or as the net made them.
        probabilities: whether the attention probabilities that layers return count, and not their features.

    Raises:
        NotImplementedError: the net is in a DataParallel over several devices; in a pass, where it was put there later.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        layouts: Sequence[Layout] | None,
        whose: str,
        on_pass_end: Callable[[nn.Module], None] | None = None,
        wanted: Callable[[], bool] | None = None,
        passed_over: Callable[[Inputs], None] | None = None,
        *,
        detach: bool = True,
        view: bool = True,
        probabilities: bool = False,
    ) -> None:
        check_not_replicated(model)
        self.layers, self.layouts, self.whose, self.wanted = list(layers), layouts, whose, wanted
        self.view, self.probabilities = view, probabilities
        self._no_padding = self.padding = Padding(model, Inputs(()))  # of the current pass
        self.missing = ""  # what was wrong with the last pass in which a layer did not run
        self.slots: Slots = [None] * len(self.layers)
        self.open = False  # from the begin of a pass that is wanted to its end
        self._thread, self._mixed = 0, False  # whose pass that is, and whether another thread made one meanwhile
        modules = named_modules(model)
        self._handles = []
        for index, name in enumerate(self.layers):
            norm = None if layouts is None else layouts[index].before
            save = _SaveOutput(self, index, name, detach=detach)
            if norm is None:
                self._handles.append(modules[name].register_forward_hook(save))
            else:
                self._handles.append(modules[norm].register_forward_pre_hook(_SaveInput(save), with_kwargs=True))
        self.masks: dict[str, dict[str, Tensor]] = {}  # by module, what it was called with in the current pass
        for name in dict.fromkeys(module for layer in self.layers for module in around(layer) if module):
            if places := mask_places(modules[name]):
                save_masks = _SaveMasks(self, name, places)
                self._handles.append(modules[name].register_forward_pre_hook(save_masks, with_kwargs=True))
        self._inputs = NO_INPUTS

        def begin(inputs: Inputs) -> None:
            thread = threading.get_ident()
            self._mixed, self._thread = self.open and thread != self._thread, thread
            self.clear()  # what a pass that raised has left
            self.open = wanted is not None and wanted()
            self.padding = self._no_padding
            if self.open:
                note(inputs)
            elif wanted is None:
                self.padding = Padding(model, inputs)
            elif passed_over is not None:
                passed_over(inputs)

        @untransformed
        def note(inputs: Inputs) -> None:
            self.padding, self._inputs = Padding(model, inputs), inputs.identity()

        if view or probabilities or wanted is not None:
            self._handles.append(begin_hook(model, begin))
        if on_pass_end is not None:
            self._handles.append(end_hook(model, on_pass_end))

    def take(self) -> ForwardPass:
        """The pass that just ended, with its features; see :meth:`outputs`."""
        inputs, self._inputs = self._inputs, NO_INPUTS
        try:
            features = self.outputs()
        except LayerNotRunError as error:
            self.missing = str(error)
            return ForwardPass(None, 0, inputs)
        rows = features[0].size(0 if self.layouts is None else self.layouts[0].batch_dim)
        return ForwardPass(features, rows, inputs, self.padding)

    def compared(self, outputs: list[Tensor], own: Padding | None, other: Padding | None) -> list[Tensor]:
        """Features of a pass, of its :meth:`outputs`, zero also where only the other net was told of padding."""
        features = outputs if own is None else self._seen(outputs, own)
        more = None if own is None or other is None else own.told_only(other)
        if more is None:
            return features
        clear = more.probabilities if self.probabilities else more.cleared
        return [clear(feature, name) for feature, name in zip(features, self.layers, strict=True)]

    def give_masks(self, padding: Padding) -> None:
        """Tell what modules inside of the net were called with in the pass that just ended."""
        for module, given in self.masks.items():
            if self.wanted is not None:
                given = {name: outside(mask) for name, mask in given.items()}
            padding.add(module, given)

    def features(self) -> list[Tensor]:
        """The features of the pass that just ended, as ``(B, C, *spatial)`` views; empties the slots.

        Raises:
            LayerNotRunError: a layer left its slot empty.
        """
        return self._seen(self.outputs(), self.padding)

    def _seen(self, outputs: list[Tensor], padding: Padding) -> list[Tensor]:
        """What is compared of these outputs."""
        features = []
        for index, (feature, name) in enumerate(zip(outputs, self.layers, strict=True)):
            if self.probabilities:
                feature = padding.probabilities(feature, name)
            elif self.layouts is not None and self.view:
                feature = padding.viewed(feature, self.layouts[index], name)
            features.append(feature)
        return features

    def outputs(self) -> list[Tensor]:
        """What the layers gave out in the pass that just ended; empties the slots.

        Raises:
            LayerNotRunError: a layer left its slot empty, or another thread made a pass meanwhile.
        """
        found = []
        if self._mixed:
            self.clear()
            raise LayerNotRunError(
                f"two threads called the {self.whose} at the same time, and its features may be of either. Give each "
                "training a copy of its own"
            )
        if self.masks and self.padding is not self._no_padding:
            self.give_masks(self.padding)
        for index, name in enumerate(self.layers):
            feature = self.slots[index]
            if feature is None:
                self.clear()
                raise LayerNotRunError(
                    f"layer {name!r} of the {self.whose} gave no feature in this pass: it was not executed, or the "
                    "model was compiled and called before lwkd was attached (hooks added later never fire). "
                    "Attach first, or pair another layer."
                )
            found.append(feature if self.wanted is None else outside(feature))
        self.clear()
        return found

    def writes(self) -> bool:
        """Whether layers write into their slots: in a pass that is wanted, and not when one recomputes them."""
        return self.open or self.wanted is None

    def clear(self) -> None:
        """The pass is over: empty the slots, so that no activation outlives its step."""
        self.open = False
        self.slots[:] = [None] * len(self.slots)
        self.masks.clear()
        self._inputs = NO_INPUTS

    def close(self) -> None:
        """Remove the hooks and let go of all features."""
        remove_hooks(self._handles)
        self.clear()


class _SaveOutput(Hook):
    """Writes the output of a layer into its slot."""

    def __init__(self, hooks: FeatureHooks, index: int, layer: str, *, detach: bool) -> None:
        self.hooks, self.slots, self.index, self.layer, self.detach = hooks, hooks.slots, index, layer, detach
        self.probabilities, self.checked = hooks.probabilities, False

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        # A feature that nobody will use takes memory from the layers behind, and so does one of a recomputation. A
        # compiled graph always writes: it would have to be compiled again whenever ``open`` changes.
        if not torch.compiler.is_compiling() and not self.hooks.writes():
            return
        if self.layer == "":  # the root, whose logits are compared
            output = find_logits(output, "the net (paired with head=True)")
        output = self._probabilities(output) if self.probabilities else feature_in(output)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"layer {self.layer!r} returned {type(output).__name__}, expected a tensor; pair another layer"
            )
        if is_sharded(output):
            output = whole_output(output, self.layer)
        self.slots[self.index] = output.detach() if self.detach else output

    def _probabilities(self, output: Any) -> Tensor:
        """The attention probabilities, of which the first are checked: a position bias has their shape."""
        found = probabilities_in(output, self.layer)
        if not self.checked and not torch.compiler.is_compiling():
            self.checked = True
            if bool((outside(found.detach()) < 0).any()):
                raise ValueError(
                    f"layer {self.layer!r} returned negative numbers for attention probabilities (shape "
                    f"{tuple(found.shape)}): they are something else, such as a position bias, and the probabilities "
                    "were not computed. Switch off fused attention: attn_implementation='eager'"
                )
        return found


class _SaveInput(Hook):
    """Writes the first tensor that a norm is called with where its output would be written."""

    def __init__(self, save: _SaveOutput) -> None:
        self.save = save

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.save(module, args, args[0] if args else next(iter(kwargs.values())))


class _SaveMasks(Hook):
    """Keeps the masks that a module inside of the net is called with.

    Args:
        hooks: keep them.
        module: its name.
        places: of the masks among the module's parameters, and their names.
    """

    def __init__(self, hooks: FeatureHooks, module: str, places: Sequence[tuple[int, str]]) -> None:
        self.hooks, self.masks, self.module, self.places = hooks, hooks.masks, module, places

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling() and not self.hooks.writes():
            return
        given = {}
        for place, name in self.places:
            value = args[place] if place < len(args) else kwargs.get(name)
            if isinstance(value, Tensor):
                given[name] = value
        self.masks[self.module] = given  # also an empty one: the last call of a module replaces the earlier ones
