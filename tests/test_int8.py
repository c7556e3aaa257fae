"""Weights that torchao keeps as int8: what a step reads and writes, and what training them keeps of its promises."""

import contextlib
import copy
import importlib.util
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from conftest import build_llama
from fira_hf import FiraAdamW, FiraConfig, functional, get_fira_optimizer, int8, matrices
from fira_hf.layerwise import step_in_backward
from fira_hf.memory import predict_memory
from fira_hf.meta_models import switch_on_checkpointing
from recipes.benchmarks.memory import allocations, peak
from test_accelerator import no_reads
from test_memory import assert_step_is_as_predicted

torchao = pytest.importorskip("torchao.prototype.quantized_training")
quantize_ = pytest.importorskip("torchao.quantization").quantize_
SHAPES = [(96, 40), (40, 96), (48, 48)]
SETTINGS = [{}, {"projection": "columns"}, {"residual": "none"}, {"split": 2}, {"base_optimizer": "muon"}]


def quantised(matrix):
    """A parameter of torchao's, with scales of the matrix's dtype."""
    return torch.nn.Parameter(torchao.Int8QuantizedTrainingLinearWeight.from_float(matrix))


def values(p):
    return p.int_data.double() * p.scale.double().unsqueeze(1)


def parts(model):
    return [part.clone() for p in model.parameters() for part in int8.stored(p.detach())]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def small(dtype=torch.bfloat16, **config):
    model = build_llama(dtype=dtype, **config)
    int8.quantise(model)
    return model


