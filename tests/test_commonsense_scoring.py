"""The commonsense recipe: likelihoods against a slow, obvious computation, and generation."""

from __future__ import annotations

import pytest
import torch

from commonsense_tiny import WORDS, build_model, build_tokenizer, question
from recipes.commonsense import scoring
from recipes.commonsense.settings import RecipeArguments
from recipes.commonsense.tasks import ANSWER_PREFIX, build_prompt


@pytest.fixture(params=[400, 260], ids=["words", "letters"])
def tokenizer(request):
    """Answers that differ in one last token, and answers of many tokens and unequal lengths."""
    tokenizer = build_tokenizer(request.param)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.unk_token, "left"
    return tokenizer


@pytest.fixture
def model(tokenizer):
    return build_model(len(tokenizer)).eval()


def records() -> list[dict]:
    """Questions of all formats and quite different lengths."""
    asked = []
    for number, task in enumerate(WORDS):
        record = question(task, number) | {"words": WORDS[task]}
        record["instruction"] = "Well. " * (3 * number) + record["instruction"]
        asked.append(record)
    return asked


@torch.no_grad()
def slow(model, tokenizer, record: dict) -> list[float]:
    """log p of each whole text, one at a time without padding, every token counted."""
    values = []
    for word in record["words"]:
        tokens = tokenizer(build_prompt(record["instruction"]) + ANSWER_PREFIX + word, return_tensors="pt")[
            "input_ids"
        ]
        log_probabilities = model(input_ids=tokens).logits[0, :-1].double().log_softmax(-1)
        values.append(log_probabilities.gather(1, tokens[0, 1:, None]).sum().item())
    return values


def test_likelihoods_equal_the_slow_computation(model, tokenizer):
    asked = records()
    prompts = [build_prompt(record["instruction"]) for record in asked]
    words = [record["words"] for record in asked]
    fast = scoring.log_likelihoods(model, tokenizer, prompts, words, batch_size=3)
    for record, of_one in zip(asked, fast, strict=True):
        expected = torch.tensor(slow(model, tokenizer, record), dtype=torch.float64)
        # What all candidates share is left out: the differences are what counts.
        found = torch.tensor(of_one, dtype=torch.float64)
        torch.testing.assert_close(found - found[0], expected - expected[0], atol=1e-4, rtol=0)
        assert expected.std() > 1e-3  # the model does prefer some


def test_predictions_are_the_likeliest_words(model, tokenizer):
    for record in records():
        values = slow(model, tokenizer, record)
        best = record["words"][values.index(max(values))]
        assert scoring.predict_by_likelihood(model, tokenizer, [record], "ARC-Easy", 4) == [best]


def test_one_pass_decides_where_answers_differ_in_one_token(monkeypatch):
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.unk_token
    model = build_model(len(tokenizer)).eval()
    seen = []
    forward = model.forward

    def watch(*args, **kwargs):
        output = forward(*args, **kwargs)
        seen.append(tuple(output.logits.shape))
        return output

    monkeypatch.setattr(model, "forward", watch)
    record = question("ARC-Easy", 0) | {"words": WORDS["ARC-Easy"]}
    scoring.predict_by_likelihood(model, tokenizer, [record], "ARC-Easy", 4)
    assert seen == [(1, 1, len(tokenizer))]


def test_an_answer_that_begins_like_another_is_scored(model, tokenizer):
    words = ("answer1", "answer12")
    fast = scoring.log_likelihoods(model, tokenizer, ["Which?"], [words], batch_size=2)[0]
    texts = [tokenizer(f"Which?{ANSWER_PREFIX}{word}")["input_ids"] for word in words]
    assert texts[1][: len(texts[0])] == texts[0]
    assert len(fast) == 2
    assert fast[0] > fast[1]  # the longer one holds the shorter one


def test_generation_takes_the_first_answer_word_and_ignores_padding(model, tokenizer, monkeypatch):
    asked = records()[:4]
    alone = [scoring.predict_by_generation(model, tokenizer, [record], "boolq", 1)[0] for record in asked]
    settings = {}
    generate = model.generate

    def answer(**kwargs):
        settings.update(kwargs)
        output = generate(**kwargs)
        reply = tokenizer("so false, not true")["input_ids"]
        return torch.cat([output[:, : kwargs["input_ids"].shape[1]], torch.tensor([reply] * len(output))], 1)

    assert scoring.predict_by_generation(model, tokenizer, asked, "boolq", 4) == alone
    monkeypatch.setattr(model, "generate", answer)
    assert scoring.predict_by_generation(model, tokenizer, asked, "boolq", 4) == ["false"] * 4
    assert (settings["num_beams"], settings["max_new_tokens"], settings["do_sample"]) == (4, 32, False)


def test_score_counts_by_task_and_leaves_the_model_as_it_was(model, tokenizer):
    asked = {task: [question(task, i) | {"words": words} for i in range(6)] for task, words in WORDS.items()}
    model.train()
    results = scoring.score(model, tokenizer, asked, RecipeArguments(method="lora"))
    assert model.training
    assert list(results) == list(WORDS)
    letters = {"fingerprint", "chosen", "right"}
    assert results["boolq"].keys() == {"accuracy", "majority", "unanswered", "questions"} | letters
    predictions = scoring.predict_by_likelihood(model.eval(), tokenizer, asked["hellaswag"], "hellaswag", 16)
    assert results["hellaswag"]["chosen"] == "".join(word.removeprefix("ending") for word in predictions)
    right = [word == one["answer"] for word, one in zip(predictions, asked["hellaswag"], strict=True)]
    assert results["hellaswag"]["right"] == "".join(str(int(one)) for one in right)
    assert results["hellaswag"]["accuracy"] == pytest.approx(sum(right) / 6)
    assert results["boolq"]["majority"] == 0.5
    assert results["hellaswag"]["questions"] == 6
