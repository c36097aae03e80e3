"""The command line: ``lwkd distill``, ``compare``, ``profile``, ``pair``, ``garments``, ``doctor``."""

from __future__ import annotations

import inspect
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

try:
    import click
    import typer

    from lwkd.program.console import Console
except ModuleNotFoundError as missing:
    sys.exit(f"lwkd: {missing.name} is missing; the program needs: pip install 'lwkd[program]'")

import torch

from lwkd.program.compare.engines import Engine
from lwkd.program.compare.run import compare as run_compare
from lwkd.program.data.garments import VAL_SHARE, make_garments
from lwkd.program.distill import run as distilling
from lwkd.program.distill.nets import pair_nets
from lwkd.program.distill.settings import Settings, in_run, read_run, refuse_unused
from lwkd.program.distill.signals import check_schedule, signal_of
from lwkd.program.distill.train import policy_of
from lwkd.program.doctor import doctor as examine
from lwkd.program.errors import ProgramError
from lwkd.program.models.registry import build
from lwkd.program.profile import TARGETS, ProfileSettings
from lwkd.program.profile import profile as run_profile

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distil a student network with a learning rate per layer, driven by how far each layer is from the teacher.",
)
DEFAULT = Settings()
MOST_THREADS = max(256, 4 * (os.cpu_count() or 1))
"""More than a processor has are of use to repeat the bits of a run on a larger one."""

Debug = Annotated[bool, in_run("--debug", help="Show where an error came from (also: LWKD_DEBUG=1).")]


