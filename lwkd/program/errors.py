"""What the program says when it cannot go on: one sentence on what is wrong, one on what to do."""

from __future__ import annotations

import importlib
from types import ModuleType

OWN_WAY = ("ray", "safetensors", "tokenizers", "transformers")
"""Packages that the extra ``program`` does not bring, since few runs need them."""


class ProgramError(Exception):
    r"""A problem that the user can solve.

    Args:
        problem: what is wrong, naming the file or option.
        remedy: what to do.
        code: exit status of the program; 2 for a wrong option, 1 for everything else.

    >>> str(ProgramError("run.yaml is not readable", "give another file"))
    'run.yaml is not readable\ngive another file'
    """

    def __init__(self, problem: str, remedy: str = "", *, code: int = 1):
        super().__init__(problem, remedy)
        self.problem, self.remedy, self.code = problem, remedy, code

    def __str__(self) -> str:
        return f"{self.problem}\n{self.remedy}" if self.remedy else self.problem


class DamagedFileError(ProgramError):
    """A file that is there and cannot be what it should be.

    Args:
        path: the file.
        why: what was found.
        remedy: what to do.

    >>> DamagedFileError("a.gz", "it ends early", "delete it").problem
    'a.gz is damaged: it ends early'
    """

    def __init__(self, path: object, why: str, remedy: str):
        super().__init__(f"{path} is damaged: {why}", remedy)
        self.why = why


class UnwrittenFileError(ProgramError):
    """A file that could not be written; the one before it, if there was one, is still there, whole.

    Args:
        path: the file.
        why: what the system says.

    >>> UnwrittenFileError("a.pt", "No space left on device").problem
    'a.pt could not be written: No space left on device'
    """

    def __init__(self, path: object, why: str):
        super().__init__(
            f"{path} could not be written: {why}",
            "what was saved before is still there; make room (or the folder writable) and give the same command again",
        )


def require(module: str) -> ModuleType:
    """Import an optional dependency; when it is missing, the error says how to get it.

    Errors: :class:`ProgramError` when the module is not installed or cannot be imported.

    >>> require("math").pi > 3
    True
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        # A torchvision that was built for another torch raises RuntimeError, not ImportError.
        package = module.partition(".")[0]
        missing = package if package in OWN_WAY else f"'lwkd[program]' ({module})"
        raise ProgramError(
            f"{module} cannot be imported: {error}", f"install what is missing: pip install {missing}"
        ) from error
