"""Two processes under DDP: each sees other data, both must hold the same rates and the same weights."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from doubles import copies_deferred
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from toy import BASES, batches, loss_of, make, nets, same, weights

import lwkd
from lwkd.rates import distributed as ranks

FORMS = (("wrapper", "sgd"), ("attach", "sgd"), ("attach", "sharded"), ("wrapper", "frozen"))


def _rank(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = [_five_steps(rank, form, base) for form, base in FORMS]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _five_steps(rank: int, form: str, base: str) -> dict[str, Any]:
    student, teacher, pairing = nets()
    parallel = DistributedDataParallel(student, broadcast_buffers=False)
    if base == "sharded":  # the parameters of a paired layer are stepped on one rank, and its rate counts on both
        sgd: Any = ZeroRedundancyOptimizer(student.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)
    else:
        sgd = BASES["sgd"](student.parameters())
    policy = lwkd.Freeze(window=1, warmup=0, tolerance=0.5) if base == "frozen" else None
    optimizer, shown = make(form, sgd, parallel, teacher, pairing, policy=policy)
    for step, (x, y) in enumerate(batches(5, seed=rank)):
        optimizer.zero_grad()
        if (rank, step) == (1, 2):  # this rank has nothing to measure, and must take part all the same
            F.cross_entropy(parallel(x), y).backward()
        else:
            loss_of(parallel, teacher, x, y).backward()
        optimizer.step()
    parameters = {name: p.detach() for name, p in student.named_parameters()}
    return {
        "rates": shown.rates,
        "divergences": shown.divergences,
        "passes": dict(shown.passes),
        "parameters": parameters,
        "weights": weights(student),
    }


def _late_rank(rank: int, folder: str) -> None:
    """Copies are one step late; one rank looks at its rates all the time, the other never does."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    patch = pytest.MonkeyPatch()
    copies_deferred(patch)
    results = []
    for options in ({}, {"signal": "jacobian", "every": 1}, {"signal": "hessian", "budget": 0.5}):
        student, teacher, pairing = nets()
        parallel = DistributedDataParallel(student, broadcast_buffers=False)
        optimizer, shown = make("wrapper", BASES["sgd"](student.parameters()), parallel, teacher, pairing, **options)
        rates = shown._rates
        for step, (x, y) in enumerate(batches(9, seed=rank)):
            optimizer.zero_grad()
            if (rank, step) == (1, 2):
                F.cross_entropy(parallel(x), y).backward()
            else:
                loss_of(parallel, teacher, x, y).backward()
            if step == 7:  # infinite on one rank only: nobody measures
                before = shown.divergences
                rates.after_step(torch.tensor(float(rank)))
                assert shown.divergences == before
            else:
                optimizer.step()
            if rank == 0:
                assert shown.rates
                assert shown.overhead() >= 0
        parameters = {name: p.detach() for name, p in student.named_parameters()}
        schedule = rates.schedule.every, rates.schedule.first, int(rates.state.counts[0])
        results.append({"rates": shown.rates, "schedule": schedule, "parameters": parameters})
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_agree_when_measurements_are_late(tmp_path: Path) -> None:
    mp.spawn(_late_rank, args=(str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for one, other in zip(*results, strict=True):
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


def test_ranks_hold_the_same_rates(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    results = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for case, one, other in zip(FORMS, *results, strict=True):
        assert (one["passes"], other["passes"]) == ({"measured": 5}, {"measured": 4, "unmatched": 1}), case
        assert one["rates"] == other["rates"], case
        assert one["divergences"] == other["divergences"], case
        assert set(one["rates"].values()) != {1.0}, case
        assert same(one["parameters"], other["parameters"]), case
        assert not same(one["weights"], other["weights"]), "batch statistics are each rank's own: the data did differ"


def _step_once(net: Any, optimizer: Any, teacher: Any, seed: int, rows: int = 4) -> None:
    optimizer.zero_grad()
    loss_of(net, teacher, *next(batches(1, seed=seed, rows=rows))).backward()
    optimizer.step()


def _four(rank: int, folder: str) -> None:
    """Several checks in one spawn, because processes are slow to start."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4)
    found: dict[str, Any] = {}

    def keep(case: str, shown: Any, student: Any) -> None:
        parameters = {name: p.detach() for name, p in student.named_parameters()}
        found[case] = {"divergences": shown.divergences, "rates": shown.rates, "parameters": parameters}

    # Two models, each trained by two ranks.
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine, theirs = pairs[rank // 2], pairs[1 - rank // 2]
    student, teacher, pairing = nets(seed=rank // 2)
    parallel = DistributedDataParallel(student, process_group=mine, broadcast_buffers=False)
    base = BASES["sgd"](student.parameters())
    optimizer, shown = make("wrapper", base, parallel, teacher, pairing, process_group=mine)
    for step in range(3 + rank // 2):  # the second pair makes a step more, for which the first must not wait
        _step_once(parallel, optimizer, teacher, seed=10 * rank + step)
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
    parallel = DistributedDataParallel(student, broadcast_buffers=False, find_unused_parameters=True)
    optimizer, shown = make("attach", BASES["sgd"](student.parameters()), parallel, teacher, pairing)
    for step in range(3):
        optimizer.zero_grad()
        with parallel.no_sync():
            loss_of(parallel, teacher, *next(batches(1, seed=10 * rank + step))).backward()
        rows = 2 if (rank, step) == (3, 2) else 4
        loss_of(parallel, teacher, *next(batches(1, seed=50 + 10 * rank + step, rows=rows))).backward()
        optimizer.step()
    keep("accumulated", shown, student)
    before = weights(student)
    parallel._join_config = parallel._join_config._replace(enable=True)  # as join() sets it
    with pytest.raises(RuntimeError, match="inside join"):
        optimizer.step()
    assert same(weights(student), before)
    if rank == 0:
        torch.save({"model": student.state_dict(), "rates": shown.state_dict()}, f"{folder}/of_four.pt")
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _two_go_on(rank: int, folder: str) -> None:
    """What four ranks saved is continued by two, one of which dies."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/two", rank=rank, world_size=2, timeout=timeout)
    student, teacher, pairing = nets()
    saved = torch.load(f"{folder}/of_four.pt", weights_only=True)
    student.load_state_dict({k: v for k, v in saved["model"].items() if not k.startswith("spare")})
    optimizer, shown = make("attach", BASES["sgd"](student.parameters()), student, teacher, pairing)
    shown.load_state_dict(saved["rates"])
    divergences = [shown.divergences]
    for step in range(2):
        _step_once(student, optimizer, teacher, seed=10 * rank + step)
        divergences.append(shown.divergences)
    torch.save(divergences, f"{folder}/two_{rank}.pt")
    dist.barrier()
    if rank == 0:
        with pytest.raises(RuntimeError, match="statistics over 2 ranks did not come about: another rank"):
            _step_once(student, optimizer, teacher, seed=0)
        Path(folder, "said").touch()
    os._exit(0)  # one dies without a word, and the other has nobody to say goodbye to


def test_four_ranks_and_then_two(tmp_path: Path) -> None:
    mp.spawn(_four, args=(str(tmp_path),), nprocs=4)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(4)]
    for case, together in (("groups", [(0, 1), (2, 3)]), ("accumulated", [(0, 1, 2, 3)])):
        for first, *others in together:
            assert set(found[first][case]["rates"].values()) != {1.0}
            for rank in others:
                assert found[rank][case]["divergences"] == found[first][case]["divergences"], (case, rank)
                assert found[rank][case]["rates"] == found[first][case]["rates"], (case, rank)
                assert same(found[rank][case]["parameters"], found[first][case]["parameters"]), (case, rank)
    assert found[0]["groups"]["divergences"] != found[2]["groups"]["divergences"]
    mp.spawn(_two_go_on, args=(str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"two_{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one == other
    assert one[0] == found[0]["accumulated"]["divergences"]
    assert one[0] != one[1] != one[2]
    assert (tmp_path / "said").exists()
    assert torch.load(tmp_path / "of_four.pt", weights_only=True)["rates"]["updates"] == 3, "the checkpoint is whole"
