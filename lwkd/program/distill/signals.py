"""From settings to the library's signal, which is tried out on the nets before they are trained."""

from __future__ import annotations

from inspect import signature
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lwkd
from lwkd.program.distill.settings import Settings
from lwkd.program.errors import ProgramError
from lwkd.reference import DivergenceKind, JacobianKind
from lwkd.signals import SIGNALS, Signal

OPTIONS = ("wrt", "estimator", "kind", "curvature", "probes")
"""Settings that only some signals have; the library's signals have fields of the same names."""

KINDS: dict[str, tuple[str, ...]] = {"attention": get_args(DivergenceKind), "jacobian": get_args(JacobianKind)}

UNITS = {
    ("attention", "jsd"): "JSD of attention maps (nats)",
    ("attention", "l2"): "squared L2 of attention maps (0 to 2)",
    ("jacobian", "direction"): "Jacobian, direction (0 to 4)",
    ("jacobian", "norm"): "Jacobian, norm (0 to 1)",
    ("jacobian", "relative"): "Jacobian, relative (0 to 2)",
    ("hessian", "hessian"): "Hessian, relative (0 to 1)",
    ("hessian", "relative"): "second derivative of the maps, relative (0 to 2)",
}


def signal_of(settings: Settings) -> Signal:
    """The library's signal, with its own defaults where a setting is None.

    Errors: :class:`~lwkd.program.errors.ProgramError` (status 2) for an option of another signal, and for what the
        library refuses.

    >>> signal_of(Settings(signal="jacobian", estimator="difference")).estimator
    'difference'
    """
    given = {name: value for name in OPTIONS if (value := getattr(settings, name)) is not None}
    for name, value in given.items():
        takers = [signal for signal in SIGNALS if _takes(signal, name, value)]
        if settings.signal not in takers:
            shown = f"--{name} {value}" if name == "kind" else f"--{name}"
            raise ProgramError(
                f"{shown} belongs to --signal {' and --signal '.join(takers)}, and this run has --signal "
                f"{settings.signal}",
                f"leave it out (of the run.yaml, too), or give --signal {' or '.join(takers)}",
                code=2,
            )
    if settings.multilabel and settings.signal == "hessian" and settings.wrt != "input":
        if settings.curvature == "ggn":
            raise ProgramError(
                "--curvature ggn is the Gauss-Newton matrix of the cross-entropy of one class a picture, and --data "
                f"{settings.data} has many",
                "leave it out, or give --curvature hessian: the Hessian of the binary cross-entropy",
                code=2,
            )
        given |= {"curvature": "hessian", "loss": _binary_cross_entropy}
    if settings.text and _by_input(settings):
        raise ProgramError(
            f"--signal {settings.signal} differentiates by the input, and --data {settings.data} are ids of words, "
            "which have no derivative",
            "give --signal attention, or differentiate by the weights: --signal hessian, or --wrt parameters",
            code=2,
        )
    try:
        return SIGNALS[settings.signal](**given)
    except ValueError as error:
        raise ProgramError(
            f"--signal {settings.signal}: {error}", "see the panel Signal of lwkd distill --help", code=2
        ) from error


def _by_input(settings: Settings) -> bool:
    if settings.signal == "jacobian":  # "output" differentiates by the layers' outputs
        return settings.estimator != "output" and settings.wrt != "parameters"
    return settings.signal == "hessian" and settings.wrt == "input"


def _binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Of both nets against the teacher's probabilities, as the cross-entropy is for one class a picture."""
    return F.binary_cross_entropy_with_logits(logits, target.sigmoid(), reduction="sum") / len(logits)


def _takes(signal: str, name: str, value: Any) -> bool:
    if name == "kind":
        return value in KINDS.get(signal, ())
    return name in signature(SIGNALS[signal]).parameters


def check_schedule(settings: Settings) -> None:
    """Refuse an interval together with a budget, and a budget that is no share (status 2)."""
    if settings.budget is None:
        return
    if settings.every is not None:
        raise ProgramError(
            f"--every {settings.every} and --budget {settings.budget} both set how often is measured",
            "leave out one of the two (of the run.yaml, too)",
            code=2,
        )
    if not 0 < settings.budget <= 1:
        raise ProgramError(
            f"--budget is {settings.budget}, expected a share of the training time above 0 and up to 1",
            "give 0.02 for 2 %",
            code=2,
        )


def measurable(
    signal: Signal, student: nn.Module, teacher: nn.Module, pairing: lwkd.Pairing, inputs: Any, remedy: str
) -> None:
    """Measure once, so that nets that cannot be measured are found before anything takes long.

    Args:
        signal: is tried only if it makes passes of its own.
        student: left as it is.
        teacher: left as it is.
        pairing: of the two.
        inputs: what both are called with, a few rows of it.
        remedy: what to do instead.

    Errors: :class:`~lwkd.program.errors.ProgramError` (status 2) with what the library says.
    """
    if not signal.replays:
        return
    measure: Any = signal.measure
    try:
        measure(student, teacher, pairing, inputs)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ProgramError(
            f"--signal {signal.name} cannot be measured on these nets: {error}", remedy, code=2
        ) from error


def try_out(settings: Settings, student: nn.Module, teacher: nn.Module, pairing: lwkd.Pairing, like: Tensor) -> None:
    """Measure once on noise, so that nets that cannot be measured are found before a teacher is trained.

    Args:
        settings: of the run.
        student: left as it is.
        teacher: left as it is.
        pairing: of the two.
        like: a batch in shape, dtype and device; ids of words are taken as they are.

    Errors: :class:`~lwkd.program.errors.ProgramError` (status 2) with what the library says.
    """
    noise = like
    if like.is_floating_point():
        noise = torch.rand(like.shape, generator=torch.Generator().manual_seed(0)).to(like)
    remedy = "give --signal jacobian --estimator difference, which needs plain passes only, or --signal attention"
    measurable(signal_of(settings), student, teacher, pairing, noise, remedy)


def unit_of(settings: Settings) -> str:
    """What the divergence is and the values it can have, for the axis of a picture.

    >>> unit_of(Settings())
    'JSD of attention maps (nats)'
    """
    signal = signal_of(settings)
    return UNITS[signal.name, getattr(signal, "kind", signal.ratio)]
