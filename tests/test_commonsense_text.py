"""The commonsense recipe in text form: options read from instructions, what is learned, and how it is scored."""

from __future__ import annotations

import json

import pytest
import torch

from commonsense_tiny import WORDS, build_model, build_tokenizer
from recipes.commonsense import data, scoring
from recipes.commonsense.options import text_form
from recipes.commonsense.settings import RecipeArguments

TEXT = {"answer_format": "text", "method": "lora", "val_set_size": 0}


def record(task: str, body: str, answer: str, words: str | None = None, **fields: str) -> dict[str, str]:
    """As LLM-Adapters writes it; body: the question with its options."""
    opening = {
        "boolq": "Please answer the following question with true or false, question: ",
        "piqa": "Please choose the correct solution to the question: ",
        "hellaswag": "Please choose the correct ending to complete the given sentence: ",
        "winogrande": "Please choose the correct answer to fill in the blank to complete the given sentence: ",
    }.get(task, "Please choose the correct answer to the question: ")
    between = " " if task == "winogrande" else "\n\n"
    words = words or "/".join(WORDS[task])
    instruction = f"{opening}{body}{between}Answer format: {words}"
    return {"instruction": instruction, "input": "", "output": f"the correct answer is {answer}"} | {
        "answer": answer,
        **fields,
    }


def form(task: str, body: str, answer: str, words: str | None = None) -> tuple[list[str], list[str]]:
    found = text_form(record(task, body, answer, words), task)
    assert found["words"] == (words.split("/") if words else list(WORDS[task]))
    return found["contexts"], found["continuations"]


def test_every_task_has_the_prompt_of_the_harness():
    assert form("boolq", "is ice cold?", "true") == (["Question: is ice cold?\nAnswer:"] * 2, [" yes", " no"])
    assert form("boolq", "is ice cold", "true")[0][0] == "Question: is ice cold?\nAnswer:"
    assert form("piqa", "Dry a cup.\n\nSolution1: Use a towel.\n\nSolution2: Use a lamp.", "solution1") == (
        ["Question: Dry a cup.\nAnswer:"] * 2,
        [" Use a towel.", " Use a lamp."],
    )
    assert form("social_i_qa", "Al fell. How is he?\n\nAnswer1: sad Answer2: glad Answer3: tall", "answer1") == (
        ["Q: Al fell. How is he?\nA:"] * 3,
        [" sad", " glad", " tall"],
    )
    endings = "Ending1: runs. Ending2: flies. Ending3: sinks. Ending4: melts."
    assert form("hellaswag", f"Jogging: A man ties his shoes. He\n\n{endings}", "ending1") == (
        ["Jogging: A man ties his shoes. He"] * 4,
        [" runs.", " flies.", " sinks.", " melts."],
    )
    for task, prompt in (("ARC-Easy", "Question: What is hot?\nAnswer:"), ("openbookqa", "What is hot?")):
        four = "Answer1: fire Answer2: ice Answer3: snow Answer4: hail"
        assert form(task, f"What is hot?\n\n{four}", "answer1") == ([prompt] * 4, [" fire", " ice", " snow", " hail"])
    # Here the options are in the contexts, and the rest of the sentence follows both.
    assert form("winogrande", "Bo beat Al because _ ran fast.\n\nOption1: Bo Option2: Al", "option1") == (
        ["Bo beat Al because Bo", "Bo beat Al because Al"],
        [" ran fast.", " ran fast."],
    )


def test_marks_of_wikihow_are_taken_out_as_in_the_harness():
    body = "Rest: [header] How to rest [title] Sit down. [step] You\n\nEnding1: nap. [title] Wake. "
    body += "Ending2: [step] x Ending3: y Ending4: z"
    contexts, continuations = form("hellaswag", body, "ending1")
    assert contexts[0] == "Rest: How to rest. Sit down. You"
    assert continuations[0] == " nap.. Wake."


