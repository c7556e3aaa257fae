"""The benchmark scripts at a tiny size: what they measure, what they write, what they refuse. No timing is judged."""

import importlib.metadata
import json
import re
import statistics
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from conftest import build_llama
from fira_hf import FiraAdamW, FiraConfig
from fira_hf.memory import estimate_memory
from fira_hf.targets import find_targets
from recipes import files
from recipes.benchmarks import basis, distributed, layerwise, memory, predict, report, scaling, step, train
from recipes.benchmarks.models import SIZES, matrices
from recipes.benchmarks.optimizers import BUILDERS, QUALITY, build
from recipes.report import marks

ROOT = Path(__file__).parents[1]


def test_every_size_is_a_llama_of_the_paper():
    """Parameters of the whole model with 32,000 tokens, untied, as published."""
    published = {"60m": 58_073_600, "130m": 134_105_856, "350m": 367_969_280, "1b": 1_339_082_752, "7b": 6_738_415_616}
    for name, total in published.items():
        size = SIZES[name]
        layer = 4 * size.hidden**2 + 3 * size.hidden * size.intermediate + 2 * size.hidden
        assert size.layers * layer + 2 * 32_000 * size.hidden + size.hidden == total, name


def test_the_matrices_have_gradients_with_a_leading_subspace():
    weights = matrices(SIZES["tiny"], 1, torch.float32, "cpu")
    assert [tuple(p.shape) for p in weights] == [(64, 64)] * 4 + [(172, 64)] * 2 + [(64, 172)]
    values = torch.linalg.svdvals(matrices(SIZES["60m"], 1, torch.float32, "cpu")[0].grad)
    assert values[31] > 3 * values[32]


def test_an_unknown_optimizer_lists_the_known_ones():
    with pytest.raises(ValueError, match="no optimizer 'fra'.*fira_hf"):
        build("fra", [], 1e-3, 4, 10)


@pytest.mark.parametrize("name", BUILDERS | QUALITY)
def test_every_optimizer_trains_the_matrices(name):
    if name in ("galore-torch", "apollo-torch", "adamw-8bit"):
        pytest.importorskip("bitsandbytes", reason="galore_torch and apollo_torch import it")
    if name in ("galore-torch", "apollo-torch"):
        pytest.importorskip(name.replace("-", "_"), reason="a peer, installed for the benchmarks only")
    weights = matrices(SIZES["tiny"], 1, torch.float32, "cpu")
    before = [p.detach().clone() for p in weights]
    optimizer = build(name, weights, 1e-3, 8, 10)
    optimizer.step()
    assert all((p - old).abs().max() > 0 for p, old in zip(weights, before, strict=True))


def test_step_times_methods_side_by_side(tmp_path, capsys):
    path = tmp_path / "step.json"
    methods = "floor;adamw;fira_hf, together;fira_hf;fira"
    words = ["--size", "tiny", "--steps", "3", "--methods", methods, "--output", str(path), "--device", "cpu"]
    assert step.main(words) == 0
    written = json.loads(path.read_text())
    found = written["milliseconds"]
    assert list(found) == methods.split(";")
    assert all(len(row["all"]) == 6 for row in found.values())
    row = found["fira"]
    assert row["refresh"] == row["all"][3] and row["first"] == row["all"][0]
    assert row["ordinary"] == statistics.median(row["all"][i] for i in (1, 2, 4, 5))
    assert row["amortised"] == pytest.approx(row["ordinary"] + (row["refresh"] - row["ordinary"]) / 200)
    assert written["provenance"]["versions"]["torch"] == importlib.metadata.version("torch")
    assert "together" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        step.main(["--methods", "fra"])


def test_a_method_that_fails_is_reported_and_the_others_go_on(monkeypatch, tmp_path):
    monkeypatch.setattr(FiraAdamW, "step", lambda self: (_ for _ in ()).throw(RuntimeError("broken")))
    words = ["--size", "tiny", "--steps", "2", "--methods", "fira_hf;adamw", "--device", "cpu"]
    assert step.main([*words, "--output", str(tmp_path / "step.json")]) == 0
    found = json.loads((tmp_path / "step.json").read_text())["milliseconds"]
    assert "broken" in found["fira_hf"]["error"] and found["adamw"]["ordinary"] > 0


def test_memory_counts_state_and_peak(tmp_path):
    path = tmp_path / "memory.json"
    words = ["--size", "tiny", "--methods", "adamw,fira_hf,fira", "--output", str(path), "--device", "cpu"]
    assert memory.main(words) == 0
    found = json.loads(path.read_text())["bytes"]
    numel = sum(p.numel() for p in matrices(SIZES["tiny"], None, torch.float32, "cpu"))
    assert found["adamw"]["state_bytes"] == 8 * numel + 4 * 14
    low = sum(16 * (64 + 2 * max(p.shape)) for p in matrices(SIZES["tiny"], None, torch.float32, "cpu"))
    assert found["fira_hf"]["state_bytes"] == 4 * (low + 2 * 14)
    # the published package builds the residual
    assert found["fira"]["peak_bytes"] >= 2 * 4 * 172 * 64


