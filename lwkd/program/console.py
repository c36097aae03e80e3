"""What the user sees while the program works: progress bars on a terminal, plain lines and tables everywhere."""

from __future__ import annotations

import io
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Literal

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lwkd.program.errors import ProgramError


class Console:
    """Messages on standard output, errors on standard error.

    >>> Console().say("ready")
    ready
    """

    def __init__(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a locale without ± and → gets ? for them
                stream.reconfigure(errors="replace")
        self.out = RichConsole(highlight=False, soft_wrap=True)
        self.err = RichConsole(stderr=True, highlight=False, soft_wrap=True)

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
    def progress(self, title: str, epochs: int, batches: int) -> Iterator[Callable[[int, int], None]]:
        """A bar over the batches of all epochs; nothing where standard output is not a terminal.

        Yields:
            Moves the bar to an epoch (counted from 0) and the number of batches done in it.
        """
        with self._bar() as bar:
            task = bar.add_task(escape(title), total=epochs * batches)

            def move(epoch: int, batch: int) -> None:
                shown = escape(f"{title}, epoch {epoch + 1} of {epochs}" if epochs > 1 else title)
                bar.update(task, completed=epoch * batches + batch, description=shown)

            yield move

    @contextmanager
    def counting(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """A bar over a number of things that may still grow; a line now and then where there is no terminal.

        Yields:
            Shows how many are done, and how many there are.
        """
        with self._bar() as bar:
            task = bar.add_task(escape(title), total=None)

            def show(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)
                if bar.disable and done and (done % 50 == 0 or done == total):
                    self.say(f"{title}: {done} of {total}")

            yield show

    def _bar(self) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        return Progress(*columns, console=self.out, transient=True, disable=not self.out.is_terminal)


def table(
    title: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    justify: Literal["left", "right"] = "right",
) -> Table:
    """A table to print; ``justify`` is for all columns but the first, which stands on the left.

    The title and the first column are names, shown as they are; other cells may have rich's markup.
    """
    made = Table(title=escape(title), title_justify="left")
    for number, head in enumerate(heads):
        made.add_column(head, justify=justify if number else "left")
    for name, *cells in rows:
        made.add_row(escape(name), *cells)
    return made


class Stopping:
    """Notes the first Ctrl-C (or SIGTERM) in ``wanted``, which the training loop reads before its next batch.

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
