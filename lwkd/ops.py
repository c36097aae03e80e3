"""The fused ops: attention maps, attention divergence and the rate update, each one call over all layers.

Legend: ``L`` layers, ``B`` batch, ``C`` channels, ``N`` map positions (product of the spatial sizes), ``S`` statistics.
Lists over layers are plural; student before teacher, always. The definitions are those of :mod:`lwkd.reference`.

These are the public functions. The ops themselves live under ``torch.ops.lwkd``: schemas and CPU kernels in the C++
extension ``lwkd._C``, fake kernels and autograd in :mod:`lwkd.registration`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lwkd.reference import DivergenceKind, Policy, RateState, Ratio, Source
from lwkd.registration import _C

# What the ops accept


def _check_inputs(op: str, tensors: Sequence[Tensor]) -> None:
    """Refuse what no kernel would ever see: no tensor at all, other devices, and tangents of forward mode."""
    if not tensors:
        raise ValueError(f"lwkd.ops.{op}: expected at least one layer, found an empty list. Pass one feature a layer.")
    dual = forward_ad._current_level >= 0
    for tensor in tensors:
        if tensor.device.type not in ("cpu", "meta"):
            raise NotImplementedError(
                f"lwkd.ops.{op}: found a tensor on {tensor.device}; this version does not launch its CUDA kernels yet. "
                f"Move it with .cpu(), or call lwkd.reference.{op}, which runs on every device."
            )
        if dual and _carries_tangent(tensor):
            raise RuntimeError(
                f"lwkd.ops.{op} has no forward-mode rule and would drop the tangent of its input. Pass tangents as "
                f"arguments (attention_maps), detach the input, or call lwkd.reference.{op}."
            )


def _carries_tangent(tensor: Tensor) -> bool:
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad.unpack_dual(tensor).tangent is not None


# Attention maps


def attention_maps(
    features: Sequence[Tensor],
    tangents: Sequence[Tensor] | None = None,
    *,
    power: float = 2.0,
    sizes: Sequence[Sequence[int]] | None = None,
) -> list[Tensor] | tuple[list[Tensor], list[Tensor]]:
    r"""Normalised attention maps of all layers, and their tangents where feature tangents are given.

    .. math:: A_n = \sum_c |F_{cn}|^p,\quad r = \mathrm{area}(A),\quad q = r / \sum_n r_n,\qquad
        \dot A_n = \sum_c p\,|F_{cn}|^{p-1}\,\mathrm{sgn}(F_{cn})\,\dot F_{cn},\quad
        \dot q = (\dot r - q \sum_n \dot r_n) / \sum_n r_n

    Each feature (and tangent) is read once. Differentiable once by a fused backward, with respect to features and
    tangents; a second derivative (``create_graph=True``) goes through :func:`lwkd.reference.attention_maps`.

    Args:
        features: L tensors ``(B, C, *spatial)`` with at most three spatial dimensions; float32, float16, bfloat16
            or float64. Contiguous and channels-last tensors are read where they are, other layouts from a copy.
        tangents: L tensors of the same shapes, or None.
        power: exponent ``p`` (at least 1).
        sizes: L spatial sizes to which the maps are area-averaged before they are normalised; None keeps their own.

    Returns:
        L maps ``(B, N)`` that sum to 1 over N (accumulated in and returned as float32; float64 for float64 input);
        with tangents a pair (maps, map tangents). A map whose sum is below 1e-24 is the uniform map, with tangent 0.

    Raises:
        ValueError: for no layers, an empty tensor, shapes or sizes that do not belong together, or a power below 1.
        TypeError: for a dtype that is not one of the above.
        NotImplementedError: for tensors that are not on the CPU.
        RuntimeError: for an input that carries a forward-mode tangent.

    Source: Zagoruyko & Komodakis 2017, eq. 1 (sum of powers over channels); normalised to sum 1.

    >>> attention_maps([torch.tensor([[[1.0, 2.0], [0.0, 1.0]]])])
    [tensor([[0.1667, 0.8333]])]
    """
    features, moved = list(features), [] if tangents is None else list(tangents)
    _check_inputs("attention_maps", [*features, *moved])
    if tangents is not None and len(moved) != len(features):
        raise ValueError(
            f"lwkd.ops.attention_maps: expected as many tangents as features, found {len(features)} features and "
            f"{len(moved)} tangents. Pass one of each for every layer."
        )
    if sizes is None:
        flat = [length for feature in features for length in feature.shape[2:]]
    else:
        _check_sizes(features, sizes)
        flat = [length for size in sizes for length in size]
    maps, map_tangents = torch.ops.lwkd.attention_maps(features, moved, power, flat)
    return maps if tangents is None else (maps, map_tangents)


def _check_sizes(features: list[Tensor], sizes: Sequence[Sequence[int]]) -> None:
    if len(sizes) != len(features):
        raise ValueError(
            f"lwkd.ops.attention_maps: expected one size a layer, found {len(sizes)} sizes for {len(features)} layers."
        )
    for layer, (feature, size) in enumerate(zip(features, sizes, strict=True)):
        if len(size) != feature.dim() - 2:
            raise ValueError(
                f"lwkd.ops.attention_maps: layer {layer}: expected a size of {feature.dim() - 2} lengths, one for each "
                f"spatial dimension of the feature {tuple(feature.shape)}, found {tuple(size)}."
            )


# Attention divergence


def attention_divergence(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    source: Source = "features",
    power: float = 2.0,
    kind: DivergenceKind = "jsd",
    betas: tuple[float, float] = (0.5, 0.5),
) -> Tensor:
    r"""Distance between the attention of student and teacher, one number a layer, mean over the batch.

    With the maps q, p of :func:`attention_maps`, both at the smaller of the two sizes:

    .. math:: \mathrm{jsd} = H(b_1 q + b_2 p) - b_1 H(q) - b_2 H(p),\qquad
        \mathrm{l2} = \| q/\|q\| - p/\|p\| \|^2

    Each feature is read once. Differentiable once with respect to the student's features, by a fused backward that
    reads the feature once and writes the gradient once, in its dtype and memory format; a second derivative
    (``create_graph=True``) goes through :func:`lwkd.reference.attention_divergence`.

    Args:
        student: L features ``(B, C, *spatial)`` with at most three spatial dimensions, or probabilities
            ``(B, heads, N, N)``; float32, float16, bfloat16 or float64. Contiguous and channels-last tensors are read
            where they are, other layouts from a copy.
        teacher: L features of the same batch and number of spatial dimensions, without gradient; channels, sizes and
            dtype may differ.
        source: ``"features"`` (maps), or ``"probabilities"`` (heads averaged, distance per query row, mean over rows).
        power: exponent of the maps, at least 1.
        kind: ``"jsd"`` in nats, between 0 and H(betas) = ln 2 for equal weights; ``"l2"`` between 0 and 2.
        betas: weights of student and teacher; positive, sum 1 (``"jsd"`` only).

    Returns:
        ``(L,)`` float32, accumulated in float32 or better (float64 for float64 input). NaN where a feature holds NaN
        or infinity. The same bits on every run and for any number of threads.

    Raises:
        ValueError: for no layers, an empty tensor, shapes that do not belong together, an option that is not one of
            the above, or a teacher that requires grad.
        TypeError: for a dtype that is not one of the above.
        NotImplementedError: for tensors that are not on the CPU.
        RuntimeError: for an input that carries a forward-mode tangent, and for a second derivative with a teacher
            that ran under ``torch.inference_mode()``.

    Source: arXiv 2407.04871 (JSD of attention); Zagoruyko & Komodakis 2017, eq. 2 (l2).

    >>> one, other = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    >>> attention_divergence([one, one], [one, other])
    tensor([0.0000, 0.6931])
    """
    student, teacher = list(student), list(teacher)
    _check_inputs("attention_divergence", [*student, *teacher])
    if len(student) != len(teacher):
        raise ValueError(
            f"lwkd.ops.attention_divergence: expected as many teacher features as student features, found "
            f"{len(student)} of the student and {len(teacher)} of the teacher. Pass one of each for every layer."
        )
    track = torch.is_grad_enabled()
    for layer, feature in enumerate(teacher):
        if track and feature.requires_grad:
            raise ValueError(
                f"lwkd.ops.attention_divergence: layer {layer}: the teacher's feature requires grad, and no gradient "
                "flows to the teacher. Run the teacher under torch.no_grad(), or pass feature.detach()."
            )
    save_factors = track and any(feature.requires_grad for feature in student)
    divergence, _ = torch.ops.lwkd.attention_divergence(
        student, teacher, source, power, kind, list(betas), save_factors
    )
    return divergence


# Rate update


def update_rates(
    state: RateState,
    statistics: Tensor,
    *,
    divergence: Ratio = "attention",
    policy: Policy = "relative",
    gamma: float = 1.0,
    momentum: float = 0.9,
    clamp: tuple[float, float] = (0.5, 1.5),
    normalize: bool = False,
    found_inf: Tensor | None = None,
) -> tuple[RateState, Tensor, Tensor]:
    r"""One step from statistics to multipliers, in one call.

    .. math:: s \leftarrow \mu s + (1-\mu)\,s_{new}\ (\text{the first measurement starts the average}),\quad
        e = \mathrm{divergence}(s)

    .. math:: \mathrm{relative}: m_l = \mathrm{clamp}\big((e_l / \bar e)^\gamma\big),\quad
        \mathrm{decay}: m_l = \mathrm{clamp}\big((e_l / e_l(0))^\gamma\big),\ 0/0 = 1,\quad
        \mathrm{constant}: m_l \text{ unchanged}

    ``normalize`` divides by the mean multiplier afterwards. A measurement whose statistics or divergence are NaN or
    infinite, or whose divergences are all zero, changes nothing but the count of skipped ones; with ``found_inf``
    nonzero nothing changes at all. Has no gradient.

    Args:
        state: as returned by the last call, or :func:`lwkd.reference.initial_rates`.
        statistics: ``(L, S)`` float32; S = 1 for attention.
        divergence: how a divergence is formed from the averaged statistics.
        policy: the rule.
        gamma: exponent of the rule; negative turns it round.
        momentum: weight of the past average, in [0, 1).
        clamp: smallest and largest multiplier.
        normalize: rescale to mean 1.
        found_inf: scalar tensor, nonzero where the gradient step was infinite.

    Returns:
        The new state, its multipliers ``(L,)`` and the count of skipped measurements (int64 scalar).
        No input is modified; the arithmetic is float64, the state float32.

    Raises:
        ValueError: for shapes that do not belong together, or an option that is not one of the above.
        TypeError: for a state or statistics that are not float32 (counts: int64).
        NotImplementedError: for tensors that are not on the CPU.

    Source: our reading of arXiv 2407.04871 (the exact rule is not published).

    >>> import lwkd
    >>> state, multipliers, skipped = update_rates(lwkd.reference.initial_rates(2), torch.tensor([[0.3], [0.1]]))
    >>> multipliers, int(skipped)
    (tensor([1.5000, 0.5000]), 0)
    """
    _check_inputs("update_rates", [*state, statistics])
    new = RateState(
        *torch.ops.lwkd.update_rates(
            *(tensor.detach() for tensor in state),
            statistics.detach(),
            divergence,
            policy,
            gamma,
            momentum,
            list(clamp),
            normalize,
            found_inf,
        )
    )
    return new, new.multipliers, new.counts[1]


def backend() -> str:
    """Which implementation runs the ops, and why.

    >>> "C++ kernels on the CPU" in backend()
    True
    """
    threads = f"{_C.threads()} threads" if _C.has_openmp() else "1 thread: it was built without OpenMP"
    return (
        f"C++ kernels on the CPU ({_C.cpu_capability()} vectors, {threads}; built with torch {_C.torch_version()}); "
        "CUDA kernels are not launched by this version"
    )
