"""Measurements are made in IEEE float32, and leave torch's switches of precision as they were."""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from paired_nets import Twice, conv, conv_nets, paired
from reduced import Reduced
from torch import nn
from toy import each_form, make

import lwkd
from lwkd.nets import passes
from lwkd.nets.precision import ieee_float32
from lwkd.signals import Hessian, Jacobian

SWITCHES = [(backend, op) for backend in ("cuda", "mkldnn") for op in ("conv", "rnn", "matmul", "all")]


def legacy() -> list[Any]:
    """What the older switches say, or that they contradict the newer ones."""
    found: list[Any] = []
    for read in (
        lambda: torch.backends.cudnn.allow_tf32,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision,
    ):
        try:
            found.append(read())
        except RuntimeError as error:
            found.append(str(error)[:40])
    return found


def shown() -> list[Any]:
    """What all switches say, and what they would if their parents said something else."""
    found = [*legacy(), torch._C._get_fp32_precision_getter("generic", "all")]
    found += [torch._C._get_fp32_precision_getter(*switch) for switch in SWITCHES]
    before = torch._C._get_fp32_precision_getter("generic", "all")
    for parent in ("ieee", "tf32"):
        torch._C._set_fp32_precision_setter("generic", "all", parent)
        found += [torch._C._get_fp32_precision_getter(*switch) for switch in SWITCHES]
    torch._C._set_fp32_precision_setter("generic", "all", before)
    return found


@pytest.fixture(autouse=True)
def as_they_come() -> Iterator[None]:
    """Every test begins and ends with the switches of a new process."""

    def reset() -> None:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
        for switch in [("generic", "all"), *SWITCHES]:
            default = "tf32" if switch in (("cuda", "conv"), ("cuda", "rnn")) else "none"
            torch._C._set_fp32_precision_setter(*switch, default)

    reset()
    yield
    reset()


def every_new() -> None:
    torch.backends.fp32_precision = "bf16"
    torch.backends.cudnn.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "none"
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "tf32"


def both_kinds() -> None:
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.conv.fp32_precision = "tf32"


@pytest.mark.parametrize(
    "setting",
    [
        lambda: None,
        lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
        lambda: torch.set_float32_matmul_precision("medium"),
        every_new,
        both_kinds,
    ],
    ids=["defaults", "cudnn", "cublas", "medium", "new", "both"],
)
def test_every_switch_is_as_it_was(setting: Callable[[], None]) -> None:
    setting()
    before = shown()
    with pytest.raises(KeyError), ieee_float32():  # noqa: PT012
        with torch.backends.cudnn.flags(enabled=False):  # reads the older ones, which must not contradict the newer
            pass
        with ieee_float32():
            pass
        assert {torch._C._get_fp32_precision_getter(*switch) for switch in SWITCHES} == {"ieee"}
        assert legacy() == [False, False, "highest"]
        raise KeyError
    assert shown() == before


def test_overlapping_measurements_restore_what_was_before_the_first() -> None:
    """The one that began first ends first, and must not end the precision of the other."""
    both_kinds()
    before, first, second = shown(), threading.Event(), threading.Event()

    def other() -> None:
        with ieee_float32():
            second.set()
            first.wait(10)
            seen.append(torch.backends.cudnn.conv.fp32_precision)

    seen: list[str] = []
    thread = threading.Thread(target=other)
    with ieee_float32():
        thread.start()
        assert second.wait(10)
    first.set()
    thread.join()
    assert seen == ["ieee"]
    assert shown() == before


