"""A recipe: the YAML file that describes a comparison, and what is wrong with it before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from lwkd.program.distill.settings import NOT_THE_RUN, Settings
from lwkd.program.errors import ProgramError, require

Rates = Literal[
    "uniform", "layerwise", "mean", "profile", "other-profile", "shuffled", "auto-rgn", "layer-decay", "frozen-prefix"
]
CONTROLS: tuple[Rates, ...] = ("mean", "profile", "other-profile", "shuffled")
"""Arms without a teacher's word of their own, which repeat the rates that a layer-wise run had."""

CONTROL_NAMES = {
    "mean": "its mean, all layers",
    "profile": "its own profile, hindsight",
    "other-profile": "another seed's profile",
    "shuffled": "its rates, layers shuffled",
}

Method = Literal["supervised", "kd", "kd+attention", "kd+jacobian", "kd+hessian"]

UNIFORM = "uniform"
"""Every comparison has this arm: the differences are to it."""

FREE = (
    *(*NOT_THE_RUN, "seed", "device", "lr", "rates", "no_teacher", "compare"),
    *("teacher_checkpoint", "attention_transfer", "amp"),
)
"""Settings that a recipe does not set: the command line does, or the comparison itself, or nothing here uses them."""

OF_TEACHERS = (
    *("data", "image_size", "limit", "augment", "teacher", "teacher_epochs", "batch_size", "optimizer", "lr"),
    *("momentum", "weight_decay", "schedule", "milestones"),
)
"""Settings that decide what a teacher becomes."""

OF_ARMS = (
    *("epochs", "optimizer", "momentum", "weight_decay", "schedule", "milestones"),
    *("signal", "wrt", "estimator", "kind", "curvature", "probes", "samples", "every", "budget"),
    *("policy", "gamma", "policy_momentum", "clamp", "normalize", "multiplier", "window", "tolerance", "near"),
)
"""Settings that one arm may have otherwise than the recipe; data, nets and losses are the same for all."""


@dataclass(frozen=True)
class Arm:
    """One way to set the learning rates.

    ``rates`` says which; ``settings`` are the recipe's with the arm's own options (signal, policy, gamma, clamp …) in
    their place. ``of`` names the layer-wise arm that a control repeats. ``decay`` is ξ of ``layer-decay`` (a layer has
    ξ times the rate of the one behind it), ``layers`` how many segments ``frozen-prefix`` freezes.
    """

    name: str
    settings: Settings
    rates: Rates = "uniform"
    of: str | None = None
    decay: float = 1.0
    layers: int = 0


@dataclass(frozen=True)
class Start:
    """What the student is before it is trained.

    Args:
        kind: ``scratch`` (random weights); ``copy`` (the teacher's weights wherever name and shape agree, and where
            ``layers`` says STUDENT: TEACHER); the other three are the teacher itself after damage: ``replaced`` (fresh
            weights), ``pruned`` (all but ``keep`` of the weights are masked, the smallest first), ``quantized``
            (weights rounded to ``bits``, trained straight through).
        segment: that is damaged, the others stay the teacher's; ``random`` takes another one for every seed.
        keep: share of the weights that ``pruned`` leaves.
        scope: ``pruned``: the share holds over the damaged layers together (``global``) or in each (``layer``).
        bits: of ``quantized``, a scale for each output channel.
        layers: of ``copy``.
    """

    kind: Literal["scratch", "copy", "replaced", "pruned", "quantized"] = "scratch"
    segment: int | Literal["random", "all"] = "all"
    keep: float = 0.1
    scope: Literal["global", "layer"] = "global"
    bits: int = 4
    layers: Mapping[str, str] = field(default_factory=dict)


OF_STARTS = {
    "scratch": (),
    "copy": ("layers",),
    "replaced": ("segment",),
    "pruned": ("segment", "keep", "scope"),
    "quantized": ("segment", "bits"),
}
"""What may be said of each kind."""


