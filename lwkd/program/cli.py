"""The command line: ``lwkd distill``, ``lwkd profile``, ``lwkd pair``, ``lwkd doctor``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import typer

    from lwkd.program.console import Screen
except ModuleNotFoundError as missing:
    sys.exit(f"lwkd: {missing.name} is missing; the program needs: pip install 'lwkd[program]'")

from lwkd.program.distill.settings import Settings, read_run
from lwkd.program.errors import ProgramError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distil a student network with a learning rate per layer, driven by how far each layer is from the teacher.",
)
DEFAULT = Settings()


def _panel(title: str) -> Any:
    def option(*names: str, **more: Any) -> Any:
        return typer.Option(*names, rich_help_panel=title, **more)

    return option


_data, _nets, _training = _panel("Data"), _panel("Nets"), _panel("Training")
_rates, _signal, _run = _panel("Distillation and rates"), _panel("Signal"), _panel("Run")
Debug = Annotated[bool, _run("--debug", help="Show where an error came from (also: LWKD_DEBUG=1).")]


@contextmanager
def _reporting(screen: Screen, debug: bool) -> Iterator[None]:
    """Errors as a message and an exit status; the traceback only where it was asked for."""
    try:
        yield
    except (ProgramError, KeyboardInterrupt, Exception) as error:
        if type(error).__module__.split(".")[0] in ("typer", "click"):
            raise  # typer's own: an exit, or a wrong option that it reports itself
        if debug or os.environ.get("LWKD_DEBUG"):
            raise
        if isinstance(error, KeyboardInterrupt):
            screen.err.print("interrupted; lwkd distill goes on from what it has saved with --resume")
            raise typer.Exit(130) from error
        if not isinstance(error, ProgramError):
            error = ProgramError(
                f"{type(error).__name__}: {error}", "run again with --debug to see where it comes from"
            )
        screen.fail(error)
        raise typer.Exit(error.code) from error


def _settings(ctx: typer.Context) -> Settings:
    """Options given on the command line, then those of the run.yaml, then the defaults."""
    given = {p.name for p in ctx.command.params if _explicit(ctx, p.name)}
    values = dict(ctx.params)
    config, recorded = values["config"], Path(values["out"]) / "run.yaml"
    if config is None and values["resume"] and recorded.exists():
        config = recorded
    if config is not None:
        stored = read_run(Path(config))
        for parameter in ctx.command.params:
            if parameter.name in stored and parameter.name not in given:
                values[parameter.name] = parameter.process_value(ctx, stored[parameter.name])
    chosen = {f.name: values[f.name] for f in fields(Settings)}
    for name in ("pair", "clamp", "multiplier"):
        chosen[name] = tuple(chosen[name] or getattr(DEFAULT, name))
    settings = Settings(**chosen)
    _check(settings)
    return settings


def _explicit(ctx: typer.Context, name: str | None) -> bool:
    source = ctx.get_parameter_source(name) if name else None
    return source is not None and source.name == "COMMANDLINE"


def _check(settings: Settings) -> None:
    """What must hold between options; each option's own range is checked where it is declared."""
    if settings.no_teacher and (settings.compare or settings.attention_transfer):
        raise ProgramError("--no-teacher trains the student alone", "leave out --compare, --attention-transfer", code=2)
    if not settings.temperature > 0:
        raise ProgramError(f"--temperature is {settings.temperature}, expected a positive number", "try 4", code=2)
    from lwkd.program.distill.signals import check_schedule, signal_of
    from lwkd.program.distill.train import policy_of

    signal_of(settings)
    check_schedule(settings)
    try:
        policy_of(settings, "layerwise")
    except ValueError as error:
        raise ProgramError(str(error), "see lwkd distill --help", code=2) from error
    _check_device(settings.device)


def _check_device(device: str) -> None:
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ProgramError(f"--device {device} cannot be used: {first}", "use --device cpu", code=2) from error


