from __future__ import annotations

import json

import pytest
import torch
from program_runs import lwkd
from torch import nn

from lwkd.nets.hooks import Hook
from lwkd.program.errors import ProgramError
from lwkd.program.profile.counters import counted
from lwkd.program.profile.inputs import ProfileSettings, made
from lwkd.program.profile.results import recommend, shortest_interval
from lwkd.program.profile.rounds import mean_overhead
from lwkd.program.profile.timed_step import PHASES, OwnTime, TimedStep
from lwkd.program.turns import take_turns
from lwkd.rates.device import HostClock
from lwkd.signals import Attention, Jacobian

CPU = torch.device("cpu")
TINY = (
    *("--teacher", "cnn_8", "--student", "cnn_4", "--batch", 4, "--image-size", 8, "--channels", 1),
    *("--threads", 1, "--seconds", 0),
)
QUARTILES = {"low", "median", "high"}


def settings(**more):
    return ProfileSettings("cnn_8", "cnn_4", batch=4, image_size=8, channels=1, **more)


class Ticks(HostClock):
    """A clock that only what is measured moves."""

    def __init__(self):
        self.now = 0.0

    def mark(self):
        return self.now


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("profile")
    result = lwkd("profile", *TINY, "--out", out, "--trace")
    assert result.exit_code == 0, result.output
    return out, result, json.loads((out / "profile.json").read_text())


def test_files_and_last_table(found):
    out, result, _ = found
    traces = {f"trace-{name}.json" for name in ("attention", "jacobian", "hessian")}
    assert {path.name for path in out.iterdir() if path.is_file()} == {"profile.json", "profile.png", *traces}
    assert all(json.loads((out / trace).read_text())["traceEvents"] for trace in traces)
    recommended = result.stdout.partition("what to set")[2]
    for name in ("attention", "jacobian", "hessian"):
        assert any(line.startswith(f"│ {name} ") for line in recommended.splitlines())


def test_json_holds_every_timed_step(found):
    figures = found[2]
    assert {"machine", "versions", "commit", "command"} <= figures.keys()
    assert (figures["teacher"], figures["student"], figures["batch"]) == ("cnn_8", "cnn_4", 4)
    assert figures["rounds"] == 3
    hinton = figures["baselines"]["hinton"]
    assert list(hinton) == ["bare", "bare again", "nothing due", "attention", "jacobian", "hessian"]
    assert list(figures["baselines"]["attention transfer"])[-1] == "attention"
    for of in hinton.values():
        assert of["step_milliseconds"].keys() == QUARTILES
        assert of["phases_milliseconds"].keys() == set(PHASES)
        assert of["peak_bytes"] > 0
    assert hinton["bare"]["phases_milliseconds"]["measuring"]["median"] == 0
    assert hinton["attention"]["target"] == 0.005
    assert hinton["jacobian"]["target"] == hinton["hessian"]["target"] == 0.03
    for of in figures["signals"].values():
        assert {"1", "2", "5", "10", "15", "20", "30", "50", "100"} <= of["overhead_by_interval"].keys()
        assert of["recommendation"]["budget"] in (0.005, 0.03)


def test_measuring_takes_memory_and_calls(found):
    hinton = found[2]["baselines"]["hinton"]
    assert hinton["bare"]["calls"] == hinton["bare again"]["calls"]
    assert hinton["bare"]["peak_bytes"] == hinton["bare again"]["peak_bytes"]
    for name in ("attention", "jacobian", "hessian"):
        assert hinton[name]["calls"] > hinton["nothing due"]["calls"]
        assert hinton[name]["peak_bytes"] >= hinton["bare"]["peak_bytes"]


def test_phases_add_up_to_the_step():
    """By construction, and in every single step; medians of phases need not."""
    nets = made(settings())
    step = TimedStep(nets, settings().training, HostClock(), signal=Attention(), every=1)
    for _ in range(3):
        took = step.run(nets)
        assert took.phases.keys() == set(PHASES)
        assert took.seconds == pytest.approx(sum(took.phases.values()))
        assert took.phases["measuring"] > 0