def test_basis_times_and_energies(tmp_path):
    path = tmp_path / "basis.json"
    assert basis.main(["time", "--shapes", "70x90x8", "--output", str(path)]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["long"], row["short"], row["rank"]) == (90, 70, 8)
    words = ["energy", "--size", "tiny", "--batch", "512", "--steps", "6", "--interval", "3", "--projection", "svd"]
    assert basis.main([*words, "--output", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["step"] for row in rows} == {0, 3}
    assert all(row["after"] == pytest.approx(1, abs=1e-4) for row in rows)
    assert all(row["before"] < 1 for row in rows if row["step"])


def test_train_measures_whole_steps(tmp_path):
    path = tmp_path / "train.json"
    words = ["--size", "tiny", "--vocab_size", "64", "--batch_size", "2", "--sequence_length", "8", "--steps", "2"]
    words += ["--repeats", "1", "--methods", "adamw-full,fira-full,fira-on-lora", "--gradient_checkpointing"]
    words += ["--output", str(path), "--device", "cpu"]
    assert train.main(words) == 0
    found = json.loads(path.read_text())["methods"]
    assert all(row["tokens_per_second"] > 0 for row in found.values())


# Tall, wide and square; what three processes hold of a side is uneven, and of 161 rows two do.
SHAPES = [(100, 100), (161, 96), (96, 161), (80, 161)]
RANK = 8


def uneven_matrices():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    for p in weights:
        p.grad = torch.randn(p.shape, generator=generator)
    return weights


def count_both():
    """What `distributed` counts of these matrices, split over the processes and replicated."""
    split = {name: distributed.count_sharded(name, uneven_matrices(), RANK) for name in ("fira_hf", "fira")}
    return split | {"replicas": distributed.share_refresh(uneven_matrices(), RANK, {}, 1)}


def test_what_scales_on_paper_is_what_is_counted():
    """Bytes, state and products of several processes: equal to the formulas, to the last one."""
    processes = 3
    found = distributed.launch(processes, count_both)
    ours, replicas = found["fira_hf"], found["replicas"]

    def paper(formula, **settings):
        return sum(formula(*shape, RANK, processes, **settings) for shape in SHAPES)

    ordinary, refresh = ours["ordinary"], ours["refresh"]
    assert ordinary["bytes"] == paper(scaling.step_bytes)
    assert refresh["bytes"] - ordinary["bytes"] == paper(scaling.refresh_bytes)
    assert ordinary["sent"] == ordinary["bytes"] * (processes - 1) // processes
    assert refresh["flops"] - ordinary["flops"] == pytest.approx(paper(scaling.refresh_flops))
    assert ours["state_bytes"] == paper(scaling.state_bytes)
    assert sum(replicas["flops"]) / processes == pytest.approx(paper(scaling.refresh_flops, replicas=True))
    assert sum(replicas["bases"]) == len(SHAPES) and len(replicas["seconds"]) == 1
    assert sum(replicas["elements"]) == sum(rows * columns for rows, columns in SHAPES)
    # The published package, by generic dispatch: of a wide matrix the whole residual goes over the network at each
    # step, and for its SVD every gradient.
    theirs = found["fira"]
    assert theirs["ordinary"]["bytes"] >= 4 * (96 + 80) * 161
    assert theirs["refresh"]["bytes"] - theirs["ordinary"]["bytes"] >= 4 * sum(
        rows * columns for rows, columns in SHAPES
    )


def test_distributed_writes_what_it_counted(tmp_path, capsys):
    path = tmp_path / "sharded.json"
    words = ["bytes", "--size", "tiny", "--layers", "1", "--processes", "2", "--output", str(path)]
    assert distributed.main(words) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["name"] for row in rows] == list(distributed.SHARDED)
    assert rows[-1]["ordinary"]["bytes"] == 0  # AdamW
    assert distributed.main(["refresh", "--size", "tiny", "--processes", "1", "--output", str(path)]) == 0
    content = json.loads(path.read_text())
    assert [(row["projection"], row["bases"]) for row in content["rows"]] == [("power", [14]), ("svd", [14])]
    assert "| svd | 1 | 14 | 1.000 |" in report.refresh_table(content)


def test_a_gathered_tensor_counts_whole_and_an_all_reduce_twice():
    assert distributed.launch(2, count_by_hand) == [3, 4 * (10 + 2 * 6 + 10), 2 * (10 + 2 * 6 + 10)]


