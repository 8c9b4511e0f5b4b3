"""Snapshots say what a program is; diffs find the nodes that changed, whatever the nodes are called."""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxpass.errors import UsageError
from fxpass.ir.cost import ATOMS, EDGES
from fxpass.ir.diff import GraphDiff, diff
from fxpass.ir.metadata import Provenance, set_provenance
from fxpass.ir.program import Program, TensorSpec
from fxpass.ir.snapshot import NodeRecord, Snapshot, snapshot

pytestmark = pytest.mark.once

INPUTS = (
    TensorSpec("node_attrs", ("atoms", 4), torch.float32, irreps="4x0e"),
    TensorSpec("edge_vectors", ("edges", 3), torch.float32, irreps="1o", unit="Angstrom"),
    TensorSpec("senders", ("edges",), torch.int64),
)
aten = torch.ops.aten


def energy(attrs: Tensor, vectors: Tensor, senders: Tensor) -> Tensor:
    length = (vectors * vectors).sum(1)
    messages = attrs[senders] * length.sqrt().unsqueeze(1)
    return torch.tanh(messages * 2.0).sum()


def trace(function: Callable[..., Tensor] = energy) -> Program:
    examples = torch.ones(7, 4), torch.ones(23, 3), torch.zeros(23, dtype=torch.int64)
    graph_module = make_fx(lambda *xs: (function(*xs),), tracing_mode="symbolic")(*examples)
    return Program(graph_module, INPUTS, (TensorSpec("energy", (), torch.float32, unit="eV"),))


def find(program: Program, target: object) -> fx.Node:
    return next(node for node in program.graph.nodes if node.target == target)


def renamed(snap: Snapshot, name: Callable[[str], str]) -> Snapshot:
    """The snapshot with other names for all nodes but inputs."""
    kept = {port.node for port in snap.inputs}
    names = {node.name: node.name if node.name in kept else name(node.name) for node in snap.nodes}

    def rename(node: NodeRecord) -> NodeRecord:
        args = node.args
        for old in sorted(node.inputs, key=len, reverse=True):
            args = args.replace(f"%{old}", f"%<{names[old]}>")
        return replace(node, name=names[node.name], args=args.replace("<", "").replace(">", ""))

    return replace(snap, nodes=tuple(map(rename, snap.nodes)))


def compare(before: Snapshot, after: Snapshot) -> GraphDiff:
    """The diff, after checks that hold for every one."""
    result = diff(before, after)
    assert result.nodes_before == len(before.nodes)
    assert result.nodes_after == len(after.nodes)
    assert sum(part.unchanged for part in result.by_module()) == result.unchanged
    counts = {t: after.op_counts[t] - before.op_counts[t] for t in before.op_counts | after.op_counts}
    assert result.op_delta == {target: count for target, count in sorted(counts.items()) if count}
    return result


def names(nodes: tuple[NodeRecord, ...]) -> list[str]:
    return [node.name for node in nodes]


# --- snapshots


def test_a_snapshot_names_targets_arguments_sizes_and_costs() -> None:
    program = trace()
    node = find(program, aten.tanh.default)
    set_provenance(node, Provenance("layers.0.act", "model.py:12", backward=True, made_by="differentiate"))
    node.meta["irreps"] = "4x0e"
    record = next(r for r in snapshot(program, "capture").nodes if r.name == node.name)
    assert record == NodeRecord(
        name=node.name,
        op="call_function",
        target="aten.tanh",
        args=f"%{node.args[0]}",
        shape="[edges, 4]",
        dtype="float32",
        irreps="4x0e",
        module="layers.0.act",
        backward=True,
        source="model.py:12",
        made_by="differentiate",
        cost=record.cost,
    )
    assert (record.cost.flops, record.cost.bytes) == (4 * EDGES, 32 * EDGES)
    assert str(record) == f"{node.name}: float32[edges, 4] = aten.tanh(%{node.args[0]})"


def test_inputs_and_outputs_are_the_specified_ones() -> None:
    snap = snapshot(trace(), "capture")
    assert [(p.name, p.shape, p.irreps, p.unit) for p in snap.inputs] == [
        ("node_attrs", "[atoms, 4]", "4x0e", ""),
        ("edge_vectors", "[edges, 3]", "1o", "Angstrom"),
        ("senders", "[edges]", "", ""),
    ]
    assert [(p.name, p.dtype, p.unit) for p in snap.outputs] == [("energy", "float32", "eV")]
    assert [n.target for n in snap.nodes if n.op == "placeholder"] == ["node_attrs", "edge_vectors", "senders"]


