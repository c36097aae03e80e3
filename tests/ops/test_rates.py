"""update_rates against the reference, step by step."""

import math
from itertools import product

import pytest
import torch
from backends import CPU, CUDA, in_float64, on, over
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FLOOR, VALUE, assert_close

from lwkd import ops, reference
from lwkd.reference import initial_rates

POLICIES = ("relative", "decay", "local", "constant")
BY_POWER = 10 * VALUE[torch.float32]
"""A GPU forms a power by way of a float32 logarithm, whose error the exponent scales."""


def column(*divergences):
    return torch.tensor(divergences, dtype=torch.float32).unsqueeze(1)


def started(backend, layers, columns=1):
    return initial_rates(layers, columns, backend.device)


def update(backend, state, statistics, found_inf=None, **options):
    """The op on the backend's device."""
    statistics, *found_inf = backend.given([statistics, *([] if found_inf is None else [found_inf])])
    return ops.update_rates(state, statistics, found_inf=found_inf[0] if found_inf else None, **options)


def assert_same_state(backend, found, expected):
    tolerance, floor = (BY_POWER, 1e-7) if backend is CUDA else (VALUE[torch.float32], FLOOR)
    assert torch.equal(found.counts.cpu(), expected.counts)
    for name in ("average", "baseline", "divergences", "multipliers"):
        assert_close(getattr(found, name).cpu(), getattr(expected, name), tolerance, floor)


def follow(backend, sequence, found_inf=None, **options):
    """Update both states measurement by measurement and compare them; return the last."""
    found, expected = started(backend, *sequence[0].shape), initial_rates(*sequence[0].shape)
    for step, statistics in enumerate(sequence):
        mask = None if found_inf is None else found_inf[step]
        before = [tensor.clone() for tensor in found]
        new, multipliers, skipped = update(backend, found, statistics, mask, **options)
        assert all(torch.equal(*pair) for pair in zip(found, before, strict=True)), "the old state was modified"
        expected, _, expected_skipped = reference.update_rates(expected, statistics, found_inf=mask, **options)
        found = new
        assert_same_state(backend, found, expected)
        assert torch.equal(multipliers, found.multipliers)
        assert int(skipped) == int(expected_skipped)
    return found


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
def test_any_trajectory(measurements, policy, gamma, momentum, normalize):
    options = {"policy": policy, "gamma": gamma, "momentum": momentum, "normalize": normalize, "clamp": (0.25, 4.0)}
    follow(CPU, [column(*divergences) for divergences in measurements], **options)


def statistics_of(divergence, layers, generator, which=None):
    """Random ones; of the Jacobian for some layers (which: 1 to 4) of opposite, zero or very unequal derivatives."""
    if divergence == "attention":
        return torch.rand(layers, 1, generator=generator) + 0.01
    if divergence == "hessian":
        return torch.randn(layers, 2, generator=generator) * torch.randint(2, (layers, 2), generator=generator)
    a, b = (torch.randn(layers, 6, generator=generator) for _ in range(2))
    which = torch.randint(5, (layers, 1), generator=generator) if which is None else which
    a = torch.where(which == 1, torch.zeros_like(a), torch.where(which == 2, -3 * b, a))
    b = torch.where(which == 3, torch.zeros_like(b), torch.where(which == 4, 100 * b, b))
    return reference.jacobian_sums(list(a), list(b))


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
def test_any_trajectory_of_ratios(divergence, layers, measurements, policy, momentum, normalize, seed):
    generator = torch.Generator().manual_seed(seed)
    options = {"divergence": divergence, "policy": policy, "momentum": momentum, "normalize": normalize}
    follow(CPU, [statistics_of(divergence, layers, generator) for _ in range(measurements)], **options)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("gamma", [1.0, 0.5, -1.0, 0.0])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("divergence", reference.STATISTICS)
@on("cpu", "cuda")
def test_trajectories(backend, divergence, policy, gamma, normalize):
    source = backend.generator()
    options = {"divergence": divergence, "policy": policy, "gamma": gamma, "normalize": normalize, "clamp": (0.25, 4.0)}
    for layers in (1, 4, 30, 512):
        which = torch.arange(layers).unsqueeze(1) % 5
        follow(backend, [statistics_of(divergence, layers, source, which) for _ in range(4)], **options)