def count_by_hand():
    five, six = torch.ones(5), torch.ones(6)
    split = distribute_tensor(torch.ones(10), init_device_mesh("cpu", (2,)), [Shard(0)])
    with distributed.Collectives() as collectives:
        torch.distributed.all_gather([torch.empty(5), torch.empty(5)], five)
        torch.distributed.all_reduce(six)
        split.full_tensor()
    return [collectives.calls, collectives.bytes, collectives.sent]


def test_the_state_of_a_device_shrinks_to_the_bases():
    """A LLaMA of grouped heads, with its embeddings: many devices keep of the projected matrices little but bases."""
    config = FiraConfig(rank=4)
    with torch.device("meta"):
        model = build_llama()
    one, many = (scaling.cost(model, config, devices) for devices in (1, 1000))
    assert one["state_bytes"] == find_targets(model, config).state_bytes
    assert one["adamw_bytes"] == estimate_memory(model, None).optimizer_state
    assert one["ordinary_sent"] == one["refresh_sent"] == one["fsdp_sent"] == 0
    assert one["refresh_flops"] == one["replica_refresh_flops"]
    moments = 14 * 2 * 4 * 4  # one row each
    dense = 2 * (2 * 32 + 2 * 32) * 4 + 5 * 2 * 4
    assert many["state_bytes"] - many["basis_bytes"] <= moments + dense + 40 * 4


def test_layerwise_measures_a_training_step(tmp_path):
    path = tmp_path / "layerwise.json"
    words = ["--size", "tiny", "--vocab_size", "64", "--sequence_length", "8", "--device", "cpu"]
    assert layerwise.main([*words, "--output", str(path)]) == 0
    found = json.loads(path.read_text())["bytes"]
    ordinary, inside = found["fira"], found["fira_layerwise"]
    assert ordinary["state_bytes"] == inside["state_bytes"] < found["adamw"]["state_bytes"]
    assert inside["peak_bytes"] < ordinary["peak_bytes"] - ordinary["weight_bytes"] / 2


def pages():
    return {path: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}


def test_the_pages_are_what_their_json_says(tmp_path):
    """Each table between its marks is made from the committed JSON, and nothing is out of date."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for path in (ROOT / "docs/benchmarks").glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    for path, page in pages().items():
        (tmp_path / path.name).write_text(page, encoding="utf-8")
    assert report.main([str(folder)]) == 0
    for path, page in pages().items():
        assert (tmp_path / path.name).read_text(encoding="utf-8") == page
    marked = {match[2] for page in pages().values() for match in marks("table").finditer(page)}
    assert marked == {path.stem for path in (ROOT / "docs/benchmarks").glob("*.json")}


def test_the_trainer_page_quotes_the_layerwise_peak():
    found = files.read_json(ROOT / "docs/benchmarks/layerwise-60m.json")["bytes"]
    page = (ROOT / "docs/trainer.md").read_text(encoding="utf-8")
    words = r'needs (\S+) MiB beyond .*?takes (\S+); with `optim="fira"` it needs (\S+) MiB'
    quoted = re.search(words, page, re.DOTALL)
    inside, ordinary = found["fira_layerwise"], found["fira"]
    sizes = (inside["peak_bytes"], inside["largest_gradient_bytes"], ordinary["peak_bytes"])
    assert quoted.groups() == tuple(f"{size / 2**20:.1f}" for size in sizes)


def test_the_committed_scaling_is_that_of_the_formulas():
    committed = files.read_json(ROOT / "docs/benchmarks/scaling.json")["rows"]
    assert committed == scaling.run([8, 16, 32, 64])


def test_the_committed_predictions_are_those_of_the_functions():
    """Of LLaMA-7B all but the activations; what the page of the command shows is run by its own test."""
    folder = ROOT / "docs/benchmarks"
    assert files.read_json(folder / "cells.json")["rows"] == predict.cells()
    rows = files.read_json(folder / "llama7b.json")["rows"]
    found = predict.finetuning()
    assert {(row["method"], row["batch_size"]) for row in rows} == {
        (name, batch) for name in found for batch in (1, 4)
    }
    for row in rows:
        for key in ("weights", "gradients", "optimizer_state"):
            assert row[key] == getattr(found[row["method"]], key)


def test_the_committed_predictions_of_int8_weights_are_those_of_the_function():
    """All but the activations."""
    pytest.importorskip("torchao")
    committed = files.read_json(ROOT / "docs/benchmarks/int8.json")["rows"]
    for row, found in zip(committed, predict.int8(batch_size=None), strict=True):
        assert {**row, "activations": 0, "total": row["total"] - row["activations"]} == found


def test_a_table_without_its_file_is_an_error(tmp_path, capsys):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks.md").write_text("<!-- table: step-60m -->\n<!-- end -->\n")
    assert report.main([str(tmp_path / "benchmarks")]) == 2
    assert "step-60m" in capsys.readouterr().err
