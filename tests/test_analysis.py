"""Scaling factors against their definition, computed slowly; and the callback that records them."""

from __future__ import annotations

import math
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from conftest import build_llama, build_mixtral, launch
from fira_hf import PUBLISHED, FiraAdamW, FiraConfig, get_fira_optimizer
from fira_hf.analysis import measure, sample_rows
from fira_hf.callbacks import AnalysisCallback, read_record
from recipes.pretraining.similarity import similarity
from reference import fira_step, gradients, weight

SHAPES = [(24, 10), (10, 24), (12, 12)]
FIRA = {"optim": "fira", "optim_args": "rank=4, update_proj_gap=3"}
ADAMW = {"optim": "adamw_torch"}


def full_rank_factors(p, state, eps):
    """phi of each entry of the long side of p, (out, in), and of p: from the full moments, one by one, in float64."""
    G, M, V = (x.double() for x in (p.grad, state["exp_avg"], state["exp_avg_sq"]))
    N = M / (V.sqrt() + eps)
    along = 0 if p.shape[0] >= p.shape[1] else 1
    rows = [N.select(along, i).norm() / (G.select(along, i).norm() + 1e-8) for i in range(max(p.shape))]
    return torch.stack(rows), N.norm() / (G.norm() + 1e-8)


# --------------------------------------------------------------------------- one weight


@pytest.mark.parametrize("settings", [{}, {"alpha": 0.25}, {"alpha": 0.25, "residual": "paper", "scaling": "matrix"}])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_projected_weight_is_measured_as_the_equations_say(shape, settings):
    """Both factors whatever the run applies; the limiter's from what the residual was before it, and after."""
    parameter = weight(shape)
    # With the published threshold the limiter would act in all of these few steps.
    group = {**PUBLISHED, "rank": 4, "update_proj_gap": 3, "gamma": 1.1} | settings
    optimizer = FiraAdamW([{"params": [parameter], **group}], lr=1e-2)
    expected, slow = parameter.detach().double(), {}
    factors = []
    for gradient in gradients(shape, 12):
        parameter.grad = gradient
        optimizer.step()
        found = measure(parameter, optimizer.state[parameter], optimizer.param_groups[0])
        basis = optimizer.state[parameter]["basis"]
        previous = slow.get("residual_norm", torch.tensor(math.inf))
        names = {"alpha", "update_proj_gap", "gamma", "scaling", "residual"} & group.keys()
        same = {name: group[name] for name in names}
        expected, slow, _ = fira_step(expected, gradient, slow, rank=4, lr=1e-2, basis=basis, **same)

        G = (gradient if shape[0] >= shape[1] else gradient.T).double()
        Q = slow["basis"]
        R, N = G @ Q, slow["exp_avg"] / (slow["exp_avg_sq"].sqrt() + 1e-6)
        rows, matrix = N.norm(dim=1) / (R.norm(dim=1) + 1e-8), N.norm() / (R.norm() + 1e-8)
        torch.testing.assert_close(found.rows.double(), rows, rtol=1e-4, atol=0)
        torch.testing.assert_close(found.matrix.double(), matrix, rtol=1e-4, atol=0)
        assert found.captured_energy.item() == pytest.approx((R.norm() / G.norm()).square().item(), rel=1e-4)
        assert found.residual_norm.item() == pytest.approx(slow["residual_norm"].item(), rel=1e-3)
        k = 1.0 if group.get("residual") == "paper" else group.get("alpha", 1.0)
        phi = matrix if group.get("scaling") == "matrix" else rows[:, None]
        before = (phi * (G - k * R @ Q.T)).norm()
        factors.append(min(1.0, (1.1 * (previous + 1e-8) / before).item()))
        assert found.limiter.item() == pytest.approx(factors[-1], rel=1e-3)
    assert min(factors) < 0.9 and factors.count(1.0) > 1  # both kinds of steps were there


