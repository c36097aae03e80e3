"""Stages: processes that run one after another or side by side, each with an end that it must keep."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

GRACE = 8.0
"""Seconds between the request to stop, on which pytest still writes its report, and the end."""

KEPT = 1_500_000
"""Bytes of a stage's output that are kept: the end of it."""

SHOWN = 40
"""Lines that are shown of a stage that failed."""


@dataclass(frozen=True)
class Stage:
    """One process.

    Args:
        name: what it is called in the summary.
        command: what runs; ``{seconds}`` in a word becomes the time that is left to it.
        environment: variables beside those of this process.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: ``passed``, ``failed`` or ``out of time``, its exit status, and its last line of output."""

    name: str
    result: str
    seconds: float
    status: int | None
    last: str


class _Running:
    """A stage that has been started; its output goes into a file."""

    def __init__(self, stage: Stage, folder: Path, output: Path, seconds: float) -> None:
        self.stage, self.output, self.begin, self.late = stage, output, time.monotonic(), False
        words = [word.replace("{seconds}", str(max(1, int(seconds)))) for word in stage.command]
        with output.open("w") as sink:
            sink.write("$ " + " ".join(words) + "\n")
            sink.flush()
            # A session of its own, so that whatever the stage starts ends with it.
            self.process = subprocess.Popen(
                words,
                cwd=folder,
                env={**os.environ, **stage.environment},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _tell(self, what: signal.Signals) -> None:
        try:
            os.killpg(self.process.pid, what)
        except ProcessLookupError:
            return

    def interrupt(self) -> None:
        """Ask for the end."""
        self.late = True
        self._tell(signal.SIGINT)

    def end(self) -> Outcome:
        """End it with all that it started, and say how it went."""
        self._tell(signal.SIGKILL)
        status = self.process.wait()
        result = "out of time" if self.late else "failed" if status else "passed"
        lines = self.text().strip().splitlines()
        return Outcome(self.stage.name, result, round(time.monotonic() - self.begin, 1), status, lines[-1][:120])

    def text(self) -> str:
        """The end of its output, which begins with the command if it is not too long."""
        return self.output.read_bytes()[-KEPT:].decode(errors="replace")


def _as_they_end(started: Sequence[_Running], deadline: float) -> Iterator[_Running]:
    """The stages as they end; those that do not are interrupted at the deadline and given up a little later."""
    left, asked = list(started), False
    while left:
        now = time.monotonic()
        if now >= deadline and not asked:
            asked = True
            for running in left:
                running.interrupt()
        over = now >= deadline + GRACE
        ended = [running for running in left if over or running.process.poll() is not None]
        left = [running for running in left if running not in ended]
        yield from ended
        time.sleep(0.05)


def execute(
    phases: Sequence[tuple[float, Sequence[Stage]]], folder: Path, log: Path, say: Callable[[str], None]
) -> list[Outcome]:
    """Run the phases in their order; the stages of one phase run side by side.

    However a stage ends, the next ones run. What earlier phases leave of their time, later ones may use.

    Args:
        phases: (seconds after the start at which all of the phase has ended, its stages).
        folder: where the processes start.
        log: file that the stages' output is put together in.
        say: told what happens, in lines.
    """
    begin, outcomes = time.monotonic(), []
    log.write_text("")
    for until, stages in phases:
        deadline = begin + until - GRACE
        started = []
        for stage in stages:
            say(f"{stage.name} … (until {until:.0f} s)")
            output = log.with_name(f".{stage.name}.log")
            started.append(_Running(stage, folder, output, deadline - time.monotonic()))
        for running in _as_they_end(started, deadline):
            outcome = running.end()
            outcomes.append(outcome)
            say(f"{outcome.name}: {outcome.result}, {outcome.seconds:.0f} s")
            text = running.text()
            running.output.unlink()
            with log.open("a") as sink:
                sink.write(f"==== {outcome.name}: {outcome.result}, status {outcome.status} ====\n{text}\n")
            if outcome.result != "passed":
                say("\n".join("    " + line[:300] for line in text.splitlines()[-SHOWN:]))
    return outcomes
