"""The fused optimizer steps: torch's own arithmetic, layouts, scalers, captures, arguments and refusals."""

import ctypes

import pytest
import torch
from backends import DTYPES, INTERPRETED
from standin import as_on_cuda
from tolerances import STEPPED, assert_close

from lwkd.ops import adamw_step, sgd_step

# Around a vector, the narrow loop, the wide loop and a chunk; the largest is three chunks.
SIZES = [1, 7, 8, 0, 255, 257, 1023, 1029, 8192, 8193, 2 * 8192 + 1030]
MULTIPLIERS = (0.5, 1.0, 1.7)
LAYER_OF = [index % 4 - 1 for index in range(len(SIZES))]
SGD_OPTIONS = [
    {},
    {"weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    {"momentum": 0.8, "nesterov": True, "maximize": True},
]
ADAMW_OPTIONS = [
    {},
    {"weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-4, "maximize": True},
    {"amsgrad": True, "weight_decay": 0.0, "betas": (0.0, 0.5)},
]


@pytest.fixture(autouse=True)
def _on_cpu_tensors():
    with as_on_cuda("sgd_step", "adamw_step"):
        yield


def randoms(seed, dtype=torch.float32):
    return INTERPRETED.randoms([(size,) for size in SIZES], dtype, seed)


def adamw(*lists, lr=0.1, **options):
    adamw_step(*lists, lr, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("op", "states", "options"),
    [*(("sgd", 1, options) for options in SGD_OPTIONS), *(("adamw", 3, options) for options in ADAMW_OPTIONS)],
)
def test_one_launch_for_all_parameters(op, states, options, dtype, driver):
    driver.interpreting(False)
    lists = [randoms(seed, dtype) for seed in range(2 + states)]
    if op == "sgd":
        sgd_step(*lists, torch.tensor(MULTIPLIERS), LAYER_OF, 0.3, **options)
    else:
        adamw(*lists, [torch.zeros(()) for _ in SIZES], torch.tensor(MULTIPLIERS), LAYER_OF, **options)
    (launch,) = driver.launches
    assert launch.kernel == f"step_{op}_fwd"
    assert launch.grid == (8 + 1 + 2 + 3, 1, 1)


@pytest.mark.parametrize("t", [0, 1, 10, 300, 700, 100_000])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.99999)])
def test_bias_corrections(betas, t):
    """They fit the averages: of equal gradients g from the first step on, the update is lr·g/(|g| + ε)."""
    rounded = [torch.tensor(beta).double().item() for beta in betas]
    p, g = torch.zeros(300), torch.linspace(-2, 2, 300)
    moments = [(g.double() ** k * (1 - beta**t)).float() for k, beta in zip((1, 2), rounded, strict=True)]
    step = torch.tensor(float(t))
    adamw([p], [g], [moments[0]], [moments[1]], [], [step], torch.ones(1), [0], lr=1.0, betas=betas, weight_decay=0.0)
    assert step == t + 1
    # Both moments are rounded, and √v before it is divided by.
    assert_close(p.double(), -g.double() / (g.double().abs() + 1e-8), STEPPED[torch.float32])


def torch_optimizer(kind, parameters, lr, layer_of, **options):
    rates = [lr * (1.0 if layer < 0 else MULTIPLIERS[layer]) for layer in layer_of]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)]
    return kind(groups, fused=True, **options)


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
def test_sgd_is_torchs_own(options):
    mine, theirs = randoms(0), randoms(0)
    optimizer, buffers = torch_optimizer(torch.optim.SGD, theirs, 0.3, LAYER_OF, **options), randoms(9)
    for step in range(3):
        gradients = randoms(step + 1)
        sgd_step(mine, gradients, buffers, torch.tensor(MULTIPLIERS), LAYER_OF, 0.3, first=step == 0, **options)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", ADAMW_OPTIONS, ids=str)
def test_adamw_is_torchs_own(options):
    mine, theirs = randoms(0), randoms(0)
    optimizer = torch_optimizer(torch.optim.AdamW, theirs, 0.3, LAYER_OF, **options)
    moments = [[torch.zeros_like(p) for p in mine] for _ in range(3)]
    steps = [torch.zeros(()) for _ in mine]
    for step in range(3):
        gradients = randoms(step + 1)
        adamw(mine, gradients, *moments, steps, torch.tensor(MULTIPLIERS), LAYER_OF, lr=0.3, **options)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=2e-6)