@pytest.mark.parametrize(
    "limiter", [{"gamma": None}, {"gamma": 0.5, "limiter": "scale"}, {"gamma": 0.5, "limiter": "shrink"}]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_factor_of_every_limiter(limiter, dtype):
    """Exactly 1 where there is none, though the norm is computed again; above 1 where the last residual was larger."""
    parameters = [weight((300, 40), seed) for seed in range(8)]
    group = {**PUBLISHED, "rank": 8, "state_dtype": dtype} | limiter
    optimizer = FiraAdamW([{"params": parameters, **group}])
    factors, previous = [], {}
    for step in zip(*(gradients((300, 40), 8, seed) for seed in range(8)), strict=True):
        for p, gradient in zip(parameters, step, strict=True):
            p.grad = gradient
        optimizer.step()
        for p in parameters:
            found = measure(p, optimizer.state[p], optimizer.param_groups[0])
            after, before = found.residual_norm.item(), previous.get(p)
            expected = limiter["gamma"] or 1.0
            if limiter.get("limiter") == "shrink":
                # ||c S|| = ||S|| / 2 + ||previous|| / 2
                expected = 1.0 if before is None else after / (2 * after - before)
            precision = {"float32": 1e-4, "bfloat16": 1e-2, "int8": 2e-2}[dtype]
            assert found.limiter.item() == pytest.approx(expected, rel=precision)
            factors.append(found.limiter.item())
            previous[p] = after
    if limiter["gamma"] is None:
        assert set(factors) == {1.0}
    if "shrink" in limiter.values():
        assert min(factors) < 0.99 and max(factors) > 1.01


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, FiraAdamW], ids=["torch", "dense"])
def test_a_full_rank_weight_is_measured_from_its_own_moments(kind, shape):
    parameter = weight(shape)
    optimizer = kind([parameter], lr=1e-2, eps=1e-5)
    for gradient in gradients(shape, 4):
        parameter.grad = gradient
        optimizer.step()
        found = measure(parameter, optimizer.state[parameter], optimizer.param_groups[0])
        rows, matrix = full_rank_factors(parameter, optimizer.state[parameter], 1e-5)
        torch.testing.assert_close(found.rows.double(), rows, rtol=1e-5, atol=0)
        torch.testing.assert_close(found.matrix.double(), matrix, rtol=1e-5, atol=0)
        assert found.captured_energy == 1
        assert found.residual_norm.isnan() and found.limiter.isnan()


def test_both_kinds_of_run_agree_where_the_subspace_is_everything():
    """At full rank the two differ only by the coordinates of the moments, which here are the same."""
    parameters = [weight((12, 6)), weight((12, 6))]
    projected = FiraAdamW([{"params": parameters[:1], **PUBLISHED, "rank": 6, "update_proj_gap": 100}], eps=1e-8)
    optimizers = [projected, torch.optim.AdamW(parameters[1:], lr=1e-3)]
    diagonal = torch.zeros(12, 6)
    diagonal[range(6), range(6)] = torch.arange(6.0, 0, -1)  # its singular vectors are the axes
    for gradient in [diagonal, *gradients((12, 6), 4)]:
        for parameter, optimizer in zip(parameters, optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    low, full = (measure(p, o.state[p], o.param_groups[0]) for p, o in zip(parameters, optimizers, strict=True))
    torch.testing.assert_close(low.rows, full.rows)
    torch.testing.assert_close(low.matrix, full.matrix)


@pytest.mark.parametrize("rank", [{}, {**PUBLISHED, "rank": 4}], ids=["full", "projected"])
def test_a_weight_stored_the_other_way_round_has_the_same_factors(rank):
    """A square one, too, whose long side is its output dimension."""
    kept, turned = weight((12, 12)), torch.nn.Parameter(weight((12, 12)).detach().T.clone())
    rows = []
    for p, transposed in ((kept, False), (turned, True)):
        optimizer = FiraAdamW([{"params": [p], **rank, **({"transposed": transposed} if rank else {})}])
        for gradient in gradients((12, 12), 3):
            p.grad = gradient.T.clone() if transposed else gradient
            optimizer.step()
        rows.append(measure(p, optimizer.state[p], optimizer.param_groups[0], transposed=transposed).rows)
    torch.testing.assert_close(*rows, rtol=1e-4, atol=0)


@pytest.mark.parametrize("rank", [{}, {"rank": 4}], ids=["full", "projected"])
def test_what_had_no_gradient_has_no_factor(rank):
    parameter = weight((24, 10))
    optimizer = FiraAdamW([{"params": [parameter], **rank}])
    gradient = gradients((24, 10), 1)[0]
    gradient[3] = 0
    parameter.grad = gradient
    assert all(x.isnan().all() for x in measure(parameter, {}, optimizer.param_groups[0]))  # no step so far
    optimizer.step()
    found = measure(parameter, optimizer.state[parameter], optimizer.param_groups[0])
    assert found.rows.isnan().nonzero().flatten().tolist() == [3]
    assert found.matrix.isfinite() and found.captured_energy.isfinite()
    for bad in (torch.zeros_like(gradient), torch.full_like(gradient, torch.inf)):
        parameter.grad = bad
        assert all(x.isnan().all() for x in measure(parameter, optimizer.state[parameter], optimizer.param_groups[0]))


def test_what_cannot_be_measured_is_refused():
    parameter = weight((24, 10))
    with pytest.raises(RuntimeError, match="(?s)gradient.*gone.*fira_layerwise"):
        measure(parameter, {}, {"eps": 1e-6})
    for p, group in ((torch.nn.Parameter(torch.ones(4, 24, 10)), {}), (parameter, {"split": 3})):
        p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match=r"(?s)shape \((4, )?24, 10\).*stacked and fused.*split_pattern"):
            measure(p, {}, {"eps": 1e-6} | group)


