"""The ASE calculator of an optimised model; ASE is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError
from ..structures import Evaluation, Neighbours, Structure, VerletList

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator


def calculator(
    evaluate: Callable[[Structure, Neighbours], Evaluation],
    cutoff: float,
    *,
    head: str | None = None,
    skin: float = 0.5,
) -> Calculator:
    """An ASE calculator: energy, free_energy, forces, and stress for fully periodic cells.

    Args:
        evaluate: what computes a structure, with what makes its neighbour list.
        cutoff: of the model, Angstrom.
        head: the head to evaluate, of a multi-head model.
        skin: of the neighbour list, Angstrom, which the calculator has as ``neighbours``.

    Raises:
        MissingExtraError: ASE is not installed.
        UsageError: a skin that is no length.
    """
    try:
        from ase.calculators.calculator import Calculator, all_changes
        from ase.stress import full_3x3_to_voigt_6_stress
    except ModuleNotFoundError as error:
        raise MissingExtraError("ASE is not installed", hint='pip install "fxpass[ase]"') from error

    class FxpassCalculator(Calculator):
        implemented_properties = ["energy", "free_energy", "forces", "stress"]  # noqa: RUF012  as ASE declares it

        def __init__(self) -> None:
            super().__init__()
            self.neighbours = VerletList(cutoff, skin)

        def calculate(self, atoms: Any = None, properties: Any = None, system_changes: Any = all_changes) -> None:
            super().calculate(atoms, properties, system_changes)
            structure = Structure.from_ase(self.atoms)  # type: ignore[arg-type]
            if head is not None:
                structure = replace(structure, head=head)
            found = evaluate(structure, self.neighbours)
            self.results = {"energy": found.energy, "free_energy": found.energy, "forces": found.forces}
            if found.stress is not None:
                self.results["stress"] = full_3x3_to_voigt_6_stress(found.stress)

    return FxpassCalculator()
