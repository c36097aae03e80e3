"""Teacher passes whose student's comes in a later step, or never: none is compared with another batch's, or kept."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from pass_loops import Loop, close, pictures
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from toy import BASES, nets, train, watched

import lwkd
from lwkd.rates.waiting import MOST_WAITING, REMEMBERED


def momentless(**options: Any) -> Loop:
    return Loop(policy=lwkd.Relative(momentum=0.0), **options)


@pytest.mark.parametrize("every", [1, 2])
def test_a_teacher_that_runs_one_batch_ahead(every: int) -> None:
    loop, given = momentless(every=every), pictures(*range(1, 9))
    loop.passes("Ta", {"a": given[0]})
    for step in range(7):
        loop.passes("Tb Sa", {"a": given[step], "b": given[step + 1]})
        found = loop.step()
        if step % every == 0 and not (every > 1 and step == 2):  # the pass before the first late one was not kept
            assert close(found, loop.truth(given[step])), step
    # With every=2, step 2 is where the loop shows that it runs ahead.
    expected = {"measured": 7} if every == 1 else {"measured": 3, "late": 1, "not_due": 3}
    assert loop.shown.passes == expected


def test_accumulation_behind_a_teacher_that_runs_ahead() -> None:
    loop, given = momentless(), pictures(*range(1, 9))
    loop.passes("Ta Tb", dict(zip("ab", given, strict=False)))
    for step in range(3):
        loop.passes("Tc Sa Td Sb", dict(zip("abcd", given[2 * step :], strict=False)))
        assert close(loop.step(), loop.truth(*given[2 * step : 2 * step + 2])), step


def from_a_buffer(loop: Loop, steps: int) -> tuple[Tensor, Tensor]:
    """A step as usual, then steps on batches that the teacher answered three steps before; the divergences of both."""
    given = pictures(*range(1, steps + 5))
    loop.passes("Tx Sx", {"x": given[0]})
    first = found = loop.step()
    for step in range(1, steps + 4):
        loop.passes("Tx" if step < 4 else "Tx Sy", {"x": given[step], "y": given[step - 3]})
        found = loop.step()
    return first, found


@pytest.mark.filterwarnings("ignore:three steps in a row")
@pytest.mark.parametrize(
    ("every", "passes"), [(1, {"measured": 1, "late": 6}), (2, {"measured": 1, "late": 3, "not_due": 3})]
)
def test_answers_from_a_buffer_are_not_taken_for_the_pass_of_this_step(every: int, passes: dict[str, int]) -> None:
    loop = momentless(every=every)
    first, found = from_a_buffer(loop, 6)
    assert loop.shown.passes == passes
    assert torch.equal(first, found)


@pytest.mark.parametrize("order", ["Sx Tx", "Tx Sx"])
def test_batches_that_come_again_belong_to_the_passes_of_their_step(order: str) -> None:
    """Slices of one tensor, in every epoch the same memory, measured at every other step."""
    loop, whole = momentless(every=2), torch.cat(pictures(1, 5, 3))
    for step in range(7):
        x = whole[4 * (step % 3) :][:4]
        loop.passes(order, {"x": x})
        found = loop.step()
        if step % 2 == 0:
            assert close(found, loop.truth(x)), step
    assert loop.shown.passes == {"measured": 4, "not_due": 3}


def test_what_a_buffer_holds_is_said() -> None:
    with pytest.warns(UserWarning, match=r"three steps in a row .*in the student's step, or one step ahead"):
        from_a_buffer(momentless(), 3)


def test_features_of_passes_that_nobody_asks_for_are_let_go_of_at_the_second_step() -> None:
    """One step tells whether the teacher runs ahead."""
    loop, kept = Loop(), []

    def note(_: Any, __: Any, output: Tensor) -> None:
        kept.append(StorageWeakRef(output.untyped_storage()))

    loop.teacher.low.register_forward_hook(note)
    for step in range(4):
        a, b = pictures(2 * step + 1, 2 * step + 2)
        loop.passes("Ta Tb Sa", {"a": a, "b": b})
        loop.step()
        gc.collect()
        assert [ref.expired() for ref in kept[-2:]] == [True, step > 0], step
        assert all(ref.expired() for ref in kept[:-2])


@pytest.mark.filterwarnings("ignore:three steps in a row")
@pytest.mark.parametrize("who", ["T", "S"])
def test_passes_between_two_steps_hold_no_memory(who: str) -> None:
    loop, inputs = Loop(), []
    for seed in range(REMEMBERED + 40):
        (x,) = pictures(seed % 7 + 1)
        inputs.append(StorageWeakRef(x.untyped_storage()))
        loop.passes(f"{who}x", {"x": x})
    del x
    assert all(ref.expired() for ref in inputs)
    matcher = loop.optimizer._layerwise.rates._matcher
    (waiting,) = matcher._waiting.values()
    passes = waiting.teachers if who == "T" else waiting.students
    assert len(passes) == REMEMBERED
    assert sum(one.made.kept is not None for one in passes) == MOST_WAITING
    loop.optimizer.step()
    (a,) = pictures(5)
    loop.passes("Ta Sa", {"a": a})
    assert close(loop.step(), loop.truth(a))
    counts = {"unmatched": REMEMBERED + 40} if who == "S" else {}
    assert loop.shown.passes == {"measured": 1, **counts}


@pytest.mark.parametrize("signal", ["attention", "jacobian"])
def test_an_optimizer_that_is_dropped_lets_go_of_the_nets(signal: str) -> None:
    _, teacher, _ = nets()

    def run() -> weakref.ref[Any]:
        student, _, pairing = nets()
        base = BASES["sgd"](student.parameters())
        optimizer = lwkd.LayerwiseOptimizer(base, student, teacher, pairing, signal=signal, every=1)
        train(optimizer, student, teacher, 1)
        return weakref.ref(student)

    student = run()
    gc.collect()
    assert student() is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules())


def test_an_attached_optimizer_is_watched_without_its_handle() -> None:
    student, teacher, pairing = nets()
    base = BASES["sgd"](student.parameters())
    lwkd.attach(base, student, teacher, pairing, policy=lwkd.Constant([0.0, 1.0]))
    gc.collect()
    before = student.low[0].weight.clone()
    train(base, student, teacher, 2)
    assert torch.equal(student.low[0].weight, before)


class Words(torch.nn.Module):
    """Gives features one by one, and is told a mask of all of them so far, as a language model with a cache is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.high = torch.nn.Embedding(9, width), torch.nn.Linear(width, width)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.high(self.embed(ids).tanh())


