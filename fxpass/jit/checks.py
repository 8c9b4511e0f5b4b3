"""Whether a trace computes what the module computes, on more than the inputs it was recorded with.

A trace is a straight line: a size that Python code made an ``int`` of, a branch it took, a result that came from a
kernel the tracer does not see, are constants in it.  So it is run on other values, and with 0, 1 and more rows, and
compared with the module, which is the judge: what the module itself does not take is no test.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import TracerWarning  # type: ignore[attr-defined]  # public, but torch does not say so

from ..errors import FrozenTraceError, Location, UsageError
from ..verify.tolerances import ROUNDING
from .inputs import Inputs, map_tensors, tensors, unchanged

#: what a module may raise of inputs that it does not take
REFUSALS = Exception
#: a module is a chain of roundings
CHAIN = 10.0


@dataclass(frozen=True)
class Fault:
    """How a trace differs from its module."""

    method: str
    args: tuple[Any, ...]
    text: str


def check_trace(
    module: nn.Module, traced: torch.jit.ScriptModule, inputs: Sequence[Inputs], path: str = "", *, source: str = ""
) -> None:
    """Run a trace and its module on all inputs, on other values, and on other numbers of rows.

    Tensors of one leading size are resized together, to 0, 1 and 3 more rows, by leaving out or repeating rows.
    On the inputs themselves derivatives are compared too.  Neither the module's buffers nor torch's random numbers
    change.

    Args:
        module: what was traced.
        traced: its trace.
        inputs: the first are those it was traced with.
        path: of the module in its model, for the error.
        source: where the tracer warned of a constant, for the error.

    Raises:
        FrozenTraceError: they differ; it names the innermost module whose own trace does.
        UsageError: the module does not take the inputs.
    """
    try:
        fault = _fault(module, traced, inputs)
    except REFUSALS as error:
        raise UsageError(
            f"{type(module).__name__} fails on the inputs its trace is checked with: {gist(error)}",
            where=Location(module_path=path or None),
        ) from error
    if fault is None:
        return
    inner = (
        _innermost(module, inputs[0], fault, path, source)
        if fault.method == "forward" and "forward" in inputs[0]
        else None
    )
    name, place, source = inner or (type(module).__name__, path, source)
    raise FrozenTraceError(
        f"the trace of {name} holds for the traced inputs alone: {fault.text}",
        where=Location(module_path=place or None, source=source or None),
        hint="mark the class compile_mode('script'), take sizes from x.shape without int() or len(), "
        "x.detach() in place of torch.no_grad(), and register kernels as torch.library ops",
    )


def record(module: nn.Module, inputs: Inputs, options: Mapping[str, Any]) -> tuple[torch.jit.ScriptModule, list[Any]]:
    """Trace a module; also what the tracer warned of."""
    with warnings.catch_warnings(record=True) as caught, unchanged(module):
        warnings.simplefilter("always")
        copies = {method: map_tensors(_copy, args) for method, args in inputs.items()}  # it may write to them
        traced = torch.jit.trace_module(module, copies, **{"check_trace": False, **options})
    return traced, [w for w in caught if issubclass(w.category, TracerWarning)]


def source_of(caught: Sequence[Any]) -> str:
    """``file:line`` of the first warning of the tracer."""
    return next((f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in caught), "")


def gist(error: BaseException) -> str:
    """One line of an error: its first one, or what TorchScript says at the end of its own traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in reversed(lines) if line.startswith("RuntimeError: ")), lines[0])


def _fault(module: nn.Module, traced: torch.jit.ScriptModule, inputs: Sequence[Inputs]) -> Fault | None:
    for each in inputs:
        for method, args in each.items():
            for label, varied, given in _variations(args):
                if text := _difference(module, traced, method, varied, given):
                    return Fault(method, varied, f"{label} {text}")
    return None


def _variations(args: tuple[Any, ...]) -> Iterator[tuple[str, tuple[Any, ...], bool]]:
    """What is varied, the arguments, and whether they are as given."""
    generator = torch.Generator().manual_seed(0)

    def moved(x: Tensor) -> Tensor:
        if not x.is_floating_point() or not x.numel():
            return x.roll(1, 0) if x.dim() else x  # indices stay such
        scale = float(x.detach().abs().mean()) or 1.0
        noise = torch.randn(x.shape, generator=generator).to(x)
        return (x.detach() + 0.1 * scale * noise).requires_grad_(x.requires_grad)

    values = map_tensors(moved, args)
    rows = dict.fromkeys(x.shape[0] for x in tensors(args) if x.dim())
    yield f"on inputs of {_rows(rows)}", args, True
    yield f"with other values of {_rows(rows)}", values, False
    for old in rows:
        for new in (old + 3, 1, 0):
            if old and new != old:
                resized = map_tensors(partial(_resized, old, new), values)
                if not new and any(_is_index(x) and x.is_cuda and x.numel() for x in tensors(resized)):
                    continue  # an index of nothing, after which the device is lost
                yield f"with {_rows([new])} in place of {old}", resized, False


def _rows(sizes: Any) -> str:
    text = " and ".join(map(str, sizes))
    return f"{text} row{'' if text == '1' else 's'}" if text else "no rows"


def _resized(old: int, new: int, x: Tensor) -> Tensor:
    """Other rows of a tensor that has ``old`` ones: its first ones, or repeated from the first again.

    Indices, which may be of those rows, are folded into what is left: not every kernel looks at their range.
    """
    if 0 < new < old and _is_index(x):
        x = x % new
    if not x.dim() or x.shape[0] != old:
        return x
    return x.detach()[torch.arange(new, device=x.device) % old].requires_grad_(x.requires_grad)


