"""The cases of the microbenchmarks: which op, at which size, in which form, and who competes.

Legend: ``L`` layers, ``B`` batch; a feature's shape is ``(B, C, H, W)``. Student before teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu import liger
from gpu.clock import Call
from gpu.contest import Prepare
from lwkd import ops, reference

Shapes = tuple[tuple[int, ...], ...]
SEED = 1
MOST_SETS = 64
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
WIDER = 4
"""Times as many channels in the teacher's features as in the student's."""


def stages(batch: int, channels: int, side: int, count: int) -> Shapes:
    """Features behind the stages of a ResNet: channels double where the side halves."""
    return tuple((batch, channels << stage, side >> stage, side >> stage) for stage in range(count))


FEATURES: dict[str, Shapes] = {
    "cifar B=128": stages(128, 16, 32, 3),
    "imagenet B=64": stages(64, 64, 56, 4),
    "imagenet B=1": stages(1, 64, 56, 4),
}
SMALL_FEATURES: dict[str, Shapes] = {"small B=2": stages(2, 4, 8, 2)}

# Of a ResNet-18, one tensor a convolution and a norm, and of four wide convolutions.
RESNET18 = (
    (64, 3, 7, 7),
    *((64, 64, 3, 3),) * 4,
    *((64,),) * 10,
    *(
        shape
        for c in (128, 256, 512)
        for shape in ((c, c // 2, 3, 3), *((c, c, 3, 3),) * 3, (c, c // 2, 1, 1), *((c,),) * 10)
    ),
    (1000, 512),
    (1000,),
)
PARAMETERS: dict[str, Shapes] = {"resnet18": RESNET18, "4 x 1024x1024x3x3": ((1024, 1024, 3, 3),) * 4}
SMALL_PARAMETERS: dict[str, Shapes] = {"2 tensors": ((8, 4, 3, 3), (8,))}


@dataclass(frozen=True)
class Case:
    """One comparison. ``memory`` is a key of :data:`FORMATS`; ``shapes`` those of the student, or of the parameters."""

    op: str
    size: str
    shapes: Shapes
    dtype: torch.dtype = torch.float32
    memory: str = "NCHW"
    compiles: bool = True
    """Whether ``torch.compile`` competes; hundreds of layers would take it minutes."""

    @property
    def name(self) -> str:
        """What it is called in tables."""
        form = "fp32" if self.dtype == torch.float32 else "bf16"
        return f"{self.op}, {self.size}, {form}" + (", channels last" if self.memory != "NCHW" else "")


@dataclass(frozen=True)
class Work:
    """Contenders of a case, each with one call for every set of inputs; ``bytes`` that a call has to move."""

    contenders: dict[str, list[Prepare]]
    bytes: int
    check: Callable[[], float]
    """Relative error of ours against eager PyTorch on the first set."""

    left_out: dict[str, str] = field(default_factory=dict)
    """Who cannot compete here, and why."""


def cases(small: bool) -> list[Case]:
    """All cases, those that matter most first: a run that is out of time leaves the last ones out."""
    features, parameters = (SMALL_FEATURES, SMALL_PARAMETERS) if small else (FEATURES, PARAMETERS)
    fp32, bf16 = torch.float32, torch.bfloat16
    plain, mixed = ((fp32, "NCHW"), (bf16, "channels_last")), ((fp32, "channels_last"), (bf16, "NCHW"))
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
        for dtype in (fp32, bf16)
    ]
    layers = (1, 2) if small else (16, 1, 64, 512)
    tiny = (8, 16, 8, 8)
    found += [Case("launch", f"L={count}", (tiny,) * count, compiles=count <= 16) for count in layers]
    found += [Case("rate update", f"L={count}", ((count,),)) for count in layers if count != 1]
    found += [
        Case("divergence", size, shapes, dtype, memory) for size, shapes in features.items() for dtype, memory in mixed
    ]
    return found


class Maker:
    """Random inputs of a case on a device; never zeros, which hide mistakes and may run faster."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator(device).manual_seed(0)

    def tensors(self, wider: int = 1, grad: bool = False) -> list[Tensor]:
        """One tensor a shape; ``wider`` times as many channels."""
        found = []
        for shape in self.case.shapes:
            wide = (shape[0], shape[1] * wider, *shape[2:]) if wider > 1 else shape
            tensor = torch.randn(wide, generator=self.generator, device=self.device).to(self.case.dtype)
            if len(shape) == 4:
                tensor = tensor.contiguous(memory_format=FORMATS[self.case.memory])
            found.append(tensor.requires_grad_(grad))
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


