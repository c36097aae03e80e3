"""Which student layer is compared with which teacher layer, and which parameters follow each pair.

Legend: a *segment* of a net is what runs behind one paired layer, up to and including the next. The *head pair*
compares the nets' logits; its layer is the root module, whose name is ``""``.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lwkd.nets.layout import Layout
from lwkd.nets.names import named_modules, named_parameters, parameter_names_by_id, unwrap
from lwkd.nets.sharding import FSDP1, joined_by_fsdp1
from lwkd.pairing.assignment import found_pairs, given_pairs, similar_names
from lwkd.pairing.blocks import MapLayer
from lwkd.pairing.crucial_layers import TracedNet
from lwkd.pairing.tracing import Call, PairingError, check_visible, trace, unlike_in_training

HEAD = "(logits)"
"""Under this name the rate and divergence of the head pair are reported; no module can have it."""


@dataclass(frozen=True)
class Pair:
    """A student layer, the teacher layer it is compared with, and the student parameters whose rate they set.

    ``student_shape`` and ``teacher_shape`` are what the modules gave out for the example input; the layouts turn
    them into ``(B, C, *spatial)``. ``elements`` is the number of scalars in ``parameters``, tied ones counted once.
    ``teacher_parameters`` are those of the teacher's segment, found the same way, for signals that compare parameters.
    ``student`` and ``teacher`` of the head pair are ``""``, the root modules.
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
        """Names of the student's layers, under which rates and divergences are reported; the logits' is "(logits)"."""
        return tuple(name or HEAD for name in self.student_layers)

    @property
    def head(self) -> bool:
        """Whether the last pair compares the logits."""
        return any(pair.student_layout.of_logits for pair in self.pairs)

    @property
    def share(self) -> float:
        """Share of the student's parameters (their scalars) that follow a pair."""
        paired = sum(pair.elements for pair in self.pairs)
        return paired / max(1, paired + self.tail_elements)

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

    def silent_layers(self, student: nn.Module) -> tuple[str, ...]:
        """Names (as in :attr:`names`) of the layers that own no trainable parameter: their rates set nothing.

        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3), nn.ReLU())
        >>> pairing = pair(net, net, torch.zeros(1, 3, 16, 16))
        >>> net[0].requires_grad_(False) and pairing.silent_layers(net)
        ('1',)
        """
        trains = {name: p.requires_grad for name, p in named_parameters(student).items()}
        return tuple(
            name
            for name, pair in zip(self.names, self.pairs, strict=True)
            if not any(trains[parameter] for parameter in pair.parameters)
        )

    def check_signal(self, signal: Any) -> None:
        """Raise where the head pair, if there is one, cannot be measured by this signal.

        The view on the logits has their softmax for its attention map with power 2 only; self-attention probabilities
        are of layers; and the gradient of a logit with respect to the logits says nothing.

        Raises:
            ValueError: the signal's option that does not go with ``head=True``.
        """
        refused = (("source", "probabilities"), ("estimator", "output"))
        found = [f"{option}={value!r}" for option, value in refused if getattr(signal, option, None) == value]
        if getattr(signal, "power", 2.0) != 2.0:
            found.append(f"power={signal.power}")
        if self.head and found:
            raise ValueError(
                f"a pairing with head=True compares softmax outputs, which the {signal.name} signal with {found[0]} "
                "does not. Leave out that option, or pair without head=True"
            )

    def check(self, student: nn.Module, teacher: nn.Module) -> None:
        """Raise unless both models have the layers, and the student exactly the parameters, of this pairing.

        Raises:
            PairingError: the pairing was made for another model; the first missing name is given.
        """
        for role, model, layers, layouts in (
            ("student", student, self.student_layers, layouts_of(self)[0]),
            ("teacher", teacher, self.teacher_layers, layouts_of(self)[1]),
        ):
            check_visible(model, role)
            norms = [layout.before for layout in layouts if layout.before is not None]
            modules = named_modules(model)
            missing = [layer for layer in (*layers, *norms) if layer not in modules]
            if missing:
                raise PairingError(
                    f"this pairing is for another model: the {role} ({type(unwrap(model)).__name__}) has no layer "
                    f"{missing[0]!r}{similar_names(missing[0], modules)}. Call lwkd.pair on the models in use"
                )
        paired, found = {*self.owners(), *self.tail}, named_parameters(student).keys()
        for name in sorted(paired ^ found):
            if joined_by_fsdp1(found):
                raise PairingError(
                    f"the student is in {FSDP1}, which has joined the parameters of its layers to flat "
                    "ones. Make it with use_orig_params=True, or use fully_shard (FSDP2; fsdp_version=2 in Accelerate)"
                )
            state = "has no parameter" if name in paired else "has the unpaired parameter"
            raise PairingError(
                f"this pairing is for another model: the student ({type(unwrap(student)).__name__}) {state} {name!r}. "
                "Call lwkd.pair on the models in use"
            )

    def __str__(self) -> str:
        """The table: layers, shapes, layouts, parameters owned, and the share of them that follow a pair."""
        rows = [("student layer", "shape", "teacher layer", "shape", "parameters")]
        for pair in self.pairs:
            rows.append(
                (
                    pair.student or HEAD,
                    _shape_text(pair.student_shape, pair.student_layout),
                    pair.teacher or HEAD,
                    _shape_text(pair.teacher_shape, pair.teacher_layout),
                    _count_text(pair.parameters, pair.elements),
                )
            )
        rows.append(("(tail, rate 1)", "", "", "", _count_text(self.tail, self.tail_elements)))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        if len(self.pairs) == 1:
            lines.append("One pair only: policies that compare layers (Local, Relative) keep its rate at 1.")
        total = sum(pair.elements for pair in self.pairs) + self.tail_elements
        lines.append(f"{100 * self.share:.1f} % of {total:,} parameters follow a pair.")
        return "\n".join(lines)


