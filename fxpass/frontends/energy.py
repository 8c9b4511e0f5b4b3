"""Energy functions in plain PyTorch: classical force fields, and potentials of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._torch_compat import load_pickle, pickle_names
from ..capture.capture import capture, copy_model, prepare
from ..errors import Location, UnsupportedModelError
from ..ir.program import Program, TensorSpec
from ..models import collate, one_hot_species
from ..structures import COINCIDENT, Evaluation, Neighbours, Structure, neighbour_list, probes_of
from .base import dtype_of
from .energy_interface import ARGUMENTS, INPUTS, EnergyInterface, Potential, argument_names, called, energies

#: what an energy function must take one of: all else does not change when atoms move
MOVING = {"edge_vectors", "positions"}


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
        unknown = [name for name in argument_names(energy) if name not in ARGUMENTS]
        if unknown or MOVING.isdisjoint(argument_names(energy)):
            what = f"its forward takes {', '.join(unknown)}" if unknown else "its forward takes nothing that moves"
            raise _refused(what, energy, f"edge_vectors or positions, and others of {', '.join(ARGUMENTS)}")
        numbers = torch.as_tensor(energy.numbers)
        integers = numbers.dim() == 1 and len(numbers) and not numbers.is_floating_point()
        if not integers or len(set(numbers.tolist())) < len(numbers):
            raise _refused(f"its numbers are {energy.numbers}", energy, "atomic numbers, each once: (1, 8)")
        if not any(t.is_floating_point() for t in chain(energy.parameters(), energy.buffers())):
            raise _refused("nothing says which type it computes in", energy, "constants as parameters or buffers")
        cutoff = getattr(energy, "cutoff", None)
        if {"edge_vectors", "edge_index"} & set(argument_names(energy)) and cutoff is None:
            raise _refused("it takes edges and has no cutoff", energy, "self.cutoff = 6.0, in Angstrom")
        if cutoff is not None and not (np.isfinite(float(cutoff)) and float(cutoff) > 0):
            raise _refused(f"its cutoff is {cutoff}", energy, "a positive length, in Angstrom")
        atoms, own = getattr(energy, "atoms", None), _structures(model)
        if atoms is not None and {len(s["numbers"]) for s in own} != {int(atoms)}:
            what = f"it is for {atoms} atoms and names no example of that size"
            raise _refused(what, energy, "self.examples = (structure,)")
        _per(model)

    def reference(self, model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
        return _potential(copy_model(model)).eval(), ()

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
            "per": _per(model),
        }
        if own := _structures(model):
            facts["structures"] = own
        if (atoms := getattr(_energy(model), "atoms", None)) is not None:
            facts["atoms"] = int(atoms)
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


def _structures(model: Any) -> list[dict[str, Any]]:
    """The structures that the function names as ``examples``, as data."""
    given = getattr(_energy(model), "examples", ())
    made = (s if isinstance(s, Structure) else Structure.from_ase(s, f"example {k}") for k, s in enumerate(given))
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


def _largest(facts: Mapping[str, Any]) -> Structure:
    """The probe structure with the most atoms: it tells energies of atoms from those of structures."""
    return max(probes_of(facts), key=len)


def _inputs(model: Any, structure: Structure) -> list[Tensor]:
    """``INPUTS`` for one structure."""
    potential = _potential(model)
    data = batch_of([structure], potential)
    index, positions = data["edge_index"], data["positions"]
    vectors = positions[index[1]] - positions[index[0]] + data["shifts"]
    attrs = one_hot_species(data["numbers"], torch.tensor(potential.numbers), positions.dtype)
    return [vectors, index, attrs, data["batch"], data["cell"], positions]


def _per(model: Any) -> str:
    """What the function returns an energy for: each ``"atom"``, each ``"graph"``, or the ``"total"``."""
    potential = _potential(model)
    facts = {"numbers": potential.numbers, "cutoff": potential.cutoff, "structures": _structures(model)}
    structure = _largest(facts)
    with torch.no_grad():
        value = called(potential.energy, potential.arguments, dict(zip(INPUTS, _inputs(model, structure), strict=True)))
    if isinstance(value, Tensor) and value.is_floating_point():
        kinds: dict[tuple[int, ...], str] = {(): "total", (1,): "graph", (len(structure),): "atom"}
        shape = tuple(value.shape)
        if found := kinds.get(shape[:-1] if len(shape) == 2 and shape[1] == 1 else shape):
            return found
        given = f"a tensor of shape {list(shape)}"
    else:
        given = f"a {type(value).__name__}"
    raise _refused(
        f"for {len(structure)} atoms its forward returns {given}",
        potential.energy,
        "energies of atoms [atoms], of structures [graphs], or a single number",
    )


def _refused(what: str, energy: Any, hint: str) -> UnsupportedModelError:
    cls = type(energy)
    where = Location(module_path="(model)", source=f"{cls.__module__}.{cls.__qualname__}")
    return UnsupportedModelError(f"this energy function is not covered: {what}", where=where, hint=hint)
