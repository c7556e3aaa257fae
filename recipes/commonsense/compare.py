"""Run the methods of a preset one after the other and report on them.

    python -m recipes.commonsense.compare smoke --output_dir runs/smoke [--methods lora,fira-full] [--seeds 0,1]
        [--key value ...]

Further settings go to every method. The same command again skips what is complete, continues what was interrupted and
repeats what failed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from recipes.commonsense import processes, report, runner
from recipes.commonsense.runner import console
from recipes.commonsense.settings import read_overrides


def parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("preset", help="smoke, smollm2, llama7b, or a folder with <method>.yaml files")
    parser.add_argument("--output_dir", type=Path, required=True, help="one folder for all runs and the report")
    parser.add_argument("--methods", type=lambda text: text.split(","), help="default: all that the preset has")
    return parser


def main(words: list[str] | None = None) -> int:
    if not processes.is_main():
        return 0  # the main process starts each run on all of them
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=lambda text: text.split(","), default=["42"], help="default: 42")
    options, overrides = arguments.parse_known_args(words)
    try:
        if "seed" in read_overrides(overrides):
            raise ValueError("The seed is set by --seeds.")
        runs = [
            runner.plan(
                f"{method}-seed{seed}",
                experiment,
                [*overrides, "--seed", seed],
                options.output_dir / f"{method}-seed{seed}",
            )
            for seed in options.seeds
            for method, experiment in runner.find_experiments(options.preset, options.methods).items()
        ]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = runner.execute(runs)
    console.rule("report")
    report.write_report(options.output_dir)
    if failed:
        console.print(
            f"[bold red]Failed: {', '.join(run.name for run in failed)}[/]. The same command tries them again."
        )
    return int(len(failed) == len(runs))


if __name__ == "__main__":
    sys.exit(main())
