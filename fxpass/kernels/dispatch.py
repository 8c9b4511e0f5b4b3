"""Kernels behind the ops: ``with Kernels():`` the ops of the namespace ``fxpass`` run generated C++ on CPU tensors.

A graph then needs no lowering of its own: whatever calls the ops, one by one, through ``torch.compile`` or out of a
program of ``torch.export``, calls the kernels, and their derivatives do.  Outside of such a block the references run.

Which of them runs is a context variable that the op reads when it is called: nothing is traced in or recompiled for
it, other threads keep what they had, and the end of the block leaves nothing behind.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..algebra.multilinear import parse_tensor_product
from ..errors import KernelError
from ..ir import ops
from ..ir.contraction import contraction, contraction_gradient
from ..ir.convolution import convolution, convolution_gradient, rows_by
from ..ir.semantic import owned
from .build import build, find_compiler
from .choice import choose

#: ops that have kernels
OPS = (
    *(rows_by, convolution, convolution_gradient, contraction, contraction_gradient),
    *(ops.linear, ops.tensor_product, ops.polynomial),
)
NO_COMPILER = "no C++ compiler on PATH builds kernels"
COEFFICIENTS = 4  # argument of ops.polynomial that is printed into the source

Function = Callable[..., Any]
Found = tuple[str, Function] | str  # name and function of a kernel, or why there is none


class Kernels:
    """Kernels for the calls made within its block; each is built at its first call, and kept.

    Attributes:
        calls: how often each kernel ran, by name.
        fallbacks: how often a reference ran, by op and reason.
        sources: C++ text of each kernel that was built, by name.
    """

    def __init__(self, constants: Iterable[Tensor] = (), *, limit: int = 256, folder: Path | None = None) -> None:
        """
        Args:
            constants: weights that never change while this object lives. What kernels make of them is kept; of
                others it is made at each call.
            limit: number of kernels and reasons that are kept, the oldest ones go.
            folder: where libraries are kept, see ``build.build``.
        """
        self.calls: Counter[str] = Counter()
        self.fallbacks: Counter[tuple[str, str]] = Counter()
        self.sources: dict[str, str] = {}
        self._constants = {id(tensor): tensor for tensor in constants}
        self._limit, self._folder = limit, folder
        self._compiler = find_compiler(folder=folder)
        self._kept: dict[tuple[Any, ...], Found] = {}
        self._lock = threading.RLock()  # making a kernel may call ops

    def __enter__(self) -> Kernels:
        _ACTIVE.set((*_ACTIVE.get(), self))
        return self

    def __exit__(self, *exception: object) -> None:
        _ACTIVE.set(_ACTIVE.get()[:-1])

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, deep ones too, have the same constants and no kernels yet: their libraries are on disk."""
        return partial(Kernels, limit=self._limit, folder=self._folder), (tuple(self._constants.values()),)

    def call(self, op: Any, args: Sequence[Any], reference: Function) -> Any:
        """The result of an op, from its kernel, or from ``reference`` where it has none.

        Raises:
            KernelError, UsageError: an index names a row that there is not.
        """
        with self._lock:
            found = misfit(op, args) or self._found(op, args)
            if isinstance(found, str):
                self.fallbacks[ops.SEMANTIC[op].name, found] += 1
                function = reference
            else:
                name, function = found
                self.calls[name] += 1
        return function(*args)

    def _found(self, op: Any, args: Sequence[Any]) -> Found:
        fixed = {at: a for at, a in enumerate(args) if isinstance(a, Tensor) and id(a) in self._constants}
        key = (op, *map(_static, args), *((at, id(a)) for at, a in fixed.items()))
        if op is ops.polynomial and args[0].shape[1] == 1 and COEFFICIENTS not in fixed:
            fixed[COEFFICIENTS] = args[COEFFICIENTS]
            key = (*key, args[COEFFICIENTS].detach().numpy().tobytes())
        if key not in self._kept:
            self._kept[key] = self._made(op, args, {at: a.detach() for at, a in fixed.items()})
            while len(self._kept) > self._limit:
                del self._kept[next(iter(self._kept))]
        return self._kept[key]

    def _made(self, op: Any, args: Sequence[Any], constants: dict[int, Tensor]) -> Found:
        if self._compiler is None:
            return NO_COMPILER
        choice = choose(op, args, constants)
        if isinstance(choice, str):
            return choice
        name, source = choice.kernel.name, choice.kernel.source
        try:
            library = build({name: source}, self._compiler, self._folder)[name]
        except KernelError as error:
            return error.what
        self.sources[name] = source
        return name, choice.bind(library)


#: kernels of the blocks around, the innermost last
_ACTIVE: ContextVar[tuple[Kernels, ...]] = ContextVar("fxpass_kernels", default=())


def _static(argument: Any) -> Any:
    """What a kernel is made for: type and columns of a tensor, a text, flags; no number of rows."""
    if isinstance(argument, Tensor):
        return argument.dtype, tuple(argument.shape[1:])
    if isinstance(argument, (list, tuple)):
        return tuple(map(_static, argument))
    return None if isinstance(argument, int) and not isinstance(argument, bool) else argument


def misfit(op: Any, args: Sequence[Any]) -> str | None:
    """Why a call cannot be given to a kernel, which would read its tensors as something else; None where it can.

    Other kernels than those of convolutions check shapes and types themselves.
    """
    if any(isinstance(a, Tensor) and not a.is_floating_point() and a.dtype is not torch.int64 for a in args):
        return "its indices are not int64"
    if op not in (convolution, convolution_gradient):
        return None
    given = dict(zip((argument.name for argument in op._schema.arguments), args, strict=True))
    tp, table = parse_tensor_product(given["spec"]), given["coefficients"]
    x, y, radial, order = (given[name] for name in ("x", "y", "radial", "order"))
    per_edge = [given[name] for name in ("radial", "species", "sender", "receiver") if given[name] is not None]
    if len({t.dtype for t in (x, y, radial, given.get("g", x))}) > 1:
        return "its operands are of several types"
    rows = x.shape[0] if op is convolution_gradient else given["size"]
    columns = [(x, tp.dims["x1"]), (y, tp.dims["x2"])]
    columns += [(given["g"], tp.dims["out"])] if "g" in given else []
    columns += [(radial, tp.weights)] if table is None else [(table[0], tp.weights)]
    fits = all(t.dim() == 2 and t.shape[1] == width for t, width in columns)
    fits = fits and all(t.shape[0] == y.shape[0] for t in per_edge) and order.shape == (rows + 1 + y.shape[0],)
    return None if fits else "shapes of its operands do not fit together"


def _register(op: Any) -> None:
    reference = owned(ops.SEMANTIC[op].reference)

    def run(*args: Any) -> Any:
        active = _ACTIVE.get()
        return active[-1].call(op, args, reference) if active else reference(*args)

    torch.library.impl(op.name(), "CPU", run)


for _op in OPS:
    _register(_op)
