"""Predicted memory beside what a training step allocates."""

import pytest
import torch

from conftest import build_llama
from fira_hf import FiraConfig
from fira_hf.memory import estimate_memory
from recipes.benchmarks.memory import allocations, peak


def wrap_in_lora(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))


@pytest.mark.parametrize("wrap", [lambda model: model, wrap_in_lora], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["all activations", "checkpointing"])
def test_the_peak_of_a_step_is_predicted_within_five_percent(wrap, checkpointing):
    """From the model on the meta device; measured beyond the weights, with the gradients."""
    size = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "vocab_size": 2048}
    with torch.device("meta"):
        on_meta = wrap(build_llama(**size))
    model = wrap(build_llama(**size))
    for one in (on_meta, model):
        if checkpointing:
            one.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            one.enable_input_require_grads()
    estimate = estimate_memory(on_meta, FiraConfig(rank=4), batch_size=4, sequence_length=128)
    assert not on_meta.training or model.training

    tokens = torch.zeros(4, 128, dtype=torch.long)
    model.train()

    def step():
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()

    step()
    model.zero_grad()
    measured = peak(allocations(lambda: model(input_ids=tokens, labels=tokens).loss.backward()))
    assert estimate.gradients + estimate.activations == pytest.approx(measured, rel=0.05)


def test_estimating_leaves_the_model_as_it_was():
    model = build_llama().eval()
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    estimate_memory(model, None, batch_size=1, sequence_length=8)
    assert not model.training
    for name, p in model.named_parameters():
        assert id(p) == before[name][0] and torch.equal(p, before[name][1]) and p.grad is None


@pytest.mark.parametrize("given", [{"batch_size": 4}, {"sequence_length": 128}])
def test_half_a_batch_is_refused(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        estimate_memory(build_llama(), None, **given)
