"""What the benchmark scripts share: the options of their command lines, and the JSON that they write."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from recipes import files, measure
from recipes.benchmarks.models import SIZES


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that choose a model, a device and where the JSON goes."""
    measure.commit()
    one = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    one.add_argument("--size", choices=list(SIZES), default="60m")
    one.add_argument("--layers", type=int, help="default: all of the model's")
    one.add_argument("--rank", type=int, help="default: the published one")
    one.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    one.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    one.add_argument("--threads", type=int, help="default: torch's")
    one.add_argument("--output", type=Path)
    return one


def write(script: str, words: list[str] | None, options: argparse.Namespace, **found: Any) -> None:
    """What was found, with settings and provenance, to --output if that is given."""
    if options.output is None:
        return
    told = {key: value for key, value in vars(options).items() if key not in ("output", "data")}
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in told.items()}
    command = ["python", "-m", f"recipes.benchmarks.{script}", *(sys.argv[1:] if words is None else words)]
    provenance = measure.provenance(0, command)
    files.write_json(options.output, {"settings": settings, **found, "provenance": provenance})
