"""Does a low-rank run scale its weights as a full-rank one? Compares two finished runs that began alike.

    python -m recipes.pretraining.compare tiny --methods adamw,fira --analysis_steps 5 --output_dir runs/similarity
    python -m recipes.pretraining.similarity runs/similarity/fira-seed42 runs/similarity/adamw-seed42
        --output_dir runs/similarity/figures

Writes similarity.md, similarity.json, and pictures of the scaling factors, the captured energy and the limiter.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table
from scipy import stats

from fira_hf.callbacks import SAMPLED, Record, read_record
from recipes import errors, files, report, rundir

# Title, name and format of a measure, in the paper's order; the paper does not give the last one.
MEASURES = [
    ("cosine", "cosine", "{:.4f}"),
    ("MSE", "mse", "{:.0e}"),
    ("Spearman", "spearman", "{:.4f}"),
    ("Kendall", "kendall", "{:.4f}"),
    ("Pearson", "pearson", "{:.4f}"),
]
# arXiv 2410.01623, by the number of parameters: the size, and the measures of matrices and of columns.
PUBLISHED = {
    58_073_600: ("60M", {"matrix": (0.9922, 3e-4, 0.9972, 0.9662), "column": (0.9273, 3e-5, 0.9372, 0.7942)}),
    134_105_856: ("130M", {"matrix": (0.9901, 2e-4, 0.9925, 0.9409), "column": (0.9046, 2e-5, 0.8698, 0.6830)}),
    367_969_280: ("350M", {"matrix": (0.9893, 1e-4, 0.9770, 0.8848), "column": (0.9174, 1e-5, 0.9091, 0.7400)}),
    1_339_082_752: ("1B", {"matrix": (0.9795, 2e-4, 0.9469, 0.8249), "column": (0.9229, 1e-5, 0.8331, 0.6513)}),
}
# What two runs must share, in their results and in their full settings. The path of the model is not among it: that it
# is the same shows in its layers and in their first weights.
SAME = ("seed", "parameters", "steps", "training_tokens")
SAME_SETTINGS = ("dtype", "data_dir", "sequence_length", "analysis_steps", "adam_beta1", "adam_beta2")
LAYER = re.compile(r".*?\.(?P<layer>\d+)\.(?P<kind>.+?)(?:\.weight)?")
# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#999999")


@dataclass
class Run:
    folder: Path
    result: dict[str, Any]
    record: Record


def load(folder: Path) -> Run:
    result = files.read_json(folder / rundir.RESULT) or {}
    if result.get("status") != "ok":
        raise ValueError(f"{folder} is not the folder of a finished run, which has a {rundir.RESULT} that says ok.")
    if not result["all_settings"].get("analysis_steps"):
        raise ValueError(f"{folder} was trained without analysis_steps; train again with --analysis_steps 20.")
    return Run(folder, result, read_record(folder))


def check(low: Run, full: Run) -> list[int]:
    """The places, in both records, of the matrices that the low-rank run projects.

    Raises ValueError if it projects none or the other one does, or if the runs did not begin, train and record alike.
    """
    projected = [place for place, matrix in enumerate(low.record.matrices) if matrix["rank"] is not None]
    if not projected:
        raise ValueError(f"{low.folder} projects nothing ({low.result['method']}); name the low-rank run first.")
    if any(matrix["rank"] is not None for matrix in full.record.matrices):
        raise ValueError(f"{full.folder} is a low-rank run ({full.result['method']}); name a full-rank run second.")
    pairs = [(key, low.result[key], full.result[key]) for key in SAME]
    pairs += [(key, low.result["all_settings"][key], full.result["all_settings"][key]) for key in SAME_SETTINGS]
    pairs.append(("the number of records", len(low.record.steps), len(full.record.steps)))
    differs = [f"{key} is {first} and {second}" for key, first, second in pairs if first != second]
    layers = [[(matrix["name"], matrix["shape"]) for matrix in run.record.matrices] for run in (low, full)]
    if layers[0] != layers[1]:
        differs.append("their models have other layers")
    if differs:
        raise ValueError(f"{low.folder} and {full.folder} cannot be compared: {'; '.join(differs)}.")
    for first, second in zip(low.record.matrices, full.record.matrices, strict=True):
        if first["initial"] != second["initial"]:
            raise ValueError(
                f"{low.folder} and {full.folder} cannot be compared: {first['name']} began with the weights "
                f"{first['initial']} ... and {second['initial']} ...; train both with one model_config and the same "
                "versions of torch and transformers."
            )
    return projected


def mean(values: np.ndarray) -> np.ndarray:
    """Over the records of a training, in double precision; what was not to be measured does not count."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return np.nanmean(values, axis=0, dtype=np.float64)


