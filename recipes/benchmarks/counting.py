"""What operations cost: launches, bytes through memory, reads by the host, products; and the time that these take.

Nothing is computed: tensors of the real shapes pass through an optimizer's own code, and each operation that it starts
is counted and gives tensors of the shapes that it would give. Which steps are counted is said by `cost`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fira_hf import base_optimizers, functional
from fira_hf.whole import Whole

# Seconds of the host for each launch.
LAUNCH = 4e-6


@dataclass(frozen=True)
class Device:
    """Bytes a second, and operations a second of products in fp32, TF32 and bf16 (dense, fp32 accumulation).

    Nine tenths of the bandwidth and two thirds of the peaks that the vendor states, rounded.
    """

    bandwidth: float
    fp32: float
    tf32: float
    bf16: float


DEVICES = {
    "H100": Device(3.0e12, 45e12, 330e12, 660e12),  # NVIDIA's data sheet, SXM: 3.35e12; 67, 495 and 989e12
    "RTX 4090": Device(0.9e12, 55e12, 55e12, 110e12),  # NVIDIA's Ada whitepaper: 1.008e12; 82.6, 82.6 and 165e12
}

# How many tensors, by the number of lists that are read or written, and how many chunks of so many elements torch
# takes in one launch of a foreach or fused operation (ATen/native/cuda/MultiTensorApply.cuh, with CUDA 12; with CUDA
# 13 seven times as many).
TENSORS_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
CHUNKS_A_LAUNCH, CHUNK = 320, 65_536

# Operations that only allocate, and those that read nothing of what they write.
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
WRITE_ONLY = ("copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "_foreach_copy_", "_foreach_zero_")
READS = ("_local_scalar_dense", "equal", "is_nonzero")
# The two factors of each product, by their places among the arguments.
FACTORS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
# Floating-point operations of a factorisation, m x n with m >= n (Golub and Van Loan, Matrix Computations: 4.2, 5.2,
# 8.3, 8.6). Each counts as one launch here, though the libraries start many.
FACTORISATIONS: dict[str, Callable[[int, int], float]] = {
    "_linalg_svd": lambda m, n: 6 * m * n**2 + 20 * n**3,
    "_linalg_eigh": lambda m, n: 9 * n**3,
    "linalg_qr": lambda m, n: 4 * n**2 * (m - n / 3),
    "linalg_cholesky_ex": lambda m, n: n**3 / 3,
}


@dataclass
class Cost:
    """Of one step. `fp32`, `tf32`, `bf16`: floating-point operations of products, by the units that take them."""

    launches: float = 0
    bytes: float = 0
    reads: float = 0
    fp32: float = 0
    tf32: float = 0
    bf16: float = 0

    def __iadd__(self, other: Cost) -> Cost:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    def seconds(self, device: Device) -> dict[str, float]:
        """What the host needs to start the work, what the device needs to do it, and the larger of the two: the host
        runs ahead, so that one hides behind the other."""
        host = self.launches * LAUNCH
        products = self.fp32 / device.fp32 + self.tf32 / device.tf32 + self.bf16 / device.bf16
        work = self.bytes / device.bandwidth + products
        return {"host": host, "device": work, "step": max(host, work)}

    def row(self) -> dict[str, Any]:
        return asdict(self) | {"seconds": {name: self.seconds(device) for name, device in DEVICES.items()}}


def size_of(tensors: Any) -> int:
    """Bytes of the tensors among some arguments, each once; of one that is expanded, those that are there."""
    found = {id(x): x for x in tree_leaves(tensors) if isinstance(x, Tensor)}
    return sum(x.element_size() * _distinct(x) for x in found.values())


def _distinct(x: Tensor) -> int:
    count = 1
    for length, stride in zip(x.shape, x.stride(), strict=True):
        count *= length if stride else min(length, 1)
    return count


def multi_tensor_launches(sizes: Sequence[int], lists: int) -> int:
    """Launches of a foreach or fused operation on so many lists of tensors with these numbers of elements."""
    launches = tensors = chunks = 0
    for size in sizes:
        left = -(-size // CHUNK)
        tensors += bool(left)
        while left:
            taken = min(left, CHUNKS_A_LAUNCH - chunks)
            left, chunks = left - taken, chunks + taken
            if chunks == CHUNKS_A_LAUNCH or (tensors == TENSORS_A_LAUNCH[min(lists, 5)] and not left):
                launches, chunks, tensors = launches + 1, 0, int(left > 0)
    return launches + (chunks > 0)


class Counter(TorchDispatchMode):
    """Counts the operations that are no views and no mere allocations, and runs none: their outputs are memory of the
    right shapes that nothing is written to. What the host reads comes out true, or as the number of steps so far."""

    def __init__(self) -> None:
        super().__init__()
        self.cost, self.steps = Cost(), 0
        # What was asked before -> what comes out, and the cost. Layers are alike, so that most is asked many times.
        self.known: dict[Any, tuple[Any, Cost]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.partition("::")[2]
        if function.namespace != "aten" or function.is_view or name == "_unsafe_view" or name in ALLOCATIONS:
            return function(*args, **kwargs)
        if name in READS:
            self.cost.reads += 1
            return self.answer(args[0].dtype if name == "_local_scalar_dense" else torch.bool)
        operands: dict[int, Tensor] = {}
        key = (function, _described([args, *sorted(kwargs.items())], operands))
        if key not in self.known:
            self.known[key] = _outputs_and_cost(name, function, args, kwargs, list(operands))
        outputs, cost = self.known[key]
        self.cost += cost
        return _made(outputs, list(operands.values()))

    def answer(self, dtype: torch.dtype) -> Any:
        return True if dtype == torch.bool else float(self.steps) if dtype.is_floating_point else self.steps

    def tolist(self, tensor: Tensor) -> Any:
        """In place of `Tensor.tolist`, which reads memory without an operation."""
        self.cost.reads += 1
        return np.full(tuple(tensor.shape), self.answer(tensor.dtype)).tolist()


def _described(x: Any, operands: dict[int, Tensor]) -> Any:
    """What the shapes of an operation's outputs and its cost depend on; collects the tensors by their ids."""
    if isinstance(x, Tensor):
        operands.setdefault(id(x), x)
        return list(operands).index(id(x)), x.shape, x.stride(), x.dtype
    if isinstance(x, (list, tuple)):
        return tuple(_described(one, operands) for one in x)
    return type(x) if isinstance(x, (float, torch.Generator)) else x


