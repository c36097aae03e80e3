from __future__ import annotations

import errno
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from program_runs import COMPARE, LOADED, TINY, assert_same_run, distill, lwkd, same, state, trained, write_image_folder

from lwkd.program import checkpoint
from lwkd.program.console import Stopping
from lwkd.program.distill import report
from lwkd.program.distill.report import Board
from lwkd.program.distill.train import Training


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    trained(out, *COMPARE)
    return out


def stop_after(monkeypatch, updates: int) -> None:
    """As if the user pressed Ctrl-C after so many updates of the whole run."""
    plain, count = Training._update, 0
    plain_run = Training.run

    def run(self):
        if updates == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return plain_run(self)

    def update(self, x, y):
        nonlocal count
        plain(self, x, y)
        count += 1
        if count == updates:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Training, "_update", update)
    monkeypatch.setattr(Training, "run", run)


# 5 updates an epoch: teacher 1–5, uniform 6–20, layerwise 21–35.
@pytest.mark.parametrize("updates", [0, 3, 5, 15, 23, 33], ids=lambda n: f"after_{n}")
def test_resume_continues_bitwise(unbroken, tmp_path, monkeypatch, updates):
    with monkeypatch.context() as patched:
        stop_after(patched, updates)
        broken = distill(tmp_path, *COMPARE)
    assert broken.exit_code == 130, broken.output
    assert f"lwkd distill --resume --out {tmp_path}" in broken.stdout
    resumed = lwkd("distill", "--resume", "--out", tmp_path)
    assert resumed.exit_code == 0, resumed.output
    assert_same_run(tmp_path, unbroken)


def test_resume_with_dropout_adam_transfer_and_two_breaks(tmp_path, monkeypatch):
    more = ("--student", f"{__name__}:dropping", "--optimizer", "adam", "--attention-transfer", "10")
    trained(tmp_path / "whole", *COMPARE, *more)
    for updates in (12, 11):
        with monkeypatch.context() as patched:
            stop_after(patched, updates)
            assert distill(tmp_path / "broken", *COMPARE, *more, "--resume").exit_code == 130
    trained(tmp_path / "broken", *COMPARE, *more, "--resume")
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


# Updates with a measurement: 1, 3, 5 … of each student; the teacher's curvature is a mean over them, and settles.
@pytest.mark.parametrize(
    "signal",
    [("hessian", "--curvature", "hessian"), ("hessian", "--probes", "2"), ("jacobian", "--kind", "relative")],
    ids=["hessian", "ggn", "jacobian"],
)
def test_resume_of_a_measuring_run_continues_bitwise(tmp_path, monkeypatch, signal):
    options = (*COMPARE, "--signal", *signal, "--every", "2", "--samples", "8")
    trained(tmp_path / "whole", *options)
    for updates in (8, 6, 11):  # in the uniform student, in it again, in the layer-wise one
        with monkeypatch.context() as patched:
            stop_after(patched, updates)
            assert distill(tmp_path / "broken", *options, "--resume").exit_code == 130
    trained(tmp_path / "broken", *options, "--resume")
    assert_same_run(tmp_path / "broken", tmp_path / "whole")
    rates = state(tmp_path / "whole", "layerwise")["optimizer"]["lwkd"]
    assert rates["signal"] == signal[0]
    assert int(rates["counts"][0]) + int(rates["counts"][1]) == 8  # of 15 updates
    if signal[0] == "hessian":
        assert rates["teacher"]["count"] == 5  # the first four, and one in four after them


def test_an_interval_that_a_budget_found_is_kept(tmp_path, monkeypatch):
    options = ("--epochs", 3, "--signal", "jacobian", "--budget", 0.5)
    with monkeypatch.context() as patched:
        stop_after(patched, 15)
        assert distill(tmp_path, *options).exit_code == 130
    then = state(tmp_path, "layerwise")["optimizer"]["lwkd"]["schedule"]
    assert then["calibrated"]
    trained(tmp_path, *options, "--resume")
    assert state(tmp_path, "layerwise")["optimizer"]["lwkd"]["schedule"] == then


def dropping(num_classes: int, in_channels: int):
    from torch import nn

    return nn.Sequential(
        *(nn.Conv2d(in_channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3)),
        *(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Dropout2d(0.2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)),
    )


