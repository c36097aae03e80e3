"""Loads the C++ extension ``lwkd._C``, which defines the ops, and tells it where the GPU images of its kernels are."""

import torch

try:
    import lwkd._C as _C
except ImportError as error:
    raise ImportError(
        f"the C++ extension lwkd._C cannot be loaded ({error}). Build it against the torch of this environment "
        f"({torch.__version__}): run `pip install --no-build-isolation -e .` in a checkout of lwkd."
    ) from error


def _find_image(variant: str, architecture: int) -> tuple[bytes, str, list[int], int, int, int]:
    """Called by the extension when it first launches a kernel on a device; ``lwkd.kernels`` is imported only then."""
    from lwkd.kernels import images

    return images.find(variant, architecture)


_C.set_image_provider(_find_image)

__all__ = ["_C"]
