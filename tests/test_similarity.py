"""Two runs of the pre-training recipe compared: the figures are what their definitions say of the gradients seen."""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from conftest import run_recipe
from fira_hf import unwrapped
from fira_hf.callbacks import AnalysisCallback, read_record
from pretraining_tiny import STEPS, write_preset
from recipes.pretraining import similarity, train
from recipes.pretraining.settings import RecipeArguments

EVERY = 3
WORDS = ["--analysis_steps", str(EVERY), "--keep_model", "false"]
PICTURES = ("scaling-factors.png", "captured-energy.png", "limiter-by-layer.png", "limiter.png")


class Seen(AnalysisCallback):
    """Computes the factors of the steps to record by itself, in float64 and from full-size matrices."""

    factors: list[dict] = []

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if (state.global_step + 1) % EVERY == 0:
            of_step = {}
            for name, p in model.named_parameters():
                if "_proj" not in name:
                    continue
                own = unwrapped(optimizer).state[p]
                M, V = own["exp_avg"].double(), own["exp_avg_sq"].double()
                R = p.grad.double() if p.shape[0] >= p.shape[1] else p.grad.double().T
                if "basis" in own:
                    R = R @ own["basis"].double()
                elif p.shape[0] < p.shape[1]:
                    M, V = M.T, V.T
                N = M / (V.sqrt() + args.adam_epsilon)
                of_step[name] = [N[i].norm().item() / (R[i].norm().item() + 1e-8) for i in range(len(N))]
                of_step[name].append(N.norm().item() / (R.norm().item() + 1e-8))
            Seen.factors.append(of_step)
        super().on_optimizer_step(args, state, control, model=model, optimizer=optimizer, **kwargs)


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> Path:
    return write_preset(tmp_path_factory.mktemp("similarity") / "tiny")


def run(preset: Path, method: str, folder: Path, *words: str) -> Path:
    assert run_recipe(train, preset, method, folder, *WORDS, *words)["status"] == "ok"
    return folder


@pytest.fixture(scope="module")
def runs(preset, tmp_path_factory) -> tuple[dict[str, Path], dict[str, list[dict]]]:
    """Folders of a run by each method, and the factors computed by hand in it, a step each."""
    folders, seen = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recipes.pretraining.train.AnalysisCallback", Seen)
        for method in ("fira", "adamw"):
            Seen.factors = []
            folders[method] = run(preset, method, tmp_path_factory.mktemp(method))
            seen[method] = Seen.factors
    return folders, seen


def test_the_reported_similarity_is_that_of_the_factors_seen(runs, tmp_path, capsys):
    folders, seen = runs
    words = [str(folders["fira"]), str(folders["adamw"]), "--output_dir", str(tmp_path)]
    assert similarity.main(words) == 0
    found = json.loads((tmp_path / "similarity.json").read_text())
    averaged = {}
    for method, steps in seen.items():
        assert len(steps) == STEPS // EVERY
        averaged[method] = {name: np.mean([step[name] for step in steps], axis=0) for name in steps[0]}
    assert len(averaged["fira"]) == 14
    of_level = {
        "matrix": [[own[-1] for own in averaged[method].values()] for method in ("fira", "adamw")],
        # the long sides have fewer than 100 entries here, so all are in the sample
        "column": [[x for own in averaged[method].values() for x in own[:-1]] for method in ("fira", "adamw")],
    }
    for level, (low, full) in of_level.items():
        low, full = (np.array(values) / math.hypot(*values) for values in (low, full))
        expected = {
            "cosine": float(low @ full),
            "mse": float(((low - full) ** 2).mean()),
            "spearman": stats.spearmanr(low, full).statistic,
            "kendall": stats.kendalltau(low, full).statistic,
            "pearson": stats.pearsonr(low, full).statistic,
        }
        measured = found["similarity"][level]
        assert {name: measured[name] for name in expected} == pytest.approx(expected, rel=1e-3)
        assert 0 < measured["cosine"] < 0.9999  # neither the same run twice nor nothing
    assert found["similarity"]["column"]["n"] == sum(len(own) - 1 for own in averaged["fira"].values())
    for matrix in found["matrices"]:
        assert matrix["phi_low_rank"] == pytest.approx(averaged["fira"][matrix["name"]][-1], rel=1e-3)
        assert matrix["phi_full_rank"] == pytest.approx(averaged["adamw"][matrix["name"]][-1], rel=1e-3)
    assert found["published"] is None

    record = read_record(folders["fira"])
    energies = [entry["captured_energy"] for entry in found["records"]]
    np.testing.assert_allclose(energies, record.captured_energy.mean(axis=1), rtol=1e-6)
    active = [entry["limiter_active"] for entry in found["records"]]
    np.testing.assert_allclose(active, (record.limiter < 1).mean(axis=1))
    assert max(active) > 0
    for kind, method in (("low_rank", "fira"), ("full_rank", "adamw")):
        assert found["runs"][kind]["method"] == method
        assert found["runs"][kind]["provenance"]["seed"] == 42
        assert found["runs"][kind]["provenance"]["versions"]["torch"] == importlib.metadata.version("torch")
    for name in PICTURES:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in (tmp_path / "similarity.md").read_text(encoding="utf-8")
    cosine = f"{found['similarity']['matrix']['cosine']:.4f}"
    assert cosine in capsys.readouterr().out
    assert f"| matrix | {cosine} |" in (tmp_path / "similarity.md").read_text(encoding="utf-8")


