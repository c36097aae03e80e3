"""``lwkd compare``: methods × arms × seeds from one recipe, paired by seed, every base rate tuned alike.

In reading order: ``recipe`` (the YAML file); ``trial`` (one run) with ``pictures``, ``start``, ``losses``, ``arms``;
``grid`` (which trials) with ``engines`` (who runs them); ``statistics``; ``report``; ``run`` (the command).
"""
