"""The optimizer wrapper: any torch optimizer, with a learning rate per student layer.

Two forms of the same code: :class:`LayerwiseOptimizer` wraps; :func:`lwkd.attach` works on the user's own object.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import distributed, nn
from torch.optim import Optimizer

from lwkd.optimizer.caught_steps import StepHooks
from lwkd.optimizer.metrics import KEY, RateMetrics
from lwkd.optimizer.nested import where_steps_come
from lwkd.optimizer.step import LayerwiseStep, check_not_layerwise, parameters_in
from lwkd.pairing import Pairing
from lwkd.policies import Policy
from lwkd.signals import Signal


class LayerwiseOptimizer(RateMetrics, Optimizer):
    r"""Any torch optimizer, with a learning rate per student layer: ``lr_l = lr · m_l``.

    The multipliers ``m_l`` come from the divergence of the passes that the training loop makes anyway; one measured
    before update k acts at update k+1, and update 0 uses 1 (or what :class:`lwkd.Constant` says). ``state``,
    ``param_groups`` and ``defaults`` are the base's; ``param_groups[i]["lr"]`` stays what the user or a scheduler put
    there. Decoupled weight decay (``lr · weight_decay · p``) scales with the rate, as it does under a scheduler. With a
    rate of 0 (``Constant([0.0, 1.0])``, ``clamp=(0, 1.5)``) a layer's parameters stay bitwise as they are, decay
    included, while what the base averages over gradients (momentum) goes on as at a learning rate of 0; rates that stay
    on the device are only a learning rate of 0 to the base.

    The base moves as it would with one explicit parameter group a layer, each at its ``lr_l``. Whether it does is tried
    when the wrapper is made, with a few small tensors and the base's own options: sums, counters and the like that a
    base keeps in its groups are then kept for each layer (``param_groups`` shows those of the layers at rate 1), one
    that steps with the user's groups only is scaled afterwards by ``p_old + m (p_new − p_old)``, where that is the
    same, and one that does not follow its groups' learning rates is refused. LBFGS, whose step looks at all parameters
    together, is scaled afterwards by definition. One optimizer takes its rates from one teacher.

    ``train``, ``eval`` and ``update_hessian`` are there where the base has them, and ``step`` takes what the base's
    takes; anything else is at ``.base``.

    On CUDA no step waits for the GPU: what is measured before update k reaches the host while it goes on, and is taken
    in when step k+1 begins, or when somebody reads, saves or copies the rates. Two things differ from the CPU: under a
    GradScaler an update of a fused base with infinite gradients drops its measurement (on the CPU its passes count with
    the next update's), and a calibration (``budget``) takes one measurement more. Where every learning rate of the
    base is a CUDA tensor and the base is fused or capturable, rates stay on the device; with the attention signal,
    measured at every update on one rank, a whole step can then be captured in a CUDA graph.

    A copy (``copy.deepcopy``, ``pickle``) keeps its rates and steps with them, but watches no net:
    :meth:`watch` attaches it to one.

    Args:
        optimizer: the base.
        student: the student, as the training loop calls it (wrapped or compiled included).
        teacher: the teacher, as the training loop calls it.
        pairing: from :func:`lwkd.pair`.
        signal: ``"attention"``, ``"jacobian"``, ``"hessian"``, or an object of :mod:`lwkd.signals`. The last two make
            passes of their own in ``step``, on rows of the last batch, after the update.
        policy: an object of :mod:`lwkd.policies`; None is ``Local()``, with the signal's momentum.
        every: measure at every so many updates; None is the signal's default (attention: 1).
        samples: rows of each batch that are measured, the first ones; None is the signal's default: for attention one
            in four and at least 8, for the Jacobian one in eight, at least 4 and at most 16, for the Hessian one in
            four, at least 8 and at most 16.
        budget: instead of ``every``: the share of the time that measuring may take on average, 0.02 for 2 %. The first
            updates are measured to find out what it costs, and fix the interval.
        process_group: the ranks that train this student together, over which statistics are summed; None is all ranks.
            For models that not all ranks share. A copy shares it; a pickle does not hold it, see :meth:`watch`.

    Raises:
        TypeError: the base is not a torch optimizer.
        ValueError: it holds no parameter of the student, its steps do not follow a learning rate per layer, it has
            one already, or an option is out of range.
        lwkd.PairingError: the pairing belongs to other nets.

    Warns:
        UserWarning: rates have no effect (paired layers without a trainable parameter in the base, or a policy that
            compares layers where there is one), or the base could not be tried.

    >>> import torch, lwkd
    >>> net = lambda width: torch.nn.Sequential(
    ...     torch.nn.Conv2d(1, width, 3, 2), torch.nn.ReLU(), torch.nn.Conv2d(width, 2 * width, 3, 2), torch.nn.ReLU())
    >>> student, teacher, x = net(4), net(8).eval(), torch.rand(2, 1, 16, 16)
    >>> optimizer = lwkd.LayerwiseOptimizer(
    ...     torch.optim.SGD(student.parameters(), lr=0.1), student, teacher, lwkd.pair(student, teacher, x))
    >>> for _ in range(2):
    ...     with torch.no_grad(): target = teacher(x).mean()
    ...     (student(x).mean() - target).square().backward()
    ...     optimizer.step()
    >>> optimizer.passes["measured"], optimizer.param_groups[0]["lr"]
    (2, 0.1)
    """

    base: Optimizer

    def __init__(
        self,
        optimizer: Optimizer,
        student: nn.Module,
        teacher: nn.Module,
        pairing: Pairing,
        *,
        signal: str | Signal = "attention",
        policy: Policy | None = None,
        every: int | None = None,
        samples: int | None = None,
        budget: float | None = None,
        process_group: distributed.ProcessGroup | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer")
        check_not_layerwise(optimizer)
        # The constructor of Optimizer writes groups, state and defaults through the properties below. An empty
        # optimizer takes them, so that the base's own are never touched.
        self.base = Optimizer.__new__(Optimizer)
        super().__init__(parameters_in(optimizer), dict(getattr(optimizer, "defaults", {})))
        self._share(optimizer)
        self._layerwise = LayerwiseStep(
            optimizer,
            student,
            teacher,
            pairing,
            signal=signal,
            policy=policy,
            every=every,
            samples=samples,
            budget=budget,
            process_group=process_group,
        )
        self._hook_steps()

    def _hook_steps(self) -> None:
        """A base that only passes steps on, and not every one, is left to do so: we act where they arrive."""
        inner = where_steps_come(self.base)
        self._hooks = None if inner is self.base else StepHooks(inner, self._layerwise, acts=False)
        if self._hooks is not None and not self._hooks:
            raise ValueError(
                f"the {type(self.base).__name__} holds a {type(inner).__name__}, which calls no step hooks: give "
                "lwkd the inner one, and the LayerwiseOptimizer to accelerator.prepare"
            )

    def _share(self, optimizer: Optimizer) -> None:
        """Make the base's hooks ours: whichever object they are registered on, they fire once."""
        self.base = optimizer
        for hooks in [name for name in vars(self) if name.startswith("_optimizer_") and name.endswith("_hooks")]:
            # A base that never ran the constructor of Optimizer has none; then ours stay ours.
            setattr(self, hooks, getattr(optimizer, hooks, getattr(self, hooks)))

    # The base's attributes

    @property
    def state(self) -> Any:
        """The base's state."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's groups, as the user and the schedulers see them."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's defaults."""
        return getattr(self.base, "defaults", {})  # PostLocalSGDOptimizer has none

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base.defaults = value

    # What a GradScaler asks for: a fused base unscales its gradients itself, and skips infinite ones without being read

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return getattr(self.base, "_step_supports_amp_scaling", False)

    @property
    def grad_scale(self) -> Any:
        """The scale of the gradients that the base divides by; set by a GradScaler for the length of a step."""
        return self.base.grad_scale  # type: ignore[attr-defined]

    @grad_scale.setter
    def grad_scale(self, value: Any) -> None:
        self.base.grad_scale = value  # type: ignore[attr-defined]

    @grad_scale.deleter
    def grad_scale(self) -> None:
        del self.base.grad_scale  # type: ignore[attr-defined]

    @property
    def found_inf(self) -> Any:
        """Nonzero where the gradients are infinite; set by a GradScaler for the length of a step."""
        return self.base.found_inf  # type: ignore[attr-defined]

    @found_inf.setter
    def found_inf(self, value: Any) -> None:
        self.base.found_inf = value  # type: ignore[attr-defined]

    @found_inf.deleter
    def found_inf(self) -> None:
        del self.base.found_inf  # type: ignore[attr-defined]

    # What an optimizer does

    def step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """One update, every layer at its own rate; afterwards the rates of the next one are set.

        Args:
            closure: re-evaluates the loss, for bases that ask for one; runs with the user's groups in place.
            args: what else the base's ``step`` takes.
            kwargs: as ``args``.

        Returns:
            What the base returns.
        """
        if self._hooks is not None:
            with self._hooks.acting(True):
                return self.base.step(closure, *args, **kwargs)
        return self._layerwise(self.base.step, closure, *args, **kwargs)

    # What some bases can do besides, and then only; whatever else one of them offers is under ``.base``.
    # Attributes are not passed on at large: frameworks ask an optimizer what it has, and act on it.

    @property
    def train(self) -> Callable[..., Any]:
        """The base's ``train``, if it has one (schedule-free optimizers)."""
        return self.base.train  # type: ignore[attr-defined]

    @property
    def eval(self) -> Callable[..., Any]:
        """The base's ``eval``, if it has one."""
        return self.base.eval  # type: ignore[attr-defined]

    @property
    def update_hessian(self) -> Callable[..., Any]:
        """The base's ``update_hessian``, if it has one (Sophia)."""
        return self.base.update_hessian  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the base's."""
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the base's; parameters of the student find their layer by name."""
        self.base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict, and the rates under the key ``lwkd``, which a bare optimizer ignores."""
        return {**self.base.state_dict(), KEY: self._layerwise.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this wrapper, or of the bare base (the rates then stay as they are).

        Raises:
            ValueError: the rates were saved with another pairing or signal; nothing has been changed then.
        """
        rates = state_dict.get(KEY)
        if rates is not None:
            self._rates.check_state(rates)
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != KEY})
        self._layerwise.note_load()
        if rates is not None:
            self._layerwise.load_state_dict(rates)

    # Lifetime

    def watch(
        self, student: nn.Module, teacher: nn.Module, *, process_group: distributed.ProcessGroup | None = None
    ) -> None:
        """Attach to these nets: for a copy of the optimizer, together with the copied student.

        Args:
            student: the student.
            teacher: the teacher.
            process_group: None leaves it as it is; has to be given where a pickle has lost it.

        Raises:
            RuntimeError: it was lost and is not given.
        """
        self._layerwise.watch(student, teacher, process_group)

    def close(self) -> None:
        """Remove the hooks from both nets. The rates stay as they are, and steps go on with them.

        Layers that :class:`lwkd.Freeze` left out of the backward pass are in it again, at rate 0.
        """
        self._layerwise.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"base": self.base, "_layerwise": self._layerwise}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share(state["base"])
        self._hook_steps()

    def __repr__(self) -> str:
        watching = "" if self._rates.watching else ", watching nothing"
        return f"LayerwiseOptimizer({len(self._rates.pairing)} layers{watching}, {self.base!r})"
