"""Which calls of semantic ops have a kernel, and what runs in their place."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor

from ..algebra.contraction import parse_contraction
from ..algebra.multilinear import parse_linear, parse_tensor_product
from ..algebra.piecewise import parse_grid
from ..algebra.polynomial import parse_polynomial
from ..errors import KernelError
from ..ir import ops
from ..ir.contraction import contraction, contraction_gradient
from ..ir.convolution import convolution, convolution_gradient, fusible, rows_by
from ..ir.grouped import linear_by_species
from .call import Call, Constant, Number, Operand, Result, Rows, Scratch, Threads
from .contraction import ContractionKernel
from .convolution import DTYPES, FORWARD, ConvolutionKernel, pack
from .grouped import UNKNOWN, GroupedKernel
from .linear import LinearKernel, ScalarProductKernel
from .polynomial import PolynomialKernel
from .rows import RowsKernel

Arguments = Sequence[Any]
Function = Callable[..., Any]


class Source(Protocol):
    """C++ text of one kernel; equal names are equal kernels."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str: ...


@dataclass(frozen=True)
class Choice:
    """A kernel for one call.

    Attributes:
        kernel: name and source.
        bind: built library -> what runs in place of the op, with the op's own arguments.
        call: how C++ calls it; None where only Python can.
        pack: built library -> constant arguments as the kernel reads them, by position.
    """

    kernel: Source
    bind: Callable[[ctypes.CDLL], Function]
    call: Call | None = None
    pack: Callable[[ctypes.CDLL], Mapping[int, Tensor]] = field(default=lambda library: {})


def refusal(op: Any, args: Arguments) -> str | None:
    """Why no kernel takes a call, or None where one does.

    Args:
        args: of the call, in the order of the schema; of tensors only dtypes and fixed sizes are read.
    """
    if op not in _RULES:
        return "no kernel implements this op"
    kinds = {t.dtype for t in args if isinstance(t, Tensor) and t.is_floating_point()}
    if op in (convolution, convolution_gradient):
        floats = args[:4] if op is convolution_gradient else args[:3]
        kinds = {t.dtype for t in floats}  # a table is packed in the type of the features
    if any(isinstance(t, Tensor) and not t.is_floating_point() and t.dtype != torch.int64 for t in args):
        return "an index is not int64"
    if not kinds <= DTYPES.keys() or len(kinds) > 1:
        return f"kernels compute in one of float32 and float64, not {', '.join(map(str, kinds))}"
    return _RULES[op](args)


def choose(op: Any, args: Arguments, constants: Mapping[int, Tensor]) -> Choice | str:
    """The kernel for a call, or why there is none.

    Args:
        args: as for :func:`refusal`.
        constants: values of the arguments that never change, by position.
    """
    return refusal(op, args) or _MAKERS[op](args, constants)


# --- which calls


def _takes_convolution(args: Arguments) -> str | None:
    return fusible(parse_tensor_product(args[9]))


def _takes_contraction(args: Arguments) -> str | None:
    return None


def _takes_linear(args: Arguments) -> str | None:
    if not parse_linear(args[3]).shared:
        return "the weights differ from row to row"
    return None if args[4] in ("out", "x") else "a gradient by weights"


def _takes_product(args: Arguments) -> str | None:
    tp = parse_tensor_product(args[4])
    if args[5] not in ("out", "x1"):
        return f"a gradient by {args[5]}"
    try:
        ScalarProductKernel(tp, torch.float64, args[5])
    except KernelError as error:
        return error.what
    return None


def _takes_polynomial(args: Arguments) -> str | None:
    x, directions, weight, _, _, _, wrt = args
    if directions or weight is not None or wrt not in ("out", "direction"):
        return "a polynomial with weights or directions"
    return None if x.shape[1] == 1 else "a polynomial of more than one channel"


_RULES: Mapping[Any, Callable[[Arguments], str | None]] = {
    rows_by: lambda args: None,
    convolution: _takes_convolution,
    convolution_gradient: _takes_convolution,
    contraction: _takes_contraction,
    contraction_gradient: _takes_contraction,
    linear_by_species: lambda args: None,
    ops.linear: _takes_linear,
    ops.tensor_product: _takes_product,
    ops.polynomial: _takes_polynomial,
}


# --- what runs


def _rows(args: Arguments, constants: Mapping[int, Tensor]) -> Choice | str:
    kernel = RowsKernel()
    call = Call((Operand(0), Result(), Rows(0), Number(1)), "an edge names an atom that there is not")
    return Choice(kernel, kernel.bind, call)


def _linear_by_species(args: Arguments, constants: Mapping[int, Tensor]) -> Choice | str:
    x, weight, _, transposed = args
    species, inputs, outputs = map(int, weight.shape)
    if transposed:
        inputs, outputs = outputs, inputs
    kernel = GroupedKernel(species, inputs, outputs, x.dtype, transposed)
    constant = constants.get(1)

    def bind(library: ctypes.CDLL) -> Function:
        function = kernel.bind(library)
        packed = None if constant is None else kernel.pack(constant, library)

        def run(x: Tensor, weight: Tensor, index: Tensor, transposed: bool) -> Tensor:
            return function(x, kernel.pack(weight, library) if packed is None else packed, index)

        return run

    if constant is None:
        return Choice(kernel, bind)
    call = Call((Operand(0), Constant(1), Operand(2), Result(), Rows(0), Threads()), UNKNOWN)
    return Choice(kernel, bind, call, lambda library: {1: kernel.pack(constant, library)})


