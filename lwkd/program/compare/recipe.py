"""A recipe: the YAML file that describes a comparison, and what is wrong with it before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from lwkd.program.compare.fields import filled, fitted, typed, wrong
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

OF_TRAINING = ("epochs", "optimizer", "momentum", "weight_decay", "schedule", "milestones")

OF_LAYERWISE = (
    *("signal", "wrt", "estimator", "kind", "curvature", "probes", "samples", "every", "budget"),
    *("policy", "gamma", "policy_momentum", "clamp", "normalize", "multiplier", "window", "tolerance", "near"),
)

OF_ARMS = (*OF_TRAINING, *OF_LAYERWISE)
"""Settings that one arm may have otherwise than the recipe; data, nets and losses are the same for all."""

OF_RATES: dict[Rates, tuple[str, ...]] = {
    "uniform": (),
    "layerwise": ("controls", *OF_LAYERWISE),
    **dict.fromkeys(CONTROLS, ("of",)),
    "auto-rgn": (),
    "layer-decay": ("decay",),
    "frozen-prefix": ("layers",),
}
"""What may be said of an arm with these rates, beside its training."""


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
        seeds: fewest and most seeds of the figures; how many follows from the spread, over all layer-wise arms.
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

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]
        """YAML keeps the last of two equal keys, and says nothing."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value]
            for number, (key, _) in enumerate(node.value):
                if key.value in names[:number]:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
            return super().construct_mapping(node, deep)

    try:
        given = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: other bytes than UTF-8, the 40th of May
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
        raise wrong(
            f"unknown entries: {', '.join(strange)}", f"known are {', '.join(sorted(own))}, and options of lwkd distill"
        )
    missing = [name for name in ("title", "arms", "base_rates") if name not in given]
    if missing:
        raise wrong(f"{missing[0]} is missing", "see the recipes in recipes/")
    shared = {key: value for key, value in given.items() if key in shared_names}
    values = {key: value for key, value in given.items() if key in own - {"arms", "start", "teacher_training"}}
    values["base_rates"] = _rates(given["base_rates"])
    if isinstance(values.get("methods"), str):
        values["methods"] = [values["methods"]]
    seeds = values.get("seeds")
    if type(seeds) is int:  # as many whatever the spread
        values["seeds"] = [seeds, seeds]
    elif isinstance(seeds, list) and len(seeds) == 1:
        values["seeds"] = seeds * 2
    teacher = _mapping(given, "teacher_training")
    strange = [name for name in teacher if name not in OF_TEACHERS or name in ("data", "image_size", "teacher")]
    if strange:
        raise wrong(f"teacher_training: {strange[0]} is nothing of the training", "such as optimizer, lr, batch_size")
    parts = {
        "settings": _settings({}, shared, made, ""),
        "teacher_settings": _settings({**shared, "weight_decay": 5e-4}, teacher, made, "teacher_training: "),
        "start": _start(_mapping(given, "start")),
        "arms": _arms(_mapping(given, "arms"), shared, made),
    }
    recipe: Recipe = filled(Recipe, {**values, **parts}, "")
    _check(recipe)
    return recipe


