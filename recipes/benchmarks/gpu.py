"""Everything that only a GPU can tell, by one command: are the kernels right, and what do a step and training cost.

    make gpu
    python -m recipes.benchmarks.gpu --output_dir runs/gpu [--parts kernels,step]

Parts, in this order; the first three end within eight minutes:

    kernels   each against fp64, beside the torch code; one that is wrong makes the exit status 1
    step      ordinary, refresh and average step of LLaMA-60M and 1B beside fused AdamW and the peers; launches
    trainer   tokens per second of the Trainer on LLaMA-60M and 1B
    step-7b   the step of LLaMA-7B
    memory    the peak of a training step of LLaMA-7B, beside the predicted one; with int8 weights in 12 GiB, no more

Each part is a process of its own, since an error in a kernel ends a process's use of the GPU, and writes its file in
the folder after every measurement. The same command continues: what this commit has measured on this device is kept.
What cannot be measured is a row that says why. --size tiny --device cpu tries everything out on a CPU, the kernels in
Triton's interpreter.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from recipes import errors, files
from recipes.benchmarks.gpu_table import GIB, summary

LIMITS = {"kernels": 170, "step": 160, "trainer": 130, "step-7b": 240, "memory": 180}  # seconds
RANKS = {"tiny": 16, "60m": 128, "1b": 256, "7b": 128}
PEERS = ["apollo-torch", "galore-torch", "fira", "pytorch-optimizer", "fira_hf, published"]  # all but one by SVD
OURS = ["floor", "adamw", "muon", "fira_hf-dense", "fira_hf, together", "fira_hf"]
OURS += ["fira_hf, subspace-muon", "fira_hf, muon-4bit"]
# Bytes an element, by those of an element.
STATE = {"adamw": lambda size: 2 * size, "muon": lambda size: size, "fira_hf-dense": lambda size: 8}
Cell = Callable[[], dict[str, Any]]


class Skipped(Exception):
    """Why something is not measured."""


def settings(options: argparse.Namespace, **more: Any) -> argparse.Namespace:
    """What the benchmark scripts read, of a model on the device."""
    one = {"layers": None, "dtype": "bfloat16", "device": options.device, "threads": None, "rank": RANKS[more["size"]]}
    one |= {"vocab_size": 256 if options.tiny else 32000, "sequence_length": 16 if options.tiny else 256}
    return argparse.Namespace(**one | more)


def kernels_part(options: argparse.Namespace) -> dict[str, Cell]:
    from recipes.benchmarks import kernels as checks

    names = list(checks.CHECKS)
    end = time.perf_counter() + 0.8 * LIMITS["kernels"]

    def check(name: str) -> dict[str, Any]:
        kernels = _kernels(options.device)
        function = checks.CHECKS[name][0]
        if not hasattr(kernels, function):
            raise Skipped(f"fira_hf.kernels has no {function}")
        axes = tuple(axis[:1] for axis in checks.TINY) if options.tiny else checks.FULL  # one case: the tests take all
        seconds = (end - time.perf_counter()) / (len(names) - names.index(name))  # what is left, shared evenly
        found = checks.run(name, kernels, axes, options.device, seconds)
        # What was not reached is in the next run, which finds compiled what this one compiled.
        return {"status": "wrong" if found["wrong"] else "in part" if found["left_out"] else "ok", **found}

    return {name: functools.partial(check, name) for name in names}


def _kernels(device: str) -> Any:
    """The module of the kernels, if it is what makes the steps of a weight on the device."""
    if not importlib.util.find_spec("triton"):
        raise Skipped("Triton is not installed")
    from fira_hf import functional
    from fira_hf.matrices import operations
    from recipes.benchmarks.models import pretended

    one = torch.ones(1, device=device)
    found = operations(pretended(one) if device == "cpu" else one)
    if found is functional:
        raise Skipped("fira_hf does not use its kernels here: they need compute capability 8.0, or the interpreter")
    return found


def step_part(options: argparse.Namespace) -> dict[str, Cell]:
    sizes = [("tiny", "bfloat16", 4.0)] if options.tiny else [("60m", "float32", 6.0), ("60m", "bfloat16", 6.0)]
    return _steps(options, sizes if options.tiny else [*sizes, ("1b", "bfloat16", 25.0)])


def step_7b_part(options: argparse.Namespace) -> dict[str, Cell]:
    if options.tiny:
        return {"7b": functools.partial(_skip, "--size tiny")}
    return _steps(options, [("7b", "bfloat16", 30.0)])


def _skip(reason: str) -> dict[str, Any]:
    raise Skipped(reason)


def _steps(options: argparse.Namespace, sizes: list[tuple[str, str, float]]) -> dict[str, Cell]:
    """Steps, launches and peers of each size, dtype and number of seconds that its steps may take; peers last."""
    cells: dict[str, Cell] = {}
    for size, dtype, seconds in sizes:
        one = {"size": size, "dtype": dtype}
        cells[f"{size} {dtype}"] = functools.partial(_step, options, seconds, **one)
        for name in ("adamw", "fira_hf, together", "fira_hf", "fira_hf, subspace-muon"):
            cells[f"{size} {dtype}, launches of {name}"] = functools.partial(_launches, options, name, **one)
    for size, dtype, seconds in sizes:
        if dtype == "bfloat16":
            cells[f"{size} {dtype}, peers"] = functools.partial(_peers, options, seconds, size=size, dtype=dtype)
    return cells


def _step(options: argparse.Namespace, seconds: float, **one: str) -> dict[str, Any]:
    """Milliseconds of the methods side by side, as many layers as fit; as many steps as the seconds allow."""
    from recipes.benchmarks import step

    layers = _fitting(options, one["size"], one["dtype"], OURS)
    told = settings(options, **one, layers=layers, gap=200, methods=OURS, steps=2)
    probe = step.run(told)  # compiles, and tells how long a step takes
    a_turn = sum(row.get("ordinary", 0.0) for row in probe.values()) / 1000
    told.steps = 3 if options.tiny else max(11, min(40, int(seconds / (2 * max(a_turn, 1e-6)))))
    return {"layers": layers, "rank": told.rank, "steps": told.steps, "milliseconds": step.run(told)}


def _fitting(options: argparse.Namespace, size: str, dtype: str, methods: list[str]) -> int:
    """Layers of the model of which every method has its own weights, gradients and state on the card."""
    from recipes.benchmarks.models import SIZES

    shape, element = SIZES[size], getattr(torch, dtype).itemsize
    if options.device == "cpu":
        return shape.layers
    elements = 4 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate
    each = sum(2 * element + STATE.get(name, lambda size: 2)(element) for name in methods)
    layers = int(0.8 * torch.cuda.mem_get_info()[0] / (elements * each))
    if not layers:
        raise Skipped(f"one layer of {size} does not fit {len(methods)} times on this card")
    return min(shape.layers, layers)


def _peers(options: argparse.Namespace, seconds: float, **one: str) -> dict[str, Any]:
    """Milliseconds of one layer; a peer's SVD of a large matrix takes seconds, so few steps, one method at a time."""
    from recipes.benchmarks import step

    start = time.perf_counter()
    told = settings(options, **one, layers=1, gap=200, methods=OURS, steps=3 if options.tiny else 11)
    found = step.run(told)
    told.steps = 2
    for name in PEERS:
        if time.perf_counter() - start > seconds:
            found[name] = {"error": f"not measured: the {seconds:.0f} s for the peers had passed"}
            continue
        told.methods = [name]
        found |= step.run(told)
    return {"layers": 1, "rank": told.rank, "milliseconds": found}


