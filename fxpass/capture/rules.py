"""Module rules: stand-ins that call semantic ops in place of known leaf modules.

A rule maps a class, by qualified name, to a function ``module -> nn.Module``.  The stand-in owns the
module's own parameters, so weights stay the model's.  Rules of plugins come in by the entry-point
group ``fxpass.module_rules`` (name = qualified class name).  Modules without a rule are traced through.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import combinations
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.multilinear import CHANNELS, Linear, LinearPath, Path, TensorProduct
from ..algebra.polynomial import DIGITS, Polynomial
from ..algebra.spherical import spherical_harmonics
from ..errors import Location, UnsupportedModelError
from ..ir import ops

Rule = Callable[[Any, str], nn.Module]  # the module is of a class that fxpass does not import


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.flatten(0, -2)


def _like(y: Tensor, x: Tensor) -> Tensor:
    return y if x.dim() == 2 else y.unflatten(0, x.shape[:-1])


class TensorProductStandIn(nn.Module):
    """``e3nn.o3.TensorProduct`` as ``fxpass::tensor_product``."""

    def __init__(self, tp: Any, path: str) -> None:
        super().__init__()
        apart = _pairs_apart(tp)
        self.spec = str(tensor_product_spec(apart, path))
        self.register_buffer("columns1", apart.columns1)
        self.register_buffer("columns2", apart.columns2)
        self.register_buffer("output_mask", getattr(tp, "output_mask", None))  # networks ask for it
        self.shapes = [prod(ins.path_shape) for ins in tp.instructions if ins.has_weight]
        self.weight = tp.weight
        self.shared = tp.shared_weights
        self.empty = tp.weight_numel == 0
        self.internal = tp.internal_weights

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | list[Tensor] | None = None) -> Tensor:
        x1, x2 = x, y
        if weight is None and self.internal:
            weight = self.weight
        if isinstance(weight, list):  # one for each instruction
            flat = () if self.shared else (-1,)
            weight = torch.cat([w.reshape(*flat, n) for w, n in zip(weight, self.shapes, strict=True)], dim=-1)
        if isinstance(self.columns1, Tensor) and isinstance(self.columns2, Tensor):
            x1, x2 = x1.index_select(-1, self.columns1), x2.index_select(-1, self.columns2)
        if x1.dim() != x2.dim() or (x1.dim() == x2.dim() != 2):
            rows = torch.broadcast_shapes(x1.shape[:-1], x2.shape[:-1])
            x1, x2 = x1.expand(*rows, -1), x2.expand(*rows, -1)
        if weight is not None:
            weight = weight.reshape(-1) if self.shared else _flat(weight)
        y = ops.tensor_product(_flat(x1), _flat(x2), None if self.empty else weight, None, self.spec, "out")
        return _like(y, x1)


class TensorSquareStandIn(TensorProductStandIn):
    """``e3nn.o3.TensorSquare``: a product of its input with itself."""

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, weight)


#: connection modes over pairs u < v, and the mode of the same product where every pair is a channel
PAIRED = {"u<vw": "uuw", "uvu<v": "uuu"}


def _pairs_apart(tp: Any) -> SimpleNamespace:
    """A product like ``tp`` over wider inputs, in which the partners of each pair u < v stand at the same place.

    Its ``columns1`` and ``columns2`` say which columns of the inputs of ``tp`` make the wider ones, None for the same.
    """
    irreps = [list(tp.irreps_in1), list(tp.irreps_in2)]
    columns = [list(range(tp.irreps_in1.dim)), list(range(tp.irreps_in2.dim))]
    instructions = []
    for ins in tp.instructions:
        if ins.connection_mode in PAIRED:
            (mul, ir), (_, other) = irreps[0][ins.i_in1], irreps[1][ins.i_in2]
            pairs = list(combinations(range(mul), 2))
            for side, (i, rep) in enumerate(((ins.i_in1, ir), (ins.i_in2, other))):
                first = (tp.irreps_in1, tp.irreps_in2)[side].slices()[i].start
                columns[side] += [first + pair[side] * rep.dim + m for pair in pairs for m in range(rep.dim)]
                irreps[side].append((len(pairs), rep))
            places = {"i_in1": len(irreps[0]) - 1, "i_in2": len(irreps[1]) - 1}
            ins = ins._replace(**places, connection_mode=PAIRED[ins.connection_mode])
        instructions.append(ins)
    wider = instructions != list(tp.instructions)
    return SimpleNamespace(
        instructions=instructions,
        irreps_in1="+".join(f"{mul}x{ir}" for mul, ir in irreps[0]),
        irreps_in2="+".join(f"{mul}x{ir}" for mul, ir in irreps[1]),
        irreps_out=tp.irreps_out,
        shared_weights=tp.shared_weights,
        named_buffers=tp.named_buffers,
        columns1=torch.tensor(columns[0]) if wider else None,
        columns2=torch.tensor(columns[1]) if wider else None,
    )


def tensor_product_spec(tp: Any, path: str) -> TensorProduct:
    """The data of an ``e3nn.o3.TensorProduct``; weights keep e3nn's order."""
    paths, offset = [], 0
    for ins in tp.instructions:
        if ins.connection_mode not in CHANNELS:
            raise UnsupportedModelError(
                f"the connection mode {ins.connection_mode!r} of a tensor product is not covered",
                where=Location(module_path=path, irreps=f"{tp.irreps_in1} x {tp.irreps_in2} -> {tp.irreps_out}"),
                hint=f"one of {', '.join(CHANNELS)}",
            )
        weight = -1
        if ins.has_weight:
            weight, offset = offset, offset + prod(ins.path_shape)
        if 0 not in ins.path_shape and ins.path_weight != 0:
            paths.append(
                Path(ins.i_in1, ins.i_in2, ins.i_out, ins.connection_mode, weight, float(ins.path_weight))
            )
    return TensorProduct(
        str(tp.irreps_in1),
        str(tp.irreps_in2),
        str(tp.irreps_out),
        tuple(paths),
        offset,
        bool(tp.shared_weights),
        coefficient_dtype(tp),
    )


