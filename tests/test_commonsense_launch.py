"""The commonsense recipe in two processes (gloo), as accelerate launch and torchrun start them."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands import launch as accelerate_launch
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from commonsense_tiny import write_data, write_model, write_preset
from conftest import RECIPE_ENVIRONMENT, ROOT, launch, run_recipe, wait_for_checkpoint
from recipes import checkpoints, files, processes, rundir
from recipes.commonsense import compare, report, search, train
from recipes.commonsense.train import RECIPE, parse
from recipes.launch import share_batch
from recipes.settings import load_settings
from test_docs import check_command

run = functools.partial(run_recipe, train)
CONFIGS = {path.stem: path for path in (ROOT / "recipes" / "commonsense" / "accelerate").glob("*.yaml")}
# Long enough to be killed in time; two micro-batches a step, which two processes share.
WORDS = ["--num_train_epochs", "5", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> Path:
    """Without use_cpu: several processes have to know by themselves that there is no GPU, which the tests see to."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny = write_preset(folder / "tiny", write_model(folder / "model"), write_data(folder / "data", test=5))
    base = tiny / "base.yaml"
    base.write_text(base.read_text().replace("use_cpu: true\n", ""))
    return tiny


def find_process(rank: int, word: str) -> int | None:
    """The id of the training process of this rank that has this word on its command line."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
            environment = (process / "environ").read_bytes().decode().split("\0")
        except OSError:  # it has ended, or is another user's
            continue
        if word in words and f"RANK={rank}" in environment and "torch.distributed.run" not in words:
            return int(process.name)
    return None


@pytest.fixture(scope="module")
def killed(preset, tmp_path_factory) -> SimpleNamespace:
    """A comparison by accelerate launch; the second of its run's two processes was killed after a checkpoint."""
    folder = tmp_path_factory.mktemp("launched")
    run_folder = folder / "fira-full-seed42"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS["ddp-2cpu"])]
    command += ["-m", "recipes.commonsense.compare", str(preset), "--output_dir", str(folder)]
    command += ["--methods", "fira-full", *WORDS]
    environment = os.environ | RECIPE_ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}
    with (folder / "out.txt").open("w") as out, (folder / "err.txt").open("w") as err:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err)
    wait_for_checkpoint(lambda: process.poll() is None, run_folder, folder)
    victim = find_process(1, str(run_folder))
    assert victim is not None, "it ended before it could be killed"
    os.kill(victim, signal.SIGKILL)
    code = process.wait(timeout=60)
    checkpoint = checkpoints.newest(run_folder)[0]
    for name, damaged in (("optimizer.pt", "checkpoint-9998"), ("rng_state_1.pth", "checkpoint-9999")):
        (shutil.copytree(checkpoint, run_folder / damaged) / name).unlink()
    out, err = ((folder / name).read_text(encoding="utf-8") for name in ("out.txt", "err.txt"))
    return SimpleNamespace(folder=folder, run=run_folder, checkpoint=checkpoint, code=code, out=out, err=err)


def test_a_comparison_outlives_a_process_of_one_of_its_runs(killed):
    assert killed.code == 1  # there was no other method that could succeed
    assert "Failed: fira-full-seed42. The same command tries them again." in killed.out
    assert "**fira-full (seed 42) failed**: " in (killed.folder / "report.md").read_text(encoding="utf-8")
    for said in ("1 of 2: before training", "2 of 2: fira-full-seed42", "Fira projects 10 matrices", "Report: "):
        assert killed.out.count(said) == 1  # one process speaks
    assert (
        killed.err.count("tokenising: 100%") == 3
    )  # training and validation examples, and the latter before training


