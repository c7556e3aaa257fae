"""What TrainingArguments promises holds under `optim="fira"` as it does under `adamw_torch`.

Two comparisons carry most of this file.

*Dense*: the model gets a linear layer that its forward pass never uses, and only that layer is projected. It never
receives a gradient, so the whole run has to be the run of `adamw_torch`, whatever is asked of the Trainer.

*Projected*: the same training written out as a plain loop with `get_fira_optimizer` has to end in the same weights.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import TrainerCallback, get_scheduler

from conftest import build_llama, build_tokens
from fira_hf import FiraConfig, get_fira_optimizer

UNUSED = {"optim": "fira", "optim_target_modules": ["unused"], "optim_args": "rank=4"}
PROJECTED = {"optim": "fira", "optim_args": "rank=4, update_proj_gap=2"}


def build_with_unused(dtype=torch.float32):
    model = build_llama(dtype=dtype)
    model.unused = nn.Linear(8, 8, bias=False, dtype=dtype)
    return model


class Gradients(TrainerCallback):
    """Keeps what the optimizer saw in each step: the learning rates and the norm of the clipped gradient."""

    def __init__(self):
        self.rates, self.norms = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.rates.append({group["lr"] for group in optimizer.param_groups})
        gradients = [p.grad.float() for p in model.parameters() if p.grad is not None]
        self.norms.append(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])).item())


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(one: dict, other: dict, **tolerance):
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def assert_near(one: dict, other: dict, start: nn.Module, share: float):
    """Where the arithmetic may round differently: two runs are apart by at most that share of the way they went."""
    for name, first in start.named_parameters():
        way = (one[name] - first).norm()
        assert (one[name] - other[name]).norm() <= share * way, name


def logged(trainer, key) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# --------------------------------------------------------------------------- dense: equal to adamw_torch

PROMISES = {
    "defaults": {},
    "weight decay": {"weight_decay": 0.1},
    "betas": {"adam_beta1": 0.8, "adam_beta2": 0.95},
    "epsilon": {"adam_epsilon": 1e-3},
    "all of AdamW": {"weight_decay": 0.1, "adam_beta2": 0.95, "adam_epsilon": 1e-5},
    "linear": {"lr_scheduler_type": "linear"},
    "linear with warm-up": {"lr_scheduler_type": "linear", "warmup_steps": 3},
    "cosine with warm-up": {"lr_scheduler_type": "cosine", "warmup_steps": 2},
    "constant with warm-up": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2},
    "polynomial": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
    "clipping": {"max_grad_norm": 0.05},
    "no clipping": {"max_grad_norm": 0.0},
    "accumulation": {"gradient_accumulation_steps": 3},
    "bf16 autocast": {"bf16": True},
    "gradient checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "epochs": {"max_steps": -1, "num_train_epochs": 2, "train_dataset": build_tokens(6)},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "max_steps": {"max_steps": 1},
}


@pytest.mark.parametrize("promise", PROMISES.values(), ids=PROMISES)
def test_dense_weights_are_those_of_adamw_torch(make_trainer, promise):
    runs = []
    for optim in ({"optim": "adamw_torch"}, UNUSED):
        seen = Gradients()
        trainer = make_trainer(build_with_unused(), callbacks=[seen], **({"max_steps": 6} | optim | promise))
        start = weights(trainer)
        trainer.train()
        runs.append((trainer, seen))
        assert not torch.equal(start["lm_head.weight"], trainer.model.lm_head.weight)
        assert torch.equal(start["unused.weight"], trainer.model.unused.weight)
    (adamw, adamw_saw), (fira, fira_saw) = runs
    assert fira.state.global_step == adamw.state.global_step
    assert fira_saw.rates == adamw_saw.rates
    # under autocast, which rounds to 3 digits, one differing bit of a weight can move an activation
    autocast = "bf16" in promise
    rel = 1e-2 if autocast else 1e-4
    assert fira_saw.norms == pytest.approx(adamw_saw.norms, rel=rel)
    assert logged(fira, "learning_rate") == logged(adamw, "learning_rate")
    assert logged(fira, "grad_norm") == pytest.approx(logged(adamw, "grad_norm"), rel=rel)
    assert logged(fira, "loss") == pytest.approx(logged(adamw, "loss"), rel=rel)
    if autocast:
        assert_near(weights(fira), weights(adamw), build_with_unused(), share=0.05)
    else:
        assert_same(weights(fira), weights(adamw), rtol=1e-4, atol=1e-6)


def test_the_comparison_would_notice_a_lost_promise(make_trainer):
    """The same comparison with weight decay lost, as the Trainer's GaLore loses it, does not hold."""
    runs = []
    for settings in ({"optim": "adamw_torch", "weight_decay": 0.1}, UNUSED):
        trainer = make_trainer(build_with_unused(), max_steps=6, **settings)
        trainer.train()
        runs.append(weights(trainer))
    with pytest.raises(AssertionError):
        assert_same(*runs, rtol=1e-4, atol=1e-6)