@pytest.mark.parametrize(
    "signal",
    [Jacobian(), Jacobian(estimator="difference"), Jacobian("parameters"), Hessian(), Hessian(curvature="hessian")],
    ids=lambda signal: signal.measured + str(getattr(signal, "estimator", "")),
)
def test_tf32_does_not_matter(signal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An emulation that follows the switches, as cuDNN and cuBLAS do."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    given = paired(*conv_nets(nn.ReLU))
    expected = signal.measure(*given)
    with Reduced() as tf32:
        assert torch.equal(signal.measure(*given), expected)
    assert tf32.count == 0
    monkeypatch.setattr(passes, "ieee_float32", contextlib.nullcontext)
    with Reduced():
        assert not torch.equal(signal.measure(*given), expected), "this test cannot fail"


@each_form
@pytest.mark.parametrize("signal", [Jacobian(), Hessian()], ids=lambda signal: signal.name)
def test_training_in_tf32_measures_in_float32(form: str, signal: Any) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    student, teacher, pairing, x = paired(*conv_nets(nn.ReLU))
    base = torch.optim.SGD(student.parameters(), 0.1)
    optimizer, rates = make(form, base, student, teacher, pairing, signal=signal, every=1)
    before = shown()
    with Reduced() as tf32:
        with torch.no_grad():
            teacher(x)
        student(x).square().sum().backward()
        trained = tf32.count
        optimizer.step()
    assert trained == tf32.count > 0
    assert shown() == before
    plain = conv_nets(nn.ReLU)[0]
    plain.load_state_dict(student.state_dict())
    expected = signal.divergence(signal.measure(*paired(plain, teacher, x)))
    assert list(rates.divergences.values()) == pytest.approx(expected.tolist(), rel=1e-6)


def test_in_a_compiled_region() -> None:
    """What frames a pass cannot be traced."""
    given, seen = paired(*conv_nets(nn.ReLU)), set()
    given[0].low.register_forward_hook(lambda *_: seen.add(torch.backends.cudnn.conv.fp32_precision))
    expected, before = Jacobian().measure(*given), shown()

    def step() -> Any:
        return 2 * Jacobian().measure(*given)

    assert torch.equal(torch.compile(step, backend="eager")(), 2 * expected)
    assert seen == {"ieee"}
    assert shown() == before


def relu_nets() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return conv(8, nn.ReLU, norm=True), conv(8, nn.ReLU, norm=True), torch.rand(4, 1, 6, 6)


def test_the_check_holds_in_tf32_that_cannot_be_turned_off() -> None:
    """A difference at its usual step is rounding only, and must not be believed, or recommended."""
    whole, half, x = relu_nets()
    half.high.insert(1, Twice(True))
    with Reduced(lambda _: True) as tf32, warnings.catch_warnings():
        warnings.simplefilter("error")
        Jacobian().check(*paired(whole, whole, x), None, seed=0)
        with pytest.raises(RuntimeError, match=r"layer 'high' of the student: .*loses part.*estimator='vjp'"):
            Jacobian().check(*paired(half, whole, x), None, seed=0)
    assert tf32.count


def test_where_nothing_can_be_checked_that_is_said() -> None:
    whole, _, x = relu_nets()
    with (
        Reduced(lambda _: True, bits=4),
        pytest.warns(UserWarning, match="layer 'low' of the student: .*could not be checked, .*would be worse"),
    ):
        Jacobian().check(*paired(whole, whole, x), None, seed=0)


@pytest.mark.parametrize("signal", [Jacobian(), Jacobian(estimator="vjp"), Hessian(curvature="hessian")], ids=repr)
def test_objects_of_the_interpreter_are_counted_as_before(signal: Any) -> None:
    # torch takes over a reference to what it is given to keep for a thread: True was deallocated after some thousand
    # measurements. Python 3.12 and later do not count its references.
    student, teacher, x = conv_nets()
    pairing = lwkd.pair(student, teacher, x)
    measured = 40

    def measure(times: int) -> None:
        for seed in range(times):
            signal.measure(student, teacher, pairing, x, seed=seed)

    measure(3)
    before = [sys.getrefcount(value) for value in (True, False)]
    measure(measured)
    threads = [threading.Thread(target=measure, args=(2,)) for _ in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    after = [sys.getrefcount(value) for value in (True, False)]
    assert all(abs(new - old) < measured / 4 for old, new in zip(before, after, strict=True)), (before, after)
