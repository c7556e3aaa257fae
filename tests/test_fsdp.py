"""FSDP2 (`fully_shard`): several processes, gloo."""

from __future__ import annotations

import pytest
import torch

from conftest import launch

COMMON = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parameters_to_vector
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from fira_hf import FiraConfig, get_fira_optimizer

ROWS = 96
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()

class Model(torch.nn.Module):
    \"\"\"Tall, wide and square matrices, one stored (in, out), one with fewer rows than processes, a stack, two
    convolutions.\"\"\"

    def __init__(self):
        super().__init__()
        widths = [(96, 161), (161, 100), (100, 100), (100, 80)]
        self.layers = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in widths)
        self.layers.insert(3, Conv1D(100, 100))
        self.experts = torch.nn.Parameter(torch.randn(5, 80, 80) / 9)
        self.convolutions = torch.nn.ModuleList([torch.nn.Conv1d(8, 20, 3, padding=1), torch.nn.Conv1d(20, 80, 1)])
        self.norm = torch.nn.LayerNorm(80)
        self.head = torch.nn.Linear(80, 2)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        for i, expert in enumerate(self.experts):
            chosen = torch.arange(len(x)) % 4 == i  # the last one is never chosen
            x = x + chosen[:, None] * torch.tanh(x @ expert)
        wide, tall = self.convolutions
        x = x + tall(torch.tanh(wide(x.unflatten(1, (8, 10))))).mean(2)
        x = self.norm(x)
        return torch.cat([x, self.head(x)], dim=1)

