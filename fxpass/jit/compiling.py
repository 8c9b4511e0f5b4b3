"""From marked modules to TorchScript, children first."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.jit.frontend import FrontendError

from ..errors import Location, LoweringError, UnsupportedModuleError, UsageError
from .checks import REFUSALS, check_trace, gist, record, source_of
from .e3nn_parts import mode_of
from .inputs import Inputs, tracing_inputs
from .modes import Mode, get_compile_mode


def compile(
    module: nn.Module,
    n_trace_checks: int = 1,
    script_options: Mapping[str, Any] | None = None,
    trace_options: Mapping[str, Any] | None = None,
    in_place: bool = False,
    recurse: bool = True,
    *,
    check: bool = True,
) -> nn.Module:
    """Compile a module and everything in it to TorchScript, children first, each as its mark says.

    A part without a mark stays Python where its parent is not compiled; a part that is TorchScript already stays as
    it is; a part that is in two places stays one.  Training mode, parameters, buffers and torch's random numbers are
    unchanged by the compilation.

    Args:
        module: what ``compile_mode`` or e3nn marked.
        n_trace_checks: how many inputs a traced module is asked for (``_make_tracing_inputs``); the first is traced,
            all are checked.
        script_options: further arguments of ``torch.jit.script``.
        trace_options: further arguments of ``torch.jit.trace_module``.
        in_place: replace parts within the caller's module, whose parameters are then those of the result; without it
            a copy is compiled.  After an error the module is as it was.
        recurse: False: compile the module itself alone.
        check: compare traces with their modules at other values and sizes too; see ``check_trace``.

    Returns:
        A ``ScriptModule``; an ``nn.Module`` with compiled parts where the module itself has no mark.

    Raises:
        UnsupportedModuleError: a part is marked ``"unsupported"``; it is a ``NotImplementedError``.
        FrozenTraceError: a trace depends on the sizes or values it was recorded with.
        LoweringError: ``torch.jit.script`` refuses a part.
        UsageError: inputs to trace a part with are neither given nor derivable.
    """
    job = _Job(n_trace_checks, dict(script_options or {}), dict(trace_options or {}), recurse, check)
    return job.run(module, in_place)


def script(module: nn.Module, in_place: bool = False, *, check: bool = True) -> torch.jit.ScriptModule:
    """``torch.jit.script`` of a module whose parts are first compiled as their marks say.

    Raises:
        UnsupportedModuleError, FrozenTraceError, LoweringError, UsageError: see :func:`compile`.
    """
    _other_mark(module, "script")
    return _Job(check=check, root="script").run(module, in_place)


def trace(
    module: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | None = None,
    check_inputs: list[Any] | None = None,
    in_place: bool = False,
    *,
    check: bool = True,
) -> torch.jit.ScriptModule:
    """``torch.jit.trace`` of a module whose parts are first compiled as their marks say.

    Args:
        module: any module.
        example_inputs: arguments of ``forward``; by default ``tracing_inputs`` of the module.
        check_inputs: further such arguments, of other sizes for example.
        in_place: see :func:`compile`.
        check: see :func:`compile`.

    Raises:
        UnsupportedModuleError, FrozenTraceError, LoweringError, UsageError: see :func:`compile`.
    """
    first = None if example_inputs is None else {"forward": example_inputs}
    further = [{"forward": each} for each in _listed(check_inputs)]
    return trace_module(module, first, further, in_place, check=check)


def trace_module(
    module: nn.Module,
    inputs: Mapping[str, Any] | None = None,
    check_inputs: list[dict[str, Any]] | None = None,
    in_place: bool = False,
    *,
    check: bool = True,
) -> torch.jit.ScriptModule:
    """``torch.jit.trace_module`` of a module whose parts are first compiled as their marks say.

    Args:
        module: any module.
        inputs: name of a method to its arguments; by default ``tracing_inputs`` of the module.
        check_inputs: further such dicts; without ``inputs`` they come after those of the module.
        in_place: see :func:`compile`.
        check: see :func:`compile`.

    Raises:
        UnsupportedModuleError, FrozenTraceError, LoweringError, UsageError: see :func:`compile`.
    """
    _other_mark(module, "trace")
    given = [_by_method(each) for each in _listed(check_inputs)]
    first = None if inputs is None else _by_method(inputs)
    return _Job(check=check, root="trace", first=first, further=given).run(module, in_place)


@dataclass
class _Job:
    """One compilation: its options, and what it has done so far."""

    n_trace_checks: int = 1
    script_options: dict[str, Any] = field(default_factory=dict)
    trace_options: dict[str, Any] = field(default_factory=dict)
    recurse: bool = True
    check: bool = True
    root: Mode = None  # mode of the outermost module, in place of its own
    first: Inputs | None = None  # inputs of the outermost module, in place of its own
    further: list[Inputs] = field(default_factory=list)
    done: dict[nn.Module, nn.Module] = field(default_factory=dict)
    replaced: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)

    def run(self, module: nn.Module, in_place: bool) -> Any:
        if self.n_trace_checks < 1:
            raise UsageError(f"n_trace_checks is {self.n_trace_checks}: a trace needs an input to be recorded with")
        if not isinstance(module, nn.Module):
            raise UsageError(f"a {type(module).__name__} is no module", hint="an instance of torch.nn.Module")
        for path, part in module.named_modules() if self.recurse else [("", module)]:
            if get_compile_mode(part) == "unsupported":
                raise UnsupportedModuleError(
                    f"{type(part).__name__} does not support TorchScript",
                    where=Location(module_path=path or None),
                    hint="replace it by a module that does, or leave what holds it uncompiled",
                )
        try:
            whole = module if in_place else copy.deepcopy(module)
        except Exception as error:  # such as a tensor in it that is a result of others
            raise UsageError(
                f"{type(module).__name__} cannot be copied: {gist(error)}", hint="in_place=True, on a model made for it"
            ) from error
        complete = False
        try:
            compiled = self.compiled(whole, "", self.root or mode_of(whole))
            complete = True
        finally:
            if not complete:
                for owner, name, part in reversed(self.replaced):
                    setattr(owner, name, part)
        return compiled

    def compiled(self, module: nn.Module, path: str, mode: Mode) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            return module
        if module in self.done:
            return self.done[module]
        if self.recurse:
            for name, child in list(module._modules.items()):  # named_children() leaves out a second name of one child
                if child is not None:
                    inner = self.compiled(child, f"{path}.{name}".lstrip("."), mode_of(child))
                    if inner is not child:
                        self.replaced.append((module, name, child))
                        setattr(module, name, inner)
        result = module
        if mode == "script":
            result = self.scripted(module, path)
        elif mode == "trace":
            result = self.traced(module, path)
        self.done[module] = result
        return result

    def scripted(self, module: nn.Module, path: str) -> torch.jit.ScriptModule:
        if isinstance(module, fx.GraphModule):
            module = _in_torchscript(module)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch.jit.*", DeprecationWarning)
            # torch says so of every GraphModule, for what it keeps beside the code
            warnings.filterwarnings("ignore", ".*instance-level annotations on empty non-base types", UserWarning)
            try:
                return torch.jit.script(module, **self.script_options)
            except (RuntimeError, FrontendError, OSError) as error:  # of its compiler, its parser, and without source
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                raise LoweringError(
                    f"TorchScript refuses {type(module).__name__}: {' '.join(lines[:2])}",
                    where=Location(module_path=path or None),
                    hint="compile_mode('trace') for a module without decisions by data",
                ) from error

    def traced(self, module: nn.Module, path: str) -> torch.jit.ScriptModule:
        own = [] if path else [*([self.first] if self.first else []), *self.further]
        if path or self.first is None:
            own = tracing_inputs(module, self.n_trace_checks, path) + own
        try:
            result, caught = record(module, own[0], self.trace_options)
        except REFUSALS as error:
            raise UsageError(
                f"{type(module).__name__} fails on the inputs it is traced with: {gist(error)}",
                where=Location(module_path=path or None),
                hint="inputs that it takes, from its method _make_tracing_inputs or given to fxpass.jit.trace",
            ) from error
        if self.check:
            check_trace(module, result, own, path, source=source_of(caught))
        for warning in caught:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return result


def _in_torchscript(module: fx.GraphModule) -> fx.GraphModule:
    """Calls that Python and TorchScript spell differently, as TorchScript does: ``tensordot`` and ``permute``."""
    graph = copy.deepcopy(module.graph)
    for node in graph.nodes:
        if isinstance(node.type, str):  # an annotation that was never evaluated; TorchScript takes none for Tensor
            node.type = None
        if node.op == "call_function" and node.target in (torch.tensordot, torch.functional.tensordot):
            dims = node.kwargs.get("dims", node.args[2] if len(node.args) > 2 else 2)
            if not isinstance(dims, int):
                node.args, node.kwargs = (*node.args[:2], tuple(list(axes) for axes in dims)), {}
        elif (
            (node.op, node.target) == ("call_method", "permute")
            and not node.kwargs
            and not isinstance(node.args[-1], (list, tuple))
        ):
            node.args = (node.args[0], list(node.args[1:]))
    result = fx.GraphModule(module, graph)
    for held in ("_parameters", "_buffers"):  # those too that the code does not use
        setattr(result, held, dict(getattr(module, held)))
    return result


def _other_mark(module: nn.Module, wanted: str) -> None:
    mark = mode_of(module)
    if mark not in (wanted, "unsupported", None) and not isinstance(module, fx.GraphModule):
        name = type(module).__name__
        warnings.warn(f"{name} is marked compile_mode({mark!r}), and asked to {wanted}", stacklevel=3)


def _listed(check_inputs: Any) -> list[Any]:
    if not isinstance(check_inputs, (list, tuple, NoneType)):
        raise UsageError(f"check_inputs is a {type(check_inputs).__name__}", hint="a list of inputs")
    return list(check_inputs or ())


def _by_method(inputs: Any) -> Inputs:
    if not isinstance(inputs, Mapping):
        raise UsageError(f"inputs are a {type(inputs).__name__}", hint="a dict from names of methods to arguments")
    return {name: _arguments(args) for name, args in inputs.items()}


def _arguments(args: Any) -> tuple[Any, ...]:
    return args if isinstance(args, tuple) else tuple(args) if isinstance(args, list) else (args,)
