"""One report from the runs of a comparison: report.md, results.json, loss.png and accuracy.png.

python -m recipes.commonsense.report runs/smoke            from the run folders in it
python -m recipes.commonsense.report docs/x/results.json   from a merged file, into its folder
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes import report
from recipes.commonsense.differences import differences, sentences
from recipes.commonsense.plots import plot_accuracy, plot_differences
from recipes.commonsense.settings import RECIPE
from recipes.commonsense.tasks import BY_ACC, TASKS, counted
from recipes.plots import plot_losses
from recipes.report import by_method, format_bytes, markdown, over_seeds
from recipes.settings import BEFORE

# Before training there are no costs.
COSTS: list[report.Column] = [
    ("trained parameters", lambda run: run.get("trainable_parameters"), "{:,.0f}".format, False),
    ("optimizer state", lambda run: run.get("optimizer_state_bytes"), format_bytes, False),
    ("peak memory", lambda run: run.get("peak_memory", {}).get("bytes"), format_bytes, False),
    ("tokens/s", lambda run: run.get("tokens_per_second"), "{:,.0f}".format, False),
    ("train loss", lambda run: run.get("train_loss"), "{:.3f}".format, True),
    ("validation loss", report.validation_loss, "{:.3f}".format, True),
]
PANELS = [
    ("loss", "training loss", "loss (nats a token)", "linear"),
    ("eval_loss", "validation loss (response only)", "loss (nats a token)", "linear"),
]


def describe(runs: list[dict[str, Any]], folder: Path) -> tuple[list[str], list[list[list[str]]], dict[str, Any]]:
    trained = [run for run in runs if run["method"] != BEFORE]
    before = next((run for run in runs if run["method"] == BEFORE), None)
    first = trained[0]
    costs, accuracy, found = report.tabulate(runs, COSTS), accuracy_table(runs), differences(runs)
    parts = [
        f"Model {first['all_settings']['model']}, {first['training_examples']:,} training examples, "
        f"{first['steps']:,} optimizer steps, seeds {report.seeds(trained)}.",
        report.where(trained),
        "",
    ]
    learned = "the whole text" if first["all_settings"]["train_on_inputs"] else "the response"
    losses = f"Train loss: the last one logged, over {learned}. Validation loss: over the response."
    parts += ["## Cost and loss", "", *markdown(costs), "", report.cost_notes(trained, losses), ""]
    evaluated = any(sum("eval_loss" in entry for entry in run["history"]) > 1 for run in trained)
    plot_losses(trained, folder / "loss.png", PANELS if evaluated else PANELS[:1], before)
    parts += [f"![{'Training and validation' if evaluated else 'Training'} loss by step](loss.png)", ""]
    parts += report.describe_fira(trained)
    if len(accuracy) > 1:
        parts += ["## Accuracy (%)", "", *markdown(accuracy), "", *_accuracy_notes(runs, bool(found)), ""]
        if all("acc" in run["accuracy"][task] for run in runs for task in tasks_of(runs)):
            parts += ["By `acc` on all tasks:", "", *markdown(accuracy_table(runs, raw=True)), ""]
        plot_accuracy(trained, folder / "accuracy.png", before)
        parts += ["![Accuracy by task](accuracy.png)", ""]
    if found:
        said = [line for sentence in sentences(found) for line in (sentence, "")]
        parts += ["## Differences", "", *said, *markdown(differences_table(found)), "", _NOTES, ""]
        if to_lora := [entry for entry in found if entry["minus"] == "lora"]:
            plot_differences(to_lora, folder / "differences.png")
            parts += ["![Differences to LoRA](differences.png)", ""]
    return parts, [costs, accuracy, differences_by_method(found)], {"differences": found} if found else {}


_NOTES = (
    "Accuracy: the difference of the averages in points. Validation loss: the difference of the means in nats; below "
    "zero is better. The intervals are by the bootstrap over questions, within each task, and over held-out examples; "
    "tasks have equal weights. Better and worse: the number of questions on which the method is; p: McNemar's exact "
    "test on them. With several seeds, each question counts with its mean over them, and an interval is about these "
    "seeds; the last column is Student's interval of the loss over the seeds, and what the sentences tell apart both "
    "do. An interval without zero tells two methods apart; of twenty intervals one is expected to mislead. A "
    "search of learning rates looks at the same held-out examples."
)


def differences_table(found: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each difference."""
    titles = ["method", "minus", "accuracy", "95% interval", "better", "worse", "p", "validation loss", "95% interval"]
    rows = [[*titles, "over seeds"]]
    for entry in found:
        accuracy, loss = entry["accuracy"], entry["loss"]
        tested = ["-"] * 3
        if accuracy is not None:
            tested = [str(accuracy["better"]), str(accuracy["worse"]), f"{accuracy['mcnemar_p']:.2g}"]
        over_seeds = loss and loss["interval_over_seeds"]
        of_seeds = f"{over_seeds[0]:+.3f} to {over_seeds[1]:+.3f}" if over_seeds else "-"
        rows.append([entry["method"], entry["minus"], *_points(accuracy), *tested, *_nats(loss), of_seeds])
    return rows


