"""One report from the runs of a comparison: report.md, results.json, loss.png and accuracy.png.

python -m recipes.commonsense.report runs/smoke            from the run folders in it
python -m recipes.commonsense.report docs/x/results.json   from a merged file, into its folder
"""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path
from typing import Any

from recipes import report
from recipes.commonsense.plots import plot_accuracy
from recipes.commonsense.settings import RECIPE
from recipes.commonsense.tasks import TASKS
from recipes.plots import plot_losses
from recipes.report import by_method, format_bytes, markdown, over_seeds

COSTS: list[report.Column] = [
    ("trained parameters", lambda run: run["trainable_parameters"], "{:,.0f}".format, False),
    ("optimizer state", lambda run: run["optimizer_state_bytes"], format_bytes, False),
    ("peak memory", lambda run: run["peak_memory"]["bytes"], format_bytes, False),
    ("tokens/s", lambda run: run["tokens_per_second"], "{:,.0f}".format, False),
    ("train loss", lambda run: run["train_loss"], "{:.3f}".format, True),
    ("validation loss", lambda run: run["eval_loss"], "{:.3f}".format, True),
]
PANELS = [
    ("loss", "training loss", "loss (nats a token)", "linear"),
    ("eval_loss", "validation loss (response only)", "loss (nats a token)", "linear"),
]


def describe(runs: list[dict[str, Any]], folder: Path) -> tuple[list[str], list[list[list[str]]]]:
    costs, accuracy = report.tabulate(runs, COSTS), accuracy_table(runs)
    parts = [
        f"Model {runs[0]['all_settings']['model']}, {runs[0]['training_examples']:,} training examples, "
        f"{runs[0]['steps']:,} optimizer steps, seeds {report.seeds(runs)}.",
        report.where(runs),
        "",
    ]
    learned = "the whole text" if runs[0]["all_settings"]["train_on_inputs"] else "the response"
    losses = f"Train loss: the last one logged, over {learned}. Validation loss: over the response."
    parts += ["## Cost and loss", "", *markdown(costs), "", report.cost_notes(runs, losses), ""]
    plot_losses(runs, folder / "loss.png", PANELS)
    parts += ["![Training and validation loss by step](loss.png)", ""]
    parts += report.describe_fira(runs)
    if len(accuracy) > 1:
        parts += ["## Accuracy (%)", "", *markdown(accuracy), "", *_accuracy_notes(runs), ""]
        plot_accuracy(runs, folder / "accuracy.png")
        parts += ["![Accuracy by task](accuracy.png)", ""]
    return parts, [costs, accuracy]


def accuracy_table(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Accuracy by task in percent, and what always giving the most frequent answer would reach."""
    tasks = tasks_of(runs)
    if not tasks:
        return []

    def row(title: str, of_some: list[dict[str, Any]], figure: str) -> list[str]:
        columns = [[100 * run["accuracy"][task][figure] for run in of_some] for task in tasks]
        means = [statistics.mean(values) for values in zip(*columns, strict=True)]
        return [title, *(over_seeds(values, "{:.1f}".format) for values in [*columns, means])]

    rows = [["method", *tasks, "average"]]
    rows += [row(method, of_one, "accuracy") for method, of_one in by_method(runs).items()]
    if any(run["accuracy"][task]["unanswered"] for run in runs for task in tasks):
        rows += [row(f"{method}: no answer", of_one, "unanswered") for method, of_one in by_method(runs).items()]
    return [*rows, row("most frequent answer", runs[:1], "majority")]


def tasks_of(runs: list[dict[str, Any]]) -> list[str]:
    """The tasks that all runs were scored on."""
    return [task for task in TASKS if all(task in run["accuracy"] for run in runs)]


def _accuracy_notes(runs: list[dict[str, Any]]) -> list[str]:
    counts = {task: runs[0]["accuracy"][task]["questions"] for task in tasks_of(runs)}
    questions = ", ".join(f"{task} {count:,}" for task, count in counts.items())
    # Of a share near one half: the standard error is largest there.
    of_task = 50 / math.sqrt(min(counts.values()))
    of_average = 50 * math.sqrt(sum(1 / count for count in counts.values())) / len(counts)
    return [
        f"Questions: {questions}; scored by {runs[0]['all_settings']['scoring']}. "
        f"The choice of questions alone makes an accuracy uncertain by up to ±{of_task:.0f} points on a task and "
        f"±{of_average:.0f} on average (one standard error); smaller differences say nothing."
    ]


def write_report(source: Path) -> None:
    report.write_report(RECIPE, source, "Commonsense: methods compared", "Accuracy in percent", describe)


def main(words: list[str] | None = None) -> int:
    return report.main(write_report, __doc__, words)


if __name__ == "__main__":
    sys.exit(main())
