"""Bases of every kind: each moves as with one explicit group a layer, or is refused when the wrapper is made."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_doubles import Script
from torch import Tensor, nn
from toy import FORMS, each_form, make

import lwkd
from lwkd.optimizer.trial import moves_by_displacement

MULTIPLIERS = ((1.0, 1.0), (1.5, 0.5), (0.5, 1.25), (1.25, 1.25), (1.0, 1.0), (0.75, 1.5), (1.5, 0.5))
"""In force at each update."""


def _net(width: int) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))
    return net.double()


def _nets() -> tuple[nn.Sequential, nn.Sequential, lwkd.Pairing]:
    torch.manual_seed(0)
    student, teacher = _net(4), _net(8).eval()
    example = torch.rand(2, 4, 5, dtype=torch.float64)
    return student, teacher, lwkd.pair(student, teacher, example, layers={"1": "1", "3": "3"})


def _backward(student: nn.Module, teacher: nn.Module, step: int, sparse: bool = False, graph: bool = False) -> Tensor:
    x = torch.rand(6, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    with torch.no_grad():
        target = teacher(x)
    student.zero_grad()
    loss = (student(x) - target).square().mean()
    loss.backward(create_graph=graph)
    if sparse:
        for parameter in student.parameters():
            parameter.grad = parameter.grad.to_sparse()
    return loss


def _parameters(net: nn.Sequential, dims: tuple[int, ...]) -> list[list[Tensor]]:
    """Those of the first paired layer, of the second, and of the tail."""
    return [[p for p in net[index].parameters() if p.dim() in dims] for index in (0, 2, 4)]


def _called(optimizer: Any, name: str) -> None:
    getattr(optimizer, name, lambda: None)()


def _trained_explicitly(base: Callable[..., Any], steps: int, dims: tuple[int, ...], **gradients: Any) -> list[Tensor]:
    """One group a layer, whose learning rate the loop sets; all parameters after every step."""
    student, teacher, _ = _nets()
    optimizer = base([{"params": group} for group in _parameters(student, dims)])
    _called(optimizer, "train")
    rates = [group["lr"] for group in optimizer.param_groups]
    way = []
    for step in range(steps):
        for group, lr, multiplier in zip(
            optimizer.param_groups, rates, (*MULTIPLIERS[step % len(MULTIPLIERS)], 1.0), strict=True
        ):
            group["lr"] = lr * multiplier
        _backward(student, teacher, step, **gradients)
        optimizer.step()
        way += [p.detach().clone() for p in student.parameters()]
    _called(optimizer, "eval")
    return way + [p.detach().clone() for p in student.parameters()]


def _trained(
    form: str,
    base: Callable[..., Any],
    steps: int,
    dims: tuple[int, ...],
    again: Callable[..., Any] | None = None,
    **gradients: Any,
) -> list[Tensor]:
    student, teacher, pairing = _nets()
    made = base([p for group in _parameters(student, dims) for p in group])
    optimizer, shown = make(form, made, student, teacher, pairing, policy=Script(MULTIPLIERS))
    _called(optimizer, "train")
    way = []
    for step in range(steps):
        if again is not None and step == steps // 2:
            student, optimizer, shown = again(form, base, student, teacher, pairing, optimizer, shown)
        _backward(student, teacher, step, **gradients)
        optimizer.step()
        way += [p.detach().clone() for p in student.parameters()]
    _called(optimizer, "eval")
    return way + [p.detach().clone() for p in student.parameters()]


def _check(
    forms: str | tuple[str, ...],
    base: Callable[..., Any],
    steps: int = 7,
    dims: tuple[int, ...] = (1, 2),
    **options: Any,
) -> None:
    explicit = _trained_explicitly(base, steps, dims, **{k: v for k, v in options.items() if k != "again"})
    for form in (forms,) if isinstance(forms, str) else forms:
        mine = _trained(form, base, steps, dims, **options)
        torch.testing.assert_close({form: mine}, {form: explicit}, rtol=1e-6, atol=1e-9)  # names the form


def _refused(base: Callable[..., Any], match: str) -> None:
    """By both forms, and nothing is left behind."""
    student, teacher, pairing = _nets()
    for form in FORMS:
        made = base(student.parameters())
        step = made.step
        with pytest.raises(ValueError, match=match):
            make(form, made, student, teacher, pairing)
        assert made.step == step
    assert not any(module._forward_hooks for net in (student, teacher) for module in net.modules())


# Every optimizer of torch

TORCH = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
OPTIONS: dict[str, dict[str, Any]] = {
    "Muon": {"dims": (2,)},  # takes matrices only
    "SparseAdam": {"sparse": True},
}


@each_form
@pytest.mark.parametrize("name", sorted(TORCH.keys() - {"LBFGS", "Rprop"}))
def test_optimizers_of_torch_move_as_with_a_group_for_each_layer(form: str, name: str) -> None:
    _check(form, lambda groups: TORCH[name](groups, lr=0.02), **OPTIONS.get(name, {}))


def test_an_optimizer_that_reads_its_learning_rate_only_once_is_refused() -> None:
    _refused(lambda p: torch.optim.Rprop(p, lr=0.02), "Rprop.*does not follow the learning rate of parameter group 0")


# Optimizers of others

TIMM_NEEDS_A_GPU = ("bnb", "fused", "apex")


def test_optimizers_of_timm_move_as_with_a_group_for_each_layer() -> None:
    timm = pytest.importorskip("timm.optim")
    names = [name for name in timm.list_optimizers() if not name.startswith(TIMM_NEEDS_A_GPU)]
    assert len(names) > 40
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")
        for name in names:
            made = lambda groups, name=name: timm.create_optimizer_v2(groups, opt=name, lr=0.02)  # noqa: E731
            try:
                # Kron draws random numbers of its own, in the order of the parameters, which is the same here.
                _check(FORMS, made, steps=4, graph=name == "adahessian")
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error


def test_lookahead_of_timm() -> None:
    """A base that never ran the constructor of Optimizer, around another."""
    timm = pytest.importorskip("timm.optim")
    _check(FORMS, lambda groups: timm.Lookahead(torch.optim.SGD(groups, lr=0.05, momentum=0.9), k=2))


@each_form
@pytest.mark.parametrize("name", ["SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree"])
def test_schedule_free_optimizers(form: str, name: str) -> None:
    package = pytest.importorskip("schedulefree")
    for options in ({}, {"warmup_steps": 3} if name != "RAdamScheduleFree" else {"weight_decay": 0.1}):
        _check(form, lambda groups, options=options: getattr(package, name)(groups, lr=0.02, **options))


@each_form
def test_lion(form: str) -> None:
    package = pytest.importorskip("lion_pytorch")
    _check(form, lambda groups: package.Lion(groups, lr=0.01, weight_decay=0.1))


def test_prodigy_is_refused() -> None:
    package = pytest.importorskip("prodigyopt")
    _refused(package.Prodigy, "Prodigy cannot be given .*: it does not step with groups of different learning rates")


# State in groups


class Averaged(torch.optim.Optimizer):
    """SGD whose iterates are averaged, weighted by the square of the learning rate; the weights are in the group."""

    def __init__(self, params: Any, lr: float = 0.1, on_tensor: bool = False) -> None:
        super().__init__(params, {"lr": lr, "weight_sum": 0.0, "on_tensor": on_tensor})
        if on_tensor:
            for group in self.param_groups:
                group["weight_sum"] = torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["weight_sum"] += group["lr"] ** 2  # into the tensor, if it is one
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)
                x = self.state[p].setdefault("x", p.clone())
                x.lerp_(p, float(group["lr"] ** 2 / group["weight_sum"]))

    def eval(self) -> None:
        for p, state in self.state.items():
            p.data.copy_(state["x"])


class Counting(torch.optim.Optimizer):
    """Steps that shrink with a counter that is a tensor in the group; ``history`` is a list there."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group.setdefault("step", torch.tensor(0.0)).add_(1)
            group.setdefault("history", []).append(float(group["lr"]))
            for p in group["params"]:
                p.sub_(p.grad * sum(group["history"]) / float(group["step"]))