SCRIPT = """
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from recipes import files, models
from recipes.commonsense import data, model, scoring, train
from recipes.settings import load_settings

torch.set_num_threads(1)
experiment, resumed, folder, *words = sys.argv[1:]
rank = int(os.environ["RANK"])

# The main process prepares the model, the other one waits for it.
load_tokenizer, prepared = train.load_tokenizer, Path(folder, "prepared")
def load_tokenizer_slowly(name):
    if rank == 0:
        time.sleep(1)
        prepared.touch()
    assert prepared.exists()
    return load_tokenizer(name)
train.load_tokenizer = load_tokenizer_slowly
status = train.main([experiment, *words, "--output_dir", resumed])
assert status == 0, Path(resumed, "error.txt").read_text(encoding="utf-8")

# Sharded weights: every forward pass needs both processes. Of five questions, two at once, the second process has none
# of the last ones; and when it generates, it ends later than the first.
settings = {"tasks": ["boolq", "social_i_qa"], "scoring_batch_size": 2}
arguments, _ = train.parse(load_settings(train.RECIPE, experiment, settings | {"output_dir": folder}))
network, tokenizer = models.load_model(arguments.model, "float32"), model.load_tokenizer(arguments.model)
scored, pad = [0, 0], scoring._pad_left
def counting(rows, *others):
    scored[1] += len(rows)
    return pad(rows, *others)
scoring._pad_left = counting
for layer in network.model.layers:
    fully_shard(layer)
fully_shard(network)
accuracy = scoring.score(network, tokenizer, data.load_questions(arguments), arguments)
scored[0] = scored[1]
if rank == 1:
    scoring.extract_answer = lambda text, task: "true"
scoring.GENERATION["max_new_tokens"] = 2 + 2 * rank
arguments.tasks, arguments.scoring = ["boolq"], "generate"
generated = scoring.score(network, tokenizer, data.load_questions(arguments), arguments)
found = {"accuracy": accuracy, "scored": scored[0], "generated": generated}
files.write_json(Path(folder, f"found{rank}.json"), found)

# An error of the second process while the first waits for it.
def fail(*_):
    raise ValueError("only here")
if rank == 1:
    train.score = fail
assert train.main([experiment, "--max_steps", "1", "--output_dir", folder + "/failing"]) == 1
os._exit(0)  # the other one has gone: no farewell
"""


@pytest.fixture(scope="module")
def found(killed, preset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("found")
    experiment = os.path.relpath(preset / "fira-full.yaml")
    launch(SCRIPT, folder, 2, experiment, str(killed.run), str(folder), *WORDS, "--seed", "42")
    return folder


@pytest.fixture(scope="module")
def single(preset, tmp_path_factory) -> dict:
    """What one process makes of the same experiment."""
    return run(preset, "fira-full", tmp_path_factory.mktemp("single"), *WORDS, "--seed", "42", "--use_cpu", "true")


def test_a_run_killed_in_two_processes_ends_as_if_one_had_run_through(killed, found, single):
    result = files.read_json(killed.run / "result.json")
    assert result["status"] == "ok"
    assert int(killed.checkpoint.name.rpartition("-")[2]) < result["steps"]
    passed_over = result["passed_over_checkpoints"]
    assert passed_over["checkpoint-9998"] == "optimizer.pt is missing"
    assert passed_over["checkpoint-9999"] == "rng_state_1.pth is missing"
    assert not list(killed.run.glob("checkpoint-*"))
    assert (killed.run / "model" / "model.safetensors").is_file()
    # The same batches: a step takes one micro-batch of each process.
    assert result["settings"] | {"use_cpu": True} == single["settings"]
    assert [of_one["all_settings"]["gradient_accumulation_steps"] for of_one in (result, single)] == [1, 2]
    histories = (of_one["history"] for of_one in (result, single))
    first, second = ({entry["step"]: entry["loss"] for entry in h if "loss" in entry} for h in histories)
    assert len(first) == 35  # every second step
    assert first == pytest.approx(second, rel=1e-5)
    assert result["eval_loss"] == pytest.approx(single["eval_loss"], rel=1e-5)
    assert result["accuracy"] == single["accuracy"]
    # Both processes' tokens count.
    assert result["training_tokens"] == single["training_tokens"]
    assert result["tokens_per_second"] == pytest.approx(result["training_tokens"] / result["train_seconds"], rel=1e-3)
    assert (result["provenance"]["processes"], single["provenance"]["processes"]) == (2, 1)


def test_the_report_says_how_many_processes_there_were(killed, found, tmp_path):
    report.write_report(killed.folder)
    assert "(2 processes of 1 CPU threads, " in (killed.folder / "report.md").read_text(encoding="utf-8")


def test_an_error_may_hold_brackets(monkeypatch, tmp_path, capfd):
    """As those of gloo do, which rich would take for its own markup."""

    def fail(*_, **__):
        rundir.write_failure(tmp_path / "lora-seed42", {"method": "lora"}, "[/x/pair.cc:1] Read error")
        return subprocess.CompletedProcess([], 1)

    monkeypatch.setattr(subprocess, "run", fail)
    assert compare.main(["smoke", "--output_dir", str(tmp_path), "--methods", "lora"]) == 1
    assert capfd.readouterr().out.count("failed: [/x/pair.cc:1] Read error") == 2  # after the run and in the report


def test_two_processes_share_the_questions_of_a_sharded_model(found, preset):
    each = [files.read_json(found / f"found{rank}.json") for rank in range(2)]
    assert each[0]["accuracy"] == each[1]["accuracy"]
    assert list(each[0]["accuracy"]) == ["boolq", "social_i_qa"]
    # Ten questions, five a process; and two batches of one question that the second process repeats.
    assert [of_one["scored"] for of_one in each] == [6, 6]
    # Only the second process found answers: those of its share, and the last question, which both have.
    assert each[0]["generated"] == each[1]["generated"]
    assert each[0]["generated"]["boolq"]["unanswered"] == 2 / 5


def test_the_process_that_failed_first_says_why(found):
    result = files.read_json(found / "failing" / "result.json")
    assert (result["status"], result["error"]) == ("failed", "ValueError: only here")
    assert 'raise ValueError("only here")' in (found / "failing" / "error.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("size", "accumulation", "world", "expected"),
    [
        (4, 4, 1, (4, 4)),
        (4, 4, 2, (4, 2)),
        (4, 4, 8, (2, 1)),
        (4, 6, 4, (2, 3)),
        (1, 16, 8, (1, 2)),
        (4, 1, 2, (2, 1)),
    ],
)
def test_the_batch_is_that_of_all_processes_together(size, accumulation, world, expected):
    training = SimpleNamespace(
        per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, world_size=world
    )
    share_batch(training)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == expected


def test_a_batch_that_cannot_be_divided_is_refused():
    training = SimpleNamespace(per_device_train_batch_size=4, gradient_accumulation_steps=4, world_size=3)
    with pytest.raises(ValueError, match="per_device_train_batch_size 4 x gradient_accumulation_steps 4 .* among 3"):
        share_batch(training)


def test_accelerate_cannot_change_the_number_format_of_an_experiment(preset, monkeypatch, tmp_path):
    settings = load_settings(RECIPE, preset / "lora.yaml", {"output_dir": str(tmp_path)})
    settings["use_cpu"] = True
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="mixed_precision is 'bf16' in accelerate's configuration, but 'no' in the"):
        parse(settings)
    parse(settings | {"bf16": True})


