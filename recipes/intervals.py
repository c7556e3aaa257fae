"""Bootstrap intervals of differences between runs that were judged by the same examples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats

RESAMPLES = 9999


def shared(records: list[dict[str, Any] | None]) -> bool:
    """Whether all were recorded on the same questions."""
    found = {None if record is None else record.get("fingerprint") for record in records}
    return len(found) == 1 and None not in found


def paired(*methods: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Of runs of two methods those of the seeds that both have, and all where they share none: a seed sets the order
    of the examples, and some are better for all methods."""
    seeds = set.intersection(*({run["seed"] for run in runs} for runs in methods))
    return [[run for run in runs if run["seed"] in seeds or not seeds] for runs in methods]


def of_losses(of_one: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Of runs of two methods: the difference of the mean loss over the held-out examples, and its interval; None where
    the runs do not share the examples. Of several seeds, the mean over them counts for each example."""
    if not shared([run.get("held_out") for run in [*of_one, *others]]):
        return None
    means = [np.mean([run["held_out"]["losses"] for run in runs], axis=0) for runs in (of_one, others)]
    return {**interval([means[0] - means[1]]), **over_seeds(of_one, others, lambda run: run["held_out"]["losses"])}


def over_seeds(
    of_one: list[dict[str, Any]], others: list[dict[str, Any]], figure: Callable[[dict[str, Any]], Any]
) -> dict[str, Any]:
    """The differences of a figure's mean by seed, and Student's 95% interval of their mean; None where the methods do
    not share two seeds."""
    found = [{run["seed"]: float(np.mean(figure(run))) for run in runs} for runs in (of_one, others)]
    if found[0].keys() != found[1].keys() or len(found[0]) < 2:
        return {"by_seed": None, "interval_over_seeds": None}
    apart = [found[0][seed] - found[1][seed] for seed in sorted(found[0])]
    half = stats.t.ppf(0.975, len(apart) - 1) * np.std(apart, ddof=1) / math.sqrt(len(apart))
    return {"by_seed": apart, "interval_over_seeds": [float(np.mean(apart) - half), float(np.mean(apart) + half)]}


def _mean_of_means(*strata: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.mean([stratum.mean(axis=axis) for stratum in strata], axis=0)


def interval(strata: list[np.ndarray]) -> dict[str, Any]:
    """The mean of the strata's means with its 95% bootstrap interval; None where a stratum has a single value.

    The values are drawn anew within each stratum, which all count alike.
    """
    found = None
    if min(map(len, strata)) > 1:
        drawn = stats.bootstrap(
            strata, _mean_of_means, method="percentile", n_resamples=RESAMPLES, batch=200, random_state=0
        )
        found = [float(end) for end in drawn.confidence_interval]
    return {"difference": float(_mean_of_means(*strata)), "interval": found}
