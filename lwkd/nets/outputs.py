"""Which tensor of a net's output is its logits, and where the classes are: the one rule for all of lwkd.

And which tensor of a layer's output is its feature, or its attention probabilities (:func:`feature_in`,
:func:`probabilities_in`).

1. What ``output=`` names, where the user gives it: a function of the net's output, the name of a field or key, or a
   place.
2. The output itself, where it is a tensor.
3. What is called ``logits``: a field or key of a mapping, named tuple, dataclass or object, the outermost first.
4. The only floating-point tensor with a class dimension, that is with two dimensions or more. A scalar loss is none.

Classes are at dimension 1, as ``torch.nn.functional.cross_entropy`` has them: ``(B, K)``, ``(B, K, H, W)``,
``(B, K, D, H, W)``. With three dimensions both ``(B, K, N)`` and the tokens' ``(B, N, K)`` are usual; there the
autograd graph decides: behind a convolution classes are at dimension 1, behind a linear layer they are last, and
permutations and reshapes are followed. Where none of this decides, an error says what was found and how to say it.

Legend: B batch, K classes, N tokens or positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lwkd.nets.inputs import named_tensors_in

Output = Callable[[Any], Tensor] | str | int
"""How a user says what the logits are: a function of the net's output, a field's or key's name, or a place."""

EXPECTED = "expected logits (..., classes), floating-point"

SAY_WHICH = "Say which tensor they are: give the signal output=, a field's or key's name, or a function of the output"

FLAT = "output=lambda out: out.flatten(0, 1) if classes are last, out.movedim(1, -1).flatten(0, 1) if they are second"


def find_logits(output: Any, whose: str, choice: Output | None = None) -> Tensor:
    """The logits in what a net returned, by the rule at the head of this file.

    Args:
        output: what the net returned.
        whose: the net, for messages.
        choice: what the user gave as ``output=``.

    Raises:
        ValueError: none, or several that may be it; says what was found.

    >>> import torch
    >>> find_logits({"loss": torch.tensor(1.0), "logits": torch.zeros(2, 3)}, "the student").shape
    torch.Size([2, 3])
    """
    if choice is not None:
        return _with_classes(_chosen(output, whose, choice), whose)
    if isinstance(output, Tensor):
        return _with_classes(output, whose)
    found = [(path, tensor) for path, tensor in named_tensors_in(output) if tensor.is_floating_point()]
    named = sorted((p for p in found if p[0][-1:] == ("logits",)), key=lambda p: len(p[0]))
    if named and (len(named) == 1 or len(named[0][0]) < len(named[1][0])):
        return _with_classes(named[0][1], whose)
    several = [(path, tensor) for path, tensor in found if tensor.dim() > 1]
    if len(several) == 1:
        return several[0][1]
    listed = ", ".join(f"{_path_text(path)} {tuple(tensor.shape)}" for path, tensor in several or found)
    expected = "none is called 'logits'" if several else EXPECTED
    raise ValueError(
        f"{whose} gives {listed or 'no tensor'}; {expected} ({type(output).__name__} returned). {SAY_WHICH}"
    )


def feature_in(output: Any) -> Any:
    """A layer's feature: its output, or the first item of a tuple or list, as attention modules and blocks give.

    >>> import torch
    >>> feature_in((torch.zeros(2, 3), None)).shape
    torch.Size([2, 3])
    """
    return output[0] if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor) else output


def gives_attention(output: Any) -> bool:
    """Whether a layer's output has a place for attention probabilities: a tuple or list with more than the feature.

    >>> import torch
    >>> gives_attention((torch.zeros(2, 3), None)), gives_attention((torch.zeros(2, 3),))
    (True, False)
    """
    return isinstance(output, (tuple, list)) and len(output) > 1 and isinstance(output[0], Tensor)


def probabilities_in(output: Any, layer: str) -> Tensor:
    """The attention probabilities ``(B, heads, N, N)`` in what a layer returned.

    The output itself, or the last tensor behind the feature in a tuple or list; ``(B, N, N)``, of which the heads were
    averaged before, counts as one head.

    Args:
        output: what the layer returned.
        layer: its name, for messages.

    Raises:
        ValueError: there are none; says which switch to set.

    >>> import torch
    >>> probabilities_in((torch.zeros(2, 3, 8), torch.zeros(2, 3, 3)), "attention").shape
    torch.Size([2, 1, 3, 3])
    """
    found = output
    if gives_attention(output):
        found = next((item for item in reversed(output[1:]) if isinstance(item, Tensor) and item.dim() > 2), None)
        if found is None:
            raise ValueError(
                f"layer {layer!r} returned no attention probabilities (found {_kinds(output)}): fused attention never "
                "computes them. Switch it off: attn_implementation='eager' for a model of transformers "
                "(model.set_attn_implementation('eager')), need_weights=True where nn.MultiheadAttention is called, "
                "fused_attn=False for timm"
            )
    if not isinstance(found, Tensor) or found.dim() not in (3, 4) or found.shape[-1] != found.shape[-2]:
        raise ValueError(
            f"layer {layer!r} returned {_kinds(output)}; source='probabilities' expects self-attention probabilities "
            "(B, heads, N, N), or a tuple that carries them behind the feature. Pair the attention modules: "
            'lwkd.pair(..., layers={"student attention": "teacher attention"})'
        )
    return found.unsqueeze(1) if found.dim() == 3 else found


def class_dimension(logits: Tensor, whose: str, channels: int | None = None) -> int:
    """The dimension of the classes, by the rule at the head of this file.

    Args:
        logits: at least two dimensions.
        whose: the net, for messages.
        channels: with three dimensions, where the autograd graph has the channels; None where it does not say.

    Raises:
        ValueError: three dimensions, and the graph does not say which holds the classes.

    >>> import torch
    >>> class_dimension(torch.zeros(2, 5, 8, 8), "a net"), class_dimension(torch.zeros(2, 7, 5), "a net", 2)
    (1, 2)
    """
    if logits.dim() != 3:
        return 1
    if channels in (1, 2):
        return int(channels)
    raise ValueError(
        f"{whose} gives logits of shape {tuple(logits.shape)}, whose classes may be at dimension 1 (batch, classes, "
        "positions) or last (batch, tokens, classes), and the operations that made them do not say which. Give "
        f"(rows, classes): {FLAT}"
    )


def _kinds(output: Any) -> str:
    """What a layer returned, in words."""
    if isinstance(output, (tuple, list)):
        return f"({', '.join(map(_kinds, output))})"
    return f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else str(type(output).__name__)


def _chosen(output: Any, whose: str, choice: Output) -> Any:
    if callable(choice):
        return choice(output)
    try:
        if isinstance(output, Mapping):
            return list(output.values())[choice] if isinstance(choice, int) else output[choice]
        return output[choice] if isinstance(choice, int) else getattr(output, choice)
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        there = ", ".join(_path_text(path) for path, _ in named_tensors_in(output)) or "no tensor"
        raise ValueError(
            f"{whose} gives {type(output).__name__}, in which output={choice!r} is not found; it holds {there}"
        ) from error


def _with_classes(value: Any, whose: str) -> Tensor:
    if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
        return value
    found = f"{type(value).__name__} and no tensor"
    if isinstance(value, Tensor):
        found = f"shape {tuple(value.shape)}" if value.is_floating_point() else f"a {value.dtype} tensor"
    raise ValueError(f"{whose} gives {found}; {EXPECTED}. {SAY_WHICH}")


def _path_text(path: tuple[Any, ...]) -> str:
    return "".join(f"[{part!r}]" if isinstance(part, int) or place else str(part) for place, part in enumerate(path))
