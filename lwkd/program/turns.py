"""Calls that take turns, round by round, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Key = TypeVar("Key")
Found = TypeVar("Found")


def take_turns(
    calls: Mapping[Key, Callable[[], Found]],
    rounds: float = math.inf,
    *,
    warm_up: int = 0,
    fewest: int = 1,
    seconds: float = math.inf,
    enough: Callable[[Mapping[Key, list[Found]]], bool] = lambda _: False,
    shuffled: bool = False,
    tell: Callable[[int], None] = lambda _: None,
) -> dict[Key, list[Found]]:
    """Results of all calls, round by round.

    Args:
        calls: each is called once a round, in this order.
        rounds: how many at most.
        warm_up: rounds before, of which nothing is kept.
        fewest: rounds that are made in any case.
        seconds: after which no further round is begun.
        enough: asked between rounds whether what was found will do.
        shuffled: the order changes with every round.
        tell: called with the number of each round, from 1 on.

    >>> take_turns({"lwkd": lambda: 1.0, "eager": lambda: 3.0}, 2)
    {'lwkd': [1.0, 1.0], 'eager': [3.0, 3.0]}
    """
    for _ in range(warm_up):
        for call in calls.values():
            call()
    found: dict[Key, list[Found]] = {key: [] for key in calls}
    order, begin, done = list(calls), time.perf_counter(), 0
    while done < fewest or (done < rounds and time.perf_counter() - begin < seconds and not enough(found)):
        tell(done + 1)
        for key in order:
            found[key].append(calls[key]())
        done += 1
        if shuffled:
            random.Random(done).shuffle(order)  # so that no call always follows the same one
    return found
