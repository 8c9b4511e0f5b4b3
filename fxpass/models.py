"""The small potential that fxpass ships: an E(3)-equivariant message passing network of e3nn blocks.

It is what a user of e3nn writes, in the manner of NequIP (Batzner et al., Nat. Commun. 13, 2453 (2022)), and
small enough to compile and verify in seconds.  ``small_potential()`` gives it with weights trained on
effective-medium-theory energies and forces of Cu, Ag and Au (``examples/train_small_potential.py``): solid,
stable in molecular dynamics, good for trying things out and for nothing else.
"""

from __future__ import annotations

import json
import math
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import _torch_compat
from .errors import UnsupportedModelError, UsageError
from .structures import Neighbours, Structure, neighbour_list

WEIGHTS = Path(__file__).parent / "data" / "small_potential.npz"
FORMAT = "fxpass small potential 1"


@dataclass(frozen=True)
class Settings:
    """Everything that a ``SmallPotential`` is made from besides its weights.

    Attributes:
        numbers: atomic numbers that the model knows.
        atomic_energies: energy of each species on its own, eV.
        cutoff: Angstrom.
        features: irreps of the atoms' features, e3nn notation.
        max_degree: largest degree l of the spherical harmonics.
        layers: number of message passing layers.
        radial_functions: number of Bessel functions.
        radial_neurons: width of the hidden layer that maps them to weights of the tensor product.
        average_neighbours: sums over neighbours are divided by the square root of this.
    """

    numbers: tuple[int, ...]
    atomic_energies: tuple[float, ...]
    cutoff: float = 5.0
    features: str = "16x0e+8x1o"
    max_degree: int = 2
    layers: int = 2
    radial_functions: int = 8
    radial_neurons: int = 32
    average_neighbours: float = 40.0


class BesselBasis(nn.Module):
    """Radial functions sqrt(2/c) sin(n pi r/c) / r whose first three derivatives vanish at the cutoff.

    Gasteiger et al., ICLR 2020 (DimeNet), Eq. 7 and 8 with p = 6.
    """

    frequencies: Tensor

    def __init__(self, cutoff: float, functions: int) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.register_buffer("frequencies", torch.arange(1, functions + 1) * (math.pi / cutoff))

    def forward(self, lengths: Tensor) -> Tensor:
        """[edges, 1] in Angstrom -> [edges, functions]."""
        x = lengths / self.cutoff
        gap = (self.cutoff - lengths).clamp(min=0) / self.cutoff
        # 1 - 28 x^6 + 48 x^7 - 21 x^8 in factors: near the cutoff the sum would lose all its digits
        envelope = gap**3 * (1 + x * (3 + x * (6 + x * (10 + x * (15 + x * 21)))))
        return math.sqrt(2 / self.cutoff) * torch.sin(lengths * self.frequencies) / lengths * envelope


