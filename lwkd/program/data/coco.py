"""COCO as multi-label data: an annotation file becomes, for every picture, a 0 or a 1 for each class.

Legend: ``N`` pictures, ``K`` classes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lwkd.program.errors import DamagedFileError, ProgramError, require

SPLITS = ("train2017", "val2017")

IN_MEMORY = 2**29
"""Sets of pictures of one size are held in memory up to so many bytes."""

ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND\xaeB`\x82"}
"""How files of JPEG and PNG begin, and how they end where they are whole."""

USE_A_COPY = "put a whole copy of COCO's own file there, or make one with lwkd garments"


def annotation_file(folder: Path, split: str) -> Path:
    """Where the annotations of a split lie."""
    return folder / "annotations" / f"instances_{split}.json"


@dataclass(frozen=True)
class Labelled:
    """One split as its annotation file has it: ``labels`` (N, K) uint8 of ``paths``, both in the file's order.

    ``categories`` are ids and names in order of id. ``size`` is the (width, height) that all pictures have, None where
    they differ or the file does not say.
    """

    paths: list[Path]
    labels: Tensor
    categories: list[tuple[int, str]]
    size: tuple[int, int] | None


def read_labels(folder: Path, split: str, say: Callable[[str], None]) -> Labelled:
    """Read the annotation file of a split, and leave out the pictures that cannot be used.

    A picture has a class where an annotation of it says so, one of a crowd as any other: the class is there. Pictures
    without an annotation are left out, as loaders for multi-label training on COCO do that go through the annotations
    (117,266 of the 118,287 of train2017 stay). So are files that are missing or that end too early, and annotations
    of pictures or categories that are not in the file. Everything left out is counted, and said.

    Args:
        folder: holds ``annotations/instances_SPLIT.json`` and ``SPLIT/``.
        split: of :data:`SPLITS`.
        say: told what was found.

    Errors: :class:`~lwkd.program.errors.ProgramError` that names a damaged annotation file and what is wrong in it, or
        where no picture is left.
    """
    path = annotation_file(folder, split)
    images, annotations, categories = _parsed(path)
    columns = {number: column for column, (number, _) in enumerate(categories)}
    rows = {number: row for row, (number, *_) in enumerate(images)}
    labels = torch.zeros(len(images), len(columns), dtype=torch.uint8)
    counts: Counter[str] = Counter()
    marked: list[tuple[int, int]] = []
    for picture, category, crowd in annotations:
        if picture not in rows:
            counts["annotations of unknown pictures left out"] += 1
        elif category not in columns:
            counts["annotations of unknown categories left out"] += 1
        else:
            counts["crowd annotations, which count as any other"] += crowd
            marked.append((rows[picture], columns[category]))
    if marked:
        labels[tuple(torch.tensor(marked).T)] = 1
    kept, first = [], dict[str, Path]()
    for row, any_class in enumerate(labels.any(1).tolist()):
        file = folder / split / images[row][1]
        why = _fault(file) if any_class else "without an annotation"
        if why is None:
            kept.append(row)
        else:
            counts[f"pictures {why} left out"] += 1
            first.setdefault(f"pictures {why} left out", file)
    notes = "".join(
        f"; {count:,} {what}{f' ({first[what].name} is the first)' if what in first else ''}"
        for what, count in sorted(counts.items())
        if count
    )
    say(f"{split}: {len(kept):,} of {len(images):,} pictures, {len(categories)} classes{notes}")
    if not kept:
        raise ProgramError(
            f"no picture that {path} names can be used{notes}", f"unpack the pictures into {folder / split}"
        )
    sizes = {images[row][2] for row in kept}
    size = sizes.pop() if len(sizes) == 1 else None
    return Labelled([folder / split / images[row][1] for row in kept], labels[kept], categories, size)


def _parsed(path: Path) -> tuple[list[Any], list[tuple[int, int, bool]], list[tuple[int, str]]]:
    """Pictures (id, file, size), annotations (picture, category, crowd) and categories (id, name) in order of id."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ProgramError(
            f"{path} is not there",
            f"lay COCO out in the folder of --data-dir as annotations/instances_{{{','.join(SPLITS)}}}.json, "
            f"{'/, '.join(SPLITS)}/ (cocodataset.org), or make such a set with lwkd garments",
        ) from error
    except OSError as error:
        raise ProgramError(f"{path} cannot be read: {error}", "look at the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(path, f"it is no JSON: {error}", USE_A_COPY) from error
    part = "file"
    try:
        part = "images"
        images = [(_number(i["id"]), _text(i["file_name"]), _size(i)) for i in content["images"]]
        part = "categories"
        categories = sorted((_number(c["id"]), _text(c["name"])) for c in content["categories"])
        part = "annotations"
        annotations = [
            (_number(a["image_id"]), _number(a["category_id"]), bool(a.get("iscrowd", 0)))
            for a in content["annotations"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(path, f"{part} are not COCO's: {type(error).__name__}: {error}", USE_A_COPY) from error
    for part, ids in (("images", [i[0] for i in images]), ("categories", [c[0] for c in categories])):
        if twice := [number for number, count in Counter(ids).items() if count > 1]:
            raise DamagedFileError(path, f"{part} has the id {twice[0]} more than once", USE_A_COPY)
        if not ids:
            raise DamagedFileError(path, f"{part} is empty", USE_A_COPY)
    return images, annotations, categories


def _number(value: Any) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is no whole number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    width, height = image.get("width"), image.get("height")
    return (width, height) if isinstance(width, int) and isinstance(height, int) else None


MISSING, DAMAGED = "that are missing", "that are damaged"


def _fault(path: Path) -> str | None:
    """Why a file cannot be used; a look at its first and last bytes, and only where they are strange at all of it."""
    try:
        with path.open("rb") as file:
            start = file.read(2)
            end = ENDS.get(start, b"")
            if end:
                file.seek(0, 2)
                file.seek(max(file.tell() - len(end), 0))
                if file.read() == end:
                    return None
    except FileNotFoundError:
        return MISSING
    except OSError:
        return DAMAGED
    return None if isinstance(read_picture(path), Tensor) else DAMAGED


def read_picture(path: str | Path) -> Tensor | str:
    """The picture ``(3, H, W)`` uint8, whatever its colours were, or what is wrong with the file."""
    opened, tensor = require("PIL.Image").open, require("torchvision.transforms.functional").pil_to_tensor
    try:
        with opened(path) as picture:
            return tensor(picture.convert("RGB"))
    except Exception as error:  # Pillow's plugins raise many kinds on damaged files
        return f"{type(error).__name__}: {error}"


def fits(splits: Sequence[Labelled]) -> bool:
    """Whether all pictures of some splits are squares of one size, and go into memory together."""
    sizes = {split.size for split in splits}
    size, count = sizes.pop(), sum(len(split.paths) for split in splits)
    return not sizes and size is not None and size[0] == size[1] and 3 * size[0] ** 2 * count <= IN_MEMORY


def in_memory(split: Labelled, say: Callable[[str], None]) -> tuple[Tensor, Tensor]:
    """Images ``(N, 3, H, W)`` uint8 and labels of a split that :func:`fits`.

    Pictures that cannot be decoded, or are of another size than the annotation file says, are left out and counted.
    """
    assert split.size is not None
    images = torch.empty(len(split.paths), 3, *split.size, dtype=torch.uint8)
    kept, faults = [], []
    for row, path in enumerate(split.paths):
        picture = read_picture(path)
        if isinstance(picture, str):
            faults.append(f"{path}: {picture}")
        elif picture.shape != images.shape[1:]:
            faults.append(f"{path}: its size is {tuple(picture.shape[1:])}, its annotation says {split.size}")
        else:
            images[row] = picture
            kept.append(row)
    if not faults:
        return images, split.labels
    say(f"{len(faults):,} damaged pictures left out; the first is {faults[0]}")
    if not kept:
        raise DamagedFileError(split.paths[0].parent, faults[0], USE_A_COPY)
    return images[kept], split.labels[kept]
