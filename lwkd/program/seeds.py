"""Seeds for all random numbers of a run, and the settings of torch with which its sums can be repeated."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_of(*numbers: int) -> int:
    """A seed for a generator out of several numbers, well mixed: neighbours give unrelated streams.

    >>> seed_of(1, 2) != seed_of(2, 1), seed_of(1, 2) == seed_of(1, 2)
    (True, True)
    """
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(*numbers: int) -> None:
    """Seed the global streams of Python, NumPy and torch."""
    import numpy as np

    seed = seed_of(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def repeatable(threads: int | None) -> Iterator[None]:
    """Ask torch for the same bits on every run, and put its settings back at the end.

    Args:
        threads: CPU threads (sums are split by them); None leaves their number as it is.
    """
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark,
    )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    _set(threads or before[0], True, True, False, False)  # filling new memory costs time and changes no result
    try:
        yield
    finally:
        _set(*before)


def _set(threads: int, deterministic: bool, warn_only: bool, fill: bool, benchmark: bool) -> None:
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = benchmark