# --------------------------------------------------------------------------- two runs


def slow_similarity(a, b):
    n = len(a)
    dot, norms = sum(x * y for x, y in zip(a, b, strict=True)), [math.sqrt(sum(x * x for x in v)) for v in (a, b)]
    ranks = [[sum(y < x for y in v) for x in v] for v in (a, b)]
    agree = sum(math.copysign(1, (a[i] - a[j]) * (b[i] - b[j])) for i, j in combinations(range(n), 2))
    return {
        "cosine": dot / norms[0] / norms[1],
        "mse": sum((x / norms[0] - y / norms[1]) ** 2 for x, y in zip(a, b, strict=True)) / n,
        "pearson": slow_pearson(a, b),
        "spearman": slow_pearson(*ranks),
        "kendall": agree / (n * (n - 1) / 2),
    }


def slow_pearson(a, b):
    deviations = [[x - sum(v) / len(v) for x in v] for v in (a, b)]
    pairs = [(deviations[i], deviations[j]) for i, j in ((0, 1), (0, 0), (1, 1))]
    products = [sum(x * y for x, y in zip(u, v, strict=True)) for u, v in pairs]
    return products[0] / math.sqrt(products[1] * products[2])


def test_similarity_is_what_its_measures_are_called():
    generator = np.random.default_rng(0)
    a = generator.lognormal(size=40)
    b = 3 * a * generator.lognormal(sigma=0.5, size=40)
    found = similarity(a, b)
    expected = slow_similarity(a.tolist(), b.tolist())
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    unit = a / np.linalg.norm(a), b / np.linalg.norm(b)
    shuffled = [unit[0] @ generator.permutation(unit[1]) for _ in range(2000)]
    # the mean of 2000 draws
    assert found["cosine_shuffled"] == pytest.approx(np.mean(shuffled), abs=5 * np.std(shuffled) / math.sqrt(2000))


def test_equal_and_opposite_runs():
    a = np.random.default_rng(1).lognormal(size=50)
    ones = dict.fromkeys(("cosine", "pearson", "spearman", "kendall"), 1.0)
    for other in (a, 1000 * a):  # no measure knows the scale
        found = similarity(a, other)
        assert {name: found[name] for name in ones} == pytest.approx(ones)
        assert found["mse"] == pytest.approx(0, abs=1e-30)
    opposite = similarity(a, 1 / a)
    assert opposite["spearman"] == pytest.approx(-1) and opposite["kendall"] == pytest.approx(-1)


def test_only_factors_known_of_both_runs_count():
    a, b = np.array([1.0, 2.0, np.nan, 4.0, 5.0]), np.array([2.0, 1.0, 7.0, np.inf, 3.0])
    assert similarity(a, b) == similarity(a[[0, 1, 4]], b[[0, 1, 4]])
    assert similarity(a, b)["n"] == 3
    with pytest.raises(ValueError, match="1 scaling factors"):
        similarity(a[[0, 2, 3]], b[[0, 2, 3]])


def test_the_sampled_rows_are_the_same_in_every_run_and_others_for_every_weight():
    torch.manual_seed(1)
    rows = sample_rows("layers.0.up_proj.weight", 1000, 100)
    torch.manual_seed(2)
    assert torch.equal(rows, sample_rows("layers.0.up_proj.weight", 1000, 100))
    assert not torch.equal(rows, sample_rows("layers.1.up_proj.weight", 1000, 100))
    assert len(rows.unique()) == 100 and rows.min() >= 0 and 900 < rows.max() < 1000
    assert sample_rows("x", 100, 100).tolist() == list(range(100))


# --------------------------------------------------------------------------- the record


