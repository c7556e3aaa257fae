"""A run that stops in the middle of a refresh interval and goes on ends in the same bits as one that did not stop.

Run as a script (`python test_resume.py FOLDER`), this file is the second half of two runs in a fresh process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import fira_hf
import forks
from conftest import build_llama, build_tokens, trainer_settings
from fira_hf import FiraConfig, get_fira_optimizer
from reference import assert_same_state

STEPS, STOP = 12, 5
ADAM = ("betas", "eps", "weight_decay")


def build(kind: str) -> nn.Module:
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(build_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    if kind == "unused":
        model = build_llama()
        model.unused = nn.Linear(8, 8)  # never has a gradient, and so never a state
        model.model.layers[0].requires_grad_(False)
        return model
    return build_llama(dtype=torch.bfloat16 if kind == "bf16" else torch.float32)


def build_trainer(output_dir, kind: str = "fp32", gap: int = 4, callbacks=None, **arguments) -> Trainer:
    settings = {
        "optim": "fira",
        "optim_args": f"rank=4, update_proj_gap={gap}",
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": STOP,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "weight_decay": 0.1,
    }
    args = TrainingArguments(**trainer_settings(output_dir=str(output_dir), **(settings | arguments)))
    return Trainer(model=build(kind), args=args, train_dataset=build_tokens(), callbacks=callbacks)


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def states(trainer) -> list[dict]:
    optimizer = trainer.optimizer.optimizer
    return [optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"]]


def assert_equal_bits(one, other):
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


KINDS = ["fp32", "bf16", "lora", "unused"]
FRESH = ["fp32", "bf16"]


@pytest.mark.parametrize("gap", [4, 5], ids=["inside an interval", "at a refresh"])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bit_equal(tmp_path, kind, gap):
    whole = build_trainer(tmp_path, kind, gap)
    whole.train()
    resumed = build_trainer(tmp_path, kind, gap)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))
    assert resumed.state.global_step == STEPS
    assert_equal_bits(parameters(whole.model), parameters(resumed.model))
    for one, other in zip(states(whole), states(resumed), strict=True):
        assert_same_state(one, other)


def test_the_checkpoint_matters(tmp_path):
    """Without the optimizer's file the same resume ends elsewhere, so bit-equality does come from it."""
    whole = build_trainer(tmp_path)
    whole.train()
    (tmp_path / f"checkpoint-{STOP}" / "optimizer.pt").unlink()
    resumed = build_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))
    with pytest.raises(AssertionError):
        assert_equal_bits(parameters(whole.model), parameters(resumed.model))


@pytest.mark.parametrize(
    ("changed", "missing"),
    [
        ({}, []),
        ({}, ["optimizer.pt"]),
        ({}, ["scheduler.pt"]),  # without which the Trainer loads neither
        ({"optim": "fira_layerwise", "max_grad_norm": 0}, ["optimizer.pt"]),
        ({"optim": "adamw_torch", "optim_args": None}, ["optimizer.pt"]),  # which is not ours to speak of
    ],
    ids=str,
)
def test_a_resume_without_the_state_of_the_optimizer_is_a_warning(tmp_path, caplog, changed, missing):
    build_trainer(tmp_path, max_steps=STOP, **changed).train()
    checkpoint = tmp_path / f"checkpoint-{STOP}"
    for name in missing:
        (checkpoint / name).unlink()
    for resume in (True, str(checkpoint)):
        caplog.clear()
        resumed = build_trainer(tmp_path, max_steps=STOP + 1, save_strategy="no", **changed)
        resumed.train(resume_from_checkpoint=resume)
        warnings = [record for record in caplog.records if record.name == "fira_hf.trainer"]
        if missing and changed.get("optim") != "adamw_torch":
            (warning,) = warnings
            assert warning.levelname == "WARNING"
            message = warning.getMessage()
            assert str(checkpoint) in message and "optimizer" in message and "begin anew" in message
            assert max(float(state["step"]) for state in states(resumed)) == 1
        else:
            assert not warnings


def test_resume_in_a_fresh_process_is_bit_equal(tmp_path):
    whole = {kind: build_trainer(tmp_path / kind, kind) for kind in FRESH}
    for trainer in whole.values():
        trainer.train()
    done = forks.run([__file__, str(tmp_path)], tmp_path, tmp_path)
    assert done.returncode == 0, done.stderr
    for kind, trainer in whole.items():
        assert_equal_bits(parameters(trainer.model), torch.load(tmp_path / f"{kind}.pt", weights_only=True))


def test_the_optimizer_file_holds_tensors_and_plain_numbers_only(tmp_path):
    build_trainer(tmp_path).train()
    content = torch.load(tmp_path / f"checkpoint-{STOP}" / "optimizer.pt", weights_only=True)
    values = [value for state in content["state"].values() for value in state.values()]
    assert values and all(torch.is_tensor(value) or type(value) in (int, float) for value in values)


def test_resume_with_evaluation_and_the_callback(tmp_path):
    """What watches a run may be switched on at the resume."""
    whole = build_trainer(tmp_path)
    whole.train()
    resumed = build_trainer(tmp_path, callbacks=[fira_hf.FiraCallback()])
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))
    assert_equal_bits(parameters(whole.model), parameters(resumed.model))


def test_resume_with_the_saved_config(tmp_path):
    """`config=` the checkpoint is the same setting as the one that made it."""
    whole = build_trainer(tmp_path, callbacks=[fira_hf.FiraCallback()])
    whole.train()
    checkpoint = tmp_path / f"checkpoint-{STOP}"
    resumed = build_trainer(tmp_path, optim_args=f"config={checkpoint}")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_equal_bits(parameters(whole.model), parameters(resumed.model))


