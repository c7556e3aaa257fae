"""What a checkpoint goes through on its way: wrappers, hooks, torch.distributed's forms, new names, damage."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from fira_hf import FiraAdamW, FiraConfig, get_fira_optimizer
from reference import weight


class Net(nn.Module):
    """A plain layer, a fused one, a stack of experts, and weights that are not projected."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.qkv, self.norm = nn.Linear(16, 12), nn.Linear(12, 24), nn.LayerNorm(24)
        self.experts = nn.Parameter(0.1 * torch.randn(3, 24, 10))

    def forward(self, x):
        x = self.norm(self.qkv(self.first(x).tanh()))
        return torch.einsum("bi,eio->beo", x, self.experts).square().mean()


CONFIG = FiraConfig(
    rank=4,
    target_modules=["first", "qkv"],
    target_parameters=["experts"],
    split_pattern={"qkv": 3},
    state_dtype="float32",
)


def make(wrap=lambda net: net):
    net = wrap(Net())
    return net, get_fira_optimizer(net, CONFIG)


def train(net, optimizer, steps=3):
    net = getattr(net, "_orig_mod", net)  # nothing is compiled here, only its names are of interest
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(8, 16, generator=generator)).backward()
        optimizer.step()


def buffers(optimizer):
    states = (optimizer.state[p] for group in optimizer.param_groups for p in group["params"])
    return list(map(dict, states))


def assert_same_state(one, other):
    for a, b in zip(buffers(one), buffers(other), strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert torch.equal(value, b[name]) if torch.is_tensor(value) else value == b[name], name


def compile_inside(net):
    net.first = torch.compile(net.first)
    return net


class Adapted(nn.Module):
    """The names of a PEFT model."""

    def __init__(self, net):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = net

    def forward(self, x):
        return self.base_model.model(x)


WRAPS = {
    "plain": lambda net: net,
    "compiled": torch.compile,
    "compiled inside": compile_inside,
    "DDP": nn.DataParallel,  # which gives names as DDP does, without processes
    "PEFT": Adapted,
    "all": lambda net: torch.compile(nn.DataParallel(Adapted(net))),
}


@pytest.mark.parametrize("after", WRAPS)
@pytest.mark.parametrize("before", WRAPS)
def test_wrappers_do_not_matter(before, after):
    net, optimizer = make(WRAPS[before])
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    _, other = make(WRAPS[after])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_state(optimizer, other)


# --------------------------------------------------------------------------- hooks


def test_a_hook_that_changes_what_is_loaded_is_honoured():
    """Torch checks what the hook returns; the moments must come from there, too."""

    def forget_momentum(optimizer, state_dict):
        state_dict = copy.deepcopy(state_dict)
        for state in state_dict["state"].values():
            state["exp_avg"].zero_()
        return state_dict

    net, optimizer = make()
    train(net, optimizer)
    _, other = make()
    other.register_load_state_dict_pre_hook(forget_momentum)
    other.load_state_dict(optimizer.state_dict())
    for ours, theirs in zip(buffers(other), buffers(optimizer), strict=True):
        assert not ours["exp_avg"].any() and torch.equal(ours["exp_avg_sq"], theirs["exp_avg_sq"])


def test_a_hook_that_reorders_by_name():
    """As in the documentation of torch's `load_state_dict`: the names tell which saved state is whose."""

    def by_name(optimizer, state_dict):
        saved = {
            name: state_dict["state"][index]
            for group in state_dict["param_groups"]
            for name, index in zip(group["param_names"], group["params"], strict=True)
        }
        groups = optimizer.state_dict()["param_groups"]
        pairs = (pair for group in groups for pair in zip(group["params"], group["param_names"], strict=True))
        return {"state": {index: saved[name] for index, name in pairs}, "param_groups": groups}

    def build(order):
        named = [(f"w{i}", weight((8 + i, 6), seed=i)) for i in order]
        return FiraAdamW([{"params": named, "rank": 3}])

    optimizer, other = build([0, 1, 2]), build([2, 0, 1])
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(ValueError, match="another order"):
        other.load_state_dict(optimizer.state_dict())
    other.register_load_state_dict_pre_hook(by_name)
    other.load_state_dict(optimizer.state_dict())
    (mine,), (theirs,) = other.param_groups, optimizer.param_groups
    for place, index in enumerate([2, 0, 1]):
        state, expected = other.state[mine["params"][place]], optimizer.state[theirs["params"][index]]
        assert torch.equal(state["exp_avg"], expected["exp_avg"]) and state["exp_avg"].any()


def test_a_hook_after_loading_sees_the_state_and_may_change_it():
    net, optimizer = make()
    train(net, optimizer)
    _, other = make()

    def halve(optimizer):
        for state in optimizer.state.values():
            state["exp_avg"].mul_(0.5)

    other.register_load_state_dict_post_hook(halve)
    other.load_state_dict(optimizer.state_dict())
    for ours, theirs in zip(buffers(other), buffers(optimizer), strict=True):
        assert torch.equal(ours["exp_avg"], 0.5 * theirs["exp_avg"])


def test_a_hook_after_saving_has_the_last_word():
    net, optimizer = make()
    train(net, optimizer)
    optimizer.register_state_dict_post_hook(lambda _, state_dict: {"wrapped": state_dict})
    saved = optimizer.state_dict()
    assert saved.keys() == {"wrapped"} and len(saved["wrapped"]["state"]) == len(list(net.parameters()))


def test_hooks_of_one_call_do_not_stay():
    _, optimizer = make()
    optimizer.load_state_dict(optimizer.state_dict())
    names = [name for name in vars(optimizer) if name.endswith("_hooks")]
    assert len(names) >= 6 and not any(getattr(optimizer, name) for name in names)


# --------------------------------------------------------------------------- torch.distributed's forms


@pytest.mark.parametrize("wrap", ["plain", "compiled", "compiled inside"])
@pytest.mark.parametrize(
    "base_optimizer", ["adamw", "lion", "adafactor", "muon", "muon of a moment in 4 bits", "adamw in int8"]
)
@pytest.mark.parametrize("cpu_offload", [True, False])
@pytest.mark.parametrize("flatten", [True, False])  # flattened and full at once torch cannot load, of AdamW either
def test_every_state_goes_through_the_forms_of_torch_distributed(flatten, cpu_offload, base_optimizer, wrap):
    """torchtitan and transformers save flattened states, which hold tensors and numbers only."""
    options = StateDictOptions(
        flatten_optimizer_state_dict=flatten, full_state_dict=not flatten, cpu_offload=cpu_offload
    )
    config = copy.copy(CONFIG)
    config.base_optimizer = base_optimizer.split()[0]
    if base_optimizer.endswith("bits"):
        config.residual, config.state_dtype = "moment", "int4"
    if base_optimizer.endswith("int8"):
        config.state_dtype = "int8"
    net, fresh = WRAPS[wrap](Net()), Net()
    optimizer, other = (get_fira_optimizer(model, config) for model in (net, fresh))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    saved = get_optimizer_state_dict(net, optimizer, options=options)
    set_optimizer_state_dict(fresh, other, saved, options=options)
    assert_same_state(optimizer, other)
    fresh.load_state_dict({k.replace("_orig_mod.", ""): v for k, v in net.state_dict().items()})
    for model, one in ((net, optimizer), (fresh, other)):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        one.step()
    assert_same_state(optimizer, other)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), fresh.parameters(), strict=True))


