"""The same bits on every run, on whatever stream and thread, and whatever else the device is doing."""

from __future__ import annotations

import threading

import pytest
import torch
from backends import DEVICE
from every_op import NAMES, EveryOp
from reruns import assert_same, copies, in_a_process_of_its_own
from training import SIGNALS, started

RUNS = 20
named = pytest.mark.parametrize("name", NAMES)
dtyped = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def keep_busy(device, stream):
    """Work that fills the multiprocessors and the memory on another stream, for some milliseconds."""
    with torch.cuda.stream(stream):
        a = torch.randn(2048, 2048, device=device)
        for _ in range(8):
            a = (a @ a).div_(64)


@dtyped
@named
def test_the_same_bits_on_every_run(name, dtype, poisoned):
    every = EveryOp(DEVICE, 1, dtype, "channels_last")
    expected = copies(every.calls[name]())
    for run in range(RUNS):
        assert_same(every.calls[name](), expected, f"of run {run}")


@dtyped
@named
def test_the_same_bits_while_another_stream_is_busy(name, dtype, cuda):
    every, other = EveryOp(cuda, 2, dtype), torch.cuda.Stream(cuda)
    expected = copies(every.calls[name]())
    for run in range(RUNS):
        keep_busy(cuda, other)
        assert_same(every.calls[name](), expected, f"of run {run}")
    torch.cuda.synchronize()


@named
def test_a_side_stream(name, cuda):
    """Inputs become what they are on the side stream, late: on any other stream an op would read what was before."""
    every, side = EveryOp(cuda, 3), torch.cuda.Stream(cuda)
    every.refill(4)
    expected = copies(every.calls[name]())
    every.refill(3)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        every.refill(4)
        found = every.calls[name]()
    side.synchronize()
    assert_same(found, expected)


@named
def test_two_streams_at_once(name, cuda):
    streams = [torch.cuda.Stream(cuda) for _ in range(2)]
    every = [EveryOp(cuda, seed) for seed in (5, 6)]
    expected = [copies(one.calls[name]()) for one in every]
    torch.cuda.synchronize()
    found = [[], []]
    for _ in range(RUNS):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[number].append(every[number].calls[name]())
    torch.cuda.synchronize()
    for number in range(2):
        for run, result in enumerate(found[number]):
            assert_same(result, expected[number], f"of run {run} on stream {number}")


def test_two_threads_at_once(cuda):
    """Every op from two Python threads, each on a stream of its own, with inputs that move between calls."""
    expected = {seed: {n: copies(c()) for n, c in EveryOp(cuda, seed).calls.items()} for seed in (7, 8)}
    torch.cuda.synchronize()
    problems: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            stream = torch.cuda.Stream(cuda)
            with torch.cuda.stream(stream):
                kept = []
                for _ in range(RUNS // 2):
                    every = EveryOp(cuda, seed)
                    for name, call in every.calls.items():
                        found = call()
                        stream.synchronize()
                        assert_same(found, expected[seed][name], f"of {name}")
                    kept.append(every)  # the next one lies elsewhere
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (7, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    if problems:
        raise problems[0]


def test_a_backward_that_is_the_first_thing_on_its_thread(cuda):
    """Autograd's thread has no current context when our backward is the first of all to run there."""
    code = """
import torch, lwkd
student = torch.rand(2, 8, 9, 9, device="cuda", requires_grad=True)
found = lwkd.ops.attention_divergence([student], [torch.rand(2, 4, 9, 9, device="cuda")])
(gradient,) = torch.autograd.grad(found, student, torch.ones(1, device="cuda"))
assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
print("done")
"""
    done = in_a_process_of_its_own(code)
    assert done.stdout.strip() == "done", done.stderr


def test_a_process_ends_quietly(cuda):
    """Kernels are never unloaded, and plans are never freed: the driver may be gone before the interpreter is."""
    code = "import every_op; every_op.main()"
    done = in_a_process_of_its_own(code)
    assert done.returncode == 0, done.stderr
    assert "rror" not in done.stderr


@pytest.mark.parametrize("first", ["student", "teacher"])
@pytest.mark.parametrize("signal", SIGNALS)
def test_a_net_on_a_side_stream(signal, first, cuda):
    """The user waits for it after both passes, and lwkd measures before; its memory goes back to the side stream."""

    def train(stream: torch.cuda.Stream) -> torch.Tensor:
        run, shown = started("sgd plain", cuda, signal=signal), []
        for seed in range(4):
            x, _ = run.batch(seed, rows=64)
            run.optimizer.zero_grad()
            nets = (run.student, run.teacher) if first == "student" else (run.teacher, run.student)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), torch.set_grad_enabled(first == "student"):
                torch.cuda._sleep(20_000_000)
                one = nets[0](x)
            with torch.set_grad_enabled(first == "teacher"):
                other = nets[1](x)
            torch.cuda.current_stream().wait_stream(stream)
            one.record_stream(torch.cuda.current_stream())
            (one - other).square().mean().backward()
            del one, other
            with torch.cuda.stream(stream):  # whatever was given back too early is overwritten
                torch.full((1 << 20,), float("nan"), device=cuda)
            run.optimizer.step()
            shown.append(run.shown())
        return torch.tensor(shown)

    alone = train(torch.cuda.current_stream(cuda))
    torch.testing.assert_close(train(torch.cuda.Stream(cuda)), alone, rtol=1e-3, atol=1e-6)