def _mapping(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = given.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise wrong(f"{name} is {value!r}, expected a mapping", "see the recipes in recipes/")
    return value


def _rates(value: Any) -> tuple[float, ...]:
    try:
        rates = tuple(float(rate) for rate in fitted(value, tuple[float, ...]))
    except (OverflowError, ValueError):
        rates = ()
    if len(rates) < 2 or rates[0] <= 0 or any(b <= a for a, b in pairwise(rates)):
        raise wrong(
            f"base_rates is {value!r}, expected two or more positive rates, ascending", "such as [0.01, 0.02, 0.04]"
        )
    factor = (rates[-1] / rates[0]) ** (1 / (len(rates) - 1))
    if any(not 0.94 < b / a / factor < 1.06 for a, b in pairwise(rates)):  # 1, 3, 10 are rounded
        raise wrong(
            f"base_rates is {value!r}, expected a constant factor from one to the next", "such as [0.01, 0.02, 0.04]"
        )
    return rates


def _settings(
    shared: Mapping[str, Any], own: Mapping[str, Any], made: Callable[[Mapping[str, Any]], Settings], what: str
) -> Settings:
    """Settings of the two together; an option would take "no" for False, and null for its default."""
    hints = get_type_hints(Settings)
    for name, value in own.items():
        typed(value, hints[name], f"{what}{name}")
    try:
        return made({**shared, **own})
    except ProgramError as error:
        raise wrong(f"{what}{error.problem}", error.remedy) from error


def _start(given: dict[str, Any]) -> Start:
    start: Start = filled(Start, given, "start: ")
    known = OF_STARTS[start.kind]
    unused = [name for name in given if name not in ("kind", *known)]
    if unused:
        raise wrong(f"start: {start.kind} has no {unused[0]}", f"it has {', '.join(known) or 'nothing'}")
    if start.kind == "replaced" and start.segment == "all":
        raise wrong("start: all segments are replaced", "say which segment, or give start: {kind: scratch}")
    return start


def _arms(
    given: dict[str, Any], shared: Mapping[str, Any], made: Callable[[Mapping[str, Any]], Settings]
) -> dict[str, Arm]:
    if not given:
        raise wrong("arms is empty", "name an arm that is compared with uniform rates, such as {rates: layerwise}")
    arms = {UNIFORM: Arm(UNIFORM, _settings(shared, {}, made, ""))}
    own = {f.name for f in fields(Arm)} - {"name", "settings"} | {"controls"}
    for name, options in given.items():
        what = f"arm {name!r}: "
        if not isinstance(name, str):
            raise wrong(f"arms: {name!r} is no name", "put it in quotes")
        if name == UNIFORM:
            raise wrong(f"{what}every comparison has it, with the recipe's settings", "give this one another name")
        if not isinstance(options, dict):
            raise wrong(f"arm {name!r} is {options!r}, expected a mapping", "such as {rates: layerwise}")
        strange = [key for key in options if key not in {*own, *OF_ARMS}]
        if strange:
            raise wrong(
                f"{what}{strange[0]} is nothing of one arm",
                f"an arm may have {', '.join([*sorted(own), *OF_ARMS])}; the rest is the same for all of them",
            )
        rates: Rates = typed(options.get("rates", "uniform"), Rates, f"{what}rates")
        known = ("rates", *OF_RATES[rates], *OF_TRAINING)
        unused = [key for key in options if key not in known]
        if unused:
            raise wrong(f"{what}rates: {rates} has no {unused[0]}", f"leave it out; it has {', '.join(known[1:])}")
        settings = _settings(shared, {key: options[key] for key in options if key in OF_ARMS}, made, what)
        mine = {key: value for key, value in options.items() if key in own - {"controls"}}
        arms[name] = filled(Arm, {"name": name, "settings": settings, **mine}, what)
        for kind in _controls(options.get("controls", False), what):
            control = f"{name}: {CONTROL_NAMES[kind]}"
            if control in arms or control in given:
                raise wrong(f"arm {control!r} is there twice", f"it is a control of {name!r}; leave the other one out")
            arms[control] = Arm(control, settings, kind, name)
    return arms


def _controls(given: Any, what: str) -> tuple[Rates, ...]:
    if isinstance(given, bool):
        return CONTROLS if given else ()
    if not isinstance(given, list) or any(kind not in CONTROLS for kind in given):
        raise wrong(f"{what}controls is {given!r}", f"expected true, or a list of some of {', '.join(CONTROLS)}")
    return tuple(given)


def _check(recipe: Recipe) -> None:
    for arm in recipe.arms.values():
        if (arm.rates in CONTROLS) != (arm.of is not None):
            raise wrong(
                f"arm {arm.name!r}: rates {arm.rates} and of {arm.of}", "of: names the arm that a control repeats"
            )
        if arm.of is not None and (arm.of not in recipe.arms or recipe.arms[arm.of].rates != "layerwise"):
            raise wrong(f"arm {arm.name!r}: of is {arm.of!r}, which is no layer-wise arm", "give the name of one")
        if arm.of is not None and arm.settings.epochs != recipe.arms[arm.of].settings.epochs:
            raise wrong(
                f"arm {arm.name!r}: epochs is {arm.settings.epochs}, and {arm.of!r}, whose rates it repeats, has "
                f"{recipe.arms[arm.of].settings.epochs}",
                "give both the same",
            )
        if arm.rates == "frozen-prefix" and arm.layers < 1:
            raise wrong(f"arm {arm.name!r}: layers is {arm.layers}", "say how many segments are frozen")
        if arm.rates == "layer-decay" and (not 0 < arm.decay <= 10 or arm.decay == 1):
            raise wrong(
                f"arm {arm.name!r}: decay is {arm.decay}", "expected a positive number up to 10 and not 1, such as 0.8"
            )
    if not recipe.methods or len({*recipe.methods}) < len(recipe.methods):
        raise wrong(
            f"methods is {[*recipe.methods]}, expected one or more, each once",
            f"known are {', '.join(get_args(Method))}",
        )
    transfer = [method for method in get_args(Method) if "+" in method]
    if strange := [method for method in recipe.weights if method not in transfer]:
        raise wrong(f"weights: {strange[0]} is no transfer loss", f"expected some of {', '.join(transfer)}")
    for method in recipe.methods:
        if method == "kd+hessian" and recipe.settings.multilabel:
            raise wrong("method kd+hessian is of a softmax, and the data are multi-label", "leave it out")
        if method == "supervised" and not recipe.labels:
            raise wrong(
                "method supervised has nothing to learn from without labels", "leave it out, or give labels: true"
            )
    if recipe.settings.text:
        derivatives = [method for method in recipe.methods if method in ("kd+jacobian", "kd+hessian")]
        if derivatives:
            raise wrong(
                f"method {derivatives[0]} differentiates by the input, and words have no derivative", "leave it out"
            )
        if recipe.shift != "none":
            raise wrong(f"shift: {recipe.shift} is of pictures, and the data are documents", "leave it out")
    if recipe.label_noise and recipe.settings.multilabel:
        raise wrong("label_noise replaces one class by another, and the data are multi-label", "leave it out")
    ranges = {
        "teachers": (recipe.teachers, 1, 1000),
        "development": (recipe.development, 2, 1000),
        "fewest seeds": (recipe.seeds[0], 2, recipe.seeds[1]),
        "most seeds": (recipe.seeds[1], 2, 10_000),
        "label_noise": (recipe.label_noise, 0, 1),
        "start: keep": (recipe.start.keep, 0.001, 1),
        "start: bits": (recipe.start.bits, 2, 8),
        "validation": (recipe.validation, 1, 10**7),
        "difference": (recipe.difference, 1e-6, 100),
        **{f"weights: {method}": (weight, 0, 10**6) for method, weight in recipe.weights.items()},
    }
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise wrong(f"{name} is {value}", f"expected a number from {low} to {high}")