# --------------------------------------------------------------------------- other names, other settings


def renamed(old, new, **settings):
    """Optimizers of one adapter under two names, the first one stepped."""
    made = []
    for name in (old, new):
        named = [(f"layer.lora_A.{name}.weight", weight((4, 12))), (f"layer.lora_B.{name}.weight", weight((12, 4)))]
        scale = [(f"layer.scale.{name}", nn.Parameter(torch.ones(4)))]
        made.append(FiraAdamW([{"params": named, "rank": 2, **settings}, {"params": scale}]))
    for group in made[0].param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    made[0].step()
    return made


def test_weights_that_only_have_new_names_have_a_way_out():
    optimizer, other = renamed("default", "sft")
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"lora_A\.default.*remove 'param_names'"):
        other.load_state_dict(saved)
    for group in saved["param_groups"]:
        del group["param_names"]
    other.load_state_dict(saved)
    assert_same_state(optimizer, other)
    assert other.param_groups[0]["param_names"][0] == "layer.lora_A.sft.weight"


def test_dense_weights_of_another_name():
    def build(name):
        return FiraAdamW(
            [{"params": [("layer.weight", weight((4, 12)))], "rank": 2}, {"params": [(name, weight((4,)))]}]
        )

    with pytest.raises(ValueError, match=r"head\.default where.* head\.sft.*remove 'param_names'"):
        build("head.sft").load_state_dict(build("head.default").state_dict())


def test_a_momentum_that_a_schedule_has_moved_is_no_setting_of_a_run_without_it():
    net, optimizer = make()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=20)
    for _ in range(6):
        train(net, optimizer, 1)
        schedule.step()
    _, other = make()
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["betas"] != CONFIG.betas and other.config.betas == CONFIG.betas


