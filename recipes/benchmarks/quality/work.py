"""Runs that several processes share: each takes the next one that is wanted and that no other holds."""

from __future__ import annotations

import fcntl
import multiprocessing
import queue
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from recipes import errors, files, measure
from recipes.benchmarks.quality.plan import Plan, Run
from recipes.benchmarks.quality.train import DENSE_LR, LENGTH, train

WAIT = 2.0  # seconds, where what is wanted next depends on a run that another process holds
# What a worker tells: ("step", run's name, steps done, of how many, training loss), ("done", name, loss, seconds) or
# ("failed", name, error).
Tell = Callable[[tuple[Any, ...]], None]


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether this process holds the file until the end of the block; the system gives up what a killed one held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)


def work(plan: Plan, command: list[str], tell: Tell, device: str = "cpu") -> int:
    """Run what the plan wants until nothing is left; returns how many runs failed here.

    What fails is not tried again by this command, and the others go on.
    """
    measure.commit()
    failed: set[Run] = set()
    while True:
        wanted = [run for run in plan.wanted() if run not in failed]
        if not wanted:
            return len(failed)
        for run in wanted:
            path = plan.folder.path / f"{run.name}.json"
            with claim(path.with_suffix(".claim")) as held:
                if not held:
                    continue
                if path.is_file():  # finished by another process since
                    break
                try:
                    execute(plan, run, path, command, tell, device)
                except Exception as error:
                    failed.add(run)
                    traceback.print_exc()
                    tell(("failed", run.name, errors.named(error)))
                break  # and look anew at what is wanted
        else:
            time.sleep(WAIT)


def execute(plan: Plan, run: Run, path: Path, command: list[str], tell: Tell, device: str) -> None:
    method, regime, data = plan.folder.methods[run.method], run.regime, plan.folder.data

    def progress(step: int, loss: float) -> None:
        tell(("step", run.name, step, regime.steps, loss))

    found = train(method, run.lr, regime, run.seed, data, progress=progress, device=device)
    about = {
        "method": run.method,
        "label": method["label"],
        "settings": {key: value for key, value in method.items() if key != "label"},
        "size": regime.size,
        "batch": regime.batch,
        "steps": regime.steps,
        "lr": run.lr,
        "seed": run.seed,
        "data": {"name": data.name, "digest": data.digest},
        "sequence_length": LENGTH,
        "dense_lr": DENSE_LR,
    }
    files.write_json(path, about | found | {"provenance": measure.provenance(run.seed, command, device)})
    tell(("done", run.name, found["loss"], found["seconds"]))


def share(plan: Plan, workers: int, command: list[str], console: Console, device: str = "cpu") -> int:
    """`work` in so many processes of one thread each, and how far they are; returns how many runs failed."""
    # A fork of this process would inherit torch's threads; of one that has only imported torch, it begins at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    told = context.Queue()
    processes = [
        context.Process(target=_worker, args=(plan, command, told, device), daemon=True, name=f"worker {number}")
        for number in range(workers)
    ]
    failed, tasks = 0, {}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
    for process in processes:
        process.start()
    try:
        with Progress(*columns, console=console) as bars:
            while any(process.is_alive() for process in processes) or not told.empty():
                try:
                    what, name, *rest = told.get(timeout=0.5)
                except queue.Empty:
                    continue
                if name not in tasks:
                    tasks[name] = bars.add_task(name, total=plan.regime.steps, loss="")
                if what == "step":
                    step, steps, loss = rest
                    bars.update(tasks[name], completed=step, loss=f"{loss:.3f}")
                    continue
                bars.remove_task(tasks.pop(name))
                failed += what == "failed"
                console.print(describe(what, name, *rest))
        if any(process.exitcode for process in processes):
            raise RuntimeError("A worker ended before its work; what it says is above.")
    finally:
        for process in processes:
            process.terminate()
    return failed


def describe(what: str, name: str, *rest: Any) -> str:
    if what == "failed":
        return f"[bold red]{name} failed[/]: {escape(rest[0])}"
    loss, seconds = rest
    return f"{name}: {'diverged' if loss is None else f'{loss:.4f}'} in {seconds:.0f} s"


def _worker(plan: Plan, command: list[str], told: Any, device: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command that started this one ends it
    torch.set_num_threads(1)

    def tell(what: tuple[Any, ...]) -> None:
        if not multiprocessing.parent_process().is_alive():
            raise SystemExit("The command that started this worker has been killed.")
        told.put(what)

    work(plan, command, tell, device)