def both(parameters, gradients, **options):
    """One step of each kind from fresh states, on copies; parameters and gradients after it."""
    results, layers = [], [0] * len(parameters)
    for kind in ("sgd", "adamw"):
        ps, gs = ([t.clone() for t in tensors] for tensors in (parameters, gradients))
        states = [[torch.zeros_like(p) for p in ps] for _ in range(2)]
        if kind == "sgd":
            sgd_step(ps, gs, states[0], torch.tensor(MULTIPLIERS), layers, 0.1, momentum=0.9, **options)
        else:
            steps = [torch.zeros(()) for _ in ps]
            adamw(ps, gs, *states, [], steps, torch.tensor(MULTIPLIERS), layers, **options)
        results += [*ps, *gs]
    return results


def test_the_learning_rate_may_be_a_tensor():
    plain = both(randoms(0), randoms(1))
    states = [[torch.zeros_like(p) for p in randoms(0)] for _ in range(2)]
    mine = randoms(0)
    layers, lr = [0] * len(SIZES), torch.tensor([0.1])
    sgd_step(mine, randoms(1), states[0], torch.tensor(MULTIPLIERS), layers, lr, momentum=0.9)
    assert all(torch.equal(*pair) for pair in zip(mine, plain, strict=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_misaligned_tensor_is_stepped_all_the_same(dtype):
    gradients = randoms(1, dtype)
    expected = both(randoms(0, dtype), gradients)
    bucket = torch.cat([torch.zeros(1, dtype=dtype), *gradients])
    views, start = [], 1
    for gradient in gradients:
        views.append(bucket[start : start + gradient.numel()])
        start += gradient.numel()
    parameters = randoms(0, dtype)
    buffers, layers = [torch.zeros_like(p) for p in parameters], [0] * len(SIZES)
    sgd_step(parameters, views, buffers, torch.tensor(MULTIPLIERS), layers, 0.1, momentum=0.9)
    assert all(torch.equal(*pair) for pair in zip(parameters, expected, strict=False))


def test_dtypes_are_a_launch_each(driver):
    parameters = [p.to(DTYPES[index % 2]) for index, p in enumerate(randoms(0))]
    gradients = [g.to(DTYPES[index % 2]) for index, g in enumerate(randoms(1))]
    both(parameters, gradients)
    assert len(driver.launches) == 4
    for dtype in DTYPES[:2]:
        alone = both([p for p in parameters if p.dtype == dtype], [g for g in gradients if g.dtype == dtype])
        mixed = both(parameters, gradients)
        assert all(torch.equal(*pair) for pair in zip(alone, [t for t in mixed if t.dtype == dtype], strict=True))


def test_memory_orders():
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3, 5, 5), (6, 7)]
    parameters, gradients = ([torch.randn(s, generator=generator) for s in shapes] for _ in range(2))
    expected = both(parameters, gradients, grad_scale=torch.tensor(4.0), found_inf=torch.zeros(()))
    last = [parameters[0].to(memory_format=torch.channels_last), parameters[1].t().contiguous().t()]
    gaps = [torch.stack([g, g], -1)[..., 0] for g in gradients]
    for given in (gradients, gaps):  # both lie in other ways than the parameters: copied, and the unscaled copied back
        found = both(last, given, grad_scale=torch.tensor(4.0), found_inf=torch.zeros(()))
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert found[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("scale", [64.0, 3.0])
def test_scaled_gradients(scale):
    gradients = randoms(1)
    plain = both(randoms(0), gradients)
    scaled = both(randoms(0), [scale * g for g in gradients], grad_scale=torch.tensor([scale]))
    for one, other in zip(scaled, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0 if scale == 64 else 1e-6, atol=0 if scale == 64 else 1e-6)


def test_infinite_gradients_change_nothing():
    parameters, gradients = randoms(0), randoms(1)
    found = both(parameters, gradients, grad_scale=torch.tensor(2.0), found_inf=torch.tensor(2.0))
    assert all(torch.equal(*pair) for pair in zip(found, 2 * [*parameters, *gradients], strict=True))
    moments, steps = [[torch.ones_like(p) for p in parameters] for _ in range(3)], [torch.ones(()) for _ in parameters]
    flag = torch.tensor(1.0)
    adamw(parameters, gradients, *moments, steps, torch.ones(1), [0] * len(SIZES), amsgrad=True, found_inf=flag)
    assert all((m == 1).all() for moment in moments for m in moment)
    assert all(step == 1 for step in steps)
    flag.zero_()  # the counters are as they were
    adamw(parameters, gradients, *moments, steps, torch.ones(1), [0] * len(SIZES), amsgrad=True, found_inf=flag)
    assert all(step == 2 for step in steps)


def test_the_same_bits_on_every_run():
    runs = [both(randoms(0), randoms(1)) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_a_step_is_seen_by_autograd():
    p, g, m, v, t = torch.ones(3), torch.ones(3), torch.zeros(3), torch.zeros(3), torch.zeros(())
    adamw([p], [g], [m], [v], [], [t], torch.ones(1), [0])
    assert [tensor._version for tensor in (p, g, m, v, t)] == [1, 0, 1, 1, 1]
    adamw([p], [g], [m], [v], [], [t], torch.ones(1), [0], grad_scale=torch.ones(()))
    assert g._version == 1
    sgd_step([p], [g], [m], torch.ones(1), [0], 0.1)  # without momentum
    assert [tensor._version for tensor in (p, g, m)] == [3, 1, 2]


def test_while_a_graph_is_captured(driver):
    expected = both(randoms(0), randoms(1))
    before = len(driver.launches)
    driver.library.standin_set_capturing(1)
    found = both(randoms(0), randoms(1))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert len(driver.launches) == before + 2


def test_no_parameters_no_launch(driver):
    sgd_step([], [], [], torch.ones(1), [], 0.1)
    adamw([], [], [], [], [], [], torch.ones(1), [])
    assert not driver.launches


def test_rates_are_read_from_the_device(driver):
    """The addresses of what the user has are the arguments, so that a replay sees what is there by then."""
    p, lr, flag, multipliers = torch.ones(3), torch.tensor(0.5), torch.zeros(()), torch.tensor([2.0, 3.0])
    sgd_step([p], [torch.ones(3)], [], multipliers, [1], lr, found_inf=flag)
    (launch,) = driver.launches
    assert [int.from_bytes(launch.parameters[index], "little") for index in range(3, 7)] == [
        *(multipliers.data_ptr(), lr.data_ptr(), 0, flag.data_ptr()),
    ]
    assert ctypes.c_float.from_buffer_copy(launch.parameters[8]).value == 0
    assert p.tolist() == [-0.5] * 3


BUFFERS = "momentum_buffers"
WRONG = {
    "gradients: a list too short": ({"gradients": [torch.ones(2)]}, ValueError, "one of gradients for each of 2"),
    "layer_of too short": ({"layer_of": [0]}, ValueError, "one of layer_of for each of 2 parameters, found 1"),
    "no such layer": ({"layer_of": [0, 3]}, ValueError, "parameter 1: expected -1 .* or 0 to 2 for 3 .* found 3"),
    "float64": ({"parameters": [torch.ones(2, dtype=torch.float64)] * 2}, TypeError, "parameter 0: found float64"),
    "gaps": ({"parameters": [torch.ones(2), torch.ones(4)[::2]]}, ValueError, "parameter 1: .* without gaps"),
    "dtype": ({"gradients": [torch.ones(2), torch.ones(2).half()]}, TypeError, "gradient 1: expected the dtype"),
    "shape": ({"gradients": [torch.ones(2), torch.ones(3)]}, ValueError, r"gradient 1: expected the shape .*\[2\]"),
    "multipliers": ({"multipliers": torch.ones(3).half()}, ValueError, "multipliers: expected .* float32"),
    "scale": ({"grad_scale": torch.ones(2)}, ValueError, r"grad_scale: expected one float32 on cpu, found \[2\]"),
    "infinite": ({"found_inf": torch.ones((), dtype=torch.bool)}, ValueError, "found_inf: expected one float32"),
    "lr": ({"lr": torch.ones((), dtype=torch.float64)}, ValueError, "lr: expected one float32"),
    "no buffers": ({BUFFERS: []}, ValueError, "one of momentum_buffers for each of 2 parameters, found 0"),
    "buffer": (
        {"momentum_buffers": [torch.ones(2), torch.ones(4)[::2]]},
        ValueError,
        "momentum_buffers 1: .* memory order",
    ),
}


@pytest.mark.parametrize(("changed", "kind", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(changed, kind, message, driver):
    right = {
        "parameters": [torch.ones(2)] * 2,
        "gradients": [torch.ones(2)] * 2,
        "momentum_buffers": [torch.ones(2)] * 2,
    }
    given = right | {"multipliers": torch.ones(3), "layer_of": [0, -1], "lr": 0.1} | changed
    with pytest.raises(kind, match=rf"lwkd\.ops\.sgd_step: .*{message}"):
        sgd_step(**given, momentum=0.9)
    assert not driver.launches


def test_wrong_steps():
    lists = [[torch.ones(2)] for _ in range(4)]
    for step in (torch.ones((), dtype=torch.float64), torch.ones(2)):
        with pytest.raises(ValueError, match=r"adamw_step: step 0: expected one float32 on cpu"):
            adamw(*lists, [], [step], torch.ones(1), [0])
    with pytest.raises(ValueError, match=r"adamw_step: expected one of steps for each of 1 parameters, found 0"):
        adamw(*lists, [], [], torch.ones(1), [0])
