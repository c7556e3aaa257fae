"""What a run would do, from the model's configuration alone: no weights, no training."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments

from fira_hf import FiraConfig
from fira_hf.arguments import config_from_args
from fira_hf.factory import parameter_count, summarize
from fira_hf.memory import MemoryEstimate, estimate_memory
from fira_hf.meta_models import quantise, switch_on_checkpointing
from fira_hf.targets import find_targets
from recipes.commonsense.data import load_questions, load_training
from recipes.commonsense.model import wrap
from recipes.commonsense.settings import METHODS, RecipeArguments
from recipes.models import load_without_weights

GIB = 1024**3


def dry_run(arguments: RecipeArguments, training: TrainingArguments) -> None:
    """Print targets and predicted memory, then check the data. Raises ValueError or OSError where a run would fail."""
    model = shapes(arguments)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(map(parameter_count, model.parameters()))
    print(f"{arguments.method} on {arguments.model}: trains {trainable:,} of {total:,} parameters")
    memory = predict_memory(model, arguments, training)
    for name in ("weights", "gradients", "optimizer_state", "activations", "total"):
        print(f"  {name.replace('_', ' '):<16}{getattr(memory, name) / GIB:9.3f} GiB")
    batch = f"{training.per_device_train_batch_size} x {arguments.cutoff_len}"
    print(f"  (activations of {batch} tokens in the dtype of the weights; PyTorch's own overhead comes on top)")

    train, validation = load_training(arguments)
    print(f"Data: {len(train):,} training and {len(validation):,} validation examples")
    for task, questions in load_questions(arguments).items():
        print(f"  {task:<16}{len(questions):6,} questions")


def shapes(arguments: RecipeArguments) -> PreTrainedModel | PeftModel:
    """The model as the method trains it, without its weights."""
    model = load_without_weights(arguments.model, arguments.dtype, arguments.model_config)
    if METHODS[arguments.method].four_bits:
        quantise(model)
    return wrap(model, arguments)


def predict_memory(
    model: PreTrainedModel | PeftModel, arguments: RecipeArguments, training: TrainingArguments
) -> MemoryEstimate:
    if training.gradient_checkpointing:
        switch_on_checkpointing(model)
    batch: dict[str, Any] = {
        "batch_size": training.per_device_train_batch_size,
        "sequence_length": arguments.cutoff_len,
        "accumulates": training.gradient_accumulation_steps > 1,
    }
    if training.optim == "fira":
        config = config_from_args(training, model)
        print(summarize(model, find_targets(model, config), config))
        return estimate_memory(model, config, **batch)
    if training.optim == "galore_adamw":
        rank = dict(entry.split("=") for entry in training.optim_args.replace(" ", "").split(","))["rank"]
        config = FiraConfig(rank=int(rank), target_modules=arguments.target_modules)
        return estimate_memory(model, config, **batch, optimizer="galore")
    return estimate_memory(model, None, **batch)