@dataclass(frozen=True)
class Recipe:
    """A comparison.

    Args:
        title: heads the report.
        arms: by name, the uniform one first.
        methods: training losses that every arm is tried with.
        base_rates: learning rates that are tried for every arm, ascending, a constant factor apart; the search goes on
            past an end where the best one is found there.
        settings: what all runs share.
        teacher_settings: with which the teachers are trained.
        start: what the student is before training.
        labels: whether the student sees labels.
        label_noise: share of the student's labels that are replaced by a random class.
        shift: what happens to the student's pictures, and not to the teacher's.
        weights: of the transfer losses beside KD, by method.
        teachers: how many are trained; seeds take turns.
        development: seeds that the base rate is chosen with.
        seeds: fewest and most seeds of the figures; how many follows from the spread.
        difference: the smallest difference worth finding, in points.
        validation: training pictures, the last ones, that only choose base rates.
        head: whether the logits are a pair as well.
    """

    title: str
    arms: Mapping[str, Arm]
    base_rates: tuple[float, ...]
    settings: Settings
    teacher_settings: Settings
    methods: tuple[Method, ...] = ("kd",)
    start: Start = Start()
    labels: bool = True
    label_noise: float = 0.0
    shift: Literal["none", "blurred", "inverted"] = "none"
    weights: Mapping[str, float] = field(default_factory=dict)
    teachers: int = 1
    development: int = 6
    seeds: tuple[int, int] = (12, 24)
    difference: float = 0.5
    validation: int = 10_000
    head: bool = False


