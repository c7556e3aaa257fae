"""What is installed: the files of the wheel, its version, its dependencies, and a quiet import."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import fira_hf
from conftest import PROJECT, run_quietly

ROOT = Path(__file__).parents[1]


def read_constraints() -> dict[str, Version]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


@pytest.mark.skipif(not importlib.util.find_spec("setuptools"), reason="a wheel is built with setuptools")
def test_wheel_holds_the_library_and_nothing_else(tmp_path: Path) -> None:
    tree = tmp_path / "tree"  # a copy: setuptools leaves build/ where it builds
    shutil.copytree(ROOT / "fira_hf", tree / "fira_hf", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for other in ("recipes", "tests"):
        (tree / other).mkdir()
        (tree / other / "__init__.py").touch()

    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(tree)], check=True, capture_output=True)

    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"fira_hf-{fira_hf.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        metadata = archive.read(f"fira_hf-{fira_hf.__version__}.dist-info/METADATA").decode()
    expected = [str(path.relative_to(ROOT)) for path in (ROOT / "fira_hf").rglob("*.py")] + ["fira_hf/py.typed"]
    assert sorted(names) == sorted(expected)
    assert "License-Expression: Apache-2.0" in metadata


def test_version_is_said_once() -> None:
    assert PROJECT["version"] == fira_hf.__version__
    assert f"## [{fira_hf.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_import_is_quiet(tmp_path: Path) -> None:
    """In a fresh process: neither a warning nor a line of output, and nothing that only recipes and tests need."""
    code = "import sys, fira_hf; assert not {'fira', 'galore_torch', 'recipes'} & set(sys.modules)"
    assert run_quietly(code, tmp_path) == (0, "", "")


def test_the_recipes_do_not_repeat_what_bitsandbytes_lacks_on_some_cpus() -> None:
    code = "import logging, recipes; logging.getLogger('bitsandbytes.backends.cpu.ops').warning('Failed to load')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_constraints_satisfy_the_project() -> None:
    pinned = read_constraints()
    extras = PROJECT["optional-dependencies"].values()
    for line in [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"constraints.txt does not pin {name}"
        assert pinned[name] in requirement.specifier, f"{line} excludes the pinned {pinned[name]}"


def test_constraints_are_sorted_and_installable_anywhere() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    names = [re.split("==", line)[0].lower() for line in lines]
    assert names == sorted(names)
    assert not any(version.local for version in read_constraints().values()), "a local version is on one machine only"