AVERAGED = {
    "numbers": Averaged,
    "a tensor": lambda groups: Averaged(groups, on_tensor=True),
    "a counter and a list": Counting,
}
averaged = pytest.mark.parametrize("base", AVERAGED.values(), ids=AVERAGED)


@each_form
@averaged
def test_state_in_groups_is_kept_for_each_layer(form: str, base: Any) -> None:
    _check(form, base)


def test_a_counter_in_the_group_counts_steps() -> None:
    student, teacher, pairing = _nets()
    optimizer, _ = make("attach", Counting(student.parameters()), student, teacher, pairing, policy=Script(MULTIPLIERS))
    seen = []
    for step in range(4):
        _backward(student, teacher, step)
        optimizer.step()
        seen.append(float(optimizer.param_groups[0]["step"]))
    assert seen == [1, 2, 3, 4]
    assert optimizer.param_groups[0]["history"] == [0.1] * 4, "the group shows the layers at rate 1"
    assert len(optimizer.param_groups) == 1


def _resumed(first_the_handle: bool) -> Callable[..., Any]:
    def again(form: str, base: Any, student: Any, teacher: Any, pairing: Any, optimizer: Any, shown: Any) -> Any:
        saved = copy.deepcopy([student.state_dict(), optimizer.state_dict(), shown.state_dict()])
        shown.close() if form == "wrapper" else shown.detach()
        student, _, _ = _nets()
        student.load_state_dict(saved[0])
        optimizer, shown = make(form, base(student.parameters()), student, teacher, pairing, policy=Script(MULTIPLIERS))
        if form == "attach" and first_the_handle:
            shown.load_state_dict(saved[2])
        optimizer.load_state_dict(saved[1])
        if form == "attach" and not first_the_handle:
            shown.load_state_dict(saved[2])
        return student, optimizer, shown

    return again


