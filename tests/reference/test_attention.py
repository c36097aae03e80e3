"""The specification against closed forms and numerical derivatives, in float64."""

import math

import pytest
import torch
from cases import CASES, build
from tolerances import CLOSED_FORM, VALUE, assert_close

from lwkd import reference

SMALL = [case for case in CASES if case.name in ("conv", "odd", "resized", "tokens", "volume", "weights", "power_4")]


def feature(*map_values):
    """A feature (1, 1, N) whose map (power 1) is proportional to the values."""
    return torch.tensor([[list(map_values)]], dtype=torch.float64)


def divergences(student, teacher, **options):
    return reference.attention_divergence([student], [teacher], **options)


def divergence(student, teacher, **options):
    return divergences(student, teacher, **options).item()


def entropy(*distribution):
    return -sum(p * math.log(p) for p in distribution if p > 0)


@pytest.mark.parametrize("betas", [(0.5, 0.5), (0.3, 0.7)])
@pytest.mark.parametrize(("q", "p"), [(0.2, 0.6), (0.5, 0.5), (0.01, 0.99), (0.0, 0.3)])
def test_jsd_of_two_points(q, p, betas):
    mixture = betas[0] * q + betas[1] * p
    expected = entropy(mixture, 1 - mixture) - betas[0] * entropy(q, 1 - q) - betas[1] * entropy(p, 1 - p)
    found = divergence(feature(q, 1 - q), feature(p, 1 - p), power=1, betas=betas)
    assert found == pytest.approx(expected, rel=CLOSED_FORM, abs=CLOSED_FORM)


def test_identical_maps_have_no_distance():
    map_ = feature(0.1, 0.4, 0.0, 0.5)
    assert divergence(map_, 7 * map_) == pytest.approx(0, abs=CLOSED_FORM)
    assert divergence(map_, -map_, kind="l2") == pytest.approx(0, abs=CLOSED_FORM)


def test_disjoint_maps_are_at_the_upper_bound():
    one, other = feature(3.0, 1.0, 0.0, 0.0), feature(0.0, 0.0, 2.0, 5.0)
    assert divergence(one, other) == pytest.approx(math.log(2), rel=CLOSED_FORM)
    assert math.log(2) == reference.LARGEST_JSD
    assert divergence(one, other, betas=(0.25, 0.75)) == pytest.approx(entropy(0.25, 0.75), rel=CLOSED_FORM)
    assert divergence(one, other, kind="l2") == pytest.approx(2, rel=CLOSED_FORM)


def test_an_empty_map_is_the_uniform_one():
    empty, uniform = feature(0.0, 0.0, 0.0), feature(1.0, 1.0, 1.0)
    assert divergence(empty, uniform) == pytest.approx(0, abs=CLOSED_FORM)
    assert divergence(empty, empty) == 0
    assert_close(reference.attention_maps([empty])[0], torch.full((1, 3), 1 / 3, dtype=torch.float64), CLOSED_FORM)
    below = torch.full((1, 1, 2), math.sqrt(reference.EMPTY_MAP / 3), dtype=torch.float64, requires_grad=True)
    reference.attention_divergence([below], [feature(0.2, 0.8)]).sum().backward()
    assert below.grad is not None
    assert below.grad.abs().max() == 0


def test_l2_of_two_angles():
    one, other = feature(1.0, 0.0), feature(math.cos(0.3), math.sin(0.3))
    assert divergence(one, other, power=1, kind="l2") == pytest.approx(2 - 2 * math.cos(0.3), rel=CLOSED_FORM)


@pytest.mark.parametrize("kind", ["jsd", "l2"])
def test_bounds(kind):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        student, teacher = (torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
        assert 0 <= divergence(student, teacher, kind=kind) <= (math.log(2) if kind == "jsd" else 2)


def test_resizing_averages_areas():
    student = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], dtype=torch.float64)
    found = reference.attention_maps([student], power=1, sizes=[(2,)])[0]
    assert_close(found, torch.tensor([[0.3, 0.7]], dtype=torch.float64), CLOSED_FORM)
    teacher = feature(1.5, 3.5)
    assert divergence(student, teacher, power=1) == pytest.approx(0, abs=CLOSED_FORM)
    odd = reference.attention_maps([feature(1.0, 2.0, 6.0)], power=1, sizes=[(2,)])[0]  # bins 0-1 and 1-2
    assert_close(odd, torch.tensor([[1.5, 4.0]], dtype=torch.float64) / 5.5, CLOSED_FORM)


def test_small_distances_keep_their_digits():
    q = torch.tensor([0.25, 0.25, 0.25, 0.25], dtype=torch.float64)
    shift = 1e-6 * torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    found = divergence((q * (1 + shift)).view(1, 1, 4), q.view(1, 1, 4), power=1)
    assert found == pytest.approx(1e-12 / 8, rel=1e-5)  # JSD of q(1 + e) and q is the mean of e^2, over 8


