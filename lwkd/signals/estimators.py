r"""How the maps of all paired layers move: the estimators behind the Jacobian signal.

Legend: ``L`` layers, ``B`` rows, ``N`` map positions (of the smaller size); ``m_l`` a layer's normalised map.

Every estimator takes both nets, the seed of its probe and the exponent ``power`` of the maps. It gives L derivatives
of the student and L of the teacher, of equal shapes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lwkd import ops, reference
from lwkd.reference import common_size
from lwkd.signals.forward_mode import ExplicitNorms
from lwkd.signals.hutchinson import class_dimension_of, dense
from lwkd.signals.measured_net import NO_DERIVATIVE, MeasuredNet, first_line, same_input

Pair = tuple[list[Tensor], list[Tensor]]
Estimate = Callable[[MeasuredNet, MeasuredNet, int, float], Pair]

STEP = {torch.float32: 1e-4, torch.float64: 1e-6}
"""Step of the finite difference, in units of rms(x) / rms(t). In a ReLU net its error grows with the root of the step,
that of rounding with its inverse."""

AGREEMENT = 0.3
"""How far a forward-mode tangent may be from the finite difference, relative to the latter: in a ReLU net the
difference itself is a few per cent off; a tangent that was lost on one branch is off by much more."""

LENGTHS = (1.0, 16.0, 128.0)
"""Steps, in units of :data:`STEP`, at which a difference that disagrees with forward mode is taken again."""

ROUNDING = 16
"""Error of a map, in units of the last place, below which a difference of two says nothing: behind a LayerNorm all
positions have the same norm, and what is left of the map's motion is rounding."""


def jvp(student: MeasuredNet, teacher: MeasuredNet, seed: int, power: float) -> Pair:
    """``J_l t`` ``(B, N)``, exact, in one forward-mode pass of each net."""
    tangent = _tangent(student, teacher, seed)
    pairs = []
    for net in (student, teacher):
        with net.side_effect_free():
            pairs.append(net.jvp(tangent.to(net.input().dtype)))
    sizes = _sizes(pairs[0][0], pairs[1][0])
    a, b = (ops.attention_maps(features, tangents, power=power, sizes=sizes)[1] for features, tangents in pairs)
    return list(a), list(b)


def difference(student: MeasuredNet, teacher: MeasuredNet, seed: int, power: float) -> Pair:
    """``(m_l(x + h t) − m_l(x)) / h`` ``(B, N)``, with the same units dropped in both passes."""
    return _differences(student, teacher, seed, power)[0]


def _differences(
    student: MeasuredNet, teacher: MeasuredNet, seed: int, power: float, steps_long: float = 1.0
) -> tuple[Pair, tuple[list[float], list[float]]]:
    """The differences, and for each the norm that it may have from the rounding of the maps alone.

    ``steps_long``: length in units of :data:`STEP`; below 0 it goes backwards.
    """
    tangent = _tangent(student, teacher, seed)
    ends, steps = [], []
    for net in (student, teacher):
        x = net.input()
        step = steps_long * STEP[x.dtype] * _rms(x)
        with net.side_effect_free(), torch.no_grad():
            inputs = (None, net.with_input(x + step * tangent.to(x.dtype)))
            ends.append([[f.detach() for f in net.viewed(net.run(given)[1])] for given in inputs])
        steps.append(step)
    sizes = _sizes(ends[0][0], ends[1][0])
    found, noise = [], []
    for (before, after), step in zip(ends, steps, strict=True):
        plain, moved = _maps(before, power, sizes), _maps(after, power, sizes)
        found.append([(m - p) / step for m, p in zip(moved, plain, strict=True)])
        noise.append([ROUNDING * torch.finfo(m.dtype).eps * float(m.norm()) / abs(step) for m in plain])
    return (found[0], found[1]), (noise[0], noise[1])


def vjp(student: MeasuredNet, teacher: MeasuredNet, seed: int, power: float) -> Pair:
    """``d(u·m_l)/dx`` in the shape of the input, with the same random signs ``u`` for both: one backward a layer."""
    same_input(student, teacher)

    def input_gradients(net: MeasuredNet, x: Tensor, maps: list[Tensor], signs: list[Tensor]) -> list[Tensor]:
        return [_gradients(net, layer, m, [x], u)[0] for layer, m, u in zip(net.layers, maps, signs, strict=True)]

    return _backward(student, teacher, seed, power, input_gradients)


