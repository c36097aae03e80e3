"""Which positions of a layer are padding, read from what the net was called with.

Padded positions are no positions of a map: their features count as exactly zero, in both nets, so that a measurement is
the same with any amount of padding. What is recognised, by name, as a keyword or by its place in ``forward``:

- ``attention_mask`` ``(B, N)``, as transformers have it: 0 is padding. With more dimensions, ``(B, ..., queries, N)``,
  a key that no query may attend to is padding. Floating-point masks of zeros and large negative numbers, which are
  added to the scores, are read as such.
- ``key_padding_mask`` and ``src_key_padding_mask`` ``(B, N)``, as torch has them: True or −∞ is padding.
- For the layers of a decoder behind an encoder: ``decoder_attention_mask``, ``tgt_key_padding_mask``, or else
  ``labels`` ``(B, N)``, where −100 is padding.

A net that makes its mask itself, and calls its encoder or its layers with it, is understood in the same way: the
outermost mask around a layer that fits the layer's rows and positions counts. Masks inside of a net that may mean
something else are left out: boolean ones with a row a query, which some nets have the other way round, and causal ones.
Nested tensors say themselves what is padding. What one net of a pair was told and the other was not (``labels``, which
only the student's loss needs) counts for both.

Legend: B batch, N positions.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lwkd.nets.inputs import Inputs, named_tensors_in
from lwkd.nets.layout import Layout
from lwkd.nets.names import unwrap
from lwkd.nets.walk import modules_of, named_modules_of

_KEPT = ("attention_mask", "src_key_padding_mask", "key_padding_mask")
_KEPT_BY_DECODER = ("decoder_attention_mask", "tgt_key_padding_mask", "labels")
_NAMES = (*_KEPT, *_KEPT_BY_DECODER)

_HIDDEN = -1000.0
"""A key with less than this added to its scores is hidden: transformers and others use -10,000 and below."""


class Padding:
    """The masks of one pass.

    Args:
        model: the net; wrappers are removed.
        inputs: what it is called with.

    >>> net, mask = nn.Identity(), torch.tensor([[1, 1, 0]])
    >>> Padding(net, Inputs((), {"attention_mask": mask})).viewed(torch.ones(1, 3, 2), Layout("tokens"), "layer")
    tensor([[[1., 1., 0.],
             [1., 1., 0.]]])
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self._model = model
        self._masks: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        if inputs.kwargs or len(inputs.args) != 1 or not isinstance(inputs.args[0], Tensor):  # one tensor is no mask
            self._add("", _by_name(self.net, inputs))

    @property
    def net(self) -> nn.Module:
        """The net without its wrappers."""
        return unwrap(self._model)

    def add(self, module: str, given: Mapping[str, Tensor]) -> None:
        """Take the masks that a module inside of the net is called with, in place of those that it had before."""
        self._masks.pop(module, None)
        self._add(module, {name: mask for name, mask in given.items() if _of_padding(name, mask)})

    def _add(self, module: str, given: Mapping[str, Tensor]) -> None:
        kept, of_decoder = (
            next((_valid(name, given[name]) for name in names if name in given), None)
            for names in (_KEPT, _KEPT_BY_DECODER)
        )
        if of_decoder is None and "decoder" in module.split("."):  # called by itself, its own mask has the usual name
            of_decoder = kept
        if kept is not None or of_decoder is not None:
            self._masks[module] = (kept, of_decoder)

    def complete(self, other: Padding) -> None:
        """Take over the masks that only the other net of a pair was called with."""
        mine, theirs = (padding._masks.get("", (None, None)) for padding in (self, other))
        kept, of_decoder = (t if m is None else m for m, t in zip(mine, theirs, strict=True))
        if kept is not None or of_decoder is not None:
            self._masks[""] = (kept, of_decoder)

    def told_only(self, other: Padding) -> Padding | None:
        """The masks that only the other net of a pair was called with, for this net; None if there are none."""
        theirs = other._masks.get("")
        if theirs is None:
            return None
        mine = self._masks.get("", (None, None))
        kept, of_decoder = (t if m is None else None for m, t in zip(mine, theirs, strict=True))
        if kept is None and of_decoder is None:
            return None
        more = Padding(self.net, Inputs(()))
        more._masks[""] = (kept, of_decoder)
        return more

    def cleared(self, feature: Tensor, layer: str) -> Tensor:
        """A feature ``(B, C, N)``, exactly zero where it is padding; others as they are.

        Raises:
            ValueError: as :meth:`viewed`.
        """
        if feature.dim() != 3:
            return feature
        mask = self._fitting(layer, feature.shape[0], feature.shape[2])
        return feature if mask is None else feature.masked_fill(~mask[:, None], 0.0)

    def viewed(self, feature: Tensor, layout: Layout, layer: str) -> Tensor:
        """:meth:`Layout.view` of a feature, exactly zero where it is padding.

        Raises:
            ValueError: there is padding, and which of the layer's positions are padding is not known.
        """
        if feature.is_nested:
            mask = self._mask_of(layer)
            length = None if mask is None else (feature.size(0), mask.shape[1], feature.size(2))
            feature = torch.nested.to_padded_tensor(feature, 0.0, length)
        if layout.kind == "channels_first" and feature.dim() > 3:  # as of most nets: nothing to see otherwise
            return feature
        positions = layout.positions(feature.shape)
        rows = feature.shape[layout.batch_dim]
        return layout.view(feature, None if positions is None else self._fitting(layer, rows, positions))

    def probabilities(self, probabilities: Tensor, layer: str) -> Tensor:
        """Self-attention probabilities ``(B, heads, N, N)`` without the rows of padded queries.

        Where there is a mask, heads are averaged, ``(B, 1, N, N)``, and the rows of padded queries are zero.
        """
        mask = self._fitting(layer, *probabilities.shape[::2])
        if mask is None:
            return probabilities
        wide = probabilities if probabilities.element_size() > 4 else probabilities.float()
        return wide.mean(1, keepdim=True).masked_fill(~mask[:, None, :, None], 0.0)

    def _fitting(self, layer: str, rows: int, positions: int) -> Tensor | None:
        """The mask ``(rows, positions)`` of a layer; None where there is none."""
        mask = self._mask_of(layer, (rows, positions))
        if mask is None or mask.shape[0] != rows:
            return None
        return mask if mask.shape[1] == positions else self._resized(mask, positions, layer)

    def _mask_of(self, layer: str, shape: tuple[int, int] | None = None) -> Tensor | None:
        """The outermost mask around a layer that has this shape, where one is given; else that of the net itself."""
        if not self._masks:
            return None
        names = (name.split(".") for name, _ in named_modules_of(self.net))
        of_decoder = "decoder" in layer.split(".") and any("encoder" in parts for parts in names)
        found = {module: self._masks[module][of_decoder] for module in around(layer) if module in self._masks}
        masks = (mask for mask in found.values() if mask is not None and shape in (None, tuple(mask.shape)))
        return next(masks, found.get(""))

    def _resized(self, mask: Tensor, positions: int, layer: str) -> Tensor | None:
        """The mask of a layer with another number of positions than the mask has.

        Raises:
            ValueError: there is padding, and nothing says where it is in this layer.
        """
        for module in modules_of(self.net):  # the frames of an audio model of transformers
            reduced = getattr(module, "_get_feature_vector_attention_mask", None)
            if reduced is not None:
                found = reduced(positions, mask.long())
                if tuple(found.shape) == (mask.shape[0], positions):
                    return found.bool()
        if bool(mask.all()):
            return None
        raise ValueError(
            f"layer {layer!r} has {positions} positions, and the mask of the batch {mask.shape[1]}, some of them "
            "padding: which positions of the layer are padding is not known. Pair layers that keep their number "
            '(lwkd.pair(..., layers={"student layer": "teacher layer"})), or train on batches without padding'
        )


