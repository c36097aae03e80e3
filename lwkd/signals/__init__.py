"""Signals: what the distance between a student layer and its teacher layer is measured on.

Every signal has two uses: ``measure`` gives statistics without a gradient, from which ``divergence`` forms one number
a layer, and ``loss`` gives a scalar that can be trained on. Attention is measured on the features of the passes that
the training loop makes anyway; Jacobian and Hessian make passes of their own on a few rows of the batch.
"""

from lwkd.signals.attention import Attention
from lwkd.signals.hessian import Hessian
from lwkd.signals.jacobian import Jacobian

Signal = Attention | Jacobian | Hessian

__all__ = ["Attention", "Hessian", "Jacobian", "Signal"]
