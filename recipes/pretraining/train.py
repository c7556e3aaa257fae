"""Train a LLaMA from random weights, or go on from a pretrained model, by one method, and write result.json.

    python -m recipes.pretraining.train recipes/pretraining/experiments/tiny/fira.yaml [--key value ...]

Keys are those of `RecipeArguments` (settings.py) and of `transformers.TrainingArguments`. The same command continues a
run that was interrupted.
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.optim import AdamW
from transformers import LlamaForCausalLM, TrainerCallback, TrainingArguments, set_seed

import fira_hf  # registers optim="fira"
from fira_hf.callbacks import AnalysisCallback
from recipes import launch, measure, models
from recipes.pretraining import data
from recipes.pretraining.model import build, load_config
from recipes.pretraining.settings import C4, METHODS, RECIPE, RecipeArguments
from recipes.relora import Restarts, add_lora, merge

MATRICES = ("attn", "mlp")  # as published, linear layers with these in their names are projected


def parse(settings: dict[str, Any]) -> tuple[RecipeArguments, TrainingArguments]:
    """Settings -> typed arguments. Raises ValueError for an unknown key or a value of the wrong kind."""
    arguments, training = launch.parse(settings, RecipeArguments)
    if arguments.data_dir == C4 and training.max_steps < 1:
        raise ValueError(f"data_dir {C4} is a stream without an end; set max_steps to a number of optimizer steps.")
    if not training.optim.startswith("adamw"):
        training.optim_target_modules = list(MATRICES)
    training.include_num_input_tokens_seen = "non_padding"
    return arguments, training


def run(arguments: RecipeArguments, training: TrainingArguments) -> dict[str, Any]:
    """Train; returns what the run found out."""
    with training.main_process_first():  # the embedded model is converted once
        config = (
            load_config(arguments.model_config) if arguments.model is None else models.load_config(arguments.model)
        )
    tokenizer, train, valid = data.load(arguments, config.vocab_size, training.seed)
    other = None if arguments.other_data_dir is None else data.load_other(arguments, tokenizer)
    before = {} if arguments.model is None else evaluate_before(arguments, training, valid, other)
    set_seed(training.seed)
    if arguments.model is None:
        config.eos_token_id = tokenizer.eos_token_id
        model = build(config, arguments)
    else:
        model = models.load_model(arguments.model, arguments.dtype)
    parameters = model.num_parameters()
    is_lora = METHODS[arguments.method].lora
    if is_lora:
        lora = LoraConfig(r=arguments.lora_rank, lora_alpha=arguments.lora_alpha, target_modules="all-linear")
        add_lora(model, lora, embeddings=arguments.model is None)  # pretrained ones stay, as is usual
    callbacks: list[TrainerCallback] = [measure.StepTime()]
    if training.optim.startswith("fira"):
        callbacks.append(fira_hf.FiraCallback())
    if arguments.analysis_steps:
        callbacks.append(AnalysisCallback(arguments.analysis_steps))
    if arguments.method == "relora":
        callbacks.append(Restarts(arguments.relora_interval, arguments.relora_warmup))
    optimizers = (two_rates(model, arguments, training), None) if arguments.dense_lr is not None else (None, None)
    trainer = launch.RecipeTrainer(
        model=model,
        args=training,
        optimizers=optimizers,
        train_dataset=train,
        eval_dataset=valid,
        data_collator=collator(arguments),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    memory = measure.peak_memory(training.device)
    loss = launch.validate(trainer)
    found = launch.figures(trainer, trainer.state.num_input_tokens_seen)
    if before:
        found["history"].insert(0, {"step": 0, "eval_loss": before["eval_loss_before"]})
    for entry in found["history"]:
        if "eval_loss" in entry:
            entry["perplexity"] = perplexity(entry["eval_loss"])
    after = {}
    if other is not None:
        after = {"other_loss": trainer.evaluate(other)["eval_loss"], "other_tokens": sum(map(len, other["input_ids"]))}
    if arguments.keep_model:
        if is_lora:
            merge(model)
        launch.save_model(trainer)
    return (
        found
        | before
        | {
            "parameters": parameters,
            "peak_memory": memory,
            "eval_loss": loss,
            "perplexity": perplexity(loss),
            "eval_tokens": sum(map(len, valid["input_ids"])),
        }
        | after
    )


def collator(arguments: RecipeArguments) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    return functools.partial(data.collate, length=arguments.sequence_length)


def evaluate_before(
    arguments: RecipeArguments, training: TrainingArguments, valid: Dataset, other: Dataset | None
) -> dict[str, float]:
    """The losses of the pretrained model as it is, also where the training is resumed.

    Of a model of its own: one that has been evaluated counts as prepared for training, too, and each of several
    processes would then train it by itself.
    """
    model = models.load_model(arguments.model, arguments.dtype)
    trainer = launch.RecipeTrainer(model=model, args=training, eval_dataset=valid, data_collator=collator(arguments))
    found = {"eval_loss_before": trainer.evaluate()["eval_loss"]}
    if other is not None:
        found["other_loss_before"] = trainer.evaluate(other)["eval_loss"]
    del model, trainer
    gc.collect()  # else its weights would count in the peak of the training
    return found


def two_rates(model: LlamaForCausalLM, arguments: RecipeArguments, training: TrainingArguments) -> AdamW:
    """AdamW with a learning rate of its own for what the low-rank methods do not project."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if any(part in name for part in MATRICES)]
    others = [p for name, p in trained if not any(part in name for part in MATRICES)]
    return AdamW(
        [{"params": matrices}, {"params": others, "lr": arguments.dense_lr}],
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        weight_decay=training.weight_decay,
        fused=True,
    )


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # larger ones no float can hold


def main(words: list[str] | None = None) -> int:
    return launch.main(RECIPE, __doc__, words, parse, run)


if __name__ == "__main__":
    launch.leave(main())