@pytest.mark.parametrize(
    ("body", "words", "options"),
    [
        ("Q?\n\nAnswer1: a Answer2: b Answer3: c", "answer1/answer2/answer3", ["a", "b", "c"]),
        (
            "Q?\n\nAnswer1: a Answer2: b Answer3: c Answer4: d Answer5: e",
            "answer1/answer2/answer3/answer4/answer5",
            ["a", "b", "c", "d", "e"],
        ),
        ("Q?\n\nAnswer1: sky Answer2: sea Answer3: sky Answer4: land", None, ["sky", "sea", "sky", "land"]),
        ("Q?\n\nAnswer1: a  Answer2: b  c Answer3: {} Answer4: 3", None, ["a", "b  c", "{}", "3"]),
        ("Q? _\nof two lines\n\nAnswer1: a\nAnswer2: b\n\nAnswer3: c Answer4: d", None, ["a", "b", "c", "d"]),
        # Texts like a label, which can stand at one place only.
        ("Q?\n\nAnswer1: a Answer3: x Answer2: b Answer3: c Answer4: d", None, ["a Answer3: x", "b", "c", "d"]),
        ("Is Answer1: right?\n\nAnswer1: a Answer2: b Answer3: c Answer4: d", None, ["a", "b", "c", "d"]),
        ("Q?\n\nAnswer1: a Answer2: b NoAnswer2: Answer3: c Answer4: d", None, ["a", "b NoAnswer2:", "c", "d"]),
    ],
)
def test_odd_options_are_read(body, words, options):
    assert form("ARC-Easy", body, "answer1", words)[1] == [f" {option}" for option in options]


FOUR = "Answer1: a Answer2: b Answer3: c Answer4: d"
GOOD = {
    "ARC-Easy": record("ARC-Easy", f"Q?\n\n{FOUR}", "answer1"),
    "winogrande": record("winogrande", "_ ran.\n\nOption1: Bo Option2: Al", "option1"),
    "hellaswag": record("hellaswag", "A man\n\nEnding1: a Ending2: b Ending3: c Ending4: d", "ending1"),
    "boolq": record("boolq", "is it?", "true"),
}


def refused(tmp_path, task: str, bad: dict[str, str]) -> str:
    """What is said of a file whose second record is bad, behind its place."""
    path = tmp_path / "train.json"
    path.write_text(json.dumps([GOOD[task], bad], indent=1))
    with pytest.raises(ValueError) as error:
        data.load_records(path, task, "text")
    place, message = str(error.value).split(": ", 1)
    assert place == f"{path}, record 2 (line 8)"
    return message


@pytest.mark.parametrize(
    ("task", "body", "message"),
    [
        ("ARC-Easy", "Q?\n\nAnswer1: a Answer2: b Answer4: d", "there is no 'Answer3:'"),
        ("ARC-Easy", f"Q? {FOUR}", "there is no 'Answer1:'"),
        ("ARC-Easy", FOUR.replace(" b", ""), "there is no 'Answer1:'"),
        ("ARC-Easy", "Q?\n\n" + FOUR.replace(" b", ""), "the text of answer2 is empty"),
        ("ARC-Easy", f"Q?\n\n{FOUR[:-2]}", "the text of answer4 is empty"),
        ("ARC-Easy", f"\n\n{FOUR}", "the text of question is empty"),
        ("ARC-Easy", f"Q?\n\n{FOUR} Answer5: e", "there is a 'Answer5:', but the format is answer1/answer2/"),
        ("ARC-Easy", "Q?\n\n" + FOUR.replace("a ", "x Answer2: a "), "Answer4: stand in 2 orders"),
        ("ARC-Easy", "Q?\n\nAnswer1: a Answer3: c Answer2: b Answer4: d", "Answer4: stand not in their order"),
        ("winogrande", "Bo ran.\n\nOption1: Bo Option2: Al", "there is no blank '_'"),
        ("winogrande", "I saw _\n\nOption1: Bo Option2: Al", "nothing follows the blank"),
        ("winogrande", "_ ran.\n\nOption1: Bo", "there is no 'Option2:'"),
        ("hellaswag", "A man\n\nEnding1: a Ending2: [step] Ending3: c Ending4: d", "the text of ending2 is empty"),
        ("boolq", "", "the text of question is empty"),
    ],
)
def test_a_record_without_its_options_is_named_by_file_record_line_and_text(tmp_path, task, body, message):
    bad = record(task, body, GOOD[task]["answer"])
    said = refused(tmp_path, task, bad)
    assert message in said
    assert said.endswith(f", in {bad['instruction']!r}.")


