"""Training on batches of every kind: signals measure the rows that they should, of what the nets were called with."""

from __future__ import annotations

import warnings
from collections import UserDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import lwkd
from lwkd.signals import Hessian, Jacobian

ROWS = 6


class Words(NamedTuple):
    x: Tensor
    mask: Tensor


class Encoding(UserDict):
    """As BatchEncoding."""


class Net(nn.Module):
    """Two token-wise stages on what ``tokens`` makes (B, N, 5) of the arguments."""

    def __init__(self, width: int, tokens: Callable[..., Tensor], before: nn.Module | None = None) -> None:
        super().__init__()
        self.before = nn.Identity() if before is None else before
        self.low = nn.Sequential(nn.Linear(5, width), nn.Tanh())
        self.high = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh())
        self.head, self.tokens = nn.Linear(2 * width, 3), tokens

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.head(self.high(self.low(self.tokens(self.before, *args, **kwargs))).mean(1))


def _packed(before: nn.Module, packed: PackedSequence) -> Tensor:
    assert isinstance(packed, PackedSequence)
    return pad_packed_sequence(before(packed)[0], batch_first=True)[0]


def _words(_: nn.Module, words: Words) -> Tensor:
    return words.x * words.mask.unsqueeze(-1)


def _encoded(before: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    return before(input_ids) * attention_mask.unsqueeze(-1)


def _images(_: nn.Module, images: list[Tensor]) -> Tensor:
    return torch.stack([image.flatten(1).t()[:4, :].tile(1, 5)[:, :5] for image in images])


class Kind(NamedTuple):
    tokens: Callable[..., Tensor]
    batch: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]  # of ROWS rows
    kept: int  # rows that are measured of 2
    before: Callable[[], nn.Module] = nn.Identity
    floating: bool = True


def _sequences() -> PackedSequence:
    return pack_padded_sequence(torch.rand(ROWS, 4, 5), torch.tensor([2, 4, 3, 1, 4, 2]), True, enforce_sorted=False)


KINDS: dict[str, Kind] = {
    "packed": Kind(_packed, lambda: ((_sequences(),), {}), 2, lambda: nn.GRU(5, 5, batch_first=True)),
    "named tuple": Kind(_words, lambda: ((Words(torch.rand(ROWS, 4, 5), torch.ones(ROWS, 4)),), {}), 2),
    "encoding": Kind(
        _encoded,
        lambda: ((), Encoding(input_ids=torch.randint(9, (ROWS, 4)), attention_mask=torch.ones(ROWS, 4).long())),
        2,
        lambda: nn.Embedding(9, 5),
        floating=False,
    ),
    "one dict": Kind(
        lambda before, batch: before(batch["ids"]),
        lambda: (({"ids": torch.randint(9, (ROWS, 4)), "text": ["a"] * ROWS},), {}),
        2,
        lambda: nn.Embedding(9, 5),
        floating=False,
    ),
    "recurrent state": Kind(
        lambda before, x, state: before(x, state)[0],
        lambda: ((torch.rand(ROWS, 4, 5), torch.rand(2, ROWS, 5)), {}),
        ROWS,
        lambda: nn.GRU(5, 5, 2, batch_first=True),
    ),
    "list of pictures": Kind(_images, lambda: (([torch.rand(1, 2, 2) for _ in range(ROWS)],), {}), 2),
}


def given(kind: Kind) -> tuple[Net, Net, lwkd.Pairing, Any]:
    torch.manual_seed(0)
    student, teacher = Net(2, kind.tokens, kind.before()), Net(3, kind.tokens, kind.before()).eval()
    if not kind.floating:
        teacher.before.load_state_dict(student.before.state_dict())
    args, kwargs = kind.batch()
    example = kwargs if kwargs else args
    return student, teacher, lwkd.pair(student, teacher, example, layers={"low": "low", "high": "high"}), example


def signals(kind: Kind) -> list[Any]:
    floating = [Jacobian(estimator="difference"), Jacobian(estimator="vjp")] if kind.floating else []
    return ["attention", Hessian(), Hessian(curvature="hessian"), Jacobian("parameters"), *floating]


@pytest.mark.parametrize("name", KINDS)
def test_every_signal_follows_the_training(name: str) -> None:
    kind = KINDS[name]
    for signal in signals(kind):
        student, teacher, pairing, _ = given(kind)
        before = {k: v.clone() for k, v in teacher.state_dict().items()}
        optimizer = lwkd.LayerwiseOptimizer(
            torch.optim.SGD(student.parameters(), lr=0.1), student, teacher, pairing, signal=signal, every=1, samples=2
        )
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(3):
                args, kwargs = kind.batch()
                with torch.no_grad():
                    z = teacher(*args, **kwargs)
                lwkd.losses.distillation(student(*args, **kwargs), z).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert optimizer.passes["measured"] == 3
        assert all(divergence > 0 for divergence in optimizer.divergences.values())
        about_rows = [w for w in said if "cannot be cut out" in str(w.message)]
        # Once for the student and once for the teacher, and never by attention, which takes its rows of the features.
        assert len(about_rows) == (0 if kind.kept == 2 or signal == "attention" else 2)
        assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize("name", KINDS)
def test_the_rows_that_are_measured_are_the_first_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, seen = KINDS[name], []
    measure = Hessian.measure

    def looking(signal: Hessian, student: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        inputs = args[2]
        seen.append(inputs)
        return measure(signal, student, *args, **kwargs)

    monkeypatch.setattr(Hessian, "measure", looking)
    student, teacher, pairing, _ = given(kind)
    optimizer = lwkd.LayerwiseOptimizer(
        torch.optim.SGD(student.parameters(), lr=0.0), student, teacher, pairing, signal="hessian", every=1, samples=2
    )
    args, kwargs = kind.batch()
    whole = student(*args, **kwargs).detach()
    with torch.no_grad():
        teacher(*args, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        student(*args, **kwargs).sum().backward()
        optimizer.step()
    (inputs,) = seen
    part = student(*inputs.args, **inputs.kwargs)
    assert inputs.batch == len(part) == kind.kept
    if name != "packed":  # there the longest of the rows decides over how many positions the mean goes
        torch.testing.assert_close(part, whole[: kind.kept])
    else:
        lengths = pad_packed_sequence(inputs.args[0], batch_first=True)[1]
        assert lengths.tolist() == [2, 4]
    assert type(inputs.args[0] if args else inputs.kwargs) is not tuple
