"""Which student pass belongs to which teacher pass, in loops that are not ours; divergences against the reference."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from optimizer_doubles import TwoSteps
from pass_loops import Loop, close, pictures
from saved_runs import through_a_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from toy import Parts, batches, each_form, nets

import lwkd
from lwkd.nets.inputs import Inputs


@each_form
@pytest.mark.parametrize(
    ("order", "right", "passes"),
    [
        ("Sa Sb Tb", "b", {"measured": 1, "unmatched": 1}),  # mean teacher: labelled, then unlabelled pictures
        ("Tb Sa Sb", "b", {"measured": 1, "unmatched": 1}),
        ("Sb Sa Tb", "b", {"measured": 1, "unmatched": 1}),
        ("Ta Tb Sa Sb", "ab", {"measured": 2}),  # siamese nets
        ("Sa Sb Ta Tb", "ab", {"measured": 2}),
        ("Sa Sb Tb Ta", "ab", {"measured": 2}),
        ("Sc Sd Sa Ta", "a", {"measured": 1, "unmatched": 2}),  # attacks on the student first, as in PGD
        ("Ta Sc Sd Sa", "a", {"measured": 1, "unmatched": 2}),
        ("Ta Sa Sa", "a", {"measured": 2}),  # two passes with other dropout
        ("Sa Sa Ta", "a", {"measured": 2}),
        ("Ta Sa Tb Sb", "ab", {"measured": 2}),  # accumulation
        ("Tc Td Ta Sa", "a", {"measured": 1}),  # teacher passes that nobody asked for
    ],
)
def test_the_same_input_decides(form: str, order: str, right: str, passes: dict[str, int]) -> None:
    loop, inputs = Loop(form), dict(zip("abcd", pictures(1, 3, 5, 7), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop.passes(order, inputs)
        found = loop.step()
    assert loop.shown.passes == passes
    assert close(found, loop.truth(*(inputs[x] for x in right)))
    assert not close(found, loop.truth(inputs["c"]))


@each_form
@pytest.mark.parametrize("order", ["Ta Tb Sa Sb", "Sa Sb Ta Tb", "Ta Sa Tb Sb", "Sa Ta Sb Tb", "Sa Ta Tb Sb"])
def test_other_tensors_for_the_teacher_are_matched_in_their_order(form: str, order: str) -> None:
    loop, (a, b) = Loop(form), pictures(1, 3)
    loop.passes(order, {"a": a, "b": b}, {"a": a.clone(), "b": b.clone()})
    found = loop.step()
    assert loop.shown.passes == {"measured": 2}
    assert close(found, loop.truth(a, b))


@pytest.mark.parametrize("order", ["Sa Sb Tb", "Tb Sa Sb", "Ta Tb Sb", "Sb Ta Tb", "Ta Sa Tb"])
def test_an_order_that_leaves_doubt_is_not_compared_and_said_once(order: str) -> None:
    loop, (a, b) = Loop(), pictures(1, 3)
    for step in range(2):
        loop.passes(order, {"a": a, "b": b}, {"a": a.clone(), "b": b.clone()})
        if step:
            assert not loop.step().any()
        else:
            with pytest.warns(UserWarning, match=r"their inputs do not tell which belong together, .* same tensor"):
                assert not loop.step().any()
    assert loop.shown.passes == {"ambiguous": 2 * order.count("S")}
    assert loop.shown.measurements == 0


@pytest.mark.parametrize("same", [True, False])
def test_features_are_let_go_of_once_they_were_compared(same: bool) -> None:
    """From the second step on: in the first it is not known whether another pass asks for them."""
    loop, found = Loop(policy=lwkd.Relative(momentum=0.0)), []
    loop.teacher.low.register_forward_hook(
        lambda _, args, output: found.append(StorageWeakRef(output.untyped_storage()))
    )
    for step, a in enumerate(pictures(1, 3, 5)):
        with torch.no_grad():
            loop.teacher(a if same else a.clone())
        feature = found.pop()
        assert not feature.expired(), "it waits for the student"
        logits = loop.student(a)
        assert feature.expired() == (step > 0)
        logits.sum().backward()
        assert close(loop.step(), loop.truth(a))
        assert feature.expired()


def test_a_loop_that_asks_again_is_remembered() -> None:
    """Two student passes of one input in later steps only: the first of these steps compares one, all others both."""
    loop, inputs = Loop(policy=lwkd.Relative(momentum=0.0)), pictures(1, 3, 5, 7, 9)
    loop.passes("Ta Sa", {"a": inputs[0]})
    loop.step()
    for a, right in zip(inputs[1:3], ({"measured": 2, "unmatched": 1}, {"measured": 4, "unmatched": 1}), strict=True):
        loop.passes("Ta Sa Sa", {"a": a})
        assert close(loop.step(), loop.truth(a))
        assert loop.shown.passes == right
    resumed = Loop()
    resumed.optimizer.load_state_dict(through_a_file(loop.optimizer.state_dict()))
    resumed.passes("Ta Sa", {"a": inputs[3]})
    resumed.step()
    resumed.passes("Ta Sa Sa", {"a": inputs[4]})
    resumed.step()
    assert resumed.shown.passes == {"measured": 3}


def test_a_pair_by_inputs_revokes_one_by_order() -> None:
    """The student's first pass seemed to belong to the teacher's, until the second came with its very input."""
    loop, (a, b) = Loop(), pictures(1, 3)
    loop.passes("Tb Sa Sb", {"a": a, "b": b})
    assert close(loop.step(), loop.truth(b))


def test_strangers_beside_pairs_by_inputs_are_not_compared() -> None:
    loop, (a, b, c) = Loop(), pictures(1, 3, 5)
    loop.passes("Sa Ta Sb", {"a": a, "b": b})
    loop.passes("Tc", {"c": c})
    with pytest.warns(UserWarning, match="do not tell which belong together"):
        found = loop.step()
    assert close(found, loop.truth(a))
    assert loop.shown.passes == {"measured": 1, "ambiguous": 1}


def test_an_input_that_was_changed_in_place_is_another() -> None:
    loop, (a,) = Loop(), pictures(3)
    before = a.clone()
    loop.passes("Ta", {"a": a})
    loop.passes("Sa", {"a": a})
    loop.passes("Ta", {"a": a.mul_(torch.linspace(3, 0, 8))})
    found = loop.step()
    assert close(found, loop.truth(before))
    assert loop.shown.passes == {"measured": 1}


def test_memory_that_is_given_to_the_next_batch_is_another_input() -> None:
    loop, memory = Loop(), bytearray(4 * 64 * 4)

    def batch() -> Tensor:
        return torch.frombuffer(memory, dtype=torch.float32).view(4, 1, 8, 8)

    a = batch()
    place, storage, identity = a.data_ptr(), StorageWeakRef(a.untyped_storage()), Inputs((a,)).identity()
    assert identity.matches(Inputs((a,)).identity())
    loop.passes("Ta", {"a": a})
    del a
    assert storage.expired(), "nothing holds it"
    other = batch()
    assert other.data_ptr() == place
    assert not identity.matches(Inputs((other,)).identity())


def test_views_of_one_batch_are_told_apart() -> None:
    """One tensor with labelled and unlabelled pictures, cut into halves for the student."""
    loop, whole = Loop(), torch.cat(pictures(1, 5))
    for part in whole.chunk(2):
        loop.student(part).sum().backward()
    with torch.no_grad():
        loop.teacher(whole.chunk(2)[1])
    assert close(loop.step(), loop.truth(whole[4:]))


class WithLabels(Parts):
    """A student that takes labels beside the pictures, as those of transformers do."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(self.high(self.low(x)))