def _launches(options: argparse.Namespace, name: str, **one: str) -> dict[str, Any]:
    """What a step starts, and how much of its time the device computes; an ordinary step but for the default."""
    from torch.profiler import ProfilerActivity, profile

    from recipes.benchmarks import step
    from recipes.benchmarks.models import SIZES, matrices, pretended
    from recipes.benchmarks.optimizers import build

    layers = 1 if options.tiny else _fitting(options, one["size"], one["dtype"], [name])
    weights = matrices(SIZES[one["size"]], layers, getattr(torch, one["dtype"]), options.device)
    kind, group = step.CHOICES[name]
    if options.device == "cpu" and kind == "fira_hf":
        weights = [pretended(p) for p in weights]
    gap = 10 if name == step.DEFAULT else 10**6
    optimizer = build(kind, weights, 1e-3, RANKS[one["size"]], gap, **group)
    for _ in range(2 if options.tiny else 12):  # a whole interval: everything is compiled
        optimizer.step()
    times = [1000 * step.timed(optimizer.step) for _ in range(2 if options.tiny else 10)]
    found = {"layers": layers, "milliseconds": statistics.median(times), "all": times}
    if options.device == "cpu":
        return {**found, "launches": None, "reason": "launches are counted on a GPU"}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step.timed(optimizer.step)
    found |= count(profiler.profiler.kineto_results.events())
    if not found["launches"]:
        return {**found, "launches": None, "reason": "the profiler sees nothing of this device"}
    # The profiler slows the host down, not the device: what the device waits for is of steps that were not watched.
    return {**found, "waits": max(0.0, 1 - found["device_milliseconds"] / found["milliseconds"])}


