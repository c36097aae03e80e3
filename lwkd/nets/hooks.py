"""Forward hooks that read features and inputs from the passes that the user makes anyway.

A hook on each paired layer writes that layer's output into its slot, hooks on the modules around it keep the masks
that these are called with, and hooks on the root module say when a pass begins, with which inputs, and when it is
complete. A layer that runs again (checkpoint recomputation, a reused module) only overwrites its slot. Which passes
count is decided in :mod:`lwkd.rates.pass_matcher`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lwkd.nets.inputs import InputIdentity, Inputs
from lwkd.nets.layout import Layout
from lwkd.nets.names import named_modules, unwrap, wrappers
from lwkd.nets.outputs import feature_in, find_logits, probabilities_in
from lwkd.nets.padding import Padding, around, mask_places
from lwkd.nets.passes import may_be_traced
from lwkd.nets.transforms import outside, untransformed

NO_INPUTS = InputIdentity(())
"""Identity of a pass whose inputs were not recorded; it matches no other."""

COMPILE_FIRST = (
    "lwkd looks at features outside of the compiled graph. Give lwkd what torch.compile(net, fullgraph=True) returns, "
    "not a net that is compiled afterwards or in place (net.compile()), or compile without fullgraph=True"
)
"""The error of fullgraph=True for a net that was given to lwkd as it is."""

REPLICATED = (
    "the net runs in a DataParallel {}, whose replicas see a part of the batch each, in threads: their features cannot "
    "be compared. Use DistributedDataParallel (torchrun), or show one device only (CUDA_VISIBLE_DEVICES=0)"
)
"""To be formatted with where."""

Slots = list["Tensor | None"]
"""One entry a layer: what it gave out in the current pass."""


class LayerNotRunError(RuntimeError):
    """A paired layer gave no feature in a pass; the message names it."""


@dataclass(eq=False)
class ForwardPass:
    """What a complete pass has left: its features (or inputs), the size of its batch, and what it was called with.

    Features are as the layers gave them: they are only looked at where two passes are compared, since a net makes
    passes that no other belongs to (words that a language model generates one by one). ``kept`` is None where a paired
    layer did not run, or once it was let go of; ``padding`` says what does not count in features.
    """

    kept: Any
    rows: int
    inputs: InputIdentity
    padding: Padding | None = None


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
        _check_not_replicated(model)
        self.layers, self.layouts, self.whose, self.wanted = list(layers), layouts, whose, wanted
        self.view, self.probabilities = view, probabilities
        self._no_padding = self.padding = Padding(model, Inputs(()))  # of the current pass
        self.missing = ""  # what was wrong with the last pass in which a layer did not run
        self.slots: Slots = [None] * len(self.layers)
        self.open = False  # from the begin of a pass that is wanted to its end
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
            self._handles.append(_begin_hook(model, begin))
        if on_pass_end is not None:
            self._handles.append(model.register_forward_hook(_OnPassEnd(on_pass_end)))

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
            LayerNotRunError: a layer left its slot empty.
        """
        found = []
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
        _remove(self._handles)
        self.clear()


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
        _check_not_replicated(model)
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

        self._handles = [_begin_hook(model, copy_rows), model.register_forward_hook(_OnPassEnd(on_pass_end))]

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
            raise RuntimeError(f"the {self.whose} was called without a batch; its first tensor must have rows (B, ...)")
        return copied

    def compared(self, inputs: Inputs, own: Padding | None, other: Padding | None) -> Inputs:
        """Inputs as they are: a net's padding is found in them once more, where the net is measured."""
        return inputs

    def clear(self) -> None:
        """Let go of the inputs."""
        self._copied = self._forward = None

    def close(self) -> None:
        """Remove the hooks and let go of the inputs."""
        _remove(self._handles)
        self.clear()


def _begin_hook(model: nn.Module, on_pass_begin: Callable[[Inputs], None]) -> RemovableHandle:
    """A hook in front of a pass, which sees what the user gave, before other pre-hooks change it."""
    return model.register_forward_pre_hook(_OnPassBegin(on_pass_begin), with_kwargs=True, prepend=True)


def _check_not_replicated(model: nn.Module) -> None:
    """Raise NotImplementedError where the passes of a model are split over several devices of this process."""
    for wrapper in wrappers(model):
        if isinstance(wrapper, nn.DataParallel) and len(wrapper.device_ids) > 1:
            raise NotImplementedError(REPLICATED.format(f"over {len(wrapper.device_ids)} devices"))


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


class Hook:
    """A forward hook of lwkd: its copies and pickles are :class:`_Inert`."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Inert:
        return _Inert()

    def __reduce__(self) -> tuple[type[_Inert], tuple[()]]:
        return _Inert, ()


class _Inert:
    """A hook that does nothing: a copied model, such as an EMA of the weights, must not write into our slots."""

    def __call__(self, *_: Any) -> None:
        return None


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


class _OnPassBegin(Hook):
    """A forward pre-hook that calls a function with the inputs of the root module, outside compiled graphs."""

    def __init__(self, on_pass_begin: Callable[[Inputs], None]) -> None:
        self.plain = on_pass_begin
        self.uncompiled = torch.compiler.disable(on_pass_begin, reason=COMPILE_FIRST)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if "_is_replica" in vars(module):  # of a DataParallel that was made afterwards
            raise NotImplementedError(REPLICATED.format("over several devices"))
        (self.uncompiled if may_be_traced() else self.plain)(Inputs(args, kwargs))


class _OnPassEnd(Hook):
    """Calls a function with the root module, outside compiled graphs."""

    def __init__(self, on_pass_end: Callable[[nn.Module], None]) -> None:
        self.plain = untransformed(on_pass_end)
        self.uncompiled = torch.compiler.disable(self.plain, reason=COMPILE_FIRST)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        (self.uncompiled if may_be_traced() else self.plain)(module)
