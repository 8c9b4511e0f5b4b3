"""``trainable``: an optimised model whose parameters are the original's, for fitting energies, forces and stress.

Parameters are inputs of the program and no constants, so nothing is folded into them. The energies, the gradient by
edge vectors and the product of a cotangent with the derivatives of both by every parameter are one graph, traced once;
its ops are the semantic ones, derivatives too, so kernels run them.
"""

from __future__ import annotations

import copy
import inspect
import operator
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from .api import open_model
from .capture.capture import copy_model
from .errors import CaptureError, Location, UnsupportedModelError, UsageError
from .frontends.base import Frontend
from .ir.guards import lower_guards
from .ir.program import Program, TensorSpec, ancestors
from .ir.tracing import Replay, constants_of, trace_program
from .ir.verifier import verify
from .kernels.dispatch import Kernels
from .pipeline import resolve
from .registry import default_registry
from .runner import run
from .structures import probes_of

#: passes that leave parameters what they are: functions of them are computed at every call
ENERGY = (
    "fold-constants,specialize-species,dead-irreps,common-subexpressions,"
    "fuse-contraction{live=true},fuse-convolution,fold-constants,common-subexpressions,dead-code"
)
FORCES = "differentiate,fold-constants,common-subexpressions,dead-code"
CLEAN = "fold-constants,common-subexpressions,dead-code"

#: modules that compute something else in training than in evaluation, torch's and e3nn's, by what their names say
MODAL = ("Dropout", "BatchNorm", "InstanceNorm")

#: whether the caller asked for gradients by what he gave, and not by parameters alone
_BY_INPUTS: ContextVar[bool] = ContextVar("fxpass_by_inputs", default=False)


