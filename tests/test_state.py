"""What is saved, loaded, copied and refused."""

import copy
import io
import pickle
import re

import pytest
import torch

from fira_hf import PUBLISHED, FiraAdamW
from reference import assert_resumes, assert_same_run, gradients, weight

SHAPES = [(40, 24), (24, 40), (16, 16), (9,)]  # the last is dense
GROUP = {**PUBLISHED, "rank": 6, "update_proj_gap": 5, "alpha": 0.25}


def parameters(dtype=torch.float32):
    return [weight(s, seed=i, dtype=dtype) for i, s in enumerate(SHAPES)]


def make(params, weight_decay=0.1, names=None, **settings):
    names = names or [f"w{i}" for i in range(len(params))]
    named = list(zip(names, params, strict=True))
    return FiraAdamW(
        [{"params": named[:-1], **GROUP} | settings, {"params": named[-1:]}], lr=1e-2, weight_decay=weight_decay
    )


def gradients_of(params, steps):
    """For each step those of all weights."""
    sequences = [
        gradients(p.shape, steps, seed=i) if p.ndim == 2 else [torch.ones(p.shape)] * steps
        for i, p in enumerate(params)
    ]
    return list(zip(*sequences, strict=True))


def train(optimizer, params, steps, first=0):
    for grads in gradients_of(params, first + steps)[first:]:
        for p, gradient in zip(params, grads, strict=True):
            p.grad = gradient.to(p.dtype)
        optimizer.step()


def through_disk(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def clones(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 4, 5, 7])
def test_resume_is_bit_equal(steps, dtype):
    """Saved after `steps` updates of intervals of five, goes on over two refreshes."""
    params, stop = parameters(dtype), steps
    grads = gradients_of(params, steps + 8)
    if steps == 7:  # a call that was skipped does not move the cadence, before the save and after
        grads.insert(7, [torch.zeros_like(p) for p in params[:-1]] + [None])
        stop += 1
    resumed = assert_resumes(make, params, grads, stop)
    tensors = [value for state in resumed.state.values() for value in state.values() if torch.is_tensor(value)]
    assert {value.dtype for value in tensors} == {torch.float32}


def test_loaded_state_is_a_copy():
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, 3)
    saved = optimizer.state_dict()  # refers to the state of `optimizer`
    kept = copy.deepcopy(saved)
    others = clones(params)
    resumed = make(others)
    resumed.load_state_dict(saved)
    train(resumed, others, 5, first=3)
    for index, state in kept["state"].items():
        for name, value in state.items():
            now = saved["state"][index][name]
            assert torch.equal(now, value) if torch.is_tensor(value) else now == value, name


def test_state_before_the_first_step():
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, 2)  # loading an empty state forgets what was there
    optimizer.load_state_dict(through_disk(make(parameters())))
    assert not any(optimizer.state.values())

    others = clones(params)
    fresh = make(others)
    train(optimizer, params, 6)
    train(fresh, others, 6)
    assert_same_run(optimizer, params, fresh, others)


def test_state_where_some_weights_have_had_no_gradient():
    params = parameters()
    begun = [[first, None, None, None] for first, *_ in gradients_of(params, 3)]
    assert_resumes(make, params, begun + gradients_of(params, 6), stop=3)


@pytest.mark.parametrize(
    ("setting", "theirs", "ours"),
    [
        ("rank", 6, 4),
        ("alpha", 0.25, 1.0),
        ("gamma", 1.01, None),
        ("gamma", None, 1.1),
        ("update_proj_gap", 5, 7),
        ("scaling", "column", "matrix"),
        ("residual", "paper", "reference"),
        ("projection", "other", "svd"),
    ],
)
def test_checkpoint_of_another_setting(setting, theirs, ours):
    params = parameters()
    optimizer = make(params, **({setting: theirs} if theirs != "other" else {}))
    train(optimizer, params, 3)
    saved = through_disk(optimizer)
    saved["param_groups"][0][setting] = theirs
    resumed = make(clones(params), **{setting: ours})
    with pytest.raises(ValueError, match=setting) as error:
        resumed.load_state_dict(saved)
    for value in (theirs, ours):
        assert re.search(rf"(?<![\w.]){re.escape(str(value))}(?![\w.]*\d)", str(error.value)), value


