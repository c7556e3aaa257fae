"""The kernels of an accelerator, in Triton's interpreter where there is no GPU: each against fp64, and whole steps."""

import copy
import importlib.util
import os
import subprocess
import sys

import pytest
import torch

import fira_hf.matrices
from conftest import ROOT, run_quietly
from fira_hf import PUBLISHED, FiraAdamW, base_optimizers, codes, whole
from fira_hf import functional as F
from fira_hf.layerwise import step_in_backward
from recipes.benchmarks import kernels as checks
from recipes.benchmarks.models import Pretended
from reference import assert_resumes, gradients, weight
from test_accelerator import no_reads

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed; on this platform it may have no wheel"
)
SHAPES = [(70, 40), (40, 70)]
SETTINGS = [{}, {"base_optimizer": "lion"}, {"base_optimizer": "adafactor"}, {"projection": "columns"}]
SETTINGS += [{"base_optimizer": "muon"}, {"projection": "columns", "base_optimizer": "muon"}]
SETTINGS += [{"state_dtype": "int8"}]
WHOLE = [
    {"base_optimizer": "muon", "residual": "moment", "state_dtype": dtype}
    for dtype in ("float32", "bfloat16", "int8", "int4")
]


@pytest.fixture
def kernels():
    from fira_hf import kernels

    return kernels


@pytest.mark.parametrize("check", checks.CHECKS)
def test_every_kernel_against_fp64(check, kernels):
    """All dtypes, memory layouts, ranks and state dtypes; an inactive matrix with NaN among the others."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = checks.run(check, kernels, checks.TINY, device, 60)
    assert found["wrong"] == [] and found["left_out"] == 0


def test_what_makes_a_step_is_chosen_in_one_place(kernels):
    assert fira_hf.matrices.operations(weight((4, 4))) is F
    assert fira_hf.matrices.operations(Pretended(torch.ones(4, 4))) is kernels
    assert fira_hf.matrices.operations_of_moments(fira_hf.matrices.operations(weight((4, 4)))) == (
        whole.project,
        whole.apply_updates,
    )
    found = fira_hf.matrices.operations_of_moments(fira_hf.matrices.operations(Pretended(torch.ones(4, 4))))
    assert found == (kernels.project_moments, kernels.apply_moment_updates)


COMPILES = """
import itertools
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fira_hf import code_kernels, codes, dense_kernel, factors, kernels, scale_kernels

INTEGERS = ("long", "short", "rank", "size", "pitch", "q_part", "a_part", "part", "outer", "inner", "width", "column")
POINTERS = {"table": "*i64", "active": "*i1", "finite": "*i1"}
NUMBERS = ("b1", "b2", "c1", "c2", "eps", "k", "decay", "lr", "beta", "ahead", "share", "log_b1", "log_b2")
NUMBERS += ("alpha", "s", "removed", "gamma", "negligible")