def test_sizes_and_arithmetic_on_them_have_a_value() -> None:
    snap = snapshot(trace(lambda a, v, s: torch.ones(a.shape[0] + 2 * v.shape[0])), "capture")
    record = next(n for n in snap.nodes if n.target == "operator.add")
    assert (record.dtype, record.shape) == ("int", "atoms + 2*edges")


def test_a_long_string_is_cut_and_still_tells_two_apart() -> None:
    def text(spec: str) -> str:
        graph = fx.Graph()
        x = graph.placeholder("x")
        graph.output((graph.call_function(operator.getitem, (x, spec)),))
        module = fx.GraphModule(torch.nn.Module(), graph)
        program = Program(module, (TensorSpec("x", ("atoms",), torch.float32),), (INPUTS[0],))
        return next(n for n in snapshot(program, "s").nodes if n.op == "call_function").args

    long = "32x0e+32x1o|" * 300
    assert len(text(long)) < 60
    assert text(long + "a") != text(long + "b")
    assert text(long) == text(long)


def test_code_parses_and_its_first_line_says_what_made_it() -> None:
    program = trace()
    set_provenance(find(program, aten.tanh.default), Provenance("layers.0", "model.py:12"))
    text = snapshot(program, "fold-constants", seconds=0.125).code()
    first, *rest = text.splitlines()
    assert first.startswith("# made by fold-constants in 0.12 s: energy program, ")
    assert "·edges" in first
    (function,) = ast.parse(text).body
    assert isinstance(function, ast.FunctionDef) and function.name == "energy"
    assert [a.arg for a in function.args.args][1:] == [p.node for p in snapshot(program, "").inputs]
    assert sum(isinstance(s, ast.AnnAssign) for s in function.body) == len(program.graph.nodes) - 4
    assert any(line.strip() == "# layers.0" for line in rest)
    assert any(": float32[edges, 4] = aten.tanh(" in line and "model.py:12" in line for line in rest)


def test_json_round_trip() -> None:
    program = trace()
    set_provenance(find(program, aten.tanh.default), Provenance("layers.0", "model.py:12", backward=True))
    snap = snapshot(program, "capture", seconds=1.5)
    assert Snapshot.from_json(json.loads(json.dumps(snap.to_json()))) == snap


def test_json_runs_nothing_that_it_carries() -> None:
    data = snapshot(trace(), "capture").to_json()
    data["nodes"][0]["cost"] = ["__import__('os').abort()", "0"]
    with pytest.raises(UsageError):
        Snapshot.from_json(data)


def test_shares_of_ops_add_up_to_one() -> None:
    snap = snapshot(trace(), "capture")
    rows = {row.target: row for row in snap.op_rows(atoms=10, edges=100)}
    assert sum(row.flops for row in rows.values()) == pytest.approx(1)
    assert sum(row.bytes for row in rows.values()) == pytest.approx(1)
    assert sum(row.count for row in rows.values()) == sum(n.op == "call_function" for n in snap.nodes)
    # 300 for v*v, 400 for *length, 400 for *2; of 300 + 300 (sum) + 100 (sqrt) + 400 + 400 + 400 (tanh) + 400 (sum)
    assert rows["aten.mul"].flops == pytest.approx(1100 / 2300)
    assert rows["aten.unsqueeze"].bytes == 0


# --- diffs


def test_a_program_does_not_differ_from_itself() -> None:
    snap = snapshot(trace(), "capture")
    result = compare(snap, snap)
    assert not result
    assert (result.unchanged, result.delta) == (len(snap.nodes), f"+0 -0 = {len(snap.nodes)}")


@pytest.mark.parametrize("name", [lambda n: f"{n}_7", lambda n: "n" + str(abs(hash(n))), lambda n: "r" + n[::-1]])
def test_names_do_not_count(name: Callable[[str], str]) -> None:
    snap = snapshot(trace(), "capture")
    assert not compare(snap, renamed(snap, name))