SPLIT = "rank=4, update_proj_gap=4, dense_lr=1e-3"
OTHERS = {"learning_rate": 3e-4, "adam_beta2": 0.95, "adam_epsilon": 1e-5, "weight_decay": 0.3}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, OTHERS),
        ({}, {"weight_decay": 0.0}),
        ({"optim_args": SPLIT}, {"learning_rate": 3e-4}),
        ({}, {"optim_args": SPLIT}),
        ({"optim_args": SPLIT}, {"optim_args": SPLIT.replace("1e-3", "1e-4"), **OTHERS}),
        ({"optim": "fira_layerwise"}, {"optim": "fira_layerwise", **OTHERS}),
    ],
    ids=str,
)
def test_the_config_of_a_resumed_run_is_what_it_trains_with(tmp_path, first, second):
    """Adam's settings are those of the checkpoint, whatever the arguments say."""
    build_trainer(tmp_path, max_steps=STOP, callbacks=[fira_hf.FiraCallback()], **first).train()
    resumed = build_trainer(tmp_path, callbacks=[fira_hf.FiraCallback()], **second)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))
    of_first, of_resumed = (FiraConfig.from_pretrained(tmp_path / f"checkpoint-{step}") for step in (STOP, STEPS))
    assert of_resumed == of_first
    # and an optimizer of it has the groups that the run has
    again = get_fira_optimizer(build("fp32"), of_resumed).param_groups
    for group, other in zip(resumed.optimizer.param_groups, again, strict=True):
        assert group["initial_lr"] == other["lr"]
        assert [group[name] for name in ADAM] == [other[name] for name in ADAM]


def test_the_config_of_an_optimizer_that_loads_is_what_it_trains_with():
    """In a loop of one's own."""
    saved = get_fira_optimizer(build("fp32"), FiraConfig(rank=4, lr=1e-3, weight_decay=0.1))
    other = get_fira_optimizer(build("fp32"), FiraConfig(rank=4, lr=3e-4, betas=(0.8, 0.99)))
    other.load_state_dict(saved.state_dict())
    assert other.config == saved.config


# --------------------------------------------------------------------------- checkpoints of another setting


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"optim_args": "rank=8, update_proj_gap=4"}, ["rank", "4", "8"]),
        ({"optim_args": "rank=4, update_proj_gap=9"}, ["update_proj_gap", "4", "9"]),
        ({"optim_args": "rank=4, update_proj_gap=4, alpha=0.5"}, ["alpha", "1.0", "0.5"]),
        ({"optim_args": "rank=4, update_proj_gap=4, gamma=none"}, ["gamma", "2.0", "None"]),
        ({"optim_args": "rank=4, update_proj_gap=4, scaling=matrix"}, ["scaling", "column", "matrix"]),
        ({"optim_target_modules": ["q_proj", "k_proj"]}, ["project", "down_proj"]),
        ({"optim_target_modules": ["proj", "lm_head"]}, ["project", "lm_head"]),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_setting_is_refused(tmp_path, changed, words):
    build_trainer(tmp_path, max_steps=STOP).train()
    resumed = build_trainer(tmp_path, **changed)
    with pytest.raises(ValueError) as refused:
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))
    message = str(refused.value)
    assert "checkpoint" in message and all(word in message for word in words)
    assert resumed.state.global_step <= STOP


def test_a_checkpoint_of_adamw_is_refused(tmp_path):
    build_trainer(tmp_path, optim="adamw_torch", optim_args=None, max_steps=STOP).train()
    with pytest.raises(ValueError, match="checkpoint"):
        build_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))


def test_a_resume_may_lower_the_learning_rate_in_the_schedule_only(tmp_path):
    """As everywhere in torch, lr comes from the checkpoint; the schedule goes on from there."""
    build_trainer(tmp_path, max_steps=STOP, lr_scheduler_type="constant", warmup_steps=0).train()
    resumed = build_trainer(tmp_path, lr_scheduler_type="constant", warmup_steps=0)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))
    assert {entry["learning_rate"] for entry in resumed.state.log_history if "learning_rate" in entry} == {1e-2}


# --------------------------------------------------------------------------- why this is needed


def test_the_published_package_cannot_resume(tmp_path):
    """Its state holds projector objects, which the Trainer's safe loading refuses."""
    fira = pytest.importorskip("fira")

    def trainer():
        model = build_llama()
        args = TrainingArguments(
            **trainer_settings(output_dir=str(tmp_path), max_steps=STEPS, save_strategy="steps", save_steps=STOP)
        )
        targets = [p for name, p in model.named_parameters() if "_proj" in name]
        others = [p for name, p in model.named_parameters() if "_proj" not in name]
        group = {"params": targets, "rank": 4, "update_proj_gap": 4, "alpha": 1.0, "proj_type": "std"}
        optimizer = fira.FiraAdamW([{"params": others}, group], lr=1e-2)
        return Trainer(model=model, args=args, train_dataset=build_tokens(), optimizers=(optimizer, None))

    trainer().train()
    with pytest.raises(Exception, match="(?i)weights.only|Unsupported"):
        trainer().train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))


def main(folder: Path) -> None:
    for kind in FRESH:
        trainer = build_trainer(folder / "second", kind)
        trainer.train(resume_from_checkpoint=str(folder / kind / f"checkpoint-{STOP}"))
        torch.save(parameters(trainer.model), folder / f"{kind}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