def _with_options_of(kind: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a command that takes ``**options``: each field of its settings becomes an option, with its default.

    In the help, options of the command itself stand behind ``--out``, and the last of them (``--debug``) at the end.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        ctx, *own, debug, _ = inspect.signature(command, eval_str=True).parameters.values()
        hints = get_type_hints(kind, include_extras=True)
        options = []
        for field in fields(kind):
            hint, default = hints[field.name], ctx.empty if field.default is MISSING else field.default
            value, option = get_args(hint)
            if get_origin(value) is tuple and Ellipsis in get_args(value):  # typer knows no tuples of any length
                hint, default = Annotated[list[get_args(value)[0]] | None, option], None  # type: ignore[misc]
            options.append(inspect.Parameter(field.name, ctx.KEYWORD_ONLY, default=default, annotation=hint))
            if field.name == "out":
                options += [parameter.replace(kind=ctx.KEYWORD_ONLY) for parameter in own]
        parameters = [ctx, *options, debug.replace(kind=ctx.KEYWORD_ONLY)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorated


def _made(kind: type[Any], options: Mapping[str, Any]) -> Any:
    """Settings from options; those that were not given keep the settings' defaults."""
    given = {field.name: options[field.name] for field in fields(kind) if options[field.name] not in (None, (), [])}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


@contextmanager
def _reporting(console: Console, debug: bool, interrupted: str = "interrupted") -> Iterator[None]:
    """Errors as a message and an exit status; the traceback only where it was asked for.

    Args:
        console: where messages go.
        debug: whether errors are raised as they are.
        interrupted: what is said after a Ctrl-C.
    """
    try:
        yield
    except (ProgramError, KeyboardInterrupt, Exception) as error:
        if type(error).__module__.split(".")[0] in ("typer", "click"):
            raise  # typer's own: an exit, or a wrong option that it reports itself
        if debug or os.environ.get("LWKD_DEBUG"):
            raise
        if isinstance(error, KeyboardInterrupt):
            console.err.print(interrupted)
            raise typer.Exit(130) from error
        if not isinstance(error, ProgramError):
            error = ProgramError(
                f"{type(error).__name__}: {error}", "run again with --debug to see where it comes from"
            )
        console.fail(error)
        raise typer.Exit(error.code) from error


def _settings(ctx: typer.Context, config: str | None, resume: bool) -> Settings:
    """Options given on the command line, then those of the run.yaml, then the defaults."""
    values = dict(ctx.params)
    recorded = Path(values["out"]) / "run.yaml"
    if config is None and resume and recorded.exists():
        config = str(recorded)
    stored = {} if config is None else read_run(Path(config))
    for name in values:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            stored.pop(name, None)
    options = _options_with(ctx, stored, "" if config is None else f"{config}: ")
    try:
        # What has been begun goes on; versions before this one did not refuse what they did not look at.
        return _checked_settings(options, refuse=not resume)
    except ProgramError as error:
        if config is None:
            raise
        problem = f"{error.problem} (what is not on the command line comes from {config})"
        raise ProgramError(problem, error.remedy, code=error.code) from error


def _options_with(ctx: typer.Context, given: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """The options of ``lwkd distill`` with plain values of a file in place of some; ``where`` heads messages."""
    options = dict(ctx.params)
    for parameter in ctx.command.params:
        if parameter.name in given:
            value = given[parameter.name]
            try:
                options[parameter.name] = _entry(ctx, parameter, value)
            except (click.ClickException, TypeError, ValueError) as error:
                problem = error.message if isinstance(error, click.ClickException) else str(error)
                problem = f"{where}{parameter.name} is {value!r}: {problem}"
                raise ProgramError(problem, "see lwkd distill --help", code=2) from error
    return options


def _entry(ctx: typer.Context, parameter: click.Parameter, value: Any) -> Any:
    """An option from a plain value, of which nothing is rounded or taken for something else."""
    several = parameter.nargs != 1 or getattr(parameter, "multiple", False)
    if several and value is not None and not isinstance(value, (list, tuple)):
        raise ValueError("expected a list")
    kind = parameter.type.name
    for one in value if several and value is not None else [value]:
        if isinstance(one, (list, tuple, dict)):
            raise ValueError("expected a single value")
        if isinstance(one, bool) and kind != "boolean":
            raise ValueError("true and false are no value of it")
        if kind == "boolean" and not isinstance(one, (bool, str, type(None))):
            raise ValueError("expected true or false")
        if isinstance(one, float) and kind.startswith("integer") and not one.is_integer():
            raise ValueError("expected a whole number")
    return parameter.process_value(ctx, value)


def _checked_settings(options: Mapping[str, Any], *, refuse: bool = True) -> Settings:
    """Settings from options, checked; ``refuse`` those that nothing would look at."""
    settings: Settings = _made(Settings, options)
    if refuse:
        refuse_unused(settings)
    _check(settings)
    return settings


def _check_run(out: str, threads: int | None) -> None:
    """What ``lwkd distill`` and ``lwkd profile`` are both told of their run."""
    if not out.strip():
        raise ProgramError("--out is empty, expected a folder", "such as --out runs/first", code=2)
    if threads is not None and threads > MOST_THREADS:
        raise ProgramError(
            f"--threads is {threads}, expected {MOST_THREADS} at most",
            f"this machine has {os.cpu_count()} processors",
            code=2,
        )


def _check_channels(channels: int) -> None:
    if channels == 2:
        raise ProgramError("--channels is 2, expected 1 (grey) or 3 (colours)", "give one of the two", code=2)


def _check(settings: Settings) -> None:
    """What must hold between options; each option's own range is checked where it is declared."""
    _check_run(settings.out, settings.threads)
    if not settings.temperature > 0:
        raise ProgramError(f"--temperature is {settings.temperature}, expected a positive number", "try 4", code=2)
    if strange := [share for share in settings.milestones if not 0 < share < 1]:
        raise ProgramError(f"--milestones {strange[0]} is no share of the run", "0.5 is half of it", code=2)
    signal_of(settings)
    check_schedule(settings)
    try:
        policy_of(settings, "layerwise")
    except ValueError as error:
        raise ProgramError(str(error), "see lwkd distill --help", code=2) from error
    for name, value in settings.as_plain().items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):  # nan is outside of no range
                shown = f"--{name.replace('_', '-')} is {number}"
                raise ProgramError(f"{shown}, expected a finite number", "see lwkd distill --help", code=2)
    _check_device(settings.device)


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ProgramError(f"--device {device} cannot be used: {first}", "use --device cpu", code=2) from error


@app.command()
@_with_options_of(Settings)
def distill(
    ctx: typer.Context,
    config: Annotated[str | None, in_run(help="A run.yaml; options on the command line go before it.")] = None,
    resume: Annotated[bool, in_run("--resume", help="Continue the run in --out, bit for bit.")] = False,
    overwrite: Annotated[bool, in_run("--overwrite", help="Replace the run in --out.")] = False,
    debug: Debug = False,
    **_: Any,
) -> None:
    """Train or load the teacher, distil the student, and report both side by side.

    Ctrl-C leaves a checkpoint from which --resume continues bit for bit. Options of the signal that are not given have
    the signal's own defaults (lwkd.signals).
    """
    console = Console()
    with _reporting(console, debug, "interrupted; it goes on from what it has saved with --resume"):
        if resume and overwrite:
            raise ProgramError(
                "--resume continues the run in --out, and --overwrite replaces it", "leave out one of the two", code=2
            )
        settings = _settings(ctx, config, resume)
        status = distilling.distill(settings, console, resume=resume, overwrite=overwrite)
        if status:
            raise typer.Exit(status)


@app.command()
def compare(
    recipe: Annotated[Path, typer.Argument(help="The comparison, a YAML file such as those in recipes/.")],
    out: Annotated[Path, typer.Option(help="Folder of the results; a grid that was broken off goes on there.")],
    data_dir: Annotated[Path, typer.Option(help="Where data lies.")] = Path(DEFAULT.data_dir),
    arm: Annotated[
        list[str] | None,
        typer.Option(help="Only these arms, at the seeds they have among all; report in OUT/only; repeatable."),
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only these training losses; repeatable.")] = None,
    engine: Annotated[Engine, typer.Option(help="joblib: processes here; ray: tasks of a cluster.")] = "joblib",
    workers: Annotated[int | None, typer.Option(min=1, help="Trials at a time; default: a core each.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda …")] = DEFAULT.device,
    debug: Debug = False,
) -> None:
    """Compare ways to set the learning rates over many seeds, every base rate tuned alike, with controls.

    Ctrl-C keeps every trial that has ended; the same command goes on with the others.
    """
    console = Console()
    with _reporting(console, debug, "interrupted; the same command goes on from what has ended"):
        fixed = {"data_dir": str(data_dir), "device": device}

        def made(values: Mapping[str, Any]) -> Settings:
            return _settings_from({**values, **fixed})

        status = run_compare(
            recipe, out, made, console, arms=arm or (), methods=method or (), engine=engine, workers=workers
        )
        if status:
            raise typer.Exit(status)


def _settings_from(values: Mapping[str, Any]) -> Settings:
    """Checked settings of ``lwkd distill`` from plain values, the others at their defaults."""
    command = typer.main.get_command(app).commands["distill"]  # type: ignore[attr-defined]
    with command.make_context("distill", [], resilient_parsing=True) as ctx:
        return _checked_settings(_options_with(ctx, values))


@app.command()
@_with_options_of(ProfileSettings)
def profile(
    ctx: typer.Context,
    overwrite: Annotated[bool, in_run("--overwrite", help="Replace the profile in --out.")] = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Measure what layer-wise rates add to a distillation step, phase by phase, and recommend how often to measure.

    Steps of baseline distillation and the same with layer-wise rates take turns.
    """
    console = Console()
    with _reporting(console, debug):
        settings: ProfileSettings = _made(ProfileSettings, options)
        budget = settings.budget
        if budget is not None and not 0 < budget <= 1:
            raise ProgramError(f"--budget is {budget}, expected a share above 0 and up to 1", "0.02 is 2 %", code=2)
        _check_run(settings.out, settings.threads)
        _check_channels(settings.channels)
        _check_device(settings.device)
        if strange := [name for name in settings.signal if name not in TARGETS]:
            raise ProgramError(f"--signal {strange[0]} is not known", f"give one of {', '.join(TARGETS)}", code=2)
        run_profile(settings, console, overwrite=overwrite)


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
    console = Console()
    with _reporting(console, debug):
        _check_channels(channels)
        nets = [build(name, classes=classes, channels=channels, size=image_size) for name in (student, teacher)]
        example = torch.zeros(2, channels, image_size, image_size)
        console.say(str(pair_nets(nets[0], nets[1], example, tuple(pair or ()))))


@app.command()
def garments(
    out: Annotated[Path, typer.Option(help="Folder of the new set; must not be there.")],
    data_dir: Annotated[Path, typer.Option(help="Where Fashion-MNIST lies, or is put.")] = Path(DEFAULT.data_dir),
    pictures: Annotated[int, typer.Option(min=1, help="Training pictures.")] = 20_000,
    size: Annotated[int, typer.Option(min=56, help="Side of the pictures, even.")] = 56,
    seed: Annotated[int, typer.Option(help="Of the choice of garments and places.")] = 0,
    debug: Debug = False,
) -> None:
    """Make a small multi-label set in COCO's layout, 1 to 4 Fashion-MNIST garments a picture, for --data coco."""
    console = Console()
    with _reporting(console, debug), console.progress("garments", 1, pictures + pictures // VAL_SHARE) as move:
        make_garments(data_dir, out, pictures, size=size, seed=seed, say=console.say, move=lambda done: move(0, done))
        console.say(f"saved: {out}; use it with --data coco --data-dir {shlex.quote(str(out))}")


@app.command()
def doctor(
    data_dir: Annotated[Path, typer.Option(help="Where data lies.")] = Path(DEFAULT.data_dir),
    debug: Debug = False,
) -> None:
    """Print versions, the backend in use, the data found, and how to get what is missing."""
    console = Console()
    with _reporting(console, debug):
        status = examine(data_dir, console)
        if status:
            raise typer.Exit(status)


def main() -> None:
    """Entry point of the console script."""
    app()
