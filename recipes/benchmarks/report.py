"""Write the tables and pictures of the pages in docs/ from the JSON files in docs/benchmarks/.

    python -m recipes.benchmarks.report [docs/benchmarks]

The words of a page are written by hand. Between `<!-- table: FILE -->` and `<!-- end -->` this puts the table of
docs/benchmarks/FILE.json with its provenance; quality.json also becomes three pictures. A quality.json is gathered
from the runs of `recipes.benchmarks.quality` by --gather FOLDER.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from recipes import errors, files, report
from recipes.benchmarks.gpu_table import GIB
from recipes.benchmarks.quality import plots
from recipes.benchmarks.quality import report as quality
from recipes.benchmarks.quality.train import POINTS
from recipes.benchmarks.ranks import KINDS, SHOWN

SPEEDS = ["tokens/s", "of AdamW", "peak, GiB", "predicted peak, GiB"]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(report.markdown([header, *rows]))


def step_table(content: dict[str, Any]) -> str:
    found = content["milliseconds"]
    base = {name: found[name]["ordinary"] for name in ("adamw", "floor") if name in found}
    rows = []
    for name, row in found.items():
        if "error" in row:
            rows.append([name, f"fails: {row['error'][:80]}", *[""] * 6])
            continue
        ratios = [f"{row['ordinary'] / base[other]:.2f}" if other in base else "" for other in ("adamw", "floor")]
        times = [f"{row[key]:,.0f}" if key in row else "" for key in ("refresh", "amortised", "first", "longest")]
        rows.append([name, f"{row['ordinary']:,.1f}", *ratios, *times])
    header = [
        "ms",
        "ordinary step",
        "of fused AdamW",
        "of the floor",
        "refresh step",
        "average",
        "first step",
        "longest",
    ]
    return markdown(header, rows)


def memory_table(content: dict[str, Any]) -> str:
    rows = []
    for name, row in content["bytes"].items():
        if "error" in row:
            rows.append([name, f"fails: {row['error'][:80]}", "", ""])
        else:
            mib = [f"{row[key] / 2**20:,.1f}" for key in ("state_bytes", "peak_bytes")]
            rows.append([name, *mib, f"{row['peak_low_rank_gradients']:.2f}"])
    return markdown(["", "state, MiB", "peak of a step beyond it, MiB", "the same in low-rank gradients"], rows)


def basis_table(content: dict[str, Any]) -> str:
    if content["what"] == "time":
        rows = [
            [
                f"{row['long']} x {row['short']}, rank {row['rank']}",
                f"{1000 * row['power']:,.1f}",
                f"{1000 * row['svd']:,.0f}",
                f"{row['ratio']:,.0f}",
            ]
            for row in content["rows"]
        ]
        return markdown(["shape", "power iteration, ms", "torch.linalg.svd, ms", "times faster"], rows)
    by_step = defaultdict(list)
    for row in content["rows"]:
        by_step[row["step"]].append(row)
    rows = []
    for step, here in by_step.items():
        before = f"{statistics.mean(row['before'] for row in here):.1%}" if step else ""
        after = [row["after"] for row in here]
        rows.append([str(step), before, f"{statistics.mean(after):.1%}", f"{min(after):.1%}"])
    return markdown(["step", "just before the refresh", "after it", "after it, the worst matrix"], rows)


def ranks_table(content: dict[str, Any]) -> str:
    runs = sorted(content["runs"], key=lambda run: (run["seed"], run["history"][1]))
    losses, energy = [], []
    for run in runs:
        every = int(run["regime"].rpartition("-s")[2]) // POINTS
        at = {every * (index + 1): loss for index, loss in enumerate(run["history"])}
        sizes = [f"{run[key] / 1e6:.3f}" for key in ("mean_bytes", "peak_bytes")]
        cells = [f"{at[step]:.3f}" if step in at else "" for step in (50, 100, 200, 400)]
        losses.append([run["name"], str(run["seed"]), *sizes, *cells])
    shown = next(run for run in content["runs"] if "shares" in run)
    steps = [step for step in ("10", "50", "100") if step in shown["shares"]]
    for place, kind in enumerate(KINDS):
        cells = []
        for rank in (1, 8, 16):
            for step in steps:
                of = [shares[SHOWN.index(rank)] for shares in shown["shares"][step][place :: len(KINDS)]]
                cells.append(f"{statistics.mean(of):.1%}")
        energy.append([kind, *cells])
    header = ["", "seed", "state, MB, on average", "at most"]
    header += [f"loss after {step} steps" for step in (50, 100, 200, 400)]
    others = ["share of the energy in the leading"]
    others += [f"{rank}, step {step}" for rank in (1, 8, 16) for step in steps]
    return f"{markdown(header, losses)}\n\n{markdown(others, energy)}"


def train_table(content: dict[str, Any]) -> str:
    return markdown(["method", *SPEEDS], speeds(content["methods"]))


def speeds(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Rows of methods and their `SPEEDS`."""
    base = found.get("adamw-full", {}).get("tokens_per_second")
    rows = []
    for name, row in found.items():
        keys = ("peak_bytes", "predicted_bytes")
        memory = [f"{row[key] / GIB:.2f}" if row.get(key) else "" for key in keys]
        if "error" in row:
            rows.append([name, f"fails: {row['error'][:80]}", "", *memory])
        else:
            speed = row["tokens_per_second"]
            rows.append([name, f"{speed:,.0f}", f"{speed / base:.2f}" if base else "", *memory])
    return rows