def test_a_node_more_does_not_disturb_the_ones_after_it() -> None:
    """The new multiplication takes the name ``mul``, and every later one has another name than before."""

    def longer(attrs: Tensor, vectors: Tensor, senders: Tensor) -> Tensor:
        return energy(attrs * 3.0, vectors, senders)

    before, after = snapshot(trace(), "a"), snapshot(trace(longer), "b")
    result = compare(before, after)
    assert [(n.target, n.args) for n in result.added] == [("aten.mul", f"%{after.inputs[0].node}, 3.0")]
    assert [(c.after.target, c.fields) for c in result.changed] == [("aten.index", ("args",))]
    assert result.removed == ()
    assert any(n.name == "mul" for n in before.nodes) and result.added[0].name == "mul"


def test_a_changed_literal_changes_one_node() -> None:
    program = trace()
    before = snapshot(program, "a")
    node = next(n for n in program.graph.nodes if 2.0 in n.args)
    node.args = (node.args[0], 5.0)
    result = compare(before, snapshot(program, "b"))
    (change,) = result.changed
    assert (change.after.name, change.fields) == (node.name, ("args",))
    assert change.details == ("args: 2.0 -> 5.0",)
    assert not result.added and not result.removed


def test_a_changed_target_is_a_change_of_the_node() -> None:
    program = trace()
    before = snapshot(program, "a")
    find(program, aten.tanh.default).target = aten.sigmoid.default
    result = compare(before, snapshot(program, "b"))
    (change,) = result.changed
    assert change.details == ("target: aten.tanh -> aten.sigmoid",)
    assert result.op_delta == {"aten.sigmoid": 1, "aten.tanh": -1}


@pytest.mark.parametrize(("field", "value"), [("shape", "[edges, 8]"), ("dtype", "float64"), ("irreps", "4x0o")])
def test_a_changed_type_is_a_change_of_the_node(field: str, value: str) -> None:
    before = snapshot(trace(), "a")
    nodes = [replace(n, **{field: value}) if n.target == "aten.tanh" else n for n in before.nodes]
    after = renamed(replace(before, nodes=tuple(nodes)), lambda name: f"{name}_9")
    (change,) = compare(before, after).changed
    assert (change.after.target, change.fields, change.renamed) == ("aten.tanh", (field,), True)


def test_a_replaced_node_leaves_its_surroundings_alone() -> None:
    """tanh becomes three nodes: it is removed, they are added, its user has another input, the rest is as before."""
    program = trace()
    before = snapshot(program, "a")
    old = find(program, aten.tanh.default)
    with program.graph.inserting_before(old):
        node = old.args[0]
        for target in (aten.neg.default, aten.sigmoid.default, aten.exp.default):
            node = program.graph.call_function(target, (node,))
            node.meta = dict(old.meta)
    old.replace_all_uses_with(node)
    program.graph.erase_node(old)
    result = compare(before, snapshot(program, "b"))
    assert [n.target for n in result.added] == ["aten.neg", "aten.sigmoid", "aten.exp"]
    assert [n.target for n in result.removed] == ["aten.tanh"]
    assert [(c.after.target, c.fields) for c in result.changed] == [("aten.sum", ("args",))]
    assert result.delta == f"+3 -1 ~1 = {len(before.nodes) + 2}"


def test_changes_at_both_ends_do_not_hide_what_is_between() -> None:
    """No value number survives the first change and no path to the output the last; all names are other ones too."""

    def other(attrs: Tensor, vectors: Tensor, senders: Tensor) -> Tensor:
        length = (vectors + vectors).sum(1)
        messages = attrs.neg()[senders] * length.sqrt().unsqueeze(1)
        return torch.tanh(messages * 2.0).mean()

    before = snapshot(trace(), "a")
    after = renamed(snapshot(trace(other), "b"), lambda name: f"{name}_5")
    result = compare(before, after)
    assert sorted(n.target for n in result.added) == ["aten.add", "aten.mean", "aten.neg"]
    assert sorted(n.target for n in result.removed) == ["aten.mul", "aten.sum"]
    assert [c.after.target for c in result.changed] == ["aten.sum", "aten.index", "output"]


def test_common_subexpressions_leave_by_removal_only() -> None:
    def twice(attrs: Tensor, vectors: Tensor, senders: Tensor) -> Tensor:
        return ((attrs * 2.0).exp() + (attrs * 2.0).exp()).sum()

    program = trace(twice)
    before = snapshot(program, "a")
    for target in (aten.mul.Tensor, aten.exp.default):
        first, second = (n for n in program.graph.nodes if n.target == target)
        second.replace_all_uses_with(first)
        program.graph.erase_node(second)
    result = compare(before, snapshot(program, "b"))
    assert [n.target for n in result.removed] == ["aten.mul", "aten.exp"]
    assert (result.added, result.changed) == ((), ())


