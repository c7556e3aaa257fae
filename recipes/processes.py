"""Several processes, as `accelerate launch` and torchrun start them. Nothing here imports torch."""

from __future__ import annotations

import os
import sys


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes the files and says what happens: the first of all, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def is_first_of_node() -> bool:
    """Whether this process is the one that reports an error which every process of its node meets."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def python(package: str) -> list[str]:
    """The command that starts a module of the package in as many processes as this one was started in.

    They are launched anew, rather than each starting its own: one that fails then ends the others of its run, and
    those that wait for the next run go on.

    Raises ValueError on several nodes, which would have to launch together.
    """
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return [sys.executable]
    processes, nodes = os.environ["LOCAL_WORLD_SIZE"], os.environ["GROUP_WORLD_SIZE"]
    if nodes != "1":
        raise ValueError(
            f"compare and search run on one node, but were launched on {nodes}: launch {package}.train for each "
            f"experiment instead, then {package}.report on the folder above their output_dir."
        )
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
