from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from program_runs import distill, lwkd, trained, write_idx, write_image_folder

from lwkd.program.data import download as sources
from lwkd.program.data.datasets import load
from lwkd.program.data.loader import Batches, crop_and_flip
from lwkd.program.errors import DamagedFileError, ProgramError


@pytest.fixture(autouse=True)
def nothing_outside(monkeypatch, tmp_path):
    """No test looks at this machine's data, and none downloads."""

    def refused(*command, **_):
        raise FileNotFoundError(command[0])

    def offline(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr(sources, "DEBIAN_FOLDER", tmp_path / "usr")
    monkeypatch.setattr(subprocess, "run", refused)
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", offline)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)


@pytest.mark.parametrize(
    ("kind", "place", "zipped"),
    [
        ("fashion-mnist", "data/FashionMNIST/raw", False),
        ("fashion-mnist", "data/FashionMNIST/raw", True),
        ("fashion-mnist", "data/fashion-mnist", True),
        ("fashion-mnist", "usr", True),
        ("mnist", "data/MNIST/raw", False),
        ("mnist", "data/mnist", True),
    ],
)
def test_idx_files_are_found(tmp_path, kind, place, zipped):
    write_idx(tmp_path / place, zipped=zipped)
    data = load(kind, tmp_path / "data")
    assert data.train.images.shape == (40, 1, 28, 28)
    assert data.train.labels.tolist() == [n % 10 for n in range(40)]
    assert (data.classes, data.channels, data.size, data.augment) == (10, 1, 28, "none")


def test_mnist_does_not_take_fashion_for_digits(tmp_path):
    write_idx(tmp_path / "data" / "fashion-mnist", zipped=True)
    with pytest.raises(ProgramError, match="mnist was not found"):
        load("mnist", tmp_path / "data")


def fake_apt(tmp_path, monkeypatch, *, lists: bool):
    """Stand-ins for apt-get and dpkg-deb that do what the real ones do to the folder."""
    calls = []

    def run(command, cwd, **_):
        calls.append(command[:2])
        failed = subprocess.CompletedProcess(command, 100, "", "E: Unable to locate package dataset-fashion-mnist\n")
        if command[:2] == ["apt-get", "download"]:
            if not lists and ["apt-get", "update"] not in calls:
                return failed
            (Path(cwd) / "dataset-fashion-mnist_0_all.deb").write_bytes(b"deb")
        if command[0] == "dpkg-deb":
            assert (Path(cwd) / command[2]).exists(), "dpkg-deb runs in that folder"
            write_idx(Path(cwd) / "usr/share/datasets/fashion-mnist", zipped=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sources, "DEBIAN_FOLDER", Path("/usr/share/datasets/fashion-mnist"))
    monkeypatch.setattr(sources, "holds_all", lambda folder: False)
    monkeypatch.setattr(subprocess, "run", run)
    return calls


@pytest.mark.parametrize("relative", [False, True])
def test_debian_package_is_fetched_without_installing(tmp_path, monkeypatch, relative):
    calls = fake_apt(tmp_path, monkeypatch, lists=True)
    monkeypatch.chdir(tmp_path)
    said = []
    data = load("fashion-mnist", Path("data") if relative else tmp_path / "data", say=said.append)
    assert len(data.train) == 40
    assert calls == [["apt-get", "download"], ["dpkg-deb", "-x"]]
    assert said == ["fashion-mnist: trying apt-get download dataset-fashion-mnist"]
    raw = tmp_path / "data/FashionMNIST/raw"
    assert sorted(p.name for p in raw.iterdir()) == sorted(sources.PARTS)


@pytest.mark.parametrize("user", [0, 1000])
def test_package_lists_are_updated_only_by_root(tmp_path, monkeypatch, user):
    calls = fake_apt(tmp_path, monkeypatch, lists=False)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    if user == 0:
        load("fashion-mnist", tmp_path / "data")
        assert ["apt-get", "update"] in calls
    else:
        with pytest.raises(ProgramError, match="Unable to locate package"):
            load("fashion-mnist", tmp_path / "data")
        assert ["apt-get", "update"] not in calls


def test_missing_data_lists_what_was_tried_and_how_to_get_it(tmp_path):
    result = distill(tmp_path / "out", "--data", "fashion-mnist", "--data-dir", tmp_path / "data")
    assert result.exit_code == 1
    for tried in ("FashionMNIST/raw", str(tmp_path / "usr"), "apt-get is not installed", "torchvision's downloader"):
        assert tried in result.stderr
    assert "apt install dataset-fashion-mnist" in result.stderr
    assert "--data digits" in result.stderr


@pytest.mark.parametrize("zipped", [True, False])
def test_cut_off_file_is_named(tmp_path, zipped):
    raw = tmp_path / "data/FashionMNIST/raw"
    write_idx(raw, zipped=zipped)
    path = next(raw.glob("train-images*"))
    path.write_bytes(path.read_bytes()[:-100])
    result = distill(tmp_path / "out", "--data", "fashion-mnist", "--data-dir", tmp_path / "data")
    assert result.exit_code == 1
    assert f"{path} is damaged" in result.stderr
    assert "delete this file" in result.stderr


@pytest.mark.parametrize("content", [b"", b"\0\0\x0d\x03" + b"\0" * 12, b"<html>not found</html>", b"\0\0\x08\x03\0"])
def test_file_of_another_kind_is_named(tmp_path, content):
    write_idx(tmp_path / "data/MNIST/raw", zipped=False)
    path = tmp_path / "data/MNIST/raw" / sources.PARTS[1]
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=str(path)):
        load("mnist", tmp_path / "data")


