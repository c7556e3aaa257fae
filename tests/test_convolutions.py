"""Weights of convolutions (out, in, *kernel), each trained as the matrix (out, in * kernel), in any memory format."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from conftest import build_llama, trainer_groups
from fira_hf import PRESETS, PUBLISHED, FiraAdamW, FiraConfig, get_fira_optimizer
from fira_hf.layerwise import step_in_backward
from fira_hf.matrices import matrices_of
from fira_hf.memory import estimate_memory, predict_memory
from fira_hf.targets import find_targets
from fira_hf.whole import decode
from recipes.benchmarks.models import Pretended
from reference import gradients, weight
from test_experts import SETTINGS

# What it is like as a matrix -> shape of the weight.
SHAPES = {
    "1-D": (12, 8, 5),
    "2-D wide": (12, 6, 3, 3),
    "2-D tall": (40, 3, 3, 3),
    "3-D": (12, 4, 2, 2, 2),
    "1 x 1": (24, 16, 1, 1),
    "depthwise": (24, 1, 3, 3),
}
STEPS = 7
GROUP = {**PUBLISHED, "rank": 6, "update_proj_gap": 3, "alpha": 0.25}
ALL = "all-linear-and-conv"


def turned(kernels):
    """The same tensor, with its channels last in memory."""
    return kernels.movedim(1, -1).contiguous().movedim(-1, 1)


def optimizer_of(p, **settings):
    return FiraAdamW([{"params": [p], **GROUP, **settings}], lr=1e-2, weight_decay=0.1)


def folded(kernels, channels_last):
    return (kernels.movedim(1, -1) if channels_last else kernels).flatten(1)


def kernels_and_matrices(shape, channels_last, dtype=torch.float32):
    """Weight and gradients of a convolution, and the same as matrices in the order in which they lie."""
    of_matrices = (weight((shape[0], torch.Size(shape[1:]).numel())).detach(), *of(shape))
    kernels = [x.to(dtype).view(shape) for x in of_matrices]
    matrices = [folded(x, channels_last).clone() for x in kernels]
    return [turned(x) if channels_last else x for x in kernels], matrices


def of(shape):
    return gradients((shape[0], torch.Size(shape[1:]).numel()), STEPS)


def tensors(state):
    return {name: value for name, value in state.items() if torch.is_tensor(value)}


# --------------------------------------------------------------------------- a convolution is its matrix


@pytest.mark.parametrize("settings", [*SETTINGS.values(), {"split": 2}], ids=[*SETTINGS, "groups"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_convolution_trains_as_its_matrix(shape, channels_last, settings):
    dtype = torch.bfloat16 if settings.get("stochastic_rounding") else torch.float32
    (start, *grads), (flat, *of_matrix) = kernels_and_matrices(shape, channels_last, dtype)
    conv, matrix, before = nn.Parameter(start), nn.Parameter(flat), start.clone()
    ours, other = optimizer_of(conv, convolution=True, **settings), optimizer_of(matrix, **settings)
    for one, two in zip(grads, of_matrix, strict=True):
        conv.grad, matrix.grad = one, two
        ours.step()
        other.step()
        assert torch.equal(folded(conv, channels_last), matrix)
    found, expected = tensors(ours.state[conv]), tensors(other.state[matrix])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not torch.equal(conv, before)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_no_copy_is_made_of_weight_and_gradient(shape, channels_last):
    (start, grad, *_), _ = kernels_and_matrices(shape, channels_last)
    p = nn.Parameter(start)
    p.grad = grad
    optimizer = optimizer_of(p, convolution=True)
    (matrix,) = matrices_of(p, optimizer.state, optimizer.param_groups[0])
    assert (matrix.weight.data_ptr(), matrix.grad.data_ptr()) == (p.data_ptr(), grad.data_ptr())


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_gradient_that_lies_otherwise_counts_the_same(channels_last):
    (start, *grads), _ = kernels_and_matrices((12, 6, 3, 3), channels_last)
    one, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a, b = (optimizer_of(p, convolution=True) for p in (one, other))
    for grad in grads:
        one.grad, other.grad = grad, grad.contiguous() if channels_last else turned(grad)
        assert one.grad.stride() != other.grad.stride()
        a.step()
        b.step()
        assert torch.equal(one, other)


def test_the_kernels_take_it_as_its_matrix():
    """The branch of an accelerator, in Triton's interpreter."""
    (start, grad, *_), (flat, of_matrix, *_) = kernels_and_matrices((8, 4, 2, 2), True)
    conv, matrix = Pretended(start.clone()), Pretended(flat)
    conv.grad, matrix.grad = grad, of_matrix
    optimizer_of(conv, convolution=True, **SETTINGS["power"]).step()
    optimizer_of(matrix, **SETTINGS["power"]).step()
    assert torch.equal(folded(conv.detach(), True), matrix.detach())
    assert not torch.equal(conv.detach(), start)


