"""Each private torch name that fxpass uses still does what fxpass needs of it; tried with torch 2.13.0."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import sympy
import torch
from torch import nn

from fxpass import _torch_compat as compat
from fxpass.ir import ops  # noqa: F401  defines fxpass::fusion_guard

SPECS = [("x", ("edges", 3), torch.float64), ("index", (2, "edges"), torch.int64), ("ptr", ("graphs+1",), torch.int64)]


def test_the_tested_version_runs() -> None:
    assert torch.__version__.partition("+")[0] in compat.TESTED_TORCH


def test_fake_inputs_share_named_sizes_and_nothing_else() -> None:
    x, index, ptr = compat.fake_inputs(SPECS, {"edges": 7, "graphs": 7})
    assert str(x.shape[0]) == str(index.shape[1]) != str(ptr.shape[0])
    assert x.shape[1] == 3 and isinstance(x, compat.FakeTensor)
    assert str(ptr.shape[0]).endswith("+ 1")
    assert isinstance(compat.size_expr(x.shape[0]), sympy.Symbol) and compat.size_expr(3) == 3


@pytest.mark.parametrize("edges", [0, 1, 50])
def test_a_trace_is_dynamic_down_to_nothing(edges: int) -> None:
    fakes = compat.fake_inputs(SPECS, {"edges": 1009, "graphs": 211})
    graph = compat.trace(lambda x, i, p: (x.sin().sum(1) * i.shape[1] + p.shape[0],), fakes, stacks=False)
    assert compat.frozen_sizes(fakes) == ()
    x = torch.randn(edges, 3, dtype=torch.float64)
    (found,) = graph(x, torch.zeros(2, edges, dtype=torch.int64), torch.zeros(5, dtype=torch.int64))
    assert torch.allclose(found, x.sin().sum(1) * edges + 5)


def test_a_frozen_size_is_seen() -> None:
    fakes = compat.fake_inputs(SPECS, {"edges": 1009, "graphs": 211})
    compat.trace(lambda x, i, p: (x * int(x.shape[0]),), fakes, stacks=False)
    assert any("1009" in tie for tie in compat.frozen_sizes(fakes))


def test_stacks_and_annotations_reach_the_nodes() -> None:
    fakes = compat.fake_inputs(SPECS, {"edges": 11, "graphs": 3})

    def forward(x: torch.Tensor, i: torch.Tensor, p: torch.Tensor) -> tuple[torch.Tensor]:
        with torch.fx.traceback.annotate({"fxpass": {"module": "here"}}):
            return (x.cos(),)

    graph = compat.trace(forward, fakes, stacks=True)  # torch records frames from a `forward` on
    (node,) = (n for n in graph.graph.nodes if n.op == "call_function")
    assert node.meta["custom"] == {"fxpass": {"module": "here"}}
    assert "test_torch_compat.py" in node.meta["stack_trace"]
    assert isinstance(node.target, compat.OpOverload)


def test_the_derivative_of_silu_has_a_derivative() -> None:
    fakes = compat.fake_inputs(SPECS, {"edges": 11, "graphs": 3})
    fakes[0].requires_grad_(True)

    def function(x: torch.Tensor, i: torch.Tensor, p: torch.Tensor) -> tuple[torch.Tensor]:
        return torch.autograd.grad(nn.functional.silu(x).sum(), x)

    graph = compat.trace(function, fakes, stacks=False)
    assert torch.ops.aten.silu_backward.default not in [n.target for n in graph.graph.nodes]
    others = (torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: graph(a, *others)[0], (x,))
    expected = torch.autograd.grad(nn.functional.silu(x).sum(), x)[0]
    assert torch.allclose(graph(x, *others)[0], expected, atol=1e-15)


def test_wigner_3j_is_a_number_inside_a_trace() -> None:
    fakes = compat.fake_inputs(SPECS, {"edges": 11, "graphs": 3})
    seen = []

    def function(x: torch.Tensor, i: torch.Tensor, p: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append(compat.wigner_3j(1, 1, 2))
        return (x + 1,)

    compat.trace(function, fakes, stacks=False)
    assert abs((seen[0] ** 2).sum() - 1) < 1e-12


def test_e3nn_imports_alone_and_leaves_no_global_allowed() -> None:
    code = (
        "import torch, fxpass._torch_compat as c; c.o3();"
        "assert slice not in torch.serialization.get_safe_globals(); print('ok')"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ok"


@pytest.fixture
def two_kernels() -> Iterator[torch._ops.OpOverload]:
    library = torch.library.Library("fxcompat", "DEF")
    library.define("f(Tensor x) -> Tensor")
    library.impl("f", lambda x: x * 2, "CPU")
    library.impl("f", lambda x: x * 3, "CompositeExplicitAutograd")
    yield torch.ops.fxcompat.f.default
    library._destroy()


def test_every_implementation_of_an_op_is_found(two_kernels: torch._ops.OpOverload) -> None:
    assert set(compat.registered_kernels(two_kernels)) == {"CPU", "CompositeExplicitAutograd"}
    assert compat.registered_kernels(torch.ops.aten.matmul.default) == ("CompositeImplicitAutograd",)
    elsewhere = compat.fallback_kernel(two_kernels)
    assert elsewhere is not None
    assert elsewhere(torch.ones(2)).tolist() == [3, 3] and two_kernels(torch.ones(2)).tolist() == [2, 2]
    assert compat.fallback_kernel(two_kernels, "CompositeImplicitAutograd") is None
    assert compat.fallback_kernel(torch.ops.aten.mm.default) is None


@pytest.mark.slow
def test_inductor_keeps_regions_apart() -> None:
    """``compile_in_regions``, ``watched_kernels`` and ``kernel_regions`` on two multiplications."""
    guard = torch.ops.fxpass.fusion_guard.default
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    doubled = graph.call_function(torch.ops.aten.mul.Tensor, (x, 2.0))
    inside = graph.call_function(guard, (doubled, "enter region"))
    graph.output(graph.call_function(torch.ops.aten.sin.default, (inside,)))
    module = torch.fx.GraphModule(nn.Module(), graph)

    def regions(lowered: torch.fx.Graph) -> dict[torch.fx.Node, str]:
        return {n: "region" for n in lowered.find_nodes(op="call_function", target=torch.ops.aten.sin.default)}

    torch.compiler.reset()
    with compat.watched_kernels() as kernels:
        y = torch.linspace(0, 1, 7)
        assert torch.allclose(compat.compile_in_regions(module, guard, regions)(y), torch.sin(2 * y))
    assert [(set(regions), names) for regions, names in kernels] == [(set(), ("mul",)), ({"region"}, ("sin",))]


@pytest.mark.slow
def test_aot_compile_keeps_sizes_dynamic() -> None:
    class Sums(torch.nn.Module):
        def forward(self, x: torch.Tensor, index: torch.Tensor) -> list[torch.Tensor]:
            return [torch.zeros(5).index_add(0, index, x.sin().sum(1))]

    examples = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    compiled = compat.aot_compile(Sums(), examples, [{0: "edges"}, {0: "edges"}])
    x, index = torch.rand(9, 3), torch.arange(9) % 5
    assert torch.allclose(compiled(x, index)[0], Sums()(x, index)[0])
