"""Triton kernels on a CUDA device: right on any stream and device, in grids and tensors that need wide numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fxpass
from fxpass.algebra.multilinear import Path as Coupling
from fxpass.algebra.multilinear import TensorProduct
from fxpass.ir import ops
from fxpass.ir.convolution import convolution, rows_by
from fxpass.kernels.convolution import ConvolutionKernel
from fxpass.kernels.linear import LinearKernel
from fxpass.kernels.triton_convolution import TritonConvolution
from fxpass.kernels.triton_launch import bind, function
from fxpass.kernels.triton_linear import TritonLinear
from fxpass.kernels.triton_printer import Config
from fxpass.kernels.triton_report import Named, harmonics, linear, mace
from fxpass.kernels.triton_tune import Tuner, cuda_device
from fxpass.models import collate, small_potential
from fxpass.structures import probe_structures
from triton_interpreter import Case, cases, relative

pytestmark = [pytest.mark.once, pytest.mark.triton, pytest.mark.gpu]

ROUNDING = {"float64": 1e-12, "float32": 4e-6, "bfloat16": 1.01 * 2.0**-8}
GIB = 2**30


def free(gibibytes: float) -> bool:
    return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > gibibytes * GIB


def scalars(channels: int) -> TensorProduct:
    paths = (Coupling(0, 0, 0, "uvu", 0, 1.0),)
    return TensorProduct(f"{channels}x0e", "1x0e", f"{channels}x0e", paths, channels, shared=False)


def convolved(channels: int, x: Tensor, sender: Tensor, receiver: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The kernel's sum of x times two numbers that are one, and the float64 op's."""
    tp, edges = scalars(channels), sender.shape[0]
    y, radial = x.new_ones((edges, 1)), x.new_ones((edges, channels))
    order = rows_by(receiver, size)
    run = bind(TritonConvolution(ConvolutionKernel(tp, None, "float32")))
    found = run(x, y, radial, None, None, sender, receiver, order, size)
    used, local = torch.unique(sender, return_inverse=True)  # a copy of all of x may not fit
    wide = (x[used].double(), y.double(), radial.double(), None, None, local, receiver, order, size)
    return found, convolution(*wide, str(tp), "")


@pytest.mark.parametrize("case", sorted(cases(), key=str), ids=str)
def test_the_device_agrees_with_the_op(case: Case) -> None:
    errors = case.errors("cuda")
    assert errors and max(errors) <= ROUNDING[case.dtype]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_kernel_of_a_realistic_model_has_a_configuration_that_fits(dtype: str) -> None:
    from triton.runtime.errors import OutOfResources

    for named in mace(64, dtype):
        fits = 0
        for config in named.printed.configs:
            try:
                launch_on_zeros(named, config)
            except OutOfResources:
                continue
            fits += 1
        assert fits, named.what


def launch_on_zeros(named: Named, config: Config) -> None:
    """One program on operands of zeros that are long enough for it."""
    printed = named.printed
    made = {"number": getattr(torch, printed.storage), "wide": getattr(torch, printed.dtype), "index": torch.int64}
    operands: list[Any] = []
    for argument in printed.arguments:
        if argument.kind == "size":
            operands.append(1)
        elif argument.kind != "block":
            zeros = torch.zeros(2**20, dtype=made[argument.kind], device="cuda")
            operands.append(None if argument.name in named.without else zeros)
    function(printed)[1,](*operands, **dict(config.blocks), num_warps=config.warps)
    torch.cuda.synchronize()


