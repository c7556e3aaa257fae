"""A LLaMA small enough for the tests of the pre-training recipe, with a text and experiments of a few seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

CONFIG = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_cache": False,
}
LENGTH, BATCH, STEPS = 16, 4, 12
METHODS = {
    "adamw": {},
    "adamw-two-rates": {"dense_lr": "3e-2"},
    "fira": {"optim_args": "rank=4, update_proj_gap=5"},
    "flora": {"optim_args": "rank=4, update_proj_gap=5, projection=random, residual=none"},
    "galore": {"optim_args": "rank=4, update_proj_gap=5, scale=0.25", "save_strategy": "no"},
    "apollo": {"optim_args": "rank=4, update_proj_gap=5", "save_strategy": "no"},
    "lora": {"lora_rank": 4},
    "lora-two-rates": {"lora_rank": 4, "dense_lr": "3e-2"},
    "relora": {"lora_rank": 4, "relora_interval": 4, "relora_warmup": 2},
}


def sentences(start: int, count: int) -> list[str]:
    return [f"The number {n} comes after {n - 1} and before {n + 1}.\n" for n in range(start, start + count)]


def write_text(folder: Path, train: int = 120, valid: int = 20) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text("".join(sentences(1, train)))
    (folder / "valid.txt").write_text("".join(sentences(1000, valid)))
    return folder


def write_config(path: Path) -> Path:
    path.write_text(json.dumps(CONFIG))
    return path


def write_preset(folder: Path) -> Path:
    """Experiments in the form of the recipe's own, beside their configuration and their text."""
    folder.mkdir(parents=True, exist_ok=True)
    base = {
        "model_config": str(write_config(folder / "config.json")),
        "data_dir": str(write_text(folder / "text")),
        "sequence_length": LENGTH,
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": "1e-2",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 6,
        "save_steps": 6,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    for method, own in METHODS.items():
        (folder / f"{method}.yaml").write_text(yaml.safe_dump({"defaults": "base.yaml", "method": method} | own))
    return folder


@contextmanager
def stopped_after_8_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run in this process that a user interrupts before its ninth step."""

    def stop(self, args, state, control, **_):
        if state.global_step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("recipes.measure.StepTime.on_step_begin", stop)
        with pytest.raises(KeyboardInterrupt):
            yield
