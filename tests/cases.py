"""Inputs over which every implementation of an attention op is compared with the reference.

A case is data: shapes of the student's and the teacher's features (one a layer), and how they are laid out.
``build`` makes the tensors, seeded by the case's name, so that every test sees the same numbers.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Case:
    """One input of the attention ops."""

    name: str
    student: Shapes
    teacher: Shapes
    memory: str = "contiguous"  # or channels_last, transposed, sliced, offset
    values: str = "normal"  # or relu, zeros, zero_channel, large, tiny, half_zero
    power: float = 2.0
    betas: tuple[float, float] = (0.5, 0.5)
    dtypes: tuple[torch.dtype, ...] = field(default=(torch.float32, torch.float16, torch.bfloat16, torch.float64))

    def __str__(self) -> str:
        return self.name


CONV = ((2, 8, 6, 6), (2, 16, 3, 3)), ((2, 32, 6, 6), (2, 24, 3, 3))
ODD = ((3, 5, 7, 5), (3, 3, 1, 9), (3, 1, 4, 4)), ((3, 7, 7, 5), (3, 2, 1, 9), (3, 17, 4, 4))
FEW = (
    ((2, 3, 5, 5), (2, 4, 3, 3), (2, 12, 3, 5), (2, 33, 2, 2)),
    ((2, 20, 5, 5), (2, 17, 3, 3), (2, 40, 3, 5), (2, 9, 2, 2)),
)
RESIZED = ((2, 6, 8, 8), (2, 4, 5, 7), (2, 4, 6, 3)), ((2, 12, 4, 4), (2, 5, 7, 5), (2, 3, 4, 9))

CASES = (
    Case("conv", *CONV),
    Case("odd", *ODD),
    Case("resized", *RESIZED),
    Case("resized_relu", *RESIZED, values="relu"),
    Case("one_sample", ((1, 8, 4, 4),), ((1, 4, 4, 4),)),
    Case("one_position", ((4, 6, 1, 1),), ((4, 3, 1, 1),)),
    Case("tokens", ((2, 12, 10), (2, 12, 10)), ((2, 20, 10), (2, 20, 7))),
    Case("volume", ((2, 4, 3, 4, 5),), ((2, 6, 2, 4, 3),)),
    Case("wide_map", ((2, 3, 40, 33),), ((2, 9, 40, 33),)),
    Case("channels_last", *CONV, memory="channels_last"),
    Case("channels_last_odd", *ODD, memory="channels_last"),
    Case("channels_last_remainders", *FEW, memory="channels_last"),
    Case("channels_last_remainders_power_3", *FEW, memory="channels_last", power=3.0),
    Case("channels_last_resized", *RESIZED, memory="channels_last"),
    Case("transposed", *CONV, memory="transposed"),
    Case("sliced", *ODD, memory="sliced"),
    Case("unaligned", *CONV, memory="offset"),
    Case("relu", *CONV, values="relu"),
    Case("zeros", *CONV, values="zeros"),
    Case("one_map_zero", *CONV, values="half_zero"),
    Case("magnitude_300", *CONV, values="large"),
    Case("magnitude_1e-6", *CONV, values="tiny"),
    Case("power_1", *CONV, power=1.0),
    Case("power_3", *CONV, power=3.0, values="relu"),
    Case("power_4", *CONV, power=4.0),
    Case("weights", *CONV, betas=(0.3, 0.7)),
    Case("many_layers", ((2, 3, 2, 2),) * 64, ((2, 5, 2, 2),) * 64),
)
FEW_LAYERS = tuple(case for case in CASES if len(case.student) < 10)
POWER_2_5 = Case("power_2.5", *CONV, values="relu", power=2.5)

# Of the kernels: maps of up to 1,024 positions are four warps', up to 4,096 sixteen warps', and beyond that they are
# split, and with them all maps of the call.
BLOCKS = (
    *(Case(f"side_{side}", ((1, 20, side, side),), ((1, 3, side, side),)) for side in (28, 64)),
    Case("beside_side_70", ((2, 2, 70, 70), (2, 4, 3, 3)), ((2, 20, 70, 70), (2, 8, 3, 3))),
)
# For a GPU: layers that are cut into many programs, and sizes of which none is a multiple of a vector.
STAGES = ((4, 64, 56, 56), (4, 128, 28, 28), (4, 512, 7, 7)), ((4, 256, 56, 56), (4, 96, 14, 14), (4, 2048, 7, 7))
LARGE = (
    Case("stages", *STAGES),
    Case("stages_channels_last", *STAGES, memory="channels_last"),
    Case("stages_unaligned", *STAGES, memory="offset"),
    Case("deep", ((1, 1000, 6, 6), (2, 96, 3, 3)), ((1, 300, 6, 6), (2, 1300, 3, 3))),
    Case("map_beyond_a_block", ((1, 2, 80, 77),), ((1, 5, 80, 77),)),
    Case("map_resized_from_beyond_a_block", ((1, 3, 90, 70),), ((1, 2, 64, 70),), memory="channels_last"),
    Case("512_layers", ((1, 2, 3, 1),) * 512, ((1, 3, 3, 1),) * 512),
)


def _values(shape: tuple[int, ...], how: str, side: str, generator: torch.Generator) -> Tensor:
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
    if how == "relu":
        return tensor.relu()
    if how == "zeros" or (how == "half_zero" and side == "student"):
        return torch.zeros_like(tensor)
    return tensor * {"large": 300.0, "tiny": 1e-6}.get(how, 1.0)


def _laid_out(tensor: Tensor, memory: str) -> Tensor:
    if memory == "channels_last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if memory == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if memory == "sliced":
        wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] * 2 + 1), float("nan"))
        wide[..., 1::2] = tensor
        return wide[..., 1::2]
    if memory == "offset":
        flat = tensor.new_full((tensor.numel() + 1,), float("nan"))
        flat[1:] = tensor.flatten()
        return flat[1:].view(tensor.shape)
    return tensor.contiguous()


def build(case: Case, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Student and teacher features of a case."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    sides = []
    for side, shapes in (("student", case.student), ("teacher", case.teacher)):
        sides.append([_laid_out(_values(s, case.values, side, generator).to(dtype), case.memory) for s in shapes])
    return sides[0], sides[1]


def probabilities(batch: int, heads: tuple[int, int], tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Row-stochastic attention of student and teacher, with some exact zeros."""
    generator = torch.Generator().manual_seed(tokens)
    pair = []
    for count in heads:
        rows = torch.randn(batch, count, tokens, tokens, generator=generator, dtype=torch.float64).mul(3).softmax(-1)
        rows = torch.where(rows < 1e-3, torch.zeros_like(rows), rows)
        pair.append((rows / rows.sum(-1, keepdim=True)).to(dtype))
    return pair[0], pair[1]
