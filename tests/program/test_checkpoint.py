from __future__ import annotations

import errno
import os
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from program_runs import LOADED, distill, lwkd, rows, same, state, trained

from lwkd.program import checkpoint
from lwkd.program.errors import DamagedFileError, ProgramError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    trained(out)
    return out


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "net.pt"
    checkpoint.save(path, {"epoch": 1, "weights": torch.arange(1000.0)})
    return path


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    at = content.index(np.float32(500.0).tobytes() if path.name == "net.pt" else b"data")
    content[at + 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip_a_bit, lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"no zip")])
def test_damaged_checkpoint_is_named(saved, damage):
    damage(saved)
    with pytest.raises(DamagedFileError, match=str(saved)):
        checkpoint.load(saved)


@pytest.mark.parametrize("damage", [cut, flip_a_bit, lambda p: p.write_bytes(b"")])
def test_the_checkpoint_before_is_read_instead(saved, damage):
    checkpoint.save(saved, {"epoch": 2, "weights": torch.arange(1000.0)})
    damage(saved)
    wrong, said = saved.read_bytes(), []
    assert checkpoint.load_last(saved, said.append)["epoch"] == 1
    (line,) = said
    assert line.startswith(f"{saved} is damaged: ")
    last, before, damaged = checkpoint.files(saved)
    assert str(before) in line
    assert str(damaged) in line
    assert damaged.read_bytes() == wrong
    checkpoint.save(saved, {"epoch": 2})  # never without a whole one, even if it dies between its two renames
    assert checkpoint.load(last)["epoch"] == 2
    assert checkpoint.load(before)["epoch"] == 1


def test_a_damaged_checkpoint_that_cannot_be_moved_is_an_error_and_stays(saved, monkeypatch):
    checkpoint.save(saved, {"epoch": 2})
    cut(saved)
    wrong = saved.read_bytes()

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ProgramError, match=f"{saved} could not be moved: .*Permission denied"):
        checkpoint.load_last(saved, print)
    assert saved.read_bytes() == wrong


def test_a_path_that_is_no_file(tmp_path):
    with pytest.raises(ProgramError, match="is not there"):
        checkpoint.load_anything(tmp_path / "net.pt")
    with pytest.raises(ProgramError, match=f"{tmp_path} cannot be read: .*directory"):
        checkpoint.load_anything(tmp_path)


@pytest.mark.parametrize("others", [0, 1])
def test_no_whole_checkpoint(saved, others):
    if others:
        checkpoint.save(saved, {"epoch": 2})
        cut(checkpoint.previous(saved))
    cut(saved)
    with pytest.raises(ProgramError, match="so is the one before" if others else "there is none before") as caught:
        checkpoint.load_last(saved, lambda _: pytest.fail("there is nothing to go on with"))
    assert str(saved) in caught.value.problem
    assert saved.exists()


def test_a_wrong_byte_anywhere_is_seen(saved):
    content, whole = saved.read_bytes(), checkpoint.load(saved)
    for at in random.Random(0).sample(range(len(content)), 150):
        saved.write_bytes(content[:at] + bytes([content[at] ^ 0x41]) + content[at + 1 :])
        try:
            found = checkpoint.load(saved)
        except DamagedFileError:
            continue
        assert same(found, whole), f"byte {at} of {len(content)}"  # a date, or a gap


def test_death_between_the_two_renames_loses_nothing(saved):
    os.replace(saved, checkpoint.previous(saved))
    assert checkpoint.find(saved) == checkpoint.previous(saved)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    for name, write in (("zip.pt", torch.save), ("old.pt", lambda o, p: p.write_bytes(pickle.dumps(o, protocol=2)))):
        write({"format": 1, "x": Payload()}, tmp_path / name)
        with pytest.raises(DamagedFileError):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_foreign_checkpoint(tmp_path):
    torch.save({"format": 99}, tmp_path / "a.pt")
    with pytest.raises(ProgramError, match="format 99, expected 1"):
        checkpoint.load(tmp_path / "a.pt")
    torch.save([1], tmp_path / "b.pt")
    with pytest.raises(DamagedFileError, match="holds a list"):
        checkpoint.load(tmp_path / "b.pt")
    with pytest.raises(ProgramError, match="is not there"):
        checkpoint.load(tmp_path / "c.pt")


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["os.replace", "torch.save", "os.fsync"])
def test_failed_write_keeps_the_old_checkpoint(saved, monkeypatch, where):
    with monkeypatch.context() as patched:
        patched.setattr(where, full)
        with pytest.raises(ProgramError, match="No space left") as caught:
            checkpoint.save(saved, {"epoch": 2})
    assert str(saved) in caught.value.problem
    assert "give the same command again" in caught.value.remedy  # the command may have no --resume
    found = checkpoint.find(saved)
    assert found is not None
    assert checkpoint.load(found)["epoch"] == 1


