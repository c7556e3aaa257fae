"""Which checkpoint a run goes on from: the newest of which every file is there and can be read.

A full disk, a broken copy or a process that was killed leave files that are missing, empty, cut or full of zeros. Of
those of torch, which compares no checksums itself, all bytes are read once, about as long as loading them takes; of
safetensors, which have none, the header, which says how long the file must be.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from recipes import errors, rundir
from recipes.files import read_json

# Optimizer and weights in the forms in which the Trainer saves both, each under one of several names: in shards by
# FSDP, whole by FSDP, and otherwise.
FORMS = (
    (("optimizer_0/.metadata",), ("pytorch_model_fsdp_0/.metadata",)),
    (("optimizer.bin",), ("pytorch_model_fsdp.bin",)),
    (
        ("optimizer.pt",),
        (
            "model.safetensors",
            "adapter_model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
            "adapter_model.bin",
        ),
    ),
)
UNFINISHED = f"it was not saved to the end ({rundir.STATE} is missing)"


def newest(folder: Path, fp16: bool = False) -> tuple[Path | None, dict[str, str]]:
    """The newest checkpoint of a run that can be resumed from, and what is wrong with each that is newer."""
    passed_over: dict[str, str] = {}
    for checkpoint in rundir.checkpoints(folder):
        reason = flaw(checkpoint, fp16)
        if reason is None:
            return checkpoint, passed_over
        passed_over[checkpoint.name] = reason
    return None, passed_over


def flaw(checkpoint: Path, fp16: bool = False) -> str | None:
    """Why a resume from the checkpoint would fail, or end elsewhere, if it would; `fp16`: gradients are scaled."""
    if not rundir.was_saved(checkpoint):
        return UNFINISHED
    damage = damaged_file(checkpoint)
    if damage is not None:
        return damage
    state = read_json(checkpoint / rundir.STATE)
    if not isinstance(state, dict) or "global_step" not in state:
        return f"{rundir.STATE} does not say where the training was"
    for names in _needed(checkpoint, state, fp16):
        if not any((checkpoint / name).exists() for name in names):
            return f"{' or '.join(names[:2])} is missing"
    return None


def _needed(checkpoint: Path, state: dict[str, Any], fp16: bool) -> list[tuple[str, ...]]:
    """The names of the files, each with those under which the same may be found."""
    forms = (form for form in FORMS if any((checkpoint / name).exists() for names in form for name in names))
    needed = [*next(forms, FORMS[-1]), ("scheduler.pt",)]
    if fp16:
        needed.append(("scaler.pt",))
    # Of each process that made the checkpoint; it may be resumed by another number of them.
    recorded = state.get("stateful_callbacks", {}).get("StepTime", {}).get("attributes", {}).get("processes")
    processes = recorded or len(list(checkpoint.glob("rng_state_*.pth"))) or 1
    return needed + ([("rng_state.pth",)] if processes == 1 else [(f"rng_state_{i}.pth",) for i in range(processes)])


def damaged_file(folder: Path) -> str | None:
    """The first file of a checkpoint or a model that cannot be read, and why, if there is one."""
    for path in sorted(folder.rglob("*")):
        check = next((check for ending, check in CHECKS.items() if path.name.endswith(ending)), None)
        if check is None or not path.is_file():
            continue
        name = path.relative_to(folder)
        try:
            if not path.stat().st_size:
                return f"{name} is empty"
            check(path)
        except Exception as error:  # there is no telling what damaged bytes lead to
            return f"{name} cannot be read ({errors.named(error)})"
    return None


def _check_index(path: Path) -> None:
    for name in sorted(set(read_json(path)["weight_map"].values())):
        if not (path.parent / name).is_file():
            raise FileNotFoundError(f"{name} is missing")


def _check_safetensors(path: Path) -> None:
    with safe_open(path, framework="numpy"):
        pass


def _check_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as content:
        broken = content.testzip()
    if broken is not None:
        raise ValueError(f"the checksum of {broken} is another one")


def _check_sharded(path: Path) -> None:
    """What FSDP has saved is at least as long as its table of contents says."""
    from torch.distributed.checkpoint import FileSystemReader

    for part in FileSystemReader(path.parent).read_metadata().storage_data.values():
        size = (path.parent / part.relative_path).stat().st_size
        if size < part.offset + part.length:
            raise ValueError(f"{part.relative_path} has {size} bytes, of at least {part.offset + part.length}")


# How a file is read, by the end of its name; others are of no consequence to a resume.
CHECKS: dict[str, Callable[[Path], Any]] = {
    ".index.json": _check_index,
    ".json": lambda path: json.loads(path.read_bytes()),
    ".safetensors": _check_safetensors,
    ".pt": _check_zip,
    ".pth": _check_zip,
    ".bin": _check_zip,
    ".metadata": _check_sharded,
}
