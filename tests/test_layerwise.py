"""`optim="fira_layerwise"` and `step_in_backward`: what optim="fira" does, with one gradient alive at a time."""

from __future__ import annotations

import gc
import pickle
import weakref

import pytest
import torch
import torch.utils.checkpoint
import transformers
from torch import nn
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

import fira_hf
from conftest import build_llama, build_tokens, launch, trainer_settings
from fira_hf import FiraAdamW, FiraConfig, get_fira_optimizer
from fira_hf.layerwise import step_in_backward
from recipes.benchmarks.memory import allocations, peak

NAME = "fira_layerwise"
UNCLIPPED = 1e9  # the Trainer looks at the norm and clips nothing
SETTINGS = {
    "optim_args": "rank=4, update_proj_gap=3, alpha=0.25",
    "max_steps": 8,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "max_grad_norm": UNCLIPPED,
}


def trained(make_trainer, optim, build=build_llama, resume=None, **arguments):
    trainer = make_trainer(build(), optim=optim, **(SETTINGS | arguments))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def optimizer_of(trainer) -> FiraAdamW:
    return trainer.optimizer.optimizer


def assert_same_model(one: nn.Module, other: nn.Module):
    pairs = zip(one.named_parameters(), other.parameters(), strict=True)
    assert not [name for (name, p), q in pairs if not torch.equal(p, q)]


def assert_same_state(one: FiraAdamW, other: FiraAdamW):
    one_dict, other_dict = one.state_dict(), other.state_dict()
    assert one_dict["param_groups"] == other_dict["param_groups"]
    assert one_dict["state"].keys() == other_dict["state"].keys() and one_dict["state"]
    for index, state in one_dict["state"].items():
        assert state.keys() == other_dict["state"][index].keys()
        for name, value in state.items():
            against = other_dict["state"][index][name]
            assert torch.equal(value, against) if torch.is_tensor(value) else value == against, (index, name)


def logged(trainer, *keys) -> list[dict]:
    return [{key: entry[key] for key in keys} for entry in trainer.state.log_history if keys[0] in entry]


# --------------------------------------------------------------------------- the name


def test_the_name_round_trips(tmp_path):
    settings = trainer_settings(output_dir=str(tmp_path), optim=NAME, optim_args="rank=8")
    args = TrainingArguments(**settings)
    member = OptimizerNames(NAME)
    assert args.optim is member and list(OptimizerNames).count(member) == 1 and OptimizerNames[member.name] is member
    assert args.to_dict()["optim"] == NAME and f'"optim": "{NAME}"' in args.to_json_string()
    again = pickle.loads(pickle.dumps(args))
    assert again.optim is member and again.to_dict() == args.to_dict()
    (parsed,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
        f"--output_dir {tmp_path} --optim {NAME} --optim_args rank=8 --use_cpu true --report_to none".split()
    )
    assert parsed.optim is member


# --------------------------------------------------------------------------- equal to optim="fira"


def bf16():
    return build_llama(dtype=torch.bfloat16)


def tied():
    return build_llama(tie_word_embeddings=True)


def checkpointed(use_reentrant):
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}


