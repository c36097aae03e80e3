r"""Whether a figure that was kept still holds: the ratio of a contender's time to ours, measured anew.

A ratio is that of the least times over rounds. Noise (another process, a neighbour of the virtual machine, an
interrupt) only ever adds time, so the least time falls towards the quiet one and stays there. In every round all
contenders take a turn; rounds go on until every ratio is where it should be, and for MANY rounds and SECONDS where one
is not. **The same machine** is one with the processor, cores, vectors, threads and torch version that stand beside the
kept figures. There a ratio must be at least

.. math:: \mathrm{kept} \cdot \max(\mathrm{low} / \mathrm{median}, \mathrm{SPREAD}) / (1 + \mathrm{margin})

with ``low`` and ``median`` those of the kept ratios within rounds: it may be worse by its own spread and a margin. On
**another machine** ratios differ, and only half of each clear lead must be there (a contender that took at least LEAD
times as long must take half of that): enough to notice that vectors or threads were lost.

Why noise alone cannot fail it:

- A check that passes stops at once; one that does not goes on, so noise delays a pass and does not prevent it.
- On the same machine a check fails only if **every other contender has meanwhile been as fast as it was when the
  figures were kept** (within part of the margin), in turn with ours. What disturbs ours in every one of all those
  rounds disturbs also those who run between them, most of which take longer and so need a longer quiet moment. Where
  they have not been as fast, the machine was not quiet, or is not the one it says it is, and no more than on another
  machine is demanded.
- What was kept is noisy too: a contender, whose code is torch's, may be faster than it was. It then counts as no
  faster, so that ours must be slower by the clock as well as against the others.
- What stays for the life of a process is noise too, and no rounds average it out: where its memory lies, and what the
  cases before have left in the allocator (three quarters of the time of small probes have been seen to hang on it).
  What fails is therefore repeated in up to AGAIN processes of its own, and fails only if it does in all of them.
- Half of a lead is not lost by noise: ours is the shortest of those compared, so a moment quiet enough for ours comes
  before one quiet enough for the other, and the least times err in favour of ours.

Why a real slowdown cannot pass: it is in every round, whereas the others' least times are close to their quiet ones by
the time that a check may pass: after FEW rounds if they have been as fast as when the figures were kept, after MANY
otherwise. By more than spread and margin, on the same machine in a quiet moment, it fails.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SHORT: tuple[tuple[str, str], ...] = (
    ("attention", "test_forward[cifar-contiguous-float32]"),
    ("attention", "test_forward[cifar-channels_last-bfloat16]"),
    ("attention", "test_backward[cifar-contiguous-float32]"),
    ("attention", "test_maps[cifar-contiguous-float32]"),
    ("jacobian", "test_maps_and_tangents[cifar-contiguous-float32]"),
    ("jacobian", "test_maps_and_tangents[cifar-channels_last-bfloat16]"),
    ("jacobian", "test_jacobian_sums[cifar-contiguous-float32]"),
    ("hutchinson", "test_probe[resnet20-float32]"),
    ("hutchinson", "test_trace[resnet20-float32]"),
    ("layers", "test_attention_divergence[64]"),
    ("layers", "test_hutchinson_trace[64]"),
    ("rates", "test_policy[relative]"),
    ("optimizer", "test_step_alone[resnet56-resnet20-sgd]"),
    ("launch", "test_attention[64]"),
    ("step", "test_rates[sgd]"),
)
"""Stem and test of the cases that every change must pass: one or two an op, of a few milliseconds each."""

SLOW_TO_BUILD = "torch.compile"
"""Contenders that begin so are left out of the short check: compiling takes longer than all the rest."""

MARGINS = {"full": 0.1, "short": 0.25}
"""Share beyond the spread. The short one keeps changes from landing, so it leaves more room for what differs from one
process to the next."""

FEW, MANY, AGAIN = 10, 100, 3
SECONDS = {"full": 20.0, "short": 6.0}
SPREAD = 0.85
"""Of the median, below which a lower quartile allows no more: least times spread less than all times do, and figures
that were kept on a busy machine must not allow everything."""

QUIET = 0.6
"""Of the margin: by that share the others may be slower than they were, in a moment that is quiet."""

LEAD = 3.0
"""Times as long as ours, from which on a contender that is slower on this machine should be so on any."""


@dataclass(frozen=True)
class Kept:
    """What is kept of one contender in one case: least times' ratio, quartiles of the ratio, least milliseconds."""

    ratio: float
    low: float
    median: float
    high: float
    least: float

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> Kept:
        """From the figures of :func:`kept.summary`."""
        within = figures["ratio_to_lwkd"]
        return cls(
            ratio=figures["ratio_of_least"],
            low=within["low"],
            median=within["median"],
            high=within["high"],
            least=figures["least_milliseconds"],
        )

    def strict(self, margin: float) -> float:
        """The least ratio on the same machine."""
        return self.ratio * max(self.low / self.median, SPREAD) / (1 + margin)

    @property
    def loose(self) -> float:
        """The least ratio on any other."""
        return self.ratio / 2 if self.ratio >= LEAD else 0.0

    def __str__(self) -> str:
        return f"{self.ratio:.3g} (within rounds {self.median:.3g}, quartiles {self.low:.3g} to {self.high:.3g})"


