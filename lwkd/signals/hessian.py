"""The Hessian signal: distance between the layers' curvatures (legend: L layers, B rows, N map positions)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwkd import ops
from lwkd.nets.names import canonical
from lwkd.nets.outputs import Output
from lwkd.nets.passes import staged, untraced
from lwkd.nets.walk import walks_remembered
from lwkd.pairing.pairs import Pairing
from lwkd.reference import STATISTICS, Ratio, divergence_of
from lwkd.signals.estimators import second_derivatives
from lwkd.signals.hutchinson import class_dimension_of, ggn_of, hessian_of
from lwkd.signals.matching import input_curvature_distance, nodes_behind
from lwkd.signals.measured_net import NO_DERIVATIVE, MeasuredNet, measured_nets
from lwkd.signals.signal import RowShare, check_counts
from lwkd.signals.teacher_curvature import TeacherCurvature

ROWS = RowShare(one_in=4, least=8, most=16)
"""Rows of a batch that are measured, unless the user says otherwise."""

Wrt = Literal["parameters", "input"]
Curvature = Literal["hessian", "ggn"]
Criterion = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, init=False)
class Hessian:
    r"""How far the curvature at the student's layers is from that at the teacher's.

    .. math:: h_l = \mathrm{tr}\,H_{ll} / n_l,\qquad e_l = \frac{|h_l^S - h_l^T|}{|h_l^S| + |h_l^T|}

    ``H_ll`` is the layer's block of the curvature in its ``n_l`` parameters, by Hutchinson's estimator, for all layers
    in one product. The curvature is that of the cross-entropy against the teacher's softmax, in the mode of the pass.

    Args:
        wrt: ``"parameters"``, or ``"input"``: second directional derivative of the maps along a random tangent (the
            paper's d²S/dx²), compared as :func:`lwkd.reference.jacobian_distance` does (``"relative"``).
        curvature: of the parameters only. ``"ggn"`` (default): the Gauss–Newton matrix, never negative, one backward;
            ``"hessian"``: traces may be negative early in training, and the distance above then says nothing.
        probes: probes a measurement.
        samples: rows of the batch that are measured: a number, or by default one in four, at least 8, at most 16; fewer
            rank layers less well.
        loss: ``(output, teacher's output) → scalar`` in place of the cross-entropy; ``curvature="hessian"`` only.
        output: which tensor of a net's output is its logits, in both nets: a function of the output, the name of a
            field or key, or a place. None finds it: ``logits``, else the only tensor with classes. Where the classes
            are is said in :mod:`lwkd.nets.outputs`: dense logits are ``(B, K, *spatial)``, tokens ``(B, N, K)``. A
            loss of one's own gets what ``output`` gives.
        tolerance: the frozen teacher's curvature is averaged over measurements until its standard error is below this
            share of it for every layer, and not measured again after that.

    Raises:
        ValueError: an option that is not one of the above.

    Source: arXiv 2407.04871; Hutchinson 1990. Which loss is curved is our reading.

    >>> import lwkd
    >>> net = lambda width: nn.Sequential(
    ...     nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    >>> student, teacher, x = net(4), net(8), torch.rand(2, 1, 12, 12)
    >>> signal, pairing = Hessian(), lwkd.pair(student, teacher, x)
    >>> signal.divergence(signal.measure(student, teacher, pairing, x)).shape
    torch.Size([2])
    """

    wrt: Wrt
    curvature: Curvature
    probes: int
    samples: int | RowShare
    criterion: Criterion | None
    tolerance: float
    output: Output | None
    name: ClassVar[str] = "hessian"
    source: ClassVar[str] = "passes"
    every: ClassVar[int] = 5
    every_on_gpu: ClassVar[int] = 125
    momentum: ClassVar[float] = 0.7
    replays: ClassVar[bool] = True

    def __init__(
        self,
        wrt: Wrt = "parameters",
        *,
        curvature: Curvature | None = None,
        probes: int = 1,
        samples: int | RowShare = ROWS,
        loss: Criterion | None = None,
        tolerance: float = 0.1,
        output: Output | None = None,
    ) -> None:
        if wrt == "input" and curvature is not None:
            raise ValueError(f"curvature is {curvature!r}; with wrt='input' the maps are curved, and no loss is")
        curvature = curvature or "ggn"
        for what, found, known in (("wrt", wrt, Wrt), ("curvature", curvature, Curvature)):
            if found not in get_args(known):
                raise ValueError(f"{what} is {found!r}; expected one of {', '.join(get_args(known))}")
        check_counts(probes, samples)
        if loss is not None and (wrt, curvature) != ("parameters", "hessian"):
            raise ValueError(
                f"a loss of your own goes with wrt='parameters' and curvature='hessian'; found {wrt!r}, {curvature!r}: "
                "the Gauss-Newton matrix here is that of the cross-entropy, and maps have no loss"
            )
        if not 0 < tolerance < float("inf"):
            raise ValueError(f"tolerance is {tolerance}; expected a positive number")
        fields = {
            "wrt": wrt,
            "curvature": curvature,
            "probes": probes,
            "samples": samples,
            "criterion": loss,
            "output": output,
        }
        for name, value in (fields | {"tolerance": float(tolerance)}).items():
            object.__setattr__(self, name, value)

    @property
    def ratio(self) -> Ratio:
        """How a divergence is formed from the statistics."""
        return "hessian" if self.wrt == "parameters" else "relative"

    @property
    def statistics(self) -> int:
        """S: 2 (h of student and teacher), or 4 sums for ``wrt="input"``."""
        return STATISTICS[self.ratio]

    def memory(self, layers: int) -> TeacherCurvature | None:
        """What is remembered of the frozen teacher from measurement to measurement; None for ``wrt="input"``."""
        return TeacherCurvature(layers, self.tolerance) if self.wrt == "parameters" else None

    @property
    def measured(self) -> str:
        """Names the measured quantity: a saved average is continued only by measurements of the same one."""
        return f"{self.curvature} by {self.wrt}"

    @untraced
    @walks_remembered()
    def measure(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairing: Pairing,
        inputs: Any,
        teacher_inputs: Any = None,
        *,
        seed: int = 0,
        known: Tensor | None = None,
    ) -> Tensor:
        """Statistics, float64: ``(L, 2)`` with h of student and teacher, or ``(L, 4)`` for ``wrt="input"``.

        Nets are measured as :meth:`lwkd.signals.Jacobian.measure` does, and are left as they were; the result stays on
        their device.

        Args:
            student: the student.
            teacher: the teacher.
            pairing: from :func:`lwkd.pair`.
            inputs: what the student is called with: a tensor, a tuple of positional arguments or a dict of keyword
                arguments; all rows of it are measured.
            teacher_inputs: the same for the teacher; None is the student's.
            seed: of the probes, and of dropout.
            known: h of the teacher ``(L,)``, where it need not be measured again; on any device.

        Raises:
            ValueError: an output without logits, or with several that may be it, where the cross-entropy is asked
                for; a loss that is not a scalar; a parameter that cannot be counted.
            RuntimeError: an op that cannot be differentiated twice; a net through which no derivative flows; nets on
                different devices.
            lwkd.nets.feature_hooks.LayerNotRunError: a net took a path without a paired layer.
        """
        with torch.inference_mode(False):
            pair = measured_nets(student, teacher, pairing, inputs, teacher_inputs, seed, self.output)
            if self.wrt == "input":
                total = torch.zeros(len(pairing), 4, dtype=torch.float64, device=pair[0].functional.device)
                for probe in range(self.probes):
                    total += ops.jacobian_sums(*second_derivatives(*pair, seed + probe))
                return total / (self.probes * pair[0].rows)
            target = None if self.curvature == "ggn" else self._target(pair[1])
            h_S = self._mean_curvature(pair[0], target, seed)
            h_T = self._mean_curvature(pair[1], target, seed) if known is None else known.double()
            h_T = staged(h_T, h_S.device).to(h_S.device, non_blocking=True)  # a known curvature lies on the host
            return torch.stack([h_S, h_T], dim=1)

    def check(self, *_: Any, **__: Any) -> None:
        """Nothing to check."""

    def divergence(self, statistics: Tensor) -> Tensor:
        """Divergence ``(L,)`` of averaged statistics."""
        return divergence_of(statistics, self.ratio)

    def loss(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        x: Tensor,
        targets: Tensor | None = None,
        *,
        seed: int = 0,
    ) -> Tensor:
        """Distance between directional second derivatives, which trains the student: ``losses.hessian_matching``."""
        return input_curvature_distance(student_logits, teacher_logits, x, targets, seed=seed)

    def _target(self, teacher: MeasuredNet) -> Any:
        """What the loss compares with, in the mode the teacher is in: logits, or for a loss of one's own the output."""
        with teacher.side_effect_free(), torch.no_grad():
            return self._compared(teacher, teacher.run()[0])

    def _compared(self, net: MeasuredNet, output: Any) -> Any:
        return net.logits(output) if self.criterion is None or self.output is not None else output

    def _mean_curvature(self, net: MeasuredNet, target: Any, seed: int) -> Tensor:
        """Trace per parameter of each layer, h ``(L,)``."""
        functional, options = net.functional, {"probes": self.probes, "seed": seed}
        layers = {str(index): names for index, names in enumerate(net.owned)}
        counted = [functional.resolve_names(names) for names in net.owned]

        def call(model: Any) -> Any:
            return net.observed(lambda inputs: model(*inputs.args, **inputs.kwargs), net.inputs)[0]

        def logits(model: Any) -> Tensor:
            found = net.logits(call(model))
            _check_reached(found, model, net, counted)
            return found

        def loss(model: Any) -> Tensor:
            criterion = self.criterion or partial(_cross_entropy, whose=net.whose)
            found = criterion(self._compared(net, call(model)), target)
            if isinstance(found, Tensor):
                _check_reached(found, model, net, counted)
            return found

        if self.curvature == "ggn":
            found = ggn_of(functional, logits, layers, **options)
        else:
            found = hessian_of(functional, loss, layers, **options)
        counts = [functional.count(names) for names in counted]
        sizes = torch.tensor(counts, dtype=torch.float64, device="cpu").clamp(min=1)
        return found.trace / staged(sizes, found.trace.device).to(found.trace.device, non_blocking=True)


def _check_reached(value: Tensor, model: nn.Module, net: MeasuredNet, counted: Sequence[Sequence[str]]) -> None:
    """Check that every paired layer's parameters have a derivative, where a zero would be taken for a flat curvature.

    Args:
        value: computed by the model.
        model: while it holds the parameters that are differentiated.
        net: the same net, and its paired layers.
        counted: names of the parameters of each layer that are counted.

    Raises:
        RuntimeError: none of a layer's has one; the layer is named.
    """
    reached = {id(node.variable) for node in nodes_behind(value) if hasattr(node, "variable")}
    leaves = {canonical(name): id(_leaf(tensor)) for name, tensor in model.named_parameters()}
    for layer, given, names in zip(net.layers, net.owned, counted, strict=True):
        if given and not any(leaves[name] in reached for name in names):
            kind = "floating-point parameter" if not names else "parameter with a derivative of the output"
            raise RuntimeError(NO_DERIVATIVE.format(f"layer {layer!r} of the {net.whose} has no {kind}", net.whose))


def _leaf(tensor: Tensor) -> Tensor:
    """The tensor that is differentiated, of which the parameter is a clone, or real and imaginary parts of one."""
    node: Any = tensor.grad_fn
    while node is not None and not hasattr(node, "variable"):
        node = node.next_functions[0][0]
    return tensor if node is None else node.variable


def _cross_entropy(logits: Tensor, target: Tensor, whose: str) -> Tensor:
    """Mean cross-entropy against the softmax of the target; a class of probability 0 there takes no part."""
    if logits.shape != target.shape:
        raise ValueError(
            f"the student gives shape {tuple(logits.shape)}, the teacher {tuple(target.shape)}; the cross-entropy "
            "needs the same classes. Give Hessian(loss=...) instead"
        )
    # The target, which has no graph, has its classes where the logits have theirs.
    dim = class_dimension_of(logits, f"the {whose}")
    z, p = logits.movedim(dim, -1).flatten(0, -2), torch.softmax(target, dim).movedim(dim, -1).flatten(0, -2)
    log_q = F.log_softmax(z, -1).masked_fill(p == 0, 0.0)
    return -(p * log_q).sum(-1).mean()