def test_more_arguments_for_one_net_are_the_same_input() -> None:
    net, teacher, _ = nets()
    student = WithLabels(net).eval()
    (a, b), labels = pictures(1, 3), torch.zeros(4, dtype=torch.long)
    layers = {"low": "low", "high": "high"}
    pairing = lwkd.pair(student, teacher, a, layers=layers)
    optimizer = lwkd.LayerwiseOptimizer(torch.optim.SGD(student.parameters(), lr=0.0), student, teacher, pairing)
    with torch.no_grad():
        teacher(b)
        teacher(a)
    student(a, labels=labels).sum().backward()
    optimizer.step()
    assert optimizer.passes == {"measured": 1}


# Validations


def validate(loop: Loop, teacher_first: bool, same: bool, alone: str = "") -> None:
    loop.student.eval()
    for x in pictures(7, 8, 9):
        with torch.no_grad():
            for net in (loop.teacher, loop.student) if teacher_first else (loop.student, loop.teacher):
                if not alone or (net is loop.student) == (alone == "student"):
                    net(x if same or net is loop.student else x.clone())
    loop.student.train()


WITH_OWN_PASSES = itertools.product(["jacobian", "hessian"], [(1, "student"), (2, "")])
"""What is measured of them hangs on the same matches, and takes longer: fewer cases."""