def read_recipe(path: Path, made: Callable[[Mapping[str, Any]], Settings]) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file. Settings of ``lwkd distill`` stand beside the recipe's own fields.
        made: makes checked settings from plain values.

    Errors: :class:`~lwkd.program.errors.ProgramError` (status 2) that names the file and the entry.
    """
    yaml = require("yaml")
    try:
        given = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ProgramError(
            f"{path} cannot be read: {error}", "give a recipe, such as those in recipes/", code=2
        ) from error
    if not isinstance(given, dict):
        raise ProgramError(f"{path} holds no recipe", "see the recipes in recipes/", code=2)
    try:
        return _recipe(given, made)
    except ProgramError as error:
        raise ProgramError(f"{path}: {error.problem}", error.remedy, code=2) from error


def _recipe(given: dict[str, Any], made: Callable[[Mapping[str, Any]], Settings]) -> Recipe:
    shared_names = {f.name for f in fields(Settings)} - {*FREE}
    own = {f.name for f in fields(Recipe)} - {"settings", "teacher_settings"} | {"teacher_training"}
    strange = [str(key) for key in given if key not in shared_names | own]
    if strange:
        raise _wrong(
            f"unknown entries: {', '.join(strange)}", f"known are {', '.join(sorted(own))}, and options of lwkd distill"
        )
    missing = [name for name in ("title", "arms", "base_rates") if name not in given]
    if missing:
        raise _wrong(f"{missing[0]} is missing", "see the recipes in recipes/")
    shared = {key: value for key, value in given.items() if key in shared_names}
    values = {key: value for key, value in given.items() if key in own - {"arms", "start", "teacher_training"}}
    values["base_rates"] = _rates(given["base_rates"])
    for name in {"methods", "seeds"} & values.keys():
        values[name] = tuple(values[name]) if isinstance(values[name], list) else (values[name],)
    if len(values.get("seeds", ())) == 1:  # as many whatever the spread
        values["seeds"] *= 2
    teacher = _mapping(given, "teacher_training")
    strange = [name for name in teacher if name not in OF_TEACHERS or name in ("data", "image_size", "teacher")]
    if strange:
        raise _wrong(f"teacher_training: {strange[0]} is nothing of the training", "such as optimizer, lr, batch_size")
    recipe = Recipe(
        settings=made(shared),
        teacher_settings=made({**shared, "weight_decay": 5e-4, **teacher}),
        start=_start(_mapping(given, "start")),
        arms=_arms(_mapping(given, "arms"), shared, made),
        **values,
    )
    _check(recipe)
    return recipe


def _wrong(problem: str, remedy: str) -> ProgramError:
    return ProgramError(problem, remedy, code=2)


def _mapping(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = given.get(name) or {}
    if not isinstance(value, dict):
        raise _wrong(f"{name} is {value!r}, expected a mapping", "see the recipes in recipes/")
    return value


def _rates(value: Any) -> tuple[float, ...]:
    rates = tuple(float(rate) for rate in value) if isinstance(value, list) else ()
    if len(rates) < 2 or rates[0] <= 0 or any(b <= a for a, b in pairwise(rates)):
        raise _wrong(
            f"base_rates is {value!r}, expected two or more positive rates, ascending", "such as [0.01, 0.02, 0.04]"
        )
    return rates


def _filled(kind: type[Any], values: Mapping[str, Any], what: str) -> Any:
    """A dataclass from plain values; words are checked against the choices there are."""
    known = {f.name: f for f in fields(kind)}
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name not in known:
            raise _wrong(f"{what}: {name} is not known", f"known are {', '.join(known)}")
        choices = [
            word for part in (hints[name], *get_args(hints[name])) for word in get_args(part) if isinstance(word, str)
        ]
        if choices and isinstance(value, str) and value not in choices:
            raise _wrong(f"{what}: {name} is {value!r}", f"expected one of {', '.join(choices)}")
    return kind(**values)


def _start(given: dict[str, Any]) -> Start:
    start: Start = _filled(Start, given, "start")
    known = OF_STARTS[start.kind]
    unused = [name for name in given if name not in ("kind", *known)]
    if unused:
        raise _wrong(f"start: {start.kind} has no {unused[0]}", f"it has {', '.join(known) or 'nothing'}")
    if start.kind == "replaced" and start.segment == "all":
        raise _wrong("start: all segments are replaced", "say which segment, or give start: {kind: scratch}")
    return start


def _arms(
    given: dict[str, Any], shared: Mapping[str, Any], made: Callable[[Mapping[str, Any]], Settings]
) -> dict[str, Arm]:
    arms = {UNIFORM: Arm(UNIFORM, made(shared))}
    own = {f.name for f in fields(Arm)} - {"name", "settings"} | {"controls"}
    for name, options in given.items():
        options = dict(options or {})
        strange = [key for key in options if key not in {*own, *OF_ARMS}]
        if strange:
            raise _wrong(
                f"arm {name!r}: {strange[0]} is nothing of one arm",
                f"an arm may have {', '.join([*sorted(own), *OF_ARMS])}; the rest is the same for all of them",
            )
        controls = options.pop("controls", False)
        settings = made({**shared, **{key: value for key, value in options.items() if key in OF_ARMS}})
        mine = {key: value for key, value in options.items() if key in own}
        arms[name] = _filled(Arm, {"name": name, "settings": settings, **mine}, f"arm {name!r}")
        if controls:
            for rates in CONTROLS if controls is True else controls:
                control = f"{name}: {CONTROL_NAMES.get(rates, rates)}"
                arms[control] = _filled(
                    Arm, {"name": control, "settings": settings, "rates": rates, "of": name}, f"arm {name!r}"
                )
    return arms


def _check(recipe: Recipe) -> None:
    for arm in recipe.arms.values():
        if (arm.rates in CONTROLS) != (arm.of is not None):
            raise _wrong(
                f"arm {arm.name!r}: rates {arm.rates} and of {arm.of}", "of: names the arm that a control repeats"
            )
        if arm.of is not None and (arm.of not in recipe.arms or recipe.arms[arm.of].rates != "layerwise"):
            raise _wrong(f"arm {arm.name!r}: of is {arm.of!r}, which is no layer-wise arm", "give the name of one")
        if arm.rates == "frozen-prefix" and arm.layers < 1:
            raise _wrong(f"arm {arm.name!r}: layers is {arm.layers}", "say how many segments are frozen")
        if not arm.decay > 0:
            raise _wrong(f"arm {arm.name!r}: decay is {arm.decay}", "expected a positive number, such as 0.8")
    for method in recipe.methods:
        if method not in get_args(Method):
            raise _wrong(f"method {method!r} is not known", f"expected some of {', '.join(get_args(Method))}")
        if method == "kd+hessian" and recipe.settings.multilabel:
            raise _wrong("method kd+hessian is of a softmax, and the data are multi-label", "leave it out")
        if method == "supervised" and not recipe.labels:
            raise _wrong(
                "method supervised has nothing to learn from without labels", "leave it out, or give labels: true"
            )
    if recipe.settings.text:
        derivatives = [method for method in recipe.methods if method in ("kd+jacobian", "kd+hessian")]
        if derivatives:
            raise _wrong(
                f"method {derivatives[0]} differentiates by the input, and words have no derivative", "leave it out"
            )
        if recipe.shift != "none":
            raise _wrong(f"shift: {recipe.shift} is of pictures, and the data are documents", "leave it out")
    if recipe.label_noise and recipe.settings.multilabel:
        raise _wrong("label_noise replaces one class by another, and the data are multi-label", "leave it out")
    ranges = {
        "teachers": (recipe.teachers, 1, 1000),
        "development": (recipe.development, 2, 1000),
        "fewest seeds": (recipe.seeds[0], 2, recipe.seeds[1]),
        "label_noise": (recipe.label_noise, 0, 1),
        "start: keep": (recipe.start.keep, 0.001, 1),
        "start: bits": (recipe.start.bits, 2, 8),
        "validation": (recipe.validation, 1, 10**7),
        "difference": (recipe.difference, 1e-6, 100),
    }
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise _wrong(f"{name} is {value}", f"expected a number from {low} to {high}")
