"""The pass dead-irreps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx
from torch.testing import FileCheck

from fxpass.algebra.multilinear import Linear, LinearPath, TensorProduct, parse_linear, parse_tensor_product
from fxpass.algebra.multilinear import Path as TensorProductPath
from fxpass.algebra.polynomial import Polynomial
from fxpass.ir import ops
from fxpass.ir.program import Program, TensorSpec
from fxpass.ir.verifier import verify
from fxpass.testing import PassContract, build_program, example_inputs, graph_text, run_program
from fxpass_passes.dead_irreps import DeadIrreps
from fxpass_passes.differentiate import Differentiate

aten = torch.ops.aten
F64 = torch.float64
SIZES = ({"atoms": 9, "edges": 23, "graphs": 3}, {"atoms": 1, "edges": 0, "graphs": 1})
LAYOUT = "2x0e+2x1o"  # columns 0-1 and 2-7
X = TensorSpec("x", ("atoms", 8), F64, LAYOUT)
Y = TensorSpec("y", ("edges", 3), F64, "1x1o", properties=frozenset({"edge_vector"}))
INDEX = [
    TensorSpec(name, ("edges",), torch.int64, properties=frozenset({"index:atoms"})) for name in ("sender", "receiver")
]
MIX = str(Linear(LAYOUT, LAYOUT, (LinearPath(0, 0, 0, 0.5), LinearPath(1, 1, 4, 0.5)), 8, True))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    return graph.call_function(target, args)


def after_linear(build: Callable[[fx.Graph, fx.Node], fx.Node], weights: Mapping[str, Tensor] | None = None) -> Program:
    """What ``build`` makes of a linear map of scalars and vectors."""

    def body(graph: fx.Graph, x: fx.Node) -> dict[str, fx.Node]:
        return {"y": build(graph, call(graph, ops.linear, x, graph.get_attr("w"), None, MIX, "out"))}

    return build_program(body, [X], {"w": numbers(8)} | dict(weights or {}))


def sliced(graph: fx.Graph, y: fx.Node) -> fx.Node:
    return call(graph, aten.slice.Tensor, y, 1, 0, 2)


def paths_left(program: Program) -> list[tuple[int, int]]:
    """(input segment, output segment) of the paths of the one linear map."""
    (node,) = program.graph.find_nodes(op="call_function", target=ops.linear)
    return [(p.i, p.o) for p in parse_linear(node.args[-2]).paths]


def cat_of_channels(graph: fx.Graph, y: fx.Node, order: tuple[int, int] = (0, 1)) -> fx.Node:
    """[atoms, 2 channels, 4 components], as MACE arranges features for its contraction."""
    rows = call(graph, aten.sym_size.int, y, 0)
    scalars = call(graph, aten.view.default, call(graph, aten.slice.Tensor, y, 1, 0, 2), [rows, 2, 1])
    vectors = call(graph, aten.view.default, call(graph, aten.slice.Tensor, y, 1, 2, 8), [rows, 2, 3])
    parts = [scalars, vectors]
    return call(graph, aten.cat.default, [parts[k] for k in order], -1)


def polynomial(monomials: tuple[tuple[int, ...], ...]) -> Callable[[fx.Graph, fx.Node], fx.Node]:
    def build(graph: fx.Graph, y: fx.Node) -> fx.Node:
        spec = str(Polynomial(4, monomials, "1x0e+1x1o", "1x0e"))
        coefficients = graph.get_attr("c")
        return call(graph, ops.polynomial, cat_of_channels(graph, y), [], None, None, coefficients, spec, "out")

    return build


def flipped(graph: fx.Graph, y: fx.Node) -> fx.Node:
    return sliced(graph, call(graph, aten.flip.default, y, [1]))


def transposed(graph: fx.Graph, y: fx.Node) -> fx.Node:
    """A view that lets rows run into columns: column 0 of it holds elements of every column."""
    rows = call(graph, aten.sym_size.int, y, 0)
    return call(graph, aten.select.int, call(graph, aten.view.default, y, [8, rows]), 0, 0)


def through(*steps: Callable[[fx.Graph, fx.Node], fx.Node]) -> Callable[[fx.Graph, fx.Node], fx.Node]:
    def build(graph: fx.Graph, y: fx.Node) -> fx.Node:
        for step in steps:
            y = step(graph, y)
        return y

    return build


KEEPS_COLUMNS = {
    "slice": sliced,
    "last columns": lambda g, y: call(g, aten.slice.Tensor, y, -1, -6, 2**63 - 1),
    "one column": lambda g, y: call(g, aten.select.int, y, 1, 1),
    "sum over rows": lambda g, y: sliced(g, call(g, aten.sum.dim_IntList, y, [0], True)),
    "permute": lambda g, y: call(g, aten.slice.Tensor, call(g, aten.permute.default, y, [1, 0]), 0, 0, 2),
    "row scalar": lambda g, y: sliced(g, call(g, aten.mul.Tensor, call(g, aten.slice.Tensor, y, 1, 0, 1), y)),
    "divided": lambda g, y: sliced(g, call(g, aten.div.Tensor, y, 3.0)),
    "stacked": lambda g, y: call(g, aten.select.int, call(g, aten.stack.default, [y, y], 1), 2, 0),
    "product": lambda g, y: call(g, aten.mm.default, sliced(g, y), g.get_attr("m")),
    "cat": lambda g, y: call(g, aten.slice.Tensor, cat_of_channels(g, y, (1, 0)), -1, 3, 4),
    "polynomial": polynomial(((0,), (0, 0))),
}


@pytest.mark.parametrize("name", KEEPS_COLUMNS)
def test_dead_paths_are_pruned(name: str) -> None:
    weights = {"m": numbers(2, 5), "c": numbers(2, 1, 1)}

    def make() -> Program:
        return after_linear(KEEPS_COLUMNS[name], weights)

    (outcome,) = PassContract(DeadIrreps(), [make], SIZES).check()
    assert paths_left(outcome.program) == [(1, 1) if name == "last columns" else (0, 0)]
    assert [(a.rule, a.removed) for a in outcome.applications] == [("dead-paths", 1)]
    assert outcome.refusals == ()


LIVE = {
    "returned": lambda g, y: y,
    "polynomial": polynomial(((0,), (1, 1), (2, 2), (3, 3))),
    "divisor": lambda g, y: sliced(g, call(g, aten.div.Tensor, y, y)),
}


@pytest.mark.parametrize("name", LIVE)
def test_live_paths_stay(name: str) -> None:
    outcome = DeadIrreps().apply(after_linear(LIVE[name], {"c": numbers(4, 1, 1)}))
    assert not outcome.modified
    assert outcome.refusals == ()
    assert paths_left(outcome.program) == [(0, 0), (1, 1)]


@pytest.mark.parametrize(("build", "op"), [(flipped, "aten.flip.default"), (transposed, "aten.view.default")])
def test_lost_liveness_is_reported(build: Callable[[fx.Graph, fx.Node], fx.Node], op: str) -> None:
    outcome = DeadIrreps().apply(after_linear(build))
    assert not outcome.modified
    (refusal,) = outcome.refusals
    assert refusal.reason == f"{op} is not known column by column: all that it reads counts as live"
    assert refusal.nodes


def test_layout_stays() -> None:
    check = FileCheck().check("fxpass.linear.default(%x, %w, None, '2x0e+2x1o|2x0e+2x1o|8|shared|0,0,0,0.5', 'out')")
    text = graph_text(DeadIrreps().apply(after_linear(sliced)).program)
    check.check_next("aten.slice.Tensor(%linear, 1, 0, 2)").run(text)


def message_passing() -> Program:
    """Scalars and vectors from each sender; the readout takes the scalars that a linear map makes of the sum."""
    half = TensorProduct(
        LAYOUT,
        "1x1o",
        "2x0e+2x1o+2x1o",
        tuple(TensorProductPath(*p, "uvu", 2 * n, 1.0) for n, p in enumerate([(1, 0, 0), (0, 0, 1), (1, 0, 2)])),
        6,
        False,
    )
    paths = tuple(LinearPath(i, min(i, 1), 4 * i, 0.5) for i in range(3))
    gathered = str(Linear("2x0e+2x1o+2x1o", LAYOUT, paths, 12, True))

    def body(graph: fx.Graph, x: fx.Node, y: fx.Node, sender: fx.Node, receiver: fx.Node) -> dict[str, fx.Node]:
        up = call(graph, ops.linear, x, graph.get_attr("up"), None, MIX, "out")
        weight = call(graph, aten.mm.default, y, graph.get_attr("radial"))
        edges = call(graph, ops.gather, up, sender)
        messages = call(graph, ops.tensor_product, edges, y, weight, None, str(half), "out")
        atoms = call(graph, aten.sym_size.int, x, 0)
        total = call(graph, ops.scatter_sum, messages, receiver, atoms)
        down = call(graph, ops.linear, total, graph.get_attr("down"), None, gathered, "out")
        scalars = call(graph, aten.tanh.default, sliced(graph, down))
        return {"energy": call(graph, aten.sum.dim_IntList, scalars, [1])}

    weights = {"up": numbers(8), "radial": numbers(3, 6), "down": numbers(12, seed=1)}
    return build_program(body, [X, Y, *INDEX], weights)


def test_what_only_dead_paths_read_is_dead_in_its_turn() -> None:
    (outcome,) = PassContract(DeadIrreps(), [message_passing], SIZES).check()
    up, down = outcome.program.graph.find_nodes(op="call_function", target=ops.linear)
    (messages,) = outcome.program.graph.find_nodes(op="call_function", target=ops.tensor_product)
    assert [p.o for p in parse_linear(down.args[-2]).paths] == [0]
    assert [(p.i1, p.io) for p in parse_tensor_product(messages.args[-2]).paths] == [(1, 0)]
    assert [p.i for p in parse_linear(up.args[-2]).paths] == [1]
    assert [(a.node, a.removed) for a in outcome.applications] == [(up.name, 1), (messages.name, 2), (down.name, 2)]


def test_forces_are_the_same_before_and_after_differentiation() -> None:
    pruned = DeadIrreps().apply(message_passing()).program
    forces = [Differentiate().apply(p).program for p in (message_passing(), pruned)]
    (outcome,) = PassContract(DeadIrreps(), [lambda: forces[0]], SIZES).check()
    assert outcome.modified
    for sizes in SIZES:
        inputs = example_inputs(forces[0], sizes)
        expected, actual = (run_program(p, inputs) for p in forces)
        assert torch.equal(actual["edge_gradient"], expected["edge_gradient"])
        assert expected["edge_gradient"].isfinite().all()


@pytest.mark.mace
def test_scalar_model_of_correlation_one_reads_scalars_only() -> None:
    from mace import modules  # before e3nn: e3nn 0.4.4 alone does not import on this torch

    # isort: split
    from e3nn import o3

    from fxpass.frontends.mace import MaceFrontend

    torch.set_default_dtype(F64)
    torch.manual_seed(0)
    block = modules.interaction_classes["RealAgnosticInteractionBlock"]
    model = modules.ScaleShiftMACE(
        r_max=4.0,
        num_bessel=4,
        num_polynomial_cutoff=5,
        max_ell=2,
        interaction_cls=block,
        interaction_cls_first=block,
        num_interactions=2,
        num_elements=3,
        hidden_irreps=o3.Irreps("4x0e"),
        MLP_irreps=o3.Irreps("4x0e"),
        atomic_energies=np.array([[0.1, 0.2, 0.3]]),
        avg_num_neighbors=8.0,
        atomic_numbers=[28, 29, 46],
        correlation=1,
        gate=torch.nn.functional.silu,
        radial_MLP=[8],
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
    )
    program = MaceFrontend().capture(model)
    (outcome,) = PassContract(DeadIrreps(), [lambda: program], SIZES).check()
    blocks = [f"interactions.{k}.{name}" for k in (0, 1) for name in ("conv_tp", "linear", "skip_tp")]
    assert [(a.module, a.removed) for a in outcome.applications] == [(block, 2) for block in blocks]
    assert outcome.refusals == ()
    for node in outcome.program.graph.find_nodes(op="call_function", target=ops.tensor_product):
        tp = parse_tensor_product(node.args[-2])
        assert {tp.degrees(path) for path in tp.paths} == {(0, 0, 0)}


@pytest.mark.mace
def test_nothing_is_dead_in_the_alloy_model(alloy_model_path: Path) -> None:
    from fxpass.frontends.mace import MaceFrontend

    frontend = MaceFrontend()
    program = frontend.capture(frontend.load(str(alloy_model_path)))
    verify(program)
    outcome = DeadIrreps().apply(program)
    assert (outcome.modified, outcome.refusals) == (False, ())
