"""Train a LLaMA from random weights by one method, and write result.json.

    python -m recipes.pretraining.train recipes/pretraining/experiments/tiny/fira.yaml [--key value ...]

Keys are those of `RecipeArguments` (settings.py) and of `transformers.TrainingArguments`. The same command continues a
run that was interrupted.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from peft import LoraConfig
from torch.optim import AdamW
from transformers import LlamaForCausalLM, TrainerCallback, TrainingArguments, set_seed

import fira_hf  # registers optim="fira"
from fira_hf.callbacks import AnalysisCallback
from recipes import launch, measure
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
    config = load_config(arguments.model_config)
    tokenizer, train, valid = data.load(arguments, config.vocab_size, training.seed)
    config.eos_token_id = tokenizer.eos_token_id
    set_seed(training.seed)
    model = build(config, arguments)
    parameters = model.num_parameters()
    is_lora = METHODS[arguments.method].lora
    if is_lora:
        lora = LoraConfig(r=arguments.lora_rank, lora_alpha=arguments.lora_alpha, target_modules="all-linear")
        add_lora(model, lora, embeddings=True)
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
        data_collator=functools.partial(data.collate, length=arguments.sequence_length),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    memory = measure.peak_memory()
    loss = launch.validate(trainer)
    found = launch.figures(trainer, trainer.state.num_input_tokens_seen)
    for entry in found["history"]:
        if "eval_loss" in entry:
            entry["perplexity"] = perplexity(entry["eval_loss"])
    if arguments.keep_model:
        if is_lora:
            merge(model)
        launch.save_model(trainer)
    return found | {
        "parameters": parameters,
        "peak_memory": memory,
        "eval_loss": loss,
        "perplexity": perplexity(loss),
        "eval_tokens": sum(map(len, valid["input_ids"])),
    }


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
