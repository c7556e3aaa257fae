"""FiraCallback: what it adds to the log, what it saves, what it prints and what it costs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback

from conftest import build_llama
from fira_hf import FiraCallback, FiraConfig, get_fira_optimizer, unwrapped

KEYS = {"fira_limiter_active", "fira_captured_energy", "fira_residual_share", "fira_state_bytes"}
FIRA = {"optim": "fira", "optim_args": "rank=4, update_proj_gap=3", "max_steps": 6}


def training_logs(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class Seen(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


# --------------------------------------------------------------------------- the log


def test_the_values_are_in_the_history_and_reach_later_callbacks(make_trainer):
    seen = Seen()
    trainer = make_trainer(callbacks=[FiraCallback(), seen], **FIRA)
    trainer.train()
    history = training_logs(trainer)
    assert len(history) == 6
    for entry, passed_on in zip(history, [logs for logs in seen.logs if "loss" in logs], strict=True):
        assert entry.keys() >= KEYS and passed_on.keys() >= KEYS
        assert {key: entry[key] for key in KEYS} == {key: passed_on[key] for key in KEYS}
        assert all(type(entry[key]) in (int, float) and math.isfinite(entry[key]) for key in KEYS)
        for key in KEYS - {"fira_state_bytes"}:
            assert 0.0 <= entry[key] <= 1.0


def test_placed_in_front_it_reaches_reporting_callbacks_too(make_trainer):
    """TensorBoard's and the like stand before the user's callbacks; the documentation says to insert this one at 0."""
    seen = Seen()
    trainer = make_trainer(callbacks=[seen], **FIRA)
    trainer.callback_handler.callbacks.insert(0, FiraCallback())
    trainer.train()
    assert all(logs.keys() >= KEYS for logs in seen.logs if "loss" in logs)


def test_the_class_will_do_and_may_train_twice(make_trainer):
    trainer = make_trainer(callbacks=[FiraCallback], **FIRA)
    for _ in range(2):
        trainer.train()
        assert len(training_logs(trainer)) == 6
        assert all(entry.keys() >= KEYS for entry in training_logs(trainer))


def test_evaluation_logs_are_left_alone(make_trainer):
    trainer = make_trainer(callbacks=[FiraCallback()], eval_strategy="steps", eval_steps=2, **FIRA)
    trainer.train()
    others = [entry for entry in trainer.state.log_history if "loss" not in entry]
    assert any("eval_loss" in entry for entry in others)
    assert not [entry for entry in others if KEYS & entry.keys()]
    assert all(entry.keys() >= KEYS for entry in training_logs(trainer))


class ByHand(TrainerCallback):
    """Recomputes the values of each step from the gradients and the optimizer's state, with full-size matrices."""

    def __init__(self):
        self.rows, self.previous = [], {}

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        rows = []
        for group in unwrapped(optimizer).param_groups:
            if "rank" not in group:
                continue
            for p in group["params"]:
                own = unwrapped(optimizer).state[p]
                tall = p.grad if p.shape[0] >= p.shape[1] else p.grad.T
                G, Q = tall.double(), own["basis"].double()
                R = G @ Q
                N = own["exp_avg"].double() / (own["exp_avg_sq"].double().sqrt() + group["eps"])
                phi = N.norm(dim=1, keepdim=True) / (R.norm(dim=1, keepdim=True) + 1e-8)
                S = phi * (G - group["alpha"] * R @ Q.T)
                before = self.previous.get(p, math.inf)
                limit = group["gamma"] * (before + 1e-8) / S.norm() if math.isfinite(before) else torch.inf
                S_limited = S * min(1.0, float(limit))
                self.previous[p] = float(S_limited.norm())
                low = group["alpha"] * N @ Q.T
                share = S_limited.norm() ** 2 / (S_limited.norm() ** 2 + low.norm() ** 2)
                rows.append([float(limit < 1.0), float(R.norm() ** 2 / G.norm() ** 2), float(share)])
        self.rows.append(torch.tensor(rows, dtype=torch.float64))


