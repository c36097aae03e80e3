r"""Curvature traces of all layers at once, with standard errors.

Legend: ``L`` layers, ``B`` rows, ``K`` classes, ``θ_l`` a layer's parameters, ``v`` a probe of random signs.

One probe costs one Hessian-vector product (or, for the Gauss–Newton matrix, one backward), whatever the number of
layers. The product is unbiased for every layer's trace, yet noisier than a probe restricted to one layer, because the
blocks off the diagonal enter its variance: judge a trace by its standard error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lwkd import ops
from lwkd.nets.functional_module import FunctionalModule
from lwkd.nets.outputs import class_dimension
from lwkd.nets.passes import differentiable_math, side_effect_free, staged, untraced
from lwkd.nets.walk import walks_remembered
from lwkd.pairing.channel_axis import channel_axes


class TraceEstimate(NamedTuple):
    """Traces of the layers' diagonal blocks, on the device of the parameters.

    ``names`` of the layers; ``trace`` ``(L,)`` float64, mean over probes; ``stderr`` ``(L,)`` float64, its standard
    error (NaN for a single probe). Intervals take Student's t with ``probes − 1`` degrees of freedom. Gauss–Newton
    traces are skewed, as sums of squares are: intervals of 95 % from 8 probes cover about 87 %, from 32 about 92 %.
    """

    names: tuple[str, ...]
    trace: Tensor
    stderr: Tensor


@untraced
@walks_remembered()
def hessian_trace(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    layers: Mapping[str, Sequence[str]] | None = None,
    *,
    probes: int = 8,
    seed: int = 0,
) -> TraceEstimate:
    r"""Trace of the loss's Hessian in the parameters of each layer, by Hutchinson's estimator.

    .. math:: \mathrm{tr}\,H_{ll} = E[v_l \cdot (Hv)_l],\qquad H = \partial^2 \mathrm{loss} / \partial\theta^2

    The model is left as it was: ``.grad``, buffers, random streams, modes and ``requires_grad``. It is measured in the
    mode it is in, in IEEE float32 (float64 models in float64), autocast off and attention by ``SDPBackend.MATH``: a
    loss that calls a model in half precision must give it float32 inputs.

    Args:
        model: any module; wrappers are removed. Frozen parameters are measured as well.
        loss: called once with the module, which for that call holds aliases of its parameters; returns a scalar.
        layers: name → names of its parameters; None takes every named parameter for a layer. A tied parameter belongs
            to the layer that names it, under whichever of its names.
        probes: number of Hessian-vector products, at least 1.
        seed: of the probes, and of dropout.

    Returns:
        The traces. A layer without parameters, with unused ones only, or in which the loss is linear has exactly 0. A
        complex parameter counts as its real and imaginary parts, one of integers not at all.

    Raises:
        ValueError: an unknown parameter, one that two layers name or that cannot be counted (quantized, sparse,
            expanded, or in the memory of another), or a loss that is not a scalar.
        RuntimeError: an op that cannot be differentiated twice.

    Source: Hutchinson 1990; Pearlmutter 1994 for the product.

    >>> net = nn.Linear(3, 1, bias=False)
    >>> x = torch.ones(1, 3)
    >>> hessian_trace(net, lambda net: net(x).square().sum(), probes=64).trace.round()
    tensor([6.], dtype=torch.float64)
    """
    return hessian_of(FunctionalModule(model, "model"), loss, layers, probes=probes, seed=seed)


def hessian_of(
    functional: FunctionalModule,
    loss: Callable[[Any], Tensor],
    layers: Mapping[str, Sequence[str]] | None,
    *,
    probes: int,
    seed: int,
) -> TraceEstimate:
    """:func:`hessian_trace` of a net whose parameters are at hand."""
    names, tensors, layer_of = _prepared(functional, layers, probes)

    def traces(net: nn.Module) -> list[Tensor]:
        value = loss(net)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(f"the loss returned {_described(value)}; expected a scalar tensor")
        gradients: Sequence[Tensor] = ()
        if tensors and value.requires_grad:
            gradients = dense(torch.autograd.grad(value, tensors, create_graph=True, materialize_grads=True))
        curved = [i for i, gradient in enumerate(gradients) if gradient.requires_grad]
        if not curved:
            return [torch.zeros(len(names), dtype=torch.float64, device=functional.device)] * probes
        found = []
        for probe in range(probes):
            key = _key(seed, probe)
            v = ops.rademacher(tensors, key)
            try:
                products = torch.autograd.grad(
                    [gradients[i] for i in curved],
                    tensors,
                    [v[i] for i in curved],
                    retain_graph=probe + 1 < probes,
                    materialize_grads=True,
                )
            except RuntimeError as error:
                raise RuntimeError(
                    f"the loss of {type(net).__name__} cannot be differentiated twice ({error}). Replace the op "
                    "it names, or use the Gauss-Newton matrix: lwkd.ggn_trace, Hessian(curvature='ggn')"
                ) from error
            found.append(ops.hutchinson_trace(dense(products), layer_of, key, len(names)).double())
        return found

    return _estimate(names, _called(functional, traces, seed))


@untraced
@walks_remembered()
def ggn_trace(
    model: nn.Module,
    logits: Callable[[Any], Tensor],
    layers: Mapping[str, Sequence[str]] | None = None,
    *,
    classes: int | None = None,
    probes: int = 8,
    seed: int = 0,
) -> TraceEstimate:
    r"""Trace of the Gauss–Newton matrix of the mean softmax cross-entropy, in the parameters of each layer.

    .. math:: G = \tfrac1B \sum_b J_b^\top (\mathrm{diag}\,p_b - p_b p_b^\top) J_b,\qquad
        \mathrm{tr}\,G_{ll} = E\,\| \textstyle\sum_b J_{b,l}^\top u_b \|^2,\quad
        u_b = \big(\sqrt{p_b} \odot \varepsilon_b - p_b\,(\sqrt{p_b} \cdot \varepsilon_b)\big)/\sqrt{B}

    with random signs ``ε`` ``(B, K)``: ``u_b`` has the covariance of the cross-entropy's Hessian in the logits, which
    does not depend on the target. Never negative, no double backward, and no noise from other layers.

    Args:
        model: as for :func:`hessian_trace`.
        logits: called once with the module; returns ``(B, K)`` or dense logits ``(B, K, *spatial)``, every position of
            which counts as a row. A class masked by −inf has p = 0 and takes no part.
        layers: as for :func:`hessian_trace`.
        classes: the dimension that holds the classes. None is dimension 1, as ``cross_entropy`` has it, save for three
            dimensions, in which tokens ``(B, N, K)`` have them last: there the autograd graph decides (last behind a
            linear layer, 1 behind a convolution; :mod:`lwkd.nets.outputs`).
        probes: number of backward passes, at least 1.
        seed: of the probes, and of dropout.

    Returns:
        The traces; see :func:`hessian_trace`.

    Raises:
        ValueError: an unknown parameter, one that two layers name or that cannot be counted, logits without classes, or
            with three dimensions of which nothing says where the classes are.

    Source: Schraudolph 2002 (the Gauss–Newton matrix); Martens 2020 for its relation to the Fisher matrix.

    >>> net = nn.Linear(3, 2)
    >>> estimate = ggn_trace(net, lambda net: net(torch.ones(4, 3)))
    >>> estimate.names, bool((estimate.trace > 0).all())
    (('weight', 'bias'), True)
    """
    return ggn_of(FunctionalModule(model, "model"), logits, layers, classes=classes, probes=probes, seed=seed)


def ggn_of(
    functional: FunctionalModule,
    logits: Callable[[Any], Tensor],
    layers: Mapping[str, Sequence[str]] | None,
    *,
    classes: int | None = None,
    probes: int,
    seed: int,
) -> TraceEstimate:
    """:func:`ggn_trace` of a net whose parameters are at hand."""
    names, tensors, layer_of = _prepared(functional, layers, probes)
    index = staged(torch.tensor(layer_of, dtype=torch.int64, device="cpu"), functional.device)
    index = index.to(functional.device, non_blocking=True)

    def traces(net: nn.Module) -> list[Tensor]:
        z = logits(net)
        if isinstance(z, Tensor) and z.dim() > 1:
            z = z.movedim(class_dimension_of(z, "the model") if classes is None else classes, -1)
        if not isinstance(z, Tensor) or z.dim() < 2 or z.shape[-1] < 2:
            raise ValueError(
                f"the model returned {_described(z)}; expected logits (batch, classes, ...), at least two classes"
            )
        none = torch.zeros(len(names), dtype=torch.float64, device=functional.device)
        if not tensors or not z.requires_grad:
            return [none] * probes
        p = torch.softmax(z.detach(), -1)
        root, rows = p.sqrt(), p[..., 0].numel()
        found = []
        for probe in range(probes):
            signed = root * ops.rademacher([p], _key(seed, probe))[0]
            u = (signed - p * signed.sum(-1, keepdim=True)) / rows**0.5
            pulled = torch.autograd.grad(z, tensors, u, retain_graph=probe + 1 < probes, materialize_grads=True)
            squares = torch.stack(torch._foreach_norm(dense(pulled))).double().square()
            # On a GPU, index_add sums in no fixed order, and the check of the index in index_put would wait.
            found.append(torch._index_put_impl_(none.clone(), (index,), squares, accumulate=True, unsafe=True))
        return found

    return _estimate(names, _called(functional, traces, seed))


def class_dimension_of(logits: Tensor, whose: str) -> int:
    """The dimension of the classes by the rule of :mod:`lwkd.nets.outputs`, which may ask the autograd graph."""
    node = logits.grad_fn if logits.dim() == 3 else None
    return class_dimension(logits, whose, None if node is None else channel_axes([node])[node].dim)


def dense(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Gradients as dense tensors: an embedding may give sparse ones."""
    return [g.to_dense() if g.layout != torch.strided else g for g in gradients]


