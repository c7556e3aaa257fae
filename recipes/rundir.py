"""The folder of one run: its settings, its checkpoints and its result. Nothing here imports torch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from recipes.files import read_json, write_json
from recipes.settings import difference

RESULT = "result.json"
SETTINGS = "settings.json"
TRACEBACK = "error.txt"


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint: one whose trainer_state.json, which the Trainer writes last, can be read."""
    complete = [state.parent for state in folder.glob("checkpoint-*/trainer_state.json") if _is_json(state)]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_json(path: Path) -> bool:
    try:
        read_json(path)
    except ValueError:
        return False
    return True


def is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds the complete result of these settings.

    Raises ValueError if it holds the result, or a checkpoint, of others.
    """
    finished = (read_json(folder / RESULT) or {}).get("status") == "ok"
    earlier = read_json(folder / SETTINGS)
    if earlier is None or not (finished or last_checkpoint(folder)):
        return False
    changed = difference(earlier, settings)
    if changed:
        raise ValueError(
            f"{folder} holds a run with other settings ({changed}); choose another output_dir or delete it."
        )
    return finished


def is_first_failure(folder: Path, traceback: str) -> bool:
    """Write the traceback, unless another process of the run has failed before: what the others meet then is only the
    consequence."""
    try:
        with (folder / TRACEBACK).open("x", encoding="utf-8") as file:
            file.write(traceback)
    except FileExistsError:
        return False
    return True


def write_failure(folder: Path, settings: dict[str, Any], error: str, **more: Any) -> None:
    result = {"status": "failed", "error": without_paths(error), "method": settings["method"], "settings": settings}
    write_json(folder / RESULT, result | more)


def without_paths(text: str) -> str:
    """The text with this checkout and home written as "." and "~": results are passed on."""
    return text.replace(os.getcwd(), ".").replace(os.path.expanduser("~"), "~")


def remove_checkpoints(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