def bytes_table(content: dict[str, Any]) -> str:
    rows = []
    for row in content["rows"]:
        name = [row["name"], str(row["processes"])]
        if "error" in row:
            rows.append([*name, f"fails: {row['error'][:80]}", "", "", ""])
            continue
        kinds = [row[kind] for kind in ("ordinary", "refresh")]
        sizes = (*(kind["sent"] for kind in kinds), row["state_bytes"])
        calls = ", ".join(str(kind["calls"]) for kind in kinds)
        rows.append([*name, *(f"{size / 2**20:,.2f}" for size in sizes), calls])
    header = ["", "processes", "ordinary step, MiB sent", "refresh step, MiB sent", "state of a process, MiB"]
    return markdown([*header, "collectives in them"], rows)


def refresh_table(content: dict[str, Any]) -> str:
    alone = {row["projection"]: row for row in content["rows"] if row["processes"] == 1}
    rows = []
    for row in content["rows"]:
        one = alone[row["projection"]]
        cells = [", ".join(map(str, row["bases"])), f"{max(row['elements']) / sum(row['elements']):.3f}"]
        # Only those of products are counted, and an SVD has none.
        cells.append(f"{max(row['flops']) / one['flops'][0]:.2f}" if row["projection"] == "power" else "")
        timed = row["median"] is not None
        cells += [f"{1000 * row['median']:,.0f}", f"{row['median'] / one['median']:.2f}"] if timed else ["", ""]
        rows.append([row["projection"], str(row["processes"]), *cells])
    header = [
        "",
        "processes",
        "bases found by each",
        "busiest: share of the matrices",
        "its operations, of one process's",
    ]
    return markdown([*header, "ms", "of one process's"], rows)


def scaling_table(content: dict[str, Any]) -> str:
    traffic, rest = [], []
    for row in content["rows"]:
        name = [row["model"], str(row["devices"])]
        keys = ("ordinary_sent", "refresh_sent", "average_sent", "gradients_sent", "fsdp_sent")
        share = f"{row['average_sent'] / row['fsdp_sent']:.1%}"
        traffic.append([*name, *(f"{row[key] / 1e9:,.2f}" for key in keys), share])
        sizes = [f"{row[key] / 1e9:,.2f}" for key in ("state_bytes", "basis_bytes", "adamw_bytes")]
        work = [f"{row[key] / 1e12:,.2f}" for key in ("refresh_flops", "replica_refresh_flops")]
        rest.append([*name, *sizes, *work])
    header = ["GB sent by a device", "devices", "ordinary step", "refresh of all bases", "average step"]
    header += ["gathering all gradients", "FSDP2 itself", "average, of FSDP2"]
    others = ["on a device", "devices", "state, GB", "of it bases, GB", "AdamW's state, GB"]
    others += ["refresh of all bases, TFLOP", "the same under DDP, TFLOP"]
    return f"{markdown(header, traffic)}\n\n{markdown(others, rest)}"


def layerwise_table(content: dict[str, Any]) -> str:
    rows = []
    for name, row in content["bytes"].items():
        keys = ("weight_bytes", "state_bytes", "peak_bytes")
        sizes = [row[key] for key in keys]
        rows.append([name, *(f"{size / 2**20:,.1f}" for size in (*sizes, sum(sizes)))])
    return markdown(["MiB", "weights", "state", "peak of a training step beyond both", "together"], rows)


