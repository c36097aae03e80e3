"""A recorded forward pass: which modules ran, in which order, and what each gave out.

The pass runs in eval mode with gradients enabled and leaves no trace (:mod:`lwkd.nets.passes`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lwkd.nets.attributes import attributes_kept
from lwkd.nets.functional_module import detached_alias, uninitialized
from lwkd.nets.inputs import Inputs, tensors_in
from lwkd.nets.names import named_modules, named_parameters, unwrap
from lwkd.nets.outputs import feature_in, find_logits, gives_attention
from lwkd.nets.passes import plain_checkpoints, side_effect_free
from lwkd.nets.sharding import FSDP1, in_fsdp1, is_fsdp, unsharded, whole_parameters
from lwkd.pairing.spine import Node, topological_order


class PairingError(ValueError):
    """Student and teacher cannot be paired, or a pairing does not fit a model; the message says what to do."""


@dataclass(eq=False)
class Call:
    """One module in the pass: ``begin`` is when its first call began, all else is of its last call."""

    name: str
    module: nn.Module
    begin: int
    end: int = -1  # −1: not completed
    output_type: str = "nothing"  # in words
    shape: tuple[int, ...] | None = None  # None: no floating-point tensor
    node: Node = None
    output_index: int = 0  # which output of the node
    passes_through: bool = False  # the output is the unchanged input
    overwritten_by: str | None = None  # name of the module that overwrote the output later; "" for other code
    streams: tuple[tuple[int, ...], ...] = ()  # shapes of the sequences in an output of several tensors
    attends: bool = False  # the output has a place for attention probabilities, or consists of them
    norms: bool = False  # a norm over the channels, whose input keeps its values until the end of the pass
    batch_dim: int | None = None  # of a sequence (B, N, C) or (N, B, C), where the module says it
    given: tuple[Node, int] = (None, 0)  # of the first tensor that it was last called with, and which output of it

    @property
    def usable(self) -> bool:
        """The output is a tensor that keeps its values until the end of the pass."""
        return self.shape is not None and self.overwritten_by is None and not self.passes_through


@dataclass(eq=False)
class Trace:
    """One net's forward pass; ``calls`` is by canonical name, in the order in which they completed."""

    role: str  # "student" or "teacher"
    calls: dict[str, Call]
    sources: list[list[Node]]  # alternatives: nodes that stand for the input in the graph
    outputs: list[Node]  # of the tensors in the net's output, in their order
    used_parameters: set[str]  # names of those that the output depends on
    leaves: set[int]  # ``id`` of what stands for a parameter in the graph; empty where some parameter has no derivative
    batch: int
    image: bool  # the input is a picture: a square number of tokens may be its grid
    logits: Logits | str  # or why there are none


@dataclass(eq=False)
class Logits:
    """The logits in a net's output."""

    shape: tuple[int, ...]
    node: Node


def trace(model: nn.Module, role: str, example_input: Any) -> Trace:
    """Run the model once and record its modules.

    Args:
        model: any module; wrappers are removed.
        role: ``"student"`` or ``"teacher"``, for messages.
        example_input: a tensor, a tuple of positional arguments or a dict of keyword arguments.

    Raises:
        PairingError: no tensor in the input, a net in FSDP1, or the forward raised.
    """
    check_visible(model, role)
    net = unwrap(model)
    if in_fsdp1(model):
        raise PairingError(
            f"the {role} is in {FSDP1}, which has no whole parameters to make a pass with: call lwkd.pair before it is "
            "put there, since names of layers stay the same"
        )
    given, batches = tensors_in(example_input), Inputs.of(example_input).batch_sizes()
    if not batches:
        raise PairingError(
            f"example_input holds no batch: found {type(example_input).__name__}. Give a tensor (B, ...), a tuple of "
            "positional arguments or a dict of keyword arguments"
        )
    if (unready := uninitialized(net, f"the {role}")) is not None:
        raise PairingError(unready)
    given_parameters = _parameters(net, role)
    with ExitStack() as stack:
        stack.enter_context(side_effect_free(net, given))
        stack.enter_context(unsharded(net))
        stack.enter_context(plain_checkpoints())
        stack.enter_context(attributes_kept(net))
        stack.enter_context(torch.enable_grad())
        for module in net.modules():
            module.training = False  # not by eval(): an overridden train() may do more than set the mode
        prepared = Inputs.of(example_input).map(_graph_input)
        first = next((tensor for tensor in prepared.tensors() if tensor.is_floating_point()), None)
        # Read before the pass: a net that works in place on its input gives it another grad_fn.
        sources = [] if first is None else [[first.grad_fn]]
        recorder = _Recorder(net)
        stack.enter_context(recorder.hooks())
        # Leaves of the graph, and copies of them, which the forward may write to.
        leaves = {name: _leaf(p) for name, p in given_parameters.items()}
        parameters = {name: leaf.clone() for name, leaf in leaves.items()}
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
    if isinstance(net, torch.fx.GraphModule) and not any(call.name and call.shape for call in recorder.calls.values()):
        raise PairingError(
            f"no layer of the {role} ({type(net).__name__}) was called as a module, so that hooks cannot see its "
            "output: an exported graph holds operations only. Use the original module, or torch.export.unflatten"
        )
    outputs = list(dict.fromkeys(t.grad_fn for t in tensors_in(output) if t.grad_fn is not None))
    order = topological_order(outputs)
    embeddings = [node for node in order if node.name().startswith("Embedding")]
    if embeddings and not all(tensor.is_floating_point() for tensor in given):
        sources.append(embeddings)  # token ids carry no graph: it begins where they are looked up
    read = {id(node.variable) for node in order if hasattr(node, "variable")}
    used = {id(p) for name, p in net.named_parameters() if id(leaves[name]) in read}
    return Trace(
        role=role,
        calls=dict(sorted(recorder.calls.items(), key=lambda item: item[1].end)),
        sources=sources,
        outputs=outputs,
        leaves={id(leaf) for leaf in leaves.values()} if all(p.requires_grad for p in leaves.values()) else set(),
        used_parameters={name for name, p in named_parameters(net).items() if id(p) in used},
        batch=max(
            batches, key=lambda rows: sum(call.shape[:1] == (rows,) for call in recorder.calls.values() if call.shape)
        ),
        image=first is not None and first.dim() == 4,
        logits=_logits(output, f"the {role} ({type(net).__name__})"),
    )