class Layer(nn.Module):
    """One round of messages: neighbours' features times spherical harmonics, weighted by distance, summed, gated."""

    def __init__(self, irreps_in: str, irreps_out: str, irreps_edge: str, species: int, settings: Settings) -> None:
        super().__init__()
        o3 = _torch_compat.o3()
        from e3nn.nn import FullyConnectedNet, Gate

        features, harmonics, out = o3.Irreps(irreps_in), o3.Irreps(irreps_edge), o3.Irreps(irreps_out)
        scalars = o3.Irreps([(mul, ir) for mul, ir in out if ir.l == 0])
        gated = o3.Irreps([(mul, ir) for mul, ir in out if ir.l > 0])
        gates = o3.Irreps([(mul, "0e") for mul, _ in gated])
        silu, tanh = nn.functional.silu, torch.tanh  # an odd scalar needs an odd function
        activations = [silu if ir.p == 1 else tanh for _, ir in scalars]
        self.gate = Gate(scalars, activations, gates, [torch.sigmoid] * len(gates), gated)

        messages: list[Any] = []
        paths: list[tuple[int, int, int, str, bool]] = []
        for i, (mul, ir) in enumerate(features):
            for j, (_, edge) in enumerate(harmonics):
                for product in ir * edge:
                    if product in self.gate.irreps_in:
                        paths.append((i, j, len(messages), "uvu", True))
                        messages.append((mul, product))
        self.linear_in = o3.Linear(features, features)
        self.product = o3.TensorProduct(
            features, harmonics, o3.Irreps(messages), paths, shared_weights=False, internal_weights=False
        )
        neurons = [settings.radial_functions, settings.radial_neurons, self.product.weight_numel]
        self.radial = FullyConnectedNet(neurons, silu)
        self.linear_out = o3.Linear(o3.Irreps(messages), self.gate.irreps_in)
        self.self_connection = o3.FullyConnectedTensorProduct(features, f"{species}x0e", self.gate.irreps_in)
        self.norm = settings.average_neighbours**-0.5

    def forward(
        self, features: Tensor, species: Tensor, edge_index: Tensor, harmonics: Tensor, basis: Tensor
    ) -> Tensor:
        """Features [atoms, irreps_in] and one-hot species [atoms, species] -> features [atoms, irreps_out]."""
        sender, receiver = edge_index[0], edge_index[1]
        messages = self.product(self.linear_in(features)[sender], harmonics, self.radial(basis))
        received = messages.new_zeros((features.shape[0], messages.shape[1])).index_add(0, receiver, messages)
        return self.gate(self.linear_out(received * self.norm) + self.self_connection(features, species))


class SmallPotential(nn.Module):
    """An E(3)-equivariant interatomic potential.

    Weights are random, in torch's default dtype, as usual for a module; see ``small_potential`` and ``load``.
    """

    atomic_numbers: Tensor
    atomic_energies: Tensor

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        o3 = _torch_compat.o3()
        species = len(settings.numbers)
        features = o3.Irreps(settings.features)
        scalars = "+".join(f"{mul}x0e" for mul, ir in features if ir.is_scalar())
        harmonics = o3.Irreps.spherical_harmonics(settings.max_degree)
        self.settings = settings
        self.cutoff = settings.cutoff
        self.register_buffer("atomic_numbers", torch.tensor(settings.numbers))
        self.register_buffer("atomic_energies", torch.tensor(settings.atomic_energies, dtype=torch.get_default_dtype()))
        self.basis = BesselBasis(settings.cutoff, settings.radial_functions)
        self.harmonics = o3.SphericalHarmonics(harmonics, normalize=True, normalization="component")
        self.embedding = o3.Linear(f"{species}x0e", scalars)
        self.layers = nn.ModuleList(
            Layer(inputs, settings.features, str(harmonics), species, settings)
            for inputs in [scalars] + [settings.features] * (settings.layers - 1)
        )
        self.readout = o3.Linear(features, "1x0e")

    def energies(
        self, edge_vectors: Tensor, edge_index: Tensor, species: Tensor, batch: Tensor, graphs: int
    ) -> tuple[Tensor, Tensor]:
        """Energy of every structure, [graphs], and of every atom, [atoms], in eV.

        Args:
            edge_vectors: [edges, 3], Angstrom.
            edge_index: [2, edges] (sender, receiver).
            species: one-hot, [atoms, species].
            batch: the structure of each atom, [atoms].
            graphs: number of structures.
        """
        harmonics = self.harmonics(edge_vectors)
        basis = self.basis(edge_vectors.norm(dim=-1, keepdim=True))
        features = self.embedding(species)
        for layer in self.layers:
            features = layer(features, species, edge_index, harmonics, basis)
        node_energy = self.readout(features).squeeze(-1) + species @ self.atomic_energies
        return node_energy.new_zeros(graphs).index_add(0, batch, node_energy), node_energy

    def forward(
        self,
        data: dict[str, Tensor],
        compute_forces: bool = True,
        compute_stress: bool = False,
        training: bool = False,
    ) -> dict[str, Tensor]:
        """Evaluate a batch of structures.

        Args:
            data: ``numbers`` [atoms]; ``positions`` [atoms, 3] and ``cell`` [graphs, 3, 3] in Angstrom;
                ``edge_index`` [2, edges] (sender, receiver); ``shifts`` [edges, 3] in Angstrom, such that
                ``positions[receiver] - positions[sender] + shift`` is the vector of an edge; ``batch``
                [atoms], the structure of each atom.  ``collate`` makes it.
            compute_forces: adds ``forces`` to the result.
            compute_stress: adds ``stress`` to the result.
            training: the result carries an autograd graph.

        Returns:
            ``energy`` [graphs] and ``node_energy`` [atoms] in eV; ``forces`` [atoms, 3] in eV/Angstrom;
            ``stress`` [graphs, 3, 3] in eV/Angstrom^3, dE/dstrain over the volume (not finite where a cell
            has no volume).

        Raises:
            ValueError: an atomic number that the model does not know.
        """
        positions, edge_index, batch, cell = data["positions"], data["edge_index"], data["batch"], data["cell"]
        species = one_hot_species(data["numbers"], self.atomic_numbers, positions.dtype)
        with torch.set_grad_enabled(training or compute_forces or compute_stress):
            displacement = torch.zeros_like(positions, requires_grad=True)
            strain = torch.zeros_like(cell, requires_grad=True)
            vectors = edge_vectors(positions + displacement, edge_index, data["shifts"])
            symmetric = 0.5 * (strain + strain.transpose(1, 2))[batch[edge_index[0]]]
            vectors = vectors + torch.bmm(vectors.unsqueeze(1), symmetric).squeeze(1)
            energy, node_energy = self.energies(vectors, edge_index, species, batch, cell.shape[0])
            result = {"energy": energy, "node_energy": node_energy}
            if compute_forces or compute_stress:
                gradients = torch.autograd.grad(energy.sum(), [displacement, strain], create_graph=training)
                if compute_forces:
                    result["forces"] = -gradients[0]
                if compute_stress:
                    result["stress"] = gradients[1] / torch.linalg.det(cell).abs().view(-1, 1, 1)
        return result if training else {name: value.detach() for name, value in result.items()}


