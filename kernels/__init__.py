"""Triton kernels, reached as ``lwkd.kernels``. One file a stem, as in ``csrc/``."""