def unlike_in_training(model: nn.Module, role: str, example_input: Any, calls: Iterable[Call]) -> set[str]:
    """Names of those layers that give no tensor, or one of other dimensions, in train mode, as detection heads do.

    Looked at are layers of others whose forward asks for the mode. A net that cannot run on this input in train mode
    (batch norms of one row, losses that need labels) says nothing.
    """
    asking = [call for call in calls if _asks_for_mode(call.module)]
    if not asking:
        return set()
    net, found = unwrap(model), set[str]()
    parameters = _parameters(net, role)

    def compare(call: Call, output: Any) -> None:
        feature = feature_in(output)
        if not isinstance(feature, Tensor) or feature.dim() != len(call.shape or ()):
            found.add(call.name)

    with ExitStack() as stack:
        stack.enter_context(side_effect_free(net, tensors_in(example_input)))
        stack.enter_context(unsharded(net))
        stack.enter_context(attributes_kept(net))
        stack.enter_context(torch.no_grad())
        stack.enter_context(suppress(Exception))
        for module in net.modules():
            module.training = True
        for call in asking:
            hook = call.module.register_forward_hook(lambda *given, call=call: compare(call, given[2]))
            stack.callback(hook.remove)
        state = {name: tensor.detach().clone() for name, tensor in (parameters | dict(net.named_buffers())).items()}
        given = Inputs.of(example_input).map(lambda tensor: tensor.detach().clone())
        torch.func.functional_call(net, state, given.args, dict(given.kwargs))
    return found


def _parameters(net: nn.Module, role: str) -> dict[str, Tensor]:
    """By name; whole ones of a net in ``fully_shard``, which every rank has to ask for.

    Raises:
        PairingError: they cannot be had whole.
    """
    if not is_fsdp(net):
        return dict(net.named_parameters())
    try:
        return whole_parameters(net, f"the {role}")
    except NotImplementedError as error:
        raise PairingError(f"{error}. Or call lwkd.pair before it is sharded: names of layers stay the same") from error


