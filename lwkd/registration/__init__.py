"""Loads the C++ extension and gives its ops what they lack: fake kernels (for ``torch.compile``), autograd, GPU images.

The schemas are in ``csrc/ops.cpp``, the CPU kernels beside it; the public functions are in :mod:`lwkd.ops`. Every
backward is one fused op; where it runs with gradients enabled (``create_graph=True``) it goes through
:mod:`lwkd.reference` instead, which can be differentiated again.
"""

import torch

try:
    import lwkd._C as _C
except ImportError as error:
    raise ImportError(
        f"the C++ extension lwkd._C cannot be loaded ({error}). Build it against the torch of this environment "
        f"({torch.__version__}): run `pip install --no-build-isolation -e .` in a checkout of lwkd."
    ) from error

from lwkd.registration import attention, hutchinson, jacobian, rates, step


def _find_image(variant: str, architecture: int) -> tuple[bytes, str, list[int], int, int, int]:
    """What the extension calls when it first launches a kernel on a device; nothing is imported for it before."""
    from lwkd.kernels import images

    return images.find(variant, architecture)


_C.set_image_provider(_find_image)

__all__ = ["_C", "attention", "hutchinson", "jacobian", "rates", "step"]
