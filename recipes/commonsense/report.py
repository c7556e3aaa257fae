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

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recipes import files
from recipes.commonsense import rundir
from recipes.commonsense.plots import plot_accuracy, plot_losses
from recipes.commonsense.settings import METHODS
from recipes.commonsense.tasks import TASKS

MERGED = "results.json"
# Columns of the table of costs: title, figure of one run, format, whether its spread over seeds tells something.
COSTS: list[tuple[str, Callable[[dict], float | None], Callable[[float], str], bool]] = [
    ("trained parameters", lambda run: run["trainable_parameters"], "{:,.0f}".format, False),
    ("optimizer state", lambda run: run["optimizer_state_bytes"], lambda value: format_bytes(value), False),
    ("peak memory", lambda run: run["peak_memory"]["bytes"], lambda value: format_bytes(value), False),
    ("tokens/s", lambda run: run["tokens_per_second"], "{:,.0f}".format, False),
    ("train loss", lambda run: run["train_loss"], "{:.3f}".format, True),
    ("validation loss", lambda run: run["eval_loss"], "{:.3f}".format, True),
]


def load_results(source: Path) -> list[dict[str, Any]]:
    """All results below a folder, or in a merged file, ordered by method and seed."""
    if source.is_dir():
        runs = [files.read_json(path) for path in sorted(source.glob(f"*/{rundir.RESULT}"))]
    else:
        runs = (files.read_json(source) or {}).get("runs", [])
    if not runs:
        raise ValueError(f"{source} holds no results.")
    order = list(METHODS)
    return sorted(runs, key=lambda run: (order.index(run["method"]), run["settings"].get("seed", 0)))


def write_report(source: Path, console: Console | None = None) -> None:
    """Write the report beside its source and print its tables."""
    console = console or Console()
    folder = source if source.is_dir() else source.parent
    runs = load_results(source)
    files.write_json(folder / MERGED, {"runs": runs})
    finished = [run for run in runs if run["status"] == "ok"]
    parts = ["# Commonsense: methods compared", ""]
    if finished:
        costs, accuracy = cost_table(finished), accuracy_table(finished)
        parts += _describe(finished)
        parts += ["## Cost and loss", "", *_markdown(costs), "", *_cost_notes(finished), ""]
        plot_losses(finished, folder / "loss.png")
        parts += ["![Training and validation loss by step](loss.png)", ""]
        parts += _describe_fira(finished)
        if len(accuracy) > 1:
            parts += ["## Accuracy (%)", "", *_markdown(accuracy), "", *_accuracy_notes(finished), ""]
            plot_accuracy(finished, folder / "accuracy.png")
            parts += ["![Accuracy by task](accuracy.png)", ""]
        parts += ["## Settings", "", *_settings(finished), ""]
        _print(console, costs, accuracy)
    for run in runs:
        if run["status"] != "ok":
            parts += [f"**{_name(run)} failed**: {run['error']}", ""]
            console.print(f"[bold red]{_name(run)} failed[/]: {escape(run['error'])}")
    (folder / "report.md").write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    console.print(f"Report: {folder / 'report.md'}")


def _name(run: dict[str, Any]) -> str:
    return f"{run['method']} (seed {run['settings'].get('seed', 42)})"