def _asks_for_mode(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "training" in code.co_names and not type(module).__module__.startswith("torch.")


def _logits(output: Any, whose: str) -> Logits | str:
    try:
        logits = find_logits(output, whose)
    except ValueError as error:
        return str(error)
    return Logits(tuple(logits.shape), logits.grad_fn)


def check_visible(model: Any, role: str) -> None:
    """Check that hooks can see a net's layers.

    Raises:
        PairingError: it is no module, or TorchScript; says what to use instead.
    """
    if not isinstance(model, nn.Module):
        raise PairingError(
            f"the {role} is {type(model).__name__}, expected a torch.nn.Module, whose layers hooks can see. Of an "
            "ExportedProgram use torch.export.unflatten(program); of a function, the module that it calls"
        )
    net = unwrap(model)
    eager = [module for module in net.modules() if not isinstance(module, torch.jit.ScriptModule)]
    scripted = isinstance(net, torch.jit.ScriptModule) or len(eager) < len(list(net.modules()))
    if scripted and not any(module._parameters for module in eager):
        raise PairingError(
            f"the {role} ({type(net).__name__}) is TorchScript, whose layers run without hooks, so that lwkd cannot "
            "see what they give out, for any signal. Use the eager module it was made from (build it and load its "
            "state_dict)"
        )


class _Recorder:
    """Forward hooks on every module of a net, and the calls that they recorded."""

    def __init__(self, net: nn.Module) -> None:
        self.calls: dict[str, Call] = {}
        self.clock = 0
        self.names: dict[nn.Module, str] = {}
        for name, module in named_modules(net).items():
            if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                self.names.setdefault(module, name)
        # Tensors with their versions, which count the writes in place.
        self.open: dict[nn.Module, list[list[tuple[Tensor, int]]]] = {}  # inputs of the calls not completed yet
        self.outputs: dict[str, tuple[Tensor, int]] = {}
        self.normed: dict[str, tuple[Tensor, int]] = {}  # inputs of norms over the channels

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    @contextmanager
    def hooks(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self.names:
                stack.enter_context(module.register_forward_pre_hook(self.enter, with_kwargs=True))
                stack.enter_context(module.register_forward_hook(self.leave, with_kwargs=True))
            yield

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        name = self.names[module]
        begin = self.tick()
        self.calls.setdefault(name, Call(name, module, begin))
        self.open.setdefault(module, []).append([(t, t._version) for t in tensors_in((args, kwargs))])

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = self.names[module]
        inputs = self.open[module].pop()
        call = Call(name, module, self.calls[name].begin, self.tick(), output_type=type(output).__name__)
        self.calls[name] = call
        self.outputs.pop(name, None)
        self.normed.pop(name, None)
        if inputs:
            call.given = inputs[0][0].grad_fn, inputs[0][0].output_nr
        call.streams = _streams(output)
        call.attends, output = gives_attention(output), feature_in(output)
        if not isinstance(output, Tensor):
            return
        if not output.is_floating_point() or output.is_nested:
            call.output_type = "nested tensor" if output.is_nested else f"{output.dtype} tensor"
            return
        call.shape, call.node, call.output_index = tuple(output.shape), output.grad_fn, output.output_nr
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and output.dim() == 3 and inputs:
            call.batch_dim = 0 if module.batch_first else 1
        call.attends |= output.grad_fn is not None and output.grad_fn.name().startswith("Softmax")
        # A dropout in eval mode returns its input; with inplace=True it will overwrite that input in training.
        same = any(tensor is output and version == output._version for tensor, version in inputs)
        overwrites = bool(getattr(module, "inplace", False))
        call.passes_through = same and not overwrites
        if same and overwrites:
            for other, (tensor, _) in self.outputs.items():
                if tensor is output:
                    self.calls[other].overwritten_by = name
        self.outputs[name] = (output, output._version)
        if inputs and inputs[0][0].shape == output.shape and _norms_channels(module):
            call.norms, self.normed[name] = True, inputs[0]

    def finish(self) -> None:
        """Find the outputs that were overwritten in place, and let go of all tensors."""
        for name, (tensor, version) in self.outputs.items():
            if tensor._version != version:
                later = (n for n, (t, v) in self.outputs.items() if t is tensor and v == tensor._version)
                self.calls[name].overwritten_by = next(later, "")
        for name, (tensor, version) in self.normed.items():
            self.calls[name].norms = tensor._version == version
        self.outputs.clear()
        self.normed.clear()
        self.open.clear()


def _streams(output: Any) -> tuple[tuple[int, ...], ...]:
    """Shapes of the sequences (B, N, C) of one width that a module returns side by side, no attention among them."""
    if not isinstance(output, (tuple, list)):
        return ()
    shapes = [tuple(t.shape) for t in output if isinstance(t, Tensor) and t.dim() == 3 and t.is_floating_point()]
    alike = [shape for shape in shapes if shape[::2] == shapes[0][::2]]
    return tuple(alike) if len(alike) > 1 else ()


def _norms_channels(module: nn.Module) -> bool:
    """Whether a module scales every position by its own channels, as layer norm and RMS norm do, whoever wrote them."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return len(module.normalized_shape) == 1
    name = type(module).__name__.lower()
    return "layernorm" in name or "rmsnorm" in name


def _leaf(parameter: Tensor) -> Tensor:
    copy = detached_alias(parameter)
    return copy.requires_grad_() if copy.is_floating_point() or copy.is_complex() else copy


def _graph_input(value: Tensor) -> Tensor:
    """A private copy of an input; a floating-point one has a graph but is no leaf, so that nets may work in place."""
    copy = value.detach().clone()
    return copy.requires_grad_().clone() if copy.is_floating_point() else copy