def cells_table(content: dict[str, Any]) -> str:
    rows = []
    for row in content["rows"]:
        parts = [row[key] for key in ("weights", "gradients", "optimizer_state", "total")]
        cells = [f"{row['published']:.2f}", f"{row['formula']:.3f}", *(f"{part / 1e9:.3f}" for part in parts)]
        rows.append([f"{row['size'].upper()} {row['method']}", *cells])
    header = ["", "published, G", "by the formula, G", "weights, GB", "gradients, GB", "state, GB", "together, GB"]
    return markdown(header, rows)


def llama7b_table(content: dict[str, Any]) -> str:
    rows = []
    totals = {row["method"]: f"{row['total'] / 1e9:.1f}" for row in content["rows"] if row["batch_size"] == 4}
    for row in content["rows"]:
        if row["batch_size"] == 1:
            parts = [row[key] for key in ("weights", "gradients", "optimizer_state", "activations", "total")]
            rows.append([f"`{row['method']}`", *(f"{part / 1e9:.1f}" for part in parts), totals[row["method"]]])
    header = ["GB, predicted", "weights", "gradients", "state", "activations of 1 x 256"]
    return markdown([*header, "peak, 1 x 256", "peak, 4 x 256"], rows)


def int8_table(content: dict[str, Any]) -> str:
    rows = []
    for row in content["rows"]:
        parts = [row[key] for key in ("weights", "gradients", "optimizer_state", "activations", "total")]
        name = [row["embeddings"], str(row["rank"]), row["state_dtype"]]
        rows.append([*name, *(f"{part / 1e9:.2f}" for part in parts)])
    header = ["embedding and head", "rank", "state in", "weights, GB", "gradient", "state", "activations", "peak"]
    return markdown(header, rows)


def cost_table(content: dict[str, Any]) -> str:
    reference = {row["size"]: row for row in content["rows"] if row["method"] == "AdamW, fp32 moments"}
    counts, times = [], []
    for row in content["rows"]:
        name = [f"{row['size'].upper()}, rank {row['rank']}", row["method"]]
        if "error" in row:
            counts.append([*name, row["error"], *[""] * 7])
            continue
        kinds = [row.get(kind) for kind in ("ordinary", "refresh", "average")]
        cells = [f"{kind['launches']:,.0f}" if kind else "" for kind in kinds]
        cells += [f"{kind['bytes'] / row['elements']:.1f}" if kind else "" for kind in kinds]
        counts.append([*name, *cells, *(f"{row[kind]['reads']:,.1f}" for kind in ("ordinary", "average"))])
        ordinary, average = row["ordinary"], row["average"]
        cells = [f"{1000 * next(iter(ordinary['seconds'].values()))['host']:,.1f}"]
        for device, seconds in ordinary["seconds"].items():
            cells.append(f"{1000 * seconds['device']:,.1f}")
            for step in (ordinary, average):
                base = reference.get(row["size"])
                took = step["seconds"][device]["step"]
                cells.append(f"{took / base['ordinary']['seconds'][device]['step']:.2f}" if base else "")
        times.append([*name, *cells])
    header = ["matrices of LLaMA", "", "launches, ordinary step", "refresh step", "average"]
    header += [
        "bytes an element, ordinary step",
        "refresh step",
        "average",
        "reads by the host, ordinary step",
        "average",
    ]
    others = ["estimate", "", "ordinary step: launches, ms"]
    for device in content["devices"]:
        others += [f"{device}: work, ms", "ordinary step, of AdamW", "average, of AdamW"]
    return f"{markdown(header, counts)}\n\n{markdown(others, times)}"


