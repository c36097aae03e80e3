"""Passes on several streams of an emulated GPU: what a side stream writes is NaN until somebody waits for it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import BASES, batches, nets

import lwkd
from lwkd.rates import device


class Stream:
    """Work that is done when somebody waits for it."""

    def __init__(self, gpu: Gpu, handle: int) -> None:
        self.gpu, self.cuda_stream, self.late = gpu, handle, []  # type: ignore[var-annotated]

    def record_event(self) -> tuple[Stream, int]:
        self.gpu.log.append(("event", self.cuda_stream))
        return self, len(self.late)

    def wait_event(self, event: tuple[Stream, int]) -> None:
        stream, until = event
        self.gpu.log.append(("wait", self.cuda_stream, stream.cuda_stream))
        for index in range(until):
            stream.late[index]()

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event((stream, len(stream.late)))


class Gpu:
    """Streams, which of them is current, and a log of events, waits and records."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[Any] = []
        self.main, self.side = Stream(self, 0), Stream(self, 7)
        self.current = self.main
        self.recorded: list[Tensor] = []
        patch.setattr(device, "_on_gpu", lambda device: True)
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: self.current.cuda_stream, raising=False)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        patch.setattr(torch.cuda, "default_stream", lambda device=None: self.main)
        patch.setattr(Tensor, "record_stream", lambda tensor, stream: self._record(tensor, stream))

    def _record(self, tensor: Tensor, stream: Stream) -> None:
        self.recorded.append(tensor)
        self.log.append(("record", stream.cuda_stream))

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def writes_late(self, net: nn.Sequential) -> None:
        """On the side stream the outputs of the net's stages arrive late; before lwkd's hooks are in place."""

        def leave(module: nn.Module, args: Any, output: Tensor) -> None:
            made.append(output)

        def end(module: nn.Module, args: Any, output: Tensor) -> None:
            for feature in made if self.current is self.side else ():
                values = feature.detach().clone()
                feature.data.fill_(float("nan"))  # .data: autograd takes no notice
                self.side.late.append(lambda feature=feature, values=values: feature.data.copy_(values))
            made.clear()

        made: list[Tensor] = []
        for stage in (net.low, net.high):
            stage.register_forward_hook(leave)
        net.register_forward_hook(end)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def started(gpu: Gpu, late: bool = True, **options: Any) -> tuple[nn.Sequential, nn.Sequential, Any]:
    student, teacher, pairing = nets()
    student.eval()
    for net in (student, teacher) if late else ():
        gpu.writes_late(net)
    base = BASES["sgd"](student.parameters(), lr=0.0)
    return student, teacher, lwkd.LayerwiseOptimizer(base, student, teacher, pairing, **{"every": 1, **options})


def stages(net: nn.Sequential, x: Tensor) -> list[Tensor]:
    """Features in float64, of a copy without hooks."""
    net = copy.deepcopy(net).double()
    low = net.low(x.double())
    return [low.detach(), net.high(low).detach()]


def truth(student: nn.Sequential, teacher: nn.Sequential, x: Tensor, x_T: Tensor) -> Tensor:
    return lwkd.reference.attention_divergence(stages(student, x), stages(teacher, x_T))


@pytest.mark.parametrize("same_tensor", [True, False])
@pytest.mark.parametrize("first", ["student", "teacher"])
def test_features_of_a_side_stream_are_waited_for(first, same_tensor, gpu):
    """The user joins the streams after both passes; the measurement comes before."""
    student, teacher, optimizer = started(gpu)
    ((x, _),) = batches(1)
    x_T = x if same_tensor else x.clone().add_(0.1)
    given = {"student": (student, x), "teacher": (teacher, x_T)}
    last = "teacher" if first == "student" else "student"
    with gpu.stream(gpu.side):
        given[first][0](given[first][1])
    for _ in range(2):  # what is launched there later need not be waited for
        gpu.side.late.append(lambda: pytest.fail("waited for more than the pass"))
    given[last][0](given[last][1])
    del gpu.side.late[-2:]
    optimizer.step()
    found = torch.tensor(list(optimizer.divergences.values()), dtype=torch.float64)
    assert torch.allclose(found, truth(student, teacher, x, x_T), rtol=1e-4)
    assert gpu.log == [("event", 7), ("wait", 0, 7), ("record", 0), ("record", 0)]


def test_nothing_is_recorded_on_one_stream(gpu):
    student, teacher, optimizer = started(gpu)
    for x, _ in batches(2):
        teacher(x), student(x).sum().backward()
        optimizer.step()
    assert optimizer.passes == {"measured": 2}
    assert gpu.log == []


def test_features_of_the_default_stream_are_read_on_another(gpu):
    student, teacher, optimizer = started(gpu)
    ((x, _),) = batches(1)
    teacher(x)
    with gpu.stream(gpu.side):
        student(x)
    assert ("wait", 7, 0) in gpu.log
    assert [entry for entry in gpu.log if entry[0] == "record"] == [("record", 7)] * 2
    gpu.log.clear()
    optimizer.step()  # on the default stream: the sums lie in memory of the other one
    assert gpu.log == [("wait", 0, 7), ("record", 0)]


def test_statistics_that_count_later(gpu):
    """Matched by order: that the pair is certain is known in the step only, on whatever stream that is."""
    student, teacher, optimizer = started(gpu, late=False)
    ((x, _),) = batches(1)
    student(x)
    with gpu.stream(gpu.side):
        teacher(x.clone().add_(0.1))
    gpu.log.clear()
    gpu.recorded.clear()
    optimizer.step()
    assert gpu.log[:2] == [("wait", 0, 7), ("record", 0)]
    assert gpu.recorded[0].shape == (2, 1)
    assert optimizer.passes == {"measured": 1}


def test_inputs_are_replayed_on_the_stream_of_the_step(gpu):
    student, teacher, optimizer = started(gpu, signal="jacobian", samples=2)
    ((x, _),) = batches(1)
    with gpu.stream(gpu.side):
        teacher(x), student(x)
    gpu.log.clear()
    optimizer.step()
    assert gpu.log[0] == ("wait", 0, 7)
    assert [tuple(tensor.shape) for tensor in gpu.recorded if tensor.dim() == 4] == [(2, 1, 8, 8)] * 2
    assert optimizer.measurements == 1


@pytest.mark.parametrize("first", [True, False])
def test_one_pass_in_a_graph_and_one_outside_of_it(first, gpu, monkeypatch):
    """A replay would not make the other one's features again."""
    student, teacher, _ = started(gpu)
    ((x, _),) = batches(1)
    monkeypatch.setattr(device, "capturing", lambda: first)
    teacher(x)
    monkeypatch.setattr(device, "capturing", lambda: not first)
    with pytest.raises(RuntimeError, match=r"teacher's features were made (while|before) a CUDA graph was captured"):
        student(x)
