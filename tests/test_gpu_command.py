"""`make gpu` at a tiny size on the CPU: every part runs, what is missing says so, and a wrong kernel is seen."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import forks
from fira_hf import FiraAdamW, functional
from recipes.benchmarks import gpu, kernels
from recipes.benchmarks.models import pretended
from recipes.benchmarks.optimizers import BUILDERS

ROOT = Path(__file__).parents[1]
TINY = ["--size", "tiny", "--device", "cpu"]
CASE = kernels.Case(torch.bfloat16, (53, 19), 7, "wide", torch.bfloat16)


def run(folder, *words, parts):
    return gpu.main(["--output_dir", str(folder), *TINY, "--in_process", "--parts", parts, *words])


def cells(folder, part):
    return json.loads((folder / f"{part}.json").read_text())["cells"]


@pytest.fixture(autouse=True, scope="module")
def environment():
    """In this process the command leaves it at what Triton was imported with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    assert run(folder, parts="step,trainer,step-7b,memory") == 0
    return folder


def test_steps_launches_and_peers(measured):
    found = cells(measured, "step")
    ours, peers = found["tiny bfloat16"], found["tiny bfloat16, peers"]
    assert list(ours["milliseconds"]) == gpu.OURS and list(peers["milliseconds"]) == gpu.OURS + gpu.PEERS
    assert ours["layers"] == 2 and ours["rank"] == 16 and peers["layers"] == 1
    assert {"ordinary", "refresh", "amortised"} <= set(ours["milliseconds"]["fira_hf, together"])
    assert "amortised" in ours["milliseconds"]["fira_hf"]
    launches = found["tiny bfloat16, launches of fira_hf, together"]
    assert launches["milliseconds"] > 0 and launches["launches"] is None and "GPU" in launches["reason"]
    for name, row in peers["milliseconds"].items():  # a peer that is not installed is a row that says so
        package = {"apollo-torch": "apollo_torch", "galore-torch": "galore_torch"}.get(name)
        assert ("error" in row) == bool(package and not importlib.util.find_spec(package)), name


def test_training_memory_and_provenance(measured):
    (trained,) = cells(measured, "trainer").values()
    assert set(trained["methods"]) == {"adamw-full", "fira-full", "fira-layerwise"}
    assert all(row["tokens_per_second"] > 0 for row in trained["methods"].values())
    peaks = cells(measured, "memory")
    assert peaks["fira_layerwise"]["measured_bytes"] < peaks["fira"]["measured_bytes"]
    if "reason" in peaks["fira_layerwise, int8"]:  # torchao is not installed
        assert "torchao" in peaks.pop("fira_layerwise, int8")["reason"]
    for row in peaks.values():  # not predicted is what the optimizer's step needs, which at this size is as much
        assert 0.95 < row["measured_bytes"] / row["predicted_bytes"] < 2
        assert row["provenance"]["versions"]["torch"] == version("torch")
    (left_out,) = cells(measured, "step-7b").values()
    assert (left_out["status"], left_out["reason"]) == ("skipped", "--size tiny")


def test_the_table_has_a_line_for_everything(measured):
    lines = [
        line for part in ("step", "trainer", "memory", "step-7b") for line in gpu.summary(part, cells(measured, part))
    ]
    text = "\n".join(lines)
    for word in ("pytorch-optimizer", "average", "fira-layerwise", "GiB at the peak", "skipped: --size tiny"):
        assert word in text


def test_what_is_measured_is_not_measured_again(measured, monkeypatch, capsys):
    before = (measured / "trainer.json").read_bytes()
    monkeypatch.setattr(gpu, "_trainer", lambda *_: pytest.fail("measured again"))
    assert run(measured, parts="trainer") == 0
    assert (measured / "trainer.json").read_bytes() == before
    assert "measured before" in capsys.readouterr().out