@each_form
@averaged
@pytest.mark.parametrize("first_the_handle", [False, True])
def test_a_resume_goes_on_with_the_state_of_each_layer(form: str, base: Any, first_the_handle: bool) -> None:
    _check(form, base, again=_resumed(first_the_handle))


def test_state_of_each_layer_loads_with_weights_only(tmp_path: Any) -> None:
    student, teacher, pairing = _nets()
    base = AVERAGED["a tensor"](student.parameters())
    optimizer, _ = make("wrapper", base, student, teacher, pairing, policy=Script(MULTIPLIERS))
    for step in range(3):
        _backward(student, teacher, step)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)["lwkd"]["groups"]
    sums = {layer: float(own["weight_sum"]) for layer, own in saved[0]["layers"].items()}
    expected = {-1: 3.0, 0: 1 + 1.5**2 + 0.5**2, 1: 1 + 0.5**2 + 1.25**2}
    assert sums == pytest.approx({layer: 0.01 * squares for layer, squares in expected.items()})
    assert float(optimizer.param_groups[0]["weight_sum"]) == pytest.approx(0.03)


def _copied(copier: Callable[[Any], Any]) -> Callable[..., Any]:
    def again(form: str, base: Any, student: Any, teacher: Any, pairing: Any, optimizer: Any, shown: Any) -> Any:
        student, optimizer = copier((student, optimizer))
        optimizer.watch(student, teacher)
        return student, optimizer, optimizer

    return again


@averaged
@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)
def test_a_copy_has_the_state_of_each_layer(base: Any, copier: Any) -> None:
    _check("wrapper", base, again=_copied(copier))


class Noting(Averaged):
    """Notes the sums that it finds."""

    def step(self, closure: Any = None) -> None:
        self.seen = [group["weight_sum"] for group in self.param_groups]
        super().step(closure)


@each_form
def test_what_the_user_writes_into_a_group_counts_for_all_layers(form: str) -> None:
    student, teacher, pairing = _nets()
    base = Noting(student.parameters())
    optimizer, _ = make(form, base, student, teacher, pairing, policy=Script(MULTIPLIERS))
    for step in range(4):
        if step == 3:
            optimizer.param_groups[0]["weight_sum"] = 5.0
        _backward(student, teacher, step)
        optimizer.step()
        if step == 2:
            assert len(set(base.seen)) == 3
    assert base.seen == [5.0, 5.0]  # two layers at 1.25, and the tail
    assert optimizer.param_groups[0]["weight_sum"] == pytest.approx(5.01)


# Bases that do not step with several groups


class OneGroup(torch.optim.SGD):
    """A base that insists on one group."""

    def step(self, closure: Any = None) -> Any:
        (_,) = self.param_groups
        return super().step(closure)


@each_form
def test_a_base_with_one_group_moves_as_an_optimizer_for_each_layer_would(form: str) -> None:
    steps, dims = 7, (1, 2)
    student, teacher, _ = _nets()
    alone = [OneGroup(group, lr=0.1, momentum=0.9) for group in _parameters(student, dims)]
    way = []
    for step in range(steps):
        _backward(student, teacher, step)
        for optimizer, multiplier in zip(alone, (*MULTIPLIERS[step], 1.0), strict=True):
            optimizer.param_groups[0]["lr"] = 0.1 * multiplier
            optimizer.step()
        way += [p.detach().clone() for p in student.parameters()]
    mine = _trained(form, lambda groups: OneGroup(groups, lr=0.1, momentum=0.9), steps, dims)
    torch.testing.assert_close(mine[: len(way)], way, rtol=1e-9, atol=1e-12)


