"""Which of the user's passes are measured, and that copies, recomputation and compiling do not disturb this."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from toy import BASES, batches, each_form, make, moving, nets, same, train, watched, weights

import lwkd


@each_form
@pytest.mark.parametrize("signal", ["attention", "jacobian", "hessian"])
def test_order_of_the_passes_does_not_matter(form: str, signal: str) -> None:
    results = []
    for teacher_first in (True, False):
        student, teacher, optimizer, shown = watched(form, signal=signal, every=1)
        for x, y in batches(3):
            outputs = {}
            for net in (teacher, student) if teacher_first else (student, teacher):
                with torch.set_grad_enabled(net is student):
                    outputs[net] = net(x)
            optimizer.zero_grad()
            lwkd.losses.distillation(outputs[student], outputs[teacher], y).backward()
            optimizer.step()
        results.append((weights(student), shown.rates))
        assert (shown.passes, shown.measurements) == ({"measured": 3}, 3)
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert set(results[0][1].values()) != {1.0}


@each_form
def test_student_first_with_accumulation_pairs_each_pass_with_its_own_teacher_pass(form: str) -> None:
    student, teacher, optimizer, shown = watched(form)
    student.eval()
    expected = []
    with lwkd.Capture(student, teacher, shown.pairing) as capture:
        for x, y in batches(2):
            s = student(x)
            with torch.no_grad():
                t = teacher(x)
            lwkd.losses.distillation(s, t, y).backward()
            expected.append(lwkd.reference.attention_divergence([f.detach() for f in capture.student], capture.teacher))
    optimizer.step()
    torch.testing.assert_close(torch.tensor(list(shown.divergences.values())), torch.stack(expected).mean(0))


@each_form
def test_teacher_under_inference_mode(form: str) -> None:
    results = []
    for mode in (torch.no_grad, torch.inference_mode):
        student, teacher, optimizer, shown = watched(form)
        capture = lwkd.Capture(student, teacher, shown.pairing)
        for x, y in batches(2):
            with mode():
                t = teacher(x)
            s = student(x)
            loss = lwkd.losses.distillation(s, t.clone(), y)
            loss = loss + lwkd.losses.attention_transfer(capture.student, capture.teacher)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append((weights(student), shown.rates))
        assert shown.passes["measured"] == 2
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@each_form
def test_validation_copies_and_recomputation_do_not_disturb_the_features(form: str) -> None:
    def run(disturb: bool) -> tuple[dict[str, torch.Tensor], dict[str, float], Any]:
        student, teacher, optimizer, shown = watched(form)
        average = AveragedModel(student)
        twin = copy.deepcopy(student)
        for x, y in batches(3):
            with torch.no_grad():
                t = teacher(x)
            if disturb:
                with torch.no_grad():
                    student.eval()(torch.rand(9, 1, 8, 8))
                    average(torch.rand_like(x))
                student.train()
                twin(torch.rand_like(x)).sum().backward()
            s = student(x)
            if disturb:
                average.update_parameters(student)
                average(torch.rand_like(x))
            optimizer.zero_grad()
            lwkd.losses.distillation(s, t, y).backward()
            optimizer.step()
        return weights(student), shown.rates, shown.passes

    calm, disturbed = run(False), run(True)
    assert same(calm[0], disturbed[0])
    assert calm[1] == disturbed[1]
    assert disturbed[2] == {"measured": 3, "no_grad": 3}


class Checkpointed(nn.Module):
    """The toy student with its stages recomputed in backward."""

    def __init__(self, stages: nn.Sequential, reentrant: bool) -> None:
        super().__init__()
        self.stages, self.reentrant = stages, reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_() if self.reentrant else x
        for stage in self.stages:
            x = checkpoint(stage, x, use_reentrant=self.reentrant, preserve_rng_state=False)
        return x


@each_form
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_recomputation(reentrant: bool, form: str) -> None:
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        student, teacher, _ = nets()
        student[0][1], student[1][1] = nn.Identity(), nn.Identity()  # batch statistics would be updated twice
        wrapped = Checkpointed(student, reentrant) if checkpointed else student
        prefix = "stages." if checkpointed else ""
        pairing = lwkd.pair(
            Checkpointed(student, reentrant=False) if checkpointed else student,
            teacher,
            torch.rand(1, 1, 8, 8),
            layers={f"{prefix}low": "low", f"{prefix}high": "high"},
        )
        optimizer, shown = make(form, BASES["sgd"](wrapped.parameters()), wrapped, teacher, pairing, policy=moving())
        train(optimizer, wrapped, teacher, 3)
        results.append((weights(student), list(shown.rates.values()), shown.passes))
    assert same(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]
    assert results[1][2] == {"measured": 3}


@each_form
def test_a_whole_model_recomputed_in_backward_is_measured_once(form: str) -> None:
    student, teacher, optimizer, shown = watched(form)
    student.eval()
    x, y = next(batches(1))
    with torch.no_grad():
        t = teacher(x)
    s = checkpoint(student, x, use_reentrant=False)
    lwkd.losses.distillation(s, t, y).backward()
    optimizer.step()
    assert shown.passes["measured"] == 1


@each_form
def test_every_and_samples(form: str) -> None:
    student, teacher, optimizer, shown = watched(form, every=3, samples=2)
    train(optimizer, student, teacher, 7)
    assert shown.passes == {"measured": 3, "not_due": 4}
    assert shown.measurements == 3


def test_pairing_anew_is_not_a_pass() -> None:
    student, teacher, _, shown = watched()
    lwkd.pair(student, teacher, torch.rand(4, 1, 8, 8))
    assert not shown.passes
    assert not shown._rates._matcher._waiting


@each_form
def test_a_compiled_student_is_measured_and_not_recompiled_when_rates_change(form: str) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    student, teacher, pairing = nets()
    compiled = torch.compile(student, backend=backend)
    optimizer, shown = make(form, BASES["sgd"](student.parameters()), compiled, teacher, pairing)
    train(optimizer, compiled, teacher, 1)
    once = len(graphs)
    train(optimizer, compiled, teacher, 4)
    assert shown.passes == {"measured": 5}
    assert set(shown.rates.values()) != {1.0}
    assert len(graphs) == once == 1


def test_probabilities_as_features() -> None:
    class Attends(nn.Module):
        def __init__(self, heads: int) -> None:
            super().__init__()
            self.queries, self.attention = nn.Linear(4, 4 * heads), nn.Softmax(-1)
            self.heads = heads

        def forward(self, x_BNC: torch.Tensor) -> torch.Tensor:
            q = self.queries(x_BNC).unflatten(-1, (self.heads, 4)).transpose(1, 2)
            return (self.attention(q @ x_BNC.unsqueeze(1).transpose(2, 3)) @ x_BNC.unsqueeze(1)).mean((1, 2, 3))

    torch.manual_seed(0)
    student, teacher, x = Attends(1), Attends(3).eval(), torch.rand(2, 5, 4)
    pairing = lwkd.pair(student, teacher, x, layers={"attention": "attention"})
    signal = lwkd.signals.Attention(source="probabilities")
    optimizer = lwkd.LayerwiseOptimizer(
        torch.optim.SGD(student.parameters(), lr=0.1), student, teacher, pairing, signal=signal
    )
    with torch.no_grad():
        teacher(x)
    student(x).sum().backward()
    optimizer.step()
    assert 0 < optimizer.divergences["attention"] < lwkd.reference.LARGEST_JSD


def test_nothing_is_kept_where_no_measurement_is_due() -> None:
    """Features of a teacher's pass that does not count would take memory from the layers behind."""
    student, teacher, optimizer, shown = watched("wrapper", every=2)
    kept = []
    slots = shown._rates._matcher._teacher.slots
    teacher.head.register_forward_hook(lambda *_: kept.append([slot is not None for slot in slots]))
    train(optimizer, student, teacher, 4)
    assert kept == [[True, True], [False, False]] * 2
    assert shown.passes == {"measured": 2, "not_due": 2}
