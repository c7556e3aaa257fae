"""Run the methods of a preset and report on them.

    python -m recipes.diffusion.compare unet --output_dir runs/unet [--methods adamw-full,fira-full] [--seeds 0,1]
        [--parallel 2] [--key value ...]

Further settings go to every method. The same command again skips what is complete, continues what was interrupted and
repeats what failed.
"""

from __future__ import annotations

import sys

from recipes.compare import compare
from recipes.diffusion import report
from recipes.diffusion.settings import RECIPE


def main(words: list[str] | None = None) -> int:
    return compare(RECIPE, __doc__, report.write_report, words)


if __name__ == "__main__":
    sys.exit(main())
