"""The paper's tables beside those of `make paper-small`: perplexities, whether the order agrees, and a picture.

    python -m recipes.pretraining.reproduction runs/paper-small [--page docs/reproduction.md]

Reads what the recipe's commands wrote there: search-*/search.json, {methods,ablation,ranks}/results.json and
similarity/similarity.json. Writes report.md and ranks.png into the same folder; with --page the tables of that page,
between `<!-- paper: NAME -->` and `<!-- end -->`, as well.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

from matplotlib.figure import Figure

from recipes import errors, files, report
from recipes.plots import STYLES
from recipes.pretraining.settings import RECIPE
from recipes.pretraining.similarity import table as similarity_table

# Validation perplexity of LLaMA-60M on C4 (arXiv 2410.01623); that of the ranks is read off a figure.
PUBLISHED = {
    "methods": {"adamw": 34.06, "fira": 31.06, "galore": 34.88, "lora": 34.99, "relora": 37.04},
    "ablation": {
        "fira": 31.06,
        "fira-matrix": 31.52,
        "fira-without-scaling": 37.06,
        "fira-without-limiter": 32.22,
        "fira-clipping": 31.22,
        "fira-shrink": 33.98,
        "fira-tensor-scaling": 33.81,
        "fira-only-scaling": 31.68,
        "fira-gamma-1.1": 32.09,
        "fira-gamma-1.001": 31.26,
        "fira-gamma-1": 31.28,
    },
    "ranks": {
        "fira-rank-4": 35,
        "galore-rank-4": 48,
        "fira-rank-16": 32,
        "galore-rank-16": 37,
        "fira-rank-64": 31,
        "galore-rank-64": 33,
        "fira-rank-128": 31,
        "galore-rank-128": 32,
    },
}
# The same column as measured by Glentis et al. (OptimAI-Lab/Minimalist_LLM_Pretraining), with a tuned Adam.
INDEPENDENT = {"adamw": 30.05, "fira": 30.34, "galore": 34.58, "apollo": 30.94}

# Fira, and what else can make its low-rank update.
BASES = ("fira", "fira-adafactor", "fira-rmsprop", "fira-lion")

FEW = 5  # of pairs that are listed


def perplexities(source: Path) -> dict[str, list[float]]:
    """Of each method, one a seed."""
    runs = [run for run in report.load_results(RECIPE, source) if run["status"] == "ok"]
    return {method: [run["perplexity"] for run in of_one] for method, of_one in report.by_method(runs).items()}


def agreement(paper: dict[str, float], ours: dict[str, list[float]]) -> str:
    """How many pairs of methods, all that differ in the paper, stand in its order here, and if few do not, which."""
    means = {method: statistics.mean(ours[method]) for method in paper if method in ours}
    pairs = [pair for pair in itertools.combinations(means, 2) if paper[pair[0]] != paper[pair[1]]]
    turned = [(a, b) for a, b in pairs if (paper[a] < paper[b]) != (means[a] < means[b])]
    said = f"{len(pairs) - len(turned)} of {len(pairs)} pairs are in the paper's order"
    few = 0 < len(turned) <= FEW
    return f"{said}; not {', '.join(f'{a} and {b}' for a, b in turned)}." if few else f"{said}."


def beside(name: str, ours: dict[str, list[float]]) -> list[str]:
    """A table of methods, from the best one here on, and how its order agrees with the paper's."""
    columns = {"paper, 60M": PUBLISHED[name]} | ({"independent, 60M": INDEPENDENT} if name == "methods" else {})
    rows = [["", "here", *columns]]
    for method in sorted(ours, key=lambda method: statistics.mean(ours[method])):
        known = [f"{column[method]:g}" if method in column else "-" for column in columns.values()]
        rows.append([f"`{method}`", report.over_seeds(ours[method], "{:,.1f}".format), *known])
    return [*report.markdown(rows), "", agreement(PUBLISHED[name], ours)]


Losses = dict[str, dict[str, float]]  # of each method, by learning rate


def searched(folder: Path) -> Losses:
    """The validation losses of all searches."""
    losses: Losses = {}
    for path in sorted(folder.glob("search*/search.json")):
        for method, of_one in files.read_json(path)["methods"].items():
            known = {value: loss for value, loss in of_one["losses"].items() if loss is not None}
            losses[method] = losses.get(method, {}) | known
    if not losses:
        raise ValueError(f"{folder} holds no search*/search.json.")
    return losses


def at_their_best(losses: Losses) -> dict[str, list[float]]:
    """Perplexity of each method at the best of its learning rates."""
    return {method: [math.exp(min(of_one.values()))] for method, of_one in losses.items()}


def searches(losses: Losses) -> list[str]:
    """A table of validation losses by method and learning rate."""
    values = sorted({value for of_one in losses.values() for value in of_one}, key=float)
    rows = [["validation loss", *values]]
    for method, of_one in losses.items():
        best = min(of_one, key=of_one.__getitem__)
        cells = {value: f"{loss:.3f}" for value, loss in of_one.items()} | {best: f"**{of_one[best]:.3f}**"}
        rows.append([f"`{method}`", *(cells.get(value, "") for value in values)])
    return report.markdown(rows)


