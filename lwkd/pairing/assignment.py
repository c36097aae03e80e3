"""The pairs of layers: crucial layers of both nets that are matched, or layers that the user named."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence

from lwkd.nets.names import canonical, named_modules
from lwkd.pairing.crucial_layers import MapLayer, TracedNet
from lwkd.pairing.tracing import PairingError

_NAME_THEM = 'Name the layers yourself: lwkd.pair(..., layers={"student layer": "teacher layer"})'


def found_pairs(student: TracedNet, teacher: TracedNet) -> list[tuple[MapLayer, MapLayer]]:
    """Crucial layers of both nets, matched.

    Raises:
        PairingError: no path from input to output, or no two layers that can be compared; says what was found.
    """
    for net in (student, teacher):
        if not net.has_path:
            raise PairingError(
                f"no differentiable path leads from the {net.trace.role}'s input to its output, so its crucial layers "
                f"cannot be found. {_NAME_THEM}"
            )
    students, teachers = student.crucial_layers(), teacher.crucial_layers()
    found = match_layers(students, teachers)
    if not found:
        apart = "; their maps have different numbers of dimensions" if students and teachers else ""
        raise PairingError(
            f"nothing to pair{apart}. Found in the student: {_found_text(student, students)}; in the teacher: "
            f"{_found_text(teacher, teachers)}. {_NAME_THEM}"
        )
    return found


def match_layers(students: Sequence[MapLayer], teachers: Sequence[MapLayer]) -> list[tuple[MapLayer, MapLayer]]:
    """As many pairs as possible, in the order of both nets; of equally many those closest in size, then in depth.

    Layers of equal size go together. A layer whose size the other net does not have may go with another such layer
    of the same number of spatial dimensions. Depth is relative: among n layers of one size the i-th is at i/n, so
    that the last goes with the last.
    """
    shared = {layer.size for layer in students} & {layer.size for layer in teachers}
    groups_S, groups_T = ([x.size if x.size in shared else len(x.size) for x in side] for side in (students, teachers))
    depths_S, depths_T = (_relative_depths([layer.size for layer in side]) for side in (students, teachers))
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


def _relative_depths(sizes: Sequence[tuple[int, ...]]) -> list[float]:
    """Relative depth of each layer among those of its size."""
    return [sizes[: i + 1].count(size) / sizes.count(size) for i, size in enumerate(sizes)]


def given_pairs(student: TracedNet, teacher: TracedNet, layers: Mapping[str, str]) -> list[tuple[MapLayer, MapLayer]]:
    """The layers that the user named, in the student's execution order.

    Raises:
        PairingError: a name that is unknown, a layer that cannot be used, or maps that cannot be compared.
    """
    if not layers:
        raise PairingError("nothing to pair: layers is empty. Name at least one pair, or leave layers out")
    found: list[tuple[MapLayer, MapLayer]] = []
    for name_S, name_T in layers.items():
        layer_S, layer_T = _layer_named(student, name_S), _layer_named(teacher, name_T)
        if len(layer_S.size) != len(layer_T.size):
            raise PairingError(
                f"{name_S!r} and {name_T!r} cannot be compared: the student's map is {_map_text(layer_S)}, "
                f"the teacher's {_map_text(layer_T)}. Name two layers whose maps have the same number of dimensions"
            )
        if any(layer_S.call is other.call for other, _ in found):
            raise PairingError(f"the student's layer {name_S!r} is named twice in layers; name each layer once")
        found.append((layer_S, layer_T))
    return sorted(found, key=lambda pair: pair[0].call.end)


def _layer_named(net: TracedNet, name: str) -> MapLayer:
    """The layer of this name; raises PairingError with the reason if it cannot be used."""
    role, modules = net.trace.role, named_modules(net.model)
    wanted = canonical(name)
    if wanted not in modules:
        wanted = canonical(name, net.model)
    if wanted not in modules or not wanted:
        raise PairingError(f"the {role} ({net.class_name}) has no layer {name!r}{similar_names(wanted, modules)}")
    call = next((call for call in net.trace.calls.values() if call.module is modules[wanted]), None)
    if call is None:
        raise PairingError(
            f"the {role}'s layer {name!r} was never executed in the forward of the example input (eval mode). "
            "Name one that runs"
        )
    if call.overwritten_by is not None:
        other = repr(call.overwritten_by)
        by = f"{other}: name {other}" if call.overwritten_by else "code outside any layer: name another"
        raise PairingError(f"the output of the {role}'s layer {name!r} is overwritten in place by {by} instead")
    layer = net.map_layer(call)
    if layer is None and call.shape is None:
        inside = [
            c.name for c in net.trace.calls.values() if call.begin < c.begin and c.end < call.end and net.map_layer(c)
        ]
        hint = f". Its child {inside[-1]!r} gives one: name that" if inside else ""
        raise PairingError(
            f"the {role}'s layer {name!r} does not give a floating-point tensor but a {call.output_type}{hint}"
        )
    if layer is None:
        raise PairingError(
            f"the {role}'s layer {name!r} gives shape {call.shape}, which is not a map of more than one position over "
            f"the batch of {net.trace.batch}: expected (B, C, *spatial), (B, *spatial, C) or (B, N, C)"
        )
    return layer


def similar_names(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: known names that are similar, else the outermost ones.

    >>> similar_names("layr1", ["", "layer1", "fc"])
    "; did you mean 'layer1'?"
    >>> similar_names("encoder", ["", "layer1", "layer1.conv", "fc"])
    '; its outermost layers are layer1, fc'
    """
    names = [k for k in known if k]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; its outermost layers are {', '.join(k for k in names if '.' not in k) or 'none'}"


def _map_text(layer: MapLayer) -> str:
    return f"{'x'.join(map(str, layer.map_shape))} ({layer.layout.describe()})"


def _found_text(net: TracedNet, layers: Sequence[MapLayer]) -> str:
    """What was found in a net, for the message that nothing could be paired."""
    if layers:
        return ", ".join(f"{layer.call.name} {_map_text(layer)}" for layer in layers)
    shapes = [f"{call.name} {call.shape}" for call in net.trace.calls.values() if call.name and call.shape is not None]
    shown = ", ".join(shapes[:8]) + (", ..." if len(shapes) > 8 else "")
    return f"no map of more than one position that every path runs through (outputs: {shown or 'none'})"
