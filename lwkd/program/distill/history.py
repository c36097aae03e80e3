"""What one training run has recorded: a line an epoch, and the layers' divergences and rates along the way."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class History:
    """The record of one stage; plain lists, so that it travels in checkpoints.

    ``epochs`` holds one dict an epoch; ``steps[i]`` is the update after which ``divergences[i]`` and ``rates[i]``
    (one number a layer of ``layers``) were read, counted from 1. ``standard_errors[i]`` are those of the divergences,
    None where they are not known; in records of versions that had none, all are None.

    >>> history, nan = History(layers=["layer1", "layer2"]), float("nan")
    >>> rates = {"layer1": 1.25, "layer2": 0.75}
    >>> history.record(10, {"layer1": 0.2, "layer2": 0.1}, rates, {"layer1": nan, "layer2": 0.01})
    >>> history.mean_rate, history.standard_errors
    (1.0, [[None, 0.01]])
    """

    epochs: list[dict[str, float]] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    divergences: list[list[float]] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)
    steps_per_epoch: int = 1
    standard_errors: list[list[float | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        unknown: list[float | None] = [None] * len(self.layers)
        missing = len(self.steps) - len(self.standard_errors)
        self.standard_errors = [list(unknown) for _ in range(missing)] + self.standard_errors

    def record(
        self, step: int, divergences: dict[str, float], rates: dict[str, float], standard_errors: dict[str, float]
    ) -> None:
        """Append the layers' state after an update."""
        self.steps.append(step)
        self.divergences.append([divergences[layer] for layer in self.layers])
        self.rates.append([rates[layer] for layer in self.layers])
        errors = [standard_errors[layer] for layer in self.layers]
        self.standard_errors.append([None if math.isnan(error) else error for error in errors])

    @property
    def mean_rate(self) -> float:
        """Mean multiplier over layers and recorded updates; 1 where no layer has a rate of its own."""
        flat = [rate for row in self.rates for rate in row]
        return sum(flat) / len(flat) if flat else 1.0

    @property
    def scores(self) -> dict[str, float]:
        """Test scores after the last epoch, in [0, 1]: never the best ones, which would be picked on the test set."""
        return {
            name.removeprefix("test_"): value for name, value in self.epochs[-1].items() if name.startswith("test_")
        }

    @property
    def seconds(self) -> float:
        """Training and testing time of all epochs."""
        return sum(epoch["seconds"] for epoch in self.epochs)

    def as_plain(self) -> dict[str, Any]:
        """Plain values for a checkpoint; ``History(**plain)`` reads them back."""
        return asdict(self)
