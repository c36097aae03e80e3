"""How the interface of a kernel is described, and how a variant of it is named.

A variant is a kernel whose absent pointers, constants and number of warps are chosen. It is named by a text that holds
these in the order of the kernel's signature, the warps last:

    attention_tiles_bwd grad_ptr=None ELEMENT=bf16 CHANNELS_LAST=1 ALIGNED=1 TANGENT=0 POWER=2 ROWS=32 COLUMNS=64 …

Constants are whole numbers or words; the words of ELEMENT and SUMS are element types. How a variant is tuned (TUNING)
is not in its name: whoever launches it need not know. Needs neither Triton nor torch.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Setting = Mapping[str, "int | str | None"]
"""What is chosen for a variant: its constants and ``num_warps``, and None for every pointer that is absent."""

TUNING = ("STAGES", "maxnreg")
"""Choices that change how fast a variant is and nothing else. STAGES: steps of its loop that are read ahead, with
asynchronous copies into shared memory; 1 for loads into registers, as many as ptxas lets be on their way. maxnreg: the
registers a thread that ptxas aims at."""

BYTES = {"i32": 4, "i64": 8, "fp32": 4}
"""Sizes of run-time parameters; a pointer has 8 bytes."""


@dataclass(frozen=True)
class Parameter:
    """A run-time parameter."""

    name: str
    type: str
    """``*`` and an element type for a pointer, else one of BYTES."""
    hinted: bool
    """Whether 16 divides the address: true of what lwkd allocates, not of a tensor that is the user's own."""

    @property
    def bytes(self) -> int:
        """Bytes of the argument."""
        return 8 if self.type.startswith("*") else BYTES[self.type]


@dataclass(frozen=True)
class Kernel:
    """A kernel's interface, in the order of its signature: run-time parameters, then constants."""

    name: str
    module: str
    """File in kernels/, without its ending."""
    parameters: tuple[Parameter, ...]
    constants: tuple[str, ...]
    settings: tuple[Setting, ...]
    """What is chosen for each variant."""

    @property
    def variants(self) -> tuple[Variant, ...]:
        """All variants, the commonest first."""
        return tuple(Variant(self, setting) for setting in self.settings)


@dataclass(frozen=True)
class Variant:
    """A kernel and what is chosen for it."""

    kernel: Kernel
    setting: Setting

    @property
    def text(self) -> str:
        """The variant's name."""
        return variant_text(self.kernel, self.setting)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The run-time parameters that the variant has."""
        return tuple(parameter for parameter in self.kernel.parameters if parameter.name not in self.setting)

    @property
    def registers(self) -> int | None:
        """Registers a thread that it is compiled for; None leaves them to ptxas."""
        stated = self.setting.get("maxnreg")
        return None if stated is None else int(stated)

    @property
    def warps(self) -> int:
        """Warps of a program, as asked for."""
        return int(self.setting["num_warps"] or 0)


def variant_text(kernel: Kernel, setting: Setting) -> str:
    """The name of a variant.

    Raises:
        ValueError: a constant or ``num_warps`` is missing, or something is set that the kernel does not have.
    """
    pointers = [parameter.name for parameter in kernel.parameters if parameter.type.startswith("*")]
    needed = (*kernel.constants, "num_warps")
    odd = set(needed) - set(setting) | set(setting) - {*needed, *pointers, *TUNING}
    if odd:
        raise ValueError(
            f"{kernel.name} takes {', '.join(needed)} and absent pointers; wrong: {', '.join(sorted(odd))}"
        )
    named = [name for name in (*pointers, *needed) if name in setting and name not in TUNING]
    return " ".join((kernel.name, *(f"{name}={setting[name]}" for name in named)))


def kernel(
    name: str, module: str, parameters: str, constants: str, settings: Sequence[Setting], anywhere: str = ""
) -> Kernel:
    """A kernel whose parameters are ``name:type name:type …``; ``anywhere`` names the pointers that are not hinted."""
    loose = anywhere.split()
    taken = tuple(
        Parameter(called, kind, kind.startswith("*") and called not in loose)
        for called, kind in (word.split(":") for word in parameters.split())
    )
    return Kernel(name, module, taken, tuple(constants.split()), tuple(settings))


def combine(*axes: Sequence[Setting]) -> list[Setting]:
    """One choice of every axis, in all combinations, the last axis fastest."""
    return [functools.reduce(operator.or_, map(dict, choice)) for choice in itertools.product(*axes)]


def each(name: str, *values: int | str) -> list[Setting]:
    """An axis for combine: one constant, with each of these values."""
    return [{name: value} for value in values]


def optional(pointer: str) -> list[Setting]:
    """An axis for combine: the pointer absent, or present."""
    return [{pointer: None}, {}]
