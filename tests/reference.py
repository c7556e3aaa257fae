"""What tests compare with: a step as the equations say it, gradients to give it, and a run that did not stop.

The step is slow, with full-size temporaries, one line per equation. Letters: W weight, G gradient, Q basis
(short x r), R = G Q, N the direction of the base optimizer in the subspace, S the scaled residual. Rows are the long
side: a matrix with rows < columns is transposed, in and out.
"""

import io
import math

import torch

# What is left of a gradient that lies in the subspace is rounding, a few fp32 ulps (1.2e-7) of the gradient; with room
# for long sums. It is not history for the limiter.
NEGLIGIBLE = 1e-5


def fira_step(
    weight,
    grad,
    state,
    *,
    rank,
    alpha=1.0,
    update_proj_gap=200,
    base_optimizer="adamw",
    gamma=1.01,
    limiter="growth",
    scaling="column",
    residual="reference",
    adjust_lr="none",
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-6,
    correct_bias=True,
    weight_decay=0.0,
    basis=None,
):
    """Return the new weight, the new state (the names of FiraAdamW's) and what pop_statistics would average.

    Everything is computed in the dtype of `weight`. `state` is {} before the first step. `basis` replaces the singular
    vectors at a refresh: their signs are arbitrary, so a comparison of buffers must agree on them first.
    """
    dtype = weight.dtype
    wide = weight.shape[0] < weight.shape[1]
    W = weight.T if wide else weight
    G = (grad.T if wide else grad).to(dtype)

    step = int(state.get("step", 0))
    Q = state.get("basis")
    if step % update_proj_gap == 0:
        Q = torch.linalg.svd(G, full_matrices=False).Vh[:rank].T if basis is None else basis.to(dtype)

    def moving(name, beta, value):
        return beta * state.get(name, torch.zeros_like(value)) + (1 - beta) * value

    M = moving("exp_avg", betas[0], G) if residual == "moment" else None
    G = G if M is None else betas[0] * M + (1 - betas[0]) * G
    R = G @ Q

    if M is not None:
        moments, N, correct_bias = {"exp_avg": M}, newton_schulz(R), False
    elif base_optimizer == "lion":
        N = moving("exp_avg", betas[0], R).sign()
        moments = {"exp_avg": moving("exp_avg", betas[1], R)}
        correct_bias = False
    elif base_optimizer == "muon":
        moments = {"exp_avg": moving("exp_avg", betas[0], R)}
        N = newton_schulz(betas[0] * moments["exp_avg"] + (1 - betas[0]) * R)
        correct_bias = False
    elif base_optimizer == "adafactor":
        moments = {
            "exp_avg": moving("exp_avg", betas[0], R),
            "exp_avg_sq_row": moving("exp_avg_sq_row", betas[1], (R**2).mean(1, keepdim=True)),
            "exp_avg_sq_col": moving("exp_avg_sq_col", betas[1], (R**2).sum(0, keepdim=True)),
        }
        rows, columns = moments["exp_avg_sq_row"], moments["exp_avg_sq_col"]
        N = moments["exp_avg"] / ((rows @ columns / columns.mean()).sqrt() + eps)
    else:
        moments = {"exp_avg": moving("exp_avg", betas[0], R), "exp_avg_sq": moving("exp_avg_sq", betas[1], R**2)}
        N = moments["exp_avg"] / (moments["exp_avg_sq"].sqrt() + eps)

    if M is not None:  # rows below a hundredth of the mean stay small
        size = math.sqrt(Q.shape[1] / len(G))
        N = N / N.norm(dim=1, keepdim=True).clamp(min=0.01 * size) * size
        left = (G - R @ Q.T).norm(dim=1, keepdim=True)
        phi = math.sqrt((Q.shape[0] - Q.shape[1]) / len(G)) / left.clamp(
            min=max(1e-30, 0.01 * left.square().mean().sqrt())
        )
    elif scaling == "column":
        phi = N.norm(dim=1, keepdim=True) / (R.norm(dim=1, keepdim=True) + 1e-8)
    elif scaling == "matrix":
        phi = N.norm() / (R.norm() + 1e-8)
    else:
        phi = torch.ones((), dtype=dtype)

    kept = alpha if residual == "reference" else 1.0
    S = phi * (G - kept * R @ Q.T)

    previous = state.get("residual_norm", torch.tensor(math.inf, dtype=dtype))
    negligible = S.norm() <= NEGLIGIBLE * (phi * G).norm()
    norm = S.norm()
    if gamma is not None and limiter == "scale":
        norm = gamma * norm
    elif gamma is not None and not negligible and previous < math.inf:
        norm = gamma * norm + (1 - gamma) * previous if limiter == "shrink" else min(norm, gamma * (previous + 1e-8))
    limited = norm < S.norm()
    if norm != S.norm():
        S = S * (norm / S.norm())
    residual_norm = torch.tensor(math.inf, dtype=dtype) if negligible else S.norm()

    applied = {"reference": 1.0, "paper": alpha, "none": 0.0, "moment": alpha}[residual] * S
    eta = lr
    if adjust_lr == "match_rms_adamw":
        eta *= 0.2 * math.sqrt(len(R)) if base_optimizer == "muon" else math.sqrt(Q.shape[0] / Q.shape[1])
    if correct_bias:
        eta *= math.sqrt(1 - betas[1] ** (step + 1)) / (1 - betas[0] ** (step + 1))
    W = W - eta * (alpha * N @ Q.T + applied)
    W = W - lr * weight_decay * W

    new_state = {
        "step": torch.tensor(float(step + 1)),
        "basis": Q,
        "residual_norm": residual_norm,
        **moments,
    }
    direction, residue = (alpha * N).norm() ** 2, applied.norm() ** 2
    statistics = {
        "limiter_active": float(limited),
        "captured_energy": float(R.norm() ** 2 / G.norm() ** 2),
        "residual_share": float(residue / (direction + residue)),
    }
    return (W.T if wide else W), new_state, statistics