def count(events: Iterable[Any]) -> dict[str, Any]:
    """Kernels and copies of a profile, milliseconds that they take, and that the host takes to start them; and of the
    ten that take the device longest, the name, how many there are, and the milliseconds of all."""
    launches, copies, on_device, on_host = 0, 0, 0, 0
    each: dict[str, list[int]] = {}
    for event in events:
        if event.is_user_annotation():  # torch's own, around the step: on the device, too
            continue
        if event.device_type() == torch.autograd.DeviceType.CUDA:
            is_copy = event.name().startswith(("Memcpy", "Memset"))
            launches, copies = launches + (not is_copy), copies + is_copy
            on_device += event.duration_ns()
            each.setdefault(event.name(), []).append(event.duration_ns())
        elif event.name().startswith(("cudaLaunch", "cuLaunch", "cudaMemcpy", "cudaMemset")):
            on_host += event.duration_ns()
    milliseconds = {"device_milliseconds": on_device / 1e6, "starting_milliseconds": on_host / 1e6}
    longest = sorted(each.items(), key=lambda item: -sum(item[1]))[:10]
    rows = [{"name": name, "count": len(times), "milliseconds": sum(times) / 1e6} for name, times in longest]
    return {"launches": launches, "copies": copies, **milliseconds, "longest": rows}


def trainer_part(options: argparse.Namespace) -> dict[str, Cell]:
    sizes = [("tiny", "float32")] if options.tiny else [("60m", "float32"), ("1b", "bfloat16")]
    return {f"{size} {dtype}": functools.partial(_trainer, options, size, dtype) for size, dtype in sizes}


def _trainer(options: argparse.Namespace, size: str, dtype: str) -> dict[str, Any]:
    """The methods turn by turn, at least once, and up to three times while there is time."""
    from recipes.benchmarks import train

    told = settings(options, size=size, dtype=dtype, gap=200, batch_size=2 if options.tiny else 8, repeats=1)
    told.steps, told.max_grad_norm, told.gradient_checkpointing = 2 if options.tiny else 12, 0.0, False
    told.methods = ["adamw-full", "fira-full", "fira-layerwise"]
    start, turns = time.perf_counter(), []
    while not turns or (len(turns) < 3 and time.perf_counter() - start < 0.2 * LIMITS["trainer"] and not options.tiny):
        turns.append(train.run(told))
    found = turns[0]
    for name, row in found.items():
        if "error" not in row:
            row["seconds_a_step"] = [second for turn in turns for second in turn[name].get("seconds_a_step", [])]
            tokens = told.batch_size * told.sequence_length
            row["tokens_per_second"] = tokens / statistics.median(row["seconds_a_step"])
    return {"batch_size": told.batch_size, "sequence_length": told.sequence_length, "methods": found}


def memory_part(options: argparse.Namespace) -> dict[str, Cell]:
    cells = {name: functools.partial(_memory, options, name) for name in ("fira", "fira_layerwise")}
    int8: dict[str, Any] = {"dtype": "int8", "rank": 256, "state_dtype": "bfloat16", "card": 12 * GIB}
    return {**cells, "fira_layerwise, int8": functools.partial(_memory, options, "fira_layerwise", **int8)}


