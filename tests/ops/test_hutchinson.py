"""rademacher and hutchinson_trace: the reference bit for bit, statistics, bits that never change, and refusals."""

import math
from itertools import product

import pytest
import torch
from backends import CPU, CUDA, DTYPES, INTERPRETED, in_float64, on, over
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import unaligned
from tolerances import SIGNED_SUM, STANDARD_ERRORS, VALUE, assert_close

from lwkd import ops, reference
from lwkd.reference import hutchinson

SHAPES = ((), (0,), (1,), (3, 0), (511,), (512,), (513,), (16383,), (16385,), (65535,), (65536,), (65537,), (200000,))
# Around a vector, the columns of a program, a plane, and a tile of the kernels.
SIZES = (
    *(1, 7, 8, 127, 128, 129, 255, 257, 511, 512, 513, 0, 1300),
    *(16 * 512 + 3, 65535, 65536, 65537 + 512),
)
SEEDS = (0, 1, -1, 12345, 2**32, 2**40 + 5, 2**63 - 1, -(2**63))
LAYERS = 5


def randoms(shapes, dtype=torch.float32):
    return CPU.randoms(shapes, dtype)


def assert_trace(backend, found, products, layer_of, seed, layers):
    """Within the rounding of the float32 sums, whose scale is that of the summands and not of what is left of them."""
    assert found.shape == (layers,)
    if backend is INTERPRETED:
        assert_close(
            found, reference.hutchinson_trace(in_float64(products), layer_of, seed, layers), VALUE[found.dtype]
        )
        return
    signs = reference.rademacher(products, seed)
    expected, magnitude = (torch.zeros(layers, dtype=torch.float64) for _ in range(2))
    for layer, product_, sign in zip(layer_of, products, signs, strict=True):
        expected[layer] += (product_.double() * sign.double()).sum()
        magnitude[layer] += product_.double().abs().sum()
    exact = found.dtype == torch.float64 and all(p.dtype == torch.float64 for p in products)
    # A program of a GPU adds up to 128 planes of a column in float32, and its columns after that: 4 times the CPU's 32.
    tolerance = SIGNED_SUM[torch.float64 if exact else torch.float32] * (4 if backend is CUDA else 1)
    assert ((found.cpu().double() - expected).abs() <= tolerance * magnitude).all()


def compare(backend, products, layer_of, seed, layers):
    """Signs of the reference bit for bit, and the traces that they give."""
    ours = backend.given(products)
    for sign, expected, tensor in zip(
        ops.rademacher(ours, seed), reference.rademacher(products, seed), ours, strict=True
    ):
        assert (sign.dtype, sign.shape, sign.device) == (tensor.dtype, tensor.shape, tensor.device)
        assert sign.is_contiguous()
        assert torch.equal(sign.cpu(), expected)
    found = ops.hutchinson_trace(ours, layer_of, seed, layers)
    assert found.dtype == reference.hutchinson_trace(products, layer_of, seed, layers).dtype
    assert_trace(backend, found, products, layer_of, seed, layers)


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


@over(
    "dtype, shapes, seeds",
    cpu=product(CPU.dtypes, [SHAPES], [SEEDS]),
    interpreted=[
        *product(DTYPES, [[(size,) for size in SIZES]], [[7]]),
        *product([torch.float32], [((3, 50), (2, 257))], [[seed] for seed in SEEDS]),
    ],
    cuda=product(DTYPES, [SHAPES], [SEEDS]),
)
def test_signs_and_traces_of_the_reference(backend, dtype, shapes, seeds):
    products = backend.randoms(shapes, dtype)
    layer_of = [index % LAYERS for index in range(len(products))]
    for seed in seeds:
        compare(backend, products, layer_of, seed, LAYERS + 1)


