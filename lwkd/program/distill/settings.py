"""The options of ``lwkd distill``: what ``run.yaml`` holds, and what both halves of a resumed run must share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import click
import typer

from lwkd.program.errors import ProgramError, require
from lwkd.signals import SIGNALS

NOT_THE_RUN = ("out", "data_dir", "workers", "threads")
"""Settings that may change between the halves of a run: where things lie and how fast it goes (a note says when the
number of threads changed, because sums are then rounded differently)."""

OPTIONS_OF_POLICIES = {
    **dict.fromkeys(("local", "relative", "decay"), ("gamma", "policy_momentum", "clamp", "normalize")),
    "constant": ("policy_momentum", "multiplier"),
    "freeze": ("window", "tolerance", "near"),
}
"""Settings that only some policies have."""

OF_TEACHERS = (
    *("rates", "compare", "teacher_checkpoint", "attention_transfer", "pair", "temperature", "alpha"),
    *("wrt", "estimator", "kind", "curvature", "probes", "samples", "every", "budget"),
)
"""Settings that, beside those of policies, mean nothing without a teacher. Those that name the teacher, the signal and
the policy are left alone, so that few have to be taken out of a run.yaml that is tried without a teacher."""

in_data, in_nets, in_training, in_rates, in_signal, in_run = (
    partial(typer.Option, rich_help_panel=panel)
    for panel in ("Data", "Nets", "Training", "Distillation and rates", "Signal", "Run")
)

# What lwkd distill and lwkd profile have in common.
Teacher = Annotated[str, in_nets(help="Teacher: a name, or module:function.")]
Student = Annotated[str, in_nets(help="Student: a name, or module:function.")]
Pairs = Annotated[tuple[str, ...], in_nets(help="STUDENT=TEACHER layers, instead of the search; repeatable.")]
Base = Literal["sgd", "adam", "adamw"]
Amp = Annotated[Literal["bf16"] | None, in_training(help="Mixed precision.")]
Device = Annotated[str, in_run(help="cpu, cuda, cuda:1 …")]
Threads = Annotated[int | None, in_run(min=1, help="CPU threads; default: torch's.")]


@dataclass(frozen=True)
class Settings:
    """Every option of ``lwkd distill`` that decides what is computed, with its help; the fields are the options' names.

    None is the default of whatever the option goes to (the data, torch, the signal).

    >>> Settings(student="cnn_4").stages
    ('teacher', 'layerwise')
    >>> Settings(compare=True).stages
    ('teacher', 'alone', 'uniform', 'layerwise')
    """

    data: Annotated[
        Literal["digits", "fashion-mnist", "mnist", "cifar10", "cifar100", "coco", "imagefolder", "bbc-news"],
        in_data(help="Data set; coco: multi-label; bbc-news: documents."),
    ] = "fashion-mnist"
    data_dir: Annotated[str, in_data(help="Where data lies, or is put when it is fetched.")] = "data"
    image_size: Annotated[
        int | None,
        in_data(min=4, help="Side of the pictures; default: the data's own. bbc-news: words a document, default 128."),
    ] = None
    limit: Annotated[int | None, in_data(min=2, help="Cap on training pictures.")] = None
    student_limit: Annotated[int | None, in_data(min=2, help="Cap for students; the teacher sees the rest too.")] = None
    augment: Annotated[
        Literal["auto", "none", "crop", "crop-flip"],
        in_data(help="auto: crop and flip for CIFAR, COCO and image folders."),
    ] = "auto"
    teacher: Teacher = "cnn_16"
    teacher_checkpoint: Annotated[str | None, in_nets(help="Weights of the teacher; it is then not trained.")] = None
    teacher_epochs: Annotated[int, in_nets(min=1, help="Epochs of the teacher.")] = 4
    student: Student = "cnn_8"
    pair: Pairs = ()
    epochs: Annotated[int, in_training(min=1, help="Epochs of the student.")] = 6
    batch_size: Annotated[int, in_training(min=2, help="Pictures or documents a batch.")] = 128
    optimizer: Annotated[Base, in_training(help="Base optimizer (sgd: with Nesterov momentum).")] = "sgd"
    lr: Annotated[float, in_training(min=0, help="Learning rate at the start.")] = 0.1
    momentum: Annotated[float, in_training(min=0, max=0.9999, help="Momentum (adam: beta1).")] = 0.9
    weight_decay: Annotated[float, in_training(min=0, help="Weight decay.")] = 5e-4
    schedule: Annotated[Literal["cosine", "step", "constant"], in_training(help="Learning rate over the run.")] = (
        "cosine"
    )
    milestones: Annotated[
        tuple[float, ...],
        in_training(help="For --schedule step: shares of the run at which the rate falls to a tenth."),
    ] = (0.5, 0.75)
    rates: Annotated[
        Literal["uniform", "layerwise", "both"], in_rates(help="Learning rates of the student's layers.")
    ] = "layerwise"
    no_teacher: Annotated[bool, in_rates("--no-teacher", help="Train the student alone.")] = False
    compare: Annotated[bool, in_rates("--compare", help="Teacher, student alone, uniform, layer-wise: same seed.")] = (
        False
    )
    signal: Annotated[
        str, in_signal(click_type=click.Choice(list(SIGNALS)), help="What the distance to the teacher is measured on.")
    ] = "attention"
    wrt: Annotated[
        Literal["input", "parameters"] | None, in_signal(help="jacobian, hessian: differentiate by what.")
    ] = None
    estimator: Annotated[
        Literal["jvp", "difference", "vjp", "output"] | None,
        in_signal(
            help="jacobian: forward mode, two plain passes, one backward a layer, or gradients of the top logit."
        ),
    ] = None
    kind: Annotated[
        Literal["jsd", "l2", "direction", "norm", "relative"] | None,
        in_signal(help="Distance; attention: jsd or l2, jacobian: direction, norm or relative."),
    ] = None
    curvature: Annotated[
        Literal["hessian", "ggn"] | None,
        in_signal(help="hessian: the Gauss-Newton matrix, or the Hessian itself (multi-label: always)."),
    ] = None
    probes: Annotated[int | None, in_signal(min=1, help="jacobian, hessian: random probes a measurement.")] = None
    samples: Annotated[int | None, in_signal(min=1, help="Rows of the batch that are measured.")] = None
    every: Annotated[int | None, in_signal(min=1, help="Measure at every so many updates.")] = None
    budget: Annotated[
        float | None, in_signal(help="Instead of --every: share of the time for measuring, 0.02 for 2 %.")
    ] = None
    policy: Annotated[
        Literal["local", "relative", "decay", "constant", "freeze"],
        in_rates(help="From divergence to rate; local: all at 1 from scratch."),
    ] = "local"
    gamma: Annotated[
        float | None, in_rates(help="Exponent; default: the policy's. relative: negative turns it round.")
    ] = None
    policy_momentum: Annotated[
        float | None, in_rates(min=0, max=0.9999, help="Weight of the past; default: the signal's.")
    ] = None
    clamp: Annotated[
        tuple[float, float] | None, in_rates(help="Smallest and largest multiplier; default: the policy's.")
    ] = None
    normalize: Annotated[bool, in_rates("--normalize", help="Rescale to a mean multiplier of 1.")] = False
    multiplier: Annotated[tuple[float, ...], in_rates(help="For --policy constant: one, or one a layer.")] = (1.0,)
    window: Annotated[int, in_rates(min=1, help="freeze: measurements from one decision to the next.")] = 100
    tolerance: Annotated[float, in_rates(help="freeze: change in a window of a layer that is at rest.")] = 0.02
    near: Annotated[float, in_rates(help="freeze: share of the largest divergence that is next to the teacher.")] = 0.1
    temperature: Annotated[float, in_rates(help="Temperature of the distillation loss.")] = 4.0
    alpha: Annotated[float, in_rates(min=0, max=1, help="Weight of the teacher beside the labels.")] = 0.9
    attention_transfer: Annotated[float, in_rates(min=0, help="Weight of the attention transfer loss.")] = 0.0
    amp: Amp = None
    out: Annotated[str, in_run(help="Folder of the run.")] = "runs/distill"
    seed: Annotated[int, in_run(help="Of weights, data order, augmentation, dropout.")] = 0
    workers: Annotated[int, in_data(min=0, help="Processes that read image files.")] = 2
    device: Device = "cpu"
    threads: Threads = None

    @property
    def multilabel(self) -> bool:
        """Whether pictures have any number of classes."""
        return self.data == "coco"

    @property
    def text(self) -> bool:
        """Whether the nets read ids of words."""
        return self.data == "bbc-news"

    @property
    def pieces(self) -> bool:
        """Whether these are MiniLM's word pieces, which its students read as well."""
        return self.teacher.startswith("minilm_")

    @property
    def stages(self) -> tuple[str, ...]:
        """The nets that are trained, in order: ``teacher``, then students ``alone``, ``uniform``, ``layerwise``."""
        if self.compare:
            return ("teacher", "alone", "uniform", "layerwise")
        if self.no_teacher:
            return ("alone",)
        return ("teacher", *(("uniform", "layerwise") if self.rates == "both" else (self.rates,)))

    def epochs_of(self, stage: str) -> int:
        """Epochs that a stage trains for; 0 where the teacher is loaded."""
        if stage != "teacher":
            return self.epochs
        return 0 if self.teacher_checkpoint else self.teacher_epochs

    def as_plain(self) -> dict[str, Any]:
        """Plain values, tuples as lists: what goes into ``run.yaml`` and into checkpoints."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Settings in which another run (as :meth:`as_plain`) differs so that it is not the same run.

        >>> Settings(lr=0.2).differences(Settings(out="elsewhere").as_plain())
        ['--lr: 0.1 then, 0.2 now']
        """
        then = {**Settings().as_plain(), **other}
        return [
            f"--{key.replace('_', '-')}: {then[key]} then, {value} now"
            for key, value in self.as_plain().items()
            if key not in NOT_THE_RUN and then[key] != value
        ]


