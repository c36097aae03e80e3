"""Signals: what the distance between a student layer and its teacher layer is measured on.

Every signal has two uses: ``measure`` gives statistics without a gradient, from which ``divergence`` forms one number
a layer, and ``loss`` gives a scalar that can be trained on.
"""

from lwkd.signals.attention import Attention

__all__ = ["Attention"]
