"""``guard-fusion``: the regions it finds, that they outlive every pass, and that no compiler fuses across a guard."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.testing import FileCheck

import fxpass
from fxpass._torch_compat import watched_kernels
from fxpass.algebra.multilinear import Path, TensorProduct
from fxpass.errors import PassError
from fxpass.ir import ops
from fxpass.ir.guards import guards, lower_guards, region_of, regions
from fxpass.ir.metadata import provenance
from fxpass.ir.ops import fusion_guard
from fxpass.ir.program import Program, TensorSpec
from fxpass.models import small_potential
from fxpass.targets.base import executable
from fxpass.targets.eager import EagerTarget
from fxpass.targets.inductor import InductorTarget
from fxpass.targets.torchscript import TorchScriptTarget, _scriptable, script
from fxpass.testing import PassContract, build_program, example_inputs, graph_text, run_program
from fxpass_passes.guard_fusion import GuardFusion

pytestmark = pytest.mark.once

aten = torch.ops.aten
F64 = torch.float64
INPUTS = (
    TensorSpec("vectors", ("edges", 3), F64, "1x1o", "Angstrom", frozenset({"edge_vector"})),
    TensorSpec("sender", ("edges",), torch.int64, properties=frozenset({"index:atoms"})),
    TensorSpec("receiver", ("edges",), torch.int64, properties=frozenset({"index:atoms"})),
    TensorSpec("x", ("atoms", 4), F64, "4x0e"),
    TensorSpec("batch", ("atoms",), torch.int64, properties=frozenset({"index:graphs"})),
    TensorSpec("cell", ("graphs", 3), F64),
)
SPEC = str(
    TensorProduct(
        "4x0e", "1x0e+1x1o", "4x0e+4x1o", (Path(0, 0, 0, "uvu", 0, 1.0), Path(0, 1, 1, "uvu", 4, 1.0)), 8, shared=False
    )
)
SIZES = [(9, 40, 2), (1, 0, 1), (2, 1, 1), (30, 200, 3)]

Call = Callable[..., fx.Node]
Nodes = Mapping[str, fx.Node]


def layer(call: Call, w: fx.Node, vectors: fx.Node, sender: fx.Node, receiver: fx.Node, x: fx.Node) -> fx.Node:
    """Messages [atoms, 4x0e+4x1o]: pointwise work on both sides of a convolution."""
    r2 = call(aten.sum.dim_IntList, call(aten.mul.Tensor, vectors, vectors), [-1], True)
    decay = call(aten.exp.default, call(aten.neg.default, r2))
    weights = call(aten.mul.Tensor, decay, w)
    harmonics = call(aten.cat.default, [decay, vectors], -1)
    source = call(ops.gather, call(aten.sin.default, x), sender)
    messages = call(ops.tensor_product, source, harmonics, weights, None, SPEC, "out")
    return call(ops.scatter_sum, messages, receiver, call(aten.sym_size.int, x, 0))


def gate(call: Call, features: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Vectors [atoms, 4, 3] times a sigmoid of scalars, written in ATen; and that sigmoid."""
    half = call(aten.mul.Tensor, features, 0.5)
    scalars = call(aten.slice.Tensor, half, 1, 0, 4)
    vectors = call(aten.view.default, call(aten.slice.Tensor, half, 1, 4, 16), [-1, 4, 3])
    opening = call(aten.sigmoid.default, scalars)
    return call(aten.mul.Tensor, vectors, call(aten.unsqueeze.default, opening, -1)), opening


def program(body: Callable[..., fx.Node], weights: Mapping[str, Tensor] | None = None) -> Program:
    """``body(call, weights by name, *inputs)`` returns a value for each atom; the energy is its sum in each graph."""

    def build(graph: fx.Graph, *inputs: fx.Node) -> dict[str, fx.Node]:
        def call(target: Any, *args: Any) -> fx.Node:
            return graph.call_function(target, args)

        named = {name: graph.get_attr(name) for name in weights or {}}
        value = body(call, named, *inputs)
        size = call(aten.sym_size.int, inputs[5], 0)
        return {"energy": call(ops.scatter_sum, value, inputs[4], size)}

    made = build_program(build, INPUTS, weights)
    for spec, node in zip(INPUTS, made.placeholders.values(), strict=True):
        node.meta["irreps"] = spec.irreps
    return made


