"""The specification of the steps against torch's own optimizers in float64, what the ops refuse, and their schemas."""

import re

import pytest
import torch
from tolerances import CLOSED_FORM, assert_close
from torch import nn
from torch.optim import SGD, AdamW

import lwkd
from lwkd import reference
from lwkd.optimizer.fused_step import FusedStep, why_not_fused

MULTIPLIERS = (0.5, 1.0, 1.7)
LAYER_OF = [0, 0, 1, 2, -1]
SHAPES = [(3, 4), (4,), (2, 3, 2), (5,), (1,)]

SGD_OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
    {"momentum": 0.9, "maximize": True, "weight_decay": 0.1},
]
ADAMW_OPTIONS = [
    {},
    {"weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-4},
    {"amsgrad": True, "maximize": True},
    {"weight_decay": 0.0, "betas": (0.0, 0.5)},
]


def randoms(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def one_group_each(kind, parameters, lr, **options):
    """Torch's optimizer with a group for each parameter, at its rate."""
    rates = [lr * (1.0 if layer < 0 else MULTIPLIERS[layer]) for layer in LAYER_OF]
    return kind([{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)], **options)


@pytest.mark.parametrize("lr", [0.1, torch.tensor([0.1], dtype=torch.float64)], ids=["number", "tensor"])
@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
def test_sgd(options, lr):
    mine, theirs = randoms(0), randoms(0)
    optimizer = one_group_each(SGD, theirs, 0.1, **options)
    buffers = [torch.full_like(p, torch.nan) for p in mine]
    for step in range(4):
        gradients = randoms(step + 1)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        multipliers = torch.tensor(MULTIPLIERS, dtype=torch.float64)
        reference.sgd_step(mine, gradients, buffers, multipliers, LAYER_OF, lr, first=step == 0, **options)
        for one, other in zip(mine, theirs, strict=True):
            assert_close(one, other, CLOSED_FORM)
    if options.get("momentum"):
        for buffer, parameter in zip(buffers, theirs, strict=True):
            assert_close(buffer, optimizer.state[parameter]["momentum_buffer"], CLOSED_FORM)


@pytest.mark.parametrize("options", ADAMW_OPTIONS, ids=str)
def test_adamw(options):
    mine, theirs = randoms(0), randoms(0)
    optimizer = one_group_each(AdamW, theirs, 0.1, **options)
    moments = {name: [torch.zeros_like(p) for p in mine] for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
    steps = [torch.zeros(()) for _ in mine]
    for step in range(4):
        gradients = randoms(step + 1)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        multipliers = torch.tensor(MULTIPLIERS, dtype=torch.float64)
        reference.adamw_step(mine, gradients, *moments.values(), steps, multipliers, LAYER_OF, 0.1, **options)
        for one, other in zip(mine, theirs, strict=True):
            assert_close(one, other, CLOSED_FORM)
    assert [step.item() for step in steps] == [4] * 5
    for name, found in moments.items():
        for moment, parameter in zip(found, theirs, strict=True):
            if name in optimizer.state[parameter]:
                assert_close(moment, optimizer.state[parameter][name], CLOSED_FORM)


def adamw_arguments(parameters, gradients):
    moments = [[torch.ones_like(p) for p in parameters] for _ in range(3)]
    return (
        parameters,
        gradients,
        *moments,
        [torch.ones(()) for _ in parameters],
        torch.tensor(MULTIPLIERS),
        LAYER_OF,
        0.1,
    )


def sgd_arguments(parameters, gradients):
    return parameters, gradients, [torch.ones_like(p) for p in parameters], torch.tensor(MULTIPLIERS), LAYER_OF, 0.1


STEPS = {"sgd_step": (sgd_arguments, {"momentum": 0.9}), "adamw_step": (adamw_arguments, {"amsgrad": True})}


@pytest.mark.parametrize("op", STEPS)
def test_scaled_gradients(op):
    make, options = STEPS[op]
    step = getattr(reference, op)
    plain, scaled = make(randoms(0), randoms(1)), make(randoms(0), [64 * g for g in randoms(1)])
    step(*plain, **options)
    step(*scaled, **options, grad_scale=torch.tensor(64.0), found_inf=torch.tensor(0.0))
    for one, other in zip(plain[:-3], scaled[:-3], strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert torch.equal(mine, theirs)  # the gradients too, which are unscaled in place


@pytest.mark.parametrize("op", STEPS)
def test_infinite_gradients_change_nothing(op):
    make, options = STEPS[op]
    arguments, untouched = (make(randoms(0), randoms(1)) for _ in range(2))
    getattr(reference, op)(*arguments, **options, grad_scale=torch.tensor(2.0), found_inf=torch.tensor(1.0))
    for one, other in zip(arguments[:-3], untouched[:-3], strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("op", STEPS)
def test_half_precision_is_computed_in_float32(op):
    make, options = STEPS[op]
    half = make(*([t.to(torch.bfloat16) for t in randoms(seed)] for seed in (0, 1)))
    wide = make(*([t.to(torch.bfloat16).float() for t in randoms(seed)] for seed in (0, 1)))
    getattr(reference, op)(*half, **options)
    getattr(reference, op)(*wide, **options)
    for one, other in zip(half[0], wide[0], strict=True):
        assert torch.equal(one, other.to(torch.bfloat16))


@pytest.mark.parametrize("op", STEPS)
def test_the_cpu_has_no_kernel(op):
    make, options = STEPS[op]
    with pytest.raises(NotImplementedError, match=rf"{op}: found parameters on cpu.*base optimizer.*reference\.{op}"):
        getattr(lwkd.ops, op)(*make(randoms(0), randoms(1)), **options)


@pytest.mark.parametrize("op", STEPS)
def test_fake_kernels_write_nothing(op):
    make, options = STEPS[op]
    parameters, gradients = ([t.float().to("meta") for t in randoms(seed)] for seed in (0, 1))
    assert getattr(lwkd.ops, op)(*make(parameters, gradients), **options) is None


def group_of(parameter, kind=SGD, **options):
    return kind([parameter], lr=0.1, **options)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (torch.optim.RMSprop([torch.ones(2)]), "RMSprop, neither torch.optim.SGD nor torch.optim.AdamW"),
        (type("Own", (SGD,), {})([torch.ones(2)], lr=0.1), r"test_fused_step\.Own, neither"),
        (group_of(torch.ones(2), AdamW, differentiable=True), "group 0 has differentiable=True"),
        (group_of(torch.ones(2), weight_decay=torch.tensor(0.1)), "group 0 has a tensor for weight_decay"),
        (group_of(torch.ones(2)), "parameter 0 of parameter group 0 is on cpu, not on a CUDA device"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_bases(optimizer, message):
    with pytest.raises(ValueError, match=f"fused_step=True does not work here: .*{message}.*Leave it out"):
        FusedStep(optimizer)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ([torch.ones(2), torch.ones(2, dtype=torch.complex64)], "parameter 1 .* is torch.complex64, not one of"),
        ([torch.ones(2), torch.ones(2, dtype=torch.float64)], "parameter 1 .* is torch.float64, not one of"),
        ([torch.ones(2), torch.ones(2, device="meta")], "parameter 1 .* is on meta, and the first one .* on cpu"),
    ],
    ids=["complex", "float64", "devices"],
)
def test_refused_parameters(parameters, message, monkeypatch):
    monkeypatch.setattr("lwkd.optimizer.fused_step._on_gpu", lambda parameter: True)
    found = why_not_fused(SGD([nn.Parameter(p) for p in parameters], lr=0.1))
    assert found is not None
    assert re.search(message, found)
