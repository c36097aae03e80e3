"""Batches in an order that depends on nothing but the seed, the epoch and the position.

Every random choice (order, crop, flip) comes from a generator seeded by (seed, epoch, batch or picture). No state has
to be saved: a run that was broken off in the middle of an epoch starts again at any batch and sees the same bits.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lwkd.program.data.datasets import Data, Files, Pictures
from lwkd.program.errors import DamagedFileError, require
from lwkd.program.seeds import seed_of

Batch = tuple[Tensor, Tensor]

REPLACE_IT = (
    "delete or replace this picture; then lwkd distill goes on with --resume, lwkd compare with the same command"
)
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
"""Those that ask a run to stop."""

MEMORY = torch.channels_last
"""Layout of pictures and of convolution weights: the quicker one on CPUs and on GPUs with tensor cores."""


def crop_and_flip(images: Tensor, generator: torch.Generator, *, flip: bool) -> Tensor:
    """Shift every picture by up to an eighth of its side (zeros come in) and mirror half of them.

    Args:
        images: ``(B, C, H, W)``, any dtype.
        generator: the only source of randomness.
        flip: whether to mirror as well.

    >>> crop_and_flip(torch.ones(2, 1, 8, 8), torch.Generator().manual_seed(0), flip=True).shape
    torch.Size([2, 1, 8, 8])
    """
    count, _, height, width = images.shape
    reach = max(1, width // 8)
    windows = F.pad(images, (reach,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    down, right = torch.randint(0, 2 * reach + 1, (2, count), generator=generator)
    moved = windows[torch.arange(count), :, down, right]
    if not flip:
        return moved
    mirrored = torch.rand(count, generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], moved.flip(3), moved)


def _starts(count: int, batch_size: int) -> list[int]:
    """Where training batches begin: whole ones only (a last batch of one picture would break batch norm)."""
    return list(range(0, max(count - batch_size, 0) + 1, batch_size))


class Batches:
    """Batches of a data set: ``train(epoch, start)`` shuffled and augmented, ``test()`` in order.

    Args:
        data: the data set.
        batch_size: pictures a batch; the incomplete last batch of a training epoch is left out.
        seed: of the order and the augmentation.
        device: where batches go.
        workers: processes that read image files (pictures in memory need none).
        rank: which of several processes this is.
        ranks: how many share each batch; every one gets as many pictures of a training batch.

    >>> from pathlib import Path
    >>> from lwkd.program.data.datasets import load
    >>> batches = Batches(load("digits", Path("data")), 64, seed=0)
    >>> images, labels = next(batches.train(epoch=0))
    >>> images.shape, len(batches)
    (torch.Size([64, 1, 8, 8]), 22)
    """

    def __init__(
        self,
        data: Data,
        batch_size: int,
        *,
        seed: int,
        device: str = "cpu",
        workers: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.data, self.batch_size, self.seed, self.device, self.workers = data, batch_size, seed, device, workers
        self._share = slice(rank, None, ranks)
        self._mean = torch.tensor(data.mean)[:, None, None]
        self._std = torch.tensor(data.std)[:, None, None]

    def __len__(self) -> int:
        return len(_starts(len(self.data.train), self.batch_size))

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Training batches of an epoch, from number ``start`` on: images (B, C, H, W) float32, labels (B,), (B, K).

        Of documents: ids (B, T) int64.
        """
        order = torch.randperm(len(self.data.train), generator=torch.Generator().manual_seed(seed_of(self.seed, epoch)))
        chosen = [order[at : at + self.batch_size] for at in _starts(len(order), self.batch_size)]
        if isinstance(self.data.train, Files):
            seeds = [
                [(int(i), seed_of(self.seed, epoch, int(i))) for i in rows[self._share]] for rows in chosen[start:]
            ]
            yield from self._read(self.data.train, seeds)
            return
        for number, rows in enumerate(chosen[start:], start):
            images = self.data.train.images[rows]
            if self.data.augment != "none":
                generator = torch.Generator().manual_seed(seed_of(self.seed, epoch, number))
                images = crop_and_flip(images, generator, flip=self.data.augment == "crop-flip")
            yield self._finish(images[self._share], self.data.train.labels[rows][self._share])

    def test(self) -> Iterator[Batch]:
        """The test split in its own order, nothing left out, nothing augmented."""
        size = max(self.batch_size, 256)
        starts = range(0, len(self.data.test), size)[self._share]
        if isinstance(self.data.test, Pictures):
            for at in starts:
                yield self._finish(self.data.test.images[at : at + size], self.data.test.labels[at : at + size])
        else:
            count = len(self.data.test)
            yield from self._read(
                self.data.test, [[(i, None) for i in range(at, min(at + size, count))] for at in starts]
            )

    def _finish(self, images: Tensor, labels: Tensor) -> Batch:
        if self.data.text:
            return images.to(self.device), labels.to(self.device)
        scaled = images.float().div_(255).sub_(self._mean).div_(self._std)
        if scaled.shape[-1] != self.data.size or scaled.shape[-2] != self.data.size:
            scaled = F.interpolate(scaled, size=(self.data.size, self.data.size), mode="bilinear", antialias=True)
        return scaled.to(self.device, memory_format=MEMORY), labels.to(self.device)

    def _read(self, files: Files, rows: list[Any]) -> Iterator[Batch]:
        loader: Any = torch.utils.data.DataLoader(
            _Reader(files, self.data.size, self.data.augment),
            batch_sampler=rows,
            collate_fn=_collate,
            num_workers=self.workers,
            worker_init_fn=_leave_signals_to_parent,
            # A generator of its own: the loader draws a base seed, which must not come from the global stream.
            generator=torch.Generator().manual_seed(0),
        )
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # a worker has them blocked until it knows them
        try:
            batches = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for images, labels in batches:
            if isinstance(images, str):
                raise DamagedFileError(images, labels, REPLACE_IT)
            yield self._finish(images, labels)


def _leave_signals_to_parent(_: int) -> None:
    # Ctrl-C in a terminal and SIGTERM from a scheduler reach every process of the group; the parent decides, and then
    # ends its workers: by SIGTERM, so only the first one is ignored.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


class _Reader(torch.utils.data.Dataset[Any]):
    """Reads one image file; the item is (index, seed), seed None meaning no augmentation."""

    def __init__(self, files: Files, size: int, augment: str):
        self.files, self.size, self.augment = files, size, augment
        transforms = require("torchvision.transforms")
        whole = [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size)]
        # A label of many must not lose its object: at least half of each side stays, as in multi-label training.
        share = (0.25, 1.0) if files.labels.dim() == 2 else (0.08, 1.0)
        varied = [transforms.RandomResizedCrop(size, scale=share)]
        if augment == "crop-flip":
            varied.append(transforms.RandomHorizontalFlip())
        tail = [transforms.PILToTensor()]
        self.plain = transforms.Compose(whole + tail)
        self.varied = transforms.Compose((whole if augment == "none" else varied) + tail)

    def __getitem__(self, item: tuple[int, int | None]) -> tuple[Any, Any]:
        index, seed = item
        path, label = self.files.paths[index], self.files.labels[index]
        try:
            with require("PIL.Image").open(path) as picture:
                picture = picture.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on damaged files
            return path, f"{type(error).__name__}: {error}"
        if seed is None:
            return self.plain(picture), label
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.varied(picture), label


def _collate(items: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    for image, label in items:
        if isinstance(image, str):
            return image, label
    return torch.stack([image for image, _ in items]), torch.stack([label for _, label in items])
