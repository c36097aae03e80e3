"""Data sets: pictures in memory as bytes, a folder of image files, or documents; a training and a test split of each.

Legend: ``N`` pictures, ``B`` batch, ``C`` channels, ``H W`` size, ``T`` words.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lwkd.program.data import coco, words
from lwkd.program.data.download import provide_idx
from lwkd.program.errors import DamagedFileError, ProgramError, require

TEST_FOLDERS = ("val", "test")

Say = Callable[[str], None]
"""Told what is being fetched."""

Splits = tuple[list[tuple[Any, Any]], int, str]
"""Images (N, C, H, W) and labels of the training and of the test split, the number of classes, the augmentation."""


@dataclass(frozen=True)
class Pictures:
    """One split in memory: ``images`` (N, C, H, W) uint8, ``labels`` (N,) int64 or, multi-label, (N, K) uint8.

    Documents are pictures here, ``images`` (N, T) int64: the ids of their words or word pieces.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, chosen: Tensor | slice) -> Pictures:
        """Some of the pictures, in the order of the indices."""
        return Pictures(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Files:
    """One split on disk: the ``paths`` of N image files, and labels as those of :class:`Pictures`."""

    paths: tuple[str, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.paths)

    def rows(self, chosen: Tensor | slice) -> Files:
        """Some of the files, in the order of the indices."""
        numbers = torch.arange(len(self))[chosen].tolist()
        return Files(tuple(self.paths[number] for number in numbers), self.labels[chosen])


@dataclass(frozen=True)
class Data:
    """A data set.

    ``size`` is the side of the pictures that the nets see; ``mean`` and ``std`` are per channel, of the training
    pictures scaled to [0, 1]; ``augment`` is ``"none"``, ``"crop"``, or ``"crop-flip"``. Documents have no channels and
    no moments, their ``size`` is T, and ``words`` is how many ids there are.
    """

    name: str
    train: Pictures | Files
    test: Pictures | Files
    classes: int
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str
    words: int = 0

    @property
    def multilabel(self) -> bool:
        """Whether a picture has any number of classes: labels are then 0 or 1 for each of the K classes."""
        return self.train.labels.dim() == 2

    @property
    def text(self) -> bool:
        """Whether batches are documents: ids of words (B, T)."""
        return self.channels == 0

    def example(self, batch: int = 2) -> Tensor:
        """Zeros shaped like a batch, or documents of unknown words: what pairing and shape checks run on."""
        if self.text:
            return torch.full((batch, self.size), words.UNKNOWN)
        return torch.zeros(batch, self.channels, self.size, self.size)


def _in_memory(name: str, splits: list[tuple[Any, Any]], classes: int, augment: str, size: int | None) -> Data:
    train, test = (
        Pictures(torch.as_tensor(images, dtype=torch.uint8), torch.as_tensor(labels, dtype=torch.int64))
        for images, labels in splits
    )
    mean, std = _moments(train.images)
    side = size or train.images.shape[-1]
    return Data(name, train, test, classes, train.images.shape[1], side, mean, std, augment)


def _moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of bytes scaled to [0, 1], exact, from the counts of the 256 values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    moments = []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = float(share @ values)
        moments.append((mean, max(float(share @ (values - mean) ** 2) ** 0.5, 1e-3)))
    return tuple(mean for mean, _ in moments), tuple(std for _, std in moments)


def _digits(name: str, folder: Path, say: Say) -> Splits:
    bunch = require("sklearn.datasets").load_digits()
    images = (torch.as_tensor(bunch.images) * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.as_tensor(bunch.target)
    # A fixed split, the same for every seed: the test pictures are never trained on, whatever is compared.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    cut = len(labels) * 4 // 5
    return [(images[order[:cut]], labels[order[:cut]]), (images[order[cut:]], labels[order[cut:]])], 10, "none"


def _idx(name: str, folder: Path, say: Say) -> Splits:
    train_images, train_labels, test_images, test_labels = provide_idx(name, folder, say)
    return [(train_images[:, None], train_labels), (test_images[:, None], test_labels)], 10, "none"


def _cifar(name: str, folder: Path, say: Say) -> Splits:
    dataset = getattr(require("torchvision.datasets"), name.upper())
    check = require("torchvision.datasets.utils").check_integrity
    base = folder / dataset.base_folder
    missing = []
    for file, md5 in (*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], dataset.meta["md5"])):
        if not (base / file).exists():
            missing.append(file)
        elif not check(str(base / file), md5):
            raise DamagedFileError(base / file, "its checksum is wrong", "delete it and run again")
    if missing:
        say(f"{name}: {missing[0]} is not in {base}; trying torchvision's downloader")
    try:
        splits = [dataset(str(folder), train=train, download=bool(missing)) for train in (True, False)]
    except (pickle.UnpicklingError, EOFError, KeyError) as error:
        raise DamagedFileError(base, str(error), "delete this folder and run again") from error
    except Exception as error:  # the downloader raises whatever its transport raises
        raise ProgramError(
            f"{name} was not found. Tried:\n  files in {base}: {missing} not there\n"
            f"  torchvision's downloader: {type(error).__name__}: {error}",
            f"unpack {dataset.filename} into {folder}, or use --data digits, which is always there",
        ) from error
    classes = 10 if name == "cifar10" else 100
    return [(torch.as_tensor(s.data).permute(0, 3, 1, 2), s.targets) for s in splits], classes, "crop-flip"


