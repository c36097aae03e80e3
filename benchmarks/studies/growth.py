r"""How the cost of the ops grows: with layers, batch, channels and map size, in time and in memory.

One size changes at a time. Beside ours stand plain PyTorch, the time to read the same bytes once, and a call that takes
the same lists and does nothing. All sizes and implementations of a panel take turns, round by round, so that whatever
else the machine does for a while is in one round of each of them. Student and teacher are alike, and all tensors of a
side are parts of one, so that reading them is one call. Memory is the peak of what torch's CPU allocator hands out
beyond the inputs, in one call after the first; it is the same in every run.

    python -m benchmarks.studies.growth

writes ``growth-MACHINE.json``, ``.png`` and ``.md`` into ``benchmarks/results``; the last two are ``growth_report.py``
applied to the first. ``--small`` runs few and small sizes, to see that it works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lwkd
from benchmarks import report
from benchmarks.harness import read, timed
from benchmarks.noop import noop
from benchmarks.studies import growth_report
from lwkd import ops, reference
from lwkd.program.profile.counters import counted
from lwkd.program.provenance import origin, quartiles
from lwkd.program.turns import take_turns
from lwkd.signals import Hessian, Jacobian, rows_of

THREADS, SEED, BATCH = 2, 1, 64
Calls = dict[str, Callable[[], object]]
Floor = Callable[[list[Tensor], list[Tensor]], Tensor]
TURN = 1e-3
"""Seconds: shorter calls are repeated within a turn, after one that is not timed, so that neither the clock nor what
other calls have left in the caches shows in them."""


@dataclass(frozen=True)
class Sizes:
    """Of a list of features alike, one of which is swept."""

    layers: int = 4
    batch: int = 8
    channels: int = 16
    side: int = 8

    @property
    def shape(self) -> tuple[int, ...]:
        """Of each feature."""
        return (self.batch, self.channels, self.side, self.side)


SWEEPS = {
    "layers": (Sizes(batch=2, channels=8, side=4), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)),
    "batch": (Sizes(channels=64, side=16), (1, 2, 4, 8, 16, 32, 64, 128, 256)),
    "channels": (Sizes(), (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)),
    "side": (Sizes(), (2, 4, 7, 14, 28, 56, 112)),
}
"""What else is fixed, and the sizes."""

TENSORS = {
    "layers": (64, (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)),
    "elements": (16, tuple(4**n for n in range(2, 11))),
}
"""Of parameters: elements a tensor where tensors are swept, tensors where their elements are."""

NETS = {"depth": (32, (4, 8, 16, 32, 64)), "width": (8, (8, 16, 32, 64, 128))}
"""Of plain nets: the width where the depth is swept, and the depth where the width is."""


def parts(count: int, shape: tuple[int, ...], channels_last: bool = False) -> tuple[Tensor, list[Tensor]]:
    """One flat tensor, and ``count`` tensors of a shape that divide it."""
    flat = torch.randn(count * torch.Size(shape).numel())
    if channels_last:
        batch, channels, *spatial = shape
        return flat, [part.view(batch, *spatial, channels).movedim(-1, 1) for part in flat.chunk(count)]
    return flat, [part.view(shape) for part in flat.chunk(count)]


def features(sizes: Sizes, channels_last: bool) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Two sides, flat and as lists."""
    flats, lists = zip(*(parts(sizes.layers, sizes.shape, channels_last) for _ in range(2)), strict=True)
    return list(flats), list(lists)


def in_turns(all_calls: Sequence[Calls], rounds: int) -> list[dict[str, dict[str, float]]]:
    """Quartiles of the milliseconds of one call, for each of several sets of implementations."""
    turns = {(which, name): _turn(call) for which, calls in enumerate(all_calls) for name, call in calls.items()}
    taken = take_turns(turns, rounds)
    found: list[dict[str, dict[str, float]]] = [{} for _ in all_calls]
    for (which, name), seconds in taken.items():
        found[which][name] = quartiles([1e3 * each for each in seconds])
    return found