def test_equal_nodes_in_two_modules_are_two_nodes() -> None:
    def two_layers(attrs: Tensor, vectors: Tensor, senders: Tensor) -> Tensor:
        return (attrs.exp() * attrs.exp()).sum()

    program = trace(two_layers)
    for n, node in enumerate(node for node in program.graph.nodes if node.target == aten.exp.default):
        set_provenance(node, Provenance(f"layers.{n}"))
    before = snapshot(program, "a")
    first, second = (n for n in program.graph.nodes if n.target == aten.exp.default)
    first.replace_all_uses_with(second)
    second.append(first)  # order: second before its users
    program.graph.erase_node(first)
    result = compare(before, snapshot(program, "b"))
    assert [n.module for n in result.removed] == ["layers.0"]
    by_module = {part.place: part for part in result.by_module()}
    assert set(by_module) == {"(model)", "layers.0", "layers.1"}
    assert (by_module["layers.0"].unchanged, len(by_module["layers.0"].removed)) == (0, 1)
    assert by_module["layers.1"].unchanged == 1


def test_an_appended_output_changes_the_output_only() -> None:
    program = trace()
    before = snapshot(program, "a")
    (results,) = program.graph.output_node().args
    program.graph.output_node().args = ((*results, find(program, aten.tanh.default)),)
    more = replace(program, outputs=(*program.outputs, TensorSpec("messages", ("edges", 4), torch.float32)))
    (change,) = compare(before, snapshot(more, "b")).changed
    assert change.after.op == "output" and "args" in change.fields


def test_a_size_is_equal_to_any_other_of_the_same_value() -> None:
    def ask_twice(attrs: Tensor, vectors: Tensor, senders: Tensor) -> Tensor:
        return torch.ones(vectors.shape[0]).sum() + torch.zeros(senders.shape[0]).sum()

    program = trace(ask_twice)
    before = snapshot(program, "a")
    first, second = (n for n in program.graph.nodes if n.target == aten.sym_size.int)
    second.replace_all_uses_with(first)
    program.graph.erase_node(second)
    result = compare(before, snapshot(program, "b"))
    assert names(result.removed) == [second.name]
    assert (result.added, result.changed) == ((), ())


def test_an_expression_of_another_module_may_take_the_place_of_an_equal_one() -> None:
    def twice(attrs: Tensor, vectors: Tensor, senders: Tensor) -> Tensor:
        return (attrs.exp() * 2.0 + attrs.exp() * 3.0).sum()

    program = trace(twice)
    first, second = (n for n in program.graph.nodes if n.target == aten.exp.default)
    set_provenance(first, Provenance("layers.0"))
    set_provenance(second, Provenance("layers.1"))
    before = snapshot(program, "a")
    second.replace_all_uses_with(first)
    program.graph.erase_node(second)
    result = compare(before, snapshot(program, "b"))
    assert [n.module for n in result.removed] == ["layers.1"]
    assert (result.added, result.changed) == ((), ())


def test_another_precision_changes_types_and_nothing_else() -> None:
    """A cast is added at the front; every node after it has another input, dtype and name, and is the same node."""

    def halved(attrs: Tensor, vectors: Tensor, senders: Tensor) -> Tensor:
        return energy(attrs.to(torch.bfloat16), vectors.to(torch.bfloat16), senders)

    result = compare(snapshot(trace(), "a"), renamed(snapshot(trace(halved), "b"), lambda name: f"{name}_5"))
    assert [n.target for n in result.added] == ["aten._to_copy"] * 2
    assert result.removed == ()
    assert {c.fields for c in result.changed} == {("dtype",), ("args", "dtype")}
    assert len(result.changed) == 9  # all but inputs and output


def test_costs_before_and_after() -> None:
    program = trace()
    before = snapshot(program, "a")
    old = find(program, aten.tanh.default)
    old.replace_all_uses_with(old.args[0])
    program.graph.erase_node(old)
    result = compare(before, snapshot(program, "b"))
    assert result.cost_before.flops - result.cost_after.flops == 4 * EDGES
    assert result.cost_before.flops.coeff(ATOMS) == 0
    data = json.loads(json.dumps(result.to_json()))
    assert data["op_delta"] == {"aten.tanh": -1}
    assert [m["removed"] for m in data["modules"]] == [[str(result.removed[0])]]