def test_checkpoint_of_other_names():
    params = parameters()
    optimizer = make(params, names=["q_proj", "k_proj", "v_proj", "norm"])
    train(optimizer, params, 3)
    with pytest.raises(ValueError, match="q_proj|up_proj"):
        make(clones(params), names=["up_proj", "k_proj", "v_proj", "norm"]).load_state_dict(through_disk(optimizer))


@pytest.mark.parametrize("named", [True, False])
def test_checkpoint_of_more_targets(named):
    params = [weight(s, seed=i) for i, s in enumerate([(12, 8), (12, 8), (12, 8)])]

    def build(params, projected):
        items = [(f"w{i}", p) for i, p in enumerate(params)] if named else params
        return FiraAdamW([{"params": items[:projected], "rank": 4}, {"params": items[projected:]}])

    optimizer = build(params, 1)
    train(optimizer, params, 2)
    with pytest.raises(ValueError, match="project"):
        build(clones(params), 2).load_state_dict(through_disk(optimizer))
    with pytest.raises(ValueError, match="project|number of parameter"):
        FiraAdamW(clones(params)).load_state_dict(through_disk(optimizer))


def test_checkpoint_of_weights_of_another_shape():
    """Unnamed groups of equal size: only the shapes tell that these are other targets."""
    small, large = weight((12, 8)), weight((20, 8))
    optimizer = FiraAdamW([{"params": [small], "rank": 4}])
    train(optimizer, [small], 2)
    with pytest.raises(ValueError, match=r"shape|12|20"):
        FiraAdamW([{"params": [large], "rank": 4}]).load_state_dict(through_disk(optimizer))


def test_checkpoint_of_adamw():
    """A run that was started with optim="adamw_torch" and is resumed with Fira."""
    params = parameters()
    adam = torch.optim.AdamW([{"params": params[:-1]}, {"params": params[-1:]}])
    train(adam, params, 2)
    with pytest.raises(ValueError, match="project"):
        make(clones(params)).load_state_dict(through_disk(adam))


def test_refused_checkpoint_leaves_the_optimizer_as_it_was():
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, 3)
    others = clones(params)
    twin = make(others)
    twin.load_state_dict(through_disk(optimizer))
    foreign = make(parameters(), rank=4)
    with pytest.raises(ValueError, match="rank"):
        optimizer.load_state_dict(foreign.state_dict())
    train(optimizer, params, 5, first=3)
    train(twin, others, 5, first=3)
    assert_same_run(optimizer, params, twin, others)


def test_learning_rate_of_the_checkpoint_is_restored():
    """torch's rule, which schedulers count on."""
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, 1)
    optimizer.param_groups[0]["lr"] = 0.123
    resumed = make(clones(params))
    resumed.load_state_dict(through_disk(optimizer))
    assert [g["lr"] for g in resumed.param_groups] == [0.123, 1e-2]


def test_only_a_setting_that_differs_is_logged(caplog):
    """Betas that went through JSON, or were sent by another process, are a list."""
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, 1)
    saved = through_disk(optimizer)
    for group in saved["param_groups"]:
        group["betas"] = list(group["betas"])
    resumed = make(clones(params))
    resumed.load_state_dict(saved)
    assert not caplog.messages
    assert resumed.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    saved["param_groups"][0]["betas"] = [0.5, 0.9]
    resumed.load_state_dict(saved)
    told = (
        "betas=(0.5, 0.9) of the checkpoint replaces (0.9, 0.999). For the latter, start a new run from its weights."
    )
    assert caplog.messages == [told]


def test_deepcopy():
    params = parameters()
    optimizer = make(params)
    optimizer.track_statistics = True
    train(optimizer, params, 3)
    twin = copy.deepcopy(optimizer)
    others = [p for group in twin.param_groups for p in group["params"]]
    assert not {id(p) for p in params} & {id(p) for p in others}
    train(optimizer, params, 4, first=3)
    train(twin, others, 4, first=3)
    assert_same_run(optimizer, params, twin, others)
    assert optimizer.pop_statistics() == twin.pop_statistics() != {}


def test_pickle():
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, 3)
    twin = pickle.loads(pickle.dumps(optimizer))
    others = [p for group in twin.param_groups for p in group["params"]]
    train(optimizer, params, 4, first=3)
    train(twin, others, 4, first=3)
    assert_same_run(optimizer, params, twin, others)
    assert twin.pop_statistics() == {}