def refuse_unused(settings: Settings) -> None:
    """Refuse settings that nothing in the run would look at; those of signals are left to ``signal_of``.

    Errors: :class:`~lwkd.program.errors.ProgramError` (status 2) that names the option and what it does not go with.

    >>> refuse_unused(Settings(policy="freeze", gamma=2.0))
    Traceback (most recent call last):
    lwkd.program.errors.ProgramError: --gamma is nothing that a run with --policy freeze looks at
    leave it out (of the run.yaml, too)
    """
    of_policies = dict.fromkeys(name for names in OPTIONS_OF_POLICIES.values() for name in names)
    of_others = [name for name in of_policies if name not in OPTIONS_OF_POLICIES[settings.policy]]
    if "uniform" in settings.stages and "policy_momentum" in of_others:
        of_others.remove("policy_momentum")  # the divergences beside uniform rates are averages, too
    of_rates = [name for name in of_policies if name != "policy_momentum"]
    unused: list[tuple[bool, str, Sequence[str]]] = [
        (settings.no_teacher, "--no-teacher", (*OF_TEACHERS, *of_policies)),
        (settings.compare, "--compare", ("rates",)),
        (settings.teacher_checkpoint is not None, "--teacher-checkpoint", ("teacher_epochs",)),
        ("layerwise" not in settings.stages and not settings.no_teacher, "--rates uniform", of_rates),
        (not settings.no_teacher, f"--policy {settings.policy}", of_others),
    ]
    default = Settings()
    for holds, what, names in unused:
        for name in names if holds else ():
            if getattr(settings, name) != getattr(default, name):
                raise ProgramError(
                    f"--{name.replace('_', '-')} is nothing that a run with {what} looks at",
                    "leave it out (of the run.yaml, too)",
                    code=2,
                )


def read_run(path: Path) -> dict[str, Any]:
    """Read the settings in a ``run.yaml``.

    Errors: :class:`~lwkd.program.errors.ProgramError` (status 2) for a missing or unreadable file, or one with
        settings that do not exist.
    """
    yaml = require("yaml")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ProgramError(
            f"{path} cannot be read: {error}", "give the run.yaml of a run with --config", code=2
        ) from error
    except yaml.YAMLError as error:
        raise ProgramError(
            f"{path} is not YAML: {error}", "give the run.yaml of a run with --config", code=2
        ) from error
    if not isinstance(values, dict):
        raise ProgramError(f"{path} holds no settings", "expected lines such as 'epochs: 6'", code=2)
    known = {field.name for field in fields(Settings)}
    strange = [str(key) for key in values if key not in known]
    if strange:
        raise ProgramError(f"{path} has unknown settings: {', '.join(strange)}", "see lwkd distill --help", code=2)
    return values


def render_run(settings: Settings) -> str:
    """The text of a ``run.yaml``."""
    text = require("yaml").safe_dump(settings.as_plain(), sort_keys=False, allow_unicode=True)
    return f"# Repeat this run: lwkd distill --config run.yaml --out ANOTHER_FOLDER\n{text}"
