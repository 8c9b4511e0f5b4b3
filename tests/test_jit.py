"""``fxpass.jit``: modules made of parts that are scripted, traced, left alone, or refused."""

from __future__ import annotations

import copy
import ctypes
import io
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxpass import jit
from fxpass._torch_compat import o3 as e3nn_o3
from fxpass.errors import FrozenTraceError, LoweringError, UnsupportedModuleError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
IRREPS = "4x0e+3x1o+2x2e"
SIZES = (1, 6, 0, 11)  # none is the traced one


@pytest.fixture(autouse=True)
def double() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)


def values_and_gradients(module: nn.Module, args: tuple[Tensor, ...]) -> list[Tensor]:
    """Results, then derivatives of a sum of squares by arguments and parameters."""
    leaves = [x.clone().requires_grad_() for x in args]
    parameters = list(module.parameters())
    torch.manual_seed(3)
    found = module(*leaves)
    results = list(found) if isinstance(found, (tuple, list)) else [found]
    total = torch.stack([(y**2).sum() for y in results]).sum()
    by = [*leaves, *parameters]
    grads = torch.autograd.grad(total, by, allow_unused=True) if total.requires_grad else [None] * len(by)
    return [y.detach() for y in results] + [
        torch.zeros_like(x) if g is None else g for x, g in zip(by, grads, strict=True)
    ]


def agree(compiled: nn.Module, original: nn.Module, *args: Tensor) -> None:
    found, expected = values_and_gradients(compiled, args), values_and_gradients(original, args)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-11, atol=1e-12)


# --- every operation of e3nn


def operations() -> dict[str, tuple[Callable[[Any, Any], nn.Module], tuple[int, ...]]]:
    """How to make each from ``e3nn.o3`` and ``e3nn.nn``; columns of its arguments, negative ones without rows."""
    silu, tanh, sigmoid = torch.nn.functional.silu, torch.tanh, torch.sigmoid
    uvu = [(0, 0, 0, "uvu", True), (0, 0, 1, "uvu", True)]

    def sphere(o3: Any, lmax: int) -> Any:
        return o3.Irreps([(1, (l, (-1) ** l)) for l in range(lmax + 1)])

    return {
        "FullyConnectedTensorProduct": (
            lambda o3, n: o3.FullyConnectedTensorProduct(IRREPS, "0e+1o", "4x0e+2x1o"),
            (23, 4),
        ),
        "ElementwiseTensorProduct": (lambda o3, n: o3.ElementwiseTensorProduct("3x1o+2x0e", "3x1o+2x0e"), (11, 11)),
        "FullTensorProduct": (lambda o3, n: o3.FullTensorProduct("2x1o", "3x1o"), (6, 9)),
        "TensorSquare": (lambda o3, n: o3.TensorSquare("2x1o+0e"), (7,)),
        "TensorProduct": (lambda o3, n: o3.TensorProduct("3x1o", "1x1o", "3x0e+3x1e", uvu), (9, 3)),
        "TensorProduct, weights by row": (
            lambda o3, n: o3.TensorProduct(
                "3x1o", "1x1o", "3x0e+3x1e", uvu, shared_weights=False, internal_weights=False
            ),
            (9, 3, 6),
        ),
        "TensorProduct, weights from outside": (
            lambda o3, n: o3.TensorProduct(
                "3x1o", "1x1o", "3x0e+3x1e", uvu, shared_weights=True, internal_weights=False
            ),
            (9, 3, -6),
        ),
        "Linear": (lambda o3, n: o3.Linear(IRREPS, "2x0e+2x1o", biases=True), (23,)),
        "Norm": (lambda o3, n: o3.Norm(IRREPS), (23,)),
        "Norm, squared": (lambda o3, n: o3.Norm(IRREPS, squared=True), (23,)),
        "Activation": (lambda o3, n: n.Activation("4x0e+3x0o+1o", [silu, tanh, None]), (10,)),
        "NormActivation": (lambda o3, n: n.NormActivation(o3.Irreps(IRREPS), sigmoid, bias=True), (23,)),
        "Gate": (lambda o3, n: n.Gate("4x0e", [silu], "2x0e", [sigmoid], "2x1o"), (12,)),
        "FullyConnectedNet": (lambda o3, n: n.FullyConnectedNet([5, 8, 2], silu), (5,)),
        "SphericalHarmonics": (lambda o3, n: o3.SphericalHarmonics([0, 1, 2, 3], True, "component"), (3,)),
        "SphericalHarmonics, some": (lambda o3, n: o3.SphericalHarmonics([1, 3], False, "norm"), (3,)),
        "Extract": (lambda o3, n: n.Extract("1e+0e+0e", ["0e", "0e"], [(1,), (2,)]), (5,)),
        "ExtractIr": (lambda o3, n: n.ExtractIr("1e+0e+0e", "0e"), (5,)),
        "Identity": (lambda o3, n: n.Identity("3x0e+1o", "3x0e+1o"), (6,)),
        "Dropout": (lambda o3, n: n.Dropout(IRREPS, 0.5), (23,)),
        "S2Activation": (lambda o3, n: n.S2Activation(sphere(o3, 2), tanh, 10), (9,)),
        "S2Activation, rotated": (lambda o3, n: n.S2Activation(sphere(o3, 2), tanh, 10, random_rot=True), (9,)),
        "SO3Activation": (lambda o3, n: n.SO3Activation(1, 1, tanh, 4), (10,)),
        "ReducedTensorProducts": (lambda o3, n: o3.ReducedTensorProducts("ij=ji", i="1o"), (3, 3)),
    }


