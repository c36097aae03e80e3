"""How a layer's output is laid out, and the ``(B, C, *spatial)`` view on it that every op takes.

Legend: ``B`` batch, ``C`` channels, ``N`` tokens, ``gh gw`` the grid that image tokens came from, ``K`` classes,
``P`` positions that each have logits of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Kind = Literal["channels_first", "channels_last", "tokens", "logits", "logits_last"]


@dataclass(frozen=True)
class Layout:
    r"""Where the channels of a feature are.

    Args:
        kind: ``"channels_first"`` ``(B, C, *spatial)``, ``"channels_last"`` ``(B, *spatial, C)``, ``"tokens"``
            ``(B, N, C)``, ``"logits"`` ``(B, K, *spatial)`` or ``"logits_last"`` ``(B, *spatial, K)``.
        prefix: number of class and register tokens in front of the others (tokens only).
        grid: ``(gh, gw)`` with ``gh · gw = N − prefix`` where the tokens come from an image (tokens only).
        before: name of the norm that gives out the layer's output, where that norm's input is the feature: behind a
            norm over the channels, :math:`\sum_c F_{cn}^2` is the same at all positions, and a map says nothing.
        batch_first: False for tokens ``(N, B, C)``, as torch's attention and recurrent layers give them by default.

    Raises:
        ValueError: an unknown kind, or what belongs to tokens given for something else.

    >>> import torch
    >>> Layout("tokens", prefix=1, grid=(2, 3)).view(torch.zeros(4, 7, 5)).shape
    torch.Size([4, 5, 2, 3])
    >>> Layout("channels_last").view(torch.zeros(4, 2, 3, 5)).shape
    torch.Size([4, 5, 2, 3])
    >>> Layout("tokens", batch_first=False).view(torch.zeros(7, 4, 5)).shape
    torch.Size([4, 5, 7])
    """

    kind: Kind
    prefix: int = 0
    grid: tuple[int, int] | None = None
    before: str | None = None
    batch_first: bool = True

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"layout kind {self.kind!r} is not known; expected one of {', '.join(get_args(Kind))}")
        if self.kind != "tokens" and (self.prefix or self.grid is not None or not self.batch_first):
            raise ValueError(f"prefix, grid and batch_first=False belong to tokens, not to a {self.kind} layout")
        if self.prefix < 0:
            raise ValueError(f"prefix is {self.prefix}; expected 0 or more tokens")

    @property
    def of_logits(self) -> bool:
        """Whether the feature is logits, compared as softmax outputs."""
        return self.kind in ("logits", "logits_last")

    @property
    def batch_dim(self) -> int:
        """The dimension of the rows: 0, or 1."""
        return 0 if self.batch_first else 1

    def positions(self, shape: Sequence[int]) -> int | None:
        """Number of positions N of a feature of this shape; None where they are no sequence (B, N, C) or (B, C, N).

        >>> Layout("tokens").positions((4, 7, 5)), Layout("channels_first").positions((4, 7, 5, 5))
        (7, None)
        """
        if len(shape) != 3:
            return None
        return shape[2] if self.kind in ("channels_first", "logits") else shape[1 - self.batch_dim]

    def view(self, feature: Tensor, valid: Tensor | None = None) -> Tensor:
        r"""The feature as ``(B, C, *spatial)``, without a copy.

        Any dtype and strides. Channels last ``(B, H, W, C)`` → ``(B, C, H, W)``; tokens ``(B, N, C)`` or ``(N, B, C)``
        → the prefix dropped → ``(B, C, N')``, or ``(B, C, gh, gw)`` where the grid is known.

        Logits ``z`` are no view: they give :math:`\sqrt{\mathrm{softmax}(z)}` ``(B, 1, K·P)`` in float32 or better,
        of which the attention map with power 2 is the softmax, of all P positions side by side, over P. The JSD of two
        such maps is the mean over the positions of the JSD of their softmax outputs. A logit of −∞ is probability 0.

        Args:
            feature: what the layer gave out.
            valid: bool ``(B, N)``, of a feature with :meth:`positions`: all others become exactly zero, in a copy, so
                that they take no part in any map.

        Raises:
            ValueError: the feature has too few dimensions, or a number of tokens that the layout does not fit.
        """
        if self.of_logits:
            if feature.dim() < 2:
                raise ValueError(f"logits have 2 dimensions or more; found shape {tuple(feature.shape)}")
            wide = feature if feature.element_size() >= 4 else feature.float()
            # Half the log-probability: the derivative of a root would be infinite at probability 0.
            roots = (0.5 * torch.log_softmax(wide, 1 if self.kind == "logits" else -1)).exp()
            return self._hidden(roots, valid).flatten(1).unsqueeze(1)
        rank = 3 if self.kind == "tokens" else max(3, feature.dim())
        if feature.dim() != rank:
            raise ValueError(f"a {self.describe()} feature has {rank} dimensions; found shape {tuple(feature.shape)}")
        feature = self._hidden(feature if self.batch_first else feature.transpose(0, 1), valid)
        if self.kind == "channels_first":
            return feature
        if self.kind == "channels_last":
            return feature.movedim(-1, 1)
        tokens_BCN = feature[:, self.prefix :].transpose(1, 2)
        if self.grid is None:
            return tokens_BCN
        if tokens_BCN.shape[2] != self.grid[0] * self.grid[1]:
            raise ValueError(
                f"a {self.describe()} feature has {self.prefix + self.grid[0] * self.grid[1]} tokens; found shape "
                f"{tuple(feature.shape)}. Pair again with an example input of the size that is now used"
            )
        return tokens_BCN.unflatten(2, self.grid)

    def _hidden(self, feature: Tensor, valid: Tensor | None) -> Tensor:
        """The feature with zeros where it is not valid; NaN there does no harm."""
        if valid is None:
            return feature
        return feature.masked_fill(~valid.unsqueeze(1 if self.kind in ("channels_first", "logits") else 2), 0.0)

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of :meth:`view` for a feature of this shape.

        >>> Layout("tokens", prefix=1).shape((4, 7, 5))
        (4, 5, 6)
        """
        if self.of_logits:
            return (shape[0], 1, math.prod(shape[1:]))
        if self.kind == "channels_first":
            return tuple(shape)
        if self.kind == "channels_last":
            return (shape[0], shape[-1], *shape[1:-1])
        spatial = (shape[1 - self.batch_dim] - self.prefix,) if self.grid is None else self.grid
        return (shape[self.batch_dim], shape[2], *spatial)

    def describe(self) -> str:
        """The layout in words, as the pairing table prints it.

        >>> Layout("tokens", prefix=1, grid=(14, 14)).describe()
        'tokens 1 + 14x14'
        """
        if self.of_logits:
            return "softmax"
        norm = ("" if self.batch_first else ", sequence first") + ("" if self.before is None else ", before its norm")
        if self.kind != "tokens":
            return self.kind.replace("_", " ") + norm
        prefix = f"{self.prefix} + " if self.prefix else ""
        return f"tokens {prefix}{'N' if self.grid is None else f'{self.grid[0]}x{self.grid[1]}'}{norm}"