def _made(output: Any, operands: list[Tensor]) -> Any:
    """An output as `_outputs_and_cost` describes it: an operand by its place, or memory that nothing is written to."""
    if isinstance(output, list):
        return [_made(one, operands) for one in output]
    if isinstance(output, dict):
        return torch.empty_strided(**output)
    if isinstance(output, int):
        return operands[output]
    return output


def _outputs_and_cost(name: str, function: Any, args: Any, kwargs: Any, places: list[int]) -> tuple[Any, Cost]:
    metas: dict[int, Tensor] = {}

    def enter(x: Any) -> Any:
        if isinstance(x, Tensor):
            like = {"dtype": x.dtype, "device": "meta"}
            return metas.setdefault(id(x), torch.empty_strided(x.shape, x.stride(), **like))
        return None if isinstance(x, torch.Generator) else torch.device("meta") if isinstance(x, torch.device) else x

    args, kwargs = tree_map(enter, args), tree_map(enter, kwargs)
    if not metas:  # a factory
        kwargs |= {"device": torch.device("meta"), "pin_memory": False}
    found = function(*args, **kwargs)
    place = {id(meta): places.index(key) for key, meta in metas.items()}

    def leave(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return [leave(one) for one in x]
        if isinstance(x, Tensor):
            return place.get(id(x), {"size": tuple(x.shape), "stride": x.stride(), "dtype": x.dtype})
        return x

    new = [x for x in tree_leaves(found) if isinstance(x, Tensor) and id(x) not in place]
    return leave(found), _cost(name, function._schema, args, kwargs, found if new else None)


def _cost(name: str, schema: Any, args: Any, kwargs: Any, new: Any) -> Cost:
    """Of one operation of torch, which makes `new`."""
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    passed = [argument for argument in schema.arguments if argument.name in given]
    # A fused optimizer changes gradients only where it unscales them.
    written = [a.name for a in passed if a.alias_info and a.alias_info.is_write]
    changed = [given[key] for key in written if key != "grads" or given.get("grad_scale") is not None]
    is_read = name not in WRITE_ONLY and not any(a.is_out for a in passed)
    cost = Cost(1, size_of([args, kwargs]) + size_of(new) + (size_of(changed) if is_read else 0))
    lists = [value for key, value in given.items() if _is_list(value) and key != "state_steps"]
    if lists and name.startswith(("_foreach", "_fused")):
        cost.launches = multi_tensor_launches([x.numel() for x in lists[0]], len(lists) + _is_list(new))
        if name == "_foreach_norm":  # norms of parts of the tensors, and then of those
            cost.launches *= 2
    if sides := FACTORS.get(name.removesuffix("_")):
        left, right = (args[side] for side in sides)
        # At torch's settings, products in fp32 do not use TF32.
        unit = "fp32" if left.dtype in (torch.float32, torch.float64) else "bf16"
        setattr(cost, unit, 2 * left.numel() * right.shape[-1])
    elif formula := FACTORISATIONS.get(name):
        *batch, m, n = args[0].shape
        cost.fp32 = float(np.prod(batch)) * formula(max(m, n), min(m, n))
    elif name == "linalg_solve_triangular":
        cost.fp32 = args[1].numel() * args[0].shape[-1]
    return cost


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Tensor)


