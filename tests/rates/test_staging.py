"""What the host sends to a GPU in a step lies in pinned memory: from any other the copy may wait for the stream."""

from __future__ import annotations

from typing import Any

import pytest
from doubles import resident, staying_on_the_device
from torch import Tensor
from toy import train

import lwkd
from lwkd.nets import passes


@pytest.mark.parametrize("signal", [lwkd.signals.Hessian(tolerance=1e6), lwkd.signals.Hessian(curvature="hessian")])
def test_nothing_pageable_is_sent(signal, monkeypatch):
    """The rates are found on the host and mirrored; the teacher's curvature is known after some measurements."""
    pinned: list[Tensor] = []
    sent: list[bool] = []
    to, copy_ = Tensor.to, Tensor.copy_

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    def log(tensor: Tensor, options: dict[str, Any]) -> None:
        if options.get("non_blocking"):
            sent.append(any(tensor is one for one in pinned))

    def logged_to(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        log(tensor, options)
        return to(tensor, *args, **options)

    def logged_copy(tensor: Tensor, source: Tensor, **options: Any) -> Tensor:
        log(source, options)
        return copy_(tensor, source, **options)

    staying_on_the_device(monkeypatch)
    student, teacher, optimizer, shown, _ = resident(signal=signal, every=1, samples=2)
    monkeypatch.setattr(passes, "_reads_pinned", lambda device: True)
    for name, replacement in (("pin_memory", pin), ("to", logged_to), ("copy_", logged_copy)):
        monkeypatch.setattr(Tensor, name, replacement)
    train(optimizer, student, teacher, 6)
    monkeypatch.undo()
    assert shown.measurements == 6
    assert shown._rates.store.mode == "mirrored"
    assert len(sent) > 6
    assert all(sent)
