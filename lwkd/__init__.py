"""Knowledge distillation in which every student layer gets its own learning rate.

The rate of a layer is driven by how far that layer is from the teacher (arXiv 2407.04871). The rooms in reading order,
each of which imports only from those above it:

- :mod:`lwkd.nets` (the user's modules, read and never changed), :mod:`lwkd.reference` (maps, divergences and rates in
  plain PyTorch: the specification)
- :mod:`lwkd.pairing` (which layers are compared), :mod:`lwkd.ops` (the reference as fused kernels)
- :mod:`lwkd.signals` (what is measured), :mod:`lwkd.policies` (from divergences to multipliers)
- :mod:`lwkd.losses` (what a student is trained on), :mod:`lwkd.rates` (from forward passes to multipliers)
- :mod:`lwkd.optimizer` (from multipliers to parameter groups and a step)
- :mod:`lwkd.integrations` (trainers of other libraries), :mod:`lwkd.program` (the command line)
"""

from lwkd import losses, ops, policies, reference, signals
from lwkd.losses import Capture
from lwkd.ops import backend
from lwkd.ops.warmup import warmup
from lwkd.optimizer import Attachment, LayerwiseOptimizer, attach
from lwkd.pairing import Pair, Pairing, PairingError, pair
from lwkd.policies import Constant, Decay, Freeze, Local, Relative
from lwkd.signals.hutchinson import TraceEstimate, ggn_trace, hessian_trace

__version__ = "0.1.0"

__all__ = [
    "Attachment",
    "Capture",
    "Constant",
    "Decay",
    "Freeze",
    "LayerwiseOptimizer",
    "Local",
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