def one_hot_species(numbers: Tensor, known: Tensor, dtype: torch.dtype) -> Tensor:
    """Atomic numbers [atoms] as one-hot rows [atoms, species] over the ``known`` ones.

    Raises:
        ValueError: an atomic number that is not among them.
    """
    matches = numbers.unsqueeze(1) == known.unsqueeze(0)
    if not bool(matches.any(dim=1).all()):
        raise ValueError("the structure holds an atomic number that the model does not know")
    return matches.to(dtype)


def edge_vectors(positions: Tensor, edge_index: Tensor, shifts: Tensor) -> Tensor:
    """Vectors from sender to receiver, [edges, 3], in the unit of the positions."""
    return positions.index_select(0, edge_index[1]) - positions.index_select(0, edge_index[0]) + shifts


def collate(
    structures: Sequence[Structure],
    numbers: Sequence[int],
    cutoff: float,
    dtype: torch.dtype = torch.float32,
    neighbours: Neighbours = neighbour_list,
) -> dict[str, Tensor]:
    """The input of ``SmallPotential`` for a batch of structures.

    Args:
        structures: one or more.
        numbers: atomic numbers that the model knows.
        cutoff: of the model, Angstrom.
        dtype: of positions, shifts and cells.
        neighbours: what makes the neighbour lists.

    Raises:
        StructureError: a structure makes no sense or holds another species.
    """
    edges, shifts = [], []
    first = 0
    for structure in structures:
        structure.check(numbers, neighbours)
        pairs, units = neighbours(structure, cutoff)
        edges.append(pairs + first)
        shifts.append(units @ structure.cell)
        first += len(structure)
    sizes = torch.tensor([len(structure) for structure in structures])
    return {
        "numbers": torch.from_numpy(np.concatenate([structure.numbers for structure in structures])),
        "positions": torch.from_numpy(np.concatenate([structure.positions for structure in structures])).to(dtype),
        "cell": torch.from_numpy(np.stack([structure.cell for structure in structures])).to(dtype),
        "edge_index": torch.from_numpy(np.concatenate(edges, axis=1)),
        "shifts": torch.from_numpy(np.concatenate(shifts)).to(dtype),
        "batch": torch.repeat_interleave(torch.arange(len(structures)), sizes),
    }


