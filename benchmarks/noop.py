"""The floor of a call: an op of two lists that looks at nothing and returns an empty tensor, one number a layer.

What Python, the dispatcher and the lists cost is in it, and nothing else: an op of one call over all layers cannot be
faster. ``noop.cpp`` is compiled at the first use, in about twenty seconds, and kept in ``build/noop``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.harness import SMALL, Timed, timed

SOURCE = Path(__file__).with_suffix(".cpp")
BUILD = SOURCE.parent.parent / "build" / "noop"


@cache
def noop() -> Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]:
    """``noop()(a, b)`` returns an empty ``(L,)`` float32 for L tensors ``a``; ``b`` may be an empty list.

    Raises:
        RuntimeError: what the compiler said.
    """
    from torch.utils.cpp_extension import load  # imports setuptools: needed here only

    BUILD.mkdir(parents=True, exist_ok=True)
    # ninja lies beside the Python that runs this, which need not be in PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    with patch.dict(os.environ, PATH=path):
        load(
            f"lwkd_noop_torch_{torch.__version__.replace('.', '_').replace('+', '_')}",
            [str(SOURCE)],
            build_directory=str(BUILD),
            extra_cflags=["-O2"],
            is_python_module=False,
        )
    return torch.ops.lwkd_floor.noop


def floor(a: Sequence[Tensor], b: Sequence[Tensor] = (), calls: int = 1) -> Timed:
    """The do-nothing op among the implementations; not there where nothing is to be built."""
    return {} if SMALL else {"noop": timed(noop(), list(a), list(b), calls=calls)}
