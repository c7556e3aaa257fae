"""Predicted memory beside what a training step allocates."""

import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model

from conftest import build_llama, build_mixtral
from fira_hf import FiraConfig, get_fira_optimizer
from fira_hf.layerwise import step_in_backward
from fira_hf.memory import estimate_memory, predict_memory
from fira_hf.meta_models import switch_on_checkpointing
from fira_hf.targets import find_targets
from recipes import measure
from recipes.benchmarks import predict
from recipes.benchmarks.memory import allocations, peak
from recipes.benchmarks.models import SIZES
from recipes.pretraining.settings import RECIPE
from recipes.relora import add_lora


def wrap_in_lora(model):
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))


def assert_step_is_as_predicted(predicted, model, optimizer, weights, batch, micro_batches=(True,)):
    """Weights, whose bytes are given, and state to the byte; and within five percent the most that is held in a whole
    step on batches of this shape, whatever is allocated in it."""
    tokens = torch.zeros(batch, dtype=torch.long)

    def step():
        for _ in micro_batches:
            model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(), step()
    gc.collect()
    state = measure.state_bytes(optimizer)
    assert (predicted.weights, predicted.optimizer_state) == (weights, state)
    assert predicted.total == pytest.approx(weights + state + peak(allocations(step)), rel=0.05)


@pytest.mark.parametrize("wrap", [lambda model: model, wrap_in_lora], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["all activations", "checkpointing"])
@pytest.mark.parametrize("accumulates", [False, True], ids=["first gradients", "further gradients"])
def test_the_peak_of_a_step_is_predicted_within_five_percent(wrap, checkpointing, accumulates):
    """From the model on the meta device; measured beyond the weights, with the gradients."""
    size = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "vocab_size": 2048}
    with torch.device("meta"):
        on_meta = wrap(build_llama(**size))
    model = wrap(build_llama(**size))
    for one in (on_meta, model):
        if checkpointing:
            one.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            one.enable_input_require_grads()
    batch = {"batch_size": 4, "sequence_length": 128, "accumulates": accumulates}
    estimate = estimate_memory(on_meta, FiraConfig(rank=4), **batch)

    tokens = torch.zeros(4, 128, dtype=torch.long)
    model.train()

    def step():
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()

    step()
    if not accumulates:
        model.zero_grad()
    measured = peak(allocations(lambda: model(input_ids=tokens, labels=tokens).loss.backward()))
    measured += estimate.gradients if accumulates else 0
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


@pytest.mark.parametrize("value", [0, -1])
def test_a_batch_of_nothing_is_refused(value):
    with pytest.raises(ValueError, match=f"batch_size={value}"):
        estimate_memory(build_llama(), None, batch_size=value, sequence_length=8)


@pytest.mark.parametrize(
    ("batch", "checkpointing"), [((4, 128), False), ((1, 64), True)], ids=["mostly activations", "mostly gradients"]
)
@pytest.mark.parametrize("method", ["adamw", "fira", "fira_layerwise", "lora", "fira-on-lora"])
def test_the_peak_of_a_whole_step_is_predicted_within_five_percent(method, batch, checkpointing):
    """Weights, state and whatever is allocated in forward, backward and step of real training."""
    size = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "vocab_size": 2048}
    model = build_llama(**size, num_key_value_heads=4, use_cache=False)
    shape = {"batch_size": batch[0], "sequence_length": batch[1], "gradient_checkpointing": checkpointing}
    estimate = predict_memory(model.config, [method], FiraConfig(8), dtype="float32", **shape)
    if "lora" in method:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    if checkpointing:
        switch_on_checkpointing(model)
    model.train()
    if method in ("adamw", "lora"):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    else:
        optimizer = get_fira_optimizer(model, FiraConfig(rank=8))
        if method == "fira_layerwise":
            step_in_backward(optimizer)
    weights = sum(p.nbytes for p in model.parameters())
    assert_step_is_as_predicted(estimate[method], model, optimizer, weights, batch)


@pytest.mark.parametrize("batch", [(4, 128), (1, 64)], ids=["mostly activations", "mostly gradients"])
@pytest.mark.parametrize("method", ["fira", "fira_layerwise"])
def test_the_peak_of_a_step_of_two_micro_batches_is_predicted_within_five_percent(method, batch):
    size = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "vocab_size": 2048}
    model = build_llama(**size, num_key_value_heads=4, use_cache=False).train()
    shape = {"batch_size": batch[0], "sequence_length": batch[1], "gradient_accumulation_steps": 2}
    estimate = predict_memory(model.config, [method], FiraConfig(8), dtype="float32", **shape)[method]
    optimizer = get_fira_optimizer(model, FiraConfig(rank=8))
    micro_batches = MicroBatches()
    if method == "fira_layerwise":
        step_in_backward(optimizer, when=lambda: micro_batches.is_last)
    weights = sum(p.nbytes for p in model.parameters())
    assert_step_is_as_predicted(estimate, model, optimizer, weights, batch, micro_batches)