def _memory(
    options: argparse.Namespace,
    method: str,
    dtype: str = "bfloat16",
    rank: int = 16,
    state_dtype: str = "float32",
    card: int | None = None,
) -> dict[str, Any]:
    """Bytes at the peak of a step of 1 x 256 tokens, checkpointed, by default at the published rank of fine-tuning.
    `card`: bytes that PyTorch may take, as if there were no more."""
    from fira_hf import FiraConfig
    from fira_hf.memory import predict_memory
    from recipes.benchmarks import layerwise, train

    size = "tiny" if options.tiny else "7b"
    told = settings(options, size=size, batch_size=1, dtype=dtype)
    told.rank = 16 if options.tiny else rank
    batch = {"batch_size": told.batch_size, "sequence_length": told.sequence_length, "gradient_checkpointing": True}
    config = FiraConfig(told.rank, state_dtype=state_dtype)
    predicted = predict_memory(train.model_config(told), [method], config, dtype=dtype, **batch)[method].total
    if options.device != "cpu":
        free = torch.cuda.mem_get_info()[0]
        if predicted + GIB > free:
            raise Skipped(f"{predicted / GIB:.1f} GiB are predicted, and {free / GIB:.1f} GiB are free on this card")
    row = layerwise.run_once(method, told, state_dtype, card)
    beyond = max(row["first_peak_bytes"] - row["state_bytes"], row["peak_bytes"])
    measured = row["weight_bytes"] + row["state_bytes"] + beyond
    return {**row, "rank": told.rank, "predicted_bytes": predicted, "measured_bytes": measured}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Cell]]] = {
    "kernels": kernels_part,
    "step": step_part,
    "trainer": trainer_part,
    "step-7b": step_7b_part,
    "memory": memory_part,
}


def run_part(part: str, options: argparse.Namespace, words: list[str]) -> None:
    """Measures what the part's file does not have yet, and writes the file after each."""
    from recipes import measure, rundir

    path = options.output_dir / f"{part}.json"
    provenance = measure.provenance(0, ["python", "-m", "recipes.benchmarks.gpu", *words])
    provenance["triton"] = measure.version("triton")
    cells = (files.read_json(path) or {"cells": {}})["cells"]
    cells.pop("the process", None)
    for name, cell in PARTS[part](options).items():
        if is_kept(cells.get(name), provenance, options):
            print(f"{part}, {name}: measured before")
            continue
        print(f"{part}, {name}", flush=True)
        start = time.perf_counter()
        try:
            row = {"status": "ok", **cell()}
        except (Skipped, ImportError) as error:
            row = {"status": "skipped", "reason": rundir.without_paths(errors.text(error))}
        except Exception as error:
            row = {"status": "failed", "error": rundir.without_paths(errors.named(error))}
        row |= {"seconds": time.perf_counter() - start, "size": options.size, "provenance": provenance}
        cells[name] = row
        files.write_json(path, {"part": part, "cells": cells})
        gc.collect()
        if options.device != "cpu":
            torch.cuda.empty_cache()


def is_kept(row: dict[str, Any] | None, provenance: dict[str, Any], options: argparse.Namespace) -> bool:
    """Whether this is a measurement of the same code on the same device."""
    if row is None or row["status"] != "ok" or row["size"] != options.size:
        return False
    return all(row["provenance"][key] == provenance[key] for key in ("commit", "device", "versions", "triton"))


def run_in_process(part: str, options: argparse.Namespace, words: list[str]) -> None:
    """The part in a process of its own, ended when its time has passed; how it died is a row, too."""
    # One device: with several the Trainer splits its batches.
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": device, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "recipes.benchmarks.gpu", *words, "--parts", part, "--in_process"]
    try:
        code = subprocess.run(command, env=environment, timeout=LIMITS[part], check=False).returncode
        ending = None if code in (0, 1) else f"ended by signal {-code}" if code < 0 else f"ended with status {code}"
    except subprocess.TimeoutExpired:
        ending = f"ended after the {LIMITS[part]} s of this part"
    if ending is not None:
        path = options.output_dir / f"{part}.json"
        found = files.read_json(path) or {"part": part, "cells": {}}
        found["cells"]["the process"] = {"status": "failed", "error": ending}
        files.write_json(path, found)


def main(words: list[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help="a,b,c")
    parser.add_argument("--size", choices=["full", "tiny"], default="full")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--in_process", action="store_true", help="the parts in this process, without time limits")
    options = parser.parse_args(words)
    options.tiny = options.size == "tiny"
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"there is no part {part!r}; there are {', '.join(PARTS)}")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu is for --size tiny")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device: run this on a machine with a GPU, or try it out by --size tiny --device cpu.")
        return 2
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
    for part in options.parts:
        (run_part if options.in_process else run_in_process)(part, options, words)
    found = {
        part: (files.read_json(options.output_dir / f"{part}.json") or {"cells": {}})["cells"]
        for part in options.parts
    }
    if not options.in_process:
        print("\n".join(line for part, cells in found.items() for line in summary(part, cells)))
    is_bad = any(row["status"] in ("wrong", "failed") for cells in found.values() for row in cells.values())
    return 1 if is_bad else 0


if __name__ == "__main__":
    sys.exit(main())
