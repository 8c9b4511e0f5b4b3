"""Small potentials of several families in plain torch, whose functions of one number per edge are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from fxpass.capture.capture import capture
from fxpass.ir.program import Program, TensorSpec

CUTOFF = 4.0
SPECIES = 3


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def envelope(r: Tensor) -> Tensor:
    """MACE's polynomial cutoff with p = 5: 1 at 0, and 0 with two derivatives at the cutoff and beyond."""
    x = r / CUTOFF
    return (1 - 21 * x**5 + 35 * x**6 - 15 * x**7) * (r < CUTOFF)


class Potential(nn.Module):
    """energy(edge vectors [edges, 3], edge index [2, edges], one-hot species [atoms, species], batch [atoms])."""

    def messages(self, vectors: Tensor, index: Tensor, species: Tensor) -> Tensor:
        """[edges, features]."""
        raise NotImplementedError

    def forward(self, vectors: Tensor, index: Tensor, species: Tensor, batch: Tensor) -> list[Tensor]:
        messages = self.messages(vectors, index, species)
        features = messages.new_zeros(species.shape[0], messages.shape[1]).index_add(0, index[1], messages)
        atoms = torch.tanh(features).square().sum(1) + 0.1 * features.sum(1)
        # one graph: its only number is read by no size
        return [atoms.new_zeros(1).index_add(0, batch, atoms)]


class Bessel(Potential):
    """NequIP's: Bessel functions times envelope, network, filter times directions."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.register_buffer("k", torch.arange(1, 5) * math.pi / CUTOFF)
        self.net = nn.Sequential(nn.Linear(4, 16, bias=False), nn.SiLU(), nn.Linear(16, channels, bias=False))

    def radial(self, r: Tensor) -> Tensor:
        return self.net(torch.sin(self.k * r) / r * envelope(r))

    def messages(self, vectors: Tensor, index: Tensor, species: Tensor) -> Tensor:
        r = vectors.norm(dim=-1, keepdim=True)
        weight = self.radial(r)
        return torch.cat([weight, weight * (vectors / r)[:, :1]], 1)


class Schnet(Potential):
    """SchNet's: Gaussian smearing, dense layers with shifted softplus, cosine cutoff."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centres", torch.linspace(0, CUTOFF, 10))
        self.first, self.second = nn.Linear(10, 12), nn.Linear(12, 8)
        self.embedding = nn.Linear(SPECIES, 8, bias=False)

    def messages(self, vectors: Tensor, index: Tensor, species: Tensor) -> Tensor:
        r = vectors.square().sum(-1).sqrt()
        smeared = torch.exp(-2.0 * (r.unsqueeze(-1) - self.centres) ** 2)
        hidden = nn.functional.softplus(self.first(smeared)) - math.log(2.0)
        cutoff = 0.5 * (torch.cos(r * math.pi / CUTOFF) + 1.0) * (r < CUTOFF)
        filters = self.second(hidden) * cutoff.unsqueeze(-1)
        return filters * self.embedding(species).index_select(0, index[0])


class Deepmd(Potential):
    """DeePMD's se_e2_a: s = switch(r) / r, one embedding net for each pair of types, rows s (1, r/|r|)."""

    def __init__(self, channels: int = 5) -> None:
        super().__init__()
        self.nets = nn.ModuleList(mlp(1, 10, channels) for _ in range(SPECIES**2))

    def switched(self, r: Tensor) -> Tensor:
        u = ((r - 1.0) / (CUTOFF - 1.0)).clamp(0.0, 1.0)
        return (u**3 * (-6 * u**2 + 15 * u - 10) + 1) / r

    def embedding(self, s: Tensor, sender: Tensor, receiver: Tensor) -> Tensor:
        total = torch.zeros_like(s)
        for pair, net in enumerate(self.nets):
            chosen = (sender == pair // SPECIES) & (receiver == pair % SPECIES)
            total = total + net(s) * chosen.unsqueeze(1)
        return total

    def messages(self, vectors: Tensor, index: Tensor, species: Tensor) -> Tensor:
        r = vectors.norm(dim=-1, keepdim=True)
        s = self.switched(r)
        types = species.argmax(1)
        rows = self.embedding(s, types.index_select(0, index[0]), types.index_select(0, index[1]))
        return torch.cat([s * rows, rows * (s / r * vectors)[:, :1]], 1)


class Pairs(Potential):
    """A pair function that a subclass or a test gives, on its own: function(r [edges, 1]) -> [edges, channels]."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def messages(self, vectors: Tensor, index: Tensor, species: Tensor) -> Tensor:
        return self.function(vectors.norm(dim=-1, keepdim=True))


def program(model: Potential, dtype: torch.dtype = torch.float64, samples: int = 2, seed: int = 0) -> Program:
    """The captured energy program of a model with random weights, with random samples."""
    random = torch.get_rng_state()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    torch.set_rng_state(random)
    model = model.to(dtype)
    inputs = (
        TensorSpec("edge_vectors", ("edges", 3), dtype, "1x1o", "Angstrom", frozenset({"edge_vector"})),
        TensorSpec("edge_index", (2, "edges"), torch.int64, None, "", frozenset({"index:atoms"})),
        TensorSpec("species", ("atoms", SPECIES), dtype, f"{SPECIES}x0e", "", frozenset({"one_hot"})),
        TensorSpec("batch", ("atoms",), torch.int64, None, "", frozenset({"index:1"})),
    )
    outputs = (TensorSpec("energy", (), dtype, None, "eV"),)
    captured = capture(lambda *given: model(*given), model, inputs, outputs)
    names = [spec.name for spec in inputs]
    made = tuple(dict(zip(names, cluster(dtype, 8, k), strict=True)) for k in range(samples))
    return replace(captured, samples=made)


def cluster(dtype: torch.dtype, atoms: int, seed: int, spread: float = 2.5) -> tuple[Tensor, ...]:
    """Inputs: ``atoms`` atoms at least 1 Angstrom apart in a cube of ``2 spread``, every pair an edge."""
    generator = torch.Generator().manual_seed(seed)
    placed: list[Tensor] = []
    while len(placed) < atoms:
        position = (torch.rand(3, dtype=torch.float64, generator=generator) * 2 - 1) * spread
        if all(float((position - other).norm()) > 1.0 for other in placed):
            placed.append(position)
    positions = torch.stack(placed)
    pairs = [(i, j) for i in range(atoms) for j in range(atoms) if i != j]
    index = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).t().contiguous()
    vectors = positions[index[1]] - positions[index[0]]
    species = torch.randint(0, SPECIES, (atoms,), generator=generator)
    hot = nn.functional.one_hot(species, SPECIES).to(dtype)
    return vectors.to(dtype), index, hot, torch.zeros(atoms, dtype=torch.int64)
