"""Two processes under DDP: each sees other data, both must hold the same rates and the same weights."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from doubles import copies_deferred
from rank_runs import ends, join, on_ranks, parallel
from signal_runs import SIGNALS
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from toy import BASES, FORMS, batches, loss_of, make, nets, same, train, watched, weights

import lwkd
from lwkd.rates import distributed as ranks

EXITS = int(os.environ.get("LWKD_EXITS", "4"))
"""Processes whose end is looked at; more, as chance decides: LWKD_EXITS=40."""

CASES: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    ("wrapper", "sgd", 20, {}),
    ("attach", "sgd", 20, {}),
    ("attach", "sharded", 5, {}),
    ("wrapper", "sgd", 5, {"policy": lwkd.Freeze(window=1, warmup=0, tolerance=0.5)}),
    ("wrapper", "sgd", 5, {"signal": SIGNALS["jvp"], "every": 1}),
    ("wrapper", "sgd", 5, {"signal": SIGNALS["ggn"], "every": 1}),
)


def _sharded(parameters: Any) -> Any:
    """The parameters of a paired layer are stepped on one rank, and its rate counts on both."""
    return ZeroRedundancyOptimizer(parameters, torch.optim.SGD, lr=0.05, momentum=0.9)


def _backward(rank: int, step: int, student: Any, teacher: Any, x: Tensor, y: Tensor) -> None:
    if (rank, step) == (1, 2):  # this rank has nothing to measure, and must take part all the same
        F.cross_entropy(student(x), y).backward()
    else:
        loss_of(student, teacher, x, y).backward()


def _parameters(student: Any) -> dict[str, Any]:
    return {name: p.detach() for name, p in student.named_parameters()}


def _all_cases(rank: int) -> list[dict[str, Any]]:
    results = []
    for form, base, steps, options in CASES:
        made = _sharded if base == "sharded" else BASES[base]
        student, whole, teacher, optimizer, shown = parallel(form, made, **options)
        for step, (x, y) in enumerate(batches(steps, seed=rank)):
            optimizer.zero_grad()
            _backward(rank, step, whole, teacher, x, y)
            optimizer.step()
        results.append(
            {
                "rates": shown.rates,
                "divergences": shown.divergences,
                "passes": dict(shown.passes),
                "parameters": _parameters(student),
                "weights": weights(student),
            }
        )
    return results


def _late_rank(rank: int) -> list[dict[str, Any]]:
    """Copies are one step late; one rank looks at its rates all the time, the other never does."""
    patch = pytest.MonkeyPatch()
    copies_deferred(patch)
    results = []
    for options in ({}, {"signal": "jacobian", "every": 1}, {"signal": "hessian", "budget": 0.5}):
        student, whole, teacher, optimizer, shown = parallel("wrapper", **options)
        rates = shown._rates
        for step, (x, y) in enumerate(batches(9, seed=rank)):
            optimizer.zero_grad()
            _backward(rank, step, whole, teacher, x, y)
            if step == 7:  # infinite on one rank only: nobody measures
                before = shown.divergences
                rates.after_step(torch.tensor(float(rank)))
                assert shown.divergences == before
            else:
                optimizer.step()
            if rank == 0:
                assert shown.rates
                assert shown.overhead() >= 0
        schedule = rates.schedule.every, rates.schedule.first, int(rates.state.counts[0])
        results.append({"rates": shown.rates, "schedule": schedule, "parameters": _parameters(student)})
    return results


def test_ranks_agree_when_measurements_are_late(tmp_path: Path) -> None:
    for one, other in zip(*on_ranks(_late_rank, tmp_path), strict=True):
        assert one["rates"] == other["rates"]
        assert one["schedule"] == other["schedule"]
        assert set(one["rates"].values()) != {1.0}
        assert same(one["parameters"], other["parameters"])


@pytest.mark.parametrize(("backends", "expected"), [("cpu:gloo,meta:fake", "cpu"), ("meta:fake", "meta")])
def test_sums_are_formed_where_the_process_group_has_a_backend(
    backends: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NCCL alone has none for the CPU; the meta device stands in for the GPU."""
    where = []
    monkeypatch.setattr(ranks, "world_size", lambda _: 2)
    monkeypatch.setattr(dist, "get_backend_config", lambda _: backends)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: where.append(tensor.device.type))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: torch.empty_like(tensor, device=device))
    on_cpu, on_meta = torch.ones(3), torch.ones(3, device="meta")
    assert ranks.summed(on_cpu).device.type == "cpu"
    assert ranks.summed(on_meta).device.type == "meta"
    assert where == [expected, "meta"]


