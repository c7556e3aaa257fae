"""What `recipes.benchmarks.cost` counts, against what can be counted by hand."""

import ast
import inspect
import json
from pathlib import Path

import pytest
import torch

from recipes import files
from recipes.benchmarks import cost, counting, report
from recipes.benchmarks.models import SIZES

ROOT = Path(__file__).parents[1]
TINY = SIZES["tiny"]
ELEMENTS = 2 * (4 * 64 * 64 + 3 * 64 * 172)  # of the 14 matrices of its two layers
BF16 = torch.bfloat16


def cost_of(function, *tensors):
    """Cost of a function of tensors; what it gives is not computed."""
    with counting.counting(with_kernels=True) as counter:
        function(*tensors)
    return counter.cost


def test_each_operation_by_hand():
    """4 x 6 times 6 x 2 in bf16; a row of 6 in fp32. Views, allocations and host arithmetic cost nothing."""
    G, Q, row = torch.ones(4, 6, dtype=BF16), torch.ones(6, 2, dtype=BF16), torch.ones(1, 6)
    assert cost_of(lambda: (G.t()[1:].unbind(), G.view(2, 12), torch.empty(9), torch.empty_like(G))) == counting.Cost()
    assert cost_of(lambda: G @ Q) == counting.Cost(1, 2 * (24 + 12 + 8), bf16=2 * 4 * 6 * 2)
    assert cost_of(lambda: G.float() @ Q.float()) == counting.Cost(3, (2 + 4 + 4) * (24 + 12) + 4 * 8, fp32=96)
    assert cost_of(lambda: row.mul_(2.0)) == counting.Cost(1, 2 * 24)  # read and written
    assert cost_of(lambda: row.copy_(row.clone())) == counting.Cost(2, 2 * 2 * 24)  # written only
    assert cost_of(lambda: torch.mm(row, row.t(), out=torch.empty(1, 1))) == counting.Cost(1, 24 + 24 + 4, fp32=12)
    assert cost_of(lambda: row.expand(4, 6) + row) == counting.Cost(1, 24 + 24 + 4 * 24)  # an expanded row is one row
    assert cost_of(lambda: row * row) == counting.Cost(1, 2 * 24)  # the same tensor twice is read once
    assert cost_of(lambda: torch.linalg.svd(torch.empty(6, 4))).fp32 == 6 * 6 * 16 + 20 * 64


def test_nothing_runs_and_a_read_has_an_answer():
    weight = torch.ones(3)
    with counting.counting(with_kernels=True) as counter:
        counter.steps = 7
        weight.zero_()
        assert weight.sum().item() == 7.0 and weight.isfinite().tolist() == [True] * 3
        assert (weight > 0).any()
    assert counter.cost.reads == 3
    assert weight.tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("sizes", "lists", "launches"),
    [
        ([10] * 36, 4, 1),
        ([10] * 37, 4, 2),
        ([10] * 220, 1, 2),
        ([0, 10, 0], 1, 1),
        ([0], 1, 0),
        ([320 * 65_536], 4, 1),
        ([320 * 65_536 + 1], 4, 2),
        ([160 * 65_536] * 5, 4, 3),
    ],
)
def test_lists_of_tensors_take_several_launches(sizes, lists, launches):
    """By torch's rule: so many tensors, and so many parts of them, in one launch."""
    assert counting.multi_tensor_launches(sizes, lists) == launches


def test_fused_adamw_is_what_the_formula_says():
    """torch's own, in bf16 and in fp32: W and moments in and out, G in; and 14 counts of steps."""
    for dtype, element in ((BF16, 14), (torch.float32, 28)):
        step = cost.count_steps("adamw", TINY, 16, dtype, 3)[-1]
        on_paper = cost.METHODS["AdamW, moments as weights"](TINY, 16, dtype)["ordinary"]
        assert on_paper["bytes"] == element * ELEMENTS
        assert step.bytes == on_paper["bytes"] + 14 * 4 * 3  # the counts are read and written, and read
        assert step.launches == on_paper["launches"] + 1
    assert cost.METHODS[cost.REFERENCE](TINY, 16, BF16)["ordinary"]["bytes"] == 22 * ELEMENTS


def test_the_floor():
    row = cost.METHODS["floor"](TINY, 16, BF16)["ordinary"]
    assert (row["launches"], row["bytes"], row["bf16"]) == (2, 8 * ELEMENTS, 2 * 2 * 16 * ELEMENTS)


def test_the_published_package_by_hand():
    """Its code starts 26 operations for each matrix and reads once, for the limiter."""
    row = cost.METHODS["fira"](TINY, 16, BF16)
    assert (row["ordinary"]["launches"], row["ordinary"]["reads"]) == (26 * 14, 14)
    assert row["ordinary"]["bf16"] == 3 * 2 * 16 * ELEMENTS  # project, and back twice
    assert row["average"]["bytes"] == pytest.approx((199 * row["ordinary"]["bytes"] + row["refresh"]["bytes"]) / 200)


@pytest.mark.parametrize("with_kernels", [True, False])
def test_ours_passes_through_all_kinds_of_steps(with_kernels):
    row = cost.ours(TINY, 16, BF16, with_kernels)
    assert row["ordinary"]["reads"] == 0
    assert row["ordinary"]["launches"] < row["average"]["launches"]
    assert row["ordinary"]["bytes"] < row["average"]["bytes"] < row["refresh"]["bytes"]
    assert sum(row["ordinary"][unit] for unit in ("fp32", "tf32", "bf16")) >= 2 * 2 * 16 * ELEMENTS