def build(sharded, replicas=1):
    torch.manual_seed(0)
    model = Model()
    if sharded:
        mesh = init_device_mesh("cpu", (replicas, world // replicas), mesh_dim_names=("replicas", "shards"))
        mesh = mesh if replicas > 1 else mesh["shards"]
        for layer in [*model.layers, model.head]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model

def prepare(model, **settings):
    defaults = {"projection": "power", "moments": "rotated", "weight_decay": 0.1, "lr": 1e-3}
    defaults |= {"rank": 8, "update_proj_gap": 6, "target_parameters": ["experts"]}
    defaults |= {"target_modules": "all-linear-and-conv"}
    return get_fira_optimizer(model, FiraConfig(**(defaults | settings)))

def train(model, optimizer, first, last, sharded, watch=None):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(ROWS, 178, generator=generator)
        if sharded:
            batch = batch[rank * ROWS // world : (rank + 1) * ROWS // world]
        inputs, targets = batch.split((96, 82), dim=1)
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        with watch or torch.enable_grad():
            optimizer.step()
        optimizer.zero_grad()

def full(model):
    parts = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return parameters_to_vector([p.detach() for p in parts])
"""

EQUAL = (
    COMMON
    + """
class Sent(TorchDispatchMode):
    \"\"\"Largest tensor that a collective was given, and how many there were.\"\"\"
    largest = count = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what generic dispatch sends comes by here
        if "c10d" in function.namespace:
            tensors = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
            self.largest = max([self.largest, *(x.numel() for x in tensors)])
            self.count += 1
        return function(*args, **(kwargs or {}))

settings = {"refresh": sys.argv[2], "scaling": sys.argv[3], "base_optimizer": sys.argv[4]}
model = build(True, int(sys.argv[5]))
start = full(model)
optimizer = prepare(model, **settings)
sent = Sent()
train(model, optimizer, 0, 20, True, sent)
weights = full(model)
if sys.argv[4] == "adafactor":  # what all hold stays the same on all, also where it is rounded at random
    rounded = build(True)
    optimizer = prepare(rounded, **settings, state_dtype="bfloat16")
    train(rounded, optimizer, 0, 8, True)
    col = optimizer.state[rounded.layers[0].weight]["exp_avg_sq_col"]
    of_each = [torch.empty_like(col) for _ in range(world)]
    dist.all_gather(of_each, col)
    assert all(torch.equal(col, other) for other in of_each)
ordinary = Sent()
train(model, optimizer, 20, 21, True, ordinary)
if sys.argv[4] == "adamw":  # what finds bases where the host does not read: the same as of whole gradients
    from fira_hf import functional, subspace, views
    from fira_hf.matrices import matrices_of
    from torch.distributed.tensor import distribute_tensor

    (group,) = (g for g in optimizer.param_groups if any(p is model.layers[0].weight for p in g["params"]))
    for layer in model.layers[:2]:
        p = layer.weight
        whole = torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
        for bad in (False, True):
            whole[0, 0] = torch.nan if bad else 1.0
            p.grad = distribute_tensor(whole, p.device_mesh, p.placements)
            (matrix,) = matrices_of(p, optimizer.state, group)
            G, Q, short = matrix.tall(matrix.grad), matrix["basis"], min(p.shape)
            basis, good = matrix.shards.refine(G, Q, "power", 0, short)
            expected, _ = subspace.refine(functional, [views.tall(whole)], "power", [Q], [0])
            assert good.item() != bad
            assert bad or (basis - expected[0]).norm() <= 1e-5 * expected.norm()
        p.grad = None
if rank == 0:
    single = build(False)
    optimizer = prepare(single, **settings)
    train(single, optimizer, 0, 20, False)
    other = full(single)
    found = {
        "error": (weights - other).norm() / other.norm(), "moved": (other - start).norm() / start.norm(),
        "largest": sent.largest, "count": ordinary.count,
    }
    torch.save(found, sys.argv[1])
"""
)


@pytest.mark.parametrize(
    ("processes", "refresh", "scaling", "base", "replicas"),
    [
        (2, "together", "column", "adamw", 1),
        (3, "staggered", "column", "adamw", 1),
        (2, "together", "matrix", "lion", 1),
        (3, "together", "column", "adafactor", 1),
        (4, "staggered", "column", "adamw", 2),
    ],
)
def test_the_result_of_one_process(tmp_path, processes, refresh, scaling, base, replicas):
    """20 steps over several refreshes; only what is low-rank goes over the network. Four processes: two replicas."""
    launch(EQUAL, tmp_path, processes, str(tmp_path / "found.pt"), refresh, scaling, base, str(replicas))
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    assert found["moved"] > 0.01
    assert found["error"] <= 1e-5
    # a low-rank gradient of the largest wide matrix with its norms, filled up to a multiple of the processes
    assert found["largest"] <= (161 + processes) * 9


RESUME = (
    COMMON
    + """
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

folder, task = sys.argv[1:]
sharded = world > 1
FORMS = {
    "sharded": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
}
for base, forms in (("adamw", FORMS), ("adafactor", ["sharded"])):
    for form in forms:
        path, options = f"{folder}/{base}-{form}", FORMS[form]
        if task == "resume" or form == "sharded":
            model = build(sharded)
            optimizer = prepare(model, refresh="staggered", base_optimizer=base)
        if task == "save":
            if form == "sharded":
                train(model, optimizer, 0, 8, sharded)
            weights, state = get_state_dict(model, optimizer, options=options)
            saved = {"model": weights, "optimizer": state}
            if form != "full":
                dcp.save(saved, checkpoint_id=path)
            elif rank == 0:
                torch.save(saved, path + ".pt")
        else:
            weights, state = get_state_dict(model, optimizer, options=options)
            saved = {"model": weights, "optimizer": state}
            if form == "full":
                saved = torch.load(path + ".pt", weights_only=True)
            else:
                dcp.load(saved, checkpoint_id=path)
            weights, state = saved["model"], saved["optimizer"]
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
            train(model, optimizer, 8, 16, sharded)
            weights = full(model)
            if rank == 0:
                torch.save(weights, f"{path}-resumed.pt")
    if task == "save":
        train(model, optimizer, 8, 16, sharded)
        weights = full(model)
        if rank == 0:
            torch.save(weights, f"{folder}/{base}-saved.pt")
"""
)


def test_a_checkpoint_of_two_processes_goes_on_with_one_two_and_three(tmp_path):
    """In the middle of an interval, by torch.distributed.checkpoint, in each form of a state dict."""
    launch(RESUME, tmp_path, 2, str(tmp_path), "save")
    for processes in (1, 2, 3):
        launch(RESUME, tmp_path, processes, str(tmp_path), "resume")
        for base, form in (("adamw", "sharded"), ("adamw", "flat"), ("adamw", "full"), ("adafactor", "sharded")):
            saved = torch.load(tmp_path / f"{base}-saved.pt")
            resumed = torch.load(tmp_path / f"{base}-{form}-resumed.pt")
            assert (resumed - saved).norm() <= 1e-5 * saved.norm(), (base, form)
            if processes == 2:
                assert torch.equal(resumed, saved), (base, form)
