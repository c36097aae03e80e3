"""What the Jacobian signal cannot differentiate: the error names the layer, and what to use instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from paired_nets import ESTIMATORS, Twice, conv_nets, paired
from torch import Tensor, nn

import lwkd
from lwkd.signals import Jacobian


class Last(nn.Module):
    """A recurrent layer that gives a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Sequence(nn.Module):
    """Sequences ``(B, 5, 3)``, or token ids ``(B, 5)``, through a recurrent layer."""

    def __init__(self, first: nn.Module, high: nn.Module, classes: int = 3) -> None:
        super().__init__()
        self.low, self.high, self.head = first, high, nn.Linear(4, classes)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        low = self.low(x)
        if attention_mask is not None:
            low = low * (attention_mask > 0).unsqueeze(-1)
        return self.head(self.high(low).mean(1))


def measured(net: nn.Module, x: Any, **options: Any) -> Tensor:
    """Statistics of a net beside itself."""
    return Jacobian(**options).measure(*paired(net, net, x))


def test_a_layer_without_forward_mode_is_named() -> None:
    torch.manual_seed(0)
    net, x = Sequence(nn.Linear(3, 4), Last()), torch.rand(2, 5, 3)
    with pytest.raises(
        RuntimeError, match=r"layer 'high.lstm' of the student has no forward mode .*estimator='difference'"
    ):
        measured(net, x)
    found = measured(net, x, estimator="difference")
    assert found[:, 0].gt(0).all()
    assert found[:, 3].eq(0).all()


def test_a_net_that_fails_says_so_itself() -> None:
    net = Sequence(nn.Linear(3, 4), nn.Linear(4, 4))
    given = paired(net, net, torch.rand(2, 5, 3))
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        Jacobian().measure(*given[:3], torch.rand(2, 5, 2))


def test_a_layer_that_drops_the_tangent_is_named() -> None:
    student, teacher, x = conv_nets()
    student.high.append(Twice(False))
    given = paired(student, teacher, x)
    with pytest.raises(RuntimeError, match=r"layer 'high' of the student: .*'high.2' lost it.*estimator='difference'"):
        Jacobian().measure(*given)
    assert Jacobian(estimator="difference").measure(*given).gt(0).any()
    with pytest.raises(RuntimeError, match="layer 'high' of the teacher"):
        Jacobian().measure(*paired(teacher, student, x))


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_half_a_tangent_is_found_by_the_check(whose: str) -> None:
    whole, half, x = conv_nets(nn.ReLU)
    half.high.insert(1, Twice(True))
    given = paired(half, whole, x) if whose == "student" else paired(whole, half, x)
    assert Jacobian().measure(*given).isfinite().all(), "forward mode itself takes no notice"
    with pytest.raises(RuntimeError, match=rf"layer 'high' of the {whose}: .*some op loses part.*'difference'"):
        Jacobian().check(*given, None, seed=0)
    Jacobian(estimator="difference").check(*given, None, seed=0)
    Jacobian().check(*paired(whole, whole, x), None, seed=0)


def test_the_optimizer_checks_before_the_first_measurement() -> None:
    student, teacher, x = conv_nets(nn.ReLU)
    student.high.insert(1, Twice(True))
    base = torch.optim.SGD(student.parameters(), lr=0.1)
    optimizer = lwkd.LayerwiseOptimizer(base, *paired(student, teacher.eval(), x)[:3], signal="jacobian")
    teacher(x)
    student(x)
    with pytest.raises(RuntimeError, match="layer 'high' of the student"):
        optimizer.step()


@pytest.mark.parametrize("estimator", ["jvp", "difference", "vjp"])
def test_token_ids_have_no_derivative(estimator: str) -> None:
    net, ids = Sequence(nn.Embedding(7, 4), nn.Linear(4, 4)), torch.randint(7, (2, 5))
    with pytest.raises(ValueError, match=r"no floating-point input .*found torch.int64.*wrt='parameters'.*'output'"):
        measured(net, ids, estimator=estimator)


