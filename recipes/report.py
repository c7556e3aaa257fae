"""What the reports of the recipes share: the merged results, tables over seeds, and what an experiment set."""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column as PrintedColumn
from rich.table import Table

from recipes import errors, files, rundir
from recipes.settings import BEFORE, Recipe, difference

MERGED = "results.json"
# A column of a table: title, figure of one run, format, whether its spread over seeds tells something.
Column = tuple[str, Callable[[dict[str, Any]], float | None], Callable[[float], str], bool]
# Finished runs and the folder for pictures -> the lines of the report, the tables that are printed as well, and what
# stands beside the runs in the merged results.
Describe = Callable[[list[dict[str, Any]], Path], tuple[list[str], list[list[list[str]]], dict[str, Any]]]
WIDTH, COLUMNS = 100, 5  # of a printed table: characters at most, methods beside one another


def load_results(recipe: Recipe, source: Path) -> list[dict[str, Any]]:
    """All results below a folder, or in a merged file, ordered by method and seed."""
    if source.is_dir():
        runs = [files.read_json(path) for path in sorted(source.glob(f"*/{rundir.RESULT}"))]
    else:
        runs = (files.read_json(source) or {}).get("runs", [])
    if not runs:
        raise ValueError(f"{source} holds no results.")
    order = [BEFORE, *recipe.methods]
    return sorted(runs, key=lambda run: (order.index(run["method"]), run["settings"].get("seed", 0)))


def validation_loss(run: dict[str, Any]) -> float | None:
    """The mean over the held-out examples; of a result without, the Trainer's, which weights by tokens of a batch."""
    return statistics.mean(run["held_out"]["losses"]) if run.get("held_out") else run.get("eval_loss")


def write_report(recipe: Recipe, source: Path, title: str, caption: str, describe: Describe) -> None:
    """Write the report beside its source and print its tables, of which `caption` says what they show."""
    console = Console()
    console = Console(width=min(console.width, WIDTH) if console.is_terminal else WIDTH)
    folder = source if source.is_dir() else source.parent
    runs = load_results(recipe, source)
    finished = [run for run in runs if run["status"] == "ok"]
    trained = [run for run in finished if run["method"] != BEFORE]
    _check_seeds(trained)
    parts, merged = [f"# {title}", ""], {"runs": runs}
    if trained:
        lines, tables, more = describe(finished, folder)
        merged |= more
        parts += [*lines, "## Settings", "", *_settings(trained), ""]
        _print(console, caption, *tables)
    files.write_json(folder / MERGED, merged)
    for run in runs:
        if run["status"] != "ok":
            parts += [f"**{_name(run)} failed**: {run['error']}", ""]
            console.print(f"[bold red]{_name(run)} failed[/]: {escape(run['error'])}")
    (folder / "report.md").write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    console.print(f"Report: {folder / 'report.md'}")


def _check_seeds(runs: list[dict[str, Any]]) -> None:
    """ValueError if the runs of a method differ in more than the seed: they would be averaged."""
    for method, of_one in by_method(runs).items():
        first, *others = ({**run["settings"], "seed": None} for run in of_one)
        for other in others:
            if changed := difference(first, other):
                raise ValueError(
                    f"{method} has runs with different settings ({changed}): report on them in folders of their own."
                )


def _name(run: dict[str, Any]) -> str:
    if run["method"] == BEFORE:
        return BEFORE
    return f"{run['method']} (seed {run['settings'].get('seed', 42)})"


