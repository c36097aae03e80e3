"""Runs of the program on the digits, with nets so small that one takes a second."""

from __future__ import annotations

import csv
import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lwkd.program.checkpoint import load
from lwkd.program.cli import app
from lwkd.program.data.download import PARTS
from lwkd.program.distill.settings import Settings

TINY = (
    *("--data", "digits", "--limit", "160", "--batch-size", "32", "--threads", "1"),
    *("--teacher", "cnn_4", "--student", "cnn_2", "--teacher-epochs", "1", "--epochs", "2"),
    *("--policy", "relative"),  # rates that move from scratch, too
)
LOADED = ("--teacher-epochs", Settings().teacher_epochs)  # as if it was not given: a teacher of a file has none
COMPARE = ("--rates", "both", "--epochs", "3", "--augment", "crop")
STAGES = ("teacher", "uniform", "layerwise")


def lwkd(*arguments: object) -> Any:
    """Run the program in this process; the result has exit_code, stdout, stderr and output (both)."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


def distill(out: Path, *more: object) -> Any:
    return lwkd("distill", *TINY, "--out", out, *more)


def trained(out: Path, *more: object) -> Any:
    """A run that succeeds."""
    result = distill(out, *more)
    assert result.exit_code == 0, result.output
    return result


def rows(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file, without the seconds, which no two runs share."""
    with path.open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def state(out: Path, stage: str) -> dict[str, Any]:
    return load(out / "checkpoints" / f"{stage}.pt")


def same(one: Any, other: Any) -> bool:
    """Bitwise equality of nested values, leaving out times."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one if k != "seconds")
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def assert_same_run(one: Path, other: Path) -> None:
    """All that two runs with COMPARE have written is the same, but for times."""
    for name in ("epochs.csv", "layers.csv"):
        assert rows(one / name) == rows(other / name)
    for stage in STAGES:
        first, second = state(one, stage), state(other, stage)
        for key in ("model", "optimizer", "scheduler", "history", "random", "epoch", "batch", "done"):
            assert same(first[key], second[key]), (stage, key)


def write_image_folder(folder: Path, count: int, size: int = 10) -> None:
    """Pictures of two classes, one dark and one bright, as PNG in train and val; to read them takes torchvision."""
    pytest.importorskip("torchvision")
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for label, offset in (("bright", 128), ("dark", 0)):
            place = folder / split / label
            place.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 128, (size, size, 3), generator=generator) + offset
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(place / f"{number:03}.png")


def write_idx(folder: Path, *, zipped: bool, count: int = 40) -> None:
    """The four files of MNIST and Fashion-MNIST, pictures of noise."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(0)
    for part in PARTS:
        if "images" in part:
            content = struct.pack(">4BIII", 0, 0, 8, 3, count, 28, 28) + numbers.bytes(count * 28 * 28)
        else:
            content = struct.pack(">4BI", 0, 0, 8, 1, count) + (np.arange(count) % 10).astype(np.uint8).tobytes()
        (folder / f"{part}{'.gz' if zipped else ''}").write_bytes(gzip.compress(content) if zipped else content)