W = {"w": torch.linspace(-1, 1, 8, dtype=F64).view(1, 8)}


def gated() -> Program:
    def body(call: Call, w: Nodes, vectors: fx.Node, s: fx.Node, r: fx.Node, x: fx.Node, *_: Any) -> Any:
        vector, _ = gate(call, layer(call, w["w"], vectors, s, r, x))
        return call(aten.sum.dim_IntList, call(aten.mul.Tensor, vector, vector), [1, 2])

    return program(body, W)


def scalar_network() -> Program:
    """Nothing to guard but the sum over graphs, which is taken away as well."""

    def body(graph: fx.Graph, x: fx.Node) -> dict[str, fx.Node]:
        return {"y": graph.call_function(aten.silu.default, (graph.call_function(aten.sin.default, (x,)),))}

    return build_program(body, (TensorSpec("x", ("atoms", 4), F64),))


LEGAL = "legalize,fold-constants,common-subexpressions,dead-code"
FORCES = "differentiate,fold-constants,common-subexpressions,dead-code"


def run(p: Program, *passes: Any) -> Program:
    return fxpass.run_passes(p, list(passes)).program


@pytest.fixture(scope="module")
def small() -> Program:
    return run(fxpass.capture(small_potential(F64)), "fold-constants,common-subexpressions,dead-code")


# --- what it finds


def test_it_keeps_the_contract() -> None:
    guarded, left, forces = PassContract(
        GuardFusion(), [gated, scalar_network, lambda: run(gated(), FORCES)]
    ).check()
    assert [(a.rule, a.added) for a in guarded.applications] == [("convolution", 4), ("gate", 3), ("scatter", 2)]
    assert not left.modified and left.refusals == ()
    assert {a.rule for a in forces.applications} == {"convolution", "gate", "scatter", "tensor-product"}
    assert all(outcome.refusals == () for outcome in (guarded, left, forces))


def test_the_graph_before_and_after() -> None:
    before, after = gated(), GuardFusion().apply(gated()).program
    assert "guard" not in graph_text(before)
    conv, gate_ = "convolution:tensor_product_default", "gate:mul_tensor_3"
    checks = [
        "%sin = aten.sin.default",
        f"%fusion_guard = fxpass.fusion_guard.default(%sin, 'enter {conv}",
        "gather.default(%fusion_guard, ",
        f"fusion_guard.default(%cat, 'enter {conv}",
        "tensor_product.default(%gather, %fusion_guard_1, %fusion_guard_2, ",
        "scatter_sum.default(%tensor_product, ",
        f"%fusion_guard_3 = fxpass.fusion_guard.default(%scatter_sum, 'leave {conv}",
        "aten.mul.Tensor(%fusion_guard_3, 0.5)",
        f"%fusion_guard_4 = fxpass.fusion_guard.default(%slice, 'enter {gate_}')",
        "aten.sigmoid.default(%fusion_guard_4)",
        f"fxpass.fusion_guard.default(%mul_3, 'leave {gate_}')",
        "return energy = %fusion_guard_8",
    ]
    check = FileCheck()
    for text in checks:
        check = check.check(text)
    check.run(graph_text(after))
    inside = regions(after.graph)["convolution:tensor_product_default"]
    assert [n.target for n in inside] == [ops.gather, ops.tensor_product, ops.scatter_sum]


def test_the_regions_of_a_model(small: Program) -> None:
    outcome = GuardFusion().apply(small.copy())
    kinds = Counter(a.rule for a in outcome.applications)
    assert kinds == {"polynomial": 1, "convolution": 2, "tensor-product": 2, "gate": 2, "scatter": 1}
    assert {a.module for a in outcome.applications} >= {"harmonics", "layers.0.product", "layers.1.gate.mul"}
    assert len(guards(outcome.program.graph)) == sum(a.added for a in outcome.applications) <= 30


