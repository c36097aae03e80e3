from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lwkd.nets.names import canonical, named_modules, named_parameters, unwrap


class Wrapped(nn.Module):
    """Stands in for a wrapper that puts its module under the given name."""

    def __init__(self, inner: nn.Module, name: str) -> None:
        super().__init__()
        self.add_module(name, inner)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        AveragedModel,
        lambda m: torch.compile(m, backend="eager"),
        lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
        lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
    ],
)
def test_wrappers_leave_no_trace_in_names(wrap):
    plain = net()
    wrapped = wrap(plain)
    assert list(named_modules(wrapped)) == ["", "0", "1", "1.0"]
    assert list(named_parameters(wrapped)) == [name for name, _ in plain.named_parameters()]
    assert [canonical(n, wrapped) for n, _ in wrapped.named_parameters()] == [n for n, _ in plain.named_parameters()]
    if not isinstance(wrapped, AveragedModel):  # averages a copy
        assert unwrap(wrapped) is plain


def test_inner_wrappers():
    plain = net()
    plain[1] = torch.compile(Wrapped(plain[1], "_checkpoint_wrapped_module"), backend="eager")
    assert list(named_parameters(plain)) == ["0.weight", "0.bias", "1.0.weight", "1.0.bias"]
    assert isinstance(named_modules(plain)["1"], nn.Sequential)


def test_a_child_called_module_is_the_users():
    own = Wrapped(nn.Linear(2, 2), "module")
    assert unwrap(own) is own
    assert list(named_parameters(own)) == ["module.weight", "module.bias"]
    assert unwrap(nn.DataParallel(own)) is own
    assert canonical("module.module.weight", nn.DataParallel(own)) == "module.weight"


def test_tied_parameters_and_modules_have_all_their_names():
    tied = net()
    tied[1][0].weight = tied[0].weight
    assert named_parameters(tied)["1.0.weight"] is named_parameters(tied)["0.weight"]
    shared = nn.ReLU()
    assert list(named_modules(nn.Sequential(shared, shared))) == ["", "0", "1"]
