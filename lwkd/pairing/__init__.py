"""Which student layer is compared with which teacher layer, and which parameters follow each pair.

Reading order: :mod:`~lwkd.pairing.tracing` (one watched forward pass), :mod:`~lwkd.pairing.spine` (what every path runs
through), :mod:`~lwkd.pairing.channel_axis` (where channels and batch are), :mod:`~lwkd.pairing.blocks`,
:mod:`~lwkd.pairing.crucial_layers`, :mod:`~lwkd.pairing.assignment` (found or given pairs), :mod:`~lwkd.pairing.pairs`
(the public function and its result).
"""

from lwkd.pairing.pairs import Pair, Pairing, pair
from lwkd.pairing.tracing import PairingError

__all__ = ["Pair", "Pairing", "PairingError", "pair"]
