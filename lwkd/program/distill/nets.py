"""The nets of a run: made for its data, and paired."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

import lwkd
from lwkd.program.data.datasets import Data
from lwkd.program.data.loader import MEMORY
from lwkd.program.errors import ProgramError
from lwkd.program.models.registry import build


def net_for(name: str, data: Data, device: str) -> nn.Module:
    """A net with random weights that takes the data's batches, on the device and in their layout."""
    net = build(name, classes=data.classes, channels=data.channels, size=data.size, words=data.words)
    return net.to(device, memory_format=MEMORY)  # type: ignore[call-overload]


def pair_nets(
    student: nn.Module, teacher: nn.Module, example: Any, given: tuple[str, ...], *, head: bool = False
) -> lwkd.Pairing:
    """Pair the nets; ``given`` holds STUDENT=TEACHER layer names and replaces the search; ``head`` adds the logits.

    Errors: :class:`~lwkd.program.errors.ProgramError` with what the library says.
    """
    layers: dict[str, str] = {}
    for text in given:
        layer, other = _split_pair(text)
        if layer in layers:
            raise ProgramError(
                f"--pair names the student layer {layer} twice: with {layers[layer]} and with {other}",
                "compare it with one layer of the teacher",
                code=2,
            )
        layers[layer] = other
    check_apart({"student": student, "teacher": teacher})
    try:
        return lwkd.pair(student, teacher, example, layers=layers or None, head=head)
    except lwkd.PairingError as error:
        raise ProgramError(str(error), "name the layers by hand with --pair STUDENT=TEACHER", code=2) from error


def _split_pair(text: str) -> tuple[str, str]:
    student, sign, teacher = text.partition("=")
    if not (student and sign and teacher):
        raise ProgramError(f"--pair {text!r} is not of the form STUDENT=TEACHER", "for instance layer1=layer2", code=2)
    return student, teacher


def check_apart(nets: Mapping[str, nn.Module]) -> None:
    """Refuse nets that share what is trained: to train one would be to train the other, too (status 2)."""
    seen: dict[int, str] = {}
    for name, net in nets.items():
        for thing in (net, *(parameter for parameter in net.parameters() if parameter.requires_grad)):
            if seen.setdefault(id(thing), name) != name:
                raise ProgramError(
                    f"the nets {seen[id(thing)]} and {name} are the same object, or share weights",
                    "let module:function make a new net at every call",
                    code=2,
                )
