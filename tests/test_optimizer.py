"""Properties of FiraAdamW that follow from the method, whatever the implementation."""

import gc
import types

import pytest
import torch
from torch import Tensor

import fira_hf.optimizer
from fira_hf import PUBLISHED, FiraAdamW
from fira_hf import functional as F
from reference import fira_step, gradients, weight


def fira(*params, lr=1e-2, **settings):
    adam = {k: settings.pop(k) for k in ("betas", "eps", "weight_decay") if k in settings}
    return FiraAdamW(
        [{"params": list(params), **PUBLISHED, "rank": 6, "update_proj_gap": 5} | settings], lr=lr, **adam
    )


def run(optimizer, parameter, sequence):
    for gradient in sequence:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return optimizer.state[parameter]


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
def test_basis_is_orthonormal_and_spans_the_leading_right_singular_space(shape):
    parameter = weight(shape)
    optimizer = fira(parameter)
    for t, gradient in enumerate(gradients(shape, 11)):
        Q = run(optimizer, parameter, [gradient])["basis"].double()
        # Householder vectors in fp32 are orthonormal to some ulps (1.2e-7) times the square root of their length
        assert (Q.T @ Q - torch.eye(6)).abs().max() <= 2e-6
        if t % 5 == 0:
            tall = gradient.double() if shape[0] >= shape[1] else gradient.double().T
            V = torch.linalg.svd(tall).Vh[:6].T
            # Wedin: the angle is at most the rounding of the fp32 SVD (1e-6 of the gradient) over the gap of the
            # spectrum at the sixth value (here about a hundredth of it)
            assert torch.linalg.matrix_norm(Q @ Q.T - V @ V.T, 2) <= 1e-4


@pytest.mark.parametrize("gap", [1, 2, 5])
def test_basis_is_refreshed_at_every_gap_counted_in_real_updates(gap):
    """Zero gradients in between, of any number and at any place, do not move the cadence."""
    shape = (12, 8)
    parameter = weight(shape)
    optimizer = fira(parameter, rank=3, update_proj_gap=gap)
    old, generator = None, torch.Generator().manual_seed(3)
    for step, gradient in enumerate(gradients(shape, 16)):
        for _ in range(int(torch.randint(0, 4, (), generator=generator))):
            run(optimizer, parameter, [torch.zeros(shape)])
        state = run(optimizer, parameter, [gradient])
        assert state["step"] == step + 1
        new = state["basis"].clone()
        assert (old is None or not torch.equal(old, new)) == (step % gap == 0), step
        old = new


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (5, 5)])
def test_rank_ends_at_the_short_side(shape):
    parameter, same = weight(shape), weight(shape)
    state = run(fira(parameter, rank=1000), parameter, gradients(shape, 7))
    other = run(fira(same, rank=5), same, gradients(shape, 7))
    assert state["basis"].shape == (5, 5)
    assert state["exp_avg"].shape == (max(shape), 5)
    assert torch.equal(parameter, same)
    assert all(torch.equal(state[k], other[k]) for k in ("basis", "exp_avg", "exp_avg_sq"))


def test_complete_basis_is_adamw_in_rotated_coordinates():
    """With rank = short side and alpha = 1 nothing is left for the residual, and W Q is trained by Adam on G Q.

    Not W by Adam on G: Adam is not invariant under rotation. Within one interval, as moments are not rotated with the
    basis; without eps and decay, which torch puts in other places than the published Fira.
    """
    shape = (20, 12)
    parameter = weight(shape)
    start = parameter.detach().clone()
    sequence = gradients(shape, 30)
    Q = torch.linalg.svd(sequence[0].double(), full_matrices=False).Vh.T
    optimizer = fira(parameter, rank=12, update_proj_gap=1000, eps=0.0)

    rotated = torch.nn.Parameter(start.double() @ Q)
    adam = torch.optim.AdamW([rotated], lr=1e-2, eps=0.0, weight_decay=0.0)
    for gradient in sequence:
        run(optimizer, parameter, [gradient])
        rotated.grad = gradient.double() @ Q
        adam.step()
    expected = (rotated.detach() @ Q.T).float()
    # fp32 against fp64: as for WEIGHT in test_reference.py
    assert (parameter - expected).norm() <= 1e-4 * (expected - start).norm()