@pytest.mark.parametrize("kept", [True, False], ids=["", "by a version that kept no checksum"])
def test_resume_with_another_teacher_is_refused(unbroken, tmp_path, kept):
    given = tmp_path / "teacher.pt"
    shutil.copy(unbroken / "checkpoints" / "teacher.pt", given)
    out = tmp_path / "out"
    trained(out, "--teacher-checkpoint", given, *LOADED)
    if not kept:
        last = out / "checkpoints" / "layerwise.pt"
        checkpoint.save(last, {key: value for key, value in state(out, "layerwise").items() if key != "fingerprint"})
    before = state(out, "layerwise")
    assert lwkd("distill", "--resume", "--out", out).exit_code == 0
    weights = torch.load(given)["model"]
    torch.save({name: value + 1 for name, value in weights.items()}, given)
    resumed = lwkd("distill", "--resume", "--out", out)
    if kept:
        assert resumed.exit_code == 2
        assert f"{given} holds other weights now than it did then" in resumed.stderr
        assert same(state(out, "layerwise"), before)
    else:
        assert resumed.exit_code == 0, resumed.output
    torch.save(weights, given)  # the same weights in another file
    assert lwkd("distill", "--resume", "--out", out).exit_code == 0


def test_what_a_run_of_another_version_did_not_look_at_does_not_keep_it_from_going_on(tmp_path):
    trained(tmp_path, "--no-teacher", "--epochs", 1)
    record, last = tmp_path / "run.yaml", tmp_path / "checkpoints" / "alone.pt"
    record.write_text(record.read_text().replace("rates: layerwise", "rates: both"))
    saved = state(tmp_path, "alone")
    checkpoint.save(last, saved | {"settings": saved["settings"] | {"rates": "both"}})
    result = lwkd("distill", "--resume", "--out", tmp_path)
    assert result.exit_code == 0, result.output


def test_resume_of_a_finished_run_changes_nothing(unbroken):
    before = (unbroken / "epochs.csv").read_bytes(), state(unbroken, "layerwise")["model"]
    result = lwkd("distill", "--resume", "--out", unbroken)
    assert result.exit_code == 0, result.output
    assert "student, layer-wise rates" in result.stdout
    assert (unbroken / "epochs.csv").read_bytes() == before[0]
    assert same(state(unbroken, "layerwise")["model"], before[1])


