"""Networks by name: torchvision's, timm's, the small families of the distillation papers, the user's own functions."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lwkd.program.data.words import PIECES, UNKNOWN, WORDS
from lwkd.program.errors import ProgramError, require
from lwkd.program.models.cifar import plain_net, residual_net, wide_net
from lwkd.program.models.text import HEAD, MINILM_LAYERS, MINILM_LENGTH, MiniLM, TextNet

CIFAR_DEPTHS = (8, 14, 20, 32, 44, 56, 110)
SMALL_NAMES = (
    "resnet10",
    *(f"resnet{depth}" for depth in CIFAR_DEPTHS),
    "resnet8x4",
    "resnet32x4",
    *(f"wrn_{depth}_{width}" for depth in (16, 40) for width in (1, 2)),
    *(f"cnn_{width}" for width in (4, 8, 16, 32)),
)
SMALL_PICTURES = 64
"""Pictures up to this side get a stem without the strides that ImageNet's 224 pixels need."""

FULL_SIZE = 16
"""Up to this side ``cnn_WIDTH`` keeps the full size in its first stage, so that the last one still has a map."""

TIMM = "timm:"


def build(name: str, *, classes: int, channels: int, size: int, words: int | None = None) -> nn.Module:
    """Build a network for pictures ``(B, channels, size, size)`` and ``classes`` classes, random weights.

    With no channels it is one for documents of up to ``size`` words, ids ``(B, size)`` int64 of ``words`` there are.

    Args:
        name: a torchvision classification model, ``resnet10`` (the paper's student), a CIFAR family (``resnet8`` …
            ``resnet110``, ``resnet8x4``, ``resnet32x4``, ``wrn_DEPTH_WIDTH``), ``cnn_WIDTH`` (with batch norms;
            ``cnn_WIDTH_group`` with group norms, ``cnn_WIDTH_bare`` with none), ``timm:NAME`` as timm builds it, for
            documents ``text_LAYERS_WIDTH`` and ``minilm_LAYERS`` (has the weights of its package, and reads its word
            pieces), or ``module:function``, called with those of ``num_classes`` and
            ``in_channels`` that it accepts.
        classes: outputs.
        channels: input channels, 1 or 3; 0 for documents.
        size: side of the pictures, or words of the documents.
        words: None: as many as the net usually reads.

    Errors: :class:`~lwkd.program.errors.ProgramError` for an unknown name (with near matches), a function that
        cannot be imported, or a net that cannot take such pictures.

    >>> net = build("cnn_4", classes=10, channels=1, size=8)
    >>> net(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    if is_own(name):
        net = from_user(name, classes, channels)
    elif channels == 0 or name.startswith(("text_", "minilm_")):
        net = _text(name, classes, channels, size, words)
    elif name.startswith(TIMM):
        net = _timm(name.removeprefix(TIMM), classes, channels)
    else:
        net = _small(name, classes, channels, size) or _torchvision(name, classes, channels, size)
    return _checked(net, name, classes, channels, size)


def is_own(name: str) -> bool:
    """Whether a model's name means the user's own function.

    >>> is_own("my_nets:student"), is_own("timm:resnet18"), is_own("resnet18")
    (True, False, False)
    """
    return ":" in name and not name.startswith(TIMM)


def _text(name: str, classes: int, channels: int, size: int, words: int | None) -> nn.Module:
    if channels:
        raise ProgramError(f"{name} reads documents (--data bbc-news), no pictures", "give another model", code=2)
    if name in (f"minilm_{layers}" for layers in MINILM_LAYERS):
        if words not in (None, PIECES):
            raise ProgramError(
                f"{name} reads MiniLM's word pieces, and the documents are ids of {words} words",
                "give it a teacher that reads them, such as minilm_6",
                code=2,
            )
        if size > MINILM_LENGTH:
            raise ProgramError(f"{name} reads {MINILM_LENGTH} word pieces, found {size}", "lower --image-size", code=2)
        return MiniLM(int(name.removeprefix("minilm_")), classes=classes)
    match = re.fullmatch(r"text_([1-9]\d*)_([1-9]\d*)", name)
    if match is None or int(match[2]) % HEAD:
        raise ProgramError(
            f"model {name!r} does not read documents",
            f"give text_LAYERS_WIDTH, the width a multiple of {HEAD}, such as text_4_64, or minilm_LAYERS, with "
            f"{', '.join(map(str, MINILM_LAYERS))} layers. Own nets: module:function",
            code=2,
        )
    return TextNet(int(match[1]), int(match[2]), classes=classes, length=size, words=words or WORDS)


def _small(name: str, classes: int, channels: int, size: int) -> nn.Module | None:
    if match := re.fullmatch(r"resnet(\d+)(x4)?", name):
        depth, wide = int(match[1]), match[2] is not None
        if depth in CIFAR_DEPTHS:
            return residual_net(depth, 4 if wide else 1, classes, channels)
    if match := re.fullmatch(r"wrn_(\d+)_(\d+)", name):
        depth, width = int(match[1]), int(match[2])
        if depth < 10 or (depth - 4) % 6 or not width:
            raise ProgramError(
                f"{name}: the depth of a wide residual net is 6n + 4", "use 10, 16, 22, 28, 40 …", code=2
            )
        return wide_net(depth, width, classes, channels)
    if match := re.fullmatch(r"cnn_(\d+)(?:_(group|bare))?", name):
        norm = {None: "batch", "group": "group", "bare": "none"}[match[2]]
        return plain_net(int(match[1]), classes, channels, 2 if size > FULL_SIZE else 1, norm)
    return None


def _torchvision(name: str, classes: int, channels: int, size: int) -> nn.Module:
    models = require("torchvision.models")
    known = models.list_models(module=models)
    options: dict[str, Any] = {"num_classes": classes}
    if name == "resnet10":
        net = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=classes)
    elif name in known:
        if name in ("googlenet", "inception_v3"):
            options.update(aux_logits=False, init_weights=True)
        if name.startswith("vit_"):
            options["image_size"] = size
        elif name.startswith("maxvit"):
            options["input_size"] = (size, size)
        try:
            net = models.get_model(name, weights=None, **options)
        except (ValueError, RuntimeError) as error:
            raise ProgramError(
                f"{name} cannot be built for {size}-pixel pictures: {error}", "try --image-size"
            ) from error
    else:
        raise _unknown(name, [*SMALL_NAMES, *known], SMALL_NAMES)
    return _fit_stem(net, channels, size)


def _timm(name: str, classes: int, channels: int) -> nn.Module:
    timm = require("timm")
    if not timm.is_model(name):  # also keeps names away that would make timm look for a net on the internet
        raise _unknown(name, timm.list_models(), ["resnet18"], TIMM)
    net: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)
    return net


def _unknown(name: str, known: Sequence[str], instances: Sequence[str], prefix: str = "") -> ProgramError:
    near = difflib.get_close_matches(name, known, 4, 0.5)
    named = ", ".join(prefix + other for other in near or instances)
    hint = f"did you mean {named}?" if near else f"for instance {named}"
    return ProgramError(f"model {prefix + name!r} is not known", f"{hint} Own nets: module:function", code=2)


def _fit_stem(net: nn.Module, channels: int, size: int) -> nn.Module:
    """Fit the first convolution to the channels, and the strides at the input to small pictures."""
    name, first = next((n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d))
    kernel: Any = first.kernel_size
    stride: Any = first.stride
    padding: Any = first.padding
    small = size <= SMALL_PICTURES and stride != (1, 1) and kernel != stride  # kernel == stride: patches, no stem
    if small:
        kernel, stride, padding = (3, 3), (1, 1), (1, 1)
    if not small and channels == first.in_channels:
        return net
    fitted = nn.Conv2d(channels, first.out_channels, kernel, stride, padding, bias=first.bias is not None)
    if kernel == first.kernel_size and channels == 1:
        # Summing over the colours gives the net that sees the grey picture in all three of them.
        fitted.load_state_dict(first.state_dict() | {"weight": first.weight.detach().sum(1, keepdim=True)})
    parent = net.get_submodule(name.rpartition(".")[0])
    parent._modules[name.rpartition(".")[2]] = fitted
    if small:
        for holder, pool in ((net, "maxpool"), (getattr(net, "features", None), "pool0")):
            if isinstance(holder, nn.Module) and isinstance(getattr(holder, pool, None), nn.MaxPool2d):
                setattr(holder, pool, nn.Identity())
    return net


def imported(name: str, what: str) -> Callable[..., Any]:
    """Import the user's own function that ``module:function`` names.

    Args:
        name: the module may lie in the current folder.
        what: what the function is for, for messages.

    Errors: :class:`~lwkd.program.errors.ProgramError` (status 2) where it cannot be imported.
    """
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # a console script does not put the current folder there, python -m does
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: no module's name at all
        raise ProgramError(
            f"{what} {name!r}: {error}", f"is {module_name}.py in {here} or installed?", code=2
        ) from error
    except Exception as error:  # the user's own module may raise anything
        raise _own_error(name, what, error) from error
    if not callable(function):
        raise ProgramError(
            f"{what} {name!r}: {function_name} is {type(function).__name__}, expected a function",
            "name a function, or a class",
            code=2,
        )
    return function


def called(name: str, what: str, *arguments: Any, **options: Any) -> Any:
    """What the user's own function returns.

    Args:
        name: ``module:function``.
        what: what the function is for, for messages.
        arguments: of the function.
        options: of the function, of which it gets those that it takes.

    Errors: :class:`~lwkd.program.errors.ProgramError` (status 2) that names the function, whatever it raises.
    """
    function = imported(name, what)
    try:
        parameters = inspect.signature(function).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        taken = {key: value for key, value in options.items() if takes_all or key in parameters}
        return function(*arguments, **taken)
    except ProgramError:
        raise
    except Exception as error:
        raise _own_error(name, what, error) from error


def _own_error(name: str, what: str, error: Exception) -> ProgramError:
    return ProgramError(
        f"{what} {name!r}: {type(error).__name__}: {error}",
        "mend this function; --debug shows where in it the error came from",
        code=2,
    )


def from_user(name: str, classes: int, channels: int) -> nn.Module:
    """The net that the user's function makes, with those of ``num_classes`` and ``in_channels`` that it takes.

    Errors: :class:`~lwkd.program.errors.ProgramError` where it cannot be imported, fails, or gives no net.
    """
    net = called(name, "model", num_classes=classes, in_channels=channels)
    if not isinstance(net, nn.Module):
        raise ProgramError(f"model {name!r}: returned {type(net).__name__}, expected an nn.Module", "return the net")
    return net


def _checked(net: nn.Module, name: str, classes: int, channels: int, size: int) -> nn.Module:
    example = torch.zeros(2, channels, size, size) if channels else torch.full((2, size), UNKNOWN)
    what = f"pictures of {size} by {size} pixels with {channels} channels" if channels else f"documents of {size} words"
    net.eval()
    try:
        with torch.no_grad():
            logits = net(example)
    except Exception as error:  # a net of the user's own may raise anything
        raise ProgramError(
            f"{name} cannot take {what}: {type(error).__name__}: {error}",
            "give a larger --image-size, or another model",
        ) from error
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if found != (2, classes):
        raise ProgramError(
            f"{name} gives {found} for two {what.split()[0]}, expected {(2, classes)}", "return the logits only"
        )
    return net.train()


def count_parameters(net: nn.Module) -> int:
    """Number of parameters.

    >>> count_parameters(nn.Linear(3, 2))
    8
    """
    return sum(parameter.numel() for parameter in net.parameters())
