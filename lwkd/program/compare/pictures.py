"""What a student is shown: which pictures, with which labels, and how they look to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lwkd.program.compare.recipe import Recipe
from lwkd.program.data.datasets import Data, load
from lwkd.program.distill.settings import Settings
from lwkd.program.errors import ProgramError, require
from lwkd.program.seeds import seed_of

PICTURES, NOISE = 2, 3
"""Random streams of the choice of pictures and of wrong labels."""

Split = Literal["validation", "test"]


@lru_cache(maxsize=2)  # a process runs many trials on the same data
def _loaded(name: str, folder: str, size: int | None, augment: str, pieces: bool) -> Data:
    return load(name, Path(folder), size=size, augment=augment, pieces=pieces)


def split_off(settings: Settings, validation: int, split: Split) -> Data:
    """The data set without its last ``validation`` training pictures; ``test`` holds these, or the test pictures.

    Errors: :class:`~lwkd.program.errors.ProgramError` (status 2) where there are not so many pictures.
    """
    data = _loaded(settings.data, settings.data_dir, settings.image_size, settings.augment, settings.pieces)
    pictures, left = data.train, len(data.train) - validation
    if left < settings.batch_size:
        raise ProgramError(
            f"{settings.data} has {len(pictures)} training {'documents' if data.text else 'pictures'}, {validation} of "
            f"them for validation, and a batch takes {settings.batch_size}",
            "lower validation or batch_size",
            code=2,
        )
    last = min(left, settings.limit or left)
    held_out = pictures.rows(slice(left, None)) if split == "validation" else data.test
    return replace(data, train=pictures.rows(slice(last)), test=held_out)


def shown_to_student(data: Data, recipe: Recipe, seed: int) -> Data:
    """The student's own pictures, drawn by its seed, some of them with wrong labels where the recipe says so."""
    draw = torch.Generator().manual_seed(seed_of(seed, PICTURES))
    chosen = torch.randperm(len(data.train), generator=draw)[: recipe.settings.student_limit]
    pictures = data.train.rows(chosen)
    if recipe.label_noise:
        noise = torch.Generator().manual_seed(seed_of(seed, NOISE))
        labels = pictures.labels.clone()
        wrong = torch.rand(len(labels), generator=noise) < recipe.label_noise
        labels[wrong] = torch.randint(data.classes, (int(wrong.sum()),), generator=noise)
        pictures = replace(pictures, labels=labels)
    return replace(data, train=pictures)


def shift_of(recipe: Recipe, data: Data) -> Callable[[Tensor], Tensor]:
    """What the student sees of a normalised batch (B, C, H, W); the teacher sees the batch itself."""
    if recipe.shift == "blurred":
        blur = require("torchvision.transforms.v2.functional").gaussian_blur
        return lambda x: blur(x, kernel_size=[5, 5], sigma=[1.5, 1.5])
    if recipe.shift == "inverted":
        mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
        return lambda x: (1 - 2 * mean.to(x)) / std.to(x) - x  # of the pictures in [0, 1]: 1 - picture
    return lambda x: x
