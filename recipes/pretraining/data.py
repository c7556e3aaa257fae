"""Text as sequences of tokens: C4 a document each, as published; any other text packed into blocks of one length."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics

import datasets
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from recipes import errors, models
from recipes.pretraining.settings import C4, EMBEDDED, RecipeArguments
from recipes.text import blocks, train_tokenizer

END = "<|endoftext|>"  # after each document, by the tokenizer that is learned here
IGNORED = -100  # the label of a position that is not learned
LINES = 1000  # tokenised at once
NO_LIMIT = 10**9


def load(
    arguments: RecipeArguments, vocab_size: int, seed: int
) -> tuple[PreTrainedTokenizerBase, Dataset | IterableDataset, Dataset]:
    """The tokenizer, and training and validation data with "input_ids" of at most `sequence_length` tokens.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is empty, malformed or too short, or the tokenizer has more tokens than the model.
    """
    if arguments.data_dir == C4:
        tokenizer = _load_tokenizer(arguments)
        train = stream_c4("train", tokenizer, arguments.sequence_length, seed)
        return tokenizer, train, _first_of_c4(tokenizer, arguments)
    texts = {split: read(arguments.data_dir, split) for split in ("train", "valid")}
    if arguments.tokenizer is None and arguments.model is None:
        lines = chain.from_iterable(text.splitlines(keepends=True) for text in texts["train"])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(lines, vocab_size, (END,)), eos_token=END)
    else:
        tokenizer = _load_tokenizer(arguments)
    packed = {split: _pack(texts[split], tokenizer, arguments, split) for split in texts}
    largest = max(int(of_split.max()) for of_split in packed.values())
    if largest >= vocab_size:
        raise ValueError(
            f"tokenizer {arguments.tokenizer or arguments.model} yields the token {largest}, but the vocab_size of "
            f"{arguments.model_config or arguments.model} is {vocab_size}; choose another tokenizer or raise "
            "vocab_size."
        )
    return (
        tokenizer,
        Dataset.from_dict({"input_ids": packed["train"].numpy()}),
        _first_tokens(packed["valid"].tolist(), arguments.eval_tokens),
    )


def load_other(arguments: RecipeArguments, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The validation data of `other_data_dir`."""
    if arguments.other_data_dir == C4:
        return _first_of_c4(tokenizer, arguments)
    texts = read(arguments.other_data_dir, "valid", "other_data_dir")
    packed = _pack(texts, tokenizer, arguments, "valid", "other_data_dir")
    return _first_tokens(packed.tolist(), arguments.eval_tokens)


def _first_of_c4(tokenizer: PreTrainedTokenizerBase, arguments: RecipeArguments) -> Dataset:
    rows = stream_c4("valid", tokenizer, arguments.sequence_length, seed=0)
    return _first_tokens((row["input_ids"] for row in rows), arguments.eval_tokens)


def _load_tokenizer(arguments: RecipeArguments) -> PreTrainedTokenizerBase:
    if arguments.model is not None:
        return models.load_tokenizer(arguments.model, model_max_length=NO_LIMIT)
    name = arguments.tokenizer
    try:
        # Texts are cut or packed here, whatever length the tokenizer's own model had.
        return AutoTokenizer.from_pretrained(name, model_max_length=NO_LIMIT)
    except OSError as error:
        raise OSError(
            f"tokenizer is {name}: not a folder here, and not to be had from the hub. ({errors.text(error)})"
        ) from error


def read(data_dir: str, split: str, setting: str = "data_dir") -> list[str]:
    """The texts of a split, "train" or "valid"; `setting` is what named the folder."""
    if data_dir == EMBEDDED:
        # Python's own manual, which it carries for help(). Topics share whole sections, so the paragraphs are made
        # unique before every tenth is set aside.
        texts = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
        paragraphs = dict.fromkeys(text.strip("\n") for text in texts)
        chosen = [text for number, text in enumerate(paragraphs) if (number % 10 == 0) == (split == "valid")]
        return ["\n\n".join(chosen)]
    found = [path for kind in ("txt", "jsonl") if (path := Path(data_dir, f"{split}.{kind}")).is_file()]
    if not found:
        raise FileNotFoundError(
            f"{setting} is {data_dir}, where there is neither {split}.txt nor {split}.jsonl; "
            f"name a folder that has one of them, {C4} or {EMBEDDED}."
        )
    if len(found) > 1:
        raise ValueError(
            f"{setting} is {data_dir}, where there are {split}.txt and {split}.jsonl; remove one of them."
        )
    path = found[0]
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError(f"{path} is empty.")
    if path.suffix == ".txt":
        return [text]
    lines = enumerate(text.split("\n"), start=1)
    return [_text_of(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _text_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error.msg}).") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f'{where}: not a record with a "text", as in {{"text": "..."}}.')
    return record["text"]


def _pack(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    arguments: RecipeArguments,
    split: str,
    setting: str = "data_dir",
) -> Tensor:
    """(blocks, sequence_length) of all texts one after another, without the rest."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = array("i")
    for text in texts:
        lines = text.splitlines(keepends=True)
        for start in range(0, len(lines), LINES):  # a text of megabytes at once would take gigabytes
            some = tokenizer(lines[start : start + LINES], add_special_tokens=False)["input_ids"]
            tokens.extend(chain.from_iterable(some))
        tokens.extend(end)
    if len(tokens) < arguments.sequence_length:
        raise ValueError(
            f"{setting} is {getattr(arguments, setting)}, whose {split} text has {len(tokens):,} tokens, less than "
            f"one sequence; lower sequence_length, which is {arguments.sequence_length}, or give more text."
        )
    return blocks(torch.frombuffer(tokens, dtype=torch.int32), arguments.sequence_length)


def stream_c4(split: str, tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> IterableDataset:
    """Documents of C4-en, each cut to `length` tokens; those for training in an order that the seed chooses."""
    name = {"train": "train", "valid": "validation"}[split]
    documents = datasets.load_dataset("allenai/c4", "en", split=name, streaming=True).select_columns("text")
    if split == "train":
        documents = documents.shuffle(seed=seed)
    return documents.map(
        lambda rows: {"input_ids": tokenizer(rows["text"], truncation=True, max_length=length)["input_ids"]},
        batched=True,
        remove_columns="text",
    )


def _first_tokens(rows: Iterable[list[int]], tokens: int) -> Dataset:
    """The first rows, up to the one with which they have so many tokens."""
    kept: list[list[int]] = []
    total = 0
    for row in rows:
        if total >= tokens:
            break
        kept.append(row)
        total += len(row)
    return Dataset.from_dict({"input_ids": kept})


def collate(rows: list[dict[str, list[int]]], length: int) -> dict[str, Tensor]:
    """A batch, padded on the right; what is padding is neither seen nor learned.

    Always of the same length, as published: a stream's batches for several processes are read as one.
    """
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for index, row in enumerate(rows):
        tokens = torch.tensor(row["input_ids"])
        input_ids[index, : len(tokens)] = labels[index, : len(tokens)] = tokens
        attention_mask[index, : len(tokens)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
