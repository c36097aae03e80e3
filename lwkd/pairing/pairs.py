"""Which student layer is compared with which teacher layer, and which parameters follow each pair.

Legend: a *segment* of a net is what runs behind one paired layer, up to and including the next.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lwkd.nets.layout import Layout
from lwkd.nets.names import named_modules, named_parameters, parameter_names_by_id, unwrap
from lwkd.pairing.assignment import found_pairs, given_pairs, similar_names
from lwkd.pairing.crucial_layers import MapLayer, TracedNet
from lwkd.pairing.tracing import Call, PairingError, check_visible, trace


@dataclass(frozen=True)
class Pair:
    """A student layer, the teacher layer it is compared with, and the student parameters whose rate they set.

    ``student_shape`` and ``teacher_shape`` are what the modules gave out for the example input; the layouts turn
    them into ``(B, C, *spatial)``. ``elements`` is the number of scalars in ``parameters``, tied ones counted once.
    ``teacher_parameters`` are those of the teacher's segment, found the same way, for signals that compare parameters.
    """

    student: str
    teacher: str
    student_shape: tuple[int, ...]
    teacher_shape: tuple[int, ...]
    student_layout: Layout
    teacher_layout: Layout
    parameters: tuple[str, ...]
    elements: int = 0
    teacher_parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pairing:
    """Pairs in the student's execution order, and the parameters behind the last pair (``tail``, multiplier 1).

    Holds names only, no module and no tensor: it can be printed, pickled, and used with any model of the same names.
    """

    pairs: tuple[Pair, ...]
    tail: tuple[str, ...]
    tail_elements: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the student's layers, under which rates and divergences are reported."""
        return self.student_layers

    @property
    def student_layers(self) -> tuple[str, ...]:
        """Names of the student's layers, in its execution order."""
        return tuple(pair.student for pair in self.pairs)

    @property
    def teacher_layers(self) -> tuple[str, ...]:
        """Names of the teacher's layers, one a pair."""
        return tuple(pair.teacher for pair in self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    def owners(self) -> dict[str, int]:
        """Student parameter name → index of its pair; parameters of the tail are absent."""
        return {name: index for index, pair in enumerate(self.pairs) for name in pair.parameters}

    def check(self, student: nn.Module, teacher: nn.Module) -> None:
        """Raise unless both models have the layers, and the student exactly the parameters, of this pairing.

        Raises:
            PairingError: the pairing was made for another model; the first missing name is given.
        """
        for role, model, layers in (
            ("student", student, self.student_layers),
            ("teacher", teacher, self.teacher_layers),
        ):
            check_visible(model, role)
            modules = named_modules(model)
            missing = [layer for layer in layers if layer not in modules]
            if missing:
                raise PairingError(
                    f"this pairing is for another model: the {role} ({type(unwrap(model)).__name__}) has no layer "
                    f"{missing[0]!r}{similar_names(missing[0], modules)}. Call lwkd.pair on the models in use"
                )
        paired, found = {*self.owners(), *self.tail}, named_parameters(student).keys()
        for name in sorted(paired ^ found):
            state = "has no parameter" if name in paired else "has the unpaired parameter"
            raise PairingError(
                f"this pairing is for another model: the student ({type(unwrap(student)).__name__}) {state} {name!r}. "
                "Call lwkd.pair on the models in use"
            )

    def __str__(self) -> str:
        """The table: layers, shapes, layouts, parameters owned."""
        rows = [("student layer", "shape", "teacher layer", "shape", "parameters")]
        for pair in self.pairs:
            rows.append(
                (
                    pair.student,
                    _shape_text(pair.student_shape, pair.student_layout),
                    pair.teacher,
                    _shape_text(pair.teacher_shape, pair.teacher_layout),
                    _count_text(pair.parameters, pair.elements),
                )
            )
        rows.append(("(tail, rate 1)", "", "", "", _count_text(self.tail, self.tail_elements)))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        if len(self.pairs) == 1:
            lines.append("One pair only: rates relative to the mean over layers (policy Relative) are then always 1.")
        return "\n".join(lines)


def layouts_of(pairing: Pairing) -> tuple[list[Layout], list[Layout]]:
    """Layouts of the student's and of the teacher's layers."""
    return [p.student_layout for p in pairing], [p.teacher_layout for p in pairing]


def pair(
    student: nn.Module, teacher: nn.Module, example_input: Any, *, layers: Mapping[str, str] | None = None
) -> Pairing:
    """Find the crucial layers of both nets, pair them, and give every student parameter to a pair.

    Both nets run once on the example input, in eval mode; nothing of them changes. A layer is a candidate if every
    path from input to output runs through its output, so blocks count and the insides of their branches do not. The
    crucial ones are those behind which channels or size change; a net that never changes them (ViT, BERT) gives its
    repeated blocks. The stem of a student made of blocks is left out. Crucial layers are paired in execution order,
    equal spatial size first, then equal relative depth; the rest stays without a partner.

    A parameter belongs to the segment between two pairs in which the module that holds it first begins to run; what
    begins after the last pair, and what never runs, is the tail. Tied parameters belong to their first segment.

    Args:
        student: the net to be trained; wrappers (DDP, ``torch.compile``) are removed.
        teacher: the net to learn from.
        example_input: a tensor ``(B, ...)``, a tuple of positional arguments or a dict of keyword arguments, on
            the models' device; B may be 1.
        layers: student layer → teacher layer, instead of the search; any layers that run and give a map.

    Returns:
        The pairs in the student's execution order.

    Raises:
        PairingError: nothing to pair; an unknown name; a layer that never ran, gives no map, or whose output is
            overwritten in place; a forward that fails; maps that cannot be compared.

    >>> import torch
    >>> def net(width):
    ...     return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(width, 8, 3), nn.ReLU())
    >>> print(pair(net(4), net(16), torch.zeros(1, 3, 16, 16)))
    student layer   shape    teacher layer  shape     parameters
    --------------  -------  -------------  --------  ----------------
    1               4x14x14  1              16x14x14  112 in 2 tensors
    4               8x5x5    4              8x5x5     296 in 2 tensors
    (tail, rate 1)                                    0 in 0 tensors
    """
    net_S = TracedNet(student, trace(student, "student", example_input))
    net_T = TracedNet(teacher, trace(teacher, "teacher", example_input))
    matched = found_pairs(net_S, net_T) if layers is None else given_pairs(net_S, net_T, layers)
    return _with_parameters(net_S, net_T, matched)


def _with_parameters(student: TracedNet, teacher: TracedNet, matched: list[tuple[MapLayer, MapLayer]]) -> Pairing:
    """The pairing in which every parameter follows the pair at whose layer its segment ends."""
    owned, elements = _segments(student, [layer.call.end for layer, _ in matched])
    # Teacher layers may be given in another order than they run in: segments are cut in execution order.
    ends_T = sorted({layer.call.end for _, layer in matched})
    owned_T, _ = _segments(teacher, ends_T)
    pairs = tuple(
        Pair(
            student=layer_S.call.name,
            teacher=layer_T.call.name,
            student_shape=layer_S.shape,
            teacher_shape=layer_T.shape,
            student_layout=layer_S.layout,
            teacher_layout=layer_T.layout,
            parameters=tuple(names),
            elements=count,
            teacher_parameters=tuple(owned_T[ends_T.index(layer_T.call.end)]),
        )
        for (layer_S, layer_T), names, count in zip(matched, owned, elements, strict=False)
    )
    return Pairing(pairs, tuple(owned[-1]), elements[-1])


def _segments(net: TracedNet, ends: list[int]) -> tuple[list[list[str]], list[int]]:
    """Per segment, the names of the parameters that are first used in it, and the number of scalars in them.

    Segments stop at the ``ends``; one more follows behind the last end.
    """
    calls = {call.module: call for call in net.trace.calls.values()}
    modules, parameters = named_modules(net.model), named_parameters(net.model)
    owned: list[list[str]] = [[] for _ in range(len(ends) + 1)]
    elements = [0] * len(owned)
    for aliases in parameter_names_by_id(net.model).values():
        begin = min(_first_use(name, name in net.trace.used_parameters, modules, calls) for name in aliases)
        segment = bisect_left(ends, begin)
        owned[segment].extend(aliases)
        elements[segment] += parameters[aliases[0]].numel()
    return owned, elements


def _first_use(name: str, used: bool, modules: Mapping[str, nn.Module], calls: Mapping[nn.Module, Call]) -> float:
    """When the module that holds a parameter was first called; infinity if it never was.

    Where a parameter is used although its module is never called (the output projection of a multi-head attention), the
    nearest module around it that is called counts.
    """
    holder = name.rpartition(".")[0]
    while modules[holder] not in calls:
        if not used:
            return math.inf
        holder = holder.rpartition(".")[0]
    return calls[modules[holder]].begin


def _shape_text(shape: tuple[int, ...], layout: Layout) -> str:
    plain = layout.kind == "channels_first"
    return "x".join(map(str, shape[1:])) + ("" if plain else f" ({layout.describe()})")


def _count_text(names: Sequence[str], elements: int) -> str:
    return f"{elements:,} in {len(names)} tensor{'' if len(names) == 1 else 's'}"
