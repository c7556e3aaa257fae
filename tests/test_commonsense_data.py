"""The commonsense recipe: questions, prompts, labels and answers."""

from __future__ import annotations

import json
from pathlib import Path

import evaluate
import pytest

from commonsense_tiny import WORDS, build_tokenizer, question, write_data
from recipes.commonsense import data
from recipes.commonsense.settings import RecipeArguments
from recipes.commonsense.tasks import TASKS, allowed_words, build_prompt, extract_answer

RECIPE = Path(data.__file__).parent


@pytest.fixture
def write(tmp_path):
    """Writes one task's training file and returns its path."""

    def write(content, task="boolq"):
        path = tmp_path / task / "train.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
        return path

    return write


def changed(**fields) -> dict[str, str]:
    return question("boolq", 0) | fields


def without(name: str) -> dict[str, str]:
    return {key: value for key, value in question("boolq", 0).items() if key != name}


def test_prompt_is_the_published_one():
    assert build_prompt("Is ice cold?") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nIs ice cold?\n\n### Response:\n"
    )
    assert build_prompt("Is it cold?", "Ice") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nIs it cold?\n\n### Input:\nIce\n\n### Response:\n"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "train.json is empty"),
        ("[]", "train.json holds no records"),
        ('{"instruction": "a"}', "must hold a JSON list of records"),
        ('[\n {"instruction": "a",\n]', "train.json, line 3: not valid JSON"),
        ([changed(), without("answer")], r"record 2 \(line 8\): the field 'answer' is missing"),
        ([changed(), without("input")], r"record 2 \(line 8\): the field 'input' is missing"),
        ([changed(answer="maybe")], r"record 1 \(line 2\): the answer is 'maybe', but its format allows true/false"),
        ([changed(answer=True)], r"the field 'answer' is True, not a text"),
        ([changed(instruction=" ")], r"the field 'instruction' is empty"),
        ([changed(instruction="Answer format: yes/no")], r"'Answer format: yes/no' is not a format of boolq"),
        (["true"], r"'true' is not a record with the fields instruction, input, output, answer"),
    ],
)
def test_bad_records_are_named_by_file_record_line_and_value(write, content, message):
    with pytest.raises(ValueError, match=message) as error:
        data.load_records(write(content), "boolq")
    assert "boolq/train.json" in str(error.value)


def test_line_is_that_of_the_record_in_any_layout(write):
    good, bad = json.dumps(question("boolq", 0)), json.dumps(changed(answer="maybe"))
    with pytest.raises(ValueError, match=r"record 3 \(line 3\)"):
        data.load_records(write(f"[{good}, {good},\n\n{bad}]"), "boolq")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no data file .*boolq/train.json; data_dir"):
        data.load_training(RecipeArguments(method="lora", data_dir=str(tmp_path), tasks=["boolq"]))


def test_allowed_answers_are_those_of_the_question_then_of_the_task():
    assert allowed_words("Which?\n\nAnswer format: answer1/answer2/answer3", "ARC-Easy") == (
        "answer1",
        "answer2",
        "answer3",
    )
    assert allowed_words("Which?", "ARC-Easy") == TASKS["ARC-Easy"]
    assert allowed_words("Which?\n\nAnswer format: option1/option2", None) == ("option1", "option2")
    assert "ending4" in allowed_words("Which?", None)
    with pytest.raises(ValueError, match="is not a format of ARC-Easy"):
        allowed_words("Which?\n\nAnswer format: answer1/answer9", "ARC-Easy")


def test_a_file_of_mixed_tasks_is_checked_by_each_question_s_own_format(write):
    mixed = [question(task, 1) for task in WORDS]
    records = data.load_records(write(mixed, "mixed"), None)
    assert [record["words"] for record in records] == list(WORDS.values())
    mixed[3]["answer"] = "option1"
    with pytest.raises(
        ValueError, match="the answer is 'option1', but its format allows ending1/ending2/ending3/ending4"
    ):
        data.load_records(write(mixed, "mixed"), None)


