"""A model to differentiate: its programs, and the structures that they are evaluated on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import StructureError, UsageError
from ..frontends.base import Frontend
from ..ir.program import Program
from ..structures import Floats, Structure
from .motion import Motion
from .programs import Linear, products, tables

Apply = Callable[..., list[Tensor]]


class Differentiable:
    """What all kinds of derivatives of one model share; each is traced when it is first asked for, and kept."""

    def __init__(
        self,
        program: Program,
        frontend: Frontend,
        facts: Mapping[str, Any],
        *,
        dtype: torch.dtype | None = None,
        memory: int = 2**30,
    ) -> None:
        """
        Args:
            program: a forces program, with its semantic ops.
            frontend, facts: the family, and what its interface knows of the model.
            dtype: to compute derivatives in; float64 costs twice the time and leaves no rounding to speak of.
            memory: bytes that may be kept of a structure between directions; beyond, each direction starts anew.

        Raises:
            UsageError: the program has no forces, the memory is negative, or the type is none to compute in.
        """
        if program.stage != "forces":
            raise UsageError(f"derivatives need a program at stage forces, this one is at stage {program.stage}")
        if memory < 0:
            raise UsageError(f"derivatives cannot keep {memory} bytes")
        own = next(s.dtype for s in program.inputs if s.dtype.is_floating_point)
        if dtype not in (None, torch.float32, torch.float64):
            raise UsageError(f"derivatives in {dtype} would be noise", hint="torch.float64 or torch.float32")
        self.dtype = dtype or own
        self.memory = memory
        self._original = replace(program, samples=())
        self._program = self._original if self.dtype == own else self._original.cast(self.dtype)
        self._frontend, self._facts = frontend, {**facts, "assumptions": list(program.assumptions)}
        self._orders = tables(program)
        self._made: dict[tuple[str, Any], Linear] = {}
        self._gradient = _gradient(self._program)

    def _motion(self, structure: Structure) -> Motion:
        recorder = _Recorder(self._original)
        self._frontend.evaluate(self._frontend.interface(recorder, recorder, self._facts), structure)
        sample = recorder.taken
        cast = {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in sample.items()}
        return Motion.of(self._program, cast, len(structure))

    def _hessian_of(self, structure: Structure) -> tuple[Apply, Motion]:
        motion = self._motion(structure)
        return self._product(2).prepared(motion.inputs, self.memory), motion

    def _product(self, order: int) -> Linear:
        if ("product", order) not in self._made:
            lowest = min(self._orders, default=None)
            smooth = order if lowest is None else (lowest - 1) // 2  # so many derivatives are continuous
            names = {2: "second", 3: "third"}
            if smooth < order - 1:
                raise UsageError(
                    f"this model reads tables of order {lowest}: their {names[order]} derivatives are steps",
                    hint='passes="exact", or tabulate{order=5}',
                )
            if smooth < order:
                warnings.warn(
                    f"fxpass: this model reads tables of order {lowest}, whose {names[order]} derivatives jump from "
                    'cell to cell; passes="exact" has none' + (", tabulate{order=5} smooth ones" if order == 2 else ""),
                    stacklevel=4,
                )
            self._made["product", order] = products(self._program, order)
        return self._made["product", order]

    def _tensor(self, values: Floats) -> Tensor:
        return torch.from_numpy(values).to(self.dtype)


class _Recorder(nn.Module):
    """Stands in for both lowered programs: keeps the inputs that the family's interface gives it, and returns zeros."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.taken: dict[str, Tensor] = {}

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        self.taken = {spec.name: value.detach() for spec, value in zip(self.program.inputs, inputs, strict=True)}
        sizes: dict[int | str, int] = {}
        for spec in self.program.inputs:
            sizes.update(zip(spec.dims, self.taken[spec.name].shape, strict=True))
        return [
            torch.zeros([d if isinstance(d, int) else sizes[d] for d in spec.dims], dtype=spec.dtype)
            for spec in self.program.outputs
        ]


def _gradient(program: Program) -> Callable[[Motion], list[Tensor]]:
    """Runs a forces program: gradients by the inputs that it is differentiated by."""
    module, count = program.copy().graph_module, len(program.differentiated)

    def run(motion: Motion) -> list[Tensor]:
        with torch.no_grad():
            return list(module(*motion.inputs)[-count:])

    return run


def structure_of(given: Any) -> Structure:
    if isinstance(given, Structure):
        return given
    if hasattr(given, "get_positions"):
        return Structure.from_ase(given)
    raise UsageError(f"{type(given).__name__} is not a structure", hint="a Structure, or ASE atoms")


def volume_of(structure: Structure) -> float:
    if not all(structure.pbc):
        raise StructureError(f"{structure.name} is not periodic in all directions, so it has no volume")
    return structure.volume


def directions_of(given: Any, structure: Structure) -> Floats:
    """Displacements [k, atoms, 3], of one or more."""
    values = np.asarray(given, dtype=np.float64)
    if values.shape[-2:] != (len(structure), 3) or values.ndim not in (2, 3) or not np.isfinite(values).all():
        what = f"displacements {list(values.shape)}" + ("" if np.isfinite(values).all() else " that are not finite")
        raise UsageError(f"{what} do not move the {len(structure)} atoms of {structure.name}", hint="[atoms, 3]")
    return values.reshape(-1, len(structure), 3)


def direction_of(given: Any, structure: Structure) -> Floats:
    """One displacement [atoms, 3]."""
    if np.ndim(given) != 2:
        raise UsageError(f"displacements {list(np.shape(given))} are not one of atoms", hint="[atoms, 3]")
    return directions_of(given, structure)[0]


def to_numpy(values: Tensor) -> Floats:
    return values.detach().to(torch.float64).numpy()