def by_method(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    methods = dict.fromkeys(run["method"] for run in runs)
    return {method: [run for run in runs if run["method"] == method] for method in methods}


def over_seeds(values: list[float | None], form: Callable[[float], str], spread: bool = True) -> str:
    """The mean over the seeds, with ± standard deviation if there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = form(statistics.mean(known))
    return f"{mean} ± {form(statistics.stdev(known))}" if spread and len(known) > 1 else mean


def tabulate(runs: list[dict[str, Any]], columns: list[Column]) -> list[list[str]]:
    """Rows of text, the first one the titles."""
    rows = [["method", *(column[0] for column in columns)]]
    for method, of_one in by_method(runs).items():
        cells = [over_seeds([get(run) for run in of_one], form, spread) for _, get, form, spread in columns]
        rows.append([method, *cells])
    return rows


def format_bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value / 1e3:.1f} kB"


def where(runs: list[dict[str, Any]]) -> str:
    """On what the runs were made, in one line."""
    places = [run["provenance"] for run in runs]

    def each(found: Iterable[Any]) -> str:
        return " and ".join(dict.fromkeys(map(str, found)))

    versions = (", ".join(f"{name} {version}" for name, version in place["versions"].items()) for place in places)
    return (
        f"On {each(place['device'] for place in places)} ({_processes(runs)}"
        f"{each(place['cpu_threads'] for place in places)} CPU threads, "
        f"{each(place['platform'] for place in places)}), {each(sorted(place['date'][:10] for place in places))}, "
        f"commit {each(place['commit'] or 'unknown' for place in places)}; {each(versions)}."
    )


def _processes(runs: list[dict[str, Any]]) -> str:
    """ "2 processes of ", or nothing if there was one."""
    counts = sorted({run["provenance"]["processes"] for run in runs})
    return "" if counts == [1] else f"{'/'.join(map(str, counts))} processes of "


def seeds(runs: list[dict[str, Any]]) -> str:
    return ", ".join(sorted({str(run["seed"]) for run in runs}))


def cost_notes(runs: list[dict[str, Any]], losses: str) -> str:
    """What the columns of the table of costs hold; `losses` says it for those of the losses."""
    memory = "allocated on the GPU" if runs[0]["peak_memory"]["of"] == "gpu" else "resident memory of the process"
    of_which = " of the main process" if _processes(runs) else ""
    return (
        "Optimizer state: bytes of its tensors, measured after training. "
        f"Peak memory{of_which}: {memory}, up to the end of training. "
        "Tokens/s: without padding, in training steps alone. "
        f"{losses} ± is the standard deviation over seeds."
    )


def describe_fira(runs: list[dict[str, Any]]) -> list[str]:
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
    return ["## What Fira did", "", *markdown(rows), "", note, ""]


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


def fill(page: Path, word: str, make: Callable[[str], str]) -> None:
    """Replace what a page has between its marks (see `marks`) by what `make` says of NAME."""
    text = page.read_text(encoding="utf-8")
    text = marks(word).sub(lambda match: f"{match[1]}\n{make(match[2])}\n\n{match[3]}", text)
    page.write_text(text, encoding="utf-8")


def marks(word: str) -> re.Pattern[str]:
    """What stands between `<!-- word: NAME -->` and `<!-- end -->`, with the name as the second group."""
    return re.compile(rf"(<!-- {word}: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(rows: list[list[str]]) -> list[str]:
    line = ["---", *["---:"] * (len(rows[0]) - 1)]
    return ["| " + " | ".join(row) + " |" for row in [rows[0], line, *rows[1:]]]


def _print(console: Console, caption: str, *tables: list[list[str]]) -> None:
    """The tables below one another, a method a column, and what is too wide for a terminal in another block below."""
    names = list(dict.fromkeys(row[0] for rows in tables for row in rows[1:]))
    for start in range(0, len(names), COLUMNS):
        some = names[start : start + COLUMNS]
        narrow = {"box": box.SIMPLE_HEAD, "show_edge": False, "padding": (0, 1, 0, 0)}
        table = Table(PrintedColumn(no_wrap=True), *some, title=caption, **narrow)
        for rows in tables:
            by_name = {row[0]: row for row in rows[1:]}
            for index, title in enumerate(rows[0][1:] if rows else [], start=1):
                table.add_row(title, *(by_name[name][index] if name in by_name else "" for name in some))
            table.add_section()
        console.print(table)


def main(write: Callable[[Path], None], description: str | None, words: list[str] | None) -> int:
    words = sys.argv[1:] if words is None else words
    if len(words) != 1 or words[0] in ("-h", "--help"):
        print(description)
        return 0 if words else 2
    try:
        write(Path(words[0]))
    except (ValueError, OSError) as error:
        return errors.refuse(error)
    return 0
