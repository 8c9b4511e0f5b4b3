"""Every private import of torch that fxpass makes, and the imports that need care.

Tried with torch 2.13.0.  ``tests/test_torch_compat.py`` checks each of them; a torch release that
moves one of them fails there and nowhere else.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, cast

import numpy as np
import sympy
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes

#: the type of ``torch.ops.aten.add.Tensor`` and its like
OpOverload = torch._ops.OpOverload

TESTED_TORCH = ("2.13.0",)
TESTED_E3NN = ("0.4.4", "0.6")



@cache
def o3() -> ModuleType:
    """``e3nn.o3``, imported so that e3nn 0.4.4 works with torch >= 2.6.

    e3nn 0.4.4 unpickles its constants file, which holds ``slice`` objects; torch >= 2.6 refuses
    them unless they are allowed, so they are, for the time of this import.
    """
    # a first import inside a trace would leave e3nn's tables fake for ever
    with torch.serialization.safe_globals([slice]), torch._C.DisableTorchFunction(), disable_current_modes():
        import e3nn.o3 as module

    return module


def wigner_3j(l1: int, l2: int, l3: int) -> np.ndarray:
    """``e3nn.o3.wigner_3j`` in float64, also when called inside a trace."""
    with torch._C.DisableTorchFunction(), disable_current_modes():
        return np.array(o3().wigner_3j(l1, l2, l3, dtype=torch.float64).tolist())


def fake_inputs(
    specs: Sequence[tuple[str, Sequence[int | str], torch.dtype]], sizes: dict[str, int]
) -> tuple[FakeTensor, ...]:
    """Fake tensors with symbolic sizes for (name, dims, dtype) specs.

    Every named size is one symbol, shared by all inputs that carry it; integer dims are static.
    ``sizes`` are the hints; nothing is deduced from equal hints (no duck shaping), and sizes may be 0
    or 1 (no 0/1 specialisation).
    """
    env = ShapeEnv(duck_shape=False, specialize_zero_one=False)
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    symbols = {}
    for name, size in sizes.items():
        probe = mode.from_tensor(
            torch.empty(size),
            source=ConstantSource(name),
            symbolic_context=StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC]),
        )
        symbols[name] = probe.shape[0]

    def extent(dim: int | str) -> Any:
        if isinstance(dim, int):
            return dim
        base, _, add = dim.partition("+")
        return symbols[base] + int(add or 0)

    with mode:
        shaped = (torch.empty([extent(d) for d in dims], dtype=dtype) for _, dims, dtype in specs)
        return tuple(cast(FakeTensor, value) for value in shaped)


def trace(function: Callable[..., Any], inputs: Sequence[FakeTensor], *, stacks: bool) -> fx.GraphModule:
    """Trace ``function`` on fake inputs to an ATen graph with symbolic sizes.

    With ``stacks`` every node records the Python stack of its call, at twice the cost.  Metadata set by
    ``torch.fx.traceback.annotate`` survives in ``node.meta["custom"]``.  Einsum is
    kept from picking a contraction order by the traced sizes, and gradient mode, flags and modes are
    left as they were.
    """
    with (
        inputs[0].fake_mode,
        torch.backends.opt_einsum.flags(enabled=False),
        fx.traceback.preserve_node_meta(),
        torch.autograd.set_multithreading_enabled(False),
    ):
        return make_fx(
            function,
            decomposition_table={torch.ops.aten.silu_backward.default: _silu_backward},
            tracing_mode="real",
            record_stack_traces=stacks,
            _allow_non_fake_inputs=True,
        )(*inputs)


def _silu_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """grad * d silu / dx in ops that have derivatives themselves; ``aten::silu_backward`` has none.

    Of 16-bit types it is computed in float32 and rounded once, as ``aten::silu_backward`` does.
    """
    if grad.dtype.itemsize == 2:
        return _silu_backward(grad.to(torch.float32), x.to(torch.float32)).to(grad.dtype)
    s = torch.sigmoid(x)
    return grad * (s * (1 + x * (1 - s)))


def frozen_sizes(inputs: Sequence[FakeTensor]) -> tuple[str, ...]:
    """Conditions of a trace that tie a symbolic size to a number or to another size."""
    env = inputs[0].fake_mode.shape_env
    assert env is not None
    ties = [f"{symbol} = {value}" for symbol, value in env.replacements.items()]
    return tuple(ties + [str(g.expr) for g in env.guards if isinstance(g.expr, sympy.Eq)])


def size_conditions(inputs: Sequence[FakeTensor]) -> tuple[sympy.Basic, ...]:
    """Conditions on symbolic sizes, other than ties, under which a trace is what the traced function does."""
    env = inputs[0].fake_mode.shape_env
    assert env is not None
    return tuple(g.expr for g in env.guards if not isinstance(g.expr, sympy.Eq))


def size_expr(size: int | torch.SymInt) -> sympy.Expr:
    """A size as a sympy expression in the symbols of its trace."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def compile_in_regions(
    module: fx.GraphModule, guard: OpOverload, regions: Callable[[fx.Graph], Mapping[fx.Node, str]]
) -> Callable[..., Any]:
    """``torch.compile`` with dynamic sizes, in which no kernel computes nodes of two regions, or of one and of none.

    Both ways in which Inductor fuses are closed: a value that passes a guard is stored, not computed again inside
    its readers, and the scheduler joins two kernels only where they belong to one region.  Guards take part in the
    key of Inductor's cache, as they are in the graph; they leave it here and cost nothing at run time.

    Args:
        module: a graph with calls of ``guard``.
        guard: an op whose first argument is its value.
        regions: the region of each node of a graph that is in one; it is asked about the graph that Inductor lowers.
    """
    # imported here: Inductor takes seconds to import, and only those who compile need it
    from torch._inductor.choices import InductorChoices
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from torch._inductor.virtualized import V

    def stored(x: Any) -> Any:
        x.realize()
        return x

    stored._inductor_lowering_function = True  # type: ignore[attr-defined]  # Inductor calls it as it is

    class Tag(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            for node, region in regions(graph).items():
                node.meta[REGION] = region
            for node in graph.find_nodes(op="call_function", target=guard):
                node.target, node.args = stored, node.args[:1]

        def uuid(self) -> str:
            return "fxpass regions 1"

    class Choices(InductorChoices):
        @staticmethod
        def can_fuse(scheduler: Any, node1: Any, node2: Any, shared_data_score: int) -> bool:
            one_region = kernel_regions(node1) == kernel_regions(node2)
            return one_region and InductorChoices.can_fuse(scheduler, node1, node2, shared_data_score)

    def inner(*args: Any, **kwargs: Any) -> Any:  # a backward graph is compiled later, through this as well
        with V.set_choices_handler(Choices()):
            return compile_fx_inner(*args, **kwargs)

    def backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return compile_fx(graph, inputs, inner, config_patches={"post_grad_custom_post_pass": Tag()})

    return torch.compile(module, backend=backend, dynamic=True, fullgraph=True)


REGION = "fxpass_region"


def kernel_regions(kernel: Any) -> frozenset[str]:
    """The regions of the graph nodes that one kernel of Inductor's scheduler computes."""
    buffers = (part.node for part in kernel.get_nodes() if part.node is not None)
    return frozenset(n.meta[REGION] for buffer in buffers for n in buffer.get_origins() if REGION in n.meta)


@contextmanager
def watched_kernels() -> Iterator[list[tuple[frozenset[str], tuple[str, ...]]]]:
    """While open, a list that gets, for every kernel that Inductor makes, its regions and the graph nodes in it.

    Inductor's caches are off meanwhile, so that every graph is really compiled.
    """
    from torch._inductor import config

    seen: list[tuple[frozenset[str], tuple[str, ...]]] = []

    def look(kernels: list[Any]) -> list[Any]:
        for kernel in kernels:
            buffers = (part.node for part in kernel.get_nodes() if part.node is not None)
            nodes = dict.fromkeys(n.name for buffer in buffers for n in buffer.get_origins())
            seen.append((kernel_regions(kernel), tuple(nodes)))
        return kernels

    with config.patch({"_post_fusion_custom_pass": look, "force_disable_caches": True}):
        yield seen


def registered_kernels(op: OpOverload) -> tuple[str, ...]:
    """The dispatch keys, among those that compute, for which an op has an implementation of its own."""
    keys = ("CPU", "CUDA", "XPU", "MPS", "CompositeExplicitAutograd", "CompositeImplicitAutograd")
    return tuple(key for key in keys if torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key))


