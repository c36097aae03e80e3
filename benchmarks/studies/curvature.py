r"""Hessian or Gauss–Newton: which of the two ranks the layers better when it is measured on a few rows?

Small nets on Fashion-MNIST, early and late in training. At each point the traces of both curvatures are computed
exactly on the whole batch (every basis vector for the Hessian, every column of the factor for the Gauss–Newton
matrix), and with them the exact divergence of every layer. Then the signal measures as it does in training, on a few
rows with one probe, averages over 1 and over 10 measurements on new batches, and its ranking of the layers is compared
with the exact one of the same curvature (Spearman, mean over draws).

    python -m benchmarks.studies.curvature

writes ``benchmarks/results/curvature.json``.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

import lwkd
from benchmarks import report
from benchmarks.training import distil, with_trained_teacher
from lwkd.nets.functional_module import FunctionalModule
from lwkd.nets.inputs import Inputs
from lwkd.reference import curvature_distance
from lwkd.signals import Hessian

LAYERS = [f"layer{stage}.{index}" for stage in (1, 2, 3) for index in (2, 5)]
POINTS = {"early": 10, "late": 1000}
DRAWS, AVERAGED, CHUNK = 40, (1, 10), 64


def exact_traces(net: nn.Module, owned: list[tuple[str, ...]], x: Tensor, target: Tensor | None) -> dict[str, Tensor]:
    """Per parameter, the exact traces (L,) of the Hessian of the cross-entropy and of its Gauss–Newton matrix.

    Without a target it is the net's own softmax: the residual is zero, and both are the same.
    """
    twin = FunctionalModule(net, "net")
    names = [name for layer in owned for name in twin.resolve_names(layer)]
    tensors = [twin.parameters[name].double().requires_grad_() for name in names]
    state = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in twin.state().items()}
    state.update(zip(names, tensors, strict=True))
    logits = torch.func.functional_call(net, state, Inputs.of(x.double()).args)
    flat_sizes = [tensor.numel() for tensor in tensors]
    layer_of = torch.tensor([i for i, layer in enumerate(owned) for _ in twin.resolve_names(layer)])
    counts = torch.zeros(len(owned)).index_add(0, layer_of, torch.tensor(flat_sizes, dtype=torch.float32)).double()

    ggn = torch.zeros(len(owned), dtype=torch.float64)
    p = torch.softmax(logits.detach(), 1)
    factor = torch.diag_embed(p.sqrt()) - p.unsqueeze(2) * p.sqrt().unsqueeze(1)  # (B, K, K): columns
    for row, column in itertools.product(range(len(x)), range(p.shape[1])):
        u = torch.zeros_like(p)
        u[row] = factor[row, :, column] / len(x) ** 0.5
        grads = torch.autograd.grad(logits, tensors, u, retain_graph=True)
        ggn.index_add_(0, layer_of, torch.stack([g.square().sum() for g in grads]))

    if target is None:
        return {"hessian": ggn / counts, "ggn": ggn / counts}
    loss = F.cross_entropy(logits, target.double())
    gradients = torch.autograd.grad(loss, tensors, create_graph=True)
    hessian = torch.zeros(len(owned), dtype=torch.float64)
    for index, (gradient, tensor) in enumerate(zip(gradients, tensors, strict=True)):
        for begin in range(0, tensor.numel(), CHUNK):
            end = min(begin + CHUNK, tensor.numel())
            basis = torch.eye(tensor.numel(), dtype=torch.float64)[begin:end].view(-1, *tensor.shape)
            rows = torch.autograd.grad(gradient, tensor, basis, retain_graph=True, is_grads_batched=True)[0]
            hessian[layer_of[index]] += rows.flatten(1)[:, begin:end].diagonal().sum()
    return {"hessian": hessian / counts, "ggn": ggn / counts}


def ranked(estimates: Tensor, exact: Tensor) -> float:
    """Mean Spearman correlation of rows (draws, L) with the exact divergences; constant rows count as 0."""
    found = [spearmanr(row.numpy(), exact.numpy()).statistic if row.unique().numel() > 1 else 0.0 for row in estimates]
    return sum(found) / len(found)


def compared(student: nn.Module, teacher: nn.Module, pairing: lwkd.Pairing, source: Any, rows: int) -> dict[str, Any]:
    x, _ = next(source)
    with torch.no_grad():
        target = torch.softmax(teacher(x), 1)
    exact_S = exact_traces(student, [pair.parameters for pair in pairing], x, target)
    exact_T = exact_traces(teacher, [pair.teacher_parameters for pair in pairing], x, None)
    result: dict[str, Any] = {}
    for curvature in ("hessian", "ggn"):
        signal = Hessian(curvature=curvature)
        h = torch.stack([exact_S[curvature], exact_T[curvature]], dim=1)
        exact = curvature_distance(h)
        entry: dict[str, Any] = {
            "exact_student": h[:, 0].tolist(),
            "exact_teacher": h[:, 1].tolist(),
            "exact_divergence": exact.tolist(),
            "negative_layers": int((h < 0).any(1).sum()),
        }
        draws = torch.stack(
            [
                signal.measure(student, teacher, pairing, next(source)[0][:rows], seed=draw)
                for draw in range(DRAWS * max(AVERAGED))
            ]
        )
        for averaged in AVERAGED:
            means = draws[: DRAWS * averaged].view(DRAWS, averaged, *draws.shape[1:]).mean(1)
            entry[f"rank_correlation_of_{averaged}"] = ranked(
                torch.stack([curvature_distance(m) for m in means]), exact
            )
        result[curvature] = entry
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rows", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(2)
    runs = []
    for seed in range(options.seeds):
        layers = {name: name for name in LAYERS}
        nets = with_trained_teacher(("cnn_8", "cnn_4"), options.batch, seed, 1000, layers)
        student, teacher, _, source = nets
        optimizer, done = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9), 0
        for point, updates in POINTS.items():
            for _ in range(updates - done):
                distil(student, teacher, optimizer, *next(source))
            done = updates
            run = {"seed": seed, "point": point, "updates": updates}
            run.update(compared(*nets, options.rows))
            runs.append(run)
            for curvature in ("hessian", "ggn"):
                shown = {k: v for k, v in run[curvature].items() if k.startswith(("rank", "neg"))}
                print(seed, point, curvature, shown, flush=True)
    report.keep("curvature", batch=options.batch, rows=options.rows, draws=DRAWS, layers=LAYERS, runs=runs)


if __name__ == "__main__":
    main()
