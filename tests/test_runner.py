"""The runner against passes that keep their promises and passes that do not; its records, reports and observers."""

from __future__ import annotations

import io
import json
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from torch import fx

from fxpass.errors import CaptureError, Location, PackageError, PassError, UsageError
from fxpass.instruments import BisectResult, ProgressBar, bisect
from fxpass.ir.program import Program, Stage, TensorSpec, add_constant
from fxpass.ir.verifier import verify
from fxpass.passes import Application, Outcome, Pass, Refusal
from fxpass.report import PassRecord, Report
from fxpass.runner import RunResult, run

pytestmark = pytest.mark.once

aten = torch.ops.aten
POSITIONS = TensorSpec("positions", ("atoms", 3), torch.float64, unit="Angstrom")
SHIFTS = TensorSpec("shifts", ("atoms", 3), torch.float64, unit="Angstrom")
ENERGY = TensorSpec("energy", ("atoms",), torch.float64, unit="eV")
FORCES = TensorSpec("forces", ("atoms", 3), torch.float64, unit="eV/Angstrom")


def harmonic() -> Program:
    """energy = sum(((positions + shifts) * stiffness) ** 2)"""
    graph = fx.Graph()
    positions, shifts = graph.placeholder("positions"), graph.placeholder("shifts")
    moved = graph.call_function(aten.add.Tensor, (positions, shifts))
    stiffness = graph.get_attr("stiffness")
    scaled = graph.call_function(aten.mul.Tensor, (moved, stiffness))
    square = graph.call_function(aten.mul.Tensor, (scaled, scaled))
    energy = graph.call_function(aten.sum.dim_IntList, (square, [1]))
    graph.output((energy,))
    root = torch.nn.Module()
    root.register_buffer("stiffness", torch.full((3,), 2.0, dtype=torch.float64))
    return Program(fx.GraphModule(root, graph), (POSITIONS, SHIFTS), (ENERGY,), assumptions=("sorted",))


def evaluate(program: Program) -> torch.Tensor:
    ones = torch.ones(4, 3, dtype=torch.float64)
    return program.graph_module(ones, ones)[0]


def accept(program: Program) -> None:
    """A check that finds nothing."""


def named(program: Program, target: object) -> fx.Node:
    return next(node for node in program.graph.nodes if node.target is target)


# --- passes that keep their promises