def fallback_kernel(op: OpOverload, kind: str = "CompositeExplicitAutograd") -> Callable[..., Any] | None:
    """The implementation of ``kind`` for all devices that have none of their own.

    None where the CPU has none of its own, so that its implementation is this one, or where every device has.
    """
    known = registered_kernels(op)
    elsewhere = next((key for key in ("CUDA", "XPU", "MPS") if key not in known), None)
    if elsewhere is None or not {"CPU", kind} <= set(known):
        return None
    kernel = torch.library.get_kernel(op, elsewhere)

    def run(*args: Any, **kwargs: Any) -> Any:
        tensor = next(x for x in args if isinstance(x, torch.Tensor))
        return kernel.call_boxed(torch._C._dispatch_keys(tensor), *args, **kwargs)

    return run


def mark_dynamic(value: torch.Tensor, axis: int) -> None:
    """Tell torch.compile that this size changes from call to call."""
    torch._dynamo.mark_dynamic(value, axis)


def aot_compile(
    module: torch.nn.Module, examples: Sequence[torch.Tensor], dynamic: Sequence[Mapping[int, str]]
) -> Callable[..., list[torch.Tensor]]:
    """``module`` compiled ahead of time by AOTInductor and loaded.

    Args:
        module: takes tensors and returns a list of tensors.
        examples: its inputs, of sizes of two or more where they are dynamic.
        dynamic: for each input its dynamic axes and the names of their sizes.
    """
    names = dict.fromkeys(name for axes in dynamic for name in axes.values())
    sizes = {name: torch.export.Dim(name, min=2) for name in names}
    shapes = [{axis: sizes[name] for axis, name in axes.items()} for axes in dynamic]
    exported = torch.export.export(module, tuple(examples), dynamic_shapes=tuple(shapes))
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(exported, package_path=f"{folder}/model.pt2")
        return cast(Callable[..., list[torch.Tensor]], torch._inductor.aoti_load_package(path))


def load_pickle(path: str) -> Any:
    """Unpickle a checkpoint on the CPU.  This runs code that the file names; only load what you trust."""
    o3()
    return torch.load(path, map_location="cpu", weights_only=False)


def pickle_names(path: str, text: str) -> bool:
    """Whether a torch checkpoint mentions ``text``, e.g. a module name; nothing is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("data.pkl")]
            return any(text.encode() in archive.read(name) for name in names)
    except zipfile.BadZipFile:
        return False
