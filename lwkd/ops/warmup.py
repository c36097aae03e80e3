"""Loads all kernels that a CUDA device may need before they are needed."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence

import torch

from lwkd.ops.extension import _C

ELEMENTS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
"""The dtypes that the kernels read, by the names that the kernels' variants give them."""

FEW = 8
"""Up to this many missing images are compiled in this process; for more, several processes are started."""


def warmup(device: torch.device | str | int | None = None, dtypes: Sequence[torch.dtype] = tuple(ELEMENTS)) -> int:
    """Load every kernel that a device may need; images that are missing are compiled first, in parallel.

    Without it a kernel is loaded when it is first launched, which delays that launch, and fails while a CUDA graph is
    captured.

    Args:
        device: a CUDA device; by default the current one.
        dtypes: those that the ops will be called with; fewer take less time and memory.

    Returns:
        The number of kernels loaded.

    Raises:
        ValueError: not a CUDA device, or a dtype that the kernels do not read.
        RuntimeError: there is no such device, or an image is missing and cannot be compiled.

    >>> warmup("cpu")
    Traceback (most recent call last):
        ...
    ValueError: only CUDA devices have kernels to load, and cpu is none
    """
    chosen = torch.device("cuda") if device is None else torch.device(device)
    if chosen.type != "cuda":
        raise ValueError(f"only CUDA devices have kernels to load, and {chosen} is none")
    odd = [dtype for dtype in dtypes if dtype not in ELEMENTS]
    if odd:
        raise ValueError(f"the kernels read {', '.join(map(str, ELEMENTS))}; found {', '.join(map(str, odd))}")
    if not torch.cuda.is_available():
        raise RuntimeError(f"no CUDA device to load kernels on: {_what_was_looked_for()}")
    index = torch.cuda.current_device() if chosen.index is None else chosen.index
    major, minor = torch.cuda.get_device_capability(index)
    return _load(index, 10 * major + minor, [ELEMENTS[dtype] for dtype in dtypes])


def _load(index: int, architecture: int, elements: Sequence[str]) -> int:
    from lwkd.kernels import images, spec

    variants = [variant.text for variant in spec.all_variants(elements)]
    if len(images.missing(variants, f"sm_{architecture}")) > FEW and images.triton_version():
        # A variant that fails there is compiled again below, where its error is raised.
        command = [sys.executable, "-m", "lwkd.kernels.compile", "--arch", str(architecture), "--element", *elements]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    for variant in variants:
        _C.load_kernel(variant, f"cuda:{index}")
    return len(variants)


def _what_was_looked_for() -> str:
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    try:
        ctypes.CDLL("libcuda.so.1")
        driver = "the driver libcuda.so.1 can be loaded"
    except OSError as error:
        driver = f"the driver cannot be loaded ({error})"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = "CUDA_VISIBLE_DEVICES is not set" if visible is None else f"CUDA_VISIBLE_DEVICES={visible!r}"
    return f"torch {torch.__version__}, {built}, finds none; {driver}; {devices}"
