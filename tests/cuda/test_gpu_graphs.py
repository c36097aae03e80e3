"""CUDA graphs of every op: replayed with other values, while calls outside of them use other memory in between."""

from __future__ import annotations

import pytest
import torch
from every_op import NAMES, EveryOp
from reruns import assert_same, copies, in_a_process_of_its_own

named = pytest.mark.parametrize("name", NAMES)
dtyped = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def captured(every: EveryOp, names: list[str]) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """A graph of these ops, and the tensors that a replay fills."""
    side = torch.cuda.Stream(every.device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for name in names:
            every.calls[name]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [result for name in names for result in every.calls[name]()]
    return graph, results


@dtyped
@named
def test_replays_with_other_values(name, dtype, cuda):
    every = EveryOp(cuda, 1, dtype)
    graph, results = captured(every, [name])
    elsewhere = EveryOp(cuda, 9, dtype, "channels_last")
    for seed in (2, 3, 1):
        every.refill(seed)
        expected = copies(every.calls[name]())
        # Calls of the same op in between, some of the same shapes: their tables must not be the graph's.
        moving = EveryOp(cuda, seed, dtype)
        for result in results:
            result.fill_(0)
        graph.replay()
        elsewhere.calls[name]()
        moving.calls[name]()
        graph.replay()
        torch.cuda.synchronize()
        assert_same(results, expected, f"of seed {seed}")


@named
def test_a_graph_captured_twice(name, cuda):
    one, other = EveryOp(cuda, 1), EveryOp(cuda, 2)
    graphs = [captured(every, [name]) for every in (one, other)]
    again = captured(one, [name])
    for seed in (3, 4):
        expected = []
        for number, every in enumerate((one, other)):
            every.refill(seed + 10 * number)
            expected.append(copies(every.calls[name]()))
        for graph, _ in (graphs[1], again, graphs[0], graphs[1]):
            graph.replay()
        torch.cuda.synchronize()
        assert_same(graphs[0][1], expected[0])
        assert_same(again[1], expected[0])
        assert_same(graphs[1][1], expected[1])


def test_all_ops_in_one_graph_replayed_many_times(cuda):
    every = EveryOp(cuda, 1)
    graph, results = captured(every, list(NAMES))
    for seed in range(20):
        every.refill(seed)
        graph.replay()
        if seed % 5 == 0:
            torch.cuda.synchronize()
            assert_same(results, [result for name in NAMES for result in every.calls[name]()], f"of seed {seed}")
    torch.cuda.synchronize()


def test_what_a_graph_copies_from_outlives_the_capture(cuda):
    """Host memory that other calls get in between must not be what the graph reads at every replay."""
    every = EveryOp(cuda, 1)
    graph, results = captured(every, ["attention_divergence", "hutchinson_trace"])
    expected = [copies(every.calls[name]()) for name in ("attention_divergence", "hutchinson_trace")]
    for _ in range(50):
        EveryOp(cuda, 2).calls["attention_divergence"]()
        torch.zeros(1 << 16, dtype=torch.int64, pin_memory=True)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(results, [result for part in expected for result in part])


def test_a_capture_without_a_warm_up_is_refused(cuda):
    code = """
import torch, lwkd
s, t = torch.rand(2, 8, 9, 9, device="cuda"), torch.rand(2, 4, 9, 9, device="cuda")
torch.cuda.synchronize()
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        lwkd.ops.attention_divergence([s], [t])
except RuntimeError as error:
    print(str(error).replace(chr(10), " "))
"""
    done = in_a_process_of_its_own(code)
    assert "lwkd" in done.stdout, (done.stdout, done.stderr)
    assert "captured" in done.stdout
    assert "lwkd.warmup" in done.stdout or "outside of a capture" in done.stdout


def test_a_capture_right_after_the_warm_up(cuda):
    """No call before the capture but ``lwkd.warmup``."""
    code = """
import torch, lwkd
s, t = torch.rand(2, 8, 9, 9, device="cuda"), torch.rand(2, 4, 9, 9, device="cuda")
lwkd.warmup("cuda")
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    found = lwkd.ops.attention_divergence([s], [t])
graph.replay()
torch.cuda.synchronize()
print(torch.equal(found, lwkd.ops.attention_divergence([s], [t])))
"""
    done = in_a_process_of_its_own(code, timeout=200)
    assert done.stdout.strip() == "True", (done.stdout, done.stderr)
