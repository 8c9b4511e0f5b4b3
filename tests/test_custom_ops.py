"""``legalize-custom-ops``: one numeric path for ops whose implementations differ between devices.

The case is multi-scale deformable attention (Zhu et al., ICLR 2021, Eq. 3): detectors compute it by plain torch on
the CPU and by a kernel of their own elsewhere, so that an export that was checked on the CPU is wrong on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.testing import FileCheck

import fxpass
from fxpass.errors import LoweringError, UsageError
from fxpass.ir import decompositions
from fxpass.ir.decompositions import custom_nodes, is_custom, reference_of
from fxpass.ir.program import Program, TensorSpec
from fxpass.targets.torchscript import TorchScriptTarget, export_module
from fxpass.testing import PassContract, build_program, example_inputs, graph_text, run_program
from fxpass.verify.devices import compare_kernels, device_rows, devices, kernel_rows
from fxpass_passes.legalize_custom_ops import LegalizeCustomOps
from test_capture import captured

pytestmark = pytest.mark.once

aten = torch.ops.aten
F64 = torch.float64
LEVELS = ((6, 8), (3, 4))  # height and width of each feature map


def attention(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Multi-scale deformable attention in plain torch: the reference.

    Args:
        value: [batch, sum of height * width over the levels, heads, channels].
        locations: [batch, queries, heads, levels, points, 2], in 0 to 1.
        weights: [batch, queries, heads, levels, points].

    Returns:
        [batch, queries, heads * channels].
    """
    batch, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    total: Any = 0
    at = 0
    for level, (height, width) in enumerate(LEVELS):
        grid = value[:, at : at + height * width].permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        at += height * width
        places = (2 * locations[:, :, :, level] - 1).transpose(1, 2).reshape(batch * heads, queries, points, 2)
        sampled = torch.nn.functional.grid_sample(grid, places, align_corners=False)
        scale = weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, points)
        total = total + (sampled * scale).sum(-1)
    return total.view(batch, heads * channels, queries).transpose(1, 2).contiguous()


