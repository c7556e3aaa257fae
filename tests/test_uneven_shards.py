"""Sharded weights of which the processes hold unlike parts: one has only zeros, or what cannot be projected."""

from __future__ import annotations

from conftest import launch

SCRIPT = """
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.optim.lr_scheduler import LambdaLR

from fira_hf import FiraAdamW

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
torch.manual_seed(0)

def sharded(tensor, dim=0):
    return distribute_tensor(tensor, mesh, [Shard(dim)])

# The row of this head is that of one process, and warm-up begins at a learning rate of 0.
head = torch.nn.Parameter(sharded(torch.randn(1, 8)))
optimizer = FiraAdamW([{"params": [head]}], lr=1e-3)
warm_up = LambdaLR(optimizer, lambda step: step / 10)
for _ in range(2):
    head.grad = sharded(torch.randn(1, 8))
    optimizer.step()
    warm_up.step()
assert optimizer.state[head]["step"] == 2

# The experts of one process get no token in the first steps. They are no replicas of the other's, whatever the group.
trained = []
for group in (None, dist.group.WORLD):
    torch.manual_seed(1)
    experts = torch.nn.Parameter(sharded(torch.randn(4, 12, 8)))
    optimizer = FiraAdamW([{"params": [experts], "rank": 2, "update_proj_gap": 2}], lr=1e-3)
    optimizer.process_group = group
    for step in range(4):
        gradients = torch.randn(4, 12, 8)
        gradients[2:] *= step > 1
        experts.grad = sharded(gradients)
        optimizer.step()
    trained.append(experts.full_tensor())
assert torch.equal(*trained)

# A replicated weight beside sharded activations: each process has a part of the sum that its gradient is.
inputs, start = torch.randn(6, 8), torch.randn(8, 8)
for settings in ({}, {"rank": 4}):
    alone = torch.nn.Parameter(start.clone())
    replicated = torch.nn.Parameter(distribute_tensor(start.clone(), mesh, [Replicate()]))
    for p, x in ((alone, inputs), (replicated, sharded(inputs))):
        optimizer_of_one = FiraAdamW([{"params": [p], **settings}], lr=1e-2)
        for _ in range(3):
            p.grad = None
            (x @ p).square().sum().backward()
            optimizer_of_one.step()
    apart = (replicated.to_local() - alone).norm()
    assert apart < 1e-3 * (alone - start).norm(), (settings, apart)

calls = [None, None]
dist.all_gather_object(calls, optimizer.state[experts]["calls"])
assert calls[0] == calls[1] == 3, calls  # a checkpoint has one count for all

# Nothing is stepped if a later group cannot be.
first, second = (torch.nn.Parameter(sharded(torch.randn(12, 8), dim)) for dim in (0, 1))
optimizer = FiraAdamW([{"params": [first], "rank": 2}, {"params": [second], "rank": 2}], lr=1e-3)
before = first.full_tensor().clone()
first.grad, second.grad = sharded(torch.randn(12, 8)), sharded(torch.randn(12, 8), 1)
try:
    optimizer.step()
except RuntimeError as error:
    assert "shard" in str(error), error
else:
    raise AssertionError("a weight that is sharded by its columns was projected")
assert torch.equal(first.full_tensor(), before)
"""


def test_processes_agree_where_their_parts_differ(tmp_path):
    launch(SCRIPT, tmp_path, 2)
