"""What both forms of the wrapper show of the rates."""

from __future__ import annotations

import io
from collections import Counter

import torch

from lwkd.optimizer.step import LayerwiseStep
from lwkd.rates import LayerRates


class RateState:
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
        return {"lwkd": file.getvalue()}

    def load_state_dict(self, state_dict: dict[str, bytes]) -> None:
        """Continue where :meth:`state_dict` left off.

        Raises:
            ValueError: the rates were saved with another pairing or signal; nothing has been changed then.
        """
        self._layerwise.load_state_dict(torch.load(io.BytesIO(state_dict["lwkd"]), weights_only=True))


class RateMetrics:
    """Rates, divergences and counts under public names; on CUDA reading one waits for the values it shows."""

    _layerwise: LayerwiseStep

    @property
    def _rates(self) -> LayerRates:
        return self._layerwise.rates

    @property
    def rate_state(self) -> RateState:
        """The rates for a checkpoint under a key of its own, where only known keys of an optimizer are kept."""
        return RateState(self._layerwise)

    @property
    def rates(self) -> dict[str, float]:
        """Learning-rate multiplier in force, by student layer."""
        return self._rates.by_layer(self._rates.state.multipliers)

    @property
    def divergences(self) -> dict[str, float]:
        """Divergence from the teacher (momentum average), by student layer; 0 before the first measurement."""
        return self._rates.by_layer(self._rates.state.divergences)

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
        paired layer did not run), ``unmatched`` (no teacher pass of that batch size), ``ambiguous`` (teacher passes
        that may belong to others), ``not_due``.
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
