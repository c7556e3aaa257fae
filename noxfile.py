"""The library's tests on the oldest and on the newest versions that it promises to work with: `make test-versions`.

Each stack is installed once, into .nox/, and kept. `nox --session newest -- tests/test_state.py` runs a part of them.
Where pip is shown a CPU build of torch, as by PIP_EXTRA_INDEX_URL, it takes that; otherwise the one of 5 GB with CUDA.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import nox
from packaging.requirements import Requirement

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml("pyproject.toml")["project"]
EXTRAS = ("recipes", "test")
REQUIREMENTS = [
    Requirement(line)
    for lines in [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in EXTRAS)]
    for line in lines
]
# The recipes run with the versions in constraints.txt. Their tests take half of the time of all, and use the library
# as the tests of the Trainer do.
LEFT_OUT = {
    "test_benchmarks.py",
    "test_commonsense_launch.py",
    "test_commonsense_run.py",
    "test_gpu_command.py",
    "test_pretraining.py",
    "test_pretraining_data.py",
    "test_pretraining_launch.py",
    "test_quality.py",
    "test_reproduction.py",
}
FILES = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/test_*.py")) if path.name not in LEFT_OUT]

nox.options.sessions = ["oldest", "newest"]
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = False  # it says which one is missing


def is_here(version: str) -> bool:
    """Whether this Python runs: the name alone may be of a launcher that only says that it was not chosen."""
    path = shutil.which(f"python{version}")
    return path is not None and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0


if shutil.which("pyenv"):  # which shows no Python but the chosen ones
    installed = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True, check=True).stdout
    os.environ.setdefault("PYENV_VERSION", ":".join(installed.split()))
OLDEST_PYTHON = PROJECT["requires-python"].removeprefix(">=")
# Without any of these it is the Python that runs nox.
NEWEST_PYTHON = next(filter(is_here, ("3.13", "3.12", "3.11")), None)


def run_tests(session: nox.Session, *requirements: str) -> None:
    session.install("--quiet", "--editable", f".[{','.join(EXTRAS)}]", *requirements)
    names = [requirement.name for requirement in REQUIREMENTS]
    show = f"from importlib.metadata import version; print(*(f'{{n}} {{version(n)}}' for n in {names}), sep=', ')"
    session.run("python", "-c", show)
    # What the commands of the recipes are is the same on every stack, and asking each of them takes minutes.
    options = ["-rs", "--numprocesses=2", "--dist=loadfile", "--deselect=tests/test_docs.py::test_commands_exist"]
    session.run("python", "-m", "pytest", *options, *(session.posargs or FILES))


@nox.session(python=OLDEST_PYTHON)
def oldest(session: nox.Session) -> None:
    """The oldest Python, and the lower bound of every requirement in pyproject.toml."""
    run_tests(session, *(f"{one.name}=={bound.version}" for one in REQUIREMENTS for bound in one.specifier))


@nox.session(python=NEWEST_PYTHON)
def newest(session: nox.Session) -> None:
    """The newest release of everything but torch, of which constraints.txt says what can be had."""
    torch = next(line for line in Path("constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    run_tests(session, "--upgrade", "--upgrade-strategy=eager", torch)