def test_processes_that_would_train_by_themselves_are_refused(preset, monkeypatch, tmp_path):
    settings = load_settings(RECIPE, preset / "lora.yaml", {"output_dir": str(tmp_path)})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but each would train by itself on"):
        parse(settings | {"use_cpu": False})


@pytest.mark.parametrize("module", [compare, search])
def test_only_the_main_process_starts_runs_and_only_on_one_node(module, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("nothing may run"))
    words = ["smoke", "--output_dir", str(tmp_path)] + (["--values", "rank=1"] if module is search else [])
    launched = {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert module.main(words) == 2
    assert "run on one node, but were launched on 2: launch recipes.commonsense.train" in capsys.readouterr().err
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    assert processes.python("recipes.commonsense")[-1] == "--nproc_per_node=8"
    monkeypatch.setenv("RANK", "1")
    assert module.main(words) == 0
    assert not list(tmp_path.iterdir())


@pytest.fixture(params=sorted(CONFIGS))
def config(request) -> Path:
    return CONFIGS[request.param]


def launch_line(config: Path) -> list[str]:
    return shlex.split(config.read_text().splitlines()[0].removeprefix("# "))


def test_every_accelerate_configuration_says_how_to_launch_it(config):
    words = launch_line(config)
    assert words[:4] == ["accelerate", "launch", "--config_file", str(config.relative_to(ROOT))]
    check_command(words)


def test_accelerate_starts_what_the_configurations_say(config, monkeypatch):
    """By accelerate's own reading of the launch line, up to the environment that it gives to the processes."""
    words = [word.replace("ADDRESS", "127.0.0.1").replace("RANK", "1") for word in launch_line(config)[2:]]
    parsed = accelerate_launch.launch_command_parser().parse_args(words)
    arguments, *_ = accelerate_launch._validate_launch_command(parsed)
    assert (arguments.use_fsdp or arguments.multi_gpu) and not arguments.cpu  # what makes it start several processes
    environment = prepare_multi_gpu_env(arguments)
    nodes = 2 if config.stem == "fsdp2-nodes" else 1
    assert int(arguments.nproc_per_node) == (2 if config.stem == "ddp-2cpu" else 8)
    assert (arguments.num_machines, arguments.machine_rank) == (nodes, nodes - 1)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert ("ACCELERATE_USE_FSDP" in environment) == config.stem.startswith("fsdp2")
    if config.stem.startswith("fsdp2"):
        for name, value in environment.items():
            if name.startswith("FSDP_"):
                monkeypatch.setenv(name, value)
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2
        assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
        assert plugin.reshard_after_forward is True
        assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
        assert plugin.cpu_ram_efficient_loading
