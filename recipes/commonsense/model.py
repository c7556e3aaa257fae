"""A model as each method trains it, and its tokenizer as the tasks need it."""

from __future__ import annotations

import copy

from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from fira_hf import FiraConfig
from fira_hf.targets import find_targets
from recipes import models
from recipes.commonsense.settings import METHODS, RecipeArguments
from recipes.relora import add_lora


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the left, as generation needs it."""
    tokenizer = models.load_tokenizer(name)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer of {name} has no end-of-text token, which every training example ends with.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Batches padded on the right. On the left padding attends to nothing, for which cuDNN's attention in torch 2.11
    has gradients of NaN at some lengths (pytorch issue 196678). Scoring pads on the left, as generation needs it.
    """
    padding = copy.copy(tokenizer)
    padding.padding_side = "right"
    return DataCollatorForSeq2Seq(padding, pad_to_multiple_of=8)


def wrap(model: PreTrainedModel, arguments: RecipeArguments) -> PreTrainedModel | PeftModel:
    """The model as the method trains it: with LoRA around the target modules, or as it is."""
    method, targets = METHODS[arguments.method], FiraConfig(target_modules=arguments.target_modules)
    if not method.four_bits:
        find_targets(model, targets)  # every entry must match; PEFT and GaLore ignore one that does not
    if not method.lora:
        return model
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=arguments.target_modules,
        use_dora=arguments.method == "dora",
    )
    if method.four_bits:
        # Norms, embeddings and head in fp32. Gradient checkpointing is for TrainingArguments to say.
        wrapped = get_peft_model(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False), lora)
        find_targets(wrapped, targets)  # which finds the adapters: what they wrap cannot be trained
        return wrapped
    if arguments.method != "relora":
        return get_peft_model(model, lora, low_cpu_mem_usage=model.device.type == "meta")
    add_lora(model, lora, embeddings=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # as get_peft_model has them
    return model