LOADERS: dict[str, Callable[[str, Path, Say], Splits]] = {
    "digits": _digits,
    "fashion-mnist": _idx,
    "mnist": _idx,
    "cifar10": _cifar,
    "cifar100": _cifar,
}
NAMES = (*LOADERS, "coco", "imagefolder", "bbc-news")

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""The usual moments of photographs: reading every picture for exact ones would take longer than they are worth."""


def _files(samples: list[tuple[str, int]]) -> Files:
    return Files(tuple(path for path, _ in samples), torch.tensor([label for _, label in samples]))


def _imagefolder(folder: Path, size: int | None) -> Data:
    train_dir = folder / "train"
    test_dir = next((folder / name for name in TEST_FOLDERS if (folder / name).is_dir()), None)
    if not train_dir.is_dir() or test_dir is None:
        raise ProgramError(
            f"{folder} holds no image folder: {train_dir} and {folder / 'val'} (or test) must both be there",
            "lay the pictures out as train/CLASS/picture.png and val/CLASS/picture.png",
        )
    reader = require("torchvision.datasets").ImageFolder
    try:
        train, test = reader(str(train_dir)), reader(str(test_dir))
    except FileNotFoundError as error:
        raise ProgramError(f"{folder}: {error}", "give every class at least one picture in train and in val") from error
    if train.classes != test.classes:
        differ = sorted(set(train.classes) ^ set(test.classes))
        raise ProgramError(f"{train_dir} and {test_dir} have different classes: {differ}", "make the folders match")
    # ImageFolder lists class after class: mixed once and for all, so that a cap takes from every class.
    order = torch.randperm(len(train.samples), generator=torch.Generator().manual_seed(0))
    mixed = [train.samples[i] for i in order.tolist()]
    return Data(
        "imagefolder",
        _files(mixed),
        _files(test.samples),
        len(train.classes),
        3,
        size or 224,
        *IMAGENET,
        "crop-flip",
    )


def _coco(folder: Path, size: int | None, say: Say) -> Data:
    train, test = (coco.read_labels(folder, split, say) for split in coco.SPLITS)
    if train.categories != test.categories:
        differ = sorted(set(train.categories) ^ set(test.categories))
        raise ProgramError(
            f"the two annotation files in {folder / 'annotations'} have different categories: {differ}",
            "take both from the same set",
        )
    classes = len(train.categories)
    if coco.fits((train, test)):
        splits = [Pictures(*coco.in_memory(split, say)) for split in (train, test)]
        side = size or splits[0].images.shape[-1]
        return Data("coco", splits[0], splits[1], classes, 3, side, *_moments(splits[0].images), "crop-flip")
    files = [Files(tuple(str(path) for path in split.paths), split.labels) for split in (train, test)]
    return Data("coco", files[0], files[1], classes, 3, size or 224, *IMAGENET, "crop-flip")


def _bbc_news(folder: Path, size: int | None, say: Say, pieces: bool) -> Data:
    length = size or words.LENGTH
    train, test, classes = words.bbc_news(folder, length, say, pieces=pieces)
    ids = words.PIECES if pieces else words.WORDS
    return Data("bbc-news", Pictures(*train), Pictures(*test), classes, 0, length, (), (), "none", ids)


def load(
    name: str,
    folder: Path,
    *,
    size: int | None = None,
    limit: int | None = None,
    augment: str = "auto",
    pieces: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> Data:
    """Load a data set.

    Args:
        name: one of :data:`NAMES`.
        folder: where data is kept, and put when it is fetched.
        size: side of the pictures the nets see, words of documents; None keeps the data's own.
        limit: cap on training pictures.
        augment: ``"auto"`` (crop and flip for CIFAR, COCO and image folders, none for others), or one of the three
            kinds. Pictures in memory are shifted by up to an eighth of their side, files are cropped and resized.
        pieces: documents are ids of MiniLM's word pieces, as ``minilm_LAYERS`` reads them, instead of words.
        say: told what is being fetched.

    Errors: :class:`~lwkd.program.errors.ProgramError` that names the damaged file, or lists what was tried.

    >>> digits = load("digits", Path("data"), limit=100)
    >>> len(digits.train), digits.classes, digits.train.images.shape[1:]
    (100, 10, torch.Size([1, 8, 8]))
    """
    if name == "imagefolder":
        data = _imagefolder(folder, size)
    elif name == "coco":
        data = _coco(folder, size, say)
    elif name == "bbc-news":
        data = _bbc_news(folder, size, say, pieces)
    elif name in LOADERS:
        splits, classes, usual = LOADERS[name](name, folder, say)
        data = _in_memory(name, splits, classes, usual, size)
    else:
        raise ProgramError(f"data set {name!r} is not known", f"use one of {', '.join(NAMES)}", code=2)
    if data.text and augment not in ("auto", "none"):
        raise ProgramError(f"--augment {augment} is of pictures, and {name} are documents", "leave it out", code=2)
    if augment != "auto":
        data = replace(data, augment=augment)
    return capped(data, limit)


def capped(data: Data, limit: int | None) -> Data:
    """The data set with the first ``limit`` training pictures; test pictures and normalisation stay the same.

    >>> digits = load("digits", Path("data"))
    >>> len(capped(digits, 50).train), capped(digits, 50).mean == digits.mean
    (50, True)
    """
    return replace(data, train=data.train.rows(slice(limit)))