def test_even_scalars_need_no_guard() -> None:
    spec = str(TensorProduct("4x0e", "1x0e", "4x0e", (Path(0, 0, 0, "uvu", 0, 1.0),), 4, shared=True))

    def body(call: Call, w: Nodes, vectors: fx.Node, s: fx.Node, r: fx.Node, x: fx.Node, *_: Any) -> Any:
        one = call(aten.sum.dim_IntList, x, [-1], True)
        return call(aten.sum.dim_IntList, call(ops.tensor_product, x, one, w["w"], None, spec, "out"), [1])

    outcome = GuardFusion().apply(program(body, {"w": torch.ones(4, dtype=F64)}))
    assert [a.rule for a in outcome.applications] == ["scatter"] and outcome.refusals == ()


# --- what it refuses


def test_a_gate_whose_scalars_are_shared_is_refused_with_its_nodes() -> None:
    def body(call: Call, w: Nodes, vectors: fx.Node, s: fx.Node, r: fx.Node, x: fx.Node, *_: Any) -> Any:
        vector, opening = gate(call, layer(call, w["w"], vectors, s, r, x))
        total = call(aten.sum.dim_IntList, vector, [1, 2])
        return call(aten.mul.Tensor, total, call(aten.sum.dim_IntList, opening, [1]))

    outcome = GuardFusion().apply(program(body, W))
    (refusal,) = outcome.refusals
    assert refusal.rule == "gate" and "used elsewhere" in refusal.reason
    assert "sigmoid_default" in refusal.nodes and len(refusal.nodes) == 3
    assert [a.rule for a in outcome.applications] == ["convolution", "scatter"]


def test_a_product_of_constants_is_refused() -> None:
    def body(call: Call, w: Nodes, vectors: fx.Node, s: fx.Node, r: fx.Node, x: fx.Node, *_: Any) -> Any:
        constant = call(ops.tensor_product, w["a"], w["b"], w["w"], None, SPEC, "out")
        return call(aten.mul.Tensor, call(aten.sum.default, constant), call(aten.sum.dim_IntList, x, [1]))

    weights = {"w": torch.ones(1, 8, dtype=F64), "a": torch.ones(1, 4, dtype=F64), "b": torch.ones(1, 4, dtype=F64)}
    outcome = GuardFusion().apply(program(body, weights))
    assert [(r.rule, r.reason) for r in outcome.refusals] == [("tensor-product", "nothing that is computed enters it")]


