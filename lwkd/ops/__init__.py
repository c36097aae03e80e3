"""The fused ops, each one call over all layers.

Lists over layers are plural; student before teacher, always. The definitions are those of :mod:`lwkd.reference`.

The ops themselves live under ``torch.ops.lwkd``. Their schemas, the CPU kernels and what launches the GPU kernels are
in the C++ extension ``lwkd._C``. Here each file holds what Python adds to the ops of its stem: fake kernels (which give
``torch.compile`` shapes and dtypes), autograd, and the public functions. A backward is one fused op; with
``create_graph=True`` it goes through :mod:`lwkd.reference` instead, which can be differentiated again.
"""

import ctypes

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
    # Until CUDA is in use neither torch nor the driver is asked, which would initialise it: children of a process that
    # forks later could not use it. Looking for the driver's library, and torch's count of devices by NVML, do not.
    if torch.cuda.is_initialized():
        index = torch.cuda.current_device()
        architecture = _C.architecture(index)
        return f"Triton kernels on CUDA device {index} (sm_{architecture}); images are {_images(architecture)}"
    devices = 0 if torch.version.cuda is None else torch.cuda._device_count_nvml()
    if devices == 0 or (devices < 0 and not _has_driver()):
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return f"no CUDA kernels, since torch {torch.__version__}, {built}, finds no driver with a device"
    found = "device 0" if devices > 0 else "devices, if the driver finds any"
    return f"Triton kernels on CUDA {found} (which this process does not use yet); images are {_images(None)}"


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _images(architecture: int | None) -> str:
    from lwkd.kernels import images  # not needed unless there is a GPU

    return images.describe(architecture)
