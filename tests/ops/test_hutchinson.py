"""rademacher and hutchinson_trace: the reference bit for bit, statistics, bits that never change, and refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import SIGNED_SUM, STANDARD_ERRORS, VALUE, assert_close

from lwkd import ops, reference
from lwkd.reference import hutchinson

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHAPES = ((), (0,), (1,), (3, 0), (511,), (512,), (513,), (16383,), (16385,), (65535,), (65536,), (65537,), (200000,))
SEEDS = (0, 1, -1, 2**32, 2**63 - 1, -(2**63))
LAYERS = 5


def tensors(shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def assert_same_signs(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.is_contiguous()
        assert torch.equal(one, other)


def assert_trace(found, products, layer_of, seed, layers):
    """Within the rounding of the float32 sums, whose scale is that of the summands and not of what is left of them."""
    signs = reference.rademacher(products, seed)
    expected = torch.zeros(layers, dtype=torch.float64)
    magnitude = torch.zeros(layers, dtype=torch.float64)
    for layer, product, sign in zip(layer_of, products, signs, strict=True):
        expected[layer] += (product.double() * sign.double()).sum()
        magnitude[layer] += product.double().abs().sum()
    exact = found.dtype == torch.float64 and all(p.dtype == torch.float64 for p in products)
    tolerance = SIGNED_SUM[torch.float64 if exact else torch.float32]
    assert found.shape == (layers,)
    assert ((found.double() - expected).abs() <= tolerance * magnitude).all()


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0_A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_philox(key, counter, words):
    assert hutchinson._philox(key, torch.tensor(counter).unsqueeze(1)).flatten().tolist() == list(words)


@pytest.mark.parametrize("dtype", DTYPES)
def test_signs_of_the_reference(dtype):
    like = tensors(SHAPES, dtype)
    for seed in SEEDS:
        assert_same_signs(ops.rademacher(like, seed), reference.rademacher(like, seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_traces_of_the_signs_of_the_reference(dtype):
    products = tensors(SHAPES, dtype)
    layer_of = [index % LAYERS for index in range(len(products))]
    for seed in SEEDS:
        assert_trace(ops.hutchinson_trace(products, layer_of, seed, LAYERS), products, layer_of, seed, LAYERS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_sign_lands_on_its_own_element(dtype):
    """A product that is the probe itself counts its elements, exactly: one wrong sign would be off by two."""
    like = tensors(SHAPES, dtype)
    for seed in SEEDS:
        found = ops.hutchinson_trace(ops.rademacher(like, seed), range(len(like)), seed, len(like))
        assert found.tolist() == [t.numel() for t in like]


def test_many_tiny_tensors():
    shapes = [(size % 12,) for size in range(600)]
    products = tensors(shapes)
    assert_same_signs(ops.rademacher(products, 4), reference.rademacher(products, 4))
    layer_of = [index // 7 % LAYERS for index in range(len(products))]
    assert_trace(ops.hutchinson_trace(products, layer_of, 4, LAYERS), products, layer_of, 4, LAYERS)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=6),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "offset", "expanded"]),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6),
    seed=st.integers(-(2**63), 2**63 - 1),
    layers=st.integers(1, 4),
)
def test_any_shapes_strides_dtypes_and_seeds(shapes, layout, dtypes, seed, layers):
    products = []
    for shape, dtype in zip(shapes, dtypes, strict=False):
        (dense,) = tensors([shape], dtype)
        if layout == "transposed":
            dense = dense.permute(tuple(reversed(range(dense.dim()))))
        elif layout == "strided" and dense.dim():
            dense = dense[..., ::3]
        elif layout == "offset":
            dense = dense.new_empty(dense.numel() + 1)[1:].copy_(dense.flatten()).view(shape)
        elif layout == "expanded":
            dense = dense.unsqueeze(0).expand(3, *dense.shape)
        products.append(dense)
    assert_same_signs(ops.rademacher(products, seed), reference.rademacher(products, seed))
    layer_of = [index % layers for index in range(len(products))]
    found = ops.hutchinson_trace(products, layer_of, seed, layers)
    assert found.dtype == reference.hutchinson_trace(products, layer_of, seed, layers).dtype
    assert_trace(found, products, layer_of, seed, layers)


def assert_uncorrelated(one, other):
    assert abs(float((one * other).mean())) < STANDARD_ERRORS / math.sqrt(one.numel())


@pytest.mark.parametrize("seed", SEEDS)
def test_signs_are_fair_and_independent(seed):
    like = [torch.empty(150000)] * 3
    signs, others = (ops.rademacher(like, s) for s in (seed, seed ^ 1))
    for sign in signs:
        assert sign.abs().eq(1).all()
        assert_uncorrelated(sign, torch.ones(()))
        # Neighbours, neighbouring planes of one word, neighbouring words, and neighbouring tiles.
        for lag in (1, 2, 16, 512, 32 * 512, 128 * 512):
            assert_uncorrelated(sign[lag:], sign[:-lag])
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert_uncorrelated(signs[first], signs[second])
    for sign, other in zip(signs, others, strict=True):
        assert_uncorrelated(sign, other)


def test_the_trace_of_a_known_matrix():
    """One probe is exact for a diagonal matrix; off the diagonal only the mean over probes is right."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    matrix = half @ half.T
    (v,) = ops.rademacher([matrix[0]], 3)
    exact = ops.hutchinson_trace([matrix.diagonal() * v], [0], 3, 1)
    assert_close(exact, matrix.trace().unsqueeze(0), VALUE[torch.float64])
    found = torch.cat(
        [ops.hutchinson_trace([matrix @ ops.rademacher([matrix[0]], s)[0]], [0], s, 1) for s in range(400)]
    )
    deviation = float((found.mean() - matrix.trace()).abs())
    assert deviation < STANDARD_ERRORS * float(found.std()) / math.sqrt(400)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_on_every_run_and_for_any_number_of_threads(threads, dtype):
    products = tensors([(300000,), (70000,), *[(size,) for size in range(40)]], dtype)
    layer_of = [0, *[index % LAYERS for index in range(41)]]
    found = []
    for count in (1, 2, 3, 2, 1):
        threads(count)
        trace = ops.hutchinson_trace(products, layer_of, 9, LAYERS)
        found.append([trace, *ops.rademacher(products, 9)])
    for other in found[1:]:
        assert all(torch.equal(first, second) for first, second in zip(found[0], other, strict=True))