@each_form
@pytest.mark.parametrize(
    ("signal", "accumulation", "alone"),
    [
        *itertools.product(["attention"], [1, 2], ["", "student", "teacher"]),
        *((signal, *case) for signal, case in WITH_OWN_PASSES),
    ],
)
@pytest.mark.parametrize("teacher_first", [True, False])
@pytest.mark.parametrize("same", [True, False], ids=["same input", "other tensors"])
def test_validations_in_between_change_no_measurement(
    same: bool, teacher_first: bool, signal: str, accumulation: int, alone: str, form: str
) -> None:
    def run(validated: bool) -> tuple[list[Tensor], dict[str, int]]:
        loop = Loop(form, signal=signal, every=1)
        found = []
        for step in range(3):
            if validated:
                validate(loop, teacher_first, same, alone)
            loop.student.train()
            for number in range(accumulation):
                (x,) = pictures(1 + 2 * step + number)
                order = "Tx Sx" if teacher_first else "Sx Tx"
                loop.passes(order, {"x": x}, {"x": x if same else x.clone()})
            found.append(loop.step())
        return found, {key: count for key, count in loop.shown.passes.items() if key != "no_grad"}

    if alone == "teacher" and not same:
        with pytest.warns(UserWarning, match="do not tell which belong together"):
            assert run(True)[1]["ambiguous"] == 3 * accumulation  # nothing says that these were no training passes
        return
    (calm, counts), (disturbed, disturbed_counts) = run(False), run(True)
    assert counts == disturbed_counts == {"measured": 3 * accumulation}
    assert all(torch.equal(one, other) for one, other in zip(calm, disturbed, strict=True))
    assert calm[0].any()


def test_a_student_that_is_looked_at_in_between_is_still_measured() -> None:
    loop, (a,) = Loop(), pictures(1)
    loop.student.train()
    loop.passes("Ta", {"a": a})
    with torch.no_grad():
        loop.student(a)
    loop.passes("Sa", {"a": a})
    loop.step()
    assert loop.shown.passes == {"measured": 1, "no_grad": 1}


def test_passes_that_wait_do_not_fill_the_memory() -> None:
    loop = Loop()
    for x in pictures(*range(1, 30)):
        loop.passes("Tx", {"x": x})
    kept = loop.shown._rates._matcher._waiting[4].teachers
    assert sum(teacher.made.kept is not None for teacher in kept) == 8
    (a,) = pictures(1)
    loop.passes("Sa Ta", {"a": a})
    assert close(loop.step(), loop.truth(a))
    assert not loop.shown._rates._matcher._waiting


# Nets that choose their path


class Skips(Parts):
    """The toy student, whose second stage is left out when told, or is the last thing that works."""

    skip = broken = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.low(x)
        x = x if self.skip else self.high(x)
        if self.broken:
            raise MemoryError
        return x.mean((1, 2, 3))


def skipping() -> tuple[Skips, Skips, lwkd.LayerwiseOptimizer]:
    """Student and teacher that can leave a layer out, and an optimizer that watches them and teaches nothing."""
    student, teacher = (Skips(net).eval() for net in nets()[:2])
    pairing = lwkd.pair(student, teacher, *pictures(1), layers={"low": "low", "high": "high"})
    base = torch.optim.SGD(student.parameters(), lr=0.0)
    return student, teacher, lwkd.LayerwiseOptimizer(base, student, teacher, pairing)


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_pass_without_a_paired_layer_is_left_out(whose: str) -> None:
    (student, teacher, optimizer), (a, b) = skipping(), pictures(1, 3)

    def once(x: Tensor) -> None:
        with torch.no_grad():
            teacher(x)
        student(x).sum().backward()

    once(a)
    (student if whose == "student" else teacher).skip = True
    once(b)
    optimizer.step()
    assert optimizer.passes == {"measured": 1, "incomplete" if whose == "student" else "unmatched": 1}
    skipped = dict(optimizer.divergences)
    student.skip = teacher.skip = False
    once(a)
    optimizer.step()
    assert optimizer.divergences == pytest.approx(skipped)


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_pass_that_broke_off_leaves_no_feature_to_the_next(whose: str) -> None:
    (student, teacher, optimizer), (a, b) = skipping(), pictures(1, 3)
    net = student if whose == "student" else teacher
    net.broken = True
    with pytest.raises(MemoryError), torch.set_grad_enabled(net is student):
        net(b)
    net.broken, net.skip = False, True
    with torch.no_grad():
        teacher(a)
    student(a).sum().backward()
    optimizer.step()
    assert optimizer.passes == {"incomplete" if whose == "student" else "unmatched": 1}
    assert optimizer.measurements == 0


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_layer_that_never_runs_is_named(whose: str) -> None:
    net_S, net_T, _ = nets()
    student, teacher, (a,) = Skips(net_S).eval(), Skips(net_T).eval(), pictures(1)
    pairing = lwkd.pair(student, teacher, a, layers={"low": "low", "high": "high"})
    optimizer = lwkd.LayerwiseOptimizer(torch.optim.SGD(student.parameters(), lr=0.0), student, teacher, pairing)
    (student if whose == "student" else teacher).skip = True

    def step() -> None:
        with torch.no_grad():
            teacher(a)
        student(a).sum().backward()
        optimizer.step()

    step(), step()
    with pytest.warns(
        UserWarning, match=f"left out because layer 'high' of the {whose} gave no feature .* Attach first"
    ):
        step()


