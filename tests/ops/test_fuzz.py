"""Every op on the CPU with inputs that nobody thought of, against the reference in float64.

Shapes, dtypes, strides, and values from none to huge. A result is right within its tolerance; or, where what the op
sums leaves the range of float32, it is NaN or infinite. It is never another number. NaN and infinity in one layer or
sample leave the others as they are.

In CI a few inputs, always the same; `make fuzz` (LWKD_FUZZ: how many) draws new ones, and prints how to repeat a
failure.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from backends import in_float64
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tolerances import FLOOR, GRADIENT, HALF_SPACING, ROUNDING, SIGNED_SUM, SMALL_DIVERGENCE, VALUE
from torch import Tensor

from lwkd import ops, reference
from lwkd.reference.attention import EMPTY_MAP

EXAMPLES = int(os.environ.get("LWKD_FUZZ", "0"))
fuzz = settings(
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
pytestmark = pytest.mark.timeout(EXAMPLES * 10 + 300)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LARGEST = float(torch.finfo(torch.float32).max)
SUBNORMAL = 2.0**-149
"""Spacing of float32 below its normal numbers."""
EPS = {dtype: torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps for dtype in DTYPES}
HALVES = (torch.float16, torch.bfloat16)


@st.composite
def tensors(draw, shape: tuple[int, ...], dtype: torch.dtype, unusable: bool = True) -> Tensor:
    """Random numbers of any magnitude that the dtype has, stored in any way, with NaN in the gaps of the memory."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(("normal", "relu", "zeros", "sparse", "spread", "spike", "constant", "alike")))
    if kind == "relu":
        values = values.relu()
    elif kind == "sparse":
        values = torch.where(torch.rand(shape, generator=generator) < 0.8, 0.0, values)
    elif kind == "spread":
        values = values * 10 ** (6 * torch.rand(shape, generator=generator, dtype=torch.float64) - 3)
    elif kind == "spike" and values.numel():
        values.view(-1)[draw(st.integers(0, values.numel() - 1))] = 1e5
    elif kind == "zeros":
        values = torch.zeros_like(values)
    elif kind == "constant":
        values = torch.full_like(values, draw(st.sampled_from((1.0, -0.5))))
    elif kind == "alike":
        values = 1 + 1e-3 * values
    scale = draw(st.sampled_from((1.0, 1.0, 1.0, 300.0, 1e-3, 1e-6, 1e15, 1e-15, 1e30, 1e-30)))
    largest = torch.finfo(dtype).max
    values = (values * scale).clamp(-largest, largest).to(dtype)
    if values.numel() and unusable and draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, values.numel() - 1))
        values.view(-1)[at] = draw(st.sampled_from((math.nan, math.inf, -math.inf)))
    return draw(stored(values))


@st.composite
def stored(draw, values: Tensor) -> Tensor:
    """The tensor, or a view of another one that has its values: permuted, with gaps, unaligned, expanded."""
    rank = values.dim()
    if draw(st.booleans()):
        return values.contiguous()
    if rank and draw(st.integers(0, 5)) == 0:
        dim = draw(st.integers(0, rank - 1))
        return values[(slice(None),) * dim + (slice(0, 1),)].expand(values.shape)
    order = draw(st.permutations(range(rank)))
    steps = draw(st.lists(st.sampled_from((1, 1, 2, 3)), min_size=rank, max_size=rank))
    offset = draw(st.sampled_from((0, 1, 3)))
    sizes = [values.shape[d] * steps[d] for d in order]
    flat = values.new_full((offset + math.prod(sizes),), math.nan)
    whole = flat[offset:].view(sizes).permute([order.index(d) for d in range(rank)])
    view = whole[tuple(slice(None, None, step) for step in steps)]
    view.copy_(values)
    return view


def within(found: Tensor, expected: Tensor, error: Tensor | float, what: str) -> None:
    """Every element is within its error."""
    assert found.shape == expected.shape, what
    distance = (found.detach().double() - expected.detach().double()).abs()
    wrong = ~(distance <= error)
    worst = distance[wrong].max() if wrong.any() else 0.0
    assert not wrong.any(), f"{what}: off by {worst:.3e}, of {found.tolist()}, expected {expected.tolist()}"


