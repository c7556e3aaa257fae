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
STATE = "trainer_state.json"  # in a checkpoint, where the Trainer writes it last


def checkpoints(folder: Path) -> list[Path]:
    """All that the Trainer has begun to save, the newest first. What has been renamed does not count."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path in steps if steps[path].isdecimal()), key=lambda path: int(steps[path]), reverse=True)


def was_saved(checkpoint: Path) -> bool:
    """Whether a checkpoint was saved to the end, in whatever state it is now."""
    return (checkpoint / STATE).is_file()


def is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds the complete result of these settings.

    Raises ValueError if it holds the result, or a checkpoint, of others, or if that cannot be told.
    """
    try:
        finished = (read_json(folder / RESULT) or {}).get("status") == "ok"
    except ValueError as error:
        raise ValueError(f"{error}. Delete it to run this again.") from None
    if not finished and not any(map(was_saved, checkpoints(folder))):
        return False
    try:
        earlier = read_json(folder / SETTINGS)
    except ValueError as error:
        raise ValueError(f"{error}. So it is not known what {folder} was run with: delete it to begin anew.") from None
    if earlier is None:
        raise ValueError(f"{folder} has no {SETTINGS}: it is not known what it was run with. Delete it to begin anew.")
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
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint)
