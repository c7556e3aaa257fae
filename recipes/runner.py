"""One run as processes of its own, so that the others survive its failure. Nothing here imports torch."""

from __future__ import annotations

import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from recipes import files, processes, rundir
from recipes.settings import Recipe, load_settings, read_overrides

console = Console(soft_wrap=True)
LOG = "log.txt"  # in a run's folder, what it prints


@dataclass
class Run:
    name: str
    command: list[str]
    settings: dict[str, Any]
    folder: Path


def find_experiments(recipe: Recipe, preset: str, methods: list[str] | None) -> dict[str, Path]:
    """The experiments of a preset (a folder's path, or its name under experiments/), in the order of the methods."""
    folder = Path(preset) if Path(preset).is_dir() else recipe.experiments / preset
    found = {method: folder / f"{method}.yaml" for method in recipe.methods if (folder / f"{method}.yaml").is_file()}
    if not found:
        raise ValueError(
            f"There is no preset {preset!r}; there are {recipe.presets}, or name a folder with <method>.yaml files."
        )
    for method in methods or []:
        if method not in found:
            raise ValueError(f"Preset {preset} has no method {method!r}; it has {', '.join(found)}.")
    return {method: path for method, path in found.items() if methods is None or method in methods}


def plan(recipe: Recipe, name: str, experiment: Path, words: list[str], folder: Path, program: str = "train") -> Run:
    """One run, checked against what its folder holds: ValueError if that is of other settings."""
    words = [*words, "--output_dir", str(folder)]
    settings = load_settings(recipe, experiment, read_overrides(words), program)
    command = [*processes.python(recipe.package), "-m", f"{recipe.package}.{program}", str(experiment), *words]
    rundir.is_finished(folder, settings)
    return Run(name, command, settings, folder)


def execute(runs: list[Run], parallel: int = 1) -> list[Run]:
    """Run what is not finished, `parallel` at a time; returns the failed ones. Each leaves a result.json.

    Where several run at once, what each prints goes into its folder.
    """

    def succeeds(number: int, run: Run) -> bool:
        title = f"{number} of {len(runs)}: {run.name}"
        if parallel == 1:
            console.rule(title)
        try:
            is_finished = rundir.is_finished(run.folder, run.settings)  # others may have been at work since the plan
        except ValueError as error:
            console.print(f"[bold red]{run.name} failed[/]: {escape(str(error))}")
            return False
        if is_finished:
            console.print(f"complete in {run.folder}" if parallel == 1 else f"{title} is complete in {run.folder}")
            return True
        if parallel > 1:
            console.print(f"{title} begins")
        log = run.folder / LOG if parallel > 1 else None
        if _execute(run, log):
            if parallel > 1:
                console.print(f"{title} is complete")
            return True
        error = escape(files.read_json(run.folder / rundir.RESULT)["error"])  # brackets are not for rich
        console.print(f"[bold red]{run.name} failed[/]: {error}")
        return False

    with ThreadPoolExecutor(parallel) as pool:
        succeeded = list(pool.map(succeeds, range(1, len(runs) + 1), runs))
    return [run for run, is_done in zip(runs, succeeded, strict=True) if not is_done]


def _execute(run: Run, log: Path | None) -> bool:
    result = run.folder / rundir.RESULT
    result.unlink(missing_ok=True)  # that of an earlier, failed attempt
    if log is None:
        code = subprocess.run(run.command, check=False).returncode
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as file:
            # Progress bars are for a terminal.
            command = [*run.command, "--disable_tqdm", "true"]
            environment = os.environ | {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
            code = subprocess.run(
                command, check=False, env=environment, stdout=file, stderr=subprocess.STDOUT
            ).returncode
    if not result.is_file():
        rundir.write_failure(run.folder, run.settings, _explain(code, log))
    return code == 0


def _explain(code: int, log: Path | None) -> str:
    if code == -signal.SIGKILL:
        return "killed by the system (signal 9), most likely for want of memory"
    where = "the output above" if log is None else LOG
    return f"ended by signal {-code}" if code < 0 else f"ended with exit status {code}; its error is in {where}"
