"""The members that rates, the optimizer and the program ask of every signal, and signals by name."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from lwkd.signals import SIGNALS, Attention, Hessian, Jacobian, Signal, rows_of, signal_named
from lwkd.signals.hessian import TeacherCurvature

OBJECTS = [Attention(), Attention("probabilities", kind="l2"), Jacobian(), Hessian(), Hessian("input", samples=4)]


@pytest.mark.parametrize("signal", OBJECTS, ids=str)
def test_an_object_is_a_signal_and_survives_pickling(signal: Signal) -> None:
    assert isinstance(signal, Signal)
    assert signal_named(signal) is signal
    assert pickle.loads(pickle.dumps(signal)) == signal
    assert signal.replays == (signal.source == "passes")


def test_a_name_is_a_signal_with_its_own_defaults() -> None:
    for name, kind in SIGNALS.items():
        assert signal_named(name) == kind()
        assert kind().name == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "queries"}, "source is 'queries'; expected 'features' or 'probabilities'"),
        ({"kind": "kl"}, "kind is 'kl'; expected 'jsd' or 'l2'"),
        ({"power": 0.5}, "power is 0.5; expected a finite number of at least 1"),
        ({"betas": (0.9, 0.2)}, r"betas are \(0.9, 0.2\); expected two positive weights with sum 1"),
    ],
)
def test_options_of_attention_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(**options)


@pytest.mark.parametrize("signal", ["gradients", Attention, Jacobian, None, 3])
def test_what_is_no_signal(signal: Any) -> None:
    with pytest.raises(ValueError, match=r"expected 'attention', 'jacobian', 'hessian' or an object of lwkd\.signals"):
        signal_named(signal)


def test_only_curvature_by_parameters_remembers_the_teacher() -> None:
    remembering = [signal for signal in OBJECTS if isinstance(signal.memory(2), TeacherCurvature)]
    assert remembering == [Hessian()]
    for signal in (Attention(), Hessian()):
        assert signal.check(None, None, None, None, None, seed=0) is None  # nothing is looked at


def test_rows_are_a_share_of_the_batch_unless_a_number_is_given() -> None:
    batches = (1, 3, 32, 64, 128, 512)
    assert [rows_of(Attention().samples, batch) for batch in batches] == [1, 3, 8, 16, 32, 128]
    assert [rows_of(Jacobian().samples, batch) for batch in batches] == [1, 3, 4, 8, 16, 16]
    assert [rows_of(Hessian().samples, batch) for batch in batches] == [1, 3, 8, 16, 16, 16]
