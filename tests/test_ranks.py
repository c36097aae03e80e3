"""Two processes under DDP: each sees other data, both must hold the same rates and the same weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from toy import BASES, FORMS, batches, loss_of, make, nets, same, weights


def _rank(rank: int, form: str, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    student, teacher, pairing = nets()
    parallel = DistributedDataParallel(student, broadcast_buffers=False)
    optimizer, shown = make(form, BASES["sgd"](student.parameters()), parallel, teacher, pairing)
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


@pytest.mark.parametrize("form", FORMS)
def test_ranks_hold_the_same_rates(form: str, tmp_path: Path) -> None:
    mp.spawn(_rank, args=(form, str(tmp_path)), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert (one["passes"], other["passes"]) == ({"measured": 5}, {"measured": 4, "unmatched": 1})
    assert one["rates"] == other["rates"]
    assert set(one["rates"].values()) != {1.0}
    assert same(one["parameters"], other["parameters"])
    assert not same(one["weights"], other["weights"]), "batch statistics are each rank's own: the data did differ"