# --------------------------------------------------------------------------- another memory format


@pytest.mark.parametrize("name", ["power", "adafactor", "muon", "columns", "whole moment"])
@pytest.mark.parametrize("shape", [SHAPES["1-D"], SHAPES["2-D wide"], SHAPES["2-D tall"]], ids=str)
@pytest.mark.parametrize("resumes", [False, True], ids=["changed", "resumed"])
def test_the_state_follows_the_memory_format(shape, name, resumes):
    """A run that changes it between two steps, or at a checkpoint, ends where one ends that does not."""
    (start, *grads), _ = kernels_and_matrices(shape, False)
    kept, changed = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a, b = (optimizer_of(p, convolution=True, **SETTINGS[name]) for p in (kept, changed))
    # A block of other columns than before: its moments begin anew, as at any change of columns.
    begins_anew = name == "columns" and shape == SHAPES["2-D tall"]
    for t, grad in enumerate(grads):
        kept.grad, changed.grad = grad, grad if t < 4 else turned(grad)
        if t == 4:
            changed.data = turned(changed.data)
            if resumes:
                saved = io.BytesIO()
                torch.save(b.state_dict(), saved)
                b = optimizer_of(changed, convolution=True, **SETTINGS[name])
                b.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
        a.step()
        b.step()
        if t == 4 and begins_anew:
            assert (a.state[kept]["step"], b.state[changed]["step"]) == (2, 1)
    assert b.state[changed]["channels_last"] and not a.state[kept]["channels_last"]
    assert begins_anew or (changed - kept).norm() <= 1e-5 * (kept - start).norm()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("shape", [SHAPES["3-D"], SHAPES["2-D tall"]], ids=str)
def test_there_and_back_the_state_is_the_same(shape, name):
    (start, grad, *_), _ = kernels_and_matrices(shape, False)
    p = nn.Parameter(start.clone())
    p.grad = grad
    optimizer = optimizer_of(p, convolution=True, **SETTINGS[name])
    optimizer.step()
    begun = tensors(copy.deepcopy(optimizer.state[p]))
    for data in (turned(p.data), p.data.contiguous()):
        p.data = data
        matrices_of(p, optimizer.state, optimizer.param_groups[0])
        now = tensors(optimizer.state[p])
    if name == "4 bits":  # coded with other neighbours in between, each time to the nearest of 15
        codes, scales = ([of[key] for of in (begun, now)] for key in ("exp_avg", "exp_avg_scale"))
        columns = torch.Size(shape[1:]).numel()
        one, other = (decode(code, scale, columns) for code, scale in zip(codes, scales, strict=True))
        assert (one - other).abs().max() <= one.abs().max() / 7
    elif name != "columns":
        assert all(torch.equal(value, begun[key]) for key, value in now.items())


def test_a_weight_that_is_no_matrix_without_a_copy_is_refused():
    p = nn.Parameter(torch.zeros(5, 4, 12, 3).permute(2, 1, 0, 3))
    refused = r"\(12, 4, 5, 3\) lies in memory .*neither contiguous nor channels_last.*p.data = p.data.contiguous\(\)"
    with pytest.raises(ValueError, match=refused):
        optimizer_of(p, convolution=True)
    q = nn.Parameter(p.detach().contiguous())
    optimizer = optimizer_of(q, convolution=True)
    q.data, q.grad = p.data, torch.ones_like(p)
    with pytest.raises(ValueError, match=refused):
        optimizer.step()
    assert not optimizer.state and not q.any()


# --------------------------------------------------------------------------- groups by hand


