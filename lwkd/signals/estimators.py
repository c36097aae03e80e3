r"""How the maps of all paired layers move: the estimators behind the Jacobian signal.

Legend: ``L`` layers, ``B`` rows, ``N`` map positions (of the smaller size); ``m_l`` a layer's normalised map.

Each function takes both subjects and gives L derivatives of the student and L of the teacher, of equal shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lwkd import ops, reference
from lwkd.nets.inputs import tensors_in
from lwkd.reference import common_size
from lwkd.signals.measured_net import MeasuredNet, same_input
from lwkd.signals.norms import WrittenOut

Pair = tuple[list[Tensor], list[Tensor]]
Estimate = Callable[[MeasuredNet, MeasuredNet, int, float], Pair]

STEP = {torch.float32: 1e-4, torch.float64: 1e-6}
"""Step of the finite difference, in units of rms(x) / rms(t). In a ReLU net its error grows with the root of the step,
that of rounding with its inverse."""

AGREEMENT = 0.3
"""How far a forward-mode tangent may be from the finite difference, relative to the latter: in a ReLU net the
difference itself is a few per cent off; a tangent that was lost on one branch is off by much more."""

ROUNDING = 16
"""Error of a map, in units of the last place, below which a difference of two says nothing: behind a LayerNorm all
positions have the same norm, and what is left of the map's motion is rounding."""


def jvp(student: MeasuredNet, teacher: MeasuredNet, seed: int, power: float) -> Pair:
    """``J_l t`` ``(B, N)``, exact, in one forward-mode pass of each net."""
    tangent = _tangent(student, teacher, seed)
    pushed = []
    for subject in (student, teacher):
        with subject.measured():
            pushed.append(subject.pushed_forward(tangent.to(subject.input().dtype)))
    sizes = _sizes(pushed[0][0], pushed[1][0])
    a, b = (ops.attention_maps(features, moved, power=power, sizes=sizes)[1] for features, moved in pushed)
    return list(a), list(b)


def difference(student: MeasuredNet, teacher: MeasuredNet, seed: int, power: float) -> Pair:
    """``(m_l(x + h t) − m_l(x)) / h`` ``(B, N)``, with the same units dropped in both passes."""
    return _differences(student, teacher, seed, power)[0]


def _differences(
    student: MeasuredNet, teacher: MeasuredNet, seed: int, power: float
) -> tuple[Pair, tuple[list[float], list[float]]]:
    """Beside the differences, the norm that rounding of the maps alone may give to each."""
    tangent = _tangent(student, teacher, seed)
    ends, steps = [], []
    for subject in (student, teacher):
        x = subject.input()
        step = STEP[x.dtype] * _rms(x)
        with subject.measured(), torch.no_grad():
            inputs = (None, subject.with_input(x + step * tangent.to(x.dtype)))
            ends.append([[f.detach() for f in subject.viewed(subject.run(given)[1])] for given in inputs])
        steps.append(step)
    sizes = _sizes(ends[0][0], ends[1][0])
    found, noise = [], []
    for (before, after), step in zip(ends, steps, strict=True):
        plain, moved = _maps(before, power, sizes), _maps(after, power, sizes)
        found.append([(m - p) / step for m, p in zip(moved, plain, strict=True)])
        noise.append([ROUNDING * torch.finfo(m.dtype).eps * float(m.norm()) / step for m in plain])
    return (found[0], found[1]), (noise[0], noise[1])


def vjp(student: MeasuredNet, teacher: MeasuredNet, seed: int, power: float) -> Pair:
    """``d(u·m_l)/dx`` in the shape of the input, with the same random signs ``u`` for both: one backward a layer."""
    same_input(student, teacher)

    def pulled(subject: MeasuredNet, x: Tensor, maps: list[Tensor], signs: list[Tensor]) -> list[Tensor]:
        return [
            torch.autograd.grad(m, x, u, retain_graph=True, materialize_grads=True)[0]
            for m, u in zip(maps, signs, strict=True)
        ]

    return _backward(student, teacher, seed, power, pulled)


