"""Train one method on the commonsense tasks, score it, and write result.json.

    python -m recipes.commonsense.train recipes/commonsense/experiments/smoke/lora.yaml [--key value ...]

Keys are those of `RecipeArguments` (settings.py) and of `transformers.TrainingArguments`. The same command continues a
run that was interrupted. --dry_run checks data, targets and memory instead.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

from accelerate.utils import parse_flag_from_env
from datasets import Dataset
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import fira_hf  # registers optim="fira"
from recipes import launch, measure, relora
from recipes.commonsense import data
from recipes.commonsense.dry_run import dry_run
from recipes.commonsense.model import collator, load_tokenizer, wrap
from recipes.commonsense.scoring import answer_losses, fingerprint, score
from recipes.commonsense.settings import METHODS, RECIPE, RecipeArguments
from recipes.commonsense.tasks import counted
from recipes.models import load_in_4_bits, load_model

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft asks transformers by the old name


def parse(settings: dict[str, Any]) -> tuple[RecipeArguments, TrainingArguments]:
    """Settings -> typed arguments. Raises ValueError for an unknown key or a value of the wrong kind."""
    arguments, training = launch.parse(settings, RecipeArguments)
    if METHODS[arguments.method].four_bits and (training.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")):
        raise ValueError(
            f"method {arguments.method} does not run under FSDP, which would have to split weights of 4 bits: use DDP "
            f"(accelerate/ddp.yaml), or method {arguments.method.replace('qlora', 'lora')}."
        )
    if training.optim in ("fira", "galore_adamw"):
        is_lora = METHODS[arguments.method].lora
        training.optim_target_modules = ["lora_A", "lora_B"] if is_lora else arguments.target_modules
    return arguments, training


def run(arguments: RecipeArguments, training: TrainingArguments) -> dict[str, Any]:
    """Train and score; returns what the run found out."""
    questions = data.load_questions(arguments)
    train_records, validation_records = data.load_training(arguments)
    with training.main_process_first():  # the embedded model is converted once
        tokenizer = load_tokenizer(arguments.model)
    encoded = data.encode_all(train_records, tokenizer, arguments.cutoff_len, arguments.train_on_inputs)
    validation = encode_validation(validation_records, tokenizer, arguments)
    set_seed(training.seed)
    if METHODS[arguments.method].four_bits:
        base = load_in_4_bits(arguments.model, arguments.dtype, training.device)
    else:
        base = load_model(arguments.model, arguments.dtype)
    model = wrap(base, arguments)
    callbacks: list[TrainerCallback] = [measure.StepTime()]
    if training.optim == "fira":
        callbacks.append(fira_hf.FiraCallback())
    if arguments.method == "relora":
        callbacks.append(relora.Restarts(arguments.relora_interval, arguments.relora_warmup))
    trainer = launch.RecipeTrainer(
        model=model,
        args=training,
        train_dataset=encoded,
        eval_dataset=validation,
        data_collator=collator(tokenizer),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    memory = measure.peak_memory(training.device)
    lengths = list(map(len, encoded["input_ids"]))
    figures = {
        "peak_memory": memory,
        "eval_loss": launch.validate(trainer) if validation else None,
        "training_examples": len(lengths),
        **launch.figures(trainer, trainer.state.epoch * sum(lengths)),
    }
    scores = evaluate(trainer, arguments, questions, validation)
    if arguments.keep_model:
        if arguments.method == "relora":
            relora.merge(trainer.model)
        launch.save_model(trainer)
    return figures | scores


def encode_validation(
    records: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, arguments: RecipeArguments
) -> Dataset | None:
    """With the labels of the response, however the training labels are chosen: methods and learning rates are compared
    by its loss.
    """
    return data.encode_all(records, tokenizer, arguments.cutoff_len, train_on_inputs=False) if records else None


def evaluate(
    trainer: Trainer,
    arguments: RecipeArguments,
    questions: dict[str, list[dict[str, Any]]],
    validation: Dataset | None,
) -> dict[str, Any]:
    """What is found out about a model question by question, and example by example."""
    model, tokenizer, start = trainer.model, trainer.processing_class, time.perf_counter()
    held_out = None
    if validation is not None:
        losses = answer_losses(model, tokenizer, validation, arguments.scoring_batch_size)
        examples = [validation["input_ids"][:], validation["labels"][:]]
        held_out = {"losses": [round(loss, 6) for loss in losses], "fingerprint": fingerprint(examples)}
    accuracy = score(model, tokenizer, questions, arguments)
    shares = [counted(task, figures)["accuracy"] for task, figures in accuracy.items()]
    return {
        "held_out": held_out,
        "scoring_seconds": time.perf_counter() - start,
        "accuracy": accuracy,
        "average": sum(shares) / len(shares) if shares else None,
    }


def main(words: list[str] | None = None) -> int:
    return launch.main(RECIPE, __doc__, words, parse, run, dry_run)


if __name__ == "__main__":
    launch.leave(main())
