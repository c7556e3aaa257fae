"""One report from the runs of a comparison: report.md, results.json and loss.png.

python -m recipes.pretraining.report runs/tiny             from the run folders in it
python -m recipes.pretraining.report docs/x/results.json   from a merged file, into its folder
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from recipes import report
from recipes.plots import plot_losses
from recipes.pretraining.settings import RECIPE
from recipes.report import format_bytes, markdown

COLUMNS: list[report.Column] = [
    ("perplexity", lambda run: run["perplexity"], "{:,.2f}".format, True),
    ("validation loss", lambda run: run["eval_loss"], "{:.3f}".format, True),
    ("train loss", lambda run: run["train_loss"], "{:.3f}".format, True),
    ("trained parameters", lambda run: run["trainable_parameters"], "{:,.0f}".format, False),
    ("optimizer state", lambda run: run["optimizer_state_bytes"], format_bytes, False),
    ("peak memory", lambda run: run["peak_memory"]["bytes"], format_bytes, False),
    ("tokens/s", lambda run: run["tokens_per_second"], "{:,.0f}".format, False),
]
PANELS = [
    ("loss", "training loss", "loss (nats a token)", "linear"),
    ("perplexity", "validation perplexity", "perplexity", "log"),
]


def describe(runs: list[dict[str, Any]], folder: Path) -> tuple[list[str], list[list[list[str]]], dict[str, Any]]:
    first, table = runs[0], report.tabulate(runs, COLUMNS)
    losses = (
        "Perplexity: e to the validation loss, the mean over the validation text after the last step. "
        "Train loss: the last one logged."
    )
    plot_losses(runs, folder / "loss.png", PANELS)
    parts = [
        f"Model {first['all_settings']['model_config']} with {first['parameters']:,} parameters, data "
        f"{first['all_settings']['data_dir']}, {first['training_tokens']:,} training tokens in {first['steps']:,} "
        f"optimizer steps, {first['eval_tokens']:,} tokens for validation, seeds {report.seeds(runs)}.",
        report.where(runs),
        "",
        *["## Perplexity and cost", "", *markdown(table), "", report.cost_notes(runs, losses), ""],
        *["![Training loss and validation perplexity by step](loss.png)", ""],
        *report.describe_fira(runs),
    ]
    return parts, [table], {}


def write_report(source: Path) -> None:
    report.write_report(RECIPE, source, "Pre-training: methods compared", "Pre-training", describe)


def main(words: list[str] | None = None) -> int:
    return report.main(write_report, __doc__, words)


if __name__ == "__main__":
    sys.exit(main())
