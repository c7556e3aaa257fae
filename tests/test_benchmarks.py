"""The benchmark scripts at a tiny size: what they measure, what they write, what they refuse. No timing is judged."""

import json
import statistics
from pathlib import Path

import pytest
import torch
import yaml

from fira_hf import FiraAdamW
from recipes import files
from recipes.benchmarks import basis, memory, quality, report, step, train
from recipes.benchmarks.models import SIZES, matrices
from recipes.benchmarks.optimizers import BUILDERS, build

ROOT = Path(__file__).parents[1]
EXPERIMENT = {
    "model": {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 1, "num_attention_heads": 2},
    "vocab_size": 300,
    "sequence_length": 16,
    "batch_size": 2,
    "steps": 6,
    "warmup_steps": 2,
    "evaluate_every": 3,
    "rank": 4,
    "update_proj_gap": 3,
    "dense_lr": 1e-3,
}


@pytest.fixture
def text(tmp_path):
    """A folder with train.txt and valid.txt."""
    folder = tmp_path / "text"
    folder.mkdir()
    lines = [f"The number {n} comes after {n - 1} and before {n + 1}.\n" for n in range(1, 400)]
    (folder / "train.txt").write_text("".join(lines))
    (folder / "valid.txt").write_text("".join(lines[::7]))
    return folder


@pytest.fixture
def experiment(tmp_path):
    def write(**variants):
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(EXPERIMENT | {"variants": variants}))
        return path

    return write


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


@pytest.mark.parametrize("name", BUILDERS)
def test_every_optimizer_trains_the_matrices(name):
    if name in ("galore-torch", "apollo-torch"):
        pytest.importorskip("bitsandbytes", reason="galore_torch and apollo_torch import it")
        pytest.importorskip(name.replace("-", "_"), reason="a peer, installed for the benchmarks only")
    if name == "pytorch-optimizer":
        pytest.importorskip("pytorch_optimizer", reason="a peer, installed for the benchmarks only")
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
    assert written["provenance"]["versions"]["torch"] == torch.__version__
    assert "together" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        step.main(["--methods", "fra"])


def test_a_method_that_fails_is_reported_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(FiraAdamW, "step", lambda self: (_ for _ in ()).throw(RuntimeError("broken")))
    assert step.main(["--size", "tiny", "--steps", "2", "--methods", "fira_hf;adamw", "--device", "cpu"]) == 0


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


def test_basis_times_and_energies(tmp_path, text, experiment):
    path = tmp_path / "basis.json"
    assert basis.main(["time", "--shapes", "70x90x8", "--output", str(path)]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["long"], row["short"], row["rank"]) == (90, 70, 8)
    settings = {"projection": "svd", "refresh": "together"}
    yaml_path = experiment(power={"optimizer": "fira_hf", "learning_rates": [1e-3], "settings": settings})
    words = ["energy", str(yaml_path), "--data_dir", str(text), "--cache", str(tmp_path / "c"), "--output", str(path)]
    assert basis.main(words) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["step"] for row in rows} == {0, 3}
    assert all(row["after"] == pytest.approx(1, abs=1e-4) for row in rows)
    assert all(row["before"] < 1 for row in rows if row["step"])


def test_quality_runs_every_variant_once_and_continues(tmp_path, text, experiment, capsys):
    settings = {"projection": "power", "stochastic_rounding": True}
    path = experiment(
        adamw={"optimizer": "adamw", "learning_rates": [1e-3, 1e-2]},
        ours={"optimizer": "fira_hf", "learning_rates": [1e-2], "settings": settings, "weights": "bfloat16"},
    )
    folder = tmp_path / "quality"
    words = [str(path), "--output_dir", str(folder), "--data_dir", str(text)]
    assert quality.main([*words, "--variants", "adamw"]) == 0
    assert len(list(folder.glob("*.json"))) == 2
    marked = folder / "adamw-lr0.001-seed0.json"
    files.write_json(marked, files.read_json(marked) | {"seen": True})
    assert quality.main([*words, "--seeds", "0"]) == 0
    assert files.read_json(marked)["seen"]
    run = files.read_json(folder / "ours-lr0.01-seed0.json")
    assert [entry["step"] for entry in run["history"]] == [3, 6]
    assert 1 < run["perplexity"] < 400
    with pytest.raises(SystemExit):
        quality.main([*words, "--variants", "theirs"])
    with pytest.raises(SystemExit):
        quality.main([*words, "--learning_rates", "7"])
    assert "no chosen variant" in capsys.readouterr().err

    content = report.gather(folder)
    assert len(content["runs"]) == 3 and content["experiment"]["steps"] == 6
    table = report.quality_table(content)
    assert "ours" in table and "adamw" in table
    report.plot_quality(content, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 10_000


def test_two_seeds_differ_and_one_repeats(text, tmp_path):
    data = quality.load_tokens(text, tmp_path / "c", 300)
    variant = {"optimizer": "fira_hf"}
    one, same, other = (quality.train(EXPERIMENT, variant, 1e-3, seed, data)["perplexity"] for seed in (0, 0, 1))
    assert one == same != other


def test_train_measures_whole_steps(tmp_path):
    path = tmp_path / "train.json"
    words = ["--size", "tiny", "--vocab_size", "64", "--batch_size", "2", "--sequence_length", "8", "--steps", "2"]
    words += ["--repeats", "1", "--methods", "adamw-full,fira-full,fira-on-lora", "--gradient_checkpointing"]
    words += ["--output", str(path), "--device", "cpu"]
    assert train.main(words) == 0
    found = json.loads(path.read_text())["methods"]
    assert all(row["tokens_per_second"] > 0 for row in found.values())


def test_the_page_of_benchmarks_is_what_its_json_says(tmp_path):
    """Each table between its marks is made from the committed JSON, and nothing is out of date."""
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for path in (ROOT / "docs/benchmarks").glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    (tmp_path / "benchmarks.md").write_text(page, encoding="utf-8")
    assert report.main([str(folder)]) == 0
    assert (tmp_path / "benchmarks.md").read_text(encoding="utf-8") == page
    marked = {match[2] for match in report.MARKED.finditer(page)}
    assert marked == {path.stem for path in (ROOT / "docs/benchmarks").glob("*.json")}


def test_a_table_without_its_file_is_an_error(tmp_path, capsys):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks.md").write_text("<!-- table: step-60m -->\n<!-- end -->\n")
    assert report.main([str(tmp_path / "benchmarks")]) == 2
    assert "step-60m" in capsys.readouterr().err