def around(layer: str) -> Iterator[str]:
    """Names of the modules that a layer is in, from the root inwards, and its own.

    >>> list(around("encoder.0"))
    ['', 'encoder', 'encoder.0']
    """
    return accumulate(["", *layer.split(".")] if layer else [""], lambda outer, name: f"{outer}.{name}".lstrip("."))


_known_places: WeakKeyDictionary[type, list[tuple[int, str]]] = WeakKeyDictionary()
"""Mask places by class, kept because looking at a signature takes longer than all else that is done with it."""


def mask_places(module: nn.Module) -> list[tuple[int, str]]:
    """Place and name of each mask that a module's forward takes; a keyword-only one has a place out of reach."""
    own = "forward" in vars(module)
    found = None if own else _known_places.get(type(module))
    if found is not None:
        return found
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    kinds = [parameter.kind for parameter in parameters]
    end = kinds.index(inspect.Parameter.VAR_POSITIONAL) if inspect.Parameter.VAR_POSITIONAL in kinds else sys.maxsize
    found = [(p if p < end else sys.maxsize, of.name) for p, of in enumerate(parameters) if of.name in _NAMES]
    if not own:
        _known_places[type(module)] = found
    return found


def _by_name(net: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """The tensors among the inputs, by keyword, by key in a batch, or, masks, by their place in ``forward``."""
    found: dict[str, Tensor] = {}
    places = dict(mask_places(net)) if len(inputs.args) > 1 else {}  # the first is no mask
    for path, tensor in named_tensors_in((inputs.args, inputs.kwargs)):
        kind, *inside = path
        name: Any = inside[-1]
        if kind == 0 and len(inside) == 1:
            name = places.get(inside[0])
        if isinstance(name, str):
            found.setdefault(name, tensor)
    return found


def _of_padding(name: str, mask: Tensor) -> bool:
    """Whether a mask that a module inside of a net is called with can only be one of padding."""
    if name.endswith("key_padding_mask") or name == "labels":
        return True
    if mask.dim() > 2:
        return mask.is_floating_point() or mask.shape[-2] == 1
    if mask.dim() < 2 or mask.shape[0] != mask.shape[1]:
        return True
    allowed = _valid(name, mask)
    return allowed is not None and not (torch.equal(allowed, allowed.tril()) and bool(allowed.diagonal().all()))


def _valid(name: str, mask: Tensor) -> Tensor | None:
    """Which positions ``(B, N)`` are no padding; None for a mask that does not say it."""
    if mask.dim() < 2:
        return None
    if name == "labels":
        return mask != -100 if mask.dim() == 2 and not mask.is_floating_point() else None
    if name.endswith("key_padding_mask"):
        return mask > _HIDDEN if mask.is_floating_point() else mask == 0
    allowed = mask > 0
    if mask.is_floating_point():  # 1 and 0, or numbers that are added to the scores: 0, and −∞ or −10,000
        added = (mask.amin() < 0) | (mask.amax() <= 0) | (mask.amax() > 1)  # Longformer: +10,000 where all attend
        allowed = torch.where(added, mask > _HIDDEN, allowed)
    if mask.dim() == 2:
        return allowed
    # The same for all rows: what queries may attend to, and no padding.
    return None if mask.shape[0] == 1 else allowed.flatten(1, -2).any(1)
