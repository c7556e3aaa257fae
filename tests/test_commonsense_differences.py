"""Differences of methods question by question: intervals, McNemar's test, and what the report says of them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from recipes.commonsense.differences import differences, sentences
from recipes.settings import BEFORE


def run(
    method: str, rights: dict[str, str], losses: list[float] | None = None, mark: str = "x", seed: int = 0
) -> dict:
    accuracy = {task: {"right": right, "fingerprint": f"{mark}{task}"} for task, right in rights.items()}
    held_out = None if losses is None else {"losses": losses, "fingerprint": mark}
    return {"method": method, "seed": seed, "accuracy": accuracy, "held_out": held_out}


def only(found: list[dict], method: str, minus: str) -> dict:
    (entry,) = [one for one in found if (one["method"], one["minus"]) == (method, minus)]
    return entry


def test_each_method_is_compared_with_the_model_before_and_with_lora():
    runs = [run(name, {"boolq": "0101"}) for name in (BEFORE, "lora", "fira-full")]
    pairs = [(one["method"], one["minus"]) for one in differences(runs)]
    assert pairs == [("lora", BEFORE), ("fira-full", BEFORE), ("fira-full", "lora")]
    assert [one["minus"] for one in differences(runs[1:])] == ["lora"]
    assert differences(runs[2:]) == []


def test_mcnemar_counts_the_questions_that_only_one_answers():
    found = differences(
        [run("lora", {"boolq": "110000", "piqa": "1"}), run("fira-full", {"boolq": "011110", "piqa": "1"})]
    )
    accuracy = only(found, "fira-full", "lora")["accuracy"]
    assert (accuracy["better"], accuracy["worse"]) == (3, 1)
    assert accuracy["mcnemar_p"] == pytest.approx(stats.binomtest(3, 4).pvalue)
    # Tasks count alike, whatever their number of questions; of a single one there is no interval.
    assert accuracy["difference"] == pytest.approx((2 / 6 + 0) / 2)
    assert accuracy["interval"] is None
    same = differences([run("lora", {"boolq": "10"}), run("fira-full", {"boolq": "10"})])
    assert only(same, "fira-full", "lora")["accuracy"]["mcnemar_p"] == 1
    assert only(same, "fira-full", "lora")["accuracy"]["interval"] == [0, 0]


def test_the_interval_is_that_of_a_mean_of_means_over_pairs():
    generator = np.random.default_rng(1)
    sizes = {"boolq": 200, "piqa": 50}

    def rights() -> dict[str, str]:
        return {task: "".join(map(str, generator.integers(0, 2, size))) for task, size in sizes.items()}

    one, other = rights(), rights()
    accuracy = only(differences([run("lora", one), run("fira-full", other)]), "fira-full", "lora")["accuracy"]
    by_task = [np.array(list(other[task]), int) - np.array(list(one[task]), int) for task in sizes]
    mean = np.mean([of_task.mean() for of_task in by_task])
    error = np.sqrt(sum(of_task.var() / len(of_task) for of_task in by_task)) / 2
    assert accuracy["difference"] == pytest.approx(mean)
    assert accuracy["interval"] == pytest.approx([mean - 1.96 * error, mean + 1.96 * error], abs=0.02)
    again = only(differences([run("lora", one), run("fira-full", other)]), "fira-full", "lora")["accuracy"]
    assert again == accuracy


def test_the_same_questions_tell_more_than_two_accuracies():
    """Right on the same ones but for ten: told apart, where two separate accuracies of 200 questions would not be."""
    lora, fira = "10" * 100, "11" * 10 + "10" * 90
    accuracy = only(
        differences([run("lora", {"boolq": lora}), run("fira-full", {"boolq": fira})]), "fira-full", "lora"
    )
    low, high = accuracy["accuracy"]["interval"]
    assert 0 < low < 0.05 < high < 0.1


def test_a_task_counts_as_the_harness_counts_it():
    """In text form BoolQ by acc and PIQA by acc_norm, whatever the other count says."""
    runs = [run("lora", {"boolq": "0000", "piqa": "0000"}), run("fira-full", {"boolq": "0001", "piqa": "0011"})]
    for one, acc in zip(runs, ("0000", "0111"), strict=True):
        for figures in one["accuracy"].values():
            figures["acc"] = {"right": acc}
    accuracy = only(differences(runs), "fira-full", "lora")["accuracy"]
    assert accuracy["difference"] == pytest.approx((0.75 + 0.5) / 2)
    assert accuracy["better"] == 5


def test_seeds_that_disagree_tell_nothing_apart_whatever_the_questions_say():
    """Each example is better by as much, so that the examples alone leave no doubt."""
    gains = [0.0, -0.04, -0.07]
    runs = [run("lora", {"boolq": "1010"}, [2.0 + i / 9 for i in range(40)], seed=seed) for seed in range(3)]
    for seed, gain in enumerate(gains):
        runs.append(run("fira-full", {"boolq": "1010"}, [2.0 + gain + i / 9 for i in range(40)], seed=seed))
    found = differences(runs)
    loss = only(found, "fira-full", "lora")["loss"]
    assert loss["interval"][1] < 0 and loss["by_seed"] == pytest.approx(gains)
    expected = stats.ttest_1samp(gains, 0).confidence_interval()
    assert loss["interval_over_seeds"] == pytest.approx([expected.low, expected.high]) and expected.high > 0
    assert "By held-out loss: fira-full not told apart from lora." in sentences(found)
    for one in runs:
        one["held_out"]["losses"] = [2.0 if one["method"] == "lora" else 1.96] * 40
    assert "By held-out loss: fira-full below lora." in sentences(differences(runs))


def test_of_several_seeds_the_mean_of_each_question_counts():
    seeds = [run("lora", {"boolq": "1100"}, [1.0, 2.0]), run("lora", {"boolq": "1010"}, [3.0, 2.0])]
    found = differences([*seeds, run("fira-full", {"boolq": "0011"}, [1.0, 1.0])])
    accuracy = only(found, "fira-full", "lora")["accuracy"]
    assert accuracy["difference"] == 0
    # Means 1, 0.5, 0.5, 0 beside 0, 0, 1, 1.
    assert (accuracy["better"], accuracy["worse"]) == (2, 2)
    assert only(found, "fira-full", "lora")["loss"]["difference"] == pytest.approx(-1)


def test_only_seeds_that_both_have_are_compared():
    """The second seed is easier, whatever the method; before training there is one run."""
    runs = [run("lora", {"boolq": "0011"}, [3.0, 4.0], seed=0), run("lora", {"boolq": "1111"}, [1.0, 2.0], seed=1)]
    runs += [
        run("fira-full", {"boolq": "0111"}, [2.5, 3.5], seed=0),
        run(BEFORE, {"boolq": "0000"}, [5.0, 5.0], seed=42),
    ]
    entry = only(differences(runs), "fira-full", "lora")
    assert (entry["accuracy"]["difference"], entry["loss"]["difference"]) == (0.25, -0.5)
    assert only(differences(runs), "lora", BEFORE)["accuracy"]["difference"] == 0.75


def test_runs_on_other_questions_are_not_compared():
    runs = [run("lora", {"boolq": "10", "piqa": "01"}, [1.0, 2.0]), run("fira-full", {"boolq": "01"}, [1.0, 2.0])]
    assert only(differences(runs), "fira-full", "lora")["accuracy"]["tasks"] == ["boolq"]
    other = run("fira-full", {"boolq": "01"}, [1.0, 2.0], mark="y")
    assert differences([runs[0], other]) == []
    old = {"method": "fira-full", "seed": 0, "accuracy": {"boolq": {"accuracy": 0.5}}}  # as it was before
    assert differences([runs[0], old]) == []


def test_the_report_says_what_is_told_apart():
    losses = list(np.linspace(1, 2, 50))
    runs = [
        run(BEFORE, {"boolq": "0" * 50}, [loss + 1 for loss in losses]),
        run("lora", {"boolq": "01" * 25}, losses),
        run("fira-full", {"boolq": "10" * 25}, [loss - 0.1 for loss in losses]),
    ]
    assert sentences(differences(runs)) == [
        "By average accuracy: lora, fira-full above before training.",
        "By held-out loss: lora, fira-full below before training.",
        "By average accuracy: fira-full not told apart from lora.",
        "By held-out loss: fira-full below lora.",
    ]
