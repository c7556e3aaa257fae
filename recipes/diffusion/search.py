"""Choose one setting, as a rule the learning rate, for each method of a preset.

    python -m recipes.diffusion.search unet --output_dir runs/search --values learning_rate=1e-3,3e-3,1e-2
        [--methods adamw-full,fira-full] [--parallel 2] [--key value ...]

Trains each method once per value and names the value with the lowest validation loss. Results go to
OUTPUT_DIR/search.json, beside what earlier commands found there; the same command continues an interrupted search.
"""

from __future__ import annotations

import sys

from recipes.diffusion.settings import RECIPE
from recipes.search import search

MINIMISED = "mean squared error of the predicted noise of the held-out images after the last step"
NOT_NEEDED: list[str] = []


def main(words: list[str] | None = None) -> int:
    return search(RECIPE, __doc__, MINIMISED, NOT_NEEDED, words)


if __name__ == "__main__":
    sys.exit(main())
