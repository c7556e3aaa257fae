"""Train one method on the commonsense tasks, score it, and write result.json.

    python -m recipes.commonsense.train recipes/commonsense/experiments/smoke/lora.yaml [--key value ...]

Keys are those of `RecipeArguments` (settings.py) and of `transformers.TrainingArguments`. The same command continues a
run that was interrupted. --dry_run checks data, targets and memory instead.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

from transformers import DataCollatorForSeq2Seq, TrainerCallback, TrainingArguments, set_seed

import fira_hf  # registers optim="fira"
from recipes import launch, measure, relora
from recipes.commonsense import data
from recipes.commonsense.dry_run import dry_run
from recipes.commonsense.model import load_model, load_tokenizer, wrap
from recipes.commonsense.scoring import score
from recipes.commonsense.settings import METHODS, RECIPE, RecipeArguments

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft asks transformers by the old name


def parse(settings: dict[str, Any]) -> tuple[RecipeArguments, TrainingArguments]:
    """Settings -> typed arguments. Raises ValueError for an unknown key or a value of the wrong kind."""
    arguments, training = launch.parse(settings, RecipeArguments)
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
    # The validation loss is that of the response, however the training labels are chosen: methods and learning rates
    # are compared by it.
    validation = None
    if validation_records:
        validation = data.encode_all(validation_records, tokenizer, arguments.cutoff_len, train_on_inputs=False)

    set_seed(training.seed)
    model = wrap(load_model(arguments.model, arguments.dtype), arguments)
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
        data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    memory = measure.peak_memory()
    lengths = list(map(len, encoded["input_ids"]))
    figures = {
        "peak_memory": memory,
        "eval_loss": launch.validate(trainer) if validation else None,
        "training_examples": len(lengths),
        **launch.figures(trainer, trainer.state.epoch * sum(lengths)),
    }
    start = time.perf_counter()
    accuracy = score(trainer.model, tokenizer, questions, arguments)
    if arguments.keep_model:
        if arguments.method == "relora":
            relora.merge(trainer.model)
        launch.save_model(trainer)
    return figures | {
        "scoring_seconds": time.perf_counter() - start,
        "accuracy": accuracy,
        "average": sum(task["accuracy"] for task in accuracy.values()) / len(accuracy) if accuracy else None,
    }


def main(words: list[str] | None = None) -> int:
    return launch.main(RECIPE, __doc__, words, parse, run, dry_run)


if __name__ == "__main__":
    launch.leave(main())
