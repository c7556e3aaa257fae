"""The diffusion recipe on models of a few thousand weights: data, training, resume, report."""

from __future__ import annotations

import json

import pytest
import yaml

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install '.[diffusion]'")
pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install '.[diffusion]'")

import torch
from torch import nn

from conftest import run_recipe
from recipes.diffusion import data, report, train
from recipes.diffusion.model import Denoiser, build, with_lora
from recipes.diffusion.settings import METHODS, RECIPE, RecipeArguments
from recipes.runner import find_experiments

OPTIM_ARGS = {"fira-full": "rank=4", "galore-full": "rank=4, update_proj_gap=2, scale=0.25"}


@pytest.fixture
def preset(tmp_path):
    base = {
        "model": "dit",
        "width": 16,
        "draws": 2,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": "3e-3",
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_eval_batch_size": 297,
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    for method in METHODS:
        own = {"optim_args": OPTIM_ARGS[method]} if method in OPTIM_ARGS else {}
        (tmp_path / f"{method}.yaml").write_text(yaml.safe_dump({"defaults": "base.yaml", "method": method} | own))
    return tmp_path


def test_each_method_trains_and_is_reported(preset, tmp_path, monkeypatch):
    """From the same weights and judged by the same noise, so that before training all have the same loss."""
    monkeypatch.setattr("recipes.diffusion.model.SAMPLING_STEPS", 2)
    runs = {method: run_recipe(train, preset, method, tmp_path / "runs" / method) for method in METHODS}
    assert {run["status"] for run in runs.values()} == {"ok"}, [run.get("error") for run in runs.values()]
    assert len({run["held_out"]["fingerprint"] for run in runs.values()}) == 1
    assert len({run["eval_loss"] for run in runs.values()}) == len(METHODS)
    state = {method: run["optimizer_state_bytes"] for method, run in runs.items()}
    assert state["fira-full"] < state["adamw-full"] / 2 and state["galore-full"] < state["adamw-full"] / 2
    for run in runs.values():
        assert run["eval_loss"] == pytest.approx(sum(run["held_out"]["losses"]) / data.HELD_OUT)
        assert [len(image) for image in run["samples"]] == [data.SIDE**2] * 2 * data.DIGITS
    report.write_report(tmp_path / "runs")
    merged = json.loads((tmp_path / "runs" / "results.json").read_text())
    low, high = merged["differences"]["fira-full"]["interval"]
    assert low <= runs["fira-full"]["eval_loss"] - runs["adamw-full"]["eval_loss"] <= high
    assert (tmp_path / "runs" / "samples.png").is_file()
    assert "galore-full" in (tmp_path / "runs" / "report.md").read_text()


def test_held_out_images_are_not_trained_on_and_their_noise_is_everywhere():
    examples, held_out = data.load()
    assert len(examples) + len(held_out) == 1797 and len(held_out) == data.HELD_OUT
    seen = {one["images"].numpy().tobytes() for one in examples}
    # The set holds few images twice; that none is shared but those would need the same shuffle.
    assert sum(one["images"].numpy().tobytes() in seen for one in held_out) == 0
    noisy = data.with_noise(held_out, 4)
    for part in range(4):
        times = torch.tensor([one["times"] for one in noisy[part::4]])
        assert times.min() >= 250 * part and times.max() < 250 * (part + 1)
    assert torch.equal(noisy[0]["images"], noisy[3]["images"]) and not torch.equal(
        noisy[0]["noise"], noisy[3]["noise"]
    )
    assert data.fingerprint(noisy) != data.fingerprint(data.with_noise(held_out[::-1], 4))


def test_images_survive_as_text():
    images = torch.arange(-1, 1, 2 / 64).view(1, 1, 8, 8)
    (text,) = data.as_text(torch.cat([images]) * 5)
    assert text[:24] == "0" * 24 and text[-1] == "f"
    rows = torch.tensor(data.from_text(data.as_text(images)[0]))
    assert (rows / 7.5 - 1 - images[0, 0]).abs().max() <= 1 / 15 + 1e-6


@pytest.mark.parametrize("model", ["unet", "dit"])
def test_lora_trains_its_matrices_and_what_it_does_not_wrap(model):
    arguments = RecipeArguments(method="lora", model=model, width=16, lora_rank=2)
    whole = build(arguments)
    before = {name: p.numel() for name, p in whole.named_parameters()}
    with_lora(whole, arguments)
    frozen = {name.replace(".base_layer", "") for name, p in whole.named_parameters() if not p.requires_grad}
    assert frozen and sum(before[name] for name in frozen) > 0.8 * sum(before.values())
    layers = {name for name, module in build(arguments).named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    left = {name for name in layers if f"{name}.weight" not in frozen}
    assert left == ({"conv_in", "conv_out"} if model == "unet" else {"pos_embed.proj", "proj_out_2"})


def test_the_loss_is_that_of_the_noise():
    denoiser = Denoiser(build(RecipeArguments(method="fira-full", model="dit", width=16)).eval())
    denoiser.model.forward = lambda noisy, times, class_labels: type("Found", (), {"sample": noisy})
    images, noise, labels = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2])
    # At the last time hardly anything of the image is left, and the noisy image is the noise.
    last = denoiser(images, labels, noise, torch.full((3,), data.TIMES - 1))
    assert last["loss"] < 1e-3 and last["losses"].shape == (3,)
    first = denoiser(images, labels, noise, torch.zeros(3, dtype=torch.long))
    expected = (images - noise).square().flatten(1).mean(1)
    torch.testing.assert_close(first["losses"], expected, rtol=0.1, atol=0)


@pytest.mark.parametrize("model", ["unet", "dit"])
def test_the_experiments_are_read(model):
    found = find_experiments(RECIPE, model, None)
    assert found.keys() == METHODS.keys()


def test_settings_that_go_together():
    with pytest.raises(ValueError, match="width is 20; it must be a multiple of 16"):
        RecipeArguments(method="lora", model="dit", width=20)
    with pytest.raises(ValueError, match="model is 'flux'; it must be one of unet, dit"):
        RecipeArguments(method="lora", model="flux")
