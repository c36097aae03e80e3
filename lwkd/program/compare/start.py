"""What the student is before it is trained: fresh, a copy of the teacher, or the teacher after damage."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import lwkd
from lwkd.program.compare.recipe import Start
from lwkd.program.errors import ProgramError
from lwkd.program.seeds import seed_of

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Modules whose weights are pruned and quantized."""


def start(kind: Start, fresh: nn.Module, teacher: nn.Module, pairing: lwkd.Pairing, seed: int) -> nn.Module:
    """The student, in train mode, all its parameters trainable.

    Args:
        kind: what becomes of it.
        fresh: a student with random weights.
        teacher: is left as it is.
        pairing: of ``fresh`` with ``teacher``; says what a segment is.
        seed: of the choice of a segment, and of its fresh weights.

    Errors: :class:`~lwkd.program.errors.ProgramError` where the nets do not go with the kind.
    """
    if kind.kind == "scratch":
        return fresh
    if kind.kind == "copy":
        return _copied(fresh, teacher, kind.layers)
    student = copy.deepcopy(teacher).requires_grad_(True).train()
    if {name: p.shape for name, p in student.named_parameters()} != {n: p.shape for n, p in fresh.named_parameters()}:
        raise ProgramError(
            f"start: {kind.kind} makes the student out of the teacher, and they are different models",
            "give both the same model, or start: {kind: copy}",
            code=2,
        )
    damaged = _modules(student, pairing, kind, seed)
    if kind.kind == "replaced":  # the statistics of batch norms go with their weights
        for name, module in damaged.items():
            module.load_state_dict(fresh.get_submodule(name).state_dict())
        return student
    layers = [module for module in damaged.values() if isinstance(module, LAYERS)]
    if kind.kind == "pruned":
        _prune(layers, kind)
        return student
    for module in layers:
        parametrize.register_parametrization(module, "weight", Quantized(kind.bits))
    return student


def _modules(student: nn.Module, pairing: lwkd.Pairing, kind: Start, seed: int) -> dict[str, nn.Module]:
    """By name, the modules that hold parameters of the segment in question, or of any."""
    if kind.segment == "all":
        return dict(student.named_modules())
    segment = seed_of(seed, 2) % len(pairing) if kind.segment == "random" else int(kind.segment)
    if not 0 <= segment < len(pairing):
        raise ProgramError(f"start: segment is {segment}", f"expected 0 to {len(pairing) - 1}", code=2)
    names = {name.rpartition(".")[0] for name in pairing.pairs[segment].parameters}
    return {name: module for name, module in student.named_modules() if name in names}


def _copied(student: nn.Module, teacher: nn.Module, layers: Mapping[str, str]) -> nn.Module:
    theirs, mine = teacher.state_dict(), student.state_dict()
    sources = {name: name for name in mine}
    for to, source in layers.items():
        found = {name: source + name.removeprefix(to) for name in mine if name == to or name.startswith(f"{to}.")}
        lacking = [
            name for name, other in found.items() if other not in theirs or theirs[other].shape != mine[name].shape
        ]
        if lacking or not found:
            raise ProgramError(
                f"start: {to} of the student cannot be copied from {source} of the teacher"
                + (f": {lacking[0]} has no counterpart of its shape" if lacking else ": it has no such layer"),
                "name layers of the same shape",
                code=2,
            )
        sources |= found
    taken = {n: theirs[s] for n, s in sources.items() if s in theirs and theirs[s].shape == mine[n].shape}
    if not taken:
        raise ProgramError("start: no weight of the teacher fits the student", "give start: {kind: scratch}", code=2)
    student.load_state_dict({**mine, **taken})
    return student


def _prune(layers: Sequence[nn.Module], kind: Start) -> None:
    weights = [(module, "weight") for module in layers]
    for module, _ in weights:
        weight: Any = module.weight
        weight.data = weight.data.contiguous()  # torch prunes them as one vector
    if kind.scope == "global":
        prune.global_unstructured(weights, prune.L1Unstructured, amount=1 - kind.keep)
        return
    for module, name in weights:
        prune.l1_unstructured(module, name, amount=1 - kind.keep)


class Quantized(nn.Module):
    """Weights rounded to ``bits``, symmetric, a scale for each output channel; gradients pass straight through.

    >>> Quantized(2)(torch.tensor([[1.0, 0.4, -0.6]]))
    tensor([[ 1.,  0., -1.]])
    """

    def __init__(self, bits: int):
        super().__init__()
        self.most = 2 ** (bits - 1) - 1

    def forward(self, weight: Tensor) -> Tensor:
        """Of the shape of ``weight``, whose first dimension is the output channel."""
        scale = weight.detach().flatten(1).abs().amax(1).clamp_min(1e-12) / self.most
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -self.most, self.most)
