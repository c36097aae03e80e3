"""FSDP2 on the CPU, two processes: identical rates, the same run as under DDP, all signals, a checkpoint and back.

And FSDP1, of which only the training passes are measured.
"""

from __future__ import annotations

import itertools
import warnings
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from rank_runs import on_ranks, parallel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from toy import BASES, FORMS, batches, loss_of, make, nets, train, train_on

import lwkd
from lwkd.nets.feature_hooks import FeatureHooks
from lwkd.nets.names import canonical
from lwkd.nets.sharding import warn_of_shares

STEPS = 4


class Counts(nn.Sequential):
    """Counts its passes, which those of a measurement are none of."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(x)


def _shard(net: Any) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for part in (net.low, net.high):
        fully_shard(part, mesh=mesh)
    fully_shard(net, mesh=mesh)


def _sharded(form: str, base: str = "sgd", *, teachers: bool = False, **options: Any) -> tuple[Any, Any, Any, Any]:
    student, teacher, pairing = nets()
    student.low.__class__ = Counts
    _shard(student)
    if teachers:
        _shard(teacher)
    return student, teacher, *make(form, BASES[base](student.parameters()), student, teacher, pairing, **options)


def _found(student: Any, shown: Any) -> tuple[Any, Any, dict[str, Any]]:
    whole = {name: p.detach() for name, p in student.named_parameters()}
    parameters = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in whole.items()}
    return shown.divergences, shown.rates, parameters


def _under_ddp(rank: int, base: str = "sgd", **options: Any) -> tuple[Any, Any, dict[str, Any]]:
    student, whole, teacher, optimizer, shown = parallel("wrapper", BASES[base], **options)
    train(optimizer, whole, teacher, STEPS, seed=rank)
    return _found(student, shown)


def _under_fsdp1(rank: int) -> tuple[Any, Any, dict[str, Any]]:
    def wrapped(net: nn.Module, *, use_orig_params: bool = True) -> nn.Module:
        policy, cpu = ModuleWrapPolicy({nn.Sequential}), torch.device("cpu")
        return FullyShardedDataParallel(net, auto_wrap_policy=policy, device_id=cpu, use_orig_params=use_orig_params)

    student, teacher, pairing = nets()
    whole = wrapped(student)
    optimizer, shown = make("wrapper", BASES["sgd"](whole.parameters()), whole, teacher, pairing)
    train(optimizer, whole, teacher, STEPS, seed=rank)
    with FullyShardedDataParallel.summon_full_params(whole):
        parameters = {canonical(name): p.detach().clone() for name, p in whole.named_parameters()}

    base = BASES["sgd"](whole.parameters())
    for signal in ("jacobian", "hessian"):
        with pytest.raises(NotImplementedError, match=r"the student is in FullyShardedDataP.*Use signal='attention"):
            make("attach", base, whole, teacher, pairing, signal=signal)
    with pytest.raises(lwkd.PairingError, match=r"is in FullyShardedDataParallel.*call lwkd.pair before"):
        lwkd.pair(whole, teacher, torch.rand(1, 1, 8, 8))
    student, _, _ = nets()
    flat = wrapped(student, use_orig_params=False)
    with pytest.raises(lwkd.PairingError, match=r"joined the parameters.*Make it with use_orig_params=True"):
        make("attach", BASES["sgd"](flat.parameters()), flat, teacher, pairing)
    return shown.divergences, shown.rates, parameters


RESUMED = ("sgd", {}), ("adamw_foreach", {"signal": "hessian", "every": 1})


def _rank(rank: int, folder: str) -> dict[str, Any]:
    data = list(batches(STEPS, seed=rank))
    found: dict[str, Any] = {}
    for form, (base, options) in itertools.product(FORMS, RESUMED):
        case = f"{form}, {base}"
        student, teacher, optimizer, shown = _sharded(form, base, **options)
        train_on(optimizer, student, teacher, data[:2])
        model, state = get_state_dict(student, optimizer)
        saved = {"model": model, "optimizer": state, "rates": shown.rate_state}
        dcp.save(saved, checkpoint_id=f"{folder}/{case}")
        train_on(optimizer, student, teacher, data[2:])
        found[case] = _found(student, shown)

        student, teacher, optimizer, shown = _sharded(form, base, **options)
        model, state = get_state_dict(student, optimizer)
        saved = {"model": model, "optimizer": state, "rates": shown.rate_state}
        dcp.load(saved, checkpoint_id=f"{folder}/{case}")
        set_state_dict(student, optimizer, model_state_dict=model, optim_state_dict=state)
        train_on(optimizer, student, teacher, data[2:])
        found[f"{case}, resumed"] = _found(student, shown)
    for base, options in RESUMED:
        found[f"ddp, {base}"] = _under_ddp(rank, base, **options)
    found["fsdp1, sgd"] = _under_fsdp1(rank)
    return found


def _rank_of_passes(rank: int, signal: str) -> dict[str, Any]:
    """Measurements by passes of the library's own, on nets of which each rank holds a part."""
    options = {"signal": signal, "every": 1}
    found: dict[str, Any] = {}
    for teachers in (False, True):
        student, teacher, optimizer, shown = _sharded("wrapper", teachers=teachers, **options)
        hooks = [list(module._forward_pre_hooks) for module in student.modules()]
        train(optimizer, student, teacher, STEPS, seed=rank)
        assert hooks == [list(module._forward_pre_hooks) for module in student.modules()]
        assert student.low.passes == STEPS
        found[f"sharded teacher: {teachers}"] = _found(student, shown)

    # One rank has nothing to measure once: nobody gathers, nobody waits, and the run goes on.
    student, teacher, optimizer, shown = _sharded("attach", **options)
    seen = []
    for step, (x, y) in enumerate(batches(3, seed=rank)):
        optimizer.zero_grad()
        (F.cross_entropy(student(x), y) if (rank, step) == (1, 1) else loss_of(student, teacher, x, y)).backward()
        optimizer.step()
        seen.append(dict(shown.divergences))
    assert seen[0] == seen[1] != seen[2]
    found["a rank without a batch"] = _found(student, shown)
    found["ddp"] = _under_ddp(rank, **options)

    student, teacher, pairing = nets()
    mesh = init_device_mesh("cpu", (2,))
    student.low[0].weight = nn.Parameter(distribute_tensor(student.low[0].weight, mesh))  # not by fully_shard
    hooks = [len(module._forward_hooks) for module in student.modules()]
    with pytest.raises(NotImplementedError, match=r"student: parameter 'low.0.weight' is sharded, and not by fully_sh"):
        make("attach", BASES["sgd"](student.parameters()), student, teacher, pairing, **options)
    assert hooks == [len(module._forward_hooks) for module in student.modules()]
    return found


