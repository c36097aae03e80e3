"""FSDP2 on the CPU, two processes: identical rates, the same run as under DDP, and a checkpoint and back."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from toy import BASES, batches, loss_of, make, nets

STEPS = 4


def _sharded(form: str) -> tuple[Any, Any, Any, Any]:
    student, teacher, pairing = nets()
    mesh = init_device_mesh("cpu", (2,))
    for part in (student.low, student.high):
        fully_shard(part, mesh=mesh)
    fully_shard(student, mesh=mesh)
    return student, teacher, *make(form, BASES["sgd"](student.parameters()), student, teacher, pairing)


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

    student, teacher, _, shown = _sharded("attach")
    shown.detach()
    for signal in ("jacobian", "hessian"):
        hooks = [len(module._forward_hooks) for module in student.modules()]
        with pytest.raises(NotImplementedError, match=rf"'low.0.weight' is sharded .*signal '{signal}'"):
            make("attach", BASES["sgd"](student.parameters()), student, teacher, nets()[2], signal=signal)
        assert hooks == [len(module._forward_hooks) for module in student.modules()]

    student, teacher, pairing = nets()
    parallel = DistributedDataParallel(student, broadcast_buffers=False)
    optimizer, shown = make("wrapper", BASES["sgd"](student.parameters()), parallel, teacher, pairing)
    _train(rank, parallel, teacher, optimizer, range(STEPS))
    found["ddp"] = shown.divergences, shown.rates, _whole(student)
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
