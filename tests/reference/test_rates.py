"""Names that the reference of the rates does not know; what it computes is tested with the op (ops/test_rates.py)."""

from __future__ import annotations

import pytest
import torch

from lwkd import reference


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "entropy"}, "divergence 'entropy' is not known; expected one of 'attention'"),
        ({"policy": "fastest"}, "policy 'fastest' is not known; expected 'relative', 'decay', 'local' or 'constant'"),
    ],
)
def test_unknown_names(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reference.update_rates(reference.initial_rates(2), torch.ones(2, 1), **options)