def similarity(low_rank: np.ndarray, full_rank: np.ndarray) -> dict[str, float]:
    """How alike the scaling factors of two runs are, (n,) each, after averaging over time.

    cosine; mse, of the two vectors divided by their norms, 2 (1 - cosine) / n, as which the published figures agree
    with each other to their one digit; pearson; spearman; kendall (tau-b). cosine_shuffled: the cosine to be expected
    of the same values in random order, which is far from 0, since factors are positive. n: pairs of two finite values.

    Raises:
        ValueError: fewer than two such pairs.
    """
    known = np.isfinite(low_rank) & np.isfinite(full_rank)
    low, full = (np.asarray(values, dtype=np.float64)[known] for values in (low_rank, full_rank))
    if len(low) < 2:
        raise ValueError(f"{len(low)} scaling factors are known of both runs; similarity needs at least 2.")
    low, full = (values / np.linalg.norm(values) for values in (low, full))
    return {
        "cosine": float(low @ full),
        "mse": float(np.mean((low - full) ** 2)),
        "pearson": float(stats.pearsonr(low, full).statistic),
        "spearman": float(stats.spearmanr(low, full).statistic),
        "kendall": float(stats.kendalltau(low, full).statistic),
        "cosine_shuffled": float(len(low) * low.mean() * full.mean()),
        "n": len(low),
    }


def compare(low: Run, full: Run) -> dict[str, Any]:
    """Every figure of the report."""
    projected = check(low, full)
    slices = low.record.slices
    rows = np.concatenate([np.arange(slices[place].start, slices[place].stop) for place in projected])
    phi = {"matrix": [mean(run.record.phi[:, projected]) for run in (low, full)]}
    phi["column"] = [mean(run.record.rows)[rows] for run in (low, full)]
    limiter = low.record.limiter[:, projected]
    active = np.where(np.isnan(limiter), np.nan, limiter < 1)
    energy = low.record.captured_energy[:, projected]
    matrices = []
    for index, place in enumerate(projected):
        own = low.record.matrices[place]
        matrices.append(
            {
                "name": own["name"],
                "shape": own["shape"],
                "rank": own["rank"],
                "phi_low_rank": phi["matrix"][0][index],
                "phi_full_rank": phi["matrix"][1][index],
                "captured_energy": mean(energy[:, index]),
                "limiter_active": mean(active[:, index]),
            }
        )
    published = PUBLISHED.get(low.result["parameters"])
    return {
        "similarity": {level: similarity(*values) for level, values in phi.items()},
        "published": published and {"size": published[0], **published[1]},
        "matrices": matrices,
        "records": [
            {"step": int(step), "limiter_active": of_step[0], "limiter": of_step[1], "captured_energy": of_step[2]}
            for step, *of_step in zip(low.record.steps, mean(active.T), mean(limiter.T), mean(energy.T), strict=True)
        ],
        "runs": {
            kind: {key: value for key, value in run.result.items() if key != "history"}
            for kind, run in (("low_rank", low), ("full_rank", full))
        },
    }


def table(found: dict[str, Any]) -> list[list[str]]:
    """Rows of text, the first one the titles."""
    rows = [["level", *(title for title, _, _ in MEASURES), "cosine if shuffled", "factors"]]
    for level, measures in found["similarity"].items():
        cells = [form.format(measures[name]) for _, name, form in MEASURES]
        rows.append([level, *cells, f"{measures['cosine_shuffled']:.4f}", f"{measures['n']:,}"])
        if found["published"]:
            values = zip(MEASURES, found["published"][level], strict=False)
            cells = [form.format(value) for (_, _, form), value in values]
            rows.append([f"{level}, published for {found['published']['size']}", *cells, "-", "-", "-"])
    return rows


def kind_of(name: str) -> str:
    """What the layers of a model have in common: "self_attn.q_proj" of "model.layers.3.self_attn.q_proj.weight"."""
    match = LAYER.fullmatch(name)
    return match["kind"] if match else name


def layer_of(name: str) -> int:
    match = LAYER.fullmatch(name)
    return int(match["layer"]) if match else 0


