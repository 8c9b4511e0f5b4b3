"""``differentiate`` and ``legalize``: the contract, the graphs, and derivatives against autograd."""

from __future__ import annotations

import pytest
import torch

import fxpass
from fxpass.ir import ops
from fxpass.ir.legalize import semantic_nodes
from fxpass.ir.metadata import provenance
from fxpass.ir.program import Program
from fxpass.models import small_potential
from fxpass.testing.contract import PassContract
from fxpass.testing.golden import graph_text
from fxpass_passes.differentiate import Differentiate
from fxpass_passes.legalize import Legalize
from test_capture import Pair, captured, inputs


def energy() -> Program:
    return captured(Pair())


def forces() -> Program:
    return Differentiate().apply(energy()).program


def small() -> Program:
    return fxpass.capture(small_potential(torch.float64))


def test_differentiate_keeps_the_contract() -> None:
    (outcome,) = PassContract(Differentiate(), [energy]).check()
    program = outcome.program
    assert program.stage == "forces"
    gradient = program.outputs[-1]
    assert (gradient.name, gradient.dims, gradient.unit) == ("edge_gradient", ("edges", 3), "eV/Angstrom")


def test_differentiate_does_not_run_twice() -> None:
    result = fxpass.run_passes(forces(), "differentiate")
    (record,) = result.records
    assert record.skipped is not None and "stage" in record.skipped and not record.modified


@pytest.mark.parametrize("make", [energy, small])
@pytest.mark.parametrize(("atoms", "edges"), [(6, 30), (1, 0), (2, 1)])
def test_the_gradient_is_autograd_s(make: object, atoms: int, edges: int) -> None:
    from fxpass.testing.contract import example_inputs

    program = make()  # type: ignore[operator]
    derived = Differentiate().apply(program.copy()).program
    values = list(example_inputs(program, {"atoms": atoms, "edges": edges, "graphs": 1}))
    (spec,) = program.with_property("edge_vector")
    at = [s.name for s in program.inputs].index(spec.name)
    values[at] = values[at].requires_grad_(True)
    names = [s.name for s in program.outputs]
    total = program.graph_module(*values)[names.index(program.energy)].sum()
    (expected,) = torch.autograd.grad(total, values[at])
    found = derived.graph_module(*[v.detach() for v in values])
    assert torch.allclose(found[-1], expected, rtol=1e-12, atol=1e-14)
    for name, before, after in zip(names, program.graph_module(*values), found, strict=False):
        assert torch.equal(before.detach(), after), name


def test_the_backward_graph_is_made_of_the_same_ops() -> None:
    program = Differentiate().apply(small()).program
    kinds = {(str(n.target), n.args[-1]) for n in program.graph.nodes if n.target in (ops.tensor_product, ops.linear)}
    assert {("fxpass.tensor_product.default", "x1"), ("fxpass.tensor_product.default", "weight")} <= kinds
    assert ("fxpass.linear.default", "x") in kinds
    backward = [n for n in program.graph.nodes if n.op == "call_function" and provenance(n).backward]
    assert len(backward) > 30 and all(provenance(n).made_by == "differentiate" for n in backward)


def test_an_op_without_a_derivative_is_named() -> None:
    def by_bits(v: torch.Tensor, i: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return torch.zeros(s.shape[0], dtype=v.dtype) + torch.special.airy_ai(v).sum()

    with pytest.raises(fxpass.PassError) as caught:
        fxpass.run_passes(captured(torch.nn.Module(), by_bits), "differentiate")
    assert caught.value.where.pass_name == "differentiate" and "airy" in str(caught.value)


def test_legalize_keeps_the_contract() -> None:
    one, two = PassContract(Legalize(), [energy, forces]).check()
    for outcome in (one, two):
        assert not semantic_nodes(outcome.program)
        assert {a.rule for a in outcome.applications} >= {"gather", "scatter_sum"}
    torch.testing.FileCheck().check("aten.index_select").check("aten.index_add").run(graph_text(one.program))


def test_legalize_leaves_a_graph_of_aten_alone() -> None:
    legal = Legalize().apply(energy()).program
    again = Legalize().apply(legal.copy())
    assert not again.modified and again.applications == ()


def test_legalize_keeps_provenance_and_assumptions() -> None:
    program = fxpass.run_passes(small(), "specialize-species").program
    assert program.assumptions
    legal = fxpass.run_passes(program, "legalize").program
    assert legal.assumptions == program.assumptions
    made = [n for n in legal.graph.nodes if n.op == "call_function" and provenance(n).made_by == "legalize"]
    assert {"harmonics", "layers.0.linear_in"} <= {provenance(n).module for n in made}


def test_a_legal_program_computes_the_same_bits() -> None:
    program = small()
    legal = Legalize().apply(program.copy()).program
    from fxpass.testing.contract import example_inputs

    values = example_inputs(program, {"atoms": 9, "edges": 50, "graphs": 2})
    for a, b in zip(program.graph_module(*values), legal.graph_module(*values), strict=True):
        assert torch.equal(a, b)


def test_inputs_of_other_sizes_after_legalisation() -> None:
    legal = Legalize().apply(forces()).program
    for atoms, edges in ((1, 0), (3, 2), (50, 400)):
        x = inputs(atoms, edges)
        assert legal.graph_module(*x)[-1].shape == (edges, 3)
