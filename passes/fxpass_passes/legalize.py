"""legalize: semantic ops become ATen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fxpass.errors import UsageError
from fxpass.ir.legalize import legalize, semantic_nodes
from fxpass.ir.metadata import provenance
from fxpass.ir.ops import SEMANTIC
from fxpass.ir.program import Program
from fxpass.kernels.choice import refusal
from fxpass.passes import Application, Exactness, Outcome, Pass


@dataclass(frozen=True)
class Legalize(Pass):
    """Replace every semantic op by its reference implementation in ATen, so that any target can carry the graph.

    Before / After:

        y = linear(x, w, "32x0e|16x0e")     y = mm(x, mul(view(w, [32, 16]), 0.176...))

    Holds when: always; the reference implementation defines the op.

    Keeps: values bit for bit with the op's eager execution, which is the same reference.

    Attributes:
        keep: names of semantic ops that stay because the target carries them: ``legalize{keep=[linear,convolution]}``.
        kernels: calls that a generated kernel takes stay too.
    """

    name: ClassVar[str] = "legalize"
    exactness: ClassVar[Exactness] = Exactness.EXACT

    keep: tuple[str, ...] = ()
    kernels: bool = False

    def __post_init__(self) -> None:
        known = sorted(op.name for op in SEMANTIC.values())
        if unknown := [name for name in self.keep if name not in known]:
            raise UsageError(f"there is no semantic op {unknown[0]!r}", hint=f"one of {', '.join(known)}")

    def apply(self, program: Program) -> Outcome:
        nodes = semantic_nodes(program, self.keeps)
        if not nodes:
            return Outcome(program, modified=False)
        fired = tuple(
            Application(SEMANTIC[n.target].name, n.name, provenance(n).module, removed=1)  # type: ignore[index]
            for n in nodes
        )
        return Outcome(legalize(program, self.name, self.keeps), modified=True, applications=fired)

    def keeps(self, op: Any, args: Sequence[Any]) -> bool:
        """Whether a call stays."""
        return SEMANTIC[op].name in self.keep or (self.kernels and refusal(op, args) is None)