def make(name: str) -> nn.Module:
    o3 = e3nn_o3()  # first: e3nn 0.4.4 alone does not import on this torch
    from e3nn import nn as layers

    return operations()[name][0](o3, layers)


def arguments(name: str, rows: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(rows, n) if n > 0 else torch.randn(-n) for n in operations()[name][1])


class Holder(nn.Module):
    """Traced around a part, which it calls with everything it gets."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *args: Tensor) -> Any:
        found = self.part(*(x * 1.5 for x in args))
        return tuple(y + 1 for y in found) if isinstance(found, tuple) else found + 1


@pytest.mark.parametrize("name", operations())
def test_every_operation_of_e3nn_at_other_sizes(name: str) -> None:
    module = make(name)
    compiled = jit.compile(module)
    assert isinstance(compiled, torch.jit.ScriptModule) and not isinstance(module, torch.jit.ScriptModule)
    holder = Holder(module)
    traced = jit.trace(holder, arguments(name, 4))
    for rows in SIZES:
        if not rows and name.startswith("S2"):
            continue  # the Fourier transform of nothing is an error in eager mode too
        args = arguments(name, rows)
        agree(compiled, module, *args)
        agree(traced, holder, *args)


def test_a_network_of_e3nn() -> None:
    e3nn_o3()
    from e3nn.nn.models.v2106.gate_points_message_passing import MessagePassing

    model = MessagePassing(["3x0e", "4x0e+2x1o", "2x0e"], "1x0e", "0e+1o", [4, 8], 3.0)

    def graph(atoms: int, edges: int) -> tuple[Tensor, ...]:
        source, target = torch.randint(atoms, (2, edges))
        return torch.randn(atoms, 3), torch.ones(atoms, 1), source, target, torch.randn(edges, 4), torch.randn(edges, 4)

    compiled, traced = jit.compile(model), jit.trace(model, graph(5, 12))
    assert type(compiled) is MessagePassing and isinstance(traced, torch.jit.ScriptModule)
    assert all(isinstance(layer, torch.jit.ScriptModule) for gate in compiled.layers for layer in gate.children())
    for sizes in ((5, 12), (1, 0), (7, 30)):
        args = graph(*sizes)
        for module in (compiled, traced):
            assert torch.allclose(module(*args), model(*args), rtol=1e-12, atol=1e-13)


@pytest.mark.mace
def test_a_potential_that_e3nn_s_marks_make_scriptable() -> None:
    from mace_models import build
    from test_mace import batch, structures

    model = build()
    compiled = jit.compile(model)
    assert isinstance(compiled, torch.jit.ScriptModule) and not isinstance(model.products, torch.jit.ScriptModule)
    for item in structures():  # the compiled one optimises itself from the second call on
        expected, found = (m({k: v.clone() for k, v in batch([item], model).items()}) for m in (model, compiled))
        for name in ("energy", "forces"):
            assert torch.allclose(found[name], expected[name], rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("name", ["FullyConnectedNet", "SphericalHarmonics", "TensorProduct, weights by row"])
def test_an_operation_is_traced_without_being_given_inputs(name: str) -> None:
    module = make(name)
    with pytest.warns(UserWarning, match="is marked compile_mode\\('script'\\), and asked to trace"):
        traced = jit.trace(module)
    agree(traced, module, *arguments(name, 9))


def test_a_class_derived_from_e3nn_s_may_differ() -> None:
    e3nn_o3()
    from e3nn import nn as layers

    class Weighted(layers.FullyConnectedNet):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x) * y

        def _make_tracing_inputs(self, n: int) -> list[dict[str, tuple[Tensor, ...]]]:
            return [{"forward": (torch.randn(3, 5), torch.randn(3, 1))}] * n

    model = jit.compile_mode("trace")(Weighted)([5, 8, 2], torch.nn.functional.silu)
    agree(jit.compile(model), model, torch.randn(6, 5), torch.randn(6, 1))


def test_a_mark_of_one_s_own_counts_more_than_that_of_e3nn() -> None:
    o3 = e3nn_o3()
    from e3nn import nn as layers

    @jit.compile_mode("script")
    class Signed(layers.S2Activation):
        def forward(self, x: Tensor) -> Tensor:
            if bool(x.sum() > 0):
                return x
            return -2 * x

    model = Signed(o3.Irreps("0e+1o"), torch.tanh, 6)
    compiled = jit.compile(model)
    for sign in (1, -1):
        agree(compiled, model, sign * torch.ones(3, 4))


def test_batch_normalisation_is_refused_by_path_and_class() -> None:
    e3nn_o3()
    from e3nn.nn import BatchNorm

    model = nn.ModuleDict({"block": nn.Sequential(nn.Linear(2, 2), BatchNorm("2x0e"))})
    for attempt in (jit.compile, jit.script, lambda m: jit.trace(m, torch.zeros(1, 2))):
        with pytest.raises(NotImplementedError, match="BatchNorm does not support TorchScript") as caught:
            attempt(model)
        assert isinstance(caught.value, UnsupportedModuleError)
        assert caught.value.where.module_path == "block.1"
    with pytest.raises(NotImplementedError, match="BatchNorm"):
        jit.script(BatchNorm("2x0e"))


def test_marks_are_e3nn_s() -> None:
    e3nn_o3()
    from e3nn.util.jit import compile_mode, get_compile_mode

    ours = jit.compile_mode("trace")(type("Ours", (nn.Module,), {}))
    theirs = compile_mode("unsupported")(type("Theirs", (nn.Module,), {}))
    heir = type("Heir", (ours,), {})
    assert get_compile_mode(ours()) == "trace" == jit.get_compile_mode(heir())
    assert jit.get_compile_mode(theirs()) == "unsupported"
    assert jit.get_compile_mode(nn.Linear(1, 1)) is None
    assert jit.get_compile_mode(fx.symbolic_trace(nn.ReLU())) == "script"


# --- the four cases


@jit.compile_mode("script")
class BranchOnNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = e3nn_o3().Norm("2x1o")

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm(x)
        if torch.any(norm > 7.0):
            return norm
        return norm * 0.5


class HoldsBranch(nn.Module):
    irreps_in = "2x1o"

    def __init__(self) -> None:
        super().__init__()
        self.branch = BranchOnNorm()

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + 1


@pytest.mark.parametrize("how", [jit.script, jit.trace])
def test_a_branch_around_a_traced_norm_is_decided_by_the_data(how: Callable[[nn.Module], nn.Module]) -> None:
    model = HoldsBranch()
    compiled = how(model)
    x = torch.randn(5, 6)
    x[2, :3] = torch.tensor([0.0, 9.0, 0.0])
    both = [x, x * 0.01]
    assert [bool(torch.any(model.branch.norm(each) > 7)) for each in both] == [True, False]
    for each in both:
        agree(compiled, model, each)


@jit.compile_mode("script")
class FirstLongRow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for row in x:
            if row.norm() > 1.0:
                return row
        return torch.zeros_like(x[0])


@jit.compile_mode("trace")
class TimesTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = FirstLongRow()

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.first(x)

    def _make_tracing_inputs(self, n: int) -> list[dict[str, tuple[Tensor, ...]]]:
        return [{"forward": (torch.randn(3 + k, 2),)} for k in range(n)]


def test_a_scripted_loop_with_an_early_return_lives_within_a_trace() -> None:
    model = TimesTwo()
    compiled = jit.compile(model, n_trace_checks=2)
    for x in (torch.tensor([[0.0, 0.1], [3.0, 0.0], [5.0, 0.0]]), torch.full((9, 2), 0.1), torch.ones(1, 2)):
        agree(compiled, model, x)
    assert compiled(torch.tensor([[0.0, 0.1], [3.0, 0.0]])).tolist() == [6.0, 0.0]


@jit.compile_mode("trace")
class Pick(nn.Module):
    """An argument that is an index, inputs of its own, and two methods."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []
        self.table = nn.Parameter(torch.randn(5, 3))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return x * self.table[index]

    def sums(self, index: Tensor) -> Tensor:
        return self.table[index].sum(0)

    def _make_tracing_inputs(self, n: int) -> list[dict[str, tuple[Tensor, ...]]]:
        self.asked.append(n)
        index = [torch.randint(5, (3 + k,)) for k in range(n)]
        return [{"forward": (torch.randn(len(i), 3), i), "sums": (i,)} for i in index]