class Trainable(nn.Module):
    """A model in whose place the optimised program runs; call it as the original, train it as the original.

    Its parameters, their names, ``state_dict`` and ``load_state_dict`` are the original's own: an optimiser that steps
    the one steps the other. The outputs carry the autograd graph that the original's carry in training: a loss on
    energies, forces and stress gives the gradients by all parameters that require them. Tensors that the caller gave
    get a gradient where they required one before the call; the original makes positions require one by itself.

    Attributes:
        original: the model.
        interface: the family's own ``forward`` over the programs.
        energy, forces: the programs; parameters are inputs after the family's own.
        constants: what else of the original's state the programs were made of, by name.
    """

    original: nn.Module
    interface: nn.Module
    energy: Program
    forces: Program
    constants: dict[str, Tensor]

    def __init__(
        self,
        original: nn.Module,
        interface: nn.Module,
        energy: Differentiable,
        forces: Differentiable,
        unused: Collection[str] = (),
    ):
        super().__init__()
        held = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
        self.__dict__.update({name: getattr(original, name) for name in held})  # a parent sees the original's names
        self.__dict__.update(original=original, interface=interface, training=original.training)
        live = {*energy.names, *forces.names, *unused}
        constants = {n: t.detach().clone() for n, t in _fixed(original, live).items()}
        # beside the original's parts, some of which may have these names
        self.__dict__.update(energy=energy.program, forces=forces.program, constants=constants)
        interface.train(original.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's.

        Raises:
            UsageError: what is a constant of the program has changed since it was made: a buffer of the original, or
                a frozen parameter that is no input of the program and changes what it computes.
        """
        self._check()
        given = [*_tensors(args), *_tensors(kwargs.values())]
        bound = inspect.signature(self.interface.forward).bind(*args, **kwargs).arguments
        token = _BY_INPUTS.set(bool(bound.get("compute_hessian")) or any(t.requires_grad for t in given))
        try:
            return self.interface(*map(_own, args), **{name: _own(value) for name, value in kwargs.items()})
        finally:
            _BY_INPUTS.reset(token)

    def __getattr__(self, name: str) -> Any:
        original = self.__dict__.get("original")
        if original is None or name.startswith("__"):  # half a copy, and what classes have
            return super().__getattr__(name)
        return getattr(original, name)

    def train(self, mode: bool = True) -> Trainable:
        """Put the original, and this, in training or evaluation mode."""
        self.original.train(mode)
        self.interface.train(mode)
        self.training = mode
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's state."""
        return self.original.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load parameters into the original; what is a constant of the program must be what it was made of.

        Raises:
            UsageError: a constant differs; nothing was loaded.
        """
        self._check_state(state_dict, "")
        return self.original.load_state_dict(state_dict, *args, **kwargs)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        self._check_state(state_dict, prefix)
        self.original._load_from_state_dict(state_dict, prefix, *args)

    def _check_state(self, state: Mapping[str, Any], prefix: str) -> None:
        for name, constant in self.constants.items():
            if prefix + name in state and not _same(state[prefix + name].to(constant), constant):
                raise UsageError(
                    f"{name} is a constant of this model's programs, and differs from what they were made of",
                    hint="load into the original and make it trainable anew",
                )

    def _check(self) -> None:
        now = dict(_named(self.original))
        for name, constant in self.constants.items():
            found = now.get(name)
            if found is None or found.requires_grad or not _same(found, constant):
                raise UsageError(
                    f"{name} is a constant of this model's programs, and it has changed since they were made, "
                    "or requires a gradient",
                    hint="fxpass.trainable(model) once more",
                )

    def _apply(self, fn: Any, recurse: bool = True) -> Trainable:
        old = next(self.original.parameters())
        new = fn(old.detach())
        if new.dtype != old.dtype or new.device != old.device:
            raise UsageError(
                f"a trainable model of {old.dtype} on {old.device} cannot become one of {new.dtype} on {new.device}",
                hint="convert the original, then fxpass.trainable(model)",
            )
        return self


def trainable(model: nn.Module | str | Path) -> Trainable:
    """An optimised model whose parameters are those of ``model``.

    Args:
        model: of a family that has a frontend, on the CPU, or the path of its checkpoint (then ``.original`` is it).
            It is shared, not copied.

    Raises:
        UsageError, UnsupportedModelError, CaptureError: as for :func:`fxpass.optimize`; also a model that computes
            something else in training (dropout, batch normalisation), one without parameters or with parametrised ones,
            or with a parameter that the program lost.
    """
    model, frontend = open_model(model)
    if not any(p.numel() for p in model.parameters()):
        raise UsageError("this model has no parameters to train", hint="fxpass.optimize(model)")
    for path, module in model.named_modules():
        if any(word in type(module).__name__ for word in MODAL) and getattr(module, "p", True):
            raise UnsupportedModelError(
                f"{type(module).__name__} computes something else in training than in evaluation",
                where=Location(module_path=path),
                hint="train the original",
            )
        if is_parametrized(module):
            raise UnsupportedModelError(
                f"{type(module).__name__} computes its parameters from others",
                where=Location(module_path=path),
                hint="torch.nn.utils.parametrize.remove_parametrizations, and then fxpass.trainable(model)",
            )
    registry = default_registry()
    with torch.inference_mode(False), torch.enable_grad():
        facts = frontend.attributes(model)
        for caveat in frontend.reference(model)[1]:
            warnings.warn(f"fxpass: {caveat}", stacklevel=2)
        captured, names = with_parameters(frontend.capture(model))
        unused = _unused(model, frontend, facts, set(names.values()))
        energy = run(captured, resolve(ENERGY, registry), check=verify).program
        forces = _attached(run(energy, resolve(FORCES, registry), check=verify).program)
        first, second = (Differentiable(each, model, tuple(names.values())) for each in (energy, forces))
        interface = frontend.interface(first, second, {**facts, "assumptions": list(forces.assumptions)})
    return Trainable(model, interface, first, second, unused)


def with_parameters(program: Program) -> tuple[Program, dict[str, str]]:
    """``program`` with its parameters as inputs after the others, and the model's name of each by the input's."""
    program, specs, names = program.copy(), [], {}
    module, inputs = program.graph_module, program.graph.find_nodes(op="placeholder")
    read: dict[str, list[fx.Node]] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        read.setdefault(str(node.target), []).append(node)
    for name, value in list(module.named_parameters(remove_duplicate=False)):
        if name not in read or value.numel() == 0 or not hasattr(value, "origin"):
            continue
        with program.graph.inserting_after(inputs[-1]):
            new = program.graph.placeholder(name)
        new.meta = dict(read[name][0].meta)
        inputs.append(new)
        for old in read[name]:
            old.replace_all_uses_with(new)
            program.graph.erase_node(old)
        delattr(module, name)
        specs.append(TensorSpec(new.name, tuple(value.shape), value.dtype))
        names[new.name] = value.origin
    module.recompile()
    return replace(program, inputs=(*program.inputs, *specs)), names


def _attached(program: Program) -> Program:
    """``program`` with outputs that differentiation has cut from what they are computed from."""
    node = program.graph.output_node()
    cut = torch.ops.aten.detach.default
    node.args = (tuple(n.args[0] if n.target is cut else n for n in node.args[0]),)  # type: ignore[union-attr]
    program.graph_module.recompile()
    return program


def _unused(model: nn.Module, frontend: Frontend, facts: Mapping[str, Any], kept: set[str]) -> list[str]:
    """Parameters that are no inputs of the program, and do not change what the model computes.

    Frozen ones that do are constants: see ``Trainable.constants``.

    Raises:
        CaptureError: one that requires a gradient does.
    """
    replica = copy_model(model).eval()
    lost = [(n, p) for n, p in replica.named_parameters() if n not in kept and p.numel() and p.is_floating_point()]
    if not lost:
        return []
    probes, unused = probes_of(facts), []

    def values() -> list[float]:
        found = [frontend.evaluate(replica, probe) for probe in probes]
        return [v for each in found for v in (each.energy, *each.forces.flatten())]

    def changed(parameter: Tensor, by: float) -> list[float]:
        old = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(by)
            after = values()
            parameter.copy_(old)
        return after

    before = values()
    for name, parameter in lost:
        # by little and by much: it may be a bound that is nowhere met, or rounded
        if all(np.array_equal(before, changed(parameter, by), equal_nan=True) for by in (0.25, -2.0)):
            unused.append(name)
        elif parameter.requires_grad:
            raise CaptureError(
                f"the parameter {name} changes what the model computes, but is no parameter of the captured program",
                hint="requires_grad_(False) for it, if it need not be trained, and then fxpass.trainable(model)",
            )
    return unused


@dataclass(frozen=True)
class _Graphs:
    """A program and the product of cotangents of its outputs with its derivatives, in two parts.

    Attributes:
        forward: inputs -> outputs, and what ``backward`` reads.
        backward: cotangents, and that -> a gradient for each input that needs one.
        outputs: how many of what ``forward`` returns are outputs.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    outputs: int


class Differentiable(nn.Module):
    """A program with parameters as inputs: a list of its outputs, with the graph of their derivatives.

    Args:
        program: its last inputs are parameters.
        model: whose parameters these are, by ``names``.
    """

    def __init__(self, program: Program, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.program, self.names = program, names
        self.of = (model,)  # in a tuple it is no module of this one
        self.plain = _module(program.graph)(program.graph_module)
        self.kernels = Kernels(program.graph_module.buffers())
        self.made: dict[tuple[bool, ...], _Graphs] = {}

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        if not _BY_INPUTS.get():
            inputs = tuple(t.detach() for t in inputs)
        try:
            parameters = [self.of[0].get_parameter(name) for name in self.names]
        except AttributeError as error:
            raise UsageError(
                f"a parameter of this model is gone since its programs were made: {error}",
                hint="fxpass.trainable(model) once more",
            ) from error
        given = (*inputs, *parameters)
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in given):
            with torch.no_grad(), self.kernels:
                return self.plain(*given)
        return list(_Run.apply(self, *given))

    def graphs(self, needs: tuple[bool, ...]) -> _Graphs:
        """The graphs for gradients by the inputs that ``needs`` has true."""
        if needs not in self.made:
            with torch.inference_mode(False), torch.enable_grad():
                try:
                    joint = _joint(self.program, needs)
                except NotImplementedError as error:  # an op that torch differentiates no further
                    raise UnsupportedModelError(
                        f"this model has no gradient by its parameters: {str(error).splitlines()[0]}",
                        hint="the same from ops that torch differentiates twice, in the model",
                    ) from error
                self.made[needs] = _split(joint, len(self.program.outputs), len(needs))
        return self.made[needs]


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, owner: Differentiable, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.owner, ctx.needs = owner, tuple(ctx.needs_input_grad[1:])
        ctx.graphs = owner.graphs(ctx.needs)
        with owner.kernels:
            made = ctx.graphs.forward(*inputs)
        count = ctx.graphs.outputs
        ctx.count = len(inputs)
        ctx.save_for_backward(*inputs, *made[count:])
        return tuple(made[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        inputs, saved = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        if torch.is_grad_enabled():  # the gradients are differentiated too: op by op, to any order
            with ctx.owner.kernels:
                # one input may be made from another: aliases have no history but their own
                aliases = [t.view_as(t) if need else t for t, need in zip(inputs, ctx.needs, strict=True)]
                wanted = [t for t, need in zip(aliases, ctx.needs, strict=True) if need]
                made = ctx.owner.plain(*aliases)
                pairs = [(o, g) for o, g in zip(made, cotangents, strict=True) if o.requires_grad]
                found = torch.autograd.grad(
                    [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True
                )
        else:
            with ctx.owner.kernels:
                found = ctx.graphs.backward(*cotangents, *saved)
        gradients = iter(found)
        return None, *(next(gradients) if need else None for need in ctx.needs)


def _joint(program: Program, needs: Sequence[bool]) -> Program:
    """The outputs of ``program``, and the gradients of their sum with cotangents by the inputs that need one."""
    wanted = [k for k, need in enumerate(needs) if need]
    count = len(program.inputs)
    cotangents = tuple(replace(s, name=f"to_{s.name}") for s in program.outputs)
    gradients = tuple(replace(program.inputs[k], name=f"by_{program.inputs[k].name}") for k in wanted)

    def body(*given: Tensor) -> list[Any]:
        inputs, incoming = given[:count], given[count:]
        values = Replay(program, made_by="trainable").run(*inputs)
        pairs = [(v, c) for v, c in zip(values, incoming, strict=True) if v.requires_grad]
        by = [inputs[k] for k in wanted]
        found: Sequence[Tensor] = [torch.zeros_like(t) for t in by]
        if pairs:  # otherwise no output depends on them
            total, towards = zip(*pairs, strict=True)
            found = torch.autograd.grad(total, by, towards, materialize_grads=True)
        return [*(v.detach() for v in values), *found]

    joint, frozen = trace_program(
        body,
        (*program.inputs, *cotangents),
        (*program.outputs, *gradients),
        constants_of(program),
        stage="forces",
        energy=program.energy,
        differentiable=[program.inputs[k].name for k in wanted],
    )
    if frozen:
        raise CaptureError(f"differentiation by parameters tied a size to a value: {'; '.join(frozen)}")
    return run(_attached(joint), resolve(CLEAN, default_registry()), check=lambda program: None).program


def _split(joint: Program, outputs: int, count: int) -> _Graphs:
    """The graph of a joint program as what is needed for its outputs, and all the rest."""
    graph = joint.graph
    results = graph.output_node().args[0]
    assert isinstance(results, (tuple, list))
    placeholders = graph.find_nodes(op="placeholder")
    first = ancestors(n for n in results[:outputs] if isinstance(n, fx.Node)) | set(placeholders[:count])
    for node in graph.nodes:  # one part of a result is no reason to save all of it
        if node.target is operator.getitem and node.args[0] in first:
            first.add(node)
    saved: dict[fx.Node, None] = {}

    def need(node: fx.Node) -> None:
        if node in first and node.op != "get_attr":
            if _is_tensor(node):
                saved[node] = None
            else:  # sizes are read again
                for operand in node.all_input_nodes:
                    need(operand)

    rest = [n for n in graph.nodes if n not in first and n.op == "call_function"]
    for node in (*(n for call in rest for n in call.all_input_nodes), *results[outputs:]):
        if isinstance(node, fx.Node):
            need(node)
    forward, backward = fx.Graph(), fx.Graph()
    _copy(forward, placeholders[:count], [*results[:outputs], *saved])
    _copy(backward, [*placeholders[count:], *saved], list(results[outputs:]))
    module = joint.graph_module
    return _Graphs(_module(forward)(module), _module(backward)(module), outputs)


def _copy(made: fx.Graph, inputs: Sequence[fx.Node], outputs: Sequence[Any]) -> None:
    """What ``outputs`` are computed with from ``inputs``, in the order in which it stands."""
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = made.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    given = set(inputs)
    wanted = ancestors((n for n in outputs if isinstance(n, fx.Node)), stop=given)
    source = next(n for n in outputs if isinstance(n, fx.Node)).graph
    for node in source.nodes:
        if node in wanted and node not in given:
            copies[node] = made.node_copy(node, copies.__getitem__)
    made.output(fx.map_arg(list(outputs), copies.__getitem__))


def _module(graph: fx.Graph) -> Any:
    """Root module -> a module that runs ``graph`` and returns a list."""

    def make(root: nn.Module) -> fx.GraphModule:
        own = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        returned = own.graph_copy(graph, mapping)
        own.output(list(returned))  # type: ignore[arg-type]
        lower_guards(own)
        return fx.GraphModule(root, own)

    return make


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _is_record(value: Any) -> bool:
    """Whether it holds tensors by name: a dictionary, or a graph of torch_geometric."""
    return hasattr(value, "keys") and hasattr(value, "__getitem__")


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        parts = [value[name] for name in list(value.keys())] if _is_record(value) else [value]
        yield from (part for part in parts if isinstance(part, Tensor))


def _own(value: Any) -> Any:
    """``value`` with tensors that interfaces may ask gradients of, without asking them of the caller's."""
    if _is_record(value):
        made = copy.copy(value)
        for name in list(value.keys()):
            made[name] = _own(value[name])
        return made
    return value.detach() if isinstance(value, Tensor) and not value.requires_grad else value


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_buffers(remove_duplicate=False)
    yield from model.named_parameters()


def _fixed(model: nn.Module, live: Collection[str]) -> dict[str, Tensor]:
    """Buffers, and frozen parameters that are not ``live``: neither inputs of programs nor of no use to them."""
    parameters = {n for n, p in model.named_parameters() if n in live or p.requires_grad}
    return {name: value for name, value in _named(model) if name not in parameters and value.numel()}


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether type, place and values are the same; by value, since writes need leave no trace."""
    if (one.dtype, one.device, one.shape) != (other.dtype, other.device, other.shape):
        return False
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())
