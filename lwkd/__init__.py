"""Knowledge distillation in which every student layer gets its own learning rate.

The rate of a layer is driven by how far that layer is from the teacher (arXiv 2407.04871). In reading order:
:mod:`lwkd.pairing` (which layers are compared), :mod:`lwkd.features` (what the passes leave behind),
:mod:`lwkd.reference` (maps, divergences, rates: the specification), :mod:`lwkd.policies` (the rule),
:mod:`lwkd.optimizer` (the wrapper).
"""

from lwkd import losses, ops, policies, reference, signals
from lwkd.attachment import Attachment, attach
from lwkd.features import Capture
from lwkd.hutchinson import TraceEstimate, ggn_trace, hessian_trace
from lwkd.ops import backend
from lwkd.optimizer import LayerwiseOptimizer
from lwkd.pairing import Pair, Pairing, PairingError, pair
from lwkd.policies import Constant, Decay, Relative
from lwkd.warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "Attachment",
    "Capture",
    "Constant",
    "Decay",
    "LayerwiseOptimizer",
    "Pair",
    "Pairing",
    "PairingError",
    "Relative",
    "TraceEstimate",
    "attach",
    "backend",
    "ggn_trace",
    "hessian_trace",
    "losses",
    "ops",
    "pair",
    "policies",
    "reference",
    "signals",
    "warmup",
]
