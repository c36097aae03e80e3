"""What the loops of a kernel keep in flight, read off its machine code; no GPU is needed.

The memory of a GPU is as fast as the bytes that are on their way at once: bandwidth = bytes in flight / latency. How
many loads of a loop are on their way together is decided last of all, by ptxas, which shares registers between loads
that it was given side by side, and then waits for one before it issues the next. The PTX does not show that. The
machine code does: each instruction of sm_70 and later says which of six barriers its load raises, and for which it
waits.

The model: a load takes one unit of time and everything else none, so that a loop's speed in bytes per unit is what it
keeps in flight on the average. It knows nothing of a load's width beyond its bytes, nor of a full memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import triton

ROUNDS = 16
"""Iterations that are gone through; the first of them fill the pipeline."""

_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*)\s*(.*?)\s*;\s*/\*\s*0x[0-9a-f]{16}\s*\*/")
_SECOND_HALF = re.compile(r"^\s*/\*\s*0x([0-9a-f]{16})\s*\*/")
_LABEL = re.compile(r"^(\.L_x_\w+):")


class Instruction(NamedTuple):
    """One machine instruction: its operation, its operands, the barrier it raises, and the barriers it waits for."""

    operation: str
    operands: str
    raises: int | None
    waits: frozenset[int]

    @property
    def loaded(self) -> int:
        """Bytes that it asks the memory for, a thread; 0 where it is no load."""
        words = self.operation.split(".")
        if words[0] not in ("LDG", "LDGSTS"):
            return 0
        return next((bits // 8 for bits in (128, 64) if str(bits) in words), 4)


class Loop(NamedTuple):
    """An innermost loop that reads memory: bytes of an iteration, and of those on their way at once, a thread."""

    instructions: int
    bytes: int
    in_flight: float


def of_image(asm: Mapping[str, bytes]) -> list[Loop]:
    """The loops of what Triton made."""
    return loops(machine_code(asm["cubin"]))


def last_in_flight(found: Sequence[Loop]) -> str:
    """What the last loop keeps in flight, for a table; a dash where no loop reads memory."""
    return f"{found[-1].in_flight:.0f}" if found else "-"


def outside_loops(listing: str) -> int:
    """Instructions that are in no innermost loop with loads: about what a warp executes that enters none again."""
    instructions = sum(bool(_LINE.match(line)) for line in listing.splitlines())
    return instructions - sum(loop.instructions for loop in loops(listing))


def machine_code(cubin: bytes) -> str:
    """The listing of a cubin, with the encoding of every instruction."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", "-hex", path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def loops(listing: str) -> list[Loop]:
    """The innermost loops with loads, in the order of the listing."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    found: list[tuple[int, int]] = []
    lines = iter(listing.splitlines())
    for line in lines:
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        if not (read := _LINE.match(line)):
            continue
        half = _SECOND_HALF.match(next(lines))
        if half is None:
            raise ValueError(f"the listing has half an instruction: {line.strip()}")
        control = int(half[1], 16) >> 41
        barrier = control >> 5 & 7
        waits = frozenset(bit for bit in range(6) if control >> 11 & 1 << bit)
        code.append(Instruction(read[1], read[2], barrier if barrier < 6 else None, waits))
        target = re.search(r"\.L_x_\w+", read[2]) if read[1].split(".")[0] == "BRA" else None
        if target and target[0] in labels:
            found.append((labels[target[0]], len(code)))
    innermost = [one for one in found if not any(one != other and one[0] <= other[0] < one[1] for other in found)]
    bodies = (code[begin:end] for begin, end in innermost)
    return [_loop(body) for body in bodies if any(instruction.loaded for instruction in body)]


def _loop(body: Sequence[Instruction]) -> Loop:
    """What a loop keeps in flight once it runs: its bytes by the time that they take."""
    read = sum(instruction.loaded for instruction in body)
    begin, now = 0.0, 0.0
    ready = dict.fromkeys(range(6), 0.0)  # when what raised each barrier has arrived
    copying, copied = 0.0, [0.0]  # asynchronous copies: when the open group has arrived, and those that are closed
    for round_ in range(2 * ROUNDS):
        if round_ == ROUNDS:
            begin = now
        for instruction in body:
            now = max([now, *(ready[barrier] for barrier in instruction.waits)])
            if instruction.operation.startswith("LDGDEPBAR"):
                copied, copying = [*copied[-8:], max(copied[-1], copying)], 0.0
            elif instruction.operation.startswith("DEPBAR"):
                counts = re.findall(r"0x([0-9a-f]+)", instruction.operands)
                allowed = int(counts[-1], 16) if counts else 0
                now = max(now, copied[-1 - allowed] if allowed < len(copied) else 0.0)
            elif instruction.operation.startswith("LDGSTS"):
                copying = now + 1
            elif instruction.loaded and instruction.raises is not None:
                ready[instruction.raises] = now + 1
    taken = now - begin
    return Loop(len(body), read, read * ROUNDS / taken if taken else float(read))
