from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compare_runs import recipe, trial
from program_runs import same

from lwkd.program.compare import trial as trials
from lwkd.program.compare.arms import Replayed
from lwkd.program.compare.pictures import shift_of, shown_to_student, split_off
from lwkd.program.compare.recipe import Start
from lwkd.program.compare.trial import DEVELOPMENT, Trial
from lwkd.program.errors import ProgramError
from lwkd.program.seeds import repeatable


@pytest.fixture(scope="module")
def weights():
    return trial(recipe()).teacher.run()["weights"]


def ran(of: Trial, weights) -> tuple[dict, dict]:
    """The result, and the student's weights at the end."""
    with repeatable(1):
        run = trials._Run(of, replace(of.arm.settings, lr=of.lr, seed=of.seed), weights)
        return run.result(), run.student.state_dict()


def test_rates_of_a_layerwise_run_replayed_by_groups_give_the_same_student_bit_for_bit(weights, monkeypatch):
    layerwise = trial(recipe(), "attention")
    found, student = ran(layerwise, weights)
    assert found["rates"].shape == found["divergences"].shape == (8, 3)
    assert found["rates"][0].tolist() == [1, 1, 1]
    assert (found["rates"][1:] != 1).any(0).all()
    monkeypatch.setattr(trials, "control", lambda arm, rates, seed: Replayed(rates))
    again = replace(trial(recipe(), "attention: its mean, all layers"), source=layerwise, rates=found["rates"])
    repeated, twin = ran(again, weights)
    assert repeated["score"] == found["score"]
    assert same(twin, student)


def test_a_trial_gives_the_same_bits_again(weights):
    of = trial(recipe(), "attention")
    one, other = of.run(weights), of.run(weights)
    assert same(one, other)


def test_arms_differ_in_nothing_but_their_rates(weights):
    """Equal rates, set in three ways, give the same student."""
    one = recipe(arms={"one": {"rates": "layerwise", "policy": "constant", "multiplier": [1.0]}})
    found = [ran(trial(one, arm), weights)[1] for arm in ("uniform", "one", {"rates": "layer-decay", "decay": 1.0})]
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def test_a_frozen_prefix_stays_as_it_was(weights):
    of = recipe(start={"kind": "copy"})
    _, student = ran(trial(of, {"rates": "frozen-prefix", "layers": 2}), weights)
    moved = {n for n, v in student.items() if n.endswith(("weight", "bias")) and not torch.equal(v, weights[n])}
    assert moved == {n for n in weights if n.endswith(("weight", "bias")) and not n.startswith("layer1")}


@pytest.mark.parametrize("method", ["supervised", "kd", "kd+attention", "kd+jacobian", "kd+hessian"])
@pytest.mark.parametrize("arm", ["uniform", "attention"])
def test_every_method_trains(method, arm, weights):
    found = trial(recipe(labels=True, epochs=1), arm, method=method).run(weights)
    assert found["finite"]
    assert 0 < found["score"] < 1


def test_methods_are_different_losses(weights):
    of = recipe(labels=True, epochs=1, weights={"kd+hessian": 1.0})
    students = [ran(trial(of, method=m), weights)[1] for m in ("supervised", "kd", "kd+attention", "kd+hessian")]
    assert len({float(student["head.weight"].sum()) for student in students}) == 4


@pytest.mark.parametrize(
    "start", [Start("scratch"), Start("pruned"), Start("quantized", bits=3), Start("copy")], ids=lambda s: s.kind
)
@pytest.mark.parametrize("signal", ["attention", "jacobian", "hessian"])
def test_every_start_is_measured_by_every_signal(start, signal, weights):
    of = recipe(
        epochs=1,
        arms={"a": {"rates": "layerwise", "signal": signal, **({"every": 1} if signal != "attention" else {})}},
    )
    found = trial(replace(of, start=start), "a").run(weights)
    assert torch.isfinite(found["divergences"]).all()
    assert (found["divergences"][-1] > 0).any()