def _pairs(rank: int) -> list[bool]:
    """Whether nets that are sharded already, and were called, are paired as whole ones are."""
    student, teacher, pairing = nets()
    same = []
    for net in (student, teacher):
        _shard(net)
        for _ in range(2):
            again = lwkd.pair(student, teacher, torch.rand(1, 1, 8, 8), layers={"low": "low", "high": "high"})
            same.append(again == pairing)
            with torch.no_grad():
                net(torch.rand(1, 1, 8, 8))
    return same


def test_nets_are_paired_after_they_were_sharded(tmp_path: Path) -> None:
    assert on_ranks(_pairs, tmp_path) == [[True] * 4] * 2


def _gathered_before(rank: int) -> list[dict[str, float]]:
    """How far parameters move, as shares of the bare update: in one group, and with a paired layer in the root's.

    A pass without gradients leaves the root gathered, whose parameters are then other objects than the optimizer's.
    """
    moved = []
    for parts in ((), ("high",)):
        student, teacher, pairing = nets()
        for part in parts:
            fully_shard(getattr(student, part), mesh=init_device_mesh("cpu", (2,)))
        fully_shard(student, mesh=init_device_mesh("cpu", (2,)))
        base = torch.optim.SGD(student.parameters(), lr=0.1)
        with torch.no_grad():
            student.eval()(torch.rand(1, 1, 8, 8))
        optimizer, _ = make("wrapper", base, student.train(), teacher, pairing, policy=lwkd.Constant([0.25, 0.5]))
        x, y = next(iter(batches(1, seed=rank)))
        loss_of(student, teacher, x, y).backward()
        weights = {name: p for name, p in student.named_parameters() if name.endswith("0.weight")}
        before = {name: (p.full_tensor().clone(), p.grad.full_tensor()) for name, p in weights.items()}
        optimizer.step()
        shares = {
            name: ((old - weights[name].full_tensor()) / (0.1 * grad)).median() for name, (old, grad) in before.items()
        }
        moved.append({name: round(float(share), 3) for name, share in shares.items()})
    return moved


