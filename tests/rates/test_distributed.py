"""Two processes under DDP: each sees other data, both must hold the same rates and the same weights."""

from __future__ import annotations

import warnings
import weakref
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

from lwkd.rates import distributed as ranks


def _rank(rank: int, form: str, base: str, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    student, teacher, pairing = nets()
    parallel = DistributedDataParallel(student, broadcast_buffers=False)
    if base == "sharded":  # the parameters of a paired layer are stepped on one rank, and its rate counts on both
        sgd: Any = ZeroRedundancyOptimizer(student.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)
    else:
        sgd = BASES[base](student.parameters())
    optimizer, shown = make(form, sgd, parallel, teacher, pairing)
    for step, (x, y) in enumerate(batches(5, seed=rank)):
        optimizer.zero_grad()
        if (rank, step) == (1, 2):  # this rank has nothing to measure, and must take part all the same
            F.cross_entropy(parallel(x), y).backward()
        else:
            loss_of(parallel, teacher, x, y).backward()
        optimizer.step()
    parameters = {name: p.detach() for name, p in student.named_parameters()}
    result = {"rates": shown.rates, "passes": dict(shown.passes), "parameters": parameters, "weights": weights(student)}
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


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


def test_the_last_sum_outlives_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a thread of gloo lets go of its tensor, for which it needs the interpreter: one exit in four aborted."""

    class Work:
        def wait(self) -> None:
            self.waited = True

    made = []

    def all_reduce(_: Any, *, group: Any, async_op: bool) -> Work:
        assert async_op
        work = Work()
        made.append(weakref.ref(work))
        return work

    monkeypatch.setattr(ranks, "world_size", lambda _: 2)
    monkeypatch.setattr(ranks, "_last", None)
    monkeypatch.setattr(dist, "get_backend_config", lambda _: "cpu:gloo")
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    ranks.summed(torch.ones(3))
    assert made[0]().waited
    ranks.summed(torch.ones(3))
    assert made[0]() is None, "one is enough"
    assert made[1]().waited


@pytest.mark.parametrize(("form", "base"), [("wrapper", "sgd"), ("attach", "sgd"), ("attach", "sharded")])
def test_ranks_hold_the_same_rates(form: str, base: str, tmp_path: Path) -> None:
    mp.spawn(_rank, args=(form, base, str(tmp_path)), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert (one["passes"], other["passes"]) == ({"measured": 5}, {"measured": 4, "unmatched": 1})
    assert one["rates"] == other["rates"]
    assert set(one["rates"].values()) != {1.0}
    assert same(one["parameters"], other["parameters"])
    assert not same(one["weights"], other["weights"]), "batch statistics are each rank's own: the data did differ"
