"""Signals: what the distance between a student layer and its teacher layer is measured on.

Every signal has two uses: ``measure`` gives statistics without a gradient, from which ``divergence`` forms one number
a layer, and ``loss`` gives a scalar that can be trained on. Attention is measured on the features of the passes that
the training loop makes anyway; Jacobian and Hessian make passes of their own on a few rows of the batch.
"""

from lwkd.signals.attention import Attention
from lwkd.signals.hessian import Hessian
from lwkd.signals.jacobian import Jacobian
from lwkd.signals.signal import RowShare, Samples, Signal, default_interval, rows_of

SIGNALS: dict[str, type[Signal]] = {"attention": Attention, "jacobian": Jacobian, "hessian": Hessian}


def signal_named(signal: str | Signal) -> Signal:
    """The signal of this name with its own defaults; an object is returned as it is.

    Raises:
        ValueError: an unknown name, or an object that is no signal.

    >>> signal_named("hessian").every
    5
    """
    if isinstance(signal, str) and signal in SIGNALS:
        return SIGNALS[signal]()
    if isinstance(signal, Signal) and not isinstance(signal, type):  # a class has the members, too
        return signal
    raise ValueError(f"signal is {signal!r}; expected {', '.join(map(repr, SIGNALS))} or an object of lwkd.signals")


__all__ = [
    "SIGNALS",
    "Attention",
    "Hessian",
    "Jacobian",
    "RowShare",
    "Samples",
    "Signal",
    "default_interval",
    "rows_of",
    "signal_named",
]
