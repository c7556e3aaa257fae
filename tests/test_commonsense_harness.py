"""lm-evaluation-harness reads the recipe's questions, and answers them as the recipe does."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from commonsense_tiny import WORDS, write_model, write_preset
from conftest import RECIPE_ENVIRONMENT, ROOT, run_recipe
from recipes import files
from recipes.commonsense import data, train
from recipes.commonsense.model import load_tokenizer
from recipes.commonsense.scoring import text_likelihoods
from recipes.commonsense.tasks import BY_ACC
from recipes.models import load_model
from test_docs import read_blocks, read_commands

RECIPE = Path(data.__file__).parent
TASK_FILES = RECIPE / "lm_eval"
needs_lm_eval = pytest.mark.skipif(
    not importlib.util.find_spec("lm_eval"), reason="lm_eval is not installed: pip install '.[lm_eval]'"
)


def name(task: str) -> str:
    return f"commonsense_{task.lower().replace('-', '_')}"


def test_every_task_has_a_file_and_is_in_the_group():
    class Loader(yaml.SafeLoader):
        """Reads `!function` as text."""

    Loader.add_constructor("!function", lambda loader, node: node.value)
    found = {path.stem: yaml.load(path.read_text(), Loader) for path in TASK_FILES.glob("*.yaml")}
    assert found.pop("_text")["custom_dataset"] == "utils.load"
    assert found.pop("commonsense")["task"] == [name(task) for task in WORDS]
    read = {one["task"]: one["dataset_kwargs"]["task"] for one in found.values()}
    assert read == {name(task): task for task in WORDS}


@needs_lm_eval
def test_a_task_counts_by_what_the_harness_has_for_its_own_task_of_that_name():
    tasks = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
    own = {"boolq": "super_glue/boolq/default", "piqa": "piqa/piqa", "social_i_qa": "siqa/siqa"}
    own |= {
        "hellaswag": "hellaswag/hellaswag",
        "winogrande": "winogrande/default",
        "openbookqa": "openbookqa/openbookqa",
    }
    own |= dict.fromkeys(("ARC-Easy", "ARC-Challenge"), "arc/arc_easy")  # which the latter includes
    assert own.keys() == WORDS.keys()
    texts = {task: (tasks / f"{name}.yaml").read_text(encoding="utf-8") for task, name in own.items()}
    assert {task for task, text in texts.items() if "metric: acc_norm" not in text} == BY_ACC


def test_without_a_folder_the_questions_are_the_recipe_s_own(monkeypatch):
    monkeypatch.delenv("COMMONSENSE_DATA", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("task_utils", TASK_FILES / "utils.py")
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    for task in WORDS:
        records = data.load_records(RECIPE / "data" / task / "test.json", task, "text")
        rows = utils.load(task=task, version=1.0)["test"]
        assert len(rows) == len(records)
        assert [row["gold"] for row in rows] == [one["words"].index(one["answer"]) for one in records]


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> Path:
    """The embedded questions for training, and a few of them for the test."""
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copytree(RECIPE / "data", folder / "data", ignore=shutil.ignore_patterns("*.md"))
    for path in folder.glob("data/*/test.json"):
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8"))[:5]))
    preset = write_preset(folder / "tiny", write_model(folder / "model"), folder / "data")
    settings = yaml.safe_load((preset / "base.yaml").read_text())
    settings |= {"answer_format": "text", "max_train_per_task": 4, "max_steps": 6, "learning_rate": 1e-2}
    (preset / "base.yaml").write_text(yaml.safe_dump(settings))
    return preset


def readme_command(kind: str) -> list[str]:
    """The words of the README's command for a full model ("pretrained") or an adapter ("peft")."""
    commands = [words for block in read_blocks(RECIPE / "README.md") for words in read_commands(block)]
    found = [words for words in commands if words[0] == "lm_eval" and ("peft=" in " ".join(words)) == (kind == "peft")]
    return found[0]


@needs_lm_eval
@pytest.mark.parametrize(("method", "kind"), [("fira-full", "pretrained"), ("lora", "peft")])
def test_the_harness_gives_the_same_answers_question_by_question(preset, method, kind, tmp_path):
    result = run_recipe(train, preset, method, tmp_path / "run")
    trained, base = tmp_path / "run" / "model", preset.parent / "model"
    words = readme_command(kind)
    start, end = words.index("--model_args") + 1, words.index("--include_path")
    words[start:end] = [f"pretrained={trained}" if kind == "pretrained" else f"pretrained={base},peft={trained}"]
    options = ["--device", "cpu", "--batch_size", "4", "--log_samples", "--output_path", str(tmp_path / "out")]
    environment = os.environ | RECIPE_ENVIRONMENT | {"COMMONSENSE_DATA": str(preset.parent / "data")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH")  # the task files find the recipe by themselves
    command = [str(Path(sys.executable).with_name("lm_eval")), *words[1:], *options]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]

    samples = {}
    for path in (tmp_path / "out").rglob("samples_*.jsonl"):
        task = re.fullmatch(r"samples_(.+)_\d{4}-.*", path.stem)[1]
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        samples[task] = sorted(lines, key=lambda sample: sample["doc_id"])
    assert sorted(samples) == sorted(map(name, WORDS))

    def right(task: str, metric: str) -> str:
        return "".join(str(int(sample[metric])) for sample in samples[name(task)])

    for task in WORDS:
        ours = result["accuracy"][task]
        assert ours["questions"] == len(samples[name(task)]) == 5
        assert ours["acc"]["right"] == right(task, "acc")
        # Where all continuations are the same, the harness is asked for acc alone.
        assert ours["right"] == right(task, "acc" if task == "winogrande" else "acc_norm")
    (summary,) = (tmp_path / "out").rglob("results_*.json")
    average = sum(ours["acc"]["accuracy"] for ours in result["accuracy"].values()) / 8
    assert files.read_json(summary)["results"]["commonsense"]["acc,none"] == pytest.approx(average)

    if kind == "pretrained":  # not only the same answers, but for the same reason
        model, tokenizer = load_model(str(trained), "float32").eval(), load_tokenizer(str(trained))
        for task in WORDS:
            records = data.load_records(preset.parent / "data" / task / "test.json", task, "text")
            for of_one, sample in zip(
                text_likelihoods(model, tokenizer, records, 4), samples[name(task)], strict=True
            ):
                theirs = [float(likelihood) for likelihood, _ in sample["filtered_resps"]]
                assert of_one == pytest.approx(theirs, abs=1e-3)
