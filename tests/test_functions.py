"""Modules without a family: ``fxpass.optimize(module, example_inputs=...)``."""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpass
from fxpass._torch_compat import o3 as imported
from fxpass.errors import CaptureError, PackageError, UnsupportedModelError, UsageError, VerificationError
from fxpass.functions import FunctionJudge, read_example
from fxpass.functions.signature import Signature, flatten, unflatten
from fxpass.targets.eager import EagerTarget
from fxpass.verify.receipt import Receipt
from fxpass_passes.legalize_custom_ops import LegalizeCustomOps

o3 = imported()
import e3nn.nn as enn  # noqa: E402  after o3, which makes e3nn 0.4.4 import at all

ONE, TWO = "3x0e+2x1o+1x2e", "2x0e+1x1o"
Case = tuple[nn.Module, tuple[Any, ...]]


def rows(irreps: str, count: int = 5) -> Tensor:
    return o3.Irreps(irreps).randn(count, -1)


def product(kind: str) -> Case:
    options = {"internal": {}, "shared": {"internal_weights": False}, "external": {"shared_weights": False}}[kind]
    tp = o3.FullyConnectedTensorProduct(ONE, TWO, "2x0e+2x1o", **options)
    shape = {"internal": None, "shared": (tp.weight_numel,), "external": (5, tp.weight_numel)}[kind]
    return tp, (rows(ONE), rows(TWO), *([] if shape is None else [torch.randn(shape)]))


def gate() -> Case:
    module = enn.Gate("3x0e", [torch.relu], "2x0e+1x0e", [torch.sigmoid, torch.tanh], "2x1o+1x2e")
    return module, (module.irreps_in.randn(5, -1),)


def normalised(instance: bool) -> Case:
    module = enn.BatchNorm(ONE, instance=instance)
    if not instance:
        nn.init.normal_(module.running_mean)
        nn.init.uniform_(module.running_var, 0.5, 2.0)
    return module, (o3.Irreps(ONE).randn(5, 6, -1) if instance else rows(ONE),)


def message_passing() -> Case:
    from e3nn.nn.models.v2106.gate_points_message_passing import MessagePassing

    nodes, edges = 4, 9
    module = MessagePassing(["2x0e+1x1o", "2x0e+2x1o", "1x0e+1x1o"], "1x0e", "1x0e+1x1o", [3, 8], 3.0)
    index = [torch.randint(nodes, (edges,)) for _ in range(2)]
    attributes = rows("1x0e+1x1o", edges), torch.randn(edges, 3)
    return module, (rows("2x0e+1x1o", nodes), rows("1x0e", nodes), *index, *attributes)


class Convolutional(nn.Module):
    """Convolutions with batch norms, a shortcut and in-place activations, as torchvision has them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.body = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Conv2d(6, 6, 3, 1, 1), nn.BatchNorm2d(6))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(6, 4))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        return self.head(torch.relu_(self.body(x) + x[..., ::2, ::2]))


class Structured(nn.Module):
    """Takes a dict, a number and something that may be left out; returns a dict with a tuple in it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(3, 4), nn.Embedding(10, 4)

    def forward(self, data: dict[str, Tensor], scale: float = 2.0, mask: Tensor | None = None) -> dict[str, Any]:
        hidden = nn.functional.silu(self.linear(data["positions"])) + self.table(data["kinds"])
        received = torch.zeros_like(hidden).index_add(0, data["to"], scale * hidden[data["from"]])
        return {"nodes": received, "pair": (hidden.sum(0), received.mean()), "mask": mask}


def structured(nodes: int = 4, edges: int = 9) -> dict[str, Tensor]:
    drawn = {name: torch.randint(nodes, (edges,)) for name in ("from", "to")}
    return {"positions": torch.randn(nodes, 3), "kinds": torch.randint(10, (nodes,)), **drawn}


