"""Data-parallel training through the Trainer: two processes, gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parent
SCRIPT = """
import sys
import torch
import torch.distributed as dist
from transformers import Trainer, TrainingArguments

import fira_hf
from conftest import build_llama, build_tokens, trainer_settings

torch.set_num_threads(1)
output = sys.argv[1]
settings = trainer_settings(output_dir=output) | {
    "optim": "fira", "optim_args": "rank=4, update_proj_gap=3", "gradient_accumulation_steps": 2,
    "max_steps": 10, "logging_steps": 5, "save_strategy": "steps", "save_steps": 4,
}

def train(resume=None):
    callbacks = [fira_hf.FiraCallback()]
    args = TrainingArguments(**settings)
    trainer = Trainer(model=build_llama(), args=args, train_dataset=build_tokens(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

weights = train()
of_each = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
dist.all_gather(of_each, weights)
resumed = train(f"{output}/checkpoint-4")
if dist.get_rank() == 0:
    start = torch.cat([p.detach().flatten() for p in build_llama().parameters()])
    torch.save({"weights": of_each, "resumed": resumed, "start": start}, f"{output}/found.pt")
"""


def test_two_processes_hold_the_same_weights_and_resume(tmp_path):
    """Ten steps over three refreshes with accumulation; the second run goes on from step 4."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*launch, str(script), str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = torch.load(tmp_path / "out" / "found.pt")
    first, second = found["weights"]
    assert not torch.equal(first, found["start"])
    assert torch.equal(first, second)
    assert torch.equal(first, found["resumed"])
