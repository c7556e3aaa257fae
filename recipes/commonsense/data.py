"""From the JSON files of LLM-Adapters to checked records and tokenised training examples."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from recipes.commonsense.options import text_form
from recipes.commonsense.settings import RecipeArguments
from recipes.commonsense.tasks import allowed_words, build_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = ("instruction", "input", "output", "answer")
# Which examples are taken when there are too many, and which are set aside for validation, is the same for every
# method and every run's seed.
SPLIT_SEED = 42
IGNORED = -100  # the label of a token that is not learned


def load_records(path: str | Path, task: str | None, answer_format: str = "label") -> list[dict[str, Any]]:
    """The records of one file, checked; each gets its allowed answers as "words", and what `text_form` adds to it.

    task None: a file of mixed tasks, which has no text form.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no data file {path}; data_dir and train_file say where the data lie.")
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError(f"{path} is empty.")
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from None
    if not isinstance(records, list):
        raise ValueError(f"{path} must hold a JSON list of records.")
    if not records:
        raise ValueError(f"{path} holds no records.")
    checked = []
    for index, record in enumerate(records):
        try:
            words = _check(record, task)
            own = {"words": words} if answer_format == "label" or task is None else text_form(record, task)
        except ValueError as error:
            raise ValueError(f"{path}, record {index + 1} (line {_line(text, index)}): {error}.") from None
        checked.append(record | own)
    return checked


def _check(record: Any, task: str | None) -> tuple[str, ...]:
    """The answers that the record allows. Raises ValueError where it is not as it should be."""
    if not isinstance(record, dict):
        raise ValueError(f"{record!r} is not a record with the fields {', '.join(FIELDS)}")
    for name in FIELDS:
        if name not in record:
            raise ValueError(f"the field {name!r} is missing")
        if not isinstance(record[name], str):
            raise ValueError(f"the field {name!r} is {record[name]!r}, not a text")
    for name in ("instruction", "output"):
        if not record[name].strip():
            raise ValueError(f"the field {name!r} is empty")
    words = allowed_words(record["instruction"], task)
    if record["answer"] not in words:
        raise ValueError(f"the answer is {record['answer']!r}, but its format allows {'/'.join(words)}")
    return words


def _line(text: str, index: int) -> int:
    """The line on which record `index` of a JSON list begins."""
    decoder = json.JSONDecoder()
    position = text.index("[") + 1
    for remaining in range(index, -1, -1):
        while text[position] in " \t\r\n,":
            position += 1
        if remaining:
            _, position = decoder.raw_decode(text, position)
    return text.count("\n", 0, position) + 1


def load_questions(arguments: RecipeArguments) -> dict[str, list[dict[str, Any]]]:
    """The test questions of each task."""
    if arguments.max_test_per_task == 0:
        return {}
    records = {
        task: load_records(Path(arguments.data_dir, task, "test.json"), task, arguments.answer_format)
        for task in arguments.tasks
    }
    return {task: _sample(of_task, arguments.max_test_per_task) for task, of_task in records.items()}


def load_training(arguments: RecipeArguments) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The training records of all tasks, and those set aside for validation."""
    if arguments.train_file is not None:
        records = load_records(arguments.train_file, None)
    else:
        records = []
        for task in arguments.tasks:
            of_task = load_records(Path(arguments.data_dir, task, "train.json"), task, arguments.answer_format)
            records += _sample(of_task, arguments.max_train_per_task)
    size = arguments.val_set_size
    if size >= len(records):
        raise ValueError(f"val_set_size is {size}, but there are only {len(records)} training examples.")
    random.Random(SPLIT_SEED).shuffle(records)
    return records[size:], records[:size]


def _sample(records: list[dict[str, Any]], count: int | None) -> list[dict[str, Any]]:
    if count is None or count >= len(records):
        return records
    return random.Random(SPLIT_SEED).sample(records, count)


def common_prefix(rows: list[list[int]]) -> int:
    """How many leading tokens all rows share."""
    shared = 0
    for tokens in zip(*rows, strict=False):
        if len(set(tokens)) > 1:
            break
        shared += 1
    return shared


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], int]:
    """The tokens of both, and where those of the continuation begin, as lm-evaluation-harness has them."""
    start = len(tokenizer(context.rstrip())["input_ids"])
    return tokenizer(context + continuation)["input_ids"], start


def encode(
    record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, cutoff_len: int, train_on_inputs: bool
) -> dict[str, list[int]]:
    """Prompt, response and end of text, cut to `cutoff_len` tokens, with a label for each token that is learned.

    In text form there is no end of text: what is learned is what is scored, the right option after its context.
    """
    if "contexts" in record:
        right = list(record["words"]).index(record["answer"])
        tokens, start = encode_pair(tokenizer, record["contexts"][right], record["continuations"][right])
        labels = [IGNORED] * start + tokens[start:]
        return {
            "input_ids": tokens[:cutoff_len],
            "attention_mask": [1] * len(tokens[:cutoff_len]),
            "labels": labels[:cutoff_len],
        }
    prompt = build_prompt(record["instruction"], record["input"])
    tokens = tokenizer(prompt + record["output"])["input_ids"][:cutoff_len]
    if len(tokens) < cutoff_len and tokens[-1] != tokenizer.eos_token_id:
        tokens = [*tokens, tokenizer.eos_token_id]
    labels = list(tokens)
    if not train_on_inputs:
        start = common_prefix([tokens, tokenizer(prompt)["input_ids"]])
        labels[:start] = [IGNORED] * start
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


def encode_all(
    records: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, cutoff_len: int, train_on_inputs: bool
) -> Dataset:
    """The tokenised records, without those so long that nothing of their answer is left to learn."""
    dataset = Dataset.from_list(records)
    dataset = dataset.map(
        encode,
        fn_kwargs={"tokenizer": tokenizer, "cutoff_len": cutoff_len, "train_on_inputs": train_on_inputs},
        remove_columns=dataset.column_names,
        desc="tokenising",
    )
    kept = dataset.filter(
        lambda labels: any(label != IGNORED for label in labels), input_columns="labels", desc="checking"
    )
    if not len(kept):
        raise ValueError(f"cutoff_len is {cutoff_len}, which leaves no example with a token to learn; raise it.")
    if len(kept) < len(dataset):
        print(f"{len(dataset) - len(kept)} examples left out: no token of the answer within cutoff_len {cutoff_len}")
    return kept