# Files: weights and settings as plain arrays, nothing that could run.


# What numpy, zlib, json, e3nn and torch raise on a file that was truncated or altered.
_DAMAGE = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, NotImplementedError, RuntimeError),
    *(SyntaxError, TypeError, ValueError, zipfile.BadZipFile, zlib.error),
)


def small_potential(dtype: torch.dtype = torch.float32) -> SmallPotential:
    """The trained potential for Cu, Ag and Au that fxpass ships; always the same weights, in any dtype."""
    return load(WEIGHTS, dtype)


def save(model: SmallPotential, path: str | Path) -> None:
    """Write settings and weights to a new ``.npz`` file.

    Raises:
        UsageError: the file exists or cannot be written.
    """
    arrays: dict[str, Any] = {name: value.detach().cpu().numpy() for name, value in model.named_parameters()}
    arrays |= {"format": FORMAT, "settings": json.dumps(asdict(model.settings))}
    try:
        with open(path, "xb") as file:
            np.savez_compressed(file, **arrays)
    except FileExistsError as error:
        raise UsageError(f"{path} exists and is left as it is", hint="another name, or remove it first") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}", hint="a folder that exists") from error


def load(path: str | Path, dtype: torch.dtype | None = None) -> SmallPotential:
    """Read a potential that ``save`` wrote, in the dtype it had unless told otherwise.  Runs nothing in the file.

    Raises:
        UsageError: there is no such file, or it cannot be opened.
        UnsupportedModelError: the file is damaged or something else.
    """
    try:
        with open(path, "rb") as file:
            if damaged := zipfile.ZipFile(file).testzip():  # numpy parses headers before it compares checksums
                raise ValueError(f"{damaged} was altered")
            file.seek(0)
            archive = np.load(file, allow_pickle=False)
            arrays = {name: archive[name] for name in archive.files}
        if str(arrays.pop("format")) != FORMAT:
            raise ValueError(f"it is not of the format {FORMAT!r}")
        stored: dict[str, Any] = json.loads(str(arrays.pop("settings")))
        for name in ("numbers", "atomic_energies"):  # JSON knows no tuples
            stored[name] = tuple(stored[name])
        model = build(Settings(**stored), dtype or torch.from_numpy(arrays["readout.weight"]).dtype)
        weights = dict(model.named_parameters())
        if arrays.keys() != weights.keys():
            raise ValueError(f"its weights do not fit: {', '.join(sorted(arrays.keys() ^ weights.keys()))}")
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(torch.from_numpy(arrays[name]))
    except OSError as error:
        raise UsageError(f"{path} cannot be opened: {error.strerror}", hint="the path of a model file") from error
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnsupportedModelError(
            f"{path} does not hold a small potential: {reason}",
            hint="a file written by fxpass.models.save",
        ) from error
    return model


def build(settings: Settings, dtype: torch.dtype = torch.float32, seed: int = 0) -> SmallPotential:
    """A potential with random weights, the same for the same seed; torch's random state stays as it is.

    It is made in float64, so that Clebsch-Gordan coefficients are as exact as ``dtype`` can hold.
    """
    with torch.random.fork_rng(devices=[]), _default_dtype(torch.float64), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The TorchScript type system")  # about e3nn 0.4.4, not about its users
        torch.manual_seed(seed)
        return SmallPotential(settings).to(dtype)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch's default dtype for as long as this is open: the only way to tell e3nn which one to use."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
