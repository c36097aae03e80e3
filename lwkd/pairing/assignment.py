"""The pairs of layers: found on the spine of both nets, or named by the user and checked."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence

from lwkd.nets.names import canonical, named_modules
from lwkd.pairing.crucial_layers import Layer, Net
from lwkd.pairing.tracing import PairingError

_GIVE = 'Name the layers yourself: lwkd.pair(..., layers={"student layer": "teacher layer"})'


def found_pairs(student: Net, teacher: Net) -> list[tuple[Layer, Layer]]:
    """Crucial layers of both nets, matched.

    Raises:
        PairingError: no path from input to output, or no two layers that can be compared; says what was found.
    """
    for net in (student, teacher):
        if not net.on_spine:
            raise PairingError(
                f"no differentiable path leads from the {net.trace.role}'s input to its output, so its crucial layers "
                f"cannot be found. {_GIVE}"
            )
    students, teachers = student.crucial_layers(), teacher.crucial_layers()
    found = match(students, teachers)
    if not found:
        apart = "; their maps have different numbers of dimensions" if students and teachers else ""
        raise PairingError(
            f"nothing to pair{apart}. Found in the student: {_listed(student, students)}; in the teacher: "
            f"{_listed(teacher, teachers)}. {_GIVE}"
        )
    return found


def match(students: Sequence[Layer], teachers: Sequence[Layer]) -> list[tuple[Layer, Layer]]:
    """As many pairs as possible in the order of both nets; among those the closest in size, then in depth.

    Layers of equal size go together. A layer whose size the other net does not have may go with another such layer
    of the same number of spatial dimensions. Depth is relative: among n layers of one size the i-th is at i/n, so
    that the last goes with the last.
    """
    shared = {layer.size for layer in students} & {layer.size for layer in teachers}
    groups_S, groups_T = ([x.size if x.size in shared else len(x.size) for x in side] for side in (students, teachers))
    depths_S, depths_T = (_depths([layer.size for layer in side]) for side in (students, teachers))
    # best[i][j]: (pairs, −distance in size, −distance in depth) of the first i students and j teachers.
    best = [[(0, 0, 0.0)] * (len(teachers) + 1) for _ in range(len(students) + 1)]

    def paired(i: int, j: int) -> tuple[int, int, float]:
        if groups_S[i] != groups_T[j]:
            return (-1, 0, 0.0)
        pairs, size, depth = best[i][j]
        distance = abs(math.log2(math.prod(students[i].size) / math.prod(teachers[j].size)))
        return (pairs + 1, size - round(100 * distance), depth - abs(depths_S[i] - depths_T[j]))

    for i in range(len(students)):
        for j in range(len(teachers)):
            best[i + 1][j + 1] = max(paired(i, j), best[i][j + 1], best[i + 1][j])
    found, i, j = [], len(students), len(teachers)
    while i and j:
        if best[i][j] == paired(i - 1, j - 1):  # first, so that ties go to the deeper layers
            i, j = i - 1, j - 1
            found.append((students[i], teachers[j]))
        elif best[i][j] == best[i - 1][j]:
            i -= 1
        else:
            j -= 1
    return found[::-1]


def _depths(sizes: Sequence[tuple[int, ...]]) -> list[float]:
    """Relative depth of each layer among those of its size."""
    return [sizes[: i + 1].count(size) / sizes.count(size) for i, size in enumerate(sizes)]


def given_pairs(student: Net, teacher: Net, layers: Mapping[str, str]) -> list[tuple[Layer, Layer]]:
    """The layers that the user named, in the student's execution order.

    Raises:
        PairingError: a name that is unknown, a layer that cannot be used, or maps that cannot be compared.
    """
    if not layers:
        raise PairingError("nothing to pair: layers is empty. Name at least one pair, or leave layers out")
    found: list[tuple[Layer, Layer]] = []
    for name_S, name_T in layers.items():
        layer_S, layer_T = _named(student, name_S), _named(teacher, name_T)
        if len(layer_S.size) != len(layer_T.size):
            raise PairingError(
                f"{name_S!r} and {name_T!r} cannot be compared: the student's map is {_map(layer_S)}, the teacher's "
                f"{_map(layer_T)}. Name two layers whose maps have the same number of dimensions"
            )
        if any(layer_S.call is other.call for other, _ in found):
            raise PairingError(f"the student's layer {name_S!r} is named twice in layers; name each layer once")
        found.append((layer_S, layer_T))
    return sorted(found, key=lambda pair: pair[0].call.end)


def _named(net: Net, name: str) -> Layer:
    """The layer of this name, or why it cannot be used."""
    role, modules = net.trace.role, named_modules(net.model)
    wanted = canonical(name)
    if wanted not in modules:
        wanted = canonical(name, net.model)
    if wanted not in modules or not wanted:
        raise PairingError(f"the {role} ({net.title}) has no layer {name!r}{near(wanted, modules)}")
    call = next((call for call in net.trace.calls.values() if call.module is modules[wanted]), None)
    if call is None:
        raise PairingError(
            f"the {role}'s layer {name!r} was never executed in the forward of the example input (eval mode). "
            "Name one that runs"
        )
    if call.changed_by is not None:
        by = (
            f"{call.changed_by!r}: name {call.changed_by!r}"
            if call.changed_by
            else "code outside any layer: name another"
        )
        raise PairingError(f"the output of the {role}'s layer {name!r} is overwritten in place by {by} instead")
    layer = net.layer(call)
    if layer is None and call.shape is None:
        inside = [
            c.name for c in net.trace.calls.values() if call.begin < c.begin and c.end < call.end and net.layer(c)
        ]
        hint = f". Its child {inside[-1]!r} gives one: name that" if inside else ""
        raise PairingError(
            f"the {role}'s layer {name!r} does not give a floating-point tensor but a {call.found}{hint}"
        )
    if layer is None:
        raise PairingError(
            f"the {role}'s layer {name!r} gives shape {call.shape}, which is not a map of more than one position over "
            f"the batch of {net.trace.batch}: expected (B, C, *spatial), (B, *spatial, C) or (B, N, C)"
        )
    return layer


def near(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: known names that are similar, else the outermost ones.

    >>> near("layr1", ["", "layer1", "fc"])
    "; did you mean 'layer1'?"
    >>> near("encoder", ["", "layer1", "layer1.conv", "fc"])
    '; its outermost layers are layer1, fc'
    """
    names = [k for k in known if k]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; its outermost layers are {', '.join(k for k in names if '.' not in k) or 'none'}"


def _map(layer: Layer) -> str:
    return f"{'x'.join(map(str, layer.stage))} ({layer.layout.describe()})"


def _listed(net: Net, layers: Sequence[Layer]) -> str:
    """What was found in a net, for the message that nothing could be paired."""
    if layers:
        return ", ".join(f"{layer.call.name} {_map(layer)}" for layer in layers)
    shapes = [f"{call.name} {call.shape}" for call in net.trace.calls.values() if call.name and call.shape is not None]
    shown = ", ".join(shapes[:8]) + (", ..." if len(shapes) > 8 else "")
    return f"no map of more than one position that every path runs through (outputs: {shown or 'none'})"