def test_what_a_group_refuses():
    kernel, matrix = nn.Parameter(torch.zeros(8, 4, 3, 3)), nn.Parameter(torch.zeros(8, 4))
    with pytest.raises(ValueError, match=r"\(8, 4, 3, 3\) cannot be projected.*or set convolution=True"):
        optimizer_of(kernel)
    with pytest.raises(ValueError, match=r"\(8, 4\) is no weight of a convolution"):
        optimizer_of(matrix, convolution=True)
    with pytest.raises(ValueError, match="transposed=True does not go with convolution=True"):
        optimizer_of(kernel, convolution=True, transposed=True)
    with pytest.raises(ValueError, match="split=3 does not divide"):
        optimizer_of(kernel, convolution=True, split=3)


@pytest.mark.parametrize("split", [1, 2])
def test_three_dimensions_are_a_stack_or_a_kernel_as_the_group_says(split):
    """Also where they are loaded: the state of a kernel has no dimension of experts."""
    start, *grads = (x.view(12, 8, 5) for x in (weight((12, 40)).detach(), *of((12, 8, 5))))
    for convolution in (False, True):
        p, resumed = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        settings = {**SETTINGS["staggered"], "convolution": convolution, "split": split}
        optimizer, other = optimizer_of(p, **settings), optimizer_of(resumed, **settings)
        for t, grad in enumerate(grads):
            if t == 4:
                resumed.data.copy_(p.detach())
                other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for each, of_each in ((p, optimizer), (resumed, other)):
                each.grad = grad
                if t >= 4 or of_each is optimizer:
                    of_each.step()
        assert torch.equal(p, resumed)
        count = split * (1 if convolution else 12)
        assert optimizer.state[p]["step"].shape == (() if count == 1 else (count,))


# --------------------------------------------------------------------------- models