def rms(tensor: Tensor) -> Tensor:
    return tensor.detach().double().square().mean().sqrt()


def usable(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def area(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(size) - 1]
    return pool(maps.unsqueeze(1), size).flatten(1)


@dataclass
class Totals:
    """Of one feature's maps: their sums (B,), and whether they and what leads to them fit into float32."""

    sums: Tensor
    fits: bool

    @classmethod
    def of(cls, feature: Tensor, power: float, size: tuple[int, ...]) -> Totals:
        powers = feature.detach().double().abs() ** power
        sums = area(powers.sum(1), size).sum(1)
        # Area averages, and the l2 distance's squares of maps, come after the division.
        most = powers.sum() * max(1, math.prod(size))
        return cls(sums, feature.dtype == torch.float64 or bool(most < LARGEST / 4))

    def clear(self) -> bool:
        """Whether rounding cannot decide that a map is empty."""
        return not bool(((self.sums > EMPTY_MAP / 1.01) & (self.sums < EMPTY_MAP * 1.01)).any())


spatial_sizes = st.one_of(
    st.tuples(st.integers(1, 40)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
)
powers = st.sampled_from((2.0, 2.0, 1.0, 3.0, 4.0, 1.5, 2.5))
channels = st.integers(1, 40)
dtypes = st.sampled_from(DTYPES)


@fuzz
@given(st.data())
def test_attention_maps(data):
    draw = data.draw
    power, batch, moving = draw(powers), draw(st.integers(1, 3)), draw(st.booleans())
    features, tangents, sizes = [], [], []
    for _ in range(draw(st.integers(1, 3))):
        spatial, dtype = draw(spatial_sizes), draw(dtypes)
        shape = (batch, draw(channels), *spatial)
        features.append(draw(tensors(shape, dtype)))
        if moving:
            tangents.append(draw(tensors(shape, dtype)))
        sizes.append(tuple(draw(st.integers(1, length + 2)) for length in spatial) if draw(st.booleans()) else spatial)
    exact, exact_tangents = in_float64(features), in_float64(tangents)
    totals = [Totals.of(f, power, s) for f, s in zip(features, sizes, strict=True)]
    assume(all(total.clear() for total in totals))
    if moving:
        maps, moved = ops.attention_maps(features, tangents, power=power, sizes=sizes)
        truths, truths_moved = reference.attention_maps(exact, exact_tangents, power=power, sizes=sizes)
    else:
        maps = ops.attention_maps(features, power=power, sizes=sizes)
        truths = reference.attention_maps(exact, power=power, sizes=sizes)
    for layer, (feature, total) in enumerate(zip(features, totals, strict=True)):
        for sample in range(batch):
            found, truth = maps[layer][sample], truths[layer][sample]
            if not usable(feature[sample]):
                assert torch.isnan(found).any()
                continue
            if not usable(found):
                assert not total.fits
                continue
            within(found, truth, VALUE[feature.dtype] * rms(truth) + 2 * VALUE[feature.dtype] * truth, "map")
            if not moving or not usable(tangents[layer][sample]):
                continue
            empty = bool(total.sums[sample] < EMPTY_MAP)
            one, tangent = exact[layer][sample], exact_tangents[layer][sample]
            slopes = power * one.abs() ** (power - 1) * tangent.abs()
            terms = slopes.flatten(1).sum() / max(float(total.sums[sample]), EMPTY_MAP)
            change, truth = moved[layer][sample], truths_moved[layer][sample]
            if feature.dtype != torch.float64 and not bool(slopes.sum() < LARGEST / 4 and terms < LARGEST / 4):
                continue  # seen below
            # The tangent is a difference; what is left of it has the rounding of its terms, and every term that of
            # numbers too small to have more digits.
            spacing = 0.0 if feature.dtype == torch.float64 else SUBNORMAL
            least = spacing * (1 + one.numel() / max(float(total.sums[sample]), EMPTY_MAP))
            error = 0.0 if empty else VALUE[feature.dtype] * (2 * terms + truth.abs()) + least
            within(change, truth, error, "tangent of a map")
    if not usable(*features, *tangents) or not all(total.fits for total in totals):
        return
    leaves = [f.detach().requires_grad_() for f in features]
    exact = in_float64(features, grad=True)
    found = ops.attention_maps(leaves, power=power, sizes=sizes)
    truths = reference.attention_maps(exact, power=power, sizes=sizes)
    weights = [torch.randn(m.shape, generator=torch.Generator().manual_seed(7)) for m in found]
    ours = torch.autograd.grad(sum((m * w.to(m)).sum() for m, w in zip(found, weights, strict=True)), leaves)
    theirs = torch.autograd.grad(sum((m * w.double()).sum() for m, w in zip(truths, weights, strict=True)), exact)
    for layer, (gradient, truth) in enumerate(zip(ours, theirs, strict=True)):
        compare_gradient(gradient, truth, features[layer], totals[layer], power, 4.0)


def compare_gradient(found: Tensor, truth: Tensor, feature: Tensor, total: Totals, power: float, factor: float) -> None:
    """Of a map's feature: each is (f_n − Σ q f) · p |F|^(p−1) sgn(F) / Σ r; the difference has the rounding of f."""
    dtype = feature.dtype
    assert found.dtype == dtype
    one = feature.detach().double()
    sums = total.sums.clamp_min(EMPTY_MAP).view(-1, *(1,) * (one.dim() - 1))
    slopes = torch.where(one == 0, 0.0, power * one.abs() ** (power - 1)) / sums
    least = float(torch.finfo(dtype).smallest_normal) if dtype != torch.float16 else HALF_SPACING
    error = GRADIENT[dtype] * truth.abs() + 64 * EPS[dtype] * factor * slopes + least
    # What float16 has no room for is infinite, in any framework.
    representable = (truth.abs() + error) < torch.finfo(dtype).max
    wide = slopes * factor < (torch.finfo(torch.float64).max if dtype == torch.float64 else LARGEST) / 1e3
    checked = representable & wide
    assert not (~torch.isfinite(found) & checked).any(), "gradient is not finite"
    within(torch.where(checked, found.double(), 0.0), torch.where(checked, truth, 0.0), error, "gradient")


@fuzz
@given(st.data())
def test_attention_divergence(data):
    draw = data.draw
    power, batch = draw(powers), draw(st.integers(1, 3))
    kind, betas = draw(st.sampled_from(("jsd", "l2"))), draw(st.sampled_from(((0.5, 0.5), (0.3, 0.7), (0.9, 0.1))))
    student, teacher = [], []
    for _ in range(draw(st.integers(1, 3))):
        spatial = draw(spatial_sizes)
        other = tuple(draw(st.integers(1, length + 3)) for length in spatial) if draw(st.booleans()) else spatial
        student.append(draw(tensors((batch, draw(channels), *spatial), draw(dtypes))))
        teacher.append(draw(tensors((batch, draw(channels), *other), draw(dtypes))))
    sizes = [reference.attention.common_size(s, t) for s, t in zip(student, teacher, strict=True)]
    totals = [Totals.of(f, power, size) for f, size in zip(student, sizes, strict=True)]
    others = [Totals.of(f, power, size) for f, size in zip(teacher, sizes, strict=True)]
    assume(all(total.clear() for total in [*totals, *others]))
    options = {"power": power, "kind": kind, "betas": betas}
    compare_divergence(student, teacher, sizes, totals, others, options)


def compare_divergence(student, teacher, sizes, totals, others, options):
    leaves, exact = [f.detach().requires_grad_() for f in student], in_float64(student, grad=True)
    found = ops.attention_divergence(leaves, teacher, **options)
    expected = reference.attention_divergence(exact, in_float64(teacher), **options)
    without = ops.attention_divergence([f.detach() for f in student], teacher, **options)
    assert torch.equal(without, found.detach()) or not usable(found)
    right = []
    for layer, (feature, other) in enumerate(zip(student, teacher, strict=True)):
        value, truth = found[layer].detach().double(), expected[layer].detach()
        if not usable(feature, other):
            assert torch.isnan(value), f"layer {layer}: {value}, though an input is NaN or infinite"
        elif not usable(value):
            assert not (totals[layer].fits and others[layer].fits), f"layer {layer}: {value}, expected {truth}"
        else:
            tolerance = max(VALUE[feature.dtype], VALUE[other.dtype])
            # d jsd = ε √jsd, where ε is the relative rounding of the maps.
            error = (tolerance if truth > 1e-4 or tolerance < 1e-9 else SMALL_DIVERGENCE) * truth + FLOOR
            within(value, truth, error, f"divergence of layer {layer}")
            right.append(layer)
    if not usable(*leaves):
        found.nansum().backward()  # no crash
        return
    ours = torch.autograd.grad(found[right].sum(), leaves, materialize_grads=True) if right else []
    theirs = torch.autograd.grad(expected[right].sum(), exact, materialize_grads=True) if right else []
    for layer in right:
        feature, rounded = student[layer], teacher[layer].dtype
        dtype = feature.dtype
        if not totals[layer].fits or not others[layer].fits:
            continue
        # Of l2 the factor is one over the norm of a map of N positions, at most √N; of jsd a logarithm.
        factor = 8.0 * math.sqrt(math.prod(sizes[layer]))
        if dtype == torch.float64 and rounded != torch.float64:
            factor *= EPS[torch.float32] / EPS[torch.float64]
        power = options.get("power", 2.0)
        compare_gradient(ours[layer], theirs[layer], feature, totals[layer], power, factor)


@fuzz
@given(st.data())
def test_attention_divergence_of_probabilities(data):
    draw = data.draw
    batch, kind = draw(st.integers(1, 3)), draw(st.sampled_from(("jsd", "l2")))
    student, teacher = [], []
    for _ in range(draw(st.integers(1, 3))):
        tokens = draw(st.integers(1, 20))
        for side in (student, teacher):
            dtype = draw(dtypes)
            logits = draw(tensors((batch, draw(st.integers(1, 5)), tokens, tokens), torch.float64))
            rows = logits.clamp(-1e6, 1e6).softmax(-1)  # NaN stays
            # Below its normal numbers float32 has few digits, and then none: the gradient is a logarithm of them.
            rows = torch.where(rows < 1e-35, 0.0, rows)
            if draw(st.booleans()):
                rows[..., draw(st.integers(0, tokens - 1)), :] = 0
            side.append(draw(stored(rows.to(dtype))))
    leaves, exact = [f.detach().requires_grad_() for f in student], in_float64(student, grad=True)
    found = ops.attention_divergence(leaves, teacher, source="probabilities", kind=kind)
    expected = reference.attention_divergence(exact, in_float64(teacher), source="probabilities", kind=kind)
    for layer, (feature, other) in enumerate(zip(student, teacher, strict=True)):
        value, truth = found[layer].detach().double(), expected[layer].detach()
        if not usable(feature, other):
            assert torch.isnan(value)
            continue
        tolerance = max(VALUE[feature.dtype], VALUE[other.dtype])
        error = (tolerance if truth > 1e-4 or tolerance < 1e-9 else SMALL_DIVERGENCE) * truth + FLOOR
        within(value, truth, error, f"divergence of layer {layer}")
    if not usable(*student, *teacher):
        found.nansum().backward()
        return
    ours, theirs = torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(expected.sum(), exact)
    for gradient, truth, feature, other in zip(ours, theirs, student, teacher, strict=True):
        assert gradient.dtype == feature.dtype
        tokens = feature.shape[-1]
        rounding = max(EPS[feature.dtype], EPS[other.dtype])
        # Sums of rows are 1 but for the rounding of halves; a row of zeros has no gradient.
        scale = 64 * 8 * math.sqrt(tokens) * rounding / feature.shape[1] / batch / tokens
        least = HALF_SPACING if feature.dtype == torch.float16 else 0.0
        within(gradient, truth, GRADIENT[feature.dtype] * truth.abs() + scale + least, "gradient")


shapes = st.lists(st.integers(0, 12), max_size=4).map(tuple) | st.tuples(st.integers(1, 3000))
whole = st.lists(st.integers(1, 12), max_size=4).map(tuple) | st.tuples(st.integers(1, 3000))


def pairs_of(draw) -> tuple[list[Tensor], list[Tensor]]:
    a, b = [], []
    for _ in range(draw(st.integers(1, 3))):
        shape, dtype = draw(shapes), draw(dtypes)
        a.append(draw(tensors(shape, dtype)))
        relation = draw(st.sampled_from(("free", "free", "near", "same", "opposite")))
        if relation == "free":
            b.append(draw(tensors(shape, draw(st.just(dtype) | dtypes))))
        else:
            factor = {"near": 1.0 + 1e-2, "same": 1.0, "opposite": -1.0}[relation]
            b.append(draw(stored((a[-1].double() * factor).to(dtype))))
    return a, b


def sums_of(a: Tensor, b: Tensor) -> Tensor:
    x, y = a.detach().double(), b.detach().double()
    return torch.stack([(x * x).sum(), (y * y).sum(), (x * y).sum(), (x - y).square().sum()])


@fuzz
@given(st.data())
def test_jacobian_sums(data):
    a, b = pairs_of(data.draw)
    leaves = [[t.detach().requires_grad_() for t in side] for side in (a, b)]
    found = ops.jacobian_sums(*leaves)
    weights = torch.tensor([0.5, -1.0, 0.25, 2.0]).expand(len(a), 4)
    ours = torch.autograd.grad(found, [*leaves[0], *leaves[1]], weights.to(found))
    for layer, (one, other) in enumerate(zip(a, b, strict=True)):
        truth = sums_of(one, other)
        if not usable(one, other):
            assert not usable(found[layer]), f"layer {layer}: {found[layer].tolist()}, though an input is unusable"
            continue
        # The product and the difference are judged by what they are made of, and dd by itself where it is exact.
        scale = torch.stack([truth[0], truth[1], (truth[0] * truth[1]).sqrt(), truth[3]])
        tolerance = VALUE[torch.float64 if found.dtype == one.dtype == other.dtype == torch.float64 else torch.float32]
        largest = float(torch.finfo(found.dtype).max)
        too_large = truth.abs() + tolerance * scale >= largest
        assert not (~torch.isfinite(found[layer]) & ~too_large).any(), f"{found[layer].tolist()} of {truth.tolist()}"
        least = float(torch.finfo(found.dtype).smallest_normal)
        error = tolerance * (truth.abs() + scale) + least
        within(torch.where(too_large, 0.0, found[layer].double()), torch.where(too_large, 0.0, truth), error, "sums")
        x, y = one.double(), other.double()
        w_aa, w_bb, w_ab, w_dd = weights[0].double()
        for which, truth_of, against in (
            (layer, 2 * w_aa * x + w_ab * y + 2 * w_dd * (x - y), one),
            (len(a) + layer, 2 * w_bb * y + w_ab * x - 2 * w_dd * (x - y), other),
        ):
            compare_linear(ours[which], truth_of, against, x, y)


def compare_linear(found: Tensor, truth: Tensor, tensor: Tensor, x: Tensor, y: Tensor) -> None:
    """A gradient that is a combination of both sides: it has their rounding."""
    dtype = tensor.dtype
    assert found.dtype == dtype
    least = HALF_SPACING if dtype == torch.float16 else float(torch.finfo(torch.float32).smallest_normal)
    error = GRADIENT[dtype] * truth.abs() + 16 * EPS[torch.float32] * (x.abs() + y.abs()) + least
    largest = min(torch.finfo(dtype).max, LARGEST / 16)
    checked = (truth.abs() < largest / 1.1) & (x.abs() < LARGEST / 16) & (y.abs() < LARGEST / 16)
    within(torch.where(checked, found.double(), 0.0), torch.where(checked, truth, 0.0), error, "gradient")


@fuzz
@given(st.data())
def test_jacobian_divergence(data):
    a, b = pairs_of(data.draw)
    kind = data.draw(st.sampled_from(("direction", "norm", "relative")))
    leaves = [[t.detach().requires_grad_() for t in side] for side in (a, b)]
    found = ops.jacobian_divergence(*leaves, kind=kind)
    exact = in_float64(a, grad=True), in_float64(b, grad=True)
    expected = reference.jacobian_divergence(*exact, kind=kind)
    right = []
    for layer, (one, other) in enumerate(zip(a, b, strict=True)):
        value, truth = found[layer].detach().double(), expected[layer].detach()
        if not usable(one, other):
            assert torch.isnan(value), f"layer {layer}: {value}, though an input is NaN or infinite"
            continue
        halves = one.dtype in HALVES and other.dtype in HALVES
        if halves and not usable(value):
            most = max(float(t.detach().double().square().sum()) for t in (one, other))
            assert most > LARGEST / 256, f"layer {layer}: {value}, expected {truth}"
            continue
        exactly = torch.float64 in (one.dtype, other.dtype)
        # Sums in float64; of halves, 128 products at a time in float32. The result is float32, or float64.
        tolerance = VALUE[torch.float64] if exactly and found.dtype == torch.float64 else VALUE[torch.float32]
        within(value, truth, tolerance * truth + (ROUNDING if exactly else FLOOR), f"divergence of layer {layer}")
        right.append(layer)
    if not right:
        return
    ours = torch.autograd.grad(found[right].sum(), [*leaves[0], *leaves[1]], materialize_grads=True)
    theirs = torch.autograd.grad(expected[right].sum(), [*exact[0], *exact[1]], materialize_grads=True)
    for layer in right:
        if kind == "norm" and expected[layer] < VALUE[torch.float32]:
            continue  # at equal norms |‖a‖ − ‖b‖| has a kink, and rounding decides on which side of it a gradient is
        for which, tensor in ((layer, a[layer]), (len(a) + layer, b[layer])):
            gradient, truth = ours[which], theirs[which]
            assert gradient.dtype == tensor.dtype
            norm = float(tensor.double().square().sum().sqrt())
            other = float((b if which == layer else a)[layer].double().square().sum().sqrt())
            if not (1e-9 < norm < 1e9 and 1e-9 < other < 1e9 and 1e-6 < norm / other < 1e6):
                continue  # no finite float32 gradient to speak of: it goes with one over the norm
            least = HALF_SPACING if tensor.dtype == torch.float16 else 0.0
            # Of a unit vector's change: 1/‖a‖ times the relative rounding of the coefficients.
            error = GRADIENT[tensor.dtype] * (truth.abs() + rms(truth)) + 64 * EPS[torch.float32] / norm + least
            checked = truth.abs() + error < torch.finfo(tensor.dtype).max
            within(torch.where(checked, gradient.double(), 0.0), torch.where(checked, truth, 0.0), error, "gradient")


@fuzz
@given(st.data())
def test_signs_and_traces(data):
    draw = data.draw
    layers, seed = draw(st.integers(1, 3)), draw(st.integers(-(2**63), 2**63 - 1))
    products = [draw(tensors(draw(shapes), draw(dtypes))) for _ in range(draw(st.integers(1, 4)))]
    layer_of = [draw(st.integers(0, layers - 1)) for _ in products]
    for found, truth in zip(ops.rademacher(products, seed), reference.rademacher(products, seed), strict=True):
        assert found.dtype == truth.dtype
        assert found.is_contiguous()
        assert torch.equal(found, truth)
    found = ops.hutchinson_trace(products, layer_of, seed, layers)
    truth = reference.hutchinson_trace([p.double() for p in products], layer_of, seed, layers)
    for layer in range(layers):
        own = [p for p, at in zip(products, layer_of, strict=True) if at == layer]
        if not usable(*own):
            assert not usable(found[layer])
            continue
        magnitude = sum(float(p.double().abs().sum()) for p in own)
        if not usable(found[layer]):
            assert magnitude > LARGEST / 4
            continue
        exactly = all(p.dtype == torch.float64 for p in own)
        least = float(torch.finfo(torch.float32).smallest_normal)
        within(
            found[layer],
            truth[layer],
            SIGNED_SUM[torch.float64 if exactly else torch.float32] * magnitude + least,
            "trace",
        )


@fuzz
@given(st.data())
def test_update_rates(data):
    draw = data.draw
    ratio = draw(st.sampled_from(tuple(reference.STATISTICS)))
    layers, columns = draw(st.integers(1, 6)), reference.STATISTICS[ratio]
    options = {
        "divergence": ratio,
        "policy": draw(st.sampled_from(("relative", "decay", "local", "constant"))),
        "gamma": draw(st.sampled_from((1.0, 0.5, 0.0, -1.0, 2.0))),
        "momentum": draw(st.sampled_from((0.0, 0.5, 0.9))),
        "clamp": draw(st.sampled_from(((0.5, 1.5), (0.01, 100.0), (1.0, 1.0)))),
        "normalize": draw(st.booleans()),
    }
    state = reference.initial_rates(layers, columns)
    for _ in range(draw(st.integers(1, 4))):
        measured = draw(tensors((layers, columns), torch.float32))
        if ratio != "hessian":
            measured = measured.abs()  # but for the mean curvature they are sums of squares, and distances
        if columns == 4:  # sums that derivatives can have
            a, b, angle = measured[:, 0], measured[:, 1], measured[:, 2].cos()
            ab = angle * (a.double() * b.double()).sqrt()
            measured = torch.stack([a.double(), b.double(), ab, a.double() + b.double() - 2 * ab], 1).float()
        found_inf = draw(st.sampled_from((None, torch.zeros(1), torch.ones(1))))
        new, multipliers, skipped = ops.update_rates(state, measured, found_inf=found_inf, **options)
        wide = reference.RateState(*(t.double() for t in state[:4]), state.counts)
        momentum = options["momentum"] if state.counts[0] else 0.0
        # The state holds the average in float32. A distance can be what is left of a difference of averages, and is
        # judged by those that it was made of.
        rounded = (momentum * wide.average + (1 - momentum) * measured.double()).float().double()
        truth, _, _ = reference.update_rates(wide, rounded, found_inf=found_inf, **options | {"momentum": 0.0})
        assert torch.equal(multipliers, new.multipliers)
        assert int(skipped) == int(new.counts[1])
        assert usable(*new[:4]), new
        cancelled = (truth.divergences > 0) & (truth.divergences < ROUNDING / VALUE[torch.float32])
        if not torch.equal(new.counts, truth.counts):
            # What float64 still holds and float32 does not is skipped, and counted; so is a zero.
            assert int(new.counts[1]) == int(state.counts[1]) + 1
            assert not usable(*(t.float() for t in truth[:3])) or cancelled.any(), (new, truth)
            assert all(torch.equal(one, other) for one, other in zip(new[:4], state[:4], strict=True))
        else:
            for name, one, other in zip(new._fields, new[:4], truth[:4], strict=False):
                if name == "multipliers" and cancelled.any():
                    continue  # quotients of rounding errors
                scale = other.abs() + (VALUE[torch.float32] if name in ("divergences", "baseline") else 0.0)
                within(one, other, VALUE[torch.float32] * scale + 1e-38, name)
        state = new


@pytest.mark.parametrize("kind", ["direction", "norm", "relative"])
@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("count", [7, 16, 300])
def test_bfloat16_whose_squares_float32_does_not_hold(count, scale, kind):
    generator = torch.Generator().manual_seed(count)
    a, b = (torch.randn(count, generator=generator).mul(scale).bfloat16() for _ in range(2))
    truth = reference.jacobian_divergence([a.double()], [b.double()], kind=kind)
    within(ops.jacobian_divergence([a], [b], kind=kind), truth, VALUE[torch.bfloat16] * truth, kind)