def measurements(layers):
    """Good ones with bad ones in between: NaN, infinite, all zero, and one with a single zero."""
    generator = torch.Generator().manual_seed(layers)
    sequence = [torch.rand(layers, 1, generator=generator) for _ in range(7)]
    sequence[1][-1] = math.nan
    sequence[3][0] = math.inf
    sequence[4].zero_()
    sequence[5][0] = 0
    return sequence


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("gamma", [1.0, 0.5, -1.0, 0.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_good_and_bad_measurements(backend, policy, gamma, normalize):
    state = follow(backend, measurements(5), policy=policy, gamma=gamma, normalize=normalize)
    # The all-zero measurement counts: the average it enters is not zero.
    assert state.counts.tolist() == [5, 2]


@pytest.mark.parametrize("layers", [1, 128, 200, 512])
def test_layer_counts(backend, layers):
    follow(backend, measurements(layers)[:4], clamp=(0.0, 100.0))


def test_a_bad_first_measurement_leaves_rate_one(backend):
    bad, good = column(math.nan, math.nan, math.nan), column(1.0, 2.0, 3.0)
    assert follow(backend, [bad]).multipliers.tolist() == [1, 1, 1]
    state = follow(backend, [bad, good])
    assert state.divergences.tolist() == [1, 2, 3]
    assert state.counts.tolist() == [1, 1]


def test_infinite_gradients_mask_the_update(backend):
    masks = [torch.tensor([value]) for value in (0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0)]
    assert follow(backend, measurements(4), masks).counts.tolist() == [3, 1]


@pytest.mark.parametrize("gamma", [1.0, -1.0])
def test_decay_from_zero_and_to_zero(backend, gamma):
    first, second = column(0.0, 0.0, 1.0), column(0.0, 1.0, 0.0)
    follow(backend, [first, second, second], policy="decay", gamma=gamma, momentum=0.0, clamp=(0.1, 10.0))


def derivatives(layers, size):
    """Four sums of pairs that differ by about ``size``, some of them zero; every layer of another magnitude."""
    generator = torch.Generator().manual_seed(layers)
    sequence = []
    for step in range(6):
        a = torch.randn(layers, 50, generator=generator) * torch.logspace(-3, 3, layers)[:, None]
        b = a * (1 + size * torch.randn(layers, 50, generator=generator))
        if step == 2:
            a[0] = 0
            b[1] = 0
            a[2], b[2] = 0, 0
            b[3] = -b[3]
        sequence.append(reference.jacobian_sums(a.unbind(), b.unbind()))
    return sequence


def curvatures(layers):
    """Mean curvatures of either sign, some of them zero."""
    generator = torch.Generator().manual_seed(layers)
    sequence = [torch.randn(layers, 2, generator=generator) for _ in range(6)]
    sequence[2][0, 0], sequence[2][1, 1], sequence[2][2] = 0, 0, 0
    return sequence


# Momenta that float32 holds exactly: small distances are differences of averages, and show every other rounding.
@over(
    "divergence, size, momentum",
    cpu=[*product(("direction", "norm", "relative"), [1.0], (0.0, 0.875)), *product(["hessian"], [1.0], (0.0, 0.9))],
    interpreted=[
        *product(("direction", "norm", "relative"), (1.0, 1e-3), (0.0, 0.875)),
        *product(["hessian"], [1.0], (0.0, 0.9)),
    ],
)
@pytest.mark.parametrize("policy", ["relative", "decay", "local"])
def test_distances(backend, divergence, size, momentum, policy):
    options = {"divergence": divergence, "policy": policy, "momentum": momentum, "clamp": (0.01, 100.0)}
    sequence = curvatures(6) if divergence == "hessian" else derivatives(6, size)
    assert follow(backend, sequence, **options).counts.tolist() == [6, 0]
    # Once more with a zero layer first, so that the zeros are an average of their own.
    state = follow(backend, sequence[2:], **options)
    assert state.baseline[:3].tolist() == [4 if divergence == "direction" else 1] * 2 + [0]


@pytest.mark.parametrize("divergence", reference.STATISTICS)
@on("cpu", "interpreted")
def test_bad_measurements_of_every_divergence(backend, divergence):
    columns = reference.STATISTICS[divergence]
    for place in range(columns):
        good = curvatures(4)[:2] if divergence == "hessian" else [s[:, :columns] for s in derivatives(4, 0.1)[:2]]
        alike = torch.ones(4, columns)
        if divergence != "hessian":
            alike[:, -1] = 0
        sequence = [good[0], good[0].clone(), good[1], good[1].clone(), good[1].clone()]
        sequence[1][2, place] = math.nan
        sequence[3][0, place] = math.inf
        sequence[4][3, place] = -math.inf
        assert follow(backend, sequence, divergence=divergence).counts.tolist() == [2, 3]
        # Equal derivatives, or curvatures, leave nothing to divide the rates by.
        state = follow(backend, [alike, good[0], alike], divergence=divergence, momentum=0.0)
        assert state.counts.tolist() == [1, 2]


@on("cpu", "interpreted")
def test_a_direction_of_1e_minus_6_is_right(backend):
    statistics = derivatives(8, 1e-3)[0]
    found = follow(backend, [statistics], divergence="direction").divergences
    aa, bb, _, dd = in_float64([statistics])[0].unbind(1)
    assert found.max() < 2e-6
    assert_close(found, (dd - (aa.sqrt() - bb.sqrt()) ** 2) / (aa * bb).sqrt(), VALUE[torch.float32], floor=0.0)


@pytest.mark.parametrize("layers", [6, 128, 512])
@on("cpu", "interpreted")
def test_layer_counts_of_four_statistics(backend, layers):
    follow(backend, derivatives(layers, 0.1)[:2], divergence="direction")


def assert_skipped(backend, before, statistics, **options):
    """Nothing changes but the count of skipped measurements."""
    after, multipliers, skipped = update(backend, before, statistics, **options)
    assert int(skipped) == 1
    assert after.counts.tolist() == [1, 1]
    assert all(torch.equal(kept, was) for kept, was in zip(after[:4], before[:4], strict=True))
    assert torch.equal(multipliers, before.multipliers)


@pytest.mark.parametrize("divergence", ["direction", "norm", "relative", "hessian"])
def test_a_statistic_that_is_not_finite_and_distances_that_are_all_zero_are_skipped(backend, divergence):
    columns = reference.STATISTICS[divergence]
    alike = torch.tensor([[2.0, 2.0, 2.0, 0.0][:columns]] * 2)
    apart = torch.tensor([[1.0, 2.0, 0.5, 2.0][:columns]] * 2)
    before, *_ = update(backend, started(backend, 2, columns), apart, divergence=divergence)
    for place in range(columns):
        broken = apart.clone()
        broken[1, place] = math.nan
        assert_skipped(backend, before, broken, divergence=divergence)
    _, multipliers, skipped = update(backend, started(backend, 2, columns), alike, divergence=divergence)
    assert int(skipped) == 1
    assert multipliers.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("bad", [(math.nan, 0.1), (0.1, math.inf), (-math.inf, 0.1), (0.0, 0.0)])
@pytest.mark.parametrize("policy", POLICIES)
def test_an_unusable_measurement_is_skipped_and_counted(backend, bad, policy):
    before, *_ = update(backend, started(backend, 2), column(0.3, 0.1), policy=policy, momentum=0.0)
    assert_skipped(backend, before, column(*bad), policy=policy, momentum=0.0)
    first, _, skipped = update(backend, started(backend, 2), column(*bad), policy=policy)
    assert first.multipliers.tolist() == [1.0, 1.0]
    assert int(skipped) == 1


@pytest.mark.parametrize("found_inf", [torch.tensor(1.0), torch.tensor([1], dtype=torch.int32), torch.tensor(True)])
def test_an_infinite_gradient_step_masks_everything(backend, found_inf):
    before, *_ = update(backend, started(backend, 2), column(0.3, 0.1))
    for divergences in ((0.5, 0.1), (math.nan, 0.1)):
        after, _, skipped = update(backend, before, column(*divergences), found_inf)
        assert int(skipped) == 0
        assert all(torch.equal(kept, was) for kept, was in zip(after, before, strict=True))
    after, *_ = update(backend, before, column(0.5, 0.1), torch.zeros_like(found_inf))
    assert after.counts.tolist() == [2, 0]


def test_no_input_is_modified_and_no_output_aliases_one(backend):
    state, (statistics,) = started(backend, 3), backend.given([column(0.1, 0.2, 0.3)])
    inputs = [*state, statistics]
    copies = [tensor.clone() for tensor in inputs]
    new, *_ = ops.update_rates(state, statistics)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies, strict=True))
    assert not {t.data_ptr() for t in new} & {t.data_ptr() for t in inputs}


