"""update_rates against the reference, step by step."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import VALUE, assert_close

from lwkd import ops, reference
from lwkd.reference import initial_rates

POLICIES = ("relative", "decay", "constant")


def column(*divergences):
    return torch.tensor(divergences, dtype=torch.float32).unsqueeze(1)


def assert_same_state(found, expected):
    assert torch.equal(found.counts, expected.counts)
    for name in ("average", "baseline", "divergences", "multipliers"):
        assert_close(getattr(found, name), getattr(expected, name), VALUE[torch.float32])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    measurements=st.integers(1, 6).flatmap(
        lambda layers: st.lists(
            st.lists(st.one_of(st.just(0.0), st.floats(2**-20, 8, width=32)), min_size=layers, max_size=layers),
            min_size=1,
            max_size=5,
        )
    ),
    policy=st.sampled_from(POLICIES),
    gamma=st.sampled_from([1.0, 0.5, 2.0, -1.0, 0.0]),
    momentum=st.sampled_from([0.0, 0.9]),
    normalize=st.booleans(),
)
def test_trajectories(measurements, policy, gamma, momentum, normalize):
    options = {"policy": policy, "gamma": gamma, "momentum": momentum, "normalize": normalize, "clamp": (0.25, 4.0)}
    found = expected = initial_rates(len(measurements[0]))
    for divergences in measurements:
        found, multipliers, skipped = ops.update_rates(found, column(*divergences), **options)
        expected, _, expected_skipped = reference.update_rates(expected, column(*divergences), **options)
        assert_same_state(found, expected)
        assert torch.equal(multipliers, found.multipliers)
        assert skipped == expected_skipped


def jacobian_statistics(layers, generator):
    """Sums of random pairs: for some layers of opposite, zero or very unequal derivatives."""
    a, b = (torch.randn(layers, 6, generator=generator) for _ in range(2))
    which = torch.randint(5, (layers, 1), generator=generator)
    a = torch.where(which == 1, torch.zeros_like(a), torch.where(which == 2, -3 * b, a))
    b = torch.where(which == 3, torch.zeros_like(b), torch.where(which == 4, 100 * b, b))
    return reference.jacobian_sums(list(a), list(b))


def curvatures(layers, generator):
    return torch.randn(layers, 2, generator=generator) * torch.randint(2, (layers, 2), generator=generator)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    divergence=st.sampled_from(["direction", "norm", "relative", "hessian"]),
    layers=st.integers(1, 6),
    measurements=st.integers(1, 5),
    policy=st.sampled_from(POLICIES),
    momentum=st.sampled_from([0.0, 0.9]),
    normalize=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_trajectories_of_ratios(divergence, layers, measurements, policy, momentum, normalize, seed):
    generator = torch.Generator().manual_seed(seed)
    measure = curvatures if divergence == "hessian" else jacobian_statistics
    options = {"divergence": divergence, "policy": policy, "momentum": momentum, "normalize": normalize}
    found = expected = initial_rates(layers, reference.STATISTICS[divergence])
    for _ in range(measurements):
        statistics = measure(layers, generator)
        found, multipliers, skipped = ops.update_rates(found, statistics, **options)
        expected, _, expected_skipped = reference.update_rates(expected, statistics, **options)
        assert_same_state(found, expected)
        assert torch.equal(multipliers, found.multipliers)
        assert skipped == expected_skipped


@pytest.mark.parametrize("divergence", ["direction", "norm", "relative", "hessian"])
def test_a_statistic_that_is_not_finite_and_distances_that_are_all_zero_are_skipped(divergence):
    columns = reference.STATISTICS[divergence]
    alike = torch.tensor([[2.0, 2.0, 2.0, 0.0][:columns]] * 2)
    apart = torch.tensor([[1.0, 2.0, 0.5, 2.0][:columns]] * 2)
    before, *_ = ops.update_rates(initial_rates(2, columns), apart, divergence=divergence)
    for column_ in range(columns):
        broken = apart.clone()
        broken[1, column_] = math.nan
        after, _, skipped = ops.update_rates(before, broken, divergence=divergence)
        assert skipped == 1
        assert all(torch.equal(kept, was) for kept, was in zip(after[:4], before[:4], strict=True))
    _, multipliers, skipped = ops.update_rates(initial_rates(2, columns), alike, divergence=divergence)
    assert skipped == 1
    assert multipliers.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("bad", [(math.nan, 0.1), (0.1, math.inf), (-math.inf, 0.1), (0.0, 0.0)])
@pytest.mark.parametrize("policy", POLICIES)
def test_an_unusable_measurement_is_skipped_and_counted(bad, policy):
    before, *_ = ops.update_rates(initial_rates(2), column(0.3, 0.1), policy=policy, momentum=0.0)
    after, multipliers, skipped = ops.update_rates(before, column(*bad), policy=policy, momentum=0.0)
    assert skipped == 1
    assert after.counts.tolist() == [1, 1]
    for kept, was in zip(after[:4], before[:4], strict=True):
        assert torch.equal(kept, was)
    assert torch.equal(multipliers, before.multipliers)
    first, _, skipped = ops.update_rates(initial_rates(2), column(*bad), policy=policy)
    assert first.multipliers.tolist() == [1.0, 1.0]
    assert skipped == 1


def test_features_that_are_not_finite_end_as_a_skipped_measurement():
    student, teacher = [torch.ones(1, 1, 4), torch.full((1, 1, 4), math.nan)], [torch.rand(1, 2, 4)] * 2
    divergence = ops.attention_divergence(student, teacher)
    state, multipliers, skipped = ops.update_rates(initial_rates(2), divergence.unsqueeze(1))
    assert skipped == 1
    assert multipliers.tolist() == [1.0, 1.0]
    assert torch.isfinite(state.average).all()


@pytest.mark.parametrize("found_inf", [torch.tensor(1.0), torch.tensor([1], dtype=torch.int32), torch.tensor(True)])
def test_an_infinite_gradient_step_masks_everything(found_inf):
    before, *_ = ops.update_rates(initial_rates(2), column(0.3, 0.1))
    for divergences in ((0.5, 0.1), (math.nan, 0.1)):
        after, _, skipped = ops.update_rates(before, column(*divergences), found_inf=found_inf)
        assert skipped == 0
        assert all(torch.equal(kept, was) for kept, was in zip(after, before, strict=True))
    after, *_ = ops.update_rates(before, column(0.5, 0.1), found_inf=torch.zeros_like(found_inf))
    assert after.counts.tolist() == [2, 0]


def test_no_input_is_modified_and_no_output_aliases_one():
    state = initial_rates(3)
    copies = [tensor.clone() for tensor in state]
    statistics = column(0.1, 0.2, 0.3)
    new, *_ = ops.update_rates(state, statistics)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(state, copies, strict=True))
    assert not {t.data_ptr() for t in new} & {t.data_ptr() for t in [*state, statistics]}


def test_one_layer_and_many():
    _, multipliers, _ = ops.update_rates(initial_rates(1), column(0.7))
    assert multipliers.tolist() == [1.0]
    divergences = torch.linspace(0.1, 1, 512).unsqueeze(1)
    found, *_ = ops.update_rates(initial_rates(512), divergences)
    assert_same_state(found, reference.update_rates(initial_rates(512), divergences)[0])


def test_opcheck_and_compile():
    state = initial_rates(2)
    rule = ("attention", "relative", 1.0, 0.9, [0.5, 1.5], False)
    torch.library.opcheck(torch.ops.lwkd.update_rates, (*state, column(0.3, 0.1), *rule, None))
    torch.library.opcheck(torch.ops.lwkd.update_rates, (*state, column(0.3, 0.1), *rule, torch.tensor(0.0)))
    torch._dynamo.reset()
    compiled = torch.compile(lambda s, x: ops.update_rates(s, x)[1], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(state, column(0.3, 0.1)), ops.update_rates(state, column(0.3, 0.1))[1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"policy": "fastest"}, ValueError, "policy 'relative', 'decay' or 'constant', found 'fastest'"),
        ({"divergence": "jacobian"}, ValueError, "'direction', 'norm', 'relative' or 'hessian', found 'jacobian'"),
        ({"divergence": "direction"}, ValueError, r"expected \(L, 4\) for divergence 'direction', found \[2, 1\]"),
        ({"divergence": "hessian"}, ValueError, r"expected \(L, 2\) for divergence 'hessian', found \[2, 1\]"),
        ({"gamma": math.nan}, ValueError, "finite gamma"),
        ({"momentum": 1.0}, ValueError, r"momentum in \[0, 1\), found 1"),
        ({"momentum": -0.1}, ValueError, "momentum"),
        ({"clamp": (2.0, 1.0)}, ValueError, "smallest <= largest"),
        ({"clamp": (-1.0, 1.0)}, ValueError, "0 <= smallest"),
        ({"statistics": torch.zeros(2)}, ValueError, r"expected \(L, 1\).*found \[2\]"),
        ({"statistics": torch.zeros(2, 4)}, ValueError, r"found \[2, 4\]"),
        ({"statistics": torch.zeros(3, 1)}, ValueError, r"average: expected shape \[3, 1\], found \[2, 1\]"),
        (
            {"statistics": torch.zeros(2, 1, dtype=torch.float64)},
            TypeError,
            "statistics: expected float32, found Double",
        ),
        ({"counts": torch.zeros(2)}, TypeError, "counts: expected Long, found Float"),
        ({"multipliers": torch.ones(3)}, ValueError, r"multipliers: expected shape \[2\], found \[3\]"),
    ],
)
def test_errors(change, error, message):
    fields = {name: change[name] for name in change if name in reference.RateState._fields}
    options = {name: change[name] for name in change if name not in (*fields, "statistics")}
    statistics = change.get("statistics", column(0.3, 0.1))
    with pytest.raises(error, match=message):
        ops.update_rates(initial_rates(2)._replace(**fields), statistics, **options)
