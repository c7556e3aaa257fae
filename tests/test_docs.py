"""The pages say what is true: their Python runs, their commands exist, their links lead somewhere."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import transformers

import forks
from conftest import PROJECT

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("recipes/*/README.md"))]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*).*?\n(?P<body>.*?)^ *```\s*?$", re.MULTILINE | re.DOTALL)
MAJOR = transformers.__version__.split(".")[0]
REASON = re.compile(rf"<!-- not run(?: with transformers {MAJOR})?: (.+?) -->\s*\Z")
RECIPES = {"recipes.commonsense", "recipes.diffusion", "recipes.pretraining"}  # what they train is said by experiments
OTHERS = {
    "cd",
    "git",
    "lm_eval",
    "ls",
    "nox",
    "pre-commit",
    "pytest",
    "python",
    "ruff",
}  # only the files they name are checked


@dataclass
class Block:
    """A fenced block: the page and line it starts at, and why it is not run (None: it is)."""

    page: Path
    line: int
    language: str
    body: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    blocks = []
    for fence in FENCE.finditer(text):
        body = re.sub(rf"^ {{{len(fence['indent'])}}}", "", fence["body"], flags=re.MULTILINE)
        reason = REASON.search(text[: fence.start()])
        line = text.count("\n", 0, fence.start("body")) + 1
        blocks.append(Block(page, line, fence["language"], body, reason and reason[1]))
    return blocks


def read_commands(block: Block) -> list[list[str]]:
    """The commands of a bash block as words, without prompts, comments and VARIABLE=value in front."""
    commands = []
    for line in block.body.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        if words:
            commands.append(words)
    return commands


BLOCKS = [block for page in PAGES for block in read_blocks(page)]
PYTHON = [block for block in BLOCKS if block.language in {"python", "py"}]
BASH = [block for block in BLOCKS if block.language in {"bash", "sh", "shell", "console"}]


@pytest.mark.parametrize(
    "page", sorted({block.page for block in PYTHON if not block.reason}), ids=lambda page: page.name
)
def test_python_runs(page: Path, tmp_path: Path) -> None:
    """The blocks of a page run in order as one program, each on its lines of the page: a traceback names them."""
    if page.name == "diffusion.md":
        pytest.importorskip("diffusers", reason="diffusers is not installed: pip install '.[diffusion]'")
    text = page.read_text(encoding="utf-8")
    if "BitsAndBytesConfig" in text:
        pytest.importorskip("bitsandbytes")
    lines = [""] * len(text.splitlines())
    for block in read_blocks(page):
        if block in PYTHON and not block.reason:
            for offset, line in enumerate(block.body.splitlines()):
                lines[block.line - 1 + offset] = line
    assert not lines[0], "a page begins with its title"
    lines[0] = "from docs_prelude import *"
    program = tmp_path / f"{page.stem}.md.py"
    program.write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = forks.run([str(program)], tmp_path, tmp_path)
    assert result.returncode == 0, f"{page.relative_to(ROOT)}\n{result.stdout[-1000:]}\n{result.stderr[-3000:]}"


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_is_read(block: Block) -> None:
    """Every block is Python; one that is not run shows as skipped, with its reason."""
    compile(block.body, str(block), "exec")
    if block.reason:
        pytest.skip(block.reason)


@functools.cache
def read_help(*command: str) -> str:
    """What `python -m command --help` prints."""
    with tempfile.TemporaryDirectory() as logs:
        result = forks.run(["-m", *command, "--help"], ROOT, Path(logs))
    assert result.returncode == 0, f"python -m {' '.join(command)} --help\n{result.stderr[-2000:]}"
    return result.stdout


def check_experiment(package: str, experiment: str, *overrides: str) -> None:
    """The training script reads the experiment with these overrides, here without its device and number formats."""
    from recipes.settings import load_settings, read_overrides

    train = importlib.import_module(f"{package}.train")
    settings = load_settings(train.RECIPE, ROOT / experiment, read_overrides(list(overrides)))
    settings.pop("dry_run", None)
    train.parse({"output_dir": "out"} | settings | {"use_cpu": True, "fp16": False, "bf16": False})


def check_module(module: str, arguments: list[str]) -> None:
    """A module of the project that documents each flag, or passes it on to a script that knows it."""
    assert importlib.util.find_spec(module), f"no module {module}"
    package, _, script = module.rpartition(".")
    if package in RECIPES and script == "train":
        check_experiment(package, *arguments)
        return
    subcommand = arguments[:1] if module == "fira_hf.cli" else []
    flags = set(re.findall(r"--[\w-]+", read_help(module, *subcommand)))
    passed_on: list[str] = []
    known = True
    for argument in arguments:
        if argument.startswith("--"):
            known = argument.split("=")[0] in flags
        if not known:
            passed_on.append(argument)
    if package in RECIPES and script in {"compare", "search"}:
        from recipes.runner import find_experiments

        recipe = importlib.import_module(f"{package}.settings").RECIPE
        named = arguments[arguments.index("--methods") + 1].split(",") if "--methods" in arguments else None
        for experiment in find_experiments(recipe, arguments[0], named).values():
            check_experiment(package, str(experiment), *passed_on)
    else:
        assert not passed_on, f"{module} has no {passed_on[0]}"


def check_command(words: list[str]) -> None:
    program, *arguments = words
    program = Path(program).name
    for file in (word.split("::")[0] for word in arguments):
        assert not file.endswith((".py", ".yaml", ".txt")) or (ROOT / file).is_file(), f"no file {file}"
    if program == "make":
        goals = [word for word in arguments if "=" not in word]
        assert goals, "`make` alone only lists the targets"
        assert set(goals) <= TARGETS, f"the Makefile has only {sorted(TARGETS)}"
    elif program in {"python", "python3", "torchrun", "accelerate"} and "-m" in arguments:
        module = arguments.index("-m") + 1
        if arguments[module].split(".")[0] in {"fira_hf", "recipes"}:
            check_module(arguments[module], arguments[module + 1 :])
    elif program in PROJECT.get("scripts", {}):
        check_module(PROJECT["scripts"][program].split(":")[0], arguments)
    elif program == "pip":
        extras = re.findall(r"(?:\.|fira[-_]hf)\[([\w,]+)\]", " ".join(arguments))
        names = {name for extra in extras for name in extra.split(",")}
        assert names <= set(PROJECT["optional-dependencies"]), f"an unknown extra among {names}"
    else:
        assert program in OTHERS, f"{program}: teach this test to check it, or say why it is not run"


@pytest.mark.parametrize("block", BASH, ids=str)
def test_commands_exist(block: Block) -> None:
    if block.reason:
        pytest.skip(block.reason)
    for words in read_commands(block):
        check_command(words)


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def read_anchors(page: Path) -> set[str]:
    return {
        slug(heading)
        for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    links = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    links += re.findall(r"^\[[^\]]+\]: (\S+)", text, re.MULTILINE)
    for link in links:
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{link} leads nowhere"
        if anchor and target.suffix == ".md":
            assert anchor in read_anchors(target), f"{link}: no such heading"


def test_pages_that_readers_look_for() -> None:
    names = {page.name for page in PAGES}
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md"} <= names


def test_ci_runs_the_command_of_the_readme() -> None:
    commands = [words for block in BASH if block.page.name == "README.md" for words in read_commands(block)]
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()
    assert ["make", "test"] in commands


def test_the_readme_shows_the_summary_of_smollm2() -> None:
    """The sample output of the README is what the shapes of SmolLM2-135M give."""
    import torch

    from conftest import build_llama
    from fira_hf import FiraConfig, get_fira_optimizer

    layers = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    size = {"hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True}
    with torch.device("meta"):
        model = build_llama(**layers, **size)
    assert get_fira_optimizer(model, FiraConfig()).summary in (ROOT / "README.md").read_text(encoding="utf-8")