def test_one_layer_and_many(backend):
    assert update(backend, started(backend, 1), column(0.7))[1].tolist() == [1.0]
    follow(backend, [torch.linspace(0.1, 1, 512).unsqueeze(1)])


@on("cpu", "cuda")
def test_opcheck_and_compile(backend):
    state, (statistics, found_inf) = started(backend, 2), backend.given([column(0.3, 0.1), torch.tensor(0.0)])
    rule = ("attention", "relative", 1.0, 0.9, [0.5, 1.5], False, 4.0)
    torch.library.opcheck(torch.ops.lwkd.update_rates, (*state, statistics, *rule, None))
    torch.library.opcheck(torch.ops.lwkd.update_rates, (*state, statistics, *rule, found_inf))
    torch._dynamo.reset()
    compiled = torch.compile(lambda s, x: ops.update_rates(s, x)[1], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(state, statistics), ops.update_rates(state, statistics)[1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"policy": "fastest"}, ValueError, "policy 'relative', 'decay', 'local' or 'constant', found 'fastest'"),
        ({"policy": "local", "clamp": (0.1, 0.9)}, ValueError, "largest multiplier of at least 1 .* found 0.9"),
        ({"policy": "local", "contrast": 0.5}, ValueError, "contrast of at least 1, found 0.5"),
        (
            {"divergence": "jacobian"},
            ValueError,
            "divergence 'attention', 'direction', 'norm', 'relative' or 'hessian', found 'jacobian'",
        ),
        ({"divergence": "direction"}, ValueError, r"expected \(L, 4\) for divergence 'direction', found \[2, 1\]"),
        ({"divergence": "norm"}, ValueError, r"expected \(L, 4\) for divergence 'norm', found \[2, 1\]"),
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
@on("cpu", "interpreted")
def test_errors(backend, change, error, message):
    fields = {name: change[name] for name in change if name in reference.RateState._fields}
    options = {name: change[name] for name in change if name not in (*fields, "statistics")}
    statistics = change.get("statistics", column(0.3, 0.1))
    with pytest.raises(error, match=message):
        ops.update_rates(initial_rates(2)._replace(**fields), statistics, **options)