class MicroBatches:
    """Two of a step, as often as it is iterated."""

    def __iter__(self):
        for self.is_last in (False, True):
            yield


def test_layerwise_holds_the_largest_gradient_and_a_tied_one_twice():
    def gradients(**config):
        return estimate_memory(build_llama(**config), FiraConfig(rank=4), optimizer="fira_layerwise").gradients

    assert gradients(vocab_size=512) == 4 * 512 * 32
    assert gradients(vocab_size=512, tie_word_embeddings=True) == 2 * 4 * 512 * 32
    assert gradients(vocab_size=8) == 4 * 80 * 32


def test_layerwise_with_accumulation_holds_what_fira_does():
    batch = {"batch_size": 2, "sequence_length": 16, "accumulates": True}
    estimates = [
        estimate_memory(build_llama(), FiraConfig(rank=4), optimizer=name, **batch)
        for name in ("fira", "fira_layerwise")
    ]
    assert estimates[1].gradients == estimates[0].gradients
    assert estimates[1].total <= estimates[0].total


def test_columns_have_no_basis():
    model, config = build_llama(), FiraConfig(rank=4, projection="columns", base_optimizer="muon")
    optimizer = get_fira_optimizer(model, config)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    predicted = estimate_memory(model, config).optimizer_state
    assert predicted == measure.state_bytes(optimizer)
    saved = sum(4 * (max(t.parameter.shape) + min(t.parameter.shape)) for t in find_targets(model, config).projected)
    assert estimate_memory(model, FiraConfig(rank=4)).optimizer_state - predicted == 4 * saved


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8", "int4"])
def test_a_whole_moment_in_every_dtype(state_dtype):
    model = build_llama()
    config = FiraConfig(rank=4, base_optimizer="muon", residual="moment", state_dtype=state_dtype)
    optimizer = get_fira_optimizer(model, config)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert estimate_memory(model, config).optimizer_state == measure.state_bytes(optimizer)


@pytest.mark.parametrize("settings", [{}, {"base_optimizer": "adafactor"}, {"projection": "columns"}], ids=str)
@pytest.mark.parametrize("rank", [4, 40])
def test_moments_and_bases_in_codes(rank, settings):
    """Ranks that are no multiple of a group of codes, and one beyond some of the short sides."""
    model, config = build_llama(), FiraConfig(rank=rank, state_dtype="int8", **settings)
    optimizer = get_fira_optimizer(model, config)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert estimate_memory(model, config).optimizer_state == measure.state_bytes(optimizer)


@pytest.mark.parametrize("base", ["lion", "adafactor", "muon"])
def test_the_state_of_other_base_optimizers(base):
    """Of projected weights a moment, with Adafactor a number for each row and column beside it; the rest as ever."""
    model = build_llama()
    config = FiraConfig(rank=4, base_optimizer=base)
    optimizer = get_fira_optimizer(model, config)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    model(input_ids=tokens, labels=tokens).loss.backward()
    for p in model.parameters():
        p.grad += 0.1  # equal tokens give queries and keys none
    optimizer.step()
    predicted = estimate_memory(model, config).optimizer_state
    assert predicted == measure.state_bytes(optimizer)
    targets = find_targets(model, config).projected
    saved = sum(4 * max(t.parameter.shape) for t in targets)
    if base == "adafactor":
        saved -= sum(max(t.parameter.shape) + 4 for t in targets)
    assert estimate_memory(model, FiraConfig(rank=4)).optimizer_state - predicted == 4 * saved