def layouts_of(pairing: Pairing) -> tuple[list[Layout], list[Layout]]:
    """Layouts of the student's and of the teacher's layers."""
    return [p.student_layout for p in pairing], [p.teacher_layout for p in pairing]


def pair(
    student: nn.Module,
    teacher: nn.Module,
    example_input: Any,
    *,
    layers: Mapping[str, str] | None = None,
    head: bool = False,
) -> Pairing:
    """Find the crucial layers of both nets, pair them, and give every student parameter to a pair.

    Both nets run on the example input, in eval mode (and once in train mode where a layer asks which of the two it is,
    since it may give something else there); nothing of them changes. A layer is a candidate if every
    path from input to output runs through its output, so blocks count and the insides of their branches do not; the
    long skips of a U-Net do not count as paths, so the stages of its encoder and decoder do. The crucial ones are those
    behind which channels or size change; a net that never changes them (ViT, BERT) gives its repeated blocks. The stem
    of a student made of blocks is left out. The last crucial layers of both nets are a pair; the others are paired in
    execution order, equal spatial size first, then equal relative depth, then what is left in between. Where only one
    of the nets has stages, blocks of the other at even depths stand for them.

    A parameter belongs to the segment between two pairs in which the module that holds it first begins to run; what
    begins after the last pair, and what never runs, is the tail. A pair of attention modules, named in ``layers``, also
    owns what follows in its block (the feed-forward part). Stages behind the last pair that give maps of a single
    position, where nothing can be compared, follow that pair. Tied parameters belong to their first segment.

    Args:
        student: the net to be trained; wrappers (DDP, ``torch.compile``) are removed.
        teacher: the net to learn from.
        example_input: a tensor ``(B, ...)``, a tuple of positional arguments or a dict of keyword arguments, on
            the models' device; B may be 1.
        layers: student layer → teacher layer, instead of the search; any layers that run and give a map.
        head: the logits of both nets are one more pair, whose parameters are those behind the last map. Their softmax
            outputs are compared like maps; with the attention signal this is the JSD of the softmax outputs in nats,
            mean over the positions of dense logits. A field or key ``logits`` of the output counts, else its only
            floating-point tensor with two dimensions or more.

    Returns:
        The pairs in the student's execution order.

    Raises:
        PairingError: nothing to pair; an unknown name; a layer that never ran, gives no map, or whose output is
            overwritten in place; a forward that fails; maps that cannot be compared; ``head=True`` and no logits of one
            shape.

    >>> import torch
    >>> def net(width):
    ...     return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(width, 8, 3), nn.ReLU())
    >>> print(pair(net(4), net(16), torch.zeros(1, 3, 16, 16)))
    student layer   shape    teacher layer  shape     parameters
    --------------  -------  -------------  --------  ----------------
    1               4x14x14  1              16x14x14  112 in 2 tensors
    4               8x5x5    4              8x5x5     296 in 2 tensors
    (tail, rate 1)                                    0 in 0 tensors
    100.0 % of 408 parameters follow a pair.
    """
    net_S = TracedNet(student, trace(student, "student", example_input))
    net_T = TracedNet(teacher, trace(teacher, "teacher", example_input))
    matched = _search(net_S, net_T, example_input) if layers is None else given_pairs(net_S, net_T, layers)
    ends_S, ends_T = (_ends(net, side) for net, side in zip((net_S, net_T), zip(*matched, strict=True), strict=True))
    compared = [(s.call.name, s.shape, s.layout, t.call.name, t.shape, t.layout) for s, t in matched]
    if head:
        compared.append(_logits_of(net_S, net_T))
        ends_S.append(net_S.trace.calls[""].end)
        ends_T.append(net_T.trace.calls[""].end)
    elif layers is None:
        ends_S[-1], ends_T[-1] = net_S.end_of_stages(matched[-1][0]), net_T.end_of_stages(matched[-1][1])
    return _with_parameters(net_S, net_T, compared, ends_S, ends_T)