class ByHand(TrainerCallback):
    """Gradients and state after every step, by name."""

    def __init__(self):
        self.steps = []

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        linear = {f"{n}.weight": m.weight for n, m in model.named_modules() if n.endswith("_proj")}
        copies = {}
        for name, p in linear.items():
            copy = torch.nn.Parameter(p.detach().clone())
            copy.grad = p.grad.clone()
            own = optimizer.optimizer.state[p]
            copies[name] = copy, {key: x.clone() for key, x in own.items() if torch.is_tensor(x)}
        self.steps.append(copies)


def train(make_trainer, folder, *callbacks, resume=None, **settings):
    settings = {"max_steps": 6, "max_grad_norm": 0.5, "output_dir": str(folder)} | settings
    trainer = make_trainer(build_llama(intermediate_size=150), callbacks=list(callbacks), **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str)
@pytest.mark.parametrize("optimizer", [FIRA, ADAMW], ids=["fira", "adamw"])
def test_the_record_holds_every_second_step(make_trainer, tmp_path, optimizer, more):
    """Of each linear layer but the head, in the step's own clipped gradient; its rows are those that it names."""
    by_hand = ByHand()
    trainer = train(make_trainer, tmp_path, AnalysisCallback(2), by_hand, **optimizer, **more)
    record = read_record(tmp_path)
    assert record.steps.tolist() == [2, 4, 6]
    assert {matrix["name"] for matrix in record.matrices} == set(by_hand.steps[0])
    assert record.rows.shape == (3, sum(min(100, max(matrix["shape"])) for matrix in record.matrices))
    group = next(g for g in trainer.optimizer.optimizer.param_groups if g.get("rank") or optimizer == ADAMW)
    for index, step in enumerate(record.steps):
        for place, (matrix, own) in enumerate(zip(record.matrices, record.slices, strict=True)):
            p, state = by_hand.steps[step - 1][matrix["name"]]
            found = measure(p, state, group)
            np.testing.assert_allclose(record.rows[index, own], found.rows[matrix["rows"]], rtol=1e-6)
            for name, value in zip(("phi", "captured_energy", "residual_norm", "limiter"), found[1:], strict=True):
                np.testing.assert_allclose(getattr(record, name)[index, place], value, rtol=1e-6)
            assert matrix["rank"] == (4 if optimizer == FIRA else None)
    assert np.isfinite(record.rows).all()
    start = dict(build_llama(intermediate_size=150).named_parameters())
    for matrix in record.matrices:
        assert matrix["initial"] == start[matrix["name"]].flatten()[:4].tolist()


def test_accumulated_micro_batches_are_one_step(make_trainer, tmp_path):
    """They give the factors of the batch that they make up."""
    one, two = tmp_path / "one", tmp_path / "two"
    train(make_trainer, one, AnalysisCallback(2), **ADAMW, per_device_train_batch_size=4)
    more = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    train(make_trainer, two, AnalysisCallback(2), **ADAMW, **more)
    np.testing.assert_allclose(read_record(one).phi, read_record(two).phi, rtol=1e-3)


@pytest.mark.parametrize("optimizer", [FIRA, ADAMW], ids=["fira", "adamw"])
def test_recording_changes_nothing(make_trainer, tmp_path, optimizer):
    models = [
        train(make_trainer, tmp_path / str(len(callbacks)), *callbacks, **optimizer).model.state_dict()
        for callbacks in ([], [AnalysisCallback(2)])
    ]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