def test_the_keys_of_trials_tell_results_apart_and_not_recipes():
    base = trial(recipe())
    assert trial(recipe(title="Other", seeds=[4, 5], difference=2.0)).key == base.key
    others = [
        trial(recipe(), seed=1),
        trial(recipe(), method="supervised"),
        trial(recipe(), "attention"),
        trial(recipe(), {"rates": "layer-decay", "decay": 0.8}),
        trial(recipe(label_noise=0.5)),
        trial(recipe(start={"kind": "pruned"})),
        trial(recipe(epochs=3)),
        trial(recipe(teacher_epochs=2)),
        trial(recipe(shift="blurred")),
        replace(base, lr=0.1),
        replace(trial(recipe(), "attention: its mean, all layers"), source=trial(recipe(), "attention", seed=3)),
        replace(trial(recipe(), "attention: its mean, all layers"), source=trial(recipe(), "attention", seed=4)),
    ]
    assert len({base.key, *(other.key for other in others)}) == 1 + len(others)


def test_development_never_sees_the_test_pictures_nor_trains_on_the_validation_pictures():
    of = recipe(limit=None)
    test, validation = (split_off(of.settings, 400, split) for split in ("test", "validation"))
    assert torch.equal(test.train.images, validation.train.images)
    whole = torch.cat([test.train.images, validation.test.images])
    assert len(whole) == 1437
    assert len(validation.test) == 400
    assert len({picture.numpy().tobytes() for picture in test.test.images} & {p.numpy().tobytes() for p in whole}) < 5
    assert trial(of, seed=DEVELOPMENT).development
    assert not trial(of).development


def test_students_of_other_seeds_see_other_pictures_and_their_labels():
    of = recipe()
    whole = split_off(of.settings, 400, "test")
    label_of = {p.numpy().tobytes(): int(y) for p, y in zip(whole.train.images, whole.train.labels, strict=True)}
    one, again, other = (shown_to_student(whole, of, seed).train for seed in (1, 1, 2))
    assert torch.equal(one.images, again.images)
    assert not torch.equal(one.images, other.images)
    assert len(one) == 64
    assert all(label_of[p.numpy().tobytes()] == int(y) for p, y in zip(one.images, one.labels, strict=True))


def test_label_noise_is_the_share_of_labels_that_are_drawn_anew():
    of = recipe(label_noise=0.5, student_limit=1000)
    whole = split_off(of.settings, 400, "test")
    noisy = shown_to_student(whole, of, 1).train.labels
    right = shown_to_student(whole, recipe(student_limit=1000), 1).train.labels
    # Half of them are drawn anew, and nine of ten of these are then wrong.
    assert 0.40 < (noisy != right).float().mean() < 0.50


def test_a_shift_is_for_the_student_only(weights):
    pytest.importorskip("torchvision")  # which blurs
    data = split_off(recipe().settings, 400, "test")
    x = (data.test.images[:4].float() / 255 - data.mean[0]) / data.std[0]
    inverted = shift_of(recipe(shift="inverted"), data)(x) * data.std[0] + data.mean[0]
    torch.testing.assert_close(inverted, 1 - data.test.images[:4].float() / 255)
    blurred = shift_of(recipe(shift="blurred"), data)(x)
    assert blurred.var() < 0.8 * x.var()
    found = [
        trial(recipe(shift=shift, start={"kind": "copy"}, epochs=1)).run(weights)["score"]
        for shift in ("none", "inverted")
    ]
    assert found[0] > found[1]


def test_more_validation_pictures_than_there_are_is_an_error():
    with pytest.raises(ProgramError, match="1437 training pictures, 1430 of them for validation"):
        split_off(recipe().settings, 1430, "test")


def test_a_loss_that_is_no_number_ends_the_run_and_is_told(weights):
    found = replace(trial(recipe()), lr=1e30).run(weights)
    assert not found["finite"]
    assert found["score"] < 0.5
