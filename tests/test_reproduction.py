"""Every table and figure of the paper: its experiments for a few steps, and the page that compares the figures."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from pretraining_tiny import write_text
from recipes import files, report
from recipes.pretraining import compare, reproduction, train
from recipes.pretraining.settings import METHODS, RECIPE

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results/paper-small"
# What the log of a variant's optimizer has to be by its definition, at every step but the first.
BY_DEFINITION = {
    "fira-only-scaling": {"fira_residual_share": 1.0},
    "fira-without-limiter": {"fira_limiter_active": 0.0},
    "fira-clipping": {"fira_limiter_active": 0.0},
    "fira-tensor-scaling": {"fira_limiter_active": 1.0},
}
VARIANTS = sorted(path.stem for path in (RECIPE.experiments / "ablation").glob("*.yaml"))


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    text = write_text(tmp_path_factory.mktemp("text"), train=400)
    few = ["--max_steps", "4", "--warmup_steps", "1", "--logging_steps", "1", "--eval_strategy", "no"]
    few += ["--eval_on_start", "false", "--keep_model", "false", "--use_cpu", "true", "--disable_tqdm", "true"]
    return ["--size", "tiny", "--data_dir", str(text), "--sequence_length", "32", *few]


def trained(experiment: Path, folder: Path, words: list[str]) -> dict:
    assert train.main([str(experiment), "--output_dir", str(folder), *words]) == 0
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def fira(words, tmp_path_factory) -> dict:
    return trained(RECIPE.experiments / "ablation" / "fira.yaml", tmp_path_factory.mktemp("fira"), words)


@pytest.mark.parametrize("method", [method for method in VARIANTS if method != "fira"])
def test_a_variant_trains_as_it_is_defined(method, fira, words, tmp_path):
    result = trained(RECIPE.experiments / "ablation" / f"{method}.yaml", tmp_path, words)
    logs = [entry for entry in result["history"] if "fira_limiter_active" in entry]
    assert len(logs) == 4
    for key, value in BY_DEFINITION.get(method, {}).items():
        assert [entry[key] for entry in logs[1:]] == pytest.approx([value] * 3)
    own, other = ([entry for entry in run["history"] if "loss" in entry] for run in (result, fira))
    assert own[0]["loss"] == other[0]["loss"]  # the same weights and the same batch
    assert any(own[-1][key] != other[-1][key] for key in ("loss", "fira_residual_share"))  # another update


@pytest.mark.parametrize("method", ["fira", "galore"])
def test_the_state_grows_with_the_rank(method, words, tmp_path):
    if method == "galore":
        pytest.importorskip("galore_torch")  # with bitsandbytes, which is not built for every system
    few = [*words, "--max_steps", "1"]
    sizes = []
    for rank in (4, 64):
        experiment = RECIPE.experiments / "ranks" / f"{method}-rank-{rank}.yaml"
        sizes.append(trained(experiment, tmp_path / str(rank), few)["optimizer_state_bytes"])
    # Four layers of four matrices of 128 x 128 and three of 344 x 128: short r + 2 long r numbers each.
    numbers = 4 * (4 * (128 + 2 * 128) + 3 * (128 + 2 * 344))
    assert sizes[1] - sizes[0] == 4 * 60 * numbers


def test_the_page_is_what_its_json_says(tmp_path):
    folder, page = tmp_path / "paper-small", tmp_path / "reproduction.md"
    shutil.copytree(RESULTS, folder)
    shutil.copy(ROOT / "docs/reproduction.md", page)
    assert reproduction.main([str(folder), "--page", str(page)]) == 0
    assert page.read_text(encoding="utf-8") == (ROOT / "docs/reproduction.md").read_text(encoding="utf-8")
    assert (folder / "report.md").read_text(encoding="utf-8") == (RESULTS / "report.md").read_text(encoding="utf-8")
    marked = {match[2] for match in report.marks("paper").finditer(page.read_text(encoding="utf-8"))}
    assert marked == set(reproduction.TITLES)


def test_agreement_counts_the_pairs_of_the_papers_order():
    paper = {"adamw": 34.0, "fira": 31.0, "galore": 35.0, "lora": 35.0, "relora": 37.0}
    ours = {"adamw": [20.0, 22.0], "fira": [25.0], "galore": [30.0], "lora": [10.0], "apollo": [1.0]}
    said = reproduction.agreement(paper, ours)  # galore and lora are equal in the paper, and relora was not run
    assert said == "2 of 5 pairs are in the paper's order; not adamw and fira, adamw and lora, fira and lora."
    assert reproduction.agreement({"fira": 1.0, "galore": 2.0}, {"fira": [3.0], "galore": [4.0]}) == (
        "1 of 1 pairs are in the paper's order."
    )


def test_a_table_orders_the_methods_and_shows_the_papers_figure(tmp_path):
    rows = reproduction.beside("methods", {"adamw": [20.0, 22.0], "fira": [19.04], "fira-hf": [18.0]})
    assert rows[2:5] == [
        "| `fira-hf` | 18.0 | - | - |",
        "| `fira` | 19.0 | 31.06 | 30.34 |",
        "| `adamw` | 21.0 ± 1.4 | 34.06 | 30.05 |",
    ]


def test_published_methods_are_experiments_of_the_recipe():
    for figures in (*reproduction.PUBLISHED.values(), reproduction.INDEPENDENT):
        assert figures.keys() <= METHODS.keys()


def test_searches_of_several_commands_make_one_table(tmp_path):
    found = {"narrow": {"galore": {"1e-2": 5.0, "3e-2": 4.0}, "adamw": {"1e-2": None, "1e-3": 6.0}}}
    found["wider"] = {"galore": {"1e-1": 3.5}}
    for name, of_methods in found.items():
        methods = {method: {"losses": losses} for method, losses in of_methods.items()}
        files.write_json(tmp_path / f"search-{name}" / "search.json", {"methods": methods})
    losses = reproduction.searched(tmp_path)
    assert reproduction.searches(losses) == [
        "| validation loss | 1e-3 | 1e-2 | 3e-2 | 1e-1 |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| `galore` |  | 5.000 | 4.000 | **3.500** |",
        "| `adamw` | **6.000** |  |  |  |",
    ]
    assert reproduction.at_their_best(losses) == {"galore": [math.exp(3.5)], "adamw": [math.exp(6.0)]}
    with pytest.raises(ValueError, match=r"no search\*/search.json of fira-lion, lora"):
        reproduction.of_methods(losses, ["adamw", "fira-lion", "lora"], tmp_path)
    with pytest.raises(ValueError, match="loss of apollo is not finite at any rate"):
        reproduction.of_methods({"apollo": {}}, ["apollo"], tmp_path)


def test_missing_results_are_named(tmp_path, capsys):
    assert reproduction.main([str(tmp_path)]) == 2
    assert "holds no search*/search.json" in capsys.readouterr().err
    search = {"methods": {"adamw": {"losses": {"1e-3": 4.0}}}}
    search["methods"] |= {method: {"losses": {"1e-2": 5.0}} for method in reproduction.BASES}
    files.write_json(tmp_path / "search" / "search.json", search)
    assert reproduction.main([str(tmp_path)]) == 2
    assert "methods/results.json holds no results" in capsys.readouterr().err


def test_compare_takes_the_size_of_an_ablation(words, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("recipes.runner._execute", lambda run, log: started.append(run) or False)
    monkeypatch.setattr("recipes.runner.files.read_json", lambda path: {"error": "not run"})
    monkeypatch.setattr("recipes.pretraining.report.write_report", lambda folder: None)
    compare.main(["ablation", "--output_dir", str(tmp_path), "--methods", "fira-matrix", *words])
    (run,) = started
    assert run.settings["model_config"] == "recipes/pretraining/experiments/tiny/config.json"
    assert run.settings["optim_args"] == "preset=published, rank=32, update_proj_gap=20, alpha=0.25, scaling=matrix"
