"""``lwkd garments``: a small multi-label set in COCO's own layout, put together from the pictures of Fashion-MNIST.

Legend: ``S`` side of a canvas, ``G`` side of a garment.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lwkd.program.checkpoint import locked
from lwkd.program.data.coco import SPLITS, annotation_file
from lwkd.program.data.datasets import Pictures, Say, load
from lwkd.program.errors import ProgramError, require
from lwkd.program.seeds import seed_of

NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
QUARTERS = 4
"""The most garments on one canvas."""

VAL_SHARE = 5
"""One validation picture for so many training pictures."""


def make_garments(
    data_dir: Path,
    out: Path,
    pictures: int,
    *,
    size: int = 56,
    seed: int = 0,
    say: Say = lambda message: None,
    move: Callable[[int], None] = lambda done: None,
) -> None:
    """Write a set that ``--data coco`` reads: 1 to 4 garments on each grey canvas, as PNG, with their boxes.

    Training canvases carry garments of Fashion-MNIST's training split only, validation canvases (a fifth as many) of
    its test split. Each garment lies somewhere in a quarter of its own, so that none hides another. Each canvas depends
    on nothing but the seed and its number.

    Args:
        data_dir: where Fashion-MNIST lies, or is put when it is fetched.
        out: the folder of the set, which must not be there; after a failure it is not there either.
        pictures: training canvases.
        size: S, even, at least twice the 28 pixels of a garment.
        seed: of the choice of garments and places.
        say: told what is being fetched.
        move: told how many canvases have been written.

    Errors: :class:`~lwkd.program.errors.ProgramError` where the folder is there, is being made by another process or
        cannot be written, or four garments do not fit on the canvas.
    """
    _check_new(out)
    garments = load("fashion-mnist", data_dir, say=say)
    if size % 2 or size < 2 * garments.size:
        raise ProgramError(
            f"--size is {size}; four garments of {garments.size} pixels must fit",
            f"give an even number, at least {2 * garments.size}",
            code=2,
        )
    counts = (pictures, max(pictures // VAL_SHARE, 1))
    with _aside(out) as aside:
        for number, (split, of, count) in enumerate(zip(SPLITS, (garments.train, garments.test), counts, strict=True)):
            assert isinstance(of, Pictures)
            done = number * counts[0]
            _write_split(aside, split, of, count, size, (seed, number), lambda n, done=done: move(done + n))  # type: ignore[misc]


def _check_new(out: Path) -> None:
    if out.exists():
        raise ProgramError(f"{out} is there already", "give another folder with --out, or delete this one", code=2)


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A folder that nobody else writes to and that becomes ``out`` in the end; after a failure it is gone."""
    aside = out.with_name(f".{out.name}.partial")
    try:
        aside.mkdir(parents=True, exist_ok=True)
        with locked(aside):
            try:
                _check_new(out)  # another process may have ended meanwhile
                for split in (*SPLITS, "annotations"):
                    shutil.rmtree(aside / split, ignore_errors=True)  # left by a run that was killed
                (aside / "annotations").mkdir()
                yield aside
                (aside / ".lock").unlink()
                aside.rename(out)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise ProgramError(f"{out} could not be written: {error}", "make room, or give another --out") from error


def _write_split(
    folder: Path, split: str, of: Pictures, count: int, size: int, seeds: tuple[int, int], move: Callable[[int], None]
) -> None:
    """Write the PNG files and the annotation file of one split."""
    from_array = require("PIL.Image").fromarray
    (folder / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        canvas, found = _canvas(of, size, torch.Generator().manual_seed(seed_of(*seeds, number)))
        name = f"{number:012}.png"
        from_array(canvas.numpy()).save(folder / split / name)
        images.append({"id": number, "file_name": name, "width": size, "height": size})
        for garment in found:
            annotations.append({"id": len(annotations) + 1, "image_id": number, "iscrowd": 0, **garment})
        move(number)
    categories = [{"id": number, "name": name} for number, name in enumerate(NAMES, 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    annotation_file(folder, split).write_text(json.dumps(content))


def _canvas(of: Pictures, size: int, generator: torch.Generator) -> tuple[Tensor, list[dict[str, Any]]]:
    """A canvas ``(S, S)`` uint8, and category, box and area of every garment on it."""

    def drawn(below: int, count: int = 1) -> list[int]:
        return torch.randint(below, (count,), generator=generator).tolist()

    canvas, found = torch.zeros(size, size, dtype=torch.uint8), []
    quarters = torch.randperm(QUARTERS, generator=generator).tolist()
    for quarter, index in zip(quarters, drawn(len(of), 1 + drawn(QUARTERS)[0]), strict=False):
        garment, half = of.images[index, 0], size // 2
        down, right = drawn(half - len(garment) + 1, 2)
        top, left = quarter // 2 * half + down, quarter % 2 * half + right
        canvas[top : top + len(garment), left : left + len(garment)] = garment
        seen = garment.nonzero()
        (low_y, low_x), (high_y, high_x) = seen.amin(0).tolist(), seen.amax(0).tolist()
        box = [left + low_x, top + low_y, high_x - low_x + 1, high_y - low_y + 1]
        found.append({"category_id": int(of.labels[index]) + 1, "bbox": box, "area": len(seen)})
    return canvas, found
