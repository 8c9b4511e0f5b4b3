"""Representations of schnetpack in semantic ops: SchNet, PaiNN and SO3net.

Each stand-in runs the representation's own networks; what it replaces is the sum over neighbours, which becomes gather,
tensor product and scatter.  schnetpack keeps components before channels, ``[atoms, components, channels]``.  In these
columns every component is a segment of scalars, so the tensor products here are between scalars, with one path for each
product of components, and no tensor is ever transposed.

Edge vectors point from the neighbour (the sender) to the centre (the receiver), against those of schnetpack; odd
functions of them carry a minus sign in the coefficients of their paths.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..algebra.multilinear import Path, TensorProduct
from ..algebra.polynomial import Polynomial
from ..ir import ops


def scalars(channels: int, components: int) -> str:
    """Irreps of columns ``[components, channels]`` whose components are segments of their own."""
    return "+".join([f"{channels}x0e"] * components)


def convolve(x: Tensor, y: Tensor, weight: Tensor, centre: Tensor, neighbour: Tensor, spec: str) -> Tensor:
    """Sum over neighbours of the product of their features with what the edges carry: [atoms, columns]."""
    messages = ops.tensor_product(ops.gather(x, neighbour), y, weight, None, spec, "out")
    return ops.scatter_sum(messages, centre, x.shape[0])


def embedding(module: Any) -> nn.Embedding:
    """Features by atomic number, as the model has them: ``NuclearEmbedding`` keeps a sum made when it was frozen."""
    if isinstance(module, nn.Embedding):
        return module
    table = module.embedding
    if module.training:
        table = module.element_embedding + module.config_linear(module.electron_config)
    return nn.Embedding.from_pretrained(table.detach())


def of_species(network: Any, table: nn.Embedding, numbers: Tensor) -> Tensor:
    """``network(table(numbers))``, evaluated once for each species: of weights alone, so that it is folded."""
    return ops.gather(network(table.weight), numbers)


class SchNetStandIn(nn.Module):
    """``SchNet``: continuous-filter convolutions (Schütt et al., J. Chem. Phys. 148, 241722 (2018), Eq. 3)."""

    def __init__(self, schnet: Any, path: str) -> None:
        super().__init__()
        self.embedding = embedding(schnet.embedding)
        self.radial_basis, self.cutoff_fn = schnet.radial_basis, schnet.cutoff_fn
        self.interactions = schnet.interactions
        columns = scalars(schnet.n_filters, 1)
        paths = (Path(0, 0, 0, "uvu", 0, 1.0),)
        self.spec = str(TensorProduct(columns, "1x0e", columns, paths, schnet.n_filters, shared=False))

    def forward(self, numbers: Tensor, vectors: Tensor, centre: Tensor, neighbour: Tensor) -> Tensor:
        """Atomic numbers [atoms], edge vectors [edges, 3] and their ends -> scalar features [atoms, channels]."""
        length = torch.norm(vectors, dim=1)
        basis, envelope = self.radial_basis(length), self.cutoff_fn(length).unsqueeze(1)
        one = torch.ones_like(length).unsqueeze(1)
        x = self.embedding(numbers)
        for k, block in enumerate(self.interactions):
            weight = block.filter_network(basis) * envelope
            features = block.in2f(x) if k else of_species(block.in2f, self.embedding, numbers)
            x = x + block.f2out(convolve(features, one, weight, centre, neighbour, self.spec))
        return x


class PaiNNStandIn(nn.Module):
    """``PaiNN`` (Schütt, Unke, Gastegger, ICML 2021, Eqs. 7 and 8).

    The gate of the neighbour's vectors is a product of features of one atom, so it is formed once an atom and not
    once an edge.  In the first block all vectors are zero, and what would multiply them is left out.
    """

    def __init__(self, painn: Any, path: str) -> None:
        super().__init__()
        self.embedding = embedding(painn.embedding)
        self.radial_basis, self.cutoff_fn = painn.radial_basis, painn.cutoff_fn
        self.filter_net, self.interactions, self.mixing = painn.filter_net, painn.interactions, painn.mixing
        self.share_filters: bool = painn.share_filters
        self.channels = c = int(painn.n_atom_basis)
        # x1: scalars, gates of directions, x, y and z of gated vectors; x2: 1 and the direction; out: scalar, x, y, z
        scalar = Path(0, 0, 0, "uvu", 0, 1.0)
        directions = [Path(1, 1 + k, 1 + k, "uvu", c, -1.0) for k in range(3)]
        vectors = [Path(2 + k, 0, 1 + k, "uvu", 2 * c, 1.0) for k in range(3)]
        y, out = scalars(1, 4), scalars(c, 4)
        first = TensorProduct(scalars(c, 2), y, out, (scalar, *directions), 2 * c, shared=False)
        others = TensorProduct(scalars(c, 5), y, out, (scalar, *directions, *vectors), 3 * c, shared=False)
        self.first, self.others = str(first), str(others)

    def forward(self, numbers: Tensor, vectors: Tensor, centre: Tensor, neighbour: Tensor) -> Tensor:
        """Atomic numbers [atoms], edge vectors [edges, 3] and their ends -> scalar features [atoms, channels]."""
        c = self.channels
        length = torch.norm(vectors, dim=1)
        y = torch.cat([torch.ones_like(length).unsqueeze(1), vectors / length.unsqueeze(1)], dim=1)
        filters = self.filter_net(self.radial_basis(length)) * self.cutoff_fn(length).unsqueeze(1)
        weights = [filters] * len(self.interactions) if self.share_filters else filters.split(3 * c, dim=1)
        q = self.embedding(numbers)
        mu: Tensor | None = None
        for block, mixing, weight in zip(self.interactions, self.mixing, weights, strict=True):
            if mu is None:
                context = of_species(block.interatomic_context_net, self.embedding, numbers)
                x, weight, spec = context[:, : 2 * c], weight[:, : 2 * c], self.first
            else:
                context = block.interatomic_context_net(q)
                gated = context[:, 2 * c :].unsqueeze(1) * mu
                x, spec = torch.cat([context[:, : 2 * c], gated.flatten(1)], dim=1), self.others
            message = convolve(x, y, weight, centre, neighbour, spec)
            q = q + message[:, :c]
            moved = message[:, c:].unflatten(1, (3, c))
            mu = moved if mu is None else mu + moved
            q, mu = _mixed(mixing, q, mu)
        return q


def _mixed(mixing: Any, q: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
    """``PaiNNMixing`` on scalars [atoms, channels] and vectors [atoms, 3, channels] (Eq. 9 and 10)."""
    mixed = mixing.mu_channel_mix(mu.flatten(0, 1))  # one product of matrices, where three dimensions give a batch
    v, w = mixed.unflatten(0, mu.shape[:2]).chunk(2, dim=2)
    norm = torch.sqrt((v**2).sum(1) + mixing.epsilon)
    dq, dmu, dqmu = mixing.intraatomic_context_net(torch.cat([q, norm], dim=1)).chunk(3, dim=1)
    return q + dq + dqmu * (v * w).sum(1), mu + dmu.unsqueeze(1) * w


class SO3netStandIn(nn.Module):
    """``SO3net``: convolutions with real spherical harmonics and Clebsch-Gordan coefficients, all of them the model's.

    Its harmonics are polynomials of the direction, in which powers of z were lowered by |r| = 1.
    """

    def __init__(self, net: Any, path: str) -> None:
        super().__init__()
        self.embedding = embedding(net.embedding)
        self.radial_basis, self.cutoff_fn = net.radial_basis, net.cutoff_fn
        self.so3convs, self.gatings = net.so3convs, net.gatings
        self.mixings1, self.mixings2, self.mixings3 = net.mixings1, net.mixings2, net.mixings3
        self.so3product = ProductStandIn(net.so3product)
        self.components = s = (int(net.lmax) + 1) ** 2
        poly, coefficients = harmonics(net.sphharm)
        self.harmonics = str(poly)
        self.coefficients = nn.Buffer(torch.tensor(coefficients).unsqueeze(1))
        self.specs = [str(_convolution(conv, s)) for conv in self.so3convs]

    def forward(self, numbers: Tensor, vectors: Tensor, centre: Tensor, neighbour: Tensor) -> Tensor:
        """Atomic numbers [atoms], edge vectors [edges, 3] and their ends -> scalar features [atoms, channels]."""
        length = torch.norm(vectors, dim=1)
        direction = (vectors / length.unsqueeze(1)).unsqueeze(1)
        coefficients = self.coefficients.to(vectors.dtype)
        y = ops.polynomial(direction, [], None, None, coefficients, self.harmonics, "out").squeeze(1)
        basis, envelope = self.radial_basis(length), self.cutoff_fn(length).unsqueeze(1)
        x = self.embedding(numbers).unsqueeze(1)
        x = torch.cat([x, x.new_zeros((x.shape[0], self.components - 1, x.shape[2]))], dim=1)
        blocks = (self.so3convs, self.mixings1, self.mixings2, self.gatings, self.mixings3, self.specs)
        for conv, mixing1, mixing2, gating, mixing3, spec in zip(*blocks, strict=True):
            weight = conv.filternet(basis) * envelope
            dx = convolve(x.flatten(1), y, weight, centre, neighbour, spec).unflatten(1, x.shape[1:])
            dx = dx + self.so3product(dx, mixing1(dx))
            x = x + mixing3(gating(mixing2(dx)))
        return x[:, 0]


def _convolution(conv: Any, components: int) -> TensorProduct:
    """The products of a ``SO3Convolution``: features times harmonics, weighted by degree of the harmonic."""
    c = int(conv.n_atom_basis)
    rows = zip(conv.idx_in_1, conv.idx_in_2, conv.idx_out, conv.Widx, conv.clebsch_gordan, strict=True)
    paths = [
        Path(int(i2), int(i1), int(io), "uvu", int(l) * c, float(cg) * (-1.0) ** int(l)) for i1, i2, io, l, cg in rows
    ]
    columns = scalars(c, components)
    return TensorProduct(columns, scalars(1, components), columns, tuple(paths), (conv.lmax + 1) * c, shared=False)


def harmonics(module: Any) -> tuple[Polynomial, np.ndarray]:
    """What ``RealSphericalHarmonics`` computes: a polynomial of a unit vector, and coefficients [monomials, outputs].

    Y_lm = sqrt((2l+1) / 2 pi) * sum_k P_lmk z^(l-2k-|m|) * sum_p {A, B}_mp x^p y^(m-p), with its own rounded numbers.
    """
    tables = {name: getattr(module, name).double().tolist() for name in ("powers", "zpow", "cAm", "cBm", "cPi")}
    terms: list[dict[tuple[int, ...], float]] = []
    for l, m in zip(module.lidx.tolist(), module.midx.tolist(), strict=True):
        # the module rounds this number to torch's default type
        plane: dict[tuple[int, ...], float] = {(): float(0.5**0.5 * torch.ones(()))}
        if m:
            own = zip(tables["powers"][abs(m) - 1], tables["cAm" if m > 0 else "cBm"][abs(m) - 1], strict=True)
            plane = {(0,) * int(a) + (1,) * int(b): value for (a, b), value in own if value}
        scale = ((2 * l + 1) / (2 * np.pi)) ** 0.5
        cell: dict[tuple[int, ...], float] = {}
        for power, value in zip(tables["zpow"][l][abs(m)], tables["cPi"][l][abs(m)], strict=True):
            for word, factor in plane.items() if value else ():
                name = (*word, *(2,) * int(power))
                cell[name] = cell.get(name, 0.0) + scale * value * factor
        terms.append(cell)
    monomials = tuple(sorted({m for cell in terms for m in cell}, key=lambda m: (len(m), m)))
    coefficients = np.array([[cell.get(m, 0.0) for cell in terms] for m in monomials])
    return Polynomial(3, monomials, "3x0e", f"{len(terms)}x0e"), coefficients


class ProductStandIn(nn.Module):
    """``SO3TensorProduct``, channel by channel, without its scripted scatter."""

    def __init__(self, product: Any) -> None:
        super().__init__()
        self.product = product
        self.components = (int(product.lmax) + 1) ** 2

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        own = self.product
        terms = x1[:, own.idx_in_1] * x2[:, own.idx_in_2] * own.clebsch_gordan.unsqueeze(1)
        return torch.zeros_like(x1).index_add(1, own.idx_out, terms)


class ZBLStandIn(nn.Module):
    """``ZBLRepulsionEnergy``: the screened Coulomb repulsion of nuclei, half of it to either atom."""

    def __init__(self, zbl: Any, path: str) -> None:
        super().__init__()
        self.a_pow, self.a_div = zbl.a_pow, zbl.a_div
        self.exponents, self.coefficients = zbl.exponents, zbl.coefficients
        self.ke, self.cutoff_fn = zbl.ke, zbl.cutoff_fn

    def forward(self, numbers: Tensor, vectors: Tensor, centre: Tensor, neighbour: Tensor) -> Tensor:
        """Atomic numbers [atoms], edge vectors [edges, 3] and their ends -> energies [atoms]."""
        softplus = nn.functional.softplus
        length = torch.norm(vectors, dim=1)
        size = numbers ** softplus(self.a_pow)
        size = (ops.gather(size, centre) + ops.gather(size, neighbour)) * softplus(self.a_div)
        exponents = size.unsqueeze(1) * softplus(self.exponents).unsqueeze(0)
        coefficients = nn.functional.normalize(softplus(self.coefficients).unsqueeze(0), p=1.0, dim=1)
        screening = (coefficients * torch.exp(-exponents * length.unsqueeze(1))).sum(1)
        repulsion = (ops.gather(numbers, centre) * ops.gather(numbers, neighbour)) / length
        if self.cutoff_fn is not None:
            repulsion = repulsion * self.cutoff_fn(length)
        return 0.5 * self.ke * ops.scatter_sum(repulsion * screening, centre, numbers.shape[0])


#: qualified class name -> stand-in
REPRESENTATIONS = {
    "schnetpack.representation.schnet.SchNet": SchNetStandIn,
    "schnetpack.representation.painn.PaiNN": PaiNNStandIn,
    "schnetpack.representation.so3net.SO3net": SO3netStandIn,
}
