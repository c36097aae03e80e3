"""The Jacobian signal: distance between how the layers' maps move (legend: L layers, B rows, N map positions)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn

from lwkd import ops
from lwkd.nets.outputs import Output
from lwkd.nets.passes import untraced
from lwkd.nets.walk import walks_remembered
from lwkd.pairing.pairs import Pairing
from lwkd.reference import JacobianKind, Ratio, divergence_of
from lwkd.signals import estimators
from lwkd.signals.matching import Form, input_gradient_distance
from lwkd.signals.measured_net import measured_nets
from lwkd.signals.signal import RowShare, check_counts

ROWS = RowShare(one_in=8, least=4, most=16)
"""Rows of a batch that are measured, unless the user says otherwise."""

Wrt = Literal["input", "parameters"]
Estimator = Literal["jvp", "difference", "vjp", "output"]


@dataclass(frozen=True)
class Jacobian:
    r"""How far the motion of the student's maps is from that of the teacher's.

    .. math:: a_l = J_l^S t,\quad b_l = J_l^T t,\qquad J_l = \partial m_l / \partial x,\quad
        \mathrm{direction} = 2 - 2\,\frac{\langle a, b\rangle}{\|a\|\,\|b\|}

    ``m_l`` is the layer's attention map normalised to sum 1, ``t`` a random tangent (±1) of the input, the same for
    both nets, so that :math:`E\|(J^S - J^T) t\|^2 = \|J^S - J^T\|_F^2`.

    Args:
        wrt: ``"input"``, or ``"parameters"``: norms of ``dm_l/dθ_l``, each layer by its own segment's parameters.
        estimator: ``"jvp"`` (default for the input): one forward-mode pass for all layers; ``"difference"``: two plain
            passes, 1 to 3 % off in a ReLU net, for models with ops that lack forward mode; ``"vjp"`` (default, and the
            only one, for the parameters): gradients of ``u·m_l`` with a random ``u``, one backward a layer;
            ``"output"``: maps of the gradient of the teacher's top-class logit with respect to each layer's output,
            one backward for all layers.
        kind: ``"direction"`` (default for the input), ``"norm"`` (default, and the only one, for the parameters) or
            ``"relative"``; see :func:`lwkd.reference.jacobian_distance`.
        probes: random tangents a measurement.
        samples: rows of the batch that are measured: a number, or by default one in eight, at least 4, at most 16.
        power: exponent of the maps, at least 1.
        output: which tensor of a net's output is its logits, in both nets, where the estimator is ``"output"``: a
            function of the output, the name of a field or key, or a place. None finds it: ``logits``, else the only
            tensor with classes. With dense logits the classes' gradients are summed over the positions; where the
            classes are is said in :mod:`lwkd.nets.outputs`.

    Raises:
        ValueError: an option that is not one of the above.

    Source: arXiv 2407.04871, whose sources contradict each other on whether the derivative is taken with respect to
    the input or to the parameters: both are our reading.

    >>> import lwkd
    >>> net = lambda width: nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 3, 2), nn.ReLU())
    >>> student, teacher, x = net(4), net(8), torch.rand(2, 1, 12, 12)
    >>> signal, pairing = Jacobian(probes=2), lwkd.pair(student, teacher, x)
    >>> signal.divergence(signal.measure(student, teacher, pairing, x)).shape
    torch.Size([2])
    """

    wrt: Wrt = "input"
    estimator: Estimator | None = None
    kind: JacobianKind | None = None
    probes: int = 1
    samples: int | RowShare = ROWS
    power: float = 2.0
    output: Output | None = None
    name: ClassVar[str] = "jacobian"
    source: ClassVar[str] = "passes"
    statistics: ClassVar[int] = 4
    every: ClassVar[int] = 10
    every_on_gpu: ClassVar[int] = 250
    momentum: ClassVar[float] = 0.7
    replays: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.wrt not in get_args(Wrt):
            raise ValueError(f"wrt is {self.wrt!r}; expected 'input' or 'parameters'")
        by_input = self.wrt == "input"
        object.__setattr__(self, "estimator", self.estimator or ("jvp" if by_input else "vjp"))
        object.__setattr__(self, "kind", self.kind or ("direction" if by_input else "norm"))
        for what, known in (("estimator", Estimator), ("kind", JacobianKind)):
            if getattr(self, what) not in get_args(known):
                raise ValueError(f"{what} is {getattr(self, what)!r}; expected one of {', '.join(get_args(known))}")
        if not by_input and (self.estimator, self.kind) != ("vjp", "norm"):
            raise ValueError(
                f"estimator is {self.estimator!r} and kind {self.kind!r}; with wrt='parameters' only 'vjp' and 'norm' "
                "have a meaning, since the parameters of the two nets differ in shape"
            )
        check_counts(self.probes, self.samples)
        if not 1 <= self.power < float("inf"):
            raise ValueError(f"power is {self.power}; expected a finite number of at least 1")

    @property
    def ratio(self) -> Ratio:
        """How a divergence is formed from the statistics."""
        return cast(Ratio, self.kind)

    @property
    def measured(self) -> str:
        """Names the measured quantity: a saved average is continued only by measurements of the same one."""
        return f"{self.kind} of the {'output' if self.estimator == 'output' else 'maps'} by {self.wrt}"

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
    ) -> Tensor:
        """Statistics ``(L, 4)``, float64: aa, bb, ab, dd, mean over probes and rows, from passes of its own.

        The nets are measured in the mode they are in, in IEEE float32 (float64 nets in float64), autocast off, and are
        left as they were; the result stays on their device.

        Args:
            student: the student.
            teacher: the teacher.
            pairing: from :func:`lwkd.pair`.
            inputs: what the student is called with: a tensor, a tuple of positional arguments or a dict of keyword
                arguments; all rows of it are measured.
            teacher_inputs: the same for the teacher; None is the student's.
            seed: of the tangents, and of dropout.

        Raises:
            ValueError: no floating-point input, inputs of different shapes, or an option that does not go with a
                pairing of logits; an output without logits, or with several that may be it; a parameter that cannot be
                counted.
            RuntimeError: an op without the derivative that the estimator needs, or a net through which none flows, and
                the layer is named; nets on different devices.
            lwkd.nets.feature_hooks.LayerNotRunError: a net took a path without a paired layer.
        """
        pairing.check_signal(self)
        with torch.inference_mode(False):
            pair = measured_nets(student, teacher, pairing, inputs, teacher_inputs, seed, self.output)
            total = torch.zeros(len(pairing), 4, dtype=torch.float64, device=pair[0].functional.device)
            for probe in range(self.probes):
                if self.wrt == "parameters":
                    total += estimators.parameter_sums(*pair, seed + probe, self.power)
                else:
                    estimate = estimators.ESTIMATES[str(self.estimator)]
                    total += ops.jacobian_sums(*estimate(*pair, seed + probe, self.power))
            return total / (self.probes * pair[0].rows)

    @untraced
    @walks_remembered()
    def check(
        self, student: nn.Module, teacher: nn.Module, pairing: Pairing, inputs: Any, teacher_inputs: Any, *, seed: int
    ) -> None:
        """Compare forward mode with a finite difference on these inputs; other estimators have nothing to check.

        Raises:
            RuntimeError: they disagree, so that some op loses part of the tangent; the layer is named.
        """
        if self.estimator == "jvp":
            pair = measured_nets(student, teacher, pairing, inputs, teacher_inputs, seed)
            estimators.check_forward_mode(*pair, seed, self.power)

    def memory(self, layers: int) -> None:
        """Nothing to remember."""

    def divergence(self, statistics: Tensor) -> Tensor:
        """Divergence ``(L,)`` of averaged statistics ``(L, 4)``."""
        return divergence_of(statistics, self.ratio)

    def loss(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        x: Tensor,
        targets: Tensor | None = None,
        *,
        form: Form = "class",
        seed: int = 0,
    ) -> Tensor:
        """Distance between the input gradients, a scalar that trains the student: ``losses.jacobian_matching``."""
        return input_gradient_distance(student_logits, teacher_logits, x, targets, form=form, seed=seed)
