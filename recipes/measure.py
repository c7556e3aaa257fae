"""What a run records beside its losses: where it ran, and what it cost."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

import fira_hf
from fira_hf.distributed import local
from recipes import processes

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")
PEERS = ("diffusers", "fira", "galore-torch", "apollo-torch", "pytorch_optimizer", "bitsandbytes")


def provenance(seed: int, command: list[str], device: torch.device | str | None = None) -> dict[str, Any]:
    """Enough to run it again and to compare timings fairly. Holds no absolute path. device: by default the GPU, if
    there is one."""
    return {
        "versions": {name: found for name in PACKAGES + PEERS if (found := version(name))}
        | {"fira_hf": fira_hf.__version__, "python": platform.python_version()},
        "commit": commit(),
        "device": torch.cuda.get_device_name() if _is_gpu(device) else _cpu(),
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "cpu_threads": torch.get_num_threads(),  # of each process
        "platform": f"{platform.system()}, {platform.machine()}",
        "seed": seed,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(os.path.relpath(word) if os.path.isabs(word) else word for word in command),
    }


def version(name: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """The CPU's name where Linux tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@functools.cache
def commit() -> str | None:
    """The commit of the checkout, "+" where it has changes; None outside a checkout or without git.

    As it was when first asked: what trains for hours asks at its start, for the code that it has loaded.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        tracked = [*git, "status", "--porcelain", "--untracked-files=no"]
        changes = subprocess.run(tracked, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changes.strip() else "")


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state in this process, those in GaLore's projector objects included.

    A tensor that several states share, as the code tables of bitsandbytes, counts once.
    """
    found: dict[int, int] = {}
    _tensor_bytes(list(optimizer.state.values()), found)
    return sum(found.values())


def _tensor_bytes(value: Any, found: dict[int, int]) -> None:
    """Adds the bytes of each tensor in `value` to `found`, by its id."""
    if isinstance(value, torch.Tensor):
        found[id(value)] = local(value).numel() * value.element_size()
    elif isinstance(value, dict):
        for one in value.values():
            _tensor_bytes(one, found)
    elif isinstance(value, (list, tuple)):
        for one in value:
            _tensor_bytes(one, found)
    elif hasattr(value, "__dict__"):
        _tensor_bytes(vars(value), found)


def _is_gpu(device: torch.device | str | None) -> bool:
    return torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Peak bytes so far: allocated on a GPU, or else resident in this process."""
    if _is_gpu(device):
        return {"of": "gpu", "bytes": torch.cuda.max_memory_allocated()}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"of": "process", "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


class StepTime(TrainerCallback, ExportableState):
    """Seconds spent in training steps: without evaluation, checkpoints and start-up; carried over a resume."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    def state(self) -> dict[str, Any]:
        # The number of processes tells which files belong to the checkpoint.
        return {"args": {}, "attributes": {"seconds": self.seconds, "processes": processes.count()}}

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._start
