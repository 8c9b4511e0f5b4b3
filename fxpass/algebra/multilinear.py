"""Equivariant multilinear maps as immutable data: tensor products and linears.

A map is a list of paths; each path couples one segment of every operand through Clebsch-Gordan
coefficients.  The same data describes the map and all of its transposes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from .irreps import dim, segments

#: connection mode -> channel letters of (x1, x2, weight, out); e3nn's notation
CHANNELS = {
    "uvw": ("u", "v", "uvw", "w"),
    "uvu": ("u", "v", "uv", "u"),
    "uvv": ("u", "v", "uv", "v"),
    "uuw": ("u", "u", "uw", "w"),
    "uuu": ("u", "u", "u", "u"),
    "uvuv": ("u", "v", "uv", "uv"),
}


@dataclass(frozen=True)
class Path:
    """One coupled triple of segments.

    Attributes:
        i1, i2, io: segment indices of x1, x2 and the output.
        mode: connection mode, a key of ``CHANNELS``.
        weight: offset of the path's weights in the weight vector, -1 where it has none.
        coefficient: factor in front of the Clebsch-Gordan coefficients.
    """

    i1: int
    i2: int
    io: int
    mode: str
    weight: int
    coefficient: float


@dataclass(frozen=True)
class TensorProduct:
    """x1 (irreps1) times x2 (irreps2), weighted, to out.

    Attributes:
        shared: the weights are one vector for the whole batch rather than one per row.
        weights: length of the weight vector.
        rounding: dtype the model's Clebsch-Gordan coefficients were stored in.
    """

    irreps1: str
    irreps2: str
    irreps_out: str
    paths: tuple[Path, ...]
    weights: int
    shared: bool
    rounding: str = "float64"

    def __str__(self) -> str:
        paths = " ".join(f"{p.i1},{p.i2},{p.io},{p.mode},{p.weight},{p.coefficient!r}" for p in self.paths)
        kind = "shared" if self.shared else "rows"
        return f"{self.irreps1}|{self.irreps2}|{self.irreps_out}|{self.weights}|{kind}|{self.rounding}|{paths}"

    @property
    def dims(self) -> dict[str, int]:
        """Number of columns of each slot."""
        return {
            "x1": dim(self.irreps1),
            "x2": dim(self.irreps2),
            "weight": self.weights,
            "out": dim(self.irreps_out),
        }

    def sizes(self, path: Path) -> dict[str, int]:
        """Extent of each index letter of a path: channels u, v, w and components i, j, k."""
        _, m1, l1, _ = segments(self.irreps1)[path.i1]
        _, m2, l2, _ = segments(self.irreps2)[path.i2]
        _, mo, lo, _ = segments(self.irreps_out)[path.io]
        return {"u": m1, "v": m2, "w": mo, "i": 2 * l1 + 1, "j": 2 * l2 + 1, "k": 2 * lo + 1}

    def degrees(self, path: Path) -> tuple[int, int, int]:
        """(l1, l2, l_out) of a path."""
        return (
            segments(self.irreps1)[path.i1][2],
            segments(self.irreps2)[path.i2][2],
            segments(self.irreps_out)[path.io][2],
        )

    def keep(self, paths: tuple[Path, ...]) -> TensorProduct:
        """The same map with only ``paths``; layouts and weight offsets stay."""
        return replace(self, paths=paths)

    @property
    def linear_in_weights(self) -> TensorProduct:
        """The part that is linear in the weights: without the paths that have none."""
        return self.keep(tuple(path for path in self.paths if path.weight >= 0))

    def flops(self) -> int:
        """Multiply-adds times two per row, for any slot."""
        total = 0
        for p in self.paths:
            s = self.sizes(p)
            w = CHANNELS[p.mode][2]
            channels = s["u"] if p.mode[:2] == "uu" else s["u"] * s["v"]
            total += 2 * s["v"] * s["i"] * s["j"] * s["k"] + 2 * channels * s["i"] * s["k"]
            if p.weight >= 0:
                extra = s["w"] if "w" in w else 1
                total += 2 * channels * s["k"] * extra
        return total


@cache
def parse_tensor_product(text: str) -> TensorProduct:
    """Inverse of ``str(TensorProduct)``."""
    irreps1, irreps2, irreps_out, weights, kind, rounding, paths = text.split("|")
    rows = (row.split(",") for row in paths.split())
    return TensorProduct(
        irreps1,
        irreps2,
        irreps_out,
        tuple(Path(int(a), int(b), int(c), mode, int(w), float(x)) for a, b, c, mode, w, x in rows),
        int(weights),
        kind == "shared",
        rounding,
    )


@dataclass(frozen=True)
class LinearPath:
    """One block of an equivariant linear map: input segment, output segment, weight offset, factor."""

    i: int
    o: int
    weight: int
    coefficient: float


@dataclass(frozen=True)
class Linear:
    """Equivariant linear map between segments of equal irrep (Schur's lemma)."""

    irreps_in: str
    irreps_out: str
    paths: tuple[LinearPath, ...]
    weights: int
    shared: bool

    def __str__(self) -> str:
        paths = " ".join(f"{p.i},{p.o},{p.weight},{p.coefficient!r}" for p in self.paths)
        kind = "shared" if self.shared else "rows"
        return f"{self.irreps_in}|{self.irreps_out}|{self.weights}|{kind}|{paths}"

    @property
    def dims(self) -> dict[str, int]:
        """Number of columns of each slot."""
        return {"x": dim(self.irreps_in), "weight": self.weights, "out": dim(self.irreps_out)}

    def keep(self, paths: tuple[LinearPath, ...]) -> Linear:
        """The same map with only ``paths``; layouts and weight offsets stay."""
        return replace(self, paths=paths)

    @property
    def transposed(self) -> Linear:
        """Layouts and paths of the transposed map; weights stay as they lie."""
        paths = tuple(replace(p, i=p.o, o=p.i) for p in self.paths)
        return replace(self, irreps_in=self.irreps_out, irreps_out=self.irreps_in, paths=paths)

    def then(self, outer: Linear) -> Linear:
        """Layouts and paths of ``outer`` of this map, like paths merged and dead ones left out; without weights."""
        ends = sorted({(p.i, q.o) for p in self.paths for q in outer.paths if p.o == q.i})
        paths = tuple(LinearPath(i, o, 0, 1.0) for i, o in ends)
        return Linear(self.irreps_in, outer.irreps_out, paths, 0, shared=True)

    def flops(self) -> int:
        """Multiply-adds times two per row, for any slot."""
        ins, outs = segments(self.irreps_in), segments(self.irreps_out)
        return sum(2 * ins[p.i][1] * outs[p.o][1] * (2 * ins[p.i][2] + 1) for p in self.paths)


@cache
def parse_linear(text: str) -> Linear:
    """Inverse of ``str(Linear)``."""
    irreps_in, irreps_out, weights, kind, paths = text.split("|")
    rows = (row.split(",") for row in paths.split())
    return Linear(
        irreps_in,
        irreps_out,
        tuple(LinearPath(int(i), int(o), int(w), float(x)) for i, o, w, x in rows),
        int(weights),
        kind == "shared",
    )