E3NN: dict[str, Callable[[], Case]] = {
    "product": lambda: product("internal"),
    "product, shared weights": lambda: product("shared"),
    "product, external weights": lambda: product("external"),
    "full product": lambda: (o3.FullTensorProduct("2x0e+1x1o", TWO), (rows("2x0e+1x1o"), rows(TWO))),
    "elementwise product": lambda: (o3.ElementwiseTensorProduct(ONE, ONE), (rows(ONE), rows(ONE))),
    "square": lambda: (o3.TensorSquare("3x0e+2x1o"), (rows("3x0e+2x1o"),)),
    "square to irreps": lambda: (o3.TensorSquare("3x0e+2x1o", "2x0e+1x2e"), (rows("3x0e+2x1o"),)),
    "linear": lambda: (o3.Linear(ONE, "2x0e+2x1o", biases=True), (o3.Irreps(ONE).randn(3, 2, -1),)),
    "spherical harmonics": lambda: (o3.SphericalHarmonics([0, 1, 2], True), (torch.randn(5, 3),)),
    "norm": lambda: (o3.Norm(ONE), (rows(ONE),)),
    "activation": lambda: (enn.Activation("2x0e+1x0o+1x1o", [torch.relu, torch.tanh, None]), (rows("2x0e+1x0o+1x1o"),)),
    "norm activation": lambda: (enn.NormActivation(o3.Irreps(ONE), torch.sigmoid, bias=True), (rows(ONE),)),
    "gate": gate,
    "batch norm": lambda: normalised(False),
    "instance norm": lambda: normalised(True),
    "extract": lambda: (enn.Extract(ONE, ["2x1o", "3x0e"], [(1,), (0,)]), (rows(ONE),)),
    "dropout": lambda: (enn.Dropout(ONE, 0.5), (rows(ONE),)),
    "network of scalars": lambda: (enn.FullyConnectedNet([4, 8, 2], nn.functional.silu), (torch.randn(5, 4),)),
    "reduced product": lambda: (o3.ReducedTensorProducts("ij=-ji", i="1o+1x0e"), (rows("1o+1x0e"), rows("1o+1x0e"))),
    "reduced cube": lambda: (o3.ReducedTensorProducts("ijk=jik=ikj", i="1o"), (rows("1o"),) * 3),
    "sphere activation": lambda: (enn.S2Activation("1x0e+1x1o", torch.tanh, 8), (rows("1x0e+1x1o"),)),
    "rotation group activation": lambda: (enn.SO3Activation(1, 1, torch.tanh, 4), (torch.randn(5, 10),)),
    "message passing": message_passing,
}
PLAIN: dict[str, Callable[[], Case]] = {
    "perceptron": lambda: (
        nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2)),
        (torch.randn(5, 4),),
    ),
    "convolutional": lambda: (Convolutional(), (torch.randn(2, 3, 12, 12),)),
    "transformer": lambda: (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1),
        (torch.randn(3, 5, 8),),
    ),
    "attention": lambda: (nn.MultiheadAttention(8, 2, batch_first=True), (torch.randn(3, 5, 8),) * 3),
    "embedding": lambda: (nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 2)), (torch.randint(20, (3, 5)),)),
}
#: one more module of a kind that others test
LONG = {
    *("product, external weights", "square", "norm", "instance norm", "activation", "reduced cube"),
    *("rotation group activation", "attention", "dropout"),
}
LONGER = pytest.mark.long
CASES = [pytest.param(name, marks=LONGER if name in LONG else ()) for name in {**E3NN, **PLAIN}]


def made(name: str) -> Case:
    torch.manual_seed(0)
    module, inputs = {**E3NN, **PLAIN}[name]()
    return module.eval(), inputs


def tensors(value: Any) -> list[Tensor]:
    found: list[tuple[str, Tensor]] = []
    flatten(value, "", found)
    return [tensor for _, tensor in found]