@dataclass(frozen=True)
class Nothing(Pass):
    name: ClassVar[str] = "nothing"

    def apply(self, program: Program) -> Outcome:
        refusal = Refusal("rule", "no match", ("add",), "readout")
        return Outcome(program, modified=False, refusals=(refusal,))


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies the energy."""

    name: ClassVar[str] = "scale"
    factor: float = 1.0

    def apply(self, program: Program) -> Outcome:
        energy = program.results["energy"]
        with program.graph.inserting_after(energy):
            scaled = program.graph.call_function(aten.mul.Tensor, (energy, self.factor))
        energy.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        return Outcome(program, modified=True, applications=(Application("scale", energy.name, added=1),))


@dataclass(frozen=True)
class AddForces(Pass):
    """Stands in for the derivative: one more output, and the next stage."""

    name: ClassVar[str] = "add-forces"
    stages: ClassVar[tuple[Stage, ...]] = ("energy",)

    def apply(self, program: Program) -> Outcome:
        output = program.graph.output_node()
        output.args = ((program.results["energy"], named(program, aten.add.Tensor)),)
        return Outcome(replace(program, outputs=(ENERGY, FORCES), stage="forces"), modified=True)


@dataclass(frozen=True)
class Custom(Pass):
    """Runs the function it is given."""

    name: ClassVar[str] = "custom"
    function: Callable[[Program], Any] = lambda program: Outcome(program, modified=False)

    def apply(self, program: Program) -> Outcome:
        return self.function(program)


def changed(program: Program) -> Outcome:
    return Outcome(program, modified=True)


def test_passes_run_in_order_and_the_input_stays_as_it_is() -> None:
    program = harmonic()
    code, before = program.graph_module.code, evaluate(program)
    result = run(program, [Scale(2.0), Nothing(), Scale(5.0)], check=accept)
    assert isinstance(result, RunResult)
    assert torch.equal(evaluate(result.program), 10 * before)
    assert program.graph_module.code == code
    assert torch.equal(evaluate(program), before)
    assert result.program.graph_module.stiffness is program.graph_module.stiffness


def test_no_passes_give_the_program_back() -> None:
    program = harmonic()
    assert run(program, [], check=accept) == RunResult(program, ())


def test_records() -> None:
    records = run(harmonic(), [Scale(2.0), Nothing(), AddForces(), AddForces()], check=accept).records
    assert [(r.name, r.options, r.nodes_before, r.nodes_after, r.modified) for r in records] == [
        ("scale", "factor=2.0", 8, 9, True),
        ("nothing", "", 9, 9, False),
        ("add-forces", "", 9, 9, True),
        ("add-forces", "", 9, 9, False),
    ]
    assert records[0].applications == (Application("scale", "sum_dim_int_list", added=1),)
    assert records[1].refusals == (Refusal("rule", "no match", ("add",), "readout"),)
    assert [r.skipped for r in records] == [None, None, None, "runs at stage energy, the program is at stage forces"]
    assert all(r.seconds > 0 for r in records[:3]) and records[3].seconds == 0


def test_an_unmodified_program_is_passed_on_itself_and_checked_only_once() -> None:
    checked: list[Program] = []
    program = harmonic()
    result = run(program, [Nothing(), Scale(2.0), Nothing()], check=checked.append)
    assert checked == [result.program]
    assert run(program, [Nothing()], check=checked.append).program is program


def test_the_code_of_the_graph_module_follows_the_graph() -> None:
    def stale(program: Program) -> Outcome:
        named(program, aten.add.Tensor).target = aten.sub.Tensor  # and no recompile
        return changed(program)

    result = run(harmonic(), [Custom(stale)], check=accept)
    assert evaluate(result.program).abs().max() == 0


def test_metadata_of_a_change_is_kept() -> None:
    def mark(program: Program) -> Outcome:
        program.graph.output_node().meta["mark"] = 1
        return changed(program)

    assert run(harmonic(), [Custom(mark)], check=accept).program.graph.output_node().meta["mark"] == 1


# --- broken passes


def dangling_argument(program: Program) -> Outcome:
    stranger = fx.Graph().placeholder("stranger")
    named(program, aten.add.Tensor).update_arg(0, stranger)
    return changed(program)


def use_before_definition(program: Program) -> Outcome:
    program.graph.output_node().prepend(named(program, aten.add.Tensor))
    return changed(program)


def missing_tensor(program: Program) -> Outcome:
    named(program, "stiffness").target = "stifness"
    return changed(program)


def no_output(program: Program) -> Outcome:
    program.graph.erase_node(program.graph.output_node())
    return changed(program)


def node_after_output(program: Program) -> Outcome:
    output = program.graph.output_node()
    with program.graph.inserting_after(output):
        program.graph.call_function(aten.neg.default, (program.results["energy"],))
    return changed(program)


def output_is_no_tuple(program: Program) -> Outcome:
    program.graph.output_node().args = (program.results["energy"],)
    return changed(program)


def output_too_many(program: Program) -> Outcome:
    energy = program.results["energy"]
    program.graph.output_node().args = ((energy, energy),)
    return changed(program)


def input_lost(program: Program) -> Outcome:
    shifts = program.placeholders["shifts"]
    shifts.replace_all_uses_with(program.placeholders["positions"])
    program.graph.erase_node(shifts)
    return changed(program)


def input_dropped(program: Program) -> Outcome:
    return changed(replace(input_lost(program).program, inputs=(POSITIONS,)))


def dtype_changed(program: Program) -> Outcome:
    return changed(replace(program, outputs=(replace(ENERGY, dtype=torch.float32),)))


def output_renamed(program: Program) -> Outcome:
    return changed(replace(program, outputs=(replace(ENERGY, name="total"),)))


def other_energy(program: Program) -> Outcome:
    return changed(replace(program, energy="node_energy"))


def assumption_dropped(program: Program) -> Outcome:
    return changed(replace(program, assumptions=()))


def weight_written(program: Program) -> Outcome:
    program.graph_module.stiffness.mul_(3)
    return changed(program)


def forgotten_return(program: Program) -> None:
    named(program, aten.add.Tensor).target = aten.sub.Tensor


def program_returned(program: Program) -> Program:
    return program


BROKEN: dict[Callable[[Program], Any], str] = {
    dangling_argument: "returned a broken graph: Argument 'stranger' of Node 'add_tensor' does not belong",
    use_before_definition: "returned a broken graph: Argument 'add_tensor' of Node 'mul_tensor' was used before",
    missing_tensor: "returned a broken graph: Node stiffness target stifness references nonexistent attribute",
    no_output: "returned a broken graph: it does not end in its one output node",
    node_after_output: "returned a broken graph: it does not end in its one output node",
    output_is_no_tuple: "returned a broken graph: it returns mul_tensor_2 instead of a tuple of nodes",
    output_too_many: "returned a broken graph: it returns 2 values for 1 outputs",
    input_lost: "returned a broken graph: 1 placeholders for 2 inputs",
    input_dropped: "changed the inputs from positions, shifts to positions",
    dtype_changed: "changed dtype of the output 'energy' from torch.float64 to torch.float32",
    output_renamed: "changed the outputs from energy to total",
    other_energy: "changed the differentiated output from 'energy' to 'node_energy'",
    assumption_dropped: "dropped the assumption 'sorted', on which earlier passes rely",
    weight_written: "changed the tensor 'stiffness' in place, which is shared with the original model",
    forgotten_return: "returned NoneType instead of an Outcome with a Program",
    program_returned: "returned Program instead of an Outcome with a Program",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda function: function.__name__)
def test_a_broken_pass_is_named(broken: Callable[[Program], Any]) -> None:
    passes = [Nothing(), Scale(2.0), Custom(broken), Nothing()]
    with pytest.raises(PassError) as caught:
        run(harmonic(), passes, check=accept)
    error = caught.value
    assert error.what.startswith(f"the pass 'custom' {BROKEN[broken]}")
    assert error.what.endswith("; passes that ran before: nothing, scale")
    assert error.where.pass_name == "custom"
    assert error.hint == f"the pipeline without 'custom'; this is a bug in {__name__}.Custom"
    assert error.exit_code == 1
    assert "\n" not in str(error)


def test_a_way_back_from_forces_to_energy_is_refused() -> None:
    back = Custom(lambda program: changed(replace(program, stage="energy")))
    with pytest.raises(PassError, match="took the program back from stage forces to energy"):
        run(harmonic(), [AddForces(), back], check=accept)


def test_skipped_passes_are_not_among_those_that_ran() -> None:
    with pytest.raises(PassError, match="passes that ran before: add-forces, nothing"):
        run(harmonic(), [AddForces(), AddForces(), Nothing(), Crash("x")], check=accept)


def test_the_first_pass_has_none_before_it() -> None:
    with pytest.raises(PassError, match="passes that ran before: none"):
        run(harmonic(), [Custom(forgotten_return)], check=accept)


# --- the modification flag


def other_target(program: Program) -> Program:
    named(program, aten.add.Tensor).target = aten.sub.Tensor
    return program


def other_argument(program: Program) -> Program:
    named(program, aten.sum.dim_IntList).update_arg(1, [-1])
    return program


def swapped_arguments(program: Program) -> Program:
    node = named(program, aten.add.Tensor)
    node.args = node.args[::-1]
    return program


def other_number_type(program: Program) -> Program:
    named(program, aten.sum.dim_IntList).update_arg(1, [True])
    return program


def other_constant(program: Program) -> Program:
    program.graph_module.stiffness = program.graph_module.stiffness.clone()
    return program


def node_added(program: Program) -> Program:
    energy = program.results["energy"]
    with program.graph.inserting_after(energy):
        program.graph.call_function(aten.neg.default, (energy,))
    return program


def node_removed(program: Program) -> Program:
    energy, square = program.results["energy"], program.results["energy"].args[0]
    assert isinstance(square, fx.Node)
    program.graph.output_node().args = ((square,),)
    program.graph.erase_node(energy)
    return program


def assumption_added(program: Program) -> Program:
    return replace(program, assumptions=(*program.assumptions, "periodic"))


def stage_raised(program: Program) -> Program:
    return replace(program, stage="forces")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_target, "node 'add_tensor' (aten.sub.Tensor) differs"),
        (other_argument, "node 'sum_dim_int_list' (aten.sum.dim_IntList) differs"),
        (other_number_type, "node 'sum_dim_int_list' (aten.sum.dim_IntList) differs"),
        (swapped_arguments, "node 'add_tensor' (aten.add.Tensor) differs"),
        (other_constant, "the tensor 'stiffness' differs"),
        (node_added, "node 'neg_default' (aten.neg.default) differs"),
        (node_removed, "node 'output' (output) differs"),
        (assumption_added, "its stage or assumptions differ"),
        (stage_raised, "its stage or assumptions differ"),
    ],
)
def test_a_hidden_change_is_found(change: Callable[[Program], Program], said: str) -> None:
    with pytest.raises(PassError) as caught:
        run(harmonic(), [Custom(lambda program: Outcome(change(program), modified=False))], check=accept)
    assert f"the pass 'custom' reported that it changed nothing, but {said}" in caught.value.what
    assert run(harmonic(), [Custom(lambda program: changed(change(program)))], check=accept).records[0].modified


def test_new_names_and_unused_constants_are_no_change() -> None:
    def rename(program: Program) -> Outcome:
        add_constant(program, "unused", torch.ones(1))
        copy = program.copy()
        named(copy, aten.add.Tensor).name = "moved"
        return Outcome(copy, modified=False)

    assert run(harmonic(), [Custom(rename)], check=accept).records[0].modified is False


def test_nan_among_the_arguments_is_equal_to_itself() -> None:
    program = run(harmonic(), [Scale(float("nan"))], check=accept).program
    assert run(program, [Nothing()], check=accept).program is program


# --- errors that passes and checks raise


@dataclass(frozen=True)
class Crash(Pass):
    name: ClassVar[str] = "crash"
    text: str = ""

    def apply(self, program: Program) -> Outcome:
        raise RuntimeError(self.text)


def test_a_crash_is_wrapped_with_its_place() -> None:
    with pytest.raises(PassError) as caught:
        run(harmonic(), [Scale(2.0), Custom(lambda program: operator.truediv(1, 0))], check=accept)
    error = caught.value
    assert error.what == (
        "the pass 'custom' crashed: ZeroDivisionError: division by zero; passes that ran before: scale"
    )
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert error.where.pass_name == "custom"
    file, line = (error.where.source or "").rsplit(":", 1)
    assert file == __file__ and int(line) > 0


@pytest.mark.parametrize(("text", "shown"), [("first\nsecond", "RuntimeError: first;"), ("", "RuntimeError;")])
def test_a_crash_shows_the_first_line_of_its_message(text: str, shown: str) -> None:
    with pytest.raises(PassError) as caught:
        run(harmonic(), [Crash(text)], check=accept)
    assert shown in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_raised_on_purpose_keeps_its_type_and_gets_the_pass() -> None:
    def refuse(program: Program) -> Outcome:
        raise CaptureError("no such layer", where=Location(node="add"), hint="another model")

    with pytest.raises(CaptureError) as caught:
        run(harmonic(), [Nothing(), Custom(refuse)], check=accept)
    assert caught.value.where == Location(pass_name="custom", node="add")
    assert caught.value.what == "no such layer; passes that ran before: nothing"
    assert caught.value.hint == "another model"


def test_a_pass_name_that_is_filled_in_stays() -> None:
    def refuse(program: Program) -> Outcome:
        raise PassError("inner", where=Location(pass_name="inner-pass"))

    with pytest.raises(PassError) as caught:
        run(harmonic(), [Custom(refuse)], check=accept)
    assert caught.value.where.pass_name == "inner-pass"


def test_an_interruption_is_left_alone() -> None:
    def interrupt(program: Program) -> Outcome:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(harmonic(), [Custom(interrupt)], check=accept)


def test_what_the_check_finds_is_blamed_on_the_pass() -> None:
    def wrong_shape(program: Program) -> Outcome:
        named(program, aten.sum.dim_IntList).update_arg(1, [0])
        return changed(program)

    verify(harmonic())
    with pytest.raises(PassError) as caught:
        run(harmonic(), [Nothing(), Custom(wrong_shape)], check=verify)
    assert caught.value.where.pass_name == "custom"
    assert caught.value.where.node == "sum_dim_int_list"
    assert caught.value.what.endswith("; passes that ran before: nothing")


# --- observers


class Diary:
    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.programs: list[tuple[Program, Program]] = []

    def on_pass_start(self, pass_: Pass, program: Program) -> None:
        self.events.append(("start", pass_.name))

    def on_pass_end(self, record: PassRecord, before: Program, after: Program) -> None:
        self.events.append(("end", record.name))
        self.programs.append((before, after))


def test_observers_see_every_pass() -> None:
    first, second = Diary(), Diary()
    program = harmonic()
    result = run(program, [Nothing(), AddForces(), AddForces()], check=accept, observers=[first, second])
    names = ["nothing", "add-forces", "add-forces"]
    assert first.events == [event for name in names for event in (("start", name), ("end", name))]
    assert second.events == first.events
    (a, b), (c, d), (e, f) = first.programs
    assert a is b is c is program
    assert d is e is f is result.program


def test_observers_see_no_end_of_a_pass_that_failed() -> None:
    diary = Diary()
    with pytest.raises(PassError):
        run(harmonic(), [Nothing(), Crash()], check=accept, observers=[diary])
    assert diary.events == [("start", "nothing"), ("end", "nothing"), ("start", "crash")]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(file: io.StringIO) -> str:
    console = Console(file=file, width=100, force_terminal=True)
    with ProgressBar(total=2, console=console) as bar:
        run(harmonic(), [Nothing(), Scale(2.0)], check=accept, observers=[bar])
    return file.getvalue()


def test_the_progress_bar_names_the_passes_on_a_terminal() -> None:
    text = drawn(Terminal())
    assert "nothing" in text and "scale" in text
    assert "1/2" in text


def test_the_progress_bar_is_silent_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert drawn(io.StringIO()) == ""
    with ProgressBar() as bar:
        bar.describe("capture", total=3)
        bar.advance()
    assert capsys.readouterr() == ("", "")


# --- bisecting


def is_good(program: Program) -> bool:
    return bool(evaluate(program).max() < 100)  # 48 at first


@pytest.mark.parametrize("guilty", range(6))
def test_bisect_names_the_pass_that_breaks_the_result(guilty: int) -> None:
    passes: list[Pass] = [Scale(1.0), Nothing(), Scale(0.5), Nothing(), Scale(2.0)]
    passes.insert(guilty, Scale(10.0))
    found = bisect(harmonic(), passes, is_good, check=accept)
    assert isinstance(found, BisectResult)
    assert (found.name, found.index) == ("scale", guilty)
    assert is_good(found.before) and not is_good(found.after)


def test_bisect_finds_nothing_where_the_end_is_good() -> None:
    assert bisect(harmonic(), [Scale(10.0), Scale(0.1)], is_good, check=accept) is None
    assert bisect(harmonic(), [], is_good, check=accept) is None


@pytest.mark.parametrize("passes", [[], [Nothing()], [Scale(1.0)], [Scale(1.0), Scale(1.0)]])
def test_bisect_blames_no_pass_for_a_bad_start(passes: list[Pass]) -> None:
    with pytest.raises(UsageError, match="bad before the first pass"):
        bisect(harmonic(), passes, lambda program: False, check=accept)


def test_bisect_asks_few_questions() -> None:
    asked: list[Program] = []

    def question(program: Program) -> bool:
        asked.append(program)
        return is_good(program)

    found = bisect(harmonic(), [*[Scale(1.0)] * 20, Scale(10.0), *[Scale(1.0)] * 11], question, check=accept)
    assert found is not None and found.index == 20
    assert len(asked) <= 2 + 5


# --- reports


@dataclass(frozen=True)
class Paper:
    """A receipt of sorts."""

    worst: float

    def to_json(self) -> dict[str, Any]:
        return {"worst": self.worst}


def full_report() -> Report:
    records = run(harmonic(), [Scale(2.0), Nothing(), AddForces(), AddForces()], check=accept).records
    return Report(
        model="mace.modules.models.MACE",
        frontend="mace",
        pipeline="scale{factor=2.0},nothing,add-forces,add-forces",
        target="eager",
        versions=(("torch", "2.13.0"), ("fxpass", "0.1.0")),
        records=records,
        timings=(("capture", 1.5), ("passes", 0.25), ("passes", 0.5)),
        receipt=Paper(1e-12),
        warnings=("no compiler",),
    )


@pytest.mark.parametrize("receipt", [Paper(1e-12), None])
def test_a_report_round_trips_through_json(receipt: Paper | None) -> None:
    report = replace(full_report(), receipt=receipt)
    data = report.to_json()
    assert json.loads(json.dumps(data)) == json.loads(json.dumps(data, sort_keys=True))
    again = Report.from_json(json.loads(json.dumps(data)), read_receipt=lambda data: Paper(**data))
    assert again == report


def test_the_json_of_a_report() -> None:
    data = full_report().to_json()
    assert [record["name"] for record in data["passes"]] == ["scale", "nothing", "add-forces", "add-forces"]
    assert data["passes"][1]["refusals"] == [
        {"rule": "rule", "reason": "no match", "nodes": ["add"], "module": "readout"}
    ]
    assert data["passes"][3]["skipped"].startswith("runs at stage energy")
    assert data["versions"] == {"torch": "2.13.0", "fxpass": "0.1.0"}
    assert data["timings"][0] == {"stage": "capture", "seconds": 1.5}
    assert data["receipt"] == {"worst": 1e-12}
    assert data["warnings"] == ["no compiler"]


def without_model(data: dict[str, Any]) -> None:
    del data["model"]


def unknown_entry_in_a_record(data: dict[str, Any]) -> None:
    data["passes"][0]["colour"] = "red"


def record_without_name(data: dict[str, Any]) -> None:
    del data["passes"][0]["name"]


def versions_as_a_list(data: dict[str, Any]) -> None:
    data["versions"] = []


def receipt_of_another_kind(data: dict[str, Any]) -> None:
    data["receipt"] = {"best": 1}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without_model, "KeyError: 'model'"),
        (unknown_entry_in_a_record, "colour"),
        (record_without_name, "name"),
        (versions_as_a_list, "AttributeError"),
        (receipt_of_another_kind, "best"),
    ],
)
def test_a_report_that_was_spoiled_is_refused(spoil: Callable[[dict[str, Any]], None], said: str) -> None:
    data = full_report().to_json()
    spoil(data)
    with pytest.raises(PackageError, match="the report cannot be read") as caught:
        Report.from_json(data, read_receipt=lambda data: Paper(**data))
    assert said in str(caught.value)