def by_kind(matrices: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["layers", "matrices", "rank", "phi, low rank", "phi, full rank", "captured energy", "limiter active"]]
    for kind in dict.fromkeys(kind_of(matrix["name"]) for matrix in matrices):
        own = [matrix for matrix in matrices if kind_of(matrix["name"]) == kind]
        ranks = "/".join(str(rank) for rank in sorted({matrix["rank"] for matrix in own}))
        phis = [f"{np.mean([m[key] for m in own]):.3g}" for key in ("phi_low_rank", "phi_full_rank")]
        shares = [f"{np.mean([m[key] for m in own]):.1%}" for key in ("captured_energy", "limiter_active")]
        rows.append([kind, str(len(own)), ranks, *phis, *shares])
    return rows


def plot_factors(low: Run, full: Run, path: Path) -> None:
    """Time-averaged scaling factors of both runs against each other, for matrices and for columns."""
    projected, slices = check(low, full), low.record.slices
    kinds = list(dict.fromkeys(kind_of(low.record.matrices[place]["name"]) for place in projected))
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    means = [(mean(run.record.phi), mean(run.record.rows)) for run in (low, full)]
    for axis, level in zip(figure.subplots(1, 2), (0, 1), strict=True):
        y, x = means[0][level], means[1][level]
        for number, kind in enumerate(kinds):
            own = [place for place in projected if kind_of(low.record.matrices[place]["name"]) == kind]
            chosen = np.concatenate([np.r_[slices[place]] for place in own]) if level else np.array(own)
            axis.scatter(
                x[chosen],
                y[chosen],
                s=5 if level else 28,
                alpha=0.5 if level else 0.9,
                linewidths=0,
                color=COLOURS[number % len(COLOURS)],
                label=None if level else kind,
                rasterized=True,
            )
        ends = np.array([np.nanmin(x), np.nanmax(x)])
        label = None if level else "equal up to the scale of the run"
        ratio = np.linalg.norm(y[np.isfinite(y)]) / np.linalg.norm(x[np.isfinite(x)])
        axis.plot(ends, ends * ratio, color="grey", linestyle="--", linewidth=1, label=label)
        title = "columns (sampled)" if level else "matrices"
        axis.set(title=title, xscale="log", yscale="log", xlabel="scaling factor, full-rank run (1 / gradient)")
        axis.set_ylabel("scaling factor, low-rank run (1 / gradient)")
        axis.grid(alpha=0.3)
    figure.legend(frameon=False, ncols=min(len(kinds) + 1, 4), loc="outside upper center")
    figure.savefig(path, dpi=150)


