"""One forward pass, watched: which modules ran, in which order, and what each gave out.

The pass runs in eval mode with gradients enabled and leaves no trace (:mod:`lwkd.nets.passes`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lwkd.nets.inputs import Inputs, tensors_in
from lwkd.nets.names import named_modules, parameter_names_by_id, unwrap
from lwkd.nets.passes import alias, untraced
from lwkd.pairing.spine import Node, in_order


class PairingError(ValueError):
    """Student and teacher cannot be paired, or a pairing does not fit a model; the message says what to do."""


@dataclass(eq=False)
class Call:
    """What a module did: ``begin`` is its first call, everything else belongs to its last one."""

    name: str
    module: nn.Module
    begin: int
    end: int = -1  # −1: not completed
    found: str = "nothing"  # type of the output, in words
    shape: tuple[int, ...] | None = None  # None: no floating-point tensor
    node: Node = None
    output_index: int = 0
    passes_through: bool = False  # gave out its own input, untouched
    changed_by: str | None = None  # what overwrote the output after it was given out

    @property
    def usable(self) -> bool:
        """The output is a tensor that keeps its values until the end of the pass."""
        return self.shape is not None and self.changed_by is None and not self.passes_through


@dataclass(eq=False)
class Trace:
    """One net's forward pass; ``calls`` by canonical name, in the order in which they completed."""

    role: str  # "student" or "teacher"
    calls: dict[str, Call]
    sources: list[list[Node]]  # alternatives for what counts as the input of the graph
    output: Node
    used: set[str]  # names of the parameters that the output depends on
    batch: int
    image: bool  # the input is a picture, so that a square number of tokens is a grid


def trace(model: nn.Module, role: str, example_input: Any) -> Trace:
    """Run the model once and record its modules.

    Args:
        model: any module; wrappers are removed.
        role: ``"student"`` or ``"teacher"``, for messages.
        example_input: a tensor, a tuple of positional arguments or a dict of keyword arguments.

    Raises:
        PairingError: no tensor in the input, or the forward raised.
    """
    net = unwrap(model)
    given = list(tensors_in(example_input))
    if not given or any(tensor.dim() == 0 for tensor in given[:1]):
        raise PairingError(
            f"example_input holds no batch: found {type(example_input).__name__}. Give a tensor (B, ...), a tuple of "
            "positional arguments or a dict of keyword arguments"
        )
    with ExitStack() as stack:
        stack.enter_context(untraced(net, given))
        stack.enter_context(torch.enable_grad())
        for module in net.modules():
            module.training = False  # train() may be overridden, and then does more than this
        prepared = Inputs.of(example_input).map(_prepared)
        first = next((tensor for tensor in prepared.tensors() if tensor.is_floating_point()), None)
        sources = [] if first is None else [[first.grad_fn]]  # now: the net may replace it by working in place
        recorder = _Recorder(net)
        stack.enter_context(recorder.hooked())
        parameters = {name: _leaf(p) for name, p in net.named_parameters()}
        buffers = {name: b.detach().clone() for name, b in net.named_buffers()}
        try:
            output = torch.func.functional_call(net, {**parameters, **buffers}, prepared.args, dict(prepared.kwargs))
        except Exception as error:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in given)
            raise PairingError(
                f"the {role} ({type(net).__name__}) failed on example_input of shape {shapes}: "
                f"{type(error).__name__}: {error}"
            ) from error
        recorder.finish()
    end = next((t.grad_fn for t in tensors_in(output) if t.grad_fn is not None), None)
    order = in_order([] if end is None else [end])
    embeddings = [node for node in order if node.name().startswith("Embedding")]
    if embeddings and not all(tensor.is_floating_point() for tensor in given):
        sources.append(embeddings)  # what token ids turn into
    read = {id(node.variable) for node in order if hasattr(node, "variable")}
    names = parameter_names_by_id(net)
    return Trace(
        role=role,
        calls=dict(sorted(recorder.calls.items(), key=lambda item: item[1].end)),
        sources=sources,
        output=end,
        used={also for name, p in net.named_parameters() if id(parameters[name]) in read for also in names[id(p)]},
        batch=given[0].shape[0],
        image=first is not None and first.dim() == 4,
    )


class _Recorder:
    """Forward hooks on every module of a net, and what they saw."""

    def __init__(self, net: nn.Module) -> None:
        self.calls: dict[str, Call] = {}
        self.clock = 0
        self.names: dict[nn.Module, str] = {}
        for name, module in named_modules(net).items():
            self.names.setdefault(module, name)
        self.open: dict[nn.Module, list[list[tuple[Tensor, int]]]] = {}
        self.outputs: dict[str, tuple[Tensor, int]] = {}

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        try:
            for module in self.names:
                handles.append(module.register_forward_pre_hook(self.enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self.leave, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        name = self.names[module]
        begin = self.tick()
        self.calls.setdefault(name, Call(name, module, begin))
        self.open.setdefault(module, []).append([(t, t._version) for t in tensors_in((args, kwargs))])

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = self.names[module]
        inputs = self.open[module].pop()
        call = Call(name, module, self.calls[name].begin, self.tick(), found=type(output).__name__)
        self.calls[name] = call
        self.outputs.pop(name, None)
        if not isinstance(output, Tensor):
            return
        if not output.is_floating_point():
            call.found = f"{output.dtype} tensor"
            return
        call.shape, call.node, call.output_index = tuple(output.shape), output.grad_fn, output.output_nr
        # A dropout in eval mode hands its input on; with inplace=True it will overwrite that input in training.
        same = any(tensor is output and version == output._version for tensor, version in inputs)
        overwrites = bool(getattr(module, "inplace", False))
        call.passes_through = same and not overwrites
        if same and overwrites:
            for other, (tensor, _) in self.outputs.items():
                if tensor is output:
                    self.calls[other].changed_by = name
        self.outputs[name] = (output, output._version)

    def finish(self) -> None:
        """Find the outputs that were overwritten, and let go of all tensors."""
        for name, (tensor, version) in self.outputs.items():
            if tensor._version != version:
                later = (n for n, (t, v) in self.outputs.items() if t is tensor and v == tensor._version)
                self.calls[name].changed_by = next(later, "")
        self.outputs.clear()
        self.open.clear()


def _leaf(parameter: Tensor) -> Tensor:
    copy = alias(parameter)
    return copy.requires_grad_() if copy.is_floating_point() else copy


def _prepared(value: Tensor) -> Tensor:
    """A private copy of an input, part of a graph where floating; not a leaf, so that nets may work in place."""
    copy = value.detach().clone()
    return copy.requires_grad_().clone() if copy.is_floating_point() else copy