@app.command()
def distill(
    ctx: typer.Context,
    data: Annotated[
        Literal["digits", "fashion-mnist", "mnist", "cifar10", "cifar100", "imagefolder"], _data(help="Data set.")
    ] = DEFAULT.data,  # type: ignore[assignment]
    data_dir: Annotated[str, _data(help="Where data lies, or is put when it is fetched.")] = DEFAULT.data_dir,
    image_size: Annotated[int | None, _data(min=4, help="Side of the pictures; default: the data's own.")] = None,
    limit: Annotated[int | None, _data(min=2, help="Cap on training pictures.")] = None,
    student_limit: Annotated[int | None, _data(min=2, help="Cap for students; the teacher sees the rest too.")] = None,
    augment: Annotated[
        Literal["auto", "none", "crop", "crop-flip"], _data(help="auto: crop and flip for CIFAR and image folders.")
    ] = DEFAULT.augment,  # type: ignore[assignment]
    workers: Annotated[int, _data(min=0, help="Processes that read image files.")] = DEFAULT.workers,
    teacher: Annotated[str, _nets(help="Teacher: a name, or module:function.")] = DEFAULT.teacher,
    teacher_checkpoint: Annotated[str | None, _nets(help="Weights of the teacher; it is then not trained.")] = None,
    teacher_epochs: Annotated[int, _nets(min=1, help="Epochs of the teacher.")] = DEFAULT.teacher_epochs,
    student: Annotated[str, _nets(help="Student: a name, or module:function.")] = DEFAULT.student,
    pair: Annotated[list[str] | None, _nets(help="STUDENT=TEACHER layers, instead of the search; repeatable.")] = None,
    epochs: Annotated[int, _training(min=1, help="Epochs of the student.")] = DEFAULT.epochs,
    batch_size: Annotated[int, _training(min=2, help="Pictures a batch.")] = DEFAULT.batch_size,
    optimizer: Annotated[
        Literal["sgd", "adam", "adamw"], _training(help="Base optimizer (sgd: with Nesterov momentum).")
    ] = DEFAULT.optimizer,  # type: ignore[assignment]
    lr: Annotated[float, _training(min=0, help="Learning rate at the start.")] = DEFAULT.lr,
    momentum: Annotated[float, _training(min=0, max=0.9999, help="Momentum (adam: beta1).")] = DEFAULT.momentum,
    weight_decay: Annotated[float, _training(min=0, help="Weight decay.")] = DEFAULT.weight_decay,
    schedule: Annotated[
        Literal["cosine", "step", "constant"], _training(help="Learning rate over the run.")
    ] = DEFAULT.schedule,  # type: ignore[assignment]
    amp: Annotated[Literal["bf16"] | None, _training(help="Mixed precision.")] = None,
    rates: Annotated[
        Literal["uniform", "layerwise", "both"], _rates(help="Learning rates of the student's layers.")
    ] = DEFAULT.rates,  # type: ignore[assignment]
    no_teacher: Annotated[bool, _rates("--no-teacher", help="Train the student alone.")] = False,
    compare: Annotated[
        bool, _rates("--compare", help="Teacher, student alone, uniform, layer-wise: same seed.")
    ] = False,
    policy: Annotated[
        Literal["relative", "decay", "constant"], _rates(help="From divergence to rate.")
    ] = DEFAULT.policy,  # type: ignore[assignment]
    gamma: Annotated[float, _rates(help="Exponent of the policy; negative turns it round.")] = DEFAULT.gamma,
    policy_momentum: Annotated[
        float | None, _rates(min=0, max=0.9999, help="Weight of the past; default: the signal's.")
    ] = None,
    clamp: Annotated[tuple[float, float], _rates(help="Smallest and largest multiplier.")] = DEFAULT.clamp,
    normalize: Annotated[bool, _rates("--normalize", help="Rescale to a mean multiplier of 1.")] = False,
    multiplier: Annotated[list[float] | None, _rates(help="For --policy constant: one, or one a layer.")] = None,
    temperature: Annotated[float, _rates(help="Temperature of the distillation loss.")] = DEFAULT.temperature,
    alpha: Annotated[float, _rates(min=0, max=1, help="Weight of the teacher beside the labels.")] = DEFAULT.alpha,
    attention_transfer: Annotated[float, _rates(min=0, help="Weight of the attention transfer loss.")] = 0.0,
    signal: Annotated[
        Literal["attention", "jacobian", "hessian"], _signal(help="What the distance to the teacher is measured on.")
    ] = DEFAULT.signal,  # type: ignore[assignment]
    wrt: Annotated[
        Literal["input", "parameters"] | None, _signal(help="jacobian, hessian: differentiate by what.")
    ] = None,
    estimator: Annotated[
        Literal["jvp", "difference", "vjp", "output"] | None,
        _signal(help="jacobian: forward mode, two plain passes, one backward a layer, or gradients of the top logit."),
    ] = None,
    kind: Annotated[
        Literal["jsd", "l2", "direction", "norm", "relative"] | None,
        _signal(help="Distance; attention: jsd or l2, jacobian: direction, norm or relative."),
    ] = None,
    curvature: Annotated[
        Literal["hessian", "ggn"] | None, _signal(help="hessian: the Hessian itself, or the Gauss-Newton matrix.")
    ] = None,
    probes: Annotated[int | None, _signal(min=1, help="jacobian, hessian: random probes a measurement.")] = None,
    samples: Annotated[int | None, _signal(min=1, help="Rows of the batch that are measured.")] = None,
    every: Annotated[int | None, _signal(min=1, help="Measure at every so many updates.")] = None,
    budget: Annotated[
        float | None, _signal(help="Instead of --every: share of the time for measuring, 0.02 for 2 %.")
    ] = None,
    out: Annotated[str, _run(help="Folder of the run.")] = DEFAULT.out,
    config: Annotated[str | None, _run(help="A run.yaml; options on the command line go before it.")] = None,
    resume: Annotated[bool, _run("--resume", help="Continue the run in --out, bit for bit.")] = False,
    overwrite: Annotated[bool, _run("--overwrite", help="Replace the run in --out.")] = False,
    seed: Annotated[int, _run(help="Of weights, data order, augmentation, dropout.")] = DEFAULT.seed,
    device: Annotated[str, _run(help="cpu, cuda, cuda:1 …")] = DEFAULT.device,
    threads: Annotated[int | None, _run(min=1, help="CPU threads; default: torch's.")] = None,
    debug: Debug = False,
) -> None:
    """Train or load the teacher, distil the student, and report both side by side.

    Ctrl-C leaves a checkpoint from which --resume continues bit for bit. Options of the signal that are not given have
    the signal's own defaults (lwkd.signals).
    """
    screen = Screen()
    with _reporting(screen, debug):
        settings = _settings(ctx)
        from lwkd.program.distill.run import distill as run

        status = run(settings, screen, resume=resume, overwrite=overwrite)
        if status:
            raise typer.Exit(status)


