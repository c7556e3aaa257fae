"""What a comparison can tell: the methods' differences over the questions and held-out answers that they share."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from recipes import intervals
from recipes.commonsense.tasks import TASKS, counted
from recipes.report import by_method
from recipes.settings import BEFORE

REFERENCES = (BEFORE, "lora", "adamw-full", "fira-full")


def differences(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each method to each of REFERENCES: {"method", "minus", "accuracy", "loss"}. One of the last two is None where
    the runs do not share their questions or did not record them; without both there is no entry.

    Of several seeds that both have, the mean over them counts for each question. An interval is over questions;
    `interval_over_seeds` takes them as given.
    """
    of_methods = by_method(runs)
    found = []
    for reference in (name for name in REFERENCES if name in of_methods):
        for method, of_one in of_methods.items():
            if method not in REFERENCES[: REFERENCES.index(reference) + 1]:  # of those the difference is there
                both = intervals.paired(of_one, of_methods[reference])
                accuracy, loss = _accuracy(*both), intervals.of_losses(*both)
                if accuracy or loss:
                    found.append({"method": method, "minus": reference, "accuracy": accuracy, "loss": loss})
    return found


def _accuracy(of_one: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Difference of the average over tasks, as a share, its interval, and McNemar's exact test over all questions.

    better, worse: on how many questions the method is. With one seed they are the discordant pairs; with several the
    test is the sign test on the means.
    """
    tasks = [task for task in TASKS if intervals.shared([run["accuracy"].get(task) for run in [*of_one, *others]])]
    if not tasks:
        return None

    def right(runs: list[dict[str, Any]], task: str) -> np.ndarray:
        letters = [counted(task, run["accuracy"][task])["right"] for run in runs]
        return np.mean([[int(letter) for letter in of_one] for of_one in letters], axis=0)

    by_task = [right(of_one, task) - right(others, task) for task in tasks]
    every = np.concatenate(by_task)
    better, worse = int((every > 0).sum()), int((every < 0).sum())
    p = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    seeds = intervals.over_seeds(of_one, others, lambda run: [right([run], task).mean() for task in tasks])
    counts = {"better": better, "worse": worse, "mcnemar_p": float(p)}
    return {**intervals.interval(by_task), **seeds, "tasks": tasks, **counts}


def sentences(found: list[dict[str, Any]]) -> list[str]:
    """What the intervals tell apart and what not, a sentence for each reference and figure. Of several seeds both have
    to, that over questions and that over seeds."""
    said = []
    for reference in dict.fromkeys(entry["minus"] for entry in found):
        for key, name in (("accuracy", "average accuracy"), ("loss", "held-out loss")):
            groups: dict[str, list[str]] = {"above": [], "below": [], "not told apart from": []}
            for entry in found:
                if entry["minus"] == reference and entry[key] is not None and entry[key]["interval"] is not None:
                    ends = [*entry[key]["interval"], *(entry[key]["interval_over_seeds"] or [])]
                    low, high = min(ends), max(ends)
                    group = "above" if low > 0 else "below" if high < 0 else "not told apart from"
                    groups[group].append(entry["method"])
            parts = [f"{', '.join(methods)} {group} {reference}" for group, methods in groups.items() if methods]
            if parts:
                said.append(f"By {name}: {'; '.join(parts)}.")
    return said
