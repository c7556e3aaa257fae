"""What an optimizer step sends under FSDP2, and how replicas share a refresh: several processes on one CPU, gloo.

    python -m recipes.benchmarks.distributed bytes [--size 60m] [--layers 2] [--processes 2,3,4] [--output FILE]
    python -m recipes.benchmarks.distributed refresh [--size 60m] [--processes 1,2,4] [--timed 1,2] [--output FILE]

`bytes` counts the collectives of one `step()` on matrices that `fully_shard` has split; those of FSDP2 itself, which
gathers weights and reduces gradients for every optimizer alike, are not in it. `refresh` finds all bases of matrices
that every process holds, as under DDP: what each process does is counted, and timed for --timed numbers of processes
(no more than there are cores). Starts its processes itself, of one thread each. Writes JSON with --output.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.multiprocessing import spawn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import fira_hf.refresh
from fira_hf import FiraAdamW
from fira_hf.matrices import matrices_of
from recipes import errors, files, measure
from recipes.benchmarks.models import SIZES, matrices
from recipes.benchmarks.optimizers import build
from recipes.benchmarks.options import write

COLLECTIVES = ("gather", "reduce", "scatter", "broadcast", "alltoall")  # beside waiting and wrapping
SHARDED = ("fira_hf", "fira", "galore-torch", "adamw")
PROJECTIONS: dict[str, dict[str, Any]] = {
    "power": {},
    "svd": {"projection": "svd", "moments": "kept"},  # as published
}


class Collectives(TorchDispatchMode):
    """Counts the collectives that run, and the bytes of the tensors that they gather, scatter, send or add up.

    The tensor is the whole one, of which a process may hold a part. That of an all-reduce counts twice, as that of the
    reduce-scatter and the all-gather that it consists of. So with N processes each of them sends (N - 1) / N of the
    bytes (`sent`), by the algorithms that send least.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back with the operations on parts and the collectives that it needs
        out = func(*args, **(kwargs or {}))
        name = func._opname.replace("_", "")
        if "c10d" in func.namespace and any(word in name for word in COLLECTIVES):
            tensors = ([x for x in tree_leaves(side) if isinstance(x, torch.Tensor)] for side in (*args, out))
            whole = max(sum(x.numel() * x.element_size() for x in side) for side in tensors)
            self.calls += 1
            self.bytes += 2 * whole if "allreduce" in name else whole
        return out

    @property
    def sent(self) -> int:
        return self.bytes * (dist.get_world_size() - 1) // dist.get_world_size()


def launch(processes: int, task: Callable[..., Any], *arguments: Any) -> Any:
    """What `task(*arguments)`, run by so many processes together, returns in the first; it must fit into JSON."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_run, (processes, folder, task, arguments), nprocs=processes)
        return files.read_json(Path(folder) / "found.json")


def _run(rank: int, processes: int, folder: str, task: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    found = task(*arguments)
    if rank == 0:
        files.write_json(Path(folder) / "found.json", found)
    dist.barrier()  # none goes while another still talks to it
    dist.destroy_process_group()


def shard(weights: list[nn.Parameter]) -> list[nn.Parameter]:
    """The weights as `fully_shard` splits them over all processes, with their gradients."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = nn.Sequential(*(nn.Linear(*p.shape[::-1], bias=False, device="meta") for p in weights))
    for layer, p in zip(model, weights, strict=True):
        layer.weight = p
    grads = [p.grad for p in weights]
    fully_shard(model, mesh=mesh)
    for layer, grad in zip(model, grads, strict=True):
        layer.weight.grad = distribute_tensor(grad, mesh, [Shard(0)])
    return [layer.weight for layer in model]


def count_sharded(name: str, weights: list[nn.Parameter], rank: int) -> dict[str, Any]:
    """Collectives and matrix products of an ordinary step, and of one with a refresh of all bases; bytes of state in
    this process."""
    settings = {"refresh": "together"} if name == "fira_hf" else {}
    optimizer = build(name, shard(weights), 1e-3, rank, 2, **settings)
    optimizer.step()
    found: dict[str, Any] = {}
    for kind in ("ordinary", "refresh"):
        with Collectives() as collectives, FlopCounterMode(display=False) as products:
            optimizer.step()
        found[kind] = {"calls": collectives.calls, "bytes": collectives.bytes, "sent": collectives.sent}
        found[kind]["flops"] = products.get_total_flops()
    return found | {"state_bytes": measure.state_bytes(optimizer)}


