"""The benchmark of rates on LoRA's matrices, and what its page says of other programs."""

from __future__ import annotations

import ast
import os
import re
import shlex

import pytest
import torch
from torch import nn

import fira_hf
from conftest import ROOT
from recipes import files
from recipes.benchmarks import lora_rates, report
from recipes.benchmarks.models import Size

PAGE = ROOT / "docs/lora.md"


def matrices() -> dict[str, nn.Parameter]:
    """LoRA's A (dim x in) and B (out x dim) of dim 8, B at zero, as programs for images make them."""
    torch.manual_seed(0)
    return {"lora_down": nn.Parameter(torch.randn(8, 24)), "lora_up": nn.Parameter(torch.zeros(20, 8))}


def test_the_benchmark_searches_each_rate_and_its_table_has_a_row_a_method(tmp_path, monkeypatch):
    monkeypatch.setattr(lora_rates, "SIZE", Size(16, 44, 2, 1, 4))
    for split in ("train", "valid"):
        (tmp_path / f"{split}.txt").write_text("All work and no play makes a dull text. " * 60)
    words = ["--data", str(tmp_path), str(tmp_path), "--dim", "4", "--steps", "2", "--base_steps", "1", "--seeds", "2"]
    names = ["adamw", "fira_hf, rank half"]
    output = tmp_path / "docs/benchmarks/lora-rates.json"
    assert lora_rates.main([*words, "--methods", ";".join(names), "--output", str(output)]) == 0
    found = files.read_json(output)
    assert list(found["methods"]) == names
    assert not [word for word in shlex.split(found["provenance"]["command"]) if os.path.isabs(word)]
    for one in found["methods"].values():
        by_rate = {run["lr"]: run["loss"] for run in one["runs"] if run["seed"] == 0 and run["loss"] is not None}
        best = min(by_rate, key=by_rate.get)
        assert min(by_rate) < best or best == 1e-8
        assert [run["lr"] for run in one["runs"] if run["seed"] == 1] == [best]
    rows = report.lora_table(found).splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["before", *names]


def test_the_line_of_the_page_trains_as_sd_scripts_reads_it():
    line = re.search(r"--optimizer_type .*", PAGE.read_text(encoding="utf-8"))[0]
    _, name, _, *arguments = shlex.split(line)
    keywords = {key: ast.literal_eval(value) for key, value in (one.split("=") for one in arguments)}
    module, _, function = name.rpartition(".")
    assert module == "fira_hf"
    weights = matrices()
    made = getattr(fira_hf, function)([{"params": weights.values(), "lr": 1e-4}], lr=1e-3, **keywords)
    (group,) = made.param_groups
    assert (group["rank"], group["lr"], len(group["params"])) == (min(keywords["rank"], 8), 1e-4, 2)


def test_what_the_page_says_of_pytorch_optimizer():
    fira = pytest.importorskip("pytorch_optimizer").Fira

    def train(steps=3, **keywords):
        weights = matrices()
        generator = torch.Generator().manual_seed(1)
        optimizer = fira([{"params": weights.values()}], lr=1e-2, eps=1e-12, **keywords)
        for _ in range(steps):
            for p in weights.values():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        return weights, optimizer

    # Without a rank it is AdamW (its epsilon stands elsewhere).
    weights, _ = train()
    plain = matrices()
    generator = torch.Generator().manual_seed(1)
    adamw = torch.optim.AdamW(plain.values(), lr=1e-2, eps=1e-12, weight_decay=0)
    for _ in range(3):
        for p in plain.values():
            p.grad = torch.randn(p.shape, generator=generator)
        adamw.step()
    for name, p in weights.items():
        torch.testing.assert_close(p, plain[name])

    with pytest.raises(KeyError, match="update_proj_gap"):
        train(rank=4)

    # At the rank of LoRA's dim no residual is left.
    settings = {"update_proj_gap": 50, "scale": 1.0, "projection_type": "std"}
    whole, half = (train(1, rank=rank, **settings)[1] for rank in (8, 4))
    norms = [[float(state["scaling_grad"]) for state in one.state.values()] for one in (whole, half)]
    assert max(norms[0]) < 1e-4 * min(norms[1])
