"""Whole steps of a base optimizer by lwkd.optimizer.fused_step, against the parameter groups that they replace."""

import copy

import pytest
import torch
import toy
from doubles import unread
from standin import steps_as_on_cuda
from torch.optim import SGD, AdamW

from lwkd.optimizer import fused_step
from lwkd.optimizer.fused_step import FusedStep
from lwkd.optimizer.param_groups import GroupMemory, HostScaling, scaled_step

MULTIPLIERS = [0.5, 1.5, 1.0]
LAYER_OF = [0, 1, None, 2, 1]
SHAPES = [(3, 4), (5,), (2, 3), (1,), ()]
BASES = {
    "sgd": (SGD, {}),
    "momentum": (SGD, {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
    "adamw": (AdamW, {"fused": True}),
    "adamw, foreach": (AdamW, {"amsgrad": True, "weight_decay": 0.2, "foreach": True}),
}


@pytest.fixture(autouse=True)
def _cuda_everywhere():
    with steps_as_on_cuda():
        yield


def net(base):
    """Parameters and their optimizer, in two groups, and what layer each belongs to."""
    kind, options = BASES[base]
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]
    groups = [{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.2}]
    layers = {id(parameter): layer for parameter, layer in zip(parameters, LAYER_OF, strict=True)}
    return parameters, kind(groups, lr=0.1, **options), lambda parameter: layers[id(parameter)]


def give_gradients(parameters, step, scale=1.0):
    generator = torch.Generator().manual_seed(step + 1)
    for index, parameter in enumerate(parameters):
        gradient = scale * torch.randn(parameter.shape, generator=generator)
        # One parameter takes part later than the others, and one never.
        parameter.grad = None if index == 3 or (index == 1 and step < 2) else gradient


def grouped(optimizer, layer_of):
    scaled_step(optimizer, optimizer.step, HostScaling(layer_of, MULTIPLIERS), GroupMemory())


def alike(one, other):
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("base", BASES)
def test_as_parameter_groups(base, driver):
    mine, optimizer, layer_of = net(base)
    theirs, expected, same_layer_of = net(base)
    step = FusedStep(optimizer)
    for count in range(4):
        driver.clear()
        for parameters in (mine, theirs):
            give_gradients(parameters, count)
        assert step.step(layer_of, torch.tensor(MULTIPLIERS)) is None
        # A launch for each of the user's groups; new momentum buffers are another.
        assert len(driver.launches) == 2 + (base == "momentum" and count == 2)
        grouped(expected, same_layer_of)
        alike(mine, theirs)
    states, found = optimizer.state_dict()["state"], expected.state_dict()["state"]
    assert {index: set(state) for index, state in states.items()} == {i: set(state) for i, state in found.items()}
    for index, state in states.items():
        alike(state.values(), [found[index][name] for name in state])


@pytest.mark.parametrize("base", BASES)
def test_a_checkpoint_is_the_bases(base):
    mine, optimizer, layer_of = net(base)
    give_gradients(mine, 3)
    FusedStep(optimizer).step(layer_of, torch.tensor(MULTIPLIERS))
    theirs, bare, _ = net(base)
    bare.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for one, other in zip(theirs, mine, strict=True):
            one.copy_(other)
    for parameters in (mine, theirs):
        give_gradients(parameters, 4)
    bare.step()
    FusedStep(optimizer).step(layer_of, torch.ones(3))
    alike(mine, theirs)


@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_what_a_grad_scaler_leaves(base):
    """A first step with infinite gradients, which is skipped, and a good one: as the good one alone."""
    multipliers, ways = torch.tensor(MULTIPLIERS), []
    for scales in ((float("inf"), 64.0), (1.0,)):
        parameters, optimizer, layer_of = net(base)
        for group in optimizer.param_groups:
            group |= {"dampening": 0.0} if base == "momentum" else {}  # the host does not know what was the first step
        for scale in scales:
            give_gradients(parameters, 3, scale)
            if len(scales) > 1:
                optimizer.grad_scale = torch.tensor(64.0)
                optimizer.found_inf = torch.tensor(float(scale == float("inf")))
            FusedStep(optimizer).step(layer_of, multipliers)
        ways.append([*parameters, *(p.grad for p in parameters if p.grad is not None)])
    alike(*ways)


def test_a_closure_has_gradients_enabled():
    mine, optimizer, layer_of = net("sgd")

    def closure():
        assert torch.is_grad_enabled()
        give_gradients(mine, 0)
        return "loss"

    with torch.no_grad():
        assert FusedStep(optimizer).step(layer_of, torch.ones(3), closure) == "loss"
    assert mine[0]._version == 1
    assert optimizer._opt_called


def test_learning_rates_in_tensors():
    mine, optimizer, layer_of = net("adamw")
    theirs, expected, same_layer_of = net("adamw")
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, dtype=torch.float64)
    for parameters in (mine, theirs):
        give_gradients(parameters, 0)
    FusedStep(optimizer).step(layer_of, torch.tensor(MULTIPLIERS))
    grouped(expected, same_layer_of)
    alike(mine, theirs)