@over(
    "dtype, shapes, seeds",
    cpu=product(CPU.dtypes, [SHAPES], [SEEDS]),
    interpreted=[(torch.float32, ((100,), (700,), (0,)), [21])],
    cuda=product(DTYPES, [SHAPES], [SEEDS]),
)
def test_every_sign_lands_on_its_own_element(backend, dtype, shapes, seeds):
    """A product that is the probe itself counts its elements, exactly: one wrong sign would be off by two."""
    like = backend.given(backend.randoms(shapes, dtype))
    for seed in seeds:
        found = ops.hutchinson_trace(ops.rademacher(like, seed), range(len(like)), seed, len(like))
        assert found.tolist() == [t.numel() for t in like]


TINY = [(size % 12,) for size in range(600)]


@over("shapes", cpu=[TINY], interpreted=[[(600,), (5,), (130,), (2000,), (64,)]], cuda=[TINY])
def test_dtypes_may_be_mixed_within_a_layer(backend, shapes):
    products = [t.to(DTYPES[index % 3]) for index, t in enumerate(backend.randoms(shapes))]
    compare(backend, products, [index // 7 % LAYERS for index in range(len(products))], 4, LAYERS)


def test_512_layers_of_few_elements(backend):
    products = backend.randoms([(1 + index % 5,) for index in range(512)])
    layer_of = list(reversed(range(512)))
    found = ops.hutchinson_trace(backend.given(products), layer_of, 9, 512)
    assert_trace(backend, found, products, layer_of, 9, 512)


VIEWS = {
    "transposed": lambda t: t.T,
    "strided": lambda t: t[:, ::3],
    "part": lambda t: t[3:, 1:],
    "expanded": lambda t: t.unsqueeze(0).expand(3, *t.shape),
    "one_element": lambda t: t[0, :1].expand(30, 2),
    "unaligned": unaligned,
}


@over(
    "dtype, view, shapes",
    cpu=product(CPU.dtypes, VIEWS, [[(70, 333)]]),
    interpreted=[
        *product([torch.float32], VIEWS, [[(24, 40)]]),
        *product(DTYPES, ["unaligned"], [[(9,), (130,), (515,), (9000,)]]),
    ],
    cuda=product(DTYPES, VIEWS, [[(70, 333)]]),
)
def test_signs_follow_the_row_major_order_of_views(backend, dtype, view, shapes):
    tensors = backend.randoms(shapes, dtype)
    views = [VIEWS[view](t) for t in tensors]
    assert view != "unaligned" or views[0].data_ptr() % 16
    given = [*views, *tensors, *views]
    compare(backend, given, [index % 2 for index in range(len(given))], 3, 2)


def test_a_layer_without_a_tensor_and_tensors_without_an_element(backend):
    ours = backend.given(backend.randoms([(0,), (3,), (0, 3)]))
    found = ops.hutchinson_trace(ours[:2], [0, 2], 1, 4)
    assert found[[0, 1, 3]].tolist() == [0, 0, 0]
    assert ops.hutchinson_trace(ours[::2], [0, 2], 1, 3).tolist() == [0, 0, 0]
    assert ops.hutchinson_trace(ours[:1], [1], 1, 2).tolist() == [0, 0]
    assert ops.rademacher(ours[:1], 1)[0].shape == (0,)


@over(
    "dtype, bad, size, place",
    cpu=product(CPU.dtypes, [math.nan, math.inf, -math.inf], [70000], [66000]),
    interpreted=product([torch.float32], [math.nan, math.inf], [600], [3]),
    cuda=product(DTYPES, [math.nan, math.inf, -math.inf], [70000], [66000]),
)
def test_what_is_not_finite_stays_in_its_layer(backend, dtype, bad, size, place):
    products = backend.given(backend.randoms([(size,)] * 3, dtype))
    good = ops.hutchinson_trace(products, [0, 1, 2], 2, 3)
    products[1][place] = bad
    found = ops.hutchinson_trace(products, [0, 1, 2], 2, 3)
    assert torch.equal(found[[0, 2]], good[[0, 2]])
    assert not torch.isfinite(found[1])


@on("cpu", "interpreted")
def test_bits_depend_on_nothing_but_the_layer(backend):
    products = backend.randoms([(3000,), (40,), (9000,)])
    together = ops.hutchinson_trace(products, [0, 1, 2], 7, 3)
    assert torch.equal(together, ops.hutchinson_trace(products, [0, 1, 2], 7, 3))
    moved = ops.hutchinson_trace(products, [4, 0, 2], 7, 5)
    assert torch.equal(together, moved[[4, 0, 2]])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=6),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "offset", "expanded"]),
    dtypes=st.lists(st.sampled_from(CPU.dtypes), min_size=6, max_size=6),
    seed=st.integers(-(2**63), 2**63 - 1),
    layers=st.integers(1, 4),
)
def test_any_shapes_strides_dtypes_and_seeds(shapes, layout, dtypes, seed, layers):
    products = []
    for shape, dtype in zip(shapes, dtypes, strict=False):
        (dense,) = randoms([shape], dtype)
        if layout == "transposed":
            dense = dense.permute(tuple(reversed(range(dense.dim()))))
        elif layout == "strided" and dense.dim():
            dense = dense[..., ::3]
        elif layout == "offset":
            dense = dense.new_empty(dense.numel() + 1)[1:].copy_(dense.flatten()).view(shape)
        elif layout == "expanded":
            dense = dense.unsqueeze(0).expand(3, *dense.shape)
        products.append(dense)
    compare(CPU, products, [index % layers for index in range(len(products))], seed, layers)


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