def parameter_sums(student: MeasuredNet, teacher: MeasuredNet, seed: int, power: float) -> Tensor:
    """Sums ``(L, 4)``: ``aa = ‖d(u·m_l)/dθ_l‖²`` of the student, ``bb`` of the teacher, and twice 0.

    ``E aa = ‖dm_l/dθ_l‖_F²``; θ_l are the parameters of the layer's own segment. The two nets' parameters differ in
    shape, so ``ab`` and ``dd`` have no meaning.
    """

    def squares(net: MeasuredNet, x: Tensor, maps: list[Tensor], signs: list[Tensor]) -> list[Tensor]:
        found = []
        for layer, m, u, given in zip(net.layers, maps, signs, net.owned, strict=True):
            names = net.functional.resolve_names(given)
            net.functional.check_countable(names)
            if given and not names:
                found_none = f"layer {layer!r} of the {net.whose} has no floating-point parameter"
                raise RuntimeError(NO_DERIVATIVE.format(found_none, net.whose))
            owned = [net.functional.parameters[name] for name in names]
            grads = dense(_gradients(net, layer, m, owned, u)) if owned else ()
            none = torch.zeros((), dtype=torch.float64, device=m.device)
            found.append(torch.stack([g.double().square().sum() for g in grads] or [none]).sum())
        return found

    _require_parameter_gradients(student, teacher)
    aa, bb = (torch.stack(found) for found in _backward(student, teacher, seed, power, squares))
    return torch.stack([aa, bb, torch.zeros_like(aa), torch.zeros_like(aa)], dim=1)


def output(student: MeasuredNet, teacher: MeasuredNet, seed: int, power: float) -> Pair:
    """Map ``(B, N)`` of the gradient of the teacher's top-class logit with respect to each layer's output."""

    def gradient_maps() -> Pair:
        (_, out_S, features_S), (_, out_T, features_T) = _with_graph(student), _with_graph(teacher)
        logits_S, logits_T = _classes_second(student, out_S), _classes_second(teacher, out_T)
        top = logits_T.argmax(1, keepdim=True)
        rows_S, rows_T = (z.select(1, 0).shape for z in (logits_S, logits_T))
        if rows_S != rows_T:
            raise ValueError(
                f"the student gives shape {tuple(logits_S.shape)}; expected logits (batch, classes, ...) with the same "
                f"positions as the teacher's {tuple(logits_T.shape)}: estimator='output' compares the gradients of one "
                "class at each of them"
            )
        gradients = []
        for net, logits, features in ((student, logits_S, features_S), (teacher, logits_T, features_T)):
            if logits.shape[1] <= int(top.max()):
                raise ValueError(
                    f"the {net.whose} has {logits.shape[1]} classes, the teacher's top class is {int(top.max())}; "
                    "estimator='output' compares the gradient of one class, so both nets need the same classes"
                )
            chosen = logits.gather(1, top)
            # A class that a net masks by −inf has no gradient there.
            chosen = chosen.masked_fill(chosen == float("-inf"), 0.0).sum()
            found = _gradients(net, None, chosen, features, None, retain_graph=False)
            gradients.append(net.viewed(found))
        a, b = (_maps(g, power, _sizes(*gradients)) for g in gradients)
        _check_positions(student, a, b)
        return a, b

    # The graph goes back to the parameters, because nothing may depend on a floating-point input.
    _require_parameter_gradients(student, teacher)
    return _both_held(student, teacher, gradient_maps)