def coefficient_dtype(module: nn.Module) -> str:
    """``"float32"`` where the module's stored Clebsch-Gordan coefficients went through float32."""
    for name, buffer in module.named_buffers():
        if "_w3j_" in name and buffer.numel() > 1:
            values = buffer.double()
            if torch.equal(values.float().double(), values):
                return "float32"
    return "float64"


class LinearStandIn(nn.Module):
    """``e3nn.o3.Linear`` as ``fxpass::linear``, plus a bias on scalars."""

    def __init__(self, linear: Any, path: str) -> None:
        super().__init__()
        paths, biases, offset = [], [], 0
        for ins in linear.instructions:
            if ins.i_in == -1:
                biases.append((ins.i_out, ins.path_weight))
                continue
            if 0 not in ins.path_shape:
                paths.append(LinearPath(ins.i_in, ins.i_out, offset, float(ins.path_weight)))
            offset += prod(ins.path_shape)
        if linear.weight.dim() > 1 and linear.internal_weights:
            raise UnsupportedModelError(
                "a Linear with f_in/f_out is not covered",
                where=Location(module_path=path, irreps=f"{linear.irreps_in} -> {linear.irreps_out}"),
                hint="a Linear without f_in and f_out",
            )
        self.spec = str(
            Linear(str(linear.irreps_in), str(linear.irreps_out), tuple(paths), offset, bool(linear.shared_weights))
        )
        self.columns = tuple((mul * ir.dim) for mul, ir in linear.irreps_out)
        self.biases = dict(biases)
        self.weight = linear.weight
        self.bias = linear.bias
        self.internal = linear.internal_weights
        self.shared = linear.shared_weights

    def forward(self, features: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        weight = self.weight if weight is None else weight
        bias = self.bias if bias is None else bias
        weight = weight.reshape(-1) if self.shared else _flat(weight)
        y = ops.linear(_flat(features), weight, None, self.spec, "out")
        if self.biases:
            pieces, offset = [], 0
            for k, length in enumerate(self.columns):
                if k in self.biases:
                    pieces.append(bias.narrow(-1, offset, length) * self.biases[k])
                    offset += length
                else:
                    pieces.append(bias.new_zeros(length))
            y = y + torch.cat(pieces)
        return _like(y, features)


class SphericalHarmonicsStandIn(nn.Module):
    """``e3nn.o3.SphericalHarmonics`` as a normalisation and ``fxpass::polynomial``."""

    def __init__(self, sh: Any, path: str) -> None:
        super().__init__()
        parity = sh.irreps_in[0].ir.p
        poly, coefficients = spherical_harmonics(tuple(sh._ls_list), sh.normalization, parity)
        self.spec = str(poly)
        self.normalize = sh.normalize
        self.register_buffer("coefficients", torch.tensor(coefficients).unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.normalize:
            x = nn.functional.normalize(x, dim=-1)
        rows = _flat(x).unsqueeze(1)
        y = ops.polynomial(rows, [], None, None, self.coefficients.to(x.dtype), self.spec, "out")
        return _like(y.squeeze(1), x)


class ContractionStandIn(nn.Module):
    """MACE's ``Contraction`` to one output irrep as one ``fxpass::polynomial``.

    The generalised Clebsch-Gordan tensors U are the model's own buffers; U[.., i, j, l, ..] x_i x_j x_l
    is symmetric in what multiplies it, so U folds exactly into one coefficient per monomial
    (Batatia et al., NeurIPS 2022, Eq. 10-11).
    """

    def __init__(self, contraction: Any, irrep_out: str, path: str) -> None:
        super().__init__()
        irreps = contraction.coupling_irreps
        if irreps.dim > len(DIGITS):
            raise UnsupportedModelError(
                f"a symmetric contraction over {irreps.dim} components is not covered",
                where=Location(module_path=path, irreps=str(irreps)),
                hint=f"at most {len(DIGITS)} components",
            )
        degrees = range(contraction.correlation, 0, -1)
        tensors = [contraction.U_tensors(nu).detach().double() for nu in degrees]
        if tensors[0].dim() == contraction.correlation + 1:  # a scalar output has no component index
            tensors = [tensor.unsqueeze(0) for tensor in tensors]
        outputs = tensors[0].shape[0]
        table: dict[tuple[int, ...], dict[tuple[int, int], float]] = {}
        first = 0
        for tensor in tensors:
            at = tensor.nonzero()
            for (k, *variables, n), value in zip(at.tolist(), tensor[tuple(at.T)].tolist(), strict=True):
                cell = table.setdefault(tuple(sorted(variables)), {})
                cell[first + n, k] = cell.get((first + n, k), 0.0) + value
            first += tensor.shape[-1]
        names = sorted((m for m, cell in table.items() if any(cell.values())), key=lambda m: (len(m), m))
        coefficients = torch.zeros(len(names), first, outputs, dtype=torch.float64)
        for row, name in enumerate(names):
            for (n, k), value in table[name].items():
                coefficients[row, n, k] = value
        self.spec = str(Polynomial(irreps.dim, tuple(names), str(irreps), f"1x{irrep_out}"))
        self.register_buffer("coefficients", coefficients.to(contraction.weights_max.dtype))
        self.weights = nn.ParameterList([contraction.weights_max, *contraction.weights])
        self.outputs = outputs
        self.vanishes = not names  # parity forbids every product

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.vanishes:
            return x.new_zeros((x.shape[0], x.shape[1] * self.outputs))
        weight = torch.cat(list(self.weights), dim=1)
        species, paths, channels = weight.shape
        rows = torch.matmul(y, weight.reshape(species, paths * channels)).reshape(-1, paths, channels)
        return ops.polynomial(x, [], rows, None, self.coefficients, self.spec, "out").flatten(1)


class SymmetricContractionStandIn(nn.Module):
    """MACE's ``SymmetricContraction``: the contractions to each output irrep, concatenated."""

    def __init__(self, module: Any, path: str) -> None:
        super().__init__()
        self.contractions = nn.ModuleList(
            ContractionStandIn(contraction, str(ir), path)
            for (_, ir), contraction in zip(module.irreps_out, module.contractions, strict=True)
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([contraction(x, y) for contraction in self.contractions], dim=-1)


class ExtractStandIn(nn.Module):
    """``e3nn.nn.Extract``, which is compiled code, as slices of the input joined to each output."""

    def __init__(self, extract: Any, path: str) -> None:
        super().__init__()
        slices = extract.irreps_in.slices()
        self.pieces = [[(slices[i].start, slices[i].stop) for i in ins] for ins in extract.instructions]
        # squeeze_out is not kept, so ask the module whether it returns a tensor or a tuple
        self.squeeze = isinstance(extract(torch.zeros(1, extract.irreps_in.dim)), Tensor)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs = tuple(_joined([x[..., start:stop] for start, stop in pieces], x) for pieces in self.pieces)
        return outputs[0] if self.squeeze else outputs


def _joined(parts: list[Tensor], x: Tensor) -> Tensor:
    if not parts:
        return x[..., :0]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class SphereGridStandIn(nn.Module):
    """``e3nn.o3.ToS2Grid`` and ``FromS2Grid`` with the Fourier transform along alpha written as a product.

    The transforms of ``torch.fft`` fix the number of rows in a trace.  With orders m and N angles 2 pi a / N they are
    products with sqrt(2) sin(|m| alpha), 1 and sqrt(2) cos(m alpha), for m < 0, m = 0 and m > 0.
    """

    def __init__(self, grid: Any, path: str) -> None:
        super().__init__()
        self.back = type(grid).__name__ == "FromS2Grid"
        self.shb = grid.shb
        angles, orders = grid.sha.shape
        waves = grid.sha
        if angles >= orders and angles % 2 == 1:  # where e3nn transforms; else it multiplies by this buffer
            alpha = 2 * torch.pi * torch.arange(angles, dtype=torch.float64).unsqueeze(1) / angles
            m = torch.arange(1, orders // 2 + 1, dtype=torch.float64)
            sines, cosines = torch.sin(alpha * m.flip(0)), torch.cos(alpha * m)
            waves = torch.cat([2**0.5 * sines, torch.ones_like(alpha), 2**0.5 * cosines], dim=1)
        self.register_buffer("waves", waves)

    def forward(self, x: Tensor) -> Tensor:
        waves = self.waves.to(x.dtype)
        if self.back:
            rows = x.flatten(0, -3) if x.dim() > 2 else x.unsqueeze(0)
            y = torch.einsum("mbi,zbm->zi", self.shb, torch.einsum("am,zba->zbm", waves, rows))
            return y.unflatten(0, x.shape[:-2]) if x.dim() > 2 else y.squeeze(0)
        rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
        y = torch.einsum("am,zbm->zba", waves, torch.einsum("mbi,zi->zbm", self.shb, rows))
        return y.unflatten(0, x.shape[:-1]) if x.dim() > 1 else y.squeeze(0)


class ReducedTensorProductsStandIn(nn.Module):
    """``e3nn.o3.ReducedTensorProducts``, which is compiled code in e3nn 0.4.4, by its own change of basis."""

    def __init__(self, product: Any, path: str) -> None:
        super().__init__()
        self.change_of_basis = product.change_of_basis

    def forward(self, *xs: Tensor) -> Tensor:
        y = torch.tensordot(xs[0], self.change_of_basis, dims=([xs[0].dim() - 1], [1]))  # [..., out, others]
        for x in xs[1:]:
            y = (y * x.reshape(*x.shape[:-1], 1, x.shape[-1], *[1] * (y.dim() - x.dim() - 1))).sum(x.dim())
        return y


class ChebyshevStandIn(nn.Module):
    """MACE's ``ChebychevBasis`` by its recurrence T_n+1 = 2 x T_n - T_n-1, which has a derivative.

    ``torch.special.chebyshev_polynomial_t`` has none: autograd takes its result for a constant.
    """

    def __init__(self, basis: Any, path: str) -> None:
        super().__init__()
        self.count = int(basis.num_basis)

    def forward(self, x: Tensor) -> Tensor:
        values = [torch.ones_like(x), x]
        while len(values) <= self.count:
            values.append(2 * x * values[-1] - values[-2])
        return torch.cat(values[1 : self.count + 1], dim=-1)


#: qualified class name -> rule; a subclass without a rule of its own takes its base's
RULES: Mapping[str, Rule] = {
    "e3nn.o3._tensor_product._tensor_product.TensorProduct": TensorProductStandIn,
    "e3nn.o3._tensor_product._sub.TensorSquare": TensorSquareStandIn,
    "e3nn.o3._linear.Linear": LinearStandIn,
    "e3nn.o3._spherical_harmonics.SphericalHarmonics": SphericalHarmonicsStandIn,
    "e3nn.o3._s2grid.ToS2Grid": SphereGridStandIn,
    "e3nn.o3._s2grid.FromS2Grid": SphereGridStandIn,
    "e3nn.o3._reduce.ReducedTensorProducts": ReducedTensorProductsStandIn,
    "e3nn.nn._extract.Extract": ExtractStandIn,
    "mace.modules.symmetric_contraction.SymmetricContraction": SymmetricContractionStandIn,
    "mace.modules.radial.ChebychevBasis": ChebyshevStandIn,
}


def install(model: nn.Module, rules: Mapping[str, Rule]) -> nn.Module:
    """Replace every module of ``model`` that a rule covers, in place; returns the model.

    Raises:
        UnsupportedModelError: a scripted module is left, which would freeze sizes silently.
    """
    replaced = _install(model, rules, "")
    for path, module in replaced.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            owner = replaced.get_submodule(path.rpartition(".")[0])
            raise UnsupportedModelError(
                f"{type(owner).__name__} holds compiled TorchScript code, which would freeze the traced sizes",
                where=Location(module_path=path),
                hint=f"register a module rule for {qualified(type(owner))} (entry point group fxpass.module_rules)",
            )
    return replaced


def _install(module: nn.Module, rules: Mapping[str, Rule], path: str) -> nn.Module:
    for cls in type(module).__mro__:
        rule = rules.get(qualified(cls))
        if rule is not None and _forward(type(module)) is _forward(cls):
            return rule(module, path)
    for name, child in module.named_children():
        new = _install(child, rules, f"{path}.{name}".lstrip("."))
        if new is not child:
            setattr(module, name, new)
    return module


def _forward(cls: type) -> Any:
    """What a rule of the class stands for: a subclass with a ``forward`` of its own is something else."""
    return getattr(cls, "forward", None)


def qualified(cls: type) -> str:
    """The name by which a class is imported; ``torch.package`` puts ``<torch_package_0>.`` before it."""
    return re.sub(r"^<torch_package_\d+>\.", "", f"{cls.__module__}.{cls.__qualname__}")
