"""The fused ops, each one call over all layers.

Lists over layers are plural; student before teacher, always. The definitions are those of :mod:`lwkd.reference`.

The ops themselves live under ``torch.ops.lwkd``. Their schemas, the CPU kernels and what launches the GPU kernels are
in the C++ extension ``lwkd._C``. Here each file holds what Python adds to the ops of its stem: fake kernels (which give
``torch.compile`` shapes and dtypes), autograd, and the public functions. A backward is one fused op; with
``create_graph=True`` it goes through :mod:`lwkd.reference` instead, which can be differentiated again.
"""

import torch

from lwkd.ops.extension import _C

# isort: split
# What follows adds to the ops that the extension defines.
from lwkd.ops.attention import attention_divergence, attention_maps
from lwkd.ops.hutchinson import hutchinson_trace, rademacher
from lwkd.ops.jacobian import jacobian_divergence, jacobian_sums
from lwkd.ops.rates import update_rates

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
        f"{_cuda()}"
    )


def _cuda() -> str:
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return f"no CUDA kernels, since torch {torch.__version__}, {built}, finds no driver with a device"
    from lwkd.kernels import images  # not needed unless there is a GPU

    # torch would initialise CUDA to tell the architecture; the driver does not.
    index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    architecture = _C.architecture(index)
    return f"Triton kernels on CUDA device {index} (sm_{architecture}); images are {images.describe(architecture)}"
