"""What the user sees while the program works: progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lwkd.program.errors import ProgramError
from lwkd.program.pace import Pace

UNKNOWN = "-:--:--"
"""Remaining time before the first update."""


class Screen:
    """Messages on standard output, errors on standard error.

    >>> Screen().say("ready")
    ready
    """

    def __init__(self) -> None:
        self.out = Console(highlight=False, soft_wrap=True)
        self.err = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, message: str) -> None:
        """One plain line."""
        self.out.print(escape(message))

    def warn(self, message: str) -> None:
        """One line on standard error that does not stop the program."""
        self.err.print(f"[yellow]note:[/yellow] {escape(message)}")

    def fail(self, error: ProgramError) -> None:
        """What is wrong, and what to do."""
        self.err.print(f"[bold red]error:[/bold red] {escape(error.problem)}")
        if error.remedy:
            self.err.print(f"[bold]what to do:[/bold] {escape(error.remedy)}")

    @contextmanager
    def progress(self, title: str, epochs: int, batches: int) -> Iterator[ProgressBar]:
        """A bar over the batches of all epochs; nothing where standard output is not a terminal."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", style="progress.remaining"),
        )
        with Progress(*columns, console=self.out, transient=True, disable=not self.out.is_terminal) as bar:
            task = bar.add_task(escape(title), total=epochs * batches, left=UNKNOWN)
            yield ProgressBar(bar, task, title, epochs, batches)


class ProgressBar:
    """Moves with every batch; made by :meth:`Screen.progress`."""

    def __init__(self, bar: Progress, task: TaskID, title: str, epochs: int, batches: int):
        self._bar, self._task, self._title, self._epochs, self._batches = bar, task, title, epochs, batches
        self._pace = Pace(bar.get_time)

    def move(self, epoch: int, batch: int, *, every: int = 1, measured: bool = False) -> None:
        """To a batch of an epoch (both counted from 0).

        Args:
            epoch: the epoch.
            batch: batches done in it.
            every: updates from one measurement to the next.
            measured: whether this update was measured, and took longer.
        """
        self._pace.lap("measured" if measured else "plain")
        done = epoch * self._batches + batch
        seconds = self._pace.left(self._epochs * self._batches - done, self._epochs - epoch, every)
        self._bar.update(
            self._task,
            completed=done,
            description=escape(f"{self._title}, epoch {epoch + 1} of {self._epochs}"),
            left=UNKNOWN if seconds is None else str(timedelta(seconds=round(seconds))),
        )

    def epoch_done(self) -> None:
        """The epoch's test and checkpoint are done; they are not part of the next update."""
        self._pace.lap("epoch")


class Stopping:
    """Turns the first Ctrl-C (or SIGTERM) into a wish that the training loop sees at its next batch.

    A second Ctrl-C raises KeyboardInterrupt at once; the last checkpoint on disk is then the one to continue from.

    >>> with Stopping() as stopping:
    ...     stopping.wanted
    False
    """

    def __init__(self) -> None:
        self.wanted = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():  # signals can be handled nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