def by_method(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {method: of_one for method in METHODS if (of_one := [run for run in runs if run["method"] == method])}


def _over_seeds(values: list[float | None], form: Callable[[float], str], spread: bool = True) -> str:
    """The mean over the seeds, with ± standard deviation if there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = form(statistics.mean(known))
    return f"{mean} ± {form(statistics.stdev(known))}" if spread and len(known) > 1 else mean


def cost_table(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of text, the first one the titles."""
    rows = [["method", *(column[0] for column in COSTS)]]
    for method, of_one in by_method(runs).items():
        cells = [_over_seeds([get(run) for run in of_one], form, spread) for _, get, form, spread in COSTS]
        rows.append([method, *cells])
    return rows


def accuracy_table(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Accuracy by task in percent, and what always giving the most frequent answer would reach."""
    tasks = tasks_of(runs)
    if not tasks:
        return []

    def row(title: str, of_some: list[dict[str, Any]], figure: str) -> list[str]:
        columns = [[100 * run["accuracy"][task][figure] for run in of_some] for task in tasks]
        means = [statistics.mean(values) for values in zip(*columns, strict=True)]
        return [title, *(_over_seeds(values, "{:.1f}".format) for values in [*columns, means])]

    rows = [["method", *tasks, "average"]]
    rows += [row(method, of_one, "accuracy") for method, of_one in by_method(runs).items()]
    if any(run["accuracy"][task]["unanswered"] for run in runs for task in tasks):
        rows += [row(f"{method}: no answer", of_one, "unanswered") for method, of_one in by_method(runs).items()]
    return [*rows, row("most frequent answer", runs[:1], "majority")]


def tasks_of(runs: list[dict[str, Any]]) -> list[str]:
    """The tasks that all runs were scored on."""
    return [task for task in TASKS if all(task in run["accuracy"] for run in runs)]


def format_bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value / 1e3:.1f} kB"


def _describe(runs: list[dict[str, Any]]) -> list[str]:
    first, where = runs[0], runs[0]["provenance"]
    seeds = ", ".join(sorted({str(run["seed"]) for run in runs}))
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return [
        f"Model {first['all_settings']['model']}, {first['training_examples']:,} training examples, "
        f"{first['steps']:,} optimizer steps, seeds {seeds}.",
        f"On {where['device']} ({_processes(runs)}{where['cpu_threads']} CPU threads, {where['platform']}), "
        f"{where['date'][:10]}, "
        f"commit {where['commit'] or 'unknown'}; {versions}.",
        "",
    ]


def _processes(runs: list[dict[str, Any]]) -> str:
    """ "2 processes of ", or nothing if there was one, as in results that do not say how many there were."""
    counts = sorted({run["provenance"].get("processes", 1) for run in runs})
    return "" if counts == [1] else f"{'/'.join(map(str, counts))} processes of "


def _cost_notes(runs: list[dict[str, Any]]) -> list[str]:
    memory = "allocated on the GPU" if runs[0]["peak_memory"]["of"] == "gpu" else "resident memory of the process"
    of_which = " of the main process" if _processes(runs) else ""
    learned = "the whole text" if runs[0]["all_settings"]["train_on_inputs"] else "the response"
    return [
        "Optimizer state: bytes of its tensors, measured after training. "
        f"Peak memory{of_which}: {memory}, up to the end of training. "
        "Tokens/s: without padding, in training steps alone. "
        f"Train loss: the last one logged, over {learned}. Validation loss: over the response. "
        "± is the standard deviation over seeds."
    ]


def _describe_fira(runs: list[dict[str, Any]]) -> list[str]:
    """What the optimizer did, as means over the training's logs; nothing if no method used it."""
    titles = {
        "limiter active": "fira_limiter_active",
        "captured energy": "fira_captured_energy",
        "residual share": "fira_residual_share",
    }
    rows = [["method", *titles]]
    for method, of_one in by_method(runs).items():
        logs = [entry for run in of_one for entry in run["history"] if "fira_limiter_active" in entry]
        if logs:
            rows.append([method, *(f"{statistics.mean(log[key] for log in logs):.1%}" for key in titles.values())])
    if len(rows) == 1:
        return []
    note = (
        "Means over training: residuals that the norm-growth limiter scaled down, the gradient's energy inside the "
        "subspace, and the residual's part of the squared update."
    )
    return ["## What Fira did", "", *_markdown(rows), "", note, ""]


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


def _settings(runs: list[dict[str, Any]]) -> list[str]:
    """What the experiments set: what they share, then what differs by method."""
    firsts = {method: of_one[0]["settings"] for method, of_one in by_method(runs).items()}
    keys = sorted({key for settings in firsts.values() for key in settings} - {"method", "seed", "report_to"})
    shared = [key for key in keys if len({str(settings.get(key)) for settings in firsts.values()}) == 1]
    first = next(iter(firsts.values()))
    lines = ["- all: " + ", ".join(f"{key} {first[key]}" for key in shared)]
    for method, settings in firsts.items():
        own = [f"{key} {settings[key]}" for key in keys if key not in shared and key in settings]
        lines.append(f"- {method}: " + (", ".join(own) or "nothing else"))
    return lines


def _markdown(rows: list[list[str]]) -> list[str]:
    line = ["---", *["---:"] * (len(rows[0]) - 1)]
    return ["| " + " | ".join(row) + " |" for row in [rows[0], line, *rows[1:]]]


def _print(console: Console, *tables: list[list[str]]) -> None:
    """The tables below one another, a method a column: so they fit a terminal."""
    names = list(dict.fromkeys(row[0] for rows in tables for row in rows[1:]))
    table = Table("", *names, title="Accuracy in percent")
    for rows in tables:
        by_name = {row[0]: row for row in rows[1:]}
        for index, title in enumerate(rows[0][1:] if rows else [], start=1):
            table.add_row(title, *(by_name[name][index] if name in by_name else "" for name in names))
        table.add_section()
    console.print(table)


def main(words: list[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    if len(words) != 1 or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if words else 2
    try:
        write_report(Path(words[0]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
