"""Which calls of semantic ops have a Triton kernel, and what runs in their place on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..algebra.contraction import parse_contraction
from ..algebra.irreps import IR_MUL
from ..algebra.multilinear import parse_linear, parse_tensor_product
from ..algebra.piecewise import parse_grid
from ..algebra.polynomial import parse_polynomial
from ..ir import ops
from ..ir.contraction import contraction, contraction_gradient
from ..ir.convolution import convolution, convolution_gradient, rows_by
from .choice import Arguments, Function, refusal
from .contraction import ContractionKernel
from .convolution import DTYPES, FORWARD, ConvolutionKernel, pack
from .linear import LinearKernel, ScalarProductKernel
from .polynomial import PolynomialKernel
from .triton_contraction import TritonContraction, one_after_another
from .triton_convolution import TritonConvolution
from .triton_linear import TritonLinear
from .triton_polynomial import TritonPolynomial
from .triton_printer import TritonKernel

#: what a sort on the device does as well as any kernel
SORTED = "torch.sort"
Bind = Callable[[TritonKernel], Function]


@dataclass(frozen=True)
class Choice:
    """Kernels for one call.

    Attributes:
        kernels: that run, in order; none for what torch does on the device.
        make: what binds a kernel -> what runs in place of the op, with the op's own arguments.
    """

    kernels: tuple[TritonKernel, ...]
    make: Callable[[Bind], Function]

    @property
    def name(self) -> str:
        """Of what runs."""
        return " ".join(kernel.name for kernel in self.kernels) or SORTED


def choose(op: Any, args: Arguments, constants: Mapping[int, Tensor]) -> Choice | str:
    """The kernels for a call, or why there are none: those that C++ has.

    Args:
        args: of the call, in the order of the schema; of tensors only dtypes and fixed sizes are read.
        constants: values of the arguments that never change, by position, on the device that runs the kernels.
    """
    if any(isinstance(a, str) and IR_MUL in a for a in args):
        return "features lie with channels last"
    return refusal(op, args) or _MAKERS[op](args, constants)


def sorted_rows(index: Tensor, size: int) -> Tensor:
    """``rows_by`` on the device of ``index``: a stable sort, and the first place of each row in it.

    Entries that are no number of a row belong to none.
    """
    ordered, permutation = torch.sort(index, stable=True)
    rows = torch.arange(size + 1, dtype=index.dtype, device=index.device)
    return torch.cat([torch.searchsorted(ordered, rows), permutation])


def _rows(args: Arguments, constants: Mapping[int, Tensor]) -> Choice | str:
    return Choice((), lambda bind: sorted_rows)


def _convolution(args: Arguments, constants: Mapping[int, Tensor]) -> Choice | str:
    gradient = isinstance(args[-1], (list, tuple))
    at = 5 if gradient else 4  # of the coefficients
    dtype, grid = args[0].dtype, None if args[at] is None else parse_grid(args[10])
    needs = cast(tuple[bool, bool, bool], tuple(args[-1])) if gradient else FORWARD
    if gradient and not any(needs):
        return "no gradient is asked for"
    printed = TritonConvolution(ConvolutionKernel(parse_tensor_product(args[9]), grid, DTYPES[dtype], needs))
    packed = pack(constants[at], dtype) if at in constants else None

    def make(bind: Bind) -> Function:
        function = bind(printed)

        def run(*given: Any) -> Any:
            used = list(given[:9])
            if used[at] is not None:
                used[at] = pack(used[at], dtype) if packed is None else packed
            return function(*map(_contiguous, used))

        return run

    return Choice((printed,), make)


def _contraction(gradient: bool) -> Callable[[Arguments, Mapping[int, Tensor]], Choice | str]:
    def chosen(args: Arguments, constants: Mapping[int, Tensor]) -> Choice | str:
        x = args[0]
        kernel = ContractionKernel(parse_contraction(args[-1]), int(x.shape[1]), DTYPES[x.dtype], gradient)
        parts = TritonContraction.parts(kernel)

        def make(bind: Bind) -> Function:
            function = one_after_another([bind(part) for part in parts])
            return lambda *given: function(*map(_contiguous, given[:-1]))

        return Choice(parts, make)

    return chosen


def _linear(args: Arguments, constants: Mapping[int, Tensor]) -> Choice | str:
    x, _, out, text, wrt = args
    source = 0 if wrt == "out" else 2
    dtype = (x, out)[wrt != "out"].dtype
    printed = TritonLinear(LinearKernel(parse_linear(text), dtype, wrt))
    return _mapped(printed, (source,), 1, constants)


def _product(args: Arguments, constants: Mapping[int, Tensor]) -> Choice | str:
    x1, _, _, out, text, wrt = args
    source = 0 if wrt == "out" else 3
    dtype = (x1, out)[wrt != "out"].dtype
    kernel = ScalarProductKernel(parse_tensor_product(text), dtype, cast(Literal["out", "x1"], wrt))
    return _mapped(TritonLinear(kernel), (source, 1), 2, constants)


def _mapped(printed: TritonLinear, sources: Sequence[int], weight: int, constants: Mapping[int, Tensor]) -> Choice:
    packed = printed.pack(constants[weight]) if weight in constants else None

    def make(bind: Bind) -> Function:
        function = bind(printed)

        def run(*given: Any) -> Tensor:
            weights = printed.pack(given[weight]) if packed is None else packed
            return function(*(_contiguous(given[k]) for k in sources), weights)

        return run

    return Choice((printed,), make)


def _polynomial(args: Arguments, constants: Mapping[int, Tensor]) -> Choice | str:
    x, _, _, _, _, text, wrt = args
    if 4 not in constants:
        return "the coefficients are not constant"
    numbers = tuple(map(tuple, constants[4][:, 0, :].double().tolist()))
    printed = TritonPolynomial(PolynomialKernel(parse_polynomial(text), numbers, DTYPES[x.dtype], wrt == "direction"))
    used = (0, 3) if printed.kernel.gradient else (0,)

    def make(bind: Bind) -> Function:
        function = bind(printed)
        return lambda *given: function(*(_contiguous(given[k]) for k in used))

    return Choice((printed,), make)


def _contiguous(argument: Any) -> Any:
    return argument.contiguous() if isinstance(argument, Tensor) else argument


_MAKERS: Mapping[Any, Callable[[Arguments, Mapping[int, Tensor]], Choice | str]] = {
    rows_by: _rows,
    convolution: _convolution,
    convolution_gradient: _convolution,
    contraction: _contraction(False),
    contraction_gradient: _contraction(True),
    ops.linear: _linear,
    ops.tensor_product: _product,
    ops.polynomial: _polynomial,
}
