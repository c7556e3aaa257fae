"""Peers whose authors publish no package, each a few lines after its paper, and Muon with its moment in int8.

Rates mean here what they mean for AdamW: an update is scaled to about the size of AdamW's, a root mean square of 0.2,
as torch's Muon does with `match_rms_adamw`. So one range of learning rates serves all of them, 1e-3 to 1e-2 and a step
or two beyond, whatever the papers' own are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

RMS = 0.2  # of AdamW's updates, as measured by the authors of Moonlight (2502.16982)
TINY = 1e-30


class Peer(torch.optim.Optimizer):
    """A loop over matrices; `direction` says what is taken off a weight at learning rate 1."""

    def __init__(self, params: Any, lr: float, **settings: Any) -> None:
        super().__init__(params, {"lr": lr, **settings})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * self.direction(p, self.state[p], group))

    def direction(self, p: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        raise NotImplementedError


def scaled(G: Tensor, dim: int) -> Tensor:
    """G with the vectors along `dim` brought to a root mean square of 1."""
    return G * (math.sqrt(G.shape[dim]) / G.norm(dim=dim, keepdim=True).clamp(min=TINY))


class SinkGD(Peer):
    """SinkGD (2502.06742): the rows and the columns of the gradient brought to one norm in turn, five times. No state.

    The root mean square of rows and of columns is 0.2 in place of the paper's 1, with its learning rate times 0.05.
    """

    def direction(self, p: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        G = p.grad
        for _ in range(5):
            G = scaled(scaled(G, 1), 0)
        return RMS * G


class Scale(Peer):
    """SCALE (2506.16659): what leads to one output of a layer brought to one norm. No state but for the last layer,
    which is trained by AdamW here as it is for all methods.

    The paper's columns are those of a matrix (inputs, outputs): the rows of torch's weights.
    """

    def direction(self, p: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return RMS * scaled(p.grad, 1)


class Sumo(Peer):
    """SUMO (2505.24749), algorithm 1: Q from an SVD every `update_proj_gap` steps, the moment M rotated into the new
    subspace, M <- mu M + Q^T G, O its polar factor, W <- W - lr (0.2 sqrt(m) Q O + G - Q Q^T G); W is (m, n), m >= n.

    The scale of O is that of Muon; what is outside the subspace is the plain gradient, as there. The paper's limiter
    bounds the growth of ||O||, which does not change, and is left out.
    """

    def direction(self, p: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        wide = p.shape[0] < p.shape[1]
        G = p.grad.T if wide else p.grad
        step = state["step"] = state.get("step", -1) + 1
        if step % group["update_proj_gap"] == 0:
            U = torch.linalg.svd(G, full_matrices=False)[0][:, : group["rank"]].contiguous()
            M = state["moment"] if step else G.new_zeros(U.shape[1], G.shape[1])
            state["moment"] = U.T @ state["basis"] @ M if step else M
            state["basis"] = U
        Q = state["basis"]
        low = Q.T @ G
        M = state["moment"].mul_(group["momentum"]).add_(low)
        U, _, Vh = torch.linalg.svd(M, full_matrices=False)
        update = G + Q @ (RMS * math.sqrt(G.shape[0]) * (U @ Vh) - low)
        return update.T if wide else update


class Frugal(Peer):
    """FRUGAL (2411.07837): Adam on columns drawn at random every `update_proj_gap` steps, its moments beginning anew;
    outside them the sign of the gradient times `free_scale`, which is 1 in the paper's pre-training.

    As many columns as rank is of the short side. With 1 the signs' updates are five times as large as AdamW's, and the
    rates are lower for it; with 0.2 both parts are of one size.
    """

    def __init__(self, params: Any, lr: float, seed: int = 0, **settings: Any) -> None:
        super().__init__(params, lr, **settings)
        self.generator = torch.Generator().manual_seed(seed)

    def direction(self, p: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        beta1, beta2 = group["betas"]
        step = state["step"] = state.get("step", -1) + 1
        age = step % group["update_proj_gap"] + 1
        if age == 1:
            count = max(1, round(p.shape[1] * group["rank"] / min(p.shape)))
            columns = torch.randperm(p.shape[1], generator=self.generator)[:count]
            state["columns"] = columns.to(p.device, torch.int32)
            state["exp_avg"], state["exp_avg_sq"] = (p.new_zeros(p.shape[0], count) for _ in range(2))
        columns = state["columns"].long()
        G = p.grad[:, columns]
        first = state["exp_avg"].lerp_(G, 1 - beta1)
        second = state["exp_avg_sq"].mul_(beta2).addcmul_(G, G, value=1 - beta2)
        update = group["free_scale"] * p.grad.sign()
        update[:, columns] = first / (1 - beta1**age) / ((second / (1 - beta2**age)).sqrt() + group["eps"])
        return update


class Int8Muon(torch.optim.Muon):
    """torch's Muon whose moment is kept as int8 with one scale for each 256 values: about a byte a weight.

    It is read, updated in fp32 and stored again at each step.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p, state in self.state.items():
            state["momentum_buffer"] = decode(state.pop("codes"), state.pop("scales"), p)
        super().step(closure)
        for state in self.state.values():
            state["codes"], state["scales"] = encode(state.pop("momentum_buffer"))


def encode(
    values: Tensor, block: int = 256, bits: int = 8, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Codes of so many bits, in int8, (blocks, block), and the step between two of them in each block.

    To the nearest; with a generator to one of the two neighbours at random, so that the mean is the value.
    """
    most = 2 ** (bits - 1) - 1
    flat = values.flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    scales = blocks.abs().amax(1, keepdim=True).clamp(min=TINY) / most
    codes = blocks / scales
    draws = None if generator is None else torch.rand(codes.shape, generator=generator).to(codes)
    codes = codes.round() if draws is None else (codes + draws).floor()
    return codes.clamp(-most, most).to(torch.int8), scales


def decode(codes: Tensor, scales: Tensor, like: Tensor) -> Tensor:
    return (codes * scales).flatten()[: like.numel()].view_as(like)
