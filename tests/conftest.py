"""Tiny models, tiny data and a Trainer on the CPU, shared by the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)  # these matrices are so small that a second thread only costs


def build_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **config):
    """A LLaMA of two layers whose matrices are square (q, o), wide (k, v, down) and tall (gate, up)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | config))).to(dtype)


def build_tokens(rows: int = 64, length: int = 12, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Rows of random tokens, each its own label."""
    tokens = torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer_settings(**arguments) -> dict:
    """Keyword arguments of TrainingArguments: four steps on the CPU, everything logged, nothing saved."""
    defaults = {
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return defaults | arguments


def launch(script: str, folder: Path, processes: int, *arguments: str) -> None:
    """Runs a script by torchrun, one thread a process on the CPU; fails with what it wrote if it fails."""
    tests = Path(__file__).parent
    path = folder / "script.py"
    path.write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    search = os.pathsep.join([str(tests.parent), str(tests)])
    result = subprocess.run(
        [*command, str(path), *arguments],
        env=os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture
def tiny_llama() -> Callable:
    return build_llama


@pytest.fixture
def token_dataset() -> list[dict[str, torch.Tensor]]:
    return build_tokens()


@pytest.fixture
def make_trainer(tmp_path, monkeypatch) -> Callable:
    """`make_trainer(model=None, callbacks=None, ..., **TrainingArguments)` -> Trainer."""
    from transformers import Trainer, TrainingArguments

    def make(
        model=None, *, trainer_class=Trainer, model_init=None, callbacks=None, optimizers=(None, None), **arguments
    ):
        if model is None and model_init is None:
            model = build_llama()
        rows = arguments.pop("train_dataset", None) or build_tokens()
        settings = trainer_settings(output_dir=str(tmp_path / "run")) | arguments
        # transformers 4.56 writes bf16=True here, where it would switch on autocast for every later Trainer
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        evaluates = settings.get("eval_strategy", "no") != "no"
        return trainer_class(
            model=model,
            args=TrainingArguments(**settings),
            train_dataset=rows,
            eval_dataset=build_tokens(8, seed=2) if evaluates else None,
            model_init=model_init,
            callbacks=callbacks,
            optimizers=optimizers,
        )

    return make