def test_a_tensor_contributes_the_same_whatever_its_layer():
    products = tensors(SHAPES, torch.float64)
    alone = ops.hutchinson_trace(products, range(len(products)), 6, len(products))
    layer_of = [(3 * index + 1) % LAYERS for index in range(len(products))]
    grouped = torch.zeros(LAYERS + 1, dtype=torch.float64)
    for layer, contribution in zip(layer_of, alone, strict=True):
        grouped[layer] += contribution
    assert torch.equal(ops.hutchinson_trace(products, layer_of, 6, LAYERS + 1), grouped)
    assert grouped[LAYERS] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_layer(bad, dtype):
    products = tensors([(70000,)] * 3, dtype)
    layer_of, good = [0, 1, 2], ops.hutchinson_trace(products, [0, 1, 2], 2, 3)
    products[1][66000] = bad
    found = ops.hutchinson_trace(products, layer_of, 2, 3)
    assert torch.equal(found[[0, 2]], good[[0, 2]])
    assert not torch.isfinite(found[1])


def test_no_gradient():
    like = [torch.ones(3, requires_grad=True)]
    assert not ops.rademacher(like, 1)[0].requires_grad
    product = torch.ones(3, requires_grad=True) * 2
    assert not ops.hutchinson_trace([product], [0], 1, 1).requires_grad
    with torch.no_grad():
        assert ops.hutchinson_trace([product], [0], 1, 1).shape == (1,)
    with torch.inference_mode():
        assert torch.equal(ops.rademacher(like, 1)[0], reference.rademacher(like, 1)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    products = [*tensors([(), (0,), (5, 4), (600,)], dtype), tensors([(5, 4)])[0].T]
    torch.library.opcheck(torch.ops.lwkd.rademacher, (products, 7))
    torch.library.opcheck(torch.ops.lwkd.hutchinson_trace, (products, [0, 0, 2, 1, 1], 7, 4))


def test_compiled_into_one_graph():
    torch._dynamo.reset()
    products = [p.requires_grad_() for p in tensors([(5, 4), (600,)])]

    def traces(inputs):
        probes = ops.rademacher(inputs, 3)
        return ops.hutchinson_trace([2 * v * p for v, p in zip(probes, inputs, strict=True)], [1, 0], 3, 2)

    found = torch.compile(traces, fullgraph=True, backend="aot_eager")(products)
    assert torch.equal(found, traces(products))


GOOD = torch.ones(4)


@pytest.mark.parametrize(
    ("products", "layer_of", "layers", "error", "message"),
    [
        ([], [], 1, ValueError, "expected at least one product, found an empty list"),
        ([GOOD, GOOD], [0], 1, ValueError, "layer_of: expected one layer for each of 2 products, found 1"),
        ([GOOD], [0, 0], 1, ValueError, "layer_of: expected one layer for each of 1 products, found 2"),
        ([GOOD, GOOD], [0, 2], 2, ValueError, "layer_of of product 1: expected 0 to 1 for 2 layers, found 2"),
        ([GOOD], [-1], 2, ValueError, "layer_of of product 0: expected 0 to 1 for 2 layers, found -1"),
        ([GOOD], [0], 0, ValueError, "layers: expected at least 1, found 0"),
        ([GOOD], [0], -2, ValueError, "layers: expected at least 1, found -2"),
        ([GOOD, GOOD.long()], [0, 0], 1, TypeError, r"product 1: expected float32.*found Long.*\.float\(\)"),
        ([GOOD.to(torch.complex64)], [0], 1, TypeError, "product 0.*found ComplexFloat"),
    ],
)
def test_refused_products(products, layer_of, layers, error, message):
    with pytest.raises(error, match=rf"lwkd\.ops\.hutchinson_trace: {message}"):
        ops.hutchinson_trace(products, layer_of, 1, layers)


def test_refused_probes_and_seeds():
    assert ops.rademacher([], 1) == []
    with pytest.raises(TypeError, match=r"lwkd\.ops\.rademacher: tensor 1: expected float32.*found Bool"):
        ops.rademacher([GOOD, GOOD.bool()], 1)
    with pytest.raises(NotImplementedError, match="SparseCPU"):
        ops.rademacher([GOOD, GOOD.to_sparse()], 1)
    with pytest.raises(NotImplementedError, match="SparseCPU"):
        ops.hutchinson_trace([GOOD.to_sparse()], [0], 1, 1)
    for op, call in (
        ("rademacher", lambda seed: ops.rademacher([GOOD], seed)),
        ("hutchinson_trace", lambda seed: ops.hutchinson_trace([GOOD], [0], seed, 1)),
    ):
        for seed in (2**63, -(2**63) - 1):
            with pytest.raises(ValueError, match=rf"{op}: seed: expected a signed integer of 64 bits, found {seed}"):
                call(seed)


def test_other_devices():
    elsewhere = torch.empty(2, 3, device=torch.device("meta"))
    assert ops.rademacher([elsewhere], 1)[0].shape == (2, 3)
    assert ops.hutchinson_trace([elsewhere.double()], [0], 1, 4).dtype == torch.float64
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        cuda = torch.empty(2, device="cuda")
        assert ops.hutchinson_trace(ops.rademacher([cuda], 1), [0], 1, 1).device.type == "cuda"
        with pytest.raises(ValueError, match=r"tensor 1 is on cpu, the first one on cuda:0.*to one device"):
            ops.hutchinson_trace([cuda, torch.empty(2)], [0, 0], 1, 1)
