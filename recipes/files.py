"""JSON files of the recipes. Nothing here imports torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """The content of a JSON file, None if there is none.

    Raises ValueError, which names the file, if it was cut or holds something else.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bytes that are no text are one, too
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that is either complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    unfinished.replace(path)
