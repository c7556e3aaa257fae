"""Choose one setting, as a rule the learning rate, for each method of a preset.

    python -m recipes.commonsense.search smollm2 --output_dir runs/search --values learning_rate=1e-5,3e-5,1e-4
        [--methods lora,fira-full] [--parallel 2] [--key value ...]

Trains each method once per value (make it brief: --max_steps 60 --warmup_steps 3) and names the value with the lowest
validation loss: the mean loss of the response's tokens ("the correct answer is ..." and the end of text) over the
validation examples, which come out of the training data; the test questions are not looked at. Results go to
OUTPUT_DIR/search.json, beside what earlier commands found there; the same command continues an interrupted search.
"""

from __future__ import annotations

import sys

from recipes.commonsense.settings import RECIPE
from recipes.search import search

MINIMISED = "mean over the validation examples of the mean loss of the response's tokens"
NOT_NEEDED = ["--max_test_per_task", "0", "--keep_model", "false"]


def main(words: list[str] | None = None) -> int:
    return search(RECIPE, __doc__, MINIMISED, NOT_NEEDED, words)


if __name__ == "__main__":
    sys.exit(main())