def test_the_recipe_s_own_questions_are_valid():
    arguments = RecipeArguments(method="lora", data_dir=str(RECIPE / "data"), val_set_size=0)
    assert all(len(questions) >= 12 for questions in data.load_questions(arguments).values())
    assert len(data.load_questions(arguments)) == 8
    assert len(data.load_training(arguments)[0]) >= 8 * 24


def test_subsets_and_validation_split_are_the_same_every_time(tmp_path):
    write_data(tmp_path, train=8, test=6)
    arguments = RecipeArguments(
        method="lora", data_dir=str(tmp_path), max_train_per_task=5, max_test_per_task=3, val_set_size=10
    )
    train, validation = data.load_training(arguments)
    assert (len(train), len(validation)) == (8 * 5 - 10, 10)
    instructions = [record["instruction"] for record in train + validation]
    assert len(set(instructions)) == 40
    assert data.load_training(arguments) == (train, validation)
    questions = data.load_questions(arguments)
    assert {len(of_task) for of_task in questions.values()} == {3}
    assert data.load_questions(arguments) == questions
    with pytest.raises(ValueError, match="val_set_size is 40, but there are only 40 training examples"):
        data.load_training(RecipeArguments(**(vars(arguments) | {"val_set_size": 40})))


def test_labels_cover_the_whole_text_or_the_response_and_its_end():
    tokenizer = build_tokenizer()
    record = question("piqa", 0)
    whole = data.encode(record, tokenizer, 256, train_on_inputs=True)
    assert whole["labels"] == whole["input_ids"]
    text = build_prompt(record["instruction"]) + record["output"] + tokenizer.eos_token
    assert tokenizer.decode(whole["input_ids"]) == text

    answer = data.encode(record, tokenizer, 256, train_on_inputs=False)
    assert answer["input_ids"] == whole["input_ids"]
    learned = [label for label in answer["labels"] if label != data.IGNORED]
    assert tokenizer.decode(learned) == record["output"] + tokenizer.eos_token
    assert answer["labels"][-len(learned) :] == learned


def test_cutoff_leaves_no_end_of_text_and_drops_what_teaches_nothing(capsys):
    tokenizer = build_tokenizer()
    record = question("piqa", 0)
    length = len(tokenizer(build_prompt(record["instruction"]))["input_ids"])
    cut = data.encode(record, tokenizer, length + 2, train_on_inputs=False)
    assert len(cut["input_ids"]) == length + 2
    assert cut["input_ids"][-1] != tokenizer.eos_token_id
    longer = record | {"instruction": "Please look. " + record["instruction"]}
    assert len(data.encode_all([record, longer], tokenizer, length + 2, train_on_inputs=False)) == 1
    assert "1 examples left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"cutoff_len is {length}, which leaves no example"):
        data.encode_all([record, longer], tokenizer, length, train_on_inputs=False)


@pytest.mark.parametrize(
    ("response", "task", "answer"),
    [
        ("the correct answer is true", "boolq", "true"),
        ("false. It is not true", "boolq", "false"),
        ("that is untrue", "boolq", "true"),  # wherever it stands, as published
        ("True", "boolq", ""),
        ("", "boolq", ""),
        ("the correct answer is solution2", "piqa", "solution2"),
        ("solution 2", "piqa", ""),
        ("answer5 or answer1", "ARC-Challenge", "answer5"),
        ("answer6", "openbookqa", ""),
        ("the correct answer is ending4", "hellaswag", "ending4"),
        ("option2, not option1", "winogrande", "option2"),
        ("solution1", "winogrande", ""),
    ],
)
def test_first_answer_word_is_extracted(response, task, answer):
    assert extract_answer(response, task) == answer


def test_accuracy_metric_loads_offline_and_counts():
    metric = evaluate.load(str(RECIPE / "accuracy"))
    figures = metric.compute(predictions=["a", "b", "", "c"], references=["a", "a", "a", "c"])
    assert figures == {"accuracy": 0.5, "majority": 0.75, "unanswered": 0.25}