CASES = {
    "fp32": {},
    "bf16 weights": {"build": bf16},
    "tied embeddings": {"build": tied},
    "checkpointing": checkpointed(False),
    "reentrant checkpointing": checkpointed(True),
    "accumulation": {"gradient_accumulation_steps": 3},
    "an odd last step": {"gradient_accumulation_steps": 3, "train_dataset": build_tokens(10), "max_steps": 6},
    "autocast": {"bf16": True},
    "power, staggered": {
        "optim_args": "rank=4, update_proj_gap=3, projection=power, refresh=staggered, moments=rotated, dense_lr=1e-3"
    },
    "a moment in 4 bits": {"optim_args": "preset=subspace-muon, rank=4, update_proj_gap=3"},
    "rounded at random": {
        "build": bf16,
        "optim_args": "rank=4, update_proj_gap=3, state_dtype=bfloat16, stochastic_rounding=true",
    },
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_bit_is_that_of_fira(make_trainer, held, case):
    runs = [trained(make_trainer, optim, **case) for optim in ("fira", NAME)]
    one, other = runs
    assert_same_model(one.model, other.model)
    assert_same_state(*map(optimizer_of, runs))
    keys = ("learning_rate", "grad_norm", "loss")
    assert logged(one, *keys) == logged(other, *keys)
    assert all(entry["grad_norm"] > 0 for entry in logged(other, *keys))


def test_the_gradients_were_stepped_in_backward(make_trainer):
    """Not by `optimizer.step()`, which would give the same weights."""
    found = []

    class Look(TrainerCallback):
        def on_substep_end(self, args, state, control, model=None, **kwargs):
            found.append({p.grad is None for p in model.parameters()})

        on_pre_optimizer_step = on_substep_end

    trained(make_trainer, NAME, gradient_accumulation_steps=2, max_steps=2, callbacks=[Look()])
    assert found == [{False}, {True}] * 2


@pytest.mark.parametrize("kind", [build_llama, bf16], ids=["fp32", "bf16"])
def test_resume_in_the_middle_of_an_interval_is_bit_equal(make_trainer, tmp_path, kind):
    saved = {"save_strategy": "steps", "save_steps": 4, "output_dir": str(tmp_path)}
    whole = trained(make_trainer, NAME, kind, **saved)
    resumed = trained(make_trainer, NAME, kind, resume=str(tmp_path / "checkpoint-4"), **saved)
    assert_same_model(whole.model, resumed.model)
    assert_same_state(optimizer_of(whole), optimizer_of(resumed))
    # and either way of stepping goes on from a checkpoint of the other
    crossed = trained(make_trainer, "fira", kind, resume=str(tmp_path / "checkpoint-4"), **saved)
    assert_same_model(whole.model, crossed.model)


def test_the_callback_says_the_same(make_trainer):
    runs = [trained(make_trainer, optim, callbacks=[fira_hf.FiraCallback()]) for optim in ("fira", NAME)]
    keys = ("fira_captured_energy", "fira_limiter_active", "fira_residual_share", "fira_state_bytes")
    one, other = (logged(run, *keys) for run in runs)
    assert len(one) == 8
    for mine, theirs in zip(one, other, strict=True):  # sums of another order
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_model_init_and_a_second_training(make_trainer):
    trainer = make_trainer(model_init=lambda: build_llama(), optim=NAME, **SETTINGS)
    trainer.train()
    first = trainer.model
    trainer.train()
    assert trainer.model is not first
    assert_same_model(first, trainer.model)


# --------------------------------------------------------------------------- the loop of one's own


def batches(count):
    return [torch.stack([row["input_ids"] for row in build_tokens(2, seed=seed)]) for seed in range(count)]


def test_a_loop_of_ones_own(held):
    """Schedule, accumulation by `when`, the norm of the gradients, and back to ordinary steps."""
    models, optimizers, norms = [], [], []
    is_last = [True]
    for layerwise in (False, True):
        model = build_llama()
        optimizer = get_fira_optimizer(model, FiraConfig(rank=4, update_proj_gap=3, lr=1e-2, weight_decay=0.1))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        hooks = step_in_backward(optimizer, when=lambda: is_last[0]) if layerwise else None
        norms.append([])
        for step, tokens in enumerate(batches(12)):
            is_last[0] = step % 2 == 1
            model(input_ids=tokens, labels=tokens).loss.backward()
            if is_last[0]:
                if hooks is not None and step < 8:
                    norms[-1].append(hooks.grad_norm(model.parameters()))
                    assert all(p.grad is None for p in model.parameters())
                else:
                    norms[-1].append(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
                optimizer.step(), scheduler.step(), optimizer.zero_grad()
            if step == 3:
                optimizer.load_state_dict(optimizer.state_dict())  # which makes new groups
            if hooks is not None and step == 7:
                hooks.remove()
        models.append(model), optimizers.append(optimizer)
    assert torch.equal(*map(torch.stack, norms))
    assert_same_model(*models)
    assert_same_state(*optimizers)


def test_what_is_dropped_is_freed(held):
    """Weights and state of an earlier trial or cell: at 7B they are most of what a card holds."""
    model = build_llama()
    optimizer = get_fira_optimizer(model, FiraConfig(rank=4))
    step_in_backward(optimizer)
    for tokens in batches(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    kept = [*model.parameters(), *(state["exp_avg"] for state in optimizer.state.values())]
    assert all(p.grad is None for p in model.parameters())
    left = [weakref.ref(one) for one in (optimizer, *kept)]
    del model, optimizer, kept
    gc.collect()
    assert not [one for one in left if one() is not None]


def test_what_backward_does_not_reach_is_left_to_step(held):
    """A weight without a gradient stays; one whose gradient is from an earlier micro-batch is stepped by `step()`."""
    model = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in ("always", "early", "never")})
    optimizer = FiraAdamW([{"params": model.parameters(), "rank": 4}], lr=1e-2)
    last = False
    hooks = step_in_backward(optimizer, lambda: last)
    before = [p.detach().clone() for p in model.parameters()]
    model["early"](model["always"](torch.ones(1, 8))).sum().backward()
    last = True
    model["always"](torch.ones(1, 8)).square().sum().backward()
    assert [p.grad is None for p in model.parameters()] == [True, False, True]
    norm = hooks.grad_norm(model.parameters())
    assert norm > model["early"].weight.grad.norm() > 0
    optimizer.step()
    assert [torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)] == [False, False, True]
    assert int(optimizer.state[model["early"].weight]["step"]) == 1


