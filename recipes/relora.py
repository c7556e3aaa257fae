"""ReLoRA (arXiv 2307.05695): LoRA whose adapters are merged into the weights and begin anew, again and again.

A sum of low-rank changes has a higher rank than each of them. This is the published restart with the whole state of
the adapters' optimizer reset, and without the published warm start by full-rank training.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def add_lora(model: PreTrainedModel, config: LoraConfig, embeddings: bool) -> None:
    """LoRA around the linear layers, in place; what it does not wrap (embeddings, norms, output head) is trained as it
    is, or frozen.

    The model itself stays the one to train: its checkpoints then hold all weights, the frozen ones included, which
    restarts change.
    """
    LoraModel(model, config, adapter_name="default", low_cpu_mem_usage=model.device.type == "meta")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".lora_" in name or (embeddings and ".base_layer." not in name)


def merge(model: PreTrainedModel) -> None:
    """Puts the linear layers back, with the adapters in their weights: the model has no LoRA any more."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())


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