def write_cifar(folder: Path, kind: str, monkeypatch) -> Path:
    """Files of the CIFAR format, ten pictures each, and torchvision told their checksums."""
    import torchvision.datasets as datasets

    dataset = getattr(datasets, kind.upper())
    base = folder / dataset.base_folder
    base.mkdir(parents=True)
    key = "labels" if kind == "cifar10" else "fine_labels"
    numbers = np.random.default_rng(0)

    def write(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((base / name).read_bytes()).hexdigest()]

    def batch():
        return {"data": numbers.integers(0, 256, (10, 3072), dtype=np.uint8), key: list(range(10))}

    for part in ("train_list", "test_list"):
        monkeypatch.setattr(dataset, part, [write(name, batch()) for name, _ in getattr(dataset, part)])
    names = {dataset.meta["key"]: [str(n) for n in range(10 if kind == "cifar10" else 100)]}
    meta = write(dataset.meta["filename"], names)
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": meta[1]})
    return base


@pytest.mark.parametrize(("kind", "count", "classes"), [("cifar10", 50, 10), ("cifar100", 10, 100)])
def test_cifar(tmp_path, monkeypatch, kind, count, classes):
    base = write_cifar(tmp_path, kind, monkeypatch)
    data = load(kind, tmp_path)
    assert data.train.images.shape == (count, 3, 32, 32)
    assert (data.classes, data.augment) == (classes, "crop-flip")
    first = pickle.loads(next(base.glob("*1" if kind == "cifar10" else "train")).read_bytes())["data"][0]
    assert torch.equal(data.train.images[0].flatten(), torch.from_numpy(first))  # channels first, as on disk


def test_damaged_cifar_file_is_named(tmp_path, monkeypatch):
    base = write_cifar(tmp_path, "cifar10", monkeypatch)
    (base / "data_batch_3").write_bytes(b"cut")
    with pytest.raises(DamagedFileError, match="data_batch_3 is damaged: its checksum is wrong"):
        load("cifar10", tmp_path)


def test_missing_cifar(tmp_path):
    with pytest.raises(ProgramError, match="no network in tests") as caught:
        load("cifar100", tmp_path)
    assert "cifar-100-python" in caught.value.problem
    assert "unpack cifar-100-python.tar.gz" in caught.value.remedy


