"""What both forms of the wrapper show of the rates."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lwkd.optimizer.param_groups import STEP_HOOKS
from lwkd.optimizer.step import LayerwiseStep, parameters_in
from lwkd.pairing import Pairing
from lwkd.rates import LayerRates

KEY = "lwkd"
"""Key of the rates in a state dict; a bare optimizer ignores it."""


class RateCheckpoint:
    """The rates as a Stateful of torch.distributed.checkpoint, or an object for ``register_for_checkpointing``.

    The state is one value, in bytes: such checkpoints ask for the same keys and sizes in the state that is loaded and
    in the one it is loaded into, and that of the rates grows with what was measured.

    Args:
        layerwise: what steps with the rates.
    """

    def __init__(self, layerwise: LayerwiseStep) -> None:
        self._layerwise = layerwise

    def state_dict(self) -> dict[str, bytes]:
        """All that a bitwise resume needs, besides the base optimizer's own state."""
        file = io.BytesIO()
        torch.save(self._layerwise.state_dict(), file)
        return {KEY: file.getvalue()}

    def load_state_dict(self, state_dict: dict[str, bytes]) -> None:
        """Continue where :meth:`state_dict` left off.

        Raises:
            ValueError: the rates were saved with another pairing or signal; nothing has been changed then.
        """
        self._layerwise.load_state_dict(torch.load(io.BytesIO(state_dict[KEY]), weights_only=True))


class RateMetrics:
    """Rates, divergences and counts under public names; on CUDA reading one waits for the values it shows."""

    _layerwise: LayerwiseStep

    @property
    def _rates(self) -> LayerRates:
        return self._layerwise.rates

    @property
    def rate_state(self) -> RateCheckpoint:
        """The rates for a checkpoint under a key of its own, where only known keys of an optimizer are kept."""
        return RateCheckpoint(self._layerwise)

    @property
    def rates(self) -> dict[str, float]:
        """Learning-rate multiplier in force, by student layer."""
        return self._rates.by_layer(self._rates.state.multipliers)

    @property
    def divergences(self) -> dict[str, float]:
        """Divergence from the teacher (momentum average), by student layer; 0 before the first measurement."""
        return self._rates.by_layer(self._rates.state.divergences)

    @property
    def pairing(self) -> Pairing:
        """Which layers are compared; the keys of all that is shown by layer are its ``names``."""
        return self._rates.pairing

    @property
    def updates(self) -> int:
        """Updates so far, measured or not."""
        return self._rates.updates

    @property
    def measurements(self) -> int:
        """Measurements that have set rates so far."""
        return int(self._rates.state.counts[0])

    @property
    def skipped(self) -> int:
        """Measurements that were NaN, infinite or all zero, and left the last rates in force."""
        return int(self._rates.state.counts[1])

    @property
    def passes(self) -> Counter[str]:
        """The student's forward passes by outcome.

        ``measured``, ``no_grad`` (validation), ``in_backward`` (recomputation), ``empty`` (no rows), ``incomplete`` (a
        paired layer did not run), ``late`` (the teacher's pass of these inputs was made in an earlier step),
        ``unmatched`` (no teacher pass of that batch size until the step), ``ambiguous`` (there were some, and it is not
        certain which), ``not_due``.
        """
        return self._rates.passes

    @property
    def standard_errors(self) -> dict[str, float]:
        """Standard error of each divergence, by student layer, from the spread of the measurements.

        NaN before the third measurement, and for attention, which is measured on the training passes.
        """
        self._rates.flush()
        return self._rates.by_layer(self._rates.store.standard_errors())

    @property
    def every(self) -> int:
        """Updates from one measurement to the next; with a budget, as found by the calibration."""
        return self._rates.schedule.every

    def overhead(self) -> float:
        """Time spent measuring, as a share of the time that the same updates took otherwise.

        From the library's own clock (on CUDA, events on the GPU's stream), over all updates but the first; 0 before
        the second.
        """
        self._rates.flush()
        return self._rates.schedule.overhead()