@pytest.mark.parametrize("share", [1e-8, 1e-14, 1e-100])
def test_gradient_where_one_map_has_next_to_nothing(share):
    """With q = r/R and m = b1·q + b2·p it is b1·(log(q/m) − Σ q·log(q/m))/R, however small q/m is."""
    student = feature(share, 1.0, 3.0).requires_grad_()
    (found,) = torch.autograd.grad(divergences(student, feature(1.0, 1.0, 2.0), power=1, betas=(0.3, 0.7)), student)
    total = share + 4
    logs = [math.log(r / (0.3 * r + 0.7 * p * total / 4)) for r, p in ((share, 1.0), (1.0, 1.0), (3.0, 2.0))]
    mean = (share * logs[0] + logs[1] + 3 * logs[2]) / total
    expected = torch.tensor([[[0.3 * (log - mean) / total for log in logs]]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_probabilities_average_heads_and_rows():
    student = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]]], dtype=torch.float64)
    teacher = torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]], dtype=torch.float64)
    row = entropy(0.25, 0.75) - 0.5 * entropy(0.5, 0.5)
    assert divergence(student, teacher, source="probabilities") == pytest.approx(row / 2, rel=CLOSED_FORM)


@pytest.mark.parametrize("kind", ["jsd", "l2"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradient_of_the_divergence(case, kind):
    student, teacher = build(case, torch.float64)
    options = {"power": case.power, "kind": kind, "betas": case.betas}
    inputs = tuple(f.contiguous().requires_grad_() for f in student)
    assert torch.autograd.gradcheck(
        lambda *s: reference.attention_divergence(s, teacher, **options), inputs, fast_mode=True
    )


@pytest.mark.parametrize("power", [2.0, 3.0])
def test_gradient_of_maps_and_map_tangents(power):
    generator = torch.Generator().manual_seed(1)
    shape = (2, 3, 4, 3)
    feature_, tangent = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))

    def both(f, t):
        maps, tangents = reference.attention_maps([f], [t], power=power, sizes=[(2, 3)])
        return maps[0], tangents[0]

    assert torch.autograd.gradcheck(both, (feature_.requires_grad_(), tangent.requires_grad_()), fast_mode=True)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_map_tangents_are_forward_mode(case):
    student, _ = build(case, torch.float64)
    generator = torch.Generator().manual_seed(2)
    tangents = [torch.randn(f.shape, generator=generator, dtype=torch.float64) for f in student]
    _, found = reference.attention_maps(student, tangents, power=case.power)
    for feature_, tangent, map_tangent in zip(student, tangents, found, strict=True):
        one = lambda f: reference.attention_maps([f], power=case.power)[0]  # noqa: E731
        _, expected = torch.func.jvp(one, (feature_,), (tangent,))
        assert_close(map_tangent, expected, CLOSED_FORM)


@pytest.mark.parametrize("values", [(0.0, 0.0, 0.0), (1.0, 0.0, 2.0)])
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0])
def test_exact_zeros_have_finite_derivatives(values, power):
    student = feature(*values).requires_grad_()
    reference.attention_divergence([student], [feature(1.0, 2.0, 3.0)], power=power).sum().backward()
    assert torch.isfinite(student.grad).all()
    assert (student.grad[student == 0] == 0).all()


def test_half_precision_is_widened_before_it_is_squared():
    large = torch.tensor([[[300.0, 600.0]]], dtype=torch.float16)
    assert_close(reference.attention_maps([large])[0], torch.tensor([[0.2, 0.8]]), VALUE[torch.float16])


def updated(state, *divergences, **options):
    return reference.update_rates(state, torch.tensor(divergences).unsqueeze(1), **options)


def test_relative_policy():
    options = {"clamp": (0.0, 10.0), "momentum": 0.5}
    state, multipliers, _ = updated(reference.initial_rates(2), 0.3, 0.1, **options)
    assert multipliers.tolist() == pytest.approx([1.5, 0.5])
    _, multipliers, _ = updated(state, 0.1, 0.1, **options)  # averages 0.2 and 0.1
    assert multipliers.tolist() == pytest.approx([4 / 3, 2 / 3])
    _, multipliers, _ = updated(state, 0.1, 0.1, gamma=-1.0, **options)
    assert multipliers.tolist() == pytest.approx([3 / 4, 3 / 2])
    _, multipliers, _ = updated(reference.initial_rates(1), 0.7)
    assert multipliers.tolist() == [1.0]


def test_decay_policy():
    options = {"policy": "decay", "momentum": 0.0, "clamp": (0.1, 1.5), "gamma": 2.0}
    state, multipliers, _ = updated(reference.initial_rates(3), 0.4, 0.2, 0.0, **options)
    assert multipliers.tolist() == [1.0, 1.0, 1.0]
    state, multipliers, _ = updated(state, 0.2, 0.01, 0.0, **options)
    assert multipliers.tolist() == pytest.approx([0.25, 0.1, 1.0])
    _, multipliers, _ = updated(state, 0.4, 0.2, 0.1, **options)
    assert multipliers.tolist() == pytest.approx([1.0, 1.0, 1.5])


def test_normalised_and_constant_policies():
    _, multipliers, _ = updated(reference.initial_rates(2), 0.9, 0.1, normalize=True)
    assert multipliers.mean().item() == pytest.approx(1.0)
    assert multipliers.tolist() == pytest.approx([1.5, 0.5])
    state = reference.initial_rates(2)._replace(multipliers=torch.tensor([0.3, 2.0]))
    new, multipliers, _ = updated(state, 0.9, 0.1, policy="constant", normalize=True)
    assert torch.equal(multipliers, state.multipliers)
    assert new.divergences.tolist() == pytest.approx([0.9, 0.1])