def test_a_record_of_another_form_is_named(tmp_path):
    good = GOOD["ARC-Easy"]
    assert "the answer is 'answer5', but its format allows answer1/" in refused(
        tmp_path, "ARC-Easy", good | {"answer": "answer5"}
    )
    assert "the field 'input' is 'Look.'" in refused(tmp_path, "ARC-Easy", good | {"input": "Look."})
    cut = good["instruction"].partition("\n\nAnswer format")[0]
    assert "there is no 'Answer format: ...' at the end" in refused(tmp_path, "ARC-Easy", good | {"instruction": cut})
    other = good["instruction"].replace("answer to", "solution to")
    assert "begins with 'Please choose the correct answer to the question: '" in refused(
        tmp_path, "ARC-Easy", good | {"instruction": other}
    )
    one = GOOD["winogrande"]
    wrong = one["instruction"].replace("option1/option2", "option1/option3")
    assert "is not a format of winogrande" in refused(tmp_path, "winogrande", one | {"instruction": wrong})
    # The format that stands on the line of the options, too.
    alone = one["instruction"].replace("option1/option2", "option1")
    assert "there is a 'Option2:', but the format is option1" in refused(
        tmp_path, "winogrande", one | {"instruction": alone}
    )


def test_the_recipe_s_own_questions_have_a_text_form():
    arguments = RecipeArguments(**TEXT)
    questions = data.load_questions(arguments)
    assert list(questions) == list(WORDS)
    for task, records in [*questions.items(), ("all", data.load_training(arguments)[0])]:
        for one in records:
            assert len(one["words"]) == len(one["contexts"]) == len(one["continuations"]) > 1
            assert all(text[0] == " " and text[1:].strip() == text[1:] for text in one["continuations"])
            # An option is a part of the instruction, and in WinoGrande fills the blank.
            said = one["instruction"].split("\n\n", 1)[1]
            if task not in ("boolq", "winogrande", "all"):
                assert all(text[1:] in said for text in one["continuations"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_on_inputs": True}, "train_on_inputs is true, but answer_format text"),
        ({"scoring": "generate"}, "scoring is 'generate', but answer_format text"),
        ({"train_file": "all.json"}, "answer_format text needs <task>/train.json"),
        ({"answer_format": "letter"}, "answer_format is 'letter'; it must be one of label, text"),
    ],
)
def test_settings_that_contradict_the_text_form_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RecipeArguments(**(TEXT | changes))


def test_the_format_decides_what_is_learned_unless_it_is_said():
    assert RecipeArguments(method="lora").answer_format == "label"
    assert RecipeArguments(method="lora").train_on_inputs is True
    assert RecipeArguments(method="lora", train_on_inputs=False).train_on_inputs is False
    assert RecipeArguments(**TEXT).train_on_inputs is False


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.unk_token, "left"
    return tokenizer


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_model(len(tokenizer)).eval()


@pytest.fixture(scope="module")
def questions() -> dict[str, list[dict]]:
    return data.load_questions(RecipeArguments(**TEXT, max_test_per_task=3))


