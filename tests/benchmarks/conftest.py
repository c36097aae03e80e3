"""Makes ``import benchmarks`` work, also where pytest was not started as ``python -m pytest``."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:
    sys.path.append(ROOT)  # behind all others: in `make gpu` the lwkd that was built comes before that of the checkout