def test_a_closure():
    model, tokens = build_llama(), batches(1)[0]
    optimizer = get_fira_optimizer(model, FiraConfig(rank=4, lr=1e-3))
    step_in_backward(optimizer)

    def closure():
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}


@pytest.mark.parametrize("rank", [None, 4], ids=["dense", "projected"])
def test_a_gradient_that_is_not_finite_passes_over_its_own_weight_only(held, rank):
    def run(layerwise):
        weights = [nn.Parameter(torch.ones(8, 8)) for _ in range(3)]
        optimizer = FiraAdamW([{"params": weights} | ({"rank": rank} if rank else {})], lr=1e-2)
        if layerwise:
            step_in_backward(optimizer)
        noise = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
        noise[1, 0, 0] = torch.nan
        sum((p * n).sum() for p, n in zip(weights, noise, strict=True)).backward()
        optimizer.step()
        assert all(p.isfinite().all() for p in weights)
        return [bool((p != 1).any()) for p in weights]

    assert run(layerwise=True) == [True, False, True]
    assert run(layerwise=False) == ([True, False, True] if rank else [False, False, False])


# --------------------------------------------------------------------------- what it costs


class Watch:
    """Bytes of gradients that are alive when a gradient is complete: seen before (first) and after the step."""

    def __init__(self, model):
        self.parameters = list(model.parameters())
        self.bytes = []
        self.handles = [p.register_post_accumulate_grad_hook(self) for p in self.parameters]

    def __call__(self, _):
        self.bytes.append(sum(p.grad.numel() * 4 for p in self.parameters if p.grad is not None))


def test_one_gradient_is_alive_at_a_time(make_trainer):
    model = build_llama()
    before = Watch(model)  # its hooks come first
    trainer = make_trainer(model, optim=NAME, **(SETTINGS | {"max_steps": 2}))
    trainer.train()
    assert len(before.bytes) == 2 * len(before.parameters)
    assert max(before.bytes) == 4 * max(p.numel() for p in before.parameters)


def chain(depth, layerwise):
    """Square matrices, one after the other: gradients are what memory goes into."""
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(depth)))
    optimizer = FiraAdamW([{"params": model.parameters(), "rank": 4}], lr=1e-3)
    if layerwise:
        step_in_backward(optimizer)
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))

    def step():
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(), step()  # the state; lazily made buffers
    gc.collect()
    return peak(allocations(step)) / (4 * 256 * 256)


def test_the_peak_does_not_grow_with_the_depth():
    """In gradients of one weight; activations and low-rank products of these shapes are small beside one."""
    assert [chain(depth, layerwise=False) for depth in (4, 12)] == pytest.approx([4.4, 12.4], abs=0.5)
    assert [chain(depth, layerwise=True) for depth in (4, 12)] == pytest.approx([1.15, 1.15], abs=0.1)


# --------------------------------------------------------------------------- afterwards


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("callbacks", [[], [Stop()]], ids=["ended", "interrupted"])
def test_the_model_and_the_trainer_are_as_before(make_trainer, callbacks):
    model = build_llama()
    first = make_trainer(model, optim=NAME, callbacks=callbacks, **SETTINGS)
    clip = first.accelerator.clip_grad_norm_
    known = len(first.callback_handler.callbacks)
    try:
        first.train()
    except KeyboardInterrupt:
        assert callbacks
    assert first.accelerator.clip_grad_norm_ == clip
    assert len(first.callback_handler.callbacks) == known
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    other = build_llama()
    other.load_state_dict(start)
    runs = [make_trainer(m, optim="adamw_torch", max_steps=3) for m in (model, other)]
    for run in runs:
        run.train()
    assert_same_model(model, other)


# --------------------------------------------------------------------------- several processes

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainingArguments

import fira_hf
from conftest import build_llama, build_tokens, trainer_settings
from fira_hf import FiraAdamW
from fira_hf.layerwise import step_in_backward
from trials import search

torch.set_num_threads(1)
output, resumes = sys.argv[1], sys.argv[2] == "True"
settings = trainer_settings(output_dir=output) | {
    "optim_args": "rank=4, update_proj_gap=3", "gradient_accumulation_steps": 2, "max_steps": 6,
    "weight_decay": 0.1, "max_grad_norm": 1e9, "save_strategy": "steps", "save_steps": 4,
}

def flat(parameters):
    return torch.cat([p.detach().flatten() for p in parameters])

