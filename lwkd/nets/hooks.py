"""Forward hooks on the root of a net: when a pass begins, with which inputs, and when it is complete.

What is kept of a pass is in :mod:`lwkd.nets.feature_hooks` and :mod:`lwkd.nets.input_hooks`; which passes count is
decided in :mod:`lwkd.rates.pass_matcher`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lwkd.nets.inputs import InputIdentity, Inputs
from lwkd.nets.names import wrappers
from lwkd.nets.padding import Padding
from lwkd.nets.passes import may_be_traced
from lwkd.nets.transforms import untransformed

NO_INPUTS = InputIdentity(())
"""Identity of a pass whose inputs were not recorded; it matches no other."""

COMPILE_FIRST = (
    "lwkd looks at features outside of the compiled graph. Give lwkd what torch.compile(net, fullgraph=True) returns, "
    "not a net that is compiled afterwards or in place (net.compile()), or compile without fullgraph=True"
)
"""The error of fullgraph=True for a net that was given to lwkd as it is."""

REPLICATED = (
    "the net runs in a DataParallel {}, whose replicas see a part of the batch each, in threads: their features cannot "
    "be compared. Use DistributedDataParallel (torchrun), or show one device only (CUDA_VISIBLE_DEVICES=0)"
)
"""To be formatted with where."""


@dataclass(eq=False)
class ForwardPass:
    """What a complete pass has left: its features (or inputs), the size of its batch, and what it was called with.

    Features are as the layers gave them: they are only looked at where two passes are compared, since a net makes
    passes that no other belongs to (words that a language model generates one by one). ``kept`` is None where a paired
    layer did not run, or once it was let go of; ``padding`` says what does not count in features.
    """

    kept: Any
    rows: int
    inputs: InputIdentity
    padding: Padding | None = None


class Hook:
    """A forward hook of lwkd: its copies and pickles are :class:`_Inert`."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Inert:
        return _Inert()

    def __reduce__(self) -> tuple[type[_Inert], tuple[()]]:
        return _Inert, ()


class _Inert:
    """A hook that does nothing: a copied model, such as an EMA of the weights, must not write into our slots."""

    def __call__(self, *_: Any) -> None:
        return None


def begin_hook(model: nn.Module, on_pass_begin: Callable[[Inputs], None]) -> RemovableHandle:
    """A hook in front of a pass, which sees what the user gave, before other pre-hooks change it."""
    return model.register_forward_pre_hook(_OnPassBegin(on_pass_begin), with_kwargs=True, prepend=True)


def end_hook(model: nn.Module, on_pass_end: Callable[[nn.Module], None]) -> RemovableHandle:
    """A hook behind a pass that is complete."""
    return model.register_forward_hook(_OnPassEnd(on_pass_end))


def check_not_replicated(model: nn.Module) -> None:
    """Raise NotImplementedError where the passes of a model are split over several devices of this process."""
    for wrapper in wrappers(model):
        if isinstance(wrapper, nn.DataParallel) and len(wrapper.device_ids) > 1:
            raise NotImplementedError(REPLICATED.format(f"over {len(wrapper.device_ids)} devices"))


def remove_hooks(handles: list[RemovableHandle]) -> None:
    """Remove these hooks, and forget them."""
    for handle in handles:
        handle.remove()
    handles.clear()


class _OnPassBegin(Hook):
    """A forward pre-hook that calls a function with the inputs of the root module, outside compiled graphs."""

    def __init__(self, on_pass_begin: Callable[[Inputs], None]) -> None:
        self.plain = on_pass_begin
        self.uncompiled = torch.compiler.disable(on_pass_begin, reason=COMPILE_FIRST)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if "_is_replica" in vars(module):  # of a DataParallel that was made afterwards
            raise NotImplementedError(REPLICATED.format("over several devices"))
        (self.uncompiled if may_be_traced() else self.plain)(Inputs(args, kwargs))


class _OnPassEnd(Hook):
    """Calls a function with the root module, outside compiled graphs."""

    def __init__(self, on_pass_end: Callable[[nn.Module], None]) -> None:
        self.plain = untransformed(on_pass_end)
        self.uncompiled = torch.compiler.disable(self.plain, reason=COMPILE_FIRST)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        (self.uncompiled if may_be_traced() else self.plain)(module)