@pytest.mark.parametrize("cycles", [True, False])
def test_betas_that_a_schedule_cycles_are_not_reported(cycles, caplog):
    """Every correct resume would log them, once a group: nobody reads a warning that is always there."""

    def build():
        net, optimizer = make()
        options = {"max_lr": 1e-3, "total_steps": 20, "cycle_momentum": cycles}
        return net, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, **options)

    net, optimizer, schedule = build()
    for _ in range(5):
        train(net, optimizer, 1)
        schedule.step()
    _, other, _ = build()
    other.load_state_dict(optimizer.state_dict())
    assert not caplog.messages
    for group in (changed := copy.deepcopy(optimizer.state_dict()))["param_groups"]:
        group["eps"] = 1e-3
    other.load_state_dict(changed)
    told = "eps=0.001 of the checkpoint replaces 1e-06. For the latter, start a new run from its weights."
    assert caplog.messages == [told]  # once, not once a group


@pytest.mark.parametrize("has_schedule", [True, False])
def test_a_rate_that_a_checkpoint_replaces_is_reported(has_schedule, caplog):
    """Of a schedule that is not torch's, such as ReduceLROnPlateau, a checkpoint has no first rate."""

    def build(lr):
        net, optimizer = make()
        for group in optimizer.param_groups:
            group["lr"] = lr
        if has_schedule:
            torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5)
        return net, optimizer

    net, optimizer = build(1e-2)
    train(net, optimizer, 1)
    _, same = build(1e-2)
    same.load_state_dict(optimizer.state_dict())
    assert not caplog.messages
    _, other = build(1e-4)
    other.load_state_dict(optimizer.state_dict())
    told = "lr=0.01 of the checkpoint replaces 0.0001. For the latter, start a new run from its weights."
    assert caplog.messages == [told]


def test_a_state_of_adamw_is_named_as_what_it_is():
    net, optimizer = make()
    other = torch.optim.AdamW(net.parameters())
    train(net, other, 1)
    with pytest.raises(ValueError, match="not Fira's: no weight is projected.*without resume_from_checkpoint"):
        optimizer.load_state_dict(other.state_dict())


# --------------------------------------------------------------------------- what is not whole


def test_what_is_no_state_of_an_optimizer():
    _, optimizer = make()
    for other in ({}, {"model": 1}, {"state": {}}):
        with pytest.raises(ValueError, match="no param_groups"):
            optimizer.load_state_dict(other)


@pytest.mark.parametrize("spoil", ["missing", "shape", "none"])
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step", "basis", "residual_norm"])
def test_a_state_that_is_not_whole_is_named(name, spoil):
    net, optimizer = make()
    train(net, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    index = saved["param_groups"][0]["params"][saved["param_groups"][0]["param_names"].index("first.weight")]
    if spoil == "missing":
        del saved["state"][index][name]
    else:
        saved["state"][index][name] = None if spoil == "none" else torch.zeros(3, 1, 2)
    net, other = make()
    before = buffers(other)
    with pytest.raises(ValueError, match=rf"first\.weight.*{name}.*Resume"):
        other.load_state_dict(saved)
    assert buffers(other) == before


def test_a_setting_that_only_adamw_has():
    p = weight((12,))
    adamw = torch.optim.AdamW([p], amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad=True"):
        FiraAdamW([p]).load_state_dict(adamw.state_dict())


@pytest.mark.parametrize("fused", [False, True])
def test_the_state_of_adamw_goes_on_in_groups_without_rank(fused):
    """Nothing is projected, so it is the same method; what AdamW has not saved is filled in."""
    one, other = weight((12, 4)), weight((12, 4))
    adamw = torch.optim.AdamW([one], lr=1e-2, eps=1e-6, weight_decay=0.0, fused=fused)
    ours = FiraAdamW([other], lr=1e-2)
    for step in range(6):
        one.grad = other.grad = torch.full((12, 4), 0.1 * (step + 1))
        adamw.step()
        if step == 2:
            other.data.copy_(one.data)
            ours.load_state_dict(copy.deepcopy(adamw.state_dict()))
        elif step > 2:
            ours.step()
    assert torch.allclose(one, other, rtol=1e-6)


def test_dense_moments_keep_the_layout_of_their_weight():
    """torch's fused step wants all alike, and another kernel rounds otherwise."""
    p = torch.nn.Parameter(weight((17, 5, 3, 3)).detach().to(memory_format=torch.channels_last))
    optimizer = FiraAdamW([p], lr=1e-2)
    p.grad = torch.ones_like(p)
    optimizer.step()
    other = FiraAdamW([p], lr=1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.state[p]["exp_avg"].stride() == optimizer.state[p]["exp_avg"].stride() == p.stride()