@pytest.mark.parametrize("signal", ["jacobian"])
def test_an_own_pass_without_a_paired_layer_is_left_out_and_counted(signal: str) -> None:
    net_S, net_T, _ = nets()
    student, teacher = Skips(net_S).eval(), Skips(net_T).eval()
    (a,) = pictures(1)
    pairing = lwkd.pair(student, teacher, a, layers={"low": "low", "high": "high"})
    optimizer = lwkd.LayerwiseOptimizer(
        torch.optim.SGD(student.parameters(), lr=0.0), student, teacher, pairing, signal=signal, every=1
    )
    for skip in (True, False):
        with torch.no_grad():
            teacher(a)
        student(a).sum().backward()
        student.skip = skip  # after the training pass, before the signal's own
        optimizer.step()
        student.skip = False
    assert optimizer.passes == {"measured": 2, "incomplete": 1}
    assert optimizer.measurements == 1


# Steps that do not come


def perturb(student: nn.Module) -> None:
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.001)


@each_form
def test_updates_without_a_step_are_said_once(form: str) -> None:
    loop = Loop(form)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for x in pictures(1, 2, 3, 4, 5, 6):
            loop.passes("Tx Sx", {"x": x})
            perturb(loop.student)
    (message,) = [str(one.message) for one in said]
    assert re.search(r"changed three times .* step\(\) .* was not called", message)


@each_form
def test_the_two_steps_of_sam_are_said_once_and_its_step_with_a_closure_is_scaled(form: str) -> None:
    """What the message asks for, ``step``, is there in both forms; the wrapper has no other method of the base's."""
    loop = Loop(form, base=TwoSteps)
    base = getattr(loop.optimizer, "base", loop.optimizer)
    assert hasattr(loop.optimizer, "first_step") == hasattr(loop.optimizer, "second_step") == (form == "attach")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for x in pictures(1, 2, 3, 4, 5, 6):
            for step in (base.first_step, base.second_step):
                loop.passes("Tx Sx", {"x": x})
                step()
                base.zero_grad()
    (message,) = [str(one.message) for one in said]
    assert re.search(r"step\(\) of the optimizer .* not called.* call step\(\) instead of another method", message)
    assert loop.shown.updates == loop.shown.measurements == 0
    assert set(loop.shown.rates.values()) == {1.0}

    loop, (x,) = Loop(form, base=TwoSteps), pictures(1)
    loop.passes("Tx Sx", {"x": x})
    loop.optimizer.step(lambda: loop.passes("Tx Sx", {"x": x}))
    assert loop.shown.updates == loop.shown.measurements == 1
    assert set(loop.shown.rates.values()) != {1.0}


@pytest.mark.parametrize("changes", [lambda loop: perturb(loop.student), lambda loop: None], ids=["EMA swap", "none"])
def test_steps_that_come_are_not_missed(changes: Callable[[Loop], None]) -> None:
    loop = Loop()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, y in zip(pictures(1, 2, 3, 4, 5, 6), pictures(2, 3, 4, 5, 6, 7), strict=True):
            changes(loop)
            loop.passes("Tx Sx Ty Sy", {"x": x, "y": y})
            loop.step()


def test_closures_that_move_the_parameters_are_no_missing_steps() -> None:
    student, teacher, pairing = nets()
    student.eval()
    base = torch.optim.LBFGS(student.parameters(), lr=0.1, max_iter=6)
    optimizer = lwkd.LayerwiseOptimizer(base, student, teacher, pairing)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (student(x) - target).square().mean()
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, _ in batches(3):
            with torch.no_grad():
                target = teacher(x)
            optimizer.step(closure)
    assert optimizer.passes["measured"] > 6


def test_own_passes_see_what_pre_hooks_have_not_changed_yet() -> None:
    """A pre-hook of the user's that scales pictures acts once in the signal's own passes, as in the training pass."""
    (x,) = pictures(3)

    def found(hooked: bool) -> dict[str, float]:
        student, teacher, pairing = nets()
        student.eval()
        for net in (student, teacher):
            if hooked:
                net.register_forward_pre_hook(lambda net, args: (args[0] - 0.3,))
        optimizer = lwkd.LayerwiseOptimizer(
            torch.optim.SGD(student.parameters(), lr=0.0), student, teacher, pairing, signal="jacobian", every=1
        )
        given = x if hooked else x - 0.3
        with torch.no_grad():
            teacher(given)
        student(given).sum().backward()
        optimizer.step()
        return dict(optimizer.divergences)

    assert found(True) == pytest.approx(found(False), rel=1e-4)
