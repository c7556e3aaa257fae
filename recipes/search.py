"""Choose one setting for each method of a preset by the validation loss: what the recipes' search commands do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.table import Table

from recipes import errors, files, processes, rundir, runner
from recipes.compare import check_parallel, parser
from recipes.report import validation_loss
from recipes.runner import console
from recipes.settings import Recipe, difference


def search(
    recipe: Recipe, description: str | None, minimised: str, not_needed: list[str], words: list[str] | None
) -> int:
    """`minimised` says what eval_loss is; `not_needed` are settings that leave out what a search does not look at."""
    if not processes.is_main():
        return 0  # the main process starts each run on all of them
    arguments = parser(recipe, description)
    arguments.add_argument("--values", required=True, help="learning_rate=1e-5,3e-5,1e-4")
    options, overrides = arguments.parse_known_args(words)
    key, _, values = options.values.partition("=")
    runs: dict[str, dict[str, runner.Run]] = {}
    path = options.output_dir / "search.json"
    try:
        check_parallel(options.parallel)
        if not values:
            raise ValueError(f"--values is {options.values!r}; write key=value,value,...")
        for method, experiment in runner.find_experiments(recipe, options.preset, options.methods).items():
            runs[method] = {}
            for value in values.split(","):
                name = f"{method}-{key}-{value}"
                changes = [*overrides, f"--{key}", value, *not_needed]
                runs[method][value] = runner.plan(recipe, name, experiment, changes, options.output_dir / name)
    except (ValueError, OSError) as error:
        return errors.refuse(error)
    runner.execute([run for of_method in runs.values() for run in of_method.values()], options.parallel)

    about = {"setting": key, "minimised": minimised}
    earlier = files.read_json(path) or {}  # of other methods and values
    known = earlier["methods"] if earlier.items() >= about.items() else {}
    found = {}
    for method, of_method in runs.items():
        settings = next(iter(of_method.values())).settings
        of_earlier = {
            value: loss
            for value, loss in known.get(method, {}).get("losses", {}).items()
            if _are_alike(options.output_dir / f"{method}-{key}-{value}", settings, key)
        }
        found[method] = _choose(of_earlier | _losses(of_method))
    files.write_json(path, about | {"methods": known | found})
    _print(key, found)
    return int(all(of_method["best"] is None for of_method in found.values()))


def _are_alike(folder: Path, settings: dict[str, Any], key: str) -> bool:
    """Whether a folder's run differs in nothing but what is searched."""
    own = files.read_json(folder / rundir.SETTINGS)
    return own is not None and difference(own | {key: None}, settings | {key: None}) is None


def _losses(runs: dict[str, runner.Run]) -> dict[str, float | None]:
    """The loss of each value; None where the run failed or diverged."""
    # Another command, of other settings, may have taken a run's folder since the plan was made.
    results = {value: files.read_json(run.folder / rundir.RESULT) or {} for value, run in runs.items()}
    found = {value: validation_loss(result) for value, result in results.items()}
    return {value: loss if loss is not None and math.isfinite(loss) else None for value, loss in found.items()}


def _choose(losses: dict[str, float | None]) -> dict[str, Any]:
    """The best value, and whether of numbers it is the lowest or the highest."""
    finite = {value: loss for value, loss in losses.items() if loss is not None}
    best = min(finite, key=finite.__getitem__, default=None)
    try:
        ends = {min(losses, key=float), max(losses, key=float)} if len(losses) > 1 else set()
    except ValueError:  # words have no order
        ends = set()
    return {"losses": losses, "best": best, "at_the_edge": best in ends}


def _print(key: str, found: dict[str, dict[str, Any]]) -> None:
    values = list(dict.fromkeys(value for of_method in found.values() for value in of_method["losses"]))
    table = Table("method", *values, "best", title=f"validation loss by {key}")
    for method, of_method in found.items():
        losses = [of_method["losses"][value] for value in values]
        cells = ["-" if loss is None else f"{loss:.4f}" for loss in losses]
        note = " (at the edge: widen the search)" if of_method["at_the_edge"] else ""
        table.add_row(method, *cells, f"{of_method['best']}{note}")
    console.print(table)
