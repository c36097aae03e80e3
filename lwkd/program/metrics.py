"""How good a net is on pictures that it has not seen.

Legend: ``N`` pictures, ``K`` classes; ``x`` pictures (B, C, H, W), ``y`` labels (B,) or (B, K).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from lwkd.program.data.datasets import Data
from lwkd.program.data.loader import Batch
from lwkd.program.distill import ranks
from lwkd.program.errors import require


def scores(
    net: nn.Module,
    batches: Iterable[Batch],
    data: Data,
    *,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Scores of a net in eval mode, each in [0, 1]; the first is the one to report.

    One class a picture: ``accuracy``, the share of pictures classified right. Multi-label: ``mAP``, ``OF1`` and
    ``CF1``, see :func:`multilabel_scores`.

    Args:
        net: gives logits (B, K); its mode is put back.
        batches: pictures and labels, such as ``Batches.test()``; every rank looks at its share.
        data: where the pictures are from.
        autocast: makes the context of each forward pass.
        check: runs before every batch.

    >>> from pathlib import Path
    >>> from lwkd.program.data.datasets import load
    >>> from lwkd.program.data.loader import Batches
    >>> data = load("digits", Path("data"))
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    >>> list(scores(net, Batches(data, 64, seed=0).test(), data))
    ['accuracy']
    """
    found: list[tuple[Tensor, Tensor]] = []
    mode = net.training
    net.eval()
    ranks.same_buffers(net)
    try:
        for x, y in batches:
            check()
            with torch.no_grad(), autocast():
                logits = net(x)
            found.append((logits.float(), y) if data.multilabel else (logits.argmax(1) == y, y))
    finally:
        net.train(mode)
    if not data.multilabel:
        right = sum(int(hits.sum()) for hits, _ in found)
        right, count = ranks.summed(torch.tensor([right, sum(len(y) for _, y in found)])).tolist()
        return {"accuracy": right / count}
    mine = tuple(torch.cat([pair[of].cpu() for pair in found]) for of in (0, 1)) if found else None
    shares = [share for share in ranks.gathered(mine) if share is not None]
    return multilabel_scores(*(torch.cat(parts) for parts in zip(*shares, strict=True)))


def multilabel_scores(logits: Tensor, targets: Tensor) -> dict[str, float]:
    r"""Mean average precision, overall and per-class F1.

    .. math:: \mathrm{OF1} = \frac{2\,\mathrm{OP}\cdot\mathrm{OR}}{\mathrm{OP} + \mathrm{OR}},\qquad
        \mathrm{CF1} = \frac{2\,\mathrm{CP}\cdot\mathrm{CR}}{\mathrm{CP} + \mathrm{CR}}

    A class is predicted where its probability is above one half. OP and OR are precision and recall over all classes
    together, CP and CR the means of the classes' own, so that CF1 is not the mean of the classes' F1. A class that is
    never predicted has precision 0. Recall and average precision of a class that no picture has are not defined: such
    classes take no part in mAP and CF1. Logits that are not finite give NaN, which is no score.

    Args:
        logits: ``(N, K)``.
        targets: 0 or 1, ``(N, K)``.

    Source: Wang et al., CNN-RNN, CVPR 2016; Chen et al., ML-GCN, CVPR 2019 ("all" labels, not the top 3).

    >>> multilabel_scores(torch.tensor([[4.0, -1.0], [-2.0, 3.0]]), torch.tensor([[1, 0], [1, 1]]))["mAP"]
    1.0
    """
    if not logits.isfinite().all():
        return dict.fromkeys(("mAP", "OF1", "CF1"), float("nan"))
    metrics = require("torchmetrics.functional.classification")
    # Float64 keeps the order of logits that are so large that their float32 probabilities are all 1. Probabilities,
    # because torchmetrics takes logits that happen to lie between 0 and 1 for such.
    probabilities, targets = logits.double().sigmoid(), targets.int()
    known = targets.any(0)
    own, own_targets, count = probabilities[:, known], targets[:, known], int(known.sum())
    if count == 0:
        return dict.fromkeys(("mAP", "OF1", "CF1"), float("nan"))
    precision, recall = (
        float(measure(own, own_targets, count, average="macro"))
        for measure in (metrics.multilabel_precision, metrics.multilabel_recall)
    )
    return {
        "mAP": float(metrics.multilabel_average_precision(own, own_targets, count, average="macro", thresholds=None)),
        "OF1": float(metrics.multilabel_f1_score(probabilities, targets, targets.shape[1], average="micro")),
        "CF1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
    }
