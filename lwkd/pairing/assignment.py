"""The pairs of layers: crucial layers of both nets that are matched, or layers that the user named."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence

from lwkd.nets.names import canonical, named_modules
from lwkd.pairing.blocks import MapLayer
from lwkd.pairing.crucial_layers import TracedNet
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
    towers_S, towers_T = student.crucial_towers(bare=True), teacher.crucial_towers(bare=False)
    bare_T = teacher.crucial_towers(bare=True)
    # The last with the last: an encoder that only one net has stays alone.
    count = min(len(towers_S), len(towers_T), len(bare_T))
    found = []
    last = (side[len(side) - count :] for side in (towers_S, towers_T, bare_T))
    for students, teachers, learned in zip(*last, strict=True):
        if _of_one_size(students) != _of_one_size(teachers):
            found += match_stages(students, learned)
        else:
            pools = sum(layer.call.end > learned[-1].call.end for layer in teachers)
            found += match_layers(students, teachers, pools)
    if not found:
        students, teachers = ([layer for tower in towers for layer in tower] for towers in (towers_S, towers_T))
        apart = "; their maps have different numbers of dimensions" if students and teachers else ""
        raise PairingError(
            f"nothing to pair{apart}. Found in the student: {_found_text(student, students)}; in the teacher: "
            f"{_found_text(teacher, teachers)}. {_NAME_THEM}"
        )
    return found


Score = tuple[int, int, int, float]
"""(pairs of equal size, pairs, minus the distance in size, minus the distance in depth); larger is better."""


def match_layers(
    students: Sequence[MapLayer], teachers: Sequence[MapLayer], pools: int = 0
) -> list[tuple[MapLayer, MapLayer]]:
    """The last of both nets, and before them as many pairs as possible, in the order of both nets.

    Layers of equal size go together first, and so do layers whose sizes the other net does not have. A student's layer
    of such a size that is left goes with any teacher's layer that is left. Of equally many pairs those closest in size,
    then in depth. Depth is relative: among n layers of one
    size the i-th is at i/n, so that the last goes with the last. Maps of different numbers of dimensions never go
    together.

    Args:
        students: in execution order.
        teachers: in execution order.
        pools: number of the last teachers that only give the output of those before them at a smaller size; they are
            left out unless more pairs come of them.
    """
    fewer = [_matched(students, teachers[: len(teachers) - left_out]) for left_out in reversed(range(pools + 1))]
    return max(fewer, key=lambda matched: matched[0])[1]


def _matched(
    students: Sequence[MapLayer], teachers: Sequence[MapLayer]
) -> tuple[Score, list[tuple[MapLayer, MapLayer]]]:
    """What :func:`match_layers` finds where the last of both are a pair."""
    last_S, last_T = _last_of_one_rank(students, teachers)
    if last_S < 0:
        return (-1, 0, 0, 0.0), []
    shared = {layer.size for layer in students[:last_S]} & {layer.size for layer in teachers[:last_T]}
    groups_S, groups_T = ([x.size if x.size in shared else len(x.size) for x in side] for side in (students, teachers))
    depths_S, depths_T = (_relative_depths([layer.size for layer in side]) for side in (students, teachers))
    # best[i][j]: score of the first i students and j teachers.
    best: list[list[Score]] = [[(0, 0, 0, 0.0)] * (last_T + 1) for _ in range(last_S + 1)]

    def paired(i: int, j: int) -> Score:
        may = groups_S[i] in (groups_T[j], len(teachers[j].size)) or (i, j) == (last_S, last_T)
        if not may or len(students[i].size) != len(teachers[j].size):
            return (-1, 0, 0, 0.0)
        alike, pairs, size, depth = best[i][j]
        distance = abs(math.log2(students[i].positions / teachers[j].positions))
        alike += groups_S[i] == groups_T[j]
        return (alike, pairs + 1, size - round(100 * distance), depth - abs(depths_S[i] - depths_T[j]))

    for i in range(last_S):
        for j in range(last_T):
            best[i + 1][j + 1] = max(paired(i, j), best[i][j + 1], best[i + 1][j])
    found, i, j = [(students[last_S], teachers[last_T])], last_S, last_T
    while i > 0 and j > 0:
        if best[i][j] == paired(i - 1, j - 1):  # first, so that ties go to the deeper layers
            i, j = i - 1, j - 1
            found.append((students[i], teachers[j]))
        elif best[i][j] == best[i - 1][j]:
            i -= 1
        else:
            j -= 1
    return paired(last_S, last_T), found[::-1]


def match_stages(students: Sequence[MapLayer], teachers: Sequence[MapLayer]) -> list[tuple[MapLayer, MapLayer]]:
    """Layers of a net of one map size (tokens) with those of a net of stages: at even depths, the last with the last.

    Sizes say nothing here. Of 12 blocks and 4 stages, the blocks 3, 6, 9 and 12 stand for the stages.
    """
    last_S, _ = _last_of_one_rank(students, teachers)
    dims = len(students[last_S].size) if last_S >= 0 else 0
    alike_S, alike_T = ([layer for layer in side if len(layer.size) == dims] for side in (students, teachers))
    count = min(len(alike_S), len(alike_T))
    return [
        (alike_S[(i + 1) * len(alike_S) // count - 1], alike_T[(i + 1) * len(alike_T) // count - 1])
        for i in range(count)
    ]


def _of_one_size(layers: Sequence[MapLayer]) -> bool:
    return len(layers) > 1 and len({layer.size for layer in layers}) == 1


def _last_of_one_rank(students: Sequence[MapLayer], teachers: Sequence[MapLayer]) -> tuple[int, int]:
    """Indices of the last layers of both nets whose maps have equally many dimensions; −1, −1 if there are none."""
    for i in reversed(range(len(students))):
        for j in reversed(range(len(teachers))):
            if len(students[i].size) == len(teachers[j].size):
                return i, j
    return -1, -1


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
    if call.streams and not net.on_spine(layer):
        raise PairingError(
            f"the {role}'s layer {name!r} gives several sequences, of shapes {', '.join(map(str, call.streams))}, and "
            "not everything runs through the first, which would be compared. Name a layer or a norm inside of it that "
            "gives or reads the one that you mean"
        )
    if not net.learns(layer):
        raise PairingError(
            f"the {role}'s layer {name!r} gives what the net was called with: no parameter has a say in it, and it is "
            "the same in both nets. Name a layer behind the first one with parameters"
        )
    if net.is_flat(layer):
        raise PairingError(
            f"the {role}'s layer {name!r} ends in a layer norm, behind which the sum of squares over the channels is "
            "the same at all positions, so that its map says nothing, and the norm is no module whose input could be "
            "compared. Name a layer in front of the norm, or make the norm an nn.LayerNorm"
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
    named = [call for call in net.trace.calls.values() if call.name and call.shape is not None]
    flat = [call.name for call in named if (layer := net.map_layer(call)) is not None and net.is_flat(layer)]
    if flat:
        return (
            f"only maps behind a layer norm that is no module ({flat[-1]}), which are the same at all positions (make "
            "it an nn.LayerNorm, whose input is then compared)"
        )
    shapes = [f"{call.name} {call.shape}" for call in named]
    shown = ", ".join(shapes[:8]) + (", ..." if len(shapes) > 8 else "")
    return f"no map of more than one position that every path runs through (outputs: {shown or 'none'})"