def _turn(call: Callable[[], object]) -> Callable[[], float]:
    call()
    calls = max(1, min(100, int(TURN / timed(call)())))
    several = timed(call, calls=calls)

    def turn() -> float:
        if calls > 1:
            call()
        return several()

    return turn


def measured_points(sizes: list[dict[str, int]], calls: list[Calls], rounds: int) -> list[dict[str, Any]]:
    """What each size is, and what its implementations took."""
    found = in_turns(calls, rounds)
    return [{**size, "milliseconds": times} for size, times in zip(sizes, found, strict=True)]


def swept(axis: str, small: bool) -> Iterator[tuple[int, Sizes]]:
    fixed, all_sizes = SWEEPS[axis]
    for size in all_sizes[:2] if small else all_sizes:
        yield size, replace(fixed, **{axis: size})


def attention(op: str, axis: str, floor: Floor, rounds: int, small: bool) -> dict[str, Any]:
    """A panel of an op on features: by memory format where channels are swept."""
    functions = {"lwkd": getattr(ops, op), "eager": getattr(reference, op), "noop": floor}
    series = {}
    for memory in ("contiguous", "channels last") if axis == "channels" else ("contiguous",):
        facts, calls = [], []
        for size, sizes in swept(axis, small):
            flats, lists = features(sizes, memory == "channels last")
            positions = sizes.layers * sizes.batch * sizes.side**2
            facts.append({"size": size, "bytes": sum(flat.nbytes for flat in flats), "positions": positions})
            calls.append({name: partial(f, *lists) for name, f in functions.items()} | {"read": partial(read, flats)})
        series[memory] = measured_points(facts, calls, rounds)
    fixed = {name: value for name, value in vars(SWEEPS[axis][0]).items() if name != axis}
    return {"op": op, "axis": axis, "fixed": fixed, "series": series}


def smallest_call(floor: Floor, rounds: int) -> dict[str, Any]:
    """What a call of attention divergence consists of: each implementation has more around it."""
    _, (student, teacher) = features(Sizes(layers=1, batch=1, channels=4, side=2), False)
    op = partial(torch.ops.lwkd.attention_divergence, student, teacher, "features", 2.0, "jsd", (0.5, 0.5), False)

    def below() -> object:
        with torch._C._AutoDispatchBelowAutograd():
            return op()

    public = partial(ops.attention_divergence, student, teacher)
    (found,) = in_turns(
        [{"noop": partial(floor, student, teacher), "below autograd": below, "op": op, "public": public}], rounds
    )
    return found


def eager_trace(products: list[Tensor], probes: list[Tensor]) -> Tensor:
    """Products and probes are both at hand, and a layer is a tensor."""
    return torch.stack([torch.dot(product, probe) for product, probe in zip(products, probes, strict=True)])


def hutchinson(axis: str, floor: Floor, rounds: int, small: bool) -> dict[str, Any]:
    """A panel of traces: against tensors, each a layer, or against their elements."""
    other, sizes = TENSORS[axis]
    facts, all_calls = [], []
    for size in sizes[:2] if small else sizes:
        layers, elements = (size, other) if axis == "layers" else (other, size)
        flat, products = parts(layers, (elements,))
        facts.append({"size": size, "bytes": flat.nbytes})
        all_calls.append(
            {
                "lwkd": partial(ops.hutchinson_trace, products, list(range(layers)), SEED, layers),
                "eager": partial(eager_trace, products, ops.rademacher(products, SEED)),
                "noop": partial(floor, products, products),
                "read": partial(read, [flat]),
            }
        )
    fixed = {"elements": other} if axis == "layers" else {"layers": other}
    points = measured_points(facts, all_calls, rounds)
    return {"op": "hutchinson_trace", "axis": axis, "fixed": fixed, "series": {"contiguous": points}}


def peak(call: Callable[[], object]) -> int:
    """Bytes that torch's CPU allocator has handed out at most beyond what was there before; what is found is freed."""
    call()
    return counted(call, torch.device("cpu")).peak_bytes


