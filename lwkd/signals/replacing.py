"""Functions of torch that are computed in another way for a while."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.overrides import TorchFunctionMode


class Replacing(TorchFunctionMode):
    """Inside, functions that have a rule are computed by it; a rule that returns None leaves the call to torch."""

    rules: ClassVar[Mapping[Any, Callable[..., Tensor | None]]]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = self.rules.get(func)
        found = None if rule is None else rule(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if found is None else found
