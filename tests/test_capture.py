"""Capture: dynamic, complete, with provenance; and refused, with the place, where it cannot be."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpass
from fxpass.algebra.spherical import spherical_harmonics
from fxpass.capture.canonical import raise_gathers_and_scatters
from fxpass.capture.capture import capture, prepare
from fxpass.errors import CaptureError, PassError, UnsupportedModelError
from fxpass.ir import ops
from fxpass.ir.legalize import legalize, semantic_nodes
from fxpass.ir.metadata import provenance
from fxpass.ir.program import Program, TensorSpec, ancestors
from fxpass.ir.verifier import verify
from fxpass.models import small_potential

INPUTS = (
    TensorSpec("edge_vectors", ("edges", 3), torch.float64, "1x1o", "Angstrom", frozenset({"edge_vector"})),
    TensorSpec("edge_index", (2, "edges"), torch.int64, None, "", frozenset({"index:atoms"})),
    TensorSpec("species", ("atoms",), torch.int64, None, "", frozenset({"below:3"})),
)
OUTPUTS = (TensorSpec("energy", (), torch.float64, None, "eV"),)


class Pair(nn.Module):
    """Energy of each atom from a network of its distances: gathers, a sum by receiver, in-place writing."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 4, dtype=torch.float64)
        self.net = nn.Sequential(nn.Linear(9, 8, dtype=torch.float64), nn.SiLU(), nn.Linear(8, 1, dtype=torch.float64))

    def forward(self, vectors: Tensor, index: Tensor, species: Tensor) -> Tensor:
        features = self.embedding(species)
        lengths = torch.linalg.norm(vectors, dim=-1, keepdim=True)
        edges = torch.cat([features[index[0]], features[index[1]], lengths], dim=-1)
        messages = self.net(edges) * torch.exp(-lengths)
        total = torch.zeros((species.shape[0], 1), dtype=vectors.dtype)
        total.scatter_add_(0, index[1].unsqueeze(-1), messages)
        return total.squeeze(-1)


def captured(model: nn.Module, function: Callable[..., Any] | None = None) -> Program:
    replica = prepare(model)
    return capture(lambda *x: [(function or replica)(*x)], replica, INPUTS, OUTPUTS)


