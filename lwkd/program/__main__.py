"""``python -m lwkd.program`` is ``lwkd``."""

from lwkd.program.cli import main

main()