def _check_positions(student: MeasuredNet, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Check that no layer's maps are all in one position, in every row of both nets: such maps are always the same.

    Raises:
        ValueError: the logits hear of one position of a layer only; the layer is named.
    """
    for layer, one, other in zip(student.layers, a, b, strict=True):
        if one.shape[1] > 1 and bool(((one > 0).sum(1) <= 1).all() & ((other > 0).sum(1) <= 1).all()):
            raise ValueError(
                f"layer {layer!r}: the logits of both nets depend on one of its {one.shape[1]} positions alone (a head "
                "that reads the first token, say), so that estimator='output' finds the same map in any two nets and a "
                "divergence of 0. Pair other layers (lwkd.pair(..., layers={...})), or use "
                "lwkd.signals.Jacobian(wrt='parameters')"
            )


def second_derivatives(student: MeasuredNet, teacher: MeasuredNet, seed: int, power: float = 2.0) -> Pair:
    """Second directional derivative of the maps along one tangent, ``d²m_l(x + εt)/dε²`` ``(B, N)``.

    One pass of each net in nested forward mode (``torch.func.jvp`` of itself) gives all layers; a plain pass of each
    before it gives the sizes of the maps.
    """
    tangent = _tangent(student, teacher, seed)
    plain = []
    for net in (student, teacher):
        with net.side_effect_free(), torch.no_grad():
            plain.append(net.viewed(net.run()[1]))
    sizes = _sizes(*plain)
    return _second_derivatives(student, tangent, power, sizes), _second_derivatives(teacher, tangent, power, sizes)


def _second_derivatives(
    net: MeasuredNet, tangent: Tensor, power: float, sizes: Sequence[tuple[int, ...]]
) -> list[Tensor]:
    x, t = net.input(), tangent.to(net.input().dtype)

    def maps(x: Tensor) -> tuple[Tensor, ...]:
        features = net.viewed(net.run(net.with_input(x))[1])
        found = reference.attention_maps(features, power=power, sizes=sizes)
        assert isinstance(found, list)
        return tuple(found)

    def first_derivatives(x: Tensor) -> tuple[Tensor, ...]:
        return torch.func.jvp(maps, (x,), (t,), strict=True)[1]

    with net.side_effect_free(), torch.no_grad(), ExplicitNorms():
        try:
            return list(torch.func.jvp(first_derivatives, (x,), (t,))[1])
        except (RuntimeError, NotImplementedError) as error:
            raise RuntimeError(
                f"the {net.whose} has an op without nested forward mode ({first_line(error)}). Use "
                "lwkd.signals.Hessian(wrt='parameters')"
            ) from error


ESTIMATES: dict[str, Estimate] = {"jvp": jvp, "difference": difference, "vjp": vjp, "output": output}


def check_forward_mode(student: MeasuredNet, teacher: MeasuredNet, seed: int, power: float) -> None:
    """Compare the forward-mode derivative with a finite difference: an op may lose part of a tangent in silence.

    Rounding in the passes, which a difference divides by its step, can be larger than the motion itself where the net
    computes in a lower precision than it is called in. A difference is therefore believed against forward mode only
    where the one backwards agrees with the one forwards; longer steps are taken until they do.

    Raises:
        RuntimeError: they differ by more than :data:`AGREEMENT`; the layer is named.

    Warns:
        UserWarning: no step gives a difference that can be believed, and forward mode agrees with none.
    """
    forward, (approximate, noises) = jvp(student, teacher, seed, power), _differences(student, teacher, seed, power)
    doubtful = [
        (net, where)
        for which, net in enumerate((student, teacher))
        for where in range(len(net.layers))
        if not _near(forward[which][where], approximate[which][where], noises[which][where])
    ]
    for length in LENGTHS:
        if not doubtful:
            return
        (ahead, noises), (behind, _) = (
            _differences(student, teacher, seed, power, signed) for signed in (length, -length)
        )
        left = []
        for net, where in doubtful:
            which = 0 if net is student else 1
            one, other = forward[which][where], (ahead[which][where] + behind[which][where]) / 2
            if _near(one, other, noises[which][where]):
                continue
            if not _near(ahead[which][where], behind[which][where], 0.0):
                left.append((net, where))
                continue
            size, off = float(other.norm()), float((one - other).norm())
            instead = "difference" if length == LENGTHS[0] else "vjp"  # at its own step a difference is rounding
            raise RuntimeError(
                f"layer {net.layers[where]!r} of the {net.whose}: the derivative by forward mode has norm "
                f"{float(one.norm()):.3g} and is {off / size if size else float('inf'):.0%} off the finite difference, "
                f"whose norm is {size:.3g}: some op loses part of the tangent. Use "
                f"lwkd.signals.Jacobian(estimator={instead!r})"
            )
        doubtful = left
    if doubtful:
        net, where = doubtful[0]
        warnings.warn(
            f"layer {net.layers[where]!r} of the {net.whose}: whether an op loses part of the tangent could not be "
            "checked, since finite differences are mostly rounding: this net computes in less than float32. Forward "
            "mode is used, which rounding harms less; estimator='difference' would be worse",
            UserWarning,
            stacklevel=2,
        )


def _near(found: Tensor, expected: Tensor, rounding: float) -> bool:
    return float((found - expected).norm()) <= AGREEMENT * float(expected.norm()) + rounding


# Steps that several estimators share


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


def _require_parameter_gradients(*nets: MeasuredNet) -> None:
    for net in nets:
        for parameter in net.functional.parameters.values():
            parameter.requires_grad_(parameter.is_floating_point())


def _with_graph(net: MeasuredNet) -> tuple[Tensor, object, list[Tensor]]:
    """Input, output and raw features, with a graph from the input; an empty input where none is floating-point."""
    if net.inputs.first_floating_index() is None:
        return torch.empty(0, dtype=torch.float32, device="cpu"), *net.run()
    x = net.input().detach().requires_grad_()
    return x, *net.run(net.with_input(x))


def _backward(
    student: MeasuredNet,
    teacher: MeasuredNet,
    seed: int,
    power: float,
    gradients: Callable[[MeasuredNet, Tensor, list[Tensor], list[Tensor]], list[Tensor]],
) -> Pair:
    """``gradients(net, x, maps, signs)`` of both nets, with the same random signs as cotangents of the maps."""

    def of_both() -> Pair:
        runs = []
        for net in (student, teacher):
            x, _, features = _with_graph(net)
            # The maps of all layers come from one op, behind which this could not be seen.
            cut = next((layer for layer, f in zip(net.layers, features, strict=True) if not f.requires_grad), None)
            if cut is not None:
                raise RuntimeError(NO_DERIVATIVE.format(f"layer {cut!r} of the {net.whose}", net.whose))
            runs.append((net, x, net.viewed(features)))
        sizes = _sizes(runs[0][2], runs[1][2])
        signs: list[Tensor] = []
        found = []
        for net, x, features in runs:
            maps = _maps(features, power, sizes)
            signs = signs or ops.rademacher(maps, seed)
            found.append(gradients(net, x, maps, [u.to(m.dtype) for u, m in zip(signs, maps, strict=True)]))
        return found[0], found[1]

    return _both_held(student, teacher, of_both)


def _both_held(student: MeasuredNet, teacher: MeasuredNet, function: Callable[[], Pair]) -> Pair:
    """Forward and backward passes of both nets, with autograd on; see ``FunctionalModule.call_with_state``."""
    with student.side_effect_free(), teacher.side_effect_free(), torch.enable_grad():
        held: Pair = student.functional.call_with_state(lambda: teacher.functional.call_with_state(function))
    return held


def _classes_second(net: MeasuredNet, output: object) -> Tensor:
    """Logits ``(B, K, *positions)``."""
    logits = net.logits(output)
    return logits.movedim(class_dimension_of(logits, f"the {net.whose}"), 1)


def _gradients(
    net: MeasuredNet,
    layer: str | None,
    value: Tensor,
    wanted: Sequence[Tensor],
    cotangent: Tensor | None,
    *,
    retain_graph: bool = True,
) -> list[Tensor]:
    """Gradients of a layer's map, or (layer None) of the logits with respect to each layer's output.

    Raises:
        RuntimeError: no derivative flows, where zeros would be taken for a measurement; the layer is named.
    """
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if value.requires_grad and all(tensor.requires_grad for tensor in wanted):
        found = torch.autograd.grad(value, wanted, cotangent, retain_graph=retain_graph, allow_unused=True)
    lost = [layer for layer, g in zip(net.layers, found, strict=False) if g is None] if layer is None else []
    if lost or (layer is not None and all(g is None for g in found)):
        where = f"layer {(layer or lost[0])!r} of the {net.whose}"
        raise RuntimeError(NO_DERIVATIVE.format(where, net.whose))
    return [torch.zeros_like(tensor) if g is None else g for g, tensor in zip(found, wanted, strict=True)]
