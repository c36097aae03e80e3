"""The profile from beginning to end: nets, steps in turns, counts, recommendation, and what is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import lwkd
from lwkd.program.checkpoint import check_output
from lwkd.program.console import Screen
from lwkd.program.distill.signals import measurable
from lwkd.program.errors import ProgramError
from lwkd.program.profile import report
from lwkd.program.profile import results as figures
from lwkd.program.profile.counters import counted, traced
from lwkd.program.profile.inputs import Nets, made
from lwkd.program.profile.plot import write_picture
from lwkd.program.profile.rounds import alone, take_turns
from lwkd.program.profile.settings import ProfileSettings
from lwkd.program.profile.timed_step import Contender
from lwkd.rates.device import Clock, clock_of
from lwkd.signals import Attention, Hessian, Signal, signal_named

HINTON, TRANSFER = "hinton", "attention transfer"
NEVER = 10**9
EARLY = 2
EARLY_HESSIAN = 2 * 9
"""Steps before the first round, every other one measured: then the teacher's curvature counts as known."""

SIZES = (8, 16, 32)
"""Rows that measurements with passes of their own are tried on, beside the signal's own number."""


def profile(settings: ProfileSettings, screen: Screen, *, overwrite: bool = False) -> int:
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
    with _apart(settings):
        nets = made(settings)
        found = _measured(settings, nets, screen, folder)
    report.write(folder, found)
    picture = write_picture(folder, found)
    for table in report.tables(found):
        screen.out.print(table)
    for line in report.lines(found):
        screen.say(line)
    screen.say(f"saved: {folder / 'profile.json'}, {picture}")
    return 0


@contextmanager
def _apart(settings: ProfileSettings) -> Iterator[None]:
    """Threads and random streams are afterwards as they were."""
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


def _contenders(
    settings: ProfileSettings, nets: Nets, signals: dict[str, Signal], clock: Clock
) -> dict[tuple[str, str], Contender]:
    def contender(transfer: bool = False, **more: Any) -> Contender:
        return Contender(nets, settings.training, clock, transfer=transfer, **more)

    found = {
        (HINTON, "bare"): contender(),
        (HINTON, "bare again"): contender(),
        (HINTON, "nothing due"): contender(signal=Attention(), every=NEVER),
    }
    for name, signal in signals.items():
        found[HINTON, name] = contender(signal=signal, every=2, samples=settings.samples)
    first = next(iter(signals))
    found[TRANSFER, "bare"] = contender(True)
    found[TRANSFER, first] = contender(True, signal=signals[first], every=2, samples=settings.samples)
    return found


def _measured(settings: ProfileSettings, nets: Nets, screen: Screen, folder: Path) -> dict[str, Any]:
    device = torch.device(settings.device)
    clock, signals = clock_of(device), signals_of(settings)
    for name, signal in signals.items():
        remedy = f"name the other signals with --signal, and leave out {name}"
        measurable(signal, nets.student, nets.teacher, nets.pairing, nets.first(2).inputs, remedy)
    contenders = _contenders(settings, nets, signals, clock)
    with screen.out.status("warm-up") as status:
        turns = take_turns(
            contenders,
            nets,
            EARLY_HESSIAN if "hessian" in signals else EARLY,
            settings.seconds,
            lambda round_: status.update(f"steps in turns, round {round_}"),
        )
        status.update("measurements on other numbers of rows")
        rounds = len(turns[HINTON, "bare"])
        rows = {name: _rows(signal, settings, nets.rows) for name, signal in signals.items()}
        asked = {name: (signal, rows[name][1], True) for name, signal in signals.items()}
        if "hessian" in signals:
            asked[figures.UNKNOWN] = (signals["hessian"], [rows["hessian"][0]], False)
        by_rows = alone(asked, nets, _features(nets), rounds, clock)
        status.update("memory and calls")
        counts = {key: counted(_due(contender, nets), device) for key, contender in contenders.items()}
        if settings.trace:
            status.update("traces")
            for (baseline, name), contender in contenders.items():
                if baseline == HINTON and name in signals:
                    traced(lambda contender=contender: contender.step(nets), 4, folder / f"trace-{name}.json")  # type: ignore[misc]
    return figures.collected(settings, nets, signals, turns, counts, by_rows, {n: r for n, (r, _) in rows.items()})


def _due(contender: Contender, nets: Nets) -> Any:
    """A step that is handed over and, for those that measure, is measured; the other one is made here."""
    if contender.measures and contender.step(nets).measured:
        contender.step(nets)  # and so the next is due again
    return lambda: contender.handed_over(nets)


def _rows(signal: Signal, settings: ProfileSettings, batch: int) -> tuple[int, list[int]]:
    """Rows that are measured in the steps, and the numbers that are tried beside them."""
    own = min(settings.samples or signal.samples or batch, batch)
    tried = (batch // 4, batch // 2, batch) if isinstance(signal, Attention) else SIZES
    return own, sorted({own, *(rows for rows in tried if 2 <= rows <= batch)})


def _features(nets: Nets) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    with torch.no_grad(), lwkd.Capture(nets.student, nets.teacher, nets.pairing) as capture:
        for net in (nets.teacher, nets.student):
            net(*nets.inputs.args, **nets.inputs.kwargs)
        return capture.student, capture.teacher
