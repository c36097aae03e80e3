"""From times to figures: ``profile.json``, with the interval and the rows that a budget pays for."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from lwkd.program.models.registry import count_parameters
from lwkd.program.profile.counters import Counts
from lwkd.program.profile.inputs import Nets, ProfileSettings
from lwkd.program.profile.rounds import Round, mean_overhead
from lwkd.program.profile.timed_step import PHASES
from lwkd.program.provenance import origin, quartiles
from lwkd.signals import Signal, default_interval

UNKNOWN = "hessian, teacher not known"
"""The measurement of the Hessian signal at the beginning of a run."""

INTERVALS = (1, 2, 5, 10, 15, 20, 30, 50, 100)

Key = tuple[str, str]
"""A timed step: the loss it is made with (the baseline), and what measures in it."""


def shortest_interval(due: float, not_due: float, budget: float) -> int | None:
    """The least interval at which no more than the budget is added; None where even a signal at rest adds more.

    >>> shortest_interval(due=0.1, not_due=0.0, budget=0.03), shortest_interval(0.1, 0.05, 0.03)
    (4, None)
    """
    if due <= budget:
        return 1
    if not_due >= budget:
        return None
    # Rounding must not ask for one update more than an interval that fits exactly.
    return math.ceil((due - not_due) / (budget - not_due) - 1e-9)


class Recommendation(NamedTuple):
    """How often and on how many rows to measure, and what that adds."""

    every: int
    samples: int
    overhead: float


def recommend(due: Mapping[int, float], not_due: float, budget: float, usual: int) -> Recommendation | None:
    """The most rows that the budget pays for at the usual interval or oftener; else those with the shortest interval.

    Args:
        due: what a measured update adds, by rows.
        not_due: what an update adds that is not measured.
        budget: share of a step that may be added on average.
        usual: the signal's own interval.

    Returns:
        None where no interval fits.

    >>> recommend({8: 0.1, 16: 0.2, 32: 0.4}, not_due=0.0, budget=0.03, usual=10)
    Recommendation(every=7, samples=16, overhead=0.0285...)
    """
    fitting = {rows: every for rows, cost in due.items() if (every := shortest_interval(cost, not_due, budget))}
    if not fitting:
        return None
    at_once = [rows for rows, every in fitting.items() if every <= usual]
    rows = max(at_once) if at_once else min(fitting, key=lambda rows: (fitting[rows], -rows))
    return Recommendation(fitting[rows], rows, mean_overhead(due[rows], not_due, fitting[rows]))


def collected(
    settings: ProfileSettings,
    nets: Nets,
    signals: Mapping[str, Signal],
    rounds: Mapping[Key, list[Round]],
    counts: Mapping[Key, Counts],
    by_rows: Mapping[str, Mapping[int, list[float]]],
    rows: Mapping[str, int],
) -> dict[str, Any]:
    """All figures, as plain values.

    Args:
        settings: what was asked for.
        nets: what it was measured on.
        signals: by name.
        rounds: of every timed step.
        counts: of every timed step.
        by_rows: seconds of measurements alone, by signal and rows.
        rows: that were measured in the steps, by signal.
    """
    baselines: dict[str, dict[str, Any]] = {}
    intervals = {name: default_interval(signal, torch.device(settings.device)) for name, signal in signals.items()}
    # One figure for all of them: in a single step the base's update scatters by more than what groups add to it.
    bare_steps = [step for (_, name), found in rounds.items() if name.startswith("bare") for step in found]
    update = statistics.median(step.plain.update for step in bare_steps)
    for (baseline, name), found in rounds.items():
        bare = rounds[baseline, "bare"]
        every = settings.every or (intervals[name] if name in signals else 1)
        of = _step(found, bare, counts[baseline, name], every, update, is_bare=name == "bare")
        if name in signals:
            of |= {"every": every, "samples": rows[name], "target": settings.budget_of(name)}
        baselines.setdefault(baseline, {})[name] = of
    first = next(iter(baselines))
    return {
        **origin(),
        "device": _device(settings),
        "teacher": settings.teacher,
        "student": settings.student,
        "batch": nets.rows,
        "input": list(next(t.shape for t in nets.inputs.tensors() if t.dim())),
        "mixed_precision": settings.amp,
        "optimizer": settings.optimizer,
        "parameters": {"student": count_parameters(nets.student), "teacher": count_parameters(nets.teacher)},
        "layers": list(nets.pairing.names),
        "rounds": len(rounds[first, "bare"]),
        "baselines": baselines,
        "signals": {
            name: _signal(
                settings.budget_of(name),
                settings.every or intervals[name],
                rounds[first, name],
                statistics.median(step.plain.seconds for step in rounds[first, "bare"]),
                update,
                by_rows[name],
                rows[name],
                by_rows.get(UNKNOWN, {}) if signal.memory(len(nets.pairing)) is not None else {},
            )
            for name, signal in signals.items()
        },
    }


def _step(
    found: list[Round], bare: list[Round], counts: Counts, every: int, update: float, *, is_bare: bool
) -> dict[str, Any]:
    of: dict[str, Any] = {
        "step_milliseconds": quartiles([1e3 * step.seconds(every) for step in found]),
        "phases_milliseconds": {p: quartiles([1e3 * step.phase(p, every) for step in found]) for p in PHASES},
        "peak_bytes": counts.peak_bytes,
        "calls": counts.calls,
        "host_milliseconds": None if counts.host_seconds is None else 1e3 * counts.host_seconds,
    }
    if not is_bare:
        pairs = [(step, b.plain.seconds) for step, b in zip(found, bare, strict=True)]
        of["overhead"] = {
            "direct": quartiles([step.added(update, every) / seconds for step, seconds in pairs]),
            "in_turns": quartiles([step.seconds(every) / seconds - 1 for step, seconds in pairs]),
        }
    return of


def _signal(
    budget: float,
    usual: int,
    rounds: list[Round],
    step: float,
    update: float,
    by_rows: Mapping[int, list[float]],
    rows: int,
    unknown: Mapping[int, list[float]],
) -> dict[str, Any]:
    """What measuring costs by rows and interval, and what that means for a budget."""
    due = [found.due.added(update) for found in rounds if found.due is not None]
    plain = [found.plain.added(update) for found in rounds]

    def on_rows(other: list[float]) -> list[float]:
        # What a step adds to the measurement itself is the same for any number of rows.
        return [d + o - own for d, o, own in zip(due, other, by_rows[rows], strict=True)]

    cost = {number: on_rows(found) for number, found in by_rows.items()}
    shares = {number: statistics.median(found) / step for number, found in cost.items()}
    rest = max(0.0, statistics.median(plain) / step)
    best = recommend(shares, rest, budget, usual)
    found: dict[str, Any] = {
        "rows": rows,
        "due_milliseconds": {str(number): quartiles([1e3 * s for s in of]) for number, of in cost.items()},
        "not_due_milliseconds": quartiles([1e3 * s for s in plain]),
        "overhead_by_interval": {
            str(every): mean_overhead(shares[rows], rest, every) for every in sorted({usual, *INTERVALS})
        },
        "recommendation": {"budget": budget} | ({} if best is None else best._asdict()),
    }
    if unknown:
        early = statistics.median(on_rows(unknown[rows])) / step
        found["overhead_until_the_teacher_is_known"] = mean_overhead(early, rest, usual)
    return found


def _device(settings: ProfileSettings) -> dict[str, str]:
    device = torch.device(settings.device)
    return {"type": device.type, "name": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"}
