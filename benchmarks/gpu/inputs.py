"""The cases of the microbenchmarks: which op, at which size, in which form, beside which implementations.

Legend: ``L`` layers, ``B`` batch; a feature's shape is ``(B, C, H, W)``. Student before teacher.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch._functorch.config  # which `import torch` leaves out
from torch import Tensor

from benchmarks.gpu import liger
from benchmarks.gpu.timing import Call
from benchmarks.harness import SMALL, flat
from benchmarks.ops.hutchinson import SEED, eager_signs, eager_trace
from benchmarks.shapes import CIFAR, FORMS, Shapes, pairs, stages
from lwkd import ops, reference
from lwkd.program.models.registry import build

WIDER = 4
"""Times as many channels in the teacher's features as in the student's."""

SETS = 2
"""Of inputs, which calls go through in rotation, so that no call finds its tensors where those of the last one lay."""


@dataclass(frozen=True)
class Case:
    """One comparison; ``shapes`` are those of the student's features, or of the parameters."""

    op: str
    size: str
    shapes: Shapes
    dtype: torch.dtype = torch.float32
    memory: str = "contiguous"
    compiles: bool = True
    """Whether ``torch.compile`` is measured too; hundreds of layers would take it minutes."""

    @property
    def name(self) -> str:
        """What it is called in tables."""
        form = "fp32" if self.dtype == torch.float32 else "bf16"
        return f"{self.op}, {self.size}, {form}" + (", channels last" if self.memory == "channels_last" else "")


@dataclass(frozen=True)
class Work:
    """Implementations of a case by name, and the bytes that a call has to move."""

    implementations: dict[str, Call]
    bytes: int
    check: Callable[[], float]
    """Relative error of ours against eager PyTorch on the first set."""

    left_out: dict[str, str] = field(default_factory=dict)
    """Which implementation cannot run here, and why."""


def cases() -> list[Case]:
    """All cases, those that matter most first: a run that is out of time leaves the last ones out."""
    if SMALL:
        features: dict[str, Shapes] = {"small B=2": stages(2, 4, 8, 2)}
        parameters: dict[str, Shapes] = {"2 tensors": ((8, 4, 3, 3), (8,))}
        layers: tuple[int, ...] = (1, 2)
    else:
        features = {"cifar B=128": CIFAR, "imagenet B=64": stages(64, 64, 56, 4), "imagenet B=1": stages(1, 64, 56, 4)}
        with torch.device("meta"):
            resnet18 = build("resnet18", classes=1000, channels=3, size=224)
        parameters = {
            "resnet18": tuple(tuple(p.shape) for p in resnet18.parameters()),
            "4 x 1024x1024x3x3": ((1024, 1024, 3, 3),) * 4,
        }
        layers = (16, 1, 64, 512)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    forms = [(dtypes[dtype], memory) for memory, dtype in FORMS]
    plain, mixed = (forms[0], forms[3]), (forms[2], forms[1])
    found = [
        Case(op, size, shapes, dtype, memory)
        for op in ("divergence", "divergence backward", "maps and tangents", "jacobian sums")
        for size, shapes in features.items()
        for dtype, memory in plain
    ]
    found += [
        Case(op, size, shapes, dtype)
        for op in ("rademacher", "hutchinson trace")
        for size, shapes in parameters.items()
        for dtype in dtypes.values()
    ]
    found += [Case("launch", f"L={count}", ((8, 16, 8, 8),) * count, compiles=count <= 16) for count in layers]
    found += [Case("rate update", f"L={count}", ((count,),)) for count in layers if count != 1]
    found += [
        Case("divergence", size, shapes, dtype, memory) for size, shapes in features.items() for dtype, memory in mixed
    ]
    return found


def size_of(tensors: Sequence[Tensor]) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """‖found − expected‖ / ‖expected‖ over all tensors; infinite where something is NaN."""
    off = sum(float((f.double() - e.double()).square().sum()) for f, e in zip(found, expected, strict=True))
    scale = sum(float(e.double().square().sum()) for e in expected)
    error = (off / scale) ** 0.5 if scale else off**0.5
    return error if error == error else float("inf")


class Arguments(NamedTuple):
    """One set of inputs: what lwkd is called with, what the others are, and the bytes that a call has to move."""

    ours: tuple[Any, ...]
    theirs: tuple[Any, ...]
    bytes: int