def _called(functional: FunctionalModule, function: Callable[[Any], list[Tensor]], seed: int) -> list[Tensor]:
    """``function(net)`` while the net holds the parameters and buffers of ``functional``, backward passes included."""
    with side_effect_free(functional.net, seed=seed), differentiable_math(functional.net), torch.enable_grad():
        found: list[Tensor] = functional.call_with_state(lambda: function(functional.net))
    return found


def _prepared(
    functional: FunctionalModule, layers: Mapping[str, Sequence[str]] | None, probes: int
) -> tuple[tuple[str, ...], list[Tensor], list[int]]:
    """The layers' names, their parameters in the model's order, and the layer of each."""
    if not isinstance(probes, int) or probes < 1:
        raise ValueError(f"probes is {probes!r}; expected a whole number of at least 1")
    groups = {name: [name] for name in functional.parameters} if layers is None else layers
    layer_of: dict[str, int] = {}
    for index, (layer, given) in enumerate(groups.items()):
        for name in functional.resolve_names(given):
            if layer_of.setdefault(name, index) != index:
                raise ValueError(
                    f"parameter {name!r} belongs to layers {list(groups)[layer_of[name]]!r} and {layer!r}; a trace "
                    "counts every parameter once: give it to one of them"
                )
    measured = [name for name in functional.parameters if name in layer_of]
    functional.check_countable(measured)
    tensors = [functional.parameters[name].requires_grad_() for name in measured]
    return tuple(groups), tensors, [layer_of[name] for name in measured]


def _key(seed: int, probe: int) -> int:
    """Key of a probe, a signed integer of 64 bits: neighbouring seeds have no probe in common."""
    word = (seed * 0x9E3779B97F4A7C15 + probe) % 2**64
    return word - 2**64 if word >= 2**63 else word


def _described(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _estimate(names: tuple[str, ...], traces: list[Tensor]) -> TraceEstimate:
    every = torch.stack(traces)
    mean, stderr = every.mean(0), torch.full_like(every[0], float("nan"))
    if len(traces) > 1:
        stderr = ((every - mean).square().sum(0) / (len(traces) - 1) / len(traces)).sqrt()
    return TraceEstimate(names, mean, stderr)