def test_a_slow_hook_is_counted_in_full_and_only_then():
    clock = Ticks()

    class Slow(Hook):
        def __call__(self, *_):
            clock.now += 2.0

    def users(*_):
        clock.now += 5.0

    net = nn.Linear(2, 2)
    net.register_forward_hook(Slow())
    net.register_forward_hook(users)
    own = OwnTime(clock)
    own.watch_hooks(net)
    net(torch.zeros(1, 2))
    assert clock.now == 7.0
    assert own.take() == 2.0
    assert own.take() == 0


def test_hooks_of_a_measurement_are_not_counted_in_the_next_step():
    nets = made(settings())
    step = TimedStep(nets, settings().training, HostClock(), signal=Jacobian(), every=2)
    assert step.run(nets).measured  # its own passes call the hooks of both nets, inside the optimizer's ``step``
    step._own._spans = [(0.0, 1e6) for _ in step._own._spans]
    assert step.run(nets).phases["measuring"] < 1e6


def test_calls_take_turns_in_an_order_that_changes():
    made, told = [], []
    calls = {name: lambda name=name: made.append(name) or len(made) for name in "abc"}
    found = take_turns(calls, 6, shuffled=True, tell=told.append)
    assert told == [1, 2, 3, 4, 5, 6]
    rounds = [made[at : at + 3] for at in range(0, 18, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(map(tuple, rounds))) > 1
    assert found == {name: [at + 1 for at, other in enumerate(made) if other == name] for name in "abc"}


@pytest.mark.parametrize(
    ("due", "rest", "every", "share"), [(0.3, 0.0, 10, 0.03), (0.3, 0.01, 10, 0.039), (0.3, 0.01, 1, 0.3)]
)
def test_mean_overhead(due, rest, every, share):
    assert mean_overhead(due, rest, every) == pytest.approx(share)


@pytest.mark.parametrize(
    ("due", "rest", "budget", "every"),
    [
        (0.02, 0.0, 0.03, 1),
        (0.3, 0.0, 0.03, 10),
        (0.301, 0.0, 0.03, 11),
        (0.3, 0.01, 0.03, 15),  # (0.3 + 14 · 0.01) / 15 = 0.0293…; at 14 it is 0.0307
        (0.3, 0.03, 0.03, None),
        (0.3, 0.05, 0.03, None),
    ],
)
def test_shortest_interval(due, rest, budget, every):
    assert shortest_interval(due, rest, budget) == every


@pytest.mark.parametrize("seed", range(20))
def test_shortest_interval_fits_and_the_one_before_does_not(seed):
    rest, budget, due = sorted(torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist())
    every = shortest_interval(due, rest, budget)
    assert mean_overhead(due, rest, every) <= budget * (1 + 1e-6)
    assert every == 1 or mean_overhead(due, rest, every - 1) > budget


def test_recommendation():
    due = {8: 0.1, 16: 0.2, 32: 0.4}
    most = recommend(due, 0.0, 0.03, usual=15)  # 32 rows need 14 updates
    assert most[:2] == (14, 32)
    assert most.overhead == pytest.approx(0.4 / 14)
    assert recommend(due, 0.0, 0.03, usual=10)[:2] == (7, 16)
    assert recommend(due, 0.0, 0.03, usual=2)[:2] == (4, 8)  # none is as quick as that: the quickest
    assert recommend({8: 0.1, 16: 0.1}, 0.0, 0.03, usual=2)[:2] == (4, 16)  # equally quick: more rows
    assert recommend(due, 0.05, 0.03, usual=10) is None


def test_peak_of_known_allocations():
    def step():
        first = torch.empty(1000, dtype=torch.float32)
        second = torch.empty(500, dtype=torch.float32)
        del first
        third = torch.empty(250, dtype=torch.float32)
        del second, third

    assert counted(step, CPU).peak_bytes in (6000, 6016)  # the allocator may round up


def test_calls_are_the_same_every_time():
    x = torch.rand(4)
    first, again = (counted(lambda: (x + x).mul(x), CPU) for _ in range(2))
    assert first == again
    assert first.calls == 2


def test_nets_and_global_state_stay_as_they_were():
    torch.manual_seed(3)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    nets = made(settings())
    torch.set_rng_state(before)
    TimedStep(nets, settings().training, HostClock(), signal=Attention(), every=1).run(nets)
    for net in (nets.student, nets.teacher):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(p.grad is None for p in nets.student.parameters())
    assert torch.get_num_threads() == threads


def test_profile_leaves_streams_and_threads(tmp_path):
    torch.manual_seed(3)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    assert lwkd("profile", *TINY, "--threads", 2, "--signal", "attention", "--out", tmp_path).exit_code == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


class Waves(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(2, width, 3, 2), nn.ReLU())
        self.second = nn.Sequential(nn.Conv1d(width, 2 * width, 3, 2), nn.ReLU())
        self.head = nn.Linear(2 * width, 10)

    def forward(self, wave, scale=None):
        return self.head(self.second(self.first(wave)).mean(2))


def large():
    return Waves(8)


def small():
    return Waves(4)


def waves(batch):
    return {"wave": torch.rand(batch, 2, 32)}, torch.randint(10, (batch,))


def no_labels(batch):
    return torch.rand(batch, 2, 32)


def too_few(batch):
    return torch.rand(batch - 1, 2, 32), torch.randint(10, (batch - 1,))


def fails(batch):
    return {}[batch]


OWN = ("--teacher", f"{__name__}:large", "--student", f"{__name__}:small", "--batch", 4)


def test_nets_and_inputs_of_the_user(tmp_path):
    out = ("--threads", 1, "--seconds", 0, "--out", tmp_path)
    result = lwkd("profile", *OWN, "--inputs", f"{__name__}:waves", *out)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "profile.json").read_text())["input"] == [4, 2, 32]