def parameter_sums(student: MeasuredNet, teacher: MeasuredNet, seed: int, power: float) -> Tensor:
    r"""``(L, 4)`` with ``aa = ‖d(u·m_l)/dθ_l‖²`` of the student, ``bb`` of the teacher, and 0 for what has no meaning.

    ``E aa = ‖dm_l/dθ_l‖_F²``; θ_l are the parameters of the layer's own segment.
    """

    def squares(subject: MeasuredNet, x: Tensor, maps: list[Tensor], signs: list[Tensor]) -> list[Tensor]:
        found = []
        for m, u, names in zip(maps, signs, subject.owned, strict=True):
            owned = [subject.twin.parameters[name] for name in subject.twin.names_of(names)]
            grads = torch.autograd.grad(m, owned, u, retain_graph=True, materialize_grads=True) if owned else ()
            none = torch.zeros((), dtype=torch.float64, device=m.device)
            found.append(torch.stack([g.double().square().sum() for g in grads] or [none]).sum())
        return found

    for subject in (student, teacher):
        for parameter in subject.twin.parameters.values():
            parameter.requires_grad_(parameter.is_floating_point())
    aa, bb = (torch.stack(found) for found in _backward(student, teacher, seed, power, squares))
    return torch.stack([aa, bb, torch.zeros_like(aa), torch.zeros_like(aa)], dim=1)


def output(student: MeasuredNet, teacher: MeasuredNet, seed: int, power: float) -> Pair:
    """Map ``(B, N)`` of the gradient of the teacher's top-class logit with respect to each layer's output."""

    def pulled() -> Pair:
        (out_S, features_S), (out_T, features_T) = _with_graph(student), _with_graph(teacher)
        top = _logits(out_T, "teacher").argmax(1, keepdim=True)
        gradients = []
        for subject, out, features in ((student, out_S, features_S), (teacher, out_T, features_T)):
            logits = _logits(out, subject.whose)
            if logits.shape[1] <= int(top.max()):
                raise ValueError(
                    f"the {subject.whose} has {logits.shape[1]} classes, the teacher's top class is {int(top.max())}; "
                    "estimator='output' compares the gradient of one class, so both nets need the same classes"
                )
            found = torch.autograd.grad(logits.gather(1, top).sum(), features, materialize_grads=True)
            gradients.append(subject.viewed(found))
        a, b = (_maps(g, power, _sizes(*gradients)) for g in gradients)
        return a, b

    return _both_held(student, teacher, pulled)


def second_derivatives(student: MeasuredNet, teacher: MeasuredNet, seed: int, power: float = 2.0) -> Pair:
    """Second directional derivative of the maps along one tangent, ``d²m_l(x + εt)/dε²`` ``(B, N)``.

    One pass of each net in nested forward mode (``torch.func.jvp`` of itself) gives all layers; one plain pass of each
    before it says how large the maps are.
    """
    tangent = _tangent(student, teacher, seed)
    plain = []
    for subject in (student, teacher):
        with subject.measured(), torch.no_grad():
            plain.append(subject.viewed(subject.run()[1]))
    sizes = _sizes(*plain)
    found = []
    for subject in (student, teacher):
        x, t = subject.input(), tangent.to(subject.input().dtype)

        def maps(x: Tensor, subject: MeasuredNet = subject) -> tuple[Tensor, ...]:
            features = subject.viewed(subject.run(subject.with_input(x))[1])
            found = reference.attention_maps(features, power=power, sizes=sizes)
            assert isinstance(found, list)
            return tuple(found)

        def moved(x: Tensor, t: Tensor = t, maps: Callable[..., tuple[Tensor, ...]] = maps) -> tuple[Tensor, ...]:
            return torch.func.jvp(maps, (x,), (t,))[1]

        with subject.measured(), torch.no_grad(), WrittenOut():
            try:
                found.append(list(torch.func.jvp(moved, (x,), (t,))[1]))
            except (RuntimeError, NotImplementedError) as error:
                first = str(error).strip().splitlines()[0]
                raise RuntimeError(
                    f"the {subject.whose} has an op without nested forward mode ({type(error).__name__}: {first}). Use "
                    "lwkd.signals.Hessian(wrt='parameters')"
                ) from error
    return found[0], found[1]


