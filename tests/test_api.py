"""``optimize`` and ``verify``: what the arguments mean, what is refused before any work, and wrong passes caught."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import fx

import fxpass
from fxpass import Application, Exactness, Outcome, Pass, PassRecord, Program, Structure
from fxpass.ir.program import Stage
from fxpass.models import Settings, SmallPotential, build, collate, save
from fxpass.structures import probe_structures

pytestmark = pytest.mark.once

aten = torch.ops.aten
NUMBERS, CUTOFF = (6, 8, 14), 4.5
PROBES = probe_structures(NUMBERS, CUTOFF)
SETTINGS = Settings(
    numbers=NUMBERS,
    atomic_energies=(0.5, -1.0, 0.25),
    cutoff=CUTOFF,
    features="2x0e+2x1o",
    max_degree=1,
    layers=1,
    radial_functions=3,
    radial_neurons=4,
    average_neighbours=1.0,
)
STAGES = ["capture", "calibration", "passes", "lower to eager", "verify"]


def model(dtype: torch.dtype = torch.float64) -> SmallPotential:
    return build(SETTINGS, dtype)


def batch(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return collate([PROBES[0], PROBES[5]], NUMBERS, CUTOFF, dtype)


def assert_close(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    ours, theirs = found(batch(), compute_stress=True), expected(batch(), compute_stress=True)
    assert theirs["forces"].abs().max() > 1e-2
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, rtol=0, atol=1e-9), name


# --- passes to test with


@dataclass(frozen=True)
class Nothing(Pass):
    """Changes nothing, and remembers that it was asked."""

    name: ClassVar[str] = "nothing"
    note: str = ""

    def apply(self, program: Program) -> Outcome:
        return Outcome(program, modified=False)


def before_output(program: Program, change: Callable[[fx.Graph, list[fx.Node]], None]) -> Outcome:
    """The program with other nodes returned."""
    output = program.graph.output_node()
    returned = list(output.args[0])  # type: ignore[arg-type]
    with program.graph.inserting_before(output):
        change(program.graph, returned)
    output.args = (tuple(returned),)
    return Outcome(program, modified=True)


@dataclass(frozen=True)
class ScaleWeight(Pass):
    """Multiplies one weight by 1.001: a wrong constant."""

    name: ClassVar[str] = "scale-weight"

    def apply(self, program: Program) -> Outcome:
        weight = next(n for n in program.graph.find_nodes(op="get_attr") if "radial" in str(n.target))
        value = getattr(program.graph_module, str(weight.target)).detach() * 1.001
        program.graph_module.register_buffer("scaled_weight", value)
        weight.target = "scaled_weight"
        return Outcome(program, modified=True)


@dataclass(frozen=True)
class ShiftEnergy(Pass):
    """Adds 1e-6 eV to every structure: forces are right, the energy is not."""

    name: ClassVar[str] = "shift-energy"

    def apply(self, program: Program) -> Outcome:
        def change(graph: fx.Graph, returned: list[fx.Node]) -> None:
            returned[0] = graph.call_function(aten.add.Tensor, (returned[0], 1e-6))

        return before_output(program, change)


@dataclass(frozen=True)
class StretchAxis(Pass):
    """Measures lengths along z with another ruler: breaks rotational symmetry, and nothing else."""

    name: ClassVar[str] = "stretch-axis"

    def apply(self, program: Program) -> Outcome:
        vectors = program.placeholders["edge_vectors"]
        program.graph_module.register_buffer("rulers", torch.tensor([1.0, 1.0, 1.001], dtype=torch.float64))
        with program.graph.inserting_after(vectors):
            rulers = program.graph.get_attr("rulers")
        with program.graph.inserting_after(rulers):
            stretched = program.graph.call_function(aten.mul.Tensor, (vectors, rulers))
        vectors.replace_all_uses_with(stretched, delete_user_cb=lambda node: node is not stretched)
        return Outcome(program, modified=True)


@dataclass(frozen=True)
class ScaleForces(Pass):
    """Forces 1% too large: no longer the gradient of the energy."""

    name: ClassVar[str] = "scale-forces"
    stages: ClassVar[tuple[Stage, ...]] = ("forces",)

    def apply(self, program: Program) -> Outcome:
        def change(graph: fx.Graph, returned: list[fx.Node]) -> None:
            returned[-1] = graph.call_function(aten.mul.Tensor, (returned[-1], 1.01))

        return before_output(program, change)


@dataclass(frozen=True)
class ApproximateForces(ScaleForces):
    """The same, by a pass that says that it approximates."""

    name: ClassVar[str] = "approximate-forces"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE


@dataclass(frozen=True)
class Approximate(Pass):
    """Scales the energy by 1 + 1e-7, which is consistent, and within a budget."""

    name: ClassVar[str] = "approximate"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    stages: ClassVar[tuple[Stage, ...]] = ("energy",)

    def apply(self, program: Program) -> Outcome:
        def change(graph: fx.Graph, returned: list[fx.Node]) -> None:
            returned[0] = graph.call_function(aten.mul.Tensor, (returned[0], 1 + 1e-7))

        return before_output(program, change)


@dataclass(frozen=True)
class BreakShape(Pass):
    """Inserts a matrix product of things that do not fit."""

    name: ClassVar[str] = "break-shape"

    def apply(self, program: Program) -> Outcome:
        def change(graph: fx.Graph, returned: list[fx.Node]) -> None:
            vectors = program.placeholders["edge_vectors"]
            graph.create_node("call_function", aten.mm.default, (vectors, vectors), name="misfit")

        return before_output(program, change)


class Watcher:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.ended: list[PassRecord] = []

    def on_pass_start(self, pass_: Pass, program: Program) -> None:
        self.started.append(pass_.name)

    def on_pass_end(self, record: PassRecord, before: Program, after: Program) -> None:
        assert record.modified == (after is not before)
        self.ended.append(record)


# --- the passes argument


def names(result: fxpass.Optimized) -> list[str]:
    return [record.name for record in result.report.records]


@dataclass(frozen=True)
class Observed:
    """One call of optimize, and all that could be seen of it."""

    result: fxpass.Optimized
    original: SmallPotential
    watcher: Watcher
    stages: list[str]
    folder: Path


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Observed:
    """A list that mixes a preset, a name, a text and an instance."""
    folder, watcher, stages, original = tmp_path_factory.mktemp("dump") / "graphs", Watcher(), [], model()
    passes = ["exact", "dead-code", "fold-constants,common-subexpressions", Nothing(note="mine")]
    result = fxpass.optimize(original, passes, dump=folder, observers=[watcher], progress=stages.append)
    return Observed(result, original, watcher, stages, folder)


def test_a_list_mixes_presets_names_texts_and_passes(observed: Observed) -> None:
    report = observed.result.report
    assert report.pipeline.startswith("fold-constants,specialize-species,")  # the preset, expanded
    assert report.pipeline.endswith(',dead-code,dead-code,fold-constants,common-subexpressions,nothing{note=mine}')
    mine = next(record for record in report.records if record.name == "nothing")
    assert mine.options == "note=mine" and not mine.modified
    assert_close(observed.result, observed.original)


def test_observers_and_progress_are_told(observed: Observed) -> None:
    watcher, report = observed.watcher, observed.result.report
    assert watcher.started == [record.name for record in watcher.ended]
    assert watcher.ended == list(report.records[: len(watcher.ended)])  # then come the target's own passes
    assert "legalize" not in watcher.started
    assert observed.stages == [stage for stage, _ in report.timings] == STAGES
    assert all(seconds >= 0 for _, seconds in report.timings)


def test_the_dump_holds_every_graph_that_changed(observed: Observed) -> None:
    found = {path.name: path.read_text() for path in observed.folder.iterdir()}
    changed = {f"{k:02d}-{record.name}.txt" for k, record in enumerate(observed.watcher.ended, 1) if record.modified}
    assert any(name.endswith("-differentiate.txt") for name in changed)
    assert found.keys() == {"00-captured.txt", "report.json", *changed}
    assert "fxpass.tensor_product" in found["00-captured.txt"]
    assert json.loads(found["report.json"]) == observed.result.report.to_json()


def test_the_report_says_what_was_done(observed: Observed) -> None:
    report = observed.result.report
    assert report.model == "fxpass.models.SmallPotential"
    assert (report.frontend, report.target) == ("equivariant", "eager")
    assert dict(report.versions)["torch"] == torch.__version__
    assert report.warnings == ()
    assert report.receipt is not None and report.receipt.passed
    assert {row.structure for row in report.receipt.rows} == {probe.name for probe in PROBES}
    assert fxpass.Report.from_json(
        json.loads(json.dumps(report.to_json())), read_receipt=fxpass.Receipt.from_json
    ) == report


@pytest.mark.parametrize("passes", ["fold-constants,dead-code,differentiate,dead-code", Nothing(), []], ids=str)
def test_a_text_a_pass_and_nothing(passes: object) -> None:
    """``differentiate`` is added where it is left out, once."""
    original = model()
    result = fxpass.optimize(original, passes, verify=False)  # type: ignore[arg-type]
    assert names(result).count("differentiate") == 1
    assert result.program.stage == "forces"
    assert_close(result, original)


def test_the_portable_preset_leaves_aten_alone() -> None:
    result = fxpass.optimize(model(), "portable", verify=False)
    called = {str(node.target) for node in result.graph_module.graph.nodes if node.op == "call_function"}
    assert any(name.startswith("aten.") for name in called)
    assert not any(name.startswith("fxpass.") for name in called)


def test_a_checkpoint_is_as_good_as_a_model(tmp_path: Path) -> None:
    save(model(), tmp_path / "small.npz")
    result = fxpass.optimize(tmp_path / "small.npz", [], verify=False)
    assert_close(result, model())
    assert result.graph_module.code == fxpass.optimize(model(), [], verify=False).graph_module.code


# --- refused before any work


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"passes": "exat"}, fxpass.PipelineError, "did you mean 'exact'"),
        ({"passes": ["exact", "dead-cod"]}, fxpass.PipelineError, "did you mean 'dead-code'"),
        ({"passes": "specialize-heads{heat=1}"}, fxpass.PipelineError, "did you mean 'head'"),
        ({"passes": ""}, fxpass.PipelineError, "empty"),
        ({"passes": Nothing}, fxpass.UsageError, "Nothing is not iterable|Nothing is a pass class|passes is"),
        ({"passes": [Nothing]}, fxpass.UsageError, "pass class, not a pass"),
        ({"passes": [7]}, fxpass.UsageError, "7 is neither"),
        ({"passes": None}, fxpass.UsageError, "passes is None"),
        ({"target": "torchscrip"}, fxpass.UsageError, "did you mean 'torchscript'"),
        ({"budget": "tiny"}, fxpass.UsageError, "not a force budget"),
        ({"budget": -1.0}, fxpass.UsageError, "not a force budget"),
        ({"budget": float("nan")}, fxpass.UsageError, "not a force budget"),
        ({"passes": Approximate()}, fxpass.UsageError, "need a budget"),
        ({"example": 7}, fxpass.UsageError, "int is not a structure"),
        ({"example": "gone.xyz"}, fxpass.StructureError, "no structure file"),
        (
            {"example": Structure([79], [[0.0, 0, 0]], np.zeros((3, 3)), (False,) * 3, "gold")},
            fxpass.StructureError,
            "gold has the unknown species Au; known are C, O, Si",
        ),
        (
            {"example": [PROBES[0], Structure([6], [[np.nan, 0, 0]], np.zeros((3, 3)), (False,) * 3, "lost")]},
            fxpass.StructureError,
            "lost has NaN",
        ),
        ({"dump": "gone/folder"}, fxpass.UsageError, "gone/folder"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_nonsense_is_refused_before_any_work(
    arguments: dict[str, object], error: type[Exception], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stages: list[str] = []
    with pytest.raises(error, match=says) as found:
        fxpass.optimize(model(), progress=stages.append, **{"dump": "graphs", **arguments})  # type: ignore[arg-type]
    assert stages == []
    assert list(tmp_path.iterdir()) == []
    assert "\n\n" not in str(found.value)


def test_a_dump_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    with pytest.raises(fxpass.UsageError, match="left as it is"):
        fxpass.optimize(model(), dump=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_model_with_hooks_is_refused(register: str) -> None:
    hooked = model()
    inner = next(module for name, module in hooked.named_modules() if name)
    getattr(inner, register)(lambda *given: None)
    with pytest.raises(fxpass.UnsupportedModelError, match="forward hooks"):
        fxpass.optimize(hooked)


def test_what_is_not_a_model_is_refused(observed: Observed, tmp_path: Path) -> None:
    with pytest.raises(fxpass.UsageError, match="optimised already") as found:
        fxpass.optimize(observed.result)
    assert found.value.hint == "optimise the original"
    for thing in (7, {"model": 1}, SmallPotential):
        with pytest.raises(fxpass.UsageError, match="is not a model"):
            fxpass.optimize(thing)  # type: ignore[arg-type]
    with pytest.raises(fxpass.UnsupportedModelError, match=r"no frontend covers.*torch\.nn\.modules\.linear\.Linear"):
        fxpass.optimize(torch.nn.Linear(2, 2))
    with pytest.raises(fxpass.UsageError, match="there is no file"):
        fxpass.optimize(tmp_path / "gone.model")
    observed.result.save(tmp_path / "model.fxp")
    with pytest.raises(fxpass.FxpassError):
        fxpass.optimize(tmp_path / "model.fxp")


# --- structures to verify on


def test_examples_are_verified_on(tmp_path: Path) -> None:
    from ase import Atoms

    mine = Structure([6, 8], [[0.0, 0, 0], [0, 0, 1.5]], np.zeros((3, 3)), (False,) * 3, "mine")
    atoms = Atoms("SiC", [[0.0, 0, 0], [1.1, 1.2, 1.3]], cell=[4.0, 4.1, 4.2], pbc=True)
    (tmp_path / "two.xyz").write_text("1\n\nC 0 0 0\n2\n\nC 0 0 0\nO 0 0 1.2\n")

    def examples() -> Iterator[object]:
        yield mine
        yield atoms
        yield tmp_path / "two.xyz"

    result = fxpass.optimize(model(), [], example=examples())
    receipt = result.report.receipt
    assert receipt is not None and receipt.passed
    tested = list(dict.fromkeys(row.structure for row in receipt.rows))
    assert tested == [*(probe.name for probe in PROBES), "mine", "structure", "two.xyz[0]", "two.xyz[1]"]
    periodic = {row.structure for row in receipt.rows if row.check == "strain"}
    assert "structure" in periodic and "mine" not in periodic

    again = fxpass.verify(result, model(), example=mine, probes=False)
    assert again.passed and {row.structure for row in again.rows} == {"mine"}
    with pytest.raises(fxpass.StructureError, match="at least one structure"):
        fxpass.verify(result, model(), probes=False)
    with pytest.raises(fxpass.VerificationError, match="not the original: numbers"):
        fxpass.verify(result, build(Settings(numbers=(6, 8, 15), atomic_energies=(0.0, 0.0, 0.0), cutoff=CUTOFF)))
    assert not fxpass.verify(result, build(SETTINGS, torch.float64, seed=1), example=mine, probes=False).passed


def test_without_verification_the_report_says_so() -> None:
    result = fxpass.optimize(model(), [], verify=False)
    assert result.report.receipt is None
    assert any("nothing was compared" in warning for warning in result.report.warnings)
    assert [stage for stage, _ in result.report.timings] == STAGES[:-1]


# --- budgets


def test_a_budget_admits_what_keeps_forces_a_gradient() -> None:
    receipt = fxpass.optimize(model(), Approximate(), budget="1 meV/A").report.receipt
    assert receipt is not None and receipt.passed
    assert (receipt.exactness, receipt.budget) == (Exactness.APPROXIMATE, 1e-3)
    assert max(row.value for row in receipt.rows if row.check == "forces") > 1e-9  # more than an exact pass may
    assert {row.limit for row in receipt.rows if row.check == "forces"} == {1e-3 + 1e-9}


# --- wrong passes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("passes", "guilty", "check"),
    [
        (["dead-code", ScaleWeight(), "fold-constants"], "scale-weight", "energy"),
        (["fold-constants", ShiftEnergy()], "shift-energy", "energy"),
        ([StretchAxis(), "fold-constants,dead-code"], "stretch-axis", "rotation"),
        (["differentiate", ScaleForces(), "dead-code"], "scale-forces", "finite differences"),
    ],
    ids=["constant", "energy", "equivariance", "forces"],
)
def test_a_wrong_pass_is_caught_and_named(passes: list[object], guilty: str, check: str, tmp_path: Path) -> None:
    folder = tmp_path / "graphs"
    with pytest.raises(fxpass.VerificationError, match=f"the pass {guilty} is to blame") as found:
        fxpass.optimize(model(), passes, dump=folder)  # type: ignore[arg-type]
    assert found.value.where.pass_name == guilty
    assert found.value.exit_code == 1
    assert found.value.hint
    # what went wrong can be looked at
    assert any(path.name.endswith(f"-{guilty}.txt") for path in folder.iterdir())
    receipt = fxpass.Receipt.from_json(json.loads((folder / "report.json").read_text())["receipt"])
    assert not receipt.passed
    assert check in {row.check for row in receipt.failures}


@pytest.mark.slow
def test_no_budget_buys_forces_that_are_no_gradient() -> None:
    with pytest.raises(fxpass.VerificationError, match="finite differences") as found:
        fxpass.optimize(model(), ["differentiate", ApproximateForces()], budget="10 eV/A")
    assert found.value.where.pass_name == "approximate-forces"


def test_a_pass_that_breaks_the_graph_is_named_with_the_node(tmp_path: Path) -> None:
    watcher, passes = Watcher(), ["dead-code", BreakShape(), "dead-code"]
    with pytest.raises(fxpass.PassError) as found:
        fxpass.optimize(model(), passes, observers=[watcher], dump=tmp_path / "graphs")
    error = found.value
    assert (error.where.pass_name, error.where.node) == ("break-shape", "misfit")
    assert "passes that ran before: dead-code" in str(error)
    assert watcher.started == ["dead-code", "break-shape"]
    assert [record.name for record in watcher.ended] == ["dead-code"]
    assert (tmp_path / "graphs" / "00-captured.txt").is_file()


# --- what optimize leaves alone


def test_the_original_is_not_touched_and_not_shared() -> None:
    original = model(torch.float32)
    original.train()
    next(original.parameters()).requires_grad_(False)
    before, modules = copy.deepcopy(original), [(module, type(module)) for module in original.modules()]
    result = fxpass.optimize(original, "exact", verify=False)
    assert original.training and not result.training
    assert [(module, type(module)) for module in original.modules()] == modules
    for (name, value), was in zip(original.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(value, was) and value.requires_grad == was.requires_grad, name
        assert value.grad is None
    data = batch(torch.float32)
    energy = result(data)["energy"]
    with torch.no_grad():
        for value in original.parameters():
            value.fill_(1e3)
    assert torch.equal(result(data)["energy"], energy)
    result.double()  # compiled again, from the model that was optimised
    assert torch.allclose(result(batch())["energy"], before.double()(batch())["energy"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_any_autograd_mode_and_default_dtype(mode: type) -> None:
    original = model(torch.float32)
    torch.set_default_dtype(torch.float64)  # set back by a fixture
    random = torch.get_rng_state()
    with mode():
        result = fxpass.optimize(original, [])
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
        inside = result(batch(torch.float32))
    assert torch.get_default_dtype() == torch.float64
    assert torch.equal(torch.get_rng_state(), random)
    assert result.report.receipt is not None and result.report.receipt.passed
    outside = result(batch(torch.float32))
    assert all(value.dtype == torch.float32 and torch.equal(value, inside[name]) for name, value in outside.items())


def test_the_result_can_be_copied(observed: Observed) -> None:
    twin = copy.deepcopy(observed.result)
    assert twin.interface is not observed.result.interface
    with torch.no_grad():
        for value in observed.result.interface.parameters():
            assert not any(value.data_ptr() == other.data_ptr() for other in twin.parameters() if other.numel())
    assert_close(twin, observed.original)


def test_public_names_are_what_they_say(observed: Observed) -> None:
    """``capture`` and ``verify`` are functions, though packages have the same names."""
    assert callable(fxpass.capture) and callable(fxpass.verify)
    assert all(hasattr(fxpass, name) for name in fxpass.__all__)
    assert isinstance(observed.result.graph_module, fx.GraphModule)
    assert all(isinstance(place, Application) for r in observed.result.report.records for place in r.applications)


# --- calibration


@dataclass(frozen=True)
class Calibrated(Pass):
    """Changes nothing, and says what it could have measured on."""

    name: ClassVar[str] = "calibrated"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    stages: ClassVar[tuple[Stage, ...]] = ("energy",)
    calibrated: ClassVar[bool] = True

    budget: str | float | None = None

    def apply(self, program: Program) -> Outcome:
        edges = "".join(f" {sample['edge_vectors'].shape[0]}" for sample in program.samples)
        told = fxpass.Refusal("samples", edges), fxpass.Refusal("budget", str(self.budget))
        return Outcome(program, False, refusals=told)


def told(**arguments: object) -> list[str]:
    report = fxpass.optimize(model(), Calibrated(), verify=False, **arguments).report  # type: ignore[arg-type]
    return [refusal.reason for refusal in report.records[0].refusals]


def test_samples_are_the_inputs_that_the_interface_makes() -> None:
    original = model()
    other = replace(PROBES[0], positions=PROBES[0].positions * 1.01)
    program = fxpass.capture(original, calibration=other)
    for probe, sample in zip((*PROBES, other), program.samples, strict=True):
        energy, *_ = program.graph_module(*[sample[spec.name] for spec in program.inputs])
        expected = original(collate([probe], NUMBERS, CUTOFF, torch.float64))["energy"]
        assert torch.allclose(energy, expected, rtol=0, atol=1e-12)
    assert len(fxpass.capture(original).samples) == len(PROBES)
    assert program.cast(torch.float32).samples[0]["edge_vectors"].dtype == torch.float32


def test_a_pass_that_calibrates_gets_a_trajectory_or_what_the_user_gives() -> None:
    given, _ = told(calibration=[PROBES[3]])
    assert given.split()[len(PROBES) :] == ["0"]  # one atom, no edges
    moving, _ = told()
    assert len(moving.split()) == len(PROBES) + 5 * sum(len(probe) > 2 for probe in PROBES)


def test_the_budget_goes_to_passes_that_state_none() -> None:
    assert told(budget="1 meV/A", calibration=PROBES[0])[1] == "1 meV/A"
    report = fxpass.optimize(model(), Calibrated(budget=2e-3), calibration=PROBES[0]).report
    assert report.receipt is not None and report.receipt.budget == 2e-3
    two = [Calibrated(budget=2e-3), Calibrated(budget="1 meV/A")]
    assert fxpass.optimize(model(), two, calibration=PROBES[0]).report.receipt.budget == 3e-3  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("calibration", "says"), [([], "empty"), (Structure([79], [[0.0] * 3], np.zeros((3, 3)), (False,) * 3), "Au")]
)
def test_calibration_that_makes_no_sense(calibration: object, says: str) -> None:
    with pytest.raises(fxpass.FxpassError, match=says):
        fxpass.optimize(model(), Calibrated(budget=1e-3), calibration=calibration)  # type: ignore[arg-type]