def test_folder_that_became_read_only_keeps_the_old_checkpoint(saved, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:  # not by chmod, which does not bind root
        patched.setattr("pathlib.Path.open", read_only)
        with pytest.raises(ProgramError, match=r"net.pt could not be written: .*Read-only") as caught:
            checkpoint.save(saved, {"epoch": 2})
    assert "the folder writable" in caught.value.remedy
    assert checkpoint.load(saved)["epoch"] == 1


def test_full_device_keeps_the_old_checkpoint(saved):
    saved.with_name(f".{saved.name}.partial").symlink_to("/dev/full")
    with pytest.raises(ProgramError, match="No space left"):
        checkpoint.save(saved, {"epoch": 2, "weights": torch.zeros(100_000)})
    assert checkpoint.load(saved)["epoch"] == 1


def test_disk_that_fills_up_in_a_run(tmp_path, monkeypatch):
    plain, count = torch.save, 0

    def save(state, file):
        nonlocal count
        count += 1
        if count == 3:  # teacher 1, student 2 and 3
            full()
        plain(state, file)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", save)
        broken = distill(tmp_path / "broken")
    assert broken.exit_code == 1
    assert "No space left" in broken.stderr
    assert "go on with --resume" in broken.stderr
    assert "layerwise.pt" in broken.stderr
    assert "Traceback" not in broken.output
    assert state(tmp_path / "broken", "layerwise")["epoch"] == 1
    assert lwkd("distill", "--resume", "--out", tmp_path / "broken").exit_code == 0
    trained(tmp_path / "whole")
    assert rows(tmp_path / "broken" / "layers.csv") == rows(tmp_path / "whole" / "layers.csv")


def test_log_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    monkeypatch.setattr(SummaryWriter, "flush", full)
    result = distill(tmp_path, "--no-teacher", "--epochs", 1)
    assert result.exit_code == 1
    assert "tensorboard/alone could not be written" in result.stderr
    assert state(tmp_path, "alone")["done"]


def test_resume_falls_back_and_ends_the_same(run, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(run, out)
    path = out / "checkpoints" / "layerwise.pt"
    cut(path)
    result = lwkd("distill", "--resume", "--out", out)
    assert result.exit_code == 0, result.output
    assert f"{path} is damaged" in result.stderr
    assert "layerwise.previous.pt" in result.stderr
    assert rows(out / "layers.csv") == rows(run / "layers.csv")
    assert same(state(out, "layerwise")["model"], state(run, "layerwise")["model"])


def test_nothing_whole_stops_a_resume_and_nothing_is_lost(run, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(run, out)
    path = out / "checkpoints" / "layerwise.pt"
    cut(path)
    cut(checkpoint.previous(path))
    before = {p: p.read_bytes() for p in out.rglob("*.pt")}
    result = lwkd("distill", "--resume", "--out", out)
    assert result.exit_code == 1
    assert f"{path} is damaged" in result.stderr
    assert {p: p.read_bytes() for p in out.rglob("*.pt")} == before


def test_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    result = distill(tmp_path / "file" / "out")
    assert result.exit_code == 1
    assert f"{tmp_path / 'file' / 'out'} cannot be written" in result.stderr
    assert "--out" in result.stderr


def test_output_folder_is_tried_before_data_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    monkeypatch.setattr("lwkd.program.distill.run.load", lambda *_, **__: pytest.fail("began to work"))
    result = distill(tmp_path)
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr


def test_room_is_checked_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("lwkd.program.checkpoint.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1000))
    monkeypatch.setattr("lwkd.program.distill.train.Training.run", lambda _: pytest.fail("began to train"))
    result = distill(tmp_path)
    assert result.exit_code == 1
    assert "MiB are free" in result.stderr


def test_teacher_checkpoint_of_another_model(run, tmp_path):
    result = distill(
        tmp_path, "--teacher", "cnn_8", "--teacher-checkpoint", run / "checkpoints" / "teacher.pt", *LOADED
    )
    assert result.exit_code == 2
    assert "holds another model than cnn_8 (it was saved for cnn_4)" in result.stderr
    assert "layer1.0.weight is (4, 1, 3, 3), expected (8, 1, 3, 3)" in result.stderr


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}])
def test_teacher_checkpoint_may_be_a_plain_state_dict(run, tmp_path, wrap):
    weights = state(run, "teacher")["model"]
    torch.save(wrap(weights), tmp_path / "plain.pt")
    trained(tmp_path / "out", "--teacher-checkpoint", tmp_path / "plain.pt", *LOADED)
    assert rows(tmp_path / "out" / "layers.csv") == rows(run / "layers.csv")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch.save(torch.nn.Linear(3, 2), path),
        lambda path: torch.save([1], path),
        lambda path: path.write_text("import torch\n"),
    ],
    ids=["a whole net", "a list", "source code"],
)
def test_a_file_of_the_user_is_not_called_damaged(tmp_path, write):
    path = tmp_path / "mine.pt"
    write(path)
    result = distill(tmp_path / "out", "--teacher-checkpoint", path, *LOADED)
    assert result.exit_code == 2
    assert f"{path} holds no weights of cnn_4: " in result.stderr
    assert "torch.save(net.state_dict(), path)" in result.stderr
    assert "delete" not in result.stderr
    assert "damaged" not in result.stderr


def test_random_states_come_back():
    states = checkpoint.random_states("cpu")
    drawn = random.random(), np.random.rand(), torch.rand(1)
    checkpoint.restore_random_states(states, "cpu")
    assert (random.random(), np.random.rand(), torch.rand(1)) == drawn