def test_around_one_projected_layer_the_first_step_is_that_of_adamw_torch(make_trainer):
    settings = {"weight_decay": 0.1, "adam_beta2": 0.95, "adam_epsilon": 1e-5, "max_steps": 1}
    adamw = make_trainer(optim="adamw_torch", **settings)
    fira = make_trainer(optim="fira", optim_target_modules=["layers.0.mlp.gate_proj"], optim_args="rank=4", **settings)
    for trainer in (adamw, fira):
        trainer.train()
    one, other = weights(fira), weights(adamw)
    projected = "model.layers.0.mlp.gate_proj.weight"
    assert not torch.allclose(one.pop(projected), other.pop(projected), rtol=1e-4, atol=1e-6)
    assert_same(one, other, rtol=1e-5, atol=1e-7)


# --------------------------------------------------------------------------- projected: equal to a plain loop


@pytest.mark.parametrize(
    "promise",
    [
        {},
        {"weight_decay": 0.1},
        {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-5},
        {"lr_scheduler_type": "linear", "warmup_steps": 2},
        {"lr_scheduler_type": "cosine"},
        {"max_grad_norm": 0.05},
        {"optim_args": "rank=4, update_proj_gap=2, dense_lr=1e-4", "lr_scheduler_type": "linear", "warmup_steps": 2},
    ],
    ids=str,
)
def test_the_trainer_is_a_plain_loop_with_the_factory(make_trainer, promise):
    settings = {"lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 1.0, "max_steps": 5}
    settings |= PROJECTED | promise
    trainer = make_trainer(**settings)
    seen = []

    class Batches(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.append([p.grad.clone() for p in model.parameters()])

    trainer.add_callback(Batches())
    trainer.train()

    args = trainer.args
    model = build_llama()
    config = FiraConfig(
        rank=4,
        update_proj_gap=2,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        dense_lr=1e-4 if "dense_lr" in settings["optim_args"] else None,
    )
    optimizer = get_fira_optimizer(model, config)
    scheduler = get_scheduler(
        args.lr_scheduler_type, optimizer, num_warmup_steps=settings["warmup_steps"], num_training_steps=5
    )
    loader = iter(make_trainer(**settings).get_train_dataloader())
    for step in range(5):
        batch = next(loader)
        model(**batch).loss.backward()
        if args.max_grad_norm:
            nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        for mine, theirs in zip(model.parameters(), seen[step], strict=True):
            torch.testing.assert_close(mine.grad, theirs, rtol=1e-4, atol=1e-6)
            mine.grad = theirs  # the loops may sum the loss in another order; the optimizer is what is compared
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert_same(weights(trainer), {name: p.detach() for name, p in model.named_parameters()}, rtol=0, atol=0)


def test_the_logged_learning_rate_is_the_projected_one(make_trainer):
    settings = {"learning_rate": 1e-2, "lr_scheduler_type": "linear", "max_steps": 4}
    trainer = make_trainer(optim="fira", optim_args="rank=4, dense_lr=1e-5", **settings)
    trainer.train()
    adamw = make_trainer(optim="adamw_torch", **settings)
    adamw.train()
    assert logged(trainer, "learning_rate") == logged(adamw, "learning_rate")
    # and the schedule moves both rates by the same factor
    trainer = make_trainer(optim="fira", optim_args="rank=4, dense_lr=1e-5", **settings)
    seen = Gradients()
    trainer.add_callback(seen)
    trainer.train()
    assert [max(rates) / min(rates) for rates in seen.rates] == pytest.approx([1e3] * 4)


def test_the_schedule_reaches_projected_weights(make_trainer):
    """A warm-up begins with a step at learning rate 0, which moves nothing; the next step moves everything."""
    moved = []

    class Moves(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            self.before = [p.detach().clone() for p in model.parameters()]

        def on_step_end(self, args, state, control, model=None, **kwargs):
            pairs = zip(model.parameters(), self.before, strict=True)
            moved.append(sum(not torch.equal(p, before) for p, before in pairs))

    settings = {"lr_scheduler_type": "linear", "warmup_steps": 2, "weight_decay": 0.1, "max_steps": 3}
    trainer = make_trainer(callbacks=[Moves()], **settings, **PROJECTED)
    trainer.train()
    assert moved == [0, *[len(list(trainer.model.parameters()))] * 2]


def test_weight_decay_shrinks_projected_weights_and_spares_the_trainers_exclusions(make_trainer):
    model = build_llama
    runs = {}
    for decay in (0.0, 0.1):
        trainer = make_trainer(model(), max_steps=1, weight_decay=decay, **PROJECTED)
        trainer.train()
        runs[decay] = weights(trainer)
    kept = trainer.get_decay_parameter_names(trainer.model)
    for name, without in runs[0.0].items():
        if name not in kept:
            assert torch.equal(runs[0.1][name], without), name
        elif "_proj" in name:  # Fira decays after its update, so one step is one exact factor
            torch.testing.assert_close(runs[0.1][name], without * (1 - 1e-2 * 0.1), rtol=1e-6, atol=1e-8)
        else:
            assert runs[0.1][name].norm() < without.norm(), name


def test_the_groups_of_the_trainer_carry_the_arguments(make_trainer):
    trainer = make_trainer(weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-5, **PROJECTED)
    optimizer = trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    decays = trainer.get_decay_parameter_names(trainer.model)
    for group in optimizer.param_groups:
        assert (group["lr"], tuple(group["betas"]), group["eps"]) == (1e-2, (0.8, 0.95), 1e-5)
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            assert group["weight_decay"] == (0.1 if name in decays else 0.0), name
            assert ("rank" in group) == ("_proj" in name), name
    assert not names, "every parameter is in a group"


# --------------------------------------------------------------------------- what must not change a run


def trained(make_trainer, **settings):
    trainer = make_trainer(**(PROJECTED | {"max_steps": 5} | settings))
    trainer.train()
    return trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_same_seed_gives_the_same_bits(make_trainer, dtype):
    runs = [weights(trained(make_trainer, model=build_llama(dtype=dtype))) for _ in range(2)]
    assert_same(*runs, rtol=0, atol=0)


def test_four_micro_batches_are_one_batch(make_trainer):
    small = trained(make_trainer, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    large = trained(make_trainer, per_device_train_batch_size=4)
    assert_near(weights(small), weights(large), build_llama(), share=1e-2)
    optimizer = small.optimizer.optimizer
    steps = {int(optimizer.state[p]["step"]) for group in optimizer.param_groups for p in group["params"]}
    assert steps == {5}, "one step of the optimizer for each update, not for each micro-batch"


def test_gradient_checkpointing_changes_nothing(make_trainer):
    plain = trained(make_trainer)
    checkpointed = trained(
        make_trainer, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    assert checkpointed.model.is_gradient_checkpointing
    assert_near(weights(plain), weights(checkpointed), build_llama(), share=1e-2)


def test_evaluation_in_between_changes_nothing(make_trainer):
    plain = trained(make_trainer)
    evaluated = trained(make_trainer, eval_strategy="steps", eval_steps=1)
    assert len(logged(evaluated, "eval_loss")) == 5
    assert_same(weights(plain), weights(evaluated), rtol=0, atol=0)


def test_saving_in_between_changes_nothing(make_trainer):
    plain = trained(make_trainer)
    saved = trained(make_trainer, save_strategy="steps", save_steps=1)
    assert_same(weights(plain), weights(saved), rtol=0, atol=0)


def test_model_init(make_trainer):
    """The model is built anew for each train(), and so must be its targets and its optimizer."""
    trainer = make_trainer(model_init=lambda: build_llama(), **PROJECTED)
    trainer.train()
    first, first_model = weights(trainer), trainer.model
    trainer.train()
    assert trainer.model is not first_model
    assert_same(first, weights(trainer), rtol=0, atol=0)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.model.parameters()}


def test_model_init_as_under_adamw_torch(make_trainer):
    runs = []
    for optim in ({"optim": "adamw_torch"}, UNUSED):
        trainer = make_trainer(model_init=lambda: build_with_unused(), weight_decay=0.1, **optim)
        trainer.train()
        runs.append(weights(trainer))
    assert_same(*runs, rtol=1e-4, atol=1e-6)


def test_max_steps_and_the_schedule_end_together(make_trainer):
    trainer = trained(make_trainer, max_steps=3, lr_scheduler_type="linear")
    assert trainer.state.global_step == 3
    assert trainer.lr_scheduler.get_last_lr()[0] == 0.0
    optimizer = trainer.optimizer.optimizer
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}


def test_load_best_model_at_end(make_trainer, tmp_path):
    from safetensors.torch import load_file

    trainer = trained(
        make_trainer,
        max_steps=6,
        learning_rate=0.3,  # so high that the last model is not the best
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
    )
    best = trainer.state.best_model_checkpoint
    losses = logged(trainer, "eval_loss")
    assert best.endswith(f"checkpoint-{2 * (1 + losses.index(min(losses)))}")
    stored = load_file(f"{best}/model.safetensors")
    assert_same(stored, {name: weights(trainer)[name] for name in stored}, rtol=0, atol=0)


def test_a_frozen_part_stays_and_costs_nothing(make_trainer):
    model = build_llama()
    model.model.layers[0].requires_grad_(False)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trained(make_trainer, model=model)
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, start[name]) == name.startswith("model.layers.0."), name
    assert len(trainer.optimizer.optimizer.state) == sum(p.requires_grad for p in model.parameters())


# --------------------------------------------------------------------------- lower precision


def test_bf16_autocast_trains_fp32_weights(make_trainer):
    plain, autocast = trained(make_trainer), trained(make_trainer, bf16=True)
    one, other = weights(plain), weights(autocast)
    assert all(p.dtype == torch.float32 for p in other.values())
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"]), "autocast was not on"
    assert logged(autocast, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-2)


def test_bf16_weights_keep_their_dtype_and_fp32_state(make_trainer):
    trainer = trained(make_trainer, model=build_llama(dtype=torch.bfloat16))
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    tensors = [v for s in trainer.optimizer.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    assert tensors and {t.dtype for t in tensors} == {torch.float32}


def scaled_run(
    dtype: torch.dtype | None = torch.float16, overflow_at: int | None = None, scale: float | None = 2.0**10
):
    """Five steps with a GradScaler, as accelerate drives it: scale, unscale, clip, step, update.

    On the CPU the Trainer accepts `fp16=True` but trains without a scaler (accelerate builds one for accelerators
    only), so the loop is written out.
    """
    model = build_llama()
    optimizer = get_fira_optimizer(model, FiraConfig(rank=4, update_proj_gap=2, lr=1e-2))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    tokens = torch.stack([row["input_ids"] for row in build_tokens(4)])
    losses = []
    for step in range(5):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        scaler.scale(loss).backward()
        if step == overflow_at:
            model.model.layers[0].self_attn.q_proj.weight.grad[0, 0] = torch.inf
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        steps = [int(state["step"]) for state in optimizer.state.values()]
        scaler.step(optimizer)
        scaler.update()
        if step == overflow_at:
            assert_same(before, dict(model.named_parameters()), rtol=0, atol=0)
            assert [int(state["step"]) for state in optimizer.state.values()] == steps
        else:
            assert not torch.equal(before["lm_head.weight"], model.lm_head.weight)
        optimizer.zero_grad()
    return model, optimizer, scaler, losses


def test_a_grad_scaler_does_not_change_the_step():
    """A power of two scales exactly, so with fp32 arithmetic the weights are the same bits."""
    plain, scaled = (dict(scaled_run(dtype=None, scale=scale)[0].named_parameters()) for scale in (None, 2.0**10))
    assert_same(plain, scaled, rtol=0, atol=0)


def test_fp16_autocast_with_a_grad_scaler():
    _, optimizer, scaler, losses = scaled_run()
    assert scaler.get_scale() == 2.0**10
    assert {int(state["step"]) for state in optimizer.state.values()} == {5}
    *_, in_fp32 = scaled_run(dtype=None, scale=None)
    assert losses == pytest.approx(in_fp32, rel=5e-3)
    assert losses != in_fp32, "autocast was not on"
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("overflow_at", [0, 2, 3], ids=["first step", "at a refresh", "between"])
def test_an_overflow_skips_the_step_and_halves_the_scale(overflow_at):
    model, optimizer, scaler, _ = scaled_run(overflow_at=overflow_at)
    assert scaler.get_scale() == 2.0**9
    assert {int(state["step"]) for state in optimizer.state.values()} == {4}
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("overflow_at", [0, 2])
def test_accelerate_sees_the_skipped_step(overflow_at):
    """accelerate wraps the optimizer and holds the schedule back when the scaler skipped a step."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    model = build_llama()
    inner = get_fira_optimizer(model, FiraConfig(rank=4, lr=1e-2))
    optimizer = AcceleratedOptimizer(inner, scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    tokens = torch.stack([row["input_ids"] for row in build_tokens(4)])
    skipped = []
    for step in range(4):
        optimizer.scaler.scale(model(input_ids=tokens, labels=tokens).loss).backward()
        if step == overflow_at:
            model.lm_head.weight.grad.fill_(torch.nan)
        optimizer.step()
        skipped.append(optimizer.step_was_skipped)
        optimizer.zero_grad()
    assert skipped == [step == overflow_at for step in range(4)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the Trainer uses a GradScaler on an accelerator only")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_trainer_with_autocast_on_a_gpu(make_trainer, precision):
    settings = {"use_cpu": False, "max_steps": 12, precision: True}
    adamw = make_trainer(build_with_unused(), optim="adamw_torch", **settings)
    fira = make_trainer(build_with_unused(), **(UNUSED | settings))
    for trainer in (adamw, fira):
        trainer.train()
    assert logged(fira, "loss") == pytest.approx(logged(adamw, "loss"), rel=2e-2)
    projected = trained(make_trainer, **settings)
    assert all(p.isfinite().all() for p in projected.model.parameters())
    assert logged(projected, "loss")[-1] < logged(projected, "loss")[0]