@pytest.mark.parametrize("shape", [(9, 1), (1, 9), (1, 1)])
def test_one_column_is_adamw(shape):
    """The only rotation of a line is its sign, which the update does not see."""
    ours, theirs = weight(shape), weight(shape)
    start = ours.detach().clone()
    optimizer = fira(ours, rank=4, update_proj_gap=1000, eps=0.0)
    adam = torch.optim.AdamW([theirs], lr=1e-2, eps=0.0, weight_decay=0.0)
    for gradient in gradients(shape, 30):
        run(optimizer, ours, [gradient])
        theirs.grad = gradient
        adam.step()
    assert (ours - theirs).norm() <= 1e-5 * (theirs - start).norm()


@pytest.mark.parametrize(
    "settings", [{}, {"alpha": 0.25}, {"alpha": 0.25, "residual": "paper"}, {"scaling": "matrix"}]
)
def test_wide_is_the_transpose_of_tall(settings):
    """Within one interval: new singular vectors have signs of the decomposition's choice, moments keep the old."""
    tall = weight((40, 24))
    wide = torch.nn.Parameter(tall.detach().T.contiguous())
    start = tall.detach().clone()
    sequence = gradients((40, 24), 12)
    a = run(fira(tall, update_proj_gap=100, **settings), tall, sequence)
    b = run(fira(wide, update_proj_gap=100, **settings), wide, [g.T.contiguous() for g in sequence])
    assert (tall - wide.T).norm() <= 1e-4 * (tall - start).norm()
    sign = (a["basis"] * b["basis"]).sum(0).sign()
    for name, flip in (("basis", sign), ("exp_avg", sign), ("exp_avg_sq", 1.0)):
        assert (a[name] - b[name] * flip).norm() <= 1e-4 * a[name].norm(), name


def test_memory_layout_of_weight_and_gradient_does_not_matter():
    """Conv1D weights and tied heads come as transposed or strided views."""
    shape = (40, 24)
    plain = weight(shape)
    strided = torch.nn.Parameter(plain.detach().T.contiguous().T)
    start = plain.detach().clone()
    sequence = gradients(shape, 12)
    run(fira(plain, update_proj_gap=100), plain, sequence)
    run(fira(strided, update_proj_gap=100), strided, [g.T.contiguous().T for g in sequence])
    assert not strided.is_contiguous()
    assert (plain - strided).norm() <= 1e-4 * (plain - start).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
@pytest.mark.parametrize("projected", [True, False])
def test_half_precision_weights_keep_fp32_state_and_differ_by_their_rounding(projected, shape, dtype):
    def make(p):
        return fira(p, weight_decay=0.1) if projected else FiraAdamW([p], lr=1e-2, weight_decay=0.1)

    half, full = weight(shape, dtype=dtype), weight(shape, dtype=dtype)
    full.data = full.data.float()
    narrow, wide = make(half), make(full)
    unit = torch.finfo(dtype).eps / 2
    for gradient in gradients(shape, 12):
        gradient = gradient.to(dtype)
        full.data.copy_(half.data)  # so that the rounding of one step is seen alone
        a, b = run(narrow, half, [gradient]), run(wide, full, [gradient.float()])
        for name, value in b.items():
            if torch.is_tensor(value):
                assert a[name].dtype == torch.float32, name
                # the same numbers went in, and fp32 products differ only by the order of their sums
                size = value.norm().item() if value.isfinite().all() else 0.0
                assert torch.allclose(a[name], value, rtol=1e-5, atol=1e-6 * size), name
        # Rounded once: half a unit in the last place, or of the subnormals' spacing. One percent more is for fp32
        # results that lie on either side of the middle between two neighbours.
        spacing = 1.01 * unit * full.detach().abs() + torch.finfo(dtype).smallest_normal * unit
        assert ((half.detach().float() - full.detach()).abs() <= spacing).all()


def test_no_limiter():
    """gamma=None and an unreachable gamma are the same, and the residual may grow at once."""
    shape = (40, 24)
    free, unreachable, limited = weight(shape), weight(shape), weight(shape)
    sequence = gradients(shape, 3)
    sequence[1] = 10 * sequence[1]
    sequence[2] = 100 * sequence[2]
    a = run(fira(free, gamma=None, scaling="none"), free, sequence)
    b = run(fira(unreachable, gamma=1e30, scaling="none"), unreachable, sequence)
    c = run(fira(limited, gamma=1.01, scaling="none"), limited, sequence)
    assert torch.equal(free, unreachable)
    assert torch.equal(a["residual_norm"], b["residual_norm"])
    assert a["residual_norm"] > 20 * c["residual_norm"]