@pytest.fixture(scope="module")
def kernels() -> Iterator[torch.library.Library]:
    library = torch.library.Library("fxguard", "DEF")
    library.define("kernel(Tensor x) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
    library.define("pair(Tensor x) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag)
    library.define("noise(Tensor x) -> Tensor", tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag))
    library.define("count(Tensor x) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
    library.impl("kernel", lambda x: x * 2, "CompositeExplicitAutograd")
    library.impl("pair", lambda x: (x * 2, x * 3), "CompositeExplicitAutograd")
    library.impl("noise", lambda x: x + torch.rand_like(x), "CompositeExplicitAutograd")
    library.impl("count", lambda x: (x > 0).long(), "CompositeExplicitAutograd")
    for name, fake in {
        "kernel": torch.empty_like,
        "pair": lambda x: (torch.empty_like(x), torch.empty_like(x)),
        "noise": torch.empty_like,
        "count": lambda x: torch.empty_like(x, dtype=torch.int64),
    }.items():
        torch.library.register_fake(f"fxguard::{name}", fake, lib=library)
    yield library
    library._destroy()


def test_custom_kernels(kernels: torch.library.Library) -> None:
    own = torch.ops.fxguard

    def body(call: Call, w: Nodes, vectors: fx.Node, s: fx.Node, r: fx.Node, x: fx.Node, *_: Any) -> Any:
        a = call(own.kernel.default, call(aten.sin.default, x))
        pair = call(own.pair.default, a)
        b = call(aten.add.Tensor, *(call(operator.getitem, pair, k) for k in (0, 1)))
        c = call(aten.mul.Tensor, call(own.noise.default, b), call(own.count.default, b))
        return call(aten.sum.dim_IntList, c, [1])

    outcome = GuardFusion().apply(program(body))
    assert [(a.rule, a.node, a.added) for a in outcome.applications] == [
        ("kernel", "kernel_default", 2),
        ("kernel", "pair_default", 3),
        ("scatter", "scatter_sum_default", 2),
    ]
    assert [(r.nodes, r.reason) for r in outcome.refusals] == [
        (("noise_default",), "it has an effect or draws random numbers"),
        (("count_default",), "what leaves it is not a tensor of floating-point numbers"),
    ]


# --- what they outlive


def test_two_equal_regions_stay_two() -> None:
    def body(call: Call, w: Nodes, vectors: fx.Node, s: fx.Node, r: fx.Node, x: fx.Node, *_: Any) -> Any:
        same = [layer(call, w["w"], vectors, s, r, x) for _ in range(2)]
        return call(aten.sum.dim_IntList, call(aten.mul.Tensor, *same), [1])

    free, guarded = run(program(body, W), LEGAL), run(program(body, W), "guard-fusion", LEGAL)
    count = [sum(n.target is aten.index_add.default for n in p.graph.nodes) for p in (free, guarded)]
    assert count == [2, 3]
    name = "convolution:tensor_product_default"
    assert {name, f"{name}_1"} <= regions(guarded.graph).keys()


@pytest.fixture(scope="module")
def on_the_way(small: Program) -> dict[str, Program]:
    """The guarded program after each step of its way to ATen."""
    p = run(small, "guard-fusion")
    programs = {"guarded": p}
    steps = ("fold-constants,common-subexpressions,dead-code", *FORCES.split(","), *LEGAL.split(","))
    for number, step in enumerate(steps):
        p = programs[f"{number} {step}"] = run(p, step)
    return programs


def test_every_pass_leaves_the_regions_as_they_are(on_the_way: dict[str, Program]) -> None:
    first, *_, last = on_the_way.values()
    whole = {name: {provenance(n).module for n in nodes} for name, nodes in regions(first.graph).items()}
    assert len(whole) == 8
    for step, p in on_the_way.items():
        found = regions(p.graph)
        assert set(found) == set(whole), step
        for name, nodes in found.items():
            assert {provenance(n).module for n in nodes} <= whole[name] | {""}, step
    backward = {name: any(provenance(n).backward for n in nodes) for name, nodes in regions(last.graph).items()}
    assert {name for name, found in backward.items() if not found} == {"tensor-product:layers.0.self_connection"}
    inside = region_of(last.graph)
    made = [n for n in last.graph.nodes if provenance(n).module == "layers.1.product" and _computes(n)]
    assert len(made) > 20 and [n.name for n in made if n not in inside] == []


def _computes(node: fx.Node) -> bool:
    """Arithmetic on what is computed; adding the gradients of several users is nobody's region."""
    return node.target in (aten.mul.Tensor, aten.bmm.default, aten.mm.default, aten.index_add.default)


@pytest.fixture(scope="module")
def lowered(small: Program, on_the_way: dict[str, Program]) -> dict[str, list[Program]]:
    """Each program lowered without guards, with guards of the energy, and one with guards of the forces."""
    ways = ([FORCES, LEGAL], ["guard-fusion", FORCES, LEGAL], [FORCES, "guard-fusion", LEGAL])
    *_, last = on_the_way.values()
    return {"gated": [run(gated(), *way) for way in ways], "small": [run(small, FORCES, LEGAL), last]}


@pytest.mark.parametrize(("atoms", "edges", "graphs"), SIZES)
@pytest.mark.parametrize("which", ["gated", "small"])
def test_energy_and_gradient_are_those_without_guards(
    lowered: dict[str, list[Program]], which: str, atoms: int, edges: int, graphs: int
) -> None:
    free, *guarded = lowered[which]
    inputs = example_inputs(free, {"atoms": atoms, "edges": edges, "graphs": graphs})
    expected = run_program(free, inputs)
    for p in guarded:
        assert guards(p.graph)
        module = EagerTarget().lower(p)
        assert not any(n.target is fusion_guard for n in module.graph.nodes)
        for found in (run_program(p, inputs).values(), module(*inputs)):
            for (name, value), other in zip(expected.items(), found, strict=True):
                assert torch.allclose(value, other, rtol=1e-12, atol=1e-12), name


def test_the_derivative_of_a_region_is_guarded() -> None:
    p = run(gated(), "guard-fusion", "differentiate")
    inside = regions(p.graph)["convolution:tensor_product_default"]
    assert {(str(n.target), n.args[-1]) for n in inside if n.target is ops.tensor_product} >= {
        ("fxpass.tensor_product.default", "out"),
        ("fxpass.tensor_product.default", "weight"),
        ("fxpass.tensor_product.default", "x2"),
    }
    grad = torch.randn(4, 3, dtype=F64)
    assert torch.autograd.gradcheck(lambda x: fusion_guard(x, "enter r") ** 2, grad.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x: fusion_guard(x, "enter r") ** 3, grad)


def test_a_second_run_and_a_run_after_differentiate_add_nothing() -> None:
    once = GuardFusion().apply(gated()).program
    assert not GuardFusion().apply(once.copy()).modified
    forces = run(once, FORCES)
    assert not GuardFusion().apply(forces.copy()).modified


def test_a_pass_that_goes_around_a_guard_is_caught() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    a, b = (graph.call_function(fusion_guard, (x, f"enter {name}")) for name in "ab")
    both = graph.call_function(aten.add.Tensor, (a, b))
    leaving = [graph.call_function(fusion_guard, (both, f"leave {name}")) for name in "ab"]
    graph.output(tuple(leaving))
    with pytest.raises(PassError, match="lies in the guarded regions") as caught:
        regions(graph)
    assert caught.value.where.node == "add_tensor"


# --- what compilers make of them


def mixed(kernel: tuple[str, ...], region: Mapping[str, str], computing: set[str]) -> bool:
    """Whether a kernel computes nodes of two regions, or of a region and of none."""
    return len({region.get(name, "") for name in kernel if name in computing}) > 1


def computing(graph: fx.Graph) -> set[str]:
    """Names of the nodes that do arithmetic on floating-point tensors; views and constants belong to whoever reads."""
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        fixed = node.op == "get_attr" or not isinstance(node.meta.get("val"), Tensor)
        if fixed or (node.op == "call_function" and constant.issuperset(node.all_input_nodes)):
            constant.add(node)
    return {
        n.name
        for n in graph.nodes
        if n.op == "call_function" and n not in constant and n.meta["val"].is_floating_point() and not n.target.is_view
    }


@pytest.fixture
def texpr_on_cpu() -> Iterator[None]:
    """TorchScript's tensor-expression fuser on the CPU, by its interpreter where torch has no LLVM."""
    c = torch._C
    before = c._jit_can_fuse_on_cpu(), c._jit_get_te_must_use_llvm_cpu(), c._jit_texpr_fuser_enabled()
    c._jit_override_can_fuse_on_cpu(True)
    c._jit_set_te_must_use_llvm_cpu(False)
    c._jit_set_texpr_fuser_enabled(True)
    yield
    c._jit_override_can_fuse_on_cpu(before[0])
    c._jit_set_te_must_use_llvm_cpu(before[1])
    c._jit_set_texpr_fuser_enabled(before[2])


def texpr_groups(module: torch.jit.ScriptModule, inputs: tuple[Tensor, ...]) -> list[tuple[str, ...]]:
    """The kernels of the optimised graph, as names of the nodes of the FX graph that was scripted."""
    for _ in range(3):
        module(*inputs)
    graph = torch.jit.last_executed_optimized_graph()
    return [
        tuple(re.sub(r"\.\d+$", "", out.debugName()) for n in group.g("Subgraph").nodes() for out in n.outputs())
        for group in graph.findAllNodes("prim::TensorExprGroup", True)
    ]


def test_torchscript_s_fuser_stops_at_a_guard(texpr_on_cpu: None) -> None:
    p = run(gated(), "guard-fusion", FORCES, LEGAL)
    inputs = example_inputs(p, {"atoms": 9, "edges": 40, "graphs": 2})
    region = {n.name: r for n, r in region_of(p.graph).items()}
    arithmetic = computing(p.graph)
    unguarded = executable(p)
    for node in unguarded.graph.nodes:
        _scriptable(node)
    unguarded.recompile()
    free = texpr_groups(script(unguarded), inputs)
    assert any(mixed(kernel, region, arithmetic) for kernel in free)  # it does fuse across regions where it may
    lowered = TorchScriptTarget().lower(p)
    groups = texpr_groups(lowered, inputs)
    assert len(groups) > 2 and sum(len(g) for g in groups) > 10
    assert [g for g in groups if mixed(g, region, arithmetic)] == []
    expected = run_program(p, inputs)
    for value, other in zip(expected.values(), lowered(*inputs), strict=True):
        assert torch.allclose(value, other, rtol=1e-12, atol=1e-12)


def test_a_fence_in_torchscript_moves_no_byte() -> None:
    p = run(gated(), "guard-fusion", FORCES, LEGAL)
    lowered = TorchScriptTarget().lower(p)
    assert str(lowered.graph).count("aten::alias") <= len(guards(p.graph))
    x = torch.randn(3)
    assert torch.jit.script(_alias)(x).data_ptr() == x.data_ptr()
    frozen = torch.jit.freeze(lowered.eval())  # what a host may do to it
    torch._C._jit_pass_peephole(frozen.graph)
    assert str(frozen.graph).count("aten::alias") == str(lowered.graph).count("aten::alias") > 5


def _alias(x: Tensor) -> Tensor:
    return torch.ops.aten.alias(x)


#: what a loop nest of generated C++ does, by the region that the graph does it in; "" is between regions
FINGERPRINTS = {"": r"\(0\.5\)|sin\(", "convolution": r"0\.57735", "gate": r"\(1\)/\(.*exp\("}


def loop_nests(code: str) -> list[set[str]]:
    """The parts of the graph that each outermost loop nest of the generated C++ computes."""
    (kernels,) = re.findall(r"r\'\'\'(.*?)\'\'\'", code, re.DOTALL)
    nests = re.split(r"^    \{$", kernels, flags=re.MULTILINE)[1:]
    return [{part for part, text in FINGERPRINTS.items() if re.search(text, nest)} for nest in nests]


@pytest.mark.slow
def test_inductor_stops_at_a_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of Inductor's scheduler, by nodes of the very graph that it lowers; and the C++ that it writes."""
    from torch._inductor.utils import run_and_get_code

    from fxpass.targets import inductor

    p = run(gated(), "guard-fusion", FORCES, LEGAL)
    inputs = example_inputs(p, {"atoms": 9, "edges": 40, "graphs": 2})
    expected = run_program(p, inputs)
    region: dict[str, str] = {}

    def spy(strip: bool) -> Callable[[fx.Graph], Mapping[fx.Node, str]]:
        def look(graph: fx.Graph) -> Mapping[fx.Node, str]:
            found = region_of(graph)
            region.update((n.name, r) for n, r in found.items())
            if strip:
                lower_guards(graph)
            return {} if strip else found

        return look

    across, mixed = {}, {}
    for strip in (True, False):
        region.clear()
        monkeypatch.setattr(inductor, "region_of", spy(strip))
        torch.compiler.reset()
        with watched_kernels() as seen:
            found, code = run_and_get_code(InductorTarget().lower(p), *inputs)
        for value, other in zip(expected.values(), found, strict=True):
            assert torch.allclose(value, other, rtol=1e-12, atol=1e-12)
        assert len(seen) > 5 and len(set(region.values())) == 3
        across[strip] = [names for _, names in seen if len({region[n] for n in names if n in region}) > 1]
        nests = loop_nests(code[0])
        assert all(any(part in nest for nest in nests) for part in FINGERPRINTS)
        mixed[strip] = [nest for nest in nests if len(nest) > 1]
    assert across[True] and mixed[True]  # Inductor does fuse across regions where it may
    assert across[False] == [] and mixed[False] == []