class Net(nn.Module):
    """What an image goes through: each kind of convolution, a linear layer, and ends as narrow as an image."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 24, 3, padding=1)
        self.grouped = nn.Conv2d(24, 24, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.line = nn.Conv1d(24, 16, 3, padding=1)
        self.volume = nn.Conv3d(16, 16, 2)
        self.up = nn.ConvTranspose2d(16, 24, 3)
        self.mix = nn.Linear(24, 24)
        self.conv_out = nn.Conv2d(24, 3, 3)

    def forward(self, x):
        x = self.depthwise(self.grouped(self.conv_in(x).tanh()).tanh())
        x = self.line(x.flatten(2)).view(len(x), 16, *x.shape[2:])
        x = self.volume(torch.stack([x, x], dim=2)).squeeze(2)
        return self.conv_out(self.mix(self.up(x.tanh()).movedim(1, -1)).movedim(-1, 1))


def build(memory_format=torch.contiguous_format):
    torch.manual_seed(0)
    model = Net()
    for module in (model.conv_in, model.grouped, model.up, model.conv_out):
        module.to(memory_format=memory_format)
    return model


def backward(model, seed):
    model(torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))).square().mean().backward()


def names(model, **settings):
    return {target.name for target in find_targets(model, FiraConfig(**{"rank": 8, **settings})).projected}


def reasons(model, **settings):
    return {other.name: other.reason for other in find_targets(model, FiraConfig(**{"rank": 8, **settings})).skipped}


MIDDLE = {"grouped.weight", "line.weight", "volume.weight", "up.weight"}


def test_which_convolutions_are_chosen(tmp_path):
    model = build()
    assert names(model) == {"mix.weight"}
    assert reasons(model)["grouped.weight"] == "not a linear layer (Conv2d)"
    assert names(model, target_modules=ALL) == {"mix.weight", "conv_in.weight"} | MIDDLE | {"depthwise.weight"}
    skipped = reasons(model, target_modules="all_linear_and_conv", rank=24, rank_pattern={"conv_in": 8})
    too_narrow = {name for name, reason in skipped.items() if reason == "convolution no wider than its rank"}
    assert too_narrow == {
        "depthwise.weight",
        "conv_out.weight",
        "line.weight",
        "volume.weight",
        "grouped.weight",
        "up.weight",
    }
    with pytest.raises(ValueError, match=f"is a list: write '{ALL}' by itself"):
        names(model, target_modules=[ALL])
    # Of two parts each has 12 outputs.
    assert "grouped.weight" in names(model, target_modules=ALL, rank=11, split_pattern={"grouped": 2})
    with pytest.raises(ValueError, match="split_pattern: 'grouped' matches no projected layer"):
        names(model, target_modules=ALL, rank=12, split_pattern={"grouped": 2})
    # A whole moment is smaller than AdamW's two at any rank.
    assert not reasons(model, target_modules=ALL, **PRESETS["muon-4bit"]).keys() & {
        name for name, p in model.named_parameters() if p.ndim > 1
    }
    assert names(model, target_modules=["up", "conv_out"]) == {"up.weight", "conv_out.weight"}
    assert names(model, target_modules=r"line|volume") == {"line.weight", "volume.weight"}
    assert names(model, target_modules=ALL, exclude_modules=["conv_in", "depthwise"]) == {"mix.weight"} | MIDDLE
    wide = nn.ModuleDict({"mix": nn.Linear(8, 8), "conv": nn.Conv2d(130, 130, 1)})
    for targets in (ALL, ["mix", "onv"]):
        groups = trainer_groups(wide, "fira", targets, tmp_path)
        assert [group["param_names"] for group in groups if group.get("convolution")] == [["conv.weight"]]


def test_a_model_of_convolutions_alone_is_told_the_word():
    model = nn.Sequential(nn.Conv2d(16, 16, 3))
    with pytest.raises(
        ValueError, match="convolutions such as 0 are trained: set target_modules='all-linear-and-conv'"
    ):
        find_targets(model, FiraConfig(rank=8))
    assert names(model, target_modules=ALL) == {"0.weight"}
    with pytest.raises(ValueError, match=r"convolution no wider than its rank\).*name '0' in target_modules"):
        find_targets(model, FiraConfig(target_modules=ALL))


def test_convolutions_that_are_flattened_are_refused():
    model = build()
    model.line.weight = nn.Parameter(model.line.weight.detach().flatten())
    with pytest.raises(ValueError, match=r"line has a weight of shape \(1152,\).*fully_shard"):
        names(model, target_modules=ALL)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"state_dtype": "bfloat16"},
        {"projection": "columns"},
        {"residual": "moment", "base_optimizer": "muon", "state_dtype": "int4"},
    ],
    ids=["fp32", "bf16", "columns", "int4"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_are_those_predicted(settings, dtype):
    model = build(torch.channels_last).to(dtype)
    config = FiraConfig(rank=8, target_modules=ALL, split_pattern={"grouped": 2}, **settings)
    optimizer = get_fira_optimizer(model, config)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    held = sum(value.nbytes for state in optimizer.state.values() for value in tensors(state).values())
    assert held == estimate_memory(model, config).optimizer_state
    assert f"{held:,} bytes" in optimizer.summary
    # conv_out has 3 outputs, which a whole moment does not mind.
    chosen = "9 matrices in 8 weights" if "residual" in settings else "8 matrices in 7 weights"
    assert f"Fira projects {chosen}" in optimizer.summary
    assert not any(torch.equal(p, start[name]) for name, p in model.named_parameters())


def test_what_others_cannot_do_with_convolutions():
    config = FiraConfig(rank=8, target_modules=ALL)
    with pytest.raises(ValueError, match="optimizer='galore' projects matrices and no convolutions such as conv_in"):
        estimate_memory(build(), config, optimizer="galore")
    with pytest.raises(ValueError, match="'all-linear-and-conv' is no word of PEFT's, which lora needs"):
        predict_memory(build_llama().config, ["lora"], FiraConfig(8, target_modules=ALL))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_steps_in_backward_are_the_same(memory_format):
    models = [build(memory_format) for _ in range(2)]
    optimizers = [get_fira_optimizer(model, FiraConfig(rank=8, target_modules=ALL, lr=1e-2)) for model in models]
    step_in_backward(optimizers[1])
    for seed in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            backward(model, seed)
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_adapters_of_convolutions():
    """PEFT's A is a convolution (r, in, *kernel), its B one of a single point (out, r, 1, 1)."""
    model = get_peft_model(
        build(), LoraConfig(r=8, target_modules=["line", "conv_in", "mix"], init_lora_weights=False)
    )
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert len(shapes) == 6 and (8, 3, 3, 3) in shapes.values()
    config = FiraConfig(rank=4, target_modules=ALL, lr=1e-2)
    optimizer = get_fira_optimizer(model, config)
    assert {target.name for target in find_targets(model, config).projected} == shapes.keys()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    backward(model, 0)
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == shapes.keys()
    named = find_targets(model, FiraConfig(rank=4, target_modules=["line"])).projected
    assert len(named) == 2 and all("line.lora_" in target.name for target in named)
