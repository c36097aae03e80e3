"""``lwkd profile``: nets, rounds of steps, counts, recommendation, and the files with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lwkd
from lwkd.program.checkpoint import check_output
from lwkd.program.console import Console
from lwkd.program.distill.signals import measurable
from lwkd.program.errors import ProgramError
from lwkd.program.profile import report, results
from lwkd.program.profile.counters import counted, traced
from lwkd.program.profile.inputs import Nets, ProfileSettings, made
from lwkd.program.profile.rounds import time_measurements, time_steps
from lwkd.program.profile.timed_step import TimedStep
from lwkd.rates.device import Clock, clock_of
from lwkd.signals import Attention, Hessian, Signal, rows_of, signal_named
from lwkd.signals.teacher_curvature import TeacherCurvature

HINTON, TRANSFER = "hinton", "attention transfer"
NEVER = 10**9
EARLY = 2
EARLY_HESSIAN = 2 * (
    1 + TeacherCurvature.EAGER + TeacherCurvature.ONE_IN * (TeacherCurvature.AT_LEAST - TeacherCurvature.EAGER)
)
"""Steps before the first round, every other one measured: then the teacher's curvature counts as known."""

SIZES = (8, 16, 32)
"""Rows that measurements with passes of their own are tried on, beside the signal's own number."""


def profile(settings: ProfileSettings, console: Console, *, overwrite: bool = False) -> int:
    """Run ``lwkd profile``.

    Returns:
        Exit status: 0, also where a signal is over its budget.

    Errors: :class:`~lwkd.program.errors.ProgramError`.
    """
    folder = Path(settings.out)
    check_output(folder, 0)
    if (folder / "profile.json").exists() and not overwrite:
        raise ProgramError(
            f"{folder} holds a profile already",
            "replace it with --overwrite, or give another folder with --out",
            code=2,
        )
    with _global_state_restored(settings):
        nets = made(settings)
        found = _measured(settings, nets, console, folder)
    report.write(folder, found)
    picture = report.write_picture(folder, found)
    for table in report.tables(found):
        console.out.print(table)
    console.say(f"saved: {folder / 'profile.json'}, {picture}")
    return 0


@contextmanager
def _global_state_restored(settings: ProfileSettings) -> Iterator[None]:
    """Set the number of threads; afterwards it and the random streams are as they were."""
    threads = torch.get_num_threads()
    device = torch.device(settings.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_num_threads(settings.threads or threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def signals_of(settings: ProfileSettings) -> dict[str, Signal]:
    """The signals by name, in the order in which they were given."""
    found = {name: signal_named(name) for name in dict.fromkeys(settings.signal)}
    if "hessian" in found:
        # As it is for most of a run: the frozen teacher's curvature is known, and not measured any more.
        found["hessian"] = Hessian(tolerance=1e9)
    return found


def _timed_steps(
    settings: ProfileSettings, nets: Nets, signals: dict[str, Signal], clock: Clock
) -> dict[tuple[str, str], TimedStep]:
    step = partial(TimedStep, nets, settings.training, clock)
    found = {
        (HINTON, "bare"): step(),
        (HINTON, "bare again"): step(),
        (HINTON, "nothing due"): step(signal=Attention(), every=NEVER),
    }
    for name, signal in signals.items():
        found[HINTON, name] = step(signal=signal, every=2, samples=settings.samples)
    first = next(iter(signals))
    found[TRANSFER, "bare"] = step(transfer=True)
    found[TRANSFER, first] = step(transfer=True, signal=signals[first], every=2, samples=settings.samples)
    return found


def _measured(settings: ProfileSettings, nets: Nets, console: Console, folder: Path) -> dict[str, Any]:
    device = torch.device(settings.device)
    clock, signals = clock_of(device), signals_of(settings)
    for name, signal in signals.items():
        remedy = f"name the other signals with --signal, and leave out {name}"
        measurable(signal, nets.student, nets.teacher, nets.pairing, nets.first(2).inputs, remedy)
    steps = _timed_steps(settings, nets, signals, clock)
    with console.out.status("warm-up") as status:
        rounds = time_steps(
            steps,
            nets,
            EARLY_HESSIAN if "hessian" in signals else EARLY,
            settings.seconds,
            lambda number: status.update(f"steps in turns, round {number}"),
        )
        status.update("measurements on other numbers of rows")
        rows = {name: _rows(signal, settings, nets.rows) for name, signal in signals.items()}
        asked = {name: (signal, rows[name][1], True) for name, signal in signals.items()}
        if "hessian" in signals:
            asked[results.UNKNOWN] = (signals["hessian"], [rows["hessian"][0]], False)
        by_rows = time_measurements(asked, nets, _features(nets), len(rounds[HINTON, "bare"]), clock)
        status.update("memory and calls")
        counts = {key: counted(_due(step, nets), device) for key, step in steps.items()}
        if settings.trace:
            status.update("traces")
            for name in signals:
                traced(partial(steps[HINTON, name].run, nets), 4, folder / f"trace-{name}.json")
    return results.collected(settings, nets, signals, rounds, counts, by_rows, {n: r for n, (r, _) in rows.items()})


def _due(step: TimedStep, nets: Nets) -> Any:
    """Launches a step, a measured one where every other is: the step before it is made here."""
    if step.measures and step.run(nets).measured:
        step.run(nets)  # and so the next is due again
    return partial(step.launch, nets)


def _rows(signal: Signal, settings: ProfileSettings, batch: int) -> tuple[int, list[int]]:
    """Rows that are measured in the steps, and the numbers that are tried beside them."""
    own = rows_of(settings.samples or signal.samples, batch)
    tried = SIZES if signal.replays else (batch // 4, batch // 2, batch)
    return own, sorted({own, *(rows for rows in tried if 2 <= rows <= batch)})


def _features(nets: Nets) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    with torch.no_grad(), lwkd.Capture(nets.student, nets.teacher, nets.pairing) as capture:
        for net in (nets.teacher, nets.student):
            net(*nets.inputs.args, **nets.inputs.kwargs)
        return capture.student, capture.teacher