class Numbered(torch.optim.SGD):
    """A base with a list of its own beside the groups, which it walks together with them (as AdaBound does)."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.scales = [2.0 for _ in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group, scale in zip(self.param_groups, self.scales, strict=False):
            for p in group["params"]:
                p.sub_(scale * group["lr"] * p.grad)


@each_form
def test_a_base_that_would_leave_out_new_groups_is_scaled_by_displacement(form: str) -> None:
    _check(form, lambda groups: Numbered(groups, lr=0.1))


class MasterCopy(OneGroup):
    """A base with one group that steps copies of the parameters, in its state."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        (group,) = self.param_groups
        for p in group["params"]:
            master = self.state[p].setdefault("master", p.detach().clone())
            p.copy_(master.sub_(group["lr"] * p.grad))


class Unit(torch.optim.SGD):
    """A base that divides gradients by their norm in the group."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            norm = torch.stack([p.grad.norm() for p in group["params"]]).norm()
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad / norm)


class OneRate(torch.optim.SGD):
    """A base that takes several groups, but of one learning rate."""

    def step(self, closure: Any = None) -> Any:
        (rate,) = {group["lr"] for group in self.param_groups}
        assert rate
        return super().step(closure)


class NoRate(torch.optim.SGD):
    """A base with a step size of its own."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(0.01 * p.grad.sign())


class ThroughAnother(torch.optim.SGD):
    """A base that steps another optimizer, with a list of groups of its own."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.inner = torch.optim.SGD(self.param_groups, **options)

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


class Shared:
    """A counter that is no tensor and no container."""

    count = 0


class CountsInAnObject(torch.optim.SGD):
    """A base with a counter in an object in its group."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group.setdefault("shared", Shared()).count += 1
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad / group["shared"].count)


@pytest.mark.parametrize(
    ("base", "match"),
    [
        (MasterCopy, r"with more parameter groups .*, and scaling its step afterwards is not the same"),
        (Unit, r"changes when its parameters are split into more groups"),
        (OneRate, r"does not step with groups of different learning rates \(ValueError"),
        (NoRate, r"does not follow the learning rate of parameter group 0"),
        (ThroughAnother, r"does not follow the learning rate of parameter group 0|do not move as one explicit"),
    ],
)
def test_what_has_no_rate_for_each_layer_is_refused(base: Any, match: str) -> None:
    _refused(lambda p: base(p, lr=0.1), f"{base.__name__} cannot be given a learning rate per layer: .*{match}")


@each_form
def test_an_object_in_a_group_is_no_way_round(form: str) -> None:
    """It cannot be kept for each layer, but its steps can be scaled."""
    _check(form, lambda groups: CountsInAnObject(groups, lr=0.1))


@pytest.mark.parametrize("found", [None, "fast", True, "missing"])
def test_a_learning_rate_that_is_none_is_refused(found: Any) -> None:
    def made(parameters: Any) -> torch.optim.Optimizer:
        base = torch.optim.SGD(parameters, lr=0.1)
        if found == "missing":
            del base.param_groups[0]["lr"]
        else:
            base.param_groups[0]["lr"] = found
        return base

    expected = "is missing" if found == "missing" else f"is {found!r}"
    _refused(made, rf"the learning rate \(lr\) of parameter group 0 {expected}; expected a number")


@each_form
def test_a_learning_rate_that_is_lost_later_changes_nothing(form: str) -> None:
    student, teacher, pairing = _nets()
    optimizer, shown = make(form, torch.optim.SGD(student.parameters(), lr=0.1), student, teacher, pairing)
    _backward(student, teacher, 0)
    before = copy.deepcopy(student.state_dict())
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="parameter group 0 is None"):
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert shown.measurements == 0


# The trial


class NeedsTheNet(torch.optim.SGD):
    """A base that steps nothing but a certain net."""

    def __init__(self, net: nn.Module, **options: Any) -> None:
        super().__init__(net.parameters(), **options)
        self.shapes = [p.shape for p in net.parameters()]

    def step(self, closure: Any = None) -> Any:
        found = [p.shape for group in self.param_groups for p in group["params"]]
        if sorted(found) != sorted(self.shapes):
            raise RuntimeError("another net")
        return super().step(closure)


def test_a_base_that_cannot_be_tried_is_said() -> None:
    student, teacher, pairing = _nets()
    base = NeedsTheNet(student, lr=0.1)
    match = r"could not try .*NeedsTheNet on small tensors \(RuntimeError: another net"
    with pytest.warns(UserWarning, match=match) as said:
        lwkd.LayerwiseOptimizer(base, student, teacher, pairing)
    assert [warning.filename for warning in said] == [__file__]


class Noisy(torch.optim.SGD):
    """A base that draws random numbers, warns, and counts its steps on itself."""

    steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        warnings.warn("a step", stacklevel=1)
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(-group["lr"] * p.grad + 0.01 * group["lr"] * torch.randn_like(p))
                self.state[p]["seen"] = self.state[p].get("seen", 0) + 1