def plot_by_layer(run: Run, values: np.ndarray, label: str, path: Path) -> None:
    """Shares (T, M) by layer and step, a heat map for each kind of projected layer."""
    places: dict[str, list[int]] = {}
    for place, matrix in enumerate(run.record.matrices):
        if matrix["rank"] is not None:
            places.setdefault(kind_of(matrix["name"]), []).append(place)
    columns = min(4, len(places))
    rows = -(-len(places) // columns)
    figure = Figure(figsize=(3.1 * columns + 1.2, 2.5 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    steps = run.record.steps
    gap = steps[0]  # the first record is made when one interval has passed
    edges = np.append(steps - gap / 2, steps[-1] + gap / 2)
    scale = Normalize(0, 1)
    for axis, (kind, own) in zip(axes, places.items(), strict=False):
        own = sorted(own, key=lambda place: layer_of(run.record.matrices[place]["name"]))
        axis.pcolormesh(edges, np.arange(len(own) + 1) - 0.5, values[:, own].T, norm=scale, cmap="viridis")
        axis.set(title=kind, ylabel="layer", xlabel="optimizer step")
        for locator in (axis.yaxis, axis.xaxis):
            locator.set_major_locator(MaxNLocator(nbins=5, integer=True))
    for axis in axes[len(places) :]:
        axis.remove()
    figure.colorbar(ScalarMappable(scale, "viridis"), ax=axes[: len(places)].tolist(), label=label)
    figure.savefig(path, dpi=150)


def plot_limiter(low: Run, found: dict[str, Any], path: Path) -> None:
    """Loss, limiter and norm of the residual over the steps of the low-rank run."""
    record = low.record
    projected = [place for place, matrix in enumerate(record.matrices) if matrix["rank"] is not None]
    layers = [layer_of(record.matrices[place]["name"]) for place in projected]
    figure = Figure(figsize=(9, 8), layout="constrained")
    loss, limiter, norms = figure.subplots(3, 1, sharex=True)
    for key, label, marker in (("loss", "training", None), ("eval_loss", "validation", "o")):
        points = [(entry["step"], entry[key]) for entry in low.result["history"] if key in entry]
        if points:
            loss.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=label)
    loss.set(title=f"Low-rank run ({low.result['method']})", ylabel="loss (nats a token)")
    for key, label in (("limiter_active", "share of matrices limited"), ("limiter", "mean factor on the residual")):
        limiter.plot(record.steps, [entry[key] for entry in found["records"]], label=label)
    limiter.set(ylabel="limiter", ylim=(-0.03, 1.03))
    residual = np.where(np.isfinite(record.residual_norm), record.residual_norm, np.nan)[:, projected]
    scale = Normalize(0, max(1, *layers))
    palette = ScalarMappable(scale, "viridis")
    for index, layer in enumerate(layers):
        norms.plot(record.steps, residual[:, index], color=palette.to_rgba(layer), linewidth=0.8, alpha=0.7)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)
        norms.plot(record.steps, np.nanmedian(residual, axis=1), color="black", linewidth=2, label="median")
    norms.set(ylabel="norm of the residual ‖c S‖", yscale="log", xlabel="optimizer step")
    figure.colorbar(palette, ax=norms, label="layer", ticks=MaxNLocator(nbins=6, integer=True))
    for axis in (loss, limiter, norms):
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


def describe(low: Run, full: Run, found: dict[str, Any]) -> str:
    first, steps = low.result, low.record.steps
    methods = [f"{run.result['method']} (perplexity {run.result['perplexity']:,.2f})" for run in (low, full)]
    return "\n".join(
        [
            "# Scaling factors of a low-rank and a full-rank run",
            "",
            f"{methods[0]} and {methods[1]} from the same weights: {first['parameters']:,} parameters, seed "
            f"{first['seed']}, {first['training_tokens']:,} tokens in {first['steps']:,} optimizer steps, of which "
            f"{len(steps)} are recorded, every {steps[0]}.",
            report.where([low.result]),
            "",
            "## Similarity",
            "",
            *report.markdown(table(found)),
            "",
            "The scaling factor of a matrix, or of one entry of its long side (a column), is how much longer Adam's "
            "direction is than the gradient: of the gradient in the subspace in the low-rank run, of the whole "
            "gradient in the full-rank run. It is averaged over the records, then compared across matrices, or across "
            f"sampled columns of all matrices, at most {SAMPLED} of each. MSE is that of the two vectors of unit "
            "length. Shuffled: the cosine to be expected if the factors had nothing to do with each other.",
            "",
            "![Scaling factors of both runs](scaling-factors.png)",
            "",
            "## Subspace and limiter of the low-rank run",
            "",
            *report.markdown(by_kind(found["matrices"])),
            "",
            "Means over matrices and records. phi: scaling factor of a matrix. Limiter active: share of the residuals "
            "that it scaled down.",
            "",
            "![Captured energy by layer and step](captured-energy.png)",
            "",
            "![Limiter by layer and step](limiter-by-layer.png)",
            "",
            "![Loss, limiter and residual by step](limiter.png)",
            "",
        ]
    )


def write(low_rank: Path, full_rank: Path, folder: Path) -> dict[str, Any]:
    low, full = load(low_rank), load(full_rank)
    found = compare(low, full)
    folder.mkdir(parents=True, exist_ok=True)
    plot_factors(low, full, folder / "scaling-factors.png")
    energy, limiter = low.record.captured_energy, low.record.limiter
    plot_by_layer(low, energy, "share of the gradient's energy", folder / "captured-energy.png")
    plot_by_layer(low, limiter, "limiter's factor (1: not active)", folder / "limiter-by-layer.png")
    plot_limiter(low, found, folder / "limiter.png")
    (folder / "similarity.md").write_text(describe(low, full, found), encoding="utf-8")
    files.write_json(folder / "similarity.json", found)
    return found


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("low_rank", type=Path, help="folder of a finished run of fira")
    parser.add_argument("full_rank", type=Path, help="folder of a finished run of adamw")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the report and its pictures")
    options = parser.parse_args(words)
    try:
        found = write(options.low_rank, options.full_rank, options.output_dir)
    except (ValueError, OSError) as error:
        return errors.refuse(error)
    rows = table(found)
    printed = Table(*rows[0], title="Scaling factors, low rank beside full rank")
    for row in rows[1:]:
        printed.add_row(*row)
    console = Console()
    console.print(printed)
    console.print(f"Report: {options.output_dir / 'similarity.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
