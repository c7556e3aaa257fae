"""A LLaMA small enough for the recipe's tests, with its tokenizer and a few questions."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from conftest import build_llama
from recipes.text import train_tokenizer

WORDS = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": ("answer1", "answer2", "answer3"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "ARC-Easy": ("answer1", "answer2", "answer3", "answer4"),
    "ARC-Challenge": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "openbookqa": ("answer1", "answer2", "answer3", "answer4"),
}


def question(task: str, number: int) -> dict[str, str]:
    words = WORDS[task]
    answer = words[number % len(words)]
    return {
        "instruction": f"Please answer question {number} of {task}.\n\nAnswer format: {'/'.join(words)}",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def write_data(folder: Path, train: int = 8, test: int = 4) -> Path:
    """`<task>/{train,test}.json` for all eight tasks."""
    for task in WORDS:
        for name, start, count in (("train", 0, train), ("test", 100, test)):
            path = folder / task / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps([question(task, start + i) for i in range(count)], indent=1))
    return folder


def build_tokenizer(vocab_size: int = 400):
    """Byte-pair encoding learned from the questions; with a vocabulary of 260 words fall into many tokens."""
    from transformers import PreTrainedTokenizerFast

    texts = [text for task in WORDS for text in question(task, 1).values()]
    tokenizer = train_tokenizer(texts, vocab_size, ("<unk>", "<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


def build_model(vocab_size: int):
    special = {"bos_token_id": None, "eos_token_id": 1}
    return build_llama(vocab_size=vocab_size, max_position_embeddings=512, initializer_range=0.2, **special)


def write_model(folder: Path) -> Path:
    tokenizer = build_tokenizer()
    build_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_preset(folder: Path, model: Path, data: Path) -> Path:
    """Experiments of a few seconds in the form of the recipe's own."""
    base = {
        "model": str(model),
        "data_dir": str(data),
        "val_set_size": 8,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "logging_steps": 2,
        "save_steps": 20,
        "eval_strategy": "no",
        "lora_rank": 8,
        "scoring_batch_size": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": "1e-3",
    }
    lora = {"lora_rank": base.pop("lora_rank")}
    fira = {"optim_args": "rank=4, update_proj_gap=3"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    galore = {"optim_args": "rank=4, update_proj_gap=3, scale=1.0", "save_strategy": "no"}
    flora = {"optim_args": "rank=4, update_proj_gap=3, projection=random, residual=none"}
    methods = {"fira-full": fira, "galore-full": galore, "flora-full": flora, "adamw-full": {}}
    methods |= {
        "fira-int8-full": {"optim_args": "rank=4, state_dtype=int8"},
        "fira-published-full": {"optim_args": "preset=published, rank=4, update_proj_gap=3"},
        "subspace-muon-full": {"optim_args": "preset=subspace-muon, rank=4, dense_lr=1e-3"},
        "muon-full": {"optim_args": "base_optimizer=muon, rank=32, projection=columns, residual=none, dense_lr=1e-3"},
    }
    methods |= {
        f"{name}-on-lora": lora | own for name, own in {"fira": fira, "galore": galore, "flora": flora}.items()
    }
    methods |= {
        "lora": lora,
        "qlora": lora,
        "fira-on-qlora": lora | fira,
        "lora-equal-bytes": {"lora_rank": 8},
        "dora": lora,
        "relora": lora | {"relora_interval": 6, "relora_warmup": 2},
    }
    for method, own in methods.items():
        experiment = {"defaults": "base.yaml", "method": method} | own
        (folder / f"{method}.yaml").write_text(yaml.safe_dump(experiment))
    return folder
