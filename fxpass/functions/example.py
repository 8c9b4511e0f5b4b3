"""What an example of a module's arguments says: names, dtypes and sizes of its tensors, and which sizes may change."""

from __future__ import annotations

import keyword
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..capture.capture import capture_function, prepare
from ..errors import FxpassError, Location, UnsupportedModelError, UsageError
from ..ir.program import Dim, Program, TensorSpec, fresh
from .signature import Signature, flatten, parameters, same_shape

#: axes of one argument and the names of their sizes
Dynamic = Mapping[str, Mapping[int, str]]

#: a size of this name means independent parts to some targets
RESERVED = "graphs"


@dataclass(frozen=True)
class Example:
    """A module's arguments.

    Attributes:
        signature: how they are made of tensors, and what the module returns for them.
        specs: name, sizes and dtype of each tensor.
        tensors: their values.
        outputs: a name for each tensor that the module returns.
        notes: what the user must be told of sizes that may not change.
    """

    signature: Signature
    specs: tuple[TensorSpec, ...]
    tensors: tuple[Tensor, ...]
    outputs: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def facts(self, module: nn.Module) -> dict[str, Any]:
        """What the drop-in has to know, JSON-able."""
        tensors = (*self.tensors, *module.parameters(), *module.buffers())
        dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
        return {"signature": self.signature.to_json(), "dtype": str(dtype).removeprefix("torch.")}

    def capture(self, module: nn.Module) -> Program:
        """The program of ``module`` at stage ``"function"``, with the example as its sample.

        Raises:
            CaptureError: the module cannot be captured as a dynamic graph.
            UnsupportedModelError: it holds compiled code that no rule knows.
        """
        replica = prepare(module)
        outputs = tuple(TensorSpec(name, (), torch.float32) for name in self.outputs)
        whole = [(s, t) for s, t in zip(self.specs, self.tensors, strict=True) if t.dtype == torch.int64 and t.numel()]
        signed = {spec.name for spec, value in whole if int(value.min()) < 0}
        program = capture_function(
            lambda *values: self.call(replica, values), replica, self.specs, outputs, signed=signed
        )
        sample = {spec.name: value for spec, value in zip(self.specs, self.tensors, strict=True)}
        return replace(program, samples=(sample,))

    @property
    def sizes(self) -> dict[str, int]:
        """The named sizes as they are in the example."""
        pairs = (p for s, t in zip(self.specs, self.tensors, strict=True) for p in zip(s.dims, t.shape, strict=True))
        return {dim: size for dim, size in pairs if isinstance(dim, str)}

    def cast(self, dtype: torch.dtype) -> Example:
        """The same with every floating tensor in ``dtype``."""
        tensors = tuple(t.to(dtype) if t.is_floating_point() else t for t in self.tensors)
        specs = tuple(replace(s, dtype=t.dtype) for s, t in zip(self.specs, tensors, strict=True))
        return replace(self, tensors=tensors, specs=specs)

    def call(self, module: nn.Module, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What ``module`` returns for other tensors, flat.

        Raises:
            UsageError: it returns tensors in other places than for the example.
        """
        found: list[tuple[str, Tensor]] = []
        args, kwargs = self.signature.arguments([t.clone() for t in tensors])  # it may write to them
        tree = flatten(module(*args, **kwargs), "result", found)
        if not same_shape(tree, self.signature.result):
            raise UsageError("the module returns another structure for other inputs", hint="one structure for all")
        return [value for _, value in found]

    def drawn(self, sizes: Mapping[str, int], seed: int) -> list[Tensor]:
        """Tensors like those of the example at other ``sizes``.

        Rows are drawn from the example; floating values move by up to a quarter, all zeros become random numbers, and
        where a size shrinks indices stay below it.
        """
        generator = torch.Generator().manual_seed(seed)
        limit = min([size for name, size in sizes.items() if size < self.sizes[name]], default=None)

        def draw(value: Tensor, spec: TensorSpec) -> Tensor:
            value = value.detach()
            for axis, dim in enumerate(spec.dims):
                if not isinstance(dim, str):
                    continue
                if value.shape[axis] == 0:
                    value = value.new_zeros([sizes[dim] if k == axis else n for k, n in enumerate(value.shape)])
                elif sizes[dim] != value.shape[axis] or axis == 0:
                    rows = torch.randint(value.shape[axis], (sizes[dim],), generator=generator)
                    value = value.index_select(axis, rows)
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator, dtype=torch.float64) - 0.5
                moved = value * (1 + 0.5 * noise).to(value.dtype)
                return moved if bool(moved.count_nonzero()) else noise.to(value.dtype)
            if limit is not None and value.dtype in (torch.int32, torch.int64):
                return value % max(limit, 1)
            return value

        return [draw(value, spec) for value, spec in zip(self.tensors, self.specs, strict=True)]


def read_example(module: nn.Module, given: Any, dynamic: Dynamic | None = None) -> Example:
    """The example of a module in evaluation mode, which is run to see what it returns and which sizes it takes.

    Args:
        module: the module.
        given: a tuple of arguments, a dict of them by name, or an example that was read before.
        dynamic: argument, such as ``"x"`` or ``"data.positions"``, to axes and names of their sizes.  Arguments that
            it leaves out have a size that may change in their first dimension, if the module takes another one.

    Raises:
        UsageError: the example does not fit ``forward``, or ``dynamic`` does not fit the example.
        UnsupportedModelError: the module fails on its example, or returns what is no tensor.
    """
    if isinstance(given, Example):
        return given
    found, named = parameters(module, given)
    for path, value in named:
        _dense(value, path)
    _constant_weights(module)
    paths, tensors = [path for path, _ in named], tuple(value.detach().clone() for _, value in named)
    names: list[str] = []
    for path in paths:
        name = re.sub(r"\W", "_", path)
        name = f"{name}_" if keyword.iskeyword(name) or not name.isidentifier() else name
        names.append(fresh(name, lambda taken: taken in names))
    dims = _dims(paths, tensors, {} if dynamic is None else dynamic)
    specs = tuple(TensorSpec(n, d, t.dtype) for n, d, t in zip(names, dims, tensors, strict=True))
    results: list[tuple[str, Tensor]] = []
    arguments = Signature(found, {"constant": None}, tuple(paths))
    before = _kept(module)
    try:
        with torch.no_grad(), _Offsets():
            copies = [t.clone() for t in tensors]  # it may write to them
            args, kwargs = arguments.arguments(copies)
            returned = module(*args, **kwargs)
    except FxpassError:
        raise
    except Exception as error:  # the module is foreign code, which may raise anything
        raise UnsupportedModelError(
            f"the module fails on example_inputs: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            where=Location(source=type(module).__qualname__),
            hint="inputs that it takes",
        ) from error
    result = flatten(returned, "result", results)
    for path, value in results:
        _dense(value, path)
    if not results:
        raise UnsupportedModelError("the module returns no tensor", where=Location(source=type(module).__qualname__))
    outputs: list[str] = []
    for path, _ in results:
        outputs.append(fresh(re.sub(r"\W", "_", path), lambda taken: taken in outputs))
    notes = tuple(
        f"the module writes to its argument {path}; the compiled one leaves it as it is"
        for path, value, after in zip(paths, tensors, copies, strict=True)
        if bool(((value != after) & ~(value.isnan() & after.isnan())).any())
    )
    notes += tuple(f"{path} becomes a dict" for path in _replaced(returned, "result"))
    changed = [path for path, value in _kept(module).items() if path not in before or before[path] is not value]
    notes += tuple(f"forward sets {path}, which the compiled module keeps as the example leaves it" for path in changed)
    example = Example(replace(arguments, result=result), specs, tensors, tuple(outputs), notes)
    return _settled(example, module, set(dynamic or {}))


def _dense(value: Tensor, path: str) -> None:
    """Refuse tensors that a program cannot hold."""
    kind = next((kind for kind in ("quantized", "nested", "meta") if getattr(value, f"is_{kind}")), None)
    if kind is not None or value.layout != torch.strided:
        kind = kind or str(value.layout).removeprefix("torch.")
        raise UsageError(
            f"{path} is a {kind} tensor, which a compiled module cannot take or return",
            hint="dense tensors; wrap the module to convert them",
        )


def _constant_weights(module: nn.Module) -> None:
    """Refuse embeddings that write to their weights when they are called."""
    for path, part in module.named_modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.max_norm is not None:
            raise UnsupportedModelError(
                "an embedding with max_norm writes to its weight at each call, and a compiled module has constant ones",
                where=Location(module_path=path or "(model)", source=type(part).__qualname__),
                hint="renormalise its weight once, with torch.renorm, and set max_norm to None",
            )


class _Offsets(TorchFunctionMode):
    """Refuses embedding bags with offsets: wrong ones, which torch does not look at, end the process."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.embedding_bag and (kwargs or {}).get("offsets", args[2:3] or None) is not None:
            raise UnsupportedModelError(
                "an embedding bag has offsets, which cannot be drawn at other sizes to compare on",
                hint="bags as rows of a matrix; padding_idx for those that are shorter",
            )
        return func(*args, **(kwargs or {}))


def _kept(module: nn.Module) -> dict[str, Any]:
    """Attributes of a module and its parts, without weights and parts; compiled code sets its own."""
    own = vars(nn.Module())
    parts = [(path, part) for path, part in module.named_modules() if not isinstance(part, torch.jit.ScriptModule)]
    kept = ((path, name, value) for path, part in parts for name, value in vars(part).items())
    return {f"{path}.{name}".lstrip("."): value for path, name, value in kept if name not in own}


def _replaced(value: Any, path: str) -> Iterator[str]:
    """The dicts of other kinds in a result, which have more than entries perhaps."""
    if isinstance(value, Mapping):
        if type(value) not in (dict, OrderedDict):
            yield f"{path}, a {type(value).__qualname__},"
        for key, item in value.items():
            yield from _replaced(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for k, item in enumerate(value):
            yield from _replaced(item, f"{path}.{k}")


def _dims(paths: Sequence[str], tensors: Sequence[Tensor], dynamic: Dynamic) -> list[tuple[Dim, ...]]:
    """Sizes by name: as ``dynamic`` says, and the first dimension of all other tensors, equal ones by one name."""
    form = '{"argument": {axis: "size"}}'
    if not isinstance(dynamic, Mapping):
        raise UsageError(f"dynamic is a {type(dynamic).__qualname__}", hint=form)
    for path, axes in dynamic.items():
        if path not in paths:
            what = f"dynamic names {path!r}, which is no tensor of the example"
            raise UsageError(what, hint=f"one of {', '.join(paths)}")
        if not isinstance(axes, Mapping):
            raise UsageError(f"dynamic gives a {type(axes).__qualname__} for {path}", hint=form)
        rank = tensors[paths.index(path)].dim()
        for axis, name in axes.items():
            if type(axis) is not int or not 0 <= axis < rank:
                what = f"dynamic names the axis {axis!r} of {path}, which has {rank} dimensions"
                raise UsageError(what, hint="a number from 0")
            if not (isinstance(name, str) and name.isidentifier()) or name == RESERVED:
                hint = f"a name of letters and digits, not {RESERVED!r}"
                raise UsageError(f"dynamic calls a size {name!r}", hint=hint)
    taken = {name for axes in dynamic.values() for name in axes.values()}
    by_extent: dict[int, str] = {}
    for path, axes in dynamic.items():  # an argument beside a named one may well have the same size
        for axis, name in axes.items():
            by_extent.setdefault(tensors[paths.index(path)].shape[axis], name)
    found: list[tuple[Dim, ...]] = []
    for path, value in zip(paths, tensors, strict=True):
        axes = dynamic.get(path, {0: ""} if value.dim() else {})
        shape: list[Dim] = list(value.shape)
        for axis, name in axes.items():
            extent = value.shape[axis]
            if not name:
                first = "batch" not in (*by_extent.values(), *taken)
                name = by_extent.setdefault(extent, "batch" if first else re.sub(r"\W", "_", f"rows_of_{path}"))
            shape[axis] = name
        found.append(tuple(shape))
    extents: dict[str, int] = {}
    for path, dims, value in zip(paths, found, tensors, strict=True):
        for dim, extent in zip(dims, value.shape, strict=True):
            if isinstance(dim, str) and extents.setdefault(dim, extent) != extent:
                raise UsageError(f"the size {dim!r} is {extents[dim]} and, in {path}, {extent}", hint="two names")
    return found


def _settled(example: Example, module: nn.Module, chosen: set[str]) -> Example:
    """The example with those sizes fixed that nobody asked for, and that the module takes no other of."""
    asked = {d for s, p in zip(example.specs, example.signature.paths, strict=True) if p in chosen for d in s.dims}
    fixed: dict[str, int] = {}
    notes = []
    for name, size in example.sizes.items():
        if name in asked:
            continue
        try:
            with torch.no_grad():
                example.call(module, example.drawn({**example.sizes, name: size + 1}, seed=0))
        except Exception as error:  # as above
            fixed[name] = size
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            notes.append(f"the size {name} is fixed at {size}, as the module does not take {size + 1}: {reason}")

    def settled(spec: TensorSpec) -> TensorSpec:
        return replace(spec, dims=tuple(fixed.get(d, d) if isinstance(d, str) else d for d in spec.dims))

    return replace(example, specs=tuple(map(settled, example.specs)), notes=(*example.notes, *notes))