def test_words_that_a_teacher_generates_are_no_passes_to_compare() -> None:
    torch.manual_seed(0)
    student, teacher = Words(4), Words(6).eval()
    ids, mask = torch.randint(9, (2, 5)), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    pairing = lwkd.pair(student, teacher, (ids, mask), layers={"high": "high"})
    optimizer = lwkd.LayerwiseOptimizer(
        torch.optim.SGD(student.parameters(), lr=0.1), student, teacher, pairing, policy=lwkd.Decay(momentum=0.0)
    )
    found = []
    for generates in (False, True):
        with torch.no_grad():
            for word in range(3 if generates else 0):
                longer = torch.cat([mask, torch.ones(2, word + 1, dtype=torch.long)], 1)
                teacher(ids[:, word : word + 1], longer)
            teacher(ids, mask)
        optimizer.zero_grad()
        (student(ids, mask).sum() * 0.0).backward()
        optimizer.step()
        found.append(optimizer.divergences["high"])
    assert found[0] == found[1] > 0
    assert optimizer.passes == {"measured": 2}


def test_a_mask_that_does_not_fit_is_an_error_where_the_passes_are_compared() -> None:
    student, teacher, optimizer, shown = watched()
    train(optimizer, student, teacher, 1)
    assert shown.passes == {"measured": 1}
    torch.manual_seed(0)
    words, other = Words(4), Words(6).eval()
    ids, mask = torch.randint(9, (2, 5)), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    pairing = lwkd.pair(words, other, (ids, mask[:, :5]), layers={"high": "high"})
    lwkd.LayerwiseOptimizer(torch.optim.SGD(words.parameters(), lr=0.1), words, other, pairing)
    with torch.no_grad():
        other(ids, mask)
    with pytest.raises(ValueError, match="layer 'high' has 5 positions, and the mask of the batch 6"):
        words(ids, mask)