ESTIMATES: dict[str, Estimate] = {"jvp": jvp, "difference": difference, "vjp": vjp, "output": output}


def check_forward_mode(student: MeasuredNet, teacher: MeasuredNet, seed: int, power: float) -> None:
    """Compare the forward-mode derivative with a finite difference, once: an op may lose part of a tangent in silence.

    Raises:
        RuntimeError: they differ by more than :data:`AGREEMENT`; the layer is named.
    """
    forward, (approximate, noises) = jvp(student, teacher, seed, power), _differences(student, teacher, seed, power)
    for subject, found, expected, noise in zip((student, teacher), forward, approximate, noises, strict=True):
        for layer, one, other, rounding in zip(subject.layers, found, expected, noise, strict=True):
            size, off = float(other.norm()), float((one - other).norm())
            if off > AGREEMENT * size + rounding:
                raise RuntimeError(
                    f"layer {layer!r} of the {subject.whose}: the derivative by forward mode has norm "
                    f"{float(one.norm()):.3g} and is {off / size if size else float('inf'):.0%} off the finite "
                    f"difference, whose norm is {size:.3g}: some op loses part of the tangent. Use "
                    "lwkd.signals.Jacobian(estimator='difference')"
                )


# What the estimators have in common


def _tangent(student: MeasuredNet, teacher: MeasuredNet, seed: int) -> Tensor:
    return ops.rademacher([same_input(student, teacher)], seed)[0]


def _maps(features: Sequence[Tensor], power: float, sizes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    found = ops.attention_maps(features, power=power, sizes=sizes)
    assert isinstance(found, list)
    return found


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt()) or 1.0


def _sizes(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [common_size(s, t) for s, t in zip(student, teacher, strict=True)]


def _with_graph(subject: MeasuredNet) -> tuple[object, list[Tensor]]:
    """Output and raw features that carry a graph: from the parameters, for nothing may depend on a floating input."""
    for parameter in subject.twin.parameters.values():
        parameter.requires_grad_(parameter.is_floating_point())
    if subject.inputs.first_floating() is None:
        return subject.run()
    return subject.run(subject.with_input(subject.input().detach().requires_grad_()))


def _backward(
    student: MeasuredNet,
    teacher: MeasuredNet,
    seed: int,
    power: float,
    pull: Callable[[MeasuredNet, Tensor, list[Tensor], list[Tensor]], list[Tensor]],
) -> Pair:
    """Pull the same random signs back through the maps of both nets."""

    def pulled() -> Pair:
        runs = []
        for subject in (student, teacher):
            index = subject.inputs.first_floating()
            x = torch.empty(0) if index is None else subject.input().detach().requires_grad_()
            _, features = subject.run(None if index is None else subject.with_input(x))
            runs.append((subject, x, subject.viewed(features)))
        sizes = _sizes(runs[0][2], runs[1][2])
        signs: list[Tensor] = []
        found = []
        for subject, x, features in runs:
            maps = _maps(features, power, sizes)
            signs = signs or ops.rademacher(maps, seed)
            found.append(pull(subject, x, maps, [u.to(m.dtype) for u, m in zip(signs, maps, strict=True)]))
        return found[0], found[1]

    return _both_held(student, teacher, pulled)


def _both_held(student: MeasuredNet, teacher: MeasuredNet, function: Callable[[], Pair]) -> Pair:
    """Forward and backward passes of both nets, with autograd on; see ``FunctionalModule.holding``."""
    with student.measured(), teacher.measured(), torch.enable_grad():
        held: Pair = student.twin.holding(lambda: teacher.twin.holding(function))
    return held


def _logits(out: object, whose: str) -> Tensor:
    logits = next((t for t in tensors_in(out) if t.is_floating_point()), None)
    if logits is None or logits.dim() != 2:
        shape = "no tensor" if logits is None else f"shape {tuple(logits.shape)}"
        raise ValueError(f"the {whose} gives {shape}; expected logits (batch, classes) for a class to differentiate")
    return logits
