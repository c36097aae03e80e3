"""From laps to the figures that are kept: ``profile.json``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch

from lwkd.program.models.registry import count_parameters
from lwkd.program.profile.counters import Counts
from lwkd.program.profile.inputs import Nets
from lwkd.program.profile.intervals import INTERVALS, mean_overhead, recommend
from lwkd.program.profile.rounds import Turn
from lwkd.program.profile.settings import ProfileSettings
from lwkd.program.profile.timed_step import PHASES
from lwkd.program.provenance import origin, quartiles
from lwkd.signals import Signal

UNKNOWN = "hessian, teacher not known"
"""The measurement of the Hessian signal at the beginning of a run."""

Key = tuple[str, str]
"""Baseline and contender."""


def collected(
    settings: ProfileSettings,
    nets: Nets,
    signals: Mapping[str, Signal],
    turns: Mapping[Key, list[Turn]],
    counts: Mapping[Key, Counts],
    by_rows: Mapping[str, Mapping[int, list[float]]],
    rows: Mapping[str, int],
) -> dict[str, Any]:
    """All that is kept, as plain values.

    Args:
        settings: what was asked for.
        nets: what it was measured on.
        signals: by name.
        turns: by contender, round by round.
        counts: by contender.
        by_rows: seconds of measurements alone, by signal and rows.
        rows: that were measured in the steps, by signal.
    """
    baselines: dict[str, dict[str, Any]] = {}
    # One figure for all of them: in a single step the base's update scatters by more than what groups add to it.
    bare_steps = [turn for (_, name), found in turns.items() if name.startswith("bare") for turn in found]
    update = statistics.median(turn.plain.update for turn in bare_steps)
    for (baseline, name), found in turns.items():
        bare = turns[baseline, "bare"]
        every = settings.every or (signals[name].every if name in signals else 1)
        of = _contender(found, bare, counts[baseline, name], every, update, is_bare=name == "bare")
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
        "rounds": len(turns[first, "bare"]),
        "baselines": baselines,
        "signals": {
            name: _signal(
                settings.budget_of(name),
                settings.every or signal.every,
                turns[first, name],
                statistics.median(turn.plain.seconds for turn in turns[first, "bare"]),
                update,
                by_rows[name],
                rows[name],
                by_rows.get(UNKNOWN, {}) if name == "hessian" else {},
            )
            for name, signal in signals.items()
        },
    }


def _contender(
    found: list[Turn], bare: list[Turn], counts: Counts, every: int, update: float, *, is_bare: bool
) -> dict[str, Any]:
    of: dict[str, Any] = {
        "step_milliseconds": quartiles([1e3 * turn.seconds(every) for turn in found]),
        "phases_milliseconds": {p: quartiles([1e3 * turn.phase(p, every) for turn in found]) for p in PHASES},
        "peak_bytes": counts.peak_bytes,
        "calls": counts.calls,
        "host_milliseconds": None if counts.host_seconds is None else 1e3 * counts.host_seconds,
    }
    if not is_bare:
        rounds = list(zip(found, bare, strict=True))
        of["overhead"] = {
            "direct": quartiles([turn.added(update, every) / b.plain.seconds for turn, b in rounds]),
            "in_turns": quartiles([turn.seconds(every) / b.plain.seconds - 1 for turn, b in rounds]),
        }
    return of


def _signal(
    budget: float,
    usual: int,
    turns: list[Turn],
    step: float,
    update: float,
    by_rows: Mapping[int, list[float]],
    rows: int,
    unknown: Mapping[int, list[float]],
) -> dict[str, Any]:
    """What measuring costs by rows and interval, and what that means for a budget."""
    due = [turn.due.added(update) for turn in turns if turn.due is not None]
    plain = [turn.plain.added(update) for turn in turns]

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
