"""The bench check: no implementation may come closer to lwkd's time than its floor.

A ratio is an implementation's least time over ours. Noise (another process, a neighbour of the virtual machine) only
ever adds time, so the least time falls towards the quiet one and stays there. A floor is SHARE of the ratio on a quiet
machine. An op that takes twice as long is left with half of that ratio, and fails; an unchanged one keeps nearly all of
it.

The short check, which keeps changes from landing, must not fail on a busy machine: it counts the processor's time with
a single thread, which hardly changes when other processes get their turns. Its floors stand in ``floors.json``, and are
ratios to implementations that do the same work, which differ less from one processor to the next than ratios to the
memory's speed do. The full check forms its floors from ``results/MACHINE.json``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import report
from lwkd.program.turns import take_turns

PATH = report.HERE / "floors.json"
SHARE = 0.6
FEWEST, SECONDS = 60, 0.5
"""Rounds and seconds of a case that passes at once."""

PATIENCE = 8.0
"""Seconds after which a case that does not pass has failed: noise delays a pass and does not prevent it."""

Cases = dict[tuple[str, str], dict[str, float]]
"""By stem and test, floors by implementation."""


def short() -> Cases:
    """Floors of the cases that every change must pass: one or two an op, of a few milliseconds each."""
    return {(stem, case): of for stem, cases in report.read(PATH)["floors"].items() for case, of in cases.items()}


def kept(stem: str, case: str) -> dict[str, float]:
    """Ratios by implementation among the results; where several machines know the case, the least of theirs."""
    found: dict[str, float] = {}
    for stems in report.of_all_machines(report.folder()).values():
        for name, figures in stems.get(stem, {"cases": {}})["cases"].get(case, {}).items():
            if name != "lwkd":
                found[name] = min(found.get(name, figures["ratio_of_least"]), figures["ratio_of_least"])
    return found


def ratios(
    implementations: Mapping[str, Callable[[], float]],
    floors: Mapping[str, float],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Ratios of least times to lwkd's, measured until all reach their floors or until patience is at its end.

    Args:
        implementations: seconds of one turn of each, by name; those without a floor are not run, apart from ``lwkd``.
        floors: by name.
        clock: by which patience is measured.
    """
    turns = {name: turn for name, turn in implementations.items() if name == "lwkd" or name in floors}
    begin = clock()

    def least(found: Mapping[str, list[float]]) -> dict[str, float]:
        return {name: min(times) / min(found["lwkd"]) for name, times in found.items() if name != "lwkd"}

    def enough(found: Mapping[str, list[float]]) -> bool:
        passed = clock() - begin > SECONDS and not worse(least(found), floors)
        return passed or clock() - begin > PATIENCE

    return least(take_turns(turns, warm_up=3, fewest=FEWEST, enough=enough))


def worse(found: Mapping[str, float], floors: Mapping[str, float]) -> list[str]:
    """A line for each ratio below its floor.

    >>> worse({"eager": 1.9, "separate calls": 4.0}, {"eager": 2.4, "separate calls": 3.0})
    ['eager takes 1.9 x as long as lwkd, expected at least 2.4 x']
    """
    return [
        f"{name} takes {ratio:.3g} x as long as lwkd, expected at least {floors[name]:.3g} x"
        for name, ratio in found.items()
        if ratio < floors[name]
    ]


def write(found: Cases, origin: Mapping[str, Any]) -> None:
    """Write ``floors.json`` anew from the ratios of the short check.

    Where the results of a machine hold a lesser ratio, that one counts: leads depend on the width of the vectors, and
    on whether somebody else fills the caches.
    """
    floors: dict[str, dict[str, dict[str, float]]] = {}
    for (stem, case), ratios in found.items():
        least = {name: min(ratio, kept(stem, case).get(name, ratio)) for name, ratio in ratios.items()}
        floors.setdefault(stem, {})[case] = {name: float(f"{SHARE * ratio:.3g}") for name, ratio in least.items()}
    report.write(PATH, {**origin, "share": SHARE, "floors": floors})
