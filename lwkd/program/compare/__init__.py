"""``lwkd compare``: methods × arms × seeds from one recipe, paired by seed, every base rate tuned alike.

In reading order: ``recipe`` (the YAML file), ``trial`` (one run) with ``start``, ``losses`` and ``arms``, ``grid`` (which
runs, and on which engine), ``statistics``, ``report``.
"""
