r"""Traces of all layers at equal standard error: lwkd beside PyHessian, curvlinops and BackPACK.

The same net, batch, mode and loss for all. Each library is asked for probe after probe of every layer's trace; from the
spread over probes follows how many it needs until the standard error of a layer is 5 % of its trace, and from the time
of a probe how long that takes. Those that have no traces by layer are asked layer by layer, and each layer is charged
only the probes that it needs itself. BackPACK's Monte-Carlo diagonal is that of the Gauss–Newton matrix.

    pip install --group bench; python -m benchmarks.studies.peers

writes ``benchmarks/results/peers.json``.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from typing import Any

import curvlinops
import torch
from backpack import backpack, extend
from backpack.extensions import DiagGGNMC
from pyhessian import hessian as pyhessian
from torch import Tensor, nn
from torch.nn import functional as F

import lwkd
from benchmarks import harness, report
from benchmarks.training import classify, fashion_mnist
from lwkd.program.models.registry import build
from lwkd.program.provenance import quartiles
from lwkd.program.turns import take_turns

BATCH, PROBES, ROUNDS, PRECISION = 128, 8, 15, 0.05
Sample = tuple[Tensor, list[float]]
"""Traces ``(PROBES, L)`` and the seconds of a probe: one number for all layers at once, or one a layer."""


def trained() -> tuple[nn.Module, Tensor, Tensor, dict[str, list[str]]]:
    """A small convolutional net after a short training, one batch, and the parameters of its layers."""
    batches = fashion_mnist(BATCH)
    torch.manual_seed(0)
    net = build("cnn_8", classes=10, channels=1, size=28)
    classify(net, torch.optim.SGD(net.parameters(), 0.05, momentum=0.9), batches, 200)
    x, y = next(batches)
    layers: dict[str, list[str]] = {}
    for name, _ in net.named_parameters():
        layers.setdefault(name.split(".")[0], []).append(name)
    return net.eval(), x, y, layers


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What the call returns, and its seconds a probe."""
    found: list[Any] = []
    seconds = harness.timed(lambda: found.append(call()))()
    return found[0], seconds / PROBES


def implementations(
    net: nn.Module, x: Tensor, y: Tensor, layers: dict[str, list[str]]
) -> dict[str, Callable[[int], Sample]]:
    parameters = dict(net.named_parameters())

    def all_at_once(estimate: Callable[..., Any], function: Callable[[Any], Tensor]) -> Callable[[int], Sample]:
        def sample(round_: int) -> Sample:
            # One estimate of PROBES probes has the mean, not the probes: ask for them one by one, time them together.
            _, seconds = timed(lambda: estimate(net, function, layers, probes=PROBES, seed=round_ * PROBES))
            seeds = range(round_ * PROBES, (round_ + 1) * PROBES)
            return torch.stack([estimate(net, function, layers, probes=1, seed=s).trace for s in seeds]), [seconds]

        return sample

    def layer_by_layer(ask: Callable[[list[str]], list[float]]) -> Callable[[int], Sample]:
        def sample(round_: int) -> Sample:
            torch.manual_seed(round_)
            found = [timed(lambda names=names: ask(names)) for names in layers.values()]
            return torch.tensor([values for values, _ in found], dtype=torch.float64).T, [s for _, s in found]

        return sample

    def with_curvlinops(names: list[str]) -> list[float]:
        operator = curvlinops.HessianLinearOperator(
            net, nn.CrossEntropyLoss(), [parameters[n] for n in names], [(x, y)], check_deterministic=False
        )
        return [float(curvlinops.hutchinson_trace(operator, 1)) for _ in range(PROBES)]

    def with_pyhessian(names: list[str]) -> list[float]:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in names)
        try:
            return pyhessian(net, nn.CrossEntropyLoss(), data=(x, y), cuda=False).trace(maxIter=PROBES, tol=0)
        finally:
            net.zero_grad(set_to_none=True)
            net.requires_grad_(True)

    # A copy: a net that BackPACK has extended cannot go through the transforms that curvlinops uses.
    extended, loss = extend(copy.deepcopy(net)), extend(nn.CrossEntropyLoss())
    theirs = dict(extended.named_parameters())

    def with_backpack(round_: int) -> Sample:
        torch.manual_seed(round_)

        def run() -> list[list[float]]:
            rows = []
            for _ in range(PROBES):
                extended.zero_grad()
                with backpack(DiagGGNMC()):
                    loss(extended(x), y).backward()
                rows.append([sum(float(theirs[n].diag_ggn_mc.sum()) for n in names) for names in layers.values()])
            return rows

        rows, seconds = timed(run)
        return torch.tensor(rows, dtype=torch.float64), [seconds]

    return {
        "hessian lwkd": all_at_once(lwkd.hessian_trace, lambda net: F.cross_entropy(net(x), y)),
        "hessian curvlinops": layer_by_layer(with_curvlinops),
        "hessian pyhessian": layer_by_layer(with_pyhessian),
        "ggn lwkd": all_at_once(lwkd.ggn_trace, lambda net: net(x)),
        "ggn backpack": with_backpack,
    }


def numbered(sample: Callable[[int], Sample]) -> Callable[[], Sample]:
    """Called with the number of the round, which is its seed."""
    rounds = itertools.count()
    return lambda: sample(next(rounds))


def main() -> None:
    torch.set_num_threads(2)
    net, x, y, layers = trained()
    asked = {name: numbered(sample) for name, sample in implementations(net, x, y, layers).items()}
    samples = take_turns(asked, ROUNDS, warm_up=1)
    result: dict[str, Any] = {}
    for name, drawn in samples.items():
        probes = torch.cat([traces for traces, _ in drawn])
        needed = (probes.std(0) / (PRECISION * probes.mean(0))) ** 2  # probes until the standard error is small enough
        seconds = []
        for _, times in drawn:
            alone = len(times) > 1
            seconds.append(float(needed @ torch.tensor(times).double()) if alone else float(needed.max()) * times[0])
        result[name] = {
            "trace": dict(zip(layers, probes.mean(0).tolist(), strict=True)),
            "probes_needed": dict(zip(layers, needed.tolist(), strict=True)),
            "milliseconds_a_probe_of_all_layers": quartiles([1e3 * sum(times) for _, times in drawn]),
            "seconds_to_5_percent": quartiles(seconds),
        }
        print(name, json.dumps(result[name]))
    report.keep("peers", net="cnn_8", batch=BATCH, rounds=ROUNDS, implementations=result)


if __name__ == "__main__":
    main()