def test_an_index_argument_comes_from_the_module_s_own_inputs() -> None:
    model = Pick().float()
    compiled = jit.compile(model, n_trace_checks=3, in_place=True)
    assert model.asked == [3]
    for rows in (1, 8):
        x, index = torch.randn(rows, 3, dtype=torch.float32), torch.randint(5, (rows,))
        assert torch.equal(compiled(x, index), model(x, index))
        assert torch.equal(compiled.sums(index), model.sums(index))


@jit.compile_mode("unsupported")
class Unsupported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_an_unsupported_child_is_named() -> None:
    model = nn.Sequential(nn.ReLU(), Holder(Unsupported()))
    with pytest.raises(NotImplementedError) as caught:
        jit.compile(model, in_place=True)
    assert "Unsupported does not support TorchScript [module path 1.part]" in str(caught.value)
    jit.compile(model, recurse=False)  # it is not reached


# --- what stays as it was


class Mixed(nn.Module):
    """No mark of its own; a traced part with a buffer that calls change, a scripted one, and one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = Counted()
        self.layers = nn.ModuleList([Scaled(), Scaled()])
        self.again = self.layers[0]
        self.nothing = None
        self.register_module("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.layers[1](self.layers[0](self.counted(x))))


@jit.compile_mode("trace")
class Counted(nn.Module):
    irreps_in = "3x0e"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3))
        self.calls: Tensor
        self.mean: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.mean = 0.9 * self.mean + 0.1 * x.detach().sum(0)
        return nn.functional.dropout(x, 0.5, self.training) - 0 * self.calls


@jit.compile_mode("script")
class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3))
        self.drop = nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x) * self.scale


@pytest.mark.parametrize("training", [True, False])
def test_the_caller_s_model_is_left_alone(training: bool) -> None:
    model = Mixed().train(training)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    compiled = jit.compile(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert type(model.layers[0]) is Scaled and type(model.counted) is Counted and model.again is model.layers[0]
    assert isinstance(compiled, Mixed) and isinstance(compiled.counted, torch.jit.ScriptModule)
    assert isinstance(compiled.layers[0], torch.jit.ScriptModule) and compiled.again is compiled.layers[0]
    for state in (model.state_dict(), compiled.state_dict()):
        assert list(state) == list(before) and all(torch.equal(state[k], v) for k, v in before.items())
    for module in (model, compiled):
        assert all(part.training is training for part in module.modules())
    agree(compiled, model, torch.randn(5, 3))
    if not training:
        compiled.train()
        assert compiled.layers[0].training and (compiled.layers[0](torch.ones(400, 3)) == 0).any()


def test_in_place_shares_and_replaces() -> None:
    model = Mixed().eval()
    scale = model.layers[0].scale
    compiled = jit.compile(model, in_place=True)
    assert compiled is model and isinstance(model.layers[0], torch.jit.ScriptModule)
    assert model.again is model.layers[0]
    model(torch.ones(2, 3)).sum().backward()
    assert scale.grad is not None
    assert jit.compile(model, in_place=True).layers[0] is model.layers[0]  # TorchScript stays what it is


def test_in_place_is_all_or_nothing() -> None:
    @jit.compile_mode("script")
    class Refused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return globals()[x]

    model = nn.Sequential(Scaled(), Refused())
    with pytest.raises(LoweringError, match="TorchScript refuses Refused") as caught:
        jit.compile(model, in_place=True)
    assert caught.value.where.module_path == "1"
    assert type(model[0]) is Scaled and type(model[1]) is Refused


def test_compiled_models_are_saved_and_originals_pickled() -> None:
    model = make("Gate")
    compiled = jit.compile(model)
    buffer = io.BytesIO()
    torch.jit.save(compiled, buffer)
    buffer.seek(0)
    x = arguments("Gate", 7)
    agree(torch.jit.load(buffer), model, *x)
    agree(pickle.loads(pickle.dumps(model)), model, *x)
    trained = make("Linear")
    state = {k: v + 1 for k, v in trained.state_dict().items()}
    scripted = jit.compile(trained)
    scripted.load_state_dict(state)
    trained.load_state_dict(state)
    agree(scripted, trained, *arguments("Linear", 3))


def test_options_reach_torch() -> None:
    class Named(nn.Module):
        irreps_in = "2x0e"

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"twice": 2 * x}

    marked = jit.compile_mode("trace")(Named)()
    with pytest.raises(UsageError, match=r"fails on the inputs it is traced with.*strict"):
        jit.compile(marked)
    compiled = jit.compile(marked, trace_options={"strict": False})
    assert compiled(torch.ones(1, 2))["twice"].sum() == 4
    with pytest.raises(TypeError, match="no_such_option"):
        jit.compile(Scaled(), script_options={"no_such_option": 1})


def test_generated_code_is_scripted() -> None:
    class Spelled(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.tensordot(x, y, dims=([1], [0])).permute(1, 0)

    graph = fx.symbolic_trace(Spelled())
    before = graph.code
    compiled = jit.compile(graph)
    agree(compiled, graph, torch.randn(4, 3), torch.randn(3, 2))
    assert isinstance(compiled, torch.jit.ScriptModule) and graph.code == before


def test_generated_code_keeps_its_keywords_and_unused_buffers() -> None:
    class Spelled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.permute(dims=(1, 0))

    graph = fx.symbolic_trace(Spelled())
    graph.register_buffer("unused", torch.ones(2))
    compiled = jit.compile(graph)
    agree(compiled, graph, torch.randn(4, 3))
    assert list(compiled.state_dict()) == ["unused"]


def test_code_without_source_is_refused() -> None:
    names: dict[str, Any] = {"nn": nn}
    exec("class Typed(nn.Module):\n    def forward(self, x): return x", names)
    with pytest.raises(LoweringError, match="TorchScript refuses Typed: Can't get source"):
        jit.script(names["Typed"]())


@jit.compile_mode("script")
class Slope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        slope = torch.autograd.grad([self.energy(x).sum()], [x], create_graph=True)[0]
        assert slope is not None
        return slope


def test_a_scripted_part_may_differentiate_within_a_trace() -> None:
    model = nn.Sequential(Slope(), nn.Linear(3, 2))
    traced = jit.trace(model, torch.randn(4, 3).requires_grad_())
    for rows in (1, 9):
        agree(traced, model, torch.randn(rows, 3))
    with pytest.raises(
        UsageError, match=r"fails on the inputs it is traced with: RuntimeError: element 0 .* does not require grad"
    ):
        jit.trace(model, torch.randn(4, 3))


# --- a trace that holds for the traced inputs alone


class CountsRows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(0) / int(x.shape[0])


class Outer(nn.Module):
    irreps_in = "3x0e"

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), inner])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](x) * 2)


def frozen(attempt: Callable[[], Any]) -> FrozenTraceError:
    with pytest.raises(FrozenTraceError) as caught:
        attempt()
    return caught.value


def test_a_frozen_size_is_refused_by_module_and_line() -> None:
    model = Outer(CountsRows())
    error = frozen(lambda: jit.trace(model))
    assert "the trace of CountsRows holds for the traced inputs alone: with 7 rows in place of 4" in str(error)
    assert re.search(r"off by 0\.\d+ of the largest element \(1e-11 allowed\)", str(error))
    assert error.where.module_path == "blocks.1" and "test_jit.py:" in str(error.where.source)
    assert jit.trace(model, check=False)(torch.ones(8, 3)).tolist() == [4.0, 4.0, 4.0]  # as torch would: 8 * 2 / 4


def test_a_marked_child_is_refused_before_its_parent() -> None:
    child = jit.compile_mode("trace")(type("Marked", (CountsRows,), {"irreps_in": ["3x0e"]}))()
    error = frozen(lambda: jit.compile(nn.Sequential(nn.Sequential(child))))
    assert "the trace of Marked" in str(error) and error.where.module_path == "0.0"


def test_an_unrolled_loop_is_refused() -> None:
    class Rows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([row * row for row in x])

    assert "the trace of Rows" in str(frozen(lambda: jit.trace(Outer(Rows()))))


def test_a_frozen_branch_is_refused_where_the_checked_inputs_show_it() -> None:
    class Sign(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -10 * x

    with pytest.warns(torch.jit.TracerWarning, match="Python boolean"):  # as long as no input shows it
        jit.trace(Sign(), torch.ones(4, 3))
    error = frozen(lambda: jit.trace(Sign(), torch.ones(4, 3), [-torch.ones(2, 3)]))
    assert "on inputs of 2 rows it is off by" in str(error)


def test_a_result_that_the_tracer_does_not_see_is_refused() -> None:
    error = frozen(lambda: jit.trace(Outer(Foreign())))
    assert "the trace of Foreign" in str(error) and "with other values of 4 rows" in str(error)
    assert "register kernels as torch.library ops" in str(error)


class Foreign(nn.Module):
    """Squares by writing to memory, as a kernel does that is called through its address."""

    def forward(self, x: Tensor) -> Tensor:
        given, result = x.detach().contiguous(), [0.0] * x.numel()
        seen = (ctypes.c_double * x.numel()).from_address(given.data_ptr())
        for k in range(len(result)):
            result[k] = seen[k] ** 2
        return torch.tensor(result, dtype=x.dtype).reshape(x.shape)


def test_a_derivative_that_the_tracer_does_not_see_is_refused() -> None:
    class Held(nn.Module):
        def __init__(self, *, detached: bool) -> None:
            super().__init__()
            self.detached = detached

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():  # which no trace records
                norm = x.norm(dim=-1, keepdim=True)
            return x * (norm.detach() if self.detached else norm)

    error = frozen(lambda: jit.trace(Outer(Held(detached=False))))
    assert "the trace of Held" in str(error) and "on inputs of 4 rows its derivative is off by" in str(error)
    model = Outer(Held(detached=True))
    agree(jit.trace(model), model, torch.randn(6, 3))


def test_indices_of_rows_are_folded_into_those_that_are_left() -> None:
    asked: list[tuple[int, int]] = []

    class Picks(nn.Module):
        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            if not torch.jit.is_tracing() and index.numel() and len(x):
                asked.append((len(x), int(index.max())))
            return x[index]

    jit.trace(Picks(), (torch.randn(5, 3), torch.tensor([4, 0, 3])))
    assert (1, 0) in asked and all(largest < rows for rows, largest in asked)


def test_a_frozen_index_is_refused() -> None:
    class Listed(nn.Module):
        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return x[index.tolist()]

    error = frozen(lambda: jit.trace(Listed(), (torch.randn(4, 3), torch.tensor([0, 2]))))
    assert "with other values of 4 and 2 rows it is off by" in str(error)


def test_a_trace_that_breaks_is_refused() -> None:
    class Rooms(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(len(x) * 3)

    model = Rooms()
    error = frozen(lambda: jit.trace(model, torch.ones(4, 3)))
    assert "with 7 rows in place of 4 it fails: RuntimeError: shape '[12]' is invalid" in str(error)
    assert error.where.module_path is None


def test_hooks_belong_to_a_trace() -> None:
    model = nn.Linear(3, 3)
    model.register_forward_hook(lambda module, args, result: 2 * result)
    agree(jit.trace(model, torch.randn(4, 3)), model, torch.randn(7, 3))


def test_the_caller_s_inputs_are_left_alone() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x += 1
            return 2 * x

    x = torch.ones(4, 3)
    jit.trace(Writes(), x)
    assert torch.equal(x, torch.ones(4, 3))


def test_a_buffer_that_the_first_call_makes_is_not_left_behind() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", None)

        def forward(self, x: Tensor) -> Tensor:
            if self.seen is None:
                self.seen = x.sum(0)
            return 2 * x

    model = Late()
    jit.trace(model, torch.ones(4, 3), in_place=True)
    assert model.seen is None


def test_a_sparse_buffer_is_one_like_others() -> None:
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.tensor([[0.0, 2.0], [3.0, 0.0]]).to_sparse())
            self.table: Tensor

        def forward(self, x: Tensor) -> Tensor:
            return torch.sparse.mm(self.table, x.t())

    model = Mixes()
    agree(jit.trace(model, torch.randn(4, 2)), model, torch.randn(7, 2))


def test_any_exception_of_the_module_says_that_it_does_not_take_the_input() -> None:
    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(min(len(x), 1)):
                found = 2 * x
            return found  # unbound without rows

    model = Last()
    agree(jit.trace(model, torch.ones(4, 3)), model, torch.randn(2, 3))


# --- bad input


@pytest.mark.parametrize(
    ("attempt", "complaint"),
    [
        (lambda: jit.compile_mode("compile"), "'compile' is no compile mode"),
        (lambda: jit.compile_mode("trace")(torch.relu), "decorates classes derived from torch.nn.Module"),
        (lambda: jit.compile(torch.relu), "is no module"),
        (lambda: jit.compile(TimesTwo(), n_trace_checks=0), "n_trace_checks is 0"),
        (lambda: jit.trace(nn.Linear(2, 2)), "Linear says nothing of its inputs"),
        (lambda: jit.trace(marked(irreps_in=[None, "0e"])), "None among its input irreps"),
        (lambda: jit.trace(marked(_make_tracing_inputs=lambda n: {})), "must return a list of dicts"),
        (lambda: jit.trace(marked(irreps_in=["2x0e"]), torch.ones(3, 2)), "fails on the inputs it is traced with"),
        (lambda: jit.compile(marked(__e3nn_compile_mode__="later")), "is marked 'later'"),
        (lambda: jit.trace(marked(_make_tracing_inputs=lambda n: [][n])), "fails: IndexError: list index out of range"),
        (lambda: jit.trace(marked(irreps_in="3x0q")), "'3x0q' among its input irreps"),
        (lambda: jit.trace(marked(), torch.ones(4, 3), [torch.ones(4, 2)]), "fails on the inputs its trace is checked"),
        (lambda: jit.trace(marked(), torch.ones(4, 3), torch.ones(4, 3)), "check_inputs is a Tensor"),
        (lambda: jit.trace_module(marked(), torch.ones(4, 3)), "inputs are a Tensor"),
        (lambda: jit.trace_module(marked(), {"backward": torch.ones(4, 3)}), "has no attribute 'backward'"),
        (lambda: jit.compile(marked(made=torch.ones(1, requires_grad=True) * 2)), "Linear cannot be copied"),
    ],
)
def test_bad_input_is_refused(attempt: Callable[[], Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=re.escape(complaint)):
        attempt()


def marked(**attributes: Any) -> nn.Module:
    module = nn.Linear(3, 3)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def test_inputs_that_are_derived() -> None:
    def widths(**attributes: Any) -> list[tuple[int, ...]]:
        (inputs,) = jit.tracing_inputs(marked(**attributes).to(torch.float32))
        assert all(x.dtype == torch.float32 for x in inputs["forward"])
        return [tuple(x.shape) for x in inputs["forward"]]

    assert widths(irreps_in=["2x0e+1o", "cartesian_points"]) == [(4, 5), (4, 3)]
    assert widths(irreps_in=e3nn_o3().Irreps("2x1o")) == [(4, 6)]
    assert widths(irreps_in1="1o", irreps_in2="0e", irreps_in3="2e") == [(4, 3), (4, 1), (4, 5)]
    assert [x["forward"][0].shape[0] for x in jit.tracing_inputs(marked(irreps_in="0e"), 3)] == [4, 2, 5]


@pytest.mark.once
def test_neither_the_compiler_nor_its_import_needs_e3nn() -> None:
    code = (
        "import sys, torch, fxpass.jit as jit\n"
        "from test_jit import TimesTwo\n"
        "jit.compile(TimesTwo()); assert 'e3nn' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=Path(__file__).parent, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_torch_s_news_about_torchscript_is_not_passed_on() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jit.compile(nn.Sequential(Scaled(), Counted()).eval())
