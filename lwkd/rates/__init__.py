"""From matched passes to the multiplier of every layer; knows no parameter and no optimizer.

Reading order: :mod:`~lwkd.rates.layer_rates` (the whole path), :mod:`~lwkd.rates.pass_matcher` (which student pass
belongs to which teacher pass), :mod:`~lwkd.rates.statistics` (sums over passes and ranks), :mod:`~lwkd.rates.state`
(the rates, and where they are kept), :mod:`~lwkd.rates.schedule` (when to measure, and what it costs).
"""

from lwkd.rates.layer_rates import LayerRates

__all__ = ["LayerRates"]
