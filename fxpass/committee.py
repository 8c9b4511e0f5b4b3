"""Committees: several models of one family evaluated as one, on one geometry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from .errors import UsageError, VerificationError
from .ir.merge import merge
from .ir.program import Program
from .ir.verifier import verify as verify_program
from .lowering import legal
from .optimized import Optimized
from .passes import Exactness
from .pipeline import resolve
from .registry import default_registry
from .report import PassRecord, Report
from .runner import run
from .structures import Evaluation, Neighbours, Structure, neighbour_list, probes_of
from .targets.ase import calculator
from .targets.geometry import lower_both
from .verify.physics import deviation, largest
from .verify.receipt import Receipt, Row
from .verify.tolerances import tolerance

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator

#: what members must have in common: as facts name it, and in words
COMMON = {"numbers": "species", "cutoff": "cutoff", "heads": "heads", "dtype": "dtype", "per": "what energies are of"}
SHARING = "common-subexpressions,dead-code"
SPREAD = ("energy_comm", "energy_var", "forces_comm", "forces_var", "stress_comm", "stress_var")


@dataclass(frozen=True)
class CommitteeReport:
    """What was done to a committee.

    Attributes:
        members: the report of each member, with its receipt against its own original in float64.
        target: name of the target that the merged program was lowered to.
        records: what passes did to the merged program, the sharing first.
        agreement: how far energy, forces and stress of each member, as the committee computes them, are from what
            the member computes on its own; None where verification was turned off.
    """

    members: tuple[Report, ...]
    target: str
    records: tuple[PassRecord, ...]
    agreement: Receipt | None

    def to_json(self) -> dict[str, Any]:
        """The report as JSON has it: objects, lists, strings and numbers."""
        return {
            "members": [report.to_json() for report in self.members],
            "target": self.target,
            "passes": [asdict(record) for record in self.records],
            "agreement": None if self.agreement is None else self.agreement.to_json(),
        }


class Committee(nn.Module):
    """Several optimised models in one: call it as one of them, with the same arguments.

    The result is the family's own dictionary with means over the members.  Beside each entry ``name`` stand
    ``name_comm`` [members, ...], the members' own values, and ``name_var``, their population variance (in the
    square of the unit).  Entries without a unit, which are features of one member or another, have no mean: None.

    Attributes:
        members: the models, each to be used by itself too.
        program: the merged program, in which members share what they have in common.
        report: the report and receipt of each member, and how well the committee agrees with its members.

    Other attributes are the first member's, so code that reads ``model.r_max`` goes on working.
    """

    def __init__(
        self, members: Sequence[Optimized], program: Program, runs: tuple[nn.Module, nn.Module], report: CommitteeReport
    ) -> None:
        super().__init__()
        self.members = tuple(members)
        self.program = program
        self.report = report
        self.frontend = members[0].frontend
        self.merged = _Merged(*runs)
        self.features = {spec.name for member in members for spec in member.program.outputs if not spec.unit}
        self.interfaces = nn.ModuleList()
        ends = 0
        slopes = len(program.differentiated)
        values = sum(len(member.program.outputs) - slopes for member in members)
        for k, member in enumerate(members):
            own: Any = member.interface
            rows = tuple(range(ends, ends + len(member.program.outputs) - slopes))
            ends += len(rows)
            energy = _Member(self.merged, rows, own.energy_program, derive=False)
            gradients = range(values + k * slopes, values + (k + 1) * slopes)
            forces = _Member(self.merged, (*rows, *gradients), own.forces_program, derive=True)
            facts = {**member.facts, "assumptions": list(program.assumptions)}
            self.interfaces.append(self.frontend.interface(energy, forces, facts))
        self.eval()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("interfaces")[0], name)  # type: ignore[index]

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor | None]:
        """Evaluate a batch; arguments, shapes and units are those of a member."""
        try:
            results = [interface(*args, **kwargs) for interface in self.interfaces]
        finally:
            self.merged.forget()
        found: dict[str, Tensor | None] = {}
        for name in results[0]:
            found |= self._together(name, [result.get(name) for result in results])
        return found

    def _together(self, name: str, values: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
        tensors = [value for value in values if value is not None]
        if len(tensors) < len(values) or len({value.shape for value in tensors}) > 1:
            return {name: None}  # nobody was asked for it, or members differ in what it is
        together = torch.stack(tensors)
        mean = None if name in self.features else together.mean(0)
        return {name: mean, f"{name}_comm": together, f"{name}_var": together.var(0, unbiased=False)}

    def evaluate(
        self, structure: Structure, neighbours: Neighbours = neighbour_list
    ) -> tuple[Evaluation, dict[str, Any]]:
        """A structure's mean energy, forces and stress, and what the members say.

        Args:
            structure: what to evaluate.
            neighbours: what makes the neighbour list.

        Returns:
            The means, and as numpy arrays in float64 ``energy_comm`` [members] and ``energy_var``; ``forces_comm``
            [members, n, 3] and ``forces_var`` [n, 3]; where there is a stress ``stress_comm`` [members, 3, 3] and
            ``stress_var`` [3, 3].  Units are eV, eV/Angstrom, eV/Angstrom^3 and their squares.
        """
        results: list[dict[str, Any]] = []
        hook = self.register_forward_hook(lambda _module, _args, result: results.append(result))
        try:
            mean = self.frontend.evaluate(self, structure, neighbours)
        finally:
            hook.remove()
        spread: dict[str, Any] = {}
        for name in SPREAD:
            value = results[0].get(name)
            if value is not None and (mean.stress is not None or "stress" not in name):
                array = value.detach().double().numpy()
                per_graph = "forces" not in name  # of the one graph that a structure is
                spread[name] = array[:, 0] if per_graph and "comm" in name else array[0] if per_graph else array
        return mean, spread

    def calculator(self, *, head: str | None = None, skin: float = 0.5) -> Calculator:
        """An ASE calculator of the means, whose results also hold what :meth:`evaluate` says of the members.

        The names are those that MACE's calculator has for committees.

        Args:
            head: the head to evaluate, of a multi-head model.
            skin: Angstrom; as for :meth:`Optimized.calculator`.

        Raises:
            MissingExtraError: ASE is not installed.
            UsageError: a skin that is no length.
        """
        spread: dict[str, Any] = {}

        def mean(structure: Structure, neighbours: Neighbours) -> Evaluation:
            found, members = self.evaluate(structure, neighbours)
            spread.clear()
            spread.update(members)
            return found

        plain = calculator(mean, self.members[0].facts["cutoff"], head=head, skin=skin)

        class CommitteeCalculator(type(plain)):  # type: ignore[misc]
            implemented_properties = [*plain.implemented_properties, *SPREAD]  # noqa: RUF012  as ASE declares it

            def calculate(self, *args: Any, **kwargs: Any) -> None:
                super().calculate(*args, **kwargs)
                self.results |= spread

        return CommitteeCalculator()

    def save(self, path: str | Path, *, overwrite: bool = False) -> NoReturn:
        """Refused: a file holds one model.

        Raises:
            UsageError: always; says how to save the members.
        """
        raise UsageError(
            f"a committee is not saved as one file, so {path} is not written",
            hint="committee.members[k].save(...), and fxpass.optimize([fxpass.load(...), ...]) to join them again",
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Committee:
        """Moves and casts: members of another dtype or device are other members."""
        own = next(s.dtype for s in self.program.inputs if s.dtype.is_floating_point)
        probe = fn(torch.zeros((), dtype=own))
        if probe.dtype != own or probe.device.type != "cpu":
            raise UsageError(
                f"this committee was made for {own} on the CPU and cannot become {probe.dtype} on {probe.device}",
                hint="optimise the members in that dtype",
            )
        return self


def join(members: Sequence[Optimized], target: str = "eager", *, verify: bool = True) -> Committee:
    """Merge optimised models into one committee.

    Args:
        members: models of one family that agree in species, cutoff, heads and dtype; architecture and weights are
            their own.
        target: how the merged program runs.
        verify: compare the committee with its members on the probe structures.

    Raises:
        UsageError: no members, or members that do not agree, by name.
        VerificationError: the committee says something else than its members by themselves.
    """
    _check_common(members)
    registry = default_registry()
    backend = registry.target(target)()
    with torch.inference_mode(False), torch.enable_grad():
        merged = merge([member.program for member in members])
        verify_program(merged)
        shared = run(merged, resolve(SHARING, registry), check=verify_program)
        fit = legal(shared.program, backend, registry)
        runs = lower_both(fit.program, backend, gradients=len(members) * len(merged.differentiated))
    records = (*shared.records, *fit.records)
    report = CommitteeReport(tuple(member.report for member in members), target, records, None)
    committee = Committee(members, shared.program, runs, report)
    if verify:
        agreement = _agreement(committee)
        if not agreement.passed:
            raise VerificationError(f"the committee does not agree with its members: {agreement.summary()}")
        committee.report = CommitteeReport(report.members, target, records, agreement)
    return committee


def _check_common(members: Sequence[Optimized]) -> None:
    if not members:
        raise UsageError("a committee needs members", hint="optimize([model, model, ...])")
    first = members[0]
    for k, member in enumerate(members):
        if member.program.stage != "forces":
            raise UsageError(f"member {k} of the committee is no potential", hint="optimise it by itself")
        pairs: list[tuple[str, Any, Any]] = [("family", first.frontend.name, member.frontend.name)]
        pairs += [(words, first.facts.get(fact), member.facts.get(fact)) for fact, words in COMMON.items()]
        for what, expected, found in pairs:
            if found != expected:
                raise UsageError(
                    f"members of a committee agree in {what}; member 0 has {expected}, member {k} has {found}",
                    hint=f"models of the same {what}",
                )


def _agreement(committee: Committee) -> Receipt:
    """Each member as the committee computes it against the member by itself, on the probe structures."""
    facts = committee.members[0].facts
    dtype, exactness = facts["dtype"], Exactness.REASSOCIATES
    bounds = tolerance(dtype, exactness).values
    rows = []
    for structure in probes_of(facts):
        _, spread = committee.evaluate(structure)
        for k, member in enumerate(committee.members):
            alone = committee.frontend.evaluate(member, structure)
            stress = spread["stress_comm"][k] if "stress_comm" in spread else None
            found = Evaluation(float(spread["energy_comm"][k]), spread["forces_comm"][k], stress)
            scales = {
                "energy": abs(alone.energy) / math.sqrt(len(structure)),
                "forces": largest(alone.forces),
                "stress": 0.0 if alone.stress is None else largest(alone.stress),
            }
            for quantity, error in deviation(found, alone).items():
                bound = bounds[quantity]
                place = f"{structure.name}, member {k}"
                rows.append(Row(quantity, place, error, bound.limit(scales[quantity]), bound.unit))
    return Receipt(tuple(rows), dtype, exactness)


class _Merged(nn.Module):
    """Runs the merged program once for all members, who ask with inputs of the same values, one after the other."""

    def __init__(self, energy: nn.Module, forces: nn.Module) -> None:
        super().__init__()
        self.energy = energy
        self.forces = forces
        self.last: tuple[bool, tuple[Tensor, ...], list[Tensor]] | None = None

    def forward(self, derive: bool, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        last = self.last  # read once: another thread may exchange it
        if last is None or last[0] != derive or not all(map(torch.equal, last[1], inputs)):
            values = self.forces(*inputs) if derive else self.energy(*inputs)
            self.last = last = (derive, inputs, values)
        return last[2]

    def forget(self) -> None:
        """Nothing is kept between calls of the committee, so inputs may be changed in place between them."""
        self.last = None


class _Member(nn.Module):
    """One member's lowered program: its rows of the merged results.

    While autograd records it is the member's own program, which knows how to be differentiated by itself.
    """

    def __init__(self, merged: _Merged, rows: tuple[int, ...], own: nn.Module, *, derive: bool) -> None:
        super().__init__()
        self.merged = merged
        self.rows = rows
        self.own = own
        self.derive = derive

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        if torch.is_grad_enabled():
            return self.own(*inputs)
        values = self.merged(self.derive, inputs)
        return [values[row] for row in self.rows]
