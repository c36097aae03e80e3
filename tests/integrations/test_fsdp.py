"""FSDP2 on the CPU, two processes: identical rates, the same run as under DDP, all signals, a checkpoint and back."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from toy import BASES, batches, loss_of, make, nets

STEPS = 4


class Counts(nn.Sequential):
    """Counts its passes, which those of a measurement are none of."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(x)


def _counting() -> tuple[Any, Any, Any]:
    student, teacher, pairing = nets()
    student.low.__class__ = Counts
    return student, teacher, pairing


def _shard(net: Any) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for part in (net.low, net.high):
        fully_shard(part, mesh=mesh)
    fully_shard(net, mesh=mesh)


def _sharded(form: str, *, teachers: bool = False, **options: Any) -> tuple[Any, Any, Any, Any]:
    student, teacher, pairing = _counting()
    _shard(student)
    if teachers:
        _shard(teacher)
    return student, teacher, *make(form, BASES["sgd"](student.parameters()), student, teacher, pairing, **options)


def _train(rank: int, student: Any, teacher: Any, optimizer: Any, steps: range) -> None:
    for x, y in list(batches(STEPS, seed=rank))[steps.start : steps.stop]:
        optimizer.zero_grad()
        loss_of(student, teacher, x, y).backward()
        optimizer.step()


def _whole(student: Any) -> dict[str, Any]:
    whole = {name: p.detach() for name, p in student.named_parameters()}
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in whole.items()}


def _rank(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for form in ("wrapper", "attach"):
        student, teacher, optimizer, shown = _sharded(form)
        _train(rank, student, teacher, optimizer, range(2))
        model, state = copy.deepcopy(get_state_dict(student, optimizer))
        rates = shown.rate_state.state_dict()
        _train(rank, student, teacher, optimizer, range(2, STEPS))
        found[form] = shown.divergences, shown.rates, _whole(student)

        student, teacher, optimizer, shown = _sharded(form)
        set_state_dict(student, optimizer, model_state_dict=model, optim_state_dict=state)
        shown.rate_state.load_state_dict(rates)
        _train(rank, student, teacher, optimizer, range(2, STEPS))
        found[f"{form}, resumed"] = shown.divergences, shown.rates, _whole(student)

    student, teacher, pairing = nets()
    parallel = DistributedDataParallel(student, broadcast_buffers=False)
    optimizer, shown = make("wrapper", BASES["sgd"](student.parameters()), parallel, teacher, pairing)
    _train(rank, parallel, teacher, optimizer, range(STEPS))
    found["ddp"] = shown.divergences, shown.rates, _whole(student)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _rank_of_passes(rank: int, folder: str, signal: str) -> None:
    """Measurements by passes of the library's own, on nets of which each rank holds a part."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    options = {"signal": signal, "every": 1}
    found: dict[str, Any] = {}
    for teachers in (False, True):
        student, teacher, optimizer, shown = _sharded("wrapper", teachers=teachers, **options)
        hooks = [list(module._forward_pre_hooks) for module in student.modules()]
        _train(rank, student, teacher, optimizer, range(STEPS))
        assert hooks == [list(module._forward_pre_hooks) for module in student.modules()]
        assert student.low.passes == STEPS
        found[f"sharded teacher: {teachers}"] = shown.divergences, shown.rates, _whole(student)

    # One rank has nothing to measure once: nobody gathers, nobody waits, and the run goes on.
    student, teacher, optimizer, shown = _sharded("attach", **options)
    seen = []
    for step, (x, y) in enumerate(batches(3, seed=rank)):
        optimizer.zero_grad()
        (F.cross_entropy(student(x), y) if (rank, step) == (1, 1) else loss_of(student, teacher, x, y)).backward()
        optimizer.step()
        seen.append(dict(shown.divergences))
    assert seen[0] == seen[1] != seen[2]
    found["a rank without a batch"] = shown.divergences, shown.rates, _whole(student)

    student, teacher, pairing = nets()
    parallel = DistributedDataParallel(student, broadcast_buffers=False)
    optimizer, shown = make("wrapper", BASES["sgd"](student.parameters()), parallel, teacher, pairing, **options)
    _train(rank, parallel, teacher, optimizer, range(STEPS))
    found["ddp"] = shown.divergences, shown.rates, _whole(student)

    student, teacher, pairing = nets()
    mesh = init_device_mesh("cpu", (2,))
    student.low[0].weight = nn.Parameter(distribute_tensor(student.low[0].weight, mesh))  # not by fully_shard
    hooks = [len(module._forward_hooks) for module in student.modules()]
    with pytest.raises(NotImplementedError, match=r"student: parameter 'low.0.weight' is sharded, and not by fully_sh"):
        make("attach", BASES["sgd"](student.parameters()), student, teacher, pairing, **options)
    assert hooks == [len(module._forward_hooks) for module in student.modules()]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_sharded_nets(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    divergences, rates, parameters = one["ddp"]
    assert set(rates.values()) != {1.0}
    for case in one:
        assert one[case][:2] == other[case][:2], case
        assert one[case][0] == pytest.approx(divergences, rel=1e-4), case
        for name, parameter in one[case][2].items():
            assert torch.equal(parameter, other[case][2][name]), (case, name)
            torch.testing.assert_close(parameter, parameters[name], rtol=1e-5, atol=1e-6)
    for form in ("wrapper", "attach"):
        assert one[form][:2] == one[f"{form}, resumed"][:2]


@pytest.mark.parametrize("signal", ["jacobian", "hessian"])
def test_passes_of_the_librarys_own_on_sharded_nets(signal: str, tmp_path: Path) -> None:
    """The same run as under DDP, where every rank has whole nets."""
    mp.spawn(_rank_of_passes, args=(str(tmp_path), signal), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    divergences, rates, parameters = one["ddp"]
    assert set(rates.values()) != {1.0}
    for case in one:
        assert one[case][:2] == other[case][:2], case
        for name, parameter in one[case][2].items():
            assert torch.equal(parameter, other[case][2][name]), (case, name)
        if case == "a rank without a batch":
            assert one[case][0] != divergences
            continue
        assert one[case][0] == pytest.approx(divergences, rel=1e-3), case
        assert one[case][1] == pytest.approx(rates, rel=1e-3), case
        for name, parameter in one[case][2].items():
            torch.testing.assert_close(parameter, parameters[name], rtol=1e-4, atol=1e-5)