@pytest.mark.parametrize("dtype", CPU.dtypes)
def test_the_same_bits_on_every_run_and_for_any_number_of_threads(threads, dtype):
    products = randoms([(300000,), (70000,), *[(size,) for size in range(40)]], dtype)
    layer_of = [0, *[index % LAYERS for index in range(41)]]
    found = []
    for count in (1, 2, 3, 2, 1):
        threads(count)
        trace = ops.hutchinson_trace(products, layer_of, 9, LAYERS)
        found.append([trace, *ops.rademacher(products, 9)])
    for other in found[1:]:
        assert all(torch.equal(first, second) for first, second in zip(found[0], other, strict=True))


def test_a_tensor_contributes_the_same_whatever_its_layer():
    products = randoms(SHAPES, torch.float64)
    alone = ops.hutchinson_trace(products, range(len(products)), 6, len(products))
    layer_of = [(3 * index + 1) % LAYERS for index in range(len(products))]
    grouped = torch.zeros(LAYERS + 1, dtype=torch.float64)
    for layer, contribution in zip(layer_of, alone, strict=True):
        grouped[layer] += contribution
    assert torch.equal(ops.hutchinson_trace(products, layer_of, 6, LAYERS + 1), grouped)
    assert grouped[LAYERS] == 0


def test_no_gradient():
    like = [torch.ones(3, requires_grad=True)]
    assert not ops.rademacher(like, 1)[0].requires_grad
    product = torch.ones(3, requires_grad=True) * 2
    assert not ops.hutchinson_trace([product], [0], 1, 1).requires_grad
    with torch.no_grad():
        assert ops.hutchinson_trace([product], [0], 1, 1).shape == (1,)
    with torch.inference_mode():
        assert torch.equal(ops.rademacher(like, 1)[0], reference.rademacher(like, 1)[0])


@over("dtype", cpu=CPU.dtypes, cuda=[torch.float32, torch.bfloat16])
def test_opcheck(backend, dtype):
    products = backend.given([*randoms([(), (0,), (5, 4), (600,)], dtype), randoms([(5, 4)])[0].T])
    torch.library.opcheck(torch.ops.lwkd.rademacher, (products, 7))
    torch.library.opcheck(torch.ops.lwkd.hutchinson_trace, (products, [0, 0, 2, 1, 1], 7, 4))


def test_compiled_into_one_graph():
    torch._dynamo.reset()
    products = [p.requires_grad_() for p in randoms([(5, 4), (600,)])]

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
