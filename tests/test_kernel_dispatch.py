"""Kernels behind the ops: called op by op, compiled and exported, for any size, with derivatives; off by default."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fxpass
from fxpass._torch_compat import mark_dynamic
from fxpass.algebra.contraction import Contraction
from fxpass.algebra.multilinear import Linear, LinearPath, TensorProduct
from fxpass.algebra.multilinear import Path as TensorPath
from fxpass.algebra.piecewise import Grid
from fxpass.algebra.spherical import spherical_harmonics
from fxpass.errors import KernelError, UsageError
from fxpass.ir import ops
from fxpass.ir.contraction import contraction
from fxpass.ir.convolution import convolution, rows_by
from fxpass.ir.program import Program
from fxpass.kernels import dispatch
from fxpass.kernels.dispatch import Kernels
from fxpass.models import small_potential
from fxpass.structures import probe_structures
from fxpass.targets.base import executable
from fxpass.targets.inductor_kernels import CompiledKernels
from fxpass.testing import example_inputs
from fxpass_passes.common_subexpressions import CommonSubexpressions
from fxpass_passes.dead_code import DeadCode
from fxpass_passes.differentiate import Differentiate
from fxpass_passes.fuse_convolution import FuseConvolution
from test_fuse_convolution import program as layers

pytestmark = pytest.mark.once

F64 = torch.float64
GRID = Grid(5, 0.0, 3.0, 8, flat=True)
PRODUCT = TensorProduct(
    "4x0e+4x1o",
    "1x0e+1x1o",
    "4x0e+4x1o",
    (TensorPath(0, 0, 0, "uvu", 0, 1.0), TensorPath(0, 1, 1, "uvu", 4, 0.7), TensorPath(1, 1, 0, "uvu", 8, 0.4)),
    12,
    False,
)
LINEAR = Linear("4x0e+4x1o", "4x0e+4x1o", (LinearPath(0, 0, 0, 0.5), LinearPath(1, 1, 16, 0.5)), 32, True)
TERMS = (((), 0), ((0,), 0), ((0, 0), 0), ((1, 1), 0), ((2, 3), 0))
CONTRACTION = Contraction(4, TERMS, "1x0e+1x1o", "1x0e")
HARMONICS, NUMBERS = spherical_harmonics((0, 1), "component", -1)
TEXTS = (str(PRODUCT), str(GRID))
LINEAR_TEXT, CONTRACTION_TEXT, HARMONICS_TEXT = str(LINEAR), str(CONTRACTION), str(HARMONICS)


class Layer(torch.nn.Module):
    """A convolution, a linear map and a contraction: energy of (features, edge vectors, species, edge index)."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name, shape in (("table", (6, GRID.rows, 12)), ("weight", (32,)), ("terms", (3, len(TERMS), 4))):
            self.register_buffer(name, torch.randn(shape, dtype=F64, generator=generator))
        self.register_buffer("harmonics", torch.tensor(NUMBERS).unsqueeze(1))

    def forward(self, x: Tensor, vectors: Tensor, species: Tensor, index: Tensor) -> Tensor:
        fx = torch.ops.fxpass
        atoms, (sender, receiver) = x.shape[0], index.unbind()
        y = fx.polynomial(vectors.unsqueeze(1), [], None, None, self.harmonics, HARMONICS_TEXT, "out").squeeze(1)
        r, order = vectors.norm(dim=1), fx.rows_by(receiver, atoms)
        m = fx.convolution(x, y, r, None, self.table, sender, receiver, order, atoms, *TEXTS)
        m = fx.linear(m, self.weight, None, LINEAR_TEXT, "out")
        scalars, rest = m[:, :4].unsqueeze(2), m[:, 4:].view(-1, 4, 3)
        joined = torch.cat([scalars, rest], 2).contiguous()
        return fx.contraction(joined, species, self.terms, CONTRACTION_TEXT).sum()