def test_closure_runs_with_gradients_and_its_loss_is_returned():
    parameter = weight((12, 8))
    optimizer = fira(parameter)

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert first.item() > optimizer.step(closure).item() > 0


def test_statistics_are_means_over_matrices_and_steps():
    shapes = [(40, 24), (24, 40), (12, 12)]
    settings = {"rank": 6, "alpha": 0.25, "update_proj_gap": 5, "scaling": "none"}
    matrices = [weight(s, seed=i) for i, s in enumerate(shapes)]
    bias = torch.nn.Parameter(torch.ones(5))
    optimizer = FiraAdamW([{"params": matrices, **PUBLISHED, **settings}, {"params": [bias]}], lr=1e-2)
    optimizer.track_statistics = True
    assert optimizer.pop_statistics() == {}

    expected, states = [], [{} for _ in shapes]
    sequences = [gradients(s, 9, seed=i) for i, s in enumerate(shapes)]
    for step in range(9):
        bias.grad = torch.ones(5)
        for i, matrix in enumerate(matrices):
            matrix.grad = sequences[i][step]
        optimizer.step()
        for i, matrix in enumerate(matrices):
            basis = optimizer.state[matrix]["basis"]
            _, states[i], statistics = fira_step(
                matrix.detach().double(), matrix.grad, states[i], basis=basis, **settings
            )
            expected.append(statistics)
        if step == 5:  # steps without a gradient are not counted
            for p in [*matrices, bias]:
                p.grad = torch.zeros_like(p)
            optimizer.step()
    actual = optimizer.pop_statistics()
    assert set(actual) == {"limiter_active", "captured_energy", "residual_share"}
    for name, value in actual.items():
        mean = sum(s[name] for s in expected) / len(expected)
        assert isinstance(value, float)
        # the limiter's share is a count: exact but for the division; the others are fp32 norms
        assert value == pytest.approx(mean, rel=1e-6 if name == "limiter_active" else 1e-4)
    assert 0 < actual["limiter_active"] < 1
    assert optimizer.pop_statistics() == {}


@pytest.mark.parametrize("residual", ["reference", "paper"])
def test_residual_share_is_of_the_applied_update(residual):
    settings = {"rank": 6, "alpha": 0.25, "residual": residual}
    parameter = weight((40, 24))
    optimizer = FiraAdamW([{"params": [parameter], **PUBLISHED, **settings}])
    optimizer.track_statistics = True
    parameter.grad = gradients((40, 24), 1)[0]
    _, _, statistics = fira_step(parameter.detach().double(), parameter.grad, {}, **settings)
    optimizer.step()
    assert optimizer.pop_statistics() == pytest.approx(statistics, rel=1e-4)


def test_statistics_do_not_change_the_training_and_are_off_at_first():
    watched, plain = weight((40, 24)), weight((40, 24))
    a, b = fira(watched), fira(plain)
    assert a.track_statistics is False
    a.track_statistics = True
    run(a, watched, gradients((40, 24), 8))
    run(b, plain, gradients((40, 24), 8))
    assert torch.equal(watched, plain)
    assert b.pop_statistics() == {}


def test_constructor_creates_no_state_and_frozen_weights_get_none():
    trained, frozen, bias, frozen_bias = weight((12, 8)), weight((12, 8)), weight((8,)), weight((8,))
    optimizer = FiraAdamW([{"params": [trained, frozen], "rank": 4}, {"params": [bias, frozen_bias]}])
    assert len(optimizer.state) == 0
    for p in (trained, bias):
        p.grad = torch.ones_like(p)
    before = frozen.detach().clone(), frozen_bias.detach().clone()
    optimizer.step()
    assert set(optimizer.state) == {trained, bias}
    assert torch.equal(frozen, before[0])
    assert torch.equal(frozen_bias, before[1])