def compiled(kernel, capability, warps, stages, **constants):
    constants |= {"INTERPRETED": False} if "INTERPRETED" in kernel.arg_names else {}
    constants |= dict.fromkeys({"w_col", "g_col", "q_row"} & set(kernel.arg_names), 1)
    def kind(name):
        if name in constants:
            return "constexpr"
        if name in INTEGERS or name.endswith(("_row", "_col")):
            return "i32"
        if name in ("A", "Q", "out"):
            of = [constants[key] for key in ("W_DTYPE", "DTYPE", "G_DTYPE") if key in constants]
            return "*fp32" if of[0] == tl.float32 else "*bf16"
        return POINTERS.get(name, "fp32" if name in NUMBERS else "*fp32")
    names = kernel.arg_names
    kinds = {n: kind(n) for n in names}
    # As in a launch on weights with sides that are multiples of 16.
    divisible = [["tt.divisibility", 16]]
    attributes = {(names.index(n),): divisible for n, of in kinds.items() if of == "i32" or of[0] == "*"}
    fixed = {(names.index(n),): c for n, c in constants.items()}
    source = ASTSource(kernel, kinds, fixed, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert found.metadata.shared <= 99 * 1024, (kernel, constants, found.metadata)
    return found

for capability, dtype in itertools.product((80, 90), (tl.bfloat16, tl.float32)):
    half = dtype == tl.bfloat16
    parts = 2 if half else 1
    of_project = {"BLOCK_L": 128, "BLOCK_S": 32, "BLOCK_R": 128 if half else 64, "PARTS": parts, "ALIGNED": True}
    of_update = {"BLOCK_L": 128, "BLOCK_S": 64, "BLOCK_R": 64 if half else 16, "PARTS": 1, "ALIGNED": True}
    of_update |= {"W_DTYPE": dtype, "HAS_R": True, "HAS_B": True, "AT_RANDOM": half, "M_AT_RANDOM": False}
    none = {"MOMENT": "none", "M_DTYPE": tl.float32, "IS_TURNED": False}
    both = {"G_DTYPE": dtype, "IS_RANGE": False, **none}
    ranges = both | {"IS_RANGE": True}
    of_ranges = {"BLOCK_L": 32, "BLOCK_S": 256, "BLOCK_R": 16}
    state = {"ALIGNED": True, "AT_RANDOM": half, "BASE": "adamw", "BLOCK_L": 16, "BLOCK_R": 128}
    dense = {"W_DTYPE": tl.bfloat16, "M_DTYPE": dtype, "ROUNDS_W": True, "ROUNDS_M": half, "BLOCK": 1024}
    dense |= {"ALIGNED": True, "G_DTYPE": tl.bfloat16}
    tile = {"DTYPE": dtype, "X_DTYPE": tl.float32, "BLOCK_O": 8, "BLOCK_I": 256}
    no_sum, stages = {"HAS_SCALE": False, "HAS_R": False}, 4 if half else 2
    code = compiled(kernels._project_kernel, capability, 8, stages, **both, **of_project).asm["ptx"]
    # Tiles come by copies of 16 bytes (.cg takes no others), with two barriers in a loop.
    assert "cp.async.cg" in code and "cp.async.ca" not in code, (capability, dtype)
    assert not half or code.count("bar.sync") <= 16, (capability, code.count("bar.sync"))
    code = compiled(kernels._update_kernel, capability, 8, 2, **both, **of_update).asm["ptx"]
    assert "cp.async.cg" in code and "cp.async.ca" not in code, (capability, dtype)
    assert "ld.global.v4.b32" in code and "ld.global.b16" not in code, (capability, dtype)
    compiled(kernels._project_kernel, capability, 4, stages, **ranges, **of_project | of_ranges)
    compiled(kernels._update_kernel, capability, 8, 2, **ranges, **of_update)
    compiled(kernels._direction_kernel, capability, 4, 3, DTYPE=dtype, **state)
    compiled(dense_kernel._adamw_kernel, capability, 4, 3, **dense)
    compiled(factors._factor_kernel, capability, 4, 3, **tile, PARTS=parts, HAS_TABLE=True, **no_sum)
    compiled(factors._factor_kernel, capability, 4, 3, **tile, PARTS=1, HAS_TABLE=False, HAS_SCALE=True, HAS_R=True)
    # A launch compiles in each number that is 1.
    compiled(factors._factor_kernel, capability, 4, 3, **tile, PARTS=2, HAS_TABLE=True, **no_sum, outer=1)
    compiled(scale_kernels._advance_kernel, capability, 8, 3, IS_CORRECTED=half, BLOCK=4096)
    for limiter, scaling in zip(("growth", "shrink", "scale", "none"), ("column", "matrix", "none", "column")):
        compiled(scale_kernels._scales_kernel, capability, 8, 3, SCALING=scaling, LIMITER=limiter, BLOCK=4096)
    for code in codes.CODES.values() if half else ():
        one = {"DTYPE": tl.int8 if code.dtype == torch.int8 else tl.uint8, "OCTAVES": code.octaves, "BITS": code.bits}
        one |= {"ALIGNED": True, "BLOCK_L": 16, "BLOCK_R": 128}
        compiled(code_kernels._decode_kernel, capability, 4, 3, **one)
        compiled(code_kernels._encode_kernel, capability, 4, 3, **one, HAS_ACTIVE=True, AT_RANDOM=True)
    m, v = codes.FIRST, codes.SECOND
    one = {"M_OCTAVES": m.octaves, "M_BITS": m.bits, "V_OCTAVES": v.octaves, "V_BITS": v.bits}
    compiled(code_kernels._direction_kernel, capability, 4, 3, **state | {"AT_RANDOM": half}, **one)
    moments = [("float", tl.bfloat16 if half else tl.float32), ("int8", tl.int8), ("int4", tl.uint8)]
    of_project |= {} if half else {"BLOCK_L": 32, "BLOCK_R": 128}
    for (kind, m_dtype), is_turned in itertools.product(moments if half else moments[::2], (False, True)):
        one = both | {"MOMENT": kind, "M_DTYPE": m_dtype, "IS_TURNED": is_turned}
        of_one = one | of_update | {"HAS_R": False, "M_AT_RANDOM": half or kind != "float", "BLOCK_L": 64}
        compiled(kernels._update_kernel, capability, 4, 2, **of_one)
        compiled(kernels._project_kernel, capability, 8, 3 if half else 2, **one | of_project)
        if half and kind == "int4" and not is_turned:  # at full rank
            compiled(kernels._update_kernel, capability, 4, 2, **of_one | {"IS_RANGE": True})
            compiled(kernels._project_kernel, capability, 4, 3, **one | of_project | of_ranges | {"IS_RANGE": True})
"""


def test_the_kernels_compile_for_gpus():
    """By Triton and ptxas, which need no GPU: compute capabilities 8.0 and 9.0, in the least shared memory."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILES], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]


def test_the_kernels_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("FIRA_HF_TRITON", "0")
    assert fira_hf.matrices._operations.__wrapped__(torch.device("cuda")) is F
    monkeypatch.setenv("FIRA_HF_TRITON", "1")
    assert fira_hf.matrices._operations.__wrapped__(torch.device("cuda")) is not F


def test_a_step_on_the_cpu_does_not_import_triton(tmp_path):
    """Where nobody else has: it takes a second, and a place where it is broken would break everything."""
    code = (
        "import sys, torch, transformers, peft; before = 'triton' in sys.modules\n"
        "import fira_hf; p = torch.nn.Parameter(torch.randn(8, 4)); p.grad = torch.randn(8, 4)\n"
        "fira_hf.FiraAdamW([{'params': [p], 'rank': 2}]).step()\n"
        "assert ('triton' in sys.modules) == before and 'fira_hf.kernels' not in sys.modules"
    )
    assert run_quietly(code, tmp_path) == (0, "", "")


def optimizer_of(*params, **settings):
    group = {"rank": 6, "alpha": 0.25, "update_proj_gap": 4} | settings
    return FiraAdamW([{"params": list(params), **group}], lr=1e-2, weight_decay=0.1)


def step(optimizer, *pairs):
    for p, gradient in pairs:
        p.grad = gradient.to(p.dtype)
    optimizer.step()


def pretended(p):
    return Pretended(p.detach().clone())


def tolerance(settings):
    """Of what is computed in fp32. A moment between two codes may get the other one: in 4 bits a difference of a
    hundredth, of one element of thousands."""
    return 1e-5 if settings.get("state_dtype", "float32") == "float32" else 1e-2


@pytest.mark.parametrize("settings", SETTINGS + WHOLE + [{**WHOLE[3], "rank": 999}], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_those_of_the_torch_code(shape, settings, monkeypatch, kernels):
    """Over several refreshes, by the torch code for accelerators and by the kernels. Codes are rounded to the nearest,
    since each draws in its own way."""
    for module in (fira_hf.projected, fira_hf.matrices, fira_hf.refresh):
        monkeypatch.setattr(module, "rounds_state", lambda group: False)
    start = weight(shape).detach()
    results = []
    for ops in (F, kernels):
        monkeypatch.setattr(
            fira_hf.matrices, "_operations", lambda device, ops=ops: ops if device.type == "cuda" else F
        )
        p = pretended(start)
        optimizer = optimizer_of(p, **settings)
        optimizer.track_statistics = True
        for gradient in gradients(shape, 14):
            step(optimizer, (p, gradient))
        results.append((torch.Tensor(p.detach()), optimizer.pop_statistics()))
    (plain, of_plain), (fused, of_fused) = results
    allowed = tolerance(settings)
    assert (fused - plain).norm() <= allowed * (plain - start).norm()
    assert of_fused == pytest.approx(of_plain, rel=max(allowed, 1e-4))


@pytest.mark.parametrize("r", [6, 40, 64])
@pytest.mark.parametrize("base", ["adamw", "lion", "muon"])
def test_codes_are_those_of_the_torch_code(base, r, kernels):
    """Decoded, updated and encoded in one pass, to the nearest; where one matrix is not active, it stays as it is."""
    generator = torch.Generator().manual_seed(0)
    names, count, long = list(base_optimizers.MOMENTS[base]), 3, 20
    active = torch.tensor([True, False, True])
    stored = []
    for name in names:
        values = torch.randn(count, long, r, generator=generator)
        both = codes.encode(values.square() if name == "exp_avg_sq" else values, codes.CODES[name])
        stored.append(tuple(list(tensor) for tensor in both))
    before = copy.deepcopy(stored)
    R = torch.randn(count, long, r, generator=generator)
    R[1] = torch.nan
    plain = [list(codes.decode(*map(torch.stack, of), codes.CODES[n])) for n, of in zip(names, stored, strict=True)]
    for of, name in zip(stored, names, strict=True):
        assert torch.equal(kernels.decode(*of, codes.CODES[name]), torch.stack(plain[names.index(name)]))
    expected = F.direction(base, R, plain, (0.9, 0.99), 1e-6, active)
    found = kernels.direction_of_codes(base, R, stored, (0.9, 0.99), 1e-6, active)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for i, name in enumerate(names):
        anew = codes.encode(torch.stack(plain[i]), codes.CODES[name])
        again = tuple([torch.zeros_like(x) for x in of] for of in stored[i])
        kernels.encode(torch.stack(plain[i]), *again, codes.CODES[name], active, None)
        for which, (old, new) in enumerate(zip(before[i], anew, strict=True)):
            for now in (stored[i][which], again[which]):
                # sums in another order: between two codes it may be the other one
                assert (now[0] != new[0]).float().mean() < 0.01 and (now[2] != new[2]).float().mean() < 0.01
            assert torch.equal(stored[i][which][1], old[1]) and not again[which][1].any()


def test_codes_are_rounded_without_bias(kernels):
    """Over draws of 300 steps; each is one of the two neighbours."""
    for name, code in codes.CODES.items():
        values = torch.randn(1, 4, 40, generator=torch.Generator().manual_seed(0))
        # less than the first code a second moment does not become
        values = values.square().clamp(min=1e-4) if name == "exp_avg_sq" else values
        many = values.expand(300, -1, -1).contiguous()
        into = [list(torch.zeros_like(x)) for x in codes.encode(many, code)]
        kernels.encode(many, *into, code, None, range(300))
        found = codes.decode(*map(torch.stack, into), code)
        steps = 2.0**-code.bits * (values.abs() + 2.0**-code.octaves / code.span * values.abs().amax())
        assert ((found - values).abs() <= 1.01 * steps).all()
        assert ((found.mean(0) - values[0]).abs() <= 0.15 * steps[0]).all()


@pytest.mark.parametrize("settings", WHOLE, ids=lambda settings: settings["state_dtype"])
@pytest.mark.parametrize("shape", [(3, 96, 40), (192, 40), (40, 192)])
def test_parts_and_experts_of_a_whole_moment(shape, settings, monkeypatch, kernels):
    """Views of a moment that is stored in one: experts, and parts along either dimension."""
    monkeypatch.setattr(fira_hf.projected, "rounds_state", lambda group: False)
    fuses = {(192, 40): {"split": 2}, (40, 192): {"split": 2, "transposed": True}}.get(shape, {})
    start = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    flat = (shape[0] * shape[1], shape[2]) if len(shape) == 3 else shape
    results = []
    for ops in (F, kernels):
        monkeypatch.setattr(
            fira_hf.matrices, "_operations", lambda device, ops=ops: ops if device.type == "cuda" else F
        )
        p = pretended(start)
        optimizer = optimizer_of(p, **settings, **fuses)
        for gradient in gradients(flat, 7):
            step(optimizer, (p, gradient.view(shape)))
        results.append(torch.Tensor(p.detach()))
    assert (results[1] - results[0]).norm() <= tolerance(settings) * (results[0] - start).norm()


def test_a_weight_that_lies_as_its_transposed(kernels):
    """Its moment does not: beside one that lies alike otherwise it is read in another way."""
    settings, sequence = {**WHOLE[3], "refresh": "together"}, gradients((70, 40), 5)  # alone it has the same turn
    results = []
    for together in (True, False):
        tall, wide = pretended(weight((70, 40))), Pretended(weight((40, 70)).detach().t().contiguous().t())
        optimizers = [optimizer_of(tall, wide, **settings)] if together else []
        optimizers = optimizers or [optimizer_of(p, **settings) for p in (tall, wide)]
        for gradient in sequence:
            tall.grad, wide.grad = gradient.clone(), gradient.clone().t()
            for optimizer in optimizers:
                optimizer.step()
        results.append(torch.Tensor(tall.detach()))
        assert wide.isfinite().all() and not torch.equal(wide, weight((40, 70)))
    assert torch.equal(*results)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_published_package(shape, kernels):
    """As in test_parity.py, through the kernels."""
    import fira

    ours, theirs = pretended(weight(shape)), weight(shape)
    start = theirs.detach().clone()
    mine = FiraAdamW([{"params": [ours], **PUBLISHED, "rank": 6, "update_proj_gap": 5, "alpha": 0.25}], lr=1e-2)
    group = {"rank": 6, "update_proj_gap": 5, "alpha": 0.25, "proj_type": "std"}
    published = fira.FiraAdamW([{"params": [theirs], **group}], lr=1e-2, no_deprecation_warning=True)
    for gradient in gradients(shape, 12):
        theirs.grad = gradient.clone()
        published.step()
        step(mine, (ours, gradient))
    assert (torch.Tensor(ours.detach()) - theirs.detach()).norm() <= 1e-3 * (theirs.detach() - start).norm()


@pytest.mark.parametrize(
    "settings",
    [{}, {"state_dtype": "bfloat16", "stochastic_rounding": True}]
    + [{**of, "stochastic_rounding": rounds} for of in WHOLE for rounds in (False, True)],
    ids=str,
)
def test_resume_is_bit_equal(settings, kernels):
    """From a checkpoint in the middle of an interval, what is drawn at random included."""
    p, grads = pretended(weight((70, 40), dtype=torch.bfloat16)), [[gradient] for gradient in gradients((70, 40), 12)]
    assert_resumes(lambda params: optimizer_of(*params, **settings), [p], grads, stop=6)


@pytest.mark.parametrize("projection", ["power", "random"])
def test_no_read_after_the_first_step(projection, kernels):
    """At the defaults, statistics included, over three intervals in which every basis is refreshed."""
    params = [pretended(weight(shape, seed=i)) for i, shape in enumerate([(70, 40), (40, 70), (70, 40), (90, 80)])]
    dense = pretended(weight((30,), dtype=torch.bfloat16))
    projected = {"params": params, "rank": 6, "projection": projection}
    optimizer = FiraAdamW([projected, {"params": [dense]}], lr=1e-2)
    optimizer.track_statistics = True
    sequences = [gradients(p.shape, 30, seed=i) for i, p in enumerate(params)]
    dense.grad = torch.ones_like(dense)
    bases = []
    for t, grads in enumerate(zip(*sequences, strict=True)):
        for p, gradient in zip(params, grads, strict=True):
            p.grad = gradient
        if t == 0:
            optimizer.step()
            continue
        with no_reads():
            optimizer.step()
        bases.append(optimizer.state[params[0]]["basis"].clone())
    changes = sum(not torch.equal(a, b) for a, b in zip(bases, bases[1:], strict=False))
    assert changes in (2, 3)  # every tenth of 29 steps
    assert optimizer.pop_statistics()["captured_energy"] > 0


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("at", [4, 5])
@pytest.mark.parametrize("settings", [{}, *WHOLE], ids=str)
def test_a_bad_gradient_changes_nothing_where_a_basis_is_due_and_where_not(at, bad, settings, kernels):
    p = pretended(weight((70, 40)))
    optimizer = optimizer_of(p, refresh="together", **settings)  # due at calls 0, 4, 8
    for gradient in gradients((70, 40), at):
        step(optimizer, (p, gradient))
    before = {k: v.clone() for k, v in optimizer.state[p].items() if torch.is_tensor(v)} | {"": p.detach().clone()}
    step(optimizer, (p, torch.full((70, 40), bad)))
    after = {**optimizer.state[p], "": p.detach()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("settings", [{}, *WHOLE], ids=str)
def test_nothing_of_the_weights_size_is_made(settings, kernels):
    """In an ordinary step and in a refresh: only what is low-rank is allocated, in two parts at most."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                # The interpreter handles what it is given as bytes; a meta tensor has no memory.
                if not isinstance(tensor, torch.Tensor) or tensor.dtype == torch.uint8 or tensor.is_meta:
                    continue
                if tensor.untyped_storage().data_ptr() not in known:
                    self.numel = max(self.numel, tensor.numel())
            return out

    p = pretended(weight((160, 128), dtype=torch.bfloat16))
    optimizer = optimizer_of(p, rank=16, refresh="together", **settings)
    sequence = gradients((160, 128), 9)
    step(optimizer, (p, sequence[0]))
    for gradient in sequence[1:]:
        p.grad = gradient.bfloat16()
        tensors = [p.data, p.grad, *(x for x in optimizer.state[p].values() if torch.is_tensor(x))]
        known = {x.untyped_storage().data_ptr() for x in tensors}
        with Largest() as largest:
            optimizer.step()
        assert 0 < largest.numel <= 2 * 160 * 16


def test_weights_that_are_stepped_inside_backward(kernels):
    """The same as by `optimizer.step()`, bit for bit."""

    def train(layerwise):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Tanh(), torch.nn.Linear(40, 20))
        for layer in (model[0], model[2]):
            layer.weight = pretended(layer.weight)
        biases = [model[0].bias, model[2].bias]
        groups = [{"params": [model[0].weight, model[2].weight], "rank": 6, "update_proj_gap": 3}, {"params": biases}]
        optimizer = FiraAdamW(groups, lr=1e-2)
        if layerwise:
            step_in_backward(optimizer)
        for _ in range(7):
            model(torch.randn(8, 24)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in model.parameters()]

    assert all(map(torch.equal, train(True), train(False)))


@pytest.mark.parametrize("sides", [(0, 8), (8, 0)])
def test_a_process_without_a_part_of_the_weight(sides, kernels):
    """Where fewer rows than processes are sharded: nothing is launched on nothing, and norms of nothing are zero."""
    long, short = sides
    grads, bases, weights = [torch.ones(sides)], [torch.ones(3, short).t()], [torch.ones(sides)]
    active = torch.ones(1, dtype=torch.bool)
    for ops in (F, kernels):
        R, norms = ops.project(grads, bases)
        assert R.shape == (1, long, 3) and not R.any() and norms.shape == (1, long, 1) and not norms.any()
        moments = [[torch.zeros(long, 3)], [torch.zeros(long, 3)]]
        N, R_norms, N_norms = ops.direction("adamw", R, moments, (0.9, 0.999), 1e-6, active)
        assert not any(x.any() for x in (N, R_norms, N_norms))
        ops.apply_updates(weights, grads, N, R, torch.ones(1, 1, 1), 1.0, norms, bases, 1.0, active)
        assert ops.transposed_products(grads, R).shape == (1, short, 3)
    for project, apply_updates in (
        (whole.project, whole.apply_updates),
        (kernels.project_moments, kernels.apply_moment_updates),
    ):
        for is_turned in (False, True):
            stored = (short, long) if is_turned else (long, short)
            of = [whole.Whole(*whole.encode(torch.zeros(stored), 4), stored[1], is_turned)] if all(stored) else None
            of = of or [whole.Whole(torch.zeros(stored), None, stored[1], is_turned)]
            Z, norms = project(grads, of, bases, 0.9)
            assert Z.shape == (1, long, 3) and not Z.any() and norms.shape == (1, long, 2) and not norms.any()
            apply_updates(weights, grads, of, Z, norms[..., :1], bases, 1.0, 0.9, active, None, None)