def test_parameters_gathered_by_a_pass_before_the_wrapper_have_their_rates(tmp_path: Path) -> None:
    expected = {"low.0.weight": 0.25, "high.0.weight": 0.5}
    assert on_ranks(_gathered_before, tmp_path) == [[expected, expected]] * 2


class Distributes(nn.Module):
    """Gives what it is called with as a tensor of all ranks."""

    def __init__(self, placement: Any) -> None:
        super().__init__()
        self.placement = placement

    def forward(self, x: Tensor) -> Any:
        return distribute_tensor(x, init_device_mesh("cpu", (2,)), [self.placement])


def _distributed_outputs(rank: int) -> bool:
    x, found = torch.arange(24.0).view(2, 3, 4), []
    for placement in (Replicate(), Shard(2)):
        net = nn.Sequential(Distributes(placement))
        hooks = FeatureHooks(net, ["0"], None, "teacher")
        shared = placement == Shard(2)
        with pytest.raises(NotImplementedError, match="'0' gives out a share") if shared else nullcontext():
            net(x)
            found = hooks.features()
        hooks.close()
    return type(found[0]) is Tensor and torch.equal(found[0], x)


def _plans(rank: int) -> list[bool]:
    """Which plans are warned of: attention and MLP of Megatron, and with norms that are sequence parallel."""
    warned = []
    for more in ({}, {"norm": SequenceParallel(), "down": RowwiseParallel(output_layouts=Shard(1))}):
        net = nn.Sequential(
            OrderedDict(norm=nn.LayerNorm(4), up=nn.Linear(4, 8), down=nn.Linear(8, 4), head=nn.Linear(4, 2))
        )
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel(), **more}
        parallelize_module(net, init_device_mesh("cpu", (2,)), plan)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            warn_of_shares(net, "student")
        warned.append(any("looks sequence parallel ('norm'" in str(one.message) for one in found))
    return warned


def test_a_net_that_looks_sequence_parallel_is_warned_of(tmp_path: Path) -> None:
    assert on_ranks(_plans, tmp_path) == [[False, True]] * 2


def test_outputs_of_tensor_parallel_layers_are_whole_or_refused(tmp_path: Path) -> None:
    assert on_ranks(_distributed_outputs, tmp_path) == [True, True]


def test_sharded_nets(tmp_path: Path) -> None:
    one, other = on_ranks(_rank, tmp_path, str(tmp_path))
    for case in one:
        divergences, rates, parameters = one[f"ddp, {case.split(', ')[1]}"]
        assert set(rates.values()) != {1.0}
        assert one[case][:2] == other[case][:2], case
        assert one[case][0] == pytest.approx(divergences, rel=1e-4), case
        whole = one[case.removesuffix(", resumed")]
        assert one[case][:2] == whole[:2], case
        for name, parameter in one[case][2].items():
            assert torch.equal(parameter, other[case][2][name]), (case, name)
            assert torch.equal(parameter, whole[2][name]), (case, name)
            torch.testing.assert_close(parameter, parameters[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("signal", ["jacobian", "hessian"])
def test_passes_of_the_librarys_own_on_sharded_nets(signal: str, tmp_path: Path) -> None:
    """The same run as under DDP, where every rank has whole nets."""
    one, other = on_ranks(_rank_of_passes, tmp_path, signal)
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