def _is_index(x: Tensor) -> bool:
    return x.dtype in (torch.int32, torch.int64)


def _difference(
    module: nn.Module, traced: torch.jit.ScriptModule, method: str, args: tuple[Any, ...], given: bool
) -> str:
    """How the results differ, in words; empty where they agree or the module does not take the arguments."""
    try:
        expected = _called(module, method, args)
    except REFUSALS:
        if given:
            raise
        return ""
    try:
        found = _called(traced, method, args)
    except REFUSALS as error:
        return f"it fails: {gist(error)}"
    if len(found) != len(expected):
        return f"it returns {len(found)} tensors, not {len(expected)}"
    for a, b in zip(found, expected, strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"it returns {a.dtype} {list(a.shape)}, not {b.dtype} {list(b.shape)}"
        distance, limit = _distance(a, b), _limit(b.dtype)
        if not distance <= limit:
            return f"it is off by {distance:.2g} of the largest element ({limit:.0e} allowed)"
    return _slope(module, traced, method, args) if given else ""


def _slope(module: nn.Module, traced: torch.jit.ScriptModule, method: str, args: tuple[Any, ...]) -> str:
    """How the derivatives differ, in words; empty where they agree or the module has none."""
    try:
        expected = _derivatives(module, module, method, args)
    except REFUSALS:
        return ""
    try:
        found = _derivatives(traced, module, method, args)
    except REFUSALS as error:
        return f"its derivative fails: {gist(error)}"
    distance, limit = _distance(found, expected), max(map(_limit, {x.dtype for x in (*tensors(args), *_free(module))}))
    return "" if distance <= limit else f"its derivative is off by {distance:.2g} of the largest element"


def _limit(dtype: torch.dtype) -> float:
    real = dtype.to_real() if dtype.is_complex else dtype
    return CHAIN * ROUNDING.get(real, 0.0)


def _free(module: nn.Module) -> list[Tensor]:
    return [x for x in module.parameters() if x.requires_grad and x.is_floating_point()]


def _derivatives(module: nn.Module, holder: nn.Module, method: str, args: tuple[Any, ...]) -> Tensor:
    """Of weighted sums of the results by all arguments and by the parameters of the holder, one after another."""
    with unchanged(module, seed=0), torch.enable_grad():
        leaves = _free(holder)

        def leaf(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x.clone()
            leaves.append(x.detach().clone().requires_grad_())
            return leaves[-1].clone()  # which may be written to

        results = [y for y in tensors(_call(module, method, map_tensors(leaf, args))) if y.requires_grad]
        weights = [torch.linspace(0.5, 1.5, y.numel()).reshape(y.shape).to(y) for y in results]
        grads = torch.autograd.grad(results, leaves, weights, allow_unused=True) if results else [None] * len(leaves)
        flat = [(torch.zeros_like(x) if g is None else g).flatten() for x, g in zip(leaves, grads, strict=True)]
        return torch.cat(flat) if flat else torch.zeros(0)


def _called(module: nn.Module, method: str, args: tuple[Any, ...]) -> list[Tensor]:
    """Results of a call on copies of the arguments, always with the same random numbers."""
    with unchanged(module, seed=0), torch.enable_grad():  # a module may differentiate within
        found = _call(module, method, map_tensors(_copy, args))
    return [x.detach().clone() for x in tensors(found)]


def _call(module: nn.Module, method: str, args: tuple[Any, ...]) -> Any:
    return (module if method == "forward" else getattr(module, method))(*args)  # hooks are part of the former


def _copy(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)


def _distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest element; equal infinities and NaNs do not differ."""
    if not expected.is_floating_point() and not expected.is_complex():
        return 0.0 if torch.equal(found, expected) else math.inf
    same = (found == expected) | (found.isnan() & expected.isnan())
    if bool(same.all()):
        return 0.0
    finite = expected[expected.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    error = float((found - expected).abs()[~same].max()) / (scale or 1.0)
    return math.inf if math.isnan(error) else error


def _innermost(module: nn.Module, inputs: Inputs, fault: Fault, path: str, source: str) -> tuple[str, str, str] | None:
    """Class, path and source of the innermost module within that, traced by itself, shows a fault too."""
    at, other = _arguments(module, inputs["forward"]), _arguments(module, fault.args)
    for inner, child in reversed(list(module.named_modules())):  # children come after their parents
        if child is module or child not in at or child not in other:
            continue
        try:
            traced, caught = record(child, {"forward": at[child]}, {})
        except REFUSALS:  # what cannot be traced by itself is not what is looked for
            continue
        args = other[child]
        if _difference(child, traced, "forward", args, False) or _slope(child, traced, "forward", args):
            return type(child).__name__, ".".join(filter(None, (path, inner))), source_of(caught) or source
    return None


def _arguments(module: nn.Module, args: tuple[Any, ...]) -> dict[nn.Module, tuple[Any, ...]]:
    """What each module within gets at its first call, when called by position with tensors."""
    seen: dict[nn.Module, tuple[Any, ...]] = {}

    def note(child: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not named and all(isinstance(x, Tensor) for x in given):
            seen.setdefault(child, map_tensors(_copy, given))

    handles = [
        child.register_forward_pre_hook(note, with_kwargs=True)
        for child in module.modules()
        if not isinstance(child, torch.jit.ScriptModule)
    ]
    try:
        _called(module, "forward", args)
    finally:
        for handle in handles:
            handle.remove()
    return seen
