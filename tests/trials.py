"""A hyper-parameter search over given trials, for machines without Optuna."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import transformers.integrations
from transformers import Trainer
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS, HyperParamSearchBackendBase
from transformers.trainer_utils import BestRun, HPSearchBackend


class Trial(dict):
    """What the Trainer asks of a trial of Optuna."""

    def __init__(self, number: int, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.number, self.params = number, values


def search(trainer: Trainer, trials: list[dict[str, Any]], after: Callable[[Trainer], Any]) -> list[Any]:
    """Trains each trial by `Trainer.hyperparameter_search`; what `after` says of each."""
    found = []

    class InTurn(HyperParamSearchBackendBase):
        name = "optuna"

        @staticmethod
        def is_available() -> bool:
            return True

        def run(self, trainer: Trainer, n_trials: int, direction: str, **kwargs: Any) -> BestRun:
            for number, values in enumerate(trials):
                trainer.objective = None
                trainer.train(trial=Trial(number, values))
                found.append(after(trainer))
            return BestRun("0", 0.0, {})

    with _backend(InTurn):
        trainer.hyperparameter_search(lambda trial: dict(trial), backend="optuna", n_trials=len(trials))
    return found


@contextmanager
def _backend(backend: type) -> Iterator[None]:
    with (
        mock.patch.dict(ALL_HYPERPARAMETER_SEARCH_BACKENDS, {HPSearchBackend.OPTUNA: backend}),
        mock.patch.object(transformers.integrations, "hp_params", dict),
    ):
        yield