def test_the_published_row_stands_beside_a_size_of_the_paper(runs, tmp_path, monkeypatch):
    folders, _ = runs
    parameters = json.loads((folders["fira"] / "result.json").read_text())["parameters"]
    monkeypatch.setitem(similarity.PUBLISHED, parameters, similarity.PUBLISHED[58_073_600])
    similarity.write(folders["fira"], folders["adamw"], tmp_path)
    text = (tmp_path / "similarity.md").read_text(encoding="utf-8")
    assert "| matrix, published for 60M | 0.9922 | 3e-04 | 0.9972 | 0.9662 | - | - | - |" in text
    assert "| column, published for 60M | 0.9273 | 3e-05 | 0.9372 | 0.7942 | - | - | - |" in text


def test_the_published_mse_is_that_of_unit_vectors():
    """To its one digit it follows from the cosine and the number of factors: 7 matrices a layer, 100 columns each."""
    for layers, (_, measures) in zip((8, 12, 24, 24), similarity.PUBLISHED.values(), strict=True):
        for level, count in (("matrix", 7 * layers), ("column", 700 * layers)):
            cosine, mse = measures[level][:2]
            assert abs(2 * (1 - cosine) / count - mse) <= 0.5 * 10 ** math.floor(math.log10(mse))


def test_a_run_beside_itself_is_wholly_similar(runs):
    folders, _ = runs
    low = similarity.load(folders["fira"])
    full = similarity.load(folders["fira"])
    for matrix in full.record.matrices:
        matrix["rank"] = None
    found = similarity.compare(low, full)["similarity"]
    for level in ("matrix", "column"):
        expected = {"cosine": 1.0, "spearman": 1.0, "kendall": 1.0, "pearson": 1.0}
        assert {name: found[level][name] for name in expected} == pytest.approx(expected)
        assert found[level]["mse"] == pytest.approx(0, abs=1e-30)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "1"], "seed is 42 and 1"),
        (["--max_steps", "6"], "steps is 12 and 6; training_tokens is"),
        (["--adam_beta2", "0.95"], "adam_beta2 is 0.999 and 0.95"),
        (["--analysis_steps", "2"], "analysis_steps is 3 and 2"),
    ],
    ids=str,
)
def test_runs_that_do_not_compare_are_refused(preset, runs, tmp_path, words, message, capsys):
    other = run(preset, "adamw", tmp_path / "other", *words)
    assert similarity.main([str(runs[0]["fira"]), str(other), "--output_dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_model_or_other_first_weights_are_refused(preset, runs, tmp_path):
    config = json.loads((preset / "config.json").read_text())
    for name, change, message in (
        ("layers.json", {"num_attention_heads": 2, "num_key_value_heads": 1}, "parameters is .*have other layers"),
        ("spread.json", {"initializer_range": 0.05}, "q_proj.weight began with the weights"),
    ):
        (tmp_path / name).write_text(json.dumps(config | change))
        other = run(preset, "adamw", tmp_path / name.partition(".")[0], "--model_config", str(tmp_path / name))
        with pytest.raises(ValueError, match=message):
            similarity.write(runs[0]["fira"], other, tmp_path / "out")


def test_runs_in_the_wrong_place_are_refused(runs, tmp_path):
    low, full = runs[0]["fira"], runs[0]["adamw"]
    for pair, message in (
        ((full, low), "projects nothing .adamw.; name the low-rank run first"),
        ((low, low), "is a low-rank run .fira.; name a full-rank run second"),
        ((low, tmp_path), "not the folder of a finished run"),
    ):
        with pytest.raises(ValueError, match=message):
            similarity.write(*pair, tmp_path / "out")
    without = tmp_path / "without"
    shutil.copytree(full, without)
    result = json.loads((without / "result.json").read_text())
    result["all_settings"]["analysis_steps"] = None
    (without / "result.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match="without analysis_steps; train again"):
        similarity.write(low, without, tmp_path / "out")


def test_only_methods_that_can_be_compared_are_analysed():
    for method in ("galore", "lora", "apollo"):
        with pytest.raises(ValueError, match=f"analysis_steps is 20.*{method}.*adamw and fira"):
            RecipeArguments(method=method, model_config="", analysis_steps=20)
    for method in ("fira", "adamw", "fira-matrix"):
        assert RecipeArguments(method=method, model_config="", analysis_steps=20).analysis_steps == 20
    with pytest.raises(ValueError, match="analysis_steps is 0"):
        RecipeArguments(method="fira", model_config="", analysis_steps=0)
