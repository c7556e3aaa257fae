"""Choose one setting, as a rule the learning rate, for each method of a preset.

    python -m recipes.commonsense.search smollm2 --output_dir runs/search --values learning_rate=1e-5,3e-5,1e-4
        [--methods lora,fira-full] [--key value ...]

Trains each method once per value (make it brief: --max_steps 30) and names the value with the lowest validation loss:
the mean loss of the response's tokens ("the correct answer is ..." and the end of text) over the validation examples,
which come out of the training data; the test questions are not looked at. Results go to OUTPUT_DIR/search.json; the
same command continues an interrupted search.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from rich.table import Table

from recipes import files
from recipes.commonsense import processes, rundir, runner
from recipes.commonsense.compare import parser
from recipes.commonsense.runner import console

MINIMISED = "eval_loss: mean loss of the response's tokens on the validation examples"


def main(words: list[str] | None = None) -> int:
    if not processes.is_main():
        return 0  # the main process starts each run on all of them
    arguments = parser(__doc__)
    arguments.add_argument("--values", required=True, help="learning_rate=1e-5,3e-5,1e-4")
    options, overrides = arguments.parse_known_args(words)
    key, _, values = options.values.partition("=")
    runs: dict[str, dict[str, runner.Run]] = {}
    try:
        if not values:
            raise ValueError(f"--values is {options.values!r}; write key=value,value,...")
        for method, experiment in runner.find_experiments(options.preset, options.methods).items():
            runs[method] = {}
            for value in values.split(","):
                name = f"{method}-{key}-{value}"
                changes = [*overrides, f"--{key}", value, "--max_test_per_task", "0", "--keep_model", "false"]
                runs[method][value] = runner.plan(name, experiment, changes, options.output_dir / name)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    runner.execute([run for of_method in runs.values() for run in of_method.values()])

    found = {method: _choose(of_method) for method, of_method in runs.items()}
    files.write_json(options.output_dir / "search.json", {"setting": key, "minimised": MINIMISED, "methods": found})
    _print(key, found)
    return int(all(of_method["best"] is None for of_method in found.values()))


def _choose(runs: dict[str, runner.Run]) -> dict[str, Any]:
    """The loss of each value (None where the run failed or diverged) and the best value."""
    losses = {}
    for value, run in runs.items():
        loss = files.read_json(run.folder / rundir.RESULT).get("eval_loss")
        losses[value] = loss if loss is not None and math.isfinite(loss) else None
    finite = {value: loss for value, loss in losses.items() if loss is not None}
    best = min(finite, key=finite.__getitem__, default=None)
    ends = {min(losses, key=float), max(losses, key=float)}
    return {"losses": losses, "best": best, "at_the_edge": len(losses) > 1 and best in ends}


def _print(key: str, found: dict[str, dict[str, Any]]) -> None:
    values = list(dict.fromkeys(value for of_method in found.values() for value in of_method["losses"]))
    table = Table("method", *values, "best", title=f"validation loss by {key}")
    for method, of_method in found.items():
        losses = [of_method["losses"][value] for value in values]
        cells = ["-" if loss is None else f"{loss:.4f}" for loss in losses]
        note = " (at the edge: widen the search)" if of_method["at_the_edge"] else ""
        table.add_row(method, *cells, f"{of_method['best']}{note}")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
