"""Which answer a model gives to each question: by the likelihood of the answer words or of the options' texts, or by
generation as published.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
import torch
import torch.distributed as dist
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipes.commonsense.data import IGNORED, common_prefix, encode_pair
from recipes.commonsense.settings import RecipeArguments
from recipes.commonsense.tasks import ANSWER_PREFIX, TASKS, build_prompt, extract_answer

# As published: 4 beams and 32 new tokens. The published call also sets temperature 0.1, top_p 0.75 and top_k 40, but
# leaves do_sample at False, and a beam search that does not sample ignores them. So do_sample is stated here and they
# are switched off: a model whose own generation_config samples is scored the same way.
GENERATION = {
    "num_beams": 4,
    "max_new_tokens": 32,
    "do_sample": False,
    "temperature": None,
    "top_p": None,
    "top_k": None,
}


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: dict[str, list[dict[str, Any]]],
    arguments: RecipeArguments,
) -> dict[str, dict[str, Any]]:
    """Per task: accuracy, majority and unanswered (shares, 0 to 1), the number of questions, a fingerprint that tells
    them from others, and a letter for each: its answer's number among the task's words, or "-" ("chosen": "2-1"), and
    whether it is right ("right": "100").

    Of questions in text form these are acc_norm's; "acc" holds accuracy, chosen and right without the division.
    `tasks.counted` tells which of the two counts.
    Several processes share the questions, and each gets all the results.
    """
    metric = evaluate.load(str(Path(__file__).parent / "accuracy"))
    predict = {"loglik": predict_by_likelihood, "generate": predict_by_generation}[arguments.scoring]
    results = {}
    with _evaluating(model):
        for task, records in questions.items():
            answers = [record["answer"] for record in records]
            more: dict[str, Any] = {"questions": len(records), "fingerprint": fingerprint(records)}
            if arguments.answer_format == "text":
                predictions, raw = predict_by_text(model, tokenizer, records, task, arguments.scoring_batch_size)
                accuracy = metric.compute(predictions=raw, references=answers)["accuracy"]
                more["acc"] = {"accuracy": accuracy, **_answers(raw, answers, task)}
            else:
                predictions = predict(model, tokenizer, records, task, arguments.scoring_batch_size)
            figures = metric.compute(predictions=predictions, references=answers)
            results[task] = figures | more | _answers(predictions, answers, task)
    return results


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout and, where all weights are in fp32, without autocast; then as it was.

    Accelerate's forward rounds to bf16 with `bf16: true`. The differences between answers are often smaller than that,
    and lm-evaluation-harness knows nothing of it.
    """
    was_training, forward = model.training, model.__dict__.get("forward")
    model.eval()
    # FSDP rounds the weights themselves.
    if "_original_forward" in model.__dict__ and _in_fp32(model) and not isinstance(model, FSDPModule):
        model.forward = model._original_forward
    yield
    if forward is not None:
        model.forward = forward
    model.train(was_training)


def _in_fp32(model: PreTrainedModel) -> bool:
    return all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())


def fingerprint(questions: list[Any]) -> str:
    return hashlib.sha256(json.dumps(questions).encode()).hexdigest()[:12]


def _answers(predictions: list[str], answers: list[str], task: str) -> dict[str, str]:
    """A letter a question."""
    numbers = {word: str(number) for number, word in enumerate(TASKS[task], start=1)}
    return {
        "chosen": "".join(numbers.get(word, "-") for word in predictions),
        "right": "".join(str(int(word == answer)) for word, answer in zip(predictions, answers, strict=True)),
    }


@dataclass
class _Row:
    """One sequence for the model. Its last `k` positions predict the tokens of each of its candidates.

    tokens: input ids; candidates: indices of the answer words; targets: one list of `k` token ids for each of them.
    """

    question: int
    tokens: list[int]
    candidates: list[int]
    targets: list[list[int]]


def _rows(question: int, texts: list[list[int]]) -> list[_Row]:
    """The sequences that decide between the tokenised candidates `texts` of one question.

    What all candidates share decides nothing. If each then has one token left, they are all read off at one position.
    """
    shared = min(common_prefix(texts), min(map(len, texts)) - 1)
    tails = [text[shared:] for text in texts]
    if all(len(tail) == 1 for tail in tails):
        return [_Row(question, texts[0][:shared], list(range(len(texts))), tails)]
    return [
        _Row(question, text[:-1], [index], [tail]) for index, (text, tail) in enumerate(zip(texts, tails, strict=True))
    ]


def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    words: list[tuple[str, ...]],
    batch_size: int,
    progress: str | None = None,
) -> list[list[float]]:
    """log p(the part in which the answers differ | everything before it) of every word of every prompt."""
    rows = []
    for question, (prompt, candidates) in enumerate(zip(prompts, words, strict=True)):
        rows += _rows(question, [tokenizer(prompt + ANSWER_PREFIX + word)["input_ids"] for word in candidates])
    found = _sums(model, tokenizer, rows, batch_size, progress)
    return [[found[index, candidate] for candidate in range(len(allowed))] for index, allowed in enumerate(words)]


