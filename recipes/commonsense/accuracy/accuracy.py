"""Accuracy of answer words: `evaluate.load("recipes/commonsense/accuracy")`."""

from collections import Counter

import datasets
import evaluate

_DESCRIPTION = "Share of questions whose predicted answer word is the reference word."

_KWARGS_DESCRIPTION = """
Args:
    predictions: list of answer words; "" where no answer was found, which counts as wrong.
    references: list of the right answer words.
Returns:
    accuracy: share of right predictions, 0 to 1.
    majority: share of the most frequent reference word, which is what always giving one answer would reach.
    unanswered: share of questions without an answer.
"""


class Accuracy(evaluate.Metric):
    def _info(self):
        words = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": words, "references": words}),
        )

    def _compute(self, predictions, references):
        if not references:
            raise ValueError("Accuracy needs at least one question.")
        count = len(references)
        right = sum(prediction == reference for prediction, reference in zip(predictions, references, strict=True))
        return {
            "accuracy": right / count,
            "majority": max(Counter(references).values()) / count,
            "unanswered": sum(not prediction for prediction in predictions) / count,
        }
