"""The questions of this recipe for lm-evaluation-harness, which reads this file from the task files beside it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from datasets import Dataset

RECIPE = Path(__file__).parents[1]
sys.path.insert(0, str(RECIPE.parents[1]))  # the harness may have been started anywhere

from recipes.commonsense.data import load_records  # noqa: E402


def load(task: str, **_) -> dict[str, Dataset]:
    """The test questions in the folder COMMONSENSE_DATA, by default the recipe's own."""
    folder = Path(os.environ.get("COMMONSENSE_DATA", RECIPE / "data"))
    return {
        "test": Dataset.from_list(
            [_question(record) for record in load_records(folder / task / "test.json", task, "text")]
        )
    }


def _question(record: dict) -> dict:
    return {
        "contexts": record["contexts"],
        "choices": [text.removeprefix(" ") for text in record["continuations"]],
        "gold": record["words"].index(record["answer"]),
    }