@pytest.mark.parametrize("logging_steps", [1, 3])
@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_the_values_are_those_computed_by_hand(make_trainer, logging_steps, alpha):
    by_hand = ByHand()
    trainer = make_trainer(
        callbacks=[FiraCallback(), by_hand],
        optim="fira",
        optim_args=f"rank=4, update_proj_gap=3, alpha={alpha}",
        max_steps=6,
        logging_steps=logging_steps,
    )
    trainer.train()
    history = training_logs(trainer)
    assert len(history) == 6 // logging_steps
    for index, entry in enumerate(history):
        steps = by_hand.rows[index * logging_steps : (index + 1) * logging_steps]
        limiter, energy, share = torch.cat(steps).mean(dim=0).tolist()
        assert entry["fira_limiter_active"] == pytest.approx(limiter, abs=1e-6)
        assert entry["fira_captured_energy"] == pytest.approx(energy, rel=1e-4)
        assert entry["fira_residual_share"] == pytest.approx(share, rel=1e-3)
    # the run is one in which the values say something
    assert any(entry["fira_limiter_active"] > 0.0 for entry in history)
    assert all(0.05 < entry["fira_captured_energy"] < 0.999 for entry in history)


def test_without_the_limiter_none_is_active(make_trainer):
    trainer = make_trainer(callbacks=[FiraCallback()], **(FIRA | {"optim_args": "rank=4, gamma=none"}))
    trainer.train()
    assert {entry["fira_limiter_active"] for entry in training_logs(trainer)} == {0.0}


def test_state_bytes_are_the_bytes_of_the_state(make_trainer):
    trainer = make_trainer(callbacks=[FiraCallback()], **FIRA)
    trainer.train()
    tensors = [v for s in unwrapped(trainer.optimizer).state.values() for v in s.values() if torch.is_tensor(v)]
    assert training_logs(trainer)[-1]["fira_state_bytes"] == sum(t.nbytes for t in tensors)


def test_watching_changes_nothing(make_trainer):
    runs = []
    for callbacks in ([], [FiraCallback()]):
        trainer = make_trainer(callbacks=callbacks, **FIRA)
        trainer.train()
        runs.append(trainer.model.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("steps", [{"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str)
def test_under_accumulation_and_autocast(make_trainer, steps):
    trainer = make_trainer(callbacks=[FiraCallback()], **FIRA, **steps)
    trainer.train()
    assert all(entry.keys() >= KEYS for entry in training_logs(trainer))


# --------------------------------------------------------------------------- the saved config


@pytest.mark.parametrize("targets", [None, ["attn"], r".*layers\.1\..*_proj"], ids=str)
def test_every_checkpoint_has_the_config(make_trainer, tmp_path, targets):
    trainer = make_trainer(
        callbacks=[FiraCallback()],
        save_strategy="steps",
        save_steps=2,
        weight_decay=0.1,
        adam_beta2=0.95,
        optim_target_modules=targets,
        **FIRA,
    )
    trainer.train()
    optimizer = unwrapped(trainer.optimizer)
    checkpoints = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for checkpoint in checkpoints:
        config = FiraConfig.from_pretrained(checkpoint)
        assert config == optimizer.config
        assert (config.rank, config.update_proj_gap, config.lr) == (4, 3, 1e-2)
        assert (config.weight_decay, config.betas, config.eps) == (0.1, (0.9, 0.95), 1e-8)

    # in a plain loop the file builds the same optimizer
    def described(model, groups):
        names = {id(p): name for name, p in model.named_parameters()}
        ignored = {"params", "param_names", "initial_lr"}
        return {
            names[id(p)]: {k: v for k, v in group.items() if k not in ignored}
            for group in groups
            for p in group["params"]
        }

    model = build_llama()
    again = get_fira_optimizer(model, FiraConfig.from_pretrained(checkpoints[0]))
    assert described(model, again.param_groups) == described(trainer.model, optimizer.param_groups)


def test_no_stray_folder_where_checkpoints_lie_elsewhere(make_trainer, tmp_path):
    """A hyper-parameter search saves under output_dir/run-N; a folder without weights would mislead resume."""

    class Search(Trainer):
        def _get_output_dir(self, trial):
            return str(tmp_path / "run" / "run-0")

    trainer = make_trainer(
        trainer_class=Search, callbacks=[FiraCallback()], save_strategy="steps", save_steps=3, **FIRA
    )
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "run" / "run-0").iterdir()) == ["checkpoint-3", "checkpoint-6"]
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_trial_leaves_the_config_of_an_earlier_checkpoint_alone(make_trainer, tmp_path):
    class Trial(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            state.is_hyper_param_search = True

    saves = {"save_strategy": "steps", "save_steps": 3, "optim": "fira"}
    make_trainer(callbacks=[FiraCallback()], optim_args="rank=4", **saves).train()
    make_trainer(callbacks=[Trial(), FiraCallback()], optim_args="rank=8", **saves).train()
    assert FiraConfig.from_pretrained(tmp_path / "run" / "checkpoint-3").rank == 4


# --------------------------------------------------------------------------- printing


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"eval_strategy": "epoch"}], ids=str)
def test_the_summary_is_printed_once(make_trainer, capfd, settings):
    trainer = make_trainer(callbacks=[FiraCallback()], **FIRA, **settings)
    trainer.train()
    summary = unwrapped(trainer.optimizer).summary
    printed = "".join(capfd.readouterr())
    assert len(summary.splitlines()) > 1
    assert printed.count(summary) == 1