def test_only_the_right_option_is_learned(tokenizer):
    jumped = record("winogrande", "Al saw Bo, so _ jumped.\n\nOption1: Al Option2: Bo", "option2")
    jumped |= text_form(jumped, "winogrande")
    found = data.encode(jumped, tokenizer, 256, train_on_inputs=False)
    assert tokenizer.decode(found["input_ids"]) == "Al saw Bo, so Bo jumped."
    learned = [label for label in found["labels"] if label != data.IGNORED]
    assert tokenizer.decode(learned) == " jumped."
    assert found["labels"][-len(learned) :] == found["input_ids"][-len(learned) :] == learned
    cut = data.encode(jumped, tokenizer, len(found["input_ids"]) - 1, train_on_inputs=False)
    assert cut["labels"] == found["labels"][:-1]
    assert len(cut["attention_mask"]) == len(cut["input_ids"]) == len(cut["labels"])


@torch.no_grad()
def slow(model, tokenizer, context: str, continuation: str) -> float:
    """log p(continuation | context), of one text without padding."""
    tokens = tokenizer(context + continuation, return_tensors="pt")["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    log_probabilities = model(input_ids=tokens).logits[0, :-1].double().log_softmax(-1)
    return log_probabilities.gather(1, tokens[0, 1:, None])[start - 1 :].sum().item()


def test_options_are_chosen_by_likelihood_and_by_likelihood_a_character(model, tokenizer, questions):
    differ = 0
    for task, records in questions.items():
        fast = scoring.text_likelihoods(model, tokenizer, records, batch_size=3)
        by_length, raw = scoring.predict_by_text(model, tokenizer, records, task, 3)
        for index, one in enumerate(records):
            pairs = list(zip(one["contexts"], one["continuations"], strict=True))
            expected = torch.tensor([slow(model, tokenizer, *pair) for pair in pairs])
            torch.testing.assert_close(torch.tensor(fast[index]), expected, atol=1e-3, rtol=1e-4)
            lengths = torch.tensor([len(text.strip()) for _, text in pairs])
            assert raw[index] == one["words"][expected.argmax()]
            assert by_length[index] == one["words"][(expected / lengths).argmax()]
            differ += raw[index] != by_length[index]
        assert task != "winogrande" or raw == by_length
    assert differ > 3


def test_the_score_keeps_what_was_chosen_for_each_question(model, tokenizer, questions):
    results = scoring.score(model, tokenizer, questions, RecipeArguments(**TEXT))
    for task, records in questions.items():
        found = results[task]
        for predicted, kept in zip(
            scoring.predict_by_text(model, tokenizer, records, task, 16), (found, found["acc"]), strict=True
        ):
            assert kept["chosen"] == "".join(str(WORDS[task].index(word) + 1) for word in predicted)
            right = [word == one["answer"] for word, one in zip(predicted, records, strict=True)]
            assert kept["right"] == "".join(str(int(one)) for one in right)
            assert kept["accuracy"] == sum(right) / 3
    changed = {"boolq": questions["boolq"][::-1]}
    other = scoring.score(model, tokenizer, changed, RecipeArguments(**TEXT))["boolq"]
    assert other["right"] == results["boolq"]["right"][::-1]
    assert other["fingerprint"] != results["boolq"]["fingerprint"]


def test_the_held_out_loss_is_that_of_the_right_answer_s_likelihood(model, tokenizer, questions):
    records = [one for of_task in questions.values() for one in of_task]
    examples = data.encode_all(records, tokenizer, 512, train_on_inputs=False)
    losses = scoring.answer_losses(model, tokenizer, examples, batch_size=4)
    likelihoods = scoring.text_likelihoods(model, tokenizer, records, batch_size=4)
    for one, of_one, loss, labels in zip(records, likelihoods, losses, examples["labels"], strict=True):
        count = sum(label != data.IGNORED for label in labels)
        assert loss == pytest.approx(-of_one[one["words"].index(one["answer"])] / count, rel=1e-4)
