"""``lwkd distill``: trains or loads the teacher, then the students that were asked for, and shows them side by side."""

from __future__ import annotations

import shlex
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lwkd
from lwkd.program import checkpoint
from lwkd.program.console import Console, Stopping
from lwkd.program.data.datasets import Data, capped, load
from lwkd.program.data.loader import Batches
from lwkd.program.distill import ranks, report
from lwkd.program.distill.history import History
from lwkd.program.distill.nets import check_apart, net_for, pair_nets
from lwkd.program.distill.plot import write_picture
from lwkd.program.distill.settings import Settings, read_run, render_run
from lwkd.program.distill.signals import try_out, unit_of
from lwkd.program.distill.train import Cost, Stage, Stopped, Training, assess, policy_of
from lwkd.program.errors import ProgramError, UnwrittenFileError
from lwkd.program.models.registry import count_parameters
from lwkd.program.seeds import repeatable, seed_everything

TEACHER_SEED, STUDENT_SEED = 0, 1
"""Which stream a net's weights and dropout come from: all students share one, so only the method differs."""


class Run:
    """One run in one folder: settings, data, results so far.

    Args:
        settings: what to compute.
        console: where messages go.
        resume: continue what lies in the folder.
        overwrite: put the run in place of another one.
    """

    def __init__(self, settings: Settings, console: Console, *, resume: bool = False, overwrite: bool = False):
        self.settings, self.console, self.resume = settings, console, resume
        self.folder = Path(settings.out)
        self.record = self.folder / "run.yaml"
        self.histories: dict[str, History] = {}
        self.results: list[report.Result] = []
        ranks.by_first(lambda: self._check_folder(overwrite))
        self.data = self._load()
        self.batches = {
            role: Batches(
                capped(self.data, limit),
                settings.batch_size,
                seed=settings.seed,
                device=settings.device,
                workers=settings.workers,
                rank=ranks.own(),
                ranks=ranks.count(),
            )
            for role, limit in (("teacher", None), ("student", settings.student_limit))
        }
        self.teacher: nn.Module | None = None
        self.pairing: lwkd.Pairing | None = None
        self.fingerprint: str | None = None
        """Of a teacher whose weights come from a file, which may have been replaced when the run is resumed."""

    def _load(self) -> Data:
        """The data, which the first rank may have to fetch before the others read it."""
        settings = self.settings

        def read() -> Data:
            return load(
                settings.data,
                Path(settings.data_dir),
                size=settings.image_size,
                limit=settings.limit,
                augment=settings.augment,
                pieces=settings.pieces,
                say=self.console.say,
            )

        if ranks.count() == 1:
            return read()
        found: list[Data] = []
        ranks.by_first(lambda: found.append(read()))
        return found[0] if found else read()

    def path(self, stage: str) -> Path:
        """The checkpoint of a stage."""
        return self.folder / "checkpoints" / f"{stage}.pt"

    def _check_folder(self, overwrite: bool) -> None:
        (self.folder / "checkpoints").mkdir(exist_ok=True)
        there = [stage for stage in report.TITLES if checkpoint.find(self.path(stage))]
        if there and not self.resume and not overwrite:
            raise ProgramError(
                f"{self.folder} holds a run already ({', '.join(there)})",
                "continue it with --resume, replace it with --overwrite, or give another folder with --out",
                code=2,
            )
        results = [name for name in report.FILES if (self.folder / name).exists()]
        if results and not there and not overwrite:
            raise ProgramError(
                f"{self.folder} holds results of a run, and no checkpoints of it ({', '.join(results)})",
                "replace them with --overwrite, or give another folder with --out",
                code=2,
            )
        if self.resume and not there:
            self.console.say(f"nothing to resume in {self.folder}: starting from the beginning")
        if self.resume and there and self.record.exists():
            self._check_same(self.record, read_run(self.record))

    def _clear(self) -> None:
        """Remove what is left of another run, once nothing more can keep this one from starting."""
        for stage in report.TITLES:
            for path in checkpoint.files(self.path(stage)):
                path.unlink(missing_ok=True)
        for name in report.FILES:
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)  # else two runs are drawn over each other

    def _check_same(self, path: Path, settings: dict[str, Any]) -> None:
        differences = self.settings.differences(settings)
        if differences:
            raise ProgramError(
                f"{path} belongs to a run with other settings: {'; '.join(differences)}",
                f"resume with the settings of then ({_resume(self.folder)}), or give another --out",
                code=2,
            )

    def execute(self) -> list[report.Result]:
        """Train all stages.

        Raises:
            Stopped: the user asked to stop; everything needed to continue has been saved.
        """
        settings = self.settings
        nets = {stage: self._net(stage) for stage in settings.stages}  # errors before any work is done
        check_apart(nets)
        self._pair(nets)
        ranks.by_first(lambda: self._begin(nets))
        what = "documents" if self.data.text else "pictures"
        count, of_students = (len(self.batches[role].data.train) for role in ("teacher", "student"))
        self.console.say(
            f"{self.data.name}: {count} training {what}"
            f"{f' ({of_students} for the student)' if of_students != count else ''}, "
            f"{len(self.data.test)} test {what}; "
            f"seed {settings.seed}; {lwkd.backend()}"
        )
        for stage, net in nets.items():
            self._stage(stage, net)
        ranks.by_first(lambda: report.write_results(self.folder, self.results))
        return self.results

    def _begin(self, nets: dict[str, nn.Module]) -> None:
        """Make room in the folder, and write down what is run."""
        self._check_room(nets)
        if not self.resume:
            self._clear()
        checkpoint.write_aside(self.record, lambda file: file.write(render_run(self.settings).encode()))

    def _model(self, stage: str) -> str:
        return self.settings.teacher if stage == "teacher" else self.settings.student

    def _net(self, stage: str) -> nn.Module:
        seed_everything(self.settings.seed, TEACHER_SEED if stage == "teacher" else STUDENT_SEED)
        name = self._model(stage)
        net = net_for(name, self.data, self.settings.device)
        if stage == "teacher" and self.settings.teacher_checkpoint:
            checkpoint.load_weights(net, Path(self.settings.teacher_checkpoint), name)
            self.fingerprint = checkpoint.fingerprint(net)
        return net

    def _check_room(self, nets: dict[str, nn.Module]) -> None:
        # Weights and optimizer state (up to two numbers a weight), in three files: last, previous, being written.
        weights = sum(t.numel() * t.element_size() for net in nets.values() for t in net.state_dict().values())
        checkpoint.check_output(self.folder, 9 * weights + 2**20)

    def _stage(self, name: str, net: nn.Module) -> None:
        settings = self.settings
        epochs = settings.epochs_of(name)
        if epochs == 0:
            net.eval()
            found = assess(net, self.batches["teacher"], settings)
            self._finish(name, net, found, 0, 0.0)
            return
        pairing = self.pairing if name in ("uniform", "layerwise") else None
        stream = TEACHER_SEED if name == "teacher" else STUDENT_SEED
        seed_everything(settings.seed, stream, 1, *([ranks.own()] if ranks.own() else []))  # a stream for each rank
        stage = Stage(
            name,
            self._model(name),
            epochs,
            self.teacher if pairing else None,
            pairing,
            self.fingerprint if pairing else None,
        )
        history, cost = self._train(stage, net)
        ranks.by_first(lambda: write_picture(self.folder, self.histories, unit_of(settings)))
        mean_rate = history.mean_rate if pairing else None
        self._finish(name, net, history.scores, epochs, history.seconds, mean_rate, cost)

    def _pair(self, nets: dict[str, nn.Module]) -> None:
        """Pair before anything is trained, so that nets that cannot be paired cost no training of a teacher."""
        students = [net for stage, net in nets.items() if stage in ("uniform", "layerwise")]
        if not students:
            return
        example = self.data.example().to(self.settings.device)
        self.pairing = pair_nets(students[0], nets["teacher"], example, self.settings.pair)
        try:
            policy_of(self.settings, "layerwise").start(len(self.pairing), 1)
        except ValueError as error:
            raise ProgramError(str(error), "give one --multiplier, or one a layer", code=2) from error
        try_out(self.settings, students[0], nets["teacher"], self.pairing, self.data.example(8).to(example))
        self.console.say(f"pairing of {self.settings.student} with {self.settings.teacher}:\n{self.pairing}")

    def _train(self, stage: Stage, net: nn.Module) -> tuple[History, Cost | None]:
        title = report.TITLES[stage.name]
        batches = self.batches["teacher" if stage.name == "teacher" else "student"]
        with Stopping() as stopping, self.console.progress(title, stage.epochs, len(batches)) as move:
            training = Training(
                stage,
                net,
                batches,
                self.settings,
                save=lambda state: self._save(stage, training, board, state),
                stop_wanted=lambda: stopping.wanted,
                tell=move,
                epoch_done=lambda: self._end_epoch(stage, training.history),
            )
            self._restore(stage, training)
            board = report.Board(self.folder, stage.name) if ranks.own() == 0 else None
            if training.history.epochs or training.history.steps:  # of a run that may have died before it logged them
                ranks.by_first(lambda: self._log(stage, training, board))
            try:
                return training.run(), training.cost
            finally:
                training.close()
                if board is not None:
                    board.close()

    def _save(self, stage: Stage, training: Training, board: report.Board | None, state: dict[str, Any]) -> None:
        def write() -> None:
            checkpoint.save(self.path(stage.name), state)
            self._log(stage, training, board)

        ranks.by_first(write)

    def _log(self, stage: Stage, training: Training, board: report.Board | None) -> None:
        assert board is not None
        self.histories[stage.name] = training.history
        report.write_logs(self.folder, self.histories)
        board.show(training.history)

    def _end_epoch(self, stage: Stage, history: History) -> None:
        row = history.epochs[-1]
        trained = f"train {100 * row['train_accuracy']:.2f} %, " if "train_accuracy" in row else ""
        shown = (f"{'' if name == 'accuracy' else f'{name} '}{100 * x:.2f} %" for name, x in history.scores.items())
        self.console.say(
            f"{report.TITLES[stage.name]}: epoch {row['epoch']} of {stage.epochs}, loss {row['train_loss']:.4f}, "
            f"{trained}test {', '.join(shown)}, {row['seconds']:.1f} s"
        )

    def _restore(self, stage: Stage, training: Training) -> None:
        found = ranks.by_first(lambda: self._saved(stage)) if self.resume else None
        if found is None:
            return
        path, state = found
        if state["threads"] != torch.get_num_threads():
            self.console.warn(
                f"{state['threads']} threads then, {torch.get_num_threads()} now: sums may be rounded differently "
                f"(--threads {state['threads']} gives the same bits)"
            )
        try:
            training.restore(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ProgramError(
                f"{path} does not fit this run: {error}", "resume with the version it was made with, or start anew"
            ) from error
        if not state["done"]:
            self.console.say(
                f"{report.TITLES[stage.name]}: continuing in epoch {training.epoch + 1}, batch {training.batch}"
            )

    def _saved(self, stage: Stage) -> tuple[Path, dict[str, Any]] | None:
        path = self.path(stage.name)
        state = checkpoint.load_last(path, self.console.warn)
        if state is None:
            return None
        self._check_same(path, state["settings"])
        then = state.get("fingerprint")  # none in checkpoints of versions that kept none
        if then is not None and then != stage.fingerprint:
            raise ProgramError(
                f"{path} belongs to a run with another teacher: {self.settings.teacher_checkpoint} holds other weights "
                "now than it did then",
                "put the file of then back, or give another folder with --out",
                code=2,
            )
        before = 1 + len(state.get("others", []))
        if before != ranks.count():
            self.console.warn(
                f"{before} ranks then, {ranks.count()} now: batches are the same, and sums and the statistics of batch "
                "norms, which each rank takes over its own part, are not"
            )
        return path, state

    def _finish(
        self,
        name: str,
        net: nn.Module,
        found: dict[str, float],
        epochs: int,
        seconds: float,
        mean_rate: float | None = None,
        cost: Cost | None = None,
    ) -> None:
        if name == "teacher":
            self.teacher = net.eval().requires_grad_(False)
        every, overhead = cost or (None, None)
        self.results.append(
            report.Result(
                name, self._model(name), found, mean_rate, count_parameters(net), epochs, seconds, every, overhead
            )
        )


def _take(folder: Path, held: ExitStack, console: Console) -> None:
    """Make the folder, and keep other runs out of it for as long as ``held`` lasts."""
    checkpoint.check_output(folder, 0)
    held.enter_context(checkpoint.locked(folder, console.warn))


def _resume(folder: str | Path) -> str:
    """The command that continues a run, to be copied."""
    return shlex.join(("lwkd", "distill", "--resume", "--out", str(folder)))


def distill(settings: Settings, console: Console, *, resume: bool = False, overwrite: bool = False) -> int:
    """Run ``lwkd distill``.

    Returns:
        Exit status: 0, or 130 where the user stopped it and can resume.

    Errors: :class:`~lwkd.program.errors.ProgramError`.
    """
    try:
        with ExitStack() as held, ranks.joined(settings, console), repeatable(settings.threads):
            ranks.by_first(lambda: _take(Path(settings.out), held, console))
            run = Run(settings, console, resume=resume, overwrite=overwrite)
            results = run.execute()
    except Stopped:
        console.say(f"stopped; nothing is lost. Continue with: {_resume(settings.out)}")
        return 130
    except UnwrittenFileError as error:
        raise ProgramError(
            error.problem,
            "what was saved before is still there; make room (or the folder writable) and go on with --resume",
        ) from error
    headline = next(iter(results[0].scores))
    title = (
        f"{settings.data}, seed {settings.seed}; {headline} after the last epoch (no epoch is picked on the test set)"
    )
    for table in report.tables(results, title, settings.signal):
        console.out.print(table)
    if len(results) > 2:
        console.say("One seed: differences of less than a point can be chance. Repeat with other values of --seed.")
    picture = run.folder / "layers.png"
    console.say(f"saved: {picture if picture.exists() else run.folder}")
    return 0