def test_parameters_can_be_swapped_after_construction():
    """As FSDP2 and model.to_empty() do: the optimizer knows its parameters by its groups alone."""
    shapes = [(12, 8), (8,)]
    old, new, same = ([weight(s) for s in shapes] for _ in range(3))
    optimizer = FiraAdamW([{"params": old[:1], "rank": 4}, {"params": old[1:]}], lr=1e-2)
    other = FiraAdamW([{"params": same[:1], "rank": 4}, {"params": same[1:]}], lr=1e-2)
    for group, parameter in zip(optimizer.param_groups, new, strict=True):
        group["params"][0] = parameter
    for _ in range(3):
        for a, b in zip(new, same, strict=True):
            a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
        optimizer.step()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(new, same, strict=True))
    assert all(torch.equal(a, weight(s)) for a, s in zip(old, shapes, strict=True))
    assert set(optimizer.state) == set(new)


def test_no_attribute_refers_to_a_parameter():
    """Otherwise a swapped parameter would stay alive, with its memory, and be updated in place of the new one."""
    matrix, bias = weight((12, 8)), weight((8,))
    optimizer = FiraAdamW([{"params": [("matrix", matrix)], "rank": 4}, {"params": [("bias", bias)]}])
    optimizer.track_statistics = True
    matrix.grad, bias.grad = torch.ones_like(matrix), torch.ones_like(bias)
    optimizer.step()

    outside = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
    attributes = {k: v for k, v in vars(optimizer).items() if k not in ("param_groups", "state")}
    assert attributes
    seen, waiting = set(), [*attributes.values(), *optimizer.state.values()]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or value is optimizer:
            continue
        seen.add(id(value))
        assert value is not matrix
        assert value is not bias
        if isinstance(value, torch.Tensor):
            assert value.untyped_storage().data_ptr() not in (matrix.data_ptr(), bias.data_ptr())
        if isinstance(value, types.FunctionType):
            waiting.extend(cell.cell_contents for cell in value.__closure__ or ())
        elif not isinstance(value, outside):
            waiting.extend(gc.get_referents(value))


def test_groups_keep_their_own_settings():
    """Two projected groups of one optimizer train as two optimizers."""
    settings = [
        {"refresh": "together", "rank": 2, "alpha": 0.25, "lr": 1e-2, "scaling": "matrix", "weight_decay": 0.1},
        {**PUBLISHED, "rank": 5, "update_proj_gap": 2, "lr": 1e-3, "betas": (0.5, 0.9), "eps": 1e-3, "gamma": None},
    ]
    together, apart = ([weight((12, 8), seed=i) for i in range(2)] for _ in range(2))
    one = FiraAdamW([{"params": [p], **s} for p, s in zip(together, settings, strict=True)])
    two = [FiraAdamW([{"params": [p], **s}]) for p, s in zip(apart, settings, strict=True)]
    for gradient in gradients((12, 8), 6):
        for p in together + apart:
            p.grad = gradient.clone()
        for optimizer in (one, *two):
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def _reduced_by_trainer(of_products):
    torch.backends.fp32_precision = "tf32"  # as transformers does for TrainingArguments(tf32=True)


def _reduced_by_torch(of_products):
    torch.set_float32_matmul_precision("medium")


def _reduced_alone(of_products):
    of_products.fp32_precision = "tf32"


@pytest.mark.parametrize("reduce", [_reduced_by_trainer, _reduced_by_torch, _reduced_alone])
def test_products_of_the_optimizer_are_fp32_whatever_the_training_allows(reduce, monkeypatch):
    """In TF32 or bf16 no basis is orthonormal, and a weight without one is not trained. What was set stays so."""
    both = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    first = [one.fp32_precision for one in both]
    seen, sequence = [], list(gradients((128, 96), 3))
    project = F.project
    monkeypatch.setattr(F, "project", lambda *a: seen.append([one.fp32_precision for one in both]) or project(*a))
    weights = []
    try:
        for how in (None, reduce):
            if how is not None:
                how(both[0])
            before = [one.fp32_precision for one in both]
            parameter = weight((128, 96))
            run(FiraAdamW([{"params": [parameter], "rank": 32}], lr=1e-2), parameter, sequence)
            assert [one.fp32_precision for one in both] == before
            weights.append(parameter.detach())
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.fp32_precision = "none"
        for one, precision in zip(both, first, strict=True):
            one.fp32_precision = precision
    assert before[0] == "tf32" and seen and all(set(one) <= {"ieee", "none"} for one in seen)
    assert torch.equal(*weights) and not torch.equal(weights[0], weight((128, 96)))


