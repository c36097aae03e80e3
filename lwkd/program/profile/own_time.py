"""The time that is spent in certain calls, among them all of lwkd's own code in a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lwkd.nets.hooks import Hook
from lwkd.rates.device import Clock


class OwnTime:
    """Adds up what wrapped calls take, by a clock whose marks may be read later.

    Args:
        clock: by which.

    >>> from lwkd.rates.device import HostClock
    >>> own = OwnTime(HostClock())
    >>> own.around(sum)([1, 2]), own.take() > 0, own.take()
    (3, True, 0)
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._spans: list[tuple[Any, Any]] = []

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self.clock.mark()
            try:
                return function(*args, **kwargs)
            finally:
                self._spans.append((begin, self.clock.mark()))

        return timed

    def pending(self) -> list[tuple[Any, Any]]:
        """Begin and end of every call since the last time somebody asked."""
        spans, self._spans = self._spans, []
        return spans

    def take(self) -> float:
        """Seconds in all calls since the last time somebody asked; their marks have passed."""
        return sum(self.clock.between(begin, end) for begin, end in self.pending())

    def watch_hooks(self, *nets: nn.Module, everywhere: bool = True) -> None:
        """Count the time in the hooks of lwkd that are on these nets now, for as long as the nets live.

        Args:
            nets: student and teacher.
            everywhere: False leaves out those of layers, which only put a feature aside: nothing of that reaches a GPU,
                whose clock would make them wait for a pair of events each.
        """
        for net in nets:
            for module in net.modules() if everywhere else [net]:
                for hooks in (module._forward_hooks, module._forward_pre_hooks):
                    for key, hook in hooks.items():
                        if isinstance(hook, Hook):
                            hooks[key] = self.around(hook)