class Kernels:
    """Stands for `fira_hf.kernels`, which no dispatch sees: each function counts its launch, the small table of
    addresses that is copied to the device before it, and each tensor that it reads or writes once, and gives tensors
    of the right shapes. Needs no Triton.

    Products of half-precision matrices with fp32 ones are of as many terms as the kernels take; of fp32 ones, three
    in TF32. A factor is made ready in a launch of its own, which reads the low-rank tensors and writes it, and the
    kernel reads that.
    """

    def __init__(self, counter: Counter) -> None:
        self.counter = counter

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"recipes/benchmarks/counting.py has no stand-in for fira_hf.kernels.{name}")

    def _launch(self, given: Any, changed: Any, made: Any, products: float = 0, half: int = 0) -> None:
        unit, terms = ("bf16", half) if half else ("tf32", 3)
        moved = size_of(given) + size_of(changed) + size_of(made)
        self.counter.cost += Cost(2, moved, **{unit: terms * products})

    def _factor(self, given: Any, rows: int, columns: int, count: int, dtype: torch.dtype, parts: int) -> Tensor:
        """What `factors` makes of a basis (its rows are the columns) or of an update, without a table of its own."""
        factor = torch.empty(count, parts, rows, -(-columns // 16) * 16, dtype=dtype)
        self.counter.cost += Cost(1, size_of(given) + size_of(factor))
        return factor

    def _basis(self, bases: Any, dtype: torch.dtype, parts: int) -> Any:
        """The factor of bases, or nothing of ranges of columns."""
        if isinstance(bases[0], range):
            return []
        short, rank = bases[0].shape
        sides = (rank, short) if bases[0].stride(0) == 1 or rank == 1 else (short, rank)
        return self._factor(bases, *sides, len(bases), dtype, parts)

    def project(self, grads: Sequence[Tensor], bases: Sequence[functional.Basis]) -> tuple[Tensor, Tensor]:
        (long, short), rank = grads[0].shape, functional.rank_of(bases[0])
        R = torch.empty(len(grads), long, rank)
        norms = torch.empty(len(grads), long, 1)
        half = 0 if grads[0].dtype == torch.float32 else 2
        rank = 0 if isinstance(bases[0], range) else rank
        Q = self._basis(bases, grads[0].dtype, half or 1)
        self._launch([grads, Q], [], [R, norms], 2 * len(grads) * long * short * rank, half)
        return R, norms

    def transposed_products(self, grads: Sequence[Tensor], P: Tensor) -> Tensor:
        return self.project([G.t() for G in grads], list(P))[0]

    def direction(self, base_optimizer: str, R: Tensor, stored: Any, *more: Any) -> tuple[Tensor, Tensor, Tensor]:
        if base_optimizer == "adafactor":
            return functional.direction(base_optimizer, R, stored, *more)
        N = torch.empty_like(R)
        norms = [torch.empty(*R.shape[:2], 1) for _ in range(2)]
        self._launch([R, stored, more], stored, [N, norms])
        if base_optimizer == "muon":
            N = base_optimizers.orthogonalized(N)
            norms[1] = functional.row_norms(N)
        return N, norms[0], norms[1]

    def advance(
        self, norms: Tensor, steps: Any, lr: float, betas: Any, add: functional.Add = None
    ) -> tuple[Tensor, Tensor]:
        active, eta = torch.empty(len(steps), dtype=torch.bool), torch.empty(len(steps), 1, 1)
        self._launch([norms, steps], steps, [active, eta])
        return active, eta

    def scales(
        self,
        G_norms: Tensor,
        R_norms: Tensor,
        N_norms: Tensor,
        eta: Tensor,
        histories: Any,
        settings: functional.Scales,
        active: Tensor,
        add: functional.Add = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a, residual, c = (torch.empty_like(eta) for _ in range(3))
        B = torch.empty_like(R_norms)
        # Rows are read again to be written.
        self._launch(
            [G_norms, R_norms, N_norms, eta, histories, active], [histories, R_norms, N_norms], [a, B, residual, c]
        )
        return a, B, residual, c

    def apply_updates(
        self,
        weights: Any,
        grads: Any,
        N: Tensor,
        R: Any,
        a: Tensor,
        k: float,
        B: Any,
        bases: Any,
        decay: float,
        *more: Any,
    ) -> None:
        half = {torch.bfloat16: 1, torch.float16: 3}.get(weights[0].dtype, 0)
        product = 0 if isinstance(bases[0], range) else 2 * N.numel() * weights[0].shape[1]
        if B is None:
            grads, R = [], None
            if decay == 1 and isinstance(bases[0], range):
                weights = [W[:, Q.start : Q.stop] for W, Q in zip(weights, bases, strict=True)]
        low_rank = [N, R, a] if isinstance(bases[0], range) else self._factors(weights[0].dtype, N, R, a, B, bases)
        self._launch([weights, grads, B, low_rank, more], weights, [], product, half)

    def _factors(self, dtype: torch.dtype, N: Tensor, R: Any, a: Any, B: Any, bases: Any) -> list[Tensor]:
        kept, parts = torch.float32 if dtype == torch.float32 else torch.bfloat16, 2 if dtype == torch.float16 else 1
        A = self._factor([N, R, a, B if R is not None else None], *N.shape[1:], len(N), kept, parts)
        return [A, self._basis(bases, kept, parts)]

    def project_moments(self, grads: Any, moments: Any, bases: Any, beta: float) -> tuple[Tensor, Tensor]:
        (long, short), rank = grads[0].shape, bases[0].shape[1]
        Z, norms = torch.empty(len(grads), long, rank), torch.empty(len(grads), long, 2)
        half = 0 if grads[0].dtype == torch.float32 else 2
        Q = self._basis(bases, torch.bfloat16 if half else torch.float32, half or 1)
        self._launch([grads, _stored(moments), Q], [], [Z, norms], 2 * len(grads) * long * short * rank, half)
        return Z, norms

    def apply_moment_updates(
        self, weights: Any, grads: Any, moments: Any, A: Tensor, B: Tensor, bases: Any, decay: float, *more: Any
    ) -> None:
        half = {torch.bfloat16: 1, torch.float16: 3}.get(weights[0].dtype, 0)
        changed = [weights, _stored(moments)]
        low_rank = self._factors(weights[0].dtype, A, None, None, B, bases)
        self._launch([grads, low_rank, B, more, changed], changed, [], 2 * A.numel() * weights[0].shape[1], half)


def _stored(moments: Sequence[Whole]) -> list[Tensor]:
    return [tensor for moment in moments for tensor in (moment.values, moment.scales) if tensor is not None]


@contextlib.contextmanager
def counting(with_kernels: bool) -> Iterator[Counter]:
    """Everything inside is counted and nothing runs. `fira_hf` works with the stand-in for its kernels, or with its
    torch code, which on an accelerator takes whole matrices."""
    counter = Counter()
    chosen = Kernels(counter) if with_kernels else functional
    elsewhere = {
        "operations": lambda parameter: chosen,
        "row_blocks": lambda tensor, like=None, size=0: (tensor,),
    }
    with contextlib.ExitStack() as stack:
        for room in [module for name, module in sys.modules.items() if name.startswith("fira_hf.")]:
            for name in elsewhere.keys() & vars(room).keys():
                stack.enter_context(mock.patch.object(room, name, elsewhere[name]))
        stack.enter_context(mock.patch.object(torch.Tensor, "tolist", lambda tensor: counter.tolist(tensor)))
        stack.enter_context(counter)
        yield counter
