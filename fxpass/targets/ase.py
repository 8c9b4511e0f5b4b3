"""The ASE calculator of an optimised model; ASE is imported when it is asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError
from ..structures import Evaluator, Structure

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator



def calculator(evaluate: Evaluator, *, head: str | None = None) -> Calculator:
    """An ASE calculator: energy, free_energy, forces, and stress for fully periodic cells.

    Args:
        evaluate: what computes a structure.
        head: the head to evaluate, of a multi-head model.

    Raises:
        MissingExtraError: ASE is not installed.
    """
    try:
        from ase.calculators.calculator import Calculator, all_changes
        from ase.stress import full_3x3_to_voigt_6_stress
    except ModuleNotFoundError as error:
        raise MissingExtraError("ASE is not installed", hint='pip install "fxpass[ase]"') from error

    class FxpassCalculator(Calculator):
        implemented_properties = ["energy", "free_energy", "forces", "stress"]  # noqa: RUF012  as ASE declares it

        def calculate(self, atoms: Any = None, properties: Any = None, system_changes: Any = all_changes) -> None:
            super().calculate(atoms, properties, system_changes)
            structure = Structure.from_ase(self.atoms)  # type: ignore[arg-type]
            if head is not None:
                structure = replace(structure, head=head)
            found = evaluate(structure)
            self.results = {"energy": found.energy, "free_energy": found.energy, "forces": found.forces}
            if found.stress is not None:
                self.results["stress"] = full_3x3_to_voigt_6_stress(found.stress)

    return FxpassCalculator()