def other_kernel(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """What another device computes: it takes the locations for those of pixel corners."""
    return attention(value, locations * 0.9 + 0.05, weights)


def by_entry_point(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return attention(value, locations, weights)


def cpu_kernel(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The same numbers by another way: a loop over the levels in reverse."""
    return attention(value, locations, weights.flip(3).flip(3))


def shape(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty((value.shape[0], locations.shape[1], value.shape[2] * value.shape[3]))


def setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def backward(ctx: Any, grad: Tensor) -> Any:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        return torch.autograd.grad(attention(*leaves), leaves, grad)


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[None]:
    made = torch.library.Library("fxdetect", "DEF")
    schema = "(Tensor value, Tensor locations, Tensor weights) -> Tensor"
    for name in ("attention", "opaque"):
        made.define(f"{name}{schema}", tags=torch.Tag.pt2_compliant_tag)
        made.impl(name, cpu_kernel, "CPU")
        made.impl(name, other_kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fxdetect::{name}", shape, lib=made)
        torch.library.register_autograd(f"fxdetect::{name}", backward, setup_context=setup, lib=made)
    made.define("twice(Tensor x) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
    made.impl("twice", lambda x: x * 2, "CPU")
    made.impl("twice", lambda x: x + x, "CompositeImplicitAutograd")
    made.define("cut(Tensor x) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
    made.impl("cut", lambda x: (x * 2).detach(), "CPU")
    inside = torch.library.Library("fxpass", "FRAGMENT")
    inside.define("test_soft(Tensor x) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
    inside.impl("test_soft", lambda x: torch.log1p(torch.exp(x)), "CPU")
    inside.impl("test_soft", lambda x: torch.log(1 + torch.exp(x)), "CompositeImplicitAutograd")
    yield
    made._destroy()
    inside._destroy()


class Detector(nn.Module):
    """A layer of deformable attention: where it looks and how much it weighs are made from the queries."""

    def __init__(self, op: str = "attention") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.op = op
        self.value = nn.Linear(8, 8, dtype=F64)
        self.offsets = nn.Linear(8, 2 * 2 * 3 * 2, dtype=F64)
        self.scores = nn.Linear(8, 2 * 2 * 3, dtype=F64)

    def forward(self, features: Tensor, queries: Tensor) -> Tensor:
        batch, count, _ = queries.shape
        value = self.value(features).view(batch, -1, 2, 4)
        locations = torch.sigmoid(self.offsets(queries)).view(batch, count, 2, 2, 3, 2)
        weights = torch.softmax(self.scores(queries).view(batch, count, 2, 6), -1).view(batch, count, 2, 2, 3)
        return getattr(torch.ops.fxdetect, self.op)(value, locations, weights)


PLACES = sum(h * w for h, w in LEVELS)
DETECTOR = (
    TensorSpec("features", ("batch", PLACES, 8), F64),
    TensorSpec("queries", ("batch", "queries", 8), F64),
)
REFERENCES = {"fxdetect::attention": attention}


def detector_inputs(batch: int, queries: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, n, 8, generator=g, dtype=F64) for n in (PLACES, queries))  # type: ignore[return-value]


# --- export of a module


def test_the_export_holds_aten_alone_and_is_right_on_new_inputs_and_shapes(tmp_path: Any) -> None:
    model = Detector()
    exported = export_module(model, DETECTOR, references=REFERENCES)
    assert "fxdetect" not in str(exported.inlined_graph) and "aten::grid_sampler" in str(exported.inlined_graph)
    exported.save(str(tmp_path / "detector.pt"))
    loaded = torch.jit.load(str(tmp_path / "detector.pt"))
    for batch, queries in ((1, 1), (1, 5), (2, 7), (3, 40), (4, 1)):
        inputs = detector_inputs(batch, queries, seed=queries)
        (found,) = loaded(*inputs)
        assert torch.allclose(found, model(*inputs), rtol=1e-12, atol=1e-12)


def test_a_traced_model_computes_what_the_device_s_kernel_computes() -> None:
    """The failure that the pass is for, as far as a CPU can show it: the same model, another implementation."""
    inputs = detector_inputs(2, 7)
    exported = export_module(Detector(), DETECTOR, references={"fxdetect::attention": other_kernel})
    assert (exported(*inputs)[0] - Detector()(*inputs)).abs().max() > 0.05


def test_an_opaque_op_is_refused_by_name_and_place() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Detector("opaque")

        def forward(self, features: Tensor, queries: Tensor) -> Tensor:
            return self.layer(features, queries)

    with pytest.raises(LoweringError) as caught:
        export_module(Outer(), DETECTOR, references=REFERENCES)
    text = str(caught.value)
    assert "fxdetect.opaque.default" in text and "layer" in text and "fxpass.decompositions" in text
    assert caught.value.where.node == "opaque" and caught.value.where.module_path == "layer"


def test_a_module_that_ties_a_size_is_refused() -> None:
    class Frozen(nn.Module):
        def forward(self, features: Tensor, queries: Tensor) -> Tensor:
            return queries.view(int(queries.shape[0]) * int(queries.shape[1]), 8)

    with pytest.raises(LoweringError, match="ties a size"):
        export_module(Frozen(), DETECTOR)


def test_a_reference_s_derivative_reaches_the_original_s_parameters_unchanged() -> None:
    model = Detector().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    export_module(model, DETECTOR, references=REFERENCES)
    assert model.training and all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# --- programs


def soft() -> Program:
    """A custom op in fxpass's namespace, which the verifier lets pass, with an implementation in ATen."""

    def body(graph: fx.Graph, x: fx.Node) -> dict[str, fx.Node]:
        half = graph.call_function(aten.mul.Tensor, (x, 0.5))
        return {"y": graph.call_function(torch.ops.fxpass.test_soft.default, (half,))}

    return build_program(body, (TensorSpec("x", ("atoms", 3), F64),))


def plain() -> Program:
    def body(graph: fx.Graph, x: fx.Node) -> dict[str, fx.Node]:
        return {"y": graph.call_function(aten.silu.default, (x,))}

    return build_program(body, (TensorSpec("x", ("atoms", 3), F64),))


def flash() -> Program:
    """The attention that torch picks on a CPU, where it has a kernel that no other device has."""

    def energy(vectors: Tensor, index: Tensor, species: Tensor) -> Tensor:
        rows = torch.cat([vectors, vectors[:, :1]], 1)
        q = rows.unsqueeze(0).unsqueeze(0)
        (mixed, _) = aten._scaled_dot_product_flash_attention_for_cpu.default(q, q, q)
        messages = mixed[0, 0, :, :1]
        return torch.zeros((species.shape[0], 1), dtype=F64).index_add(0, index[1], messages).squeeze(-1)

    return captured(nn.Module(), energy)


def test_it_keeps_the_contract() -> None:
    replaced, left = PassContract(LegalizeCustomOps(), [soft, plain]).check()
    assert [(a.rule, a.node) for a in replaced.applications] == [("fxpass.test_soft.default", "test_soft_default")]
    assert not left.modified and left.refusals == ()


def test_the_graph_before_and_after() -> None:
    FileCheck().check("fxpass.test_soft.default").run(graph_text(soft()))
    after = graph_text(LegalizeCustomOps().apply(soft()).program)
    FileCheck().check("aten.mul.Tensor(%x, 0.5)").check("aten.exp.default").check("aten.log.default").run(after)
    assert "test_soft" not in after


def test_an_op_of_one_device_becomes_its_reference() -> None:
    p = flash()
    assert [str(n.target) for n in custom_nodes(p)] == ["aten._scaled_dot_product_flash_attention_for_cpu.default"]
    outcome = LegalizeCustomOps().apply(p.copy())
    assert len(outcome.applications) == 1 and not custom_nodes(outcome.program)
    for sizes in ({"atoms": 6, "edges": 20}, {"atoms": 2, "edges": 2}):
        inputs = example_inputs(p, sizes)
        for name, value in run_program(p, inputs).items():
            assert torch.allclose(run_program(outcome.program, inputs)[name], value, rtol=1e-12, atol=1e-12)
    forces = fxpass.run_passes(p, [LegalizeCustomOps(), "differentiate"]).program
    assert not custom_nodes(forces)


def test_further_ops_by_name() -> None:
    for name in ("aten::silu", "aten.silu.default"):
        outcome = LegalizeCustomOps(ops=(name,)).apply(plain())
        assert outcome.modified and "silu" not in graph_text(outcome.program)
        x = example_inputs(plain(), {"atoms": 7})
        assert torch.allclose(run_program(outcome.program, x)["y"], run_program(plain(), x)["y"], rtol=1e-13)
    (parsed,) = fxpass.run_passes(plain(), 'legalize-custom-ops{ops=["aten::silu"]}').records
    assert parsed.modified


def detector_program(op: str = "attention") -> Program:
    def body(graph: fx.Graph, v: fx.Node, locations: fx.Node, weights: fx.Node) -> dict[str, fx.Node]:
        return {"y": graph.call_function(getattr(torch.ops.fxdetect, op).default, (v, locations, weights))}

    return build_program(body, ATTENTION)


ATTENTION = (
    TensorSpec("value", ("graphs", PLACES, 2, 4), F64),
    TensorSpec("locations", ("graphs", "atoms", 2, 2, 3, 2), F64),
    TensorSpec("weights", ("graphs", "atoms", 2, 2, 3), F64),
)


def test_an_op_without_a_reference_stays_and_is_refused() -> None:
    outcome = LegalizeCustomOps(references=REFERENCES).apply(detector_program("opaque"))
    assert not outcome.modified
    (refusal,) = outcome.refusals
    assert refusal.rule == "fxdetect.opaque.default" and refusal.nodes == ("opaque_default",)
    assert "no reference" in refusal.reason and "references={...}" in refusal.reason
    with pytest.raises(LoweringError, match=r"cannot carry fxdetect\.opaque\.default") as caught:
        TorchScriptTarget().lower(outcome.program)
    assert "legalize-custom-ops" in str(caught.value)


# --- where references come from


def test_names_and_order_of_references() -> None:
    op = torch.ops.fxdetect.attention.default
    assert reference_of(op) is None
    for spelling in ("fxdetect::attention", "fxdetect.attention"):
        for name in (spelling, f"{spelling}.default"):
            assert reference_of(op, {name: attention}) is attention
    both = {"fxdetect::attention": other_kernel, "fxdetect::attention.default": attention}
    assert reference_of(op, both) is attention
    twice = reference_of(torch.ops.fxdetect.twice.default)
    assert twice is not None and torch.equal(twice(torch.ones(2)), torch.full((2,), 2.0))
    assert is_custom(op) and not is_custom(aten.mm.default) and not is_custom(torch.ops.fxpass.linear.default)


def test_an_entry_point_gives_a_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def listed(value: str) -> Callable[..., EntryPoints]:
        every = EntryPoints([EntryPoint("fxdetect.attention", value, decompositions.GROUP)])
        return lambda **wanted: every.select(**wanted)

    op = torch.ops.fxdetect.attention.default
    monkeypatch.setattr(decompositions.metadata, "entry_points", listed(f"{__name__}:by_entry_point"))
    assert reference_of(op) is by_entry_point
    outcome = LegalizeCustomOps().apply(detector_program())
    assert outcome.modified and not custom_nodes(outcome.program)
    monkeypatch.setattr(decompositions.metadata, "entry_points", listed(f"{__name__}:nothing_of_that_name"))
    with pytest.raises(UsageError, match="nothing_of_that_name"):
        reference_of(op)


# --- per-device comparison


def sample(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "value": torch.randn(2, PLACES, 2, 4, generator=g, dtype=F64),
        "locations": torch.rand(2, 5, 2, 2, 3, 2, generator=g, dtype=F64),
        "weights": torch.rand(2, 5, 2, 2, 3, generator=g, dtype=F64),
    }


def test_every_implementation_is_compared_with_the_reference() -> None:
    op = torch.ops.fxdetect.attention.default
    rows = {row.check: row for row in compare_kernels(op, attention, tuple(sample().values()))}
    assert rows["fxdetect.attention.default on cpu"].passed
    assert rows["fxdetect.attention.default on cpu, derivative"].passed
    elsewhere = rows["fxdetect.attention.default elsewhere"]
    assert not elsewhere.passed and elsewhere.value > 0.05
    assert {check.split(" on ")[-1].split(",")[0] for check in rows if " on " in check} == set(devices())


def test_kernels_see_what_the_program_gives_them() -> None:
    p = detector_program()
    rows = kernel_rows(p, [sample(0), sample(1)], REFERENCES)
    assert {row.structure for row in rows} == {"sample 0, attention_default", "sample 1, attention_default"}
    assert sum(not row.passed for row in rows) == 2
    assert kernel_rows(detector_program("opaque"), [sample()], REFERENCES) == ()


def test_a_result_is_compared_on_every_device() -> None:
    p = detector_program()
    right = LegalizeCustomOps(references=REFERENCES).apply(p.copy()).program
    rows = device_rows(p, right, [sample()])
    assert [row.check for row in rows] == [f"y on {device}" for device in devices()]
    assert all(row.passed for row in rows)
    wrong = LegalizeCustomOps(references={"fxdetect::attention": other_kernel}).apply(p.copy()).program
    (row, *_) = device_rows(p, wrong, [sample()])
    assert not row.passed and row.value > 0.05


def test_a_result_s_derivative_is_compared_too() -> None:
    p = flash()
    legal = LegalizeCustomOps().apply(p.copy()).program
    names = [spec.name for spec in p.inputs]
    inputs = dict(zip(names, example_inputs(p, {"atoms": 6, "edges": 20}), strict=True))
    rows = device_rows(p, legal, [inputs])
    assert {row.check for row in rows} >= {"energy on cpu", "edge_gradient on cpu"} and all(row.passed for row in rows)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered:UserWarning")
def test_a_kernel_that_loses_the_derivative_or_changes_the_shape_does_not_pass() -> None:
    rows = compare_kernels(torch.ops.fxdetect.cut.default, lambda x: x * 2, (torch.ones(3, dtype=F64),))
    derivative = next(row for row in rows if row.check.endswith("derivative"))
    assert derivative.value == 1.0 and not derivative.passed and rows[0].passed
    wrong = compare_kernels(torch.ops.fxdetect.twice.default, lambda x: (x * 2).sum(), (torch.ones(3, dtype=F64),))
    assert math.isnan(wrong[0].value) and not wrong[0].passed and "returns" in wrong[0].note


@pytest.mark.gpu
def test_the_comparison_on_a_gpu() -> None:
    p = detector_program()
    right = LegalizeCustomOps(references=REFERENCES).apply(p.copy()).program
    assert {row.check for row in device_rows(p, right, [sample()])} == {"y on cpu", "y on cuda"}
    kernels = {row.check: row.passed for row in kernel_rows(p, [sample()], REFERENCES)}
    assert not kernels["fxdetect.attention.default on cuda"]
