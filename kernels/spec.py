"""The interface of every kernel, stated once, as data: what it is launched with, and which variants of it exist.

Read by whoever compiles images (compile.py) or finds them (images.py), and obeyed by whoever asks for them (csrc/cuda).
A kernel is added by writing it down in ``KERNELS``. All its variants are listed, since whoever compiles them ahead of
time must know them; the first is the commonest. Needs neither Triton nor torch.
"""

from __future__ import annotations

import difflib
import functools
import itertools
from collections.abc import Iterator, Sequence

from lwkd.kernels.interface import Setting, Variant, combine, each, kernel, optional

ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
"""Element types that the kernels read, and the bytes of one element."""


def _tile(element: str, channels_last: int, aligned: int) -> Setting:
    """What one program reads in one step: 2,048 elements, or half of that where loads are narrow.

    Narrow loads need an address each, and registers for it. Only the summed dimension shrinks. One row of a
    channels-last tile is one memory transaction, 128 bytes.
    """
    columns = 128 // ITEM_BYTES[element] if channels_last else 128
    rows = 2048 // columns
    if not aligned:
        rows, columns = (rows, columns // 2) if channels_last else (rows // 2, columns)
    layout: Setting = {"ELEMENT": element, "CHANNELS_LAST": channels_last, "ALIGNED": aligned}
    return {**layout, "ROWS": rows, "COLUMNS": columns, "num_warps": 4}


def _signs(element: str, aligned: int) -> Setting:
    """Columns and planes that one warp has at once; a row of one plane is 512 bytes, 16 for each thread."""
    columns = 512 // ITEM_BYTES[element]
    return {"ELEMENT": element, "COLUMNS": columns, "STEP": 2048 // columns // (1 if aligned else 2), "num_warps": 1}


def _tuned_tile(tile: Setting, tangent: bool, forward: bool) -> Setting:
    """A tile kernel's variant, tuned so that enough bytes are on their way, as an H200 showed.

    Left alone, ptxas lets the loads of the forward kernel wait for each other, to save registers for programs that
    then have nothing to do. Fewer rows at a time leave it more registers for loads: with two rows a warp, or one in 16
    bits, a divergence reads 3 to 9 % faster, and maps with tangents in 16 bits by a fifth. Logarithms and powers wait
    whatever the registers, and are read ahead instead, where an element is wide enough for an asynchronous copy. So are
    channels-last features without a tangent, which takes up to 6 % off the whole divergence.
    """
    half = ITEM_BYTES[str(tile["ELEMENT"])] == 2
    if tile["POWER"] == 0:
        return {**tile, "STAGES": 3 if tile["ALIGNED"] or not half else 1}
    if not forward or not tile["ALIGNED"]:
        return {**tile, "STAGES": 1}
    if tile["CHANNELS_LAST"]:
        return {**tile, "STAGES": 1, "maxnreg": 80 if half else 96} if tangent else {**tile, "STAGES": 3}
    rows = int(str(tile["ROWS"])) // (4 if half else 1 if tangent else 2)  # forward_rows in csrc/cuda
    registers = 96 if tangent else 64 if half else 80
    return {**tile, "ROWS": rows, "STAGES": 1, "maxnreg": registers}


def _tuned_chunk(chunk: Setting, forward: bool) -> Setting:
    """A variant of jacobian_sums, tuned in the same way; read ahead, forward takes 3 to 12 % less time on an H200."""
    if forward and chunk["ALIGNED"]:
        return {**chunk, "STAGES": 3}
    narrow = ITEM_BYTES[str(chunk["ELEMENT"])] == 2 and chunk["ALIGNED"]
    return {**chunk, "STAGES": 1} if narrow else {**chunk, "STAGES": 1, "maxnreg": 80}


ELEMENTS = each("ELEMENT", *ITEM_BYTES)
ALIGNMENTS = each("ALIGNED", 1, 0)

TILES = [_tile(*choice) for choice in itertools.product(ITEM_BYTES, (0, 1), (1, 0))]
"""One step of a tile kernel, for each element type, memory order and alignment."""

POWERS = {"square": {"POWER": 2}, "any": {"POWER": 0}, "linear": {"POWER": -1}}
"""See attention_power.py. Self-attention probabilities, summed as they are, have no tangents."""

MAP_BLOCKS: list[Setting] = [
    {"MORE": 0, "BLOCK": 256, "num_warps": 1},
    {"MORE": 0, "BLOCK": 1024, "num_warps": 4},
    {"MORE": 0, "BLOCK": 4096, "num_warps": 16, "maxnreg": 64},
    {"MORE": 1, "BLOCK": 512, "num_warps": 4, "maxnreg": 128},
]
"""Map positions that a program holds in registers, and its warps; the last for calls with maps that do not fit, whose
further blocks are gone over again and again. With 64 registers two programs of 16 warps share a processor: of 256
programs none then waits for another to end, which took an H200 10 µs instead of 14."""

WHOLE: Setting = {"sums_ptr": None, "PHASE": "whole"}
"""Maps with one program each; the other phases are for maps that are split, see attention_split.py."""


def _divergences(kind: str) -> list[Setting]:
    """The second stage of one kind: in one launch, and in phases."""
    phases = ["sums", "norms", "distances"] if kind == "l2" else ["sums", "distances"]
    settings = combine(optional("addresses_ptr"), [WHOLE], MAP_BLOCKS)
    settings += combine([{"addresses_ptr": None}], each("PHASE", *phases), MAP_BLOCKS[-1:])
    settings += combine(each("PHASE", "factors"), MAP_BLOCKS[-1:])
    return combine([{"KIND": kind}], settings)


RESIZE: list[Setting] = [{"BLOCK": 256, "num_warps": 4}]
CHUNKS = combine(ELEMENTS, ALIGNMENTS, [{"CHUNK": 8192, "STEP": 1024, "num_warps": 4}])

DIVERGENCES = {"attention": 1, "direction": 4, "norm": 4, "relative": 4, "hessian": 2}
"""Statistics a layer of every signal."""

MAPS = "totals_ptr:*fp32 table_ptr:*i64 ends_ptr:*i64 sums_ptr:*fp32 addresses_ptr:*i64 n_layers:i32"
TABLES = "addresses_ptr:*i64 table_ptr:*i64 ends_ptr:*i64"

KERNELS = (
    kernel(
        "attention_tiles_fwd",
        "attention_tiles",
        f"{TABLES} partials_ptr:*fp32 tangent_partials_ptr:*fp32 n_rows:i32 power:fp32",
        "ELEMENT CHANNELS_LAST ALIGNED POWER ROWS COLUMNS STAGES",
        [
            _tuned_tile(tile, "tangent_partials_ptr" not in tile, forward=True)
            for tile in combine(
                TILES,
                [
                    *({"tangent_partials_ptr": None, **power} for power in POWERS.values()),
                    *(POWERS["square"], POWERS["any"]),
                ],
            )
        ],
    ),
    kernel(
        "attention_tiles_bwd",
        "attention_tiles",
        f"{TABLES} layers_ptr:*i64 grad_ptr:*fp32 n_rows:i32 power:fp32",
        "ELEMENT CHANNELS_LAST ALIGNED TANGENT POWER ROWS COLUMNS STAGES",
        [
            _tuned_tile(tile, bool(tile["TANGENT"]), forward=False)
            for tile in combine(
                TILES,
                [{"TANGENT": 0, **power} for power in POWERS.values()]
                + combine([{"grad_ptr": None}], each("TANGENT", 0, 1), [POWERS["square"], POWERS["any"]]),
            )
        ],
        anywhere="grad_ptr",
    ),
    kernel(
        "attention_maps_fwd",
        "attention",
        f"partials_ptr:*fp32 tangent_partials_ptr:*fp32 {MAPS}",
        "PHASE MORE BLOCK",
        combine(optional("tangent_partials_ptr"), [WHOLE], MAP_BLOCKS[:-1])
        + combine(optional("tangent_partials_ptr"), each("PHASE", "sums", "rest"), MAP_BLOCKS[-1:]),
    ),
    kernel(
        "attention_maps_bwd",
        "attention",
        MAPS,
        "PHASE TANGENT BLOCK",
        combine(
            [WHOLE, *each("PHASE", "sums", "rest")],
            each("TANGENT", 0, 1),
            [{"BLOCK": 512, "num_warps": 4}],
        ),
    ),
    kernel(
        "attention_divergence_fwd",
        "attention_divergence",
        "partials_ptr:*fp32 table_ptr:*i64 ends_ptr:*i64 sums_ptr:*fp32 distances_ptr:*fp32 counters_ptr:*i32 "
        "divergences_ptr:*fp32 addresses_ptr:*i64 n_layers:i32 beta_S:fp32 beta_T:fp32",
        "KIND PHASE MORE BLOCK",
        _divergences("jsd") + _divergences("l2"),
    ),
    kernel(
        "attention_resize_fwd",
        "attention_resize",
        "partials_ptr:*fp32 table_ptr:*i64 ends_ptr:*i64 n_rows:i32",
        "BLOCK",
        RESIZE,
    ),
    kernel("attention_resize_bwd", "attention_resize", f"{TABLES} n_rows:i32", "BLOCK", RESIZE),
    kernel(
        "jacobian_sums_fwd",
        "jacobian",
        f"{TABLES} partials_ptr:*fp32 n_rows:i32",
        "ELEMENT ALIGNED CHUNK STEP STAGES",
        [_tuned_chunk(chunk, forward=True) for chunk in CHUNKS],
    ),
    kernel(
        "jacobian_sums_bwd",
        "jacobian",
        f"{TABLES} grad_ptr:*fp32 n_rows:i32",
        "ELEMENT ALIGNED CHUNK STEP STAGES",
        [_tuned_chunk(chunk, forward=False) for chunk in CHUNKS],
        anywhere="grad_ptr",
    ),
    kernel(
        "jacobian_layers_fwd",
        "jacobian",
        # The kernel takes sums_ptr for a pointer to SUMS.
        "partials_ptr:*fp32 layers_ptr:*i64 sums_ptr:*fp32 distances_ptr:*fp32",
        "SUMS KIND BLOCK",
        [
            {"distances_ptr": None, "SUMS": "fp32", "KIND": "none", "BLOCK": 256, "num_warps": 4},
            *combine([{"SUMS": "fp64", "BLOCK": 256, "num_warps": 4}], each("KIND", "direction", "norm", "relative")),
        ],
    ),
    kernel(
        "hutchinson_rademacher_fwd",
        "hutchinson",
        f"{TABLES} seed:i64 n_rows:i32",
        "ELEMENT COLUMNS STEP",
        [_signs(element, 1) for element in ITEM_BYTES],
    ),
    kernel(
        "hutchinson_trace_fwd",
        "hutchinson",
        f"{TABLES} partials_ptr:*fp32 seed:i64 n_rows:i32",
        "ELEMENT ALIGNED COLUMNS STEP",
        [{"ALIGNED": aligned, **_signs(element, aligned)} for element in ITEM_BYTES for aligned in (1, 0)],
    ),
    kernel(
        "hutchinson_layers_fwd",
        "hutchinson",
        "partials_ptr:*fp32 layers_ptr:*i64 traces_ptr:*fp32",
        "BLOCK",
        [{"BLOCK": 1024, "num_warps": 4}],
    ),
    kernel(
        "rates_update_fwd",
        "rates",
        "average_ptr:*fp32 baseline_ptr:*fp32 divergences_ptr:*fp32 multipliers_ptr:*fp32 counts_ptr:*i64 "
        "statistics_ptr:*fp32 found_inf_ptr:*fp32 new_average_ptr:*fp32 new_baseline_ptr:*fp32 "
        "new_divergences_ptr:*fp32 new_multipliers_ptr:*fp32 new_counts_ptr:*i64 n_layers:i32 gamma:fp32 "
        "momentum:fp32 smallest:fp32 largest:fp32 contrast:fp32",
        "DIVERGENCE POLICY NORMALIZE STATISTICS BLOCK",
        combine(
            [{"DIVERGENCE": name, "STATISTICS": statistics} for name, statistics in DIVERGENCES.items()],
            optional("found_inf_ptr"),
            each("POLICY", "relative", "decay", "local", "constant"),
            each("NORMALIZE", 0, 1),
            [{"BLOCK": 512, "num_warps": 4}],
        ),
        anywhere="average_ptr baseline_ptr divergences_ptr multipliers_ptr counts_ptr statistics_ptr found_inf_ptr",
    ),
)


@functools.cache
def _variants() -> dict[str, Variant]:
    return {variant.text: variant for stated in KERNELS for variant in stated.variants}


def all_variants(elements: Sequence[str] = tuple(ITEM_BYTES)) -> Iterator[Variant]:
    """Every variant of every kernel.

    Args:
        elements: leave out variants that read other element types.
    """
    return (variant for variant in _variants().values() if variant.setting.get("ELEMENT", elements[0]) in elements)


def parse(text: str) -> Variant:
    """The variant of that name.

    Raises:
        ValueError: no variant has that name; the message gives the nearest one.
    """
    known = _variants()
    if text not in known:
        name = text.partition(" ")[0]
        alike = [other for other in known if other.partition(" ")[0] == name]
        nearest = difflib.get_close_matches(text, alike or known, n=1, cutoff=0)[0]
        raise ValueError(f"no kernel variant is called {text!r}; kernels/spec.py lists all, the nearest is {nearest!r}")
    return known[text]
