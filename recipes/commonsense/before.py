"""Score a model as it is, before any training, and write result.json.

    python -m recipes.commonsense.before recipes/commonsense/experiments/smoke/lora.yaml [--key value ...]

Of the settings those count that matter before training: the model, the data and the scoring. `compare` runs this once.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments

from recipes import launch
from recipes.commonsense import data
from recipes.commonsense.model import collator, load_tokenizer
from recipes.commonsense.settings import RECIPE, RecipeArguments
from recipes.commonsense.train import encode_validation, evaluate
from recipes.models import load_model


def parse(settings: dict[str, Any]) -> tuple[RecipeArguments, TrainingArguments]:
    return launch.parse(settings, RecipeArguments)


def run(arguments: RecipeArguments, training: TrainingArguments) -> dict[str, Any]:
    questions = data.load_questions(arguments)
    _, validation_records = data.load_training(arguments)
    with training.main_process_first():  # the embedded model is converted once
        tokenizer = load_tokenizer(arguments.model)
    validation = encode_validation(validation_records, tokenizer, arguments)
    trainer = launch.RecipeTrainer(
        model=load_model(arguments.model, arguments.dtype),
        args=training,
        eval_dataset=validation,
        data_collator=collator(tokenizer),
        processing_class=tokenizer,
    )
    eval_loss = trainer.evaluate()["eval_loss"] if validation else None
    return {"history": [], "eval_loss": eval_loss, **evaluate(trainer, arguments, questions, validation)}


def main(words: list[str] | None = None) -> int:
    return launch.main(RECIPE, __doc__, words, parse, run, program="before")


if __name__ == "__main__":
    launch.leave(main())