def test_a_kernel_runs_after_what_is_before_it_on_its_stream() -> None:
    printed = harmonics("float32", gradient=False)
    run, stream = bind(printed), torch.cuda.Stream()
    x = torch.zeros(1000, 1, 3, device="cuda")
    wanted = run(torch.ones_like(x))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        busy = torch.ones(4096, 4096, device="cuda")
        for _ in range(20):
            busy = busy @ busy * 1e-4
        x += 1.0 + 0.0 * busy[0, 0].nan_to_num(0.0, 0.0, 0.0)
        found = run(x)
    stream.synchronize()
    torch.testing.assert_close(found, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_a_kernel_runs_where_its_operands_are() -> None:
    run = bind(harmonics("float32", gradient=False))
    x = torch.ones(10, 1, 3)
    with torch.cuda.device(0):
        found = [run(x.to(f"cuda:{k}")) for k in (0, 1)]
    assert [t.device.index for t in found] == [0, 1]
    torch.testing.assert_close(found[0].cpu(), found[1].cpu())


def test_more_atoms_than_a_second_axis_of_a_grid_has() -> None:
    size, generator = 70_001, torch.Generator().manual_seed(0)
    x = torch.randn(size, 8, generator=generator).cuda()
    sender, receiver = (torch.randint(size, (200_000,), generator=generator).cuda() for _ in range(2))
    assert relative(*convolved(8, x, sender, receiver, size)) <= ROUNDING["float32"]
    rows = 65_537 * 256
    vectors = torch.randn(rows, 1, 3, generator=generator).cuda()
    found = bind(harmonics("float32", gradient=False))(vectors)
    assert relative(found[-1000:], harmonics_of(vectors[-1000:])) <= ROUNDING["float32"]
    lin = linear("4x0e", "4x0e")
    printed = TritonLinear(LinearKernel(lin, torch.float32, "out"))
    weight, many = torch.randn(16, generator=generator).cuda(), torch.randn(65_540 * 64, 4, generator=generator).cuda()
    expected = ops.linear(many[-1000:].double(), weight.double(), None, str(lin), "out")
    assert relative(bind(printed)(many, printed.pack(weight))[-1000:], expected) <= ROUNDING["float32"]


def harmonics_of(vectors: Tensor) -> Tensor:
    kernel = harmonics("float64", gradient=False).kernel
    table = torch.tensor(kernel.coefficients, dtype=torch.float64, device=vectors.device).unsqueeze(1)
    return ops.polynomial(vectors.double(), [], None, None, table, str(kernel.polynomial), "out")


@pytest.mark.slow
@pytest.mark.skipif(not free(12), reason="needs 12 GiB of a CUDA device")
def test_tensors_of_more_numbers_than_32_bits_count() -> None:
    vectors = torch.ones(2**27 + 1000, 1, 3, device="cuda")
    found = bind(harmonics("float32", gradient=False))(vectors)
    assert found.numel() > 2**31
    assert relative(found[-1000:], harmonics_of(vectors[-1000:])) <= ROUNDING["float32"]
    del found, vectors
    channels = 1024
    x = torch.empty(2**21 + 3, channels, device="cuda")
    x[-1] = torch.arange(channels)
    last = torch.tensor([len(x) - 1], device="cuda")
    assert relative(*convolved(channels, x, last, torch.zeros_like(last), 1)) == 0.0


def test_a_configuration_is_chosen_by_measuring_and_kept(tmp_path: Path) -> None:
    printed, tuner = harmonics("float32", gradient=True), Tuner(tmp_path)
    x, g = (torch.randn(100_000, 1, n, device="cuda") for n in (3, 16))
    torch.testing.assert_close(bind(printed, tuner)(x, g), bind(printed)(x, g))
    (file,) = tmp_path.iterdir()
    name = cuda_device(x.device).name
    assert file.name.startswith("triton-") and all(word in file.name for word in name.split()[:1])
    row = json.loads(file.read_text())[printed.name]
    assert 0 < row["seconds"] < 1
    again = Tuner(tmp_path, measure=never)
    torch.testing.assert_close(bind(printed, again)(x, g), bind(printed)(x, g))


def never(call: Any) -> float:
    raise AssertionError("what was kept is measured again")


def test_nothing_is_measured_while_a_graph_is_recorded(tmp_path: Path) -> None:
    printed = harmonics("float32", gradient=False)
    run = bind(printed, Tuner(tmp_path, measure=never))
    x = torch.ones(100_000, 1, 3, device="cuda")
    expected = bind(printed)(x)  # compiled before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(x)
    graph.replay()
    torch.testing.assert_close(found, expected)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def optimized() -> fxpass.Optimized:
    return fxpass.optimize(small_potential(torch.float64), "exact", target="triton", verify=False)


def test_the_target_runs_a_model_in_kernels(optimized: fxpass.Optimized) -> None:
    model = small_potential(torch.float64)
    assert optimized.manifest and all(row.kernel and not row.reason for row in optimized.manifest)
    for structure in probe_structures(optimized.facts["numbers"], optimized.facts["cutoff"]):
        found, expected = (optimized.frontend.evaluate(each, structure) for each in (optimized, model))
        assert abs(found.energy - expected.energy) < 1e-9 * max(len(structure), 1)
        np.testing.assert_allclose(found.forces, expected.forces, rtol=0, atol=1e-9)


def test_results_of_the_target_are_where_its_inputs_were() -> None:
    optimized = fxpass.optimize(small_potential(torch.float64), "exact", target="triton", verify=False)
    numbers, cutoff = tuple(optimized.facts["numbers"]), optimized.facts["cutoff"]
    data = collate(probe_structures(numbers, cutoff)[1:2], numbers, cutoff, torch.float64)
    here = optimized(data)["forces"]
    optimized.interface.to("cuda")
    there = optimized({name: t.cuda() for name, t in data.items()})["forces"]
    assert here.device.type == "cpu" and there.device.type == "cuda"
    torch.testing.assert_close(here, there.cpu(), rtol=0, atol=1e-9)


def test_the_target_has_derivatives(optimized: fxpass.Optimized) -> None:
    numbers, cutoff = tuple(optimized.facts["numbers"]), optimized.facts["cutoff"]
    found = []
    for each in (optimized, small_potential(torch.float64)):
        data = collate(probe_structures(numbers, cutoff)[1:2], numbers, cutoff, torch.float64)
        data["positions"].requires_grad_()
        forces = each(data, training=True)["forces"]
        found.append(torch.autograd.grad(forces.square().sum(), data["positions"])[0])
    torch.testing.assert_close(*found, rtol=0, atol=1e-8)
