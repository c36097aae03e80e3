"""The settings of a run: what ``run.yaml`` holds, and what two halves of a resumed run must have in common."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lwkd.program.errors import ProgramError, require

NOT_THE_RUN = ("out", "data_dir", "workers", "threads")
"""Settings that may change between the halves of a run: where things lie and how fast it goes (a note says when the
number of threads changed, because sums are then rounded differently)."""


@dataclass(frozen=True)
class Settings:
    """Every option of ``lwkd distill`` that decides what is computed; the fields are the options' names.

    None is the default of whatever the option goes to (the data, torch, the signal).

    >>> Settings(student="cnn_4").stages
    ('teacher', 'layerwise')
    >>> Settings(compare=True).stages
    ('teacher', 'alone', 'uniform', 'layerwise')
    """

    data: str = "fashion-mnist"
    data_dir: str = "data"
    image_size: int | None = None
    limit: int | None = None
    student_limit: int | None = None
    augment: str = "auto"
    teacher: str = "cnn_16"
    teacher_checkpoint: str | None = None
    teacher_epochs: int = 4
    student: str = "cnn_8"
    pair: tuple[str, ...] = ()
    epochs: int = 6
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    rates: str = "layerwise"
    no_teacher: bool = False
    compare: bool = False
    signal: str = "attention"
    wrt: str | None = None
    estimator: str | None = None
    kind: str | None = None
    curvature: str | None = None
    probes: int | None = None
    samples: int | None = None
    every: int | None = None
    budget: float | None = None
    policy: str = "relative"
    gamma: float = 1.0
    policy_momentum: float | None = None
    clamp: tuple[float, float] = (0.5, 1.5)
    normalize: bool = False
    multiplier: tuple[float, ...] = (1.0,)
    temperature: float = 4.0
    alpha: float = 0.9
    attention_transfer: float = 0.0
    amp: str | None = None
    seed: int = 0
    workers: int = 2
    device: str = "cpu"
    threads: int | None = None
    out: str = "runs/distill"

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


def read_run(path: Path) -> dict[str, Any]:
    """Read the settings in a ``run.yaml``.

    Errors: :class:`~lwkd.program.errors.ProgramError` (status 2) for a missing or unreadable file, or one with
        settings that do not exist.
    """
    yaml = require("yaml")
    try:
        values = yaml.safe_load(path.read_text())
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