def bytes_of_all(size: str, layers: int, rank: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name in SHARDED:
        weights = matrices(SIZES[size], layers, torch.float32, "cpu")
        try:
            found[name] = count_sharded(name, weights, rank)
        except Exception as error:
            found[name] = {"error": errors.named(error)}
    return found


def share_refresh(
    weights: list[nn.Parameter], rank: int, settings: dict[str, Any], repeats: int
) -> dict[str, list[Any]]:
    """Refreshes all bases again and again. Of each process: how many bases it found, the elements of their matrices,
    and the floating-point operations of its matrix products in one refresh; and the seconds of each repeat."""
    group = {"params": weights, "rank": rank, "update_proj_gap": 1, "refresh": "together", **settings}
    optimizer = FiraAdamW([group])
    optimizer.process_group = dist.group.WORLD if dist.get_world_size() > 1 else None
    optimizer.step()
    group = optimizer.param_groups[0]
    due = [matrix for p in weights for matrix in matrices_of(p, optimizer.state, group)]

    @torch.no_grad()
    def refresh() -> None:
        for matrix in due:
            matrix.refresh_in = 0
        fira_hf.refresh.refresh(due, group, {}, optimizer.process_group)

    found: list[torch.Tensor] = []
    original = fira_hf.refresh.find_bases

    def watched(grads: list[torch.Tensor], *others: Any) -> Any:
        found.extend(grads)
        return original(grads, *others)

    with mock.patch.object(fira_hf.refresh, "find_bases", watched), FlopCounterMode(display=False) as products:
        refresh()
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        refresh()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    elements = sum(grad.numel() for grad in found)
    own = {"bases": len(found), "elements": elements, "flops": products.get_total_flops()}
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, own)
    return {key: [one[key] for one in of_all] for key in own} | {"seconds": seconds}


def refresh_of_all(size: str, layers: int | None, rank: int, repeats: int) -> dict[str, dict[str, list[Any]]]:
    weights = matrices(SIZES[size], layers, torch.float32, "cpu")
    return {name: share_refresh(weights, rank, settings, repeats) for name, settings in PROJECTIONS.items()}


def run_bytes(options: argparse.Namespace) -> list[dict[str, Any]]:
    rank = options.rank or SIZES[options.size].rank
    weights = matrices(SIZES[options.size], options.layers, torch.float32, "cpu")
    shared = {"matrices": len(weights), "rank": rank, "gradient_bytes": sum(4 * p.numel() for p in weights)}
    rows = []
    for processes in options.processes:
        found = launch(processes, bytes_of_all, options.size, options.layers, rank)
        rows += [{"name": name, "processes": processes, **shared, **row} for name, row in found.items()]
    return rows


def run_refresh(options: argparse.Namespace) -> list[dict[str, Any]]:
    rank = options.rank or SIZES[options.size].rank
    rows = []
    for processes in options.processes:
        repeats = options.repeats if processes in options.timed else 0
        found = launch(processes, refresh_of_all, options.size, options.layers, rank, repeats)
        for projection, row in found.items():
            median = statistics.median(row["seconds"]) if repeats else None
            rows.append({"projection": projection, "processes": processes, "rank": rank, "median": median, **row})
    return rows


def print_bytes(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table("bytes that each process sends", "processes", "calls", "ordinary", "refresh", "state")
    for row in rows:
        if "error" in row:
            table.add_row(row["name"], str(row["processes"]), row["error"][:80])
            continue
        cells = [f"{row['ordinary']['calls']}, {row['refresh']['calls']}"]
        cells += [f"{row[kind]['sent']:,}" for kind in ("ordinary", "refresh")]
        table.add_row(row["name"], str(row["processes"]), *cells, f"{row['state_bytes']:,}")
    console.print(table)


def print_refresh(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table("refresh of all bases", "processes", "ms", "bases found by each", "MFLOP of products in each")
    for row in rows:
        ms = "-" if row["median"] is None else f"{1000 * row['median']:.0f}"
        flops = ", ".join(f"{flops / 1e6:,.0f}" for flops in row["flops"])
        table.add_row(row["projection"], str(row["processes"]), ms, ", ".join(map(str, row["bases"])), flops)
    console.print(table)


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    one, two = commands.add_parser("bytes"), commands.add_parser("refresh")
    one.add_argument("--layers", type=int, default=2)
    two.add_argument("--layers", type=int, help="default: all of the model's")
    one.add_argument("--processes", type=_numbers, default=[2, 3, 4])
    two.add_argument("--processes", type=_numbers, default=[1, 2, 4])
    two.add_argument("--timed", type=_numbers, default=[1, 2], help="those of --processes that are timed")
    two.add_argument("--repeats", type=int, default=5)
    for command in (one, two):
        command.add_argument("--size", choices=list(SIZES), default="60m")
        command.add_argument("--rank", type=int, help="default: the published one")
        command.add_argument("--output", type=Path)
    options = parser.parse_args(words)
    torch.set_num_threads(1)  # as in the processes that it starts
    if options.what == "bytes":
        rows = run_bytes(options)
        print_bytes(rows, Console())
    else:
        rows = run_refresh(options)
        print_refresh(rows, Console())
    write("distributed", words, options, what=options.what, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
