"""Optimizers that hold others: which of them makes the updates, and which are inside."""

from __future__ import annotations

from torch.optim import Optimizer

PASS_ON = {"accelerate.optimizer": "optimizer", "torch.distributed.optim.zero_redundancy_optimizer": "optim"}
"""Modules of optimizers that hold another one, which alone makes updates, and the attribute that holds it.

AcceleratedOptimizer passes steps on, but not every one (accumulation, a GradScaler), and keeps the step that it first
saw. ZeroRedundancyOptimizer passes on those of this rank's parameters, with learning rates that it copies.
"""


def where_steps_come(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose steps are updates: the one inside an optimizer of :data:`PASS_ON`, or itself."""
    while type(optimizer).__module__ in PASS_ON:
        optimizer = getattr(optimizer, PASS_ON[type(optimizer).__module__])
    return optimizer


def with_those_inside(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizer, and those that it holds."""
    found = [optimizer]
    for one in found:
        for value in vars(one).values():
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(item, Optimizer) and not any(item is other for other in found):
                    found.append(item)
    return found
