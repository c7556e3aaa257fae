"""The eight tasks, their answer words and the prompt."""

from __future__ import annotations

import re
from typing import Any

TASKS: dict[str, tuple[str, ...]] = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "ARC-Easy": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "ARC-Challenge": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "openbookqa": ("answer1", "answer2", "answer3", "answer4", "answer5"),
}
# Counted by acc in text form, the others by acc_norm: as lm-evaluation-harness (0.4.13) does, whose own tasks of these
# names have no acc_norm.
BY_ACC = frozenset({"boolq", "social_i_qa", "winogrande"})
ANY_WORD = tuple(dict.fromkeys(word for words in TASKS.values() for word in words))
ANSWER_PREFIX = "the correct answer is "

_FORMAT_LINE = re.compile(r"^Answer format:\s*(\S+)\s*$", re.MULTILINE)


def allowed_words(instruction: str, task: str | None) -> tuple[str, ...]:
    """The answers one question allows: those of its "Answer format:" line, else the task's (None: any task's)."""
    words = TASKS[task] if task is not None else ANY_WORD
    lines = _FORMAT_LINE.findall(instruction)
    if not lines:
        return words
    stated = tuple(lines[-1].split("/"))
    if not set(stated) <= set(words):
        raise ValueError(f"'Answer format: {lines[-1]}' is not a format of {task or 'any task'} ({'/'.join(words)})")
    return stated


def counted(task: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Of a task's figures, as `score` finds them, those that count in averages and comparisons."""
    return figures | figures["acc"] if task in BY_ACC and "acc" in figures else figures


def build_prompt(instruction: str, context: str = "") -> str:
    """The Alpaca prompt, up to where the response begins."""
    if context:
        opening = "Below is an instruction that describes a task, paired with an input that provides further context. "
        middle = f"### Instruction:\n{instruction}\n\n### Input:\n{context}"
    else:
        opening = "Below is an instruction that describes a task. "
        middle = f"### Instruction:\n{instruction}"
    return f"{opening}Write a response that appropriately completes the request.\n\n{middle}\n\n### Response:\n"


def extract_answer(response: str, task: str) -> str:
    """The first answer word of the task in a response, wherever it stands, as published; "" if there is none."""
    found = re.search("|".join(TASKS[task]), response)
    return found.group() if found else ""
