"""What a frontend is: the one place where a model family is known.

A frontend maps a family's own inputs to the canonical ones (edge vectors, edge index, species,
batch, heads) and the canonical outputs back; it makes its own probe structures; it knows nothing of
passes or targets.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..capture.capture import copy_model
from ..capture.rules import qualified
from ..ir.program import Program
from ..structures import Evaluation, Neighbours, Structure, neighbour_list

#: runs a lowered program: canonical inputs by name -> outputs by name
Runner = Callable[..., tuple[Tensor, ...]]

#: classes, by qualified name, that compute in float64 in a model of any dtype
PRECISE = ("nequip.nn.atomwise.PerTypeScaleShift",)


class Frontend(Protocol):
    """One model family.

    Class attributes:
        name: the family's name, as registered in the entry-point group ``fxpass.frontends``.
        extra: the pip extra that brings the family's package, e.g. ``"mace"``.
        tested: versions of the family's package that are tested, for ``fxpass doctor``.
        names: in lower case, of models that the package brings with it and ``load`` takes; may be left out.
    """

    name: ClassVar[str]
    extra: ClassVar[str]
    tested: ClassVar[tuple[str, ...]]

    @abstractmethod
    def recognises(self, model: nn.Module) -> bool:
        """Whether ``model`` is of this family, judged by class names alone (the package may be absent)."""

    @abstractmethod
    def reads(self, path: str) -> bool:
        """Whether the file looks like a checkpoint of this family; nothing in it is run."""

    @abstractmethod
    def load(self, path: str) -> nn.Module:
        """Load a checkpoint of this family.

        Raises:
            MissingExtraError: the family's package is not installed.
            UnsupportedModelError: the file is not a checkpoint of this family.
        """

    @abstractmethod
    def check(self, model: nn.Module) -> None:
        """Refuse, by name, a variant that is not covered, before any work is done.

        Raises:
            UnsupportedModelError: names the module's path and class.
        """

    @abstractmethod
    def reference(self, model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
        """What a result is compared with: a copy of ``model``, and what the user must be told about it.

        It is the model itself unless the model's own forces are not the gradient of its energy; then it is
        the model with the cause mended, and the second value says so.
        """

    @abstractmethod
    def capture(self, model: nn.Module) -> Program:
        """The energy program of ``model``, in the model's dtype."""

    @abstractmethod
    def attributes(self, model: nn.Module) -> dict[str, Any]:
        """What the drop-in needs to know of the model, JSON-able: species, cutoff (Angstrom), heads, ..."""

    @abstractmethod
    def interface(self, energy: nn.Module, forces: nn.Module, attributes: Mapping[str, Any]) -> nn.Module:
        """The drop-in: a module with the family's own ``forward`` over two lowered programs."""

    @abstractmethod
    def evaluate(
        self, model: nn.Module, structure: Structure, neighbours: Neighbours = neighbour_list
    ) -> Evaluation:
        """Energy (eV), forces (eV/Angstrom), stress (eV/Angstrom^3) by ``model`` or by its drop-in.

        Args:
            model: the original or its drop-in.
            structure: one that passes ``Structure.check``.
            neighbours: what makes the neighbour list; also asked for atoms at the same place.
        """


def converted(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of ``model`` that computes in ``dtype``.

    ``Module.to`` casts weights alone; modules that keep the type they compute in as an attribute are told the new one.
    Those in ``PRECISE`` stay as they are.
    """
    replica = copy_model(model).to(dtype)
    for path, module in replica.named_modules():
        if qualified(type(module)) in PRECISE:
            module.double().load_state_dict(model.get_submodule(path).state_dict())
            continue
        for name, value in vars(module).items():
            if isinstance(value, torch.dtype) and value.is_floating_point:
                setattr(module, name, dtype)
    return replica


def dtype_of(model: nn.Module) -> torch.dtype:
    """Floating dtype of a model's weights."""
    return next(t.dtype for t in chain(model.parameters(), model.buffers()) if t.is_floating_point())