@app.command()
def profile(
    ctx: typer.Context,
    teacher: Annotated[str, _nets(help="Teacher: a name, or module:function.")],
    student: Annotated[str, _nets(help="Student: a name, or module:function.")],
    batch: Annotated[int, _nets(min=2, help="Rows of the batch.")] = 128,
    image_size: Annotated[int, _nets(min=4, help="Side of the pictures.")] = 32,
    channels: Annotated[int, _nets(min=1, max=3, help="Channels of the pictures: 1 or 3.")] = 3,
    classes: Annotated[int, _nets(min=2, help="Number of classes.")] = 10,
    inputs: Annotated[
        str | None, _nets(help="For nets that take no pictures: module:function, called with --batch, gives (x, y).")
    ] = None,
    pair: Annotated[list[str] | None, _nets(help="STUDENT=TEACHER layers, instead of the search; repeatable.")] = None,
    optimizer: Annotated[Literal["sgd", "adam", "adamw"], _training(help="Base optimizer.")] = "sgd",
    amp: Annotated[Literal["bf16"] | None, _training(help="Mixed precision.")] = None,
    signal: Annotated[
        list[str] | None, _signal(help="attention, jacobian or hessian; repeatable. Default: all three.")
    ] = None,
    every: Annotated[int | None, _signal(min=1, help="Instead of each signal's own interval.")] = None,
    samples: Annotated[int | None, _signal(min=1, help="Instead of each signal's own number of rows.")] = None,
    budget: Annotated[
        float | None, _signal(help="Share of a step to recommend for; default: 0.005 attention, 0.03 the others.")
    ] = None,
    seconds: Annotated[float, _run(min=0, help="After which no round is begun (three are made in any case).")] = 120,
    out: Annotated[str, _run(help="Folder for profile.json and profile.png.")] = "runs/profile",
    overwrite: Annotated[bool, _run("--overwrite", help="Replace the profile in --out.")] = False,
    trace: Annotated[bool, _run("--trace", help="Leave a Chrome trace of a few steps with each signal, too.")] = False,
    seed: Annotated[int, _run(help="Of weights and pictures.")] = 0,
    device: Annotated[str, _run(help="cpu, cuda, cuda:1 …")] = "cpu",
    threads: Annotated[int | None, _run(min=1, help="CPU threads; default: torch's.")] = None,
    debug: Debug = False,
) -> None:
    """Measure what layer-wise rates add to a distillation step, phase by phase, and recommend how often to measure.

    Steps of baseline distillation and the same with layer-wise rates take turns.
    """
    screen = Screen()
    with _reporting(screen, debug):
        if budget is not None and not 0 < budget <= 1:
            raise ProgramError(f"--budget is {budget}, expected a share above 0 and up to 1", "0.02 is 2 %", code=2)
        _check_device(device)
        from lwkd.program.profile import TARGETS, ProfileSettings
        from lwkd.program.profile import profile as run

        if strange := [name for name in signal or () if name not in TARGETS]:
            raise ProgramError(f"--signal {strange[0]} is not known", f"give one of {', '.join(TARGETS)}", code=2)
        chosen = {f.name: ctx.params[f.name] for f in fields(ProfileSettings)}
        chosen["pair"], chosen["signal"] = tuple(pair or ()), tuple(signal or TARGETS)
        settings = ProfileSettings(**chosen)
        run(settings, screen, overwrite=overwrite)


