"""legalize: semantic ops become ATen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxpass.ir.legalize import legalize, semantic_nodes
from fxpass.ir.metadata import provenance
from fxpass.ir.ops import SEMANTIC
from fxpass.ir.program import Program
from fxpass.passes import Application, Exactness, Outcome, Pass


@dataclass(frozen=True)
class Legalize(Pass):
    """Replace every semantic op by its reference implementation in ATen, so that any target can carry the graph.

    Before / After:

        y = linear(x, w, "32x0e|16x0e")     y = mm(x, mul(view(w, [32, 16]), 0.176...))

    Holds when: always; the reference implementation defines the op.

    Keeps: values bit for bit with the op's eager execution, which is the same reference.
    """

    name: ClassVar[str] = "legalize"
    exactness: ClassVar[Exactness] = Exactness.EXACT

    def apply(self, program: Program) -> Outcome:
        nodes = semantic_nodes(program)
        if not nodes:
            return Outcome(program, modified=False)
        fired = tuple(
            Application(SEMANTIC[n.target].name, n.name, provenance(n).module, removed=1)  # type: ignore[index]
            for n in nodes
        )
        return Outcome(legalize(program, made_by=self.name), modified=True, applications=fired)
