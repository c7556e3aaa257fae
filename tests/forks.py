"""Processes for tests of what a process does, not of how it begins: forks of one that has imported torch, transformers
and datasets, which takes each new process seven seconds. What is ours each of them imports anew."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import sys
import time
import traceback
from multiprocessing import forkserver
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

from torch.multiprocessing import ProcessContext, ProcessExitedException, start_processes

OTHERS = ["torch.distributed.fsdp", "torch.distributed.checkpoint", "transformers.trainer", "peft", "datasets"]
OTHERS += ["transformers.models.llama.modeling_llama"]


def _begin(rank: int, words: list[str], folder: Path, logs: Path, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    if "WORLD_SIZE" in environment:
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    for stream, name in ((sys.stdout, "out.txt"), (sys.stderr, "err.txt")):
        with (logs / name).open("ab") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.chdir(folder)
    as_module = words[0] == "-m"
    sys.argv = words = words[as_module:]
    try:
        if as_module:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def start(words: list[str], folder: Path, logs: Path, processes: int = 1, **environment: str) -> ProcessContext:
    """`python *words` (a file or -m and a module) in a folder; what it says is added to out.txt and err.txt in `logs`.

    Its environment is this process's and the given one; of several processes each knows its RANK.
    """
    multiprocessing.set_forkserver_preload(OTHERS)
    # No fork could use a device that the server had seen; what forks do is done on the CPU.
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
        forkserver.ensure_running()
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
    arguments = (words, folder, logs, dict(environment))
    return start_processes(_begin, arguments, processes, join=False, start_method="forkserver")


def wait(started: ProcessContext, seconds: float = 300) -> None:
    """ProcessExitedException if one ends with another status than 0, which ends the others."""
    deadline = time.monotonic() + seconds
    while not started.join(max(0, deadline - time.monotonic())):
        if time.monotonic() > deadline:
            for process in started.processes:
                process.kill()


def run(words: list[str], folder: Path, logs: Path, **environment: str) -> CompletedProcess:
    """Waits for it: its exit status, and what it said."""
    started = start(words, folder, logs, **environment)
    with contextlib.suppress(ProcessExitedException):
        wait(started)
    out, err = ((logs / name).read_text(encoding="utf-8") for name in ("out.txt", "err.txt"))
    return CompletedProcess(words, started.processes[0].exitcode, out, err)