def _convolution(gradient: bool, args: Arguments, constants: Mapping[int, Tensor]) -> Choice | str:
    at = 5 if gradient else 4  # of the coefficients
    dtype = args[0].dtype
    text, grid_text = args[9:11]
    grid = parse_grid(grid_text) if args[at] is not None else None
    needs = cast(tuple[bool, bool, bool], tuple(args[-1])) if gradient else FORWARD
    if gradient and not any(needs):
        return "no gradient is asked for"
    tables = 1 if grid is None else args[at].shape[1] // grid.rows
    kernel = ConvolutionKernel(parse_tensor_product(text), grid, DTYPES[dtype], needs, tables)
    packed = pack(constants[at], dtype) if at in constants else None

    def bind(library: ctypes.CDLL) -> Function:
        function = kernel.bind(library)

        def run(*given: Any) -> Any:
            used = list(given[:9])
            coefficients = used[at]
            if coefficients is not None:
                used[at] = pack(coefficients, dtype) if packed is None else packed
            return function(*[t.contiguous() if isinstance(t, Tensor) else t for t in used])

        return run

    call = None
    if packed is not None or grid is None:
        table = Operand(at) if grid is None else Constant(at)
        sizes: tuple[Number | Rows, ...]
        if gradient:
            operands = (*map(Operand, (0, 1, 2, 3, 4)), table, Operand(7), Operand(8), Result(0), Result(1), Result(2))
            sizes = (Rows(0), Rows(2), Rows(1))
        else:
            operands = (*map(Operand, (0, 1, 2, 3)), table, Operand(5), Operand(7), Result())
            sizes = (Number(8), Rows(0), Rows(1))
        scratch = Scratch(Rows(2 if gradient else 0))
        call = Call((*operands, scratch, *sizes, Threads()), "an edge names an atom or a table that there is not")
    return Choice(kernel, bind, call, lambda library: {} if packed is None else {at: packed})


def _contraction(gradient: bool, args: Arguments, constants: Mapping[int, Tensor]) -> Choice | str:
    x = args[0]
    kernel = ContractionKernel(parse_contraction(args[-1]), int(x.shape[1]), DTYPES[x.dtype], gradient)

    def bind(library: ctypes.CDLL) -> Function:
        function = kernel.function(library)

        def run(*given: Any) -> Tensor:
            tensors = [t.contiguous() for t in given[:-1]]
            return kernel.call(function, *tensors, threads=torch.get_num_threads())

        return run

    operands = map(Operand, range(4 if gradient else 3))
    failure = "the species of an atom is not one of the model's"
    return Choice(kernel, bind, Call((*operands, Result(), Rows(0), Rows(2), Threads()), failure))


def _linear(args: Arguments, constants: Mapping[int, Tensor]) -> Choice | str:
    x, _, out, text, wrt = args
    source = x if wrt == "out" else out
    kernel = LinearKernel(parse_linear(text), source.dtype, wrt)
    return _linear_choice(kernel, 0 if wrt == "out" else 2, 1, None, constants)


def _product(args: Arguments, constants: Mapping[int, Tensor]) -> Choice | str:
    x1, _, _, out, text, wrt = args
    source = x1 if wrt == "out" else out
    kernel = ScalarProductKernel(parse_tensor_product(text), source.dtype, cast(Literal["out", "x1"], wrt))
    return _linear_choice(kernel, 0 if wrt == "out" else 3, 2, 1, constants)


def _linear_choice(
    kernel: LinearKernel | ScalarProductKernel,
    source: int,
    weight: int,
    scalars: int | None,
    constants: Mapping[int, Tensor],
) -> Choice:
    bind = partial(_bind_linear, kernel, source, weight, scalars, constants)
    if weight not in constants:
        return Choice(kernel, bind)
    second = Operand(scalars)
    call = Call((Operand(source), second, Constant(weight), Result(), Rows(source), Threads()))
    return Choice(kernel, bind, call, lambda library: {weight: kernel.bind(library).pack(constants[weight])})


def _bind_linear(
    kernel: LinearKernel | ScalarProductKernel,
    source: int,
    weight: int,
    scalars: int | None,
    constants: Mapping[int, Tensor],
    library: ctypes.CDLL,
) -> Function:
    bound = kernel.bind(library)
    packed = bound.pack(constants[weight].contiguous()) if weight in constants else None

    def run(*given: Any) -> Tensor:
        weights = bound.pack(given[weight].contiguous()) if packed is None else packed
        return bound(given[source], weights, None if scalars is None else given[scalars])

    return run


def _polynomial(args: Arguments, constants: Mapping[int, Tensor]) -> Choice | str:
    x, _, _, _, _, text, wrt = args
    if 4 not in constants:
        return "the coefficients are not constant"
    numbers = tuple(map(tuple, constants[4][:, 0, :].double().tolist()))
    kernel = PolynomialKernel(parse_polynomial(text), numbers, DTYPES[x.dtype], wrt == "direction")
    used = (0, 3) if kernel.gradient else (0,)

    def bind(library: ctypes.CDLL) -> Function:
        function = kernel.function(library)

        def run(*given: Any) -> Tensor:
            tensors = [given[k].contiguous() for k in used]
            return kernel.call(function, *tensors, threads=torch.get_num_threads())

        return run

    return Choice(kernel, bind, Call((*map(Operand, used), Result(), Rows(0), Threads())))


_MAKERS: Mapping[Any, Callable[[Arguments, Mapping[int, Tensor]], Choice | str]] = {
    rows_by: _rows,
    convolution: partial(_convolution, False),
    convolution_gradient: partial(_convolution, True),
    contraction: partial(_contraction, False),
    contraction_gradient: partial(_contraction, True),
    linear_by_species: _linear_by_species,
    ops.linear: _linear,
    ops.tensor_product: _product,
    ops.polynomial: _polynomial,
}
