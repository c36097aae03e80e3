"""From the multiplier of every layer to parameter groups and the step of the base optimizer.

Reading order: :mod:`~lwkd.optimizer.wrapper` and :mod:`~lwkd.optimizer.attachment` (the two public forms),
:mod:`~lwkd.optimizer.step` (what both do in a step), :mod:`~lwkd.optimizer.ownership` (parameter to layer),
:mod:`~lwkd.optimizer.param_groups` (groups that exist for the length of a step) with
:mod:`~lwkd.optimizer.lr_scaling` and :mod:`~lwkd.optimizer.group_memory`, :mod:`~lwkd.optimizer.backward_cut` (layers
left out of the backward pass), :mod:`~lwkd.optimizer.trial` (does the base follow its groups?), and
:mod:`~lwkd.optimizer.metrics` (what both forms show).
"""

from lwkd.optimizer.attachment import Attachment, attach
from lwkd.optimizer.wrapper import LayerwiseOptimizer

__all__ = ["Attachment", "LayerwiseOptimizer", "attach"]
