from __future__ import annotations

import errno
import os
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from program_runs import distill, lwkd, rows, state, trained

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


def test_the_checkpoint_before_is_kept_and_named(saved):
    checkpoint.save(saved, {"epoch": 2})
    cut(saved)
    with pytest.raises(DamagedFileError) as caught:
        checkpoint.load(saved)
    assert f"mv {checkpoint.previous(saved)} {saved}" in caught.value.remedy
    os.replace(checkpoint.previous(saved), saved)
    assert checkpoint.load(saved)["epoch"] == 1


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
    assert "--resume" in caught.value.remedy
    found = checkpoint.find(saved)
    assert found is not None
    assert checkpoint.load(found)["epoch"] == 1


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


def test_damaged_checkpoint_stops_a_resume_and_nothing_is_lost(run, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(run, out)
    path = out / "checkpoints" / "layerwise.pt"
    cut(path)
    before = {p: p.read_bytes() for p in out.rglob("*.pt")}
    result = lwkd("distill", "--resume", "--out", out)
    assert result.exit_code == 1
    assert f"{path} is damaged" in result.stderr
    assert "layerwise.previous.pt" in result.stderr
    assert {p: p.read_bytes() for p in out.rglob("*.pt")} == before
    os.replace(checkpoint.previous(path), path)
    assert lwkd("distill", "--resume", "--out", out).exit_code == 0
    assert rows(out / "layers.csv") == rows(run / "layers.csv")


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
    result = distill(tmp_path, "--teacher", "cnn_8", "--teacher-checkpoint", run / "checkpoints" / "teacher.pt")
    assert result.exit_code == 2
    assert "holds another model than cnn_8 (it was saved for cnn_4)" in result.stderr
    assert "layer1.0.weight is (4, 1, 3, 3), expected (8, 1, 3, 3)" in result.stderr


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}])
def test_teacher_checkpoint_may_be_a_plain_state_dict(run, tmp_path, wrap):
    weights = state(run, "teacher")["model"]
    torch.save(wrap(weights), tmp_path / "plain.pt")
    trained(tmp_path / "out", "--teacher-checkpoint", tmp_path / "plain.pt")
    assert rows(tmp_path / "out" / "layers.csv") == rows(run / "layers.csv")


def test_random_states_come_back():
    states = checkpoint.random_states("cpu")
    drawn = random.random(), np.random.rand(), torch.rand(1)
    checkpoint.restore_random_states(states, "cpu")
    assert (random.random(), np.random.rand(), torch.rand(1)) == drawn