@torch.no_grad()
def _sums(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[_Row],
    batch_size: int,
    progress: str | None,
) -> dict[tuple[int, int], float]:
    """Of each question and candidate the sum of log p over its targets."""
    found = {}
    for batch in _batches(rows, [len(row.tokens) for row in rows], batch_size, progress):
        inputs = _pad_left([row.tokens for row in batch], tokenizer.pad_token_id, model.device)
        # Only the last positions: the logits of whole prompts over the vocabulary would take gigabytes.
        longest = max(len(row.targets[0]) for row in batch)
        logits = model(**inputs, use_cache=False, logits_to_keep=longest).logits
        for row, of_row in zip(batch, logits, strict=True):
            targets = torch.tensor(row.targets, device=of_row.device)
            log_probabilities = of_row[-targets.shape[1] :].float().log_softmax(-1)
            sums = log_probabilities.gather(1, targets.T).sum(0)
            for candidate, value in zip(row.candidates, sums.tolist(), strict=True):
                found[row.question, candidate] = value
    return _gather(found)


def _pad_left(rows: list[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Rows padded on the left, so that their ends are aligned; positions count from each row's first token."""
    length = max(map(len, rows))
    input_ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def _batches(items: list, lengths: list[int], size: int, progress: str | None) -> Iterator[list]:
    """The items in batches of like length, the longest first, so that what does not fit in memory fails at once.

    Each of several processes gets its share, in as many batches as the others: where the weights are sharded, all have
    to take part in a forward pass. One for which the last items do not suffice repeats one of them.
    """
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    order = sorted(range(len(items)), key=lambda index: -lengths[index])
    # None: no bar where there is no terminal
    with tqdm(total=len(items), desc=progress, disable=progress is None or rank > 0 or None) as bar:
        for start in range(0, len(order), size * processes):
            block = order[start : start + size * processes]
            yield [items[index] for index in block[rank::processes] or block[:1]]
            bar.update(len(block))


def _gather(found: dict[Any, Any]) -> dict[Any, Any]:
    """What all processes have found."""
    if not dist.is_initialized():
        return found
    of_each: list[dict[Any, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_each, found)
    return {key: value for of_one in of_each for key, value in of_one.items()}


def predict_by_likelihood(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: list[dict[str, Any]],
    task: str,
    batch_size: int,
) -> list[str]:
    """The likeliest of the answer words that each question allows."""
    prompts = [build_prompt(record["instruction"], record["input"]) for record in records]
    words = [record["words"] for record in records]
    scores = log_likelihoods(model, tokenizer, prompts, words, batch_size, progress=task)
    return [allowed[of_one.index(max(of_one))] for allowed, of_one in zip(words, scores, strict=True)]


def text_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: list[dict[str, Any]],
    batch_size: int,
    progress: str | None = None,
) -> list[list[float]]:
    """log p(continuation | context) of each option of each record in text form."""
    rows = []
    for question, record in enumerate(records):
        for option, pair in enumerate(zip(record["contexts"], record["continuations"], strict=True)):
            tokens, start = encode_pair(tokenizer, *pair)
            rows.append(_Row(question, tokens[:-1], [option], [tokens[start:]]))
    found = _sums(model, tokenizer, rows, batch_size, progress)
    return [[found[index, option] for option in range(len(record["words"]))] for index, record in enumerate(records)]


def predict_by_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: list[dict[str, Any]],
    task: str,
    batch_size: int,
) -> tuple[list[str], list[str]]:
    """The words of the options that are likeliest by acc_norm, the likelihood divided by the option's length in
    characters, and by acc, the likelihood itself; the first one where some are equal.
    """
    by_length, raw = [], []
    for record, sums in zip(
        records, text_likelihoods(model, tokenizer, records, batch_size, progress=task), strict=True
    ):
        # The space before an option does not count. In WinoGrande all continuations are the same: acc_norm is acc.
        means = [value / (len(text) - 1) for value, text in zip(sums, record["continuations"], strict=True)]
        by_length.append(record["words"][means.index(max(means))])
        raw.append(record["words"][sums.index(max(sums))])
    return by_length, raw


def answer_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Dataset, batch_size: int
) -> list[float]:
    """Of each encoded example the mean loss of the tokens that have a label, which are its last ones."""
    rows = []
    for index, (tokens, labels) in enumerate(zip(examples["input_ids"], examples["labels"], strict=True)):
        rows.append(_Row(index, tokens[:-1], [0], [[label for label in labels[1:] if label != IGNORED]]))
    with _evaluating(model):
        found = _sums(model, tokenizer, rows, batch_size, progress="held-out answers")
    return [-found[row.question, 0] / len(row.targets[0]) for row in rows]


@torch.no_grad()
def predict_by_generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: list[dict[str, Any]],
    task: str,
    batch_size: int,
) -> list[str]:
    """The first answer word in the generated response, "" if there is none."""
    prompts = [tokenizer(build_prompt(record["instruction"], record["input"]))["input_ids"] for record in records]
    answers = {}
    items = list(enumerate(prompts))
    for batch in _batches(items, [len(prompt) for prompt in prompts], batch_size, progress=task):
        inputs = _pad_left([prompt for _, prompt in batch], tokenizer.pad_token_id, model.device)
        length = inputs["input_ids"].shape[1]
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            pad_token_id=tokenizer.pad_token_id,
            synced_gpus=dist.is_initialized(),  # as in _batches: one that has its answers goes on with the others
            **GENERATION,
        )
        responses = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
        for (index, _), response in zip(batch, responses, strict=True):
            answers[index] = extract_answer(response, task)
    answers = _gather(answers)
    return [answers[index] for index in range(len(records))]
