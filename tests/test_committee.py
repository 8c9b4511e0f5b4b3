"""Committees: several models merged into one program that computes their common geometry once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxpass
from fxpass.committee import Committee, join
from fxpass.errors import PassError, UsageError, VerificationError
from fxpass.ir import ops
from fxpass.ir.merge import first_outputs, merge
from fxpass.ir.metadata import provenance
from fxpass.ir.program import Program
from fxpass.ir.verifier import verify
from fxpass.models import Settings, build, collate
from fxpass.optimized import Optimized
from fxpass.structures import Structure, probe_structures
from fxpass.testing import example_inputs, run_program
from fxpass.verify.receipt import Receipt

pytestmark = pytest.mark.once

F64 = torch.float64
SETTINGS = Settings((29, 47, 79), (-1.0, -2.0, -3.0), features="4x0e+2x1o", max_degree=1, layers=1)
PROBES = {probe.name: probe for probe in probe_structures(SETTINGS.numbers, SETTINGS.cutoff)}
PASSES = ["preserve-sparsity", "exact"]
PHYSICAL = ("energy", "node_energy", "forces", "stress")


def model(seed: int, dtype: torch.dtype = F64, **settings: Any) -> nn.Module:
    return build(replace(SETTINGS, **settings), dtype, seed=seed)


def batch(names: Sequence[str] = tuple(PROBES), cutoff: float = SETTINGS.cutoff) -> dict[str, Tensor]:
    return collate([PROBES[name] for name in names], SETTINGS.numbers, cutoff, F64)


@pytest.fixture(scope="module")
def members() -> list[Optimized]:
    """Two members of one architecture, and one with another layer and other features."""
    models = [model(0), model(1), model(2, features="6x0e+3x1o", layers=2)]
    return [fxpass.optimize(m, PASSES, verify=False) for m in models]


@pytest.fixture(scope="module")
def committee(members: list[Optimized]) -> Committee:
    made = fxpass.optimize(members)
    assert isinstance(made, Committee)
    return made


# --- merging programs


def test_merged_programs_return_what_each_returns(members: list[Optimized]) -> None:
    programs = [member.program for member in members]
    merged = merge(programs)
    verify(merged)
    assert [spec.name for spec in merged.outputs] == [
        *(f"{name}.{k}" for k in range(3) for name in ("energy", "node_energy")),
        *(f"edge_gradient.{k}" for k in range(3)),
    ]
    for sizes in ({"atoms": 9, "edges": 23, "graphs": 3}, {"atoms": 1, "edges": 0, "graphs": 1}):
        inputs = example_inputs(merged, sizes)
        together = run_program(merged, inputs)
        for k, program in enumerate(programs):
            for name, value in run_program(program, inputs).items():
                assert torch.equal(together[f"{name}.{k}"], value), (name, k)
    energies = first_outputs(merged, 6)
    assert energies.stage == "energy"
    assert len(energies.graph.nodes) < len(merged.graph.nodes)
    verify(energies)


def test_merged_nodes_say_whose_they_are(members: list[Optimized]) -> None:
    merged = merge([member.program for member in members])
    modules = {provenance(node).module for node in merged.graph.nodes if node.op == "call_function"}
    assert {module.split(".")[1] for module in modules} == {"0", "1", "2"}
    assert "members.2.layers.1.product" in modules


def test_equal_weights_become_one_and_others_do_not(members: list[Optimized]) -> None:
    program = members[0].program

    def weights(merged: Program) -> int:
        return len(list(merged.graph_module.parameters())) + len(list(merged.graph_module.buffers()))

    assert weights(merge([program, program.copy()])) == weights(merge([program]))
    assert weights(merge([program, members[1].program])) > weights(merge([program]))


def test_programs_that_do_not_fit_are_not_merged(members: list[Optimized]) -> None:
    program = members[0].program
    with pytest.raises(PassError, match="no programs"):
        merge([])
    with pytest.raises(PassError, match="program 1 has other inputs"):
        merge([program, fxpass.capture(model(0))])


# --- what members share


def forward_harmonics(program: Program) -> int:
    return sum(
        node.target is ops.polynomial and node.args[-1] == "out" and "harmonics" in provenance(node).module
        for node in program.graph.nodes
    )


def radial(program: Program) -> int:
    return sum(
        node.target is torch.ops.aten.sin.default and not provenance(node).backward for node in program.graph.nodes
    )


def test_members_share_harmonics_and_radial_basis(members: list[Optimized], committee: Committee) -> None:
    merged = merge([member.program for member in members])
    assert (forward_harmonics(merged), radial(merged)) == (3, 3)
    assert (forward_harmonics(committee.program), radial(committee.program)) == (1, 1)
    assert sum(len(member.program.graph.nodes) for member in members) > len(committee.program.graph.nodes)


def test_the_merged_program_runs_once_for_all_members(committee: Committee) -> None:
    runs = []
    hook = committee.merged.forces.register_forward_hook(lambda *_: runs.append(1))
    committee(batch(), compute_stress=True)
    hook.remove()
    assert len(runs) == 1
    assert committee.merged.last is None


# --- values


def check_against_members(committee: Committee, data: dict[str, Tensor], **flags: Any) -> None:
    found = committee(data, **flags)
    alone = [member(data, **flags) for member in committee.members]
    for name, first in alone[0].items():
        values = torch.stack([result[name] for result in alone])
        assert found[name].shape == first.shape and found[name].dtype == first.dtype
        torch.testing.assert_close(found[f"{name}_comm"], values, rtol=0, atol=1e-12)
        torch.testing.assert_close(found[name], values.mean(0), rtol=0, atol=1e-12)
        torch.testing.assert_close(found[f"{name}_var"], values.var(0, unbiased=False), rtol=0, atol=1e-12)


@pytest.mark.parametrize("names", [tuple(PROBES), ("alloy",), ("cluster",), ("atom",), ("dimer", "atom")])
def test_a_committee_is_its_members(committee: Committee, names: Sequence[str]) -> None:
    check_against_members(committee, batch(names), compute_stress="alloy" in names and len(names) == 1)
    check_against_members(committee, batch(names), compute_forces=False)


def test_changes_in_place_between_calls(committee: Committee) -> None:
    data = batch(["alloy", "cluster"])
    check_against_members(committee, data)
    data["positions"][0] += 0.05
    check_against_members(committee, data)
    data["shifts"].mul_(1.02)
    check_against_members(committee, data)
    data["numbers"].fill_(29)
    check_against_members(committee, data)
    data["edge_index"][:, 0] = data["edge_index"][:, 1]
    data["shifts"][0] = data["shifts"][1]
    check_against_members(committee, data)


def test_order_skin_and_padding_keep_the_bits(committee: Committee) -> None:
    expected, data = committee(batch()), batch(cutoff=6.0)
    order = torch.randperm(data["shifts"].shape[0], generator=torch.Generator().manual_seed(0))
    found = committee({**data, "edge_index": data["edge_index"][:, order], "shifts": data["shifts"][order]})
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_training_a_committee(committee: Committee) -> None:
    """With autograd recording, each member is differentiated by itself: d(mean force)/dr is the mean of theirs."""
    data = batch(["cluster"])

    def row(module: Any) -> Tensor:
        moving = {**data, "positions": data["positions"].clone().requires_grad_()}
        force = module(moving, training=True)["forces"][1, 2]
        return torch.autograd.grad(force, moving["positions"])[0]

    rows = torch.stack([row(member) for member in committee.members])
    torch.testing.assert_close(row(committee), rows.mean(0), rtol=0, atol=1e-11)
    check_against_members(committee, data)


def test_a_failed_call_leaves_nothing_behind(committee: Committee) -> None:
    data = batch(["cluster"])
    with pytest.raises(ValueError, match="does not know"):
        committee({**data, "numbers": data["numbers"] + 1})
    assert committee.merged.last is None
    check_against_members(committee, data)


# --- the report


def test_a_committee_agrees_with_its_members_and_says_so(committee: Committee) -> None:
    agreement = committee.report.agreement
    assert agreement is not None and agreement.passed
    assert {row.structure for row in agreement.rows} >= {"alloy, member 0", "atom, member 2"}
    assert max(row.value for row in agreement.rows) <= 1e-12
    data = committee.report.to_json()
    assert data["agreement"]["passed"] and len(data["members"]) == 3
    assert data["passes"][0]["name"] == "common-subexpressions" and data["passes"][0]["modified"]


def test_every_member_has_a_receipt_of_its_own(members: list[Optimized]) -> None:
    """A model is optimised and verified by itself; one that is optimised already keeps the report it has."""
    made = fxpass.optimize([model(0), members[1]], PASSES)
    receipt = made.report.members[0].receipt
    assert isinstance(receipt, Receipt) and receipt.passed
    assert {row.check for row in receipt.rows} >= {"forces", "rotation", "finite differences"}
    assert made.members[1] is members[1] and made.report.members[1] is members[1].report


def test_a_committee_that_differs_from_its_members_is_not_returned(
    members: list[Optimized], monkeypatch: pytest.MonkeyPatch
) -> None:
    import fxpass.committee as module

    def shifted(program: Program, *args: Any, **options: Any) -> Any:
        energy, forces = lower_both(program, *args, **options)
        forces.register_forward_hook(lambda _m, _i, values: [values[0] + 1e-6, *values[1:]])
        return energy, forces

    lower_both = module.lower_both
    monkeypatch.setattr(module, "lower_both", shifted)
    with pytest.raises(VerificationError, match=r"does not agree with its members.*energy of \w+, member 0"):
        join(members[:1])


# --- as a drop-in


def test_attributes_are_those_of_a_member(committee: Committee) -> None:
    assert committee.cutoff == SETTINGS.cutoff
    assert committee.atomic_numbers.tolist() == [29, 47, 79]
    with pytest.raises(AttributeError):
        _ = committee.no_such_thing


def test_a_committee_neither_moves_nor_casts(committee: Committee) -> None:
    assert committee.double() is committee
    with pytest.raises(UsageError, match=re.escape("cannot become torch.float32")):
        committee.float()


def test_saving_is_refused_and_says_how_to(committee: Committee, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"members\[k\].save"):
        committee.save(tmp_path / "all.fxp")
    assert not (tmp_path / "all.fxp").exists()
    for k, member in enumerate(committee.members[:2]):
        member.save(tmp_path / f"{k}.fxp")
    again = fxpass.optimize([fxpass.load(tmp_path / f"{k}.fxp") for k in range(2)], verify=False)
    assert again.report.agreement is None
    expected = committee(batch())["forces_comm"][:2]
    torch.testing.assert_close(again(batch())["forces_comm"], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"cutoff": 4.5}, "agree in cutoff; member 0 has 5.0, member 1 has 4.5"),
        ({"numbers": [29, 47, 78]}, "agree in species; member 0 has [29, 47, 79], member 1 has [29, 47, 78]"),
        ({"dtype": "float32"}, "agree in dtype; member 0 has float64, member 1 has float32"),
        ({"heads": ["a", "b"]}, "agree in heads; member 0 has None, member 1 has ['a', 'b']"),
    ],
)
def test_members_that_do_not_agree(members: list[Optimized], other: dict[str, Any], said: str) -> None:
    one = members[1]
    facts = {**one.facts, **other}
    foreign = Optimized(one.interface, one.program, one.report, one.frontend, one.target, facts, None)
    with pytest.raises(UsageError, match=re.escape(said)):
        fxpass.optimize([members[0], foreign])


def test_no_members_and_a_dump_are_refused(members: list[Optimized], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a committee needs members"):
        fxpass.optimize([])
    with pytest.raises(UsageError, match="dump= takes one model"):
        fxpass.optimize(members, dump=tmp_path / "dump")


def test_a_committee_of_one(members: list[Optimized]) -> None:
    alone = fxpass.optimize(members[:1])
    found = alone(batch())
    assert torch.equal(found["forces"], members[0](batch())["forces"])
    assert not found["energy_var"].any()


# --- MACE and ASE


@pytest.fixture(scope="module")
def mace_models() -> list[nn.Module]:
    import mace_models

    return [mace_models.build(hidden="4x0e", l_max=1, correlation=1, layers=1, seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def mace_committee(mace_models: list[nn.Module]) -> Committee:
    return fxpass.optimize(mace_models, PASSES, verify=False)


@pytest.mark.mace
def test_the_calculator_is_that_of_mace(mace_models: list[nn.Module], mace_committee: Committee) -> None:
    from mace.calculators import MACECalculator

    (probe,) = (p for p in probe_structures((6, 8, 14), 4.5) if p.name == "alloy")
    ours, theirs = probe.to_ase(), probe.to_ase()
    ours.calc = mace_committee.calculator()
    theirs.calc = MACECalculator(models=mace_models, device="cpu", default_dtype="float64")
    assert ours.get_potential_energy() == pytest.approx(theirs.get_potential_energy(), abs=1e-9)
    np.testing.assert_allclose(ours.get_forces(), theirs.get_forces(), rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.get_stress(), theirs.get_stress(), rtol=0, atol=1e-10)
    for name in ("energy_comm", "energy_var", "forces_comm", "forces_var", "stress_comm", "stress_var"):
        expected = theirs.calc.results[name]
        assert np.shape(ours.calc.results[name]) == np.shape(expected), name
        np.testing.assert_allclose(ours.calc.results[name], expected, rtol=0, atol=1e-9, err_msg=name)
    assert set(ours.calc.results) <= set(ours.calc.implemented_properties)


@pytest.mark.mace
def test_a_mace_committee_has_all_that_mace_returns(mace_committee: Committee) -> None:
    from fxpass.frontends.mace import mace_batch

    probes = [p for p in probe_structures((6, 8, 14), 4.5) if all(p.pbc)]
    data = mace_batch(probes, (6, 8, 14), 4.5, ["Default"], F64)
    flags = {"compute_stress": True, "compute_edge_forces": True, "compute_atomic_stresses": True}
    found = mace_committee(data, **flags)
    alone = [member(data, **flags) for member in mace_committee.members]
    for name in alone[0]:
        values = [result[name] for result in alone]
        if name == "node_feats":
            assert found[name] is None  # features of different networks have no mean
        elif values[0] is None:
            assert found[name] is None and f"{name}_comm" not in found
        else:
            torch.testing.assert_close(found[name], torch.stack(values).mean(0), rtol=0, atol=1e-10, msg=name)
    assert found["forces_comm"].shape == (2, *found["forces"].shape)


@pytest.mark.mace
def test_members_of_different_families(members: list[Optimized], mace_committee: Committee) -> None:
    with pytest.raises(UsageError, match="agree in family; member 0 has equivariant, member 1 has mace"):
        join([members[0], mace_committee.members[0]])


def test_structures_without_a_cell_have_no_stress(committee: Committee) -> None:
    mean, spread = committee.evaluate(PROBES["cluster"])
    assert mean.stress is None and "stress_comm" not in spread
    assert spread["energy_comm"].shape == (3,)
    assert mean.energy == pytest.approx(spread["energy_comm"].mean(), abs=1e-12)
    assert spread["energy_var"] == pytest.approx(spread["energy_comm"].var(), rel=1e-9)
    atom = Structure(np.array([29]), np.zeros((1, 3)), np.zeros((3, 3)), (False,) * 3)
    assert committee.evaluate(atom)[1]["forces_comm"].shape == (3, 1, 3)