def inputs(atoms: int, edges: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(atoms)
    x, vectors = (torch.randn(shape, dtype=F64, generator=generator) for shape in ((atoms, 16), (edges, 3)))
    species = torch.randint(0, 3, (atoms,), generator=generator)
    return x, vectors, species, torch.randint(0, atoms, (2, edges), generator=generator)


SIZES = ((7, 30), (11, 50), (5, 2), (2, 0), (1, 0), (1, 4))


@pytest.mark.parametrize("atoms, edges", SIZES)
def test_op_by_op(atoms: int, edges: int) -> None:
    layer, given = Layer(), inputs(atoms, edges)
    expected = layer(*given)
    with Kernels() as kernels:
        found = layer(*given)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert len(kernels.calls) == 5 and not kernels.fallbacks, "rows_by, polynomial, convolution, linear, contraction"
    assert kernels.sources.keys() == kernels.calls.keys()


def test_off_by_default_and_after_the_block() -> None:
    layer, given = Layer(), inputs(7, 30)
    before, kernels = layer(*given), Kernels()
    with kernels, Kernels() as inner:
        layer(*given)
    assert not kernels.calls and inner.calls, "the innermost block counts"
    count = inner.calls.total()
    assert torch.equal(layer(*given), before) and inner.calls.total() == count


def test_another_thread_keeps_its_references() -> None:
    layer, given, found = Layer(), inputs(7, 30), []
    expected = layer(*given)
    with Kernels() as kernels:
        thread = threading.Thread(target=lambda: found.append(layer(*given)))
        thread.start()
        thread.join()
    assert not kernels.calls and torch.equal(found[0], expected)


def test_first_and_second_derivatives() -> None:
    layer, (x, vectors, *rest) = Layer(), inputs(4, 6)
    x.requires_grad_()
    vectors.requires_grad_()
    energy: Callable[..., Tensor] = lambda x, v: layer(x, v, *rest)  # noqa: E731
    by_reference = [torch.autograd.grad(energy(x, vectors), (x, vectors))]
    with Kernels() as kernels:
        by_reference.append(torch.autograd.grad(energy(x, vectors), (x, vectors)))
        assert len(kernels.calls) == 9, "and the gradients of the four"
        assert torch.autograd.gradcheck(energy, (x, vectors))
        assert torch.autograd.gradgradcheck(energy, (x, vectors))
    for expected, found in zip(*by_reference, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("constant", [False, True])
def test_constants_are_read_once_and_others_at_each_call(constant: bool) -> None:
    layer, given = Layer(), inputs(7, 30)
    with Kernels(layer.buffers() if constant else ()):
        before = layer(*given)
        for buffer in layer.buffers():
            buffer.mul_(2)
        after = layer(*given)
    if not constant:
        torch.testing.assert_close(after, layer(*given), rtol=1e-12, atol=1e-12)
        assert not torch.equal(before, after)


def test_what_is_kept_is_bounded() -> None:
    layer, given = Layer(), inputs(7, 30)
    with Kernels(limit=2) as kernels:
        expected = [layer(*given) for _ in range(2)]
    assert torch.equal(*expected) and len(kernels._kept) == 2
    assert kernels.calls.total() == 10


def marked(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    for tensor, axis in zip(given, (0, 0, 0, 1), strict=True):
        mark_dynamic(tensor, axis)
    return given


def agrees_with_references(found: Tensor, atoms: int, edges: int) -> None:
    torch.testing.assert_close(found, Layer()(*inputs(atoms, edges)), rtol=1e-12, atol=1e-12)


def test_compiled_for_all_sizes() -> None:
    run, kernels = torch.compile(Layer(), dynamic=True, fullgraph=True), Kernels()
    with kernels:
        run(*marked(inputs(*SIZES[0])))
    with torch.compiler.set_stance("fail_on_recompile"):  # neither a size nor the block is part of what is compiled
        for n, sizes in enumerate(SIZES[:3]):
            with kernels:
                found = run(*marked(inputs(*sizes)))
            assert kernels.calls.total() == 5 * (n + 2) and not kernels.fallbacks
            agrees_with_references(found, *sizes)
            agrees_with_references(run(*marked(inputs(*sizes))), *sizes)
        assert kernels.calls.total() == 20


def test_compiled_gradient() -> None:
    layer, (x, vectors, *rest) = Layer(), inputs(7, 30)
    run = torch.compile(layer, dynamic=True, fullgraph=True)
    found = []
    for function, kernels in ((run, Kernels()), (layer, None)):
        given = x.clone().requires_grad_(), vectors.clone().requires_grad_()
        with kernels or nullcontext():
            found.append(torch.autograd.grad(function(*given, *rest), given))
        if kernels:
            assert len(kernels.calls) == 9 and not kernels.fallbacks
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_exported_for_all_sizes() -> None:
    atoms, edges = torch.export.Dim("atoms"), torch.export.Dim("edges")
    sizes = ({0: atoms}, {0: edges}, {0: atoms}, {1: edges})
    exported = torch.export.export(Layer(), inputs(7, 30), dynamic_shapes=sizes)
    assert {n.target for n in exported.graph.nodes} >= {convolution, contraction, rows_by, ops.linear, ops.polynomial}
    run = exported.module()
    for sizes in SIZES:
        with Kernels() as kernels:
            found = run(*inputs(*sizes))
        assert kernels.calls.total() == 5 and not kernels.fallbacks
        agrees_with_references(found, *sizes)


def forces() -> Program:
    """Two convolutions and their gradients, as ``fuse-convolution`` leaves them."""
    given = Differentiate().apply(layers("species")).program
    for pass_ in (CommonSubexpressions(), FuseConvolution(), DeadCode()):
        given = pass_.apply(given.copy()).program
    return given


def test_a_program_keeps_its_fused_ops() -> None:
    given = forces()
    run = executable(given)
    exported = torch.export.export(run, example_inputs(given, {"atoms": 7, "edges": 19, "graphs": 2}))
    for module in (run, exported.module()):
        args = example_inputs(given, {"atoms": 7, "edges": 19, "graphs": 2})
        with torch.no_grad(), Kernels(module.buffers()) as kernels:
            found = module(*args)
        assert {name[:11] for name in kernels.calls} == {"rows_by", "convolution"} and kernels.calls.total() == 6
        for ours, theirs in zip(found, run(*args), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# --- where the references run


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "find_compiler", lambda **_: None)
    layer, given = Layer(), inputs(7, 30)
    expected = layer(*given)
    with Kernels() as kernels:
        assert torch.equal(layer(*given), expected)
    assert not kernels.calls and {reason for _, reason in kernels.fallbacks} == {dispatch.NO_COMPILER}
    assert kernels.fallbacks["convolution", dispatch.NO_COMPILER] == 1


def test_a_kernel_that_does_not_build(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*args: object) -> None:
        raise KernelError("the disk is full")

    kernels, layer, given = Kernels(), Layer(), inputs(7, 30)
    expected = layer(*given)
    monkeypatch.setattr(dispatch, "build", build)
    with kernels:
        assert torch.equal(layer(*given), expected)
    assert kernels.fallbacks["linear", "the disk is full"] == 1


def test_what_has_no_kernel_runs_as_its_reference() -> None:
    x, weight = torch.randn(3, 16, dtype=torch.bfloat16), torch.randn(32, dtype=torch.bfloat16)
    expected = ops.linear(x, weight, None, str(LINEAR), "out")
    with Kernels() as kernels:
        assert torch.equal(ops.linear(x, weight, None, str(LINEAR), "out"), expected)
    assert [op for op, _ in kernels.fallbacks] == ["linear"] and not kernels.calls


def call(change: dict[str, Any]) -> tuple[Any, ...]:
    x, vectors, _, (sender, receiver) = inputs(7, 30)
    y = torch.cat([vectors[:, :1], vectors], 1)
    args = {"x": x, "y": y, "radial": vectors.norm(dim=1), "species": None, "coefficients": Layer().table}
    args |= {"sender": sender, "receiver": receiver, "order": rows_by(receiver, 7), "size": 7}
    return (*(args | {k: v(args[k]) for k, v in change.items()}).values(), str(PRODUCT), str(GRID))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sender": lambda t: t.int(), "receiver": lambda t: t.int()}, "its indices are not int64"),
        ({"radial": lambda t: t.float()}, "its operands are of several types"),
        ({"y": lambda t: t[:-1]}, "shapes of its operands do not fit together"),
        ({"order": lambda t: t[:-1]}, "shapes of its operands do not fit together"),
        ({"x": lambda t: t[:, :-1]}, "shapes of its operands do not fit together"),
        ({"coefficients": lambda t: t[..., :-1]}, "shapes of its operands do not fit together"),
    ],
)
def test_what_a_kernel_would_misread_never_reaches_it(change: dict[str, Any], reason: str) -> None:
    args = call(change)
    assert dispatch.misfit(convolution, args) == reason
    assert dispatch.misfit(convolution, call({})) is None
    with Kernels() as kernels:
        if "order" in change:  # the reference reads none
            torch.testing.assert_close(convolution(*args), convolution(*call({})), rtol=1e-12, atol=1e-12)
        elif "sender" not in change and "radial" not in change:
            with pytest.raises((RuntimeError, IndexError)):
                convolution(*args)
        else:
            convolution(*args)
    assert kernels.fallbacks["convolution", reason] == 1


def test_an_index_of_no_atom() -> None:
    with Kernels(), pytest.raises(KernelError, match="an atom"):
        convolution(*call({"sender": lambda t: t + 7}))
    with Kernels(), pytest.raises(UsageError, match="species"):
        contraction(torch.randn(2, 4, 4, dtype=F64), torch.tensor([0, 3]), Layer().terms, str(CONTRACTION))


def test_copies_build_their_own() -> None:
    layer, given = Layer(), inputs(7, 30)
    kernels = Kernels(layer.buffers())
    with kernels:
        expected = layer(*given)
    again, twin = copy.deepcopy((kernels, layer))
    with again:
        assert torch.equal(twin(*given), expected)
    assert again.calls == kernels.calls and again.sources == kernels.sources


def test_blocks_of_threads_are_their_own() -> None:
    """One object, entered by two threads that leave it in the order in which they came."""
    kernels, args = Kernels(), call({})
    both, left = threading.Barrier(2, timeout=60), threading.Event()

    def block(first: bool) -> None:
        with kernels:
            both.wait()
            if not first:
                assert left.wait(60)
            convolution(*args)
        if first:
            left.set()
        convolution(*args)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(block, (True, False)))
    assert sum(kernels.calls.values()) == 2