def test_the_trial_leaves_no_trace() -> None:
    student, _, _ = _nets()
    base = Noisy(student.parameters(), lr=0.1)
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base.step()
    fired: list[str] = []
    base.register_step_post_hook(lambda *_: fired.append("post"))
    before = copy.deepcopy([student.state_dict(), base.state_dict(), [p.grad for p in student.parameters()]])
    random = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not moves_by_displacement(base)
    after = [student.state_dict(), base.state_dict(), [p.grad for p in student.parameters()]]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert base.steps == 1
    assert not fired


def test_a_base_is_tried_in_the_state_that_it_has() -> None:
    """Of a resumed run, whose state a fresh one would not find; and while a warm-up holds the learning rate at 0."""
    student, teacher, pairing = _nets()
    base = torch.optim.Adagrad(student.parameters(), lr=0.1)  # makes its state at once, and finds none later
    base.param_groups[0]["lr"] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lwkd.LayerwiseOptimizer(base, student, teacher, pairing)


# What a base can do besides


class Sophia(torch.optim.SGD):
    """A base with methods and arguments of its own."""

    def step(self, closure: Any = None, bs: int = 1, *, scale: float = 1.0) -> Any:
        self.given = bs, scale
        return super().step(closure)

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"

    def update_hessian(self, samples: int) -> None:
        self.samples = samples


@each_form
def test_methods_and_arguments_reach_the_base(form: str) -> None:
    student, teacher, pairing = _nets()
    base = Sophia(student.parameters(), lr=0.1)
    optimizer, _ = make(form, base, student, teacher, pairing)
    optimizer.train()
    assert base.mode == "train"
    optimizer.eval()
    assert base.mode == "eval"
    optimizer.update_hessian(3)
    assert base.samples == 3
    _backward(student, teacher, 0)
    closure = lambda: _backward(student, teacher, 0)  # noqa: E731
    for call, given, loss in (
        (lambda: optimizer.step(bs=8), (8, 1.0), None),
        (lambda: optimizer.step(None, 4, scale=0.5), (4, 0.5), None),
        (lambda: optimizer.step(closure, bs=2), (2, 1.0), Tensor),
        (lambda: optimizer.step(closure=closure), (1, 1.0), Tensor),
        (lambda: optimizer.step(closure=None), (1, 1.0), None),
    ):
        found = call()
        assert base.given == given
        assert (found is None) if loss is None else isinstance(found, loss)
    with pytest.raises(TypeError, match="unexpected"):
        optimizer.step(lr=3)


def test_a_wrapper_has_the_methods_that_its_base_has() -> None:
    student, teacher, pairing = _nets()
    optimizer, _ = make("wrapper", torch.optim.SGD(student.parameters(), lr=0.1), student, teacher, pairing)
    assert not any(hasattr(optimizer, name) for name in ("train", "eval", "update_hessian", "anything"))


class NoClosure(torch.optim.Optimizer):
    """A base whose step takes nothing."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)


@each_form
def test_a_base_without_closures_is_stepped_by_those_who_name_one(form: str) -> None:
    student, teacher, pairing = _nets()
    base, policy = NoClosure(student.parameters()), lwkd.Constant([1.5, 0.5])
    optimizer, _ = make(form, base, student, teacher, pairing, policy=policy)
    _backward(student, teacher, 0)
    multipliers = (1.5, 1.5, 0.5, 0.5, 1, 1)
    expected = [p.detach() - 0.1 * m * p.grad for p, m in zip(student.parameters(), multipliers, strict=True)]
    optimizer.step(closure=None)
    torch.testing.assert_close(list(student.parameters()), expected)


class Bare(torch.optim.Optimizer):
    """An optimizer around another one that never runs the constructor of Optimizer, as Accelerate's does."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @property
    def defaults(self) -> Any:
        return self.optimizer.defaults

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


@each_form
def test_a_base_that_never_ran_the_constructor_of_optimizer(form: str) -> None:
    again = _resumed(False)
    _check(form, lambda groups: Bare(torch.optim.SGD(groups, lr=0.1, momentum=0.9)), again=again)


class WithoutDefaults(Bare):
    """As torch's PostLocalSGDOptimizer, which passes on the other attributes only."""

    @property
    def defaults(self) -> Any:
        raise AttributeError("no defaults")


@each_form
def test_a_base_without_defaults(form: str) -> None:
    _check(form, lambda groups: WithoutDefaults(torch.optim.SGD(groups, lr=0.1, momentum=0.9)), again=_resumed(False))