# --------------------------------------------------------------------------- what it costs


class HostReads(TorchDispatchMode):
    """Counts the reads of a tensor's value by the host: item(), bool(), float() ... all end in this operator."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def host_reads(make_trainer, monkeypatch, callbacks, steps: int) -> int:
    """Reads in a run of so many steps that logs once, at its end; copies to the host count as reads."""
    copies = []
    with monkeypatch.context() as patch:
        for name in ("cpu", "tolist", "numpy"):
            original = getattr(torch.Tensor, name)
            patch.setattr(
                torch.Tensor,
                name,
                lambda self, *a, _original=original, **k: copies.append(1) or _original(self, *a, **k),
            )
        trainer = make_trainer(callbacks=callbacks, **(FIRA | {"max_steps": steps, "logging_steps": steps}))
        with HostReads() as reads:
            trainer.train()
    assert len(training_logs(trainer)) == 1
    return reads.count + len(copies)


def test_the_host_reads_nothing_between_logging_steps(make_trainer, monkeypatch):
    extra = [
        host_reads(make_trainer, monkeypatch, [FiraCallback()], steps)
        - host_reads(make_trainer, monkeypatch, [], steps)
        for steps in (3, 9)
    ]
    assert extra[0] == extra[1], "reads that the callback adds grow with the steps"
    assert extra[0] >= 1, "the counter must see the one read of the log"


# --------------------------------------------------------------------------- where it does not belong


def test_without_fira_it_says_so_before_the_first_step(make_trainer):
    trainer = make_trainer(callbacks=[FiraCallback()], optim="adamw_torch")
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match="(?s)FiraCallback.*AdamW.*fira"):
        trainer.train()
    assert all(torch.equal(p, start[name]) for name, p in trainer.model.named_parameters())


def test_with_a_hand_passed_optimizer(make_trainer):
    model = build_llama()
    optimizer = get_fira_optimizer(model, FiraConfig(rank=4))
    trainer = make_trainer(model, optimizers=(optimizer, None), callbacks=[FiraCallback()])
    trainer.train()
    assert all(entry.keys() >= KEYS for entry in training_logs(trainer))