def test_another_commit_or_an_unfinished_measurement_is_measured_again():
    options = SimpleNamespace(size="full")
    now = {"commit": "a", "device": "b", "versions": {}, "triton": None}
    row = {"status": "ok", "size": "full", "provenance": now}
    assert gpu.is_kept(row, now, options)
    assert not gpu.is_kept(None, now, options)
    assert not gpu.is_kept(row, now | {"commit": "c"}, options)
    assert not gpu.is_kept(row | {"size": "tiny"}, now, options)
    for status in ("in part", "wrong", "failed", "skipped"):
        assert not gpu.is_kept(row | {"status": status}, now, options)


def test_a_part_that_fails_is_a_row_and_the_rest_goes_on(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError(f"no {ROOT}/x")

    parts = {"one": lambda options: {"a": broken, "b": lambda: {"x": 1}}}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(gpu, "summary", lambda *_: [])
    assert run(tmp_path, parts="one") == 1
    found = cells(tmp_path, "one")
    assert (found["a"]["status"], found["a"]["error"]) == ("failed", "RuntimeError: no ./x")
    assert (found["b"]["status"], found["b"]["x"]) == ("ok", 1)


def test_a_process_that_dies_or_hangs_is_a_row(tmp_path, monkeypatch):
    options = SimpleNamespace(output_dir=tmp_path)
    monkeypatch.setattr(gpu.sys, "executable", "false")  # ends with status 1, as where a measurement failed
    gpu.run_in_process("memory", options, [])
    assert not (tmp_path / "memory.json").exists()

    def hang(*_, timeout, **__):
        raise subprocess.TimeoutExpired("gpu", timeout)

    died = SimpleNamespace(returncode=-11)
    for name, function in (("signal 11", lambda *_, **__: died), ("after the 180 s", hang)):
        monkeypatch.setattr(gpu.subprocess, "run", function)
        gpu.run_in_process("memory", options, [])
        row = cells(tmp_path, "memory")["the process"]
        assert row["status"] == "failed" and name in row["error"]


def test_a_profile_is_counted():
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(name, device, ns, annotation=False):
        return SimpleNamespace(
            name=lambda: name,
            device_type=lambda: device,
            duration_ns=lambda: ns,
            is_user_annotation=lambda: annotation,
        )

    events = [event("_project_kernel", cuda, 3_000_000), event("Memcpy HtoD", cuda, 1_000_000)]
    events += [event("Optimizer.step#FiraAdamW.step", cuda, 9_000_000, True), event("aten::mm", cpu, 7_000_000)]
    events += [event("cuLaunchKernelEx", cpu, 2_000_000), event("cudaMemcpyAsync", cpu, 1_000_000)]
    found = gpu.count(events)
    longest = found.pop("longest")
    assert found == {"launches": 1, "copies": 1, "device_milliseconds": 4.0, "starting_milliseconds": 3.0}
    assert [(row["name"], row["count"], row["milliseconds"]) for row in longest] == [
        ("_project_kernel", 1, 3.0),
        ("Memcpy HtoD", 1, 1.0),
    ]


def test_the_kernels_that_take_longest_are_told_by_name():
    """The ten with the most time in all, of which the table shows three."""
    cuda = torch.autograd.DeviceType.CUDA

    def event(name, ns):
        return SimpleNamespace(
            name=lambda: name,
            device_type=lambda: cuda,
            duration_ns=lambda: ns,
            is_user_annotation=lambda: False,
        )

    events = [event(f"kernel {i}", 1_000_000 * i) for i in range(1, 13)] + [event("kernel 1", 90_000_000)]
    found = gpu.count(events)
    assert len(found["longest"]) == 10
    assert found["longest"][0] == {"name": "kernel 1", "count": 2, "milliseconds": 91.0}
    lines = gpu.summary("step", {"x": {"status": "ok", "milliseconds": 1.0, "waits": 0.0, **found}})
    assert lines[1:] == [
        "    91.000 ms on the device: 2 x kernel 1",
        "    12.000 ms on the device: 1 x kernel 12",
        "    11.000 ms on the device: 1 x kernel 11",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(tmp_path, capsys):
    assert gpu.main(["--output_dir", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().out
    assert said.startswith("There is no CUDA device") and said.count("\n") == 1
    assert not (tmp_path / "none").exists()
    with pytest.raises(SystemExit):
        gpu.main(["--output_dir", str(tmp_path), "--parts", "kernel"])


def test_the_command_checks_the_kernels(tmp_path):
    """In processes of its own; where Triton is not installed the rows say so."""
    words = ["--output_dir", str(tmp_path), *TINY, "--parts", "kernels"]
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"TRITON_INTERPRET": "1"}
    result = forks.run(["-m", "recipes.benchmarks.gpu", *words], ROOT, tmp_path, **environment)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    found = cells(tmp_path, "kernels")
    assert list(found) == list(kernels.CHECKS)
    if importlib.util.find_spec("triton"):
        assert {row["status"] for row in found.values()} == {"ok"}
        assert all(row["cases"] for row in found.values())
    else:
        assert all(row["reason"] == "Triton is not installed" for row in found.values())
    assert f"kernels, {next(iter(found))}: " in result.stdout


def test_any_two_values_meet_in_a_case():
    for axes in (kernels.TINY, kernels.FULL):
        found = [(c.dtype, c.shape, c.rank, c.layout, c.state) for c in kernels.cases(axes)]
        assert len(found) <= 30
        for i in range(5):
            for j in range(i):
                assert {(one[i], one[j]) for one in found} == {(a, b) for a in axes[i] for b in axes[j]}


@pytest.mark.parametrize("check", kernels.CHECKS)
def test_the_torch_code_passes(check):
    """What judges the kernels finds nothing wrong with the reference."""
    for state in (torch.float32, torch.bfloat16):
        case = kernels.Case(CASE.dtype, CASE.shape, CASE.rank, CASE.layout, state)
        found = kernels.CHECKS[check][1](functional, case, "cpu").found
        assert found and all(row["worst"] <= 1 for row in found.values()), found


def test_a_wrong_kernel_is_seen(tmp_path, monkeypatch):
    """One element of a product, a moment that is not active, a rounding of one draw: each makes the exit status 1."""

    def project(grads, bases):
        R, norms = functional.project(grads, bases)
        R[0, -1, -1] *= 1.01
        return R, norms

    def direction(base, R, stored, betas, eps, active, seeds=None):
        return functional.direction(base, R, stored, betas, eps, torch.ones_like(active), seeds)

    def apply_updates(weights, *others):
        functional.apply_updates(weights, *others[:-1], others[-1] and [7] * len(weights))

    broken = SimpleNamespace(project=project, direction=direction, apply_updates=apply_updates)
    monkeypatch.setattr(gpu, "_kernels", lambda device: broken)
    assert run(tmp_path, parts="kernels") == 1
    found = cells(tmp_path, "kernels")
    for name, word in (("project", "R is off"), ("direction, lion", "not active"), ("rounding at random", "seed")):
        assert found[name]["status"] == "wrong" and word in found[name]["wrong"][0], found[name]["wrong"]
    assert (
        found["dense_adamw"] | {"status": "skipped", "reason": "fira_hf.kernels has no dense_adamw"}
        == found["dense_adamw"]
    )
    assert any("wrong" in line for line in gpu.summary("kernels", found))


def test_what_takes_the_accelerators_branch_is_stepped():
    plain = torch.nn.Parameter(torch.randn(24, 16))
    plain.grad, before = torch.randn(24, 16), plain.detach().clone()
    p = pretended(plain)
    FiraAdamW([{"params": [p], "rank": 4}], lr=0.1).step()
    assert not torch.equal(p.detach(), before) and "fira_hf-dense" in BUILDERS