def inputs(atoms: int, edges: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(0, atoms, (2, edges), generator=g)
    vectors = torch.randn(edges, 3, generator=g, dtype=torch.float64)
    return vectors, index, torch.randint(0, 3, (atoms,), generator=g)


@pytest.mark.parametrize(("atoms", "edges"), [(1, 0), (1, 1), (5, 0), (2, 1), (7, 40), (100, 2000)])
def test_one_capture_serves_all_sizes(atoms: int, edges: int) -> None:
    model = Pair()
    program = captured(model)
    verify(program)
    x = inputs(atoms, edges)
    for form in (program, legalize(program)):
        (found,) = form.graph_module(*x)
        assert torch.allclose(found, model(*x), rtol=0, atol=1e-13)


def test_gathers_and_scatters_become_semantic_ops() -> None:
    program = captured(Pair())
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert targets.count(ops.gather) == 3 and targets.count(ops.scatter_sum) == 1
    assert torch.ops.aten.scatter_add.default not in targets
    assert raise_gathers_and_scatters(program.graph) == 0
    assert not semantic_nodes(legalize(program))


@pytest.mark.parametrize(
    "spelling",
    [
        lambda x, i, n: x.new_zeros((n, 4)).index_add(0, i, x),
        lambda x, i, n: torch.zeros((n, 4), dtype=x.dtype).scatter_add(0, i.view(-1, 1).expand(-1, 4), x),
        lambda x, i, n: x.new_zeros((n, 4)).scatter_add_(0, i[:, None].expand_as(x), x),
    ],
)
def test_every_spelling_of_a_sum_by_receiver(spelling: Callable[..., Tensor]) -> None:
    def energy(vectors: Tensor, index: Tensor, species: Tensor) -> Tensor:
        wide = torch.cat([vectors, vectors[:, :1]], dim=1)
        return spelling(wide, index[1], species.shape[0]).pow(2).sum(1)

    program = captured(nn.Module(), energy)
    assert [n.target for n in program.graph.nodes].count(ops.scatter_sum) == 1
    x = inputs(6, 30)
    assert torch.allclose(program.graph_module(*x)[0], energy(*x))


def test_a_scatter_along_another_dimension_is_left_alone() -> None:
    def energy(vectors: Tensor, index: Tensor, species: Tensor) -> Tensor:
        # the three components of each edge are summed into one column: not a sum by receiver
        columns = torch.zeros((index.shape[1], 3), dtype=torch.int64)
        summed = torch.zeros((index.shape[1], 1), dtype=vectors.dtype).scatter_add(1, columns, vectors)
        return torch.zeros(species.shape[0], dtype=vectors.dtype) + summed.sum()

    program = captured(nn.Module(), energy)
    assert ops.scatter_sum not in [n.target for n in program.graph.nodes]


def test_provenance_reaches_backward_nodes() -> None:
    program = captured(Pair())
    forces = fxpass.run_passes(program, "differentiate").program
    modules = {(provenance(n).module, provenance(n).backward) for n in forces.graph.nodes if n.op == "call_function"}
    assert ("net.0", False) in modules and ("net.0", True) in modules and ("net.1", True) in modules
    sources = [provenance(n).source for n in forces.graph.nodes if n.op == "call_function"]
    assert any("test_capture.py:" in source for source in sources)
    known = [bool(provenance(n).module or provenance(n).source) for n in forces.graph.nodes if n.op == "call_function"]
    assert sum(known) / len(known) > 0.9


def test_weights_keep_their_names_and_are_shared_not_copied() -> None:
    model = Pair()
    program = captured(model)
    names = {n for n, _ in program.graph_module.named_parameters()}
    assert {"net_0_weight", "net_2_bias", "embedding_weight"} <= names
    copy = program.copy()
    assert copy.graph_module.net_0_weight is program.graph_module.net_0_weight
    assert all(p.requires_grad for p in model.parameters()), "the original's flags are its own"


# --- what is refused

Energy = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_len(v: Tensor, i: Tensor, s: Tensor) -> Tensor:
    return v.pow(2).sum() * torch.ones(len(s), dtype=v.dtype)


def by_int(v: Tensor, i: Tensor, s: Tensor) -> Tensor:
    return v.pow(2).sum() * torch.ones(s.shape[0], dtype=v.dtype) * int(v.shape[0])


def by_value(v: Tensor, i: Tensor, s: Tensor) -> Tensor:
    return torch.zeros(int(i.max()) + 1, dtype=v.dtype).index_add(0, i[1], v.pow(2).sum(1))


def by_branch(v: Tensor, i: Tensor, s: Tensor) -> Tensor:
    return v.pow(2).sum() * torch.ones(s.shape[0], dtype=v.dtype) if v.sum() > 0 else v.sum() + s


def constant(v: Tensor, i: Tensor, s: Tensor) -> Tensor:
    return torch.ones(s.shape[0], dtype=v.dtype)


def by_weights(v: Tensor, i: Tensor, s: Tensor) -> Tensor:
    return torch.ones(7, dtype=v.dtype)


def detached(v: Tensor, i: Tensor, s: Tensor) -> Tensor:
    return torch.zeros(s.shape[0], dtype=v.dtype) + v.new_ones(v.shape).pow(2).sum()


def uninitialised(v: Tensor, i: Tensor, s: Tensor) -> Tensor:
    return torch.empty(s.shape[0], dtype=v.dtype) + v.sum()


@pytest.mark.parametrize(
    ("energy", "words"),
    [
        (by_len, ("size", "len(tensor)")),
        (by_int, ("size",)),
        (by_value, ("cannot be traced",)),
        (by_branch, ("cannot be traced",)),
        (constant, ("does not depend on edge_vectors",)),
        (by_weights, ("depends on no input",)),
        (detached, ("does not depend on edge_vectors",)),
        (uninitialised, ("uninitialised",)),
    ],
)
def test_what_cannot_be_proven_is_refused(energy: Energy, words: tuple[str, ...]) -> None:
    with pytest.raises(CaptureError) as caught:
        captured(nn.Module(), energy)
    for word in words:
        assert word in str(caught.value)
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_bug_of_the_compiler_is_not_told_as_one_of_the_model() -> None:
    def energy(v: Tensor, i: Tensor, s: Tensor) -> Tensor:
        ancestors(3)  # type: ignore[arg-type]
        return v

    with pytest.raises(TypeError, match="not iterable"):
        captured(nn.Module(), energy)


def test_an_op_without_a_shape_function_is_refused_by_name() -> None:
    library = torch.library.Library("fxpass_test", "FRAGMENT")
    library.define("opaque(Tensor x) -> Tensor")
    library.impl("opaque", lambda x: x.exp(), "CPU")

    def energy(v: Tensor, i: Tensor, s: Tensor) -> Tensor:
        return torch.zeros(s.shape[0], dtype=v.dtype).index_add(0, i[1], torch.ops.fxpass_test.opaque(v).sum(1))

    with pytest.raises(CaptureError, match="fxpass_test"):
        captured(nn.Module(), energy)


def test_a_scripted_module_is_refused_by_path_and_class() -> None:
    class Holder(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.jit.script(self.net)

    with pytest.raises(UnsupportedModelError, match=r"(?s)Holder.*TorchScript.*net"):
        prepare(Holder())


def test_an_energy_that_ignores_positions_in_value_is_found_by_running() -> None:
    with pytest.raises(CaptureError, match="stays the same when atoms move"):
        captured(nn.Module(), lambda v, i, s: torch.zeros(s.shape[0], dtype=v.dtype) + 0 * v.sum())


def test_an_energy_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(CaptureError, match="not a number"):
        captured(nn.Module(), lambda v, i, s: torch.zeros(s.shape[0], dtype=v.dtype) + v.sum() * float("inf"))


# --- the verifier


def first(program: Program, target: Any) -> torch.fx.Node:
    return next(n for n in program.graph.nodes if n.target is target)


def test_writing_to_weights_changes_no_other_model() -> None:
    _, numbers = spherical_harmonics((0, 1, 2), "component", -1)
    before = numbers.copy()
    program = fxpass.capture(small_potential(torch.float64))
    for weight in program.graph_module.buffers():
        if weight.is_floating_point():
            weight.mul_(2)
    again = fxpass.capture(small_potential(torch.float64))
    assert (spherical_harmonics((0, 1, 2), "component", -1)[1] == before).all()
    doubled, fresh = (dict(p.graph_module.named_buffers()) for p in (program, again))
    assert all(torch.equal(doubled[name], 2 * fresh[name]) for name in fresh if fresh[name].is_floating_point())


def test_verifier_names_a_node_that_does_not_fit() -> None:
    program = captured(Pair()).copy()
    node = first(program, torch.ops.aten.addmm.default)
    node.args = (node.args[0], node.args[2], node.args[1])
    with pytest.raises(PassError, match=node.name) as caught:
        verify(program)
    assert caught.value.where.module_path == "net.0" and "test_capture.py" in (caught.value.where.source or "")


def test_verifier_refuses_foreign_calls_and_in_place_ops() -> None:
    program = captured(Pair()).copy()
    node = first(program, torch.ops.aten.exp.default)
    node.target = torch.exp
    with pytest.raises(PassError, match="which is no op"):
        verify(program)
    node.target = torch.ops.aten.exp_.default
    with pytest.raises(PassError, match="in place"):
        verify(program)
    node.target = operator.neg
    with pytest.raises(PassError):
        node.target = print
        verify(program)


def test_verifier_refuses_another_output() -> None:
    program = captured(Pair()).copy()
    program.graph.output_node().args = ((first(program, ops.scatter_sum),),)
    with pytest.raises(PassError, match=r"output energy.*declared"):
        verify(program)


def test_verifier_refuses_mixed_irreps() -> None:
    program = captured(Pair()).copy()
    vectors = program.placeholders["edge_vectors"]
    exp = first(program, torch.ops.aten.exp.default)
    with program.graph.inserting_before(exp):
        wrong = program.graph.call_function(torch.ops.aten.sigmoid.default, (vectors,))
        total = program.graph.call_function(torch.ops.aten.sum.dim_IntList, (wrong, [1], True))
    exp.args = (total,)
    with pytest.raises(PassError, match="equivariance is broken") as caught:
        verify(program)
    assert caught.value.where.node == wrong.name


def test_verifier_refuses_a_frozen_size() -> None:
    program = captured(Pair()).copy()
    zeros = first(program, ops.scatter_sum)
    zeros.args = (*zeros.args[:2], 1009)
    with pytest.raises(PassError):
        verify(program)
