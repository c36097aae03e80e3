"""What the stages that measure are told on their command line, alike for all of them."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def measuring(doc: str | None, seconds: str) -> tuple[argparse.Namespace, torch.device]:
    """The options of this process, and the device to measure on; the folder for the results is there afterwards.

    Args:
        doc: what the stage does.
        seconds: what its time limit means.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1800, help=seconds)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    return options, torch.device(options.device, 0) if options.device == "cuda" else torch.device(options.device)