def test_ops_agree_with_their_registrations(tmp_path: Path) -> None:
    args = call({})
    with Kernels(folder=tmp_path) as kernels:
        torch.library.opcheck(convolution, args)
    assert kernels.calls and list(tmp_path.glob("convolution*.cpp"))


# --- the target inductor-kernels


@pytest.mark.slow
def test_the_target_runs_kernels_inside_compiled_code() -> None:
    model = small_potential(F64)
    fused = fxpass.optimize(model, ["specialize-species", "differentiate"], target="inductor-kernels", verify=False)
    assert all(row.kernel for row in fused.manifest) and fused.kernels.keys() == {row.kernel for row in fused.manifest}
    programs = [m for m in fused.modules() if isinstance(m, CompiledKernels)]  # of the energy, and of forces too
    numbers, cutoff = tuple(fused.facts["numbers"]), fused.facts["cutoff"]
    for structure in probe_structures(numbers, cutoff):  # periodic and isolated, one atom, no edges
        found, expected = (fused.frontend.evaluate(each, structure) for each in (fused, model))
        assert abs(found.energy - expected.energy) < 1e-10 * max(len(structure), 1)
        np.testing.assert_allclose(found.forces, expected.forces, rtol=0, atol=1e-9)
    assert max((p.kernels for p in programs), key=lambda k: len(k.calls)).calls.keys() == fused.kernels.keys()
    assert not any(p.kernels.fallbacks for p in programs)