def train(optim, model=None, resume=None):
    model = model or build_llama(seed=dist.get_rank() if dist.is_initialized() else 0)
    args = TrainingArguments(optim=optim, **settings)
    trainer = Trainer(model=model, args=args, train_dataset=build_tokens())
    trainer.train(resume_from_checkpoint=resume)
    of_each = [torch.empty_like(flat(model.parameters())) for _ in range(dist.get_world_size())]
    dist.all_gather(of_each, flat(model.parameters()))
    wrapped = isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return {"weights": of_each, "norms": norms, "wrapped": wrapped}

def searched(names):
    args = TrainingArguments(optim="adamw_torch", **(settings | {"save_strategy": "no"}))
    trainer = Trainer(model_init=lambda: build_llama(), args=args, train_dataset=build_tokens())

    def after(trainer):
        wrapped = isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        return {"weights": flat(trainer.model.parameters()), "norms": norms, "wrapped": wrapped}

    return search(trainer, [{"optim": name} for name in names], after)

def error(function):
    try:
        function()
    except (RuntimeError, ValueError) as error:
        return str(error)

found = {"fira": train("fira", build_llama())}
model = build_llama(seed=dist.get_rank())  # made equal to that of the first process
found["layerwise"] = train("fira_layerwise", model)
if resumes:
    found["resumed"] = train("fira_layerwise", resume=f"{output}/checkpoint-4")
found["again"] = train("fira", model)
found["trials"] = searched(["fira_layerwise", "fira", "fira_layerwise", "adamw_torch"])

def no_group():
    step_in_backward(FiraAdamW(nn.Linear(4, 4).parameters()))

def other_order(steps_alike):
    layers = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(2)])
    optimizer = FiraAdamW(layers.parameters())
    step_in_backward(optimizer, group=dist.group.WORLD)
    for step in range(steps_alike + 1):
        swap = step == steps_alike and dist.get_rank() == 1
        first, second = reversed(layers) if swap else layers
        if step == steps_alike and steps_alike and not swap:
            return None  # it would wait for the other, which stops
        second(first(torch.ones(1, 4))).sum().backward()
        optimizer.step()

def closure():
    optimizer = FiraAdamW(nn.Linear(4, 4).parameters())
    step_in_backward(optimizer, group=dist.group.WORLD)
    optimizer.step(lambda: None)

orders = [error(lambda: other_order(0)), error(lambda: other_order(2))]
found["errors"] = [error(no_group), *orders, error(closure)]
torch.save(found, f"{output}/found{dist.get_rank()}.pt")
"""


def test_two_processes(tmp_path):
    """The weights of DDP with optim="fira", without its buckets; resume; what is refused."""
    resumes = not transformers.__version__.startswith("4.")  # whose Trainer loads no optimizer there, AdamW's neither
    launch(SCRIPT, tmp_path, 2, str(tmp_path / "out"), str(resumes))
    found, of_second = (torch.load(tmp_path / "out" / f"found{rank}.pt") for rank in range(2))
    for run in found.keys() & {"fira", "layerwise", "resumed", "again"}:
        assert torch.equal(*found[run]["weights"]), run
    (fira, _), (layerwise, _) = (found[run]["weights"] for run in ("fira", "layerwise"))
    start = torch.cat([p.detach().flatten() for p in build_llama().parameters()])
    assert (layerwise - fira).norm() <= 1e-5 * (fira - start).norm()
    assert found["layerwise"]["norms"] == pytest.approx(found["fira"]["norms"], rel=1e-5)
    assert not resumes or torch.equal(layerwise, found["resumed"]["weights"][0])
    # DDP is back for the next Trainer of the same model
    assert [found[run]["wrapped"] for run in ("fira", "layerwise", "again")] == [True, False, True]
    # trials of a search are as trainings of their own, each with its own optimizer, wrapped or not
    first, second = found["trials"], of_second["trials"]
    assert all(torch.equal(mine["weights"], other["weights"]) for mine, other in zip(first, second, strict=True))
    assert [trial["wrapped"] for trial in first] == [False, True, False, True]
    assert torch.equal(first[0]["weights"], first[2]["weights"]) and first[0]["norms"] == first[2]["norms"]
    assert (first[0]["weights"] - first[1]["weights"]).norm() <= 1e-5 * (first[1]["weights"] - start).norm()
    assert first[0]["norms"] == pytest.approx(first[1]["norms"], rel=1e-5) and min(first[0]["norms"]) > 0
    no_group, at_first, later, closure = of_second["errors"]
    assert "group=None" in no_group and found["errors"][0] == no_group
    assert "order" in at_first and found["errors"][1] == at_first
    assert "order" in later and "without a closure" in closure
