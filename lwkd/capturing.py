"""Whether a CUDA graph is being captured: what is launched then runs later, and nothing can be read."""

from __future__ import annotations

import torch


def capturing() -> bool:
    """Whether the current stream is being captured; False where CUDA is not in use.

    >>> capturing()
    False
    """
    # Asked first, because without a driver the other question is an error.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
