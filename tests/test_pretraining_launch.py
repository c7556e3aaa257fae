"""The pre-training recipe in two processes (gloo): the same batches, restarts and figures as in one."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import launch
from pretraining_tiny import write_preset
from recipes import files

# Trains on packed text with restarts, on a stream of documents of different lengths as C4 is one, and from what was
# learned first.
SCRIPT = """
import os
import sys
from pathlib import Path

import datasets
import torch

from pretraining_tiny import sentences
from recipes.pretraining import data, train
from recipes.pretraining.settings import RecipeArguments

torch.set_num_threads(1)
torch.manual_seed(int(os.environ.get("RANK", 0)))  # which is not to matter
preset, folder = map(Path, sys.argv[1:])


def load_dataset(path, name, split, streaming):
    def documents():
        for number, text in enumerate(sentences(1, 200)):
            yield {"text": text * (1 + number % 3)}

    return datasets.IterableDataset.from_generator(documents)


datasets.load_dataset = load_dataset
words = ["--optim", "adamw_torch", "--save_strategy", "no"]
assert train.main([str(preset / "relora.yaml"), "--output_dir", str(folder / "packed"), *words]) == 0
tokenizer = str(folder / "packed" / "model")
# The validation loss is the mean of the means of its batches, each of all processes: three of four texts.
stream = ["--per_device_eval_batch_size", str(4 // int(os.environ["WORLD_SIZE"]))]
stream += ["--data_dir", "c4", "--tokenizer", tokenizer, "--eval_tokens", "240", "--sequence_length", "40"]
assert train.main([str(preset / "adamw.yaml"), "--output_dir", str(folder / "stream"), *stream]) == 0
# A model that was evaluated before its training would be trained by each process for itself.
continued = ["--model_config", "null", "--model", tokenizer, "--other_data_dir", str(preset / "text")]
continued += ["--optim", "adamw_torch", "--learning_rate", "1e-3"]
assert train.main([str(preset / "adamw.yaml"), "--output_dir", str(folder / "continued"), *continued]) == 0
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """What one process and what two of them have written."""
    preset = write_preset(tmp_path_factory.mktemp("pretraining") / "tiny")
    found = []
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"processes{processes}")
        launch(SCRIPT, folder, processes, str(preset), str(folder))
        found.append(folder)
    return found


@pytest.mark.parametrize("run", ["packed", "stream", "continued"])
def test_two_processes_train_as_one(folders, run):
    one, two = (files.read_json(folder / run / "result.json") for folder in folders)
    assert (one["status"], two["status"]) == ("ok", "ok")
    assert (one["provenance"]["processes"], two["provenance"]["processes"]) == (1, 2)
    assert [result["all_settings"]["per_device_train_batch_size"] for result in (one, two)] == [4, 2]
    losses = [[entry["loss"] for entry in result["history"] if "loss" in entry] for result in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert one["training_tokens"] == two["training_tokens"]
    for key in [key for key in one if "eval_loss" in key or "other_loss" in key]:
        assert one[key] == pytest.approx(two[key], rel=1e-3)