def test_memory_that_runs_out_as_states_are_made_has_written_nothing(monkeypatch):
    """As with auto_find_batch_size, which tries again with a smaller batch from the same weights."""

    def build():
        matrix, vector = weight((12, 8)), weight((5,))
        matrix.grad, vector.grad = torch.ones(12, 8), torch.ones(5)
        return FiraAdamW([{"params": [matrix], "rank": 2}, {"params": [vector]}], lr=1e-2), matrix, vector

    def fails(*_):
        raise torch.OutOfMemoryError("out of memory")

    optimizer, *weights = build()
    before = [p.detach().clone() for p in weights]
    with monkeypatch.context() as patched:
        patched.setattr("fira_hf.optimizer.create_dense", fails)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
    assert all(map(torch.equal, weights, before))
    optimizer.step()
    other, *expected = build()
    other.step()
    assert all(map(torch.equal, weights, expected))


@pytest.mark.parametrize("projection", ["columns", "power"])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_step_that_memory_ran_out_of_can_be_made_again(failing, projection, monkeypatch):
    """Neither the turn of a subspace nor what becomes of its moments is lost, whichever group ran out."""

    def train(fails):
        weights, generator = [weight((12, 8)), weight((12, 8))], torch.Generator().manual_seed(0)
        common = {"rank": 2, "update_proj_gap": 3, "refresh": "together", "projection": projection}
        optimizer = FiraAdamW([{"params": [p], **common} for p in weights], lr=1e-2)
        for step in range(8):
            for p in weights:
                p.grad = torch.randn(12, 8, generator=generator)
            if step in (0, 3) and fails:
                left, refresh = [failing], fira_hf.optimizer.refresh

                def runs_out(*given, left=left, refresh=refresh):
                    if not left[0]:
                        raise torch.OutOfMemoryError("out of memory")
                    left[0] -= 1
                    refresh(*given)

                with monkeypatch.context() as patched:
                    patched.setattr("fira_hf.optimizer.refresh", runs_out)
                    with pytest.raises(torch.OutOfMemoryError):
                        optimizer.step()
            optimizer.step()
        calls = [optimizer.state[p]["calls"] for p in weights]
        return weights, calls

    (weights, calls), (expected, others) = train(True), train(False)
    assert calls == others and all(map(torch.equal, weights, expected))