def _pair(case: Case, device: torch.device, wider: int = 1) -> Arguments:
    """Two lists of tensors that are read once."""
    pair = pairs(case.shapes, case.dtype, case.memory, wider=wider, device=device)
    return Arguments(pair, pair, size_of([*pair[0], *pair[1]]))


def _backward(case: Case, device: torch.device) -> Arguments:
    """The student's features are read, and as much is written."""
    student, teacher = pairs(case.shapes, case.dtype, case.memory, wider=WIDER, grad="first", device=device)
    given = student, teacher, torch.linspace(1, 2, len(student), device=device)
    return Arguments(given, given, 2 * size_of(student))


def _rademacher(case: Case, device: torch.device) -> Arguments:
    like, _ = pairs(case.shapes, case.dtype, device=device)
    return Arguments((like, SEED), (like,), size_of(like))


def _trace(case: Case, device: torch.device) -> Arguments:
    products, _ = pairs(case.shapes, case.dtype, device=device)
    layer_of = [tensor // 3 for tensor in range(len(products))]
    layers, index = layer_of[-1] + 1, torch.tensor(layer_of, device=device)
    probes = ops.rademacher(products, SEED)
    return Arguments((products, layer_of, SEED, layers), (products, probes, index, layers), size_of(products))


def _rates(case: Case, device: torch.device) -> Arguments:
    (layers,) = case.shapes[0]
    statistics = torch.rand(layers, 1, device=device) + 0.1
    given = reference.initial_rates(layers, device=device), statistics
    return Arguments(given, given, size_of([*given[0], statistics]))


def _gradient(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """The backward pass alone: each set of inputs goes through the forward pass once."""
    results: dict[int, Tensor] = {}

    def call(student: list[Tensor], teacher: list[Tensor], grad: Tensor) -> Any:
        if id(student) not in results:
            results[id(student)] = function(student, teacher)
        return torch.autograd.grad(results[id(student)], student, grad, retain_graph=True)

    return call


class Op(NamedTuple):
    """How the inputs of an op are made, lwkd's function, that in eager PyTorch, and what is done with either."""

    make: Callable[[Case, torch.device], Arguments]
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function


OPS = {
    "divergence": Op(partial(_pair, wider=WIDER), ops.attention_divergence, reference.attention_divergence),
    "divergence backward": Op(_backward, ops.attention_divergence, reference.attention_divergence, _gradient),
    "launch": Op(_pair, ops.attention_divergence, reference.attention_divergence),
    "maps and tangents": Op(_pair, ops.attention_maps, reference.attention_maps),
    "jacobian sums": Op(_pair, ops.jacobian_sums, reference.jacobian_sums),
    "rademacher": Op(_rademacher, ops.rademacher, eager_signs),
    "hutchinson trace": Op(_trace, ops.hutchinson_trace, eager_trace),
    "rate update": Op(
        _rates, lambda s, x: list(ops.update_rates(s, x)[0]), lambda s, x: list(reference.update_rates(s, x)[0])
    ),
}


def work(case: Case, device: torch.device, sets: int = SETS) -> Work:
    """Build the inputs and implementations of a case, with so many sets of inputs."""
    op = OPS[case.op]
    inputs = [op.make(case, device) for _ in range(sets)]

    def in_rotation(function: Callable[..., Any], side: str) -> Call:
        arguments = itertools.cycle([getattr(of, side) for of in inputs])
        return lambda: function(*next(arguments))

    ours, theirs = op.wrap(op.ours), op.wrap(op.theirs)
    found = {"lwkd": in_rotation(ours, "ours"), "eager": in_rotation(theirs, "theirs")}
    left_out: dict[str, str] = {}
    if case.compiles:
        torch._functorch.config.donated_buffer = False  # a backward pass is repeated over one forward pass
        compiled = torch.compile(op.theirs, fullgraph=True, backend="aot_eager" if SMALL else "inductor")
        found["torch.compile"] = in_rotation(op.wrap(compiled), "theirs")
    if case.op == "launch":
        found["lwkd, same addresses"] = partial(ours, *inputs[0].ours)
    if case.op == "divergence":
        if reason := liger.why_not(device):
            left_out["liger"] = reason
        else:
            found["liger"] = in_rotation(liger.divergence, "theirs")

    def check() -> float:
        result = flat(ours(*inputs[0].ours))
        if case.op == "rademacher":  # other random signs than those of eager PyTorch
            return max(float((sign.abs() - 1).abs().max()) for sign in result)
        return relative_error(result, flat(theirs(*inputs[0].theirs)))

    return Work(found, inputs[0].bytes, check, left_out)
