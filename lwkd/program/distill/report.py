"""The numbers of a run: CSV, TensorBoard, the closing tables."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lwkd.program.checkpoint import write_aside
from lwkd.program.console import table
from lwkd.program.distill.history import History
from lwkd.program.errors import ProgramError, require

LAYER_COLUMNS = ("net", "epoch", "step", "layer", "divergence", "standard_error", "rate")
FILES = ("summary.csv", "epochs.csv", "layers.csv", "layers.png")
"""Results of a run, in its folder."""

TITLES = {
    "teacher": "teacher",
    "alone": "student without a teacher",
    "uniform": "student, uniform rates",
    "layerwise": "student, layer-wise rates",
}


@dataclass(frozen=True)
class Result:
    """One net of the closing tables; the first of its test ``scores`` is the one that runs are compared by.

    ``every`` and ``overhead`` are None where nothing was measured.
    """

    stage: str
    model: str
    scores: dict[str, float]
    mean_rate: float | None
    parameters: int
    epochs: int
    seconds: float
    every: int | None = None
    overhead: float | None = None


def tables(results: Sequence[Result], title: str, signal: str) -> Iterator[Table]:
    """Every net side by side; then what measuring cost each student that has a teacher."""
    rows = [
        (
            f"{TITLES[of.stage]} ({of.model})",
            *(f"{100 * score:.2f} %" for score in of.scores.values()),
            "-" if of.mean_rate is None else f"{of.mean_rate:.3f}",
            f"{of.parameters:,}",
            f"{of.seconds:.1f}",
        )
        for of in results
    ]
    tested = (f"test\n{name}" for name in results[0].scores)
    yield table(title, ("net", *tested, "mean\nrate", "parameters", "seconds"), rows)
    costs = [
        (TITLES[of.stage], signal, str(of.every), f"{100 * of.overhead:.1f} %")
        for of in results
        if of.overhead is not None
    ]
    if costs:
        heads = ("measuring", "signal", "every so many\nupdates", "adds to the\ntraining time")
        yield table("what measuring cost", heads, costs)


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a table, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_aside(path, lambda file: file.write(text.getvalue().encode()))


def write_results(folder: Path, results: Sequence[Result]) -> None:
    """Write ``summary.csv``: the closing table with full digits, a column a score."""
    lines = [_flat(vars(result)) for result in results]
    write_csv(folder / "summary.csv", list(lines[0]), [list(line.values()) for line in lines])


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name, those of the scores each under its own."""
    return {
        inner: found
        for name, value in values.items()
        for inner, found in (value.items() if name == "scores" else [(name, value)])
    }


def write_logs(folder: Path, histories: Mapping[str, History]) -> None:
    """Write ``epochs.csv`` and ``layers.csv`` of all stages, whole every time, so that a resumed run has no gaps.

    Columns: net, epoch, train_loss, train_accuracy, test_accuracy, lr, seconds (multi-label: test_mAP, test_OF1,
    test_CF1 in place of both accuracies); and net, epoch, step, layer, divergence, standard_error (empty where
    unknown), rate.
    """
    epochs = [{"net": stage, **row} for stage, history in histories.items() for row in history.epochs]
    # Before the end of the first epoch there is nothing to say, not even what is scored.
    write_csv(
        folder / "epochs.csv", list(epochs[0]) if epochs else ["net", "epoch"], [list(e.values()) for e in epochs]
    )
    layers = [
        [stage, step / history.steps_per_epoch, step, *of_layer]
        for stage, history in histories.items()
        for step, *of_layers in zip(
            history.steps, history.divergences, history.standard_errors, history.rates, strict=True
        )
        for of_layer in zip(history.layers, *of_layers, strict=True)
    ]
    write_csv(folder / "layers.csv", LAYER_COLUMNS, layers)


class Board:
    """TensorBoard log of one stage, which hides what earlier processes of this run wrote there.

    A process that died may have written more than its last checkpoint holds, or less: the history is shown anew.

    Args:
        folder: of the run; the log goes to ``tensorboard/STAGE``.
        stage: name of the stage.
    """

    def __init__(self, folder: Path, stage: str):
        writer = require("torch.utils.tensorboard").SummaryWriter
        self._folder = folder / "tensorboard" / stage
        self._shown, self._epochs_shown = 0, 0
        # Files are read in the order of their names, which begin with the second in which they were made.
        made = [int(file.name.split(".")[3]) for file in self._folder.glob("events.out.tfevents.*")]
        time.sleep(min(1.0, max(0.0, max(made, default=0) + 1 - time.time())))
        with _writing(self._folder):
            self._writer = writer(str(self._folder), purge_step=0 if made else None)

    def show(self, history: History) -> None:
        """Write what is new in the history."""
        with _writing(self._folder):
            for index in range(self._shown, len(history.steps)):
                step = history.steps[index]
                for name, series in (
                    ("divergence", history.divergences),
                    ("standard_error", history.standard_errors),
                    ("rate", history.rates),
                ):
                    for layer, value in zip(history.layers, series[index], strict=True):
                        if value is not None:
                            self._writer.add_scalar(f"{name}/{layer}", value, step)
            for row in history.epochs[self._epochs_shown :]:
                step = int(row["epoch"]) * history.steps_per_epoch
                for name, value in row.items():
                    if name not in ("epoch", "seconds"):
                        self._writer.add_scalar(name, value, step)
            self._writer.flush()
        self._shown, self._epochs_shown = len(history.steps), len(history.epochs)

    def close(self) -> None:
        """Flush and close the log."""
        with _writing(self._folder):
            self._writer.close()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns a failed write of a log into an error that names it."""
    try:
        yield
    except OSError as error:
        raise ProgramError(
            f"{path} could not be written: {error}",
            "the checkpoints are still there; make room and go on with --resume",
        ) from error
