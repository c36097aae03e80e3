"""The defaults of torch for new tensors, which scripts set: set_default_device("cuda"), set_default_dtype(bfloat16)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._device import _device_constructors
from toy import BASES, batches, each_form, make, nets, train_on

import lwkd
from lwkd.signals import Hessian, Jacobian

LIBRARY = Path(lwkd.__file__).parent
MAKERS = {function.__name__ for function in _device_constructors()}
WITHOUT_A_DTYPE = {"arange", "randperm"}
"""They give integers for integers."""

SIGNALS: dict[str, Any] = {
    "attention": "attention",
    "jacobian": "jacobian",
    "difference": Jacobian(estimator="difference"),
    "vjp": Jacobian(estimator="vjp"),
    "output": Jacobian(estimator="output"),
    "parameters": Jacobian(wrt="parameters"),
    "hessian": "hessian",
    "full hessian": Hessian(curvature="hessian"),
    "along the input": Hessian(wrt="input"),
}


@contextmanager
def defaults(*, device: str | None = None, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Inside, new tensors are made there, and of this dtype, where nobody says which."""
    before = torch.get_default_dtype()
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


def results(form: str, inside: dict[str, Any], **options: Any) -> tuple[Any, ...]:
    """What a run shows, with the optimizer made, stepped, saved and loaded under these defaults."""
    given = list(batches(5))
    student, teacher, pairing = nets()
    with defaults(**inside):  # on the "meta" device, which stands for a GPU, tensors have no values
        base = BASES["sgd"](student.parameters())
        optimizer, shown = make(form, base, student, teacher, pairing, **{"every": 1, **options})
        train_on(optimizer, student, teacher, given[:4])
        shown.rate_state.load_state_dict(shown.rate_state.state_dict())
        train_on(optimizer, student, teacher, given[4:])
        found = shown.rates, shown.divergences, shown.standard_errors, shown.measurements
    return *found, {name: tensor.tolist() for name, tensor in student.state_dict().items()}


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("inside", [{"device": "meta"}, {"dtype": torch.bfloat16}, {"dtype": torch.float64}], ids=str)
def test_a_run_is_the_same_under_every_default(signal: str, inside: dict[str, Any]) -> None:
    plain, found = (results("wrapper", given, signal=SIGNALS[signal]) for given in ({}, inside))
    torch.testing.assert_close(found[2], plain[2], rtol=0, atol=0, equal_nan=True)
    assert (*found[:2], *found[3:]) == (*plain[:2], *plain[3:])
    assert found[3] == 5
    assert set(found[0].values()) != {1.0}


@each_form
@pytest.mark.parametrize("policy", [lwkd.Local(), lwkd.Decay(), lwkd.Freeze(), lwkd.Constant([0.5, 2.0])], ids=repr)
def test_with_every_policy(form: str, policy: Any) -> None:
    plain, found = (results(form, given, policy=policy) for given in ({}, {"device": "meta", "dtype": torch.bfloat16}))
    torch.testing.assert_close(found[2], plain[2], rtol=0, atol=0, equal_nan=True)
    assert (*found[:2], *found[3:]) == (*plain[:2], *plain[3:])


def test_no_new_tensor_of_the_library_follows_them() -> None:
    unclear = []
    for path in sorted(LIBRARY.rglob("*.py")):
        if LIBRARY / "program" in path.parents:  # the program sets no defaults
            continue
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            made = call.func.attr if ast.unparse(call.func.value) == "torch" else ""
            said = {keyword.arg for keyword in call.keywords}
            wanted = {"device"} if made in WITHOUT_A_DTYPE else {"device", "dtype"}
            if made in MAKERS and not wanted <= said:
                unclear.append(f"{path.relative_to(LIBRARY)}:{call.lineno}: {ast.unparse(call)}")
    assert not unclear, "say device= and dtype= in\n" + "\n".join(unclear)