class UpdateRatios:
    r"""How far the last update moved every layer, learning rate and all: the realised update ratio.

    .. math:: r_l = \|\theta_l^\mathrm{new} - \theta_l^\mathrm{old}\| \,/\, \|\theta_l^\mathrm{old}\|

    over the parameters that follow layer l in this optimizer. An update that is measured keeps a copy of them for its
    length; the ratios stay on their device until somebody reads them. A layer that was all 0 has infinity or NaN.

    Args:
        shown: a :class:`~lwkd.LayerwiseOptimizer`, or what :func:`~lwkd.attach` returned.
        due: asked before an update whether to measure it; None measures every one.

    Raises:
        ValueError: the base calls no step hooks.

    >>> import lwkd
    >>> student, teacher = (torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, bias=False)) for _ in range(2))
    >>> pairing = lwkd.pair(student, teacher.eval(), torch.zeros(1, 1, 8, 8), layers={"0": "0"})
    >>> base = torch.optim.SGD(student.parameters(), lr=0.25)
    >>> ratios = UpdateRatios(lwkd.LayerwiseOptimizer(base, student, teacher, pairing, policy=lwkd.Decay()))
    >>> student[0].weight.grad = 2 * student[0].weight.detach()
    >>> base.step()
    >>> ratios.by_layer()
    {'0': 0.5}
    """

    def __init__(self, shown: RateMetrics, due: Callable[[], bool] | None = None) -> None:
        self._step, self._due = shown._layerwise, due
        self._old: list[tuple[int, Tensor, Tensor]] = []
        self._ratios: dict[int, Tensor] = {}
        # A base that never ran the constructor of Optimizer has no hooks; a wrapper around it has.
        candidates = [one for one in (self._step.optimizer, shown) if vars(one).keys() >= STEP_HOOKS]
        if not candidates:
            raise ValueError(
                f"the {type(self._step.optimizer).__name__} calls no step hooks, from which updates are known: wrap it "
                "in a LayerwiseOptimizer, or do without update ratios"
            )
        optimizer: Any = candidates[0]
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        self._old, self._ratios = [], {}
        if self._due is None or self._due():
            self._step.owners.refresh(optimizer.param_groups, self._step.rates.student)
            owned = [(self._step.owners.layer_of(parameter), parameter) for parameter in parameters_in(optimizer)]
            self._old = [(layer, p, p.detach().clone()) for layer, p in owned if layer is not None]

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        found: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for layer, parameter, old in self._old:
            wide = torch.promote_types(old.dtype, torch.float32)
            found.setdefault(layer, []).append((parameter.detach().to(wide) - old.to(wide), old.to(wide)))
        self._old = []
        for layer, pairs in found.items():
            moved, old = (_norm(tensors) for tensors in zip(*pairs, strict=True))
            self._ratios[layer] = moved / old

    def by_layer(self) -> dict[str, float]:
        """The ratios of the last update by student layer, without those that the optimizer holds nothing of.

        Empty if that update was not due; on CUDA this waits for the values.
        """
        names = self._step.rates.pairing.names
        return {names[layer]: float(self._ratios[layer]) for layer in sorted(self._ratios)}

    def close(self) -> None:
        """Let go of the optimizer."""
        for handle in self._handles:
            handle.remove()


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all together, whole where they are sharded."""
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack([norm.to(whole[0].device) for norm in whole]))


def scalars(shown: RateMetrics, ratios: UpdateRatios | None = None) -> dict[str, float]:
    """What loggers are given: ``rate/LAYER`` (of the next update), ``divergence/LAYER``, and ``update_ratio/LAYER``."""
    kinds = {"rate": shown.rates, "divergence": shown.divergences}
    if ratios is not None:
        kinds["update_ratio"] = ratios.by_layer()
    return {f"{kind}/{layer}": value for kind, values in kinds.items() for layer, value in values.items()}