class Killed(TrainerCallback):
    """Ends the training without a word, after so many steps."""

    def __init__(self, after):
        self.after = after

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("optimizer", [FIRA, ADAMW], ids=["fira", "adamw"])
def test_an_interrupted_record_ends_as_if_it_had_not_been(make_trainer, tmp_path, optimizer):
    """Interrupted three steps after its last checkpoint, with a record made since."""
    saves = {"save_strategy": "steps", "save_steps": 4, "max_steps": 10} | optimizer
    train(make_trainer, tmp_path / "whole", AnalysisCallback(2), **saves)
    killed = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        train(make_trainer, killed, AnalysisCallback(2), Killed(7), **saves)
    assert read_record(killed).steps.tolist() == [2, 4, 6]
    checkpoint = str(killed / "checkpoint-4")
    with pytest.raises(KeyboardInterrupt):
        train(make_trainer, killed, AnalysisCallback(2), Killed(5), resume=checkpoint, **saves)
    assert read_record(killed).steps.tolist() == [2, 4]  # what comes after the checkpoint is made anew
    train(make_trainer, killed, AnalysisCallback(2), resume=checkpoint, **saves)
    assert read_record(killed).steps.tolist() == [2, 4, 6, 8, 10]
    for name in ("analysis.json", "analysis.npy"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_training_that_goes_on_for_longer_keeps_its_record(make_trainer, tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 4} | FIRA
    train(make_trainer, tmp_path, AnalysisCallback(2), max_steps=4, **saves)
    first = np.array(read_record(tmp_path).rows)
    train(make_trainer, tmp_path, AnalysisCallback(2), max_steps=8, resume=str(tmp_path / "checkpoint-4"), **saves)
    record = read_record(tmp_path)
    assert record.steps.tolist() == [2, 4, 6, 8]
    assert np.array_equal(record.rows[:2], first)


def test_a_resume_without_the_earlier_record_is_refused(make_trainer, tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 4} | FIRA
    train(make_trainer, tmp_path, AnalysisCallback(2), **saves)
    checkpoint = str(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match="(?s)continues at step 4.*every 1 steps.*begin anew"):
        train(make_trainer, tmp_path, AnalysisCallback(1), resume=checkpoint, **saves)
    (tmp_path / "analysis.json").unlink()
    with pytest.raises(ValueError, match="(?s)continues at step 4.*every 2 steps.*begin anew"):
        train(make_trainer, tmp_path, AnalysisCallback(2), resume=checkpoint, **saves)
    with pytest.raises(FileNotFoundError, match="AnalysisCallback"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "fira_layerwise", "max_grad_norm": 0}, 'gradients after the step.*fira_layerwise.*optim="fira"'),
        ({"optim": "sgd"}, "Adam's moments.*SGD.*adamw_torch"),
        ({"max_steps": 1} | FIRA, "every 2 steps.*ends after 1"),
    ],
    ids=["layerwise", "sgd", "short"],
)
def test_it_is_refused_before_the_first_step(make_trainer, tmp_path, settings, message):
    by_hand = ByHand()
    with pytest.raises(ValueError, match=message):
        train(make_trainer, tmp_path, AnalysisCallback(2), by_hand, **settings)
    assert not by_hand.steps and not (tmp_path / "analysis.npy").exists()
    with pytest.raises(ValueError, match="steps is 0"):
        AnalysisCallback(0)


def test_scaled_gradients_other_bases_and_stacked_weights_are_refused(tmp_path):
    def begin(model, base_optimizer="adamw", target_modules="all-linear", **settings):
        args = SimpleNamespace(**({"optim": "fira", "fp16": False, "output_dir": ""} | settings))
        config = FiraConfig(rank=4, base_optimizer=base_optimizer, target_modules=target_modules)
        optimizer = get_fira_optimizer(model, config)
        state = SimpleNamespace(max_steps=100, global_step=0, is_world_process_zero=True)
        AnalysisCallback().on_train_begin(args, state, None, model=model, optimizer=optimizer)

    with pytest.raises(ValueError, match="fp16=True.*bf16=True"):
        begin(build_llama(), fp16=True)
    with pytest.raises(ValueError, match="base_optimizer='lion'.*AdamW's moments"):
        begin(build_llama(), base_optimizer="lion")
    with pytest.raises(ValueError, match=r"shape \(4, 80, 32\).*stacked"):
        begin(build_mixtral())
    begin(build_mixtral(), target_modules=["q_proj"], output_dir=str(tmp_path))


DDP = """
import sys
import torch
from transformers import Trainer, TrainingArguments
from conftest import build_llama, build_tokens, trainer_settings
from fira_hf.callbacks import AnalysisCallback

torch.set_num_threads(1)
settings = trainer_settings(output_dir=sys.argv[1]) | {
    "optim": "fira", "optim_args": "rank=4, update_proj_gap=3", "per_device_train_batch_size": 1,
}
callbacks = [AnalysisCallback(2)]
Trainer(build_llama(), TrainingArguments(**settings), train_dataset=build_tokens(), callbacks=callbacks).train()
"""


def test_two_processes_record_what_one_does(make_trainer, tmp_path):
    launch(DDP, tmp_path, 2, str(tmp_path / "two"))
    make_trainer(callbacks=[AnalysisCallback(2)], output_dir=str(tmp_path / "one"), **FIRA).train()
    one, two = (read_record(tmp_path / name) for name in ("one", "two"))
    assert one.matrices == two.matrices and one.steps.tolist() == two.steps.tolist() == [2, 4]
    np.testing.assert_allclose(one.phi, two.phi, rtol=1e-2)
