"""The fused ops, each one call over all layers.

Lists over layers are plural; student before teacher, always. The definitions are those of :mod:`lwkd.reference`.

These are the public functions. The ops themselves live under ``torch.ops.lwkd``: schemas and CPU kernels in the C++
extension ``lwkd._C``, fake kernels and autograd in :mod:`lwkd.registration`.
"""

from lwkd.ops.attention import attention_divergence, attention_maps
from lwkd.ops.hutchinson import hutchinson_trace, rademacher
from lwkd.ops.jacobian import jacobian_divergence, jacobian_sums
from lwkd.ops.rates import update_rates
from lwkd.registration import _C

__all__ = [
    "attention_divergence",
    "attention_maps",
    "backend",
    "hutchinson_trace",
    "jacobian_divergence",
    "jacobian_sums",
    "rademacher",
    "update_rates",
]


def backend() -> str:
    """Which implementation runs the ops, and why.

    >>> "C++ kernels on the CPU" in backend()
    True
    """
    threads = f"{_C.threads()} threads" if _C.has_openmp() else "1 thread: it was built without OpenMP"
    return (
        f"C++ kernels on the CPU ({_C.cpu_capability()} vectors, {threads}; built with torch {_C.torch_version()}); "
        "CUDA kernels are not launched by this version"
    )
