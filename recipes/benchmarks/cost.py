"""What a step costs on a GPU, counted on any machine: launches, bytes through memory, reads by the host, products.

    python -m recipes.benchmarks.cost [--sizes 60m,1b,7b] [--dtype bfloat16] [--output docs/benchmarks/cost.json]

Of the matrices of all layers of a LLaMA, for each optimizer: an ordinary step, one that refreshes all bases, and the
average at the defaults. Nothing is computed: tensors of the real shapes pass through the optimizer's own code, and
each operation that it starts is counted and gives tensors of the shapes that it would give. From the counts comes an
estimate of the time on a GPU, under the constants below. docs/cost.md says what is counted and what is not. Writes
JSON with --output.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

from fira_hf import PRESETS, FiraConfig, base_optimizers, functional
from fira_hf.whole import Whole
from recipes.benchmarks.models import SIZES, Size, matrices, pretended
from recipes.benchmarks.optimizers import build
from recipes.benchmarks.options import write

RANKS = {"tiny": 16, "60m": 128, "130m": 256, "350m": 256, "1b": 256, "7b": 128}
GAP = 200  # steps between two refreshes of the peers, as they publish it

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
        raise AttributeError(f"recipes/benchmarks/cost.py has no stand-in for fira_hf.kernels.{name}")

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


def count_steps(
    name: str, size: Size, rank: int, dtype: torch.dtype, steps: int, with_kernels: bool = True, **settings: Any
) -> list[Cost]:
    """What each of the first steps of an optimizer costs on the matrices of a LLaMA."""
    gap = settings.pop("gap", GAP)
    found = []
    with counting(with_kernels) as counter:
        weights = matrices(size, None, dtype, "cpu")
        if name == "fira_hf":  # the others take one path everywhere
            weights = [pretended(p) for p in weights]
        optimizer = build(name, weights, 1e-3, rank, gap, **settings)
        for counter.steps in range(steps):
            counter.cost = Cost()
            optimizer.step()
            found.append(counter.cost)
    return found


def mean(rows: Sequence[Any], weights: Sequence[float]) -> Any:
    """Of numbers, or of rows key by key."""
    if isinstance(rows[0], dict):
        return {key: mean([row[key] for row in rows], weights) for key in rows[0]}
    return sum(weight * row for weight, row in zip(weights, rows, strict=True)) / sum(weights)


def peer(name: str, size: Size, rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """A package that refreshes all bases together, every `GAP` steps."""
    _, _, ordinary, refresh = (cost.row() for cost in count_steps(name, size, rank, dtype, 4, gap=3))
    return {"ordinary": ordinary, "refresh": refresh, "average": mean([ordinary, refresh], [GAP - 1, 1])}


def ours(size: Size, rank: int, dtype: torch.dtype, with_kernels: bool, preset: str | None = None) -> dict[str, Any]:
    """`fira_hf`: an ordinary step and one that refreshes all bases, with refresh="together"; and the mean of the steps
    of an interval at the defaults, after the first step, in which every matrix gets its basis."""

    def rows(steps: int, **settings: Any) -> list[dict[str, Any]]:
        settings |= PRESETS[preset] if preset else {}
        costs = count_steps("fira_hf", size, rank, dtype, steps, with_kernels, **settings)
        return [cost.row() for cost in costs]

    _, _, ordinary, refresh = rows(4, gap=3, refresh="together")
    gap = FiraConfig().update_proj_gap
    return {"ordinary": ordinary, "refresh": refresh, "average": mean(rows(gap + 1, gap=gap)[1:], [1] * gap)}


def on_paper(numels: Sequence[int], bytes_an_element: int, launches: int, **flops: float) -> dict[str, Any]:
    row = Cost(launches, bytes_an_element * sum(numels), 0, **flops).row()
    return {"ordinary": row, "average": row}


def adamw(size: Size, rank: int, dtype: torch.dtype, moments: torch.dtype) -> dict[str, Any]:
    """Fused AdamW: the gradient is read, the weight and two moments are read and written. Moments in the dtype of the
    weights are what torch's own has."""
    numels = _numels(size)
    element = 3 * dtype.itemsize + 4 * moments.itemsize
    return on_paper(numels, element, multi_tensor_launches(numels, 4))


def floor(size: Size, rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """What no step of this kind does without: the gradient twice, the weight in and out, and the two products with the
    basis on the tensor cores, once each, in one launch for all."""
    numels = _numels(size)
    unit = "tf32" if dtype == torch.float32 else "bf16"
    return on_paper(numels, 4 * dtype.itemsize, 2, **{unit: 4 * rank * sum(numels)})


def _numels(size: Size) -> list[int]:
    h, m = size.hidden, size.intermediate
    return ([h * h] * 4 + [h * m] * 3) * size.layers


METHODS: dict[str, Callable[[Size, int, torch.dtype], dict[str, Any]]] = {
    "floor": floor,
    "AdamW, fp32 moments": lambda *of: adamw(*of, torch.float32),
    "AdamW, moments as weights": lambda size, rank, dtype: adamw(size, rank, dtype, dtype),
    "fira_hf": lambda *of: ours(*of, with_kernels=True),
    "fira_hf, subspace-muon": lambda *of: ours(*of, with_kernels=True, preset="subspace-muon"),
    "fira_hf, without Triton": lambda *of: ours(*of, with_kernels=False),
    "fira": lambda *of: peer("fira", *of),
    "galore-torch": lambda *of: peer("galore-torch", *of),
    "apollo-torch": lambda *of: peer("apollo-torch", *of),
}
REFERENCE = "AdamW, fp32 moments"


def count(size_name: str, method: str, dtype: str) -> dict[str, Any]:
    """One row: the costs, or why there are none."""
    size, rank = SIZES[size_name], RANKS[size_name]
    row = {"size": size_name, "rank": rank, "method": method, "elements": sum(_numels(size))}
    try:
        return row | METHODS[method](size, rank, getattr(torch, dtype))
    except ImportError:
        return row | {"error": "not installed"}


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("", "", "step", "launches", "bytes an element", "reads", *(f"{name}, ms" for name in DEVICES))
    for row in rows:
        if "error" in row:
            table.add_row(row["size"], row["method"], row["error"])
        for kind in ("ordinary", "refresh", "average"):
            if kind in row:
                cost = row[kind]
                cells = [f"{cost['launches']:,.0f}", f"{cost['bytes'] / row['elements']:.1f}", f"{cost['reads']:,.0f}"]
                cells += [f"{1000 * cost['seconds'][name]['step']:,.1f}" for name in DEVICES]
                table.add_row(row["size"], row["method"], kind, *cells)
    Console().print(table)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=lambda text: text.split(","), default=["60m", "1b", "7b"])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="weights and gradients")
    parser.add_argument("--methods", type=lambda text: text.split(";"), default=list(METHODS), help="with ; between")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(words)
    for given, known in ((options.sizes, RANKS), (options.methods, METHODS)):
        for name in given:
            if name not in known:
                parser.error(f"there is no {name!r}; there are {', '.join(known)}")
    work = [(size, method) for size in options.sizes for method in options.methods]
    rows = [count(*of, options.dtype) for of in tqdm(work, disable=None, leave=False)]
    show(rows)
    devices = {name: asdict(device) for name, device in DEVICES.items()}
    write("cost", words, options, rows=rows, launch_seconds=LAUNCH, devices=devices)
    return 0


if __name__ == "__main__":
    sys.exit(main())
