"""One report from the runs of a comparison: report.md, results.json, loss.png and samples.png.

python -m recipes.diffusion.report runs/unet             from the run folders in it
python -m recipes.diffusion.report docs/x/results.json   from a merged file, into its folder
"""

from __future__ import annotations

import sys
from pathlib import Path

from recipes import report


def write_report(source: Path) -> None:
    raise NotImplementedError


if __name__ == "__main__":
    sys.exit(report.main(write_report, __doc__, None))
