"""``fxpass::linear_by_species``: its reference, derivatives of any order, legal form and kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fxpass.errors import KernelError
from fxpass.ir.grouped import linear_by_species
from fxpass.ir.legalize import EXPAND
from fxpass.kernels.build import build, find_compiler
from fxpass.kernels.choice import Choice, choose

ROWS, SPECIES, INPUTS, OUTPUTS = 7, 3, 5, 4


def operands(dtype: torch.dtype = torch.float64, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, INPUTS, generator=generator, dtype=dtype)
    weight = torch.randn(SPECIES, INPUTS, OUTPUTS, generator=generator, dtype=dtype)
    return x, weight, torch.arange(rows) * 2 % SPECIES


def by_rows(x: Tensor, weight: Tensor, index: Tensor, transposed: bool) -> Tensor:
    own = weight[index].transpose(1, 2) if transposed else weight[index]
    return torch.bmm(x.unsqueeze(1), own).squeeze(1)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [0, 1, ROWS])
def test_each_row_meets_the_matrix_of_its_species(rows: int, transposed: bool) -> None:
    x, weight, index = operands(rows=rows)
    given = x @ weight[0] if transposed else x
    expected = by_rows(given, weight, index, transposed)
    torch.testing.assert_close(linear_by_species(given, weight, index, transposed), expected)
    torch.testing.assert_close(EXPAND[linear_by_species](given, weight, index, transposed), expected)


def test_derivatives_of_both_orders() -> None:
    x, weight, index = operands()
    inputs = (x.requires_grad_(), weight.requires_grad_())
    for transposed in (False, True):
        first = (x @ weight[0]).detach().requires_grad_() if transposed else inputs[0]
        function = partial(_of_floats, index=index, transposed=transposed)
        assert torch.autograd.gradcheck(function, (first, inputs[1]))
        assert torch.autograd.gradgradcheck(function, (first, inputs[1]))
    torch.library.opcheck(linear_by_species, (x.detach(), weight.detach(), index, False))


def _of_floats(x: Tensor, weight: Tensor, *, index: Tensor, transposed: bool) -> Tensor:
    return linear_by_species(x, weight, index, transposed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(0, 5, 4), (ROWS, 5, 4), (230, 19, 33), (13, 600, 1)])
def test_the_kernel_equals_the_reference(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> None:
    """Fewer and more rows than a chunk, columns than a panel, and more depth than one block of it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SPECIES, inputs, outputs, generator=generator, dtype=dtype)
    index = torch.randint(SPECIES - 1, (rows,), generator=generator)  # of the last species there is no row
    for transposed in (False, True):
        x = torch.randn(rows, outputs if transposed else inputs, generator=generator, dtype=dtype)
        given = (x, weight, index, transposed)
        expected = linear_by_species(*given)
        for constants in ({}, {1: weight}):
            run = kernel_of(given, constants)
            torch.testing.assert_close(run(*given), expected)
            assert torch.equal(on_threads(2, run, given), on_threads(1, run, given))


@pytest.mark.parametrize("wrong", [SPECIES, -1])
def test_a_species_that_there_is_not_is_refused(wrong: int) -> None:
    x, weight, index = operands()
    run = kernel_of((x, weight, index, False), {1: weight})
    with pytest.raises(KernelError, match="species of a row is not one of the weights'"):
        run(x, weight, torch.full_like(index, wrong), False)


def kernel_of(given: tuple[Any, ...], constants: dict[int, Tensor]) -> Callable[..., Tensor]:
    compiler = find_compiler()
    assert compiler is not None
    choice = choose(linear_by_species, given, constants)
    assert isinstance(choice, Choice)
    return choice.bind(build({choice.kernel.name: choice.kernel.source}, compiler)[choice.kernel.name])


def on_threads(count: int, run: Callable[..., Tensor], given: tuple[Any, ...]) -> Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return run(*given)
    finally:
        torch.set_num_threads(before)