def _search(student: TracedNet, teacher: TracedNet, example_input: Any) -> list[tuple[MapLayer, MapLayer]]:
    """Crucial layers of both nets, matched, without those that give something else in training."""
    while True:
        matched, found = found_pairs(student, teacher), False
        for net, layers in zip((student, teacher), zip(*matched, strict=True), strict=True):
            calls = [layer.call for layer in layers]
            unlike = unlike_in_training(net.model, net.trace.role, example_input, calls)
            net.left_out |= unlike
            found = found or bool(unlike)
        if not found:
            return matched


Compared = tuple[str, tuple[int, ...], Layout, str, tuple[int, ...], Layout]
"""Name, shape and layout of what is compared, of the student and of the teacher."""


def _logits_of(student: TracedNet, teacher: TracedNet) -> Compared:
    """The head pair.

    Raises:
        PairingError: no logits, or of unlike shapes.
    """
    (shape_S, layout_S), (shape_T, layout_T) = student.logits_layout(), teacher.logits_layout()
    if (shape_S, layout_S) != (shape_T, layout_T):
        raise PairingError(
            f"head=True compares logits of one shape; the student ({student.class_name}) gives {shape_S}, the teacher "
            f"({teacher.class_name}) {shape_T}"
            + ("" if shape_S != shape_T else ", with the classes at different dimensions")
            + ". Give both nets the same classes, or leave out head=True"
        )
    return "", shape_S, layout_S, "", shape_T, layout_T


def _with_parameters(
    student: TracedNet, teacher: TracedNet, compared: list[Compared], ends_S: list[int], ends_T: list[int]
) -> Pairing:
    """The pairing in which every parameter follows the pair at whose end its segment ends."""
    owned, elements = _segments(student, ends_S)
    # Teacher layers may be given in another order than they run in: segments are cut in execution order.
    order_T = sorted(set(ends_T))
    owned_T, _ = _segments(teacher, order_T)
    pairs = tuple(
        Pair(
            student=name_S,
            teacher=name_T,
            student_shape=shape_S,
            teacher_shape=shape_T,
            student_layout=layout_S,
            teacher_layout=layout_T,
            parameters=tuple(names),
            elements=count,
            teacher_parameters=tuple(owned_T[order_T.index(end_T)]),
        )
        for (name_S, shape_S, layout_S, name_T, shape_T, layout_T), end_T, names, count in zip(
            compared, ends_T, owned, elements, strict=False
        )
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


def _ends(net: TracedNet, layers: Sequence[MapLayer]) -> list[int]:
    """When the segment of each paired layer ends: with the layer, or with the block around an attention module."""
    names = [layer.call.name for layer in layers]
    return [_block_of(net, layer.call, names).end if layer.call.attends else layer.call.end for layer in layers]


def _block_of(net: TracedNet, call: Call, paired: Sequence[str]) -> Call:
    """The block around an attention module, whose feed-forward part learns with it; the module itself if there is none.

    The outermost module with a place in a list that holds no other paired layer, and no second module of this name but
    for the numbers in it: a stage that holds several such blocks is none.
    """

    def alike(inside: str) -> list[str]:
        same = re.sub(r"\d+", "*", call.name)
        return [n for n in net.trace.calls if n.startswith(inside) and re.sub(r"\d+", "*", n) == same]

    parts = call.name.split(".")
    for depth in range(1, len(parts)):
        name = ".".join(parts[:depth])
        alone = sum(other.startswith(name + ".") for other in paired) == 1 and len(alike(name + ".")) == 1
        if parts[depth - 1].isdigit() and name in net.trace.calls and alone:
            return net.trace.calls[name]
    return call


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
    row = [str(size) for dim, size in enumerate(shape) if dim != layout.batch_dim]
    return "x".join(row) + ("" if plain else f" ({layout.describe()})")


def _count_text(names: Sequence[str], elements: int) -> str:
    return f"{elements:,} in {len(names)} tensor{'' if len(names) == 1 else 's'}"