@pytest.mark.parametrize("base", BASES)
def test_nothing_is_read(base, driver):
    mine, optimizer, layer_of = net(base)
    step, multipliers = FusedStep(optimizer), torch.tensor(MULTIPLIERS)
    optimizer.found_inf = torch.tensor(0.0)
    driver.interpreting(False)
    for count in range(2):
        give_gradients(mine, count)
        with unread():
            step.step(layer_of, multipliers)


@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_states_are_not_made_while_a_graph_is_captured(base, monkeypatch):
    mine, optimizer, layer_of = net(base)
    step = FusedStep(optimizer)
    give_gradients(mine, 3)
    monkeypatch.setattr(fused_step, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"states to make.*Run one step before the capture"):
        step.step(layer_of, torch.ones(3))
    monkeypatch.setattr(fused_step, "capturing", lambda: False)
    step.step(layer_of, torch.ones(3))
    monkeypatch.setattr(fused_step, "capturing", lambda: True)
    step.step(layer_of, torch.ones(3))


def test_sparse_gradients_are_refused():
    weight = torch.nn.Parameter(torch.randn(4, 2))
    step = FusedStep(SGD([weight], lr=0.1))
    torch.nn.functional.embedding(torch.tensor([1, 2]), weight, sparse=True).sum().backward()
    with pytest.raises(TypeError, match=r"gradient 0: expected a dense tensor, found layout torch.sparse_coo.*without"):
        step.step(lambda parameter: 0, torch.ones(1))


@pytest.mark.parametrize("unscaled", [False, True])
def test_opcheck(unscaled):
    def tensors(count=2):
        return [torch.rand(3) for _ in range(count)]

    scaler = (torch.tensor(2.0), torch.tensor(0.0)) if unscaled else (None, None)
    rates = torch.rand(2), [0, -1], 0.1, None
    sgd = tensors(), tensors(), tensors(), *rates, 0.9, 0.0, 0.1, True, False, False, *scaler
    torch.library.opcheck(torch.ops.lwkd.sgd_step.default, sgd)
    steps = [torch.tensor(1.0), torch.tensor(2.0)]
    adamw = *(tensors() for _ in range(5)), steps, *rates, 0.9, 0.999, 1e-8, 0.1, True, False, *scaler
    torch.library.opcheck(torch.ops.lwkd.adamw_step.default, adamw)


@pytest.mark.parametrize("form", ["wrapper", "attach"])
@pytest.mark.parametrize("base", BASES)
def test_in_the_wrapper(form, base, driver):
    """The same weights and rates as with a parameter group for each rate, with hooks and a scheduler."""
    kind, options = BASES[base]
    if kind is AdamW:  # which would divide gradients that are all rounding by themselves
        options = options | {"eps": 1e-2}
    runs = []
    for fused in (False, True):
        student, teacher, pairing = toy.nets()
        optimizer = kind(student.parameters(), lr=0.1, **options)
        fired = []
        optimizer.register_step_post_hook(lambda *_, fired=fired: fired.append(1))
        stepped, shown = toy.make(form, optimizer, student, teacher, pairing, fused_step=fused)
        scheduler = torch.optim.lr_scheduler.StepLR(stepped, 2, 0.5)
        for seed in range(3):
            toy.train(stepped, student, teacher, count=2, seed=seed)
            scheduler.step()
        assert len(fired) == 6
        runs.append((list(student.parameters()), shown, stepped))
    (groups_weights, groups, _), (mine, shown, stepped) = runs
    alike(mine, groups_weights)
    assert shown.rates == pytest.approx(groups.rates, rel=1e-4)
    assert len(set(shown.rates.values())) > 1
    assert any(launch.kernel.startswith("step_") for launch in driver.launches)
    again = copy.deepcopy(stepped) if form == "wrapper" else None
    if again is not None:
        again.step()
        assert again.rates == shown.rates


def test_a_base_that_is_not_known(monkeypatch):
    student, teacher, pairing = toy.nets()
    with pytest.raises(ValueError, match=r"fused_step=True does not work here: the optimizer is a .*Adam, neither"):
        toy.make("wrapper", torch.optim.Adam(student.parameters()), student, teacher, pairing, fused_step=True)