def flat(result: Any) -> list[Tensor]:
    """All tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in flat(part)]


def _always(function: Callable[..., Any], *arguments: Any) -> Prepare:
    call = partial(function, *arguments)
    return lambda: call


def _backward(function: Callable[..., Tensor], student: list[Tensor], teacher: list[Tensor], grad: Tensor) -> Prepare:
    def prepare() -> Call:
        divergence = function(student, teacher)
        return lambda: torch.autograd.grad(divergence, student, grad)

    return prepare


def _compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend)


def eager_signs(like: list[Tensor]) -> list[Tensor]:
    """Random signs, as one writes them."""
    return [torch.randint(0, 2, p.shape, dtype=p.dtype, device=p.device) * 2 - 1 for p in like]


def eager_trace(products: list[Tensor], probes: list[Tensor], index: Tensor, layers: int) -> Tensor:
    """The probe is at hand and read, and sums of half precision are float32 too."""
    each = [(v * p).sum(dtype=torch.float32) for v, p in zip(probes, products, strict=True)]
    return torch.zeros(layers, device=index.device).index_add(0, index, torch.stack(each))


def eager_rates(state: reference.RateState, statistics: Tensor) -> list[Tensor]:
    """The reference, its state as a list."""
    return list(reference.update_rates(state, statistics)[0])


def work(case: Case, device: torch.device, cache_bytes: int, backend: str, sets: int | None = None) -> Work:
    """Build the inputs and contenders of a case.

    Args:
        case: which.
        device: where.
        cache_bytes: the sets of inputs are together at least three times as large, up to :data:`MOST_SETS`.
        backend: of ``torch.compile``.
        sets: how many sets; None for as many as the cache asks for.
    """
    maker = Maker(case, device)
    if case.op == "divergence backward":
        return _of_backward(case, maker, cache_bytes, backend, sets)
    inputs, functions, moved = [], {}, 0
    while not inputs or len(inputs) < (sets or min(MOST_SETS, max(2, -(-3 * cache_bytes // max(moved, 1))))):
        arguments, functions, moved = OPS[case.op](case, maker)
        inputs.append(arguments)
    plain = {"lwkd": functions["lwkd"], "eager": functions["eager"]}
    if case.compiles:
        plain["torch.compile"] = _compiled(functions["compiled"], backend)
    contenders = {
        name: [_always(f, *(arguments["lwkd" if name == "lwkd" else "eager"])) for arguments in inputs]
        for name, f in plain.items()
    }
    if case.op == "launch":
        contenders["lwkd, same addresses"] = contenders["lwkd"][:1]
    left_out: dict[str, str] = {}
    if case.op == "divergence":
        reason = liger.why_not(device)
        if reason is None:
            contenders["liger"] = [_always(liger.divergence, *arguments["eager"]) for arguments in inputs]
        else:
            left_out["liger"] = reason
    first = inputs[0]

    def check() -> float:
        ours = flat(functions["lwkd"](*first["lwkd"]))
        if case.op == "rademacher":  # other random signs than those of eager PyTorch
            return max(float((sign.abs() - 1).abs().max()) for sign in ours)
        return relative_error(ours, flat(functions["eager"](*first["eager"])))

    return Work(contenders, moved, check, left_out)


Made = tuple[dict[str, tuple[Any, ...]], dict[str, Callable[..., Any]], int]
"""Arguments of ours and of the others, the functions, and the bytes that have to be moved."""


def _pair_of(ours: Callable[..., Any], theirs: Callable[..., Any], wider: int) -> Callable[[Case, Maker], Made]:
    """Ops on two lists of tensors that are read once."""

    def make(case: Case, maker: Maker) -> Made:
        pair = maker.tensors(), maker.tensors(wider)
        return {"lwkd": pair, "eager": pair}, _functions(ours, theirs), size_of([*pair[0], *pair[1]])

    return make


def _functions(ours: Callable[..., Any], theirs: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {"lwkd": ours, "eager": theirs, "compiled": theirs}


def _rademacher(case: Case, maker: Maker) -> Made:
    like = maker.tensors()
    return {"lwkd": (like, SEED), "eager": (like,)}, _functions(ops.rademacher, eager_signs), size_of(like)


def _trace(case: Case, maker: Maker) -> Made:
    products = maker.tensors()
    layer_of = [tensor // 3 for tensor in range(len(products))]
    layers, index = layer_of[-1] + 1, torch.tensor(layer_of, device=maker.device)
    probes = ops.rademacher(products, SEED)
    given = {"lwkd": (products, layer_of, SEED, layers), "eager": (products, probes, index, layers)}
    return given, _functions(ops.hutchinson_trace, eager_trace), size_of(products)


def _rates(case: Case, maker: Maker) -> Made:
    (layers,) = case.shapes[0]
    statistics = torch.rand(layers, 1, generator=maker.generator, device=maker.device) + 0.1
    state = reference.initial_rates(layers, device=maker.device)
    functions = _functions(lambda s, x: list(ops.update_rates(s, x)[0]), eager_rates)
    return {"lwkd": (state, statistics), "eager": (state, statistics)}, functions, size_of([*state, statistics])


OPS: dict[str, Callable[[Case, Maker], Made]] = {
    "divergence": _pair_of(ops.attention_divergence, reference.attention_divergence, WIDER),
    "launch": _pair_of(ops.attention_divergence, reference.attention_divergence, 1),
    "maps and tangents": _pair_of(ops.attention_maps, reference.attention_maps, 1),
    "jacobian sums": _pair_of(ops.jacobian_sums, reference.jacobian_sums, 1),
    "rademacher": _rademacher,
    "hutchinson trace": _trace,
    "rate update": _rates,
}


def _of_backward(case: Case, maker: Maker, cache_bytes: int, backend: str, sets: int | None) -> Work:
    """The backward pass alone: it reads the student's features and writes as much."""
    functions = {"lwkd": ops.attention_divergence, "eager": reference.attention_divergence}
    if case.compiles:
        functions["torch.compile"] = _compiled(reference.attention_divergence, backend)
    grad = torch.linspace(1, 2, len(case.shapes), device=maker.device)
    inputs: list[tuple[list[Tensor], list[Tensor]]] = []
    moved = 0
    while not inputs or len(inputs) < (sets or min(MOST_SETS, max(2, -(-3 * cache_bytes // max(moved, 1))))):
        inputs.append((maker.tensors(grad=True), maker.tensors(WIDER)))
        moved = 2 * size_of(inputs[0][0])
    contenders = {name: [_backward(f, *pair, grad) for pair in inputs] for name, f in functions.items()}

    def check() -> float:
        ours, theirs = (flat(contenders[name][0]()()) for name in ("lwkd", "eager"))
        return relative_error(ours, theirs)

    return Work(contenders, moved, check)
