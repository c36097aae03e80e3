"""Nets sharded by ``fully_shard`` (FSDP2): whole parameters for the passes that the library makes itself.

Those of FSDP1 (``FullyShardedDataParallel``) are measured on the training passes alone.

FSDP2 gathers the parameters of a module in hooks around its forward, for one pass and its backward. The library's
passes run on copies, and need whole values once a measurement: :func:`gathered` gives them to every rank, and
:func:`unsharded` takes those hooks off meanwhile. Every rank has to come to a collective, or none: that something is
measured is agreed before.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from lwkd.nets.names import unwrap
from lwkd.nets.precision import home_of
from lwkd.nets.walk import modules_of, named_modules_of, parameters_of

FSDP1 = "FullyShardedDataParallel"

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")

_gathered: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()
"""Whole values by net, for as long as a measurement lasts."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is one of several machines, of which each holds a part."""
    return type(tensor).__name__ == "DTensor"


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    shards: Any = tensor
    part: Tensor = shards.to_local() if is_sharded(tensor) else tensor
    return part


def whole_output(output: Tensor, layer: str) -> Tensor:
    """What a layer of a tensor-parallel net gives out, if every rank has all of it.

    Raises:
        NotImplementedError: it is a share.
    """
    shards: Any = output
    if not all(placement.is_replicate() for placement in shards.placements):
        raise NotImplementedError(
            f"layer {layer!r} gives out a share of its features on each rank ({shards.placements}), which cannot be "
            "compared. Pair a layer whose output is whole, such as that behind a RowwiseParallel block"
        )
    return local(output)


def warn_of_shares(net: nn.Module, whose: str) -> None:
    """Say that layers of a sequence-parallel net may give each rank a share of the positions, as plain tensors.

    Such a net has norms whose parameters are tensors of all ranks, and whole on each (``SequenceParallel``).
    """
    placements: dict[str, list[Any]] = {}
    for prefix, module in named_modules_of(net):
        for parameter in module._parameters.values():
            if parameter is not None and is_sharded(parameter):
                shards: Any = parameter
                if not by_fsdp(module) or shards.device_mesh.ndim > 1:
                    placements.setdefault(prefix, []).append(shards.placements[-1])
    norms = [name for name, of in placements.items() if all(placement.is_replicate() for placement in of)]
    if norms and len(norms) < len(placements):
        warnings.warn(
            f"the {whose} looks sequence parallel ({norms[0]!r} has whole parameters on every rank, others have not): "
            "layers that give each rank a share of the positions are compared on that share, which is another number. "
            "Pair layers whose outputs are whole",
            UserWarning,
            stacklevel=2,
        )


def by_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` looks after this module."""
    # The wrapper of FSDP1 marks modules as well, and itself.
    return "_is_fsdp_managed_module" in vars(module) and type(module).__name__ != FSDP1


def in_fsdp1(net: nn.Module) -> bool:
    """Whether any part of it is in FSDP1."""
    return any(type(module).__name__ == FSDP1 for module in net.modules())


def joined_by_fsdp1(parameters: Iterable[str]) -> bool:
    """Whether FSDP1 has joined the parameters with these names to flat ones, in which no layer has its own."""
    return any("_flat_param" in name for name in parameters)


def is_fsdp(net: nn.Module) -> bool:
    """Whether ``fully_shard`` looks after any of its modules: their parameters are other objects at other times."""
    return any(map(by_fsdp, modules_of(net)))


def reshard(net: nn.Module) -> None:
    """Make the net's parameters those that an optimizer has.

    After a pass without gradients ``fully_shard`` leaves the outermost module gathered, with other objects for
    parameters, until the next backward pass.
    """
    for module in modules_of(net):
        reshard_module: Any = getattr(module, "reshard", None) if by_fsdp(module) else None
        if reshard_module is not None:  # not of a part of a larger group
            reshard_module()


def any_sharded(net: nn.Module) -> bool:
    """Whether any of its parameters is."""
    return any(map(is_sharded, parameters_of(net).values()))


def check_gatherable(net: nn.Module, whose: str) -> None:
    """Check that what is sharded is sharded by ``fully_shard`` alone, on the device that it computes on.

    Raises:
        NotImplementedError: it is sharded in another way (FSDP1, tensor parallel), or offloaded; says which.
    """
    if in_fsdp1(net):
        raise NotImplementedError(
            f"the {whose} is in {FSDP1} (FSDP1), of which passes of lwkd's own cannot have whole parameters. Use "
            "signal='attention', which is measured on the training passes, or fully_shard (FSDP2; fsdp_version=2 in "
            "Accelerate)"
        )
    for prefix, module in net.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if not is_sharded(parameter):
                continue
            shards: Any = parameter  # a DTensor
            found = ""
            if not by_fsdp(module) or sum(not placement.is_replicate() for placement in shards.placements) > 1:
                found = "sharded, and not by fully_shard alone"
            elif parameter.device.type != shards.device_mesh.device_type:
                found = f"offloaded to {parameter.device}"
            if found:
                raise NotImplementedError(
                    f"{whose}: parameter {name!r} is {found}: passes of lwkd's own cannot have it whole. Use "
                    "signal='attention', which is measured on the training passes (paired layers have to give whole "
                    "outputs, not shares of the sequence or of the channels), or measure on a full-size copy"
                )


def whole_parameters(net: nn.Module, whose: str = "the net") -> dict[str, Tensor]:
    """Parameters by name, each once, whole on every rank: those of :func:`gathered`, or gathered now by all ranks.

    Raises:
        NotImplementedError: see :func:`check_gatherable`.
    """
    found = _gathered.get(unwrap(net))
    if found is None:
        found = parameters_of(unwrap(net))
        if any(map(is_sharded, found.values())):
            check_gatherable(net, whose)
            found = {name: _whole(parameter) for name, parameter in found.items()}
    return found


def _whole(parameter: Tensor) -> Tensor:
    whole: Tensor = parameter.detach().full_tensor() if is_sharded(parameter) else parameter  # type: ignore[attr-defined]
    return whole


@contextmanager
def gathered(*nets: nn.Module) -> Iterator[None]:
    """Inside, the sharded ones of these nets have whole parameters at hand; every rank has to enter."""
    sharded = [unwrap(net) for net in nets if any_sharded(net)]
    try:
        for net in sharded:
            _gathered[net] = whole_parameters(net)
        yield
    finally:
        for net in sharded:
            _gathered.pop(net, None)


@contextmanager
def unsharded(net: nn.Module) -> Iterator[None]:
    """Inside, passes of this net gather nothing: without the hooks that ``fully_shard`` put around its modules."""
    replaced: list[tuple[nn.Module, str, Any]] = []
    try:
        for module in modules_of(net):
            for name in _HOOKS if by_fsdp(module) else ():
                hooks = vars(module)[name]
                replaced.append((module, name, hooks))
                kept = {key: hook for key, hook in hooks.items() if not home_of(hook).startswith("torch.distributed")}
                vars(module)[name] = OrderedDict(kept)
        yield
    finally:
        for module, name, hooks in replaced:
            vars(module)[name] = hooks
