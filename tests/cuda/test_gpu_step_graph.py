"""A whole training step in a CUDA graph, rates included, against the same steps without one."""

from __future__ import annotations

import pytest
import torch
from training import Run, assert_alike, started

pytestmark = pytest.mark.usefixtures("exact_arithmetic", "cuda")

WARM_UP, REPLAYS = 3, 10


def captured(run: Run) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
    """Warm-up steps on a side stream, then the capture of one that reads its batch from these tensors."""
    x, y = run.batch(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(WARM_UP):
            for static, given in zip((x, y), run.batch(step), strict=True):
                static.copy_(given)
            run.step(x, y)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    run.optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        run.step(x, y)
    return graph, x, y


@pytest.mark.parametrize("base", ["sgd fused", "adamw fused"])
def test_replays_equal_steps_without_a_graph(base: str) -> None:
    lr = 0.02
    # Without capturable AdamW refuses to be captured, with or without rates.
    options = {"capturable": base.startswith("adamw")}
    in_graph, plain = (started(base, lr=torch.tensor(lr, device="cuda"), **options) for _ in range(2))
    graph, x, y = captured(in_graph)
    for step in range(WARM_UP):
        plain.step(*plain.batch(step))
    assert in_graph.shown()[0] == pytest.approx(plain.shown()[0], rel=1e-4), "a capture runs nothing"
    seen = set()
    for step in range(WARM_UP, WARM_UP + REPLAYS):
        for static, given in zip((x, y), in_graph.batch(step), strict=True):
            static.copy_(given)
        graph.replay()
        plain.step(*plain.batch(step))
        rates, divergences = in_graph.shown()
        seen.add(tuple(rates))
        assert rates == pytest.approx(plain.shown()[0], rel=1e-3), f"replay of step {step}"
        assert divergences == pytest.approx(plain.shown()[1], rel=1e-3, abs=1e-6), f"replay of step {step}"
    assert len(seen) == REPLAYS, "the rates move with every replay"
    assert_alike(in_graph.student, plain.student, 5e-3)


def test_steps_without_the_graph_after_it() -> None:
    run, plain = (started(lr=torch.tensor(0.02, device="cuda")) for _ in range(2))
    graph, x, y = captured(run)
    for step in range(WARM_UP):
        plain.step(*plain.batch(step))
    for step in range(WARM_UP, WARM_UP + 6):
        given = run.batch(step)
        if step % 2:
            run.step(*given)
        else:
            x.copy_(given[0])
            y.copy_(given[1])
            graph.replay()
        plain.step(*given)
    assert run.shown()[0] == pytest.approx(plain.shown()[0], rel=1e-3)
    assert_alike(run.student, plain.student, 5e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"signal": "jacobian"}, "jacobian"),
        ({"every": 2}, "every"),
        ({"lr": 0.05}, "tensor"),
    ],
)
def test_what_cannot_be_captured_says_so(options, words: str) -> None:
    run = started(**{"lr": torch.tensor(0.02, device="cuda"), **options})
    with pytest.raises(RuntimeError, match=rf"captured.*{words}"):
        captured(run)