@app.command()
def pair(
    teacher: Annotated[str, typer.Option(help="Teacher: a name, or module:function.")],
    student: Annotated[str, typer.Option(help="Student: a name, or module:function.")],
    image_size: Annotated[int, typer.Option(min=4, help="Side of the pictures.")] = 32,
    channels: Annotated[int, typer.Option(min=1, max=3, help="Channels of the pictures: 1 or 3.")] = 3,
    classes: Annotated[int, typer.Option(min=2, help="Number of classes.")] = 10,
    pair: Annotated[list[str] | None, typer.Option(help="STUDENT=TEACHER layers; repeatable.")] = None,
    debug: Debug = False,
) -> None:
    """Print which student layer is compared with which teacher layer, and which parameters follow it."""
    screen = Screen()
    with _reporting(screen, debug):
        import torch

        from lwkd.program.distill.run import pair_nets
        from lwkd.program.models.registry import build

        nets = [build(name, classes=classes, channels=channels, size=image_size) for name in (student, teacher)]
        example = torch.zeros(2, channels, image_size, image_size)
        screen.say(str(pair_nets(nets[0], nets[1], example, tuple(pair or ()))))


@app.command()
def doctor(
    data_dir: Annotated[Path, typer.Option(help="Where data lies.")] = Path(DEFAULT.data_dir),
    debug: Debug = False,
) -> None:
    """Print versions, the backend in use, the data found, and how to get what is missing."""
    screen = Screen()
    with _reporting(screen, debug):
        from lwkd.program.doctor import doctor as examine

        status = examine(data_dir, screen)
        if status:
            raise typer.Exit(status)


def main() -> None:
    """Entry point of the console script."""
    app()