def op_memory(axis: str, small: bool) -> dict[str, Any]:
    """Bytes beyond the inputs of the attention op, forward, and with the gradients of the student."""
    series: dict[str, list[list[int]]] = {}
    for size, sizes in swept(axis, small):
        flats, (student, teacher) = features(sizes, False)
        wanted = [feature.detach().requires_grad_() for feature in student]
        for name, function in (("lwkd", ops.attention_divergence), ("eager", reference.attention_divergence)):

            def backward(function: Any = function, wanted: Any = wanted, teacher: Any = teacher) -> object:
                return torch.autograd.grad(function(wanted, teacher).sum(), wanted)

            series.setdefault(f"{name}, forward", []).append([size, peak(partial(function, student, teacher))])
            series.setdefault(f"{name}, with backward", []).append([size, peak(backward)])
        series.setdefault("inputs", []).append([size, sum(flat.nbytes for flat in flats)])
    return {"axis": axis, "unit": "bytes", "series": series}


def plain(depth: int, width: int) -> nn.Sequential:
    """``depth`` convolutions with ReLU at full size, and a head."""
    layers: list[nn.Module] = []
    for number in range(depth):
        layers += [nn.Conv2d(width if number else 3, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def net_memory(axis: str, small: bool) -> dict[str, Any]:
    """Peak of a measurement over that of a training step, every ReLU paired with its like."""
    other, sizes = NETS[axis]
    series: dict[str, list[list[float]]] = {}
    for size in sizes[:1] if small else sizes:
        depth, width = (size, other) if axis == "depth" else (other, size)
        torch.manual_seed(0)
        student, teacher = plain(depth, width), plain(depth, width).eval()
        x, y = torch.rand(BATCH, 3, 16, 16), torch.randint(10, (BATCH,))
        layers = {str(2 * number + 1): str(2 * number + 1) for number in range(depth)}
        pairing = lwkd.pair(student, teacher, x[:2], layers=layers)

        def step(student: Any = student, teacher: Any = teacher, x: Any = x, y: Any = y) -> object:
            with torch.no_grad():
                target = teacher(x)
            loss = lwkd.losses.distillation(student(x), target, y)
            return torch.autograd.grad(loss, list(student.parameters()))

        whole = peak(step)
        for signal in (Jacobian(), Hessian()):
            options = {} if signal.memory(len(pairing)) is None else {"known": torch.ones(len(pairing))}
            count = rows_of(signal.samples, len(x))
            rows = x[:count]
            most = peak(partial(signal.measure, student, teacher, pairing, rows, seed=SEED, **options))
            series.setdefault(f"{signal.name}, {count} rows", []).append([size, most / whole])
        series.setdefault("step bytes", []).append([size, whole])
    fixed = {"width" if axis == "depth" else "depth": other, "batch": BATCH}
    return {"axis": axis, "unit": "of a training step", "fixed": fixed, "series": series}


def cache() -> int | None:
    """Bytes of the last-level cache, where Linux tells."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return 1024 * int(path.read_text().strip().removesuffix("K")) if path.exists() else None


def measured(rounds: int, small: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    # The floor's op would be compiled, which takes longer than everything small.
    floor: Floor = (lambda student, teacher: torch.empty(0)) if small else noop()
    form = (floor, rounds, small)
    panels = [attention(op, axis, *form) for op in ("attention_divergence", "attention_maps") for axis in SWEEPS]
    panels += [hutchinson(axis, *form) for axis in TENSORS]
    return {
        "last_level_cache": cache(),
        "smallest call": smallest_call(floor, rounds),
        "panels": panels,
        "memory of the op": [op_memory(axis, small) for axis in ("layers", "channels")],
        "memory of a measurement": [net_memory(axis, small) for axis in NETS],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="few and small sizes")
    parser.add_argument("--out", type=Path, default=report.folder())
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    found = measured(options.rounds, options.small)
    path = options.out / f"growth-{report.machine()}.json"
    report.write(path, {**origin(rounds=options.rounds), **found})
    for written in (path, *growth_report.write(path)):
        print(f"written to {written}")


if __name__ == "__main__":
    main()