def test_what_stands_for_the_kernels_counts_its_arguments():
    """One 8 x 4 matrix of rank 2 with its gradient, in bf16: each argument once, what is in place twice."""
    W, G = torch.empty(8, 4, dtype=BF16), torch.empty(8, 4, dtype=BF16)
    Q, moments = torch.empty(4, 2), [[torch.empty(8, 2)], [torch.empty(8, 2)]]
    with counting.counting(with_kernels=True) as counter:
        kernels = counting.Kernels(counter)
        R, norms = kernels.project([G], [Q])
        assert (R.shape, norms.shape) == ((1, 8, 2), (1, 8, 1))
        in_two = 2 * 2 * 4 * 16  # of rows of two elements each, which are filled up to 16
        assert counter.cost == counting.Cost(3, 2 * 32 + 4 * (8 + 16 + 8) + 2 * in_two, bf16=2 * 128)
        counter.cost = counting.Cost()
        N, R_norms, N_norms = kernels.direction("adamw", R, moments, (0.9, 0.999), 1e-6, torch.ones(1), None)
        assert (N.shape, R_norms.shape, N_norms.shape) == (R.shape, norms.shape, norms.shape)
        assert counter.cost.bytes == 4 * (16 + 2 * 2 * 16 + 16 + 2 * 8) + 4 + 4  # torch.ones is counted, too
        counter.cost = counting.Cost()
        kernels.apply_updates([W], [G], N, R, R.new_empty(1, 1, 1), 1.0, norms, [Q], 1.0, None, None)
        factors = 2 * 16 * (8 + 4)  # B is read for the one and for the other
        assert counter.cost == counting.Cost(4, 3 * 2 * 32 + 4 * (16 + 16 + 1 + 8 + 8 + 8) + 2 * factors, bf16=128)
        assert kernels.transposed_products([G], R).shape == (1, 4, 2)
        with pytest.raises(AttributeError, match="stand-in for fira_hf.kernels.other"):
            kernels.other  # noqa: B018


def test_what_stands_for_the_kernels_takes_their_arguments():
    """Read, not imported: that needs Triton."""
    kernels = {}
    for module in ("kernels", "scale_kernels"):
        tree = ast.parse((ROOT / f"fira_hf/{module}.py").read_text(encoding="utf-8"))
        kernels |= {function.name: function.args for function in tree.body if isinstance(function, ast.FunctionDef)}
    for name in ("project", "transposed_products", "direction", "advance", "scales", "apply_updates"):
        given = inspect.signature(getattr(counting.Kernels, name)).parameters.values()
        named = [p.name for p in given if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
        assert [argument.arg for argument in kernels[name].args][: len(named)] == named, name


def test_the_larger_of_host_and_device():
    device = counting.Device(bandwidth=100, fp32=10, tf32=20, bf16=40)
    seconds = counting.Cost(launches=10**6, bytes=50, fp32=5, tf32=5, bf16=10).seconds(device)
    assert seconds == {"host": 4.0, "device": 0.5 + 0.5 + 0.25 + 0.25, "step": 4.0}


def test_the_command_writes_rows_and_the_table_shows_them(tmp_path, monkeypatch, capsys):
    def missing(*of):
        raise ImportError

    monkeypatch.setitem(cost.METHODS, "apollo-torch", missing)
    path = tmp_path / "cost.json"
    methods = f"floor;{cost.REFERENCE};galore-torch;apollo-torch"
    assert cost.main(["--sizes", "tiny", "--methods", methods, "--output", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["devices"].keys() == counting.DEVICES.keys() and content["launch_seconds"] == 4e-6
    lines = report.cost_table(content).splitlines()
    assert "| TINY, rank 16 | apollo-torch | not installed |" in "\n".join(lines)
    (times,) = (line for line in lines if f"| {cost.REFERENCE} | 0.0 |" in line)
    assert times.count("1.00") == 4  # of itself: two kinds of steps on two devices
    assert len({line.count("|") for line in lines[: lines.index("")]}) == 1
    for words in (["--sizes", "9b"], ["--methods", "sgd"]):
        with pytest.raises(SystemExit):
            cost.main(words)
    assert "'9b'; there are tiny" in capsys.readouterr().err


def test_a_step_costs_no_more_than_adamws():
    """By the committed counts of the largest models: what the page and the README say of the kernels."""
    rows = {(row["size"], row["method"]): row for row in files.read_json(ROOT / "docs/benchmarks/cost.json")["rows"]}
    # Of each kind of step the bytes an element, the launches, and the time beside AdamW's.
    most = {("7b", "ordinary"): (9.8, 185, 0.62), ("7b", "average"): (11.2, 430, 0.72)}
    most |= {("1b", "ordinary"): (14.8, 130, 1.0), ("1b", "average"): (19.0, 380, 1.35)}
    for (size, kind), (bytes_an_element, launches, share) in most.items():
        row, reference = rows[size, "fira_hf"], rows[size, cost.REFERENCE]
        assert row[kind]["bytes"] <= bytes_an_element * row["elements"], (size, kind)
        assert row[kind]["launches"] <= launches, (size, kind)
        assert row[kind]["reads"] == 0
        seconds = (of[kind]["seconds"]["H100"]["step"] for of in (row, reference))
        assert next(seconds) <= share * next(seconds), (size, kind)


def test_the_committed_costs_are_what_is_counted():
    """At the smallest size, of what is always installed."""
    rows = files.read_json(ROOT / "docs/benchmarks/cost.json")["rows"]
    for row in (row for row in rows if row["size"] == "60m" and row["method"] != "apollo-torch"):
        assert cost.count("60m", row["method"], "bfloat16") == row