def test_a_step_is_made_on_the_device_of_each_weight(monkeypatch):
    """Triton launches on the current device: with device_map="auto" a weight may be on another one."""
    current, seen = [], []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *_):
            current.pop()

    class Elsewhere(torch.nn.Parameter):
        device = property(lambda self: torch.device("cuda", self.number))

    weights = [Elsewhere(weight((12, 8)).detach()) for _ in range(2)]
    for number, p in enumerate(weights):
        p.number, p.grad = number, torch.ones(12, 8)
    optimizer = fira(*weights, projection="power", rank=2)
    inner = F.apply_updates
    monkeypatch.setattr(F, "apply_updates", lambda *args: (seen.append(list(current)), inner(*args)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr("fira_hf.matrices._operations", lambda device: F)
    optimizer.step()
    assert seen == [[torch.device("cuda", 0)], [torch.device("cuda", 1)]]


def test_products_stay_in_fp32_until_the_last_thread_has_left():
    """Layerwise on a model over two GPUs: autograd has a thread for each, and the precision is that of all threads."""
    of_products = torch.backends.mkldnn.matmul
    before, one, other = of_products.fp32_precision, F.fp32_products(), F.fp32_products()
    of_products.fp32_precision = "tf32"
    try:
        one.__enter__()
        other.__enter__()
        one.__exit__(None, None, None)
        assert of_products.fp32_precision == "ieee"
        other.__exit__(None, None, None)
        assert of_products.fp32_precision == "tf32"
    finally:
        of_products.fp32_precision = before


def _set_state(name, change):
    def edit(optimizer, p):
        optimizer.state[p][name] = change(optimizer.state[p][name])

    return edit


def _set_data_of_state(name, change):
    def edit(optimizer, p):
        optimizer.state[p][name].data = change(optimizer.state[p][name].data)

    return edit


def _set_weight(change):
    def edit(optimizer, p):
        p.data = change(p.data)  # the gradient stays

    return edit


def _set_gradient(change):
    def edit(optimizer, p):
        p.grad.data = change(p.grad.data)

    return edit


def _set_group(**settings):
    return lambda optimizer, p: optimizer.param_groups[0].update(settings)


def _into_sparse(optimizer, p):
    p.grad = p.grad.to_sparse()


def _without_exp_avg(optimizer, p):
    del optimizer.state[p]["exp_avg"]


def _plain_state(optimizer, p):
    optimizer.state[p] = dict(optimizer.state[p])


def _into_other_group(optimizer, p):
    optimizer.param_groups[0]["params"].remove(p)
    optimizer.param_groups[1]["params"].append(p)


OF_ALL = {
    "moment of another dtype": (_set_state("exp_avg", Tensor.bfloat16), "exp_avg .* in torch.bfloat16"),
    "data of a moment of another dtype": (_set_data_of_state("exp_avg", Tensor.bfloat16), "exp_avg .* torch.bfloat16"),
    "count of another dtype": (_set_data_of_state("step", Tensor.double), "step .* in torch.float64"),
    "moment of another shape": (_set_state("exp_avg", lambda x: x[1:]), "state of a weight of another shape"),
    "data of a moment of another shape": (_set_data_of_state("exp_avg", lambda x: x[1:]), "of another shape"),
    "moment elsewhere": (_set_state("exp_avg", lambda x: x.to("meta")), "exp_avg .* on meta"),
    "moment missing": (_without_exp_avg, "without exp_avg"),
    "weight of another dtype": (_set_weight(Tensor.double), "of dtype torch.float64"),
    "weight of another shape": (_set_weight(lambda x: x[1:].clone()), "gradient of another shape"),
    "expanded weight": (_set_weight(lambda x: x[:1].expand(x.shape)), "is expanded"),
    "gradient of another dtype": (_set_gradient(Tensor.double), "gradient of another kind"),
    "gradient of another shape": (_set_gradient(lambda x: x[1:]), "gradient of another shape"),
    "sparse gradient": (_into_sparse, "sparse"),
}
OF_PROJECTED = {
    "flat weight": (_set_weight(Tensor.flatten), "cannot project flattened"),
    "split": (_set_group(split=2), "made with split=1"),
    "rank": (_set_group(rank=3), "made with rank=2"),
    "state_dtype": (_set_group(state_dtype="bfloat16"), "made with state_dtype='float32'"),
    "setting that is not valid": (_set_group(gamma=-1.0), "gamma"),
    "state that is none of ours": (_plain_state, "loaded past load_state_dict"),
    "other group": (_into_other_group, "of another shape"),
}


@pytest.mark.parametrize(
    ("index", "edit"), [(i, name) for i in (0, 1) for name in OF_ALL] + [(0, name) for name in OF_PROJECTED]
)
def test_what_has_passed_is_checked_again_when_it_changes(index, edit, monkeypatch):
    """As by an optimizer that has seen nothing; and not in between, which would take the host's time."""
    weights = weight((12, 8)), weight((8,))
    groups = [{"params": [weights[0]], **PUBLISHED, "rank": 2}, {"params": [weights[1]]}]
    optimizer, checked = FiraAdamW(groups, lr=1e-2), []
    misfit = fira_hf.optimizer.misfit
    monkeypatch.setattr(fira_hf.optimizer, "misfit", lambda p: checked.append(p) or misfit(p))
    for calls in (2, 4, 4, 4):  # the first step makes the state, which the second looks at
        for p in weights:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert len(checked) == calls
    change, message = (OF_ALL | OF_PROJECTED)[edit]
    change(optimizer, weights[index])
    before = [p.detach().clone() for p in weights]
    said = []
    for _ in range(3):  # what has failed has not passed
        with pytest.raises((RuntimeError, ValueError), match=message) as error:
            optimizer.step()
        said.append((error.type, str(error.value)))
        if len(said) == 2:
            optimizer._passed, optimizer._checked = {}, {}
    assert len(set(said)) == 1
    assert all(map(torch.equal, weights, before))


@pytest.mark.parametrize("numel", [1, 2])
def test_a_gradient_whose_square_is_no_fp32_is_passed_over_by_single_numbers_too(numel):
    p = torch.nn.Parameter(torch.ones(numel))
    optimizer = FiraAdamW([{"params": [p]}], lr=1e-2)
    for step in range(20):
        p.grad = torch.full_like(p, 1e20 if step == 5 else 1.0)
        optimizer.step()
    assert optimizer.state[p]["step"] == 19 and torch.allclose(p, torch.tensor(1 - 19 * 1e-2), atol=1e-4)
