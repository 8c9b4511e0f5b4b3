"""``fxpass::linear_by_species``: its reference, derivatives of any order, legal form and kernel."""

from __future__ import annotations

from functools import partial

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
def test_the_kernel_equals_the_reference(dtype: torch.dtype) -> None:
    compiler = find_compiler()
    assert compiler is not None
    x, weight, index = operands(dtype)
    for transposed in (False, True):
        given = (x @ weight[0] if transposed else x, weight, index, transposed)
        choice = choose(linear_by_species, given, {})
        assert isinstance(choice, Choice)
        run = choice.bind(build({choice.kernel.name: choice.kernel.source}, compiler)[choice.kernel.name])
        torch.testing.assert_close(run(*given), linear_by_species(*given))
        with pytest.raises(KernelError, match="the species of a row is not below 3"):
            run(given[0], weight, index + 2, transposed)