@dataclass(frozen=True)
class Verdict:
    """How a check of one case ended."""

    passed: bool
    how: str
    """By which rule."""
    rounds: int
    ratios: dict[str, float]
    demanded: dict[str, float]
    kept: Mapping[str, Kept]

    def lines(self) -> list[str]:
        """One line a contender: found, demanded and kept ratio."""
        return [
            f"{name}: {'worse: ' if ratio < self.demanded[name] else ''}found {ratio:.3g} x lwkd, demanded "
            f"{self.demanded[name]:.3g}, kept {self.kept[name]}"
            for name, ratio in self.ratios.items()
        ]


def setting(origin: Mapping[str, Any]) -> tuple[object, ...]:
    """What must be equal for two ratios to be comparable within their spread."""
    vectors = re.search(r"\((\S+ vectors)", origin["versions"]["backend"])
    machine = origin["machine"]
    return (
        machine["processor"],
        machine["cores"],
        origin["threads"],
        origin["versions"]["torch"],
        vectors[1] if vectors else None,
    )


def kept_for(case: Mapping[str, Any]) -> dict[str, Kept]:
    """All contenders of a kept case but ours."""
    return {name: Kept.of(figures) for name, figures in case.items() if name != "lwkd"}


def least_lead(machines: list[Mapping[str, Any]]) -> dict[str, Kept]:
    """Of several machines' figures of a case, for each contender that has the least lead of ours."""
    least: dict[str, Kept] = {}
    for case in machines:
        for name, kept in kept_for(case).items():
            if name not in least or kept.ratio < least[name].ratio:
                least[name] = kept
    return least


def watch(
    contenders: Mapping[str, Callable[[], float]],
    kept: Mapping[str, Kept],
    *,
    same: bool,
    margin: float,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Verdict:
    """Measure until the ratios hold, or until it is known that they do not.

    Args:
        contenders: seconds of one turn of each; ``lwkd`` among them. Those of which nothing is kept are not run.
        kept: what is kept of the others.
        same: whether it was kept on the same machine.
        margin: beyond the spread, on the same machine.
        seconds: limit, for what does not pass.
        clock: by which.
    """
    turns = {name: turn for name, turn in contenders.items() if name == "lwkd" or name in kept}
    others = [name for name in turns if name != "lwkd"]
    loose = {name: kept[name].loose for name in others}
    strict = {name: kept[name].strict(margin) for name in others}
    demanded = strict if same else loose
    least = dict.fromkeys(turns, math.inf)
    begin, rounds = clock(), 0

    def verdict(floors: dict[str, float], how: str) -> Verdict:
        quietest = {name: max(least[name], 1e-3 * kept[name].least if same else 0.0) for name in others}
        ratios = {name: quietest[name] / least["lwkd"] for name in others}
        return Verdict(all(ratios[n] >= floors[n] for n in others), how, rounds, ratios, floors, kept)

    while True:
        for name, turn in turns.items():
            least[name] = min(least[name], turn())
        rounds += 1
        quiet = same and all(1e3 * least[name] <= (1 + QUIET * margin) * kept[name].least for name in others)
        if rounds < (FEW if quiet else MANY):
            continue
        now = verdict(demanded, "within the spread, same machine" if same else "half of each lead, other machine")
        if now.passed:
            return now
        if rounds >= MANY and clock() - begin >= seconds:
            unlike = same and not quiet
            return verdict(loose, "half of each lead: the others were never as fast as before") if unlike else now