@pytest.mark.parametrize("workers", [0, 1])
def test_image_folder_trains_the_same_with_any_number_of_workers(tmp_path, workers):
    write_image_folder(tmp_path, 12, size=20)
    data = load("imagefolder", tmp_path, size=16)
    assert (len(data.train), data.classes, data.channels) == (24, 2, 3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches = Batches(data, 8, seed=3, workers=workers)
    found = list(batches.train(epoch=1))
    expected = list(Batches(data, 8, seed=3).train(epoch=1))
    assert all(
        torch.equal(a, b) for one, two in zip(found, expected, strict=True) for a, b in zip(one, two, strict=True)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert sum(len(y) for _, y in batches.test()) == 24


def test_image_folder_through_the_program(tmp_path):
    write_image_folder(tmp_path / "pictures", 24)
    folder = ("--data", "imagefolder", "--data-dir", tmp_path / "pictures", "--image-size", 8, "--workers", 0)
    result = trained(tmp_path / "out", *folder, "--batch-size", 8, "--augment", "none", "--no-teacher")
    assert "test 100.00 %" in result.stdout  # dark and bright pictures


def test_damaged_picture_is_named(tmp_path):
    write_image_folder(tmp_path / "pictures", 12)
    path = tmp_path / "pictures/train/dark/003.png"
    path.write_bytes(path.read_bytes()[:60])
    folder = ("--data", "imagefolder", "--data-dir", tmp_path / "pictures", "--image-size", 8, "--workers", 1)
    result = distill(tmp_path / "out", *folder, "--batch-size", 8, "--no-teacher", "--limit", 1000)
    assert result.exit_code == 1
    assert f"{path} is damaged" in result.stderr


def test_image_folder_that_is_none(tmp_path):
    result = lwkd("distill", "--data", "imagefolder", "--data-dir", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "holds no image folder" in result.stderr
    write_image_folder(tmp_path, 1)
    (tmp_path / "val/bright").rename(tmp_path / "val/light")
    with pytest.raises(ProgramError, match=r"different classes: \['bright', 'light'\]"):
        load("imagefolder", tmp_path)
    (tmp_path / "train/empty").mkdir()
    with pytest.raises(ProgramError, match="for the classes empty") as caught:
        load("imagefolder", tmp_path)
    assert "at least one picture" in caught.value.remedy


def test_a_data_set_that_nobody_knows(tmp_path):
    with pytest.raises(ProgramError, match="'cifar11' is not known") as caught:
        load("cifar11", tmp_path)
    assert "cifar10" in caught.value.remedy


def test_digits_are_split_once_and_for_all():
    one, other = load("digits", Path("unused")), load("digits", Path("unused"), limit=100)
    assert (len(one.train), len(one.test), len(other.train), len(other.test)) == (1437, 360, 100, 360)
    assert torch.equal(one.test.images, other.test.images)
    assert one.train.images.max() == 255


def test_normalised_pictures_have_mean_0_and_deviation_1():
    data = load("digits", Path("unused"))
    x = torch.cat([x for x, _ in Batches(data, 479, seed=0).train(0)])
    assert len(x) == 1437
    assert abs(float(x.mean())) < 1e-5
    assert float(x.std(unbiased=False)) == pytest.approx(1, abs=1e-5)


def test_order_depends_on_seed_and_epoch_and_any_batch_can_be_first():
    data = load("digits", Path("unused"), augment="crop-flip")
    batches = Batches(data, 64, seed=0)
    whole = list(batches.train(epoch=2))
    assert len(whole) == len(batches) == 22
    for (x, y), (x2, y2) in zip(whole[7:], batches.train(epoch=2, start=7), strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
    for other in (Batches(data, 64, seed=1).train(epoch=2), batches.train(epoch=3)):
        assert not torch.equal(next(other)[1], whole[0][1])
    assert not list(batches.train(epoch=2, start=22))


def test_every_picture_is_seen_once_an_epoch():
    data = load("digits", Path("unused"))
    labels = torch.cat([y for _, y in Batches(data, 479, seed=5).train(0)])
    assert torch.equal(labels.bincount(), data.train.labels.bincount())


def test_crop_moves_and_flip_mirrors():
    images = torch.arange(64.0).view(1, 1, 8, 8).repeat(200, 1, 1, 1) + 1
    moved = crop_and_flip(images, torch.Generator().manual_seed(0), flip=True)
    kinds = {tuple(m.flatten().tolist()) for m in moved}
    assert len(kinds) == 18  # nine shifts, mirrored or not
    assert tuple(images[0].flatten().tolist()) in kinds
    assert tuple(images[0].flip(2).flatten().tolist()) in kinds
    plain = crop_and_flip(images, torch.Generator().manual_seed(0), flip=False)
    assert len({tuple(m.flatten().tolist()) for m in plain}) == 9


def test_pictures_are_resized():
    x, _ = next(Batches(load("digits", Path("unused"), size=16), 4, seed=0).train(0))
    assert x.shape == (4, 1, 16, 16)


def test_limit_smaller_than_a_batch_is_one_batch():
    batches = Batches(load("digits", Path("unused"), limit=10), 64, seed=0)
    assert [len(y) for _, y in batches.train(0)] == [10]


def test_a_worker_outlives_a_signal_that_comes_before_it_has_begun(tmp_path, monkeypatch):
    write_image_folder(tmp_path, 8)
    batches = Batches(load("imagefolder", tmp_path, size=8), 4, seed=0, workers=1)
    start = multiprocessing.process.BaseProcess.start

    def started(process):
        start(process)
        os.kill(process.pid, signal.SIGTERM)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", started)
    assert len(list(batches.train(epoch=0))) == 4