def test_python_ends_after_the_threads_that_hold_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """They need the interpreter to let go of its tensor: else one process in five aborted at its end."""
    monkeypatch.setattr(ranks, "world_size", lambda _: 2)
    monkeypatch.setattr(ranks, "_recent", type(ranks._recent)(maxlen=8))
    monkeypatch.setattr(dist, "get_backend_config", lambda _: "cpu:gloo")
    threads = []

    def hold(tensor: Any) -> None:
        held = [tensor]
        threads.append(threading.Timer(0.3, held.clear))
        threads[-1].start()

    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: hold(tensor))
    for _ in range(2):
        ranks.summed(torch.ones(3))
    ranks.wait_until_let_go()
    assert all(thread.finished.is_set() for thread in threads)
    assert not ranks._recent
    monkeypatch.setattr(ranks, "PATIENCE", 0.05)
    held = torch.ones(3)
    ranks.summed(held)
    began = time.monotonic()
    ranks.wait_until_let_go()
    assert time.monotonic() - began < 2, "a tensor that somebody keeps does not hold up the end for good"


@pytest.mark.parametrize("number", range((EXITS + 1) // 2))
def test_processes_that_trained_end_with_code_0(number: int, tmp_path: Path) -> None:
    """Both forms in turn. Without the wait at the end, one process in eight aborted (5 of 40)."""
    for code, said in ends(tmp_path, FORMS[number % 2]):
        assert code == 0, said


def test_ranks_hold_the_same_rates(tmp_path: Path) -> None:
    for case, one, other in zip(CASES, *on_ranks(_all_cases, tmp_path), strict=True):
        steps = case[2]
        assert (one["passes"], other["passes"]) == ({"measured": steps}, {"measured": steps - 1, "unmatched": 1}), case
        assert one["rates"] == other["rates"], case
        assert one["divergences"] == other["divergences"], case
        assert set(one["rates"].values()) != {1.0}, case
        assert same(one["parameters"], other["parameters"]), case
        assert not same(one["weights"], other["weights"]), "batch statistics are each rank's own: the data did differ"


def _teachers_that_differ(rank: int) -> list[dict[str, Any]]:
    """One rank's teacher is written to, with the values that it had."""
    student, whole, teacher, optimizer, shown = parallel("wrapper", signal="hessian", every=1)
    for step, (x, y) in enumerate(batches(16, seed=rank)):
        optimizer.zero_grad()
        loss_of(whole, teacher, x, y).backward()
        optimizer.step()
        if (rank, step) == (0, 9):
            teacher.load_state_dict({name: value.clone() for name, value in teacher.state_dict().items()})
    curvature = shown._rates.teacher
    return [shown.rates, shown.divergences, _parameters(student), curvature.count, curvature.rests, curvature.mean]


def test_a_teacher_that_one_rank_finds_changed_is_measured_anew_by_all(tmp_path: Path) -> None:
    one, other = on_ranks(_teachers_that_differ, tmp_path)
    assert one[:2] == other[:2]
    assert all(torch.equal(value, other[2][name]) for name, value in one[2].items())
    # Forgotten in the 11th measurement, which counts for nobody: the four next take it in, then one in four.
    assert one[3:5] == other[3:5] == [4, 2]
    assert torch.equal(one[5], other[5])


def _warm_up(rank: int) -> list[Any]:
    """A first step at a learning rate of 0, in which one rank calls no student."""
    _, whole, teacher, optimizer, shown = parallel("wrapper", lambda p: torch.optim.SGD(p, lr=0.0))
    for step, (x, y) in enumerate(batches(3, seed=rank)):
        optimizer.zero_grad()
        with whole.no_sync():
            if (rank, step) != (1, 0):
                loss_of(whole, teacher, x, y).backward()
        optimizer.step()
    return [shown.rates, shown.measurements]


def test_a_rank_without_a_pass_takes_part_at_a_rate_of_0(tmp_path: Path) -> None:
    one, other = on_ranks(_warm_up, tmp_path)
    assert one == other
    assert one[1] == 3


def _four(rank: int, folder: Path) -> dict[str, Any]:
    """Several checks in one spawn, because processes are slow to start."""
    found: dict[str, Any] = {}

    def keep(case: str, shown: Any, student: Any) -> None:
        found[case] = {"divergences": shown.divergences, "rates": shown.rates, "parameters": _parameters(student)}

    # Two models, each trained by two ranks.
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine, theirs = pairs[rank // 2], pairs[1 - rank // 2]
    student, teacher, pairing = nets(seed=rank // 2)
    whole = DistributedDataParallel(student, process_group=mine, broadcast_buffers=False)
    base = BASES["sgd"](student.parameters())
    optimizer, shown = make("wrapper", base, whole, teacher, pairing, process_group=mine)
    for step in range(3 + rank // 2):  # the second pair makes a step more, for which the first must not wait
        train(optimizer, whole, teacher, 1, seed=10 * rank + step)
    keep("groups", shown, student)
    assert copy.deepcopy(optimizer)._rates.ranks.group is mine
    lost = pickle.loads(pickle.dumps(optimizer))
    with pytest.raises(RuntimeError, match=r"watch\(student, teacher, process_group=...\)"):
        lost.watch(student, teacher)
    lost.watch(student, teacher, process_group=mine)
    assert lost._rates.ranks.group is lost._rates.schedule.ranks.group is mine
    lost.close()
    optimizer.close()
    with pytest.raises(ValueError, match="this rank is not in"):
        make("attach", BASES["sgd"](student.parameters()), student, teacher, pairing, process_group=theirs)
    with pytest.raises(TypeError, match="process_group is a int"):
        make("attach", BASES["sgd"](student.parameters()), student, teacher, pairing, process_group=2)

    # Accumulation under no_sync, an unused branch, and fewer rows on one rank in the last batch.
    student, teacher, _ = nets()
    student.spare = torch.nn.Linear(2, 2)
    student.forward = lambda x: student.head(student.high(student.low(x)))
    pairing = lwkd.pair(student, teacher, torch.rand(1, 1, 8, 8), layers={"low": "low", "high": "high"})
    whole = DistributedDataParallel(student, broadcast_buffers=False, find_unused_parameters=True)
    optimizer, shown = make("attach", BASES["sgd"](student.parameters()), whole, teacher, pairing)
    for step in range(3):
        optimizer.zero_grad()
        with whole.no_sync():
            loss_of(whole, teacher, *next(batches(1, seed=10 * rank + step))).backward()
        rows = 2 if (rank, step) == (3, 2) else 4
        loss_of(whole, teacher, *next(batches(1, seed=50 + 10 * rank + step, rows=rows))).backward()
        optimizer.step()
    keep("accumulated", shown, student)
    before = weights(student)
    whole._join_config = whole._join_config._replace(enable=True)  # as join() sets it
    with pytest.raises(RuntimeError, match="inside join"):
        optimizer.step()
    assert same(weights(student), before)
    if rank == 0:
        torch.save({"model": student.state_dict(), "rates": shown.state_dict()}, folder / "of_four.pt")
    return found


def _two_go_on(rank: int, folder: str) -> None:
    """What four ranks saved is continued by two, one of which dies."""
    join(rank, f"{folder}/two", 2, timeout=timedelta(seconds=60))
    student, teacher, optimizer, shown = watched("attach")
    saved = torch.load(f"{folder}/of_four.pt", weights_only=True)
    student.load_state_dict({k: v for k, v in saved["model"].items() if not k.startswith("spare")})
    shown.load_state_dict(saved["rates"])
    divergences = [shown.divergences]
    for step in range(2):
        train(optimizer, student, teacher, 1, seed=10 * rank + step)
        divergences.append(shown.divergences)
    torch.save(divergences, f"{folder}/two/{rank}.pt")
    dist.barrier()
    if rank == 0:
        with pytest.raises(RuntimeError, match="statistics over 2 ranks did not come about: another rank"):
            train(optimizer, student, teacher, 1, seed=0)
        Path(folder, "said").touch()
    os._exit(0)  # one dies without a word, and the other has nobody to say goodbye to


def test_four_ranks_and_then_two(tmp_path: Path) -> None:
    found = on_ranks(_four, tmp_path, tmp_path, count=4)
    for case, together in (("groups", [(0, 1), (2, 3)]), ("accumulated", [(0, 1, 2, 3)])):
        for first, *others in together:
            assert set(found[first][case]["rates"].values()) != {1.0}
            for rank in others:
                assert found[rank][case]["divergences"] == found[first][case]["divergences"], (case, rank)
                assert found[rank][case]["rates"] == found[first][case]["rates"], (case, rank)
                assert same(found[rank][case]["parameters"], found[first][case]["parameters"]), (case, rank)
    assert found[0]["groups"]["divergences"] != found[2]["groups"]["divergences"]
    (tmp_path / "two").mkdir()
    mp.spawn(_two_go_on, args=(str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / "two" / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one == other
    assert one[0] == found[0]["accumulated"]["divergences"]
    assert one[0] != one[1] != one[2]
    assert (tmp_path / "said").exists()
    assert torch.load(tmp_path / "of_four.pt", weights_only=True)["rates"]["updates"] == 3, "the checkpoint is whole"
