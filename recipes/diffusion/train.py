"""Train a small diffusion model of handwritten digits by one method, and write result.json.

    python -m recipes.diffusion.train recipes/diffusion/experiments/unet/fira-full.yaml [--key value ...]

Keys are those of `RecipeArguments` (settings.py) and of `transformers.TrainingArguments`. The same command continues a
run that was interrupted.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments, set_seed

import fira_hf  # registers optim="fira"
from fira_hf.config import ALL_LINEAR, ALL_LINEAR_AND_CONV
from recipes import launch, measure
from recipes.diffusion import data
from recipes.diffusion.model import Denoiser, build, with_lora
from recipes.diffusion.settings import METHODS, RECIPE, RecipeArguments

SAMPLES = 2  # of each digit


def parse(settings: dict[str, Any]) -> tuple[RecipeArguments, TrainingArguments]:
    """Settings -> typed arguments. Raises ValueError for an unknown key or a value of the wrong kind."""
    arguments, training = launch.parse(settings, RecipeArguments)
    if training.optim.startswith("fira"):
        training.optim_target_modules = ALL_LINEAR_AND_CONV
    elif training.optim.startswith("galore"):
        training.optim_target_modules = ALL_LINEAR  # it takes matrices, and the Trainer gives it no others
    return arguments, training


def run(arguments: RecipeArguments, training: TrainingArguments) -> dict[str, Any]:
    """Train; returns what the run found out."""
    train, held_out = data.load()
    valid = data.with_noise(held_out, arguments.draws)
    set_seed(training.seed)
    model = build(arguments)
    parameters = sum(p.numel() for p in model.parameters())
    if METHODS[arguments.method].lora:
        with_lora(model, arguments)
    denoiser = Denoiser(model)
    callbacks: list[TrainerCallback] = [measure.StepTime()]
    if training.optim.startswith("fira"):
        callbacks.append(fira_hf.FiraCallback())
    trainer = launch.RecipeTrainer(
        model=denoiser, args=training, train_dataset=train, eval_dataset=valid, callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    found = launch.figures(trainer, 0)
    del found["training_tokens"], found["tokens_per_second"]
    images = trainer.state.global_step * training.train_batch_size * training.gradient_accumulation_steps
    predicted = trainer.predict(valid)
    losses = torch.as_tensor(predicted.predictions).view(len(held_out), arguments.draws).double().mean(1)
    labels = torch.arange(data.DIGITS, device=training.device).repeat(SAMPLES)
    return found | {
        "parameters": parameters,
        "training_images": images * training.world_size,
        "eval_loss": losses.mean().item(),
        "held_out": {"losses": losses.tolist(), "fingerprint": data.fingerprint(valid)},
        "samples": data.as_text(denoiser.eval().sample(labels, training.seed).cpu()),
    }


def main(words: list[str] | None = None) -> int:
    return launch.main(RECIPE, __doc__, words, parse, run)


if __name__ == "__main__":
    launch.leave(main())