def newton_schulz(X):
    """Muon's iteration, on the matrix itself."""
    X = X / X.norm()
    for _ in range(5):
        A = X.T @ X
        X = 3.4445 * X + X @ (-4.7750 * A + 2.0315 * A @ A)
    return X


def gradients(shape, steps, seed=0, decay=0.85, noise=0.05):
    """Gradients as a network gives them: a decaying spectrum that turns slowly, plus noise of changing strength.

    The changing strength makes the limiter act at some steps and not at others.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    short = min(shape)
    left = torch.randn(2, rows, short, generator=generator) / math.sqrt(rows)
    right = torch.randn(2, columns, short, generator=generator) / math.sqrt(columns)
    spectrum = decay ** torch.arange(short)
    result = []
    for t in range(steps):
        turn = torch.tensor(0.02 * t)
        u = turn.cos() * left[0] + turn.sin() * left[1]
        v = turn.cos() * right[0] + turn.sin() * right[1]
        strength = noise * math.exp(0.7 * torch.randn((), generator=generator)) / math.sqrt(short)
        result.append((u * spectrum) @ v.T + strength * torch.randn(shape, generator=generator))
    return result


def weight(shape, seed=0, dtype=torch.float32):
    """A parameter with the spread of an initialised linear layer."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.nn.Parameter((0.05 * torch.randn(shape, generator=generator)).to(dtype))


def spoiled(gradient, bad):
    """The gradient with one entry that is not finite, or all zero where `bad` is 0."""
    gradient = gradient.clone()
    if bad == 0.0:
        return gradient.zero_()
    gradient[3, 7] = bad
    return gradient


def assert_resumes(make, params, grads, stop):
    """A run that was saved after `stop` of its steps and loaded goes on in the same bits as one that did not stop.

    make(params) is the optimizer; grads, for each step, the gradients of all weights. Returns the resumed optimizer.
    """

    def train(optimizer, weights, steps):
        for gradients_of_step in steps:
            for p, gradient in zip(weights, gradients_of_step, strict=True):
                p.grad = None if gradient is None else gradient.to(p.dtype, copy=True)
            optimizer.step()

    optimizer = make(params)
    train(optimizer, params, grads[:stop])
    file = io.BytesIO()
    torch.save({"weights": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others = [torch.nn.Parameter(p) for p in saved["weights"]]
    resumed = make(others)
    resumed.load_state_dict(saved["optimizer"])
    for p, other in zip(params, others, strict=True):
        other.__class__ = p.__class__  # not before: torch loads a state to where a weight says it is
    assert_same_run(optimizer, params, resumed, others)
    train(optimizer, params, grads[stop:])
    train(resumed, others, grads[stop:])
    assert_same_run(optimizer, params, resumed, others)
    return resumed


def assert_same_run(optimizer, params, other, others):
    """The weights of two optimizers and all that they keep for them, bit for bit."""
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert_same_state(optimizer.state.get(p, {}), other.state.get(q, {}))


def assert_same_state(state, other):
    """What is kept for one weight, bit for bit."""
    assert state.keys() == other.keys()
    for name, value in state.items():
        if torch.is_tensor(value):
            assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name
        else:
            assert value == other[name], name
