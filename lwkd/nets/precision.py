"""IEEE float32 for passes that the library makes itself, whatever precision the user trains in.

A finite difference, a tangent or a curvature is 10 % off and more in TF32 or bfloat16. What lowers the precision of a
float32 pass is turned off while it is made, and back on afterwards exactly as it was. Switches belong to the process,
and measurements of several threads may overlap: :class:`Shared`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch


class Shared:
    """A change of the whole process that lasts for as long as anyone needs it.

    The first who enters makes it, and the last who leaves undoes it, in whichever threads and order: were it saved and
    restored by each, the one who leaves last would restore what another had set.

    Args:
        change: gives a context manager that makes the change and undoes it.
    """

    def __init__(self, change: Callable[[], AbstractContextManager[Any]]) -> None:
        self.change, self.inside, self.made = change, 0, ExitStack()
        self.lock = threading.RLock()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, the change is made."""
        with self.lock:
            if not self.inside:
                self.made.enter_context(self.change())
            self.inside += 1
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                if not self.inside:
                    self.made.close()


_SWITCHES = [
    ("generic", "all"),
    *((backend, "all") for backend in ("cuda", "mkldnn")),
    *((backend, op) for backend in ("cuda", "mkldnn") for op in ("conv", "rnn", "matmul")),
]
"""Backends and operations with a precision of float32 arithmetic; those that others inherit from come first."""


@contextmanager
def _ieee_switches() -> Iterator[None]:
    # torch.backends.*.fp32_precision, without the setters that refuse after torch.backends.disable_global_flags().
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    saved = {}
    for switch in _SWITCHES:
        saved[switch] = get(*switch)
        put(*switch, "none")  # or those below, which may say nothing themselves, would show what they inherit
    # The older switches (allow_tf32, set_float32_matmul_precision) are kept beside these. Where the two contradict each
    # other, torch raises when the older ones are read, as cuBLAS and torch.backends.cudnn.flags do.
    matmul = torch._C._get_float32_matmul_precision()
    try:
        cudnn = torch._C._get_cudnn_allow_tf32()
    except RuntimeError:  # contradicts the "none" above, so it is on
        cudnn = True
    try:
        torch._C._set_float32_matmul_precision("highest")
        torch._C._set_cudnn_allow_tf32(False)
        for switch in _SWITCHES:
            put(*switch, "ieee")
        yield
    finally:
        torch._C._set_float32_matmul_precision(matmul)
        torch._C._set_cudnn_allow_tf32(cudnn)
        for switch, precision in saved.items():
            put(*switch, precision)


ieee_float32 = Shared(_ieee_switches)
"""Inside, float32 arithmetic is IEEE float32. Afterwards every switch is as it was before the first who entered."""
