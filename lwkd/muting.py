"""Passes that the library makes itself are not passes of the training loop: its own hooks stay silent in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_muted: ContextVar[bool] = ContextVar("lwkd_muted", default=False)


@contextmanager
def muted() -> Iterator[None]:
    """Lwkd's hooks take no notice of the passes made inside.

    >>> with muted():
    ...     is_muted()
    True
    >>> is_muted()
    False
    """
    token = _muted.set(True)
    try:
        yield
    finally:
        _muted.reset(token)


def is_muted() -> bool:
    """Whether the pass at hand is the library's own."""
    return _muted.get()
