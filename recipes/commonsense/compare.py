"""Run the methods of a preset and report on them.

    python -m recipes.commonsense.compare smoke --output_dir runs/smoke [--methods lora,fira-full] [--seeds 0,1]
        [--parallel 2] [--key value ...]

Further settings go to every method. The same command again skips what is complete, continues what was interrupted and
repeats what failed.
"""

from __future__ import annotations

import sys

from recipes.commonsense import report
from recipes.commonsense.settings import RECIPE
from recipes.compare import compare


def main(words: list[str] | None = None) -> int:
    return compare(RECIPE, __doc__, report.write_report, words)


if __name__ == "__main__":
    sys.exit(main())
