from __future__ import annotations

import pytest
import torch
from torch import nn

import lwkd
from lwkd.program.compare.recipe import Start
from lwkd.program.compare.start import Quantized, start
from lwkd.program.errors import ProgramError
from lwkd.program.models.registry import build


def net(seed: int, name: str = "cnn_4") -> nn.Module:
    torch.manual_seed(seed)
    return build(name, classes=10, channels=1, size=8)


@pytest.fixture
def teacher():
    made = net(0)
    made(torch.rand(8, 1, 8, 8))  # running statistics of its own
    return made.eval().requires_grad_(False)


def begun(kind: Start, teacher: nn.Module, fresh: nn.Module, seed: int = 0) -> nn.Module:
    pairing = lwkd.pair(fresh, teacher, torch.zeros(2, 1, 8, 8))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = start(kind, fresh, teacher, pairing, seed)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    return student


def test_from_scratch_is_the_fresh_net(teacher):
    fresh = net(1)
    assert begun(Start("scratch"), teacher, fresh) is fresh


@pytest.mark.parametrize("segment", [0, 1, 2])
def test_one_segment_is_replaced_and_no_other(segment, teacher):
    fresh = net(1)
    student = begun(Start("replaced", segment=segment), teacher, fresh)
    layer = f"layer{segment + 1}."
    for name, value in student.state_dict().items():
        inside = name.startswith(layer)
        source = fresh if inside else teacher
        assert torch.equal(value, source.state_dict()[name]), name
    assert not torch.equal(student.state_dict()[f"{layer}0.weight"], teacher.state_dict()[f"{layer}0.weight"])


def test_random_segments_differ_by_seed_and_not_by_call(teacher):
    def changed(seed: int) -> frozenset[str]:
        student = begun(Start("replaced", segment="random"), teacher, net(1), seed)
        theirs = teacher.state_dict()
        return frozenset(n.split(".")[0] for n, v in student.state_dict().items() if not torch.equal(v, theirs[n]))

    found = [changed(seed) for seed in range(8)]
    assert all(len(layers) == 1 for layers in found)
    assert len(set(found)) == 3
    assert changed(5) == found[5]


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_pruned_weights_are_the_smallest_and_stay_zero(scope, teacher):
    student = begun(Start("pruned", keep=0.25, scope=scope), teacher, net(1))
    weights = {n: m.weight for n, m in student.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    theirs = {name: teacher.get_submodule(name).weight for name in weights}
    kept = torch.cat([w.flatten() != 0 for w in weights.values()])
    assert kept.float().mean() == pytest.approx(0.25, abs=0.01)
    groups = [list(weights)] if scope == "global" else [[name] for name in weights]
    for group in groups:
        sizes = torch.cat([theirs[name].abs().flatten() for name in group])
        mask = torch.cat([weights[name].flatten() != 0 for name in group])
        assert sizes[~mask].max() <= sizes[mask].min()
    optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        student(torch.rand(4, 1, 8, 8)).square().sum().backward()
        optimizer.step()
    student(torch.rand(4, 1, 8, 8))
    after = torch.cat([m.weight.flatten() for m in student.modules() if isinstance(m, (nn.Conv2d, nn.Linear))])
    assert torch.equal(after != 0, kept)


@pytest.mark.parametrize("kind", [Start("pruned", segment=1, keep=0.1), Start("quantized", segment=1, bits=2)])
def test_the_other_segments_stay_the_teachers(kind, teacher):
    student = begun(kind, teacher, net(1))
    for name, module in student.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            same = torch.equal(module.weight, teacher.get_submodule(name).weight)
            assert same != name.startswith("layer2."), name


def test_quantized_weights_have_few_values_and_learn(teacher):
    student = begun(Start("quantized", bits=3), teacher, net(1))
    conv = student.get_submodule("layer2.0")
    original = teacher.get_submodule("layer2.0").weight
    for row, exact in zip(conv.weight, original, strict=True):
        scale = exact.abs().max() / 3
        expected = (exact / scale).round() * scale
        torch.testing.assert_close(row, expected)
        assert len(row.unique()) <= 7
    student(torch.rand(4, 1, 8, 8)).square().sum().backward()
    assert conv.parametrizations.weight.original.grad.abs().sum() > 0


def test_gradients_pass_straight_through_the_rounding():
    weight = torch.tensor([[0.9, -0.31, 0.05]], requires_grad=True)
    (Quantized(4)(weight) * torch.tensor([[1.0, 2.0, 3.0]])).sum().backward()
    assert weight.grad.tolist() == [[1.0, 2.0, 3.0]]


def test_a_shorter_student_starts_with_the_layers_that_it_shares():
    torch.manual_seed(0)
    teacher = build("resnet14", classes=10, channels=1, size=8).eval()
    fresh = build("resnet8", classes=10, channels=1, size=8)
    student = begun(Start("copy", layers={"layer2.0": "layer2.0", "layer1.0": "layer1.1"}), teacher, fresh)
    theirs = teacher.state_dict()
    assert torch.equal(student.state_dict()["layer1.0.conv1.weight"], theirs["layer1.1.conv1.weight"])
    assert torch.equal(student.state_dict()["layer3.0.conv1.weight"], theirs["layer3.0.conv1.weight"])
    assert torch.equal(student.state_dict()["head.weight"], theirs["head.weight"])


@pytest.mark.parametrize(
    ("kind", "student", "says"),
    [
        (Start("replaced", segment=0), "cnn_2", "different models"),
        (Start("replaced", segment=3), "cnn_4", "segment is 3"),
        (Start("copy", layers={"layer1": "layer9"}), "cnn_4", "layer1.0.weight has no counterpart"),
        (Start("copy", layers={"layer9": "layer1"}), "cnn_4", "no such layer"),
        (Start("copy", layers={"layer2": "layer3"}), "cnn_4", "no counterpart of its shape"),
    ],
)
def test_what_does_not_fit_is_refused(kind, student, says, teacher):
    with pytest.raises(ProgramError, match=says):
        begun(kind, teacher, net(1, student))
