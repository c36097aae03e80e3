"""The GPU's clock and its copies to the host, on events that the test fires."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from doubles import OnCuda

from lwkd.rates.device import DeviceClock, HostClock, HostCopy, clock_of

CUDA = torch.device("cuda", 0)


class Event:
    """Passes when it is waited for, or when the test says so; made events and what they stand behind are kept."""

    made: list[Event]

    def __init__(self, enable_timing: bool = False) -> None:
        self.timing, self.behind, self.fired = enable_timing, "", False
        self.made.append(self)

    def record(self, stream: str) -> None:
        self.behind = stream

    def synchronize(self) -> None:
        self.fired = True

    def query(self) -> bool:
        return self.fired

    def elapsed_time(self, other: Event) -> float:
        assert self.fired
        assert other.fired
        return 250.0


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    made: list[Event] = []
    monkeypatch.setattr(torch.cuda, "Event", type("Made", (Event,), {"made": made}))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    return made


def test_the_clock_belongs_to_the_device() -> None:
    assert isinstance(clock_of(torch.device("cpu")), HostClock)
    clock = clock_of(CUDA)
    assert isinstance(clock, DeviceClock)
    assert clock.device == CUDA


def test_the_hosts_clock() -> None:
    clock = HostClock()
    begin = clock.mark()
    time.sleep(0.01)
    end = clock.mark()
    assert clock.passed(end)
    clock.wait(end)
    assert 0.009 < clock.between(begin, end) < 10


def test_marks_of_a_gpu_are_events_on_its_stream(events: list[Any]) -> None:
    clock = DeviceClock(CUDA)
    begin, end = clock.mark(), clock.mark()
    assert [event.behind for event in events] == ["the stream of cuda:0"] * 2
    assert all(event.timing for event in events)
    assert not clock.passed(end)
    clock.wait(begin)
    clock.wait(end)
    assert clock.passed(end)
    assert clock.between(begin, end) == 0.25


def test_a_tensor_of_a_gpu_arrives_in_pinned_memory_behind_an_event(
    events: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    empty = torch.empty

    def unpinned(shape: Any, *, dtype: Any, device: Any, pin_memory: bool) -> torch.Tensor:
        asked.append({"device": device, "pin_memory": pin_memory})
        return empty(shape, dtype=dtype)

    monkeypatch.setattr(torch, "empty", unpinned)
    there = torch.tensor([1.0, 2.0], dtype=torch.float64).as_subclass(OnCuda)
    copy = HostCopy(there)
    assert copy.deferred
    assert asked == [{"device": "cpu", "pin_memory": True}]
    (event,) = events
    assert event.behind == "the stream of cuda:0"
    assert not event.fired, "nothing waits"
    found = copy.tensor()
    assert event.fired
    assert type(found) is torch.Tensor
    assert found.tolist() == [1.0, 2.0]