def of_methods(losses: Losses, methods: Iterable[str], folder: Path) -> Losses:
    """The losses of these methods alone, all of which must have been searched."""
    missing = [method for method in methods if method not in losses]
    if missing:
        raise ValueError(f"{folder} holds no search*/search.json of {', '.join(missing)}.")
    diverged = [method for method in methods if not losses[method]]
    if diverged:
        raise ValueError(f"{folder}: the loss of {', '.join(diverged)} is not finite at any rate; search lower ones.")
    return {method: losses[method] for method in methods}


def method_and_rank(name: str) -> tuple[str, int]:
    """ "fira-rank-4" -> ("fira", 4)."""
    method, _, rank = name.split("-")
    return method, int(rank)


def searched_rank(source: Path) -> dict[str, list[float]]:
    """Of Fira and GaLore at the rank of the other comparisons, by the name that it would have among the ranks."""
    found: dict[str, list[float]] = {}
    for run in report.load_results(RECIPE, source):
        if run["method"] in ("fira", "galore") and run["status"] == "ok":
            (rank,) = re.findall(r"\brank=(\d+)", run["settings"]["optim_args"])
            found.setdefault(f"{run['method']}-rank-{rank}", []).append(run["perplexity"])
    return found


def plot_ranks(ours: dict[str, list[float]], at_best: dict[str, list[float]], path: Path) -> None:
    """Perplexity by rank: at one learning rate for all ranks, and at the best of each; and the paper's."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    means = [{name: statistics.mean(values) for name, values in found.items()} for found in (ours, at_best)]
    titles = ("here, one rate for all ranks", "here, the best rate of each", "the paper, 60M on C4")
    here, best, paper = figure.subplots(1, 3)
    best.sharey(here)
    for axis, found, title in zip((here, best, paper), (*means, PUBLISHED["ranks"]), titles, strict=True):
        for method in ("fira", "galore"):
            points = sorted(
                (method_and_rank(name)[1], value) for name, value in found.items() if name.startswith(method)
            )
            colour, marker = STYLES[method]
            axis.plot(*zip(*points, strict=True), color=colour, marker=marker, label=method)
        axis.set(title=title, xlabel="rank", ylabel="validation perplexity", xscale="log")
        axis.set_xticks([rank for rank, _ in points], [str(rank) for rank, _ in points])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


def tables_of_ranks(folder: Path, losses: Losses) -> dict[str, list[str]]:
    """Fira and GaLore by rank, at one learning rate and at the best of each; draws both."""
    ours = perplexities(folder / "ranks" / report.MERGED)
    at_methods_rank = searched_rank(folder / "methods" / report.MERGED)
    rates = of_methods(losses, list(ours), folder)
    for name in at_methods_rank:
        method, _ = method_and_rank(name)
        rates[name] = of_methods(losses, [method], folder)[method]
    ours |= at_methods_rank
    at_best = at_their_best(rates)
    plot_ranks(ours, at_best, folder / "ranks.png")
    ordered = {name: rates[name] for name in sorted(rates, key=method_and_rank)}
    said = f"At the best rate of each: {agreement(PUBLISHED['ranks'], at_best)}"
    return {"ranks": beside("ranks", ours), "rank-search": [*searches(ordered), "", said]}


def tables(folder: Path) -> dict[str, list[str]]:
    """The lines of each table."""
    losses = searched(folder)
    methods = [name for name in RECIPE.methods if name in losses and "-rank-" not in name and name not in BASES[1:]]
    found = {"search": searches(of_methods(losses, methods, folder))}
    found["bases"] = searches(of_methods(losses, BASES, folder))
    found |= {name: beside(name, perplexities(folder / name / report.MERGED)) for name in ("methods", "ablation")}
    found |= tables_of_ranks(folder, losses)
    content = files.read_json(folder / "similarity" / "similarity.json")
    if content is None:
        raise ValueError(f"{folder} holds no similarity/similarity.json.")
    rows = similarity_table(content)
    found["similarity"] = report.markdown(rows)
    runs = report.load_results(RECIPE, folder / "methods" / report.MERGED)
    first = next(run for run in runs if run["status"] == "ok")
    found["setting"] = [
        f"LLaMA of {first['parameters']:,} parameters, {first['training_tokens']:,} tokens in {first['steps']:,} "
        f"steps, data {first['all_settings']['data_dir']}, {first['eval_tokens']:,} tokens for validation.",
        report.where([first]),
    ]
    return found


TITLES = {
    "setting": "The runs",
    "search": "Learning rates",
    "methods": "Pre-training",
    "ablation": "Ablation and gamma",
    "bases": "Base optimizers",
    "ranks": "Ranks",
    "rank-search": "Learning rates of the ranks",
    "similarity": "Scaling-factor similarity",
}


def write(folder: Path, page: Path | None) -> None:
    found = tables(folder)
    parts = ["# The paper's tables at small size", ""]
    for name, title in TITLES.items():
        parts += [f"## {title}", "", *found[name], ""]
    parts += ["![Perplexity by rank](ranks.png)", ""]
    (folder / "report.md").write_text("\n".join(parts), encoding="utf-8")
    if page is not None:
        report.fill(page, "paper", lambda name: "\n".join(found[name]))


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--page", type=Path, help="a page with marks for the tables")
    options = parser.parse_args(words)
    try:
        write(options.folder, options.page)
    except (ValueError, OSError) as error:
        return errors.refuse(error)
    print(f"Report: {options.folder / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