def train(model, optimizer, steps, first=0):
    for i in range(first, first + steps):
        tokens = (torch.arange(16).view(2, 8) * (i + 3)) % 64
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def coded(x, scales, seed=0):
    return int8.encode(x.clone(), scales, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_codes_have_the_mean_of_what_they_stand_for_and_cut_nothing_off(dtype):
    x = torch.linspace(-1, 1, 101).view(1, -1).repeat(4000, 1) * 0.7
    codes, scales = coded(x, torch.ones(4000, 1, dtype=dtype))
    assert scales.dtype == dtype and codes.abs().max() <= 127
    assert (127 * scales.double() >= x.abs().amax(1, keepdim=True).double()).all()
    assert (scales.double() <= (1 + 2 * torch.finfo(dtype).eps) * 0.7 / 127).all()
    off = codes.double() * scales.double() - x.double()
    assert (off.abs() < scales.double()).all()
    assert off.mean(0).abs().max() < 4.5 * 0.5 * scales[0].double() / 4000**0.5  # a one in 1,500 chance for any of 101


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_keeps_its_scale_and_its_codes_until_its_largest_value_outgrows_or_leaves_them(dtype):
    codes = torch.randint(-100, 101, (6, 64), generator=torch.Generator().manual_seed(1)).float()
    codes[:, 0] = torch.tensor([127.0, -96, 127, 127, 95, 0])
    codes[5] = 0
    scales = torch.tensor([0.013, 0.7, 1e-3, 2.0, 0.1, 0.5], dtype=dtype).view(-1, 1)
    codes[4] = codes[4].clamp(-95, 95)
    x = codes * scales.float()
    x[2, 1] = 127.5 * scales[2].float()
    new, after = coded(x, scales)
    assert torch.equal(after[[0, 1, 3]], scales[[0, 1, 3]]) and torch.equal(new[[0, 1, 3]].float(), codes[[0, 1, 3]])
    assert after[2] > scales[2] and after[4] < scales[4] and after[5] < scales[5]
    assert not new[5].any() and torch.isfinite(after).all() and (after > 0).all()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_is_that_of_the_dequantised_weight_but_for_one_rounding(shape, dtype, settings, monkeypatch):
    monkeypatch.setattr(int8, "BLOCK", {"cpu": 7 * shape[1]})  # whole rows, and a rest
    p = quantised(normal(*shape, dtype=dtype))
    exact = torch.nn.Parameter(values(p).float())
    group = {"rank": 8, "update_proj_gap": 2, **settings}
    pair = [FiraAdamW([{"params": [one], **group}], lr=1e-2, weight_decay=0.1) for one in (p, exact)]
    for step in range(3):
        exact.data.copy_(values(p))
        p.grad = normal(*shape, seed=step + 1, dtype=dtype)
        exact.grad = p.grad.float()
        before = values(p)
        for optimizer in pair:
            optimizer.step()
        assert not torch.equal(values(p), before)
        assert ((values(p) - exact.double()).abs() <= 1.0001 * p.scale.double().unsqueeze(1)).all()


def test_weights_of_which_no_address_is_known_do_not_go_to_the_kernels(monkeypatch):
    """Those that torchao multiplies in int8 hold their numbers in another tensor: their own address is 0."""
    monkeypatch.setattr(matrices, "_operations", lambda device: "kernels")
    layer = torch.nn.Linear(32, 16, bias=False)
    assert matrices.operations(layer.weight) == "kernels" == matrices.operations(quantised(normal(16, 32)))
    quantize_(layer, torchao.int8_mixed_precision_training())
    assert layer.weight.data.data_ptr() == 0 and matrices.operations(layer.weight) is functional


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("settings", [{}, {"projection": "columns"}, {"residual": "none", "alpha": 2.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(70, 40), (40, 70)], ids=str)
def test_the_kernel_of_an_accelerator_does_the_same_and_leaves_the_host_alone(shape, dtype, settings, monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")  # of the parameter, not of the codes in it
    device = property(lambda p: cuda if hasattr(p, "pretends") else cpu)
    monkeypatch.setattr(torchao.Int8QuantizedTrainingLinearWeight, "device", device, raising=False)
    p = quantised(normal(*shape, dtype=dtype))
    p.pretends = True
    exact = torch.nn.Parameter(values(p).float())
    group = {"rank": 8, "refresh": "together", "update_proj_gap": 100, **settings}
    pair = [FiraAdamW([{"params": [one], **group}], lr=1e-2, weight_decay=0.1) for one in (p, exact)]
    off = []
    for step in range(3):
        exact.data.copy_(values(p))
        p.grad = normal(*shape, seed=step + 1, dtype=dtype)
        exact.grad = p.grad.float()
        with no_reads() if step else contextlib.nullcontext():
            pair[0].step()
        pair[1].step()
        off.append((values(p) - exact.double()) / p.scale.double().unsqueeze(1))
    off = torch.stack(off)
    assert off.abs().max() < 1.02  # factors of products are bf16
    assert off.mean().abs() < 4.5 * 0.5 / off.numel() ** 0.5
    kept = p.int_data.clone(), p.scale.clone()
    p.grad[1, 1] = torch.nan
    pair[0].step()
    assert same(kept, (p.int_data, p.scale))


@pytest.mark.parametrize("projected", [True, False])
def test_updates_far_below_the_distance_of_two_codes_are_not_lost(projected):
    """The mean of 6,144 weights, each moved by less than a tenth of a code in forty steps."""
    start = normal(64, 96).abs().mul_(0.3).add_(0.5)
    start[:, 0] = 2
    p, exact = quantised(start.clone()), torch.nn.Parameter(start)
    exact.data.copy_(values(p))
    before = values(p)
    group = {"rank": 8} if projected else {}
    pair = [FiraAdamW([{"params": [one], **group}], lr=1e-4 if projected else 3e-5) for one in (p, exact)]
    for step in range(40):
        for one, optimizer in zip((p, exact), pair, strict=True):
            one.grad = normal(64, 96, seed=step).abs()
            optimizer.step()
    moved, expected = (before - values(p)).mean(), (before - exact.double()).mean()
    assert 0 < expected < 0.1 * p.scale.mean()
    # each weight is off by less than a distance, with a variance of at most moved * distance
    error = (expected * p.scale.mean() / p.numel()) ** 0.5
    assert abs(moved - expected) < 4.5 * error < 0.5 * expected


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_a_gradient_that_cannot_be_used_leaves_codes_and_scales_untouched(projected, value):
    p = quantised(normal(32, 24))
    optimizer = FiraAdamW([{"params": [p], **({"rank": 4} if projected else {})}], lr=1e-2, weight_decay=0.0)
    p.grad = normal(32, 24, seed=1)
    optimizer.step()
    p.scale.mul_(1.5)  # rows whose largest value would get them another scale
    p.int_data.copy_(p.int_data.float() / 1.5)
    kept = parts(torch.nn.ParameterList([p]))
    if projected or value != 0:
        p.grad.fill_(0)[3, 3] = value
        optimizer.step()
        assert same(parts(torch.nn.ParameterList([p])), kept)


@pytest.mark.parametrize("projected", [True, False])
def test_weights_decay(projected):
    """By a thousandth a step, which is less than the distance of two codes for all but none of them."""
    p = quantised(normal(64, 48).abs().add_(0.5))
    before = values(p).mean()
    group = {"rank": 4} if projected else {}
    optimizer = FiraAdamW([{"params": [p], **group}], lr=1e-9, weight_decay=1e6)
    for step in range(50):
        p.grad = normal(64, 48, seed=step)
        optimizer.step()
    assert values(p).mean() / before == pytest.approx(0.999**50, rel=2e-3)


def test_what_is_int8_is_said_and_a_plain_quantize_trains_the_head_as_well():
    model = small()
    optimizer = get_fira_optimizer(model, FiraConfig(rank=4, lr=1e-2))
    assert "15 of the trained weights are int8" in optimizer.summary
    before = parts(model)
    train(model, optimizer, 3)
    assert not any(torch.equal(a, b) for a, b in zip(parts(model), before, strict=True) if a.dtype == torch.int8)
    held = (state for state in optimizer.state.values())
    assert all(t.dtype == torch.float32 for state in held for t in state.values() if torch.is_tensor(t))


def test_a_run_that_is_saved_and_loaded_goes_on_to_the_last_bit():
    whole, half, again = small(), small(), small()
    for model in (half, again):
        int8.save_as_parts(model)
    config = FiraConfig(rank=4, lr=1e-2)
    optimizers = [get_fira_optimizer(model, config) for model in (whole, half, again)]
    train(whole, optimizers[0], 6)
    train(half, optimizers[1], 3)
    torch.manual_seed(5)  # nothing is drawn from the global generator
    saved = copy.deepcopy(half.state_dict())
    assert all(type(value) is torch.Tensor for value in saved.values())
    again.load_state_dict(saved)
    optimizers[2].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    train(again, optimizers[2], 3, first=3)
    assert same(parts(again), parts(whole))


def test_stepping_inside_backward_is_the_same_to_the_last_bit():
    models = small(), small()
    for model, layerwise in zip(models, (False, True), strict=True):
        optimizer = get_fira_optimizer(model, FiraConfig(rank=4, lr=1e-2))
        if layerwise:
            step_in_backward(optimizer)
        switch_on_checkpointing(model)
        train(model, optimizer, 4)
    assert same(*map(parts, models))


def test_a_step_makes_no_tensor_of_the_weights_size(monkeypatch):
    p = quantised(normal(512, 512))
    optimizer = FiraAdamW([{"params": [p], "rank": 4, "update_proj_gap": 100}], lr=1e-3)
    p.grad = normal(512, 512)
    optimizer.step(), optimizer.step()
    monkeypatch.setattr(int8, "BLOCK", {"cpu": 2**13})
    assert peak(allocations(optimizer.step)) < 0.3 * 4 * p.numel()


def test_the_peak_of_a_step_is_predicted_within_five_percent(monkeypatch):
    # As small beside these matrices as they are beside large ones.
    monkeypatch.setattr(int8, "BLOCK", {"cpu": 2**13})
    monkeypatch.setattr(functional, "BLOCK", 2**13)
    name = "fira_layerwise"
    size = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "vocab_size": 1024}
    model = small(**size, num_key_value_heads=4, use_cache=False)
    shape = {"batch_size": 1, "sequence_length": 64, "gradient_checkpointing": True}
    config = FiraConfig(rank=8, state_dtype="bfloat16")
    estimate = predict_memory(model.config, [name], config, dtype="int8", **shape)[name]
    switch_on_checkpointing(model)
    optimizer = get_fira_optimizer(model, config)
    step_in_backward(optimizer)
    weights = sum(part.nbytes for p in model.parameters() for part in int8.stored(p.detach()))
    assert_step_is_as_predicted(estimate, model, optimizer, weights, (1, 64))


def test_methods_that_train_no_int8_weights_are_refused():
    with pytest.raises(ValueError, match="galore trains no weights of dtype='int8': choose of adamw, fira"):
        predict_memory(build_llama().config, ["galore"], FiraConfig(4), dtype="int8")


def test_a_whole_moment_is_refused():
    with pytest.raises(ValueError, match="residual='moment' trains no int8 weights.*filter_fn"):
        get_fira_optimizer(small(), FiraConfig(rank=4, base_optimizer="muon", residual="moment"))


def test_without_torchao_nothing_is_int8(monkeypatch):
    monkeypatch.delitem(sys.modules, int8.TORCHAO)
    assert not int8.is_int8(torch.zeros(2, 2))


@pytest.mark.parametrize("optim", ["fira", "fira_layerwise", "an optimizer that is passed"])
def test_the_trainer_trains_saves_and_resumes_them(optim, tmp_path):
    rows = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(8)]

    def run(steps, checkpoint=None):
        model = small()
        is_named = optim.startswith("fira")
        passed = None if is_named else get_fira_optimizer(model, FiraConfig(rank=4, lr=1e-2, eps=1e-8))
        arguments = TrainingArguments(
            str(tmp_path), **({"optim": optim, "optim_args": "rank=4"} if is_named else {}), learning_rate=1e-2,
            max_steps=steps, save_steps=2, lr_scheduler_type="constant", max_grad_norm=0, use_cpu=True,
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(passed, None))
        trainer.train(resume_from_checkpoint=checkpoint)
        return model

    whole = run(4)
    resumed = run(4, str(tmp_path / "checkpoint-2"))
    assert same(parts(resumed), parts(whole)) and not same(parts(whole), parts(small()))
    whole.save_pretrained(tmp_path / "model", state_dict=int8.dequantised(whole))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    for (name, p), q in zip(plain.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q.dequantize() if int8.is_int8(q) else q), name
