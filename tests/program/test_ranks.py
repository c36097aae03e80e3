"""lwkd distill under torchrun: two processes, one run, one folder."""

from __future__ import annotations

import contextlib

import pytest
from program_runs import TINY, distill, rows, same, state, trained
from python_runs import python

from lwkd.program.console import Console
from lwkd.program.distill import ranks
from lwkd.program.distill.settings import Settings
from lwkd.program.errors import ProgramError

RUN = ("--augment", "crop", "--optimizer", "sgd", "--lr", "0.02")


def torchrun(out, *more, processes=2):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes)
    command = ("-m", "lwkd.program", "distill", *TINY, *RUN, "--out", out, *more)
    return python(*launcher, *command, timeout=600, OMP_NUM_THREADS="1")


def test_two_processes_train_one_run(tmp_path):
    out, alone = tmp_path / "two", tmp_path / "alone"
    together = torchrun(out)
    assert together.returncode == 0, together.stderr
    assert together.stdout.count("epoch 2 of 2") == 1, "the first rank alone speaks"
    trained(alone, *RUN)
    assert {p.name for p in out.iterdir()} == {p.name for p in alone.iterdir()}
    assert rows(out / "epochs.csv")[0].keys() == rows(alone / "epochs.csv")[0].keys()
    assert len(rows(out / "epochs.csv")) == len(rows(alone / "epochs.csv"))
    # The same pictures in the same updates; batch norms see half of each batch, so that the losses are near only.
    for two, one in zip(rows(out / "epochs.csv"), rows(alone / "epochs.csv"), strict=True):
        assert float(two["train_loss"]) == pytest.approx(float(one["train_loss"]), rel=0.1)
    assert len(state(out, "layerwise")["others"]) == 1
    assert rows(out / "layers.csv")

    # As if the run had been broken off in the last epoch.
    whole, last = state(out, "layerwise"), out / "checkpoints" / "layerwise.pt"
    last.unlink()
    resumed = torchrun(out, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing in epoch 2" in resumed.stdout
    again = state(out, "layerwise")
    for part in ("model", "optimizer", "scheduler", "random", "others"):
        assert same(again[part], whole[part]), part

    last.unlink()
    fewer = distill(out, *RUN, "--resume")
    assert fewer.exit_code == 0, fewer.output
    assert "2 ranks then, 1 now" in fewer.stderr
    assert state(out, "layerwise")["done"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [(Settings(batch_size=33), "33 cannot be shared by 2 ranks"), (Settings(device="cuda:1"), "names one device")],
)
def test_what_ranks_cannot_share_is_refused(settings, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ProgramError, match=message), ranks.joined(settings, Console()):
        pass


@pytest.mark.parametrize("fails", [False, True])
def test_gloo_gets_time_to_let_go_before_a_rank_leaves(fails, monkeypatch):
    """Of bare processes with DistributedDataParallel that end right behind an exchange of objects 3 in 32 abort."""
    done = []
    for name, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks.time, "sleep", lambda seconds: done.append(f"{seconds >= 0.1}"))
    for name in ("init_process_group", "destroy_process_group", "get_rank"):
        monkeypatch.setattr(ranks.dist, name, lambda *_, name=name: done.append(name) or 0)
    with pytest.raises(ProgramError) if fails else contextlib.nullcontext(), ranks.joined(Settings(), Console()):
        done.append("the run")
        if fails:
            raise ProgramError("no data", "get some")
    assert done == ["init_process_group", "get_rank", "the run", "True", "destroy_process_group"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fails", [False, True])
def test_what_the_first_rank_makes_the_others_get_or_they_end_as_it_does(rank, fails, monkeypatch):
    told = []

    def make():
        if fails:
            raise ProgramError("no data", "get some", code=2)
        return "data"

    def broadcast(values):
        told.append(list(values))
        if rank:
            values[:] = [None, 2] if fails else ["data", None]

    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(ranks, "own", lambda: rank)
    monkeypatch.setattr(ranks.dist, "broadcast_object_list", broadcast)
    if not fails:
        assert ranks.by_first(make) == "data"
    else:
        with pytest.raises(SystemExit if rank else ProgramError) as caught:
            ranks.by_first(make)
        assert caught.value.code == 2
    assert told == [[None, None] if rank else [None, 2] if fails else ["data", None]]
