"""The proof on a GPU: what ``make gpu`` runs. In reading order: run.py, ops.py, steps.py, report.py."""
