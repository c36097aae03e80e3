"""Contenders take turns within a case, round by round, so that whatever else the machine does meets all of them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

from gpu.clock import Call, Clock
from lwkd.program.provenance import quartiles

Prepare = Callable[[], Call]
"""Everything that is not timed, such as a forward pass before a backward pass; returns what is."""

ROUNDS, WARM_UP = 31, 3
LONGEST_HEAD_START = 0.03
"""Seconds; a call that finds an idle device even then waits for the device itself, and gets no head start."""

TIMES = ("latency", "on_device", "host")


class Contender:
    """One way to do the work of a case.

    Args:
        prepares: one for each set of inputs; calls go through them in turn, so that none finds its inputs in the cache.
    """

    def __init__(self, prepares: Sequence[Prepare]) -> None:
        self._turns = itertools.cycle(prepares)
        self.seconds: dict[str, list[float]] = {name: [] for name in TIMES}
        self.head_start, self.ahead = 0.0, True

    def next(self) -> Call:
        """A call with the next set of inputs."""
        return next(self._turns)()

    def warm_up(self, clock: Clock) -> None:
        """Compile and load what is needed, and find out how long the head start must be."""
        for _ in range(WARM_UP):
            self.next()()
        self.head_start = 3 * max(clock.host(self.next()) for _ in range(3)) + 5e-5
        while not clock.on_device(self.next(), self.head_start)[1]:
            self.head_start *= 3
            if self.head_start > LONGEST_HEAD_START:
                self.head_start, self.ahead = 0.0, False
                return

    def take_turn(self, clock: Clock) -> None:
        """One round: each of the three times, once."""
        self.seconds["latency"].append(clock.latency(self.next()))
        self.seconds["host"].append(clock.host(self.next()))
        seconds, ahead = clock.on_device(self.next(), self.head_start)
        # A round in which the host was held up says nothing about the device: the longer head start is for the next.
        if self.ahead and not ahead and self.head_start < LONGEST_HEAD_START:
            self.head_start *= 2
            seconds, ahead = clock.on_device(self.next(), self.head_start)
        self.seconds["on_device"].append(seconds)


def compare(
    clock: Clock, contenders: dict[str, Sequence[Prepare]], rounds: int = ROUNDS, longest: float = 8.0
) -> dict[str, Any]:
    """Times of all contenders in microseconds, and how many times longer than lwkd each one takes.

    Args:
        clock: what times are taken with.
        contenders: by name; ``lwkd`` must be among them, and must run. Another one that raises is left out, with what
            it said.
        rounds: turns of each.
        longest: seconds after which no further round is begun, however few there were.
    """
    running: dict[str, Contender] = {}
    result: dict[str, Any] = {}
    for name, prepares in contenders.items():
        contender = Contender(prepares)
        try:
            contender.warm_up(clock)
        except Exception as error:
            if name == "lwkd":
                raise
            result[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            continue
        running[name] = contender
    begin = time.perf_counter()
    done = 0
    while done < rounds and (done < 5 or time.perf_counter() - begin < longest):
        for contender in running.values():
            contender.take_turn(clock)
        done += 1
    ours = running["lwkd"].seconds
    for name, contender in running.items():
        found: dict[str, Any] = {
            f"{kind}_microseconds": quartiles([1e6 * s for s in contender.seconds[kind]]) for kind in TIMES
        }
        for kind in ("latency", "on_device"):
            ratios = [other / mine for other, mine in zip(contender.seconds[kind], ours[kind], strict=True)]
            found[f"{kind}_ratio"] = quartiles(ratios)
        found["waits_for_the_device"] = not contender.ahead
        launched = clock.launches(contender.next())
        found["kernels"] = None if launched is None else launched.kernels
        found["copies"] = None if launched is None else launched.copies
        if name == "lwkd":
            found["launched"] = None if launched is None else [kernel[:60] for kernel in launched.names[:12]]
        result[name] = found
    return {"rounds": done, "contenders": result}