def differences_by_method(found: list[dict[str, Any]]) -> list[list[str]]:
    """The same without the tests, a row for each method, for the terminal."""
    if not found:
        return []
    titles, rows = ["method"], {entry["method"]: [entry["method"]] for entry in found}
    for reference in dict.fromkeys(entry["minus"] for entry in found):
        name = "before" if reference == BEFORE else reference
        of_reference = {entry["method"]: entry for entry in found if entry["minus"] == reference}
        titles += [f"accuracy - {name}", "  95% interval", f"loss - {name}", "  95% interval"]
        for method, row in rows.items():
            entry = of_reference.get(method, {"accuracy": None, "loss": None})
            row += [*_points(entry["accuracy"], ", "), *_nats(entry["loss"], ", ")]
    return [titles, *rows.values()]


def _points(figure: dict[str, Any] | None, to: str = " to ") -> list[str]:
    return _difference(figure, 100, "{:+.1f}".format, to)


def _nats(figure: dict[str, Any] | None, to: str = " to ") -> list[str]:
    return _difference(figure, 1, "{:+.3f}".format, to)


def _difference(figure: dict[str, Any] | None, factor: float, form: Callable[[float], str], to: str) -> list[str]:
    """The difference and its interval as text."""
    if figure is None:
        return ["-", "-"]
    ends = figure["interval"]
    return [form(factor * figure["difference"]), to.join(form(factor * end) for end in ends) if ends else "-"]


def accuracy_table(runs: list[dict[str, Any]], raw: bool = False) -> list[list[str]]:
    """Accuracy by task in percent, and what always giving the most frequent answer would reach.

    raw: of the text form without the division by length, whatever the task.
    """
    tasks = tasks_of(runs)
    if not tasks:
        return []

    def chosen(task: str, figures: dict[str, Any]) -> dict[str, Any]:
        return figures | figures["acc"] if raw else counted(task, figures)

    def row(title: str, of_some: list[dict[str, Any]], figure: str) -> list[str]:
        scores = [[chosen(task, run["accuracy"][task]) for run in of_some] for task in tasks]
        columns = [[100 * one[figure] for one in of_task] for of_task in scores]
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


def _accuracy_notes(runs: list[dict[str, Any]], compared: bool) -> list[str]:
    counts = {task: runs[0]["accuracy"][task]["questions"] for task in tasks_of(runs)}
    questions = ", ".join(f"{task} {count:,}" for task, count in counts.items())
    settings = runs[0]["all_settings"]
    by = settings["scoring"]
    if settings.get("answer_format") == "text":
        raw, divided = (", ".join(task for task in counts if (task in BY_ACC) == raw) for raw in (True, False))
        kinds = {"as it is (`acc`)": raw, "divided by its length in characters (`acc_norm`)": divided}
        parts = [f"{kind} on {tasks}" for kind, tasks in kinds.items() if tasks]
        by = f"the likelihood of each option's text, {' and '.join(parts)}, as lm-evaluation-harness counts them"
    # Of a share near one half: the standard error is largest there.
    of_task = 50 / math.sqrt(min(counts.values()))
    of_average = 50 * math.sqrt(sum(1 / count for count in counts.values())) / len(counts)
    small = "differences are more certain, see below" if compared else "smaller differences say nothing"
    return [
        f"Questions: {questions}; scored by {by}. "
        f"The choice of questions alone makes an accuracy uncertain by up to ±{of_task:.0f} points on a task and "
        f"±{of_average:.0f} on average (one standard error); {small}."
    ]


def write_report(source: Path) -> None:
    report.write_report(RECIPE, source, "Commonsense: methods compared", "Accuracy in percent", describe)


def main(words: list[str] | None = None) -> int:
    return report.main(write_report, __doc__, words)


if __name__ == "__main__":
    sys.exit(main())