@pytest.mark.parametrize(
    ("options", "says", "code"),
    [
        ((*TINY, "--signal", "entropy"), "entropy", 2),
        ((*TINY, "--budget", 2), "--budget", 2),
        ((*TINY, "--every", 0), "--every", 2),
        ((*TINY, "--batch", 1), "--batch", 2),
        ((*TINY, "--device", "abacus"), "abacus", 2),
        ((*TINY, "--teacher", "cnn8"), "did you mean", 2),
        ((*TINY, "--pair", "layer9=layer1"), "layer9", 2),
        ((*OWN, "--inputs", f"{__name__}:no_labels"), "expected (x, y)", 1),
        ((*OWN, "--inputs", f"{__name__}:too_few"), "3 rows", 1),
        ((*OWN, "--inputs", f"{__name__}:missing"), "missing", 2),
        ((*OWN, "--inputs", "nowhere"), "nowhere", 2),
    ],
    ids=lambda v: " ".join(map(str, v[-2:])) if isinstance(v, tuple) else "",
)
def test_wrong_options_say_what_to_do(tmp_path, options, says, code):
    if "cnn8" in options:
        pytest.importorskip("torchvision")  # whose names are proposed
    result = lwkd("profile", *options, "--out", tmp_path)
    assert result.exit_code == code, result.output
    assert says in result.stderr
    assert "--debug" not in result.stderr  # that is what nobody had thought of
    assert not (tmp_path / "profile.json").exists()


def test_inputs_of_the_user_that_fail_are_named(tmp_path):
    result = lwkd("profile", *OWN, "--inputs", f"{__name__}:fails", "--out", tmp_path)
    assert result.exit_code == 2
    assert f"--inputs '{__name__}:fails': KeyError: 4" in result.stderr


def test_a_net_cannot_be_its_own_teacher(monkeypatch):
    net = large()
    monkeypatch.setattr("lwkd.program.profile.inputs._net", lambda *_: net)
    with pytest.raises(ProgramError, match="are the same object, or share weights"):
        made(settings())


def test_another_profile_is_replaced_only_when_asked(tmp_path):
    (tmp_path / "profile.json").write_text("{}")
    quick = (*TINY, "--signal", "attention", "--out", tmp_path)
    refused = lwkd("profile", *quick)
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr
    assert (tmp_path / "profile.json").read_text() == "{}"
    assert lwkd("profile", *quick, "--overwrite").exit_code == 0
