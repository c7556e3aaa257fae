"""ReLoRA (arXiv 2307.05695): LoRA whose adapters are merged into the weights and begin anew, again and again.

A sum of low-rank changes has a higher rank than each of them. This is the published restart with the whole state of
the adapters' optimizer reset, and without the published warm start by full-rank training.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


@torch.no_grad()
def restart(model: nn.Module, optimizer: Optimizer) -> None:
    """W <- W + s B A, then B <- 0, A <- random, and both forget their moments. The model's output stays as it is."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.merge()
            layer.reset_lora_parameters("default", init_lora_weights=True)
            layer.unmerge()  # takes off the new B A, which is zero
            for adapter in (layer.lora_A, layer.lora_B):
                for parameter in adapter.parameters():
                    optimizer.state.pop(parameter, None)


class Restarts(TrainerCallback):
    """Restarts every `interval` optimizer steps, each followed by a linear warm-up of `warmup` steps."""

    def __init__(self, interval: int, warmup: int) -> None:
        self.interval, self.warmup = interval, warmup

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, lr_scheduler: LambdaLR, **kwargs
    ) -> None:
        lr_scheduler.lr_lambdas = [self._warm_up_again(schedule) for schedule in lr_scheduler.lr_lambdas]

    def _warm_up_again(self, schedule: Callable[[int], float]) -> Callable[[int], float]:
        def jagged(step: int) -> float:
            since = step % self.interval
            return schedule(step) * (1.0 if step < self.interval else min(1.0, (since + 1) / self.warmup))

        return jagged

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model, optimizer, **kwargs
    ) -> None:
        # Not after the last step, when only the record of the state's size would change.
        if state.global_step % self.interval == 0 and state.global_step < state.max_steps:
            with torch.random.fork_rng():
                torch.manual_seed(args.seed + state.global_step)  # the same A on every process
                restart(model, optimizer)