def test_tensorboard_has_each_step_once_after_a_break(unbroken, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(patched, 28)
        assert distill(tmp_path, *COMPARE).exit_code == 130
    trained(tmp_path, *COMPARE, "--resume")
    assert_same_board(unbroken, tmp_path)


class Killed(BaseException):
    """In place of a kill, which would take the test along."""


@pytest.mark.parametrize("after", ["checkpoint", "logs"])
def test_a_run_that_died_between_checkpoint_and_logs_ends_with_the_same_logs(unbroken, tmp_path, monkeypatch, after):
    """At the end of the last epoch, after which no other save would write them."""
    saved, logged = checkpoint.save, report.write_logs
    last = []

    def save(path, state):
        saved(path, state)
        if state["stage"] == "layerwise" and state["done"]:
            last.append(path)
            if after == "checkpoint":
                raise Killed

    def write_logs(*arguments):
        logged(*arguments)
        if last:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", save)
        patched.setattr(report, "write_logs", write_logs)
        with pytest.raises(Killed):
            distill(tmp_path, *COMPARE)
    trained(tmp_path, *COMPARE, "--resume")
    assert_same_run(tmp_path, unbroken)
    assert_same_board(unbroken, tmp_path)


def assert_same_board(*runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = []
    for out in runs:
        log = EventAccumulator(str(out / "tensorboard" / "layerwise"))
        log.Reload()
        steps.append([(e.step, e.value) for e in log.Scalars("rate/layer2")])
    assert steps[0] == steps[1]


def test_logs_of_tensorboard_are_read_in_the_order_in_which_they_were_made(tmp_path):
    """Names begin with the second; within one, a tenth file would come before a ninth."""
    for _ in range(3):
        Board(tmp_path, "layerwise").close()
    seconds = [file.name.split(".")[3] for file in (tmp_path / "tensorboard" / "layerwise").iterdir()]
    assert len(set(seconds)) == 3


def test_resume_with_other_settings_says_which(unbroken):
    recorded = (unbroken / "run.yaml").read_bytes()
    result = lwkd("distill", "--resume", "--out", unbroken, "--lr", 0.2, "--gamma", 2)
    assert result.exit_code == 2
    assert "--lr: 0.1 then, 0.2 now" in result.stderr
    assert "--gamma: None then, 2.0 now" in result.stderr
    assert (unbroken / "run.yaml").read_bytes() == recorded


def test_resume_says_when_the_thread_count_changed(tmp_path, monkeypatch):
    arguments = ["distill", *TINY[:6], *TINY[8:], "--no-teacher", "--out", str(tmp_path)]
    assert "--threads" not in arguments
    assert lwkd(*arguments).exit_code == 0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    result = lwkd(*arguments, "--resume")
    assert "7 now" in result.stderr


def test_a_run_is_not_replaced_unasked(unbroken):
    result = distill(unbroken, *COMPARE)
    assert result.exit_code == 2
    assert "--resume" in result.stderr
    assert "--overwrite" in result.stderr
    assert state(unbroken, "layerwise")["done"]


def test_overwrite_keeps_the_old_run_until_the_new_one_can_start(tmp_path):
    pytest.importorskip("torchvision")  # which might have known the net
    trained(tmp_path, "--no-teacher", "--epochs", 1)
    assert distill(tmp_path, "--no-teacher", "--student", "nonet", "--overwrite").exit_code == 2
    assert state(tmp_path, "alone")["done"]


def test_overwrite_replaces_a_run(tmp_path):
    trained(tmp_path, "--no-teacher", "--epochs", 1)
    trained(tmp_path, "--no-teacher", "--epochs", 1, "--seed", 5, "--overwrite")
    assert state(tmp_path, "alone")["settings"]["seed"] == 5


def test_overwrite_leaves_nothing_of_the_run_before(unbroken, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    result = trained(out, "--no-teacher", "--epochs", 1, "--overwrite")
    assert "layers.png" not in result.stdout
    trained(tmp_path / "new", "--no-teacher", "--epochs", 1)
    assert names(out) == names(tmp_path / "new")


def names(folder):
    """Of all files, those of TensorBoard by their folders."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(name.parent if "tfevents" in name.name else name) for name in found}


def test_overwrite_that_is_broken_off_shows_no_old_figures(unbroken, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    with monkeypatch.context() as patched:
        patched.setattr(Training, "run", lambda _: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            distill(out, "--no-teacher", "--overwrite")
    assert not [name for name in report.FILES if (out / name).exists()]


@pytest.mark.parametrize("name", ["summary.csv", "epochs.csv", "layers.csv", "layers.png"])
@pytest.mark.parametrize("resume", [(), ("--resume",)], ids=["", "resume"])
def test_results_without_checkpoints_are_not_replaced_unasked(tmp_path, name, resume):
    (tmp_path / name).write_text("of months")
    result = distill(tmp_path, "--no-teacher", "--epochs", 1, *resume)
    assert result.exit_code == 2
    assert f"holds results of a run, and no checkpoints of it ({name})" in result.stderr
    assert "--overwrite" in result.stderr
    assert (tmp_path / name).read_text() == "of months"


def test_a_folder_takes_one_run_at_a_time(tmp_path):
    command = [sys.executable, "-m", "lwkd.program", "distill", *TINY, "--no-teacher", "--epochs", "2000"]
    first = subprocess.Popen([*command, "--out", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with first:
        deadline = time.monotonic() + 120
        while not (tmp_path / "checkpoints" / "alone.pt").exists():
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for more in ((), ("--resume",), ("--overwrite",)):
            second = distill(tmp_path, "--no-teacher", "--epochs", 2000, *more)
            assert second.exit_code == 2
            assert f"{tmp_path}: another run writes there at this moment" in second.stderr
        first.kill()
    assert trained(tmp_path, "--no-teacher", "--epochs", 1, "--overwrite").exit_code == 0


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(checkpoint.fcntl, "lockf", none)
    assert "No locks available" in trained(tmp_path, "--no-teacher", "--epochs", 1).stderr


def test_the_command_that_goes_on_can_be_copied(tmp_path, monkeypatch):
    out = tmp_path / "my runs"
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        broken = distill(out, *COMPARE)
    line = next(line for line in broken.stdout.splitlines() if "Continue with: " in line)
    assert shlex.split(line.partition("Continue with: ")[2]) == ["lwkd", "distill", "--resume", "--out", str(out)]
    differs = lwkd("distill", "--resume", "--out", out, "--lr", 0.2)
    assert f"lwkd distill --resume --out {shlex.quote(str(out))})" in differs.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_leaves_a_resumable_checkpoint(tmp_path, number):
    # With worker processes, which a terminal's Ctrl-C and a scheduler's SIGTERM reach as well.
    command = [sys.executable, "-m", "lwkd.program", "distill", *TINY, "--no-teacher", "--epochs", "400"]
    write_image_folder(tmp_path / "pictures", 40)
    command += ["--data", "imagefolder", "--data-dir", str(tmp_path / "pictures"), "--image-size", "8"]
    command += ["--workers", "1"]
    with subprocess.Popen(
        [*command, "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "checkpoints" / "alone.pt").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, number)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "--resume" in stdout
    assert "Traceback" not in stderr
    saved = state(tmp_path, "alone")
    assert not saved["done"]
    assert saved["epoch"] > 0


def test_second_signal_stops_at_once():
    before = signal.getsignal(signal.SIGINT)  # a run in the background of a shell ignores it
    with Stopping() as stopping:
        os.kill(os.getpid(), signal.SIGINT)
        assert stopping.wanted
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
