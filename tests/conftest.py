"""Tiny models, tiny data and a Trainer on the CPU, shared by the tests."""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType, SimpleNamespace

import pytest
import torch

import forks
from recipes import checkpoints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest there

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    # Before Triton is imported by anything: kernels run on CPU tensors, for weights that say they are elsewhere.
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)  # these matrices are so small that a second thread only costs

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RECIPE_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # for processes that run a recipe


def pytest_configure(config: pytest.Config) -> None:
    """No test may depend on what is in the user's caches, nor on whether there is a home that can be written."""
    folder = tempfile.TemporaryDirectory(prefix="fira-hf-tests-")
    config.add_cleanup(folder.cleanup)
    os.environ["HF_HOME"] = folder.name


def build_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **config):
    """A LLaMA of two layers whose matrices are square (q, o), wide (k, v, down) and tall (gate, up)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | config))).to(dtype)


def needs_stacked_experts() -> None:
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("the experts are linear layers before transformers 5")


def build_mixtral(dtype: torch.dtype = torch.float32, **config):
    """A mixture of four experts in each of two layers, stacked: gate_up_proj (4, 80, 32), down_proj (4, 32, 40)."""
    from transformers import MixtralConfig, MixtralForCausalLM

    needs_stacked_experts()
    torch.manual_seed(0)
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
    }
    return MixtralForCausalLM(MixtralConfig(**(settings | config))).to(dtype)


def build_tokens(rows: int = 64, length: int = 12, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Rows of random tokens, each its own label."""
    tokens = torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer_settings(**arguments) -> dict:
    """Keyword arguments of TrainingArguments: four steps on the CPU, everything logged, nothing saved."""
    defaults = {
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return defaults | arguments


def trainer_groups(model, optim: str, targets, folder: Path) -> list[dict]:
    """Parameter groups of the optimizer that the Trainer makes for these `optim_target_modules`."""
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(**trainer_settings(output_dir=str(folder), optim=optim, optim_target_modules=targets))
    return Trainer(model=model, args=args).create_optimizer().param_groups


FAREWELL = """
import os, sys
import torch.distributed as dist

if dist.is_initialized():
    dist.barrier()  # none goes while another still talks to it
    dist.destroy_process_group()
sys.stdout.flush(), sys.stderr.flush()
os._exit(0)  # before Python 3.14 a thread of torch that meets the end of the interpreter may abort the process
"""


def launch(script: str, folder: Path, processes: int, *arguments: str) -> None:
    """Runs a script in processes that find each other as torchrun's do, one thread each on the CPU; fails with what
    they wrote if one fails."""
    path = folder / "script.py"
    path.write_text(script + FAREWELL)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"MASTER_ADDR": store.host, "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    started = forks.start([str(path), *arguments], ROOT, folder, processes, **environment)
    try:
        forks.wait(started)
    except torch.multiprocessing.ProcessExitedException as error:
        pytest.fail(f"{error}\n{(folder / 'err.txt').read_text(encoding='utf-8')[-3000:]}")


def run_quietly(code: str, folder: Path, *words: str) -> tuple[int, str, str]:
    """Runs code with these arguments in a process that has imported what others make and nothing of ours: its exit
    status, and what it prints (stdout, stderr)."""
    (folder / "code.py").write_text(code)
    done = forks.run([str(folder / "code.py"), *words], ROOT, folder)
    return done.returncode, done.stdout, done.stderr


def _train_words(preset: Path, method: str, folder: Path, words: tuple[str, ...]) -> list[str]:
    return [str(preset / f"{method}.yaml"), "--output_dir", str(folder), *words]


def run_recipe(train: ModuleType, preset: Path, method: str, folder: Path, *words: str) -> dict:
    """Trains by a recipe's `train` in this process; the result."""
    code = train.main(_train_words(preset, method, folder, words))
    result = json.loads((folder / "result.json").read_text())
    assert code == (result["status"] != "ok")
    return result


def kill_recipe(train: ModuleType, preset: Path, method: str, folder: Path, *words: str) -> None:
    """Does the same in another process and kills it when it has a checkpoint."""
    command = ["-m", train.__name__, *_train_words(preset, method, folder, words)]
    (process,) = forks.start(command, ROOT, folder.parent).processes
    wait_for_checkpoint(process.is_alive, folder, folder.parent)
    process.kill()
    process.join()
    assert not (folder / "result.json").exists()


def call_main(command: list[str], **_) -> CompletedProcess:
    """In the place of `subprocess.run`: a module's `main` in this process."""
    assert command[:2] == [sys.executable, "-m"]
    return CompletedProcess(command, importlib.import_module(command[2]).main(command[3:]))


def wait_for_checkpoint(is_alive: Callable[[], bool], folder: Path, logs: Path) -> None:
    """Until a process has just written the first checkpoint into `folder`; err.txt in `logs` is its."""
    deadline = time.monotonic() + 120
    while checkpoints.newest(folder)[0] is None:
        assert is_alive(), (logs / "err.txt").read_text(encoding="utf-8")[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def in_this_process(monkeypatch) -> None:
    """`compare` and `search` start processes, which here are calls of what those would run."""
    monkeypatch.setattr("recipes.runner.subprocess", SimpleNamespace(run=call_main))


@pytest.fixture
def tiny_llama() -> Callable:
    return build_llama


@pytest.fixture
def token_dataset() -> list[dict[str, torch.Tensor]]:
    return build_tokens()


@pytest.fixture(params=[0, 2**14], ids=["one by one", "held"])
def held(request, monkeypatch) -> int:
    """Bytes of gradients that layerwise holds, to step weights together as on a GPU; a layer of `build_llama` has
    more."""
    from fira_hf import layerwise

    monkeypatch.setitem(layerwise.HELD, "cpu", request.param)
    return request.param


@pytest.fixture
def make_trainer(tmp_path, monkeypatch) -> Callable:
    """`make_trainer(model=None, callbacks=None, ..., **TrainingArguments)` -> Trainer."""
    from transformers import Trainer, TrainingArguments

    def make(
        model=None, *, trainer_class=Trainer, model_init=None, callbacks=None, optimizers=(None, None), **arguments
    ):
        if model is None and model_init is None:
            model = build_llama()
        rows = arguments.pop("train_dataset", None) or build_tokens()
        settings = trainer_settings(output_dir=str(tmp_path / "run")) | arguments
        # transformers 4.56 writes bf16=True here, where it would switch on autocast for every later Trainer
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        evaluates = settings.get("eval_strategy", "no") != "no"
        return trainer_class(
            model=model,
            args=TrainingArguments(**settings),
            train_dataset=rows,
            eval_dataset=build_tokens(8, seed=2) if evaluates else None,
            model_init=model_init,
            callbacks=callbacks,
            optimizers=optimizers,
        )

    return make
