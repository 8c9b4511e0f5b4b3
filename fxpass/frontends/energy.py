"""Energy functions in plain PyTorch: classical force fields, and potentials of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._torch_compat import load_pickle, pickle_names
from ..capture.capture import capture, copy_model, prepare
from ..errors import StructureError, UnsupportedModelError
from ..ir.program import Program, TensorSpec
from ..models import collate, one_hot_species
from ..passes import Exactness
from ..structures import COINCIDENT, Evaluation, Evaluator, Neighbours, Structure, neighbour_list, probes_of
from ..verify.physics import SYMMETRIES, force_error, largest, stress_error, symmetry_error
from ..verify.tolerances import tolerance
from .base import converted, dtype_of
from .energy_interface import (
    INPUTS,
    MOVING,
    UNREADABLE,
    EnergyInterface,
    Potential,
    argument_names,
    atoms_of,
    called,
    check_attributes,
    energies,
    refused,
)

#: how much of something is wrong on a structure, 1 where it is told, and in words
Check = Callable[[Evaluator, Structure], tuple[float, str]]
#: times the table's row: further than rounding goes in any function of float64, and finite differences across the
#: knots of splines
MOVED = 1e3
#: what user code raises on a structure that it is not for
FAILURES = (*UNREADABLE, AssertionError)
ONLY_SOME = "self.examples = (structure,), where it is not for any structure of its elements"


class EnergyFrontend:
    """Frontend for :class:`Potential`, and for energy functions that are not wrapped in one yet.

    ``docs/families/energy_functions.md`` says what an energy function is.
    """

    name = "energy-function"
    extra = ""
    tested = ()

    def recognises(self, model: nn.Module) -> bool:
        return isinstance(model, Potential) or _is_energy(model)

    def reads(self, path: str) -> bool:
        attributes = (f"X{chr(len(name))}\0\0\0{name}" for name in ("numbers", "cutoff"))  # as a pickle has a string
        return pickle_names(path, f"c{Potential.__module__}\n") or all(pickle_names(path, n) for n in attributes)

    def load(self, path: str) -> nn.Module:
        model = load_pickle(path)
        if not isinstance(model, nn.Module) or not self.recognises(model):
            raise UnsupportedModelError(
                f"{path} holds a {type(model).__name__}, not an energy function",
                hint="torch.save of a Potential, whose energy function is of a class that can be imported",
            )
        return _potential(model)

    def check(self, model: Any) -> None:
        energy = _energy(model)
        check_attributes(energy)
        atoms, own = atoms_of(energy), _structures(model)
        if atoms and {len(s["numbers"]) for s in own} != {atoms}:
            what = f"it is for {atoms} atoms and names no example of that size"
            raise refused(what, energy, "self.examples = (structure,)")
        exact = _exact(model)
        _check_sums(exact, _per(exact))
        takes_places = "positions" in exact.arguments  # edges do not tell where they are
        change, where = _worst(partial(_broken, "translation"), exact) if takes_places else ("", "")
        if change and not _is_external(energy):
            hint = "positions by their differences alone; self.external_field = True, where it stands in a field"
            raise refused(f"when all atoms of {where} move together, {change}", energy, hint)

    def reference(self, model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
        return _potential(copy_model(model)).eval(), _caveats(model)

    def capture(self, model: Any) -> Program:
        dtype, facts = dtype_of(model), self.attributes(model)
        species, atoms = len(facts["numbers"]), facts.get("atoms", "atoms")
        moved = {name: frozenset({"differentiated"}) for name in facts["arguments"]}
        inputs = (
            TensorSpec("edge_vectors", ("edges", 3), dtype, "1x1o", "Angstrom", frozenset({"edge_vector"})),
            TensorSpec("edge_index", (2, "edges"), torch.int64, None, "", frozenset({"index:atoms"})),
            TensorSpec("node_attrs", (atoms, species), dtype, f"{species}x0e", "", frozenset({"one_hot"})),
            TensorSpec("batch", (atoms,), torch.int64, None, "", frozenset({"index:graphs"})),
            TensorSpec("cell", ("graphs", 3, 3), dtype, None, "Angstrom", moved.get("cell", frozenset())),
            TensorSpec("positions", (atoms, 3), dtype, None, "Angstrom", moved.get("positions", frozenset())),
        )
        names = ("energy", "node_energy") if facts["per"] == "atom" else ("energy",)
        outputs = tuple(TensorSpec(name, (), dtype, None, "eV") for name in names)
        replica: Any = prepare(model)

        def run(*values: Tensor) -> list[Tensor]:
            given = dict(zip(INPUTS, values, strict=True))
            value = called(_energy(replica), facts["arguments"], given)
            return energies(value, facts["per"], given["batch"], given["cell"].shape[0])

        start = _largest(facts)

        def example(seed: int) -> Sequence[Tensor]:
            shifted = np.random.default_rng(seed).normal(scale=0.02, size=start.positions.shape)
            return _inputs(model, replace(start, positions=start.positions + shifted))

        return capture(run, replica, inputs, outputs, example=example)

    def attributes(self, model: Any) -> dict[str, Any]:
        potential = _potential(model)
        facts: dict[str, Any] = {
            "cutoff": potential.cutoff,
            "numbers": potential.numbers,
            "dtype": str(dtype_of(model)).removeprefix("torch."),
            "arguments": potential.arguments,
            "per": _per(_exact(model)),
        }
        if own := _structures(model):
            facts["structures"] = own
        if atoms := atoms_of(_energy(model)):
            facts["atoms"] = atoms
        return facts

    def interface(self, energy: nn.Module, forces: nn.Module, attributes: Mapping[str, Any]) -> nn.Module:
        return EnergyInterface(energy, forces, attributes)

    def evaluate(self, model: Any, structure: Structure, neighbours: Neighbours = neighbour_list) -> Evaluation:
        potential = _potential(model) if _is_energy(model) else model
        dtype, periodic = dtype_of(potential), all(structure.pbc)
        data = batch_of([structure], potential, dtype, neighbours)
        result = {k: v.detach() for k, v in potential(data, compute_stress=periodic).items()}
        return Evaluation(
            energy=float(result["energy"][0]),
            forces=result["forces"].double().numpy(),
            stress=result["stress"][0].double().numpy() if periodic else None,
            dtype=str(dtype).removeprefix("torch."),
        )


def batch_of(
    structures: Sequence[Structure],
    potential: Any,
    dtype: torch.dtype | None = None,
    neighbours: Neighbours = neighbour_list,
) -> dict[str, Tensor]:
    """The input of a :class:`Potential`, or of its drop-in, for a batch of structures.

    Args:
        structures: one or more; cell vectors that are not periodic become zero.
        potential: whose ``numbers``, ``cutoff`` and ``arguments`` say what it needs; edges are left out where it takes
            none.
        dtype: of positions, shifts and cells; that of the potential if None.
        neighbours: what makes the neighbour lists.

    Raises:
        StructureError: a structure makes no sense or holds another species.
    """
    within = [replace(s, cell=s.cell * np.array(s.pbc)[:, None]) for s in structures]
    takes_edges = bool({"edge_vectors", "edge_index"} & set(potential.arguments))
    dtype = dtype_of(potential) if dtype is None else dtype
    listed = neighbours if takes_edges else _only_coincident(neighbours)
    return collate(within, potential.numbers, potential.cutoff, dtype, listed)


def _only_coincident(neighbours: Neighbours) -> Neighbours:
    """No edges, but pairs of atoms at one place where a structure is checked for them."""

    def none(structure: Structure, cutoff: float) -> tuple[Any, Any]:
        return neighbours(structure, min(cutoff, COINCIDENT))

    return none


def _is_energy(model: Any) -> bool:
    """Whether a module says which elements it knows, and its ``forward`` takes what an energy function takes."""
    if not hasattr(model, "numbers") or isinstance(model, (torch.jit.ScriptModule, Potential, EnergyInterface)):
        return False
    return not MOVING.isdisjoint(argument_names(model))


def _energy(model: Any) -> Any:
    return model.energy if isinstance(model, Potential) else model


def _potential(model: Any) -> Any:
    return model if isinstance(model, Potential) else Potential(model)


def _is_external(energy: Any) -> bool:
    """Whether the function says that it stands in an external field, so that space is not the same everywhere."""
    return getattr(energy, "external_field", False) is True


def _exact(model: Any) -> Potential:
    """A copy of the potential in float64 and evaluation mode."""
    exact: Potential = _potential(converted(model, torch.float64)).eval()
    return exact


def _structures(model: Any) -> list[dict[str, Any]]:
    """The structures that the function names as ``examples``, as data."""
    energy, potential = _energy(model), _potential(model)
    given = getattr(energy, "examples", None)
    given = () if given is None else given
    made = []
    for k, item in enumerate(given if isinstance(given, (list, tuple)) else (given,)):
        if not (isinstance(item, Structure) or hasattr(item, "get_positions")):
            raise refused(f"its examples hold a {type(item).__name__}", energy, "Structures, or ASE atoms")
        structure = item if isinstance(item, Structure) else Structure.from_ase(item, f"example {k}")
        try:
            structure.check(potential.numbers)
        except StructureError as error:
            hint = error.hint or "examples that it can be evaluated on"
            raise refused(f"its examples make no sense: {error.what}", energy, hint) from error
        made.append(structure)
    return [
        {
            "name": s.name,
            "numbers": s.numbers.tolist(),
            "positions": s.positions.tolist(),
            "cell": s.cell.tolist(),
            "pbc": list(s.pbc),
        }
        for s in made
    ]


def _probes(potential: Any) -> tuple[Structure, ...]:
    """What the function is tried on."""
    return probes_of({"numbers": potential.numbers, "cutoff": potential.cutoff, "structures": _structures(potential)})


def _largest(facts: Mapping[str, Any]) -> Structure:
    """The probe structure with the most atoms: it tells energies of atoms from those of structures."""
    return max(probes_of(facts), key=len)


def _inputs(model: Any, *structures: Structure) -> list[Tensor]:
    """``INPUTS`` for a batch of structures."""
    potential = _potential(model)
    data = batch_of(structures, potential)
    index, positions = data["edge_index"], data["positions"]
    vectors = positions[index[1]] - positions[index[0]] + data["shifts"]
    attrs = one_hot_species(data["numbers"], torch.tensor(potential.numbers), positions.dtype)
    return [vectors, index, attrs, data["batch"], data["cell"], positions]


def _tried(potential: Any, *structures: Structure) -> Any:
    """What the function returns for a batch of structures."""
    inputs = dict(zip(INPUTS, _inputs(potential, *structures), strict=True))
    try:
        with torch.no_grad():
            return called(potential.energy, potential.arguments, inputs)
    except FAILURES as error:
        raise _failed(error, potential, structures) from error


def _failed(error: Exception, potential: Any, structures: Sequence[Structure]) -> UnsupportedModelError:
    named = ", ".join(f"{s.name} ({len(s)} atoms, periodic along {sum(s.pbc)} vectors)" for s in structures)
    text = " ".join(str(error).split())[:200]
    what = f"its forward raises {type(error).__name__} on {named}: {text}"
    hint = f"{ONLY_SOME}; in float64 nothing may keep another type: x.new_zeros(...), no .float()"
    return refused(what, potential.energy, hint)


def _per(model: Any) -> str:
    """What the function returns an energy for: each ``"atom"``, each ``"graph"``, or the ``"total"``."""
    potential = _potential(model)
    structure = max(_probes(potential), key=len)
    value = _tried(potential, structure)
    if isinstance(value, Tensor) and value.is_floating_point():
        kinds: dict[tuple[int, ...], str] = {(): "total", (1,): "graph", (len(structure),): "atom"}
        shape = tuple(value.shape)
        if found := kinds.get(shape[:-1] if len(shape) == 2 and shape[1] == 1 else shape):
            return found
        given = f"a tensor of shape {list(shape)}"
    else:
        given = f"a {type(value).__name__}"
    raise refused(
        f"for {len(structure)} atoms its forward returns {given}",
        potential.energy,
        "energies of atoms [atoms], of structures [graphs], or a single number",
    )


def _check_sums(potential: Potential, per: str) -> None:
    """Refuse a function that some probe has no energy in, or whose energies of a batch are not those of each alone."""
    energy, probes, alone = potential.energy, _probes(potential), []
    for probe in probes:
        batch = torch.zeros(len(probe), dtype=torch.int64)
        value = energies(_tried(potential, probe), per, batch, 1)[0]
        if not bool(torch.isfinite(value).all()):
            raise refused(f"its energy of {probe.name}, {len(probe)} atoms, is {value.tolist()}", energy, ONLY_SOME)
        alone.append(value)
    if per == "total" or atoms_of(energy):
        return
    if len(probes) == 1:  # another one, in another cell
        grown = replace(probes[0], positions=1.01 * probes[0].positions, cell=1.01 * probes[0].cell, name="its copy")
        probes = (*probes, grown)
        alone.append(energies(_tried(potential, grown), per, torch.zeros(len(grown), dtype=torch.int64), 1)[0])
    hint = "zeros(cell.shape[0]).index_add(0, batch, e) of energies e of atoms; or e.sum(), for one structure a call"
    value, expected = _tried(potential, *probes), torch.cat(alone)
    sizes = torch.tensor([len(probe) for probe in probes])
    if value.numel() != (int(sizes.sum()) if per == "atom" else len(probes)):
        what = f"for {len(probes)} structures its forward returns a tensor of shape {list(value.shape)}"
        raise refused(what, energy, hint)
    batch = torch.repeat_interleave(torch.arange(len(probes)), sizes)
    error = float((energies(value, per, batch, len(probes))[0] - expected).abs().max())
    if not error <= 1e-9 * (1 + float(expected.abs().max())):
        what = f"energies of {len(probes)} structures in one batch are {error:.2g} eV off those of each by itself"
        raise refused(what, energy, hint)


def _evaluator(potential: Potential) -> Evaluator:
    """Energy, forces and stress by a potential in float64."""

    def evaluate(structure: Structure) -> Evaluation:
        try:
            found = EnergyFrontend().evaluate(potential, structure)
        except FAILURES as error:
            raise _failed(error, potential, (structure,)) from error
        if not np.isfinite(found.forces).all():
            what = f"its forces on {structure.name}, {len(structure)} atoms, are not numbers"
            raise refused(what, potential.energy, "a norm, root or angle has no derivative at zero; or " + ONLY_SOME)
        return found

    return evaluate


def _broken(name: str, evaluate: Evaluator, structure: Structure) -> tuple[float, str]:
    """How far the function is from a symmetry, 1 where it can no longer be rounding, and what that does to it."""
    here = evaluate(structure)
    found = symmetry_error(name, evaluate, structure, here)
    bounds, stress = tolerance("float64", Exactness.REASSOCIATES).symmetry, here.stress
    scales = {"energy": abs(here.energy), "forces": largest(here.forces)}
    scales["stress"] = 0.0 if stress is None else largest(stress)
    share = max(error / (MOVED * bounds[quantity].limit(scales[quantity])) for quantity, error in found.items())
    told = f"its energy changes by {found['energy']:.2g} eV an atom and its forces by {found['forces']:.2g} eV/A"
    return share, told if stress is None else f"{told}, its stress by {found['stress']:.2g} eV/A^3"


def _worst(check: Check, potential: Potential) -> tuple[str, str]:
    """What ``check`` says of the probe on which it finds most, and its name; nothing where it finds nothing."""
    evaluate = _evaluator(potential)
    found = [(*check(evaluate, probe), probe.name) for probe in _probes(potential)]
    share, told, name = max(found, key=lambda each: each[0])
    return (told, name) if share > 1 else ("", "")


def _caveats(model: Any) -> tuple[str, ...]:
    """What a receipt would let pass because the original does the same: broken symmetry, and wrong derivatives."""
    exact, told = _exact(model), []
    bounds = tolerance("float64", Exactness.REASSOCIATES)

    def forces(evaluate: Evaluator, structure: Structure) -> tuple[float, str]:
        here = evaluate(structure)
        error, _ = force_error(evaluate, structure, here)
        return error / (MOVED * bounds.gradient.limit(largest(here.forces))), f"its forces are {error:.2g} eV/A"

    def stress(evaluate: Evaluator, structure: Structure) -> tuple[float, str]:
        here = evaluate(structure)
        if here.stress is None:
            return 0.0, ""
        error, _ = stress_error(evaluate, structure, here)
        return error / (MOVED * bounds.strain.limit(largest(here.stress))), f"its stress is {error:.2g} eV/A^3"

    for name in SYMMETRIES:
        if name == "permutation" and _structures(model):
            continue  # it may be bound to these atoms in this order
        change, where = _worst(partial(_broken, name), exact)
        if change:
            told.append(f"the energy function is not the same after {name} of {where}: {change}")
    for check in (forces, stress):
        off, where = _worst(check, exact)
        if off:
            told.append(f"{off} off the derivative of its energy, on {where}")
    return (*told, *_mode(exact, _exact(model).train()))


def _mode(evaluated: Potential, trained: Potential) -> list[str]:
    """Whether the function computes something else in training mode, in words."""
    probe = max(_probes(evaluated), key=len)
    with torch.random.fork_rng(devices=[]):
        change = float((_tried(trained, probe) - _tried(evaluated, probe)).abs().max())
    if change == 0:
        return []
    return [f"in training mode its energies of {probe.name} differ by {change:.2g} eV; this is evaluation mode"]
