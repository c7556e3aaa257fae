"""Run the methods of a preset and report on them: what the recipes' compare commands do."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from recipes import errors, processes, runner
from recipes.runner import console
from recipes.settings import BEFORE, Recipe, read_overrides


def parser(recipe: Recipe, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("preset", help=f"{recipe.presets}, or a folder with <method>.yaml files")
    parser.add_argument("--output_dir", type=Path, required=True, help="one folder for all runs and the report")
    parser.add_argument("--methods", type=lambda text: text.split(","), help="default: all that the preset has")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, each with its log.txt; default: 1")
    return parser


def check_parallel(parallel: int) -> None:
    """Raises ValueError."""
    if parallel < 1:
        raise ValueError(f"parallel is {parallel}; it must be at least 1, the runs at a time.")


def compare(
    recipe: Recipe, description: str | None, write_report: Callable[[Path], None], words: list[str] | None
) -> int:
    if not processes.is_main():
        return 0  # the main process starts each run on all of them
    arguments = parser(recipe, description)
    arguments.add_argument("--seeds", type=lambda text: text.split(","), default=["42"], help="default: 42")
    options, overrides = arguments.parse_known_args(words)
    try:
        check_parallel(options.parallel)
        if "seed" in read_overrides(overrides):
            raise ValueError("The seed is set by --seeds.")
        methods = [
            runner.plan(
                recipe,
                f"{method}-seed{seed}",
                experiment,
                [*overrides, "--seed", seed],
                options.output_dir / f"{method}-seed{seed}",
            )
            for seed in options.seeds
            for method, experiment in runner.find_experiments(recipe, options.preset, options.methods).items()
        ]
        before = []
        if recipe.before:
            # The same experiment, whichever methods are chosen: its settings decide whether this has been done.
            experiment = next(iter(runner.find_experiments(recipe, options.preset, None).values()))
            folder = options.output_dir / BEFORE.replace(" ", "-")
            before = [runner.plan(recipe, BEFORE, experiment, overrides, folder, program="before")]
    except (ValueError, OSError) as error:
        return errors.refuse(error)
    failed = runner.execute([*before, *methods], options.parallel)
    console.rule("report")
    try:
        write_report(options.output_dir)
    except ValueError as error:  # a damaged result of some other run in the folder
        return errors.refuse(error)
    if failed:
        console.print(
            f"[bold red]Failed: {', '.join(run.name for run in failed)}[/]. The same command tries them again."
        )
    return int(all(run in failed for run in methods))
