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
# Where a pretrained model is trained.
GAINED: report.Column = ("gained", lambda run: _fall(run, "eval_loss", 1), "{:.3f}".format, True)
FORGOTTEN: list[report.Column] = [
    ("other text's loss", lambda run: run["other_loss"], "{:.3f}".format, True),
    ("forgotten", lambda run: _fall(run, "other_loss", -1), "{:.3f}".format, True),
]
PANELS = [
    ("loss", "training loss", "loss (nats a token)", "linear"),
    ("perplexity", "validation perplexity", "perplexity", "log"),
]


def _fall(run: dict[str, Any], loss: str, sign: int) -> float:
    return sign * (run[f"{loss}_before"] - run[loss])


def columns(runs: list[dict[str, Any]]) -> tuple[list[report.Column], str]:
    """Those of these runs, and what they hold that a model from random weights has not."""
    at = 1 + [title for title, *_ in COLUMNS].index("validation loss")
    if not all("eval_loss_before" in run for run in runs):
        return COLUMNS, ""
    before = runs[0]["eval_loss_before"]
    notes = f" Gained: what the validation loss, {before:.3f} before training, has fallen by."
    if not all("other_loss_before" in run for run in runs):
        return [*COLUMNS[:at], GAINED, *COLUMNS[at:]], notes
    notes += (
        f" Forgotten: what the loss on {runs[0]['all_settings']['other_data_dir']}, "
        f"{runs[0]['other_loss_before']:.3f} before training, has risen by."
    )
    return [*COLUMNS[:at], GAINED, *FORGOTTEN, *COLUMNS[at:]], notes


def describe(runs: list[dict[str, Any]], folder: Path) -> tuple[list[str], list[list[list[str]]], dict[str, Any]]:
    first, (shown, notes) = runs[0], columns(runs)
    table = report.tabulate(runs, shown)
    model = first["all_settings"].get("model") or first["all_settings"]["model_config"]
    losses = (
        "Perplexity: e to the validation loss, the mean over the validation text after the last step. "
        f"Train loss: the last one logged.{notes}"
    )
    plot_losses(runs, folder / "loss.png", PANELS)
    parts = [
        f"Model {model} with {first['parameters']:,} parameters, data "
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