def twice(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Twice as many rows of everything but weights."""
    return tuple(torch.cat([x, x]) if x.dim() > 1 or x.dtype == torch.int64 else x for x in inputs)


@pytest.mark.parametrize("name", CASES)
def test_a_module_and_its_drop_in_agree(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    module, inputs = made(name)
    optimized = fxpass.optimize(module, example_inputs=inputs, passes="exact")
    assert optimized.report.receipt.passed
    assert optimized.program.stage == "function"
    for given in (inputs, twice(inputs)):
        for found, expected in zip(tensors(optimized(*given)), tensors(module(*given)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_float32_module_can_be_converted() -> None:
    module, inputs = made("elementwise product")
    optimized = fxpass.optimize(module, example_inputs=inputs).double()
    wide = [x.double() for x in inputs]
    # e3nn rounds coefficients of some paths to float32, and of others not
    torch.testing.assert_close(optimized(*wide), module.double()(*wide), rtol=1e-6, atol=1e-7)
    assert optimized(*wide).dtype == torch.float64
    with pytest.raises(ValueError, match="wrong dtype"):
        optimized(*inputs)


@pytest.mark.parametrize("name", ["product", "gate", "convolutional", pytest.param("message passing", marks=LONGER)])
def test_results_have_gradients_of_every_order(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    module, inputs = made(name)
    optimized = fxpass.optimize(module, example_inputs=inputs, verify=False)
    leaf = inputs[0].clone().requires_grad_()
    slopes = []
    for either in (module, optimized):
        (first,) = torch.autograd.grad(either(leaf, *inputs[1:]).square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        slopes.append((first.detach(), second))
    for found, expected in zip(*slopes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_the_meaning_of_e3nn_modules_is_kept() -> None:
    module, inputs = made("message passing")
    program = fxpass.optimize(module, example_inputs=inputs, verify=False).program
    ops = {str(node.target) for node in program.graph.nodes}
    assert {"fxpass.tensor_product.default", "fxpass.gather.default", "fxpass.scatter_sum.default"} <= ops
    assert [spec.dims[0] for spec in program.inputs] == ["batch", "batch", *["rows_of_edge_src"] * 4]
    assert "index:batch" in program.inputs[2].properties


@pytest.mark.parametrize("name", ["spherical harmonics", "product"])
def test_symmetry_is_in_the_receipt(name: str) -> None:
    module, inputs = made(name)
    report = fxpass.optimize(module, example_inputs=inputs).report
    receipt = report.receipt
    assert report.warnings == ()
    checks = {row.check for row in receipt.rows}
    assert {"values", "gradient", "gradient in float64", "rotation", "inversion"} <= checks
    assert {"batch = 1", "batch = 0", "larger"} <= {row.structure for row in receipt.rows}


@pytest.mark.parametrize("target", ["torchscript", "native"])
def test_structures_of_arguments_survive_every_target(target: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    module, data = Structured().eval(), structured()
    optimized = fxpass.optimize(module, example_inputs=(data,), target=target)
    optimized.save(tmp_path / "saved")
    for either in (optimized, fxpass.load(tmp_path / "saved")):
        for nodes, edges in ((4, 9), (1, 1), (3, 0), (6, 20)):
            given = structured(nodes, edges)
            found, expected = either(given), module(given)
            assert found.keys() == expected.keys() and found["mask"] is None
            torch.testing.assert_close(found["nodes"], expected["nodes"])
            assert isinstance(found["pair"], tuple)
            torch.testing.assert_close(found["pair"], expected["pair"])
    names = list(inspect.signature(optimized.forward).parameters)
    assert names == ["data", "scale", "mask"]


@pytest.mark.slow
def test_inductor_takes_other_sizes(tmp_path: Path) -> None:
    module, inputs = made("perceptron")
    optimized = fxpass.optimize(module, example_inputs=inputs, target="inductor")
    for count in (7, 1, 0):
        x = torch.randn(count, 4)
        torch.testing.assert_close(optimized(x), module(x))


def test_sizes_are_named_by_the_caller() -> None:
    module = made("convolutional")[0]
    sizes = {"image": {0: "batch", 2: "height", 3: "width"}}
    optimized = fxpass.optimize(module, example_inputs={"image": torch.randn(2, 3, 12, 10)}, dynamic=sizes)
    image = torch.randn(1, 3, 25, 9)
    torch.testing.assert_close(optimized(image), module(image))
    torch.testing.assert_close(optimized(image=image.transpose(2, 3)), module(image.transpose(2, 3)))


def test_a_size_that_the_module_fixes_is_fixed_and_told() -> None:
    module, inputs = made("product, shared weights")
    optimized = fxpass.optimize(module, example_inputs=inputs, verify=False)
    assert optimized.program.inputs[2].dims == (module.weight_numel,)
    assert any("rows_of_weight is fixed" in warning for warning in optimized.report.warnings)


def test_a_module_in_training_mode_is_compiled_for_evaluation() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    assert module.training
    optimized = fxpass.optimize(module, example_inputs=(torch.randn(4, 3),))
    assert module.training
    assert any("training mode" in warning for warning in optimized.report.warnings)
    x = torch.randn(2, 3)
    torch.testing.assert_close(optimized(x), module[0](x))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: {**d, "positions": d["positions"].double()}, "data.positions has the wrong dtype"),
        (lambda d: {**d, "positions": torch.randn(4, 2)}, "data.positions has the size 2 in dimension 1, not 3"),
        (lambda d: {**d, "positions": torch.randn(4)}, "data.positions has 1 dimensions"),
        (lambda d: {**d, "kinds": torch.zeros(5, dtype=torch.int64)}, "other inputs have as 'batch'"),
        (lambda d: {**d, "kinds": d["kinds"] + 10}, "data.kinds holds indices from"),
        (lambda d: {**d, "from": d["from"] - 9}, "data.from holds indices from"),
        (lambda d: {**d, "more": d["to"]}, "data has the entries"),
        (lambda d: {k: v for k, v in d.items() if k != "to"}, "data has no entry 'to'"),
        (lambda d: {**d, "positions": 3}, "data.positions is no tensor"),
    ],
)
def test_wrong_inputs_are_named(drop_in: nn.Module, change: Callable[[Any], Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        drop_in(change(structured()))


def test_other_constants_are_refused(drop_in: nn.Module) -> None:
    drop_in(structured(), 2.0, None)
    with pytest.raises(ValueError, match=r"scale is 2\.0 in this compiled module"):
        drop_in(structured(), scale=3.0)
    with pytest.raises(ValueError, match="mask is given"):
        drop_in(structured(), mask=torch.ones(4))


@pytest.fixture(scope="module")
def drop_in() -> nn.Module:
    torch.manual_seed(1)
    return fxpass.optimize(Structured(), example_inputs=(structured(),), verify=False)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] > 8 else x * 3


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Data(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.arange(3.0)


@pytest.mark.parametrize(
    ("module", "error", "told"),
    [
        (Branches(), VerificationError, "the capture is to blame"),
        (Noise(), CaptureError, "draws random numbers"),
        (Data(), CaptureError, "cannot be traced"),
        (Constant(), CaptureError, "depends on no input"),
        (torch.jit.script(nn.Linear(3, 3)), UnsupportedModelError, "compiled to TorchScript already"),
        (nn.Linear(4, 3), UnsupportedModelError, "the module fails on example_inputs"),
    ],
)
def test_what_cannot_be_compiled_is_refused(module: nn.Module, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        fxpass.optimize(module, example_inputs=(torch.randn(5, 3),))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"example_inputs": (3,)}, "hold no tensor"),
        ({"example_inputs": (torch.ones(2, 3), 1)}, "do not fit forward"),
        ({"example_inputs": "x"}, "example_inputs is a str"),
        ({"example_inputs": ([torch.ones(2, 3), object()],)}, "input.1 is a object"),
        ({"example_inputs": (torch.ones(2, 3),), "budget": 0.1}, "budget= is for potentials"),
        ({"example_inputs": (torch.ones(2, 3),), "dynamic": {"y": {0: "n"}}}, "dynamic names 'y'"),
        ({"example_inputs": (torch.ones(2, 3),), "dynamic": {"input": {2: "n"}}}, "names the axis 2"),
        ({"example_inputs": (torch.ones(2, 3),), "dynamic": {"input": {0: "graphs"}}}, "calls a size 'graphs'"),
        ({"dynamic": {"input": {0: "n"}}}, "example_inputs, which are missing"),
        ({"example_inputs": (torch.ones(2, 3),), "dynamic": ["input"]}, "dynamic is a list"),
        ({"example_inputs": (torch.ones(2, 3),), "dynamic": {"input": 0}}, "dynamic gives a int for input"),
        ({"example_inputs": (torch.ones(2, 3),), "dynamic": {"input": {True: "n"}}}, "names the axis True of input"),
        ({"example_inputs": (torch.ones(2, 3).to_sparse(),)}, "input is a sparse_coo tensor"),
    ],
)
def test_senseless_arguments_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        fxpass.optimize(nn.Linear(3, 3), **options)


def test_a_module_without_family_and_example_is_told_of_example_inputs() -> None:
    with pytest.raises(UnsupportedModelError, match=r"example_inputs=\(\.\.\.\)"):
        fxpass.optimize(nn.Linear(3, 3))


def test_a_model_of_a_family_is_told_to_come_without_them() -> None:
    from fxpass.models import small_potential

    with pytest.raises(UsageError, match="leave example_inputs out"):
        fxpass.optimize(small_potential(), example_inputs=(torch.ones(2, 3),))


def test_passes_that_need_forces_say_why_they_did_not_run() -> None:
    module, inputs = made("perceptron")
    report = fxpass.optimize(module, example_inputs=inputs, passes="tabulate,differentiate", verify=False).report
    assert [record.skipped for record in report.records[:2]] == [
        "runs at stage energy, the program is at stage function"
    ] * 2


def test_a_calculator_is_refused(drop_in: nn.Module) -> None:
    with pytest.raises(UsageError, match="no calculator"):
        drop_in.calculator()


def test_structure_survives_flattening() -> None:
    value = {"a": (torch.ones(1), [torch.zeros(2), None]), "b": 3}
    found: list[tuple[str, Tensor]] = []
    tree = flatten(value, "x", found)
    assert [path for path, _ in found] == ["x.a.0", "x.a.1.0"]
    back = unflatten(tree, [tensor for _, tensor in found])
    assert back["b"] == 3 and back["a"][1][1] is None and isinstance(back["a"], tuple)
    with pytest.raises(UsageError, match="x is a set"):
        flatten({1}, "x", [])


class OnLevels(nn.Module):
    """A custom op without a derivative, and Python numbers for the sizes of levels."""

    def forward(self, x: Tensor, levels: list[tuple[int, int]]) -> Tensor:
        parts = x.split([height * width for height, width in levels], dim=1)
        return torch.cat([torch.ops.fxpass_levels.halved(part) for part in parts], dim=1)


def test_custom_ops_and_python_numbers_go_to_torchscript(tmp_path: Path) -> None:
    library = torch.library.Library("fxpass_levels", "DEF")
    library.define("halved(Tensor x) -> Tensor")
    library.impl("halved", lambda x: x / 2, "CompositeExplicitAutograd")
    torch.library.register_fake("fxpass_levels::halved", torch.empty_like, lib=library)
    x, levels = torch.randn(3, 10), [(2, 3), (1, 4)]
    passes = [LegalizeCustomOps(references={"fxpass_levels::halved": lambda x: x * 0.5})]
    optimized = fxpass.optimize(OnLevels(), example_inputs=(x, levels), passes=passes, target="torchscript")
    assert any("on cpu" in row.check for row in optimized.report.receipt.rows)
    optimized.save(tmp_path / "saved.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "saved.pt")(x[:1], levels), x[:1] / 2)
    with pytest.raises(ValueError, match=r"levels\.0\.0 is 2"):
        fxpass.optimize(OnLevels(), example_inputs=(x, levels), verify=False)(x, [(3, 2), (1, 4)])


def test_a_file_cannot_bring_code_by_the_name_of_a_parameter() -> None:
    data = {"parameters": [["x=print(1)", {"tensor": 0}]], "result": {"tensor": 0}, "paths": ["x"]}
    with pytest.raises(PackageError, match="not a name"):
        Signature.from_json(data)


class Parity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] % 2 else x


class Unequal(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y.mean(0) if x.shape[0] != y.shape[0] else x + y


class Few(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 / min(x.shape[0], 1000)


@pytest.mark.parametrize(("module", "told"), [(Parity(), "Mod"), (Unequal(), "Ne"), (Few(), "<= 1000")])
def test_a_branch_on_sizes_is_refused(module: nn.Module, told: str) -> None:
    inputs = [torch.rand(7, 3), torch.rand(5, 3)][: 1 + isinstance(module, Unequal)]
    with pytest.raises(CaptureError, match=f"something else at other sizes.*{told}"):
        fxpass.optimize(module, example_inputs=tuple(inputs))


class Masked(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        x = x if mask is None else x * mask
        return x if bias is None else x + bias


@pytest.mark.parametrize("target", ["eager", "torchscript"])
def test_arguments_keep_their_places(target: str) -> None:
    module, x, bias = Masked(), torch.rand(7, 3), torch.rand(7, 3)
    drop_in = fxpass.optimize(module, example_inputs=(x, None, bias), target=target, verify=False)
    for found in (drop_in(x, None, bias), drop_in(x, bias=bias)):
        assert torch.equal(found, x + bias)
    with pytest.raises(Exception, match="mask is given"):
        drop_in(x, bias)
    with pytest.raises(Exception, match="bias is left out"):
        drop_in(x)


class Typed(nn.Module):
    def forward(self, x: Tensor, k: Any = 0) -> Tensor:
        return x + (1.0 if k is False else 0.0)


def test_equal_constants_of_other_types_are_others() -> None:
    x = torch.rand(7, 3)
    drop_in = fxpass.optimize(Typed(), example_inputs=(x, False))
    assert torch.equal(drop_in(x, False), x + 1)
    for other in (0, 0.0, True, x[0, 0]):
        with pytest.raises(ValueError, match="k is False"):
            drop_in(x, other)


def test_parts_in_training_mode_are_told() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)).eval()
    module[0].train()
    drop_in = fxpass.optimize(module, example_inputs=(torch.rand(7, 3),))
    assert any("0 was in training mode" in warning for warning in drop_in.report.warnings)


def test_the_example_stays_as_it_was() -> None:
    x = torch.randn(7, 3)
    before = x.clone()
    drop_in = fxpass.optimize(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)), example_inputs=(x,))
    assert torch.equal(x, before) and drop_in.report.receipt.passed


class Narrow(nn.Module):
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return torch.zeros_like(x).scatter_add(0, index.unsqueeze(-1), x)


class Doubled(o3.Linear):
    def forward(self, features: Tensor) -> Tensor:
        return 2 * super().forward(features)


def test_what_only_looks_like_a_sum_by_rows_or_like_a_known_module() -> None:
    x, index = torch.rand(7, 3, dtype=torch.float64), torch.tensor([0, 0, 1, 2, 2, 5, 6])
    assert torch.equal(fxpass.optimize(Narrow(), example_inputs=(x, index))(x, index), Narrow()(x, index))
    module = Doubled("3x0e", "3x0e").double()
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):  # the code that e3nn 0.4.4 makes
        with pytest.raises(UnsupportedModelError, match="TorchScript"):
            fxpass.optimize(module, example_inputs=(x,), verify=False)
    else:
        drop_in = fxpass.optimize(module, example_inputs=(x,), verify=False)
        torch.testing.assert_close(drop_in(x), module(x))


def test_more_sizes_than_a_few_and_results_of_similar_names() -> None:
    class Many(nn.Module):
        def forward(self, xs: list[Tensor]) -> dict[str, Any]:
            return {"a": {"b": sum(x.sum(0) for x in xs)}, "a_b": xs[0] * 2}

    xs = [torch.rand(2 + k, 3) for k in range(13)]
    found = fxpass.optimize(Many(), example_inputs=(xs,))(xs)
    assert torch.equal(found["a_b"], xs[0] * 2) and found["a"]["b"].shape == (3,)


class Single(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.mm(x, torch.ones(3, 3))


def test_a_module_of_one_type_is_compared_in_it_and_told() -> None:
    report = fxpass.optimize(Single(), example_inputs=(torch.rand(7, 3),)).report
    assert report.receipt.passed and any("in its own type alone" in warning for warning in report.warnings)


class Filled(nn.Module):
    """Small numbers beside a fill value, and ones that are far larger."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        scores = (self.factor * x).masked_fill(x > 0.5, -1e9)
        return torch.cat([scores / 3**0.5, 1e7 * x, 1e-12 * self.factor * x], dim=1)


def judged(module: nn.Module, other: nn.Module, *inputs: Tensor) -> Receipt:
    """What the receipt of ``module`` would be, were ``other`` its drop-in."""
    example = read_example(module, inputs)
    judge = FunctionJudge(module, example, example.facts(module), EagerTarget())
    return judge.receipt(other, example.capture(other), judge.probes()[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fill_values_hide_no_error(dtype: torch.dtype) -> None:
    x = torch.rand(7, 5, dtype=dtype)
    assert judged(Filled(1.0), Filled(1.0), x).passed
    receipt = judged(Filled(1.0), Filled(1.0001), x)
    assert "values" in {row.check for row in receipt.failures}


class Cancels(nn.Module):
    """Zeros by symmetry, in an order of operations that ``turn`` chooses; and a threshold that a value is equal to."""

    def __init__(self, turn: bool = False) -> None:
        super().__init__()
        self.turn = turn

    def forward(self, x: Tensor) -> Tensor:
        large = 1e3 + x
        mean = large.flip(1).cumsum(1)[:, -1:] / 5 if self.turn else large.mean(1, keepdim=True)
        total = large.softmax(1).flip(1).cumsum(1)[:, -1:] if self.turn else large.softmax(1).sum(1, keepdim=True)
        product = (x.flip(1) * x).flip(1) if self.turn else x * x.flip(1)
        kept = x.masked_fill(x < x.topk(2).values[:, -1:], -torch.inf)
        rest = large - mean
        return torch.cat([rest, rest.sum(1, keepdim=True), total - 1, product - x.flip(1) * x, kept], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_cancels_raises_no_alarm(dtype: torch.dtype) -> None:
    receipt = judged(Cancels(), Cancels(turn=True), torch.rand(7, 5, dtype=dtype))
    assert receipt.passed, receipt.summary()


class Strict(nn.Module):
    """Takes what float32 holds alone, and so no noise."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.equal(x, x.float().to(x.dtype)):
            raise ValueError("not of float32")
        return 3.0 * x


class Tripled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x + x


def test_a_module_that_refuses_noise_is_held_to_its_largest_element() -> None:
    receipt = judged(Strict(), Tripled(), torch.rand(5, 3))
    assert receipt.passed
    assert all("largest element, as the original does not run with noise" in row.note for row in receipt.rows[:1])


class Incomplete(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.igamma(x, x)  # has no derivative by the first


class Cut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach() * 2


@pytest.mark.parametrize(("module", "told"), [(Incomplete(), "not implemented"), (Cut(), "cut from its inputs")])
def test_gradients_that_are_not_compared_are_told(module: nn.Module, told: str) -> None:
    report = fxpass.optimize(module, example_inputs=(torch.rand(5, 3),)).report
    assert {row.check for row in report.receipt.rows} == {"values"}
    assert any("gradients are not compared" in warning and told in warning for warning in report.warnings)


class Complex(nn.Module):
    def __init__(self, cut: bool = False) -> None:
        super().__init__()
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_complex(torch.stack([x.sin(), (2 * x).detach() if self.cut else 2 * x], dim=-1))


def test_gradients_of_complex_results_are_compared() -> None:
    x = torch.rand(5, 3)
    assert fxpass.optimize(Complex(), example_inputs=(x,)).report.receipt.passed
    receipt = judged(Complex(), Complex(cut=True), x)
    assert {row.check for row in receipt.failures} == {"gradient", "gradient in float64"}


class Root(nn.Module):
    """x, with a derivative that is NaN where the branch that nobody takes is differentiated as well."""

    def __init__(self, branch: bool = False) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > -1, x, (x - x).sqrt()) if self.branch else x * 1.0


def test_gradients_that_are_nan_fail() -> None:
    receipt = judged(Root(), Root(branch=True), torch.rand(5, 3))
    assert {row.check for row in receipt.failures} == {"gradient", "gradient in float64"}


class Writes(nn.Module):
    """Parts of tensors are written in the ways that models do it."""

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        table = torch.zeros(x.shape[0], 4, dtype=x.dtype)
        table[:, 0::2] = x[:, :2].sin()
        table[:, 1::2] = x[:, :2].cos()
        out = torch.empty_like(x)
        out[:, 0], out[:, 1:] = x[:, 2], x[:, :2]
        out[index] = x[index, :1]
        out[out > 0.9] = -1.0
        out[:, 1].mul_(table[:, 0])
        nn.functional.relu6(out.t()[2], inplace=True)
        return torch.cat([table, out], dim=1).clamp_(max=0.8)


@pytest.mark.parametrize("target", [pytest.param("torchscript", marks=LONGER), "native"])
def test_writes_into_parts_of_tensors(target: str) -> None:
    module, x, index = Writes(), torch.rand(7, 3), torch.tensor([0, 2, 5])
    drop_in = fxpass.optimize(module, example_inputs=(x, index), target=target)
    assert {"values", "gradient in float64"} <= {row.check for row in drop_in.report.receipt.rows}
    for count in (7, 9):
        x = torch.rand(count, 3)
        torch.testing.assert_close(drop_in(x, index), module(x, index))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x.sum(0))
        return x + self.total


class Diagonal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        part = (x * 2)[:, :2]
        return part.fill_diagonal_(0.0)


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (Counts(), r"writes to a buffer or weight of its own.*test_functions.py:\d+.*return the new value"),
        (Diagonal(), r"cannot be made functional.*test_functions.py:\d+.*torch\.where"),
    ],
)
def test_writes_that_cannot_be_are_refused_with_their_line(module: nn.Module, told: str) -> None:
    with pytest.raises(CaptureError, match=told):
        fxpass.optimize(module, example_inputs=(torch.rand(7, 3),))


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.linear.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Builtin(nn.Module):
    forward = torch.relu


class Chosen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nonzero(x > 0.5)


INDICES = torch.tensor([0, 1, 1, 0, 2, 1])


@pytest.mark.parametrize(
    ("module", "inputs", "error", "told"),
    [
        (Keeps(), (torch.rand(5, 3),), UnsupportedModelError, r"cannot be copied.*module path linear\.lock"),
        (Builtin(), (torch.rand(5, 3),), UsageError, "does not say which arguments"),
        (Chosen(), (torch.rand(5, 3),), CaptureError, r"size of result depends on values.*test_functions\.py:\d+"),
        (nn.Embedding(4, 3, max_norm=1.0), (INDICES,), UnsupportedModelError, "max_norm writes to its weight"),
        (nn.EmbeddingBag(4, 3), (INDICES, torch.tensor([0, 2])), UnsupportedModelError, "bag has offsets"),
    ],
)
def test_what_no_drop_in_can_hold_is_refused(
    module: nn.Module, inputs: tuple[Tensor, ...], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        fxpass.optimize(module, example_inputs=inputs)


class Late(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, data: Any = None, pair: Any = None) -> Tensor:
        return x * data["a"] + pair[0]


def test_dicts_and_lists_behind_a_default_cannot_be_left_out() -> None:
    x = torch.rand(5, 3)
    drop_in = fxpass.optimize(Late(), example_inputs=(x, None, {"a": x}, (x, x)), verify=False)
    assert torch.equal(drop_in(x, data={"a": x}, pair=[x, x]), x * x + x)
    with pytest.raises(ValueError, match="data is left out or no dict"):
        drop_in(x, pair=(x, x))
    with pytest.raises(ValueError, match="pair is left out or no list"):
        drop_in(x, data={"a": x})


class Indexed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("columns", torch.tensor([0, -1]))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return x[index][:, self.columns]


def test_negative_indices_count_from_the_end() -> None:
    x, index = torch.rand(7, 3), torch.tensor([0, -1, 3, -7, 2])
    drop_in = fxpass.optimize(Indexed(), example_inputs=(x, index), target="native")
    for count in (7, 9):
        x = torch.rand(count, 3)
        assert torch.equal(drop_in(x, index), Indexed()(x, index))
    drop_in = fxpass.optimize(Indexed(), example_inputs=(x, index.abs()), verify=False)
    with pytest.raises(ValueError, match="index holds indices from -7"):
        drop_in(x, index)


class Result(OrderedDict[str, Tensor]):
    pass


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Result:
        return Result(x=x.mul_(2.0))


def test_what_a_caller_may_miss_is_told() -> None:
    drop_in = fxpass.optimize(Scaled(), example_inputs=(torch.rand(7, 3),))
    told = " ".join(drop_in.report.warnings)
    assert "the module writes to its argument x" in told and "result, a Result, becomes a dict" in told
    x = torch.ones(2, 3)
    assert torch.equal(drop_in(x)["x"], 2 * x) and torch.equal(x, torch.ones(2, 3))


class Turned(nn.Module):
    """Its complex buffer would become real in float64."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("phases", factor * torch.polar(torch.ones(4), torch.arange(4.0)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * self.phases).flatten(-2)


def test_a_module_that_is_another_in_float64_is_compared_in_its_own_type() -> None:
    x = torch.rand(5, 8)
    report = fxpass.optimize(Turned(), example_inputs=(x,)).report
    assert any("in its own type alone" in warning for warning in report.warnings)
    assert not judged(Turned(), Turned(1.001), x).passed


class Template(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("template", torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.template.expand(x.shape[0], 3).clone()
        rows[:, 1:] -= x[:, 1:]
        return rows


def test_a_clone_of_a_buffer_can_be_written_to() -> None:
    module = Template()
    drop_in = fxpass.optimize(module, example_inputs=(torch.rand(7, 3),))
    x = torch.rand(4, 3)
    torch.testing.assert_close(drop_in(x), module(x))


class Halved(nn.Module):
    """Computes a part in half precision, and keeps something that it computes."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.shape[0]
        return x.bfloat16().float() * 2


def test_half_precision_inside_and_what_forward_keeps() -> None:
    report = fxpass.optimize(Halved(), example_inputs=(torch.rand(7, 3),)).report
    told = {row.check: row.note for row in report.receipt.rows}
    assert "not compared in float64" in told["gradient"] and "gradient in float64" not in told
    assert any("forward sets seen" in warning for warning in report.warnings)


class Partly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            mean = x.mean(0)
        return x - mean


def test_a_part_without_gradients_is_refused_for_them() -> None:
    with pytest.raises(VerificationError, match=r"gradient in float64.*x\.detach\(\) in forward"):
        fxpass.optimize(Partly(), example_inputs=(torch.rand(7, 3),))
