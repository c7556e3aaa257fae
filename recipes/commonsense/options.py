"""The text form of the tasks: the options that an instruction of LLM-Adapters lists, in the prompts of
lm-evaluation-harness.

An option is scored by the likelihood of its continuation after its context. Both are what `lm_eval/tasks` has for each
task (0.4.13), but for BoolQ's passage, which LLM-Adapters leaves out.
"""

from __future__ import annotations

import itertools
import re

from recipes.commonsense.tasks import TASKS

_CHOOSE = "Please choose the correct "
OPENINGS = dict.fromkeys(TASKS, f"{_CHOOSE}answer to the question: ") | {
    "boolq": "Please answer the following question with true or false, question: ",
    "piqa": f"{_CHOOSE}solution to the question: ",
    "hellaswag": f"{_CHOOSE}ending to complete the given sentence: ",
    "winogrande": f"{_CHOOSE}answer to fill in the blank to complete the given sentence: ",
}
PROMPTS = dict.fromkeys(TASKS, "Question: {}\nAnswer:") | {
    "social_i_qa": "Q: {}\nA:",
    "hellaswag": "{}",
    "openbookqa": "{}",
}
YES_NO = {"true": "yes", "false": "no"}
BLANK = "_"

_FORMAT = re.compile(r"\s+Answer format:\s*(\S+)$")


def text_form(record: dict[str, str], task: str) -> dict[str, list[str]]:
    """The record's "words" with the "contexts" and the "continuations" of these options, each beginning with a space.

    The contexts of a question are the same, but for WinoGrande: there the continuations are, the rest of the sentence.
    Raises ValueError where the options cannot be told from the instruction.
    """
    if record["input"]:
        raise ValueError(f"the field 'input' is {record['input']!r}, for which the text form has no place")
    instruction = record["instruction"].strip()
    try:
        question, options = read_options(instruction, task)
        if record["answer"] not in options:
            raise ValueError(f"the answer is {record['answer']!r}, but the options are {'/'.join(options)}")
        contexts, continuations = _fill(question, list(options.values()), task)
    except ValueError as error:
        raise ValueError(f"{error}, in {instruction!r}") from None
    return {"words": list(options), "contexts": contexts, "continuations": [f" {text}" for text in continuations]}


def read_options(instruction: str, task: str) -> tuple[str, dict[str, str]]:
    """The question, and each answer word with its option's text."""
    opening, ending = OPENINGS[task], _FORMAT.search(instruction)
    if not instruction.startswith(opening):
        raise ValueError(f"an instruction of {task} begins with {opening!r}, not so this one")
    if ending is None:
        raise ValueError("there is no 'Answer format: ...' at the end")
    words = ending[1].split("/")
    if not set(words) <= set(TASKS[task]):
        raise ValueError(f"'Answer format: {ending[1]}' is not a format of {task} ({'/'.join(TASKS[task])})")
    body = instruction[len(opening) : ending.start()]
    question, *options = [body.strip(), *(YES_NO[word] for word in words)] if task == "boolq" else _split(body, words)
    if task == "hellaswag":
        question, *options = map(_without_wikihow_marks, (question, *options))
    for name, text in zip(("question", *words), (question, *options), strict=True):
        if not text.strip():
            raise ValueError(f"the text of {name} is empty")
    return question, dict(zip(words, options, strict=True))


def _split(body: str, words: list[str]) -> list[str]:
    """The question and the options of "QUESTION\\n\\nAnswer1: ... Answer2: ...".

    A label may occur in a question or an option as well, where all labels stand in their order in one way only.
    """
    labels = [f"{word.capitalize()}:" for word in words]
    # The first one begins a line, the others follow a space or begin a line.
    patterns = [rf"(?<=\n){labels[0]}", *(rf"(?<!\S){label}" for label in labels[1:])]
    places = [[match.span() for match in re.finditer(pattern, body)] for pattern in patterns]
    for label, found in zip(labels, places, strict=True):
        if not found:
            raise ValueError(f"there is no {label!r}")
    following = f"{words[0][:-1].capitalize()}{len(words) + 1}:"
    if re.search(rf"(?<!\S){following}", body):
        raise ValueError(f"there is a {following!r}, but the format is {'/'.join(words)}")
    readings = [
        spans for spans in itertools.product(*places) if all(one < other for one, other in itertools.pairwise(spans))
    ]
    if len(readings) != 1:
        reason = f"in {len(readings)} orders" if readings else "not in their order"
        raise ValueError(f"the labels {' '.join(labels)} stand {reason}")
    starts, ends = zip(*readings[0], strict=True)
    return [body[start:end].strip() for start, end in zip((0, *ends), (*starts, None), strict=True)]


def _without_wikihow_marks(text: str) -> str:
    """As the harness has HellaSwag: "How to rest [title] Sit. [step] Breathe." -> "How to rest. Sit. Breathe."."""
    return re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).replace("  ", " ")


def _fill(question: str, options: list[str], task: str) -> tuple[list[str], list[str]]:
    """Contexts and continuations, one for each option."""
    if task == "winogrande":
        before, blank, rest = question.partition(BLANK)
        if not blank:
            raise ValueError(f"there is no blank {BLANK!r}")
        if not rest.strip():
            raise ValueError("nothing follows the blank, so that nothing decides between the options")
        return [before + option for option in options], [rest.strip()] * len(options)
    if task == "boolq" and not question.endswith("?"):
        question += "?"
    return [PROMPTS[task].format(question)] * len(options), options
