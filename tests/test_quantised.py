"""A base in 4 bits: what is said of it, what it weighs, and that adapters on it train and resume."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer, TrainingArguments

from conftest import build_llama, trainer_settings
from fira_hf import FiraConfig, get_fira_optimizer
from fira_hf.memory import estimate_memory, predict_memory
from fira_hf.targets import find_targets
from recipes import models
from test_memory import assert_step_is_as_predicted

if importlib.util.find_spec("bitsandbytes") is None:
    pytest.skip("needs bitsandbytes", allow_module_level=True)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A LLaMA of two layers whose linear layers are of 4 bits, two weights to a byte."""
    folder = tmp_path_factory.mktemp("llama")
    build_llama().save_pretrained(folder)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=settings).requires_grad_(False)


def test_a_quantised_base_with_a_trained_head_says_what_is_the_case(quantised):
    quantised.lm_head.requires_grad_(True)
    try:
        wrong = r"The other linear layers \(14\) are quantised and frozen: add adapters \(PEFT's LoRA\) or name 'lm_"
        with pytest.raises(ValueError, match=wrong):
            find_targets(quantised, FiraConfig())
        plan = find_targets(quantised, FiraConfig(rank=2, target_modules=["lm_head"]))
        assert [target.name for target in plan.projected] == ["lm_head.weight"]
    finally:
        quantised.lm_head.requires_grad_(False)


def test_training_a_quantised_base_without_adapters_says_that_it_needs_them(quantised, tmp_path):
    wrong = r"no trainable linear layer: its linear layers are quantised and frozen: add adapters \(PEFT's LoRA\)\.$"
    with pytest.raises(ValueError, match=wrong):
        find_targets(quantised, FiraConfig())
    quantised.lm_head.requires_grad_(True)
    try:
        wrong = r"'q_proj' matches only quantised weights, which cannot be trained: add adapters \(PEFT's"
        with pytest.raises(ValueError, match=wrong):
            find_targets(quantised, FiraConfig(target_modules=["q_proj"]))
    finally:
        quantised.lm_head.requires_grad_(False)
    with pytest.raises(ValueError, match="attach trainable adapters"):  # of transformers
        Trainer(quantised, TrainingArguments(str(tmp_path), **trainer_settings(optim="fira")))


def test_frozen_parameters_are_counted_as_peft_counts_them(quantised):
    model = get_peft_model(quantised, LoraConfig(r=4, target_modules=["q_proj"]))
    trained, total = model.get_nb_trainable_parameters()
    summary = get_fira_optimizer(model, FiraConfig(rank=2)).summary
    in_4_bits = sum(p.numel() for name, p in build_llama().named_parameters() if name.endswith("_proj.weight"))
    assert f"Frozen: {total - trained:,} parameters, {in_4_bits:,} of them in 4 bits." in summary
    assert total - trained == sum(p.numel() for p in build_llama().parameters())
    model.unload()


# --------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("method", "checkpointing", "dtype"), [("qlora", False, "bfloat16"), ("fira-on-qlora", True, "float32")]
)
def test_memory_is_predicted_from_shapes(method, checkpointing, dtype, tmp_path):
    """Weights with their scales and state to the byte, and the peak of a whole step within five percent."""
    size = {"hidden_size": 128, "intermediate_size": 352, "num_key_value_heads": 4, "vocab_size": 512}
    build_llama(**size, use_cache=False).save_pretrained(tmp_path)
    model = models.load_in_4_bits(str(tmp_path), dtype, torch.device("cpu"))
    model = prepare_model_for_kbit_training(
        model, checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    shape = {"batch_size": 4, "sequence_length": 64, "gradient_checkpointing": checkpointing}
    predicted = predict_memory(model.config, [method], FiraConfig(8), dtype=dtype, **shape)[method]
    if method == "qlora":
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    else:
        optimizer = get_fira_optimizer(model, FiraConfig(rank=8))

    weights = sum(p.nbytes + quantisation_bytes(getattr(p, "quant_state", None)) for p in model.parameters())
    assert estimate_memory(model, FiraConfig(rank=8)).weights == weights
    assert_step_is_as_predicted(predicted, model, optimizer, weights, (4, 64))


def quantisation_bytes(state) -> int:
    """By the names under which bitsandbytes saves what belongs to a weight; of the text a few bytes."""
    if state is None:
        return 0
    saved = state.as_dict(packed=True)
    return sum(t.nbytes for name, t in saved.items() if "bitsandbytes" not in name) + state.offset.nbytes
