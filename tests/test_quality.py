"""The quality benchmark: what a run trains, how rates are searched and shared, what the report says of it."""

import json
import math
import threading

import numpy as np
import pytest
import torch

from fira_hf import base_optimizers
from recipes import files, measure
from recipes.benchmarks import peers, report
from recipes.benchmarks.optimizers import build
from recipes.benchmarks.quality import __main__ as command
from recipes.benchmarks.quality import work
from recipes.benchmarks.quality.plan import GRID, Folder, Plan, Run, at, missing_rates, read_methods
from recipes.benchmarks.quality.plan import METHODS as METHODS_FILE
from recipes.benchmarks.quality.report import gather, outcomes
from recipes.benchmarks.quality.train import SIZES, Data, Regime, batches, build_model, load, split_parameters, train

TINY = Regime("tiny", 512, 8)
METHODS = read_methods()
CANDIDATES = read_methods(METHODS_FILE.with_name("candidates.yaml"))
PACKAGES = {"apollo-torch": "apollo_torch", "galore-torch": "galore_torch", "adamw-8bit": "bitsandbytes"}


@pytest.fixture(scope="module")
def data():
    return load("embedded")


def weight_of(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    p = torch.nn.Parameter(torch.randn(rows, columns, generator=generator))
    p.grad = torch.randn(rows, columns, generator=generator)
    return p


# The training run.


def test_the_models_are_of_the_size_that_their_name_says():
    totals = {"1m": 869_504, "3m": 3_295_488, "10m": 10_818_432}
    for name, total in totals.items():
        with torch.device("meta"):
            model = build_model(SIZES[name])
        matrices, dense = split_parameters(model)
        assert sum(p.numel() for p in model.parameters()) == total
        assert len(matrices) == 7 * SIZES[name].layers
        assert sum(p.numel() for p in matrices) > 0.92 * total and len(dense) == 2 * SIZES[name].layers + 3


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_keeps_the_state_that_is_told_of_it(name, data):
    """Bytes by hand, for the rank 8 at the width 32: four square matrices, two of (88, 32) and one of (32, 88)."""
    method = METHODS[name]
    if method["optimizer"] in PACKAGES:
        pytest.importorskip(PACKAGES[method["optimizer"]], reason="a peer, installed for the benchmarks only")
    found = train(method, method["rate"], Regime("tiny", 1024, 24), 0, data)
    assert found["status"] == "ok" and found["history"][-1]["loss"] == found["loss"]
    assert found["loss"] < 4.2 < found["history"][0]["loss"]  # from log 256 = 5.55
    elements, shapes = 4 * 32 * 32 + 3 * 32 * 88, [32] * 4 + [88] * 3
    r = found["rank"]
    low_rank = {  # numbers of fp32
        "galore": sum(32 * r + 2 * long * r for long in shapes),
        "apollo": sum(32 * r + 2 * long * r + 1 for long in shapes),  # and the norm of the last update
        "apollo-mini": sum(32 + 2 * long + 1 for long in shapes),
        "fira": sum(32 * r + 2 * long * r + 1 for long in shapes),
        "fira-hf": sum(32 * r + 2 * long * r + 2 for long in shapes),
        "sumo": sum(32 * r + long * r for long in shapes),
        # Two moments in a quarter of the columns, and which ones these are.
        "frugal": 4 * (2 * 32 + 1) * 8 + 2 * (2 * 88 + 1) * 8 + (2 * 32 + 1) * 22,
    }
    low_rank |= dict.fromkeys([n for n in METHODS if n.startswith("fira-hf")], low_rank["fira-hf"])
    del low_rank["fira-hf-half-int8"]  # bytes; below
    if name in low_rank:
        assert found["state_bytes"] == 4 * low_rank[name]
    expected = {
        "adamw": 8 + 28 / elements,  # a step count each
        "adamw-095": 8 + 28 / elements,
        "adamw-8bit": 2 + (2 * 4 / 256 * elements + 2 * 4 * 256) / elements,  # scales of blocks, and two code tables
        "muon": 4,
        "muon-09": 4,
        "muon-int8": 1 + 4 / 256,
        "lora": (8 * r * sum(32 + long for long in shapes) + 4 * 14) / elements,
        "scale": 0,
        "sinkgd": 0,
    }
    # Codes and scales of 32 weights (88 are filled up to 96), and two numbers; the bases are bf16.
    groups = sum((*[32] * 4, 88, 88, 32 * 3))
    expected["subspace-muon"] = (18 * groups + 7 * (2 * 32 * r + 8)) / elements
    expected |= {name: (size * groups + 7 * 8) / elements for name, size in (("muon-4bit", 18), ("muon-8bit", 34))}
    # Codes, and a scale (bf16) for each row of a basis and of both moments; and two numbers.
    expected["fira-hf-half-int8"] = sum((32 + 2 * long) * (r + 2) + 8 for long in shapes) / elements
    if name in expected:
        assert found["bytes_a_weight"] == pytest.approx(expected[name], abs=2e-3)
    assert name in low_rank or name in expected


def test_a_run_is_the_seeds_and_sees_every_block_once_before_any_twice(data):
    method = METHODS["muon"]
    one, same, other = (train(method, 1e-2, TINY, seed, data)["loss"] for seed in (0, 0, 1))
    assert one == same != other
    blocks = np.arange(5 * 256, dtype=np.int64).reshape(5, 256)
    drawn = batches(blocks, 2, seed=3)
    rows = [int(row[0]) // 256 for _ in range(5) for row in next(drawn)]
    assert sorted(rows[:5]) == sorted(rows[5:]) == [0, 1, 2, 3, 4] and rows[:5] != rows[5:]


def test_validation_is_spread_over_the_text(tmp_path):
    (tmp_path / "train.txt").write_text("a" * 1000)
    (tmp_path / "valid.txt").write_bytes(b"".join(bytes([65 + n // 20]) * 256 for n in range(1000)))
    found = load(str(tmp_path))
    firsts = found.valid[:, 0]
    assert found.valid.shape == (256, 256) and len(found.train) == 3
    assert firsts[0] == 65 and firsts[-1] == 65 + 999 // 20 and set(np.diff(firsts.astype(int))) == {0, 1}
    (tmp_path / "valid.txt").write_text("short")
    with pytest.raises(ValueError, match="valid text .* has 5 bytes"):
        load(str(tmp_path))


def test_what_diverges_has_no_loss_and_stops(data):
    steps = []
    regime = Regime("tiny", 512, 24)  # validated after every third step
    found = train(METHODS["sinkgd"], 1e30, regime, 0, data, progress=lambda step, loss: steps.append(step))
    assert (found["status"], found["loss"], found["history"]) == ("diverged", None, []) and steps == [1]
    json.dumps(found, allow_nan=False)


# The peers.


def test_sinkgd_brings_rows_and_columns_to_one_norm():
    p = weight_of(40, 90)
    p.grad[3] *= 100
    p.grad[:, 5] *= 0.01
    before = p.detach().clone()
    build("sinkgd", [p], 1.0, 8, 10).step()
    update = before - p.detach()
    for dim, length in ((0, 40), (1, 90)):
        assert torch.allclose(update.norm(dim=dim), torch.tensor(0.2 * math.sqrt(length)), rtol=2e-3)


def test_scale_brings_the_weights_of_each_output_to_one_norm():
    p = weight_of(40, 90)
    before = p.detach().clone()
    build("scale", [p], 0.5, 8, 10).step()
    update = before - p.detach()
    assert torch.allclose(update.square().mean(1).sqrt(), torch.tensor(0.1), rtol=1e-4)
    cosine = torch.nn.functional.cosine_similarity(update, p.grad, dim=1)
    assert torch.allclose(cosine, torch.tensor(1.0))


def test_muon_in_int8_is_near_muon():
    exact, coarse = weight_of(64, 96), weight_of(64, 96)
    start = exact.detach().clone()
    optimizers = [build(name, [p], 1e-2, 8, 10) for name, p in (("muon", exact), ("muon-int8", coarse))]
    for seed in range(10):
        for p, optimizer in zip((exact, coarse), optimizers, strict=True):
            p.grad = weight_of(64, 96, seed).grad
            optimizer.step()
    moved = (exact - start).norm()
    assert 0 < (exact - coarse).norm() < 0.05 * moved
    state = optimizers[1].state[coarse]
    assert state["codes"].dtype == torch.int8 and set(state) == {"codes", "scales"}
    values = torch.randn(7, 50)
    assert (peers.decode(*peers.encode(values), values) - values).abs().max() <= values.abs().max() / 254 * 1.001


# What a step could be made of.


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_every_candidate_goes_downhill(name, shape):
    """Of ||W||^2, in a dozen steps."""
    method, p = CANDIDATES[name], weight_of(*shape)
    optimizer = build(method["optimizer"], [p], 3e-2, method.get("rank") or 8, 3, **method.get("settings", {}))
    before = p.norm()
    for _ in range(12):
        p.grad = p.detach().clone()
        optimizer.step()
    assert p.norm() < 0.998 * before and p.isfinite().all()


def test_one_block_of_all_columns_is_muon():
    one, other = weight_of(40, 24), weight_of(40, 24)
    start = one.detach().clone()
    optimizers = [
        build("candidate", [one], 1e-2, 24, 10, moment="full", subspace="blocks", beta=0.95),
        build("muon", [other], 1e-2, 24, 10),
    ]
    for seed in range(8):
        for p, optimizer in zip((one, other), optimizers, strict=True):
            p.grad = weight_of(40, 24, seed).grad
            optimizer.step()
    assert (one - other).norm() < 0.02 * (other - start).norm()


def test_the_parts_of_a_candidates_update():
    """Leading directions with singular values near 1, and rows and columns of what is left as they are said to be."""
    for residual, dim in (("rows", 1), ("rows-columns", 0)):
        p = weight_of(64, 32)
        before, G = p.detach().clone(), p.grad
        optimizer = build("candidate", [p], 1.0, 4, 10, moment="full", residual=residual)
        optimizer.step()
        update, Q = (before - p.detach()) / (0.2 * math.sqrt(64)), optimizer.state[p]["basis"]
        leading = base_optimizers.orthogonalized((G @ Q)[None])[0]
        assert (update @ Q - leading).norm() < 0.4 * leading.norm()
        rest, scaled = G - G @ Q @ Q.T, update - leading @ Q.T
        norms = scaled.norm(dim=dim)
        assert torch.allclose(norms, norms.mean().expand_as(norms), rtol=1e-3)
        assert scaled.norm() == pytest.approx(math.sqrt(28), rel=1e-3)
        assert (scaled.sign() == rest.sign()).float().mean() > 0.99


@pytest.mark.parametrize("bits", [4, 8])
def test_a_rounded_moment_has_few_levels_and_the_right_mean(bits):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, 32, generator=generator)
    rounded = torch.stack([peers.decode(*peers.encode(values, 32, bits, generator), values) for _ in range(400)])
    assert max(len(row.unique()) for row in rounded[0]) <= 2**bits - 1
    step = values.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((rounded[0] - values).abs() <= step * 1.001).all()
    assert ((rounded.mean(0) - values).abs() <= 0.15 * step).all()  # six standard errors


def test_an_unknown_setting_of_a_candidate_is_an_error():
    with pytest.raises(ValueError, match="no moments; it has moment, subspace"):
        build("candidate", [weight_of(8, 8)], 1.0, 4, 10, moments="full")


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_sumo_is_a_polar_factor_in_its_subspace_and_the_gradient_outside(shape):
    p = weight_of(*shape)
    before, G = p.detach().clone(), p.grad
    optimizer = build("sumo", [p], 1.0, 6, 10)
    optimizer.step()
    update = before - p.detach()
    G, update = (G, update) if shape[0] > shape[1] else (G.T, update.T)
    Q = optimizer.state[p]["basis"]
    values = torch.linalg.svdvals(Q.T @ update)
    assert torch.allclose(values, torch.full_like(values, 0.2 * math.sqrt(40)), rtol=1e-4)
    assert torch.allclose(update - Q @ Q.T @ update, G - Q @ Q.T @ G, atol=1e-4)


def test_frugal_is_adam_in_its_columns_and_the_sign_outside():
    p = weight_of(12, 40)
    optimizer = build("frugal", [p], 1.0, 3, 4, free_scale=0.5)
    seen = set()
    for _ in range(8):
        before = p.detach().clone()
        optimizer.step()
        update, columns = before - p.detach(), optimizer.state[p]["columns"].long()
        free = torch.ones(40, dtype=torch.bool)
        free[columns] = False
        assert len(columns) == 10  # a quarter, as 3 is of 12
        assert torch.allclose(update[:, free], 0.5 * p.grad.sign()[:, free], atol=1e-6)
        # Of one and the same gradient Adam's step has its sign, too, from the first step after each new choice.
        assert torch.allclose(update[:, columns], p.grad.sign()[:, columns], atol=1e-4)
        seen.add(tuple(columns.tolist()))
    assert len(seen) == 2


def test_a_tensor_that_states_share_counts_once():
    a, b = weight_of(4, 4), weight_of(4, 4)
    optimizer = torch.optim.SGD([a, b])
    table = torch.zeros(10)
    optimizer.state[a], optimizer.state[b] = {"table": table, "own": torch.zeros(2)}, {"table": table}
    assert measure.state_bytes(optimizer) == 4 * 12


# The search.


def test_the_grid_is_1_3_10():
    assert [at(index) for index in (-7, -6, -5, -4, 0, 1)] == [3e-4, 1e-3, 3e-3, 1e-2, 1.0, 3.0]
    assert all(at(index) == rate for rate, index in GRID.items())


@pytest.mark.parametrize(
    ("best", "first", "tried"),
    [(3e-3, 3e-3, 3), (1e-2, 1e-3, 4), (1e-4, 1e-2, 6), (1.0, 1.0, 3)],
)
def test_a_search_ends_when_both_neighbours_are_worse(best, first, tried):
    """Of a bowl around the best rate, wherever it begins; what diverges, above 0.5, counts as worse."""
    losses = {}
    while missing := missing_rates(losses, first):
        for rate in missing:
            losses[rate] = math.inf if rate > 1.5 else abs(math.log(rate / best))
    index = GRID[min(losses, key=losses.get)]
    assert at(index) == best and {at(index - 1), at(index + 1)} <= set(losses)
    assert len(losses) == tried + 1 if first != best else len(losses) == tried


def test_a_search_where_all_diverges_goes_down_and_ends():
    losses = {}
    while missing := missing_rates(losses, 1e-2):
        losses |= dict.fromkeys(missing, math.inf)
    assert max(losses) == 1e-2 and min(losses) == min(GRID)


class Trainer:
    """In place of `train`: the loss is a bowl in the logarithm of the rate; it remembers what it was asked for."""

    def __init__(self, **bests):
        self.bests, self.asked, self.lock = bests, [], threading.Lock()
        self.meanwhile = lambda: None

    def __call__(self, method, lr, regime, seed, data, progress=None, device=None):
        with self.lock:
            self.asked.append((method["label"], lr, seed))
        self.meanwhile()
        loss = 1 + abs(math.log(lr / self.bests[method["label"]]))
        history = [{"step": step, "loss": loss + 2 / step} for step in (4, 8)]
        about = {"status": "ok", "loss": loss, "history": history, "tokens": 4096, "parameters": 10**6}
        return about | {"rank": 8, "state_bytes": 100, "bytes_a_weight": 2.0, "seconds": 1.0}


@pytest.fixture
def folder(tmp_path, data):
    methods = {name: {"label": name, "optimizer": "adamw", "rate": 1e-3} for name in ("adamw", "muon", "late")}
    return Folder(tmp_path / "runs", data, methods)


@pytest.fixture
def trainer(monkeypatch):
    one = Trainer(adamw=1e-3, muon=1e-2, late=3e-4)
    monkeypatch.setattr(work, "train", one)
    monkeypatch.setattr(work, "WAIT", 0.01)
    return one


def run(plan):
    told = []
    assert work.work(plan, ["python"], told.append) == 0
    return told


def test_first_rates_come_first_and_other_seeds_at_the_best_rate_alone(folder, trainer):
    run(Plan(folder, list(folder.methods), TINY, [5, 6], search=True))
    assert trainer.asked[:3] == [("adamw", 1e-3, 5), ("muon", 1e-3, 5), ("late", 1e-3, 5)]
    rates = {name: sorted(folder.losses(name, TINY, 5)) for name in folder.methods}
    assert rates["adamw"] == [3e-4, 1e-3, 3e-3]
    assert rates["muon"] == [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    assert rates["late"] == [1e-4, 3e-4, 1e-3]
    assert {(label, lr) for label, lr, seed in trainer.asked if seed == 6} == set(trainer.bests.items())
    assert len(trainer.asked) == len(set(trainer.asked))


def test_what_was_interrupted_goes_on_and_runs_nothing_twice(folder, trainer):
    plan = Plan(folder, list(folder.methods), TINY, [0], search=True)

    def interrupt():
        if len(trainer.asked) == 5:
            raise KeyboardInterrupt

    trainer.meanwhile = interrupt
    with pytest.raises(KeyboardInterrupt):
        run(plan)
    lost, done = trainer.asked[-1], trainer.asked[:-1]
    assert len(list(folder.path.glob("*.json"))) == 4 and not list(folder.path.glob("*.tmp"))
    trainer.asked, trainer.meanwhile = [], lambda: None
    run(plan)
    assert lost in trainer.asked and not set(done) & set(trainer.asked)
    trainer.asked = []
    assert run(plan) == [] == trainer.asked


def test_two_workers_share_the_runs(folder, trainer):
    plan = Plan(folder, list(folder.methods), TINY, [0, 1], search=True)
    together = threading.Barrier(2, timeout=20)
    waiting = iter(range(2))  # the first run of each worker waits for the other's: they do work side by side
    trainer.meanwhile = lambda: together.wait() if next(waiting, None) is not None else None
    workers = [threading.Thread(target=run, args=(plan,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    # Of one worker, whatever is tried in vain because the other's loss is not yet known comes on top.
    assert 11 + 3 <= len(trainer.asked) == len(set(trainer.asked)) == len(list(folder.path.glob("*.json"))) <= 13 + 3
    assert plan.wanted() == [] and not list(folder.path.glob("*.claim"))


def test_what_another_has_finished_meanwhile_is_not_run_again(folder, trainer, monkeypatch):
    plan = Plan(folder, ["muon"], TINY, [0], rates=[1e-2])
    stale = [plan.wanted()]  # as a worker has read it before the other one was done
    run(plan)
    monkeypatch.setattr(Plan, "wanted", lambda self: stale.pop() if stale else [])
    run(plan)
    assert trainer.asked == [("muon", 1e-2, 0)]


def test_a_claim_is_of_one_process_and_outlives_none(tmp_path):
    path = tmp_path / "a.claim"
    path.touch()  # as a killed process leaves it
    with work.claim(path) as one, work.claim(path) as other:
        assert one and not other
    with work.claim(path) as again:
        assert again


def test_rates_around_begin_where_the_search_ended_and_go_on_at_the_edge(folder, trainer):
    run(Plan(folder, ["muon"], TINY, [0], search=True))
    trainer.asked, trainer.bests["muon"] = [], 1e-1
    longer = Regime("tiny", 512, 16)
    run(Plan(folder, ["muon"], longer, [0, 1], rates=["around"], searched=TINY))
    assert sorted(lr for _, lr, seed in trainer.asked if seed == 0) == [3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
    assert [lr for _, lr, seed in trainer.asked if seed == 1] == [1e-1]


def test_given_rates_run_with_all_seeds_and_adamws_is_its_best(folder, trainer):
    run(Plan(folder, ["adamw"], TINY, [0], search=True))
    trainer.asked = []
    run(Plan(folder, ["muon", "late"], TINY, [0, 1], rates=["adamw", 2e-2]))
    assert set(trainer.asked) == {(n, lr, seed) for n in ("muon", "late") for lr in (1e-3, 2e-2) for seed in (0, 1)}


def test_a_run_that_fails_is_told_and_the_others_go_on(folder, trainer, capsys):
    def fail():
        if trainer.asked[-1][0] == "muon":
            raise RuntimeError("no such thing")

    trainer.meanwhile = fail
    told = []
    plan = Plan(folder, list(folder.methods), TINY, [0], search=True)
    assert work.work(plan, ["python"], told.append) == 1
    assert [what for what in told if what[0] == "failed"] == [
        ("failed", "muon-tiny-b512-s8-lr0.001-seed0", "RuntimeError: no such thing")
    ]
    assert len(folder.losses("late", TINY, 0)) == 3 and not folder.losses("muon", TINY, 0)


def test_runs_of_another_text_or_other_settings_are_not_taken_for_these(folder, trainer):
    plan = Plan(folder, ["muon"], TINY, [0], rates=[1e-2])
    run(plan)
    other = Folder(folder.path, Data("other", "0" * 12, folder.data.train, folder.data.valid), folder.methods)
    with pytest.raises(ValueError, match="of the text embedded, not of other.*another --output_dir"):
        Plan(other, ["muon"], TINY, [0], rates=[1e-2]).wanted()
    folder.methods["muon"] = folder.methods["muon"] | {"settings": {"momentum": 0.9}}
    with pytest.raises(ValueError, match=r"momentum.*another name, or delete its runs"):
        plan.wanted()
    folder.methods["muon"] = {"label": "called otherwise", "optimizer": "adamw", "rate": 1e-1}
    assert plan.wanted() == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--search looks for the best ones"),
        (["--search", "--methods", "adam"], "no method 'adam'; there are adamw"),
        (["--rates", "1e-3,fast"], "--rates has 'fast'; write positive numbers"),
        (["--rates", "-1"], "--rates has '-1'"),
        (["--search", "--seeds", "a"], "--seeds is 'a'"),
        (["--search", "--size", "2m"], "size is '2m'; there are tiny, 1m"),
        (["--search", "--batch", "100"], "multiple of 256"),
        (["--search", "--data", "nowhere"], "nowhere"),
        (["--search", "--workers", "0"], "at least one has to work"),
        (["--search", "--device", "cuda"], "torch sees no CUDA device here"),
        (["--rates", "around", "--size", "3m", "--methods", "muon"], "no run of muon in 1m-b4096-s400"),
        (["--rates", "around", "--methods", "muon"], "another regime"),
        (["--rates", "adamw", "--methods", "muon"], "no run of adamw in 1m-b4096-s400"),
        (["--rates", "around", "--searched", "1m"], "write size,batch,steps"),
    ],
)
def test_what_cannot_be_meant_says_the_way_out(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--output_dir", str(tmp_path / "runs"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a: {optimizer: adamw, rate: 2.0e-3}", "1 or 3 times a power of ten"),
        ("a: {optimizer: adamv, rate: 1.0e-3}", "'adamv'; there are adamw"),
        ("a: {optimizer: adamw, rate: 1.0e-3, gap: 3}", "unknown gap; known are interval"),
        ("a/b: {optimizer: adamw, rate: 1.0e-3}", "names files"),
    ],
)
def test_a_methods_file_that_is_wrong_says_so(line, message, tmp_path):
    path = tmp_path / "methods.yaml"
    path.write_text(line)
    with pytest.raises(ValueError, match=message):
        read_methods(path)
    path.write_text("a: {optimizer: adamw, rate: 1e-3}")  # which YAML takes for a word
    assert read_methods(path)["a"]["rate"] == 1e-3


# The command, and what becomes of its runs.


def test_the_command_trains_on_the_embedded_text_in_two_processes_and_is_reported(tmp_path, capsys):
    """From the command to the page: table and pictures."""
    runs = tmp_path / "quality"
    words = ["--size", "tiny", "--batch", "256", "--steps", "8", "--output_dir", str(runs)]
    assert command.main([*words, "--methods", "adamw,sinkgd,fira-hf", "--rates", "3e-3,1e-2", "--seeds", "0,1"]) == 0
    assert len(list(runs.iterdir())) == 12
    one = files.read_json(runs / "fira-hf-tiny-b256-s8-lr0.01-seed1.json")
    assert one["data"]["name"] == "embedded" and one["tokens"] == 8 * 256 and len(one["history"]) == 8
    assert one["provenance"]["cpu_threads"] == 1 and "--rates 3e-3,1e-2" in one["provenance"]["command"]
    assert 3 < one["loss"] < 5.6

    pages = tmp_path / "docs"
    (pages / "benchmarks").mkdir(parents=True)
    (pages / "page.md").write_text("Before.\n<!-- table: quality -->\n<!-- end -->\nAfter.\n")
    assert report.main([str(pages / "benchmarks"), "--gather", str(runs)]) == 0
    page = (pages / "page.md").read_text()
    assert "| fira_hf |" in page and "| SinkGD |" in page and page.endswith("<!-- end -->\nAfter.\n")
    for kind in ("tokens", "state", "distance"):
        assert (pages / "benchmarks" / f"quality-{kind}.png").stat().st_size > 10_000

    # What is gathered is known elsewhere: of the same command nothing is run again, and one run more is one run.
    known, other = pages / "benchmarks" / "quality.json", tmp_path / "other"
    words = ["--size", "tiny", "--batch", "256", "--steps", "8", "--output_dir", str(other), "--known", str(known)]
    words += ["--workers", "1"]
    assert command.main([*words, "--methods", "adamw,sinkgd", "--rates", "3e-3,1e-2,3e-2"]) == 0
    assert len(list(other.glob("*.json"))) == 12 + 2
    again = files.read_json(other / "fira-hf-tiny-b256-s8-lr0.01-seed1.json")
    assert again.keys() == one.keys() and again["provenance"].keys() == one["provenance"].keys()
    assert {k: again[k] for k in one if k not in ("history", "seconds", "provenance")} == {
        k: one[k] for k in one if k not in ("history", "seconds", "provenance")
    }
    assert again["history"] == [{**point, "loss": round(point["loss"], 4)} for point in one["history"]]
    assert command.main([*words[:-4], "--known", str(tmp_path / "none.json"), "--rates", "1e-2"]) == 2
    assert "holds no gathered runs" in capsys.readouterr().err


def test_the_table_says_what_the_runs_say(folder, trainer, tmp_path):
    run(Plan(folder, list(folder.methods), TINY, [0, 1], search=True))
    run(Plan(folder, ["muon"], TINY, [0], rates=["adamw"]))
    diverged = folder.path / f"{Run('late', TINY, 1e-3, 0).name}.json"
    files.write_json(diverged, files.read_json(diverged) | {"loss": None, "status": "diverged", "history": []})
    content = gather(folder.path)
    assert len(content["provenance"]) == 1 and len(content["regimes"]) == 1
    third = math.log(10 / 3)
    rows = {one.name: one for one in outcomes(content, content["regimes"][0])}
    muon, late = rows["muon"], rows["late"]
    assert (muon.lr, muon.losses) == (1e-2, {0: 1, 1: 1})
    assert muon.beside(-1) == pytest.approx(1 + third) and muon.beside(1) == pytest.approx(1 + math.log(3))
    assert muon.by_rate[rows["adamw"].lr] == pytest.approx(1 + math.log(10))
    assert muon.curve == [1.5, 1.25] and math.isinf(late.by_rate[1e-3])
    table = report.quality.table(content)
    assert "| muon | 1.000 | 1.000 of 2 (1.000 to 1.000) | 0.01 | 2.204 | 2.099 | 3.303 | 2.00 |" in table
    files.write_json(diverged, files.read_json(diverged) | {"data": {"name": "x", "digest": "y"}})
    with pytest.raises(ValueError, match="different texts"):
        gather(folder.path)