@pytest.mark.parametrize("options", [{"estimator": "output"}, {"wrt": "parameters"}])
@pytest.mark.parametrize("masked", [False, True])
def test_what_works_on_token_ids(options: dict[str, Any], masked: bool) -> None:
    """A floating mask is a floating input, but nothing depends on it."""
    torch.manual_seed(0)
    net, ids = Sequence(nn.Embedding(7, 4), nn.Linear(4, 4)), torch.randint(7, (2, 5))
    found = measured(net, {"x": ids, "attention_mask": torch.ones(2, 5)} if masked else ids, **options)
    assert found[:, 0].gt(0).all()
    assert torch.equal(found, measured(net, ids, **options))


@pytest.mark.parametrize("estimator", ["jvp", "difference", "vjp"])
def test_inputs_of_different_shapes(estimator: str) -> None:
    with pytest.raises(ValueError, match=r"student's input has shape \(2, 1, 6, 6\), the teacher's \(2, 1, 8, 8\)"):
        Jacobian(estimator=estimator).measure(*paired(*conv_nets()), torch.rand(2, 1, 8, 8))  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"estimator": "output"}, {"wrt": "parameters"}])
def test_what_works_on_inputs_of_different_shapes(options: dict[str, Any]) -> None:
    assert Jacobian(**options).measure(*paired(*conv_nets()), torch.rand(2, 1, 8, 8)).isfinite().all()


def test_nets_with_different_classes() -> None:
    student, teacher, x = conv_nets()
    teacher.head.append(nn.Linear(3, 9))
    given = paired(student, teacher, x)
    with torch.no_grad():
        teacher.head[3].bias[7] = 99.0
    with pytest.raises(ValueError, match=r"the student has 3 classes, the teacher's top class is 7.*same classes"):
        Jacobian(estimator="output").measure(*given)
    for estimator in ESTIMATORS[:3]:
        assert Jacobian(estimator=estimator).measure(*given).gt(0).any()  # type: ignore[arg-type]


class FirstPosition(nn.Module):
    """A net of tokens whose logits read the first position of its last layer, as that of a CLS token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.TransformerEncoderLayer(width, 2, 8, 0.0, batch_first=True) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.second(self.first(x))[:, 0])
        return found


def test_a_layer_of_which_the_logits_read_one_position() -> None:
    student, teacher, x = FirstPosition(4), FirstPosition(4), torch.rand(2, 5, 4)
    both = {"first": "first", "second": "second"}
    with pytest.raises(ValueError, match=r"layer 'second': the logits of both nets depend on one of its 5 positions"):
        Jacobian(estimator="output").measure(student, teacher, lwkd.pair(student, teacher, x, layers=both), x)
    found = Jacobian(estimator="output").measure(
        student, teacher, lwkd.pair(student, teacher, x, layers={"first": "first"}), x
    )
    assert float(Jacobian(estimator="output").divergence(found)) > 0


def test_an_output_without_classes() -> None:
    given = paired(*conv_nets())
    given[0].head = nn.Identity()
    with pytest.raises(ValueError, match=r"the student gives shape \(2, 4, 3, 3\); expected logits"):
        Jacobian(estimator="output").measure(*given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wrt": "weights"}, "wrt is 'weights'; expected 'input' or 'parameters'"),
        ({"estimator": "hvp"}, "estimator is 'hvp'; expected one of jvp, difference, vjp, output"),
        ({"kind": "angle"}, "kind is 'angle'; expected one of direction, norm, relative"),
        ({"wrt": "parameters", "estimator": "jvp"}, "estimator is 'jvp' and kind 'norm'; with wrt='parameters' only"),
        ({"wrt": "parameters", "kind": "direction"}, "estimator is 'vjp' and kind 'direction'; with wrt='parameters'"),
        ({"probes": 0}, "probes is 0; expected a whole number of at least 1"),
        ({"probes": 1.5}, "probes is 1.5; expected a whole number"),
        ({"samples": 0}, "samples is 0; expected a whole number of at least 1"),
        ({"samples": "all"}, "samples is 'all'; expected a whole number"),
        ({"power": 0.5}, "power is 0.5; expected a finite number of at least 1"),
        ({"power": float("inf")}, "power is inf; expected a finite number"),
        ({"power": float("nan")}, "power is nan; expected a finite number"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Jacobian(**options)