def held(value, seen):
    """Bytes of the storages behind a state: of a view, those of all that it looks into."""
    if isinstance(value, torch.Tensor):
        seen[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
    for inner in value.values() if isinstance(value, dict) else [vars(value)] if hasattr(value, "rank") else []:
        held(inner, seen)
    return sum(seen.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["galore", "apollo"])
def test_the_state_of_the_peers_is_counted_to_the_byte(name, dtype):
    package = pytest.importorskip(f"{name}_torch")
    model, config = build_llama(dtype=dtype), FiraConfig(rank=4)
    plan = find_targets(model, config)
    group = {"rank": 4, "update_proj_gap": 10, "scale": 1.0, "proj_type": "std"}
    group |= {"proj": "random", "scale_type": "channel"} if name == "apollo" else {}
    groups = [{"params": [t.parameter for t in plan.projected], **group}]
    groups += [{"params": [other.parameter for other in plan.skipped]}]
    build = getattr(package, {"galore": "GaLoreAdamW", "apollo": "APOLLOAdamW"}[name])
    optimizer = build(groups, no_deprecation_warning=True)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = sum(held(state, {}) for state in optimizer.state.values())
    assert estimate_memory(model, config, optimizer=name).optimizer_state == expected


def test_the_state_of_flora():
    """Counted once from flora_opt 0.0.3: momenta of rank 4; rows, columns and a scalar of every matrix, in fp32."""
    model = build_llama(dtype=torch.bfloat16, vocab_size=512)
    layer = 4 * (32 * 4) + 4 * (80 * 3) + 2 * (32 + 32 + 1) + 2 * (16 + 32 + 1) + 3 * (80 + 32 + 1)
    wide = 512 * 32 + 512 + 32 + 1  # more than four times as long as wide
    expected = 4 * (2 * layer + 2 * wide + 5 * (2 * 32 + 1))
    assert estimate_memory(model, FiraConfig(rank=4), optimizer="flora").optimizer_state == expected == 153044


def test_relora_is_what_the_pretraining_recipe_trains():
    model = build_llama(dtype=torch.bfloat16)
    predicted = predict_memory(model.config, ["relora"], FiraConfig(4))["relora"]
    add_lora(model, LoraConfig(r=4, target_modules="all-linear"), embeddings=True)
    assert predicted == estimate_memory(model, None)


def test_unknown_names_and_what_depends_on_the_data():
    config = build_llama().config
    with pytest.raises(ValueError, match="method 'adam'.*'adamw'"):
        predict_memory(config, ["adam"], FiraConfig(4))
    with pytest.raises(ValueError, match="optimizer 'galor'.*'galore'"):
        estimate_memory(build_llama(), FiraConfig(rank=4), optimizer="galor")
    with pytest.raises(ValueError, match="galore.*needs a config"):
        estimate_memory(build_llama(), None, optimizer="galore")
    model = build_mixtral()
    model.set_experts_implementation("eager")
    with pytest.raises(ValueError, match="MixtralForCausalLM cannot be predicted"):
        estimate_memory(model, None, batch_size=1, sequence_length=8)
    with pytest.raises(ValueError, match="Linear cannot be predicted"):
        estimate_memory(torch.nn.Linear(8, 8), None, batch_size=1, sequence_length=8)


# What the paper and GaLore's say of memory.


def published_runs(size, *methods):
    config = predict.load(RECIPE.experiments / size)
    return predict_memory(config, methods, FiraConfig(SIZES[size].rank, state_dtype="bfloat16"))


def test_every_cell_of_the_pretraining_table_follows_from_its_formula():
    rows = predict.cells()
    assert len(rows) == 20
    for row in rows:
        # Two or three published figures, rounded to 0.01 each, make a cell.
        assert row["formula"] == pytest.approx(row["published"], abs=0.0151), row


@pytest.mark.parametrize(("size", "state"), [("60m", 0.13), ("130m", 0.28), ("350m", 0.54), ("1b", 1.78)])
def test_galores_published_states_are_three_quarters_of_loras(size, state):
    lora = published_runs(size, "relora")["relora"]
    assert 0.75 * lora.optimizer_state / predict.G == pytest.approx(state, abs=0.0055)


@pytest.mark.parametrize(
    ("size", "total", "saved"),
    [("60m", 0.396, 29.5), ("130m", 0.879, 36.1), ("350m", 2.125, 55.6), ("1b", 7.441, 61.1)],
)
@pytest.mark.parametrize("method", ["galore", "fira"])
def test_the_formula_of_galores_state_on_the_real_configurations(method, size, total, saved):
    """1 basis and 2 moments; 61.1% is what the paper's abstract says of 1B."""
    found = published_runs(size, method, "adamw")
    assert round(found[method].total / 1e9, 3) == total
    share = found[method].optimizer_state / found["adamw"].optimizer_state
    assert round(100 * (1 - share), 1) == saved


def test_full_rank_fine_tuning_is_four_times_the_weights():
    """56.00G in the paper: of 7e9 parameters by name, 6.74e9 in fact."""
    adamw = predict.finetuning()["adamw"]
    assert adamw.total == pytest.approx(4 * 2 * 6_738_415_616, rel=1e-6)
    assert adamw.total * 7e9 / 6_738_415_616 == pytest.approx(56.00e9, rel=1e-6)