def gpu_table(content: dict[str, Any]) -> str:
    """Of what `recipes.benchmarks.gpu` wrote: the checks of the kernels, steps beside those of fused AdamW, tokens per
    second of training, or memory at its peak."""
    if "checks" in content:
        checks = [
            [name, str(found["right"]), str(len(found["wrong"])), str(found["not_reached"])]
            for name, found in content["checks"].items()
        ]
        return markdown(["kernel", "cases right", "wrong", "not reached in time"], checks)
    if content["part"] == "trainer":
        models = [(name.split(), row["methods"]) for name, row in content["cells"].items()]
        rows = [[f"{size.upper()}, {dtype}", *one] for (size, dtype), methods in models for one in speeds(methods)]
        return markdown(["LLaMA", "", *SPEEDS], rows)
    if content["part"] == "memory":
        peaks = [
            [name, str(row["rank"]), *(f"{row[key] / GIB:.2f}" for key in ("measured_bytes", "predicted_bytes"))]
            for name, row in content["cells"].items()
        ]
        return markdown(["method", "rank", "peak of a training step, GiB", "predicted, GiB"], peaks)
    steps, launches = [], []
    for name, row in content["cells"].items():
        size, dtype = name.split(",")[0].split()
        model = f"{size.upper()}, {dtype}, {row['layers']} layers"
        if "milliseconds" in row and isinstance(row["milliseconds"], dict):
            base = row["milliseconds"]["adamw"]["ordinary"]
            for method, found in row["milliseconds"].items():
                times = [f"{found[key]:,.2f}" if key in found else "" for key in ("ordinary", "refresh", "amortised")]
                steps.append([f"{model}, rank {row['rank']}", method, *times, f"{found['ordinary'] / base:.2f}"])
        elif row.get("launches") is not None:
            times = [f"{row[key]:,.2f}" for key in ("milliseconds", "device_milliseconds")]
            cells = [name.partition(" of ")[2], f"{row['launches']:,}", *times, f"{row['waits']:.0%}"]
            launches.append([model, *cells])
    header = ["matrices of LLaMA", "", "ordinary step, ms", "refresh step, ms", "average, ms", "ordinary, of AdamW"]
    others = ["an ordinary step", "", "launches", "a step, ms", "the GPU works, ms", "it waits for the host"]
    return f"{markdown(header, steps)}\n\n{markdown(others, launches)}"


def lora_table(content: dict[str, Any]) -> str:
    """By the first seed the best rate, and the losses of all seeds there."""
    found = {name: one["runs"] for name, one in content["methods"].items()}

    def losses(runs: list[dict[str, Any]], lr: float) -> list[str]:
        return ["diverged" if run["loss"] is None else f"{run['loss']:.3f}" for run in runs if run["lr"] == lr]

    bests = {}
    for name, runs in found.items():
        first = [run for run in runs if run["seed"] == 0 and run["loss"] is not None]
        bests[name] = min(first, key=lambda run: run["loss"])["lr"]
    header = ["", "best rate", "loss there, by seed", "at AdamW's best rate", "rates tried", "state, KB"]
    rows = [["before", "", f"{content['before']:.3f}", "", "", ""]]
    for name, runs in found.items():
        tried = sorted({run["lr"] for run in runs})
        at_adamws = (losses(runs, bests["adamw"]) or [""])[0]
        state = f"{runs[0]['state_bytes'] / 1e3:,.0f}"
        rates = f"{tried[0]:g} to {tried[-1]:g}"
        rows.append([name, f"{bests[name]:g}", ", ".join(losses(runs, bests[name])), at_adamws, rates, state])
    return markdown(header, rows)


TABLES = {
    "gpu": gpu_table,
    "step": step_table,
    "memory": memory_table,
    "basis": basis_table,
    "adaptive": ranks_table,
    "train": train_table,
    "quality": quality.table,
    "candidates": quality.table,
    "weights": quality.table,
    "codes": quality.table,
    "sharded": bytes_table,
    "refresh": refresh_table,
    "scaling": scaling_table,
    "layerwise": layerwise_table,
    "cells": cells_table,
    "llama7b": llama7b_table,
    "int8": int8_table,
    "lora": lora_table,
    "cost": cost_table,
}


def origin(content: dict[str, Any]) -> str:
    """One line: command, hardware, versions, commit."""
    if "regimes" in content:
        return quality.origin(content)
    about = content["runs"][0]["provenance"] if "runs" in content else content["provenance"]
    versions = about["versions"]
    packages = f"torch {versions['torch']}, transformers {versions['transformers']}"
    return (
        f"`{about['command']}` on {about['device']}, {about['cpu_threads']} threads, {packages}, {about['date'][:10]}."
    )


def write_report(folder: Path) -> None:
    def table(page: Path, name: str) -> str:
        content = files.read_json(folder / f"{name}.json")
        if content is None:
            raise ValueError(f"{page} wants {folder / name}.json, which is not there.")
        kind = name.partition("-")[0]
        if kind == "quality":
            plots.draw(content, folder, name)
        return f"{TABLES[kind](content)}\n\n{origin(content)}"

    for page in sorted(folder.parent.glob("*.md")):
        report.fill(page, "table", functools.partial(table, page))


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("docs/benchmarks"))
    parser.add_argument("--gather", type=Path, action="append", default=[], metavar="FOLDER")
    options = parser.parse_args(words)
    try:
        for runs in options.gather:
            files.write_json(options.folder / f"{runs.name}.json", quality.gather(runs))
        write_report(options.folder)
    except ValueError as error:
        return errors.refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
