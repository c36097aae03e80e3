"""A net, the rows it is measured on, and its paired layers: what the Jacobian and Hessian signals differentiate.

Legend: ``L`` layers, ``B`` rows, ``C`` channels, ``N`` map positions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lwkd.nets.feature_hooks import FeatureHooks
from lwkd.nets.functional_module import FunctionalModule, at_least_float32, detached_alias
from lwkd.nets.inputs import Inputs, tensors_in
from lwkd.nets.layout import Layout
from lwkd.nets.names import unwrap
from lwkd.nets.outputs import Output, find_logits
from lwkd.nets.padding import Padding
from lwkd.nets.passes import (
    check_same_device,
    cuda_devices,
    device_of,
    differentiable_math,
    seed_streams,
    side_effect_free,
)
from lwkd.pairing.pairs import Pairing, layouts_of
from lwkd.signals.forward_mode import JointForwardMode

INSTEAD = "Use lwkd.signals.Jacobian(estimator='difference')"

NO_DERIVATIVE = (
    "{}: no derivative flows through the {}: it is quantized, frozen, exported, or runs under no_grad or detach in its "
    "own forward. Signals that need no derivative: 'attention', lwkd.signals.Jacobian(estimator='difference')"
)
"""To be formatted with what was found, and which net."""

HALF = (
    "{} is {} in a pass that is made in float32: the net's own forward casts to it, which cannot be turned off, and "
    "derivatives are 10 % off and more. Use torch.autocast in its place, which such passes leave out, or the attention "
    "signal"
)
"""To be formatted with a place in a net, and a dtype."""


class MeasuredNet:
    """One net at its present weights, and the rows on which its paired layers are differentiated.

    Args:
        net: the net as the user calls it.
        whose: "student" or "teacher", for messages.
        layers: names of its paired layers.
        layouts: how each layer's output is seen as ``(B, C, *spatial)``.
        owned: names of the parameters of each layer's segment.
        inputs: what the net is called with; tensors in half precision are widened to float32.
        seed: of dropout and the like; every pass starts from it.
        output: which tensor of what the net returns is its logits; see :mod:`lwkd.nets.outputs`.
    """

    def __init__(
        self,
        net: nn.Module,
        whose: str,
        layers: Sequence[str],
        layouts: Sequence[Layout],
        owned: Sequence[Sequence[str]],
        inputs: Inputs,
        seed: int,
        output: Output | None = None,
    ) -> None:
        self.net, self.whose, self.output = unwrap(net), whose, output
        self.layers, self.layouts = list(layers), list(layouts)
        self.owned, self.seed = [list(names) for names in owned], seed
        self.inputs = inputs.map(lambda tensor: at_least_float32(detached_alias(tensor)))
        self.padding = Padding(net, self.inputs)
        self.devices = cuda_devices(self.net, self.inputs.tensors())

    @cached_property
    def functional(self) -> FunctionalModule:
        """The net as a function of its weights, made when it is first asked for: not of a teacher that is known."""
        return FunctionalModule(self.net, self.whose)

    @property
    def rows(self) -> int:
        """B."""
        return self.inputs.batch or 1

    @contextmanager
    def side_effect_free(self) -> Iterator[None]:
        """Passes made inside leave no trace, and autograd can go through everything in them."""
        with (
            side_effect_free(self.net, self.inputs.tensors(), seed=self.seed),
            differentiable_math(self.net),
        ):
            yield

    def run(
        self, inputs: Inputs | None = None, within: AbstractContextManager[Any] | None = None
    ) -> tuple[Any, list[Tensor]]:
        """Output, and the raw outputs of the paired layers; to be called inside :meth:`side_effect_free`.

        ``within`` is entered for the net's own computation alone.
        """
        seed_streams(self.seed, self.devices)
        given = self.inputs if inputs is None else inputs
        return self.observed(lambda copied: self.functional(copied, within), given, detach=False)

    def observed(
        self, call: Callable[[Inputs], Any], inputs: Inputs, *, detach: bool = True
    ) -> tuple[Any, list[Tensor]]:
        """``call(inputs)``, which runs the net, and what its paired layers gave out meanwhile.

        Raises:
            LayerNotRunError: the net took a path without one of them.
        """
        hooks = FeatureHooks(self.net, self.layers, self.layouts, self.whose, detach=detach, view=False)
        try:
            output = call(inputs.map(torch.clone))  # copies: nets may write to their inputs
            hooks.give_masks(self.padding)
            features = hooks.features()
        finally:
            hooks.close()
        self._say_half(output, features)
        return output, features

    def _say_half(self, output: Any, features: Sequence[Tensor]) -> None:
        """Warn of half precision, which can only come from casts in the net's own forward: weights and inputs are wide.

        ``output`` is what the net returned, ``features`` what its paired layers did.
        """
        found = [(f"layer {layer!r} of the {self.whose}", f) for layer, f in zip(self.layers, features, strict=True)]
        found += [(f"the output of the {self.whose}", tensor) for tensor in tensors_in(output)]
        for where, tensor in found:
            if tensor.is_floating_point() and tensor.element_size() < 4:
                warnings.warn(HALF.format(where, tensor.dtype), UserWarning, stacklevel=2)
                return

    def logits(self, output: Any) -> Tensor:
        """The logits in what the net returned, as it returned them; see :mod:`lwkd.nets.outputs`."""
        return find_logits(output, f"the {self.whose}", self.output)

    def viewed(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Layer outputs as ``(B, C, *spatial)``, zero where they are padding."""
        layers = zip(features, self.layouts, self.layers, strict=True)
        return [self.padding.viewed(feature, layout, layer) for feature, layout, layer in layers]

    def input(self) -> Tensor:
        """The first floating-point input, with respect to which derivatives are taken.

        Raises:
            ValueError: there is none (token ids).
        """
        index = self.inputs.first_floating_index()
        if index is None:
            raise ValueError(
                f"the {self.whose} has no floating-point input to differentiate (found "
                f"{', '.join(str(t.dtype) for t in self.inputs.tensors()) or 'no tensor'}). Use "
                "lwkd.signals.Jacobian(wrt='parameters'), or estimator='output' where the logits read every position"
            )
        return self.inputs.tensors()[index]

    def with_input(self, tensor: Tensor) -> Inputs:
        """The inputs with another tensor in place of :meth:`input`."""
        index = self.inputs.first_floating_index()
        assert index is not None
        return self.inputs.with_tensor(index, tensor)

    def jvp(self, tangent: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Features ``(B, C, *spatial)`` of all layers and their tangents, in one forward-mode pass.

        Raises:
            RuntimeError: an op without forward mode, or one that dropped the tangent; the layer is named.
        """
        with torch.no_grad(), forward_ad.dual_level():
            dual = self.with_input(forward_ad.make_dual(self.input(), tangent))
            try:
                _, outputs = self.run(dual, JointForwardMode())
            except (RuntimeError, NotImplementedError) as error:
                raise self._no_forward_mode(error) from error
            pairs = [forward_ad.unpack_dual(feature) for feature in self.viewed(outputs)]
            for layer, pair in zip(self.layers, pairs, strict=True):
                if pair.tangent is None:
                    raise self._dropped(layer, dual)
        return [pair.primal for pair in pairs], [pair.tangent for pair in pairs]

    def _no_forward_mode(self, error: Exception) -> Exception:
        """The error of a failed forward-mode pass, which names the layer; a plain pass that fails raises its own."""
        self.run()
        again = self.with_input(forward_ad.make_dual(self.input(), self.input()))
        entered = self._entered(lambda: self.run(again, JointForwardMode()))
        where = f"layer {entered[-1]!r} of the {self.whose}" if entered else f"the {self.whose}"
        return RuntimeError(f"{where} has no forward mode ({first_line(error)}). {INSTEAD}")

    def _entered(self, run: Callable[[], Any]) -> list[str]:
        """Names of the modules that were entered and not left when ``run`` failed, outermost first."""
        names, entered = {m: name for name, m in self.net.named_modules() if name}, list[str]()
        handles = []
        for module, name in names.items():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: entered.append(name)))
            handles.append(module.register_forward_hook(lambda *_: entered.pop() and None))
        try:
            run()
        except (RuntimeError, NotImplementedError):
            return entered
        finally:
            for handle in handles:
                handle.remove()
        return []

    def _dropped(self, layer: str, dual: Inputs) -> Exception:
        """The error of a tangent that did not arrive at a paired layer; names the innermost module that lost it."""
        lost: list[str] = []

        def carries(value: Any) -> bool:
            return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors_in(value))

        def look(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str) -> None:
            if not lost and carries((args, kwargs)) and not carries(output):
                lost.append(name)

        handles = [
            module.register_forward_hook(
                lambda *found, name=name: look(*found, name=name),  # type: ignore[misc]
                with_kwargs=True,
            )
            for name, module in self.net.named_modules()
            if name
        ]
        try:
            self.run(dual, JointForwardMode())
        finally:
            for handle in handles:
                handle.remove()
        by = f", and {lost[0]!r} lost it" if lost and lost[0] != layer else ""
        return RuntimeError(
            f"layer {layer!r} of the {self.whose}: the tangent of the input did not arrive{by}. Custom ops without "
            f"a forward-mode rule drop tangents in silence. {INSTEAD}"
        )


def measured_nets(
    student: nn.Module,
    teacher: nn.Module,
    pairing: Pairing,
    inputs: Any,
    teacher_inputs: Any,
    seed: int,
    output: Output | None = None,
) -> tuple[MeasuredNet, MeasuredNet]:
    """Student and teacher with their rows and paired layers; ``teacher_inputs`` None is the student's.

    Raises:
        RuntimeError: the nets are on different devices.
    """
    check_same_device(student, teacher, device_of(student), device_of(teacher))
    given_S = Inputs.of(inputs)
    given_T = given_S if teacher_inputs is None else Inputs.of(teacher_inputs)
    layouts_S, layouts_T = layouts_of(pairing)
    owned_S, owned_T = [pair.parameters for pair in pairing], [pair.teacher_parameters for pair in pairing]
    with torch.inference_mode(False):  # under which copies could not be part of a graph
        measured_S = MeasuredNet(student, "student", pairing.student_layers, layouts_S, owned_S, given_S, seed, output)
        measured_T = MeasuredNet(teacher, "teacher", pairing.teacher_layers, layouts_T, owned_T, given_T, seed, output)
        measured_S.padding.complete(measured_T.padding)
        measured_T.padding.complete(measured_S.padding)
    return measured_S, measured_T


def first_line(error: Exception) -> str:
    """Its type, and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def same_input(student: MeasuredNet, teacher: MeasuredNet) -> Tensor:
    """The student's differentiated input, after a check that the teacher's has the same shape.

    Raises:
        ValueError: the shapes differ, so that no tangent fits both.
    """
    x_S, x_T = student.input(), teacher.input()
    if x_S.shape != x_T.shape:
        raise ValueError(
            f"the student's input has shape {tuple(x_S.shape)}, the teacher's {tuple(x_T.shape)}; derivatives with "
            "respect to the input are compared along one tangent, so both must have the same shape. Use "
            "wrt='parameters', or the attention signal"
        )
    return x_S
