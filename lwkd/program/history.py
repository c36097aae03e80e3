"""What one training run has recorded: a line an epoch, and the layers' divergences and rates along the way."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class History:
    """The record of one stage; plain lists, so that it travels in checkpoints.

    ``epochs`` holds one dict an epoch; ``steps[i]`` is the update after which ``divergences[i]`` and ``rates[i]``
    (one number a layer of ``layers``) were read, counted from 1.

    >>> history = History(layers=["layer1", "layer2"])
    >>> history.record(10, {"layer1": 0.2, "layer2": 0.1}, {"layer1": 1.25, "layer2": 0.75})
    >>> history.mean_rate
    1.0
    """

    epochs: list[dict[str, float]] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    divergences: list[list[float]] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)
    steps_per_epoch: int = 1

    def record(self, step: int, divergences: dict[str, float], rates: dict[str, float]) -> None:
        """Append the layers' state after an update."""
        self.steps.append(step)
        self.divergences.append([divergences[layer] for layer in self.layers])
        self.rates.append([rates[layer] for layer in self.layers])

    @property
    def mean_rate(self) -> float:
        """Mean multiplier over layers and recorded updates; 1 where no layer has a rate of its own."""
        flat = [rate for row in self.rates for rate in row]
        return sum(flat) / len(flat) if flat else 1.0

    @property
    def accuracy(self) -> float:
        """Test accuracy after the last epoch, in [0, 1]: never the best one, which would be picked on the test set."""
        return self.epochs[-1]["test_accuracy"]

    @property
    def seconds(self) -> float:
        """Training and testing time of all epochs."""
        return sum(epoch["seconds"] for epoch in self.epochs)

    def as_plain(self) -> dict[str, Any]:
        """Plain values for a checkpoint; ``History(**plain)`` reads them back."""
        return asdict(self)
